"""The habits of aiter's attention in CK and assembly, over the formula.

Read from github.com/ROCm/aiter, v0.1.7.post5 to v0.1.20.post1, and from the CK sources in its wheel 0.1.7.post2.dev18.

* ``flash_attn_func``, ``flash_attn_varlen_func`` (``aiter/ops/mha.py``): bf16 of head dims 128, or 192 with 128, goes
  to an assembly kernel (``can_impl_fmha_v3_fwd``) unless ALiBi or a window keeps it from it; dense calls only above 128
  queries. That kernel drops sinks, and before 0.1.7.post3 caps; a left window side of 0 is none to it, and then there
  is no kernel. What it writes for rows without keys is not known: NaN here. CK drops the cap where there is ALiBi, and
  takes sinks in other units with a cap or ALiBi. Windows have two or three numbers, the third in 0.1.8 and later.
* ``mha_batch_prefill_func``: tiles of 128 keys read page indices past a row's end; values there are multiplied by 0.
* ``paged_attention_ragged`` (``csrc/cpp_itfs/pa``): V is read by K's strides, q by its first stride alone; ALiBi before
  the cap; tokens past the end of a page are multiplied by 0; a row without keys looks at -1 in the scratch.
* LSEs are natural, ``[batch, heads, len]`` or ``[heads, tokens]``, float32; +inf where there are no keys at all.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import emulated.library
import hal
from emulated.attend import attend, with_garbage
from emulated.named import by_name
from emulated.signatures import functions as signatures
from emulated.signatures import signature, versions

__all__ = ["TILE", "emulations", "installed", "of_version", "require"]

TILE = 128
NAN = math.nan
HALVES = (torch.float16, torch.bfloat16)
Row = tuple[Tensor, Tensor, Tensor]


def require(holds: bool, text: str) -> None:
    """The library's ``TORCH_CHECK``."""
    if not holds:
        raise RuntimeError(text)


def of_version(
    library: str, version: str, functions: Mapping[str, Callable[..., Any]]
) -> dict[str, Callable[..., Any]]:
    """Emulations under the parameters that a version has for them; they are told the version."""
    return {
        name: by_name(_told(function, version), signature(library, version, name))
        for name, function in functions.items()
        if any(held.endswith(f":{name}") for held in signatures(library, version))
    }


