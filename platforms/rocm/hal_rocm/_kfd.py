"""KFD topology: what the kernel's compute driver says about each GPU in sysfs, read without any runtime.

Files and fields are those of Linux ``drivers/gpu/drm/amd/amdkfd/kfd_topology.c``; which nodes the runtime can use
follows ``topology_sysfs_check_node_supported`` of ROCR-Runtime ``libhsakmt/src/topology.c``: a node that a device
cgroup hides fails to be read with EPERM, and one without its render node in ``/dev/dri`` is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hal_rocm._system import SourceError, System

if TYPE_CHECKING:
    from hal_rocm._gpus import Gpu, Reading

__all__ = ["read_kfd"]

_NODES = "sys/class/kfd/kfd/topology/nodes"
_VRAM_HEAPS = (1, 2)
_CONTAINER = "start the container with --device=/dev/kfd --device=/dev/dri"
_GROUPS = "add the user to the groups render and video"


def read_kfd(system: System) -> Reading:
    """Every GPU that KFD lets this process see, in node order, which is the runtime's order.

    Raises:
        SourceError: there is no KFD, it lists no GPU, or ``/dev/kfd`` is not here.
    """
    nodes = _nodes(system.root / _NODES)
    from hal_rocm._gpus import Reading, plural

    gpus: list[Gpu] = []
    notes: list[str] = []
    hsa_node = 0
    for node, path in nodes:
        try:
            gpu = _gpu(system, node, hsa_node, path)
        except SourceError as hidden:
            notes.append(str(hidden))
            continue
        hsa_node += 1
        if gpu is not None:
            gpus.append(gpu)
    if not gpus:
        raise SourceError(
            "; ".join(["KFD lists no GPU that this process may use", *notes]), _CONTAINER if notes else ""
        )
    if not system.exists("dev/kfd"):
        raise SourceError(f"KFD lists {plural(len(gpus), 'GPU')}, but /dev/kfd is not here", _CONTAINER)
    return Reading(source="KFD", gpus=tuple(gpus), notes=tuple(notes))


def _nodes(folder: Path) -> list[tuple[int, Path]]:
    try:
        found = sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdigit())
    except OSError as error:
        remedy = "install the amdgpu driver" if isinstance(error, FileNotFoundError) else ""
        raise SourceError(f"/{_NODES} cannot be read: {error.strerror}", remedy) from error
    return found


def _gpu(system: System, node: int, hsa_node: int, path: Path) -> Gpu | None:
    """The GPU of one node; None for a CPU node."""
    try:
        if (path / "gpu_id").read_text(encoding="ascii").strip() in ("", "0"):
            return None
        facts = _numbers(path / "properties")
    except OSError as error:
        raise SourceError(f"node {node} is hidden from this process ({error.strerror})") from error
    render = facts.get("drm_render_minor", 0)
    device_file = f"dev/dri/renderD{render}"
    if not system.exists(device_file):
        raise SourceError(f"node {node} has no /{device_file} here")
    from hal_rocm._arch import UNKNOWN, from_version
    from hal_rocm._gpus import Gpu

    arch = from_version(facts["gfx_target_version"]) if facts.get("gfx_target_version") else UNKNOWN
    unique = facts.get("unique_id", 0)
    return Gpu(
        arch=arch,
        memory=_vram(path / "mem_banks"),
        units=_units(facts),
        uuid=f"GPU-{unique:016x}" if unique else "",
        pci=_pci(facts),
        node=node,
        hsa_node=hsa_node,
        render=render,
        pci_vendor=facts.get("vendor_id"),
        pci_device=facts.get("device_id"),
        problem=_problem(system, device_file, arch == UNKNOWN),
    )


def _problem(system: System, device_file: str, unknown: bool) -> str:
    for name in ("dev/kfd", device_file):
        if system.exists(name) and not system.may_open(name):
            return f"this user may not open /{name}: {_GROUPS}"
    if unknown:
        return "this amdgpu driver does not state the gfx target (gfx_target_version): use a newer one"
    return ""


def _numbers(path: Path) -> dict[str, int]:
    """``name value`` lines as a mapping; lines of another form are not for us."""
    pairs = (line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _vram(folder: Path) -> int | None:
    """Bytes of the node's own memory banks: heap type 1 is what the CPU can map, 2 the rest."""
    total = 0
    try:
        for bank in sorted(folder.iterdir()):
            facts = _numbers(bank / "properties")
            total += facts.get("size_in_bytes", 0) if facts.get("heap_type") in _VRAM_HEAPS else 0
    except OSError:
        return None
    return total or None


def _units(facts: dict[str, int]) -> int | None:
    """Compute units of all dies of the partition together."""
    per = facts.get("simd_per_cu", 0)
    return facts.get("simd_count", 0) // per or None if per else None


def _pci(facts: dict[str, int]) -> str:
    """``location_id`` is bus, device and function in 8, 5 and 3 bits; on partitions the function is the partition."""
    if not facts.get("location_id"):
        return ""
    place = facts["location_id"]
    return f"{facts.get('domain', 0):04x}:{place >> 8 & 0xFF:02x}:{place >> 3 & 0x1F:02x}.{place & 7}"
