"""One kernel, one request, against the reference: values, inputs, determinism, gradients, graph capture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hal import _bind, _devices, _eligibility, _plugins
from hal._device import Device
from hal._kernel import Kernel
from hal.errors import DeviceError, InputError
from hal.testing._capture import capture_problems
from hal.testing._cases import make_cases, make_gradient_cases, tensors_of
from hal.testing._corners import find_kernel, request_id
from hal.testing._gradients import gradient_problems
from hal.testing._watched import KernelError, Watched, blamed
from hal_ops import Op, Request

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Result", "check"]


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one check.

    ``status`` is ``"verified"``, ``"failed"`` or ``"untested"``: memory ran out, or the inputs, the reference or the
    comparison failed, so that nothing is known about the kernel. ``detail`` says what was found; ``max_error`` is the
    largest absolute error of any output.
    """

    kernel: str
    phase: str
    request: Request
    status: str
    detail: str
    max_error: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the kernel did everything right."""
        return self.status == "verified"

    def __str__(self) -> str:
        return f"{self.kernel} {self.status} ({request_id(self.request)}): {self.detail}"


def check(kernel: Kernel | str, request: Request, *, device: Any = None, seed: int = 0) -> Result:
    """Run a kernel for a request, and hold what it does against the op's contract.

    Outputs are compared by value with the reference in float64, within bounds that plain torch itself needs in the
    request's format. Slots that no length covers hold NaN. Beside values, shapes and dtypes: inputs must be unchanged;
    with ``deterministic`` two runs must agree to the bit; with ``needs_grad`` gradients must be those of the
    reference; with ``graph`` the call is captured and replayed, where the device can. Whatever the kernel raises is a
    failure with its text.

    Args:
        kernel: a declaration, or a registered kernel's name. request: with no field left open.
        device: anything :func:`hal.device` takes. seed: of the inputs.

    Raises:
        InputError: the kernel does not declare that it serves the request, or a field of it is open.
        DeviceError: the device is simulated.
    """
    kernel, where = find_kernel(kernel), _devices.device(device)
    op = _plugins.registry().op(kernel.op)
    _check_asked(kernel, request, where)
    import torch

    findings = _Findings(kernel, request, where.torch_device())
    try:
        cases = list(make_cases(op, request, kernel.phase, findings.place, seed))
        implementation = Watched(blamed(_bind.build, kernel, op, request, where), findings.place)
        for case in cases:
            findings.look(case, implementation)
        findings.look_at_gradients(implementation, op, seed)
    except KernelError as fault:
        findings.problems.append(f"{findings.label}{fault}")
    except (MemoryError, torch.OutOfMemoryError) as raised:
        findings.gap = f"memory ran out: {raised}"
    except Exception as raised:  # noqa: BLE001 - the result says it, and nothing is held against the kernel
        findings.gap = f"the check itself failed: {findings.label}{type(raised).__name__}: {raised}"
    return findings.result()


@dataclasses.dataclass
class _Findings:
    """What the cases of one check show."""

    kernel: Kernel
    request: Request
    place: torch.device
    label: str = ""
    gap: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: dict[str, None] = dataclasses.field(default_factory=dict)
    error: float = 0.0

    def result(self) -> Result:
        status = "failed" if self.problems else "untested" if self.gap else "verified"
        problems = "\n".join(dict.fromkeys(self.problems))
        detail = problems or self.gap or "; ".join([f"max error {self.error:.3g}", *self.notes])
        return Result(self.kernel.name, self.kernel.phase, self.request, status, detail, self.error)

    def look(self, case: Any, implementation: Watched) -> None:
        """Run one case, and hold everything against the contract but gradients."""
        self.label = f"{case.label}: "
        before = {path: _bits(x).clone() for path, x in tensors_of(case)}
        outputs = blamed(_outputs, case, implementation)
        self.problems += [f"{self.label}it changed its input {path}" for path in _changed(case, before)]
        if getattr(self.request, "deterministic", False):
            unequal = _unequal(outputs, case.call(implementation))
            self.problems += [f"{self.label}two runs differ in {name}" for name in unequal]
        for comparison in case.check(implementation):
            self.error = max(self.error, comparison.max_error)
            self.problems += [] if comparison.ok else [comparison.report()]
        if getattr(self.request, "graph", False):
            problems, note = blamed(capture_problems, case, implementation.bare, self.place)
            self.problems += problems
            self.notes.update({note: None} if note else {})

    def look_at_gradients(self, implementation: Watched, op: Op, seed: int) -> None:
        """The same for gradients, if the request needs them."""
        if getattr(self.request, "needs_grad", False):
            for case in make_gradient_cases(op, self.request, self.kernel.phase, self.place, seed):
                self.label = f"{case.label}: "
                self.problems += gradient_problems(case, implementation, op, self.kernel.phase)


def _check_asked(kernel: Kernel, request: Request, device: Device) -> None:
    if device.simulated:
        raise DeviceError(f"{device} is simulated: kernels are checked by running them")
    if request.op != kernel.op:
        raise InputError(f"{kernel.name} serves {kernel.op}, and the request is for {request.op}")
    opens = [n for n in request.open_fields() if request.rules()[n].applies(kernel.phase)]
    if opens:
        raise InputError(f"{', '.join(opens)} of the request is open: give values, or take hal.select(request).request")
    reasons = [*_eligibility._fields(kernel, request), *(kernel.check(request, device) if kernel.check else ())]
    if reasons:
        raise InputError(f"{kernel.name} does not say that it serves this request: {'; '.join(map(str, reasons))}")


def _changed(case: Any, before: dict[str, Tensor]) -> Iterator[str]:
    import torch

    for path, x in tensors_of(case):
        if not torch.equal(_bits(x), before[path]):
            yield path


def _outputs(case: Any, implementation: Watched) -> dict[str, Tensor]:
    """What comes back, all of it tensors."""
    import torch

    outputs: dict[str, Tensor] = case.call(implementation)
    strange = [f"{name} is {value!r}" for name, value in outputs.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise TypeError(f"it returned no tensor: {', '.join(strange)}")
    return outputs


def _unequal(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    import torch

    return [name for name in first if not torch.equal(_bits(first[name]), _bits(second[name]))]


def _bits(x: Tensor) -> Tensor:
    """The tensor's bits, for comparisons in which NaN equals itself."""
    import torch

    return x.detach().contiguous().flatten().view(torch.uint8)
