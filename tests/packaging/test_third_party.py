"""The whole story of a stranger's plugin: installed, used, taken away again, and nobody else noticed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/acme_platform"
VENDORS = ("nvidia", "rocm", "musa")

DECISIONS = """
import json, sys
import hal
from hal_ops.attention import AttentionRequest

base = {"num_q_heads": 16, "num_kv_heads": 4, "head_dim": 128}
wishes = [{}, {"softcap": 30.0}, {"window": 128, "sinks": True}, {"kv_dtype": "float8_e4m3fn"}, {"needs_grad": True}]
devices = ["cpu:x86_64", "nvidia:sm_90,cuda=12.8,driver=570.86", "nvidia:sm_120,cuda=13.0", "rocm:gfx942,hip=6.4",
           "musa:mp_31,musa=4.3"]
libraries = {"torch": "2.9.0", "triton": "3.5.0", "flash-attn": "2.8.3", "flash-attn-3": "3.0.0", "mate": "0.1.0",
             "flashinfer-python": "0.5.0", "amd-aiter": "0.1.7"}
found = {}
for device in devices:
    for fields in wishes:
        with hal.simulate(device, libraries=libraries):
            phases = hal.select(AttentionRequest(**base, **fields)).as_dict()["phases"]
        for phase in phases.values():
            phase["candidates"] = [c for c in phase["candidates"] if not c["kernel"].startswith("acme.")]
        found[f"{device} {fields}"] = phases
json.dump(found, sys.stdout)
"""

LOOK = """
import json, sys
import hal
json.dump({
    "plugins": {p.name: [p.distribution, p.status, p.error] for p in hal.plugins()},
    "devices": [d.id for d in hal.devices()],
    "version": hal.__version__,
    "torch": "torch" in sys.modules,
    "file": hal.__file__,
}, sys.stdout)
"""

USE = """
import json, sys
import hal
from hal_ops.attention import AttentionRequest

request = AttentionRequest(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="float32", phases=("prefill",))
json.dump({
    "default": hal.device().id,
    "acme": [str(d) for d in hal.devices("acme")],
    "kernel": hal.select(request).kernels(),
    "explain": hal.select(request).explain(),
    "cpu": hal.select(request, device="cpu").kernels(),
    "erratum": hal.select(request.replace(head_dim=256, v_head_dim=256), device="acme:1").explain(),
}, sys.stdout)
"""

COMPUTE = """
import json, sys
import hal, torch

attend = hal.get_attention(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="float32", phases=("prefill",))
oracle = hal.get_attention(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="float32", phases=("prefill",),
                           kernel="reference")
draw = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2, 11, heads, 64, generator=draw) for heads in (8, 2, 2))
softcap = hal.get_op("logit_softcap", cap=30.0, dtype=torch.float32)
logits = 60 * torch.randn(5, 33, generator=draw)
json.dump({
    "kernels": [attend.kernels()["prefill"], oracle.kernels()["prefill"], softcap.selection.kernels()["call"]],
    "attention": (attend(q, k, v) - oracle(q, k, v)).abs().max().item(),
    "softcap": (softcap(logits) - 30 * torch.tanh(logits / 30)).abs().max().item(),
    "on cpu": hal.get_op("logit_softcap", cap=30.0, device="cpu").selection.kernels()["call"],
}, sys.stdout)
"""

GONE = """
import importlib.util, json, sys
import hal
try:
    hal.devices("acme")
    text = ""
except hal.errors.DeviceError as error:
    text = str(error)
try:
    hal.get_op("logit_softcap", cap=30.0)
    op = ""
except hal.errors.UnknownOpError as error:
    op = str(error)
json.dump([importlib.util.find_spec("hal_acme") is None, text, op], sys.stdout)
"""


OWN_TESTS = """
import json, pytest, sys
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()) as said:
    done = pytest.main(["-q", "-rs", "-p", "no:cacheprovider", "-c", {root!r} + "/pyproject.toml", {root!r}])
