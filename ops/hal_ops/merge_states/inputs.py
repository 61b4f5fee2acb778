"""What is wrong with the arguments of a merge."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hal_ops._call_inputs import mismatch, shown
from hal_ops._dtypes import torch_dtype
from hal_ops.merge_states.op import MergeStatesRequest

__all__ = ["check"]


def check(request: MergeStatesRequest, device: torch.device, values: bool) -> Callable[..., str]:
    """A function of the call's arguments; see :attr:`hal_ops.Op.check`."""
    del values
    last, dtype = (request.num_heads, request.v_head_dim), torch_dtype(request.dtype)

    def problem(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> str:
        shape = getattr(out_a, "shape", ())
        if shape[-2:] != last:
            return f"out_a is {shown(out_a)}, and should be {request.dtype} [..., {last[0]}, {last[1]}] on {device}"
        return (
            mismatch("out_a", out_a, shape, dtype, device)
            or mismatch("lse_a", lse_a, shape[:-1], torch.float32, device)
            or mismatch("out_b", out_b, shape, dtype, device)
            or mismatch("lse_b", lse_b, shape[:-1], torch.float32, device)
        )

    return problem
