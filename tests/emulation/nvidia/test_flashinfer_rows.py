"""flashinfer's functions for rows, heads and pages: what is copied for them, and what their contracts have beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia
from emulated.library import Installed
from torch import Tensor

import hal
from hal import _plugins
from hal_nvidia import flashinfer_op_kernels
from hal_ops import resolve_target

KERNELS = {k.op: k for k in flashinfer_op_kernels.KERNELS}
HEADS: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64}
CACHE: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 64, "page_size": 16}
ROWS: dict[str, dict[str, Any]] = {
    "rms_norm": {}, "fused_add_rms_norm": {}, "silu_and_mul": {}, "gelu_and_mul": {},
    "layer_norm": {"weight_dtype": "float32"},
}  # fmt: skip
BFLOAT16 = torch.bfloat16


@pytest.fixture
def held() -> Iterator[Installed]:
    with nvidia.running_on("sm_90", "flashinfer") as installed:
        assert isinstance(installed, Installed)
        yield installed


def built(op: str, **fields: Any) -> Any:
    return hardware.build(KERNELS[op], _plugins.registry().op(op).request(**fields))


def oracle(op: str, **fields: Any) -> Any:
    declared = _plugins.registry().op(op)
    return resolve_target(str(declared.reference["call"]))(declared.request(**fields), "cpu")


def shifted(x: Tensor, by: int = 1) -> Tensor:
    """The same numbers, contiguous, from an address that is no multiple of 16 bytes."""
    flat = x.new_zeros(x.numel() + by)[by:]
    return flat.view(x.shape).copy_(x)


def lopsided(x: Tensor) -> Tensor:
    """The same numbers in rows whose distance is no multiple of 16 bytes."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
    return wide[..., : x.shape[-1]].copy_(x)


def arguments(op: str) -> list[Tensor]:
    torch.manual_seed(0)
    width = 128 if op.endswith("_and_mul") else 64
    x, residual = torch.randn(6, width).to(BFLOAT16), torch.randn(6, width).to(BFLOAT16)
    weight = torch.randn(64).to(torch.float32 if op == "layer_norm" else BFLOAT16)
    more = {"rms_norm": [weight], "fused_add_rms_norm": [residual, weight], "layer_norm": [weight, weight.flip(0)]}
    return [x, *more.get(op, [])]


@pytest.mark.parametrize("into", ["returned", "out", "shifted out"])
@pytest.mark.parametrize("misplaced", [shifted, lopsided])
@pytest.mark.parametrize("op", ROWS)
def test_rows_at_any_address_are_right(op: str, misplaced: Any, into: str, held: Installed) -> None:
    # requirement C7, D14, P24
    """They read 16 bytes at a time: what begins elsewhere stops the device, with a misaligned address."""
    call, right = built(op, hidden_size=64, **ROWS[op]), oracle(op, hidden_size=64, **ROWS[op])
    given, wanted = [misplaced(x) for x in arguments(op)], [x.clone() for x in arguments(op)]
    out = {"returned": None, "out": torch.empty(6, 64, dtype=BFLOAT16)}.get(into)
    out = shifted(torch.empty(6, 64, dtype=BFLOAT16)) if into == "shifted out" else out
    found = call(*given, **({} if out is None else {"out": out}))
    assert out is None or found is out
    torch.testing.assert_close(found, right(*wanted), atol=2e-2, rtol=2e-2)
    for mine, theirs in zip(given, wanted, strict=True):
        assert torch.equal(mine, theirs), "a residual takes up x, and nothing else changes"
    assert held.calls


@pytest.mark.parametrize("op", ["rms_norm", "fused_add_rms_norm"])
def test_rows_are_read_where_they_lie(op: str, held: Installed) -> None:  # requirement C7
    """Nothing is copied that the declaration does not name: not x of a slice, and nothing where out is x."""
    x, *more = arguments(op)
    slice_of = torch.cat([x, x], 1)[:, :64]
    call = built(op, hidden_size=64)
    assert call(slice_of, *more, out=slice_of) is slice_of
    assert held.calls[0].arguments["input"].data_ptr() == slice_of.data_ptr()
    if op == "fused_add_rms_norm":
        assert held.calls[0].arguments["residual"].data_ptr() == more[0].data_ptr()


