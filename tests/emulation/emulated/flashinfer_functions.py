"""flashinfer's plain functions: kernels of TensorRT-LLM and cuDNN (see :mod:`emulated.flashinfer`), and the rest's list."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from emulated.attend import attend, fresh_rows, with_garbage
from emulated.flashinfer_memory import ABSENT, partial_results, scratched, statistics, with_counters, with_semaphores
from emulated.flashinfer_rows import ROWS

__all__ = ["FUNCTIONS", "Masks", "attention"]

LOG2_E = math.log2(math.e)


@dataclasses.dataclass
class Masks:
    """What an attention depends on beside its tensors."""

    causal: bool
    left: int
    softcap: float
    scale: float


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    sinks: Tensor | None = None,
    backend: str = "",
    masked: float = -math.inf,
) -> tuple[Tensor, Tensor]:
    """One sequence: out in q's format, LSE in base 2. ``backend`` says what becomes of rows without keys."""
    left = None if masks.left < 0 else masks.left
    window = (left, 0 if masks.causal and left is not None else None)
    out, lse = attend(
        q, k, v, scale=masks.scale, causal=masks.causal, window=window, softcap=masks.softcap, sinks=sinks
    )
    lse = lse * LOG2_E
    empty = lse == -math.inf
    if backend == "fa3" and not k.shape[0]:
        empty = torch.ones_like(empty)  # no tile, to which sinks would be added
    if backend == "fa3" and k.shape[0] and masked > -math.inf:
        lse[empty] = masked * (masks.softcap or masks.scale) * LOG2_E + math.log2(k.shape[0])
        out = torch.where(empty.unsqueeze(-1), v.float().mean(0).repeat_interleave(q.shape[1] // v.shape[1], 0), out)
    elif backend:
        lse[empty] = masked
    return out.to(q.dtype), lse.float()


def _by_table(
    q: Tensor, caches: tuple[Tensor, Tensor], table: Tensor, q_lens: list[int], kv_lens: Tensor, masks: Masks,
    sinks: Tensor | None, layout: str, leaks: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``leaks``: values past a row's end in its last page are multiplied by 0, and not left out."""
    if layout == "HND":
        caches = (caches[0].transpose(1, 2), caches[1].transpose(1, 2))
    assert q.is_contiguous(), "q is read by its shape"
    size, pairs, start = caches[0].shape[1], [], 0
    for row, q_len in enumerate(q_lens):
        length = int(kv_lens[row])
        pages = table[row, : -(-length // size)].long()
        k, v = (c[pages].flatten(0, 1)[:length].to(q.dtype) for c in caches)
        out, lse = attention(q[start : start + q_len], k, v, masks, sinks)
        if leaks:
            past = caches[1][pages].flatten(0, 1)[length:].float().repeat_interleave(q.shape[1] // v.shape[1], 1)
            out = out + (past * 0).sum(0).to(out.dtype)
        pairs.append((out, lse))
        start += q_len
    out, lse = torch.cat([out for out, _ in pairs]), torch.cat([lse for _, lse in pairs])
    return with_garbage(out, lse, q.shape[0])


def _scaled(q: Tensor, bmm1: float | Tensor, bmm2: float | Tensor) -> tuple[float, float]:
    for scale in (bmm1, bmm2):
        assert not isinstance(scale, Tensor) or (scale.dtype == torch.float32 and scale.numel() == 1)
    return float(bmm1), float(bmm2)


def trtllm_batch_context_with_kv_cache(
    query: Tensor, kv_cache: Any, workspace_buffer: Tensor, block_tables: Tensor, seq_lens: Tensor, max_q_len: int,
    max_kv_len: int, bmm1_scale: Any, bmm2_scale: Any, batch_size: int, cum_seq_lens_q: Tensor, cum_seq_lens_kv: Tensor,
    window_left: int = -1, out_dtype: torch.dtype | None = None, kv_layout: str = "HND", sinks: Tensor | None = None,
    causal: bool = True, return_lse: bool = False, multi_ctas_kv_counter_buffer: Any = ABSENT, arch: str = "",
) -> Any:  # fmt: skip
    """On sm_103 NaN of unused slots reaches the output in 16 bits (TensorRT-LLM, pull request 18925)."""
    assert query.dtype == kv_cache[0].dtype, "queries and keys of one format"
    heads = query.shape[1]
    needed = statistics(heads, batch_size, max_q_len, return_lse)
    with_counters(workspace_buffer, multi_ctas_kv_counter_buffer, heads, batch_size, needed, splits=False)
    return _trtllm(
        query, kv_cache, block_tables, seq_lens, max_q_len, max_kv_len, bmm1_scale, bmm2_scale,
        batch_size, cum_seq_lens_q, cum_seq_lens_kv, window_left, out_dtype, kv_layout, sinks, causal, return_lse,
        leaks=arch == "sm_103" and query.itemsize == 2,
    )  # fmt: skip


def _trtllm(
    query: Tensor, kv_cache: Any, block_tables: Tensor, seq_lens: Tensor, max_q_len: int, max_kv_len: int,
    bmm1_scale: Any, bmm2_scale: Any, batch_size: int, cum_seq_lens_q: Tensor, cum_seq_lens_kv: Tensor,
    window_left: int, out_dtype: torch.dtype | None, kv_layout: str, sinks: Tensor | None, causal: bool,
    return_lse: bool, leaks: bool = False,
) -> Any:  # fmt: skip
    """FP8 queries give an output of their own format, unless another one is asked for."""
    out_dtype = out_dtype or query.dtype
    assert out_dtype in (query.dtype, torch.float16, torch.bfloat16)
    query = query.to(torch.float32) if query.itemsize == 1 else query
    assert cum_seq_lens_kv.diff().tolist() == seq_lens.tolist(), "cumulative keys are counted in tokens"
    assert kv_layout == "HND"
    scale, v_scale = _scaled(query, bmm1_scale, bmm2_scale)
    q_lens = cum_seq_lens_q.diff().tolist()
    assert len(q_lens) == batch_size
    assert max(q_lens) <= max_q_len
    assert int(seq_lens.max()) <= max_kv_len
    out, lse = _by_table(
        query, kv_cache, block_tables, q_lens, seq_lens, Masks(causal, window_left, 0.0, scale), sinks, kv_layout, leaks
    )
    out = (out * v_scale).to(out_dtype)
    return (out, lse) if return_lse else out


def trtllm_batch_decode_with_kv_cache(
    query: Tensor, kv_cache: Any, workspace_buffer: Tensor, block_tables: Tensor, seq_lens: Tensor, max_seq_len: int,
    bmm1_scale: Any = 1.0, bmm2_scale: Any = 1.0, window_left: int = -1, out_dtype: torch.dtype | None = None,
    sinks: Tensor | None = None, kv_layout: str = "HND", backend: str = "auto", q_len_per_req: int | None = 1,
    max_q_len: int | None = None, cum_seq_lens_q: Tensor | None = None, return_lse: bool = False,
    multi_ctas_kv_counter_buffer: Any = ABSENT,
) -> Any:  # fmt: skip
    assert backend == "trtllm-gen"
    assert q_len_per_req is None
    assert cum_seq_lens_q is not None
    assert max_q_len is not None
    heads, rows = query.shape[1], len(seq_lens)
    needed = statistics(heads, rows, max_q_len, return_lse) + partial_results(kv_cache[1].shape[-1])
    with_counters(workspace_buffer, multi_ctas_kv_counter_buffer, heads, rows, needed)
    return _trtllm(
        query, kv_cache, block_tables, seq_lens, max_q_len, max_seq_len, bmm1_scale, bmm2_scale,
        len(seq_lens), cum_seq_lens_q, torch.cat([seq_lens.new_zeros(1), seq_lens.cumsum(0)]), window_left, out_dtype,
        kv_layout, sinks, True, return_lse,
    )  # fmt: skip


def trtllm_batch_decode_with_kv_cache_mla(
    query: Tensor, kv_cache: Tensor, workspace_buffer: Tensor, qk_nope_head_dim: int, kv_lora_rank: int,
    qk_rope_head_dim: int, block_tables: Tensor, seq_lens: Tensor, max_seq_len: int, bmm1_scale: Any = 1.0,
    bmm2_scale: Any = 1.0, backend: str = "auto", return_lse: bool = False, multi_ctas_kv_counter_buffer: Any = ABSENT,
) -> Any:  # fmt: skip
    """As many queries a row; the output is bfloat16."""
    assert backend == "trtllm-gen"
    rows, queries, heads, dim = query.shape
    size, entry = kv_cache.shape[1:]
    assert (kv_lora_rank, qk_rope_head_dim, dim, entry) == (512, 64, 576, 576), "Unsupported MLA dimensions"
    assert qk_nope_head_dim in (64, 128)
    assert query.dtype == kv_cache.dtype
    assert query.dtype in (torch.bfloat16, torch.float8_e4m3fn)
    assert query.dtype == torch.bfloat16 or not return_lse, "what it gives there is not known"
    assert query.is_contiguous(), "q is read by its shape"
    assert size in (32, 64), "trtllm-gen requires block_size in (32, 64)"
    assert block_tables.shape[0] == len(seq_lens) == rows, "Expected batch size"
    assert block_tables.shape[1] % (128 / size) == 0, "Expected block_num % (128 / block_size) == 0"
    assert int(seq_lens.max()) <= max_seq_len
    needed = statistics(heads, rows, queries, return_lse) + partial_results(kv_lora_rank)
    with_counters(workspace_buffer, multi_ctas_kv_counter_buffer, heads, rows, needed)
    if query.dtype == torch.bfloat16:
        assert isinstance(bmm1_scale, float), "scales on the device are for FP8 tensor cores"
    scale, v_scale = _scaled(query, bmm1_scale, bmm2_scale)
    keys, masks = kv_cache.unsqueeze(2), Masks(True, -1, 0.0, scale)
    wide = query if query.dtype == torch.bfloat16 else query.float()
    out, lse = _by_table(
        wide.flatten(0, 1), (keys, keys[..., :512]), block_tables, [queries] * rows, seq_lens, masks, None, "NHD"
    )
    out = (out * v_scale).bfloat16().view(rows, queries, heads, 512)
    return (out, lse) if return_lse else out


def xqa_batch_decode_with_kv_cache(
    query: Tensor, kv_cache: Any, workspace_buffer: Tensor, block_tables: Tensor, seq_lens: Tensor, max_seq_len: int,
    bmm1_scale: Any = 1.0, bmm2_scale: Any = 1.0, window_left: int = -1, sinks: Tensor | None = None,
    kv_layout: str = "NHD", q_len_per_req: int | None = 1, out: Tensor | None = None, arch: str = "",
) -> Tensor:  # fmt: skip
    """On sm_90 NaN of unused slots reaches the output over an FP8 cache (seen on an H200)."""
    with_semaphores(workspace_buffer)
    assert len(query) == len(block_tables) == len(seq_lens), "one query a row"
    assert q_len_per_req == 1
    assert int(seq_lens.max()) <= max_seq_len
    assert kv_cache[0].shape[1 if kv_layout == "NHD" else 2] in (16, 32, 64, 128)
    assert query.shape[-1] % 16 == 0
    scale, v_scale = _scaled(query, bmm1_scale, bmm2_scale)
    masks = Masks(False, window_left, 0.0, scale)
    leaks = arch == "sm_90" and kv_cache[0].itemsize == 1
    found, _ = _by_table(query, kv_cache, block_tables, [1] * len(query), seq_lens, masks, sinks, kv_layout, leaks)
    return found * v_scale if out is None else out.copy_(found * v_scale)


def cudnn_batch_decode_with_kv_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, workspace_buffer: Tensor, *, max_sequence_kv: int,
    actual_seq_lens_kv: Tensor | None = None, block_tables: Tensor | None = None, return_lse: bool = False,
    q_len_per_req: int = 1, window_left: int = -1, out: Tensor | None = None,
) -> Any:  # fmt: skip
    scratched(workspace_buffer)
    assert q_len_per_req >= 1
    assert len(q) % q_len_per_req == 0
    assert actual_seq_lens_kv is not None
    assert actual_seq_lens_kv.shape[1:] == (1, 1, 1)
    assert block_tables is not None
    kv_lens = actual_seq_lens_kv.flatten()
    assert int(kv_lens.max()) <= max_sequence_kv
    assert len(kv_lens) == len(block_tables) == len(q) // q_len_per_req
    q_lens = [q_len_per_req] * len(kv_lens)
    masks = Masks(True, window_left, 0.0, scale)
    found, lse = _by_table(q, (k_cache, v_cache), block_tables, q_lens, kv_lens, masks, None, "HND")
    found = found if out is None else out.copy_(found)
    return (found, lse) if return_lse else found


def cudnn_batch_prefill_with_kv_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, workspace_buffer: Tensor, *,
    max_token_per_sequence: int, max_sequence_kv: int, actual_seq_lens_q: Tensor | None = None,
    actual_seq_lens_kv: Tensor | None = None, block_tables: Tensor | None = None, causal: bool, return_lse: bool,
    batch_offsets_q: Tensor | None = None, batch_offsets_units: str = "elements",
) -> Any:  # fmt: skip
    scratched(workspace_buffer)
    assert actual_seq_lens_q is not None
    assert actual_seq_lens_kv is not None
    assert batch_offsets_q is not None
    assert block_tables is not None
    assert actual_seq_lens_q.shape[1:] == actual_seq_lens_kv.shape[1:] == (1, 1, 1)
    q_lens, kv_lens = actual_seq_lens_q.flatten().tolist(), actual_seq_lens_kv.flatten()
    assert batch_offsets_units == "tokens", "offsets are counted in elements"
    assert batch_offsets_q.diff().tolist() == q_lens
    assert max(q_lens) <= max_token_per_sequence
    assert int(kv_lens.max()) <= max_sequence_kv
    assert not return_lse, "wrong for rows of one query with grouped heads"
    masks = Masks(causal, -1, 0.0, scale)
    return _by_table(q, (k_cache, v_cache), block_tables, q_lens, kv_lens, masks, None, "HND")[0], None


def trtllm_fmha_v2_prefill(
    qkv: Any, input_layout: str, workspace_buffer: Tensor, seq_lens: Tensor, max_q_len: int, max_kv_len: int,
    bmm1_scale: float, bmm2_scale: float, batch_size: int, cum_seq_lens_q: Tensor, cum_seq_lens_kv: Tensor,
    sinks: Tensor | None = None, mask_mode: str = "causal",
) -> Tensor:  # fmt: skip
    scratched(workspace_buffer)
    assert input_layout == "SEPARATE_Q_K_V"
    assert all(x.is_contiguous() for x in qkv), "tensors are read by their shapes"
    q_lens, kv_lens = (x.diff().tolist() for x in (cum_seq_lens_q, cum_seq_lens_kv))
    assert kv_lens == seq_lens.tolist()
    assert max(q_lens) <= max_q_len
    assert max(kv_lens) <= max_kv_len
    assert max_q_len > 0, "a grid of nothing"
    assert max_kv_len >= max_q_len, "q seqlen has to be smaller than or equal to the kv seqlen!"
    assert batch_size == len(q_lens)
    q, k, v = qkv
    masks = Masks({"causal": True, "padding": False}[mask_mode], -1, 0.0, float(bmm1_scale))
    outs = []
    for row in fresh_rows(q, k, v, q_lens, kv_lens):
        out, lse = attention(*row, masks, sinks)
        out[lse == -math.inf] = 7.0  # what a kernel leaves there is anybody's guess
        outs.append(out)
    found = torch.cat(outs) * bmm2_scale
    return with_garbage(found, found[..., 0], q.shape[0])[0].to(q.dtype)


FUNCTIONS = (
    trtllm_batch_context_with_kv_cache,
    trtllm_batch_decode_with_kv_cache,
    trtllm_batch_decode_with_kv_cache_mla,
    trtllm_fmha_v2_prefill,
    xqa_batch_decode_with_kv_cache,
    cudnn_batch_decode_with_kv_cache,
    cudnn_batch_prefill_with_kv_cache,
    *ROWS,
)
