"""On NVIDIA hardware: emulations against the real functions: layouts, LSE, masks, empty rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated import flash_attn_3, signatures, torch_attention
from emulated.attend import attend
from torch import Tensor

pytestmark = pytest.mark.gpu

LENGTHS = ((33, 33), (0, 0), (9, 4), (1, 17), (7, 0), (0, 7), (70, 200))
CACHED = ((1, 17), (5, 5), (0, 33), (8, 9), (40, 130), (1, 1))
WINDOWS = ((-1, -1), (7, -1), (16, 0), (3, 5))
ANY = pytest.mark.parametrize(("causal", "window"), list(itertools.product((True, False), WINDOWS)))


@pytest.fixture(scope="module", autouse=True)
def on_nvidia() -> None:
    if not torch.cuda.is_available() or torch.version.hip:
        pytest.skip("no NVIDIA device")


def host(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def alike(found: Any, emulated: Any, *, where: str) -> None:
    """Same number of results, same shapes, infinities in the same places, values within the format's rounding."""
    found = found if isinstance(found, tuple) else (found,)
    emulated = emulated if isinstance(emulated, tuple) else (emulated,)
    assert len(found) == len(emulated), f"{where}: {len(found)} results, emulated {len(emulated)}"
    for index in range(min(2, len(found))):
        real, mine = found[index].detach().float().cpu(), emulated[index].detach().float()
        assert real.shape == mine.shape, f"{where}, result {index}: {tuple(real.shape)}, emulated {tuple(mine.shape)}"
        finite = mine.isfinite()
        assert torch.equal(real.isposinf(), mine.isposinf()), f"{where}, result {index}: +inf elsewhere"
        assert torch.equal(real.isneginf(), mine.isneginf()), f"{where}, result {index}: -inf elsewhere"
        torch.testing.assert_close(real[finite], mine[finite], atol=2e-2, rtol=2e-2, msg=lambda m: f"{where}: {m}")


def compare(
    real: Callable[..., Any], emulation: Callable[..., Any], signature: Any, where: str, *args: Any, **kw: Any
) -> None:
    bound = signature.bind(*args, **kw)
    found = real(*args, **kw)
    bound.apply_defaults()
    alike(found, emulation(*map(host, bound.args), **{n: host(x) for n, x in bound.kwargs.items()}), where=where)


def fresh(dim: int = 64, heads: tuple[int, int] = (4, 2)) -> tuple[Any, ...]:
    torch.manual_seed(0)
    q_lens, kv_lens = zip(*LENGTHS, strict=True)
    three = [
        torch.randn(sum(n), h, dim, device="cuda").half()
        for n, h in ((q_lens, heads[0]), (kv_lens, heads[1]), (kv_lens, heads[1]))
    ]
    cu = [torch.tensor([0, *n], device="cuda").cumsum(0).int() for n in (q_lens, kv_lens)]
    return *three, *cu, max(q_lens), max(kv_lens)


@pytest.fixture
def fa3() -> Any:
    return pytest.importorskip("flash_attn_interface")


def fa3_signature(name: str, fa3: Any) -> Any:
    import inspect

    return inspect.signature(getattr(fa3, name))


def test_the_signatures_kept_are_those_installed(fa3: Any) -> None:  # requirement A4
    from importlib import metadata

    version = metadata.version("tokenspeed-fa3")
    for name, kept in signatures.functions("tokenspeed-fa3", version).items():
        real = fa3_signature(name.partition(":")[2], fa3)
        assert list(kept.parameters) == list(real.parameters), name


@ANY
def test_flash_attention_3_ragged(causal: bool, window: Any, fa3: Any) -> None:  # requirement E8, B15
    name = "flash_attn_varlen_func"
    compare(
        getattr(fa3, name), flash_attn_3.FUNCTIONS[name], fa3_signature(name, fa3), f"{causal} {window}", *fresh(),
        softmax_scale=0.125, causal=causal, window_size=window, return_attn_probs=True,
    )  # fmt: skip


