"""Habits of the libraries that an adapter must know, one by one: what the library does, and what becomes of it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import flash_attn_4, hardware, nvidia, operators, torch_attention

import hal
import hal_nvidia
from hal._attention import for_step
from hal._plan import make_step
from hal_nvidia import _sdpa_cudnn
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import AttentionCase, make_case
from hal_ops.mla_attention import MlaAttentionRequest

BASE: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}
EMPTY = [(9, 4), (3, 3), (7, 0)]
FIRST_AND_LAST = [*range(5), *range(12, 19)]
"""Rows of ``EMPTY`` that see no key under a causal mask."""


def built(name: str, arch: str = "sm_90", **fields: Any) -> tuple[AttentionRequest, Any]:
    phase = name.partition(".")[2].partition("_")[0]
    request = AttentionRequest(**{**BASE, "page_size": 256, "kv_layout": "NHD", **fields}, phases=(phase,))
    return request, hardware.build(name, request, arch)


def fresh(request: AttentionRequest) -> AttentionCase:
    return make_case(request, "prefill", lengths=EMPTY)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[(9, 4)] * 2, [(5, 1)], [(9, 4), (3, 3), (7, 0)]], ids=str)
def test_fmha_v2_is_told_of_no_fewer_keys_than_queries(causal: bool, lengths: list[tuple[int, int]]) -> None:
    # requirement B15, E8
    """It asserts that, where asserts are compiled in. Dense where all lengths are the same, else ragged."""
    with nvidia.running_on("sm_120", "fmha_v2") as held:
        request, prefill = built("fmha_v2.prefill", "sm_120", causal=causal)
        case = make_case(request, "prefill", lengths=lengths)
        assert all(comparison.ok for comparison in case.check(prefill))
        if len(set(lengths)) == 1:
            q, k, v = (x.view(len(lengths), -1, *x.shape[1:]) for x in case.args)
            assert torch.equal(prefill(q, k, v).flatten(0, 1), case.call(prefill)["out"])
    assert held is not None
    for call in held.called("trtllm_fmha_v2_prefill"):
        assert call.passed["max_kv_len"] >= call.passed["max_q_len"] == max(n for n, _ in lengths)


def test_flash_attention_2_says_plus_infinity_where_no_key_is_seen() -> None:  # requirement B15
    with nvidia.running("fa2") as held:
        assert held is not None
        request, prefill = built("fa2.prefill", return_lse=True)
        case = fresh(request)
        cu_q, cu_k = case.kwargs["cu_seqlens_q"], case.kwargs["cu_seqlens_k"]
        from flash_attn.flash_attn_interface import flash_attn_varlen_func

        theirs = flash_attn_varlen_func(*case.args, cu_q, cu_k, 9, 4, causal=True, return_attn_probs=True)[1]
        out, lse = prefill(*case.args, **case.kwargs)
    assert theirs.t()[FIRST_AND_LAST].isposinf().all()
    assert lse[FIRST_AND_LAST].isneginf().all()
    assert lse[5:12].isfinite().all()
    assert not out[FIRST_AND_LAST].any()


def test_flash_attention_2_is_known_by_its_own_extension() -> None:  # requirement P45, E6, B11
    """The package ``flash_attn`` is there with flash-attention 4 alone."""
    needs = next(n for n in hardware.kernel_named("fa2.prefill").needs if n.library == "flash-attn")
    assert needs.module == "flash_attn_2_cuda"
    with hal.simulate("nvidia:sm_90,cuda=13.0", libraries={"torch": "2.13.0", "flash-attn-4": "4.0.0b36"}):
        choice = hal.select(AttentionRequest(**BASE, phases=("prefill",))).choices["prefill"]
    (fa2,) = (c for c in choice.candidates if c.kernel.name == "fa2.prefill")
    assert [r.code for r in fa2.reasons] == ["not_installed"]


def test_flash_attention_3_gives_four_values_with_the_lse() -> None:  # requirement B15, A4
    with nvidia.running("fa3") as held:
        assert held is not None
        request, decode = built("fa3.decode", return_lse=True, page_size=16)
        case = make_case(request, "decode")
        found = case.call(decode)
        (call,) = held.called("flash_attn_with_kvcache")
        from flash_attn_interface import flash_attn_with_kvcache

        assert len(flash_attn_with_kvcache(**call.passed)) == 4
    assert set(found) == {"out", "lse"}
    assert found["lse"].shape == found["out"].shape[:2]


@pytest.mark.parametrize("version", flash_attn_4.VERSIONS)
@pytest.mark.parametrize(("window", "told"), [(None, (None, None)), (16, (15, 0)), ((None, 3), (None, None))])
def test_flash_attention_4_is_told_none_and_everything_by_name(version: str, window: Any, told: Any) -> None:
    # requirement E8, C11, A4
    """-1 would be a limit, and parameters have changed places between betas."""
    for name, phase in (("fa4.prefill", "prefill"), ("fa4.extend", "extend"), ("fa4.decode", "decode")):
        with nvidia.running_on("sm_90", "fa4", version) as held:
            assert held is not None
            request, made = built(name, window=window, page_size=16)
            case = make_case(request, phase)
            assert all(c.ok for c in case.check(made))
            assert {call.arguments["window_size"] for call in held.calls} == {told}
    tree = ast.parse((Path(hal_nvidia.__file__).parent / "_flash_attn_4.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).startswith("self._")]
    assert {len(n.args) for n in calls} == {3}, "q, k and v (or their caches) go by position, and nothing else"


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_backward_pass_is_told_whether_bits_may_vary(name: str, deterministic: bool) -> None:  # requirement D14, P24
    """Dense and ragged. What adds up gradients in no fixed order has other bits each time."""
    with nvidia.running_on("sm_90", name) as held:
        assert held is not None
        request, prefill = built(f"{name}.prefill", deterministic=deterministic, needs_grad=True)
        for form, function in (("dense", "flash_attn_func"), ("ragged", "flash_attn_varlen_func")):
            make_case(request, "prefill", lengths=[(5, 5)] * 2, form=form).call(prefill)
            assert held.called(function)[-1].arguments["deterministic"] is deterministic


@pytest.mark.parametrize(
    ("name", "arch", "free"),
    [
        ("fa3.extend", "sm_90", 0),
        ("fa3.decode", "sm_90", 0),
        ("fa4.extend_sm100", "sm_100", 1),
        ("fa4.decode_sm100", "sm_100", 0),
        ("fa4.decode_sm100", "sm_103", 0),
        ("fa4.decode", "sm_90", 1),
    ],
)
def test_keys_are_split_only_where_bits_may_vary(name: str, arch: str, free: int) -> None:  # requirement D14, P24
    """Sums of splits depend on how many there are, and that on the rows beside. 0: the library chooses."""
    phase = name.partition(".")[2].partition("_")[0]
    for deterministic, splits in ((True, 1), (False, free)):
        with nvidia.running_on(arch, name.partition(".")[0]) as held:
            assert held is not None
            request, made = built(name, arch, deterministic=deterministic, page_size=16)
            assert all(c.ok for c in make_case(request, phase).check(made))
            assert {call.arguments["num_splits"] for call in held.calls if "num_splits" in call.arguments} == {splits}


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_latents_are_split_only_where_bits_may_vary(phase: str) -> None:  # requirement D14, P24
    for deterministic, splits in ((True, 1), (False, 0)):
        with nvidia.running("fa3", libraries=nvidia.MLA) as held:
            assert held is not None
            request = MlaAttentionRequest(num_q_heads=4, page_size=16, deterministic=deterministic)
            assert hardware.check(f"fa3.mla_{phase}", request).ok
            assert {call.arguments["num_splits"] for call in held.calls} == {splits}


def test_torch_is_never_asked_to_choose_an_attention() -> None:  # requirement C1, P34
    """``scaled_dot_product_attention`` may become its math fallback; each operator is called by its own name."""
    for path in Path(hal_nvidia.__file__).parent.glob("*.py"):
        names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
        assert "scaled_dot_product_attention" not in names, path.name


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_efficient", "sdpa_cudnn"])
@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (1, 7), (6, 6)])
def test_torch_s_causal_mask_is_aligned_to_the_last_key(
    name: str, shape: tuple[int, int]
) -> None:  # requirement D7, B9
    """cuDNN's and the efficient kernel's own masks are not, where queries and keys are not equally many."""
    with nvidia.running(name):
        request, prefill = built(f"{name}.prefill", num_kv_heads=4, return_lse=True)
        case = make_case(request, "prefill", lengths=[shape] * 2, form="dense")
        assert all(c.ok for c in case.check(prefill))


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_103"])
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_gets_no_single_query_on_blackwell(
    causal: bool, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement D13
    """There it gives wrong values of one (pytorch#193893); torch's own choice leaves it out."""
    queries = []

    def watched(q: Any, *rest: Any, **more: Any) -> Any:
        queries.append(q.shape[2])
        return forward(q, *rest, **more)

    with nvidia.running("sdpa_cudnn"):
        forward = _sdpa_cudnn.forward
        monkeypatch.setattr(_sdpa_cudnn, "forward", watched)
        request, prefill = built("sdpa_cudnn.prefill", arch, causal=causal, return_lse=True)
        for form, lengths in (("dense", [(1, 7)] * 2), ("dense", [(1, 1)]), ("ragged", [(1, 9), (3, 3), (1, 1)])):
            case = make_case(request, "prefill", lengths=lengths, form=form)
            assert all(c.ok for c in case.check(prefill))
        plain, call = built("sdpa_cudnn.prefill", arch, causal=causal)
        for lengths in ([(1, 1)] * 3, [(1, 1), (4, 4)]):
            case = make_case(plain, "prefill", lengths=lengths)
            lens = [q for q, _ in lengths]
            step = make_step(lens, lens, torch.zeros(len(lens), 1, dtype=torch.int32), 16, torch.device("cpu"))
            torch.testing.assert_close(for_step(call, step)(*case.args), call(*case.args, **case.kwargs))
        dense = make_case(plain, "prefill", lengths=[(1, 7)] * 2, form="dense").args
        torch.testing.assert_close(call.for_dense(*dense)(*dense), call(*dense))
    assert (1 in queries) == (arch == "sm_90")


@pytest.mark.parametrize("name", ["trtllm_gen.extend", "trtllm_gen.decode", "xqa.decode", "flashinfer_cudnn.decode"])
def test_flashinfer_s_functions_are_told_the_layout(name: str) -> None:  # requirement D8, P32, D9
    """Its default is HND for one and NHD for the next; cuDNN's has no other. Keys are counted in tokens."""
    arch = "sm_90" if name.startswith("xqa") else "sm_100"
    with nvidia.running_on(arch, name.partition(".")[0]) as held:
        assert held is not None
        request, made = built(name, arch, kv_layout="HND", page_size=32, head_dim=128)
        case = make_case(request, name.partition(".")[2])
        assert all(c.ok for c in case.check(made))
        (call,) = held.calls
    assert call.arguments.get("kv_layout", "HND") == "HND"
    assert "cudnn" in name or call.passed["kv_layout"] == "HND"
    step = case.args[3]
    lengths = next(x for n, x in call.passed.items() if n in ("seq_lens", "actual_seq_lens_kv"))
    assert lengths.flatten().tolist() == list(step.kv_lens_host)


def test_a_cudnn_lse_is_never_asked_for() -> None:  # requirement B15, D13
    """cuDNN 9.26 and 9.27 write it for one head of a group (NVBug 6783545)."""
    for name in ("flashinfer_cudnn.extend", "flashinfer_cudnn.decode"):
        assert "return_lse" not in hardware.kernel_named(name).fields


def test_a_noncontiguous_v_is_refused_where_it_was_wrong() -> None:  # requirement B3, B5
    """Head dim 256 of flash-attention 4 on Blackwell (tokenspeed#445). On Hopper views are read rightly: tests/gpu."""
    with hal.simulate("nvidia:sm_100,cuda=13.0", libraries={"torch": "2.13.0", **FA4}):
        choice = hal.select(AttentionRequest(**{**BASE, "head_dim": 256}, phases=("prefill",))).choices["prefill"]
    (fa4,) = (c for c in choice.candidates if c.kernel.name == "fa4.prefill_sm100")
    assert [(r.code, r.field) for r in fa4.reasons if r.field] == [("head_dim", "head_dim"), ("head_dim", "v_head_dim")]


FA4 = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.0"}
STRIDED = ("fa2", "fa3", "fa4", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flashinfer_fa2", "flashinfer_fa3")


@pytest.mark.parametrize("name", STRIDED)
def test_slices_of_a_fused_projection_are_read_rightly(name: str) -> None:  # requirement B3, B4
    """q, k and v as views of one tensor, dense and ragged."""
    with nvidia.running_on("sm_90", name):
        _, prefill = built(f"{name}.prefill", num_kv_heads=4)
        torch.manual_seed(0)
        fused = torch.randn(2, 20, 3, 4, 64).half()
        views, copies = fused.unbind(2), [x.contiguous() for x in fused.unbind(2)]
        assert not any(x.is_contiguous() for x in views)
        torch.testing.assert_close(prefill(*views), prefill(*copies), atol=0, rtol=0)
        cu = torch.tensor([0, 20, 40], dtype=torch.int32)
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 20, "max_seqlen_k": 20}
        ragged = prefill(*(x.flatten(0, 1) for x in views), **lengths)
        torch.testing.assert_close(ragged.unflatten(0, (2, 20)), prefill(*copies), atol=2e-3, rtol=2e-3)


def test_outputs_that_are_copied_are_declared() -> None:  # requirement B4
    """And one that need not be is not: what the memory-efficient kernel leaves unwritten is cleared where it is."""
    for name, words in (
        ("sdpa_cudnn.prefill", "put together"),
        ("sdpa_efficient.prefill", "zeros are put before it"),
        ("fa2.decode", "more tokens than its rows"),
        ("flashinfer_fa2.prefill", "more tokens than its rows"),
    ):
        assert words in hardware.kernel_named(name).copies
    request, prefill = built("sdpa_efficient.prefill", num_kv_heads=4, head_dim=256, return_lse=True)
    written: list[torch.Tensor] = []
    forward = torch_attention.EFFICIENT["_efficient_attention_forward"]

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        written.append(found[0])
        return found

    functions = {**torch_attention.EFFICIENT, "_efficient_attention_forward": watched}
    with operators.emulated_operators(functions):
        found = fresh(request).call(prefill)["out"]
    assert found.data_ptr() == written[0].data_ptr()
