"""Every kernel compiles for every arch it is declared for, and the documentation's table is of these very kernels."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def rows(aot: ModuleType) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(r["kernel"], r["label"], r["target"]): r for r in json.loads(aot.TABLE.read_text())}


def test_the_table_is_of_the_kernels_as_they_are(aot: ModuleType, rows: Any) -> None:
    wanted = {(v.kernel, v.label, target): v.digest() for v in aot.variants() for target in v.targets}
    assert wanted, "there are no variants"
    stale = [key for key, digest in wanted.items() if rows.get(key, {}).get("digest") != digest]
    unknown = [key for key in rows if key not in wanted]
    assert (stale, unknown) == ([], []), "run `python tests/triton/aot.py`"


def test_no_variant_is_refused_spills_or_asks_for_too_much_shared_memory(aot: ModuleType, rows: Any) -> None:
    faults = {key: aot.fault(row) for key, row in rows.items() if aot.fault(row)}
    assert not faults, "\n".join(f"{' '.join(key)}: {text}" for key, text in faults.items())


def test_faults_are_seen(aot: ModuleType) -> None:
    row = {"target": "sm_80", "shared": 1 << 10, "shared_limit": 1 << 17, "stack": 0, "main": True}
    assert aot.fault(row) == ""
    assert "spilled" in aot.fault({**row, "stack": 8})
    assert aot.fault({**row, "stack": 8, "main": False}) == ""
    assert aot.fault({**row, "stack": 64, "spilled": 0}) == ""
    assert "sm_80 gives a block 131072" in aot.fault({**row, "shared": 1 << 18})
    assert aot.fault({**row, "error": "no"}) == "no"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_compiles_here(aot: ModuleType, target: str) -> None:
    variant = next(v for v in aot.variants() if target in v.targets)
    row = aot.compile_variant(variant, aot.TARGETS[target])
    assert aot.fault(row) == "", row
    assert row["registers"] > 0
