"""flash-attention 3's plan: made by its own planner, once a step, of the right size, and by nobody else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import flash_attn_2, flash_attn_3, hardware, library, nvidia
from emulated.library import Installed

import hal
from hal._plan import Buffers, make_step
from hal.errors import InputError, PlanMismatchError
from hal_nvidia import _flash_attn_3_sizes as sizes
from hal_ops.attention import AttentionRequest, Step
from hal_ops.attention.cases import make_case

BASE: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}
PLANNER, KERNEL = "get_scheduler_metadata", "flash_attn_with_kvcache"


@pytest.fixture
def fa3() -> Iterator[Installed]:
    hal.reset()
    with nvidia.running("fa3") as held:
        assert held is not None
        yield held
    hal.reset()


def handle(**fields: Any) -> hal.Attention:
    given = {**BASE, "page_size": 16, "kernel": "fa3", **fields}
    return hal.get_attention(**given, device=hardware.device_of("sm_90"))


def plan_of(attention: hal.Attention, **sizes: Any) -> Any:
    return attention.plan(q_lens=[2, 1], kv_lens=[20, 9], block_table=[[0, 1, 2], [3, 0, 0]], **sizes)


def attend(attention: hal.Attention, plan: Any) -> torch.Tensor:
    cache = attention.allocate_kv_cache(8)
    out: torch.Tensor = attention(torch.randn(3, 4, 64).half(), cache=cache, plan=plan)
    return out


def test_one_plan_serves_all_layers(fa3: Installed) -> None:  # requirement A1, A3, B10
    attention = handle()
    plan = plan_of(attention)
    for _ in range(3):
        attend(attention, plan)
    assert len(fa3.called(PLANNER)) == 1
    metadata = [call.arguments["scheduler_metadata"] for call in fa3.called(KERNEL)]
    assert len(metadata) == 3
    assert all(found is plan._payload.metadata for found in metadata)


def test_the_planner_and_the_kernel_are_told_the_same(fa3: Installed) -> None:  # requirement A3, E3, E4
    attention = handle(window=16, softcap=20.0)
    attend(attention, plan_of(attention))
    planned, launched = fa3.called(PLANNER)[0].arguments, fa3.called(KERNEL)[0].arguments
    assert planned["max_seqlen_k"] == launched["page_table"].shape[1] * 16 == 48
    assert planned["max_seqlen_q"] == launched["max_seqlen_q"] == 2
    for name in ("causal", "window_size", "num_splits", "attention_chunk", "pack_gqa", "sm_margin"):
        assert planned[name] == launched[name]
    assert planned["cache_seqlens"] is launched["cache_seqlens"]
    assert (planned["has_softcap"], launched["softcap"]) == (True, 20.0)


@pytest.mark.parametrize(
    ("fields", "dtype", "v_dim"),
    [
        ({}, torch.float16, 64),
        ({"dtype": "bfloat16"}, torch.bfloat16, 64),
        ({"v_head_dim": 512}, torch.float16, 512),
        ({"dtype": "bfloat16", "kv_dtype": "float8_e4m3fn", "fp8_query": True}, torch.float8_e4m3fn, 64),
    ],
    ids=["plain", "bfloat16", "v_head_dim", "fp8"],
)
def test_the_planner_is_told_the_formats_that_are_launched(
    fields: dict[str, Any], dtype: torch.dtype, v_dim: int, fa3: Installed
) -> None:  # requirement A3, C4, E4
    """Its tiles, and with them the splits of a row, depend on the bytes of a number and on both head dims."""
    request = AttentionRequest(**{**BASE, **fields}, page_size=16, kv_layout="NHD", phases=("decode",))
    case = make_case(request, "decode")
    assert all(comparison.ok for comparison in case.check(hardware.build("fa3.decode", request)))
    planned, launched = fa3.called(PLANNER)[-1].arguments, fa3.called(KERNEL)[-1].arguments
    assert planned["qkv_dtype"] == launched["q"].dtype == launched["k_cache"].dtype == dtype
    assert planned["headdim_v"] == launched["v_cache"].shape[-1] == v_dim
    assert (planned["headdim"], planned["page_size"]) == (launched["q"].shape[-1], launched["k_cache"].shape[1])
    assert (planned["num_heads_q"], planned["num_heads_kv"]) == (launched["q"].shape[-2], launched["k_cache"].shape[-2])


def test_lengths_are_tokens(fa3: Installed) -> None:  # requirement D9
    attention = handle()
    attend(attention, plan_of(attention))
    launched = fa3.called(KERNEL)[0].arguments
    assert launched["cache_seqlens"].tolist() == [20, 9]
    assert launched["cu_seqlens_q"].tolist() == [0, 2, 3]


def test_a_buffered_plan_is_made_for_the_padded_width(fa3: Installed) -> None:  # requirement E3, E12, P37
    request = AttentionRequest(**BASE, page_size=16, kv_layout="NHD", graph=True, phases=("decode",))
    implementation = hardware.build("fa3.decode", request)
    buffers = Buffers(4, 4, 8, torch.device("cpu"))

    def step(kv_lens: list[int]) -> Step:
        table = [[row, row + 1] for row in range(len(kv_lens))]
        return buffers.fill(make_step([1] * len(kv_lens), kv_lens, table, 16, torch.device("cpu")))

    schedule = implementation.plan(step([20, 9]))
    address, size = schedule.metadata.data_ptr(), schedule.metadata.numel()
    assert implementation.update(step([5]), schedule) is schedule
    assert (schedule.metadata.data_ptr(), schedule.metadata.numel()) == (address, size)
    for call in fa3.called(PLANNER):
        assert (call.arguments["batch_size"], call.arguments["max_seqlen_k"]) == (4, 128)
    assert fa3.called(PLANNER)[1].arguments["cache_seqlens"].tolist() == [5, 0, 0, 0]
    with pytest.raises(InputError, match="max_batch=5"):
        step([1] * 5)


def test_lengths_that_change_in_place_are_seen(fa3: Installed) -> None:  # requirement C6
    attention = handle()
    plan = attention.plan(q_lens=[1], kv_lens=[20], block_table=[[0, 1]], max_batch=1)
    cache = attention.allocate_kv_cache(2)
    cache.k.copy_(torch.randn(cache.k.shape))
    cache.v.copy_(torch.randn(cache.v.shape))
    q = torch.randn(1, 4, 64).half()
    first = attention(q, cache=cache, plan=plan)
    plan.update(q_lens=[1], kv_lens=[3], block_table=[[0, 1]])
    assert not torch.equal(first, attention(q, cache=cache, plan=plan))
    assert [c.arguments["cache_seqlens"].tolist() for c in fa3.called(KERNEL)] == [[3], [3]], "one buffer, two values"


CHANGES: tuple[dict[str, Any], ...] = (
    {"num_q_heads": 8},
    {"num_kv_heads": 4},
    {"head_dim": 128},
    {"dtype": "bfloat16"},
    {"page_size": 32},
    {"causal": False},
    {"window": 8},
    {"softcap": 9.0},
    {"deterministic": True},
)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_whatever_shapes_the_plan_reaches_the_planner(change: dict[str, Any], fa3: Installed) -> None:
    # requirement C4, C5, P36
    told = []
    for fields in ({}, change):
        plan_of(handle(**fields))
        told.append({n: v for n, v in fa3.called(PLANNER)[-1].arguments.items() if not isinstance(v, torch.Tensor)})
    assert told[0] != told[1]


def test_equal_layers_share_a_handle_and_others_do_not(fa3: Installed) -> None:  # requirement C5
    assert handle(window=8) is handle(window=8)
    assert handle(window=8) is not handle(window=16)


def test_a_plan_is_refused_by_another_library(fa3: Installed) -> None:  # requirement P35, C1
    with library.installed(
        "flash-attn", "2.8.3", flash_attn_2.FUNCTIONS, adapters=["hal_nvidia._flash_attn_2"],
        modules=["flash_attn_2_cuda"],
    ) as other, hal.simulate(libraries={"torch": "2.13", "flash-attn": "2.8.3", "flash-attn-3": "3.0.0"}):  # fmt: skip
        plan = plan_of(handle())
        second = handle(kernel="fa2", page_size=256)
        with pytest.raises(PlanMismatchError):
            attend(second, plan)
        assert other.calls == []


def test_a_forced_library_is_the_only_one_called(fa3: Installed) -> None:  # requirement C1, P34, A1, A2
    """In each phase; the planner of flash-attention 3 is its own affair, and others are given nothing of it."""
    with library.installed(
        "flash-attn", "2.8.3", flash_attn_2.FUNCTIONS, adapters=["hal_nvidia._flash_attn_2"],
        modules=["flash_attn_2_cuda"],
    ) as other, hal.simulate(libraries={"torch": "2.13", "flash-attn": "2.8.3", "flash-attn-3": "3.0.0"}):  # fmt: skip
        attention = handle(kernel="fa2", page_size=256)
        cache = attention.allocate_kv_cache(4)
        q, k, v = (torch.randn(6, h, 64).half() for h in (4, 2, 2))
        attention(q[None], k[None], v[None])
        for q_lens, kv_lens in (([4, 2], [9, 2]), ([1, 1], [10, 3])):
            plan = attention.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=[[0], [1]])
            n = sum(q_lens)
            attention(q[:n], k[:n], v[:n], cache=cache, plan=plan)
        assert fa3.calls == []
        assert {c.function.partition(":")[2] for c in other.calls} == {
            "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"
        }  # fmt: skip


def test_the_plan_changes_nothing(fa3: Installed) -> None:  # requirement A6
    request = AttentionRequest(**BASE, page_size=16, kv_layout="NHD", phases=("decode",))
    case = make_case(request, "decode")
    implementation = hardware.build("fa3.decode", request)
    step = case.args[3]
    schedule = implementation.plan(step)
    planned = implementation(*case.args, schedule)
    schedule.metadata = None
    torch.testing.assert_close(implementation(*case.args, schedule), planned)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_size_is_that_of_the_launch(dim: int) -> None:  # requirement E4
    """Our formula and the emulation's, which was written from the launch's code, agree near every boundary."""
    for batch, longest, width, causal in itertools.product((1, 4, 5, 129), (1, 2, 33), (16, 64, 4096), (True, False)):
        for left, right in ((None, None), (width - 2, 0), (width - 1, 0), (7, None), (None, longest - 1), (None, 5)):
            request = AttentionRequest(
                num_q_heads=2, num_kv_heads=1, head_dim=dim, causal=causal, window=(left, right), page_size=16,
                kv_layout="NHD",
            )  # fmt: skip
            mine = sizes.metadata_sizes(request, batch, longest, width, hopper=True)
            sides = tuple(-1 if side is None else side for side in request.window)
            assert mine == {flash_attn_3.metadata_size(batch, causal, sides, longest, width, dim)}


def test_metadata_of_another_size_is_an_error_before_the_launch(
    fa3: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement E4
    attention = handle()
    monkeypatch.setattr(
        "hal_nvidia._flash_attn_3.get_scheduler_metadata", lambda *args, **kwargs: torch.zeros(7, dtype=torch.int32)
    )
    with pytest.raises(ValueError, match=r"metadata of 7 numbers for 2 rows .*, and the launch takes 17"):
        plan_of(attention)
    assert fa3.called(KERNEL) == []


@pytest.mark.parametrize(
    ("window", "causal", "told"),
    [(None, True, (-1, -1)), (16, True, (15, 0)), ((3, 5), False, (3, 5)), ((None, 2), False, (-1, 2))],
)
def test_windows_are_told_as_the_library_counts_them(
    window: Any, causal: bool, told: tuple[int, int], fa3: Installed
) -> None:  # requirement E8, C11
    attention = handle(window=window, causal=causal)
    attend(attention, plan_of(attention))
    assert fa3.called(KERNEL)[0].arguments["window_size"] == told
    assert fa3.called(KERNEL)[0].arguments["softcap"] == 0.0


def test_steps_without_queries_or_keys_launch_nothing(fa3: Installed) -> None:  # requirement D5
    attention = handle()
    plan = attention.plan(q_lens=[0, 0], kv_lens=[0, 0], block_table=[[], []])
    out = attention(torch.zeros(0, 4, 64).half(), cache=attention.allocate_kv_cache(1), plan=plan)
    assert out.shape == (0, 4, 64)
    assert fa3.calls == []


def test_sinks_go_where_the_signature_has_them(fa3: Installed) -> None:  # requirement D11
    request = AttentionRequest(**{**BASE, "dtype": "bfloat16"}, sinks=True, phases=("prefill",))
    with pytest.raises(ValueError, match="takes no sinks"):
        hardware.build("fa3.prefill", request)
    with nvidia.running("fa3", "tokenspeed-fa3") as held:
        assert held is not None
        prefill = hardware.build("fa3.prefill", request)
        x = torch.zeros(1, 3, 4, 64).bfloat16()
        prefill(x, x[:, :, :2], x[:, :, :2], sinks=torch.ones(4))
        assert held.calls[0].passed["sinks"].dtype == torch.bfloat16
        assert "sinks" not in fa3.calls[0].passed if fa3.calls else True
