"""The ops of the KV cache beside its plain write: rotary and write in one, page copies, gathers of rows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import hal
from hal._portable_cache import KERNELS
from hal.testing import check, corners
from hal_ops import FP8_DTYPES, Op, torch_dtype
from hal_ops.kv_pages_copy import KvPagesCopyRequest
from hal_ops.kv_pages_copy.cases import make_case as make_copy_case
from hal_ops.kv_pages_copy.torch_copy import kv_pages_copy
from hal_ops.kv_pages_gather import KvPagesGatherRequest
from hal_ops.kv_pages_gather.cases import make_case as make_gather_case
from hal_ops.kv_pages_gather.torch_gather import kv_pages_gather
from hal_ops.rotary_embedding.tables import rotary_tables
from hal_ops.rotary_kv_cache_write import RotaryKvCacheWriteRequest
from hal_ops.rotary_kv_cache_write.cases import make_case as make_rotary_case
from hal_ops.rotary_kv_cache_write.torch_rotary_write import rotary_kv_cache_write

OPS = tuple(hal._plugins.registry().op(name) for name in dict.fromkeys(kernel.op for kernel in KERNELS))
ON_CPU = [kernel for kernel in KERNELS if kernel.library in ("torch", "reference")]
FORMATS = ("float64", "float32", "bfloat16", "float16", *FP8_DTYPES)
LIBRARIES = {"torch": "2.11.0", "triton": "3.6.0"}
SIZES: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 16, "page_size": 4}
OWN = {"rotary_kv_cache_write": {"num_q_heads": 4}}


def op_of(kernel: hal.Kernel) -> Op:
    return next(op for op in OPS if op.name == kernel.op)


def plain(op: Op, **fields: Any) -> Any:
    return op.request(**{**SIZES, **OWN.get(op.name, {}), **fields})


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda k: k.name)
def test_kernels_do_what_they_declare(kernel: hal.Kernel) -> None:  # requirement X11, P24
    """Values, inputs unchanged, equal bits where deterministic, in each of the corners."""
    found = [check(kernel, request, device="cpu") for request in corners(kernel, op=op_of(kernel))]
    assert len(found) > 8
    wrong = [str(result) for result in found if not result.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_field_is_tried_by_some_corner(op: Op) -> None:
    moved = set()
    for kernel in KERNELS:
        if kernel.op == op.name and kernel.library != "reference":
            requests = corners(kernel, op=op)
            moved |= {n for n in op.request.rules() if len({getattr(r, n) for r in requests}) > 1}
    assert moved == set(op.request.rules())


@pytest.mark.parametrize("device", ["nvidia:sm_80", "nvidia:sm_90", "rocm:gfx942", "musa:mp_31"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_triton_is_chosen_where_it_reaches(op: Op, device: str) -> None:  # requirement R12
    with hal.simulate(device, libraries=LIBRARIES):
        assert hal.select(plain(op)).kernels() == {"call": f"triton.{op.name}"}
        wide = plain(op, kv_dtype="float64", **({} if op.name == "kv_pages_copy" else {"dtype": "float64"}))
        copies = op.name == "kv_pages_copy"
        assert hal.select(wide).kernels() == {"call": f"{'triton' if copies else 'torch'}.{op.name}"}


def test_formats_that_triton_does_not_convert_are_torchs() -> None:  # requirement P29
    with hal.simulate("nvidia:sm_80", libraries=LIBRARIES):
        for op in OPS:
            chosen = hal.select(plain(op, kv_dtype="float8_e4m3fn"))
            copies = op.name == "kv_pages_copy"
            assert chosen.kernels() == {"call": f"{'triton' if copies else 'torch'}.{op.name}"}
            assert copies or "Triton does not convert float8_e4m3fn on sm_80" in chosen.explain()


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_rotary_and_write(assert_right: Any, kv_dtype: str, layout: str) -> None:
    # requirement B6, P30, D15
    fp8 = kv_dtype in FP8_DTYPES
    for graph, style, dtype in itertools.product((False, True), ("neox", "interleaved"), ("float32", "bfloat16")):
        for more in ({}, {"rotary_dim": 8, "v_head_dim": 24}, {"kv_scale": "head"} if fp8 else {"page_size": 1}):
            fields = {"kv_dtype": kv_dtype, "kv_layout": layout, "graph": graph, "style": style, "dtype": dtype, **more}
            request = RotaryKvCacheWriteRequest(num_q_heads=4, **{**SIZES, **fields})
            for form in ("plain", "strided", "out", "inplace"):
                assert_right(make_rotary_case(request, form=form).check(rotary_kv_cache_write(request, "cpu")))


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pages_are_copied(assert_right: Any, kv_dtype: str, layout: str) -> None:  # requirement D15
    for more, seed in itertools.product(({}, {"v_head_dim": 24}, {"page_size": 1}), (0, 1)):
        request = KvPagesCopyRequest(**{**SIZES, "kv_dtype": kv_dtype, "kv_layout": layout, **more})
        assert_right(make_copy_case(request, seed=seed).check(kv_pages_copy(request, "cpu")))


def test_pairs_that_are_all_skipped_change_nothing() -> None:
    request = KvPagesCopyRequest(**SIZES, kv_dtype="float32")
    k = torch.randn(3, 4, 2, 16)
    v, before = k + 1, k.clone()
    kv_pages_copy(request, "cpu")(k, v, torch.tensor([-1, 2]), torch.tensor([1, -5]))
    assert torch.equal(k, before)
    assert torch.equal(v, before + 1)


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_rows_are_gathered(assert_right: Any, kv_dtype: str, layout: str) -> None:  # requirement D15
    scales = ("tensor", "head") if kv_dtype in FP8_DTYPES else ("tensor",)
    for dtype, kv_scale, form in itertools.product((None, "float16"), scales, ("plain", "strided", "out")):
        for more in ({}, {"v_head_dim": 24}, {"page_size": 1}):
            fields = {**SIZES, "kv_dtype": kv_dtype, "kv_layout": layout, "kv_scale": kv_scale, **more}
            request = KvPagesGatherRequest(**fields, dtype=dtype)
            assert_right(make_gather_case(request, form=form).check(kv_pages_gather(request, "cpu")))


@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn"])
def test_a_forked_sequence_is_gathered_as_it_was_written(kv_dtype: str) -> None:
    """Write with rotary, copy the pages, gather both sequences: what comes back is what was turned."""
    torch.manual_seed(0)
    fields = {**SIZES, "kv_dtype": kv_dtype}
    rotary = hal.get_op("rotary_kv_cache_write", device="cpu", num_q_heads=2, dtype="float32", **fields)
    copy = hal.get_op("kv_pages_copy", device="cpu", **fields)
    gather = hal.get_op("kv_pages_gather", device="cpu", dtype="float32", **fields)
    turn = hal.get_op("rotary_embedding", device="cpu", num_q_heads=2, num_kv_heads=2, head_dim=16, dtype="float32")
    q, k, v = (torch.randn(7, 2, 16) for _ in range(3))
    cos, sin = rotary_tables(16, 8)
    positions, slots = torch.arange(7), torch.tensor([12, 13, 14, 15, 4, 5, 6])
    caches = [torch.full((5, 4, 2, 16), torch.nan).to(torch_dtype(kv_dtype)) for _ in "kv"]
    found = rotary(q, k, v, cos, sin, positions, *caches, slots)
    wanted = turn(q, k, cos, sin, positions)
    torch.testing.assert_close(found, wanted[0])
    copy(*caches, torch.tensor([3, 1]), torch.tensor([0, 2]))
    table = torch.tensor([[3, 1, 99], [0, 2, -1]], dtype=torch.int32)
    keys, values = gather(*caches, table, torch.tensor([0, 7, 14], dtype=torch.int32), 14, 7)
    tolerance = {"float32": 1e-6, "float8_e4m3fn": 0.07}[kv_dtype]
    for rows, right in ((keys, wanted[1]), (values, v)):
        assert torch.equal(rows[:7], rows[7:])
        torch.testing.assert_close(rows[:7], right, rtol=tolerance, atol=tolerance / 4)


def test_wrong_kernels_are_caught() -> None:  # requirement X20
    def without(name: str, right: Any) -> Any:
        """The call without one of its keywords."""
        return lambda *args, **given: right(*args, **{n: x for n, x in given.items() if n != name})

    request = RotaryKvCacheWriteRequest(num_q_heads=4, **SIZES, dtype="float32", kv_dtype="float8_e4m3fn")
    right, case = rotary_kv_cache_write(request, "cpu"), make_rotary_case(request)
    other = rotary_kv_cache_write(request.replace(style="interleaved"), "cpu")

    def unturned(q: Any, k: Any, v: Any, cos: Any, sin: Any, *others: Any, **given: Any) -> Any:
        turned = right(q, k, v, cos, sin, *others, **given)
        right(q, k, v, torch.ones_like(cos), torch.zeros_like(sin), *others, **given)
        return turned

    for wrong in (other, unturned, without("v_scale", right), without("k_scale", right)):
        assert not all(c.ok for c in case.check(wrong))
    gather = KvPagesGatherRequest(**SIZES, kv_dtype="float8_e4m3fn", kv_scale="head")
    call, rows = kv_pages_gather(gather, "cpu"), make_gather_case(gather)
    assert not all(c.ok for c in rows.check(without("k_scale", call)))
    first = lambda k, v, table, *others, **given: call(k, v, table * 0, *others, **given)  # noqa: E731
    assert not all(c.ok for c in rows.check(first))
    copies = KvPagesCopyRequest(**SIZES)
    backwards = lambda k, v, source, target: kv_pages_copy(copies, "cpu")(k, v, target, source)  # noqa: E731
    assert not all(c.ok for c in make_copy_case(copies).check(backwards))


@pytest.mark.parametrize(
    ("name", "fields", "text"),
    [
        ("rotary_kv_cache_write", {"rotary_dim": 7}, "rotary_dim=7: give an even number up to head_dim"),
        ("rotary_kv_cache_write", {"kv_scale": "head"}, "needs an FP8 cache"),
        ("rotary_kv_cache_write", {"style": "gptj"}, "choose 'neox' or 'interleaved'"),
        ("rotary_kv_cache_write", {"dtype": "float8_e4m3fn"}, "give float16, bfloat16"),
        ("kv_pages_copy", {"kv_dtype": "fp8"}, "unknown dtype 'fp8'"),
        ("kv_pages_copy", {"kv_layout": "auto"}, "choose 'NHD' or 'HND'"),
        ("kv_pages_gather", {"kv_scale": "head"}, "needs an FP8 cache"),
        ("kv_pages_gather", {"page_size": 0}, "page_size=0: give a whole number"),
    ],
)
def test_requests_that_nothing_could_honour(name: str, fields: dict[str, Any], text: str) -> None:
    # requirement P29
    with pytest.raises(ValueError, match=text):
        plain(next(op for op in OPS if op.name == name), **fields)


def test_pairs_are_pairs() -> None:
    cache = torch.zeros(2, 4, 2, 16)
    with pytest.raises(ValueError, match="source has 1 pages, target 2: they are pairs"):
        kv_pages_copy(KvPagesCopyRequest(**SIZES), "cpu")(cache, cache, torch.zeros(1).long(), torch.zeros(2).long())
