"""Benchmarks: which kernels are timed, what a row says, and that nothing is decided by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import hal
from hal import _settings
from hal._bench import bench
from hal._ledger import Ledger, Row, identity
from hal.errors import DeviceError, UnknownKernelError
from hal_ops.attention import AttentionRequest
from hal_ops.attention.work import flop, num_bytes

torch = pytest.importorskip("torch")

Make = Callable[..., Any]
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 16, "kv_layout": "NHD"}
REQUEST = AttentionRequest(**HEADS, phases=("prefill",))
RIGHT = "hal_ops.attention.reference:prefill"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that each sample takes, in order; the last one stays."""
    ticks = [2e-3]
    monkeypatch.setattr("hal._timing.Clock.seconds", lambda self, run, calls: ticks.pop(0) if ticks[1:] else ticks[0])
    return ticks


def test_rows_come_fastest_first_with_ratios_and_rates(attention_kernel: Make, fake_platform: Make, clock: Any) -> None:
    fake_platform(kernels=[attention_kernel(f"{n}.prefill", target=RIGHT) for n in ("slow", "fast")])
    clock[:] = [2e-3, 1e-3, *[2e-3, 1e-3, 1e-3, 2e-3] * 2, 1e-3]
    slow_first = {"slow.prefill": 2000.0, "fast.prefill": 1000.0}
    rows = bench(REQUEST, repeats=4)
    assert {r.kernel: r.microseconds for r in rows} in (
        slow_first,
        dict(zip(slow_first, (1000.0, 2000.0), strict=True)),
    )
    assert [(r.microseconds, r.ratio, r.phase, r.spread) for r in rows] == [
        (1000.0, 1.0, "prefill", 0.0),
        (2000.0, 2.0, "prefill", 0.0),
    ]
    assert rows[0].sizes == "2 x 128 queries over 128 keys"
    assert rows[0].tflops == pytest.approx(flop(REQUEST, [(128, 128)] * 2) / 1e-3 / 1e12, rel=1e-3)
    assert rows[0].gbytes == pytest.approx(num_bytes(REQUEST, "prefill", [(128, 128)] * 2) / 1e-3 / 1e9, rel=1e-3)


def test_a_row_says_whether_its_kernel_is_verified_and_what_it_ran_on(
    attention_kernel: Make, fake_platform: Make, clock: Any
) -> None:
    """A time without its machine, driver and versions is no evidence, and neither is one of a wrong kernel."""
    kernels = [attention_kernel(f"{n}.prefill", target=RIGHT) for n in ("good", "new", "bad")]
    fake_platform(kernels=kernels)
    device, ledger = hal.device(), Ledger(_settings.current().cache_dir() / "ledger.json")
    for kernel, status in zip(kernels[::2], ("verified", "failed"), strict=True):
        ledger.record([Row(kernel.name, identity(kernel, device), REQUEST.corner("prefill"), status, "off by 3")])
    rows = {r.kernel: r for r in bench(REQUEST, repeats=4)}
    assert {n: r.known for n, r in rows.items()} == {
        "good.prefill": "verified",
        "new.prefill": "not verified",
        "bad.prefill": "failed",
    }
    assert {"platform", "arch", "driver", "runtime", "torch"} <= set(rows["new.prefill"].identity)
    assert json.loads(json.dumps(rows["new.prefill"].as_dict()))["request"]["num_q_heads"] == 4


def test_a_kernel_that_fails_is_a_row_with_its_error(
    attention_kernel: Make, kernel_module: Make, fake_platform: Make, clock: Any
) -> None:
    def factory(request: Any, device: Any) -> Any:
        raise RuntimeError("no workspace\nfor this")

    broken = attention_kernel("broken.prefill", target=f"{kernel_module(factory=factory)}:factory", priority=480)
    fake_platform(kernels=[attention_kernel("good.prefill", target=RIGHT), broken])
    good, failed = bench(REQUEST, repeats=4)
    assert (good.kernel, good.error) == ("good.prefill", "")
    assert (failed.kernel, failed.microseconds) == ("broken.prefill", None)
    assert "no workspace" in failed.error
    assert "\n" not in failed.error


def test_references_are_timed_where_there_is_nothing_else_or_by_name(fake_platform: Make, clock: Any) -> None:
    fake_platform(kernels=[])
    assert [r.kernel for r in bench(REQUEST, repeats=4)] == ["reference.prefill"]
    both = bench(REQUEST, repeats=4, device="cpu", kernels=("reference", "torch_cpu"))
    assert {r.kernel for r in both} == {"reference.prefill", "torch_cpu.prefill"}
    assert "reference.prefill" not in {r.kernel for r in bench(REQUEST, repeats=4, device="cpu")}
    with pytest.raises(UnknownKernelError, match="torch_cpu"):
        bench(REQUEST, kernels=("torch_cpuu",))


def test_nothing_is_recorded_and_nothing_chosen_by_it(clock: Any) -> None:
    before = hal.select(REQUEST, device="cpu").kernels()
    bench(REQUEST, repeats=4, device="cpu")
    assert not (_settings.current().cache_dir() / "measurements.json").exists()
    assert not (_settings.current().cache_dir() / "ledger.json").exists()
    assert hal.select(REQUEST, device="cpu").kernels() == before


def test_what_cannot_be_timed_is_told() -> None:
    with hal.simulate("rocm:gfx942,hip=6.4"), pytest.raises(DeviceError, match="simulated"):
        bench(REQUEST)
    with pytest.raises(ValueError, match="quartiles take at least 4"):
        bench(REQUEST, device="cpu", repeats=3)


@pytest.mark.parametrize(
    ("fields", "lengths", "pairs", "keys"),
    [
        ({}, [(4, 4)], 10, 4),
        ({"causal": False}, [(4, 4)], 16, 4),
        ({}, [(2, 6), (1, 3)], 11 + 3, 9),
        ({"window": 2}, [(4, 4)], 7, 4),
        ({"window": 2}, [(1, 100)], 2, 2),
        ({}, [(4, 2), (0, 7), (3, 0)], 3, 2),
    ],
)
def test_the_work_is_that_of_the_pairs_that_the_mask_leaves(
    fields: dict[str, Any], lengths: list[tuple[int, int]], pairs: int, keys: int
) -> None:
    request = AttentionRequest(**{**HEADS, "v_head_dim": 8, "kv_dtype": "float8_e4m3fn", **fields})
    queries = sum(q for q, _ in lengths)
    assert flop(request, lengths) == 2 * 4 * (16 + 8) * pairs
    assert num_bytes(request, "decode", lengths) == 24 * (queries * 4 * 2 + keys * 2)
    assert num_bytes(request, "prefill", lengths) == 24 * (queries * 4 * 2 + keys * 2 * 2)
