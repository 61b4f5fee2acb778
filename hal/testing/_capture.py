"""Graph capture: the kernel's call is captured once and replayed, where the device's torch module has graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hal.testing._cases import tensors_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["capture_problems"]


class _Call:
    """The one call that a case makes of an implementation, to be made again. What it writes to can be restored."""

    def __init__(self, implementation: Callable[..., Any]) -> None:
        self._implementation = implementation
        self._arguments: Any = None
        self._before: dict[str, Tensor] = {}

    def plan(self, step: Any) -> Any:
        return self._implementation.plan(step)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._arguments = {"args": args, "kwargs": kwargs}
        self._before = {path: x.clone() for path, x in tensors_of(self._arguments)}
        return self.again()

    def again(self) -> Any:
        return self._implementation(*self._arguments["args"], **self._arguments["kwargs"])

    def restore(self) -> None:
        for path, x in tensors_of(self._arguments):
            x.copy_(self._before[path])

    def outcome(self, result: Any) -> dict[str, Tensor]:
        """What came back and what was written, by place."""
        return {path: x.clone() for path, x in tensors_of({"result": result, **self._arguments})}


def capture_problems(case: Any, implementation: Callable[..., Any], device: torch.device) -> tuple[list[str], str]:
    """What a replay gets wrong, and a note where nothing could be captured. Planning is no part of the graph."""
    import torch

    module = torch.get_device_module(device.type)
    make = getattr(module, "CUDAGraph", None) or getattr(module, f"{device.type.upper()}Graph", None)
    if device.type == "cpu" or make is None or not hasattr(module, "graph"):
        return [], f"graph capture was not tried: torch.{device.type} has no graphs"
    call = _Call(implementation)
    case.call(call)
    call.restore()
    eager = call.outcome(call.again())
    graph = make()
    try:
        _warm_up(call, module)
        with module.graph(graph):
            result = call.again()
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises during capture is the finding
        first = _first(error)
        return [f"{case.label}: it cannot be captured in a graph: {type(first).__name__}: {first}"], ""
    call.restore()
    graph.replay()
    module.synchronize()
    return _differences(case.label, eager, call.outcome(result)), ""


def _warm_up(call: _Call, module: Any) -> None:
    """Once on another stream, as capturing wants it: what is made at the first call must not be made in the graph."""
    side = module.Stream()
    side.wait_stream(module.current_stream())
    with module.stream(side):
        call.again()
    module.current_stream().wait_stream(side)
    module.synchronize()


def _first(error: BaseException) -> BaseException:
    """What went wrong first: ending a broken capture raises too, and hides it."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _differences(label: str, eager: dict[str, Tensor], replayed: dict[str, Tensor]) -> list[str]:
    import torch

    problems = []
    for path, wanted in eager.items():
        try:
            torch.testing.assert_close(replayed[path].float(), wanted.float(), equal_nan=True, atol=1e-3, rtol=1e-2)
        except AssertionError as error:
            problems.append(f"{label}: {path} after a replay differs from the eager call's: {error}")
    return problems
