"""AMD devices whose tensors live on the CPU, and kernels of the ROCm platform on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import hal
from hal import _bind, _plugins
from hal.testing import Result, check, corners
from hal_ops import Request
from hal_ops.attention.cases import AttentionCase
from hal_rocm import RocmPlatform

__all__ = ["KERNELS", "built", "check_corners", "device_of", "values"]

KERNELS = {kernel.name: kernel for kernel in RocmPlatform().kernels()}


def device_of(arch: str = "gfx942", hip: str = "6.4") -> hal.Device:
    """A device of an arch, real as far as HAL is concerned, on which torch computes with the CPU."""
    platform = RocmPlatform()
    found = platform.parse_arch(arch)
    bare = hal.Device(
        platform="rocm", arch=found, capabilities=platform.capabilities(found), runtime=hal.Version.parse(hip)
    )
    return dataclasses.replace(platform.simulate(bare), torch_type="cpu", simulated=False)


def built(name: str, request: Request, arch: str = "gfx942") -> Any:
    """What a kernel's factory makes, held against its op's contract."""
    kernel = KERNELS[name]
    return _bind.build(kernel, _plugins.registry().op(kernel.op), request, device_of(arch))


def check_corners(name: str, arch: str = "gfx942", limit: int | None = None) -> list[Result]:
    """``hal.testing.check`` for each corner of a kernel's declaration.

    Raises:
        AssertionError: one is not right.
    """
    kernel, device = KERNELS[name], device_of(arch)
    op = _plugins.registry().op(kernel.op)
    results = [check(kernel, r, device=device) for r in corners(kernel, op=op, device=device, limit=limit)]
    assert results
    assert not [r for r in results if not r.ok], "\n".join(str(r) for r in results if not r.ok)
    return results


def values(case: AttentionCase, implementation: Any, atol: float = 2e-2) -> None:
    """Hold what an implementation makes of a case against the oracle."""
    found, right = case.call(implementation), case.expected()
    for name in right:
        torch.testing.assert_close(found[name].double(), right[name], atol=atol, rtol=2e-2)