json.dump([int(done), said.getvalue()], sys.stdout)
"""


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A machine with two of Acme's devices."""
    file = tmp_path_factory.mktemp("acme") / "devices.json"
    rows = [{"arch": "acme2+mx", "name": "Acme Two", "acmert": "2.1"}, {"arch": "acme1", "acmert": "2.0"}]
    file.write_text(json.dumps(rows))
    return {"ACME_DEVICES_FILE": str(file)}


def test_a_stranger_comes_and_goes(environment: Any, wheels: dict[str, Any], acme: dict[str, str]) -> None:
    # requirement X10, X11, C2
    """One test, since each step builds on the one before it."""
    environment.borrow("click", "packaging", "rich", "tomli", "nvidia-ml-py")
    environment.install(wheels["torch-hal"], *(wheels[f"torch-hal-{v}"] for v in VENDORS))
    before = environment.ask(DECISIONS)
    works_without_torch(environment, before)
    environment.install(wheels["torch-hal-acme"])
    installing_it_is_all_it_takes(environment, acme)
    assert environment.ask(DECISIONS) == before
    assert environment.ask(DECISIONS, **acme) == before
    if importlib.util.find_spec("torch"):
        its_kernels_compute(environment, acme)
        failed, said = environment.ask(OWN_TESTS.format(root=str(EXAMPLE)))
        assert not failed, said
        assert "skipped" not in said
    environment.uninstall("torch-hal-acme")
    taking_it_away_leaves_nothing(environment, acme)
    assert environment.ask(DECISIONS, **acme) == before


def works_without_torch(environment: Any, decisions: dict[str, Any]) -> None:
    # requirement X8, B11
    look = environment.ask(LOOK)
    assert str(environment.folder) in look["file"]
    assert look["version"] == importlib.metadata.version("torch-hal")
    assert look["torch"] is False
    found = {name: status for name, (_, status, _) in look["plugins"].items()}
    assert found == dict.fromkeys(("cpu", "portable", *VENDORS), "loaded"), look["plugins"]
    assert "cpu:0" in look["devices"]
    assert all(phase["kernel"] for phases in decisions.values() for phase in phases.values())


def installing_it_is_all_it_takes(environment: Any, acme: dict[str, str]) -> None:
    # requirement X9, X10
    look = environment.ask(LOOK)
    assert look["plugins"]["acme"] == ["torch-hal-acme", "loaded", ""]
    assert not any(d.startswith("acme") for d in look["devices"])
    found = environment.ask(USE, **acme, HAL_PLATFORM="acme")
    assert found["default"] == "acme:0"
    assert found["acme"] == ["acme:0 (Acme Two, acme2)", "acme:1 (acme1, acme1)"]
    assert found["kernel"] == {"prefill": "acme.prefill"}
    assert "acme:acme2 Acme Two, acmert 2.1" in found["explain"]
    assert found["cpu"] != found["kernel"]
    assert "https://acme.example/errata/17" in found["erratum"]


def its_kernels_compute(environment: Any, acme: dict[str, str]) -> None:
    environment.borrow("numpy", "pytest", "torch")
    found = environment.ask(COMPUTE, **acme, HAL_PLATFORM="acme")
    assert found["kernels"] == ["acme.prefill", "reference.prefill", "acme.logit_softcap"]
    assert 0 <= found["attention"] < 1e-5
    assert 0 <= found["softcap"] < 1e-4
    assert found["on cpu"] == "reference.logit_softcap"


def taking_it_away_leaves_nothing(environment: Any, acme: dict[str, str]) -> None:
    gone, text, op = environment.ask(GONE, **acme)
    assert gone is True
    assert "no platform is called 'acme'" in text
    assert "no op is called 'logit_softcap'" in op
    assert "acme" not in environment.ask(LOOK, **acme)["plugins"]
