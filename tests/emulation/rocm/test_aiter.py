"""aiter's attention adapters in CK and assembly: bound against the kept signatures, and by value against its habits."""

from __future__ import annotations

import itertools
from typing import Any

import emulated.aiter
import emulated.signatures
import pytest
import torch
from emulated.aiter import installed
from emulated.amd import KERNELS, built, check_corners, device_of, values

import hal
from hal.testing import check
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import AttentionCase, make_case
from hal_rocm import RocmPlatform, aiter_kernels

NAMES = [kernel.name for kernel in aiter_kernels.KERNELS]
FUNCTIONS = {
    "aiter.prefill": "flash_attn_varlen_func",
    "aiter.extend": "mha_batch_prefill_func",
    "aiter.decode": "paged_attention_ragged",
}
VERSIONS = [
    *(("amd-aiter-wheel", v) for v in emulated.signatures.versions("amd-aiter-wheel")),
    *(("amd-aiter", v) for v in emulated.signatures.versions("amd-aiter")),
]
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "kv_layout": "NHD"}
ERRATA = {e.id: e for e in RocmPlatform().errata()}


def served(version: str, kernel: hal.Kernel) -> bool:
    needed = next(n.versions for n in kernel.needs if n.library == "amd-aiter")
    return hal.Version.parse(version).satisfies(needed) is True


def request(**fields: Any) -> AttentionRequest:
    return AttentionRequest(**{**HEADS, **fields})


@pytest.mark.parametrize(("name", "arch"), list(itertools.product(NAMES, aiter_kernels.AITER_ARCHS)))
def test_corners_by_value(name: str, arch: str) -> None:
    # requirement A5, B5, B15, C7, C11, D1, D4, D8, D14, D15, E8, P22, P23, P24
    with installed():
        results = check_corners(name, arch, None if arch == "gfx942" else 4)
    assert len(results) > 20 or arch != "gfx942"


@pytest.mark.parametrize(("name", "version"), list(itertools.product(NAMES, VERSIONS)))
def test_calls_bind_in_every_supported_version(name: str, version: tuple[str, str]) -> None:
    # requirement A4, P39
    kernel = KERNELS[name]
    if not served(version[1], kernel):
        assert hal.Version.parse(version[1]).satisfies("<0.1.13")
        assert name == "aiter.extend"
        return
    more = {} if name == "aiter.decode" else {"window": 9, "return_lse": True}
    with installed(version[1], version[0]) as library:
        for wanted in (request(**more), request(softcap=5.0, **more), request(alibi=True, **more)):
            result = check(kernel, wanted, device=device_of())
            assert result.ok, result
    assert library.called(FUNCTIONS[name])


@pytest.mark.parametrize("version", [v for v in VERSIONS if v[0] == "amd-aiter"])
@pytest.mark.parametrize("name", ["aiter.prefill", "aiter.extend"])
def test_sinks_bind_where_there_is_an_argument_for_them(name: str, version: tuple[str, str]) -> None:
    # requirement A4, B13, C7, D11
    wanted = request(sinks=True, return_lse=True, window=8)
    known_bad = ERRATA["aiter-no-sinks"].versions
    with installed(version[1]) as library:
        if not served(version[1], KERNELS[name]):
            return
        result = check(KERNELS[name], wanted, device=device_of())
    if name == "aiter.prefill" and hal.Version.parse(version[1]).satisfies(known_bad):
        assert not result.ok
        assert "sink_ptr" in str(result)
    else:
        assert result.ok, result
        assert any(c.arguments["sink_ptr"] is not None for c in library.calls)


def prefill_case(length: int = 5, **fields: Any) -> AttentionCase:
    wanted = AttentionRequest(num_q_heads=4, num_kv_heads=2, phases=("prefill",), **{"head_dim": 128, **fields})
    return make_case(wanted, "prefill", lengths=((length, length), (7, 9)))


@pytest.mark.parametrize("head_dim", [128, 192])
def test_the_assembly_kernel_drops_sinks(head_dim: int) -> None:
    # requirement C7, D11, P24
    row = ERRATA["aiter-v3-sinks"]
    case = prefill_case(head_dim=head_dim, v_head_dim=128, sinks=True)
    assert row.when["head_dim"].admits(head_dim, case.request)
    with installed(), pytest.raises(AssertionError, match="not close"):
        values(case, built("aiter.prefill", case.request))
    for fields in ({"dtype": "float16"}, {"head_dim": 64}, {"head_dim": 160, "v_head_dim": 160}):
        other = prefill_case(**{"sinks": True, **fields})
        assert not all(c.admits(getattr(other.request, f), other.request) for f, c in row.when.items())
        with installed():
            values(other, built("aiter.prefill", other.request))


