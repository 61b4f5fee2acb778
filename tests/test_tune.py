"""Tuning: what is timed, and when a time may decide."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _measurements, _settings
from hal._ledger import Ledger, Row, identity
from hal._measurements import Measurement, Measurements, request_key
from hal._tune import tune
from hal.errors import DeviceError, HalError
from hal_ops.attention import AttentionRequest

torch = pytest.importorskip("torch")

Make = Callable[..., Any]
REQUEST = AttentionRequest(
    num_q_heads=2, num_kv_heads=1, head_dim=16, dtype="float32", page_size=16, kv_layout="NHD", phases=("prefill",)
)
NAMES = ("high.prefill", "low.prefill", "lowest.prefill")


def cache() -> Path:
    return _settings.current().cache_dir()


@pytest.fixture
def implementation(attention_kernel: Make, kernel_module: Make) -> Make:
    """Declare a prefill kernel that is right, sleeps a while, and multiplies what is right by a factor."""

    def make(name: str, *, microseconds: float = 0, factor: float = 1.0, **changes: Any) -> hal.Kernel:
        def factory(request: Any, device: Any) -> Any:
            from hal_ops.attention.reference import prefill

            right = prefill(request, device)

            def call(
                q: Any, k: Any, v: Any, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
                max_seqlen_q: Any = None, max_seqlen_k: Any = None, sinks: Any = None, alibi_slopes: Any = None,
                return_lse: Any = False,
            ) -> Any:  # fmt: skip
                time.sleep(microseconds / 1e6)
                if q.shape[0] > 200:
                    return q
                return factor * right(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)

            return call

        made: hal.Kernel = attention_kernel(name, target=f"{kernel_module(factory=factory)}:factory", **changes)
        return made

    return make


def chosen(request: AttentionRequest = REQUEST) -> hal.PhaseChoice:
    return hal.select(request).choices["prefill"]


def name_of(choice: hal.PhaseChoice) -> str:
    assert choice.kernel is not None
    return choice.kernel.name


def test_a_faster_kernel_is_chosen_after_tuning(implementation: Make, fake_platform: Make) -> None:  # requirement B14
    slow = implementation("slow.prefill", microseconds=3000, priority=450)
    fast = implementation("fast.prefill", microseconds=500, priority=410)
    fake_platform(kernels=[slow, fast])
    assert name_of(chosen()) == "slow.prefill"
    told: list[str] = []
    measured = tune(REQUEST, repeats=5, progress=told.append)
    assert [m.kernel for m in measured] == ["slow.prefill", "fast.prefill"]
    assert measured[0].microseconds > 3000
    assert 500 < measured[1].microseconds < measured[0].microseconds
    assert Measurements(cache() / "measurements.json").rows() == tuple(measured)
    assert {r.kernel: r.status for r in Ledger(cache() / "ledger.json").rows()} == {
        "slow.prefill": "verified",
        "fast.prefill": "verified",
    }
    assert name_of(chosen()) == "fast.prefill"
    assert chosen().measured
    assert any("sample 5/5" in text for text in told)
    assert "measurement" in hal.select(REQUEST).explain()


def test_a_wrong_kernel_gets_no_time_however_fast_it_is(implementation: Make, fake_platform: Make) -> None:
    """requirement R8: correctness comes before speed."""
    slow = implementation("slow.prefill", microseconds=2000, priority=450)
    middle = implementation("middle.prefill", microseconds=1500, priority=430)
    wrong = implementation("wrong.prefill", factor=1.1, priority=410)
    fake_platform(kernels=[slow, middle, wrong])
    told: list[str] = []
    measured = tune(REQUEST, repeats=4, progress=told.append)
    assert {m.kernel for m in measured} == {"slow.prefill", "middle.prefill"}
    assert any(text.startswith("wrong.prefill gets no time: ") for text in told)
    refused = {c.kernel.name: [r.code for r in c.reasons] for c in chosen().candidates if c.status == "refused"}
    assert refused["wrong.prefill"] == ["quarantined"]


def test_samples_are_taken_in_turns(implementation: Make, fake_platform: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down half way must not make one kernel look slower than the other."""
    kernels = [implementation(name, priority=450 - i) for i, name in enumerate(NAMES)]
    fake_platform(kernels=kernels)
    order: list[int] = []

    def seconds(self: Any, run: Callable[[], Any], calls: int) -> float:
        order.append(id(run))
        return 1e-3

    monkeypatch.setattr("hal._timing.Clock.seconds", seconds)
    measured = tune(REQUEST, repeats=6)
    first = list(dict.fromkeys(order))
    turns = [tuple(first.index(i) for i in order[3 + 3 * n : 6 + 3 * n]) for n in range(6)]
    assert turns == [(0, 1, 2), (1, 2, 0), (2, 0, 1)] * 2
    assert [(m.microseconds, m.spread) for m in measured] == [(1000.0, 0.0)] * 3


