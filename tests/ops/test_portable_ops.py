"""The declared kernels of the ops beside attention: each does what it declares, and no field goes unanswered."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import hal
from hal._portable_ops import KERNELS
from hal.errors import NoKernelError
from hal.testing import check, corners, request_id
from hal_ops import Op, resolve_target

OPS = tuple(hal._plugins.registry().op(name) for name in dict.fromkeys(kernel.op for kernel in KERNELS))
ON_CPU = [kernel for kernel in KERNELS if kernel.library in ("torch", "reference")]
DEVICES = ("nvidia:sm_80", "nvidia:sm_90", "rocm:gfx942", "musa:mp_31")
LIBRARIES = {"torch": "2.11.0", "triton": "3.6.0"}


def op_of(kernel: hal.Kernel) -> Op:
    return next(op for op in OPS if op.name == kernel.op)


def plain(op: Op, **fields: Any) -> Any:
    own = (
        {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64} if op.name == "rotary_embedding" else {"hidden_size": 64}
    )
    extra = {"fp8_dtype": "float8_e4m3fn"} if op.name == "fp8_quantize" else {}
    return op.request(**own, **extra, **fields)


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda k: k.name)
def test_kernels_do_what_they_declare(kernel: hal.Kernel) -> None:  # requirement X11, P24
    """Values, inputs unchanged, equal bits where deterministic, gradients, in each of the corners."""
    found = [check(kernel, request, device="cpu") for request in corners(kernel, op=op_of(kernel))]
    assert len(found) > 8
    wrong = [str(result) for result in found if not result.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_field_is_tried_by_some_corner(op: Op) -> None:
    """Of the torch and the Triton kernel together: a field that no corner moves would be tested by nobody."""
    moved = set()
    for kernel in KERNELS:
        if kernel.op == op.name and kernel.library != "reference":
            requests = corners(kernel, op=op)
            moved |= {n for n in op.request.rules() if len({getattr(r, n) for r in requests}) > 1}
    assert moved == set(op.request.rules()) - ({"needs_grad"} if op.name == "fp8_quantize" else set())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_triton_is_chosen_where_it_reaches(op: Op, device: str) -> None:  # requirement R12
    with hal.simulate(device, libraries=LIBRARIES):
        assert hal.select(plain(op)).kernels() == {"call": f"triton.{op.name}"}
        assert hal.select(plain(op, dtype="float64")).kernels() == {"call": f"torch.{op.name}"}


@pytest.mark.parametrize("op", OPS[:6], ids=lambda op: op.name)
def test_gradients_are_torchs(op: Op) -> None:
    with hal.simulate(DEVICES[1], libraries=LIBRARIES):
        assert hal.select(plain(op, needs_grad=True)).kernels() == {"call": f"torch.{op.name}"}


@pytest.mark.parametrize("device", ["nvidia:sm_75", "rocm:gfx906", "musa:mp_22"])
def test_triton_is_not_chosen_where_it_does_not_reach(device: str) -> None:
    with hal.simulate(device, libraries=LIBRARIES):
        for op in OPS:
            assert hal.select(plain(op)).kernels() == {"call": f"torch.{op.name}"}


def test_without_triton_and_without_its_version() -> None:
    for libraries in ({"torch": "2.11.0"}, {"torch": "2.11.0", "triton": "3.1.0"}):
        with hal.simulate(DEVICES[1], libraries=libraries):
            decided = hal.select(plain(OPS[0]))
            assert decided.kernels() == {"call": "torch.rms_norm"}
            assert "triton" in decided.explain()


def test_tokens_of_any_length_are_quantised_by_triton() -> None:
    """The down projection of a large model has 28672 elements a token."""
    with hal.simulate(DEVICES[1], libraries=LIBRARIES):
        decided = hal.select(dataclasses.replace(plain(OPS[-1]), hidden_size=28672))
    assert decided.kernels() == {"call": "triton.fp8_quantize"}


def test_a_quantisation_has_no_gradient() -> None:
    with hal.simulate(DEVICES[1], libraries=LIBRARIES), pytest.raises(NoKernelError, match="needs_grad"):
        hal.get_op("fp8_quantize", hidden_size=64, needs_grad=True)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_contracts_are_whole(op: Op) -> None:
    assert op.keywords["call"][-1] == "out"
    assert op.traced is not None
    for target in (*op.reference.values(), op.cases, op.traced.outputs):
        assert callable(resolve_target(str(target)))
    assert request_id(plain(op)).startswith(("hidden_size=64", "num_q_heads=4"))
