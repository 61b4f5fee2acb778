"""What the ops declare is what their code has; and none of it needs torch to be read."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hal_ops import Op, resolve_target
from hal_ops.attention import ATTENTION, AttentionRequest, torch_sdpa
from hal_ops.attention.cases import hard_lengths, make_case
from hal_ops.attention.paged_inputs import make_step
from hal_ops.kv_cache import KV_CACHE_WRITE, KvCacheWriteRequest, torch_write
from hal_ops.merge_states import MERGE_STATES, MergeStatesRequest, torch_merge
from hal_ops.mla_attention import MLA_ATTENTION, MlaAttentionRequest, torch_mla

REQUESTS = {
    ATTENTION: AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=16, kv_layout="NHD"),
    MLA_ATTENTION: MlaAttentionRequest(num_q_heads=4, kv_lora_rank=32, qk_rope_head_dim=16, page_size=16),
    KV_CACHE_WRITE: KvCacheWriteRequest(num_kv_heads=2, head_dim=16),
    MERGE_STATES: MergeStatesRequest(num_heads=4, v_head_dim=16),
}
KERNELS = {
    ATTENTION: {phase: getattr(torch_sdpa, phase) for phase in ATTENTION.phases},
    MLA_ATTENTION: {phase: getattr(torch_mla, phase) for phase in MLA_ATTENTION.phases},
    KV_CACHE_WRITE: {"call": torch_write.write},
    MERGE_STATES: {"call": torch_merge.merge},
}
PHASES = [(op, phase) for op in REQUESTS for phase in op.phases]


@pytest.mark.parametrize(("op", "phase"), PHASES)
def test_implementations_have_every_keyword(op: Op, phase: str) -> None:
    # requirement A4, X11, B7
    for factory in (resolve_target(op.reference[phase]), KERNELS[op][phase]):
        implementation = factory(REQUESTS[op], "cpu")
        parameters = inspect.signature(implementation).parameters
        assert set(op.keywords.get(phase, ())) <= set(parameters)
        assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
        assert all(callable(getattr(implementation, name)) for name in op.attributes.get(phase, ()))


@pytest.mark.parametrize(("op", "phase"), PHASES)
def test_cases_judge_kernels(op: Op, phase: str) -> None:
    # requirement X11
    assert op.cases is not None
    case = resolve_target(op.cases)(REQUESTS[op], phase, device="cpu", seed=3)
    assert case.label
    for factory in (resolve_target(op.reference[phase]), KERNELS[op][phase]):
        found = case.check(factory(REQUESTS[op], "cpu"))
        assert found
        assert all(c.ok for c in found), "\n".join(map(str, found))


@pytest.mark.parametrize("phase", ATTENTION.phases)
def test_cases_are_the_same_for_one_seed(phase: str) -> None:
    first, second, other = (make_case(REQUESTS[ATTENTION], phase, seed=seed) for seed in (5, 5, 6))
    for a, b, c in zip(first.args[:3], second.args[:3], other.args[:3], strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))
        assert not torch.equal(a.view(torch.int16), c.view(torch.int16))


def test_cases_are_hard() -> None:
    # requirement D1, D15
    request = REQUESTS[ATTENTION]
    assert isinstance(request, AttentionRequest)
    for phase in ("extend", "decode"):
        case = make_case(request, phase)
        _, k_cache, v_cache, step = case.args
        kv_lens = {kv for _, kv in hard_lengths(request, phase)}
        assert {1, 5, 9, 15, 16, 17, 25, 33} <= kv_lens
        used = torch.cat([row[: -(-n // 16)] for row, n in zip(step.block_table, step.kv_lens_host, strict=True)])
        assert len(used.unique()) == len(used) - 1, "two rows share their first page"
        assert not torch.equal(used, used.sort().values), "pages are permuted"
        past = [row[-(-n // 16) :] for row, n in zip(step.block_table, step.kv_lens_host, strict=True)]
        assert {-1, 2**31 - 1} <= set(torch.cat(past).tolist())
        spare = [page for page in range(len(k_cache)) if page not in set(used.tolist())]
        assert spare
        for cache in (k_cache, v_cache):
            assert not cache[spare].isfinite().any()
            assert not cache[step.block_table[0, 0], step.kv_lens_host[0] :].isfinite().any()
    pairs = hard_lengths(request, "prefill")
    assert any(q > kv > 0 for q, kv in pairs)
    assert {(0, 0), (0, 7), (7, 0)} <= set(pairs)


def test_large_cases_are_large() -> None:
    # requirement P23
    request = REQUESTS[ATTENTION]
    assert isinstance(request, AttentionRequest)
    for scale in (request.softmax_scale, 0.01, 3.0):
        case = make_case(request.replace(softmax_scale=scale), "prefill", scale="large", form="dense")
        q, k, _ = (x.float() for x in case.args)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * scale
        assert 30 < logits.abs().max() < 90


def test_steps_count_tokens() -> None:
    # requirement D9
    step = make_step([2, 0, 5], [4, 3, 5], torch.tensor([[7], [2], [1]]), 16)
    assert step.cu_seqlens_q.tolist() == [0, 2, 2, 7]
    assert step.cu_seqlens_k.tolist() == [0, 4, 7, 12]
    assert (step.num_tokens, step.max_q_len, step.max_kv_len) == (7, 5, 5)
    assert step.slot_mapping.tolist() == [7 * 16 + 2, 7 * 16 + 3, 16, 17, 18, 19, 20]
    dtypes = (step.cu_seqlens_q.dtype, step.kv_lens.dtype, step.block_table.dtype, step.slot_mapping.dtype)
    assert dtypes == (torch.int32, torch.int32, torch.int32, torch.int64)


def test_nothing_needs_torch_to_be_read() -> None:
    # requirement X8
    code = (
        "import sys, hal_ops, hal_ops.attention, hal_ops.kv_cache, hal_ops.merge_states\n"
        "assert hal_ops.attention.AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=8).digest()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    root = Path(__file__).resolve().parents[2] / "ops"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [{"scale": "huge"}, {"form": "square"}, {"form": "dense", "lengths": ((1, 1), (2, 2))}]
)
def test_cases_that_cannot_be_made(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"scale='huge'|form='square'|equal lengths"):
        make_case(REQUESTS[ATTENTION], "prefill", **arguments)  # type: ignore[arg-type]
