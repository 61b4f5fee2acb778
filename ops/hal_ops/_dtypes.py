"""Exact names of number formats, shared by requests and kernels. Needs no torch."""

from __future__ import annotations

import difflib
from typing import Any

__all__ = ["DTYPES", "FP8_DTYPES", "cache_dtype", "device_fp8", "dtype_name", "is_fp8", "torch_dtype"]

FP8_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
DTYPES = ("float64", "float32", "bfloat16", "float16", *FP8_DTYPES, "int8")

_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e4m3fnuz": "float8_e4m3fnuz",
    "fp8_e5m2": "float8_e5m2",
    "fp8_e5m2fnuz": "float8_e5m2fnuz",
}


def dtype_name(value: Any) -> str:
    """The exact format name of a ``torch.dtype`` or of a string.

    Raises:
        ValueError: the name is unknown, or ``"fp8"``/``"fp8_e4m3"``, which name more than one format.
    """
    text = str(value).removeprefix("torch.").strip().lower()
    text = _ALIASES.get(text, text)
    if text in DTYPES:
        return text
    near = difflib.get_close_matches(text, [*DTYPES, *_ALIASES], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown dtype {value!r}{hint} Known: {', '.join(DTYPES)}")


def torch_dtype(name: str) -> Any:
    """The ``torch.dtype`` called ``name``."""
    import torch

    return getattr(torch, dtype_name(name))


def cache_dtype(value: Any, dtype: str) -> str:
    """The format of a cache: that of ``dtype`` unless named, an exact one, or ``"fp8"`` until a device is known."""
    if value in (None, "auto"):
        return dtype
    return "fp8" if value == "fp8" else dtype_name(value)


def device_fp8(capabilities: frozenset[str]) -> str:
    """The e4m3 flavour that a device declares.

    Raises:
        ValueError: it declares neither ``fp8_e4m3fn`` nor ``fp8_e4m3fnuz``.
    """
    for flavour in ("e4m3fn", "e4m3fnuz"):
        if f"fp8_{flavour}" in capabilities:
            return f"float8_{flavour}"
    raise ValueError(
        "kv_dtype='fp8' stands for the device's own e4m3 format, and this device declares none "
        "(fp8_e4m3fn, fp8_e4m3fnuz); name the format exactly, or leave the cache in the compute dtype"
    )


def is_fp8(name: str) -> bool:
    """Whether ``name`` is one of the 8-bit float formats."""
    return name in FP8_DTYPES
