"""``hal kernels``."""

from __future__ import annotations

import hal
from hal._plugins import registry


def test_lists_every_registered_kernel(hal_cli, hal_json, fake_platform, library) -> None:
    needs = hal.Needs("fastlib", ">=2.0", install="`pip install fastlib`")
    archs = {"fake": hal.Archs(at_least="f20")}
    fake_platform(kernels=library("fast", needs=(needs,), platforms=archs, evidence={"f20": "run", "f30": "compiled"}))
    facts = hal_json("kernels")["kernels"]
    assert {row["name"] for row in facts} == set(registry().kernels)
    keys = {
        "name",
        "op",
        "phase",
        "library",
        "band",
        "priority",
        "platforms",
        "needs",
        "evidence",
        "fields",
        "distribution",
        "plugin",
    }
    assert all(keys <= set(row) for row in facts)
    fast = next(row for row in facts if row["name"] == "fast.decode")
    assert fast["platforms"] == {"fake": "f20 or newer"}
    assert fast["needs"][0]["library"] == "fastlib"
    text = hal_cli("kernels").stdout
    row = next(line for line in text.splitlines() if "fast.decode" in line)
    for part in ("plugin 400", "fake f20 or newer", "fastlib >=2.0", "run on f20; compiled for f30", "fake-plugin 0"):
        assert part in row


def test_best_first(hal_json) -> None:
    rows = [row for row in hal_json("kernels", "--op", "attention")["kernels"] if row["phase"] == "decode"]
    assert [row["priority"] for row in rows] == sorted((row["priority"] for row in rows), reverse=True)


def test_one_op(hal_json) -> None:
    rows = hal_json("kernels", "--op", "kv_cache_write")["kernels"]
    assert {row["op"] for row in rows} == {"kv_cache_write"}
    assert rows


def test_verbose_shows_what_each_field_allows(hal_cli) -> None:
    text = hal_cli("kernels", "-v", "--op", "attention").stdout
    for kernel in registry().kernels.values():
        if kernel.op == "attention":
            assert kernel.name in text
            for field, constraint in kernel.fields.items():
                assert any(line.split() == [field, *constraint.allowed().split()] for line in text.splitlines())


def test_where_rows_must_begin_is_shown(hal_cli, hal_json, fake_platform, library) -> None:
    fake_platform(kernels=library("fast", row_alignment=32))
    rows = {row["name"]: row["row_alignment"] for row in hal_json("kernels")["kernels"]}
    assert (rows["fast.decode"], rows["reference.decode"]) == (32, 1)
    _, _, after = hal_cli("kernels", "-v", "--op", "attention").stdout.partition("fast.decode")
    assert "begin at multiples of 32 bytes" in after.partition("reference.")[0]
