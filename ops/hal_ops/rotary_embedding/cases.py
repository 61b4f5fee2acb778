"""Inputs for the rotary embedding: sequences one behind the other, and NaN in the tables where no position points."""

from __future__ import annotations

import torch

from hal_ops._row_case import RowCase, draw, variants, views
from hal_ops.rotary_embedding.op import RotaryEmbeddingRequest
from hal_ops.rotary_embedding.reference import outputs, rotary_embedding
from hal_ops.rotary_embedding.scaling import YarnScaling
from hal_ops.rotary_embedding.tables import rotary_tables

__all__ = ["make_case"]

MAX_POSITION = 97


def make_case(
    request: RotaryEmbeddingRequest,
    phase: str = "call",
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    form: str = "plain",
    tokens: int = 18,
) -> RowCase:
    """Random heads. ``form`` is one of :data:`hal_ops._row_case.FORMS`; ``"strided"`` has 18 tokens."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        draw(generator, tokens, heads, request.head_dim, dtype=request.dtype)
        for heads in (request.num_q_heads, request.num_kv_heads)
    )
    starts = torch.tensor([0, MAX_POSITION - tokens]).repeat_interleave(
        torch.tensor([tokens // 3, tokens - tokens // 3])
    )
    positions = (starts + torch.arange(tokens)).to(torch.int32 if seed % 2 else torch.int64)
    cos, sin = _tables(request, positions, form)
    args = [views(x.to(device), form, kept=2) for x in (q, k)]
    args += [cos.to(device), sin.to(device), positions.reshape(args[0].shape[:-2]).to(device)]
    label = f"rotary_embedding {request.dtype} {request.style}, seed {seed}, {form}"
    return RowCase(
        request,
        label,
        tuple(args),
        rotary_embedding,
        outputs(request),
        names=("q", "k"),
        inplace=(0, 1),
        form=form,
    )


def _tables(request: RotaryEmbeddingRequest, positions: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """YaRN's tables; for strided forms the two halves of one tensor."""
    scaling = YarnScaling(factor=4.0, original_max_position=32, beta_fast=4.0)
    cos, sin = rotary_tables(request.rotary_dim, MAX_POSITION, scaling=scaling, dtype=request.table_dtype)
    unused = torch.ones(MAX_POSITION, dtype=torch.bool)
    unused[positions.long()] = False
    both = torch.cat((cos, sin), -1)
    both[unused] = torch.nan
    halves = both.chunk(2, -1)
    cos, sin = halves if form == "strided" else tuple(x.contiguous() for x in halves)
    return cos, sin


make_case.variants = variants()  # type: ignore[attr-defined]
