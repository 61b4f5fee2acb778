"""On real hardware: the probe tells the truth, and creates no device context."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

PROBE = """
import json, os, sys
import hal
devices = [d.as_dict() for d in hal.devices()]
from hal_ops.attention import AttentionRequest
text = hal.select(AttentionRequest(num_q_heads=32, num_kv_heads=8, head_dim=128)).explain()
import pynvml
pynvml.nvmlInit()
handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
def held():
    return [p.pid for h in handles for p in pynvml.nvmlDeviceGetComputeRunningProcesses(h)]
before, imported = held(), "torch" in sys.modules
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
context = ctypes.c_void_p()
uninitialised = cuda.cuCtxGetCurrent(ctypes.byref(context))
import torch
initialised = torch.cuda.is_initialized()
torch.zeros(1, device="cuda")
print(json.dumps({"devices": devices, "text": text, "torch_imported": imported, "torch_initialised": initialised,
    "processes_before": before, "pids": len(held()) - len(before), "cuCtxGetCurrent": uninitialised,
    "truth": [[torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i),
        torch.cuda.get_device_properties(i).multi_processor_count, torch.cuda.get_device_properties(i).total_memory]
        for i in range(torch.cuda.device_count())]}))
"""


@pytest.fixture(scope="module")
def seen() -> Any:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_probe_and_explain_create_no_context(seen: Any) -> None:  # requirement P16, X8
    """CUDA itself is not even initialised (CUDA_ERROR_NOT_INITIALIZED is 3) until torch is asked for a tensor."""
    assert not seen["torch_imported"]
    assert not seen["torch_initialised"]
    assert seen["cuCtxGetCurrent"] == 3


def test_the_probe_agrees_with_torch(seen: Any) -> None:  # requirement P10, P14
    found = [d for d in seen["devices"] if d["platform"] == "nvidia"]
    assert len(found) == len(seen["truth"])
    for device, (name, capability, multiprocessors, memory) in zip(found, seen["truth"], strict=True):
        assert device["name"] == name
        assert device["arch"] == f"sm_{capability[0]}{capability[1]}"
        assert device["multiprocessors"] == multiprocessors
        assert abs(device["memory"] - memory) < 0.02 * memory
        assert device["driver"] != "unknown"
        assert not device["unusable"]


def test_a_child_can_use_the_device_after_the_parent_probed() -> None:  # requirement P16
    code = (
        "import hal, os; hal.devices(); pid = os.fork()\n"
        "if pid == 0:\n"
        "    import torch; torch.zeros(1, device='cuda').add_(1).item(); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