@pytest.mark.parametrize("op", ROWS)
def test_nothing_is_launched_over_no_rows(op: str, held: Installed) -> None:  # requirement E12
    x, *more = (y[:0] if y.dim() == 2 else y for y in arguments(op))
    assert built(op, hidden_size=64, **ROWS[op])(x, *more).shape == (0, 64)
    assert held.calls == []


def turned(place: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    q, k = (place(torch.randn(5, heads, 64).to(BFLOAT16)) for heads in (4, 2))
    return q, k, torch.rand(8, 32), torch.rand(8, 32), torch.tensor([0, 3, 7, 7, 1])


@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize(
    "place", [lambda x: x, shifted, lopsided, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)]
)
def test_heads_turn_in_place_or_anew(place: Any, style: str, held: Installed) -> None:  # requirement C7, P24
    call, right = built("rotary_embedding", **HEADS, style=style), oracle("rotary_embedding", **HEADS, style=style)
    wanted = right(*turned(lambda x: x))
    q, k, *rest = turned(place)
    fresh = call(q, k, *rest)
    assert all(x.is_contiguous() for x in fresh)
    assert call(q, k, *rest, out=(q, k))[0] is q
    for found in (fresh, (q, k)):
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def test_heads_in_place_are_not_copied(held: Installed) -> None:  # requirement C7
    fused = torch.randn(5, 8, 64).to(BFLOAT16)
    q, k = fused[:, :4], fused[:, 4:6]
    _, _, *rest = turned(lambda x: x)
    built("rotary_embedding", **HEADS)(q, k, *rest, out=(q, k))
    (call,) = held.called("apply_rope_with_cos_sin_cache_inplace")
    assert [call.arguments[n].data_ptr() for n in ("query", "key")] == [q.data_ptr(), k.data_ptr()]
    assert len(call.arguments["cos_sin_cache"]) == 6, "a row for each token, and one that is read and not used"


@pytest.mark.parametrize("position", [-1, 8])
def test_a_position_outside_of_the_tables_raises(position: int, held: Installed) -> None:  # requirement P24
    """The library would read beside the table."""
    q, k, cos, sin, positions = turned(lambda x: x)
    with pytest.raises(IndexError):
        built("rotary_embedding", **HEADS)(q, k, cos, sin, positions.fill_(position))
    assert held.calls == []


def written(slots: list[int], caches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    k, v = (torch.randn(len(slots), 2, 64).to(BFLOAT16) for _ in range(2))
    built("kv_cache_write", **CACHE)(k, v, *caches, torch.tensor(slots, dtype=torch.int64))
    return k, v


def test_skipped_tokens_are_not_written(held: Installed) -> None:  # requirement B10, E12
    caches = torch.zeros(4, 2, 16, 2, 64).to(BFLOAT16).unbind(1)
    k, v = written([-1, 17, -5, 63, -1], caches)
    for x, cache in ((k, caches[0]), (v, caches[1])):
        tokens = cache.flatten(0, 1)
        assert torch.equal(tokens[[17, 63]], x[[1, 3]])
        assert tokens.flatten(1).any(1).nonzero().flatten().tolist() == [17, 63]


@pytest.mark.parametrize("slots", [[-1, -1, -7], [-1], []])
def test_where_all_tokens_are_skipped_nothing_changes(
    slots: list[int], held: Installed
) -> None:  # requirement B10, E12
    caches = tuple(torch.randn(4, 16, 2, 64).to(BFLOAT16) for _ in range(2))
    before = [cache.clone() for cache in caches]
    written(slots, caches)
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))
    assert len(held.calls) == bool(slots)


@pytest.mark.parametrize("odd", ["strides", "address", "heads"])
def test_caches_that_it_would_misread_are_refused(odd: str, held: Installed) -> None:  # requirement D8, P32
    plain = torch.zeros(4, 16, 2, 64).to(BFLOAT16)
    strange = {
        "strides": torch.zeros(4, 2, 16, 2, 64).to(BFLOAT16)[:, 0],
        "address": shifted(plain),
        "heads": lopsided(plain),
    }[odd]
    with pytest.raises(ValueError, match="choose another write kernel"):
        written(
            [0], (plain, strange) if odd == "strides" else (strange, strange.clone(memory_format=torch.preserve_format))
        )
    assert held.calls == []