def test_medians_and_quartiles(implementation: Make, fake_platform: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_platform(kernels=[implementation("one.prefill", priority=450), implementation("two.prefill", priority=410)])
    ticks = iter([1e-3] * 2 + [x * 1e-6 for pair in zip([10, 20, 30, 40, 5000], [7] * 5, strict=True) for x in pair])
    taken: list[float] = []

    def seconds(self: Any, run: Callable[[], Any], calls: int) -> float:
        taken.append(next(ticks))
        return taken[-1]

    monkeypatch.setattr("hal._timing.Clock.seconds", seconds)
    measured = tune(REQUEST, repeats=5)
    times = [10, 7, 20, 7, 30]
    assert len(taken) == 2 + 2 * 5
    assert {m.kernel for m in measured} == {"one.prefill", "two.prefill"}
    assert all(0 < m.microseconds < 5000 for m in measured), times


def test_one_kernel_needs_no_race(implementation: Make, fake_platform: Make) -> None:
    fake_platform(kernels=[implementation("only.prefill", priority=450)])
    assert tune(REQUEST) == []
    assert Ledger(cache() / "ledger.json").rows() == ()


def test_a_kernel_that_fails_at_the_timed_size_gets_no_time(
    implementation: Make,
    attention_kernel: Make,
    kernel_module: Make,
    fake_platform: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def factory(request: Any, device: Any) -> Any:
        from hal_ops.attention.reference import prefill

        right = prefill(request, device)

        def call(
            q: Any, k: Any, v: Any, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None,
            max_seqlen_k: Any = None, sinks: Any = None, alibi_slopes: Any = None, return_lse: Any = False,
        ) -> Any:  # fmt: skip
            if q.shape[0] > 200:
                raise RuntimeError("too many tokens")
            return right(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)

        return call

    small = attention_kernel("small.prefill", target=f"{kernel_module(factory=factory)}:factory", priority=450)
    fake_platform(kernels=[small, implementation("any.prefill", priority=410)])
    assert [m.kernel for m in tune(REQUEST, repeats=4)] == ["any.prefill"]
    assert "small.prefill gets no time: it fails at the size that is timed: too many tokens" in caplog.text
    assert name_of(chosen()) == "small.prefill"


def test_what_tune_refuses(implementation: Make, fake_platform: Make) -> None:
    fake_platform(kernels=[implementation(name) for name in NAMES])
    with pytest.raises(ValueError, match="quartiles take at least 4"):
        tune(REQUEST, repeats=3)
    with hal.simulate("fake:f10"), pytest.raises(DeviceError, match="simulated"):
        tune(REQUEST)


@pytest.fixture
def record(implementation: Make, fake_platform: Make) -> Make:
    """Three kernels by falling priority; gives the function that writes what was measured and verified."""
    kernels = {n: implementation(n, priority=450 - 10 * i) for i, n in enumerate(NAMES)}
    fake_platform(kernels=list(kernels.values()))

    def write(
        times: dict[str, tuple[float, float]], *, verified: tuple[str, ...] = NAMES, request: Any = REQUEST, **key: str
    ) -> None:
        keys = {n: {**identity(k, hal.device()), **key} for n, k in kernels.items()}
        Ledger(cache() / "ledger.json").record(
            Row(n, identity(kernels[n], hal.device()), REQUEST.corner("prefill"), "verified") for n in verified
        )
        Measurements(cache() / "measurements.json").record(
            Measurement(n, keys[n], request_key(request), *pair) for n, pair in times.items()
        )

    return write


HIGH, LOW, LOWEST = NAMES


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({HIGH: (100, 1), LOW: (50, 1)}, LOW),
        ({HIGH: (100, 1), LOW: (50, 1), LOWEST: (40, 1)}, LOWEST),
        ({HIGH: (100, 1), LOW: (50, 1), LOWEST: (50, 1)}, LOW),
        ({HIGH: (100, 1), LOW: (96, 1)}, HIGH),
        ({HIGH: (100, 1), LOW: (94, 1)}, LOW),
        ({HIGH: (100, 20), LOW: (85, 1)}, HIGH),
        ({HIGH: (100, 1), LOW: (85, 20)}, HIGH),
        ({HIGH: (100, 20), LOW: (75, 20)}, LOW),
        ({LOW: (1, 0)}, HIGH),
        ({HIGH: (1, 0)}, HIGH),
        ({LOW: (50, 1), LOWEST: (1, 1)}, HIGH),
        ({}, HIGH),
    ],
    ids=str,
)
def test_a_time_decides_beyond_margin_and_noise_only(record: Make, times: Any, winner: str) -> None:
    """requirement R8, X6: within the noise the declared order holds, and it does not flip from run to run."""
    record(times)
    assert [name_of(chosen()) for _ in range(3)] == [winner] * 3
    assert chosen().measured is (winner != HIGH)


