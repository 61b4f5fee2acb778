"""Prefill in Triton against the reference: the corners of what it declares, masks, strides, configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hal_ops._gpu import gpu_of
from hal_ops.attention import AttentionRequest
from hal_ops.attention._triton_configs import (
    DEFAULT,
    HOPPER_PLAIN,
    HOPPER_PREFILL,
    TABLE,
    WIDE,
    Config,
    Hopper,
)
from hal_ops.attention._triton_features import cut, pack_heads
from hal_ops.attention.cases import indicator_case, make_case, visible_keys
from hal_ops.attention.reference import prefill as reference
from hal_ops.attention.triton_limits import heads
from hal_ops.attention.triton_prefill import prefill

Check = Callable[[Any], None]


def request_of(**fields: Any) -> AttentionRequest:
    base = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}
    return AttentionRequest(**{**base, "phases": "prefill", **fields})


CORNERS: dict[str, dict[str, Any]] = {
    "plain": {"return_lse": True},
    "float32": {"dtype": "float32", "return_lse": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bidirectional": {"causal": False, "return_lse": True},
    "group 1": {"num_q_heads": 2},
    "group 3": {"num_q_heads": 3, "num_kv_heads": 1},
    "group 5": {"num_q_heads": 10},
    "group 7": {"num_q_heads": 14, "return_lse": True},
    "group 12": {"num_q_heads": 12, "num_kv_heads": 1},
    "group 24": {"num_q_heads": 24, "num_kv_heads": 1},
    "head_dim 32": {"head_dim": 32},
    "head_dim 40/24": {"head_dim": 40, "v_head_dim": 24},
    "head_dim 80": {"head_dim": 80, "return_lse": True},
    "head_dim 96": {"head_dim": 96},
    "head_dim 112": {"head_dim": 112},
    "head_dim 128": {"head_dim": 128},
    "head_dim 192/128": {"head_dim": 192, "v_head_dim": 128, "num_q_heads": 2},
    "head_dim 256": {"head_dim": 256, "num_q_heads": 2, "num_kv_heads": 1},
    "window 1": {"window": 1},
    "window 17": {"window": 17, "return_lse": True},
    "window, left": {"window": (6, None), "causal": False},
    "window, right": {"window": (None, 6), "causal": False},
    "window, both sides": {"window": (6, 2), "causal": False, "return_lse": True},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True, "return_lse": True},
    "alibi": {"alibi": True},
    "scale": {"softmax_scale": 0.3},
    "negative scale": {"softmax_scale": -0.3},
    "e4m3fn": {"dtype": "float16", "qkv_dtype": "float8_e4m3fn", "return_lse": True},
    "e4m3fn a head": {"qkv_dtype": "float8_e4m3fn", "qkv_scale": "head", "head_dim": 96, "window": 9},
    "e4m3fn, two parts": {"qkv_dtype": "float8_e4m3fn", "dtype": "bfloat16", "head_dim": 80, "return_lse": True},
    "e4m3fn, short heads": {"qkv_dtype": "float8_e4m3fn", "head_dim": 40, "v_head_dim": 16, "dtype": "bfloat16"},
    "e5m2 of 16 bits": {"qkv_dtype": "float8_e5m2", "dtype": "bfloat16", "num_q_heads": 6, "sinks": True},
    "e5m2": {"dtype": "float32", "qkv_dtype": "float8_e5m2", "v_head_dim": 32, "softcap": 20.0, "return_lse": True},
    "everything": {
        "softcap": 30.0, "sinks": True, "alibi": True, "window": 20, "return_lse": True,
        "num_q_heads": 6, "head_dim": 80, "softmax_scale": 0.2,
    },
}  # fmt: skip


@pytest.mark.parametrize("corner", CORNERS)
def test_a_corner_is_right(corner: str, device: str, assert_right: Check) -> None:
    # requirement D4, B13, B15, E8
    request = request_of(**CORNERS[corner])
    if device != "cpu" and heads(request, cached=False):
        with pytest.raises(ValueError, match="needs multiples of 16"):
            prefill(request, device)
        return
    assert_right(make_case(request, "prefill", device=device).check(prefill(request, device)))


FP8_PREFILLS: tuple[dict[str, Any], ...] = (
    {"qkv_dtype": "float8_e4m3fn", "dtype": "bfloat16"},
    {"qkv_dtype": "float8_e4m3fn", "head_dim": 96, "qkv_scale": "head", "window": 9},
    {"qkv_dtype": "float8_e5m2", "dtype": "bfloat16", "v_head_dim": 32, "softcap": 20.0, "sinks": True},
    {"qkv_dtype": "float8_e4m3fn", "head_dim": 128, "num_q_heads": 5, "num_kv_heads": 1, "causal": False},
    {"qkv_dtype": "float8_e5m2", "head_dim": 128, "qkv_scale": "head", "dtype": "bfloat16", "window": 20},
)


@pytest.mark.parametrize("fields", FP8_PREFILLS, ids=str)
@pytest.mark.parametrize("scale", ["normal", "large"])
def test_fp8_is_as_close_as_16_bits(
    fields: dict[str, Any], scale: str, device: str, assert_right: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of FP8 q and k lose nothing that the gates for FP8 would permit; Triton's interpreter makes them too."""
    if device == "cpu":
        monkeypatch.setattr("hal_ops.attention.triton_prefill.keys_as_they_are", lambda *_: True)
    request = request_of(**fields)
    case = make_case(request, "prefill", device=device, scale=scale)
    impl = prefill(request, device)
    assert_right(case.check(impl))
    found, right = case.call(impl)["out"].float(), case.expected()["out"].to(device).float()
    # Large scores show the 14 bits in which sm_90 adds FP8 products.
    assert float((found - right).norm() / right.norm()) < (4e-3 if device == "cpu" or scale == "normal" else 1e-2)


