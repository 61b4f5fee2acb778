"""Asks the CUDA driver library what it sees and writes the answer to stdout as JSON; run as a child process.

``cuInit`` leaves state behind that does not survive a fork, so the process that probes must not call it itself. No
context is created. Attribute numbers are those of ``CUdevice_attribute`` in ``cuda.h`` (CUDA 13.0).
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

_ATTRIBUTES = {"multiprocessors": 16, "integrated": 18, "bus": 33, "device": 34, "domain": 50, "major": 75, "minor": 76}


def describe(cuda: Any) -> dict[str, Any]:
    """What the driver library ``cuda`` sees: ``{"cuda", "devices"}``, or ``{"error"}``."""
    status = cuda.cuInit(0)
    if status:
        return {"error": f"cuInit failed: {_error(cuda, status)}"}
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    status = cuda.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return {"error": f"cuDeviceGetCount failed: {_error(cuda, status)}"}
    return {"cuda": version.value, "devices": [_device(cuda, ordinal) for ordinal in range(count.value)]}


def _device(cuda: Any, ordinal: int) -> dict[str, Any]:
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    status = cuda.cuDeviceGet(ctypes.byref(handle), ordinal)
    if status:
        return {"problem": f"cuDeviceGet failed: {_error(cuda, status)}"}
    cuda.cuDeviceGetName(name, len(name), handle)
    told = cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle) == 0
    facts: dict[str, Any] = {key: _attribute(cuda, number, handle) for key, number in _ATTRIBUTES.items()}
    facts.update(name=name.value.decode("utf-8", "replace"), uuid=_uuid(cuda, handle))
    return {**facts, "memory": memory.value if told else None}


def _attribute(cuda: Any, number: int, handle: Any) -> int | None:
    value = ctypes.c_int()
    return None if cuda.cuDeviceGetAttribute(ctypes.byref(value), number, handle) else value.value


def _uuid(cuda: Any, handle: Any) -> str:
    """Sixteen bytes as text, without ``GPU-``. Only the second version tells MIG instances from their parent."""
    raw = (ctypes.c_ubyte * 16)()
    call = getattr(cuda, "cuDeviceGetUuid_v2", None) or getattr(cuda, "cuDeviceGetUuid", None)
    if call is None or call(ctypes.byref(raw), handle):
        return ""
    digits = bytes(raw).hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _error(cuda: Any, status: int) -> str:
    name = ctypes.c_char_p()
    if cuda.cuGetErrorName(status, ctypes.byref(name)) or not name.value:
        return f"error {status}"
    return f"{name.value.decode()} ({status})"


def main() -> None:
    """Load the library and write what it says."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        answer = describe(ctypes.CDLL(library))
    except (OSError, AttributeError) as error:
        answer = {"error": f"{library} cannot be used: {error}"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
