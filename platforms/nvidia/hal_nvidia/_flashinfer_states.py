"""flashinfer's merge of two attention states behind the contract of ``merge_attention_states``.

``merge_state`` takes natural logs for logs in base 2, gives NaN for two states without keys (before 0.7.4), and multiplies
what a state without keys holds by zero, which leaves its NaN. So those states are cleared.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

import hal
from hal_nvidia._flashinfer_reads import readable
from hal_ops.merge_states import MergeStatesRequest

__all__ = ["merge_attention_states"]

_LOG2_E = math.log2(math.e)


def merge_attention_states(request: MergeStatesRequest, device: hal.Device) -> Callable[..., tuple[Tensor, Tensor]]:
    """``merge_state``."""
    function = importlib.import_module("flashinfer.cascade").merge_state
    last = (request.num_heads, request.v_head_dim)

    def call(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        if not lse_a.numel():
            return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
        none_a, none_b = lse_a == -torch.inf, lse_b == -torch.inf
        none = none_a & none_b
        # two infinities have no difference: of two states without keys the first counts, with zeros
        logs_a, logs_b = (lse_a * _LOG2_E).masked_fill_(none, 0.0), lse_b * _LOG2_E
        states = [(_cleared(out_a, none_a), logs_a), (_cleared(out_b, none_b), logs_b)]
        shaped = [(out.view(-1, *last), readable(logs.contiguous().view(-1, last[0]))) for out, logs in states]
        out, logs = function(*shaped[0], *shaped[1])
        lse = logs.view(lse_a.shape).div_(_LOG2_E).masked_fill_(none, -torch.inf)
        return out.view(out_a.shape), lse

    return call


def _cleared(out: Tensor, none: Tensor) -> Tensor:
    """A contiguous copy with zeros where there were no keys."""
    return torch.where(none.unsqueeze(-1), 0.0, out).to(out.dtype).contiguous()
