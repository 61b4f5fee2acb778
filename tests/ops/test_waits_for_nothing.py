"""What torch's operators do for a call in a graph: nothing that reads a tensor's values on the host."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hal
from hal import _plugins
from hal.testing import corners
from hal_ops import resolve_target

READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
KERNELS = [
    k for k in _plugins.registry().kernels.values()
    if ".torch_" in str(k.target) and k.phase == "call" and "graph" in k.fields
]  # fmt: skip


class Watched(TorchDispatchMode):
    """Notes operators that wait for the device, and masks among indices, which do too."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index_put")) and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        if name in READING or by_mask:
            self.read.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_waits() -> None:
    watched, kept = Watched(), torch.tensor([False, True])
    with watched:
        kept[kept.to(torch.uint8).argmax()]
        kept[kept]
    assert len(watched.read) == 2


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_a_call_in_a_graph_reads_no_value(kernel: hal.Kernel) -> None:  # requirement E12, P37
    op = _plugins.registry().op(kernel.op)
    make_case, factory = resolve_target(str(op.cases)), resolve_target(str(kernel.target))
    for corner in corners(kernel, op=op, limit=6):
        plain = {"needs_grad": False} if "needs_grad" in op.request.rules() else {}
        request = dataclasses.replace(corner, graph=True, **plain)
        case, watched = make_case(request, "call"), Watched()
        implementation = factory(request, "cpu")

        def call(*args: Any, **kwargs: Any) -> Any:
            with watched:  # noqa: B023
                return implementation(*args, **kwargs)  # noqa: B023

        case.call(call)
        assert watched.read == [], request.describe()
