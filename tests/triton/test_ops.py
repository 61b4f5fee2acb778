"""The Triton kernels of the ops beside attention: what they declare, against the reference.

The interpreter rounds to bfloat16 by cutting off, so it runs float16 and float32; the device runs all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import hal
from hal._portable_ops import KERNELS as DECLARED
from hal.testing import check, corners
from hal_ops import Op, resolve_target
from hal_ops._triton_gate import CONFIGS as GATE_CONFIGS
from hal_ops._triton_norm import CONFIGS as NORM_CONFIGS
from hal_ops._triton_norm import RMS_CONFIGS, NormConfig, NormRows
from hal_ops.fp8_quantize import Fp8QuantizeRequest
from hal_ops.fp8_quantize.cases import make_case as make_fp8_case
from hal_ops.fp8_quantize.triton_quantize import FORMATS, fp8_quantize
from hal_ops.gelu_and_mul import GeluAndMulRequest
from hal_ops.gelu_and_mul.cases import make_case as make_gelu_case
from hal_ops.gelu_and_mul.triton_gate import gelu_and_mul
from hal_ops.rms_norm import RmsNormRequest
from hal_ops.rms_norm.cases import make_case as make_rms_case
from hal_ops.rms_norm.triton_norm import rms_norm
from hal_ops.rotary_embedding import ROTARY_EMBEDDING, RotaryEmbeddingRequest
from hal_ops.rotary_embedding.cases import make_case as make_rotary_case
from hal_ops.rotary_embedding.triton_rotary import rotary_embedding
from hal_ops.silu_and_mul import SiluAndMulRequest
from hal_ops.silu_and_mul.triton_gate import silu_and_mul

OPS = tuple(hal._plugins.registry().op(name) for name in dict.fromkeys(kernel.op for kernel in DECLARED))
KERNELS = {kernel.op: kernel for kernel in DECLARED if kernel.library == "triton"}
FEW = {"rotary_embedding": 8, "fp8_quantize": 14}
HALVES = ("float16", "bfloat16")

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's numpy


def interpretable(op: Op) -> Iterator[Any]:
    """The first corners of what the op's kernel declares, in formats that the interpreter rounds to."""
    for request in corners(KERNELS[op.name], op=op, limit=FEW.get(op.name, 10)):
        if request.dtype != "bfloat16":
            yield request
        else:
            follows = {n: "float16" for n in ("weight_dtype",) if getattr(request, n, "") == "bfloat16"}
            yield dataclasses.replace(request, dtype="float16", **follows)


def corner_id(value: Any) -> str:
    return value.op if isinstance(value, hal.Kernel) else value.describe().replace(" ", "_")


@pytest.mark.parametrize("request_", [r for op in OPS for r in interpretable(op)], ids=lambda r: f"{r.op}:{r.digest()}")
def test_kernels_do_what_they_declare(
    request_: Any, device: str, interpreted: bool, assert_right: Callable[[Any], None]
) -> None:
    if not interpreted:
        pytest.skip("the next test runs more on the device")
    kernel, op = KERNELS[request_.op], next(op for op in OPS if op.name == request_.op)
    implementation, make = resolve_target(kernel.target)(request_, device), resolve_target(op.cases or "")
    for keywords in ({}, *make.variants(request_, "call")):
        assert_right(make(request_, device=device, **keywords).check(implementation))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "request_", [r for op in OPS for r in corners(KERNELS[op.name], op=op)], ids=lambda r: f"{r.op}:{r.digest()}"
)
def test_kernels_do_what_they_declare_on_the_device(request_: Any) -> None:  # requirement D14
    """In all formats; twice to the bit where deterministic, captured in a graph where it is asked for."""
    result = check(KERNELS[request_.op], request_, seed=1)
    assert result.ok, str(result)


LONGEST = sorted({min(c.longest, 20000) for c in (*NORM_CONFIGS, *RMS_CONFIGS)})
LENGTHS = [(n, form) for n in LONGEST for form in ("plain", "strided")] + [(n - 3, "plain") for n in LONGEST]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
@pytest.mark.parametrize(("hidden", "form"), LENGTHS)
def test_every_configuration_of_the_norms(
    hidden: int, form: str, dtype: str, device: str, assert_right: Callable[[Any], None]
) -> None:
    for op in OPS[:3]:
        request = op.request(hidden_size=hidden, dtype=dtype)
        implementation = resolve_target(KERNELS[op.name].target)(request, device)
        assert_right(resolve_target(op.cases or "")(request, device=device, form=form).check(implementation))


