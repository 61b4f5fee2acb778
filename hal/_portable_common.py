"""What the declarations of the ``portable`` platform have in common."""

from __future__ import annotations

from collections.abc import Sequence

from hal._device import Device
from hal._kernel import Needs
from hal._reason import Reason
from hal_ops import Request, is_fp8

__all__ = ["TORCH", "TRITON", "cache_format", "fp8_format"]

TORCH = Needs("torch", ">=2.6", install="`pip install torch`")
TRITON = Needs("triton", ">=3.2", ("triton", "pytorch-triton", "pytorch-triton-rocm"))


def cache_format(request: Request, device: Device) -> Sequence[Reason]:
    """Which FP8 formats Triton converts is said by the device's platform."""
    return fp8_format(str(request.kv_dtype), "kv_dtype", device)  # type: ignore[attr-defined]


def fp8_format(given: str, field: str, device: Device) -> Sequence[Reason]:
    """The same for the format that ``field`` holds."""
    if not is_fp8(given) or f"triton_{given.replace('float8', 'fp8')}" in device.capabilities:
        return []
    return [Reason("capability_missing", f"Triton does not convert {given} on {device.arch.name}", field, given)]