@pytest.mark.parametrize(
    "corner", ["plain", "head_dim 96", "window, both sides", "sinks", "everything", "e4m3fn a head"]
)
def test_a_dense_batch_is_right(corner: str, device: str, assert_right: Check) -> None:
    request = request_of(**CORNERS[corner])
    for lengths in ([(33, 33)] * 2, [(5, 40)] * 2, [(40, 5)], [(3, 0)]):
        case = make_case(request, "prefill", device=device, form="dense", lengths=lengths)
        assert_right(case.check(prefill(request, device)))


@pytest.mark.parametrize("scale", ["large", "outliers"])
@pytest.mark.parametrize("fields", [{}, {"softcap": 30.0}, {"dtype": "float32"}, {"alibi": True}])
def test_large_numbers_are_right(scale: str, fields: dict[str, Any], device: str, assert_right: Check) -> None:
    request = request_of(**fields)
    assert_right(make_case(request, "prefill", device=device, scale=scale).check(prefill(request, device)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": False},
        {"window": 1},
        {"window": 16},
        {"window": 128},
        {"window": (9, None), "causal": False},
        {"window": (None, 1), "causal": False},
        {"window": (0, 0), "causal": False},
        {"window": (70, 33), "causal": False},
    ],
)
def test_exactly_the_keys_of_the_mask_are_seen(fields: dict[str, Any], device: str) -> None:  # requirement E8
    request = request_of(num_q_heads=2, num_kv_heads=1, head_dim=256, dtype="float16", **fields)
    lengths = [(8, 8), (130, 130), (60, 190), (1, 100), (90, 40), (0, 3)]
    case = indicator_case(request, "prefill", device=device, lengths=lengths)
    out = case.call(prefill(request, device))["out"].cpu()
    assert torch.equal(out > 0, visible_keys(case).unsqueeze(1).expand(out.shape))


def fused(device: str, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 40, 8, 64).to(dtype).to(device)


