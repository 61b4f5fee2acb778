"""torch_musa as a source: only where it is imported and MUSA is initialised already. ``torch.cuda`` is never asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal_musa._system import SourceError

if TYPE_CHECKING:
    from hal_musa._gpus import Gpu, Reading

__all__ = ["decode_version", "read_torch"]


def read_torch(torch: Any) -> Reading:
    """The devices of an initialised ``torch.musa``, in its order.

    Raises:
        SourceError: asking would import or initialise something.
    """
    musa = getattr(torch, "musa", None)
    if torch is None or musa is None:
        raise SourceError("torch_musa is not imported here, and not imported to ask")
    if not musa.is_initialized():
        raise SourceError("torch_musa is imported, but MUSA is not initialised, and is not initialised to ask")
    count = musa.device_count()
    if not count:
        raise SourceError("torch.musa is initialised, but counts no device")
    from hal_musa._gpus import Reading

    gpus = tuple(_gpu(index, musa.get_device_properties(index)) for index in range(count))
    return Reading(source="torch_musa", gpus=gpus, ordered=True)


def decode_version(text: str) -> str:
    """``torch.version.musa`` as numbers with dots.

    torch_musa writes the compiler's ``MUSA_VERSION`` as one number ("csrc/core/Module.cpp"): ``4030`` is 4.3.0 (as
    ``CUDA_VERSION`` counts; its tests compare with 4000), ``40306`` would be 4.3.6. Texts with dots stay as they are.
    """
    if not (text.isascii() and text.isdigit()) or not 4 <= len(text) <= 5:
        return text
    number = int(text)
    if len(text) == 4:
        return f"{number // 1000}.{number % 1000 // 10}.{number % 10}"
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _gpu(index: int, properties: Any) -> Gpu:
    from hal_musa._arch import from_number
    from hal_musa._gpus import Gpu

    return Gpu(
        position=index,
        arch=from_number(properties.major, properties.minor),
        name=properties.name,
        memory=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
    )
