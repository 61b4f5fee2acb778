"""On NVIDIA hardware with flashinfer: its functions for rows, at the corners of their declarations and as emulated.

It compiles a module for the norms and one for each gate; where nvidia-cutlass-dsl is installed, the norms are compiled by
that instead, for each hidden size.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from importlib import metadata
from typing import Any

import pytest
import torch
from emulated import flashinfer as emulation
from torch import Tensor

import hal
from hal import testing
from hal._libraries import installed
from hal_nvidia import NvidiaPlatform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(installed("flashinfer-python") is None, reason="flashinfer is not installed"),
    pytest.mark.filterwarnings("default"),
]

DEVICE = "cuda"
GATES = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
NORMS = ("rmsnorm", "gemma_rmsnorm")
CALLS = [
    *(("rmsnorm", form) for form in ("rows", "spaced", "heads")),
    *(("gemma_rmsnorm", form) for form in ("rows", "spaced")),
    *((name, form) for name in GATES for form in ("rows", "heads")),
]


@pytest.fixture(scope="module")
def device() -> hal.Device:
    found = NvidiaPlatform().probe(os.environ).devices
    if not found:
        pytest.skip("no NVIDIA device")
    return found[0]


@pytest.mark.parametrize("name", ["flashinfer.rms_norm", "flashinfer.silu_and_mul", "flashinfer.gelu_and_mul"])
def test_rows_are_right_at_the_corners_of_their_declarations(name: str, device: hal.Device) -> None:
    # requirement A5, D14, P23, P24, C7
    results = [testing.check(name, request, device=device) for request in testing.corners(name, device=device)]
    assert len(results) > 5
    failed = [str(result) for result in results if not result.ok]
    assert not failed, f"{len(failed)} of {len(results)} corners:\n" + "\n".join(failed)


@functools.cache
def emulated(arch: str) -> dict[str, Any]:
    return emulation.emulations(metadata.version("flashinfer-python"), arch)


def inputs(name: str, form: str, place: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """The arguments, and a result full of NaN: rows behind each other, evenly spaced ones, or three dims.

    Gates read x by its shape alone, and get it without gaps.
    """
    torch.manual_seed(0)
    x, weight, gates = (torch.randn(shape).bfloat16().to(place) for shape in ((3, 7, 136), (128,), (3, 7, 2064)))
    norm = name in NORMS
    spaced = x[..., :128] if norm else gates
    rows = {"rows": spaced[0].contiguous(), "spaced": spaced[0], "heads": spaced[:, :6] if norm else spaced}[form]
    out = torch.full((*rows.shape[:-1], 128 if norm else 1032), math.nan, dtype=rows.dtype, device=place)
    return (rows, weight) if norm else (rows,), out


@pytest.mark.parametrize("into", [False, True], ids=["returned", "out"])
@pytest.mark.parametrize(("name", "form"), CALLS)
def test_the_emulation_gives_the_same_rows(name: str, form: str, into: bool, device: hal.Device) -> None:
    # requirement A4
    real = getattr(importlib.import_module(f"flashinfer.{'norm' if name in NORMS else 'activation'}"), name)
    found = []
    for call, place in ((real, DEVICE), (emulated(device.arch.name)[name], "cpu")):
        arguments, out = inputs(name, form, place)
        result = call(*arguments, **({"eps": 1e-5} if name in NORMS else {}), **({"out": out} if into else {}))
        found.append(out if into else result)
    torch.testing.assert_close(found[0].cpu(), found[1], atol=2e-2, rtol=2e-2)
