"""What Moore Threads devices are offered: true reasons, no library taken for another, one library bound at a time."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import emulated.library
import emulated.mate
import pytest
import torch

import hal
from hal import _plugins
from hal.cli._models import MODELS, requests_for
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

MUSA = {"torch": "2.7.1", "torch_musa": "2.7.1", "mate": "0.2.2"}
LLAMA = AttentionRequest(num_q_heads=32, num_kv_heads=8, head_dim=128)

Device = Callable[..., hal.Device]
Install = Callable[..., None]


def reasons(request: Any, phase: str, name: str, **options: Any) -> tuple[hal.Reason, ...]:
    candidates = hal.select(request, **options).choices[phase].candidates
    return next(c.reasons for c in candidates if c.kernel.name == name)


@pytest.mark.parametrize("version", ["0.2.0", "0.2.2", "3.1"])
def test_another_project_called_mate_is_not_taken_for_it(version: str, install: Install, device: Device) -> None:
    # requirement C9, P45
    install("mate", version, "mate/__init__.py", "mate/matchers.py")
    install("torch_musa", "2.7.1", "torch_musa/__init__.py")
    for phase in ("prefill", "extend", "decode"):
        (reason,) = reasons(LLAMA, phase, f"mate.{phase}", device=device())
        assert reason.code == "not_installed"
        assert reason.text == f"mate {version} here is another project of that name: it has no mate.mha_interface"
        assert "github.com/MooreThreads/mate" in reason.remedy
    assert "mate" not in sys.modules


@pytest.mark.parametrize("form", ["mate/mha_interface.py", "mate/mha_interface/__init__.py"])
def test_mate_is_recognised_without_importing_it(form: str, install: Install, device: Device) -> None:
    # requirement P45
    install("mate", "0.2.2", "mate/__init__.py", form)
    install("torch_musa", "2.7.1", "torch_musa/__init__.py")
    assert reasons(LLAMA, "decode", "mate.decode", device=device()) == ()
    assert {"mate", "torch_musa"}.isdisjoint(sys.modules)


def test_flash_attn_3s_names_mean_nothing_here() -> None:
    # requirement P34, C9
    wrapper = {"torch": "2.7.1", "torch_musa": "2.7.1", "flash_attn_3": "0.2.2"}
    with hal.simulate("musa:mp_31,musa=4.3.6", libraries=wrapper):
        assert [r.code for r in reasons(LLAMA, "decode", "mate.decode")] == ["not_installed"]
        assert "wrong_vendor" in {r.code for r in reasons(LLAMA, "decode", "fa3.decode")}
    with hal.simulate("nvidia:sm_90,cuda=12.8", libraries={**wrapper, "torch": "2.11.0", "mate": "0.2.2"}):
        assert "wrong_vendor" in {r.code for r in reasons(LLAMA, "decode", "mate.decode")}


@pytest.mark.parametrize(
    ("where", "libraries", "codes", "words"),
    [
        ("mp_31,musa=4.2", MUSA, {"runtime_too_old"}, "needs musa >=4.3.6; this is 4.2"),
        ("mp_31", MUSA, {"version_unknown"}, "needs musa >=4.3.6"),
        ("mp_22,musa=4.3.6", MUSA, {"arch_not_listed"}, "needs mp_31; this is mp_22"),
        ("mp_21,musa=4.3.6", MUSA, {"arch_not_listed"}, "needs mp_31; this is mp_21"),
        ("mp_41,musa=6.0", MUSA, {"arch_not_listed"}, "needs mp_31; this is mp_41"),
        ("mp_31,musa=5.1", {**MUSA, "mate": "0.2.0"}, {"version_too_old"}, "drops softcap, and plans without windows"),
        ("mp_31,musa=5.1", {"torch": "2.7.1", "mate": "0.2.2"}, {"not_installed"}, "torch_musa is not installed"),
        ("mp_31,musa=5.1", MUSA, set(), ""),
    ],
)
def test_why_mate_is_refused(where: str, libraries: dict[str, str], codes: set[str], words: str) -> None:
    # requirement E6, E7, C9, X16
    with hal.simulate(f"musa:{where}", libraries=libraries):
        found = reasons(LLAMA, "decode", "mate.decode")
    assert {r.code for r in found} == codes
    assert words in "; ".join(map(str, found))


@pytest.mark.parametrize(
    ("fields", "codes"),
    [
        ({"kv_dtype": "float8_e4m3fn"}, ["dtype"]),
        ({"alibi": True}, ["feature_unsupported"]),
        ({"deterministic": True}, ["feature_unsupported"]),
        ({"kv_layout": "HND"}, ["layout"]),
        ({"head_dim": 100}, ["head_dim"]),
        ({"head_dim": 576, "v_head_dim": 512}, ["head_dim", "head_dim"]),
        ({"dtype": "float32"}, ["dtype"]),
        ({"softmax_scale": -0.1}, ["feature_unsupported"]),
    ],
)
def test_what_mate_lacks_is_refused(fields: dict[str, Any], codes: list[str]) -> None:
    # requirement C7, D8, B7
    request = AttentionRequest(**{"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, **fields})
    with hal.simulate("musa:mp_31,musa=4.3.6", libraries=MUSA):
        assert [r.code for r in reasons(request, "decode", "mate.decode")] == codes


@pytest.mark.parametrize("arch", ["mp_21", "mp_22", "mp_31"])
def test_no_other_vendors_arch_is_compared(arch: str) -> None:
    # requirement C9, P18
    foreign = [k for k in _plugins.registry().kernels.values() if k.platforms and "musa" not in k.platforms]
    assert len(foreign) > 3
    with hal.simulate(f"musa:{arch},musa=4.3.6", libraries=MUSA):
        for kernel in foreign:
            if kernel.op == "attention":
                codes = {r.code for r in reasons(LLAMA, kernel.phase, kernel.name)}
                assert "wrong_vendor" in codes
                assert codes.isdisjoint({"arch_too_low", "arch_not_listed", "build_lacks_arch", "runtime_too_old"})


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("musa", ["4.2", "4.3.6"])
def test_models_are_explained_in_full(model: Any, musa: str) -> None:
    # requirement X19, P33
    with hal.simulate(f"musa:mp_31,musa={musa}", libraries=MUSA):
        for cache, layers in requests_for(model, hal.device()).items():
            for request in layers.values():
                selection = hal.select(request)
                text = selection.explain()
                for phase, choice in selection.choices.items():
                    assert all(c.reasons for c in choice.candidates if c.status == "refused")
                    adapted = musa == "4.3.6" and request.op == "attention"
                    fits = adapted and (cache != "fp8" or phase == "prefill")
                    assert (choice.kernel is not None and choice.kernel.library == "mate") == fits
                assert ("needs musa >=4.3.6; this is 4.2" in text) == (musa == "4.2" and request.op == "attention")


def test_layers_of_one_model_share_one_cache() -> None:
    # requirement P33, C5
    (model,) = (m for m in MODELS if m.name.startswith("GPT-OSS"))
    with hal.simulate("musa:mp_31,musa=4.3.6", libraries=MUSA):
        from hal._selection import select_together

        layers = list(requests_for(model, hal.device())["bfloat16"].values())
        sliding, full = select_together(layers)
    assert sliding.request.kv_layout == full.request.kv_layout == "NHD"  # type: ignore[attr-defined]
    assert sliding.request.page_size == full.request.page_size  # type: ignore[attr-defined]
    assert {*sliding.kernels().values(), *full.kernels().values()} == {"mate.prefill", "mate.extend", "mate.decode"}


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Other libraries under the names that MATE's wrapper takes too; gives what was looked at in them."""
    touched: list[str] = []

    class Foreign(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if not name.startswith("__"):  # the import system and inspect look at those of every module
                touched.append(f"{self.__name__}.{name}")
            raise AttributeError(name)

    for name in ("flash_attn_interface", "flash_attn_3", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, Foreign(name))
    return touched


def handle(device: hal.Device, **fields: Any) -> hal.Attention:
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "device": device}
    with hal.simulate(libraries=MUSA):
        return hal.get_attention(**{**heads, **fields})


