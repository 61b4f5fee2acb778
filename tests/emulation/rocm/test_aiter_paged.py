"""aiter's paged kernels see a cache of any page size as pages of one token: places, plans, and nothing else read."""

from __future__ import annotations

from typing import Any

import emulated.aiter
import pytest
import torch
from emulated.aiter import installed
from emulated.amd import KERNELS, built, values
from emulated.replay import empty_steps, replays, smaller_steps

from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "kv_layout": "NHD"}


def request(**fields: Any) -> AttentionRequest:
    return AttentionRequest(**{**HEADS, **fields})


@pytest.mark.parametrize("phase", ["extend", "decode"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 48])
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_page_size_is_served_without_a_copy(phase: str, page_size: int, interleaved: bool) -> None:
    # requirement D1, D8, D15, P32
    wanted = request(page_size=page_size)
    pairs = ((1, 17), (1, 33), (1, 1)) if phase == "decode" else ((3, 17), (1, 33), (5, 5))
    case = make_case(wanted, phase, lengths=pairs, interleaved=interleaved)
    caches = case.args[1:3]
    with installed() as library:
        values(case, built(f"aiter.{phase}", wanted))
    (call,) = library.calls
    names = ("key_cache", "value_cache") if phase == "decode" else ("k", "v")
    for name, cache in zip(names, caches, strict=True):
        seen = call.arguments[name]
        assert seen.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
        assert seen.shape[0] >= cache.shape[0] * page_size or interleaved
    if page_size > 1:
        assert caches[1].isnan().any(), "what no length covers holds NaN"


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_places_past_the_end_repeat_a_valid_token(phase: str) -> None:
    # requirement D15
    wanted = request()
    case = make_case(wanted, phase, lengths=((1, 17), (1, 33)))
    step = case.args[3]
    with installed():
        payload = built(f"aiter.{phase}", wanted).plan(step)
    places = payload.at(16)
    pages = step.block_table
    right = [int(pages[row, t // 16]) * 16 + t % 16 for row, n in enumerate(step.kv_lens_host) for t in range(n)]
    assert places[:50].tolist() == right
    assert set(places[50:].tolist()) == {right[-1]}
    assert len(places) - 50 >= emulated.aiter.TILE
    assert places.dtype == torch.int32


def test_the_librarys_own_pages_let_nan_through() -> None:
    # requirement D15
    wanted = request()
    case = make_case(wanted, "extend", lengths=((1, 17), (1, 33)))
    with installed() as library:
        values(case, built("aiter.extend", wanted))
        (call,) = library.calls
        told = dict(call.passed)
        beyond = told["kv_page_indices"].clone()
        table = case.args[3].block_table
        beyond[50:] = int(table[1, 2]) * 16 + 15
        spoilt = emulated.aiter.emulations()["mha_batch_prefill_func"](**{**told, "kv_page_indices": beyond})
    assert case.args[2].flatten(0, 1)[beyond[-1]].isnan().any()
    assert spoilt.isnan().any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_an_updated_plan_keeps_its_addresses_and_is_right(interleaved: bool) -> None:
    # requirement C6, E12, P37
    wanted = request(graph=True)
    with installed():
        implementation = built("aiter.decode", wanted)
        case = make_case(wanted, "decode", lengths=((1, 40), (1, 9)), interleaved=interleaved)
        payload = implementation.plan(case.args[3])
        implementation(*case.args, payload, **case.kwargs)
        held = [payload.scratch, *payload.by_gap.values()]
        addresses = [x.data_ptr() for x in held]
        other = make_case(wanted, "decode", lengths=((1, 3), (1, 41)), interleaved=interleaved, seed=1)
        updated = implementation.update(other.args[3], payload)
        updated.indptr.copy_(other.args[3].cu_seqlens_k)  # a handle's buffers are filled before
        assert updated is payload
        assert [x.data_ptr() for x in held] == addresses
        out = implementation(*other.args, updated, **other.kwargs)
        again = implementation(*other.args, implementation.plan(other.args[3]), **other.kwargs)
    assert len(payload.by_gap) == 1 + interleaved
    assert torch.equal(out, again)
    torch.testing.assert_close(out.double(), other.expected()["out"], atol=2e-2, rtol=2e-2)


def test_a_plan_for_graphs_has_room_for_every_length_that_fits_its_table() -> None:
    # requirement E12, P37
    wanted = request(graph=True)
    case = make_case(wanted, "decode", lengths=((1, 3), (1, 41)))
    step = case.args[3]
    with installed():
        payload = built("aiter.decode", wanted).plan(step)
    assert len(payload.at(16)) >= step.block_table.numel() * 16 + emulated.aiter.TILE


def test_two_plans_share_nothing() -> None:
    # requirement C4, C5, P36
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 20), (1, 30)))
    step = case.args[3]
    with installed():
        implementation = built("aiter.decode", wanted)
        first, second = implementation.plan(step), implementation.plan(step)
        assert first.scratch.data_ptr() != second.scratch.data_ptr()
        assert first.at(16).data_ptr() != second.at(16).data_ptr()
        kept = first.at(16).clone()
        step.block_table.add_(1)
        third = implementation.plan(step)
    assert torch.equal(first.at(16), kept)
    assert not torch.equal(third.at(16)[:50], kept[:50])


