"""Products: what a simulated device has when only its arch or its name is given.

Sources: NVIDIA's data sheets and architecture white papers of the products named; 132 multiprocessors and 143771 MiB
were also read from an H200.
"""

from __future__ import annotations

import dataclasses

from hal import Device
from hal_nvidia._capabilities import capabilities
from hal_ops import record

__all__ = ["CORES_PER_MULTIPROCESSOR", "complete"]

_GIB = 1 << 30

CORES_PER_MULTIPROCESSOR = {
    (7, 0): 64,
    (7, 2): 64,
    (7, 5): 64,
    (8, 0): 64,
    (8, 6): 128,
    (8, 7): 128,
    (8, 9): 128,
    (9, 0): 128,
    (10, 0): 128,
    (10, 3): 128,
    (11, 0): 128,
    (12, 0): 128,
    (12, 1): 128,
}
"""Float32 cores of one multiprocessor, by compute capability (CUDA programming guide, "Arithmetic Instructions")."""


@record(frozen=True)
class Product:
    """One product: its name, bytes of memory and number of multiprocessors."""

    name: str
    memory: int | None
    multiprocessors: int | None


_PRODUCTS: dict[str, tuple[Product, ...]] = {
    "sm_70": (Product("Tesla V100-SXM2-32GB", 32 * _GIB, 80),),
    "sm_75": (Product("Tesla T4", 16 * _GIB, 40),),
    "sm_80": (
        Product("NVIDIA A100-SXM4-80GB", 80 * _GIB, 108),
        Product("NVIDIA A100-SXM4-40GB", 40 * _GIB, 108),
        Product("NVIDIA A30", 24 * _GIB, 56),
    ),
    "sm_86": (
        Product("NVIDIA A10", 24 * _GIB, 72),
        Product("NVIDIA A40", 48 * _GIB, 84),
        Product("NVIDIA GeForce RTX 3090", 24 * _GIB, 82),
    ),
    "sm_87": (Product("Jetson AGX Orin", 64 * _GIB, 16),),
    "sm_89": (
        Product("NVIDIA L40S", 48 * _GIB, 142),
        Product("NVIDIA L4", 24 * _GIB, 58),
        Product("NVIDIA GeForce RTX 4090", 24 * _GIB, 128),
    ),
    "sm_90": (
        Product("NVIDIA H100 80GB HBM3", 80 * _GIB, 132),
        Product("NVIDIA H200", 143771 * (1 << 20), 132),
        Product("NVIDIA H20", 96 * _GIB, 78),
    ),
    "sm_100": (Product("NVIDIA B200", 180 * _GIB, 148),),
    "sm_103": (Product("NVIDIA B300", 268 * _GIB, 148),),
    "sm_110": (Product("NVIDIA Jetson AGX Thor", 128 * _GIB, 20),),
    "sm_120": (
        Product("NVIDIA RTX PRO 6000 Blackwell", 96 * _GIB, 188),
        Product("NVIDIA GeForce RTX 5090", 32 * _GIB, 170),
    ),
    "sm_121": (Product("NVIDIA GB10", 128 * _GIB, 48),),
}


def complete(device: Device) -> Device:
    """``device`` with the fields it leaves open taken from its product; what is given stays."""
    product = _product(device) or Product(device.name, device.memory, device.multiprocessors)
    return dataclasses.replace(
        device,
        name=device.name or product.name,
        memory=product.memory if device.memory is None else device.memory,
        multiprocessors=product.multiprocessors if device.multiprocessors is None else device.multiprocessors,
        capabilities=device.capabilities or capabilities(device.arch),
        torch_type="cuda",
    )


def _product(device: Device) -> Product | None:
    known = _PRODUCTS.get(device.arch.name, ())
    named = [p for p in known if device.name and device.name.lower() in p.name.lower()]
    if device.name and not named:
        return None
    return next(iter(named or known), None)
