"""On an NVIDIA GPU with flash-attn 4: its kernels at the corners of their declarations, and the habits relied upon.

It compiles each kernel on first use, some seconds each: run it with ``-n``.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from emulated import flash_attn_4

import hal
from hal.testing import check
from hal_nvidia import NvidiaPlatform, flash_attn_4_kernels
from hal_ops import resolve_target
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(hal.installed("flash-attn-4") is None, reason="flash-attn 4 is not installed"),
]

KERNELS = {k.name: k for k in flash_attn_4_kernels.KERNELS}
LLAMA: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "page_size": 16, "kv_layout": "NHD"}
QWEN: dict[str, Any] = {**LLAMA, "num_q_heads": 14, "head_dim": 64, "dtype": "float16"}
LSE: dict[str, Any] = {"return_lse": True, "deterministic": True}
GPT_OSS: dict[str, Any] = {**LLAMA, "num_q_heads": 16, "head_dim": 64, "sinks": True, "window": (127, 0)}


@pytest.fixture(scope="module")
def device() -> hal.Device:
    found = NvidiaPlatform().probe(os.environ).devices
    if not found:
        pytest.skip("no NVIDIA device")
    return found[0]


def cases() -> list[Any]:
    prefill = [
        {**LLAMA, **LSE},
        {**LLAMA, "causal": False, "window": (7, 3)},
        {**LLAMA, "window": (0, 0), "softcap": 30.0},
        {**GPT_OSS, "return_lse": True},
        {**QWEN, "causal": False, "return_lse": True},
        {**LLAMA, "head_dim": 192, "v_head_dim": 128, "graph": True},
        {**LLAMA, "head_dim": 256, "softmax_scale": 0.3, **LSE},
        {**LLAMA, "head_dim": 256, "window": (15, 0)},
        {**LLAMA, "head_dim": 96, "causal": False},
        {**LLAMA, "head_dim": 80},
        {**LLAMA, "needs_grad": True},
        {**QWEN, "needs_grad": True, "causal": False, "deterministic": True},
    ]
    extend = [
        {**LLAMA, **LSE},
        {**LLAMA, "page_size": 64, "window": (15, 0)},
        {**LLAMA, "page_size": 256, "softcap": 30.0},
        {**GPT_OSS, "return_lse": True},
        {**QWEN, "page_size": 32, "causal": False},
        {**LLAMA, "head_dim": 96, "graph": True},
        {**LLAMA, "head_dim": 80, "page_size": 64},
    ]
    decode = [
        {**LLAMA, **LSE},
        {**LLAMA, "max_q_len": 4, "page_size": 64},
        {**GPT_OSS, "graph": True},
        {**QWEN, "page_size": 256},
    ]
    found = {"fa4.prefill": prefill, "fa4.extend": extend, "fa4.decode": decode}
    numbered = ((name, i, fields) for name, each in found.items() for i, fields in enumerate(each))
    return [pytest.param(name, fields, id=f"{name}-{i}") for name, i, fields in numbered]


@pytest.mark.parametrize(("name", "fields"), cases())
def test_values(name: str, fields: dict[str, Any], device: hal.Device) -> None:
    # requirement A5, B3, B4, B5, B13, B15, C7, D1, D2, D3, D4, D5, D6, D14, D15, E8, E12, P22, P23, P24, P32
    kernel = KERNELS[name]
    if device.arch.name not in kernel.platforms["nvidia"].only:
        pytest.skip(f"{name} is for {', '.join(kernel.platforms['nvidia'].only)}")
    result = check(kernel, AttentionRequest(**{"dtype": "bfloat16", **fields}), device=device)
    assert result.ok, result.detail


def test_rows_without_keys_are_as_the_emulation_has_them(device: hal.Device) -> None:  # requirement B15
    request = AttentionRequest(**LLAMA, dtype="bfloat16", return_lse=True, phases=("prefill",))
    prefill = resolve_target(KERNELS["fa4.prefill"].target)(request, device)
    case = make_case(request, "prefill", device="cuda", lengths=[(9, 4), (33, 33), (7, 0)])
    out, lse = prefill(*case.args, **case.kwargs)
    blind = [*range(5), *range(42, 49)]
    assert not out[blind].any()
    assert (lse[blind] == -math.inf).all()


@pytest.mark.parametrize("window", [(None, None), (7, 0), (5, 3), (None, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_functions_are_as_the_emulation_has_them(causal: bool, window: Any, device: hal.Device) -> None:
    # requirement B15, E8, D15
    """Results, layouts of the LSE, masks and rows without keys: dense, ragged, and over pages with NaN in unused slots."""
    cute = pytest.importorskip("flash_attn.cute")
    mine = flash_attn_4.emulations(str(hal.installed("flash-attn-4")), device.arch.name)
    torch.manual_seed(0)
    draw = torch.randn
    masks = {"causal": causal, "window_size": window, "softmax_scale": 0.1, "return_lse": True}
    dense = [draw(2, n, h, 64, device="cuda").half() for n, h in ((33, 4), (40, 2), (40, 2))]
    ragged = [draw(n, h, 64, device="cuda").half() for n, h in ((49, 4), (64, 2), (64, 2))]
    cu = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 9, 42, 49], [0, 4, 64, 64])]
    bounds = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "max_seqlen_q": 33, "max_seqlen_k": 60}
    pages = [draw(6, 16, 2, 64, device="cuda").half() for _ in range(2)]
    for cache in pages:
        cache[2, 1:], cache[5, 9:] = torch.nan, torch.nan
    cached = {
        "cu_seqlens_q": torch.tensor([0, 1, 9], dtype=torch.int32, device="cuda"), "max_seqlen_q": 8, "max_seqlen_k": 48,
        "seqused_k": torch.tensor([33, 41], dtype=torch.int32, device="cuda"),
        "page_table": torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32, device="cuda"),
    }  # fmt: skip
    for name, args, more in (
        ("flash_attn_func", dense, {}),
        ("flash_attn_varlen_func", ragged, bounds),
        ("flash_attn_varlen_func", [ragged[0][:9], *pages], cached),
    ):
        found = getattr(cute, name)(*args, **more, **masks)
        on_host = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in more.items()}
        wanted = mine[name](*(x.cpu() for x in args), **on_host, **masks)
        for real, emulated in zip(found[:2], wanted[:2], strict=True):
            assert real.shape == emulated.shape
            real, emulated = real.float().cpu(), emulated.float()
            assert torch.equal(real.isneginf(), emulated.isneginf())
            torch.testing.assert_close(real.nan_to_num(neginf=0), emulated.nan_to_num(neginf=0), atol=2e-2, rtol=2e-2)


def test_a_value_tensor_that_is_a_view_is_read_rightly_at_256(device: hal.Device) -> None:  # requirement B3
    """V as a slice of a fused projection, dense and ragged."""
    request = AttentionRequest(num_q_heads=4, num_kv_heads=4, head_dim=256, dtype="bfloat16", phases=("prefill",))
    prefill = resolve_target(KERNELS["fa4.prefill"].target)(request, device)
    fused = torch.randn(2, 160, 3, 4, 256, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.unbind(2)
    assert not v.is_contiguous()
    torch.testing.assert_close(prefill(q, k, v), prefill(*(x.contiguous() for x in (q, k, v))), atol=0, rtol=0)
    cu = torch.tensor([0, 160, 320], dtype=torch.int32, device="cuda")
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 160, "max_seqlen_k": 160}
    ragged = prefill(*flat, **lengths).unflatten(0, (2, 160))
    torch.testing.assert_close(ragged, prefill(q, k, v), atol=1e-2, rtol=1e-2)
