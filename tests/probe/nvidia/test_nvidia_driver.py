"""What the child process asks of the driver library, with a library that answers from a list."""

# ruff: noqa: N802 - names are libcuda's

from __future__ import annotations

from typing import Any

from hal_nvidia._ask_driver import describe

NAMES = {16: "multiprocessors", 18: "integrated", 33: "bus", 34: "device", 50: "domain", 75: "major", 76: "minor"}


class FakeCuda:
    """The calls of libcuda that the child makes. Pointers are ctypes ``byref`` objects."""

    def __init__(self, devices: list[dict[str, Any]], *, init: int = 0, uuid_v2: bool = True) -> None:
        self.devices, self.init = devices, init
        if uuid_v2:
            self.cuDeviceGetUuid_v2 = self._uuid
        self.cuDeviceGetUuid = self._uuid

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuGetErrorName(self, status: int, out: Any) -> int:
        out._obj.value = {100: b"CUDA_ERROR_NO_DEVICE", 803: b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"}.get(status)
        return 0 if out._obj.value else 1

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 12080
        return 0

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, out: Any, ordinal: int) -> int:
        out._obj.value = ordinal
        return int(self.devices[ordinal].get("broken", 0))

    def cuDeviceGetName(self, out: Any, size: int, handle: Any) -> int:
        out.value = self.devices[handle.value]["name"].encode()
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, handle: Any) -> int:
        out._obj.value = self.devices[handle.value]["memory"]
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, handle: Any) -> int:
        value = self.devices[handle.value].get(NAMES[attribute])
        if value is None:
            return 1
        out._obj.value = value
        return 0

    def _uuid(self, out: Any, handle: Any) -> int:
        out._obj[:] = list(bytes.fromhex(self.devices[handle.value]["uuid"].replace("-", "")))
        return 0


T4 = {
    "name": "Tesla T4",
    "memory": 15 << 30,
    "uuid": "8932f937-d72c-4106-c12f-20bd9faed9f6",
    "multiprocessors": 40,
    "integrated": 0,
    "domain": 0,
    "bus": 1,
    "device": 0,
    "major": 7,
    "minor": 5,
}


def test_every_fact_is_told() -> None:
    assert describe(FakeCuda([T4])) == {"cuda": 12080, "devices": [T4]}


def test_older_libraries_tell_the_uuid_too() -> None:
    assert describe(FakeCuda([T4], uuid_v2=False))["devices"][0]["uuid"] == T4["uuid"]


def test_attributes_that_are_refused_are_none() -> None:
    facts = {name: value for name, value in T4.items() if name != "integrated"}
    assert describe(FakeCuda([facts]))["devices"][0]["integrated"] is None


def test_errors_are_named() -> None:
    # requirement P10
    assert describe(FakeCuda([], init=100)) == {"error": "cuInit failed: CUDA_ERROR_NO_DEVICE (100)"}
    assert describe(FakeCuda([], init=4711)) == {"error": "cuInit failed: error 4711"}
    broken = describe(FakeCuda([T4, {"broken": 803}]))["devices"]
    assert broken[1] == {"problem": "cuDeviceGet failed: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)"}
