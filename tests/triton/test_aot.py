"""Kernels compile for every arch that they are declared for, and the documentation's table is of these very kernels.

Two are compiled for each arch here. ``python tests/triton/aot.py`` compiles all and writes the table; it takes tens of
minutes, and ``--stale`` only as long as what has changed needs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hal
from hal import _plugins
from hal_ops.attention import AttentionRequest

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
SAMPLE = ("prefill_kernel", "decode_kernel")


@pytest.fixture(scope="module")
def rows(aot: ModuleType) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(r["kernel"], r["label"], r["target"]): r for r in json.loads(aot.TABLE.read_text())}


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """``tools/triton_doc.py``."""
    path = Path(__file__).resolve().parents[2] / "tools/triton_doc.py"
    spec = importlib.util.spec_from_file_location("triton_doc", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_doc"] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_is_of_the_kernels_as_they_are(aot: ModuleType, rows: Any) -> None:
    wanted = {(v.kernel, v.label, target): v.digest() for v in aot.variants() for target in v.targets}
    assert wanted, "there are no variants"
    stale = [key for key, digest in wanted.items() if rows.get(key, {}).get("digest") != digest]
    unknown = [key for key in rows if key not in wanted]
    assert (stale, unknown) == ([], []), "run `python tests/triton/aot.py --stale` and `python tools/triton_doc.py`"


def test_no_variant_is_refused_spills_or_asks_for_too_much_shared_memory(aot: ModuleType, rows: Any) -> None:
    faults = {key: aot.fault(row) for key, row in rows.items() if aot.fault(row)}
    assert not faults, "\n".join(f"{' '.join(key)}: {text}" for key, text in faults.items())


def test_faults_are_seen(aot: ModuleType) -> None:
    row = {"target": "sm_80", "shared": 1 << 10, "shared_limit": 1 << 17, "stack": 0, "main": True}
    assert aot.fault(row) == ""
    assert aot.fault({**row, "stack": aot.STACK}) == ""
    assert "40 bytes spilled" in aot.fault({**row, "stack": 40})
    assert aot.fault({**row, "stack": 40, "main": False}) == ""
    assert "registers spilled: 1" in aot.fault({**row, "spilled": 1})
    assert aot.fault({**row, "stack": 64, "spilled": 0}) == ""
    assert "sm_80 gives a block 131072" in aot.fault({**row, "shared": 1 << 18})
    assert aot.fault({**row, "error": "no"}) == "no"


def test_targets_are_those_of_the_platforms(aot: ModuleType) -> None:
    """Waves, local memory and FP8 formats that kernels are compiled with are the ones that AMD's platform declares."""
    names = {"fp8_e4m3fn": "fp8e4nv", "fp8_e5m2": "fp8e5", "fp8_e4m3fnuz": "fp8e4b8", "fp8_e5m2fnuz": "fp8e5b16"}
    assert tuple(aot.TARGETS) == TARGETS
    for name, target in aot.TARGETS.items():
        platform = _plugins.registry().platforms["rocm" if target.backend == "hip" else "nvidia"]
        found = platform.capabilities(platform.parse_arch(name))
        assert {short for long, short in names.items() if f"triton_{long}" in found} == target.formats
        if target.backend == "hip":
            assert {f"wave{target.warp_size}", f"lds_{target.shared >> 10}k"} <= found


def test_compiled_is_said_of_archs_that_were_compiled_for(rows: Any) -> None:
    """Evidence of a portable kernel on an arch is a row of the table, or is only a claim."""
    found = {target for _, _, target in rows}
    kernels = [k for k in _plugins.registry().kernels.values() if k.library == "triton"]
    assert len(kernels) > 8
    for kernel in kernels:
        known = {arch: word for arch, word in kernel.evidence.items() if word != "run"}
        assert known == {**dict.fromkeys(found - kernel.evidence.keys(), "compiled"), **known}, kernel.name
        assert {arch for arch, word in known.items() if word == "compiled"} <= found, kernel.name
        assert known["*"] == "claimed"


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_features_that_are_told_as_compiled_were_compiled(aot: ModuleType, phase: str) -> None:
    """Each that brings an argument or a constant of its own, on each arch."""
    mine = [v for v in aot.variants() if v.kernel.endswith(f":{phase}_kernel")]
    for target in aot.TARGETS.values():
        found = [v for v in mine if target.name in v.targets]
        wanted = {"sinks", "slopes", "cap"} | (
            {"k_scale", "v_scale"} if target.formats and phase != "prefill" else set()
        )
        assert any(wanted <= v.signature.keys() for v in found), f"{phase} on {target.name}"


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_an_arch_that_nobody_knows_gets_the_portable_kernels_as_claims(phase: str) -> None:
    # requirement X16, R15
    request = AttentionRequest(num_q_heads=8, num_kv_heads=2, head_dim=64, phases=(phase,))
    with hal.simulate("rocm:gfx1999,hip=9.0", libraries={"torch": "2.11.0", "triton": "3.6.0"}):
        choice = hal.select(request).choices[phase]
    assert choice.kernel is not None
    assert choice.kernel.name == f"triton.{phase}"
    assert {c.kernel.name: c.evidence for c in choice.candidates}[choice.kernel.name] == "claimed"


@pytest.mark.parametrize("kernel", SAMPLE)
@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_compiles_here(aot: ModuleType, target: str, kernel: str) -> None:
    variants = [v for v in aot.variants() if target in v.targets and v.kernel.endswith(f":{kernel}") and v.main]
    variant = next((v for v in variants if "128" in v.label and "bfloat16" in v.label), None)
    variant = variant or next(v for v in aot.variants() if target in v.targets and v.kernel.endswith(f":{kernel}"))
    row = aot.compile_variant(variant, aot.TARGETS[target])
    assert aot.fault(row) == "", row
    assert row["registers"] > 0


def test_the_page_is_made_of_the_table(page: ModuleType) -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run `python tools/triton_doc.py`"
