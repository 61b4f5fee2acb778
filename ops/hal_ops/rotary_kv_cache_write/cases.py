"""Inputs: sequences behind each other, NaN in tables where no position points, caches that hold NaN, slots in disorder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops._row_case import variants
from hal_ops.case import Case
from hal_ops.compare import Comparison, compare
from hal_ops.kv_cache.cases import KvCacheWriteCase
from hal_ops.kv_cache.cases import make_case as make_write_case
from hal_ops.rotary_embedding.cases import make_case as make_rotary_case
from hal_ops.rotary_kv_cache_write.op import RotaryKvCacheWriteRequest
from hal_ops.rotary_kv_cache_write.reference import rotary_kv_cache_write

__all__ = ["RotaryKvCacheWriteCase", "make_case"]

TOKENS = 18
MOST_OFF = 0.02
"""Share of keys that may be a step of an FP8 format off."""


@dataclasses.dataclass(frozen=True)
class RotaryKvCacheWriteCase(Case):
    """``args`` are the first six of the call; ``write`` has v, the caches, the slots and the scales."""

    request: RotaryKvCacheWriteRequest
    label: str
    args: tuple[Tensor, ...]
    write: KvCacheWriteCase
    form: str

    def call(self, implementation: Callable[..., Any]) -> dict[str, Tensor]:
        """The turned q, and the caches after the call."""
        q, k, v, *tables = self.args
        q = q.clone() if self.form == "inplace" else q
        k_cache, v_cache = self.write.fresh()
        given: dict[str, Any] = dict(self.write.scales)
        if self.form in ("out", "inplace"):
            given["out"] = q if self.form == "inplace" else torch.full_like(q, torch.nan)
        out = implementation(q, k, v, *tables, k_cache, v_cache, self.write.slot_mapping, **given)
        return {"q": out, "k_cache": k_cache, "v_cache": v_cache}

    def expected(self) -> dict[str, Tensor]:
        """q in float64; the caches in their format."""
        args, written = tuple(x.cpu() for x in self.args), self.write
        moved = {n: getattr(written, n).cpu() for n in ("k", "v", "k_cache", "v_cache", "slot_mapping")}
        scales = {n: x.cpu() for n, x in written.scales.items()}
        written = dataclasses.replace(written, **moved, scales=scales)
        right = rotary_kv_cache_write(self.request, "cpu", accumulate=torch.float64, rounded=False)
        return dataclasses.replace(self, args=args, write=written, form="plain").call(right)

    def check(self, implementation: Callable[..., Any]) -> tuple[Comparison, ...]:
        """q and keys within a few steps of their formats; values, and slots that no token has, as the cache write's."""
        found, right = self.call(implementation), self.expected()
        keys = self.write.judge(f"{self.label}: k_cache", found["k_cache"], right["k_cache"], most_steps=math.inf)
        values = self.write.judge(f"{self.label}: v_cache", found["v_cache"], right["v_cache"])
        return (self._judge_q(found["q"], right["q"]), keys, self._judge_keys(found, right), values)

    def _judge_q(self, found: Tensor, right: Tensor) -> Comparison:
        title, wanted = f"{self.label}: q", torch_dtype(self.request.dtype)
        if found.dtype != wanted:
            return Comparison(title, (f"its dtype is {found.dtype}; the contract says {wanted}",))
        return compare(found, right, dtype=self.request.dtype, name=title)

    def _judge_keys(self, found: dict[str, Tensor], right: dict[str, Tensor]) -> Comparison:
        """Sums in another order may round to the next number of the keys' format, and that to the cache's next."""
        title, written = f"{self.label}: keys", self.write.written()
        a, b = (self.write.slots_of(x["k_cache"].cpu().float())[written] for x in (found, right))
        if not is_fp8(self.request.kv_dtype):
            formats = (self.request.dtype, self.request.kv_dtype)
            coarser = max(formats, key=lambda name: float(torch.finfo(torch_dtype(name)).eps))
            return compare(a, b, dtype=coarser, name=title)
        step = torch.finfo(torch_dtype(self.request.kv_dtype))
        far = ~torch.isclose(a, b, rtol=2 * step.eps, atol=2 * step.smallest_normal, equal_nan=True)
        share = a.ne(b).double().mean().item() if a.numel() else 0.0
        wrong = bool(far.any()) or share > MOST_OFF
        return Comparison(title, (f"{share:.1%} of the keys differ from the reference",) if wrong else ())


def make_case(
    request: RotaryKvCacheWriteRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    form: str = "plain",
) -> RotaryKvCacheWriteCase:
    """18 tokens. ``form``: ``"plain"``; ``"strided"``, where q, k and v are views of one tensor, and K and V of another;
    ``"out"``, ``"inplace"``: with ``out``."""
    strided = form == "strided"
    interleaved = strided and request.head_dim == request.v_head_dim
    written = make_write_case(request.write(), device=device, seed=seed, tokens=TOKENS, interleaved=interleaved)
    tokens = len(written.slot_mapping)
    q, k, cos, sin, positions = make_rotary_case(request.rotary(), device=device, seed=seed, tokens=TOKENS).args
    three = (q[:tokens], k[:tokens], written.v)
    args = (*(_fused(*three) if strided else three), cos, sin, positions[:tokens])
    formats = f"{request.dtype} to {request.kv_dtype} {request.style} {request.kv_layout}"
    return RotaryKvCacheWriteCase(request, f"{request.op} {formats}, seed {seed}, {form}", args, written, form)


def _fused(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Views with the values of the given tensors, of one projection ``[tokens, all heads' elements]``."""
    both = torch.cat([x.flatten(1) for x in tensors], 1)
    parts = torch.split(both, [x[0].numel() for x in tensors], 1)
    return tuple(part.view(x.shape) for part, x in zip(parts, tensors, strict=True))


make_case.variants = variants()  # type: ignore[attr-defined]
