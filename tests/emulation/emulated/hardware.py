"""NVIDIA devices whose tensors live on the CPU, and checks of kernels on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import hal
from hal import _bind, _plugins, testing
from hal_nvidia import NvidiaPlatform
from hal_ops import Request

__all__ = ["ARCHS", "build", "check", "device_of", "kernel_named"]

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")


def device_of(arch: str, cuda: str = "13.0") -> hal.Device:
    """A device of an arch, real as far as HAL is concerned, on which torch computes with the CPU."""
    platform = NvidiaPlatform()
    found = platform.parse_arch(arch)
    version = hal.Version.parse(cuda)
    bare = hal.Device(
        platform="nvidia",
        arch=found,
        torch_type="cpu",
        capabilities=platform.capabilities(found),
        runtime=version,
        driver=hal.Version.parse("580.65"),
    )
    return dataclasses.replace(platform.simulate(bare), torch_type="cpu", simulated=False)


def kernel_named(name: str) -> hal.Kernel:
    """The declaration of a kernel that the NVIDIA platform offers."""
    return next(kernel for kernel in NvidiaPlatform().kernels() if kernel.name == name)


def build(kernel: hal.Kernel | str, request: Request, arch: str = "sm_90") -> Any:
    """What the kernel's factory makes, held against the op's contract."""
    declared = kernel_named(kernel) if isinstance(kernel, str) else kernel
    return _bind.build(declared, _plugins.registry().op(declared.op), request, device_of(arch))


def check(kernel: hal.Kernel | str, request: Request, arch: str = "sm_90", cuda: str = "13.0") -> testing.Result:
    """``hal.testing.check`` on a device of the arch."""
    declared = kernel_named(kernel) if isinstance(kernel, str) else kernel
    return testing.check(declared, request, device=device_of(arch, cuda))