def test_rows_without_keys_look_before_the_scratch() -> None:
    # requirement E12
    wanted = request(graph=True)
    case = make_case(wanted, "decode", lengths=((1, 20), (1, 30)))
    with installed():
        payload = built("aiter.decode", wanted).plan(case.args[3])
    assert payload.scratch.storage_offset() >= 4


def test_caches_that_it_would_misread_are_refused() -> None:
    # requirement D8, P32
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 40),))
    q, k_cache, _, step = case.args
    odd = torch.empty(8 * 16 * 128 + 512, dtype=q.dtype).as_strided((8, 16, 2, 64), (16 * 128 + 8, 128, 64, 1))
    apart = torch.empty(8, 2, 16, 2, 64, dtype=q.dtype)[:, 0]
    for phase in ("extend", "decode"):
        with installed():
            implementation = built(f"aiter.{phase}", wanted)
            payload = implementation.plan(step)
            for k, v in ((odd, odd), (k_cache, apart)):
                with pytest.raises(ValueError, match="allocate_kv_cache"):
                    implementation(q, k, v, step, payload)


def test_queries_whose_heads_lie_apart_are_copied_as_declared() -> None:
    # requirement C7
    assert "q, where" in KERNELS["aiter.decode"].copies
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 20), (1, 30)))
    q, *rest = case.args
    wide = torch.cat([q, q], -1)[..., :64]
    with installed() as library:
        implementation = built("aiter.decode", wanted)
        payload = implementation.plan(case.args[3])
        assert torch.equal(implementation(wide, *rest, payload), implementation(q, *rest, payload))
    first, second = library.calls
    assert first.arguments["query"].stride(1) == second.arguments["query"].stride(1) == 64
    assert second.arguments["query"].data_ptr() == q.data_ptr()


def test_planning_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement P38
    wanted = request()
    case = make_case(wanted, "decode", lengths=((1, 20), (1, 30)))

    def waits(self: Any, *_: Any) -> Any:
        raise AssertionError("it waits for the device")

    with installed():
        made = {phase: built(f"aiter.{phase}", wanted) for phase in ("extend", "decode")}
        for method in ("item", "tolist", "cpu", "__bool__"):
            monkeypatch.setattr(torch.Tensor, method, waits)
        for implementation in made.values():
            implementation.plan(case.args[3])
        monkeypatch.undo()


def test_a_graph_captured_with_short_rows_serves_longer_ones() -> None:  # requirement E3, E12, P37
    wanted = request(phases=("decode",))
    with installed():
        steps = [([1, 1], [2, 9]), ([1, 1, 1], [100, 3, 128]), ([1], [60])]
        for out, right in replays(lambda r: built("aiter.decode", r), wanted, steps):
            torch.testing.assert_close(out, right, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_a_step_of_fewer_rows_than_its_plan_and_one_of_none(phase: str) -> None:  # requirement P37, D5
    wanted = request(phases=(phase,))
    with installed():
        for found, right in smaller_steps(lambda r: built(f"aiter.{phase}", r), wanted):
            torch.testing.assert_close(found, right, atol=2e-2, rtol=2e-2)
        paged, cache = built(f"aiter.{phase}", wanted), torch.zeros(2, 16, 2, 64, dtype=torch.bfloat16)
        for step, tokens in empty_steps(16):
            q = torch.zeros(tokens, 4, 64, dtype=torch.bfloat16)
            assert paged(q, cache, cache, step, paged.plan(step)).shape == (tokens, 4, 64)
