"""On NVIDIA hardware with flashinfer: all but attention, at the corners of their declarations and as emulated.

It compiles a module for the norms, one for each gate, and ``rope``, ``page`` and ``cascade``; where nvidia-cutlass-dsl is
installed, the norms are compiled by that instead, for each hidden size.
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
from hal_nvidia import NvidiaPlatform, flashinfer_op_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(installed("flashinfer-python") is None, reason="flashinfer is not installed"),
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


@pytest.mark.parametrize("name", [kernel.name for kernel in flashinfer_op_kernels.KERNELS])
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


def others(name: str, place: str) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """Arguments of a function that is not in ``CALLS``, and those of them that it changes."""
    torch.manual_seed(0)
    x, y = (torch.randn(7, 4, 128).bfloat16().to(place) for _ in range(2))
    rows, residual, weight = x[:, 0].contiguous(), y[:, 0].contiguous(), torch.rand(128).to(place)
    if name.endswith("fused_add_rmsnorm"):
        return (rows, residual, weight.bfloat16()), (rows, residual)
    if name == "layernorm":
        return (rows, weight, weight.flip(0)), ()
    table = torch.rand(9, 64).to(place)
    positions = torch.tensor([0, 3, 7, 7, 1, 2, 5], dtype=torch.int32, device=place)
    if name.startswith("apply_rope"):
        return (positions, x, y, 128, table, not name.endswith("inplace")), ((x, y) if name.endswith("inplace") else ())
    if name == "append_paged_kv_cache":
        caches = tuple(torch.zeros(3, 4, 4, 128).bfloat16().to(place) for _ in range(2))
        first, pages = torch.zeros_like(positions), torch.tensor([2, 0, 1], dtype=torch.int32, device=place)
        ends = torch.tensor([0, 3], dtype=torch.int32, device=place)
        slots = torch.tensor([0, 3, 11, 7, 1, 2, 5], dtype=torch.int32, device=place)
        return (x, y, first, slots, caches, pages, ends, ends[:1] + 4), caches
    lse = torch.linspace(-9, 9, 28, device=place).view(7, 4)
    return (x, lse, y, lse.flip(0).contiguous()), ()


@pytest.mark.parametrize(
    "name",
    [
        "norm.fused_add_rmsnorm",
        "norm.gemma_fused_add_rmsnorm",
        "norm.layernorm",
        "rope.apply_rope_with_cos_sin_cache",
        "rope.apply_rope_with_cos_sin_cache_inplace",
        "page.append_paged_kv_cache",
        "cascade.merge_state",
    ],
)
def test_the_emulation_does_the_same(name: str, device: hal.Device) -> None:  # requirement A4
    module, _, function = name.partition(".")
    real = getattr(importlib.import_module(f"flashinfer.{module}"), function)
    found = []
    for call, place in ((real, DEVICE), (emulated(device.arch.name)[function], "cpu")):
        given, changed = others(function, place)
        result = call(*given)
        results = result if isinstance(result, tuple) else () if result is None else (result,)
        found.append([x.cpu() for x in (*results, *changed)])
    assert found[0]
    torch.testing.assert_close(found[0], found[1], atol=3e-2, rtol=2e-2)


def test_rows_that_begin_anywhere_do_not_stop_the_device(device: hal.Device) -> None:  # requirement D14, P24
    """The library reads 16 bytes at a time."""
    x, weight = torch.randn(6, 67, device=DEVICE).bfloat16()[:, 3:], torch.randn(65, device=DEVICE).bfloat16()[1:]
    norm = hal.get_op("rms_norm", hidden_size=64, device=device, kernel="flashinfer")
    found = norm(x, weight)
    wanted = torch.nn.functional.rms_norm(x.float(), (64,), weight.float(), 1e-6)
    torch.testing.assert_close(found.float(), wanted, atol=3e-2, rtol=2e-2)


def test_a_write_is_captured_and_replayed(device: hal.Device) -> None:  # requirement E12, P37
    """With other slots, all of them skipped among those."""
    write = hal.get_op(
        "kv_cache_write", num_kv_heads=2, head_dim=64, page_size=16, graph=True, device=device, kernel="flashinfer"
    )
    k, v = (torch.randn(5, 2, 64, device=DEVICE).bfloat16() for _ in range(2))
    caches = tuple(torch.zeros(4, 16, 2, 64, device=DEVICE).bfloat16() for _ in range(2))
    slots = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    write(k, v, *caches, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(k, v, *caches, slots)
    for given in ([-1, 3, 17, -1, 63], [-1] * 5, [1, 0, 2, 33, 34]):
        slots.copy_(torch.tensor(given))
        for cache in caches:
            cache.zero_()
        graph.replay()
        for x, cache in ((k, caches[0]), (v, caches[1])):
            wanted = torch.zeros(64, 2, 64, device=DEVICE).bfloat16()
            for token, slot in enumerate(given):
                if slot >= 0:
                    wanted[slot] = x[token]
            assert torch.equal(cache.flatten(0, 1), wanted)