def test_noise_around_the_margin_never_flips_the_choice(record: Make) -> None:  # requirement X6
    for high, low in ((100, 99), (99, 100), (100, 98), (101, 100), (97, 100)):
        record({HIGH: (high, 4), LOW: (low, 4)})
        assert name_of(chosen()) == HIGH


def test_the_fastest_wins_only_if_it_is_verified(record: Make) -> None:
    """requirement R8: the fastest of the verified ones is chosen, not the fastest."""
    record({HIGH: (100, 1), LOW: (60, 1), LOWEST: (10, 1)}, verified=(HIGH, LOW))
    assert name_of(chosen()) == LOW


def test_nothing_unverified_wins(record: Make) -> None:  # requirement R8
    record({HIGH: (100, 1), LOW: (60, 1), LOWEST: (10, 1)}, verified=())
    assert name_of(chosen()) == HIGH


def test_tune_off_leaves_the_declared_order(record: Make) -> None:
    record({HIGH: (100, 1), LOW: (50, 1)})
    with hal.override(tune="off"):
        assert name_of(chosen()) == HIGH
    assert name_of(chosen()) == LOW


def test_a_forced_choice_is_not_overtaken(record: Make) -> None:  # requirement X2
    record({HIGH: (100, 1), LOW: (50, 1)})
    assert hal.select(REQUEST, kernel=HIGH).kernels() == {"prefill": HIGH}
    with hal.override(attention_prefill=LOWEST):
        assert name_of(chosen()) == LOWEST


@pytest.mark.parametrize(
    "part", ["platform", "arch", "name", "multiprocessors", "runtime", "driver", "torch", "plugin"]
)
def test_measurements_of_another_machine_are_ignored(record: Make, part: str) -> None:  # requirement R10
    record({HIGH: (100, 1), LOW: (50, 1)}, **{part: "another"})
    assert name_of(chosen()) == HIGH
    assert all(c.microseconds is None for c in chosen().candidates)


def test_measurements_of_another_request_are_ignored(record: Make) -> None:  # requirement R10, C4
    record({HIGH: (100, 1), LOW: (50, 1)}, request=REQUEST.replace(num_q_heads=4))
    assert name_of(chosen()) == HIGH
    assert name_of(chosen(REQUEST.replace(softmax_scale=None, phases=("prefill", "decode")))) == HIGH


def test_the_phases_that_a_caller_uses_do_not_matter(record: Make) -> None:
    record({HIGH: (100, 1), LOW: (50, 1)}, request=REQUEST.replace(phases=None))
    assert name_of(chosen()) == LOW


def test_simulated_devices_know_no_times(record: Make) -> None:
    record({HIGH: (100, 1), LOW: (50, 1)})
    pretended = dataclasses.replace(hal.device(), simulated=True)
    assert hal.select(REQUEST, device=pretended).kernels() == {"prefill": HIGH}


def test_on_a_device_that_is_not_fully_known_nothing_is_measured(
    implementation: Make, fake_platform: Make, record: Make
) -> None:  # requirement R10
    record({HIGH: (100, 1), LOW: (50, 1)}, driver="unknown")
    vague = dataclasses.replace(hal.device(), driver=hal.Version.unknown("no management library"))
    assert identity(hal._plugins.registry().kernels[HIGH], vague)["driver"] == "unknown"
    assert hal.select(REQUEST, device=vague).kernels() == {"prefill": HIGH}
    with pytest.raises(DeviceError, match=r"driver version is unknown \(no management library\)"):
        tune(REQUEST, device=vague)


def test_a_new_measurement_replaces_the_old_one(record: Make) -> None:
    record({HIGH: (100, 1), LOW: (50, 1)})
    record({LOW: (200, 1)})
    assert name_of(chosen()) == HIGH
    assert len(Measurements(cache() / "measurements.json").rows()) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 0, "rows": []}', '{"format": 1, "rows": [{"kernel": "x"}]}']
)
def test_damaged_measurements_are_an_error_that_says_what_to_do(record: Make, text: str) -> None:
    record({HIGH: (100, 1)})
    (cache() / "measurements.json").write_text(text)
    with pytest.raises(HalError, match=r"measurements\.json are damaged .*: delete them and run `hal tune` again"):
        hal.select(REQUEST)


def test_the_file_is_plain_json(record: Make) -> None:
    record({HIGH: (100.5, 1.25)})
    data = json.loads((cache() / "measurements.json").read_text())
    assert data["format"] == _measurements.FORMAT
    assert data["rows"][0]["microseconds"] == 100.5
