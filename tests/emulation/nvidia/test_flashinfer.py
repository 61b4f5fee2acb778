"""flashinfer and flash-attn 4 by value, at the corners of their declarations, on every arch and in every version."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import flash_attn_4, flashinfer, hardware, library, signatures
from emulated.library import Installed

import hal
from hal import testing
from hal_nvidia import flash_attn_4_kernels, flashinfer_kernels, flashinfer_op_kernels, flashinfer_trtllm_kernels
from hal_nvidia._flashinfer_pool import _idle, _zeroed
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

FLASHINFER = (*flashinfer_kernels.KERNELS, *flashinfer_trtllm_kernels.KERNELS)
ROWS = flashinfer_op_kernels.KERNELS
KERNELS = {k.name: k for k in (*FLASHINFER, *ROWS, *flash_attn_4_kernels.KERNELS)}
ATTENTION = [name for name, k in KERNELS.items() if k.op == "attention"]
HOMES = [
    (name, arch) for name in ATTENTION for arch in KERNELS[name].platforms["nvidia"].only
    if (name, arch) != ("trtllm_gen.extend", "sm_103")
]  # fmt: skip
"""Where a kernel is right in its plain format, see :func:`test_what_is_refused_lets_nan_through`."""


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """Wrappers of one emulated library are not for the next; and tensors here are tiny, so that threads only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    _idle.clear()
    _zeroed.clear()


@contextlib.contextmanager
def running(name: str, arch: str, version: str = "") -> Iterator[Installed]:
    """The kernel's library, in the newest kept version unless told otherwise."""
    module = flash_attn_4 if name.startswith("fa4") else flashinfer
    version = version or signatures.versions(module.LIBRARY)[-1]
    distribution = flash_attn_4.distribution(version) if module is flash_attn_4 else module.LIBRARY
    versions = {distribution: version, "torch": "2.13.0", "nvidia-cutlass-dsl": "4.8.1"}
    functions = module.emulations(version, arch)
    with hal.simulate(libraries=versions), library.installed(distribution, version, functions) as held:
        yield held


def corners(name: str, arch: str, limit: int | None = None) -> list[Any]:
    return testing.corners(KERNELS[name], device=hardware.device_of(arch), limit=limit)


def wrong(name: str, requests: list[Any], arch: str) -> list[str]:
    return [str(r) for r in (hardware.check(KERNELS[name], request, arch) for request in requests) if not r.ok]


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_right_at_the_corners_of_its_declaration(name: str) -> None:
    # requirement A4, A5, B13, B15, C7, C11, D1, D4, D8, D12, D15, E8, E11, P22, P23, P24, P30
    homes = [arch for kernel, arch in HOMES if kernel == name] or ["sm_90"]
    arch = "sm_90" if "sm_90" in homes else homes[-1]
    with running(name, arch):
        given = corners(name, arch)
        assert len(given) >= 7
        assert wrong(name, given, arch) == []


@pytest.mark.parametrize(("name", "arch"), HOMES)
def test_every_arch(name: str, arch: str) -> None:  # requirement D10, D11, E13, B5
    with running(name, arch):
        assert wrong(name, corners(name, arch, limit=1), arch) == []


FP8: dict[str, Any] = {"kv_dtype": "float8_e4m3fn", "fp8_query": True}


@pytest.mark.parametrize(
    ("name", "arch", "fields", "right"),
    [
        ("trtllm_gen.extend", "sm_103", {}, False),
        ("trtllm_gen.extend", "sm_103", FP8, True),
        ("trtllm_gen.extend", "sm_100", {}, True),
        ("xqa.decode", "sm_90", {}, True),
        ("xqa.decode", "sm_100", FP8, True),
    ],
)
def test_what_is_refused_lets_nan_through(name: str, arch: str, fields: dict[str, Any], right: bool) -> None:
    # requirement D15, D13
    """The emulations have the habits for which an erratum and a check refuse kernels: the checks see NaN of unused slots."""
    request = AttentionRequest(
        num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16, kv_layout="HND", dtype="bfloat16",
        phases=(KERNELS[name].phase,), **fields,
    )  # fmt: skip
    with running(name, arch):
        assert (wrong(name, [request], arch) == []) == right


