"""NVIDIA GPUs for ``hal``: probe, archs, capabilities and the libraries that their kernels come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hal import Arch, ByOp, Device, Erratum, Kernel, Library, Platform, Probe

if TYPE_CHECKING:
    from hal_nvidia._system import System

__all__ = ["NvidiaPlatform"]

_KERNELS: ByOp[Kernel] = ByOp(
    {
        "hal_nvidia.sdpa_kernels:KERNELS": ("attention",),
        "hal_nvidia.flash_attn_2_kernels:KERNELS": ("attention",),
        "hal_nvidia.flash_attn_3_kernels:KERNELS": ("attention",),
        "hal_nvidia.flash_attn_3_mla_kernels:KERNELS": ("mla_attention",),
        "hal_nvidia.flash_attn_4_kernels:KERNELS": ("attention",),
        "hal_nvidia.flashinfer_kernels:KERNELS": ("attention",),
        "hal_nvidia.flashinfer_mla_kernels:KERNELS": ("mla_attention",),
        "hal_nvidia.flashinfer_trtllm_kernels:KERNELS": ("attention",),
        "hal_nvidia.trtllm_mla_kernels:KERNELS": ("mla_attention",),
        "hal_nvidia.flashinfer_op_kernels:KERNELS": (
            "rms_norm",
            "fused_add_rms_norm",
            "layer_norm",
            "silu_and_mul",
            "gelu_and_mul",
            "rotary_embedding",
            "kv_cache_write",
            "merge_attention_states",
        ),
    },
    platforms=("nvidia",),
)


class NvidiaPlatform(Platform):
    """CUDA devices, found through NVML, the driver library in a child process, or an initialised torch."""

    name = "nvidia"
    vendor = "NVIDIA"
    api = 1
    torch_type = "cuda"
    runtime_name = "cuda"
    visibility = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")

    def __init__(self, system: System | None = None) -> None:
        """``system`` is where facts come from; the default is this machine."""
        self._system = system

    def probe(self, environ: Mapping[str, str]) -> Probe:
        """NVIDIA devices in CUDA's order. Creates no CUDA context in this process.

        Raises:
            VisibilityError: a shortened UUID in ``CUDA_VISIBLE_DEVICES`` fits several GPUs.
        """
        from hal_nvidia._probe import probe
        from hal_nvidia._system import System

        return probe(environ, self._system or System())

    def parse_arch(self, text: str) -> Arch:
        """``sm_90``, ``sm90a``, ``compute_90``, ``90``, ``9.0``, ``(9, 0)``: all name ``sm_90``.

        Raises:
            ValueError: ``text`` has none of these forms.
        """
        from hal_nvidia._arch import parse_arch

        return parse_arch(text)

    def capabilities(self, arch: Arch) -> frozenset[str]:
        """What devices of ``arch`` can do; for an arch newer than this release, what every newer one keeps."""
        from hal_nvidia._capabilities import capabilities

        return capabilities(arch)

    def simulate(self, device: Device) -> Device:
        """Name, memory and multiprocessors of the product that ``device`` names, or of its arch's usual one."""
        from hal_nvidia._products import complete

        return complete(device)

    def libraries(self) -> Iterable[Library]:
        """Libraries that NVIDIA's kernels come from."""
        from hal_nvidia._libraries import LIBRARIES

        return LIBRARIES

    def kernels(self) -> Iterable[Kernel]:
        """Kernels of the libraries, as declarations; none is imported."""
        return _KERNELS

    def errata(self) -> Iterable[Erratum]:
        """Known-bad combinations, from ``errata.json``."""
        from hal import load_errata

        return load_errata(Path(__file__).with_name("errata.json"))
