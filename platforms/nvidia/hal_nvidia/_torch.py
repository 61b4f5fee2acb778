"""torch as a source: only where it is imported and CUDA is initialised already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal_nvidia._system import SourceError

if TYPE_CHECKING:
    from hal_nvidia._cards import Card, Reading

__all__ = ["OTHERS", "read_torch"]

OTHERS = {"hip": "ROCm", "musa": "MUSA"}
"""What torch may be built for instead of CUDA."""


def read_torch(torch: Any) -> Reading:
    """The devices of an initialised ``torch.cuda``, in its order.

    Raises:
        SourceError: asking would import or initialise something, or ``torch.cuda`` is not CUDA.
    """
    if torch is None:
        raise SourceError("not imported here, and not imported to ask")
    _require_cuda(torch)
    if not torch.cuda.is_initialized():
        raise SourceError("imported, but CUDA is not initialised, and is not initialised to ask")
    count = torch.cuda.device_count()
    if not count:
        raise SourceError("torch.cuda is initialised, but counts no device")
    from hal_nvidia._cards import Reading

    cards = tuple(_card(i, torch.cuda.get_device_properties(i)) for i in range(count))
    return Reading(source="torch", cards=cards, cuda=str(torch.version.cuda), ordered=True)


def _require_cuda(torch: Any) -> None:
    """Adapters such as torchada, torch_musa and torch_npu put other vendors' functions into ``torch.cuda``."""
    version = getattr(torch, "version", None)
    for vendor in OTHERS:
        if getattr(version, vendor, None):
            built = getattr(version, vendor)
            raise SourceError(f"this torch is built for {vendor} {built}, so torch.cuda is not CUDA")
    if not getattr(version, "cuda", None):
        raise SourceError("this torch is built without CUDA")
    for name in ("is_initialized", "get_device_properties", "_lazy_init"):
        home = getattr(getattr(torch.cuda, name, None), "__module__", "nowhere")
        if home != "torch.cuda":
            raise SourceError(f"torch.cuda.{name} comes from {home}: torch.cuda is patched, so it is not asked")


def _card(position: int, properties: Any) -> Card:
    from hal_nvidia._cards import Card

    uuid = str(getattr(properties, "uuid", "") or "")
    bus = getattr(properties, "pci_bus_id", None)
    known = bus is not None and hasattr(properties, "pci_domain_id")
    pci = f"{properties.pci_domain_id:04x}:{bus:02x}:{properties.pci_device_id:02x}.0" if known else ""
    return Card(
        position=position,
        uuid=f"GPU-{uuid}" if uuid and not uuid.startswith(("GPU-", "MIG-")) else uuid,
        pci=pci,
        name=properties.name,
        capability=(properties.major, properties.minor),
        memory=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        integrated=bool(getattr(properties, "is_integrated", False)),
    )