@ANY
def test_flash_attention_3_dense(causal: bool, window: Any, fa3: Any) -> None:  # requirement E8, B15
    torch.manual_seed(0)
    for q_len, kv_len in ((33, 33), (5, 40), (40, 5), (1, 17)):
        q, k, v = (torch.randn(2, n, h, 128, device="cuda").half() for n, h in ((q_len, 4), (kv_len, 2), (kv_len, 2)))
        name = "flash_attn_func"
        compare(
            getattr(fa3, name), flash_attn_3.FUNCTIONS[name], fa3_signature(name, fa3), f"{q_len}/{kv_len}", q, k, v,
            softmax_scale=0.1, causal=causal, window_size=window, return_attn_probs=True,
        )  # fmt: skip


def paged(size: int, dim: int, poison: bool, heads: int = 4) -> dict[str, Any]:
    torch.manual_seed(0)
    q_lens, kv_lens = zip(*CACHED, strict=True)
    counts = [-(-n // size) for n in kv_lens]
    k, v = (torch.randn(sum(counts), size, 2, dim, device="cuda").half() for _ in range(2))
    table = torch.full((len(counts), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    for row, end in enumerate(itertools.accumulate(counts)):
        table[row, : counts[row]] = torch.arange(end - counts[row], end)
        if poison and kv_lens[row] % size:
            v[end - 1, kv_lens[row] % size :] = torch.nan
            k[end - 1, kv_lens[row] % size :] = torch.nan
    return {
        "q": torch.randn(sum(q_lens), heads, dim, device="cuda").half(), "k_cache": k, "v_cache": v,
        "cache_seqlens": torch.tensor(kv_lens, dtype=torch.int32, device="cuda"),
        "page_table": table.cuda(), "cu_seqlens_q": torch.tensor([0, *q_lens], device="cuda").cumsum(0).int(),
        "max_seqlen_q": max(q_lens), "softmax_scale": 0.1, "return_softmax_lse": True,
    }  # fmt: skip


@ANY
def test_flash_attention_3_paged(causal: bool, window: Any, fa3: Any) -> None:  # requirement A3, E4, D15
    name = "flash_attn_with_kvcache"
    for size in (16, 64):
        given = paged(size, 64, True)
        width = given["page_table"].shape[1] * size
        given["scheduler_metadata"] = fa3.get_scheduler_metadata(
            len(CACHED), given["max_seqlen_q"], width, 4, 2, 64, given["cache_seqlens"], qkv_dtype=torch.float16,
            cu_seqlens_q=given["cu_seqlens_q"], page_size=size, causal=causal, window_size=window,
        )  # fmt: skip
        wanted = flash_attn_3.metadata_size(len(CACHED), causal, window, given["max_seqlen_q"], width, 64)
        assert given["scheduler_metadata"].shape == (wanted,)
        found = getattr(fa3, name)(**given, causal=causal, window_size=window)
        bound = fa3_signature(name, fa3).bind(
            **{n: host(x) for n, x in given.items() if n != "scheduler_metadata"}, causal=causal, window_size=window
        )
        bound.apply_defaults()
        alike(found, flash_attn_3.FUNCTIONS[name](*bound.args, **bound.kwargs), where=f"{size} {causal} {window}")


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_metadata_has_the_size_of_the_formula(dim: int, fa3: Any) -> None:  # requirement E4
    for batch, longest, width, causal, window in itertools.product(
        (1, 3, 4, 9, 200),
        (1, 2, 40),
        (32, 4096),
        (True, False),
        ((-1, -1), (31, 0), (30, 0), (4095, 0), (4094, 0), (5, 5)),
    ):
        lens = torch.full((batch,), 20, dtype=torch.int32, device="cuda")
        found = fa3.get_scheduler_metadata(
            batch, longest, width, 8, 2, dim, lens, page_size=16, causal=causal, window_size=window
        )
        wanted = flash_attn_3.metadata_size(batch, causal, window, longest, width, dim)
        assert found.numel() == wanted, (batch, longest, width, causal, window)


@pytest.mark.parametrize(("size", "dim", "causal"), [(128, 128, True), (128, 64, True), (256, 128, True)])
def test_large_pages_let_nan_through(size: int, dim: int, causal: bool, fa3: Any) -> None:  # requirement D15
    """Why those page sizes are not declared. Should this fail, they can be."""
    given = paged(size, dim, True, heads=16)
    found = fa3.flash_attn_with_kvcache(**given, causal=causal)[0]
    bound = fa3_signature("flash_attn_with_kvcache", fa3).bind(**{n: host(x) for n, x in given.items()}, causal=causal)
    bound.apply_defaults()
    emulated = flash_attn_3.FUNCTIONS["flash_attn_with_kvcache"](*bound.args, **bound.kwargs)[0]
    real, mine = (x.isnan().any(-1).any(-1).cpu() for x in (found, emulated))
    assert real.any()
    assert not (real & ~mine).any(), (
        "the emulation lets NaN into whole rows, the kernel into the tiles that need the page"
    )


def aten(name: str) -> Any:
    return getattr(torch.ops.aten, name).default


@ANY
def test_torch_flash(causal: bool, window: Any) -> None:  # requirement B15, E8
    q, k, v, cu_q, cu_k, longest_q, longest_k = fresh()
    left, right = window
    given = {"scale": 0.125, "window_size_left": left, "window_size_right": right}
    args = (q, k, v, cu_q, cu_k, longest_q, longest_k, 0.0, causal, False)
    found = aten("_flash_attention_forward")(*args, **given)
    mine = torch_attention.FLASH["_flash_attention_forward"](*map(host, args), **given)
    alike(tuple(found[:2]), tuple(mine[:2]), where=f"{causal} {window}")


@pytest.mark.parametrize("mask", [0, 2])
@pytest.mark.parametrize("dim", [64, 192])
def test_torch_efficient(mask: int, dim: int) -> None:  # requirement B15
    """Sequences without keys are compared by their LSE alone; causal ones with more queries than keys are wrong."""
    q, k, v, cu_q, cu_k, longest_q, longest_k = fresh(dim, (4, 4))
    args = (q[None], k[None], v[None], None, cu_q, cu_k, longest_q, longest_k, 0.0, mask, True)
    found = aten("_efficient_attention_forward")(*args, scale=0.125)
    mine = torch_attention.EFFICIENT["_efficient_attention_forward"](*map(host, args), scale=0.125)
    assert found[1].shape == mine[1].shape
    start, wrong = 0, []
    for row, (q_len, kv_len) in enumerate(LENGTHS):
        part = slice(start, start + q_len)
        start += q_len
        out, other = found[0][0, part].float().cpu(), mine[0][0, part].float()
        if mask and 0 < kv_len < q_len:
            wrong.append((out - bottom_right(q[part], k, v, cu_k, row)).abs().max().item())
        elif kv_len:
            alike((out, found[1][row, :, :q_len].cpu()), (other, mine[1][row, :, :q_len]), where=f"{mask} {dim} {row}")
        else:
            assert (found[1][row, :, :q_len] == 0).all()
    assert all(error > 0.1 for error in wrong), "torch has mended its mask: the adapter's detour can go"


def bottom_right(q: Tensor, k: Tensor, v: Tensor, cu_k: Tensor, row: int) -> Tensor:
    begin, end = cu_k[row : row + 2].tolist()
    return attend(q.cpu(), k[begin:end].cpu(), v[begin:end].cpu(), scale=0.125, causal=True)[0]


@pytest.mark.parametrize("causal", [True, False])
def test_torch_cudnn(causal: bool) -> None:  # requirement B15
    torch.manual_seed(0)
    for q_len, kv_len in ((33, 33), (5, 40), (64, 200), (1, 17)):
        q, k, v = (torch.randn(2, n, h, 64, device="cuda").half() for n, h in ((q_len, 4), (kv_len, 2), (kv_len, 2)))
        three = [x.transpose(1, 2) for x in (q, k, v)]
        found = aten("_scaled_dot_product_cudnn_attention")(*three, None, True, 0.0, causal, False, scale=0.125)
        mine = torch_attention.CUDNN["_scaled_dot_product_cudnn_attention"](
            *map(host, three), None, True, 0.0, causal, False, scale=0.125
        )
        alike(tuple(found[:2]), tuple(mine[:2]), where=f"{q_len}/{kv_len}")
