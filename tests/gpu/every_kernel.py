"""Every kernel that can run here, asked for something that it serves; what comes of calls to each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import hal
from hal import _plugins
from hal.testing._verify import circumstances, refusals
from hal_ops import Request

__all__ = ["BASE", "WANTED", "faults", "serving"]

BASE: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": "bfloat16"}
WANTED: dict[str, dict[str, Any]] = {
    "fa2": {"page_size": 256},
    "flashinfer_sink": {"sinks": True, "head_dim": 64},
    "trtllm_gen": {"kv_layout": "HND"},
    "flashinfer_cudnn": {"kv_layout": "HND"},
    "sdpa_efficient": {"num_kv_heads": 8},
}
"""What libraries ask for that do not serve the others' request."""
REFUSED = "in 32 bits"


def serving(op: str, phase: str, request: Callable[[dict[str, Any]], Request], device: hal.Device) -> Iterator[Any]:
    """(kernel, a request that it serves) of all kernels that can run here."""
    around = circumstances(device)
    for kernel in _plugins.registry().kernels.values():
        if (kernel.op, kernel.phase) == (op, phase):
            asked = request(WANTED.get(kernel.library, {}))
            if not refusals(kernel, asked, around):
                yield kernel, asked


def faults(checks: Sequence[tuple[str, Callable[[], list[str]]]]) -> list[str]:
    """What is wrong, of all; what is refused for its distance is not."""
    found = []
    for name, check in checks:
        try:
            found += [f"{name}: {fault}" for fault in check()]
            torch.cuda.synchronize()
        except ValueError as error:
            found += [] if REFUSED in str(error) else [f"{name}: {error}"]
    return found
