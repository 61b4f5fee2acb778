"""AMD GPUs for ``hal``: probe, archs, capabilities and the libraries that their kernels come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hal import Arch, ByOp, Device, Erratum, Kernel, Library, Platform, Probe

if TYPE_CHECKING:
    from hal_rocm._system import System

__all__ = ["RocmPlatform"]

_KERNELS: ByOp[Kernel] = ByOp(
    {
        "hal_rocm.aiter_kernels:KERNELS": ("attention",),
        "hal_rocm.aiter_pa_kernels:KERNELS": ("attention",),
        "hal_rocm.aiter_mla_kernels:KERNELS": ("mla_attention",),
        "hal_rocm.aiter_triton_kernels:KERNELS": ("attention",),
        "hal_rocm.aiter_op_kernels:KERNELS": (
            "rms_norm",
            "fused_add_rms_norm",
            "layer_norm",
            "silu_and_mul",
            "gelu_and_mul",
            "rotary_embedding",
            "kv_cache_write",
        ),
        "hal_rocm.flash_attn_kernels:KERNELS": ("attention",),
        "hal_rocm.sdpa_kernels:KERNELS": ("attention",),
    },
    platforms=("rocm",),
)


class RocmPlatform(Platform):
    """HIP devices, found through the kernel's KFD topology or an initialised torch."""

    name = "rocm"
    vendor = "AMD"
    api = 1
    torch_type = "cuda"
    runtime_name = "hip"
    visibility = (
        "ROCR_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "CUDA_VISIBLE_DEVICES",
        "HSA_OVERRIDE_GFX_VERSION",
    )

    def __init__(self, system: System | None = None) -> None:
        """``system`` is where facts come from; the default is this machine."""
        self._system = system

    def probe(self, environ: Mapping[str, str]) -> Probe:
        """AMD devices in HIP's order. Initialises no HIP runtime.

        Raises:
            VisibilityError: the variables that select devices contradict each other, or a shortened UUID fits several.
        """
        from hal_rocm._probe import probe
        from hal_rocm._system import System

        return probe(environ, self._system or System())

    def parse_arch(self, text: str) -> Arch:
        """``gfx942``, ``gfx942:sramecc+:xnack-``, ``amdgcn-amd-amdhsa--gfx942``: all name ``gfx942``.

        Raises:
            ValueError: ``text`` has none of these forms.
        """
        from hal_rocm._arch import parse_arch

        return parse_arch(text)

    def capabilities(self, arch: Arch) -> frozenset[str]:
        """What devices of ``arch`` can do. Of one that is not known: that Triton may be tried."""
        from hal_rocm._capabilities import capabilities

        return capabilities(arch)

    def simulate(self, device: Device) -> Device:
        """Name, memory and compute units of the product that ``device`` names, or of its arch's usual one."""
        from hal_rocm._products import complete

        return complete(device)

    def kernels(self) -> Iterable[Kernel]:
        """What aiter, flash-attn and torch offer on AMD's devices."""
        return _KERNELS

    def errata(self) -> Iterable[Erratum]:
        """What is known to be wrong with them, from ``errata.json``."""
        from hal import load_errata

        return load_errata(Path(__file__).with_name("errata.json"))

    def libraries(self) -> Iterable[Library]:
        """Libraries that AMD's kernels come from."""
        from hal_rocm._libraries import LIBRARIES

        return LIBRARIES