STEPS = {"one": NormConfig(700, 1024, 2, 4), "several": NormConfig(700, 256, 1, 4)}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("op", OPS[:3], ids=lambda op: op.name)
def test_rows_in_one_step_and_in_several(op: Op, steps: str, device: str, assert_right: Callable[[Any], None]) -> None:
    request = op.request(hidden_size=700, dtype="float16")
    flags = {"add": op is OPS[1], "center": op is OPS[2], "bias": op is OPS[2]}
    norm = NormRows(device, 700, request.eps, config=STEPS[steps], **flags)

    def call(x: torch.Tensor, *others: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=device) if out is None else out
        residual, weight, bias = (others[0], others[1], None) if op is OPS[1] else (None, *others, None)[:3]
        norm(x, out, weight, bias, residual)
        return out

    make = resolve_target(op.cases or "")
    for keywords in ({}, *make.variants(request, "call")):
        assert_right(make(request, device=device, **keywords).check(call))


@pytest.mark.parametrize("op", OPS[:3], ids=lambda op: op.name)
def test_rows_of_any_length(op: Op, device: str, assert_right: Callable[[Any], None]) -> None:
    request = op.request(hidden_size=17000, dtype="float16")
    implementation = resolve_target(KERNELS[op.name].target)(request, device)
    assert_right(resolve_target(op.cases or "")(request, device=device, tokens=3).check(implementation))


def test_a_constant_row_has_no_deviation(device: str) -> None:
    """The mean is divided exactly: off by one bit, a row of 3 would become 1e-4 and not 0."""
    for hidden in (61, 300, 700, 17000):
        norm = NormRows(device, hidden, 1e-5, center=True, weight=False)
        x = torch.full((2, hidden), 3.0, device=device)
        norm(x, x, None)
        assert not x.any(), hidden


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
@pytest.mark.parametrize("hidden", [h for c in GATE_CONFIGS for h in (min(c.block, 11008), min(c.block, 4099) - 3)])
def test_every_configuration_of_the_gates(
    hidden: int, dtype: str, device: str, assert_right: Callable[[Any], None]
) -> None:
    for approximate in ("none", "tanh"):
        request = GeluAndMulRequest(hidden_size=hidden, dtype=dtype, approximate=approximate)
        assert_right(make_gelu_case(request, device=device).check(gelu_and_mul(request, device)))


@pytest.mark.gpu
@pytest.mark.parametrize("native", [False, True], ids=["whole numbers", "Triton's conversion"])
@pytest.mark.parametrize("fp8_dtype", [name for name, form in FORMATS.items() if form.native])
def test_both_ways_to_make_a_format_give_the_same(
    fp8_dtype: str, native: bool, device: str, assert_right: Callable[[Any], None]
) -> None:
    for granularity, hidden in (("tensor", 5000), ("token", 16384), ("token", 28672), ("token", 999), ("block", 1000)):
        request = Fp8QuantizeRequest(hidden_size=hidden, fp8_dtype=fp8_dtype, granularity=granularity)
        case = make_fp8_case(request, device=device)
        assert_right(case.check(fp8_quantize(request, device, native=native)))