def test_views_of_one_tensor_are_right(device: str) -> None:
    """q, k and v cut out of one projection; heads before tokens; a memory that starts at an odd element."""
    request = request_of()
    impl: Any = prefill(request, device)
    x = fused(device)
    q, k, v = x[:, :, :4], x[:, :, 4:6], x[:, :, 6:]
    right = reference(request, device)(q, k, v)
    torch.testing.assert_close(impl(q, k, v), right, atol=2e-3, rtol=2e-3)
    turned = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in (q, k, v)]
    torch.testing.assert_close(impl(*turned), right, atol=2e-3, rtol=2e-3)
    memory = torch.empty(k.numel() + 1, dtype=k.dtype, device=device)
    odd = memory[1:].view(k.shape).copy_(k)
    torch.testing.assert_close(impl(q, odd, v), right, atol=2e-3, rtol=2e-3)
    shared = k[:, :, :1].expand(-1, -1, 2, -1)
    torch.testing.assert_close(impl(q, shared, v), reference(request, device)(q, shared, v), atol=2e-3, rtol=2e-3)


def test_maxima_change_nothing(device: str) -> None:  # requirement D3
    request = request_of(window=9)
    case = make_case(request, "prefill", device=device)
    impl: Any = prefill(request, device)
    right = impl(*case.args, **case.kwargs)
    for most in (None, 66, 4096):
        again = impl(*case.args, **{**case.kwargs, "max_seqlen_q": most, "max_seqlen_k": most})
        assert torch.equal(again, right)


def test_the_same_bits_each_time(device: str) -> None:  # requirement D14
    case = make_case(request_of(), "prefill", device=device)
    impl: Any = prefill(case.request, device)
    first, *others = (impl(*case.args, **case.kwargs) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def test_nothing_to_do(device: str) -> None:
    impl: Any = prefill(request_of(return_lse=True), device)
    q = torch.zeros(0, 4, 64, device=device).half()
    none = torch.zeros(1, dtype=torch.int32, device=device)
    out, lse = impl(q, q[:, :2], q[:, :2], cu_seqlens_q=none, cu_seqlens_k=none, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, 64), (0, 4))
    dense = torch.zeros(2, 0, 4, 64, device=device).half()
    assert impl(dense, dense[:, :, :2], dense[:, :, :2]).shape == dense.shape


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"dtype": "float64"}, "does not do dtype float64"),
        ({"head_dim": 320}, "head_dim 320, v_head_dim 320"),
        ({"needs_grad": True}, "needs_grad True"),
    ],
)
def test_what_it_does_not_do_is_refused(fields: dict[str, Any], text: str) -> None:  # requirement C7
    with pytest.raises(ValueError, match=text):
        prefill(request_of(**fields), "cpu")


def test_tensors_that_the_request_does_not_mention_are_refused(device: str) -> None:  # requirement C7
    case = make_case(request_of(), "prefill", device=device)
    impl: Any = prefill(case.request, device)
    with pytest.raises(ValueError, match="a tensor for sinks"):
        impl(*case.args, **case.kwargs, sinks=torch.zeros(4, device=device))


def test_cuts_of_head_dims() -> None:
    found = {dim: cut(dim) for dim in (8, 16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256)}
    assert found == {
        8: (16, 0), 16: (16, 0), 32: (32, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32),
        112: (128, 0), 128: (128, 0), 160: (128, 32), 192: (128, 64), 224: (256, 0), 256: (256, 0),
    }  # fmt: skip


def test_heads_of_a_tile() -> None:
    assert [pack_heads(group, 128) for group in (1, 3, 4, 5, 7, 8, 12, 24, 128, 200)] == [
        1,
        3,
        4,
        5,
        7,
        8,
        6,
        8,
        128,
        25,
    ]
    assert [pack_heads(group, 16, short=True) for group in (7, 12, 24, 40)] == [7, 12, 12, 10]


ARCHS = "gfx" if torch.version.hip else "sm_"
"""Configurations of other vendors' archs are not what is run here."""
CONFIGS = sorted({c for arch in TABLE if arch.startswith(ARCHS) for c in TABLE[arch]} | {*DEFAULT}, key=str)
HOPPERS = [*HOPPER_PREFILL, HOPPER_PLAIN, Hopper(128, 128, 64, 2, 24), Hopper(256, 256, 32, 2, 24)]


