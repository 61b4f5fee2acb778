"""Near misses: the smallest change that would admit a refused kernel."""

from __future__ import annotations

from typing import Any

import pytest

import hal
from hal_ops.attention import AttentionRequest


def request(**changes: Any) -> AttentionRequest:
    return AttentionRequest(**{"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, **changes})


def near(selection: hal.Selection) -> dict[str, hal.NearMiss]:
    return {miss.text(): miss for miss in selection.near_misses()}


@pytest.mark.parametrize(
    ("asked", "fields", "text"),
    [
        ({"sinks": True}, {}, "without sinks"),
        ({"window": 128}, {}, "without window"),
        ({"softcap": 30.0}, {}, "without softcap"),
        ({"page_size": 16}, {"page_size": hal.MultipleOf(64)}, "with page_size 64"),
        ({"head_dim": 200}, {"head_dim": hal.Range(1, 128), "v_head_dim": hal.SameAs("head_dim")}, "with head_dim 128"),
        ({"kv_layout": "NHD"}, {"kv_layout": hal.OneOf("HND")}, "with kv_layout HND"),
        ({"causal": False}, {"causal": hal.OneOf(True)}, "with causal"),
        ({"softmax_scale": 0.3}, {}, "with softmax_scale 0.0883883"),
        ({"dtype": "float32", "kv_dtype": "bfloat16"}, {"dtype": hal.OneOf("bfloat16")}, "with dtype bfloat16"),
    ],
)
def test_one_change_is_found(
    fake_platform: Any, attention_kernel: Any, asked: dict[str, Any], fields: dict[str, Any], text: str
) -> None:
    fake_platform(kernels=[attention_kernel("lib.decode", fields=fields)])
    selection = hal.select(request(**asked, phases=("decode",)))
    found = [t for t in near(selection) if t.startswith(text)]
    assert found == [next(iter(near(selection)))]
    miss = near(selection)[found[0]]
    assert miss.kernels == ("lib.decode",)
    assert miss.first


def test_the_change_really_admits_the_kernel(fake_platform: Any, library: Any) -> None:
    fake_platform(kernels=library("lib", fields={"page_size": hal.MultipleOf(64), "head_dim": hal.OneOf(64, 256)}))
    selection = hal.select(request(page_size=24, sinks=True))
    for miss in selection.near_misses():
        changed = selection.request.replace(**dict(miss.changes))
        assert set(miss.kernels) <= set(hal.select(changed).kernels().values())


def test_fewer_changes_come_first(fake_platform: Any, library: Any) -> None:
    far = library("far", fields={"head_dim": hal.OneOf(64), "v_head_dim": hal.Anything()})
    fake_platform(kernels=[*far, *library("close", priority=hal.Band.PERFORMANT)])
    first, second = hal.select(request(sinks=True)).near_misses()
    assert first.kernels[0] == "close.prefill"
    assert second.kernels[0] == "far.prefill"
    assert dict(second.changes) == {"head_dim": 64, "v_head_dim": 64, "sinks": False}


def test_what_to_install_is_a_near_miss(fake_platform: Any, library: Any) -> None:
    needs = hal.Needs("fast-lib", ">=3", install="`pip install fast-lib`")
    fake_platform(kernels=library("lib", needs=(needs,)))
    (miss,) = hal.select(request()).near_misses()
    assert miss.install == ("`pip install fast-lib`",)
    assert miss.text().endswith("would be chosen")


def test_other_hardware_is_no_near_miss(fake_platform: Any, library: Any) -> None:
    fake_platform(kernels=library("lib", platforms={"fake": hal.Archs(only=("f99",))}))
    assert hal.select(request(sinks=True)).near_misses() == ()


def test_a_kernel_that_would_lose_anyway_is_no_near_miss(fake_platform: Any, library: Any) -> None:
    fake_platform(
        kernels=[*library("best", fields={"sinks": hal.Anything()}), *library("worse", priority=hal.Band.PORTABLE)]
    )
    assert hal.select(request(sinks=True)).near_misses() == ()


def test_what_was_left_open_is_no_change(fake_platform: Any, library: Any) -> None:
    needs = hal.Needs("fast-lib", install="`pip install fast-lib`")
    paged = {"page_size": hal.OneOf(128), "kv_layout": hal.OneOf("HND")}
    fake_platform(kernels=library("lib", fields=paged, needs=(needs,)))
    (miss,) = hal.select(request()).near_misses()
    assert miss.text() == "`pip install fast-lib`: lib.prefill, lib.extend, lib.decode would be chosen"
    with hal.simulate(libraries={"torch": "2.13.0", "fast-lib": "1"}):
        assert hal.select(request()).kernels()["decode"] == "lib.decode"
    (asked,) = (m for m in hal.select(request(page_size=16)).near_misses() if "lib.decode" in m.kernels)
    assert dict(asked.changes) == {"page_size": 128}


@pytest.mark.parametrize(
    "fields",
    [
        {"sinks": hal.OneOf(True)},
        {"causal": hal.OneOf(False)},
        {"kv_dtype": hal.OneOf("float8_e4m3fn")},
        {"head_dim": hal.OneOf(192), "v_head_dim": hal.OneOf(128)},
    ],
)
def test_a_feature_that_was_not_asked_for_is_not_proposed(
    fake_platform: Any, attention_kernel: Any, fields: dict[str, Any]
) -> None:
    fake_platform(kernels=[attention_kernel("lib.decode", fields=fields)])
    assert hal.select(request(phases=("decode",))).near_misses() == ()


def test_dims_move_together(fake_platform: Any, attention_kernel: Any) -> None:
    fake_platform(kernels=[attention_kernel("lib.decode", fields={"head_dim": hal.OneOf(64)})])
    (miss,) = hal.select(request(phases=("decode",))).near_misses()
    assert dict(miss.changes) == {"head_dim": 64, "v_head_dim": 64}


@pytest.mark.parametrize(
    ("head_dim", "kv_dtype", "proposed"),
    [(48, "float8_e4m3fn", 64), (16, "float8_e4m3fn", 64), (40, "float8_e4m3fn", 64)],
)
def test_what_a_check_refuses_moves_to_the_closest_value(head_dim: int, kv_dtype: str, proposed: int) -> None:
    """The declaration admits the value, so that its bounds say nothing; Triton's short heads in FP8 are such a case."""
    with hal.simulate("nvidia:sm_90,cuda=13.0,driver=580.65", libraries={"torch": "2.11.0", "triton": "3.6.0"}):
        selection = hal.select(
            request(head_dim=head_dim, kv_dtype=kv_dtype, page_size=16, kv_layout="NHD", phases=("extend",))
        )
    changes = [dict(m.changes) for m in selection.near_misses() if m.kernels == ("triton.extend",)]
    assert changes == [{"head_dim": proposed, "v_head_dim": proposed}]


def test_the_best_of_what_an_installation_brings_is_named(fake_platform: Any, library: Any) -> None:
    one, two = (hal.Needs(name, install=f"`pip install {name}`") for name in ("one", "two"))
    fake_platform(
        kernels=[
            *library("best", needs=(one,), priority=hal.Band.SPECIALIZED + 90),
            *library("good", needs=(one,), priority=hal.Band.SPECIALIZED + 50),
            *library("more", needs=(one, two), priority=hal.Band.SPECIALIZED + 70),
            *library("other", needs=(two,), priority=hal.Band.SPECIALIZED + 60),
        ]
    )
    texts = [miss.text() for miss in hal.select(request()).near_misses()]
    assert texts == [
        "`pip install one`: best.prefill, best.extend, best.decode would be chosen",
        "`pip install two`: other.prefill, other.extend, other.decode would be chosen",
    ]
