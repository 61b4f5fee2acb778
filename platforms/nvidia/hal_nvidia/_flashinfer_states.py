"""flashinfer's merge of two attention states behind the contract of ``merge_attention_states``.

``merge_state`` takes natural logs for logs in base 2, gives NaN for two states without keys (before 0.7.4), and multiplies
what a state without keys holds by zero, which leaves its NaN. So those states are cleared. It takes no more states at a time
than :mod:`hal_nvidia._flashinfer_reads` says.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

import hal
from hal_nvidia._flashinfer_reads import FAR
from hal_ops.merge_states import MergeStatesRequest

__all__ = ["merge_attention_states"]

_LOG2_E = math.log2(math.e)
_NO_KEYS = -1e30
"""For minus infinity, as two infinities have no difference: two states without keys count alike, with zeros."""


def merge_attention_states(request: MergeStatesRequest, device: hal.Device) -> Callable[..., tuple[Tensor, Tensor]]:
    """``merge_state``."""
    function = importlib.import_module("flashinfer.cascade").merge_state
    last = (request.num_heads, request.v_head_dim)

    def call(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        if not lse_a.numel():
            return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
        if out_a.numel() >= FAR:
            return _halves(call, (out_a, lse_a, out_b, lse_b))
        if out_a.dim() != 3:
            sizes = (-1, *last), (-1, last[0])
            merged, lse = call(*(x.reshape(s) for x, s in zip((out_a, lse_a, out_b, lse_b), 2 * sizes, strict=True)))
            return merged.view(out_a.shape), lse.view(lse_a.shape)
        logs = torch.stack((lse_a, lse_b))
        none_a, none_b = (logs == -torch.inf).unsqueeze(-1).unbind()
        log_a, log_b = logs.mul_(_LOG2_E).clamp_min_(_NO_KEYS).unbind()
        merged, total = function(_cleared(out_a, none_a), log_a, _cleared(out_b, none_b), log_b)
        return merged, torch.threshold_(total.mul_(1 / _LOG2_E), _NO_KEYS / 2, -torch.inf)

    return call


def _halves(call: Callable[..., tuple[Tensor, Tensor]], states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The states of the first tokens, then those of the others."""
    sizes = states[1].shape[:-1]
    dim = sizes.index(max(sizes))
    parts = zip(*(x.tensor_split(2, dim) for x in states), strict=True)
    (out_a, lse_a), (out_b, lse_b) = (call(*part) for part in parts)
    return torch.cat((out_a, out_b), dim), torch.cat((lse_a, lse_b), dim)


def _cleared(out: Tensor, none: Tensor) -> Tensor:
    """A contiguous copy with zeros where there were no keys."""
    return torch.where(none, 0.0, out).contiguous()
