"""flash-attn's two back ends on ROCm: bound against the kept signatures, and by value against their habits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import emulated.library
import emulated.signatures
import pytest
import torch
from emulated import flash_attn_rocm
from emulated.amd import KERNELS, built, check_corners, device_of, values
from emulated.replay import empty_steps, smaller_steps

import hal
from hal.testing import check
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case
from hal_rocm.flash_attn_kernels import KERNELS as DECLARED
from hal_rocm.flash_attn_kernels import SWITCH

CK = [kernel.name for kernel in DECLARED if kernel.library == "fa2_ck"]
VERSIONS = [v for v in emulated.signatures.versions("flash-attn") if hal.Version.parse(v).satisfies(">=2.8")]
HOMES = [(kernel.name, arch) for kernel in DECLARED for arch in kernel.platforms["rocm"].only]
FUNCTIONS = {
    "prefill": "flash_attn_varlen_func",
    "extend": "flash_attn_varlen_func",
    "decode": "flash_attn_with_kvcache",
}
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 128, "kv_layout": "NHD"}


@contextlib.contextmanager
def flash_attn(version: str = "2.8.3", *, triton: bool = False) -> Iterator[emulated.library.Installed]:
    found = flash_attn_rocm.TRITON if triton else flash_attn_rocm.CK
    with emulated.library.installed("flash-attn", version, found, adapters=["hal_rocm._flash_attn"]) as library:
        sys.modules["flash_attn.flash_attn_interface"].USE_TRITON_ROCM = triton  # type: ignore[attr-defined]
        yield library


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chooses the back end as a user would."""
    monkeypatch.delenv(SWITCH, raising=False)
    return lambda triton: monkeypatch.setenv(SWITCH, "TRUE") if triton else monkeypatch.delenv(SWITCH, raising=False)


def request(**fields: Any) -> AttentionRequest:
    return AttentionRequest(**{**HEADS, **fields})


@pytest.mark.parametrize(("name", "arch"), HOMES)
def test_corners_by_value(name: str, arch: str, switch: Any) -> None:
    # requirement A5, B5, B15, C7, D1, D4, D8, D14, D15, E8, P22, P24
    triton = name.startswith("fa2_triton")
    switch(triton)
    with flash_attn(triton=triton):
        check_corners(name, arch, (None if name.endswith("prefill") else 14) if arch == "gfx90a" else 2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CK)
def test_calls_bind_in_every_supported_version(name: str, version: str, switch: Any) -> None:
    # requirement A4, P39
    phase = KERNELS[name].phase
    wanted = request(window=9, alibi=True, return_lse=True)
    case = make_case(wanted, phase, lengths=((1, 130), (1, 9)))
    with flash_attn(version) as library:
        values(case, built(name, wanted, "gfx90a"))
    assert [c.function.partition(":")[2] for c in library.calls] == [FUNCTIONS[phase]]


def test_the_switch_decides_which_back_end_is_offered(switch: Any) -> None:
    # requirement C7, P45
    wanted = request(phases=("prefill",))
    for triton in (False, True, False):
        switch(triton)
        for kernel in DECLARED:
            (*reasons,) = kernel.check(wanted, device_of("gfx90a"))
            right = kernel.library == ("fa2_triton" if triton else "fa2_ck")
            assert [r.code for r in reasons] == ([] if right else ["disabled_by_env"])
            assert all(SWITCH in str(r) for r in reasons)


@pytest.mark.parametrize("triton", [False, True])
def test_the_other_back_end_is_not_taken_for_it(triton: bool) -> None:
    # requirement C9, P45
    name = "fa2_triton.prefill" if not triton else "fa2_ck.prefill"
    with flash_attn(triton=triton), pytest.raises(ImportError, match=SWITCH):
        built(name, request(phases=("prefill",)), "gfx90a")


def test_ck_ignores_soft_caps_and_so_refuses_them() -> None:
    # requirement C7, P23
    wanted = request(softcap=2.0)
    for name in CK:
        with pytest.raises(hal.errors.InputError, match="softcap"):
            check(KERNELS[name], wanted, device=device_of("gfx90a"))
    case = make_case(wanted, "prefill", lengths=((5, 9),), scale="large")
    q, k, v = case.args
    cu = [torch.tensor([0, len(x)], dtype=torch.int32) for x in (q, k)]
    capped = flash_attn_rocm.CK["flash_attn_varlen_func"](
        q, k, v, *cu, 5, 9, 0.0, wanted.softmax_scale, True, (-1, -1), 2.0, None, False, False, None
    )
    assert not torch.allclose(capped.double(), case.expected()["out"], atol=2e-2)