def _told(function: Callable[..., Any], version: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def core(**arguments: Any) -> Any:
        return function(**arguments, version=hal.Version.parse(version))

    return core


def emulations(version: str = "", library: str = "amd-aiter") -> dict[str, Callable[..., Any]]:
    """Of a version's attention functions, the newest one's by default."""
    return of_version(
        library,
        version or versions(library)[-1],
        {
            "flash_attn_func": _dense,
            "flash_attn_varlen_func": _varlen,
            "mha_batch_prefill_func": _batch_prefill,
            "paged_attention_ragged": _ragged_decode,
        },
    )


def installed(
    version: str = "", library: str = "amd-aiter"
) -> contextlib.AbstractContextManager[emulated.library.Installed]:
    """A version of aiter, the newest one by default, with its attention functions."""
    version = version or versions(library)[-1]
    return emulated.library.installed(library, version, emulations(version, library), adapters=["hal_rocm._aiter"])


def _dense(
    *, q: Tensor, k: Tensor, v: Tensor, version: hal.Version, softmax_scale: float, causal: bool = False,
    window_size: Sequence[int] = (-1, -1), alibi_slopes: Tensor | None = None, return_lse: bool = False,
    sink_ptr: Tensor | None = None,
) -> Any:  # fmt: skip
    mask = _Mask(softmax_scale, causal, tuple(window_size), 0.0, alibi_slopes, sink_ptr)
    out, lse = _forward(list(zip(q, k, v, strict=True)), mask, version, assembly=q.shape[1] > 128)
    out = out.view(*q.shape[:-1], v.shape[-1]).to(q.dtype)
    return (out, lse.view(q.shape[:-1]).transpose(1, 2).contiguous()) if return_lse else out


def _varlen(
    *, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, version: hal.Version, softmax_scale: float, logits_soft_cap: float = 0.0, causal: bool = False,
    window_size: Sequence[int] = (-1, -1), alibi_slopes: Tensor | None = None, return_lse: bool = False,
    sink_ptr: Tensor | None = None,
) -> Any:  # fmt: skip
    lens = [_lengths(cu) for cu in (cu_seqlens_q, cu_seqlens_k)]
    require(sum(lens[0]) == q.shape[0] and max(lens[0]) <= max_seqlen_q, "queries past max_seqlen_q are left out")
    require(max(lens[1]) <= max_seqlen_k, "keys past max_seqlen_k are left out")
    rows = list(zip(q.split(lens[0]), k.split(lens[1]), v.split(lens[1]), strict=True))
    mask = _Mask(softmax_scale, causal, tuple(window_size), logits_soft_cap, alibi_slopes, sink_ptr)
    out, lse = _forward(rows, mask, version, assembly=True)
    return (out.to(q.dtype), lse.t().contiguous()) if return_lse else out.to(q.dtype)


def _lengths(cu: Tensor) -> list[int]:
    require(cu.dtype == torch.int32 and cu.is_contiguous(), "lengths must be int32 and contiguous")
    found: list[int] = cu.diff().tolist()
    require(bool(found), "batch size must be positive")
    return found


class _Mask(NamedTuple):
    scale: float
    causal: bool
    sides: tuple[int, ...]
    cap: float
    slopes: Tensor | None
    sinks: Tensor | None

    @property
    def window(self) -> tuple[int | None, int | None]:
        left, right = (None if side < 0 else side for side in self.sides[:2])
        return left, 0 if self.causal else right

    def plain(self) -> dict[str, Any]:
        """What the assembly kernel sees of it."""
        return {"scale": self.scale, "window": self.window}

    def ck(self) -> dict[str, Any]:
        """What CK makes of its features together."""
        mixed = self.sinks is not None and bool(self.cap or self.slopes is not None)
        sinks = self.sinks * self.scale if mixed and self.sinks is not None else self.sinks
        cap = 0.0 if self.slopes is not None else self.cap
        return {**self.plain(), "softcap": cap, "alibi": self.slopes, "sinks": sinks}


def _forward(rows: Sequence[Row], mask: _Mask, version: hal.Version, *, assembly: bool) -> tuple[Tensor, Tensor]:
    q, k, v = rows[0]
    require(q.dtype in HALVES and q.dtype == k.dtype == v.dtype, "only fp16 and bf16, all alike")
    require(max(q.shape[-1], v.shape[-1]) <= 256, "at most 256")
    require(len(mask.sides) == 2 or mask.sides[2] == 0, "sink tokens are no logits")
    assembly = assembly and _assembly(q, v, mask, version)
    require(not assembly or mask.sides[0] != 0, "invalid argument for fmha_v3_fwd")
    found = [attend(*row, **(mask.plain() if assembly else mask.ck())) for row in rows]
    none_at_all = not any(len(k) for _, k, _ in rows)
    for (query, key, _), (out, lse) in zip(rows, found, strict=True):
        unseen = _unseen(len(query), len(key), mask.window[1])
        if none_at_all:
            lse[:unseen] = math.inf
        elif assembly:
            out[:unseen] = lse[:unseen] = NAN
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def _assembly(q: Tensor, v: Tensor, mask: _Mask, version: hal.Version) -> bool:
    dims = (q.shape[-1], v.shape[-1])
    if q.dtype != torch.bfloat16 or dims not in ((128, 128), (192, 128)) or mask.slopes is not None:
        return False
    sees_cap = version.satisfies(">=0.1.7.post3") is True
    return not any(side > 0 for side in mask.sides[:2]) and not (mask.cap and sees_cap)


def _unseen(q_len: int, kv_len: int, right: int | None) -> int:
    if not kv_len:
        return q_len
    return 0 if right is None else min(q_len, max(0, q_len - kv_len - right))


def _batch_prefill(
    *, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, kv_indptr: Tensor, kv_page_indices: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, version: hal.Version, softmax_scale: float, logits_soft_cap: float = 0.0,
    causal: bool = False, window_size: Sequence[int] = (-1, -1), alibi_slopes: Tensor | None = None,
    return_lse: bool = False, sink_ptr: Tensor | None = None,
) -> Any:  # fmt: skip
    require(q.dtype in HALVES and q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    require(k.dim() == v.dim() == 3, "3D K/V tensors are pages of one token")
    require(q.shape[-1] == k.shape[-1] == v.shape[-1] <= 128 and q.shape[-1] % 8 == 0, "no such head dim")
    require(all(x.stride(-1) == 1 for x in (q, k, v)), "the last dimension must be contiguous")
    for cache in (k, v):
        require(cache.stride(1) >= cache.shape[2], "head stride must be >= head_dim")
        require(cache.stride(0) >= cache.shape[1] * cache.stride(1), "batch stride must be >= num_heads * head_stride")
        require(cache.stride(0) % 8 == cache.stride(1) % 8 == 0, "strides must be multiples of the vector size")
    require(kv_page_indices.dtype == torch.int32, "kv_page_indices must have dtype torch.int32")
    q_lens, kv_lens = _lengths(cu_seqlens_q), _lengths(kv_indptr)
    require(max(q_lens) <= max_seqlen_q and max(kv_lens) <= max_seqlen_k, "the bounds are too small")
    mask = _Mask(softmax_scale, causal, tuple(window_size), logits_soft_cap, alibi_slopes, sink_ptr)
    found = []
    for query, begin, length in zip(q[: sum(q_lens)].split(q_lens), kv_indptr.tolist(), kv_lens, strict=False):
        keys, values = _tiles(k, v, kv_page_indices, begin, length)
        out, lse = attend(query, keys[:length], values[:length], **mask.ck())
        found.append((_spoilt(out, values[length:]), lse))
    out, lse = torch.cat([o for o, _ in found]).to(q.dtype), torch.cat([own for _, own in found])
    lse = lse if sum(kv_lens) else torch.full_like(lse, math.inf)
    out, lse = with_garbage(out, lse, q.shape[0])
    return (out, lse.t().contiguous()) if return_lse else out


def _tiles(k: Tensor, v: Tensor, indices: Tensor, begin: int, length: int) -> tuple[Tensor, Tensor]:
    """What a row's tiles read: its own tokens, and those that the indices behind them name."""
    read = -(-length // TILE) * TILE
    require(begin + read <= indices.numel(), "a tile reads outside of kv_page_indices")
    places = indices[begin : begin + read].long()
    require(bool(((places >= 0) & (places < k.shape[0])).all()), "a tile reads outside of the cache")
    return k[places], v[places]


def _spoilt(out: Tensor, past: Tensor) -> Tensor:
    """0 times what lies behind the last token: nothing, but for NaN and inf."""
    bad = ~past.isfinite().all(0).all(-1).repeat_interleave(out.shape[1] // past.shape[1])
    return out.masked_fill(bad[:, None], NAN) if past.numel() else out


def _ragged_decode(
    *, out: Tensor, workspace_buffer: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, scale: float,
    kv_indptr: Tensor, kv_page_indices: Tensor, kv_last_page_lens: Tensor | None, block_size: int,
    max_num_partitions: int, alibi_slopes: Tensor | None, kv_cache_dtype: str, kv_cache_layout: str,
    logits_soft_cap: float, k_scale: Tensor, v_scale: Tensor, version: hal.Version,
    fp8_out_scale: Tensor | None = None, partition_size: int = 256,
) -> Tensor:  # fmt: skip
    rows, heads, dim = query.shape
    require(
        query.dtype in HALVES and kv_cache_dtype == "auto" and key_cache.dtype == query.dtype, "Unsupported data type"
    )
    require(fp8_out_scale is None and partition_size == 256, "not used here")
    require(all(isinstance(x, Tensor) for x in (k_scale, v_scale)), "scales are read where they are given or not")
    require(block_size == 1, "more than one token a page is multiplied by 0 past its end: not used here")
    kv_heads = key_cache.shape[1 if kv_cache_layout == "HND" else 2]
    require(dim % 64 == 0 and heads // kv_heads <= 16, "no such kernel")
    require(out.is_contiguous() and kv_indptr.is_contiguous(), "written and read as if they were contiguous")
    require(kv_indptr.dtype == kv_page_indices.dtype == torch.int32, "int32")
    require(workspace_buffer.nbytes >= rows * heads * max_num_partitions * (2 * dim + 8), "the scratch is too small")
    token, head = key_cache.stride(0), key_cache.stride(1 if kv_cache_layout == "HND" else 2)
    shape = (key_cache.shape[0], kv_heads, dim)
    keys, values = (x.as_strided(shape, (token, head, 1)) for x in (key_cache, value_cache))
    queries = query.as_strided((rows, heads, dim), (query.stride(0), dim, 1))
    bounds = kv_indptr.tolist()
    for row in range(rows):
        length = bounds[row + 1] - bounds[row]
        require(length <= max_num_partitions * partition_size, "more keys than partitions")
        if not length:
            require(row > 0 or workspace_buffer.storage_offset() >= 4, "it reads before the scratch")
            out[row] = NAN
            continue
        places = kv_page_indices[bounds[row] : bounds[row + 1]].long()
        require(bool((places < shape[0]).all()), "a page outside of the cache")
        out[row] = _one(queries[row], keys[places], values[places], scale, alibi_slopes, logits_soft_cap).to(out.dtype)
    return out


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, slopes: Tensor | None, cap: float) -> Tensor:
    """One query ``[heads, dim]``; here the cap is taken after ALiBi."""
    group = q.shape[0] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    logits = (k @ q.float()[..., None])[..., 0] * scale
    if slopes is not None:
        logits = logits + slopes[:, None] * torch.arange(1 - k.shape[1], 1)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return (torch.softmax(logits, -1)[:, None] @ v)[:, 0]
