"""MTML through ``pymtml`` (distribution ``mthreads-ml-py``; written against 2.4.3). Creates no MUSA context.

The library is initialised once and never shut down: other users of ``pymtml`` in the process share its handle. Its
``nvmlDeviceGetCudaComputeCapability`` is not called, because it imports torch and starts MUSA on every device; the arch
follows from the product name instead.
"""

from __future__ import annotations

from typing import Any

from hal_musa._arch import UNKNOWN
from hal_musa._gpus import Gpu, Reading
from hal_musa._products import arch_of, product_of
from hal_musa._system import SourceError

__all__ = ["read_mtml"]

_UNKNOWN_PRODUCT = "MTML calls it {name!r}, whose arch is not known here: use it once with torch.musa, then probe again"


def read_mtml(mtml: Any) -> Reading:
    """Every GPU that MTML lists, in MTML's order.

    Raises:
        SourceError: MTML does not start, or lists nothing.
    """
    try:
        if not getattr(mtml, "_mtmlLib_refcount", 0):
            mtml.mtmlLibraryInit()
        count = mtml.mtmlLibraryCountDevice()
    except OSError as error:
        first = str(error).partition("\n")[0]
        raise SourceError(f"MTML's library cannot be loaded: {first}", "install the Moore Threads driver") from error
    except mtml.MTMLError as error:
        raise SourceError(f"MTML does not start: {error}", "`mthreads-gmi` shows whether the driver works") from error
    if not count:
        raise SourceError("MTML starts, but lists no GPU")
    reader = _Reader(mtml)
    gpus = tuple(reader.gpu(index) for index in range(count))
    untold = tuple(f"{call}: {why}" for call, why in reader.untold.items())
    return Reading(source="MTML", gpus=gpus, driver=reader.driver(), untold=untold)


class _Reader:
    """Asks MTML, and remembers what it would not tell."""

    def __init__(self, mtml: Any) -> None:
        self.mtml = mtml
        self.untold: dict[str, str] = {}

    def ask(self, call: str, *arguments: Any) -> Any:
        """The answer, or None where this driver or device does not support the question."""
        function = getattr(self.mtml, call, None)
        if function is None:
            self.untold[call] = "this pymtml lacks it"
            return None
        try:
            return function(*arguments)
        except self.mtml.MTMLError as error:
            self.untold[call] = str(error)
            return None

    def gpu(self, index: int) -> Gpu:
        handle = self.ask("mtmlLibraryInitDeviceByIndex", index)
        if handle is None:
            why = self.untold["mtmlLibraryInitDeviceByIndex"]
            return Gpu(position=index, problem=f"MTML cannot open GPU {index}: {why}")
        name = _text(self.ask("mtmlDeviceGetName", handle))
        product, arch = product_of(name), arch_of(name)
        return Gpu(
            position=index,
            arch=arch,
            name=name,
            memory=self.memory(handle),
            multiprocessors=product.multiprocessors if product else None,
            uuid=_text(self.ask("mtmlDeviceGetUUID", handle)),
            pci=_text(getattr(self.ask("mtmlDeviceGetPciInfo", handle), "sbdf", "")).lower(),
            problem=_UNKNOWN_PRODUCT.format(name=name) if arch == UNKNOWN else "",
        )

    def memory(self, handle: Any) -> int | None:
        """Bytes. The memory handle is freed again; the device and library handles are MTML's own."""
        memory = self.ask("mtmlDeviceInitMemory", handle)
        if memory is None:
            return None
        total = self.ask("mtmlMemoryGetTotal", memory)
        self.ask("mtmlDeviceFreeMemory", memory)
        return None if total is None else int(total)

    def driver(self) -> str:
        system = self.ask("mtmlLibraryInitSystem")
        return "" if system is None else _text(self.ask("mtmlSystemGetDriverVersion", system))


def _text(value: Any) -> str:
    """Fields of structures may be bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
