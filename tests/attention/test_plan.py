"""Plans: made once a step, without synchronisation, updated in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small_requests import SMALL

import hal
from hal._plan import make_step
from hal._portable import PortablePlatform
from hal.errors import DeviceError, InputError, WorkspaceError


@pytest.fixture
def planner(fake_platform: Any, attention_kernel: Any, kernel_module: Any) -> tuple[Any, list[Any]]:
    """A handle on a fake library whose decode kernel records every plan that it is asked for."""
    planned: list[Any] = []

    class Decode:
        def plan(self, step: Any) -> Any:
            planned.append(step)
            return ("payload of", step)

        def __call__(
            self, q: Any, k_cache: Any, v_cache: Any, step: Any, payload: Any, *, sinks: Any = None,
            alibi_slopes: Any = None, k_scale: Any = None, v_scale: Any = None, return_lse: bool = False,
        ) -> Any:  # fmt: skip
            assert payload == ("payload of", step)
            return q

    module = kernel_module(decode=lambda request, device: Decode())
    fake_platform(kernels=[attention_kernel("spy.decode", target=f"{module}:decode")])
    handle = hal.get_attention(**{**SMALL, "device": "fake", "page_size": 16}, phases=("decode",))
    return handle, planned


def test_step_tensors_and_plans_are_made_once_for_all_layers(planner: Any) -> None:  # requirement B10, A1, A3
    handle, planned = planner
    plan = handle.plan(q_lens=[1, 1], kv_lens=[5, 9], block_table=[[0], [1]])
    q, k = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    for _ in range(4):
        cache = handle.allocate_kv_cache(2)
        handle(q, k, k, cache=cache, plan=plan)
    assert len(planned) == 1
    step = planned[0]
    assert step.cu_seqlens_q.tolist() == [0, 1, 2]
    assert step.cu_seqlens_k.tolist() == [0, 5, 14]
    assert step.kv_lens.tolist() == [5, 9]
    assert step.slot_mapping.tolist() == [4, 16 + 8]
    assert {t.dtype for t in (step.cu_seqlens_q, step.cu_seqlens_k, step.kv_lens, step.block_table)} == {torch.int32}


def test_another_kernel_s_planner_is_never_asked(planner: Any) -> None:  # requirement A1, A2, P35
    _, planned = planner
    other = hal.get_attention(**{**SMALL, "device": "fake", "page_size": 16}, kernel="reference")
    plan = other.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
    other(torch.zeros(1, 4, 8), torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), cache=other.allocate_kv_cache(1), plan=plan)
    assert planned == []


def test_changed_lengths_in_the_same_tensor_are_seen(planner: Any) -> None:  # requirement C6
    handle, planned = planner
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    handle.plan(q_lens=[1, 1], kv_lens=lengths, block_table=[[0], [1]])
    lengths += 1
    handle.plan(q_lens=[1, 1], kv_lens=lengths, block_table=[[0], [1]])
    assert [s.kv_lens_host for s in planned] == [(5, 9), (6, 10)]


@pytest.mark.parametrize("kernel", ["torch_cpu", "reference"])
def test_host_lengths_cause_no_synchronisation(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:  # requirement P38
    handle = hal.get_attention(**SMALL, kernel=kernel)

    def synchronises(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the plan reads a tensor back")

    for name in ("item", "cpu", "tolist", "numpy", "__int__", "__bool__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, synchronises)
    for q_lens in ([1, 1], [3, 2]):
        handle.plan(q_lens=q_lens, kv_lens=[5, 7], block_table=[[0, 0], [0, 0]])


def test_a_table_on_a_device_is_read_for_debug_checks_alone() -> None:  # requirement P38
    """A meta tensor is one that cannot be read."""
    place = torch.device("meta")
    for dtype in (torch.int32, torch.int64):
        table = torch.zeros(2, 2, dtype=dtype, device=place)
        assert make_step([1, 1], [5, 7], table, 4, place).block_table.dtype == torch.int32
        with pytest.raises(NotImplementedError, match="meta tensor"):
            make_step([1, 1], [5, 7], table, 4, place, debug=True)


def addresses(plan: Any) -> list[int]:
    step = plan._step
    tensors = (step.cu_seqlens_q, step.cu_seqlens_k, step.kv_lens, step.block_table, step.slot_mapping)
    return [t.data_ptr() for t in tensors]


def test_a_plan_of_maximum_size_is_updated_in_place(planner: Any) -> None:  # requirement P37, E12
    handle, planned = planner
    table = torch.arange(12, dtype=torch.int32).reshape(4, 3)
    plan = handle.plan(q_lens=[1] * 4, kv_lens=[33, 9, 20, 40], block_table=table, max_batch=4)
    before = addresses(plan)
    plan.update(q_lens=[1, 1], kv_lens=[4, 17], block_table=table[:2, :2])
    assert addresses(plan) == before
    step = planned[-1]
    assert step.kv_lens.tolist() == [4, 17, 0, 0]
    assert step.cu_seqlens_q.tolist() == [0, 1, 2, 2, 2]
    assert step.cu_seqlens_k.tolist() == [0, 4, 21, 21, 21]
    assert step.block_table.tolist() == [[0, 1, 0], [3, 4, 0], [0, 0, 0], [0, 0, 0]]
    assert step.slot_mapping.tolist() == [3, 64, -1, -1]
    assert step.max_kv_len == 3 * 16


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"q_lens": [1] * 3, "kv_lens": [1] * 3, "block_table": [[0]] * 3}, "max_batch=3, and the plan was made for 2"),
        ({"q_lens": [1], "kv_lens": [33], "block_table": [[0, 1, 2]]}, "max_pages=3, and the plan was made for 2"),
    ],
)
def test_a_step_beyond_the_maximum_is_refused_and_changes_nothing(
    planner: Any, step: dict[str, Any], text: str
) -> None:  # requirement P37
    handle, _ = planner
    plan = handle.plan(q_lens=[1, 1], kv_lens=[5, 9], block_table=[[0, 1], [2, 3]], max_batch=2)
    with pytest.raises(InputError, match=text):
        plan.update(**step)
    assert plan._step.kv_lens.tolist() == [5, 9]


@pytest.fixture
def bounded(fake_platform: Any, attention_kernel: Any, kernel_module: Any) -> Any:
    """Handles on a fake library that declares graphs; every step that any of its phases is given is recorded."""
    planned: list[Any] = []

    class Paged:
        def plan(self, step: Any) -> Any:
            planned.append(step)
            return [step]

        def update(self, step: Any, payload: Any) -> Any:
            planned.append(step)
            payload[:] = [step]
            return payload

        def refuses(self, step: Any, payload: Any) -> str:
            return "seven rows are too many" if step.batch == 7 else ""

        def __call__(
            self, q: Any, k_cache: Any, v_cache: Any, step: Any, payload: Any, *, sinks: Any = None,
            alibi_slopes: Any = None, k_scale: Any = None, v_scale: Any = None, return_lse: bool = False,
        ) -> Any:  # fmt: skip
            return q

    class Prefill:
        def for_step(self, step: Any) -> Any:
            planned.append(step)

        def __call__(
            self, q: Any, k: Any, v: Any, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
            max_seqlen_q: Any = None, max_seqlen_k: Any = None, sinks: Any = None, alibi_slopes: Any = None,
            return_lse: bool = False,
        ) -> Any:  # fmt: skip
            return q

    module = kernel_module(paged=lambda request, device: Paged(), prefill=lambda request, device: Prefill())
    flag = {"graph": hal.OneOf(False, True)}
    kernels = [attention_kernel(f"spy.{p}", target=f"{module}:paged", fields=flag) for p in ("extend", "decode")]
    kernels.append(attention_kernel("spy.prefill", target=f"{module}:prefill", fields=flag))
    written = next(k for k in PortablePlatform().kernels() if k.name == "torch.kv_cache_write")
    changes = {"name": "spy.kv_cache_write", "fields": {**written.fields, **flag}}
    fake_platform(kernels=[*kernels, dataclasses.replace(written, **changes)])
    made = {**SMALL, "device": "fake", "page_size": 16, "max_q_len": 4}
    return made, planned


def test_a_plan_for_graphs_has_bounds_that_hold_for_every_later_step(bounded: Any) -> None:
    # requirement E3, E12, P37
    """In each phase: what a launch was captured with, it keeps."""
    made, planned = bounded
    sizes: dict[str, Any] = {"max_batch": 2, "max_tokens": 400, "max_pages": 20}
    table = torch.arange(40, dtype=torch.int32).view(2, 20)
    for phases, step, longest in (
        (("decode",), {"q_lens": [2, 2], "kv_lens": [2, 9]}, 4),
        (("extend",), {"q_lens": [2, 2], "kv_lens": [2, 9]}, 320),
        (("prefill", "decode"), {"q_lens": [5, 2], "kv_lens": [5, 2]}, 320),
    ):
        for graph in (False, True):
            handle = hal.get_attention(**made, graph=graph, phases=phases)
            plan = handle.plan(**step, block_table=table, **sizes)
            assert planned[-1].max_q_len == (longest if graph else max(step["q_lens"]))
            assert planned[-1].max_kv_len == 320
            plan.update(q_lens=[1], kv_lens=[1], block_table=table[:1]) if "extend" in phases else None
            assert planned[-1].max_q_len == (longest if graph else planned[-1].q_lens[0])
            whole = handle.plan(**step, block_table=table)
            assert planned[-1].max_q_len == max(step["q_lens"]), "a plan that keeps nothing is for its own step"
            assert whole.num_tokens == sum(step["q_lens"])


def test_a_call_over_the_cache_alone_that_a_graph_holds_keeps_its_payload(bounded: Any) -> None:
    # requirement E12, P37
    """Also of a plan over fresh keys, which is given one by that call."""
    made, _ = bounded
    handle = hal.get_attention(**made, graph=True, phases=("prefill", "extend"))
    plan = handle.plan(q_lens=[5, 2], kv_lens=[5, 2], block_table=[[0], [1]], max_batch=2, max_tokens=8)
    assert (plan.phase, plan._payload) == ("prefill", None)
    handle(torch.zeros(7, 4, 8), cache=handle.allocate_kv_cache(2), plan=plan)
    held = plan._payload
    plan.update(q_lens=[6], kv_lens=[6], block_table=[[1]])
    assert plan._payload is held
    assert held == [plan._step]
    assert plan._step.q_lens == (6, 0)


def test_what_a_kernel_refuses_changes_nothing(bounded: Any) -> None:  # requirement P37
    made, planned = bounded
    handle = hal.get_attention(**made, phases=("extend",))
    plan = handle.plan(q_lens=[2, 1], kv_lens=[5, 9], block_table=[[0], [1]], max_batch=8)
    with pytest.raises(InputError, match="seven rows are too many"):
        plan.update(q_lens=[1] * 7, kv_lens=[1] * 7, block_table=[[0]] * 7)
    assert len(planned) == 1
    assert plan._step.kv_lens.tolist() == [5, 9, 0, 0, 0, 0, 0, 0]


def test_updated_plans_give_right_answers_with_padding() -> None:  # requirement E12, P37
    handle = hal.get_attention(**SMALL)
    torch.manual_seed(0)
    cache = handle.allocate_kv_cache(8)
    table = [[3, 1], [0, 2], [5, 4]]
    plan = handle.plan(q_lens=[1] * 3, kv_lens=[1] * 3, block_table=table, max_batch=3)
    for lengths in ([1, 1, 1], [2, 2, 2], [3, 3]):
        rows = len(lengths)
        q, k, v = torch.randn(rows, 4, 8), torch.randn(rows, 2, 8), torch.randn(rows, 2, 8)
        step = {"q_lens": [1] * rows, "kv_lens": lengths, "block_table": table[:rows]}
        out = handle(q, k, v, cache=cache, plan=plan.update(**step))
        expected = handle(q, cache=cache, plan=handle.plan(**step))
        torch.testing.assert_close(out, expected)


MIXED: dict[str, list[tuple[list[int], list[int]]]] = {
    "extend": [
        ([3, 1, 2], [7, 4, 2]),
        ([1, 1, 1], [9, 2, 12]),
        ([5, 2, 1], [5, 2, 1]),
        ([1, 1], [1, 1]),
        ([0, 4], [0, 9]),
    ],
    "prefill": [([3, 1, 2], [3, 1, 2]), ([1, 1, 1], [1, 1, 1]), ([5], [5]), ([0, 4], [0, 4])],
}


@pytest.mark.parametrize("asked", [False, True], ids=["by its first step", "asked for"])
@pytest.mark.parametrize("kernel", ["torch_cpu", "reference"])
@pytest.mark.parametrize("phase", MIXED)
def test_a_plan_keeps_its_phase_for_all_that_its_kernel_can_serve(phase: str, kernel: str, asked: bool) -> None:
    # requirement P37
    """Rows of one token and prompts without a prefix among them, as batches that a captured graph is replayed with."""
    handle, other = hal.get_attention(**SMALL, kernel=kernel), hal.get_attention(**SMALL, kernel="reference")
    q_lens, kv_lens = ([1] * 3, [1] * 3) if asked else MIXED[phase][0]
    made = {"phase": phase} if asked or kernel == "reference" else {}
    table = torch.arange(9, dtype=torch.int32).reshape(3, 3)
    plan = handle.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=table, max_batch=3, max_tokens=8, **made)
    draw = torch.Generator().manual_seed(0)
    cache, right = handle.allocate_kv_cache(9), other.allocate_kv_cache(9)
    for held, like in ((cache.k, right.k), (cache.v, right.v)):
        like.copy_(held.copy_(torch.randn(held.shape, generator=draw)))
    for q_lens, kv_lens in MIXED[phase]:
        step = {"q_lens": q_lens, "kv_lens": kv_lens, "block_table": table[: len(q_lens)]}
        q, k, v = (torch.randn(sum(q_lens), heads, 8, generator=draw) for heads in (4, 2, 2))
        assert plan.update(**step).phase == phase
        assert plan.write == ("after" if phase == "prefill" else "before")
        wanted = other(q, k, v, cache=right, plan=other.plan(**step))
        torch.testing.assert_close(handle(q, k, v, cache=cache, plan=plan), wanted)
        torch.testing.assert_close(handle(q, cache=cache, plan=plan), wanted)
        assert torch.equal(cache.k, right.k)
        assert torch.equal(cache.v, right.v)


def test_a_plan_refuses_what_its_phase_cannot_serve() -> None:  # requirement P37
    handle = hal.get_attention(**SMALL)
    fresh: dict[str, Any] = {"q_lens": [3, 2], "kv_lens": [3, 2], "block_table": [[0], [1]]}
    plan = handle.plan(**fresh, max_batch=2, max_tokens=8)
    with pytest.raises(InputError, match="prefill attends to fresh keys alone, while row 1 has 1 in the cache"):
        plan.update(**{**fresh, "kv_lens": [3, 3]})
    assert plan._step.kv_lens.tolist() == [3, 2]
    for wrong, text in (
        ({"phase": "extnd"}, "phase='extnd': this handle has .*Did you mean 'extend'"),
        ({"phase": "decode"}, r"phase='decode' does not serve this step: .* up to 1 \(max_q_len\)"),
        ({"phase": "prefill", "kv_lens": [4, 2]}, "does not serve this step: .* row 0 has 1 in the cache"),
    ):
        with pytest.raises(InputError, match=text):
            handle.plan(**{**fresh, **wrong})
    latent = hal.get_mla_attention(num_q_heads=2, kv_lora_rank=16, qk_rope_head_dim=8, dtype="float32", device="cpu")
    assert latent.plan(q_lens=[1], kv_lens=[1], block_table=[[0]], phase="extend").phase == "extend"
    with pytest.raises(InputError, match="phase='prefill': this handle has extend, decode"):
        latent.plan(q_lens=[1], kv_lens=[1], block_table=[[0]], phase="prefill")


@pytest.mark.parametrize("kernel", ["torch_cpu", "reference"])
@pytest.mark.parametrize("phase", [*MIXED, "decode"])
def test_tokens_of_no_row_give_nothing(phase: str, kernel: str) -> None:  # requirement E12
    """q, k and v may keep the plan's largest size; what is in their tails is read by nobody."""
    handle = hal.get_attention(**SMALL, kernel=kernel, return_lse=True)
    q_lens, kv_lens = MIXED.get(phase, [([1, 1], [9, 2])])[0]
    step = {"q_lens": q_lens, "kv_lens": kv_lens, "block_table": torch.arange(9).reshape(3, 3)[: len(q_lens)]}
    plan, once = handle.plan(**step, max_batch=3, max_tokens=8, phase=phase), handle.plan(**step, phase=phase)
    n = plan.num_tokens
    q, k, v = (torch.randn(8, heads, 8) for heads in (4, 2, 2))
    for x in (q, k, v):
        x[n:] = torch.nan
    cache, other = handle.allocate_kv_cache(9), handle.allocate_kv_cache(9)
    out, lse = handle(q, k, v, cache=cache, plan=plan, return_lse=True)
    right, right_lse = handle(q[:n], k[:n], v[:n], cache=other, plan=once, return_lse=True)
    assert (out.shape, lse.shape) == ((8, 4, 8), (8, 4))
    assert torch.equal(out[:n], right)
    assert torch.equal(lse[:n], right_lse)
    assert bool((out[n:] == 0).all())
    assert bool((lse[n:] == -torch.inf).all())
    assert torch.equal(cache.k, other.k)
    assert torch.equal(handle(q, cache=cache, plan=plan), out)


