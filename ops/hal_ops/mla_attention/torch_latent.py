"""Latent attention by torch's matrix products, on any device. Run on the CPU with torch 2.13.0.

A row's latents are gathered once and serve as keys and as values, and the heads of its queries are the rows of one
product: what is read and computed is what the formula needs, and no more than one copy of the keys is made.

What :func:`extend` and :func:`decode` honour: any heads and dims; float64, float32, bfloat16 and float16 (the last two
computed in float32), over a cache of any of these or in FP8 with its scale; any page size and number of queries; causal
or not; any scale; LSE; deterministic. Not graphs: its groups of rows depend on the lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hal_ops._dtypes import FP8_DTYPES, torch_dtype
from hal_ops.attention import masks
from hal_ops.attention.contract import Step
from hal_ops.attention.gather import Gather, Group, plan_groups
from hal_ops.mla_attention.contract import MlaAttention
from hal_ops.mla_attention.request import MlaAttentionRequest

__all__ = ["DTYPES", "KV_DTYPES", "decode", "extend"]

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Formats of q and of the output."""
KV_DTYPES = (*DTYPES, *FP8_DTYPES)
"""Formats of the cache."""
_SCORES_AT_ONCE = 1 << 24


def extend(request: MlaAttentionRequest, device: object) -> MlaAttention:
    """The extend phase.

    Raises:
        ValueError: a dtype that is not in ``DTYPES`` or ``KV_DTYPES``, or ``graph=True``.
    """
    wrong = [f"{n} {getattr(request, n)}" for n, allowed in _ALLOWED.items() if getattr(request, n) not in allowed]
    if wrong:
        raise ValueError(f"torch_latent does not do {', '.join(wrong)}: use hal_ops.mla_attention.reference")
    return _Latent(request)


def decode(request: MlaAttentionRequest, device: object) -> MlaAttention:
    """The decode phase: the same as :func:`extend`."""
    return extend(request, device)


_ALLOWED = {"dtype": DTYPES, "kv_dtype": KV_DTYPES, "graph": (False,)}


class _Latent:
    def __init__(self, request: MlaAttentionRequest) -> None:
        self._paged = request.absorbed()
        self._rank = request.kv_lora_rank
        self._scale = request.softmax_scale
        self._causal = request.causal
        self._compute = torch.float64 if request.dtype == "float64" else torch.float32
        self._dtype = torch_dtype(request.dtype)
        self._gather = Gather(self._paged, self._compute)

    def plan(self, step: Step) -> list[Group]:
        return plan_groups(step, self._paged, self._compute)

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        step: Step,
        payload: list[Group],
        *,
        kv_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        out = q.new_zeros((*q.shape[:2], self._rank))
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        for group in payload:
            keys = self._gather(cache.unsqueeze(2), group).squeeze(2)
            queries = group.queries(q).to(self._compute)
            # Scores and sums are linear in the latents: their scale goes to what there is less of.
            queries = queries if kv_scale is None else queries * kv_scale.to(self._compute)
            found = [self._attend(part, first, group, keys) for first, part in self._parts(queries, keys)]
            sums = torch.cat([o for o, _ in found], 1).flatten(0, 1)
            out[group.tokens] = (sums if kv_scale is None else sums * kv_scale.to(self._compute)).to(self._dtype)
            lse[group.tokens] = torch.cat([one for _, one in found], 1).flatten(0, 1).float()
        return (out, lse) if return_lse else out

    def _parts(self, queries: Tensor, keys: Tensor) -> list[tuple[int, Tensor]]:
        """The queries ``[rows, q_len, heads, dim]`` in parts whose scores fit in memory, each with its first one."""
        size = max(1, _SCORES_AT_ONCE // max(1, queries.shape[0] * queries.shape[2] * keys.shape[1]))
        return [(index * size, part) for index, part in enumerate(torch.split(queries, size, 1))]

    def _attend(self, q: Tensor, first: int, group: Group, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Some queries of each row: out ``[rows, queries, heads, rank]`` and lse ``[rows, queries, heads]``."""
        rows, queries, heads, _ = q.shape
        if not keys.shape[1]:
            return q.new_zeros((rows, queries, heads, self._rank)), q.new_full((rows, queries, heads), -torch.inf)
        scores = (q.flatten(1, 2) @ keys.transpose(1, 2) * self._scale).view(rows, queries, heads, -1)
        if self._causal and group.q_len > 1:
            distance = masks.relative(queries, keys.shape[1], first + keys.shape[1] - group.q_len, q.device)
            scores = scores.masked_fill(~masks.visible(distance, (None, 0))[:, None], -torch.inf)
        if group.hidden is not None:
            scores = scores + group.hidden
        lse = scores.logsumexp(-1)
        nothing = (lse == -torch.inf).unsqueeze(-1)
        weights = torch.exp(scores - lse.unsqueeze(-1).masked_fill(nothing, 0.0))
        out = weights.flatten(1, 2) @ keys[..., : self._rank]
        return out.view(rows, queries, heads, -1), lse
