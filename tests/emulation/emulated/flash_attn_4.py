"""flash-attn 4's habits over the formula (flash-attn-4 4.0.0b27 to b36, ``flash_attn/cute/interface.py``).

* Always a pair; the LSE is None unless it is asked for, natural, ``[batch, heads, q_len]`` or ``[heads, tokens]``.
* An unlimited side of the window is None: -1 is a limit.
* The LSE is +inf where a sink is above a row's scores by more than float32 holds as a power.
* On sm_90 pages go wrong for head dims 65 to 96 where nothing is masked.
* Pages go with ``seqused_k``, not with ``cu_seqlens_k``; pages of the key tile's size are read whole, NaN and all.
* No pages, splits or sinks on sm_8x and sm_12x, no splits on sm_90; head dims by arch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emulated.attend import attend_rows, fresh_rows, leak_past, paged_rows, with_garbage
from emulated.named import by_name
from emulated.signatures import functions, signature, versions
from hal_nvidia.flash_attn_4_kernels import DISTRIBUTIONS

__all__ = ["LIBRARY", "VERSIONS", "distribution", "emulations"]

LIBRARY = "flash-attn-4"
VERSIONS = tuple(v for d in DISTRIBUTIONS for v in versions(d))
"""Those of both distributions, whose numbers differ: one counts by dates."""
_OVERFLOWS = 88.7
"""How far a sink may lie above a row's scores."""


def distribution(version: str) -> str:
    """The one that has the version."""
    return next(d for d in DISTRIBUTIONS if version in versions(d))


def emulations(version: str, arch: str) -> dict[str, Callable[..., Any]]:
    """Name to function, as a version behaves on an arch."""
    cute = _Cute(int(arch.removeprefix("sm_")) // 10)
    known = {"flash_attn_func": cute.dense, "flash_attn_varlen_func": cute.ragged}
    held = distribution(version)
    kept = {name.partition(":")[2] for name in functions(held, version)}
    return {name: by_name(core, signature(held, version, name)) for name, core in known.items() if name in kept}


class _Cute:
    """The interface on one major arch."""

    def __init__(self, major: int) -> None:
        self.major = major

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
        window_size: Any = (None, None), learnable_sink: Tensor | None = None, softcap: float = 0.0,
        num_splits: int = 1, deterministic: bool = False, return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        self._check(q, k, v, learnable_sink, window_size, num_splits, deterministic)
        rows = list(zip(q, k, v, strict=True))
        out, lse = self._attend(rows, q, v, softmax_scale, causal, window_size, softcap, learnable_sink)
        out = out.view(*q.shape[:-1], v.shape[-1])
        return out.to(q.dtype), lse.view(q.shape[:-1]).transpose(1, 2) if return_lse else None

    def ragged(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, seqused_k: Tensor | None = None,
        page_table: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
        window_size: Any = (None, None), learnable_sink: Tensor | None = None, softcap: float = 0.0,
        num_splits: int = 1, deterministic: bool = False, return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        self._check(q, k, v, learnable_sink, window_size, num_splits, deterministic)
        assert cu_seqlens_q is not None
        q_lens = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q
        assert max(q_lens) <= max_seqlen_q
        if page_table is None:
            assert cu_seqlens_k is not None
            kv_lens = cu_seqlens_k.diff().tolist()
            rows = fresh_rows(q, k, v, q_lens, kv_lens)
        else:
            assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
            masked = causal or window_size != (None, None)
            kv_lens, rows = self._pages(q[: sum(q_lens)], k, v, page_table, seqused_k, max_seqlen_k, q_lens, masked)
        assert max_seqlen_k is not None
        assert max(kv_lens) <= max_seqlen_k
        out, lse = self._attend(rows, q, v, softmax_scale, causal, window_size, softcap, learnable_sink)
        if page_table is None:
            leak_past(out, v, q_lens, kv_lens)
        out, lse = with_garbage(out, lse, q.shape[0])
        return out.to(q.dtype), lse.t() if return_lse else None

    def _pages(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, used: Any, longest: Any, q_lens: list[int], masked: bool
    ) -> Any:  # fmt: skip
        assert self.major in (9, 10), "paged KV not supported"
        assert table.dtype == torch.int32
        assert table.stride(-1) == 1
        assert used.dtype == torch.int32
        size = k.shape[1]
        assert longest == table.shape[1] * size, "b27 holds the bound against the table's width"
        assert not 64 < q.shape[-1] <= 96 or self.major == 10 or masked, "copies of pages overrun tiles of 144 keys"
        tile = 128 if q.shape[-1] <= 96 or self.major == 10 or q.shape[-1] <= 128 else 80
        assert size not in (tile, 144), "pages of a tile's size are read whole: what is behind the last token counts"
        return used.tolist(), paged_rows(q.split(q_lens), k, v, table, used.tolist())

    def _attend(
        self, rows: Any, q: Tensor, v: Tensor, scale: float | None, causal: bool, window: Any, softcap: float,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        sinks = None if sinks is None else sinks.float()
        masks: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
        out, lse = attend_rows(rows, q, v.shape[-1], **masks, sinks=sinks)
        if sinks is not None:
            below = sinks - attend_rows(rows, q, v.shape[-1], **masks, sinks=None)[1]
            lse = lse.masked_fill((below > _OVERFLOWS) & (below < math.inf), math.inf)
        return out, lse

    def _check(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: Any, splits: int, deterministic: bool
    ) -> None:
        assert all(side is None or side >= 0 for side in window), "-1 is a limit here"
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in (torch.float16, torch.bfloat16), "FP8 needs scales, which are arguments of no public function"
        assert splits == 1 or self.major == 10, "SplitKV not supported"
        assert sinks is None or self.major in (9, 10), "Learnable sink is not supported in this kernel"
        dims = q.shape[-1], v.shape[-1]
        small = all(8 <= d <= 128 and d % 8 == 0 for d in dims)
        known = {9: all(d <= 256 and d % 8 == 0 for d in dims), 10: small or dims in ((192, 128), (256, 256))}
        assert known.get(self.major, small), f"head dims {dims}"
        if q.requires_grad:
            assert self.major >= 9, "no backward"
