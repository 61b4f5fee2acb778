"""Graph capture: the call is captured once and replayed, where the device's torch module has graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.testing._cases import Planned

if TYPE_CHECKING:
    import torch

__all__ = ["capture_problems"]


def capture_problems(case: Any, implementation: Callable[..., Any], device: torch.device) -> tuple[list[str], str]:
    """What a replay gets wrong, and a note where nothing could be captured."""
    import torch

    module = torch.get_device_module(device.type)
    make = getattr(module, "CUDAGraph", None) or getattr(module, f"{device.type.upper()}Graph", None)
    if device.type == "cpu" or make is None or not hasattr(module, "graph"):
        return [], f"graph capture was not tried: torch.{device.type} has no graphs"
    planned = Planned(implementation)
    eager = case.call(planned)
    side = module.Stream()
    with module.stream(side):
        case.call(planned)
    module.synchronize()
    graph = make()
    with module.graph(graph):
        captured = case.call(planned)
    graph.replay()
    module.synchronize()
    problems = []
    for name, wanted in eager.items():
        try:
            torch.testing.assert_close(captured[name].float(), wanted.float(), equal_nan=True, atol=1e-3, rtol=1e-2)
        except AssertionError as error:
            problems.append(f"{case.label}: {name} of the replayed graph differs from the eager call's: {error}")
    return problems, ""
