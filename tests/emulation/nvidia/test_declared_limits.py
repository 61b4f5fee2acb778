"""Limits of flash-attention 2, 3 and torch's own attention: each is refused by the field that is past it, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from emulated import hardware

import hal
from hal_nvidia import NvidiaPlatform
from hal_nvidia import _flash_attn_3_build as builds
from hal_ops import Request
from hal_ops.attention import AttentionRequest
from hal_ops.mla_attention import MlaAttentionRequest

FP8 = "float8_e4m3fn"
PAGES = {"page_size": 16, "kv_layout": "NHD"}
FP8_CACHE = {**PAGES, "kv_dtype": FP8, "fp8_query": True}
DIFF_64, DIFF_192 = {"head_dim": 64, "v_head_dim": 512}, {"head_dim": 192, "v_head_dim": 128}
LIBRARIES = {"torch": "2.13.0", "flash-attn": "2.8.3", "flash-attn-3": "3.0.0"}
VARIES, TOO_WIDE = ("feature_unsupported", "deterministic"), ("head_dim", "v_head_dim")
Put = Callable[..., None]


@pytest.fixture
def build_of(monkeypatch: pytest.MonkeyPatch) -> Put:
    """Makes a build of flash-attention 3 the installed one: what it was built without, and what else it is."""

    def put(*without: str, **known: Any) -> None:
        monkeypatch.setattr(builds, "_build", lambda *_: builds.Build("this build", frozenset(without), **known))

    return put


def refused(kernel: str, arch: str = "sm_90", **fields: Any) -> set[tuple[str, str]]:
    """(code, field) of why a kernel is refused."""
    declared = hardware.kernel_named(kernel)
    phases = (declared.phase,)
    request: Request
    if declared.op == "mla_attention":
        request = MlaAttentionRequest(**{"num_q_heads": 16, "page_size": 16, **fields}, phases=phases)
    else:
        request = AttentionRequest(**{"num_q_heads": 8, "num_kv_heads": 8, "head_dim": 128, **fields}, phases=phases)
    with hal.simulate(f"nvidia:{arch},cuda=13.0", libraries=LIBRARIES):
        choice = hal.select(request).choices[declared.phase]
    candidate = next(c for c in choice.candidates if c.kernel.name == kernel)
    return {(r.code, r.field) for r in candidate.reasons}


@pytest.mark.parametrize(
    ("flag", "kernel", "fields", "reason"),
    [
        ("VARLEN", "fa3.prefill", {}, ("check", "library")),
        *(("VARLEN", f"fa3.{phase}", PAGES, ("check", "library")) for phase in ("extend", "decode")),
        *(("PAGEDKV", f"fa3.{phase}", PAGES, ("check", "library")) for phase in ("extend", "decode")),
        ("LOCAL", "fa3.prefill", {"window": 8}, ("feature_unsupported", "window")),
        ("LOCAL", "fa3.decode", {**PAGES, "window": 8}, ("feature_unsupported", "window")),
        ("SOFTCAP", "fa3.prefill", {"softcap": 9.0}, ("feature_unsupported", "softcap")),
        ("SOFTCAP", "fa3.decode", {**PAGES, "softcap": 9.0}, ("feature_unsupported", "softcap")),
        ("FP16", "fa3.prefill", {"dtype": "float16"}, ("dtype", "dtype")),
        ("FP16", "fa3.extend", {**PAGES, "dtype": "float16"}, ("dtype", "dtype")),
        ("FP8", "fa3.prefill", {"qkv_dtype": FP8}, ("dtype", "qkv_dtype")),
        ("FP8", "fa3.decode", FP8_CACHE, ("dtype", "kv_dtype")),
        ("BACKWARD", "fa3.prefill", {"needs_grad": True}, ("feature_unsupported", "needs_grad")),
        ("HDIM256", "fa3.prefill", {"head_dim": 256}, ("head_dim", "head_dim")),
        *((flag, "fa3.prefill", DIFF_64, ("head_dim", "v_head_dim")) for flag in ("HDIM64", "HDIMDIFF64")),
        *((flag, "fa3.decode", {**PAGES, **DIFF_64}, ("head_dim", "v_head_dim")) for flag in ("HDIM64", "HDIMDIFF64")),
        *((flag, "fa3.prefill", DIFF_192, ("head_dim", "v_head_dim")) for flag in ("HDIM192", "HDIMDIFF192")),
        *((flag, "fa3.mla_decode", {}, ("check", "library")) for flag in ("HDIM64", "HDIMDIFF64", "PAGEDKV", "VARLEN")),
        ("FP16", "fa3.mla_decode", {"dtype": "float16"}, ("dtype", "dtype")),
    ],
)
def test_what_a_build_of_flash_attention_3_was_built_without_is_refused(
    flag: str, kernel: str, fields: dict[str, Any], reason: tuple[str, str], build_of: Put
) -> None:  # requirement P44, D11, C7
    """By its flags (``flash_attn_config.py``). The code of unequal head dims is inside that of equal ones."""
    build_of()
    assert refused(kernel, **fields) == set()
    build_of(flag)
    assert refused(kernel, **fields) == {reason}


@pytest.mark.parametrize(
    ("flags", "kernel", "fields"),
    [
        (("PAGEDKV",), "fa3.prefill", {}),
        (("LOCAL", "SOFTCAP", "FP16", "FP8", "BACKWARD", "HDIM256"), "fa3.prefill", {}),
        (("LOCAL", "SOFTCAP", "FP16", "FP8", "BACKWARD", "HDIM256"), "fa3.decode", PAGES),
        (("HDIM64", "HDIMDIFF64", "HDIMDIFF192"), "fa3.prefill", {"head_dim": 64}),
        (("HDIM192", "HDIMDIFF192"), "fa3.prefill", DIFF_64),
        (("HDIM64", "HDIMDIFF64"), "fa3.prefill", DIFF_192),
        (("HDIM192", "HDIMDIFF192", "HDIM256", "FP16", "FP8", "LOCAL"), "fa3.mla_extend", {}),
    ],
)
def test_what_a_request_does_not_need_may_be_left_out_of_a_build(
    flags: tuple[str, ...], kernel: str, fields: dict[str, Any], build_of: Put
) -> None:  # requirement P44, E6
    build_of(*flags)
    assert refused(kernel, **fields) == set()


@pytest.mark.parametrize(
    ("kernel", "fields", "served", "reason"),
    [
        ("fa3.prefill", {"sinks": True, "dtype": "float16"}, {"dtype": "bfloat16"}, ("dtype", "dtype")),
        ("fa3.decode", {**PAGES, "sinks": True, "dtype": "float16"}, {"dtype": "bfloat16"}, ("dtype", "dtype")),
        ("fa3.prefill", {"sinks": True, "needs_grad": True}, {"sinks": False}, ("feature_unsupported", "needs_grad")),
        ("fa3.prefill", {"sinks": True, "return_lse": True}, {"return_lse": False}, ("feature_unsupported", "sinks")),
        ("fa3.prefill", {"head_dim": 72, "qkv_dtype": FP8}, {"head_dim": 80}, ("head_dim", "head_dim")),
        ("fa3.prefill", {**DIFF_192, "qkv_dtype": FP8}, {"qkv_dtype": "bfloat16"}, ("head_dim", "v_head_dim")),
        ("fa3.prefill", {"sinks": True, "qkv_dtype": FP8}, {"sinks": False}, ("feature_unsupported", "sinks")),
        ("fa3.prefill", {"dtype": "float16", "qkv_dtype": FP8}, {"dtype": "bfloat16"}, ("dtype", "dtype")),
        ("fa3.decode", {"head_dim": 72, **FP8_CACHE}, {"head_dim": 80}, ("head_dim", "head_dim")),
        (
            "fa3.decode",
            {"head_dim": 64, "v_head_dim": 256, **FP8_CACHE},
            {"v_head_dim": 64},
            ("head_dim", "v_head_dim"),
        ),
        ("fa3.decode", {"sinks": True, **FP8_CACHE}, {"sinks": False}, ("feature_unsupported", "sinks")),
        ("fa3.extend", {**PAGES, **DIFF_64, "page_size": 64}, {"page_size": 63}, ("page_size", "page_size")),
        ("fa3.extend", {**PAGES, **DIFF_64, "page_size": 64}, {"v_head_dim": 256}, ("page_size", "page_size")),
    ],
)
def test_limits_of_flash_attention_3_are_one_field_away_from_what_it_serves(
    kernel: str, fields: dict[str, Any], served: dict[str, Any], reason: tuple[str, str], build_of: Put
) -> None:  # requirement B5, C7, D11, D15
    """In a build that has everything, sinks too."""
    build_of(sinks=True)
    assert refused(kernel, **fields) == {reason}
    assert refused(kernel, **{**fields, **served}) == set()


@pytest.mark.parametrize(
    ("without", "fields", "reasons"),
    [
        ((), {"head_dim": 192}, set()),
        ((), {"head_dim": 256}, {VARIES}),
        ((), {"head_dim": 64, "v_head_dim": 256}, {VARIES}),
        ((), DIFF_64, {VARIES, TOO_WIDE}),
        (("HDIM192",), {"head_dim": 160}, {VARIES}),
        (("HDIM256",), {"head_dim": 192}, set()),
        (("HDIM256",), {"head_dim": 64, "v_head_dim": 256}, {VARIES, TOO_WIDE}),
    ],
)
def test_the_backward_pass_of_flash_attention_3_has_the_larger_head_dim(
    without: tuple[str, ...], fields: dict[str, Any], reasons: set[tuple[str, str]], build_of: Put
) -> None:  # requirement B5, C7, D14
    """And none above 256, and none that is deterministic in the code of 256 (``mha_bwd``). The forward pass has both."""
    build_of(*without)
    grads = {**fields, "needs_grad": True}
    assert refused("fa3.prefill", **grads, deterministic=True) == reasons
    assert refused("fa3.prefill", **grads) == {r for r in reasons if r != VARIES}
    assert refused("fa3.prefill", **fields, deterministic=True) == set()


def test_gradients_of_the_lse_are_left_to_those_who_have_them() -> None:  # requirement C7, P22
    """A request for both means gradients through the LSE too. The backward passes of flash-attention 2, 3 and torch take
    none (``backward(ctx, dout, *args)``); that of flash-attention 4 does since a4510a6e (2026-03-13)."""
    request = AttentionRequest(
        num_q_heads=8, num_kv_heads=8, head_dim=128, needs_grad=True, return_lse=True, phases=("prefill",)
    )
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for kernel in NvidiaPlatform().kernels():
        if kernel.op == "attention" and {"needs_grad", "return_lse"} <= kernel.fields.keys():
            found[not list(hal._eligibility._fields(kernel, request))].add(kernel.library)
    assert found[True] == {"fa4"}
    assert found[False] == {"fa2", "fa3", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn"}


@pytest.mark.parametrize(
    ("library", "arch", "fields", "served", "reason"),
    [
        *(
            ("sdpa_flash", arch, {"head_dim": dim}, {"head_dim": 192}, ("head_dim", "head_dim"))
            for arch in ("sm_86", "sm_89", "sm_120")
            for dim in (200, 256)
        ),
        ("sdpa_efficient", "sm_90", {"v_head_dim": 256}, {"v_head_dim": 128}, ("head_dim", "v_head_dim")),
        (
            "sdpa_efficient",
            "sm_90",
            {"v_head_dim": 136},
            {"head_dim": 512, "v_head_dim": 128},
            ("head_dim", "v_head_dim"),
        ),
        *(
            (library, "sm_90", {"deterministic": True}, {}, ("feature_unsupported", "deterministic"))
            for library in ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn")
        ),
    ],
)
def test_limits_of_torch_s_backward_passes_are_not_those_of_its_forward_passes(
    library: str, arch: str, fields: dict[str, Any], served: dict[str, Any], reason: tuple[str, str]
) -> None:  # requirement B5, C7, D14
    assert refused(f"{library}.prefill", arch, **fields, needs_grad=True) == {reason}
    assert refused(f"{library}.prefill", arch, **fields) == set()
    assert refused(f"{library}.prefill", arch, **served, needs_grad=True) == set()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_103"])
def test_torch_s_wide_backward_pass_is_there_on_the_datacenter_s_archs(arch: str) -> None:  # requirement B5, D10
    assert refused("sdpa_flash.prefill", arch, head_dim=256, needs_grad=True) == set()
