"""What AMD devices are offered: true reasons, no library taken for another, one library bound at a time."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import emulated.aiter
import emulated.aiter_ops
import emulated.aiter_triton
import emulated.library
import pytest
import torch
from emulated.amd import device_of

import hal
from hal import _plugins
from hal._selection import select_together
from hal.cli._models import MODELS, requests_for
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

PHASES = ("prefill", "extend", "decode")
TORCH = {"torch": "2.9.1", "triton": "3.4.0"}
AITER = {**TORCH, "amd-aiter": "0.1.20.post1"}
FLASH = {**TORCH, "flash-attn": "2.8.3"}
HEADS = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
LLAMA = AttentionRequest(**HEADS)
ADAPTERS = ("hal_rocm._aiter", "hal_rocm._aiter_ops", "hal_rocm._aiter_triton")

Install = Callable[..., None]


def reasons(request: Any, phase: str, name: str, **options: Any) -> tuple[hal.Reason, ...]:
    candidates = hal.select(request, **options).choices[phase].candidates
    return next(c.reasons for c in candidates if c.kernel.name == name)


def test_another_project_called_aiter_is_not_taken_for_it(install: Install) -> None:
    # requirement C9, P45
    install("aiter", "0.13.20191203", "aiter/__init__.py", "aiter/iterators.py")
    for phase in PHASES:
        found = [r for r in reasons(LLAMA, phase, f"aiter.{phase}", device=device_of()) if r.field == "library"]
        assert "amd-aiter is not installed" in [r.text for r in found]
        assert any("`pip install aiter` brings another project" in r.remedy for r in found)
    assert "aiter" not in sys.modules


def test_aiter_shadowed_by_the_other_project_is_not_taken_for_it(install: Install) -> None:
    # requirement C9, P45
    install("amd_aiter", "0.1.20.post1", "aiter/__init__.py", "aiter/iterators.py")
    (reason,) = (r for r in reasons(LLAMA, "prefill", "aiter.prefill", device=device_of()) if "aiter" in r.text)
    assert reason.code == "not_installed"
    assert reason.text == "amd-aiter 0.1.20.post1 here is another project of that name: it has no aiter.ops.mha"
    assert "aiter" not in sys.modules


def test_aiter_is_recognised_without_importing_it(install: Install) -> None:
    # requirement P45
    install("amd_aiter", "0.1.20.post1", "aiter/__init__.py", "aiter/ops/__init__.py", "aiter/ops/mha.py")
    assert reasons(LLAMA, "prefill", "aiter.prefill", device=device_of()) == ()
    assert "aiter" not in sys.modules


@pytest.mark.parametrize("where", ["nvidia:sm_90,cuda=12.8", "musa:mp_31,musa=4.3.6", "cpu:x86_64"])
def test_off_amd_it_is_refused_for_the_vendor_and_never_imported(where: str) -> None:
    # requirement C9, P44
    adapters = {
        f"hal_rocm.{n}" for n in ("_aiter", "_aiter_ops", "_aiter_paged", "_aiter_triton", "_flash_attn", "_sdpa")
    }
    for name in adapters:
        sys.modules.pop(name, None)
    with hal.simulate(where, libraries={**AITER, **FLASH, "torch": "2.13.0"}):
        for phase in PHASES:
            for candidate in hal.select(LLAMA).choices[phase].candidates:
                if "rocm" in (candidate.kernel.platforms or ()):
                    assert {"wrong_vendor"} <= {r.code for r in candidate.reasons}
    hal.get_attention(**HEADS, device="cpu")
    assert adapters.isdisjoint(sys.modules)
    assert "aiter" not in sys.modules


@pytest.mark.parametrize(
    ("arch", "libraries", "name", "codes", "words"),
    [
        ("gfx942", AITER, "aiter.decode", set(), ""),
        ("gfx950", AITER, "aiter.prefill", set(), ""),
        ("gfx90a", AITER, "aiter.prefill", {"arch_not_listed"}, "needs gfx942 or gfx950; this is gfx90a"),
        ("gfx1100", AITER, "aiter.decode", {"arch_not_listed"}, "this is gfx1100"),
        ("gfx1250", AITER, "aiter_triton.decode", {"arch_not_listed"}, "this is gfx1250"),
        ("gfx942", TORCH, "aiter.decode", {"not_installed"}, "amd-aiter is not installed"),
        ("gfx942", {**TORCH, "amd-aiter": "0.1.7"}, "aiter.prefill", {"version_too_old"}, "amd-aiter"),
        ("gfx942", {**TORCH, "amd-aiter": "0.1.12"}, "aiter.extend", {"version_too_old"}, ">=0.1.13"),
        ("gfx942", {**AITER, "torch": "2.5.1"}, "aiter.decode", {"version_too_old"}, "torch"),
        ("gfx1201", FLASH, "fa2_ck.decode", {"arch_not_listed"}, "this is gfx1201"),
        ("gfx90a", FLASH, "fa2_ck.decode", set(), ""),
        ("gfx90a", FLASH, "fa2_triton.prefill", {"disabled_by_env"}, "FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE"),
        ("gfx1100", TORCH, "sdpa_aotriton_flash.prefill", {"arch_not_listed"}, "this is gfx1100"),
        ("gfx942", {"torch": "2.7.1"}, "sdpa_aotriton_flash.prefill", {"version_too_old"}, ">=2.8"),
    ],
)
def test_why_a_kernel_is_refused(
    arch: str, libraries: dict[str, str], name: str, codes: set[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # requirement B1, C9, D10, P44, X16
    monkeypatch.delenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", raising=False)
    request = LLAMA.replace(page_size=128)
    with hal.simulate(f"rocm:{arch},hip=6.4", libraries=libraries):
        found = reasons(request, name.rpartition(".")[2], name)
    assert {r.code for r in found if r.code != "capability_missing"} == codes
    assert words in "; ".join(map(str, found))


MODEL_REASONS = {
    "Llama-3-8B": {"fa2_ck.prefill": "flash-attn is not installed"},
    "GPT-OSS-120B": {
        "aiter.decode": "sinks",
        "fa2_ck.prefill": "sinks",
        "sdpa_aotriton_flash.prefill": "sinks",
    },
    "Gemma-2-9B": {
        "aiter.extend": "head_dim 256",
        "aiter.decode": "head_dim 256",
        "fa2_ck.extend": "softcap",
        "sdpa_aotriton_flash.prefill": "softcap",
    },
    "MiniLM-L6": {},
}


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_models_are_explained_in_full(model: Any, arch: str) -> None:
    # requirement B1, B13, X19, P33
    with hal.simulate(f"rocm:{arch},hip=6.4", libraries=AITER):
        for cache, layers in requests_for(model, hal.device()).items():
            for kind, request in layers.items():
                selection = hal.select(request)
                for phase, choice in selection.choices.items():
                    assert all(c.reasons for c in choice.candidates if c.status == "refused")
                    assert choice.kernel is not None
                    latent = (
                        "triton",
                        "triton" if cache == "fp8" else "aiter",
                    )  # aiter's FP8 rounds queries: fp8_query permits it
                    paged = latent if request.op == "mla_attention" else ("aiter_triton", "aiter_triton")
                    served = dict(zip(PHASES, ("aiter", *paged), strict=True))
                    assert choice.kernel.library == served[phase], (cache, kind)
                text = selection.explain()
                assert all(name in text for name in selection.kernels().values())
                for name, words in MODEL_REASONS.get(model.name, {}).items():
                    if (phase := name.rpartition(".")[2]) in selection.choices:
                        assert words in "; ".join(map(str, reasons(request, phase, name)))


@pytest.mark.parametrize(
    ("page_size", "decode"), [(16, "aiter.decode"), (1, "aiter.decode"), (128, "aiter_triton.decode")]
)
def test_page_sizes_decide_between_its_decode_kernels(page_size: int, decode: str) -> None:
    # requirement D1, D8
    with hal.simulate("rocm:gfx942,hip=6.4", libraries=AITER):
        selection = hal.select(LLAMA.replace(page_size=page_size))
        assert selection.kernels()["decode"] == decode
        if page_size != 128:
            assert selection.kernels()["extend"] == "aiter.extend"
            refused = reasons(LLAMA.replace(page_size=page_size), "decode", "aiter_triton.decode")
            assert [r.code for r in refused] == ["page_size"]


@pytest.mark.parametrize("name", ["GPT-OSS-120B", "Gemma-2-9B", "Gemma-3-27B"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "gfx1100"])
def test_layers_of_one_model_share_one_cache(name: str, arch: str) -> None:
    # requirement C5, P33
    (model,) = (m for m in MODELS if m.name == name)
    with hal.simulate(f"rocm:{arch},hip=6.4", libraries=AITER):
        sliding, full = select_together(list(requests_for(model, hal.device())["bfloat16"].values()))
    for field in ("kv_layout", "page_size", "kv_dtype"):
        assert getattr(sliding.request, field) == getattr(full.request, field)


@pytest.mark.parametrize(
    ("arch", "flavour"), [("gfx942", "float8_e4m3fnuz"), ("gfx950", "float8_e4m3fn"), ("gfx1201", "float8_e4m3fn")]
)
def test_fp8_is_the_flavour_of_the_device(arch: str, flavour: str) -> None:
    # requirement P29, P31
    other = {"float8_e4m3fn": "float8_e4m3fnuz", "float8_e4m3fnuz": "float8_e4m3fn"}[flavour]
    with hal.simulate(f"rocm:{arch},hip=6.4", libraries=AITER):
        request = LLAMA.replace(page_size=128)
        selection = hal.select(request.replace(kv_dtype="fp8"))
        assert selection.request.kv_dtype == flavour  # type: ignore[attr-defined]
        assert selection.kernels()["decode"] == "aiter_triton.decode"
        (reason,) = reasons(request.replace(kv_dtype=other), "decode", "aiter_triton.decode")
        assert (reason.code, reason.field, reason.wanted) == ("dtype", "kv_dtype", other)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100", "gfx1151"])
def test_archs_without_fp8_take_none(arch: str) -> None:
    # requirement P29, P31
    with hal.simulate(f"rocm:{arch},hip=6.4", libraries=AITER):
        for flavour in ("float8_e4m3fn", "float8_e4m3fnuz"):
            assert "dtype" in {
                r.code for r in reasons(LLAMA.replace(kv_dtype=flavour), "decode", "aiter_triton.decode")
            }


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "gfx1250", "gfx1310"])
def test_no_other_vendors_arch_is_compared(arch: str) -> None:
    # requirement C9, P18, R15, X16
    foreign = [k for k in _plugins.registry().kernels.values() if k.platforms and "rocm" not in k.platforms]
    assert len(foreign) > 3
    with hal.simulate(f"rocm:{arch},hip=6.4", libraries=AITER):
        for kernel in foreign:
            if kernel.op == "attention":
                codes = {r.code for r in reasons(LLAMA, kernel.phase, kernel.name)}
                assert "wrong_vendor" in codes
                assert codes.isdisjoint({"arch_too_low", "arch_not_listed", "build_lacks_arch", "runtime_too_old"})
        assert all(kernel != "none" for kernel in hal.select(LLAMA).kernels().values())


def test_known_bad_versions_are_refused_with_their_link() -> None:
    # requirement E6, P23
    sinks = AttentionRequest(**HEADS, sinks=True, phases=("prefill",))
    with hal.simulate("rocm:gfx942,hip=6.4", libraries=AITER):
        (reason,) = reasons(sinks, "prefill", "aiter.prefill")
        assert reason.code == "version_known_bad"
        assert "aiter-v3-sinks" in reason.text
        assert "github.com/ROCm/aiter/pull/5223" in reason.remedy
        narrow = sinks.replace(head_dim=64, v_head_dim=64)
        assert reasons(narrow, "prefill", "aiter.prefill") == ()
    with hal.simulate("rocm:gfx942,hip=6.4", libraries={**TORCH, "amd-aiter": "0.1.8"}):
        found = reasons(narrow, "prefill", "aiter.prefill")
        assert "aiter-no-sinks" in "; ".join(map(str, found))


def test_forcing_what_is_refused_names_every_reason() -> None:
    # requirement B1
    with hal.simulate("rocm:gfx90a,hip=6.4", libraries=TORCH), pytest.raises(hal.errors.NoKernelError) as error:
        hal.get_attention(**HEADS, kernel="aiter")
    text = str(error.value)
    for words in ("aiter.prefill", "aiter.extend", "aiter.decode", "amd-aiter is not installed", "this is gfx90a"):
        assert words in text


@pytest.fixture
def library() -> Iterator[emulated.library.Installed]:
    version = "0.1.20.post1"
    found = {
        **emulated.aiter.emulations(version),
        **emulated.aiter_triton.emulations(version, torch.float8_e4m3fnuz),
        **emulated.aiter_ops.emulations(version),
    }
    with emulated.library.installed("amd-aiter", version, found, adapters=ADAPTERS) as installed:
        yield installed


def handle(**fields: Any) -> hal.Attention:
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "device": device_of()}
    with hal.simulate(libraries=AITER):
        return hal.get_attention(**{**heads, **fields})


@pytest.mark.parametrize(("page_size", "family"), [(16, "aiter"), (128, "aiter_triton")])
def test_a_sequence_through_every_phase_of_a_handle(
    page_size: int, family: str, library: emulated.library.Installed
) -> None:
    # requirement A2, A5, B8, B9, C1, P34, P49
    environment = dict(os.environ)
    attn = handle(page_size=page_size)
    cache = attn.allocate_kv_cache(8)
    table = [[5, 2, 7]]
    q, k, v = (torch.randn(20, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    whole = attn(q, k, v, cu_seqlens_q=(cu := torch.tensor([0, 20], dtype=torch.int32)), cu_seqlens_k=cu)
    parts = []
    for begin, end in ((0, 17), (17, 19), (19, 20)):
        plan = attn.plan(q_lens=[end - begin], kv_lens=[end], block_table=table)
        parts.append(attn(q[begin:end], k[begin:end], v[begin:end], cache=cache, plan=plan))
    bound = {phase: name for phase, name in attn.kernels().items() if phase != "write"}
    assert bound == {"prefill": "aiter.prefill", "extend": f"{family}.extend", "decode": f"{family}.decode"}
    torch.testing.assert_close(torch.cat(parts), whole, atol=2e-2, rtol=2e-2)
    called = [c.function.partition(":")[2] for c in library.calls if not c.function.startswith("aiter.ops.cache:")]
    assert attn.kernels()["write"] == "aiter.kv_cache_write"
    assert len(library.calls) == len(called) + 3
    own = ["mha_batch_prefill_func", "paged_attention_ragged"]
    fresh = ["flash_attn_varlen_func"] * 2  # the whole, and the first part: no row has a prefix in the cache
    assert called == [*fresh, *(own if family == "aiter" else ["unified_attention"] * 2)]
    assert dict(os.environ) == environment


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 2.0)])
def test_an_fp8_cache_is_read_as_it_was_written(
    scales: tuple[float, float], library: emulated.library.Installed
) -> None:
    # requirement B6, P29, P30
    with hal.override(op_kv_cache_write="torch"):  # Triton's cannot run here
        attn, right = handle(page_size=128, kv_dtype="fp8"), handle(page_size=128, kernel="reference")
    assert attn.request.kv_dtype == "float8_e4m3fnuz"
    assert attn.kernels()["decode"] == "aiter_triton.decode"
    cache = attn.allocate_kv_cache(2, k_scale=scales[0], v_scale=scales[1])
    q, k, v = (torch.randn(9, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    steps = [attn.plan(q_lens=[n], kv_lens=[end], block_table=[[1]]) for n, end in ((8, 8), (1, 9))]
    attn(q[:8], k[:8], v[:8], cache=cache, plan=steps[0])
    out = attn(q[8:], k[8:], v[8:], cache=cache, plan=steps[1])
    held = cache.k[1, :9].float() * scales[0]
    torch.testing.assert_close(held, k.float(), atol=0.02, rtol=0.07)
    torch.testing.assert_close(out, right(q[None], k[None], v[None])[0, 8:], atol=0.1, rtol=0.1)


def test_forced_elsewhere_nothing_of_aiter_is_called(library: emulated.library.Installed) -> None:
    # requirement C1, P26
    attn = handle(kernel="reference")
    q, k, v = (torch.randn(1, 5, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    attn(q, k, v)
    assert library.calls == []


def test_two_handles_in_two_threads_do_not_mix(library: emulated.library.Installed) -> None:
    # requirement C5, C8, P36
    small = AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16, kv_layout="NHD")
    softcaps = (0.0, 2.0)
    cases = [make_case(small.replace(softcap=c), "decode", seed=i, scale="large") for i, c in enumerate(softcaps)]
    handles = [handle(softcap=c) for c in softcaps]
    assert {h.kernels()["decode"] for h in handles} == {"aiter.decode"}
    failures: list[str] = []
    barrier = threading.Barrier(2)

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
