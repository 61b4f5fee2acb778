"""Forced kernels that cannot run are refused before a launch: nothing is imported, allocated or replaced."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import hal  # noqa: E402
from hal.errors import NoKernelError  # noqa: E402
from hal.testing._verify import circumstances, refusals  # noqa: E402
from hal_nvidia import NvidiaPlatform  # noqa: E402
from hal_ops import Request  # noqa: E402

KERNELS = [kernel for kernel in NvidiaPlatform().kernels() if kernel.op == "attention"]
LIBRARIES = ("flash_attn_2_cuda", "flash_attn_interface", "flash_attn", "flashinfer", "cudnn")


def arguments(request: Request, phase: str) -> dict[str, Any]:
    found = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
    return {**found, "phases": (phase,)}


def refused(kernel: hal.Kernel, device: hal.Device) -> bool:
    """Whether the kernel is refused here at all; where it is, a forced choice must be an error that says why."""
    request = hal.testing.corners(kernel, limit=1)[0]
    why = refusals(kernel, request, circumstances(device))
    if not why:
        return False
    with pytest.raises(NoKernelError) as found:
        hal.get_attention(**arguments(request, kernel.phase), device=device, kernel=kernel.name)
    text = str(found.value)
    for reason in why:
        assert reason.text in text, f"{kernel.name}: {reason.text!r} is not in the error"
    assert "cannot be obeyed" in text
    assert device.arch.name in text
    return True


@pytest.mark.gpu
def test_what_this_device_cannot_run() -> None:  # requirement B1, D10, E6, E7, E9, P25, P28, P45, X1
    """Among them, on Hopper: trtllm-gen, fmha_v2, and what flash-attention 4 has for other archs."""
    found = [d for d in hal.devices() if d.platform == "nvidia"]
    if not found:
        pytest.skip("no NVIDIA device")
    device = found[0]
    loaded = set(LIBRARIES) & set(sys.modules)
    torch.empty(1, device="cuda")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    names = [kernel.name for kernel in KERNELS if refused(kernel, device)]
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before, "something was allocated"
    assert set(LIBRARIES) & set(sys.modules) == loaded, "something was imported to be considered"
    elsewhere = [
        k.name for k in KERNELS if k.platforms["nvidia"].only and device.arch.name not in k.platforms["nvidia"].only
    ]
    assert set(elsewhere) <= set(names)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_what_made_up_devices_cannot_run(arch: str) -> None:  # requirement B1, D10, E6, E7, E9, P28, P45
    """The same without hardware: no library is installed, so that every kernel but torch's own is refused."""
    device = dataclasses.replace(device_of(arch), torch_type="cpu")
    with hal.simulate(libraries={"torch": "2.11.0"}):
        names = {kernel.name for kernel in KERNELS if refused(kernel, device)}
    assert names >= {k.name for k in KERNELS if not k.library.startswith("sdpa")}


def device_of(arch: str) -> hal.Device:
    """A device that is real as far as HAL is concerned."""
    platform = NvidiaPlatform()
    found = platform.parse_arch(arch)
    return hal.Device(
        platform="nvidia",
        arch=found,
        capabilities=platform.capabilities(found),
        runtime=hal.Version.parse("13.0"),
        driver=hal.Version.parse("580.65"),
    )