@pytest.mark.parametrize("fields", [{"window": 3}, {"softcap": 2.0}, {"return_lse": True}, {"needs_grad": True}])
def test_triton_ignores_what_it_is_refused_for(fields: dict[str, Any], switch: Any) -> None:
    # requirement C7, P24
    switch(True)
    wanted = request(**fields, phases=("prefill",))
    with pytest.raises(hal.errors.InputError, match=next(iter(fields))):
        check(KERNELS["fa2_triton.prefill"], wanted, device=device_of("gfx1100"))


@pytest.mark.parametrize(
    ("page_size", "served"), [(16, False), (64, False), (128, True), (192, False), (256, True), (384, True)]
)
def test_pages_are_multiples_of_128(page_size: int, served: bool) -> None:
    # requirement C7, D8
    wanted = request(page_size=page_size)
    case = make_case(wanted, "decode", lengths=((1, 9), (1, 5)))
    with flash_attn():
        if served:
            values(case, built("fa2_ck.decode", wanted, "gfx90a"))
            return
        with pytest.raises(hal.errors.InputError, match="page_size"):
            check(KERNELS["fa2_ck.decode"], wanted, device=device_of("gfx90a"))
        with pytest.raises(RuntimeError, match="divisible by 128"):
            case.call(built("fa2_ck.decode", wanted, "gfx90a"))


@pytest.mark.parametrize("fields", [{"sinks": True}, {"kv_dtype": "float8_e4m3fnuz"}, {"kv_layout": "HND"}])
def test_what_ck_lacks_is_refused(fields: dict[str, Any]) -> None:
    # requirement C7, D8, P29
    for name in ("fa2_ck.extend", "fa2_ck.decode"):
        with pytest.raises(hal.errors.InputError, match=next(iter(fields))):
            check(KERNELS[name], request(**fields), device=device_of("gfx90a"))


def test_rows_past_the_last_whole_one_are_zeros() -> None:
    # requirement D1, E12
    wanted = request(max_q_len=2, return_lse=True)
    case = make_case(wanted, "decode", lengths=((2, 9), (2, 5)))
    q, *rest = case.args
    with flash_attn() as library:
        implementation = built("fa2_ck.decode", wanted, "gfx90a")
        payload = implementation.plan(case.args[3])
        out, lse = implementation(torch.cat([q, q]), *rest, payload, return_lse=True)
        right, right_lse = implementation(q, *rest, payload, return_lse=True)
    assert torch.equal(out[:4], right)
    assert torch.equal(lse[:4], right_lse)
    assert not out[4:].any()
    assert (lse[4:] == -torch.inf).all()
    assert library.calls[0].arguments["q"].shape == (2, 2, 4, 64)


@pytest.mark.parametrize("name", ["fa2_ck.extend", "fa2_ck.decode"])
def test_a_step_without_tokens(name: str) -> None:  # requirement D5
    with flash_attn() as library:
        paged = built(name, request(return_lse=True, phases=(name.rpartition(".")[2],)), "gfx90a")
        cache = torch.zeros(2, 128, 2, 64, dtype=torch.bfloat16)
        for step, tokens in empty_steps(128):
            q = torch.zeros(tokens, 4, 64, dtype=torch.bfloat16)
            out, lse = paged(q, cache, cache, step, paged.plan(step), return_lse=True)
            assert (out.shape, lse.shape) == ((tokens, 4, 64), (tokens, 4))
    assert not library.calls


def test_a_step_of_fewer_rows_than_its_plan() -> None:  # requirement P37
    for phase in ("extend", "decode"):
        with flash_attn():
            wanted = request(phases=(phase,), max_q_len=3)
            for found, right in smaller_steps(lambda r, name=f"fa2_ck.{phase}": built(name, r, "gfx90a"), wanted):
                torch.testing.assert_close(found, right, atol=2e-2, rtol=2e-2)
