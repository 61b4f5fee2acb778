"""What an adapter binds for calls that are alike: the library's own function where nothing has to be converted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import hardware, nvidia
from emulated.library import Installed

from hal._attention import for_step
from hal._eligibility import _fields
from hal._plan import Buffers, make_step
from hal_nvidia import _flashinfer_pool as pool
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

BASE: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16", "phases": ("prefill",)}
KERNELS = ("fa2", "fa3", "fa4", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flashinfer_fa2", "flashinfer_fa3")


def built(library: str, **fields: Any) -> Any:
    heads = {"num_kv_heads": 4} if library == "sdpa_efficient" else {}
    return hardware.build(f"{library}.prefill", AttentionRequest(**{**BASE, **heads, **fields}))


def tensors(library: str, *sizes: int, dims: tuple[int, int] = (64, 64)) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads = (4, 4, 4) if library == "sdpa_efficient" else (4, 2, 2)
    return [torch.randn(*sizes, *each).half() for each in zip(heads, (dims[0], *dims), strict=True)]


@pytest.mark.parametrize("library", KERNELS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(7, 7), (1, 7), (3, 7), (7, 3), (0, 7), (7, 0), (1, 1)])
def test_a_dense_call_that_is_bound_gives_the_same(library: str, causal: bool, lengths: tuple[int, int]) -> None:
    # requirement B4, D15, X1
    """Also for views: heads first, and a slice of a wider tensor."""
    with nvidia.running_on("sm_90", library):
        prefill = built(library, causal=causal)
        q = tensors(library, 2, lengths[0])[0]
        k, v = tensors(library, 2, lengths[1])[1:]
        views = [torch.cat([x, x], -1)[..., :64].transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        for three in ((q, k, v), views):
            plain = prefill(*three)
            bound = prefill.for_dense(*three)(*three) if hasattr(prefill, "for_dense") else plain
            torch.testing.assert_close(bound, plain, atol=0, rtol=0)


@pytest.mark.parametrize(("library", "dims"), [*((name, (64, 64)) for name in KERNELS), ("sdpa_cudnn", (192, 128))])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("lens", [[5], [5, 5], [1, 1, 1], [4, 9, 2], [3, 0, 7], []])
@pytest.mark.parametrize("heads_first", [False, True])
def test_the_call_of_a_step_gives_the_same(
    heads_first: bool, library: str, dims: tuple[int, int], return_lse: bool, lens: list[int]
) -> None:  # requirement B10, D9, C7
    with nvidia.running_on("sm_90", library):
        prefill = built(library, return_lse=return_lse, head_dim=dims[0], v_head_dim=dims[1])
        step = make_step(lens, lens, torch.zeros(len(lens), 1, dtype=torch.int32), 16, torch.device("cpu"))
        q, k, v = tensors(library, sum(lens), dims=dims)
        q = q.transpose(0, 1).contiguous().transpose(0, 1) if heads_first else q
        bounds = {"max_seqlen_q": step.max_q_len, "max_seqlen_k": step.max_q_len}
        cumulative = {"cu_seqlens_q": step.cu_seqlens_q, "cu_seqlens_k": step.cu_seqlens_q}
        extras = {"return_lse": True} if return_lse else {}
        plain = prefill(q, k, v, **cumulative, **bounds, **extras)
        bound = for_step(prefill, step)(q, k, v, **extras)
        torch.testing.assert_close(bound, plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("library", ["fa2", "sdpa_flash"])
@pytest.mark.parametrize("lens", [[1, 0, 1], [0, 1], [1, 0, 0, 0], [1, 1, 1]], ids=str)
def test_a_bound_of_one_query_is_no_promise_of_one_in_every_row(library: str, lens: list[int]) -> None:
    # requirement D5, D9
    """flash-attention 2 reshapes q by the number of rows there, which fails where a row has none."""
    with nvidia.running_on("sm_90", library):
        prefill = built(library)
        cu = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0).int()
        bounds = {"cu_seqlens_q": cu, "cu_seqlens_k": cu * 3, "max_seqlen_k": 3}
        q, k, v = tensors(library, sum(lens))[0], *tensors(library, 3 * sum(lens))[1:]
        found, right = (prefill(q, k, v, max_seqlen_q=most, **bounds) for most in (1, 2))
        torch.testing.assert_close(found, right, atol=0, rtol=0)


def test_a_bound_call_of_flashinfer_follows_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:  # requirement C3, P36
    """Its plan's buffers are one stream's."""
    with nvidia.running_on("sm_90", "flashinfer_fa2"):
        prefill, three = built("flashinfer_fa2"), tensors("flashinfer_fa2", 2, 5)
        used: list[int] = []
        plain = prefill._planned

        def planned(*lengths: Any) -> Any:
            used.append(pool.stream_of(torch.device("cpu")))
            return plain(*lengths)

        monkeypatch.setattr(prefill, "_planned", planned)
        bound = prefill.for_dense(*three)
        first = bound(*three)
        for stream in (7, 7, 0, 7):
            monkeypatch.setattr(pool, "stream_of", lambda _, stream=stream: stream)
            torch.testing.assert_close(bound(*three), first, atol=0, rtol=0)
        assert used == [0, 7], "a plan a stream, and no more"


@pytest.mark.parametrize(("arch", "library"), [("sm_90", name) for name in KERNELS] + [("sm_120", "fmha_v2")])
@pytest.mark.parametrize("fields", [{}, {"return_lse": True}, {"head_dim": 256, "causal": False}], ids=str)
def test_the_call_of_a_step_in_a_plan_with_room_for_more_gives_the_same(
    arch: str, library: str, fields: dict[str, Any]
) -> None:  # requirement E12, P37
    """q, k and v are as long as the plan's buffers, and longer than their rows: what is behind them is nobody's."""
    kernel = hardware.kernel_named(f"{library}.prefill")
    heads = 4 if library == "sdpa_efficient" else 2
    request = AttentionRequest(**{**BASE, "num_kv_heads": heads, **fields})
    device = hardware.device_of(arch)
    if any(_fields(kernel, request)) or (kernel.check and list(kernel.check(request, device))):
        pytest.skip("not declared")
    with nvidia.running_on(arch, library):
        prefill = hardware.build(kernel, request, arch)
        buffers = Buffers(4, 40, 3, torch.device("cpu"))
        q, k, v = (torch.randn(40, n, request.head_dim).half() for n in (4, heads, heads))
        extras = {"return_lse": True} if request.return_lse else {}
        for lens in ([30, 2], [1, 0, 1], [1, 1, 1, 1], [3, 0, 0, 7]):
            step = make_step(lens, lens, torch.zeros(len(lens), 3, dtype=torch.int32), 16, torch.device("cpu"))
            found = for_step(prefill, buffers.fill(step))(q, k, v, **extras)
            right = for_step(prefill, step)(*(x[: sum(lens)] for x in (q, k, v)), **extras)
            for mine, wanted in zip(found, right, strict=True) if extras else ((found, right),):
                assert mine.shape[0] == 40
                torch.testing.assert_close(mine[: sum(lens)], wanted, atol=1e-3, rtol=1e-3)


def test_nothing_stands_before_flash_attention_3() -> None:  # requirement X1
    """A call that has nothing to convert is the library's own function, with the request's and the step's arguments."""
    with nvidia.running("fa3") as held:
        assert isinstance(held, Installed)
        import flash_attn_interface as library

        prefill, three = built("fa3"), tensors("fa3", 2, 5)
        assert prefill.for_dense(*three).func is library.flash_attn_func
        step = make_step([5], [5], [[0]], 16, torch.device("cpu"))
        assert prefill.for_step(step).func is library.flash_attn_varlen_func
        request = AttentionRequest(**{**BASE, "phases": ("decode",)}, page_size=16, kv_layout="NHD")
        payload = hardware.build("fa3.decode", request).plan(make_step([1], [9], [[0]], 16, torch.device("cpu")))
        assert payload.attend.func is library.flash_attn_with_kvcache