def test_the_assembly_kernel_dropped_caps() -> None:
    # requirement C7, P23
    case = prefill_case(softcap=3.0)
    with installed("0.1.7.post2.dev18", "amd-aiter-wheel"), pytest.raises(AssertionError, match="not close"):
        values(case, built("aiter.prefill", case.request))
    bad = ERRATA["aiter-v3-softcap"].versions
    assert hal.Version.parse("0.1.7.post2.dev18").satisfies(bad)
    assert not hal.Version.parse("0.1.7.post5").satisfies(bad)
    with installed("0.1.7.post5"):
        values(case, built("aiter.prefill", case.request))


@pytest.mark.parametrize(
    ("fields", "causal", "window"),
    [
        ({}, True, (-1, -1)),
        ({"window": 8}, True, (7, -1)),
        ({"causal": False}, False, (-1, -1)),
        ({"causal": False, "window": (None, 0)}, True, (-1, -1)),
        ({"causal": False, "window": (4, 0)}, True, (4, -1)),
        ({"causal": False, "window": (4, 2)}, False, (4, 2)),
    ],
)
def test_windows_have_three_numbers(fields: dict[str, Any], causal: bool, window: tuple[int, int]) -> None:
    # requirement C7, C11, E8
    wanted = request(**fields, phases=("prefill",))
    with installed() as library:
        assert check(KERNELS["aiter.prefill"], wanted, device=device_of()).ok
    assert {(c.arguments["causal"], c.arguments["window_size"]) for c in library.calls} == {(causal, (*window, 0))}
    wanted = request(**fields, phases=("extend",))
    with installed() as library:
        assert check(KERNELS["aiter.extend"], wanted, device=device_of()).ok
    assert {(c.arguments["causal"], c.arguments["window_size"]) for c in library.calls} == {(causal, window)}


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_of_no_keys_to_the_left_is_refused(causal: bool) -> None:
    # requirement C7, E8
    wanted = AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=128, window=(0, 0), causal=causal)
    (reason,) = KERNELS["aiter.prefill"].check(wanted, device_of())
    assert (reason.code, reason.field) == ("feature_unsupported", "window")
    case = make_case(wanted, "prefill", lengths=((5, 5),))
    with installed(), pytest.raises(RuntimeError, match="invalid argument"):
        case.call(built("aiter.prefill", wanted))


@pytest.mark.parametrize(
    "fields",
    [{"sinks": True, "softcap": 5.0}, {"sinks": True, "alibi": True}, {"softcap": 5.0, "alibi": True}],
    ids=lambda f: "+".join(f),
)
def test_features_that_it_applies_wrongly_together_are_refused(fields: dict[str, Any]) -> None:
    # requirement C7, P24
    for name in ("aiter.prefill", "aiter.extend"):
        wanted = request(**fields, dtype="float16", kv_dtype="float16")
        reasons = KERNELS[name].check(wanted, device_of())
        assert [r.code for r in reasons] == ["feature_unsupported"]
        assert all(f in reasons[0].text for f in fields)
        case = make_case(wanted, KERNELS[name].phase, lengths=((5, 9), (3, 3)), scale="large")
        with installed(), pytest.raises(AssertionError, match="not close"):
            values(case, built(name, wanted))


def test_alibi_and_a_cap_are_wrong_together_in_decode_too() -> None:
    # requirement C7
    wanted = request(softcap=2.0, alibi=True)
    assert KERNELS["aiter.decode"].check(wanted, device_of())
    case = make_case(wanted, "decode", lengths=((1, 20),), scale="large")
    with installed(), pytest.raises(AssertionError, match="not close"):
        values(case, built("aiter.decode", wanted))


def test_rows_without_keys_need_nothing_of_the_library() -> None:
    # requirement D1
    wanted = AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=128, return_lse=True, phases=("prefill",))
    case = make_case(wanted, "prefill", lengths=((5, 5), (9, 4), (3, 0), (0, 2)))
    with installed() as library:
        values(case, built("aiter.prefill", wanted))
        (call,) = library.calls
        raw, _ = emulated.aiter.emulations()["flash_attn_varlen_func"](**call.passed)
    assert raw.isnan().any(), "the library itself leaves them undefined"
    for right, hidden in ((None, 3), (0, 8), (2, 6)):
        limits = {} if right is None else {"window": (None, right)}
        sees = AttentionRequest(
            num_q_heads=4, num_kv_heads=2, head_dim=128, return_lse=True, phases=("prefill",), causal=False, **limits
        )
        found = make_case(sees, "prefill", lengths=((5, 5), (9, 4), (3, 0), (0, 2)))
        assert int((found.expected()["lse"] == -torch.inf).all(1).sum()) == hidden
        with installed():
            values(found, built("aiter.prefill", sees))


