"""The ledger's file: what it holds, what it speaks about, and what happens when it is not what it should be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _settings
from hal._ledger import Ledger, Row, identity
from hal.errors import HalError
from hal_ops.attention import AttentionRequest

Make = Callable[..., Any]
REQUEST = AttentionRequest(num_q_heads=2, num_kv_heads=1, head_dim=64, page_size=16, kv_layout="NHD")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "cache" / "ledger.json")


@pytest.fixture
def kernel(attention_kernel: Make, fake_platform: Make) -> hal.Kernel:
    made: hal.Kernel = attention_kernel("acme.decode", fields={"softcap": hal.Range(0)})
    fake_platform(kernels=[made])
    return made


def row(kernel: hal.Kernel, status: str = "verified", request: AttentionRequest = REQUEST, **changes: Any) -> Row:
    key = {**identity(kernel, hal.device()), **changes}
    return Row(kernel.name, key, request.corner(kernel.phase), status, "detail", "2026-01-02", request.as_dict())


def test_rows_come_back_as_they_went(ledger: Ledger, kernel: hal.Kernel) -> None:
    assert ledger.rows() == ()
    rows = (row(kernel), row(kernel, "failed", REQUEST.replace(window=5)))
    ledger.record(rows)
    assert ledger.rows() == rows
    assert Ledger(ledger.path).rows() == rows


def test_two_batches_within_one_tick_of_the_clock_are_both_kept(ledger: Ledger, kernel: hal.Kernel) -> None:
    for heads in range(2, 22, 2):
        ledger.record([row(kernel, request=REQUEST.replace(num_q_heads=heads))])
        assert len(ledger.rows()) == heads // 2


def test_a_row_of_the_same_corner_is_replaced(ledger: Ledger, kernel: hal.Kernel) -> None:
    ledger.record([row(kernel, "failed")])
    ledger.record([row(kernel), row(kernel, name="another device")])
    assert [(r.status, r.key["name"]) for r in ledger.rows()] == [
        ("verified", "Fake 0"),
        ("verified", "another device"),
    ]


def test_a_failed_row_is_found_before_a_verified_one(ledger: Ledger, kernel: hal.Kernel) -> None:
    ledger.record([row(kernel), row(kernel, "failed")])
    found = ledger.find(kernel, REQUEST, hal.device())
    assert found is not None
    assert found.status == "failed"


@pytest.mark.parametrize(
    ("change", "covered"),
    [
        ({}, True),
        ({"softcap": 3.0}, False),
        ({"num_q_heads": 4}, False),
        ({"page_size": 32}, False),
        ({"page_size": "auto"}, True),
        ({"softmax_scale": 0.5}, False),
        ({"phases": ("decode",)}, True),
    ],
    ids=str,
)
def test_what_a_verified_row_speaks_about(
    ledger: Ledger, kernel: hal.Kernel, change: dict[str, Any], covered: bool
) -> None:
    ledger.record([row(kernel)])
    assert (ledger.find(kernel, REQUEST.replace(**change), hal.device()) is not None) is covered


def test_a_failed_page_size_is_avoided_and_not_its_kernel(kernel: hal.Kernel) -> None:
    """A value left to the selection is chosen so that the best kernel can serve, past what failed."""
    asked = REQUEST.replace(page_size="auto", phases=("decode",))
    assert hal.select(asked).request.page_size == 16  # type: ignore[attr-defined]
    Ledger(_settings.current().cache_dir() / "ledger.json").record([row(kernel, "failed")])
    chosen = hal.select(asked)
    assert chosen.kernels() == {"decode": "acme.decode"}
    assert chosen.request.page_size == 32  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", ["torch", "name", "driver", "runtime", "multiprocessors", "arch", "plugin"])
def test_another_device_or_version_knows_nothing(ledger: Ledger, kernel: hal.Kernel, part: str) -> None:
    """requirement R10: whatever a result depends on is in its key."""
    pytest.importorskip("torch")
    ledger.record([row(kernel, **{part: "another"})])
    assert ledger.find(kernel, REQUEST, hal.device()) is None
    ledger.record([row(kernel)])
    assert ledger.find(kernel, REQUEST, hal.device()) is not None


def test_the_version_of_a_needed_library_is_in_the_key(
    attention_kernel: Make, fake_platform: Make
) -> None:  # requirement R10
    acme = hal.Needs("acme", ">=1", distributions=("acme-blas", "acme-blas-cu12"))
    needing: hal.Kernel = attention_kernel("acme.decode", needs=(acme,))
    fake_platform(kernels=[needing])
    with hal.simulate(libraries={"acme_blas.cu12": "1.4", "torch": "2.8.0"}):
        assert identity(needing, hal.device())["acme"] == "1.4"
        assert identity(needing, hal.device())["torch"] == "2.8.0"
    with hal.simulate(libraries={}):
        assert "acme" not in identity(needing, hal.device())


def test_the_distribution_that_brings_the_kernel_is_in_the_key(kernel: hal.Kernel) -> None:  # requirement R10
    assert identity(kernel, hal.device())["plugin"] == "fake (fake-plugin 0)"
    portable = hal._plugins.registry().kernels["reference.decode"]
    assert identity(portable, hal.device())["plugin"] == f"portable (torch-hal {hal.__version__})"


def test_twins_share_their_rows(kernel: hal.Kernel) -> None:
    first = hal.device()
    assert identity(kernel, first) == identity(kernel, dataclasses.replace(first, index=3, uuid="GPU-2", pci="01:00.0"))


def test_nothing_is_verified_on_a_simulated_device(kernel: hal.Kernel) -> None:
    Ledger(_settings.current().cache_dir() / "ledger.json").record([row(kernel, "failed")])
    assert hal.select(REQUEST).kernels()["decode"] == "reference.decode"
    pretended = dataclasses.replace(hal.device(), simulated=True)
    assert hal.select(REQUEST, device=pretended).kernels()["decode"] == "acme.decode"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"rows": []}',
        '{"format": 99, "rows": []}',
        '{"format": 1, "rows": [{"kernel": "x"}]}',
        '{"format": 1, "rows": [{"odd": 1}]}',
    ],
)
def test_a_damaged_ledger_is_an_error_that_says_what_to_do(ledger: Ledger, kernel: hal.Kernel, text: str) -> None:
    ledger.path.parent.mkdir()
    ledger.path.write_text(text)
    with pytest.raises(HalError, match=r"ledger\.json is damaged .*: delete it and run `hal verify` again"):
        ledger.find(kernel, REQUEST, hal.device())


def test_a_write_that_fails_leaves_the_old_file(ledger: Ledger, kernel: hal.Kernel) -> None:
    ledger.record([row(kernel)])
    before = ledger.path.read_text()
    with pytest.raises(TypeError):
        ledger.record([dataclasses.replace(row(kernel), corner={"x": object()})])
    assert ledger.path.read_text() == before
    assert json.loads(before)["format"] == 1
    assert [p.name for p in ledger.path.parent.iterdir()] == ["ledger.json"]