def test_xqa_over_fp8_lets_nan_through_on_hopper() -> None:  # requirement D15
    """As ``tests/gpu/test_nvidia_flashinfer.py`` saw it of the library: in rows that do not fill their last page."""
    request = AttentionRequest(
        num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16, kv_layout="NHD", dtype="bfloat16", phases=("decode",),
        **FP8,
    )  # fmt: skip
    with running("xqa.decode", "sm_90"):
        paged = hardware.build("xqa.decode", request)
        case = make_case(request, "decode", lengths=[(1, 9), (1, 16), (1, 33), (1, 32)])
        out = paged(*case.args, paged.plan(case.args[3]), **case.kwargs)
    assert out.isnan().flatten(1).all(1).tolist() == [True, False, True, False]


def supported() -> list[Any]:
    found = []
    for name, kernel in KERNELS.items():
        dist = "flash-attn-4" if name.startswith("fa4") else "flashinfer-python"
        needs = next(n for n in kernel.needs if n.library == dist)
        kept = [v for d in needs.names() for v in signatures.versions(d)]
        fits = [v for v in kept if hal.Version.parse(v).satisfies(needs.versions)]
        found += [(name, version) for version in fits]
    return found


@pytest.mark.parametrize(("name", "version"), supported())
def test_every_version_takes_the_calls_and_answers_rightly(name: str, version: str) -> None:  # requirement A4, P39
    arch = "sm_90" if "sm_90" in KERNELS[name].platforms["nvidia"].only else "sm_120"
    arch = arch if arch in (KERNELS[name].platforms["nvidia"].only or (arch,)) else "sm_100"
    request = corners(name, arch, limit=1)[0]
    fields = KERNELS[name].fields
    rich = {"return_lse": True, "window": (15, 0), "graph": True, "weight_offset": 1.0, "approximate": "tanh"}
    more = {n: v for n, v in rich.items() if n in fields and fields[n].admits(v, request)}
    with running(name, arch, version) as held:
        assert wrong(name, [request, request.replace(**more)], arch) == []
        assert held.calls


def test_a_wrong_emulation_is_seen() -> None:
    """The checks above can fail: a library that speaks base e, and one that ignores the window."""
    request = AttentionRequest(
        num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16, kv_layout="NHD", return_lse=True, window=(15, 0)
    )
    with running("flashinfer_fa2.extend", "sm_90") as held:
        assert hardware.check(KERNELS["flashinfer_fa2.extend"], request, "sm_90").ok
        assert {c.arguments["window_left"] for c in held.called("BatchPrefillWithPagedKVCacheWrapper.plan")} == {15}
    version = signatures.versions(flashinfer.LIBRARY)[-1]
    with hal.simulate(libraries={}):
        for name, spoilt in (("lse", lambda out, lse: (out, lse * 0.7)), ("out", lambda out, lse: (out * 1.1, lse))):
            functions = flashinfer.emulations(version, "sm_90")
            base = functions[flashinfer.PAGED]
            run = base.run
            base.run = lambda self, *a, run=run, spoilt=spoilt, **k: spoilt(*run(self, *a, **k))
            with library.installed(flashinfer.LIBRARY, version, functions):
                result = hardware.check(KERNELS["flashinfer_fa2.extend"], request, "sm_90")
            assert not result.ok
            assert f": {name}: WRONG" in result.detail
            _idle.clear()


