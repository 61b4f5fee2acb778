"""Steps that are smaller than their plan, and steps without queries: no rows at all, rows that have none, room for some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia
from emulated.replay import empty_steps, smaller_steps

from hal._attention import for_step
from hal_nvidia import NvidiaPlatform
from hal_nvidia._flashinfer_pool import _idle, _zeroed
from hal_ops import torch_dtype
from hal_ops.attention import AttentionRequest

KERNELS = {k.name: k for k in NvidiaPlatform().kernels() if k.op == "attention"}
PAGED = [name for name, k in KERNELS.items() if k.phase != "prefill"]
FRESH = [name for name, k in KERNELS.items() if k.phase == "prefill"]
FP8 = "float8_e4m3fn"


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    yield
    _idle.clear()
    _zeroed.clear()


def arch_of(name: str) -> str:
    only = KERNELS[name].platforms["nvidia"].only
    return only[0] if only and "sm_90" not in only else "sm_90"


def request_of(name: str) -> AttentionRequest:
    kernel = KERNELS[name]
    given: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 4, "head_dim": 128, "phases": (kernel.phase,)}
    if kernel.phase != "prefill":
        sizes, layouts = kernel.fields["page_size"], kernel.fields["kv_layout"]
        given["page_size"] = next(size for size in (16, 256) if sizes.admits(size, None))
        given["kv_layout"] = next(layout for layout in ("NHD", "HND") if layouts.admits(layout, None))
    if "sink" in name:
        given |= {"head_dim": 64, "sinks": True}
    return AttentionRequest(**given, return_lse="return_lse" in kernel.fields)


def assert_nothing(found: Any, tokens: int, request: AttentionRequest) -> None:
    out, lse = found if request.return_lse else (found, torch.zeros(tokens, 4))
    assert out.shape == (tokens, 4, request.v_head_dim)
    assert out.dtype == torch.bfloat16
    assert (lse.shape, lse.dtype) == ((tokens, 4), torch.float32)


@pytest.mark.parametrize("name", PAGED)
def test_a_step_without_tokens(name: str) -> None:  # requirement D5
    request = request_of(name)
    with nvidia.running_on(arch_of(name), name.partition(".")[0]):
        paged = hardware.build(KERNELS[name], request, arch_of(name))
        shape = (2, int(request.page_size), 4) if request.kv_layout == "NHD" else (2, 4, int(request.page_size))
        cache = torch.zeros(*shape, request.head_dim, dtype=torch.bfloat16)
        extras = {"sinks": torch.zeros(4)} if request.sinks else {}
        extras |= {"return_lse": True} if request.return_lse else {}
        for step, tokens in empty_steps(int(request.page_size)):
            q = torch.zeros(tokens, 4, request.head_dim, dtype=torch.bfloat16)
            found = paged(q, cache, cache, step, paged.plan(step), **extras)
            assert_nothing(found, tokens, request)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "bfloat16") for name in FRESH), *((n, FP8) for n in FRESH if "qkv_dtype" in KERNELS[n].fields)],
)
def test_a_prompt_without_tokens(name: str, dtype: str) -> None:  # requirement D5, B7
    """Whatever q, k and v are, the output has the request's format."""
    request, given = request_of(name).replace(qkv_dtype=dtype), torch_dtype(dtype)
    with nvidia.running_on(arch_of(name), name.partition(".")[0]):
        prefill = hardware.build(KERNELS[name], request, arch_of(name))
        extras = {"return_lse": True} if request.return_lse else {}
        for step, tokens in empty_steps(16):
            q = torch.zeros(tokens, 4, request.head_dim, dtype=given)
            assert_nothing(for_step(prefill, step)(q, q, q, **extras), tokens, request)
        for shape in ((0, 3), (2, 0)):
            none = torch.zeros(*shape, 4, request.head_dim, dtype=given)
            found = prefill(none, none, none)
            assert (found.shape, found.dtype) == (none.shape, torch.bfloat16)


@pytest.mark.parametrize("name", PAGED)
def test_a_step_of_fewer_rows_than_its_plan(name: str) -> None:  # requirement P37
    request = request_of(name).replace(return_lse=False)
    if "sink" in name:
        pytest.skip("the reference wants sinks at the call")
    drafts = request.replace(max_q_len=1 if name == "xqa.decode" else 3)
    with nvidia.running_on(arch_of(name), name.partition(".")[0]):
        for found, right in smaller_steps(lambda r: hardware.build(KERNELS[name], r, arch_of(name)), drafts):
            torch.testing.assert_close(found, right, atol=2e-2, rtol=2e-2)
