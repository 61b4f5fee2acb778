"""What is wrong with the arguments of a rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops._call_inputs import numbers, shown
from hal_ops._dtypes import torch_dtype
from hal_ops._row_inputs import pair, read, row, written
from hal_ops.rotary_embedding.op import RotaryEmbeddingRequest

__all__ = ["check", "tables"]


def check(request: RotaryEmbeddingRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """A function of the call's arguments; see :attr:`hal_ops.Op.check`."""
    del values
    q_last, k_last = ((heads, request.head_dim) for heads in (request.num_q_heads, request.num_kv_heads))
    of_q, of_tables, dtype = read(q_last, request.dtype, device), tables(request, device), torch_dtype(request.dtype)

    def problem(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        *,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> str:
        wrong = of_q("q", q)
        if wrong:
            return wrong
        tokens = q.shape[:-2]
        wrong = (
            row("k", k, (*tokens, *k_last), dtype, device, kept=2)
            or of_tables(cos, sin)
            or numbers("positions", positions, tokens, device, torch.int64, torch.int32)
        )
        if wrong or out is None:
            return wrong
        return (
            pair(out, "q and k")
            or written("out[0]", out[0], q.shape, dtype, device, kept=2)
            or written("out[1]", out[1], k.shape, dtype, device, kept=2)
        )

    return problem


def tables(request: Any, device: torch.device) -> Callable[[Tensor, Tensor], str]:
    """A function of cosines and sines, for requests with ``table_dtype`` and ``rotary_dim``."""
    dtype, half = torch_dtype(request.table_dtype), request.rotary_dim // 2

    def problem(cos: Tensor, sin: Tensor) -> str:
        if not isinstance(cos, Tensor) or cos.dim() != 2:
            return f"cos is {shown(cos)}, and should be {request.table_dtype} [max_position, {half}] on {device}"
        shape = (cos.shape[0], half)
        return row("cos", cos, shape, dtype, device) or row("sin", sin, shape, dtype, device)

    return problem