def test_one_library_serves_every_phase_of_a_handle(foreign: list[str], device: Device) -> None:
    # requirement C1, P34, A2, A5, B8, B9
    with emulated.library.installed("mate", "0.2.2", emulated.mate.FUNCTIONS, adapters=["hal_musa._mate"]) as library:
        attn = handle(device())
        cache = attn.allocate_kv_cache(8)
        table = [[5, 2, 7]]
        q, k, v = (torch.randn(20, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
        whole = attn(q, k, v, cu_seqlens_q=(cu := torch.tensor([0, 20], dtype=torch.int32)), cu_seqlens_k=cu)
        parts = []
        for begin, end in ((0, 17), (17, 19), (19, 20)):
            plan = attn.plan(q_lens=[end - begin], kv_lens=[end], block_table=table)
            parts.append(attn(q[begin:end], k[begin:end], v[begin:end], cache=cache, plan=plan))
    assert {n for p, n in attn.kernels().items() if p != "write"} == {"mate.prefill", "mate.extend", "mate.decode"}
    assert [c.function.partition(":")[2] for c in library.calls] == [
        "flash_attn_varlen_func",
        "flash_attn_varlen_func",
        "get_scheduler_metadata",
        "flash_attn_with_kvcache",
        "get_scheduler_metadata",
        "flash_attn_with_kvcache",
    ]
    torch.testing.assert_close(torch.cat(parts), whole, atol=2e-2, rtol=2e-2)
    assert foreign == []


def test_forced_elsewhere_nothing_of_mate_is_called(device: Device) -> None:
    # requirement C1, P26
    with emulated.library.installed("mate", "0.2.2", emulated.mate.FUNCTIONS, adapters=["hal_musa._mate"]) as library:
        attn = handle(device(), kernel="reference")
        q, k, v = (torch.randn(1, 5, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
        attn(q, k, v)
    assert library.calls == []


def test_two_handles_in_two_threads_do_not_mix(device: Device) -> None:
    # requirement P36, C5, C8
    small = AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16, kv_layout="NHD")
    requests = [small, small.replace(window=4)]
    cases = [make_case(r, "decode", seed=i) for i, r in enumerate(requests)]
    failures: list[str] = []
    barrier = threading.Barrier(2)
    with emulated.library.installed("mate", "0.2.2", emulated.mate.FUNCTIONS, adapters=["hal_musa._mate"]):
        windows = (None, 4)
        handles = [handle(device(), window=w) for w in windows]

        def work(index: int) -> None:
            implementation = handles[index].implementation("decode")
            for _ in range(5):
                barrier.wait(10)
                failures.extend(str(r) for r in cases[index].check(implementation) if not r)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_what_torch_musa_serves_on_an_s4000() -> None:
    # requirement X16, D10
    with hal.simulate("musa:mp_22,musa=4.3.6", libraries=MUSA):
        assert set(hal.select(LLAMA).kernels().values()) == {f"torch_musa.{p}" for p in ("prefill", "extend", "decode")}
        softcap = hal.select(LLAMA.replace(softcap=30.0)).choices["decode"]
    refused = next(c.reasons for c in softcap.candidates if c.kernel.name == "torch_musa.decode")
    assert [r.code for r in refused] == ["feature_unsupported"]


@pytest.mark.parametrize(
    ("arch", "has", "lacks"),
    [
        ("mp_21", {"fp16"}, {"bf16", "graph_capture", "mccl", "triton"}),
        ("mp_22", {"bf16", "graph_capture", "mccl"}, {"fp8_e4m3fn", "mccl_fp8", "triton", "nccl"}),
        ("mp_31", {"fp8_e4m3fn", "graph_capture", "mccl", "mccl_fp8", "tme"}, {"fp8_e4m3fnuz", "tma", "nccl", "wgmma"}),
        ("mp_41", set(), {"fp16", "mccl"}),
    ],
)
def test_capabilities_are_named(arch: str, has: set[str], lacks: set[str]) -> None:
    with hal.simulate(f"musa:{arch},musa=4.3.6"):
        found = hal.device().capabilities
    assert has <= found
    assert found.isdisjoint(lacks)


def test_a_newer_toolkit_is_a_near_miss() -> None:
    # requirement X19, P28
    with hal.simulate("musa:mp_31,musa=4.2", libraries={**MUSA, "triton": "3.2.0"}):
        first = hal.select(LLAMA).near_misses()[0]
        assert first.text() == "with musa >=4.3.6: mate.prefill, mate.extend, mate.decode would be chosen"
        assert first.install == ("with musa >=4.3.6",)


def test_an_arch_that_nobody_knows_is_said_to_be_unknown() -> None:
    # requirement X16, X19
    with hal.simulate("musa:mp_99,musa=9.9", libraries={**MUSA, "triton": "3.2.0"}):
        (reason,) = reasons(LLAMA, "decode", "triton.decode")
        assert str(reason) == "what mp_99 can do is not known; this needs triton"
        assert hal.select(LLAMA).kernels()["decode"] == "reference.decode"