@pytest.mark.parametrize("odd", ["strides of v", "address of k", "address of v"])
def test_caches_are_looked_at_after_like_ones_too(odd: str, held: Installed) -> None:  # requirement D8, P32, C4
    """The strides of k's cache are remembered: its address, and v's cache, are new in each call."""
    write = built("kv_cache_write", **CACHE)
    k, v = (torch.randn(1, 2, 64).to(BFLOAT16) for _ in range(2))
    caches = [torch.zeros(4, 16, 2, 64).to(BFLOAT16) for _ in range(2)]
    write(k, v, *caches, torch.zeros(1, dtype=torch.int64))
    assert len(held.calls) == 1
    wide = torch.zeros(4, 2, 16, 2, 64).to(BFLOAT16)[:, 0]
    place = 0 if odd == "address of k" else 1
    caches[place] = wide if odd == "strides of v" else shifted(caches[place])
    with pytest.raises(ValueError, match="choose another write kernel"):
        write(k, v, *caches, torch.zeros(1, dtype=torch.int64))
    assert len(held.calls) == 1


@pytest.mark.parametrize("tokens", [0, 7])
def test_states_of_any_strides_are_merged(tokens: int, held: Installed) -> None:  # requirement B14, B15
    torch.manual_seed(0)
    fields = {"num_heads": 6, "v_head_dim": 64}
    states: list[Tensor] = []
    for turn in range(2):
        out = torch.randn(6, tokens, 64).to(BFLOAT16).transpose(0, 1)
        lse = (5 * torch.randn(6, tokens)).t()
        lse[turn : turn + 2], out[turn : turn + 2] = -torch.inf, torch.nan
        states += [out, lse]
    before = [x.clone() for x in states]
    found = built("merge_attention_states", **fields)(*states)
    wanted = oracle("merge_attention_states", **fields)(*states)
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(states, before, equal_nan=True, atol=0, rtol=0)
    assert len(held.calls) == bool(tokens)


@pytest.mark.parametrize(
    ("op", "fields", "needle"),
    [
        (
            "merge_attention_states",
            {"num_heads": 65, "v_head_dim": 128},
            "num_heads 65 with head dim 128; a block of 1024",
        ),
        ("merge_attention_states", {"num_heads": 33, "v_head_dim": 256}, "takes 32"),
        ("kv_cache_write", {**CACHE, "num_kv_heads": 128, "head_dim": 128}, "num_kv_heads 128 with head dim 128"),
        ("kv_cache_write", {**CACHE, "kv_dtype": "float8_e4m3fn"}, "kv_dtype"),
        ("kv_cache_write", {**CACHE, "v_head_dim": 128}, "v_head_dim"),
        ("kv_cache_write", {**CACHE, "kv_layout": "HDN"}, "kv_layout"),
        ("rotary_embedding", {**HEADS, "head_dim": 96}, "head_dim"),
        ("rotary_embedding", {**HEADS, "rotary_dim": 24}, "rotary_dim"),
        ("layer_norm", {"hidden_size": 64}, "weight_dtype"),
        ("fused_add_rms_norm", {"hidden_size": 32768}, "hidden_size"),
    ],
)
def test_what_is_refused(op: str, fields: dict[str, Any], needle: str) -> None:  # requirement C7, P30
    request = _plugins.registry().op(op).request(**fields)
    with hal.simulate("nvidia:sm_90,cuda=13.0", libraries={"torch": "2.13.0", "flashinfer-python": "0.6.13"}):
        (choice,) = hal.select(request).choices.values()
        (candidate,) = (c for c in choice.candidates if c.kernel.name == f"flashinfer.{op}")
    assert needle in str(candidate.reasons[0])


@pytest.mark.parametrize("op", KERNELS)
def test_they_are_taken_before_torch_s_operators_and_behind_triton_s(op: str) -> None:
    fields = {**HEADS} if op == "rotary_embedding" else {**CACHE} if op == "kv_cache_write" else {"hidden_size": 4096}
    fields = {"num_heads": 32, "v_head_dim": 128} if op == "merge_attention_states" else {**fields, **ROWS.get(op, {})}
    request = _plugins.registry().op(op).request(**fields)
    for more, wanted in (({}, "flashinfer"), ({"triton": "3.6.0"}, "triton")):
        with hal.simulate(
            "nvidia:sm_90,cuda=13.0", libraries={"torch": "2.13.0", "flashinfer-python": "0.6.13", **more}
        ):
            assert hal.select(request).kernels() == {"call": f"{wanted}.{op}"}