def test_latents_of_no_row_give_nothing() -> None:  # requirement E12
    dims = {"num_q_heads": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "dtype": "float32", "page_size": 4}
    for kernel in ("torch_cpu", "reference"):
        handle = hal.get_mla_attention(**dims, device="cpu", kernel=kernel)
        cache = handle.allocate_kv_cache(9)
        for q_lens in ([1, 1], [3, 1]):
            step = {"q_lens": q_lens, "kv_lens": [5, 2], "block_table": [[0, 1], [2]]}
            q, latent, n = torch.randn(8, 2, 24), torch.randn(8, 24), sum(q_lens)
            out = handle(q, latent, cache=cache, plan=handle.plan(**step, max_batch=3, max_tokens=8))
            torch.testing.assert_close(out[:n], handle(q[:n], cache=cache, plan=handle.plan(**step)))
            assert out.shape == (8, 2, 16)
            assert bool((out[n:] == 0).all())


def test_a_plan_for_one_step_cannot_be_updated() -> None:
    handle = hal.get_attention(**SMALL)
    plan = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
    with pytest.raises(InputError, match="make it with max_batch="):
        plan.update(q_lens=[1], kv_lens=[2], block_table=[[0]])
    with pytest.raises(InputError, match="go with max_batch"):
        handle.plan(q_lens=[1], kv_lens=[1], block_table=[[0]], max_tokens=4)
    kept = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[0]], max_batch=1)
    with pytest.raises(
        InputError, match=r"for the decode phase, and decode serves equal q_lens up to 1 \(max_q_len\): make another"
    ):
        kept.update(q_lens=[2], kv_lens=[3], block_table=[[0]])


