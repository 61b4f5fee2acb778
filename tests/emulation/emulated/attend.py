"""The formula that emulations share: the oracle of ``hal_ops``, under the names that libraries use."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hal_ops.attention import AttentionRequest
from hal_ops.attention.reference import attend as oracle

__all__ = ["attend", "attend_rows", "fresh_rows", "leak_past", "paged_rows", "with_garbage"]


@functools.lru_cache(maxsize=256)
def _request(
    q_heads: int, kv_heads: int, dim: int, v_dim: int, scale: float, causal: bool,
    window: tuple[int | None, int | None], softcap: float, sinks: bool, alibi: bool,
) -> AttentionRequest:  # fmt: skip
    return AttentionRequest(
        num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim, dtype="float32", causal=causal,
        window=window, softcap=softcap, sinks=sinks, alibi=alibi, softmax_scale=scale, phases=("prefill",),
    )  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q ``[q_len, heads, dim]``, k and v ``[kv_len, kv_heads, dim]``, positions aligned to the last key.

    ``window`` has None for an unlimited side. Returns out ``[q_len, heads, v_dim]`` and the natural-log LSE
    ``[q_len, heads]``, both float32; rows without keys give 0 and -inf.
    """
    request = _request(
        q.shape[1], k.shape[1], q.shape[2], v.shape[2], scale, causal, window, softcap, sinks is not None,
        alibi is not None,
    )  # fmt: skip
    return oracle(q.float(), k.float(), v.float(), request, sinks, alibi)


def attend_rows(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]], like: Tensor, v_dim: int, **settings: object
) -> tuple[Tensor, Tensor]:
    """Several sequences: out ``[tokens, heads, v_dim]`` and LSE ``[tokens, heads]``, of q's device."""
    pairs = [attend(q, k, v, **settings) for q, k, v in rows]  # type: ignore[arg-type]
    heads = like.shape[-2]
    out = torch.cat([torch.zeros(0, heads, v_dim), *(out for out, _ in pairs)])
    return out, torch.cat([torch.zeros(0, heads), *(lse for _, lse in pairs)])


def fresh_rows(
    q: Tensor, k: Tensor, v: Tensor, q_lens: Sequence[int], kv_lens: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each sequence's own part; tokens behind the last sequence are nobody's."""
    three = ((q, q_lens), (k, kv_lens), (v, kv_lens))
    return list(zip(*(x[: sum(lens)].split(list(lens)) for x, lens in three), strict=True))


def leak_past(out: Tensor, v: Tensor, q_lens: Sequence[int], kv_lens: Sequence[int], tile: int = 128) -> None:
    """``0 * NaN`` of the values that a last tile reads behind a sequence, of whomever they are."""
    q_end = k_end = 0
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        q_end, k_end = q_end + q_len, k_end + kv_len
        rest = v[k_end : k_end + -kv_len % tile].detach().float()
        if q_len and kv_len and not rest.isfinite().all():
            out[q_end - q_len : q_end] += (rest.repeat_interleave(out.shape[1] // rest.shape[1], 1) * 0).sum(0)


def with_garbage(out: Tensor, lse: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """``[tokens, ...]``: what belongs to no sequence is left as it was allocated, NaN here."""
    rest = tokens - out.shape[0]
    filler = out.new_full((rest, *out.shape[1:]), torch.nan), lse.new_full((rest, lse.shape[1]), torch.nan)
    return torch.cat([out, filler[0]]), torch.cat([lse, filler[1]])


def paged_rows(
    queries: Sequence[Tensor], k_cache: Tensor, v_cache: Tensor, table: Tensor, kv_lens: Sequence[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each row's queries with its keys and values out of ``[pages, page_size, kv_heads, dim]`` caches.

    Only the pages that a row's length covers are looked up: entries past them may be anything.
    """
    size = k_cache.shape[1]
    rows = []
    for row, (q, length) in enumerate(zip(queries, kv_lens, strict=True)):
        pages = table[row, : -(-length // size)].long()
        k, v = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        rows.append((q, k, v))
    return rows
