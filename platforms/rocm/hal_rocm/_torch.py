"""torch as a source: only where it is imported and HIP is initialised already (WSL and Windows have no KFD)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal_rocm._system import SourceError

if TYPE_CHECKING:
    from hal_rocm._gpus import Gpu, Reading

__all__ = ["read_torch"]


def read_torch(torch: Any) -> Reading:
    """The devices of an initialised HIP build of torch, in its order.

    Raises:
        SourceError: asking would import or initialise something, or ``torch.cuda`` is not HIP.
    """
    if torch is None:
        raise SourceError("not imported here, and not imported to ask")
    if not getattr(getattr(torch, "version", None), "hip", None):
        raise SourceError("this torch is not built for ROCm")
    home = getattr(getattr(torch.cuda, "get_device_properties", None), "__module__", "nowhere")
    if home != "torch.cuda":
        raise SourceError(
            f"torch.cuda.get_device_properties comes from {home}: torch.cuda is patched, so it is not asked"
        )
    if not torch.cuda.is_initialized():
        raise SourceError("imported, but HIP is not initialised, and is not initialised to ask")
    count = torch.cuda.device_count()
    if not count:
        raise SourceError("torch.cuda is initialised, but counts no device")
    from hal_rocm._gpus import Reading

    gpus = tuple(_gpu(torch.cuda.get_device_properties(i)) for i in range(count))
    return Reading(source="torch", gpus=gpus, ordered=True)


def _gpu(properties: Any) -> Gpu:
    """torch counts work group processors on RDNA, two compute units each; the arch tells which it is."""
    from hal_rocm._arch import parse_arch
    from hal_rocm._gpus import Gpu

    arch = parse_arch(properties.gcnArchName)
    units = properties.multi_processor_count * (2 if arch.line == "rdna" else 1)
    return Gpu(arch=arch, name=properties.name, memory=properties.total_memory, units=units)
