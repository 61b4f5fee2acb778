"""Verifying: what is run, what the ledger then says, and what selection makes of it."""

from __future__ import annotations

import datetime as dt
import io
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _settings
from hal._ledger import Ledger, identity
from hal.errors import DeviceError, HalError, UnknownKernelError, UnknownOpError
from hal.testing import _worker, corners, verify
from hal.testing._corners import find_kernel
from hal.testing._isolated import Isolated
from hal_ops.kv_cache import KvCacheWriteRequest

torch = pytest.importorskip("torch")

Make = Callable[..., Any]
SMALL: dict[str, hal.Constraint] = {
    "num_q_heads": hal.OneOf(2),
    "num_kv_heads": hal.OneOf(1),
    "head_dim": hal.OneOf(16),
    "v_head_dim": hal.SameAs("head_dim"),
    "dtype": hal.OneOf("float32"),
    "kv_dtype": hal.OneOf("float32"),
    "page_size": hal.OneOf(16),
    "kv_layout": hal.OneOf("NHD"),
    "max_q_len": hal.OneOf(1),
    "causal": hal.OneOf(True),
    "softcap": hal.Range(0, None, (5.0,)),
}


def ledger() -> Ledger:
    return Ledger(_settings.current().cache_dir() / "ledger.json")


def wrong_with_softcap(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    out = right(*args, **kwargs)
    return out * 1.5 if request.softcap and not wrong_with_softcap.repaired else out  # type: ignore[attr-defined]


wrong_with_softcap.repaired = False  # type: ignore[attr-defined]


@pytest.fixture
def acme(spoiled: Make, fake_platform: Make, monkeypatch: pytest.MonkeyPatch) -> hal.Kernel:
    """A plugged-in decode kernel that is wrong where a softcap is asked for, and only there."""
    monkeypatch.setattr(wrong_with_softcap, "repaired", False)
    kernel: hal.Kernel = spoiled("acme.decode", wrong_with_softcap, fields=SMALL)
    fake_platform(kernels=[kernel])
    return kernel


def decode(small: Make, **fields: Any) -> hal.Selection:
    return hal.select(small("decode", dtype="float32", **fields))


def test_a_failed_corner_is_quarantined_and_no_other(acme: hal.Kernel, small: Make) -> None:
    """requirement R8, P24: a wrong kernel is refused for what it does wrong, and chosen for the rest."""
    assert decode(small, softcap=5.0).kernels() == {"decode": "acme.decode"}
    rows = verify(kernels=["acme.decode"])
    assert {(r.corner["softcap"], r.status) for r in rows} == {(False, "verified"), (True, "failed")}
    assert decode(small).kernels() == {"decode": "acme.decode"}
    refused = decode(small, softcap=5.0)
    assert refused.kernels() == {"decode": "reference.decode"}
    reasons = [r for c in refused.choices["decode"].candidates if c.kernel.name == "acme.decode" for r in c.reasons]
    assert [r.code for r in reasons] == ["quarantined"]
    assert "largest error" in reasons[0].text
    assert "hal verify --kernel acme.decode" in reasons[0].remedy


def test_rows_say_what_was_run_where_and_when(acme: hal.Kernel) -> None:  # requirement R10
    rows = verify(kernels=["acme"])
    assert ledger().rows() == tuple(rows)
    for row in rows:
        assert row.key == identity(acme, hal.device())
        assert {"platform", "arch", "name", "runtime", "driver", "torch"} <= set(row.key)
        assert dt.date.fromisoformat(row.date) <= dt.date.today()
        assert row.request["num_q_heads"] == 2
    failed = [r for r in rows if r.status == "failed"]
    assert all("softcap=5: " in r.detail for r in failed)
    assert all(r.detail.startswith("max error ") for r in rows if r not in failed)


def test_verified_is_what_require_demands(acme: hal.Kernel, small: Make) -> None:
    """requirement R8: with HAL_VERIFY=require an unverified kernel is refused, a verified one is not."""
    with hal.override(verify="require"):
        assert decode(small).kernels() == {"decode": "reference.decode"}
        verify(kernels=["acme.decode"])
        chosen = decode(small)
        assert chosen.kernels() == {"decode": "acme.decode"}
        assert "verified here" in chosen.explain()
        assert decode(small, softcap=5.0).kernels() == {"decode": "reference.decode"}


def test_a_forced_choice_of_a_quarantined_kernel_is_refused(
    acme: hal.Kernel, small: Make
) -> None:  # requirement X1, P26
    verify(kernels=["acme.decode"])
    with pytest.raises(hal.errors.NoKernelError, match="failed verification"):
        hal.get_attention(
            num_q_heads=2,
            num_kv_heads=1,
            head_dim=16,
            dtype="float32",
            softcap=5.0,
            phases=["decode"],
            kernel="acme.decode",
        )


def test_a_repaired_kernel_is_let_out_by_a_whole_run_only(
    acme: hal.Kernel, small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(kernels=["acme.decode"])
    monkeypatch.setattr(wrong_with_softcap, "repaired", True)
    verify(kernels=["acme.decode"], quick=True)
    assert decode(small, softcap=5.0).kernels() == {"decode": "reference.decode"}
    verify(kernels=["acme.decode"])
    assert decode(small, softcap=5.0).kernels() == {"decode": "acme.decode"}


def test_what_failed_before_is_tried_again(acme: hal.Kernel, small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of the user's own that failed is no generated corner; its quarantine ends all the same."""
    mine = small("decode", dtype="float32", softcap=7.5)
    assert mine not in corners(acme)
    assert [r.status for r in verify(kernels=["acme.decode"], requests=[mine])] == ["failed"]
    monkeypatch.setattr(wrong_with_softcap, "repaired", True)
    told: list[str] = []
    verify(kernels=["acme.decode"], progress=told.append)
    assert any("softcap=7.5" in text for text in told)
    assert decode(small, softcap=7.5).kernels() == {"decode": "acme.decode"}


def test_the_worst_of_a_corner_counts(spoiled: Make, fake_platform: Make) -> None:
    def wrong_with_wide_windows(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs) * (2.0 if request.window == (15, 0) else 1.0)

    kernel = spoiled("acme.prefill", wrong_with_wide_windows, fields={**SMALL, "window": hal.Windows(right=False)})
    fake_platform(kernels=[kernel])
    rows = [r for r in verify(kernels=["acme.prefill"]) if r.corner["window"] and not r.corner["softcap"]]
    assert [r.status for r in rows] == ["failed"]
    assert "window=(15,0)" in rows[0].detail


def test_a_crash_is_a_failed_row_and_not_the_end(spoiled: Make, attention_kernel: Make, fake_platform: Make) -> None:
    def crashes(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("illegal instruction at 0x10")

    broken = attention_kernel("broken.prefill", target="no_such_module_of_acme:factory", fields=SMALL)
    fake_platform(
        kernels=[spoiled("acme.prefill", crashes, fields=SMALL), broken, spoiled("good.prefill", fields=SMALL)]
    )
    rows = {r.kernel: r for r in verify(kernels=["acme", "broken", "good"], quick=True)}
    assert {name: row.status for name, row in rows.items()} == {
        "acme.prefill": "failed", "broken.prefill": "failed", "good.prefill": "verified",
    }  # fmt: skip
    assert "RuntimeError: illegal instruction at 0x10" in rows["acme.prefill"].detail
    assert "No module named 'no_such_module_of_acme'" in rows["broken.prefill"].detail


def test_what_could_not_be_tried_leaves_no_row(spoiled: Make, fake_platform: Make, small: Make) -> None:
    def full(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("80 GiB")

    fake_platform(kernels=[spoiled("acme.decode", full, fields=SMALL)])
    told: list[str] = []
    assert verify(kernels=["acme.decode"], quick=True, progress=told.append) == []
    assert any("acme.decode untested" in text and "80 GiB" in text for text in told)
    assert decode(small).kernels() == {"decode": "acme.decode"}


def test_only_what_the_device_can_run_is_run(spoiled: Make, fake_platform: Make) -> None:
    elsewhere = spoiled("far.decode", platforms={"other": hal.Archs()})
    lacking = spoiled("lacking.decode", needs=(hal.Needs("acme-blas", ">=2"),))
    off = spoiled("off.decode")
    old = spoiled("old.decode", runtime=">=99")
    fake_platform(kernels=[elsewhere, lacking, off, old])
    with hal.override(disable="off.decode"):
        rows = verify(op="kv_cache_write", quick=True)
        assert {r.kernel.partition(".")[2] for r in rows} == {"kv_cache_write"}
        with pytest.raises(HalError) as caught:
            verify(kernels=["far", "lacking", "off", "old"])
    for text in (
        "none of the kernels asked for can run on fake:0",
        "far.decode: for other only",
        "lacking.decode: acme-blas is not installed",
        "off.decode: hal.override(disable='off.decode') disables off.decode",
        "old.decode: needs frt >=99; this is 12.10",
    ):
        assert text in str(caught.value)


def test_given_requests_take_the_place_of_corners(acme: hal.Kernel, small: Make) -> None:
    write = KvCacheWriteRequest(num_kv_heads=1, head_dim=8)
    rows = verify(kernels=["acme.decode"], requests=[small("decode", dtype="float32"), write])
    assert [r.corner["softcap"] for r in rows] == [False]


def test_names_are_checked_before_anything_runs(acme: hal.Kernel) -> None:
    with pytest.raises(UnknownKernelError, match=r"Did you mean 'acme\.decode'"):
        verify(kernels=["acme.decod"])
    with pytest.raises(UnknownOpError, match="atention"):
        verify(op="atention")
    with (
        hal.simulate("fake:f10"),
        pytest.raises(DeviceError, match="is simulated; kernels are verified by running them"),
    ):
        verify()
    assert ledger().rows() == ()


def test_errata_keep_a_kernel_out(acme: hal.Kernel, tmp_path: Path) -> None:  # requirement D13
    row = {
        "id": "A-1",
        "kernels": ["acme.*"],
        "summary": "bad",
        "url": "https://a.b/1",
        "when": {"softcap": {"min": 1}},
    }
    (tmp_path / "errata.json").write_text(json.dumps([row]))
    with hal.override(errata=tmp_path / "errata.json"):
        assert {r.corner["softcap"] for r in verify(kernels=["acme.decode"])} == {False}


KERNELS = """
    import os, time
    from hal_ops.attention import reference
    from hal_ops.kv_cache.reference import write

    def aborts(request, device):
        print("about to abort")
        os.abort()

    def sleeps(request, device):
        time.sleep(100)

    def right(request, device):
        return reference.prefill(request, device)
"""

PLUGIN = """
    import hal

    FIELDS = {
        "num_q_heads": hal.OneOf(2), "num_kv_heads": hal.OneOf(1), "head_dim": hal.OneOf(16),
        "v_head_dim": hal.SameAs("head_dim"), "dtype": hal.OneOf("float32"), "causal": hal.OneOf(True),
    }

    class CrashPlatform(hal.Platform):
        name = "crash"
        vendor = "Crash"

        def probe(self, environ):
            arch = self.parse_arch("c1")
            return hal.Probe((hal.Device(platform="crash", arch=arch),), (hal.Evidence("bus", "one device", 1),))

        def parse_arch(self, text):
            if text != "c1":
                raise ValueError(f"{text!r} is not c1")
            return hal.Arch("crash", text)

        def capabilities(self, arch):
            return frozenset()

        def kernels(self):
            return [
                hal.Kernel(
                    name=f"{name}.prefill", op="attention", phase="prefill", target=f"crash_kernels:{name}",
                    priority=400, platforms={"crash": hal.Archs()}, fields=FIELDS,
                )
                for name in ("aborts", "sleeps", "right")
            ]
"""


@pytest.fixture
def crash_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An installed plugin whose kernels take their process with them."""
    (tmp_path / "crash_kernels.py").write_text(textwrap.dedent(KERNELS))
    (tmp_path / "crash_plugin.py").write_text(textwrap.dedent(PLUGIN))
    info = tmp_path / "crash_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crash-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hal.platforms]\ncrash = crash_plugin:CrashPlatform\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    hal.reset()
    yield
    monkeypatch.undo()
    hal.reset()


def test_a_crash_of_the_process_is_one_kernels_failure(crash_plugin: Any) -> None:  # requirement R16
    found = verify(kernels=["aborts", "right"], device="crash", isolate=True, quick=True)
    rows = {r.kernel: r for r in found}
    assert rows["aborts.prefill"].status == "failed"
    assert "the process died of SIGABRT" in rows["aborts.prefill"].detail
    assert "about to abort" in rows["aborts.prefill"].detail
    assert rows["right.prefill"].status == "verified", rows["right.prefill"].detail


def test_a_kernel_that_never_answers_is_killed(crash_plugin: Any) -> None:
    kernel = find_kernel("sleeps.prefill")
    with Isolated(timeout=1) as process:
        found = process.check(kernel, corners(kernel)[0], hal.device("crash"))
        assert found.status == "failed"
        assert "no answer within 1 s" in found.detail


def test_a_process_that_does_not_start_blames_no_kernel(
    crash_plugin: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernel = find_kernel("right.prefill")
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    (tmp_path / "pickle.py").write_text("raise ImportError('no such thing')")
    with Isolated() as process, pytest.raises(HalError) as caught:
        process.check(kernel, corners(kernel)[0], hal.device("crash"))
    assert "the process that checks kernels does not start: the process ended with status 1" in str(caught.value)
    assert "no such thing" in str(caught.value)


@pytest.mark.parametrize("works", [True, False])
def test_what_the_worker_answers(crash_plugin: Any, monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    """The result, and whether the device survived it; a task that makes no sense is nobody's failure."""
    monkeypatch.setattr(_worker, "_works", lambda device: works)
    kernel = find_kernel("right.prefill")
    request = corners(kernel)[0]
    tasks = [(kernel.name, "prefill", request, device, 0) for device in ("crash:0", "crash:9")]
    answers = io.BytesIO()
    _worker.serve(io.BytesIO(b"".join(map(_worker.encode, tasks))), answers)
    ready, good, bad = (_worker.decode(line) for line in answers.getvalue().splitlines())
    assert ready == _worker.READY
    assert (good[0].status, good[1]) == ("verified", True)
    assert (bad[0].status, bad[1]) == ("untested", works)
    assert "crash has no device 9" in bad[0].detail


def test_whether_a_device_works(crash_plugin: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert _worker._works("crash:0")
    assert not _worker._works("crash:9")
    assert "crash:9 works no longer: crash has no device 9" in capfd.readouterr().err


def test_one_name_may_be_given_as_it_is(acme: hal.Kernel) -> None:
    assert {r.kernel for r in verify(kernels="acme.decode", quick=True)} == {"acme.decode"}
