"""Corners: what a declaration says is what is tested, and nothing else."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import hal
from hal import _eligibility, _plugins
from hal.errors import RegistrationError, UnknownKernelError
from hal.testing import corners, request_id
from hal_ops import Op, Request, feature, required
from hal_ops.attention import AttentionRequest

Make = Callable[..., hal.Kernel]


def refused(kernel: hal.Kernel, requests: list[Any]) -> list[Any]:
    return [r for r in requests if list(_eligibility._fields(kernel, r))]


def every_kernel() -> list[hal.Kernel]:
    return list(_plugins.registry().kernels.values())


@pytest.mark.parametrize("kernel", every_kernel(), ids=lambda k: k.name)
def test_every_corner_of_every_registered_kernel_is_admitted(kernel: hal.Kernel) -> None:  # requirement P24, X5
    requests = corners(kernel)
    assert len(requests) > 5
    assert refused(kernel, requests) == []
    assert len({request_id(r) for r in requests}) == len(set(requests)) == len(requests)
    assert all(not [n for n in r.open_fields() if r.rules()[n].applies(kernel.phase)] for r in requests)


def test_every_declared_field_is_varied_and_no_other(attention_kernel: Make) -> None:  # requirement P24, R3
    declared = {"softcap": hal.Range(0), "sinks": hal.OneOf(False, True), "window": hal.Windows(right=False)}
    kernel = attention_kernel("corner.decode", fields=declared)
    requests = corners(kernel)
    features = {n for n, rule in AttentionRequest.rules().items() if not rule.required}
    used = {n for n in features if any(not r.is_neutral(n) for r in requests)}
    assert used == set(declared)
    for name in ("dtype", "kv_dtype", "page_size", "kv_layout", "max_q_len", "causal"):
        assert len({getattr(r, name) for r in requests}) > 1, name


def test_the_first_corners_differ_from_the_plain_one_in_one_field(attention_kernel: Make) -> None:
    kernel = attention_kernel(
        "corner.prefill", fields={"sinks": hal.OneOf(False, True), "alibi": hal.OneOf(False, True)}
    )
    plain, *others = corners(kernel)
    assert (plain.causal, plain.sinks, plain.alibi) == (True, False, False)
    for request in others[:5]:
        changed = [n for n in request.rules() if getattr(request, n) != getattr(plain, n)]
        assert len(changed) == 1 or changed == ["dtype", "kv_dtype", "qkv_dtype"]


def test_the_order_is_the_same_in_another_process() -> None:
    script = (
        "from hal.testing import corners, request_id\nimport sys\n"
        "print('\\n'.join(map(request_id, corners('reference.decode'))))\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.splitlines() == [request_id(r) for r in corners("reference.decode")]


def test_fields_that_depend_on_each_other_move_together(attention_kernel: Make) -> None:
    fields = {
        "head_dim": hal.OneOf(128, 192),
        "v_head_dim": hal.Pairs("head_dim", (128, 128), (192, 128)),
        "kv_dtype": hal.SameAs("dtype"),
        "page_size": hal.MultipleOf(64),
    }
    kernel = attention_kernel("corner.extend", fields=fields)
    requests = corners(kernel)
    assert refused(kernel, requests) == []
    assert {(r.head_dim, r.v_head_dim) for r in requests} == {(128, 128), (192, 128)}
    assert {r.page_size for r in requests} == {64, 128, 192}
    assert {r.kv_dtype for r in requests} == {"bfloat16", "float16", "float32"}


def test_a_head_scale_brings_the_fp8_cache_that_it_needs(attention_kernel: Make) -> None:
    fields = {"kv_dtype": hal.OneOf("bfloat16", "float8_e4m3fn"), "kv_scale": hal.OneOf("tensor", "head")}
    requests = corners(attention_kernel("corner.decode", fields=fields))
    assert any(r.kv_scale == "head" and r.kv_dtype == "float8_e4m3fn" for r in requests)


def test_permissions_are_granted_where_a_kernel_may_use_them(attention_kernel: Make) -> None:
    """Over an FP8 cache; a declaration that speaks of the permission has its own values."""
    caches = hal.OneOf("bfloat16", "float8_e4m3fn", "float8_e5m2")
    silent = corners(attention_kernel("corner.decode", fields={"kv_dtype": caches}))
    assert {r.kv_dtype for r in silent if r.fp8_query} == {"float8_e4m3fn", "float8_e5m2"}
    assert {r.kv_dtype for r in silent if not r.fp8_query} == {"bfloat16", "float8_e4m3fn", "float8_e5m2"}
    denied = corners(attention_kernel("corner.decode", fields={"kv_dtype": caches, "fp8_query": hal.OneOf(False)}))
    assert not any(r.fp8_query for r in denied)


def test_windows_to_the_right_come_with_the_lack_of_causality(attention_kernel: Make) -> None:
    requests = corners(attention_kernel("corner.prefill", fields={"window": hal.Windows()}))
    assert {(None, 0), (None, 5), (7, 3)} <= {r.window for r in requests if not r.causal}
    assert {(0, 0), (15, 0), (127, 0)} <= {r.window for r in requests if r.causal}


def test_declared_group_sizes_are_reached(attention_kernel: Make) -> None:  # requirement D4
    fields = {"group_size": hal.OneOf(1, 3, 7), "num_kv_heads": hal.Anything((2,)), "num_q_heads": hal.Anything()}
    requests = corners(attention_kernel("corner.prefill", fields=fields))
    assert {r.group_size for r in requests} == {1, 3, 7}


def test_open_declarations_are_sampled_small(attention_kernel: Make) -> None:
    fields = {
        "num_q_heads": hal.Anything(),
        "num_kv_heads": hal.Anything(),
        "head_dim": hal.Range(1),
        "page_size": hal.Range(1, 65536),
    }
    for request in corners(attention_kernel("corner.decode", fields=fields)):
        assert request.num_q_heads <= 64
        assert request.head_dim <= 256
        assert int(request.page_size) <= 1024


def test_a_number_that_is_large_and_alone_is_tested_all_the_same(attention_kernel: Make) -> None:
    requests = corners(attention_kernel("corner.decode", fields={"page_size": hal.OneOf(4096, 2048)}))
    assert {r.page_size for r in requests} == {2048}


def test_what_the_kernels_own_check_refuses_is_left_out(attention_kernel: Make) -> None:
    def no_wide_pages(request: Any, device: Any) -> list[hal.Reason]:
        return [hal.Reason("check", "pages too wide", "page_size")] if request.page_size > 32 else []

    kernel = attention_kernel("corner.decode", check=no_wide_pages)
    device = hal.Device(platform="fake", arch=hal.Arch("fake", "f10"))
    assert {r.page_size for r in corners(kernel, device=device)} == {16, 32}


def test_limit_keeps_breadth(attention_kernel: Make) -> None:
    kernel = attention_kernel("corner.decode", fields={"sinks": hal.OneOf(False, True)})
    assert corners(kernel, limit=4) == corners(kernel)[:4]
    assert len(corners(kernel, limit=1)) == 1


def test_a_declaration_that_nothing_meets_is_an_error(attention_kernel: Make) -> None:
    kernel = attention_kernel(
        "corner.prefill",
        fields={"head_dim": hal.OneOf(64), "v_head_dim": hal.OneOf(32, 48), "group_size": hal.OneOf(0)},
    )
    with pytest.raises(RegistrationError, match=r"corner.prefill.*no request meets.*group_size"):
        corners(kernel)


def test_kernels_go_by_name_too() -> None:
    assert corners("reference.prefill", limit=2)[0].op == "attention"
    with pytest.raises(UnknownKernelError, match=r"reference\.prefill"):
        corners("refrence.prefill")
    with pytest.raises(RegistrationError, match=r"is a library; name one of its kernels: .*reference\.decode"):
        corners("reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormRequest(Request):
    """The request of an op that this project knows nothing about."""

    op: ClassVar[str] = "norm"

    hidden_size: int = required()
    dtype: str = required(default="bfloat16")
    epsilon: float = feature(1e-6)
    residual: bool = feature(False)


def test_ops_of_plugins_have_corners() -> None:  # requirement X10
    fields = {
        "hidden_size": hal.MultipleOf(128, high=8192),
        "dtype": hal.OneOf("float16"),
        "epsilon": hal.Anything(),
        "residual": hal.Anything(),
    }
    kernel = hal.Kernel(name="acme.norm", op="norm", phase="call", target="x:y", priority=400, fields=fields)
    requests = corners(kernel, op=Op(name="norm", summary="", request=NormRequest))
    assert {r.dtype for r in requests} == {"float16"}
    assert {r.hidden_size for r in requests} == {128, 256}
    assert {r.residual for r in requests} == {False, True}
    assert {r.epsilon for r in requests} == {1e-6, 0.5, 30.0}
    assert request_id(requests[0]) == "hidden_size=256,dtype=float16"


def whole(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


CONSTRAINTS = st.fixed_dictionaries(
    {
        "num_q_heads": st.one_of(st.just(hal.Anything()), st.builds(hal.MultipleOf, whole(1, 9))),
        "num_kv_heads": st.one_of(st.just(hal.Anything()), st.builds(hal.OneOf, whole(1, 4))),
        "head_dim": st.one_of(
            st.builds(hal.MultipleOf, whole(1, 32)), st.builds(hal.Range, whole(1, 9), whole(9, 300))
        ),
        "v_head_dim": st.sampled_from([hal.SameAs("head_dim"), hal.Anything(), hal.Range(1, 512)]),
        "kv_dtype": st.sampled_from([hal.SameAs("dtype"), hal.OneOf("float8_e5m2"), hal.OneOf("float16", "float32")]),
        "page_size": st.one_of(st.builds(hal.MultipleOf, whole(1, 128)), st.builds(hal.OneOf, whole(1, 2000))),
        "max_q_len": st.builds(hal.Range, st.just(1), whole(1, 16)),
    },
    optional={
        "window": st.builds(hal.Windows, st.booleans(), st.booleans()),
        "softcap": st.sampled_from([hal.Range(0), hal.OneOf(0.0, 50.0)]),
        "sinks": st.just(hal.OneOf(False, True)),
        "kv_scale": st.just(hal.OneOf("tensor", "head")),
        "group_size": st.builds(lambda n: hal.OneOf(1, n), whole(1, 8)),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=CONSTRAINTS)
def test_whatever_is_declared_every_corner_is_inside(attention_kernel: Make, fields: dict[str, hal.Constraint]) -> None:
    """requirement P24, X5: a declaration has no corner that it refuses."""
    kernel = attention_kernel("corner.decode", fields=fields)
    try:
        requests = corners(kernel)
    except RegistrationError:
        event("no request meets the declaration")
        return
    assert requests
    assert refused(kernel, requests) == []
