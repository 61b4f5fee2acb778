"""Products: names by PCI device id, and what a simulated device has when only its arch or name is given.

Sources: libdrm's ``amdgpu.ids`` (ids and names); AMD's product pages (memory, compute units). One MI250X is two GPUs.
"""

from __future__ import annotations

import dataclasses

from hal import Device
from hal_ops import record
from hal_rocm._capabilities import capabilities
from hal_rocm._facts import facts_of

__all__ = ["NAMES", "complete"]

_GIB = 1 << 30

NAMES = {
    0x738C: "AMD Instinct MI100",
    0x740C: "AMD Instinct MI250X / MI250",
    0x7408: "AMD Instinct MI250X",
    0x740F: "AMD Instinct MI210",
    0x74A0: "AMD Instinct MI300A",
    0x74A1: "AMD Instinct MI300X",
    0x74A2: "AMD Instinct MI308X",
    0x74A5: "AMD Instinct MI325X",
    0x74B5: "AMD Instinct MI300X VF",
    0x75A0: "AMD Instinct MI350X",
    0x75A3: "AMD Instinct MI355X",
}
"""Product names of data-center cards by PCI device id, for machines that state none. Radeon ids name several cards."""


@record(frozen=True)
class Product:
    """One product: its name, bytes of memory and number of compute units."""

    name: str
    memory: int | None
    units: int | None


_PRODUCTS: dict[str, tuple[Product, ...]] = {
    "gfx906": (Product("AMD Instinct MI50", 32 * _GIB, 60),),
    "gfx908": (Product("AMD Instinct MI100", 32 * _GIB, 120),),
    "gfx90a": (
        Product("AMD Instinct MI250X", 64 * _GIB, 110),
        Product("AMD Instinct MI210", 64 * _GIB, 104),
    ),
    "gfx942": (
        Product("AMD Instinct MI300X", 192 * _GIB, 304),
        Product("AMD Instinct MI325X", 256 * _GIB, 304),
        Product("AMD Instinct MI300A", 128 * _GIB, 228),
    ),
    "gfx950": (
        Product("AMD Instinct MI355X", 288 * _GIB, 256),
        Product("AMD Instinct MI350X", 288 * _GIB, 256),
    ),
    "gfx1030": (Product("AMD Radeon RX 6900 XT", 16 * _GIB, 80),),
    "gfx1100": (Product("AMD Radeon RX 7900 XTX", 24 * _GIB, 96),),
    "gfx1151": (Product("AMD Radeon 8060S", None, 40),),
    "gfx1201": (Product("AMD Radeon RX 9070 XT", 16 * _GIB, 64),),
}


def complete(device: Device) -> Device:
    """``device`` with the fields it leaves open taken from its product; what is given stays."""
    product = _product(device) or Product(device.name, device.memory, device.multiprocessors)
    facts = facts_of(device.arch)
    return dataclasses.replace(
        device,
        name=device.name or product.name,
        memory=product.memory if device.memory is None else device.memory,
        multiprocessors=product.units if device.multiprocessors is None else device.multiprocessors,
        capabilities=device.capabilities or capabilities(device.arch),
        torch_type="cuda",
        properties=device.properties or (() if facts is None else facts.properties()),
    )


def _product(device: Device) -> Product | None:
    known = _PRODUCTS.get(device.arch.name, ())
    named = [p for p in known if device.name and device.name.lower() in p.name.lower()]
    return None if device.name and not named else next(iter(named or known), None)