@pytest.mark.parametrize("name", [n for n in ATTENTION if n.startswith("flashinfer_fa") or "sink" in n])
def test_what_plan_fixes_is_told_to_plan(name: str) -> None:  # requirement C7, C11, D9, P22, P23
    arch = "sm_90"
    fields: dict[str, Any] = {"window": (15, 0), "softmax_scale": 0.3}
    fields |= {"sinks": True} if "sink" in name else {"softcap": 30.0}
    phase = name.rpartition(".")[2]
    request = AttentionRequest(
        num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16, kv_layout="HND", phases=(phase,), **fields
    )
    with running(name, arch) as held:
        assert hardware.check(KERNELS[name], request, arch).ok
        plans = [c for c in held.calls if c.function.endswith((".plan", "._plan_impl"))]
        runs = [c for c in held.calls if c.function.endswith(".run")]
        made = [c for c in held.calls if c.function.endswith(".__init__")]
    assert {c.passed["backend"] for c in made} <= {"fa2", "fa3"}, "auto may become another library"
    for call in plans:
        told = call.passed.get("kwargs", call.passed)
        assert told["window_left"] == 15
        assert told["logits_soft_cap"] == (None if "sink" in name else 30.0)
        assert told["sm_scale"] == 0.3
        assert told["q_data_type"] == told["kv_data_type"] == torch.bfloat16
    for call in runs:
        assert set(call.passed) <= {"q", "k", "v", "paged_kv_cache", "args", "return_lse"}
        assert ("args" in call.passed) == ("sink" in name), "run(sinks=) is ignored by these backends"


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("scale", ["tensor", "head"])
def test_fp8_caches_are_scaled_on_the_device(dtype: str, scale: str) -> None:  # requirement B6, B7, D12, P30
    request = AttentionRequest(
        num_q_heads=6, num_kv_heads=2, head_dim=128, page_size=16, kv_layout="HND", kv_dtype=dtype, kv_scale=scale,
        return_lse=True,
    )  # fmt: skip
    for name in ("flashinfer_fa2.extend", "flashinfer_fa2.decode"):
        with running(name, "sm_89") as held:
            assert wrong(name, [request], "sm_89") == []
            told = {c.passed.get("kwargs", c.passed)["kv_data_type"] for c in held.calls if c.function.endswith("plan")}
            assert told == {getattr(torch, dtype)}
            assert not any("k_scale" in c.passed or "v_scale" in c.passed for c in held.calls)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("heads", "wanted"), [((6, 2), False), ((4, 1), True), ((14, 2), True)])
def test_tensor_cores_decode_from_four_heads_a_kv_head_on(heads: tuple[int, int], wanted: bool, kv_dtype: str) -> None:
    """Over FP8 caches always: of these the other kernel has read none on hardware."""
    request = AttentionRequest(
        num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=128, page_size=16, kv_layout="NHD", kv_dtype=kv_dtype
    )
    with running("flashinfer_fa2.decode", "sm_90") as held:
        assert wrong("flashinfer_fa2.decode", [request], "sm_90") == []
        made = held.called("BatchDecodeWithPagedKVCacheWrapper.__init__")
    assert {c.arguments["use_tensor_cores"] for c in made} == {wanted or "float8" in kv_dtype}


@pytest.mark.parametrize("fp8_query", [True, False])
@pytest.mark.parametrize("name", ["trtllm_gen.extend", "trtllm_gen.decode"])
def test_trtllm_gen_s_queries_are_in_fp8_where_that_is_permitted(name: str, fp8_query: bool) -> None:
    # requirement B6, B7, D12, P26
    request = AttentionRequest(
        num_q_heads=6, num_kv_heads=2, head_dim=128, page_size=32, kv_layout="HND", max_q_len=4,
        kv_dtype="float8_e4m3fn", fp8_query=fp8_query, window=(15, 0), phases=(name.rpartition(".")[2],),
    )  # fmt: skip
    if name == "trtllm_gen.extend" and not fp8_query:
        return  # refused: see test_flashinfer_declared.py
    with running(name, "sm_100") as held:
        assert wrong(name, [request], "sm_100") == []
        calls = [c for c in held.calls if "trtllm_batch" in c.function]
        assert {c.passed["query"].dtype for c in calls} == {torch.float8_e4m3fn if fp8_query else torch.bfloat16}
        assert {c.passed["out_dtype"] for c in calls} == {torch.bfloat16}
        assert {c.passed["backend"] for c in calls if "decode" in c.function} <= {"trtllm-gen"}, "auto may become xqa"


@pytest.mark.parametrize("version", ["0.6.13", "0.7.2.post1"])
@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_rows_without_keys_do_not_show_the_library_s_stand_in(backend: str, version: str) -> None:  # requirement B15
    from hal_ops.attention.cases import make_case

    request = AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=64, return_lse=True, phases=("prefill",))
    name = f"flashinfer_{backend}.prefill"
    with running(name, "sm_90", version):
        prefill = hardware.build(KERNELS[name], request, "sm_90")
        case = make_case(request, "prefill", lengths=[(9, 4), (3, 3), (7, 0)])
        out, lse = prefill(*case.args, **case.kwargs)
        dense = prefill(*(x[None] for x in (case.args[0][:9], *(y[:4] for y in case.args[1:]))))
    assert all(c.ok for c in case.check(lambda *a, **k: (out, lse)))
    assert (lse[:5] == -torch.inf).all()
    assert not dense[0, :5].any()
    assert dense[0, 5:].any()