@pytest.mark.parametrize("above", [50.0, 120.0])
def test_a_sink_far_above_all_scores_is_the_lse(above: float) -> None:  # requirement B15
    """flash-attn 4 says +inf there: its sums are relative to the largest score."""
    with nvidia.running_on("sm_90", "fa4"):
        prefill = built("fa4", sinks=True, return_lse=True)
        q, k, v = tensors("fa4", 2, 5)
        sinks = torch.full((4,), above)
        out, lse = prefill(q, k, v, sinks=sinks, return_lse=True)
        torch.testing.assert_close(lse, sinks.expand(2, 5, 4))
        assert out.abs().max() < 1e-6


@pytest.mark.parametrize("library", ["fa3", "fa4"])
def test_without_keys_the_lse_is_the_sink(library: str) -> None:  # requirement B15
    with nvidia.running_on("sm_90", library):
        prefill = built(library, sinks=True, return_lse=True)
        q, (k, v) = tensors(library, 2, 5)[0], tensors(library, 2, 0)[1:]
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
        out, lse = prefill(q, k, v, sinks=sinks, return_lse=True)
        assert torch.equal(lse, sinks.expand(2, 5, 4))
        assert not out.any()


@pytest.mark.parametrize("phase", ["extend", "decode"])
@pytest.mark.parametrize("head_dim", [80, 96])
def test_unmasked_pages_that_flash_attn_4_copies_too_far_are_refused(phase: str, head_dim: int) -> None:
    # requirement D15, P22
    kernel = hardware.kernel_named(f"fa4.{phase}")
    device = hardware.device_of("sm_90")
    fields = {**BASE, "head_dim": head_dim, "page_size": 64, "kv_layout": "NHD", "phases": (phase,)}
    assert kernel.check is not None
    for more in ({}, {"causal": False, "window": (7, 3)}):
        assert not list(kernel.check(AttentionRequest(**{**fields, **more}), device))
    (reason,) = kernel.check(AttentionRequest(**fields, causal=False), device)
    assert "144 keys" in reason.text


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("lens", [((200,), (100,)), ((40, 7, 30), (20, 30, 0)), ((9, 0, 50), (0, 3, 0))], ids=str)
def test_queries_that_see_no_key_are_not_left_to_flashinfers_fa2(
    lens: tuple[tuple[int, ...], tuple[int, ...]], return_lse: bool
) -> None:  # requirement B15, D5
    """It masks too little where there are more queries than keys."""
    with nvidia.running_on("sm_90", "flashinfer_fa2"):
        request = AttentionRequest(**BASE, return_lse=return_lse)
        case = make_case(request, "prefill", lengths=list(zip(*lens, strict=True)))
        for comparison in case.check(hardware.build("flashinfer_fa2.prefill", request)):
            assert comparison.ok, str(comparison)
        if len(lens[0]) == 1:
            q, k, v = (torch.randn(2, n, h, 64).half() for n, h in ((200, 4), (100, 2), (100, 2)))
            prefill = hardware.build("flashinfer_fa2.prefill", request)
            apart = torch.cat([prefill(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(2)])
            torch.testing.assert_close(prefill.for_dense(q, k, v)(q, k, v), apart, atol=1e-3, rtol=1e-3)