@pytest.mark.parametrize("fp8_dtype", FORMATS)
def test_every_half_becomes_the_nearest_number_of_the_format(fp8_dtype: str, device: str) -> None:
    """All float16 values at scale 1, against torch's cast of what is in range: to the bit, ties to even."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16).reshape(64, 1024)
    dtype = getattr(torch, fp8_dtype)
    most = torch.finfo(dtype).max
    wanted = x.float().clamp(-most, most).to(dtype)
    request = Fp8QuantizeRequest(
        hidden_size=1024, dtype="float16", fp8_dtype=fp8_dtype, granularity="tensor", static=True
    )
    for native in {False, device != "cpu" and bool(FORMATS[fp8_dtype].native)}:
        values, scales = fp8_quantize(request, device, native=native)(x.to(device), torch.ones(1, device=device))
        known = ~x.isnan()
        assert torch.equal(values.cpu().view(torch.uint8)[known], wanted.view(torch.uint8)[known])
        assert values.float().isnan().cpu().equal(x.isnan())
        assert scales.tolist() == [1.0]


def test_positions_outside_the_tables_give_nan_and_read_nothing(device: str) -> None:
    request = RotaryEmbeddingRequest(num_q_heads=2, num_kv_heads=1, head_dim=32, dtype="float32")
    q, k = torch.randn(4, 2, 32, device=device), torch.randn(4, 1, 32, device=device)
    cos, sin = torch.ones(8, 16, device=device), torch.zeros(8, 16, device=device)
    positions = torch.tensor([7, 8, -1, 1 << 40], device=device)
    for found, x in zip(rotary_embedding(request, device)(q, k, cos, sin, positions), (q, k), strict=True):
        assert torch.equal(found[0], x[0])
        assert found[1:].isnan().all()


def test_heads_seen_with_their_dims_swapped_are_taken_as_they_are(
    device: str, assert_right: Callable[[Any], None]
) -> None:  # requirement B4
    """``[batch, heads, len, dim]`` as most model code has it, turned in place."""
    request = RotaryEmbeddingRequest(num_q_heads=4, num_kv_heads=2, head_dim=32, dtype="float32", rotary_dim=16)
    case = make_rotary_case(request, device=device, form="inplace")
    swapped = [x.reshape(3, 6, *x.shape[1:]).transpose(1, 2).contiguous().transpose(1, 2) for x in case.args[:2]]
    args = (*swapped, *case.args[2:4], case.args[4].reshape(3, 6))
    assert_right(dataclasses.replace(case, args=args).check(rotary_embedding(request, device)))


def test_what_folds_into_no_two_dims_is_refused(device: str) -> None:
    x = torch.randn(2, 3, 4, 5, 16, device=device).transpose(0, 2)
    request = RmsNormRequest(hidden_size=16, dtype="float32")
    with pytest.raises(ValueError, match=r"do not fold into two; pass x.contiguous\(\)"):
        rms_norm(request, device)(x[:, ::2], torch.ones(16, device=device))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_rows_are_no_work(op: Op, device: str) -> None:
    sizes = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 48} if op is ROTARY_EMBEDDING else {"hidden_size": 48}
    request = op.request(**sizes, dtype="float32")
    if op.name == "fp8_quantize":
        request = dataclasses.replace(request, fp8_dtype="float8_e4m3fn")
    case = resolve_target(op.cases or "")(request, device=device)
    args = [x[:0] if len(x) == 18 else x for x in case.args]
    assert resolve_target(op.check or "")(request, args[0].device, False)(*args) == ""
    results = resolve_target(KERNELS[op.name].target)(request, device)(*args)
    first = results[0] if isinstance(results, tuple) else results
    assert first.shape == (*args[0].shape[:-1], 48)
    assert not first.numel()


def test_a_gradient_that_would_be_lost_is_refused(device: str) -> None:
    gate = silu_and_mul(SiluAndMulRequest(hidden_size=16, dtype="float32"), device)
    x = torch.randn(2, 32, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="bind the op with needs_grad=True"):
        gate(x)
    with torch.no_grad():
        assert gate(x).shape == (2, 16)


LONG: dict[str, dict[str, Any]] = {
    "a token": {"hidden_size": 28672, "granularity": "token"},
    "a token, odd": {"hidden_size": 16411, "granularity": "token", "dtype": "float32"},
    "a block of a row": {"hidden_size": 40000, "granularity": "block", "block_size": 17000},
    "a block of rows": {"hidden_size": 900, "granularity": "block", "block_size": 700, "block_rows": 30},
}


@pytest.mark.parametrize("static", [False, True], ids=["made", "given"])
@pytest.mark.parametrize("fp8_dtype", ["float8_e4m3fn", "float8_e5m2fnuz"])
@pytest.mark.parametrize("group", LONG)
def test_groups_longer_than_a_program_holds(
    group: str, fp8_dtype: str, static: bool, device: str, assert_right: Callable[[Any], None]
) -> None:
    request = Fp8QuantizeRequest(**{"dtype": "float16", **LONG[group]}, fp8_dtype=fp8_dtype, static=static)
    implementation = fp8_quantize(request, device)
    tokens = 40 if request.block_rows > 1 else 3
    for form in ("plain", "out"):
        assert_right(make_fp8_case(request, device=device, form=form, tokens=tokens).check(implementation))


@pytest.mark.gpu
def test_rows_beyond_two_to_the_thirty_one_elements(device: str) -> None:
    """The last row is right though its place passes 32 bits."""
    hidden, rows = 4096, (1 << 31) // 4096 + 3
    x = torch.zeros(rows, hidden, dtype=torch.bfloat16, device=device)
    x[-1] = torch.randn(hidden, device=device).bfloat16()
    weight = torch.ones(hidden, dtype=torch.bfloat16, device=device)
    found = rms_norm(RmsNormRequest(hidden_size=hidden), device)(x, weight)
    wanted = torch.nn.functional.rms_norm(x[-1].float(), (hidden,), eps=1e-6)
    torch.testing.assert_close(found[-1].float(), wanted, atol=0.02, rtol=0.01)
    assert not found[:-1].any()


@pytest.mark.gpu
def test_misaligned_tensors(device: str, assert_right: Callable[[Any], None]) -> None:
    """Addresses two bytes off, after the same kernel was compiled for aligned ones."""
    request = RmsNormRequest(hidden_size=256)
    norm = rms_norm(request, device)
    case = make_rms_case(request, device=device)
    assert_right(case.check(norm))
    x = case.args[0]
    off = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)[1:].view(x.shape).copy_(x)
    assert_right(dataclasses.replace(case, args=(off, case.args[1])).check(norm))