def test_workspaces_belong_to_a_device_and_freeze() -> None:  # requirement X13, C3
    here, there = hal.Workspace(torch.device("cpu")), hal.Workspace(torch.device("meta"))
    buffer = here.get("fa.decode", 128)
    assert here.get("fa.decode", 64) is buffer
    assert here.get("other", 64) is not buffer
    assert there.get("fa.decode", 128).device.type == "meta"
    here.freeze()
    assert here.get("fa.decode", 128) is buffer
    with pytest.raises(
        WorkspaceError, match=r"fa\.decode needs 256 bytes of scratch on cpu, has 128.*frozen"
    ) as caught:
        here.get("fa.decode", 256)
    assert caught.value.owner == "fa.decode"
    assert hal.workspace(torch.device("cpu")) is hal.workspace(torch.device("cpu"))
    assert hal.workspace(torch.device("cpu")) is not hal.workspace(torch.device("meta"))


def test_a_device_has_one_workspace_whatever_it_is_called(fake_platform: Any) -> None:  # requirement X13
    handle = hal.get_attention(**SMALL)
    pool = hal.workspace(torch.device("cpu"))
    for same in (torch.device("cpu", 0), "cpu", "cpu:0", handle.device, handle, torch.zeros(1)):
        assert hal.workspace(same) is pool
    assert pool.get("one", 8).device == torch.device("cpu")
    current = hal.workspace(torch.device("xpu"))
    assert hal.workspace(torch.device("xpu", 0)) is current is not hal.workspace(torch.device("xpu", 1))
    for wrong in (True, 1.5, b"cpu", ["cpu"]):
        with pytest.raises(InputError, match=r"device=.*: give a hal\.Device, a torch\.device, or the name"):
            hal.workspace(wrong)
    with pytest.raises(DeviceError, match="There is no device 'gpu'"):
        hal.workspace("gpu")


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"max_tokens": 0}, "max_tokens=0: give at least 1"),
        ({"max_pages": 0}, "max_pages=0: give at least 1"),
        ({"max_batch": 0}, "max_batch=0: give at least 1"),
        ({"max_batch": 2.0}, r"max_batch=2\.0: give a whole number"),
        ({"max_batch": True}, "max_batch=True: give a whole number"),
        ({"max_batch": "2"}, "max_batch='2': give a whole number"),
        ({"max_tokens": 4.5}, r"max_tokens=4\.5: give a whole number"),
        ({"max_pages": "1"}, "max_pages='1': give a whole number"),
    ],
)
def test_sizes_that_are_none(sizes: dict[str, Any], text: str, latent: bool) -> None:  # requirement P24
    dims = {"num_q_heads": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "dtype": "float32", "device": "cpu"}
    handle: Any = hal.get_mla_attention(**dims) if latent else hal.get_attention(**SMALL)
    step = {"q_lens": [1, 1], "kv_lens": [3, 2], "block_table": [[0], [1]]}
    with pytest.raises(InputError, match=text):
        handle.plan(**step, **{"max_batch": 2, **sizes})
    with pytest.raises(InputError, match=r"num_pages=2\.5: give a whole number of at least 1"):
        handle.allocate_kv_cache(2.5)
    plan = handle.plan(**step, max_batch=torch.tensor(2), max_tokens=2)
    assert plan._buffers.sizes == {"max_batch": 2, "max_tokens": 2, "max_pages": 1}