def head_dims(config: Config | Hopper) -> list[tuple[int, int]]:
    if config.dim > 128:
        return [(192, 128)] if config.dim == 192 else [(256, 256), (192, 128), (160, 160)]
    served = [d for d in (32, 64, 80, 96, 112, 128) if d <= config.dim]
    return [(d, d) for d in served if isinstance(config, Config) or sum(cut(d)) == d]


def few_programs(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """The kernel of Hopper makes several tiles a program, as over long inputs."""
    few = dataclasses.replace(gpu_of("cuda"), multiprocessors=5)
    monkeypatch.setattr(f"hal_ops.attention.triton_{phase}.gpu_of", lambda _: few)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "dims"), [(config, dims) for config in (*CONFIGS, *HOPPERS) for dims in head_dims(config)], ids=str
)
def test_every_configuration_is_right(
    config: Config | Hopper, dims: tuple[int, int], assert_right: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.5 to 3.6 and their ptxas have compiled single configurations wrongly (lmdeploy#4920, fla#1262)."""
    if config in DEFAULT:
        monkeypatch.setattr("hal_ops.attention.triton_prefill.padded_on", lambda *_, **__: True)
    lengths = [(300, 300), (0, 0), (5, 5), (7, 0), (0, 7), (129, 700), (400, 90), (1, 513)]
    for fields in ({"window": 200}, {"causal": False, "dtype": "float16"}, {"softcap": 9.0, "sinks": True}):
        request = request_of(**{"dtype": "bfloat16", **fields}, head_dim=dims[0], v_head_dim=dims[1], return_lse=True)
        case = make_case(request, "prefill", device="cuda", lengths=lengths, oracle="cuda")
        spare = (config,) if isinstance(config, Config) else (config, Config(256, 32, 16, 4, 1))
        assert_right(case.check(prefill(request, "cuda", configs=spare)))
        if isinstance(config, Hopper):
            with monkeypatch.context() as several:
                few_programs(several, "prefill")
                assert_right(case.check(prefill(request, "cuda", configs=spare)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "fields", [{"window": 200}, {"causal": False, "qkv_scale": "head"}, {"softcap": 9.0, "sinks": True}]
)
@pytest.mark.parametrize("programs", ["few", "all"])
def test_fp8_over_many_blocks(
    fields: dict[str, Any], programs: str, assert_right: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    if programs == "few":
        few_programs(monkeypatch, "prefill")
    request = request_of(
        **fields, qkv_dtype="float8_e4m3fn", dtype="bfloat16", head_dim=128, num_q_heads=6, return_lse=True
    )
    lengths = [(300, 300), (0, 0), (7, 0), (0, 7), (129, 700), (400, 90), (1, 513), (1000, 1000)]
    case = make_case(request, "prefill", device="cuda", lengths=lengths, oracle="cuda")
    assert_right(case.check(prefill(request, "cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("config", WIDE, ids=str)
def test_float32_is_right(config: Config, assert_right: Check) -> None:
    request = request_of(dtype="float32", head_dim=config.dim, window=77, return_lse=True)
    case = make_case(request, "prefill", device="cuda", lengths=[(300, 300), (33, 290), (9, 4)], oracle="cuda")
    assert_right(case.check(prefill(request, "cuda", configs=(config,))))


@pytest.mark.gpu
def test_nan_of_one_sequence_stays_there() -> None:  # requirement D15
    request = request_of(head_dim=128, dtype="bfloat16", causal=False)
    impl: Any = prefill(request, "cuda")
    torch.manual_seed(0)
    q, k, v = (torch.randn(600, heads, 128, device="cuda").bfloat16() for heads in (4, 2, 2))
    cu = torch.tensor([0, 150, 300, 600], dtype=torch.int32, device="cuda")
    right = impl(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    k[150:300], v[150:300] = torch.nan, torch.inf
    found = impl(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert torch.equal(found[:150], right[:150])
    assert torch.equal(found[300:], right[300:])
