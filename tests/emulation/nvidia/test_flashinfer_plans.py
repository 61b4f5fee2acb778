"""flashinfer's plans: a wrapper each, made from host lengths, on buffers of its stream or of its graph."""

from __future__ import annotations

import contextlib
import gc
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import flashinfer, hardware, library, signatures
from emulated.library import Installed

import hal
from hal._plan import Buffers, make_step
from hal_nvidia import _flashinfer_pool as pool
from hal_nvidia import flashinfer_kernels
from hal_nvidia._flashinfer_tables import page_tables
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

KERNELS = {k.name: k for k in flashinfer_kernels.KERNELS}
PAGED = [name for name in KERNELS if not name.endswith("prefill")]
BASE: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "kv_layout": "NHD"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    yield
    gc.collect()
    pool._idle.clear()


@contextlib.contextmanager
def running(arch: str = "sm_90") -> Iterator[Installed]:
    version = signatures.versions(flashinfer.LIBRARY)[-1]
    functions = flashinfer.emulations(version, arch)
    with hal.simulate(libraries={}), library.installed(flashinfer.LIBRARY, version, functions) as held:
        yield held


def made(name: str, **fields: Any) -> tuple[AttentionRequest, Any]:
    sinks = {"sinks": True} if "sink" in name else {}
    request = AttentionRequest(**{**BASE, **sinks, **fields}, phases=(KERNELS[name].phase,))
    return request, hardware.build(KERNELS[name], request)


def plans_of(held: Installed) -> list[Any]:
    return [c for c in held.calls if c.function.endswith(".plan")]


@pytest.mark.parametrize("name", PAGED)
def test_a_plan_is_made_from_host_lengths_alone(name: str) -> None:  # requirement P38, B10, D9
    """What a step has on the device, beside its block table, is not even looked at."""
    with running():
        request, paged = made(name)
        case = make_case(request, KERNELS[name].phase)
        step = case.args[3]
        unreadable = types.SimpleNamespace()
        for field in ("cu_seqlens_q", "cu_seqlens_k", "kv_lens"):
            setattr(step, field, unreadable)
        payload = paged.plan(step)
        assert payload.wrapper is not None


def test_tables_count_tokens_and_pages() -> None:  # requirement D9, D1
    table = torch.tensor([[7, 3, 99], [5, -1, -1], [2**31 - 1] * 3, [0, 1, 2]], dtype=torch.int32)
    step = make_step([1, 1, 0, 2], [17, 16, 0, 48], table, 16, CPU)
    tables = page_tables(step, tail=False)
    assert tables.qo_indptr.tolist() == [0, 1, 2, 2, 4]
    assert tables.kv_indptr.tolist() == [0, 2, 3, 3, 6]
    assert tables.indices.tolist() == [7, 3, 5, 0, 1, 2]
    assert tables.last_page_len.tolist() == [1, 16, 0, 16]
    assert tables.seq_lens.tolist() == [17, 16, 0, 48]
    assert {t.dtype for t in (tables.qo_indptr, tables.kv_indptr, tables.indices, tables.last_page_len)} == {
        torch.int32
    }


def test_a_tail_row_takes_what_a_step_of_fixed_size_has_room_for() -> None:  # requirement P37, E12
    most = Buffers(4, 9, 3, CPU)
    step = most.fill(make_step([3, 1], [17, 5], [[1, 0, 0], [2, 0, 0]], 16, CPU))
    tables = page_tables(step, tail=True)
    assert tables.qo_indptr.tolist() == [0, 3, 4, 4, 4, 9]
    assert tables.kv_indptr.tolist() == [0, 2, 3, 3, 3, 3]
    assert tables.last_page_len.tolist() == [1, 5, 0, 0, 0]
    assert tables.tokens == 9


@pytest.mark.parametrize("name", PAGED)
def test_plans_do_not_share_their_wrapper(name: str) -> None:  # requirement C3, C5, C6, P36
    with running():
        request, paged = made(name)
        phase = KERNELS[name].phase
        cases = [make_case(request, phase, seed=s, lengths=[(1, 9), (1, 20 + s)]) for s in range(2)]
        payloads = [paged.plan(case.args[3]) for case in cases]
        assert payloads[0].wrapper is not payloads[1].wrapper
        for case, payload in zip(cases, payloads, strict=True):
            fixed = types.SimpleNamespace(plan=lambda step, payload=payload: payload)
            bound = _Bound(paged, fixed.plan)
            assert all(c.ok for c in case.check(bound))


class _Bound:
    """An implementation with a plan that is there already."""

    def __init__(self, implementation: Any, plan: Any) -> None:
        self._implementation, self.plan = implementation, plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._implementation(*args, **kwargs)


