"""Fresh inputs for tests: q, k and v of prefill, dense or ragged, with scales where they are FP8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hal_ops._dtypes import is_fp8, torch_dtype
from hal_ops.attention.request import AttentionRequest
from hal_ops.kv_cache.reference import quantize

__all__ = ["fresh_inputs"]

SCALES = (("q_scale", 0.25), ("k_scale", 0.5), ("v_scale", 2.0))
"""Keyword and first scale of q, k and v; kv heads have it and its inverse in turn."""


def fresh_inputs(
    request: AttentionRequest,
    lengths: Sequence[tuple[int, int]],
    three: tuple[Tensor, Tensor, Tensor],
    form: str,
    kwargs: dict[str, Any],
) -> tuple[Tensor, ...]:
    """q, k and v as a call of prefill brings them; lengths and scales go to ``kwargs``.

    Args:
        lengths: (q_len, kv_len) a sequence.
        three: values ``[tokens, heads, dim]`` of all sequences, in float32.
        form: ``"dense"`` or ``"ragged"``.

    Raises:
        ValueError: a dense batch of unequal lengths, or a form that there is not.
    """
    given = _in_format(request, three, kwargs)
    if form == "dense":
        if len(set(lengths)) != 1:
            raise ValueError(f"a dense batch has equal lengths; these are {lengths}: use form='ragged'")
        return tuple(x.view(len(lengths), len(x) // len(lengths), *x.shape[1:]) for x in given)
    if form != "ragged":
        raise ValueError(f"form={form!r}: choose 'dense' or 'ragged'")
    for name, lens in (("q", [q for q, _ in lengths]), ("k", [kv for _, kv in lengths])):
        kwargs[f"cu_seqlens_{name}"] = torch.tensor([0, *lens]).cumsum(0).int()
        kwargs[f"max_seqlen_{name}"] = max(lens)
    return given


def _in_format(request: AttentionRequest, three: Sequence[Tensor], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    if not is_fp8(request.qkv_dtype):
        return tuple(x.to(torch_dtype(request.dtype)) for x in three)
    heads = request.num_kv_heads if request.qkv_scale == "head" else 1
    made = []
    for (name, first), x in zip(SCALES, three, strict=True):
        scale = kwargs[name] = torch.tensor([first, 1 / first] * heads)[:heads]
        each = scale.repeat_interleave(x.shape[1] // heads) if heads > 1 else scale
        made.append(quantize(x, each, request.qkv_dtype))
    return tuple(made)
