"""Products: which arch a product name means, and what a simulated device has.

Sources: Moore Threads' product pages; torch_musa 2.7.1 (``README.md``, ``utils/musa_extension.py``: S80 and S3000 are
mp_21, S4000 is mp_22); ``musaInfo`` of MUSA 5.2 on an S5000 (compute capability 3.1, 56 multiprocessors, 79.91 GB).
"""

from __future__ import annotations

import dataclasses
import re

from hal import Arch, Device
from hal_musa._arch import UNKNOWN, parse_arch
from hal_musa._capabilities import capabilities
from hal_ops import record

__all__ = ["PRODUCTS", "Product", "arch_of", "complete", "product_of"]

_GIB = 1 << 30


@record(frozen=True)
class Product:
    """One product: its name, arch, bytes of memory, and number of multiprocessors where a source states it."""

    name: str
    arch: str
    memory: int
    multiprocessors: int | None = None


PRODUCTS = (
    Product("MTT S80", "mp_21", 16 * _GIB),
    Product("MTT S70", "mp_21", 7 * _GIB),
    Product("MTT S3000", "mp_21", 32 * _GIB),
    Product("MTT S4000", "mp_22", 48 * _GIB),
    Product("MTT S5000", "mp_31", 80 * _GIB, 56),
)

_MODEL = re.compile(r"\bS\d{2,4}\b", re.IGNORECASE)


def product_of(name: str) -> Product | None:
    """The product that a driver's ``name`` means (``"MTT S5000"``, ``"S5000"``); None if it is not known."""
    models = {match.upper() for match in _MODEL.findall(name)}
    return next((p for p in PRODUCTS if p.name.partition(" ")[2] in models), None)


def arch_of(name: str) -> Arch:
    """The arch of the product called ``name``, or the unknown arch."""
    product = product_of(name)
    return UNKNOWN if product is None else parse_arch(product.arch)


def complete(device: Device) -> Device:
    """``device`` with the fields it leaves open taken from its product; what is given stays."""
    usual = next((p for p in PRODUCTS if p.arch == device.arch.name), None)
    product = product_of(device.name) if device.name else usual
    if product is None or product.arch != device.arch.name:
        product = Product(device.name, device.arch.name, device.memory or 0)
    return dataclasses.replace(
        device,
        name=device.name or product.name,
        memory=(product.memory or None) if device.memory is None else device.memory,
        multiprocessors=product.multiprocessors if device.multiprocessors is None else device.multiprocessors,
        capabilities=device.capabilities or capabilities(device.arch),
        torch_type="musa",
    )