def test_ragged_calls_with_the_same_lengths_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement P38
    wanted = AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=64, phases=("prefill",))
    q, kv = torch.randn(9, 4, 64).bfloat16(), torch.randn(9, 2, 64).bfloat16()
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    looked: list[str] = []
    monkeypatch.setattr(torch, "bucketize", lambda places, *_, **__: looked.append("looked") or places.clamp_max(1))
    with installed():
        attend = built("aiter.prefill", wanted)
        attend(q, kv, kv, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5)
        assert not looked
        attend(q, kv, kv, cu_seqlens_q=cu, cu_seqlens_k=cu.clone(), max_seqlen_q=5, max_seqlen_k=5)
    assert looked


@pytest.mark.parametrize("q_len", [100, 130])
def test_dense_calls(q_len: int) -> None:
    # requirement A5, B15
    for fields in ({}, {"softcap": 4.0}, {"window": 8}, {"head_dim": 192, "v_head_dim": 128}):
        wanted = AttentionRequest(
            **{"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 128, "return_lse": True, **fields}
        )
        case = make_case(wanted, "prefill", lengths=((q_len, q_len + 3),) * 2, form="dense")
        with installed() as library:
            values(case, built("aiter.prefill", wanted))
        (call,) = library.calls
        assert call.function.endswith("flash_attn_varlen_func" if wanted.softcap else "flash_attn_func")


def test_nothing_is_launched_over_no_queries() -> None:
    wanted = request(return_lse=True, sinks=True, phases=("prefill", "extend"))
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with installed() as library:
        prefill = built("aiter.prefill", wanted)
        q, kv = torch.zeros(1, 3, 4, 64, dtype=torch.bfloat16), torch.zeros(1, 0, 2, 64, dtype=torch.bfloat16)
        out, lse = prefill(q, kv, kv, sinks=sinks, return_lse=True)
    assert not library.calls
    assert (out == 0).all()
    assert torch.equal(lse, sinks.expand(1, 3, 4))


def test_its_environment_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement C7, P45
    wanted, capped = request(), request(softcap=5.0)
    for kernel in (KERNELS[name] for name in NAMES):
        assert not [*kernel.check(wanted, device_of()), *kernel.check(capped, device_of())]
        with monkeypatch.context() as patch:
            patch.setenv("CK_TILE_ATTENTION_LOGITS_SOFT_CAP_DEFAULT", "1")
            assert not kernel.check(wanted, device_of())
            assert [r.field for r in kernel.check(capped, device_of())] == ["softcap"]
            patch.setenv("ENABLE_CK", "0")
            assert [r.code for r in kernel.check(wanted, device_of())] == ["disabled_by_env"]


def test_what_is_refused_for_good_reason() -> None:
    # requirement C7, P29
    for name, fields, field in (
        ("aiter.extend", {"head_dim": 256}, "head_dim"),
        ("aiter.decode", {"head_dim": 96}, "head_dim"),
        ("aiter.decode", {"window": 8}, "window"),
        ("aiter.decode", {"sinks": True}, "sinks"),
        ("aiter.decode", {"return_lse": True}, "return_lse"),
        ("aiter.decode", {"max_q_len": 2}, "max_q_len"),
        ("aiter.decode", {"num_q_heads": 34}, "group_size"),
        ("aiter.decode", {"kv_dtype": "float8_e4m3fnuz"}, "kv_dtype"),
        ("aiter.extend", {"kv_dtype": "float8_e4m3fnuz"}, "kv_dtype"),
        ("aiter.extend", {"kv_layout": "HND"}, "kv_layout"),
        ("aiter.prefill", {"needs_grad": True}, "needs_grad"),
        ("aiter.prefill", {"v_head_dim": 128}, "v_head_dim"),
    ):
        with pytest.raises(hal.errors.InputError, match=field):
            check(KERNELS[name], request(**{**fields, "phases": (KERNELS[name].phase,)}), device=device_of())
