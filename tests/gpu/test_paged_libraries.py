"""Paged caches, exactly: the same steps through each library, forced, against the float32 reference on the host.

One shape serves nearly all of them: that of the report that once gave garbage (14 to 2 heads of 64, pages of 16, float16).
It is one variant of each kernel for the libraries that compile on first use; xqa, which has one for each group size, is
asked for groups of 4. The CPU's kernels prove the tests themselves.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import hal
from hal import _plugins
from hal.testing._verify import circumstances, refusals
from hal_ops.attention import AttentionRequest

BASE: dict[str, Any] = {"num_q_heads": 14, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}
LENGTHS = (1, 5, 9, 15, 16, 17, 25, 33)
HOST = ("torch_cpu", "reference")
ON_DEVICE: dict[str, dict[str, Any]] = {
    "triton": {}, "fa2": {"page_size": 256}, "fa3": {}, "fa4": {}, "flashinfer_fa2": {}, "flashinfer_fa3": {},
    "flashinfer_sink": {"dtype": "bfloat16", "sinks": True},
    "xqa": {"num_q_heads": 8, "head_dim": 128, "dtype": "bfloat16"},
}  # fmt: skip
"""Library to what it wants of a request; flashinfer_fa3 has no decode, xqa no extend."""
NOT_HERE = ("library", "device", "runtime")


def named(library: str) -> Any:
    """``flashinfer_fa2`` is found by ``-k flashinfer``; what needs an accelerator is marked."""
    marks = () if library in HOST else pytest.mark.gpu
    return pytest.param(library, marks=marks, id=library)


EACH = pytest.mark.parametrize("library", [named(name) for name in (*HOST, *ON_DEVICE)])


def handle_of(library: str, **fields: Any) -> hal.Attention:
    """A handle with the library forced for the paged phases that it has; skips where it cannot run."""
    request = {**BASE, "page_size": 16, **ON_DEVICE.get(library, {}), **fields}
    device = next(d for d in hal.devices() if d.platform == "cpu") if library in HOST else hal.device()
    kernels = _plugins.registry().kernels
    phases = [p for p in ("extend", "decode") if f"{library}.{p}" in kernels]
    for phase in phases:
        first = hal.testing.corners(f"{library}.{phase}", limit=1)[0]
        why = refusals(kernels[f"{library}.{phase}"], first, circumstances(device))
        if any(r.field in NOT_HERE for r in why):
            pytest.skip("; ".join(map(str, why)))
    found = hal.get_attention(**request, device=device, kernel=dict.fromkeys(phases, library))
    assert {p: found.kernels()[p] for p in phases} == {p: f"{library}.{p}" for p in phases}
    return found


class Sequences:
    """Keys, values, queries and sinks of some sequences on the host, and their pages in a cache full of NaN."""

    def __init__(self, handle: hal.Attention, kv_lens: tuple[int, ...], width: int | None = None) -> None:
        torch.manual_seed(0)
        self.handle, self.kv_lens = handle, kv_lens
        self.place = handle.device.torch_device()
        request = handle.request
        dtype, heads = getattr(torch, request.dtype), (request.num_q_heads, request.num_kv_heads, request.num_kv_heads)
        draws = ([torch.randn(n, h, request.head_dim).to(dtype) for n in kv_lens] for h in heads)
        self.q, self.k, self.v = draws
        self.sinks = {"sinks": torch.linspace(-2, 4, request.num_q_heads)} if request.sinks else {}
        size = request.page_size
        assert isinstance(size, int)
        counts = [-(-n // size) for n in kv_lens]
        numbers = torch.randperm(sum(counts) + 3)[: sum(counts)].tolist()
        self.cache = handle.allocate_kv_cache(sum(counts) + 3)
        for cache in (self.cache.k, self.cache.v):
            cache.view(torch.uint8).fill_(0x7F) if cache.itemsize == 1 else cache.fill_(torch.nan)
        starts = [0, *itertools.accumulate(counts)]
        self.table = torch.full((len(counts), width or max(counts)), 2**31 - 1, dtype=torch.int32)
        for row, (start, end) in enumerate(itertools.pairwise(starts)):
            self.table[row, : end - start] = torch.tensor(numbers[start:end])

    def step(self, spans: list[tuple[int, int]], rows: tuple[int, ...] = ()) -> Tensor:
        """Tokens ``[start, end)`` of each sequence (or of ``rows``): written, and attended to, in one step."""
        rows = rows or tuple(range(len(spans)))
        plan = self.handle.plan(
            q_lens=[b - a for a, b in spans], kv_lens=[b for _, b in spans], block_table=self.table[list(rows)]
        )
        three = (
            torch.cat([x[row][a:b] for row, (a, b) in zip(rows, spans, strict=True)]).to(self.place)
            for x in (self.q, self.k, self.v)
        )
        out: Tensor = self.handle(*three, cache=self.cache, plan=plan, **self.on_device())
        return out

    def on_device(self) -> dict[str, Tensor]:
        """What each call is given beside q, k and v."""
        return {name: x.to(self.place) for name, x in self.sinks.items()}

    def right(self, row: int) -> Tensor:
        """The whole sequence at once, in float32."""
        three = (x[row].float()[None] for x in (self.q, self.k, self.v))
        return reference(self.handle.request)(*three, **self.sinks)[0]


@functools.cache
def reference(request: AttentionRequest) -> hal.Attention:
    """What computes the same on the host."""
    fields = {name: getattr(request, name) for name in ("num_q_heads", "num_kv_heads", "head_dim", "window", "sinks")}
    return hal.get_attention(**fields, dtype="float32", phases="prefill", device="cpu", kernel="reference")


MOST = {torch.float16: 0.01, torch.bfloat16: 0.05}
"""How far a result of values up to 4 or so may be off."""


def assert_right(out: Tensor, wanted: Tensor) -> None:
    assert not out.isnan().any()
    assert (out.float().cpu() - wanted).abs().max() < MOST[out.dtype]


@EACH
@pytest.mark.parametrize("new", ["one", "some", "all"])
def test_short_and_odd_lengths(library: str, new: str) -> None:  # requirement D1, D2, D4, D5, D6, D15
    """Every length in one batch: with one new query a row, with some, and with no prefix at all."""
    sequences = Sequences(handle_of(library), LENGTHS)
    first = {"one": [n - 1 for n in LENGTHS], "some": [n // 2 for n in LENGTHS], "all": [0 for _ in LENGTHS]}[new]
    before = [(0, n) for n in first]
    kept = tuple(row for row, (_, end) in enumerate(before) if end)
    if kept:
        sequences.step([before[row] for row in kept], kept)
    out = sequences.step(list(zip(first, LENGTHS, strict=True)))
    assert_right(out, torch.cat([sequences.right(row)[start:] for row, start in enumerate(first)]))


@EACH
@pytest.mark.parametrize("heads", [(6, 2), (5, 1), (21, 3), (12, 1)])
def test_groups_that_are_no_powers_of_two(library: str, heads: tuple[int, int]) -> None:  # requirement D4, B13
    if library == "xqa":
        pytest.skip("xqa is compiled for each group size: test_nvidia_libraries.py has groups at its corners")
    sequences = Sequences(handle_of(library, num_q_heads=heads[0], num_kv_heads=heads[1]), (9, 33, 100))
    outs = [sequences.step([(0, 8), (0, 20), (0, 99)]), sequences.step([(8, 9), (20, 21), (99, 100)])]
    right = [sequences.right(row) for row in range(3)]
    assert_right(outs[0], torch.cat([right[0][:8], right[1][:20], right[2][:99]]))
    assert_right(outs[1], torch.cat([right[0][8:9], right[1][20:21], right[2][99:]]))


@EACH
def test_padded_bounds_change_nothing(library: str) -> None:  # requirement D3, E3
    """Tables as wide as need be, twice as wide, and as wide as a long context."""
    outs = []
    for width in (None, 8, 256):
        sequences = Sequences(handle_of(library), (9, 33, 17), width)
        sequences.step([(0, 8), (0, 20), (0, 16)])
        outs.append((sequences.step([(8, 9), (20, 33), (16, 17)]), sequences))
    right = torch.cat([outs[0][1].right(row)[start:] for row, start in enumerate((8, 20, 16))])
    for out, _ in outs:
        assert_right(out, right)
        torch.testing.assert_close(out, outs[0][0], atol=1e-3, rtol=1e-3)


@EACH
@pytest.mark.parametrize("bounds", [(0, 200), (0, 100, 200), (0, 1, 16, 17, 64, 130, 199, 200)])
def test_a_prompt_in_chunks_equals_the_whole(library: str, bounds: tuple[int, ...]) -> None:  # requirement D7, B9
    sequences = Sequences(handle_of(library), (200,))
    outs = [sequences.step([span]) for span in itertools.pairwise(bounds)]
    assert_right(torch.cat(outs), sequences.right(0))


@EACH
@pytest.mark.parametrize("window", [1, 16, 128])
def test_windows_count_the_query_itself(library: str, window: int) -> None:  # requirement E8
    sequences = Sequences(handle_of(library, window=window), (150, 33))
    outs = [sequences.step([(0, 149), (0, 32)]), sequences.step([(149, 150), (32, 33)])]
    right = [sequences.right(row) for row in (0, 1)]
    assert_right(outs[0], torch.cat([right[0][:149], right[1][:32]]))
    assert_right(outs[1], torch.cat([right[0][149:], right[1][32:]]))


@EACH
def test_the_same_input_gives_the_same_bits(library: str) -> None:  # requirement D14
    """Again, and beside other rows; a prefix that is there gives what one computed anew gives."""
    declared = [k for name, k in _plugins.registry().kernels.items() if name.partition(".")[0] == library]
    if not all(k.fields.get("deterministic") for k in declared if k.op == "attention" and k.phase != "prefill"):
        pytest.skip(f"{library} does not declare determinism")
    sequences = Sequences(handle_of(library, deterministic=True), (200, 33))
    cold = sequences.step([(0, 200), (0, 33)])
    warm = sequences.step([(100, 200), (20, 33)])
    assert torch.equal(warm, sequences.step([(100, 200), (20, 33)]))
    alone = sequences.step([(20, 33)], (1,))
    assert_right(warm, torch.cat([cold[100:200], cold[220:233]]).float().cpu())
    assert_right(alone, cold[220:233].float().cpu())
    if library in ("reference", "torch_cpu", "triton", "fa3"):
        assert torch.equal(alone, warm[100:])


@EACH
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_scale_of_an_fp8_v_is_applied(library: str, scale: float) -> None:  # requirement D12, B6, B7
    """Values that are right only if what was divided on writing is multiplied back on reading, in each product."""
    dims = {"num_q_heads": 8, "head_dim": 128} if library == "flashinfer_fa2" else {}
    fields = {"dtype": "bfloat16", "kv_dtype": "float8_e4m3fn", "fp8_query": True, **dims}
    phases = [f"{library}.{p}" for p in ("extend", "decode") if f"{library}.{p}" in _plugins.registry().kernels]
    if any("kv_scale" not in _plugins.registry().kernels[name].fields for name in phases):
        pytest.skip(f"{library} reads no FP8 cache")
    handle = handle_of(library, **fields)
    torch.manual_seed(0)
    heads = handle.request.num_q_heads, 2, 2
    q, k, v = (torch.randn(40, n, handle.request.head_dim).bfloat16() for n in heads)
    cache = handle.allocate_kv_cache(4, k_scale=1 / scale, v_scale=scale)
    place, outs = handle.device.torch_device(), []
    for a, b in ((0, 39), (39, 40)):
        plan = handle.plan(q_lens=[b - a], kv_lens=[b], block_table=[[3, 0, 2]])
        outs.append(handle(*(x[a:b].to(place) for x in (q, k, v)), cache=cache, plan=plan))
    assert {x.dtype for x in outs} == {torch.bfloat16}
    right = reference(handle.request)(*(x.float()[None] for x in (q, k, v)))[0]
    error = (torch.cat(outs).float().cpu() - right).norm() / right.norm()
    assert error < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("library", list(ON_DEVICE))
def test_a_captured_decode_follows_its_plan(library: str) -> None:  # requirement E12, E3, P37, D15
    """Captured at its largest, replayed with other lengths and with fewer rows: same addresses, right values."""
    handle = handle_of(library, graph=True)
    if handle.device.torch_type != "cuda" or not handle.kernels()["decode"].startswith(library):
        pytest.skip(f"{library} has no decode, or the device no graphs")
    kv_lens = (128, 100, 33, 17, 16, 1)
    size = handle.request.page_size
    assert isinstance(size, int)
    sequences = Sequences(handle, kv_lens, -(-128 // size))
    for row, n in enumerate(kv_lens):
        sequences.step([(0, n)], (row,))
    place = handle.device.torch_device()
    q = torch.stack([sequences.q[row][n - 1] for row, n in enumerate(kv_lens)]).to(place)
    plan = handle.plan(
        q_lens=[1] * 6, kv_lens=[128] * 6, block_table=sequences.table[[0] * 6], max_batch=6,
        max_pages=sequences.table.shape[1],
    )  # fmt: skip
    addresses = [x.data_ptr() for x in (plan._step.kv_lens, plan._step.block_table, plan._step.cu_seqlens_q)]
    side, more = torch.cuda.Stream(), sequences.on_device()
    with torch.cuda.stream(side):
        handle(q, cache=sequences.cache, plan=plan, **more)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = handle(q, cache=sequences.cache, plan=plan, **more)
    for rows in ((0, 1, 2, 3, 4, 5), (5, 4, 3), (2,), (0, 5)):
        lens = [kv_lens[row] for row in rows]
        plan.update(q_lens=[1] * len(rows), kv_lens=lens, block_table=sequences.table[list(rows)])
        assert addresses == [
            x.data_ptr() for x in (plan._step.kv_lens, plan._step.block_table, plan._step.cu_seqlens_q)
        ]
        q[: len(rows)] = torch.stack([sequences.q[row][kv_lens[row] - 1] for row in rows]).to(place)
        graph.replay()
        torch.cuda.synchronize()
        assert_right(out[: len(rows)], torch.stack([sequences.right(row)[-1] for row in rows]))