def test_a_wrapper_is_used_again_by_its_own_kind_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement C3, C4, P36
    with running():
        request, paged = made("flashinfer_fa2.extend")
        step = make_case(request, "extend").args[3]
        one = paged.plan(step)
        wrapper = one.wrapper
        del one
        gc.collect()
        assert paged.plan(step).wrapper is wrapper, "the same handle, stream and device"
        _, decode = made("flashinfer_fa2.decode")
        _, other_layout = made("flashinfer_fa2.extend", kv_layout="HND")
        others = [decode.plan(make_case(request.replace(phases=("decode",)), "decode").args[3])]
        others += [other_layout.plan(step)]
        monkeypatch.setattr(pool, "stream_of", lambda device: 77)
        others += [paged.plan(step)]
        assert all(o.wrapper is not wrapper for o in others)
        assert others[-1].wrapper._float_workspace_buffer.data_ptr() != wrapper._float_workspace_buffer.data_ptr()


def test_buffers_of_a_wrapper_whose_copies_are_queued_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page-locked buffer of a plan is read when the stream gets there: until then nobody may fill it."""
    copied = types.SimpleNamespace(query=lambda: False, synchronize=lambda: waits.append(1))
    waits: list[int] = []
    monkeypatch.setattr(pool, "_mark", lambda device: copied)
    with running():
        request, paged = made("flashinfer_fa2.extend")
        case = make_case(request, "extend")
        one = paged.plan(case.args[3])
        queued = one.wrapper
        del one
        gc.collect()
        two = paged.plan(case.args[3])
        assert two.wrapper is not queued
        assert waits == []
        assert paged.update(case.args[3], two) is two
        assert waits == [1], "an update in place has to wait for the copies of the plan before"


def test_two_handles_in_two_threads() -> None:  # requirement C3, P36, D14
    with running():
        jobs = [("flashinfer_fa2.extend", {"window": (15, 0)}), ("flashinfer_fa3.extend", {"softcap": 20.0})]
        bound = [(name, *made(name, **fields)) for name, fields in jobs]
        found: list[bool] = []

        def work(name: str, request: AttentionRequest, paged: Any) -> None:
            cases = [make_case(request, "extend", seed=s, lengths=[(3, 9 + s), (1, 40)]) for s in range(3)]
            for _ in range(3):
                found.extend(all(c.ok for c in case.check(paged)) for case in cases)

        threads = [threading.Thread(target=work, args=job) for job in bound]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 18
    assert all(found)


@pytest.mark.parametrize("name", PAGED)
def test_a_plan_of_fixed_size_is_updated_in_place(name: str) -> None:  # requirement P37, P38, E12, C6
    phase = KERNELS[name].phase
    with running():
        request, paged = made(name, graph=True)
        lengths = {"decode": [(1, 40), (1, 33), (1, 5)], "extend": [(9, 40), (1, 33), (4, 16)]}[phase]
        case = make_case(request, phase, lengths=lengths)
        q, k, v, step = case.args
        most = Buffers(4, 20 if phase == "extend" else 4, step.block_table.shape[1], CPU)
        payload = paged.plan(most.fill(step))
        addresses = {n: t.data_ptr() for n, t in payload.wrapper._graph.items()}
        for rows in (slice(0, 3), slice(1, 3), slice(0, 1)):
            first, end = sum(step.q_lens[: rows.start]), sum(step.q_lens[: rows.stop])
            part = make_step(step.q_lens[rows], step.kv_lens_host[rows], step.block_table[rows], 16, CPU)
            fixed = most.fill(part)
            assert paged.update(fixed, payload) is payload
            assert {n: t.data_ptr() for n, t in payload.wrapper._graph.items()} == addresses
            padded = torch.full((most.sizes["max_tokens"], *q.shape[1:]), 9.0).to(q.dtype)
            padded[: end - first] = q[first:end]
            whole = paged(padded, k, v, fixed, payload, **case.kwargs)
            short = paged(q[first:end], k, v, fixed, payload, **case.kwargs)
            _, plain = made(name)
            right = plain(q[first:end], k, v, part, plain.plan(part), **case.kwargs)
            assert torch.equal(short, right)
            assert torch.equal(whole[: end - first], right)
        with pytest.raises(ValueError, match="the plan is for"):
            paged(torch.cat([padded, padded]), k, v, fixed, payload, **case.kwargs)


def test_graphs_have_work_buffers_of_their_own() -> None:  # requirement C3
    with running():
        request, paged = made("flashinfer_fa2.decode", graph=True)
        step = make_case(request, "decode").args[3]
        buffers = [paged.plan(step).wrapper._float_workspace_buffer for _ in range(2)]
        assert buffers[0].data_ptr() != buffers[1].data_ptr()
        _, eager = made("flashinfer_fa2.decode")
        assert eager.plan(step).wrapper._float_workspace_buffer.data_ptr() not in {b.data_ptr() for b in buffers}


def test_the_workspace_does_not_grow_once_it_is_frozen() -> None:  # requirement X13
    with running():
        request, paged = made("flashinfer_fa2.extend", num_q_heads=64, num_kv_heads=1)
        scratch = hal.workspace(CPU)
        step = make_case(request, "extend").args[3]
        scratch.freeze()
        try:
            paged.plan(step)
            with pytest.raises(hal.errors.WorkspaceError, match="flashinfer, stream 0x0 needs"):
                pool.scratch(CPU, 0, 1 << 33)
        finally:
            scratch.thaw()


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_a_step_s_prefill_is_planned_once_for_all_layers(backend: str) -> None:  # requirement B10, C6
    with running() as held:
        request, prefill = made(f"flashinfer_{backend}.prefill", return_lse=True)
        case = make_case(request, "prefill", lengths=[(5, 5), (17, 17)])
        step = make_step([5, 17], [5, 17], [[0, 0], [1, 2]], 16, CPU)
        before = len(plans_of(held))
        layer = prefill.for_step(step)
        assert all(comparison.ok for _ in range(3) for comparison in case.check(layer))
        assert len(plans_of(held)) == before + 1
        assert all(c.ok for c in case.check(prefill))
        wider = [torch.cat([x, x[:3]]) for x in case.args]
        out, lse = layer(*wider, return_lse=True)
        assert torch.equal(out[:22], case.call(layer)["out"])
        assert not out[22:].any()
        assert (lse[22:] == -torch.inf).all()
        with pytest.raises(ValueError, match="the plan is for 22"):
            layer(*(x[:3] for x in case.args))


def test_lengths_that_change_in_place_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:  # requirement C4, C6
    with running() as held:
        request, prefill = made("flashinfer_fa2.prefill")
        q, k, v = make_case(request, "prefill", lengths=[(9, 9), (7, 7)]).args
        cu = torch.tensor([0, 9, 16], dtype=torch.int32)
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 16, "max_seqlen_k": 16}
        first = prefill(q, k, v, **lengths)
        cu[1] = 4
        second = prefill(q, k, v, **lengths)
        assert not torch.equal(first, second)
        assert torch.equal(second[4:], prefill(q[None, 4:], k[None, 4:], v[None, 4:])[0])
        before = len(plans_of(held))
        for batch, length in ((1, 16), (2, 8), (1, 16), (2, 8)):
            dense = prefill(*(x.view(batch, length, *x.shape[1:]) for x in (q, k, v)))
            assert dense.shape[:2] == (batch, length)
        assert len(plans_of(held)) == before + 2, "a shape is planned once"
        monkeypatch.setattr(pool, "stream_of", lambda device: 77)
        prefill(q[None], k[None], v[None])
        assert len(plans_of(held)) == before + 3, "and once a stream"


@pytest.mark.parametrize("name", [n for n in KERNELS if n.startswith("flashinfer_fa")])
def test_a_step_without_tokens(name: str) -> None:
    with running():
        _, implementation = made(name, return_lse=True)
        q = torch.empty(0, 4, 64, dtype=torch.bfloat16)
        cache = torch.zeros(2, 16, 2, 64, dtype=torch.bfloat16)
        step = make_step([], [], torch.zeros(0, 1, dtype=torch.int32), 16, CPU)
        if name.endswith("prefill"):
            out, lse = implementation.for_step(step)(q, q[:, :2], q[:, :2], return_lse=True)
        else:
            out, lse = implementation(q, cache, cache, step, implementation.plan(step), return_lse=True)
        assert out.shape == (0, 4, 64)
        assert lse.shape == (0, 4)
        assert lse.dtype == torch.float32


def test_a_compiler_that_fails_is_found_when_the_kernel_is_bound() -> None:  # requirement P25, P45, B1
    with running():
        request = AttentionRequest(**BASE, phases=("extend",))
        with (
            library.installed(flashinfer.LIBRARY, "0.6.13", _without_compiler()),
            pytest.raises(RuntimeError, match="nvcc"),
        ):
            hardware.build(KERNELS["flashinfer_fa2.extend"], request)


def _without_compiler() -> dict[str, Any]:
    functions = flashinfer.emulations("0.6.13", "sm_90")

    def plan(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Could not find nvcc")

    functions[flashinfer.PAGED].plan = plan
    return functions
