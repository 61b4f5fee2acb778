"""The tables of ``docs/support.md``: whole, not stale, and made of nothing but what kernels declare."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hal
from hal import _plugins
from hal._kernel import EVIDENCE

pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    """``tools/support_doc.py``, as a module."""
    spec = importlib.util.spec_from_file_location("support_doc", ROOT / "tools" / "support_doc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["support_doc"] = module
    spec.loader.exec_module(module)
    return module


support_doc = load()
Table = dict[str, dict[str, str]]


def tables(lines: list[str]) -> dict[str, Table]:
    """Headings to kernels to cells; a kernel of several rows stands there once a row, with its archs."""
    found: dict[str, Table] = {}
    names: list[str] = []
    for line in lines:
        if line.startswith("### "):
            table = found.setdefault(line.removeprefix("### ").replace("`", ""), {})
        elif line.startswith("| kernel |"):
            names = cells(line)
        elif line.startswith("| `"):
            row = dict(zip(names, cells(line), strict=True))
            table[f"{row['kernel'].strip('`')} {row['archs']}"] = row
    return found


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in line.strip("|").replace("\\|", "\0").split("|")]


def made() -> dict[str, Table]:
    return tables(list(support_doc.tables(_plugins.registry())))


def rows_of(kernel: str, found: dict[str, Table]) -> list[dict[str, str]]:
    return [row for table in found.values() for row in table.values() if row["kernel"] == f"`{kernel}`"]


def test_the_page_is_not_stale() -> None:
    page = support_doc.PAGE.read_text(encoding="utf-8")
    assert page == support_doc.render(page), "run python tools/support_doc.py"


def test_every_kernel_has_a_row_and_every_cell_one_of_four_words() -> None:
    found = made()
    declared = set(_plugins.registry().kernels)
    assert {row["kernel"].strip("`") for table in found.values() for row in table.values()} == declared
    for heading, table in found.items():
        assert len({k.rpartition(" ")[0] for k in table}) == len(table), heading
        for row in table.values():
            word = row["archs"].rpartition(": ")[2]
            weaker = EVIDENCE[EVIDENCE.index(word) :]
            told = {v for name, v in row.items() if name not in ("kernel", "archs", "formats")}
            assert told <= {*weaker, "-"}, row


def test_each_word_is_the_one_that_the_kernel_declares() -> None:
    found = made()
    for kernel in _plugins.registry().kernels.values():
        for row in rows_of(kernel.name, found):
            archs, _, word = row["archs"].rpartition(": ")
            for arch in archs.split(", "):
                expected = kernel.evidence.get(arch, kernel.evidence.get("*", "claimed"))
                assert word == expected, f"{kernel.name} on {arch}"


def test_what_a_kernel_does_not_declare_is_not_told_of_it(fake_platform: Any, attention_kernel: Any) -> None:
    softcap = {"softcap": hal.Range(0.0, 50.0)}
    fake_platform(
        archs=("f10", "f20"),
        kernels=[
            attention_kernel("able.decode", fields=softcap, evidence={"f10": "run", "f20": "compiled"}),
            attention_kernel("plain.decode", evidence={"*": "emulated"}),
            attention_kernel("silent.decode"),
        ],
    )
    found = tables(list(support_doc.tables(_plugins.registry())))["attention, decode"]
    told = {key: row["softcap"] for key, row in found.items() if row["kernel"].strip("`") in DECLARED}
    assert told == {
        "able.decode f10: run": "run",
        "able.decode f20: compiled": "compiled",
        "able.decode every other fake: claimed": "claimed",
        "plain.decode every fake: emulated": "-",
        "silent.decode every fake: claimed": "-",
    }


DECLARED = ("able.decode", "plain.decode", "silent.decode")


def test_a_feature_is_told_only_of_archs_that_have_it(fake_platform: Any, attention_kernel: Any) -> None:
    def check(request: Any, device: hal.Device) -> list[hal.Reason]:
        drafts = request.max_q_len > 1 and device.arch.name == "f10"
        return [hal.Reason("check", "no drafts before f20", "max_q_len")] if drafts else []

    platforms = {"fake": hal.Archs(only=("f10", "f20"))}
    limited = attention_kernel("drafts.decode", check=check, platforms=platforms, evidence={"*": "run"})
    fake_platform(archs=("f10", "f20"), kernels=[limited])
    found = rows_of("drafts.decode", tables(list(support_doc.tables(_plugins.registry()))))
    assert {row["archs"]: row["drafts"] for row in found} == {"f10: run": "-", "f20: run": "run"}


def test_a_feature_has_a_word_of_its_own(fake_platform: Any, attention_kernel: Any) -> None:
    fields = {"sinks": hal.OneOf(False, True), "window": hal.Windows()}
    less = {"sinks": "emulated", "causal": "claimed"}
    kernel = attention_kernel("mixed.decode", fields=fields, evidence={"f10": "run"}, evidence_with=less)
    fake_platform(kernels=[kernel])
    row = rows_of("mixed.decode", tables(list(support_doc.tables(_plugins.registry()))))[0]
    told = {name: row[name] for name in ("archs", "window", "sinks", "no causality")}
    assert told == {"archs": "f10: run", "window": "run", "sinks": "emulated", "no causality": "claimed"}


def test_what_a_check_refuses_on_an_arch_is_not_told_of_it() -> None:
    """Triton converts no FP8 format on these, so that selection refuses such a cache there."""
    found = made()
    for name in ("triton.extend", "triton.decode", "triton.kv_cache_write", "triton.rotary_kv_cache_write"):
        for row in rows_of(name, found):
            has = (
                "-"
                if {"gfx90a", "gfx1100"} & set(row["archs"].partition(": ")[0].split(", "))
                else row["archs"].split()[-1]
            )
            assert (row["FP8 cache"], row["scale a head"]) == (has, has), row


def test_what_cannot_run_here_is_not_told_to_have_run() -> None:
    found = made()
    for name in ("trtllm_gen.extend", "flashinfer_cudnn.decode", "fmha_v2.prefill"):
        assert all(row["archs"].endswith(": emulated") for row in rows_of(name, found))
    (hopper,) = [row for row in rows_of("xqa.decode", found) if row["archs"] == "sm_90: run"]
    assert (hopper["window"], hopper["sinks"], hopper["FP8 cache"]) == ("run", "run", "-")
    for row in rows_of("flashinfer_fa3.prefill", found):
        assert (row["window"], row["softcap"], row["LSE"]) == ("run", "run", "run")
    assert {row["archs"] for row in rows_of("torch_cpu.prefill", found)} == {"x86_64: run", "every other cpu: claimed"}


@pytest.mark.parametrize("page", ["", "{begin}", "{end}", "{begin} {end} {begin} {end}"])
def test_a_page_without_a_place_for_the_tables_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="must hold each of these lines once"):
        support_doc.render(page.format(begin=support_doc.BEGIN, end=support_doc.END))


def test_only_what_is_between_the_comments_changes() -> None:
    page = f"before\n{support_doc.BEGIN}\nold\n{support_doc.END}\nafter\n"
    new = support_doc.render(page)
    assert new.startswith(f"before\n{support_doc.BEGIN}\n\n### `attention`, prefill\n")
    assert new.endswith(f"{support_doc.END}\nafter\n")
    assert "old" not in new


def test_a_stale_page_fails_the_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "support.md"
    page.write_text(f"{support_doc.BEGIN}\n{support_doc.END}\n", encoding="utf-8")
    monkeypatch.setattr(support_doc, "PAGE", page)
    monkeypatch.setattr(support_doc, "tables", lambda registry: ["made"])
    monkeypatch.setattr(sys, "argv", ["support_doc.py", "--check"])
    assert support_doc.main() == 1
    monkeypatch.setattr(sys, "argv", ["support_doc.py"])
    assert support_doc.main() == 0
    monkeypatch.setattr(sys, "argv", ["support_doc.py", "--check"])
    assert support_doc.main() == 0
