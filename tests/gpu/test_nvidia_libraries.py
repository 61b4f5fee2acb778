"""On NVIDIA hardware: every attention kernel of an installed library at the corners of its declaration, and the habits
of the libraries that their emulations stand for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hal
from hal import testing
from hal.testing._verify import circumstances, refusals
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

pytestmark = pytest.mark.gpu

ALL = ("prefill", "extend", "decode")
PHASES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sdpa_flash", "sdpa_efficient", "sdpa_cudnn"), ("prefill",)),
    **dict.fromkeys(("fa2", "fa3", "fa4", "flashinfer_fa2"), ALL),
    "flashinfer_fa3": ("prefill", "extend"),
    "flashinfer_sink": ("extend", "decode"),
    "xqa": ("decode",),
}
PARTS = {"fa4": 6, "flashinfer_fa2": 10, "flashinfer_fa3": 10, "flashinfer_sink": 6, "xqa": 6}
"""How many tests a kernel's corners are, for libraries that compile on first use: ``-n`` spreads the compiling."""
CORNERS = [
    pytest.param(f"{library}.{phase}", part, id=f"{library}.{phase}" + (f"-{part}" if library in PARTS else ""))
    for library, phases in PHASES.items()
    for phase in phases
    for part in range(PARTS.get(library, 1))
]
FORMATS = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def device() -> hal.Device:
    found = hal.devices("nvidia") if "nvidia" in {d.platform for d in hal.devices()} else ()
    if not found:
        pytest.skip("no NVIDIA device")
    return found[0]


def requests(name: str, device: hal.Device) -> Iterator[AttentionRequest]:
    """The corners of a kernel as far as it serves them here, each in both 16-bit formats.

    flashinfer's, which compile for a minute and more each, are in the format of the corner alone.
    """
    kernel = hal._plugins.registry().kernels[name]
    around = circumstances(device)
    formats = () if "flashinfer-python" in {need.library for need in kernel.needs} else FORMATS
    found: dict[AttentionRequest, None] = {}
    for request in testing.corners(name, device=device):
        assert isinstance(request, AttentionRequest)
        for dtype in dict.fromkeys((request.dtype, *formats)):
            fp8 = request.kv_dtype.startswith("float8")
            found.setdefault(request.replace(dtype=dtype, **({} if fp8 else {"kv_dtype": dtype})))
    yield from (r for r in found if not refusals(kernel, r, around))


def skip_unless_here(name: str, device: hal.Device) -> None:
    kernel = hal._plugins.registry().kernels[name]
    first = testing.corners(name, limit=1)[0]
    why = [r for r in refusals(kernel, first, circumstances(device)) if r.field in ("library", "device", "runtime")]
    if why:
        pytest.skip("; ".join(map(str, why)))


@pytest.mark.parametrize(("name", "part"), CORNERS)
def test_a_kernel_is_right_at_the_corners_of_its_declaration(name: str, part: int, device: hal.Device) -> None:
    # requirement A5, B13, D1, D4, D5, D14, D15, P23, P24, C7, E8
    skip_unless_here(name, device)
    parts = PARTS.get(name.partition(".")[0], 1)
    chosen = list(requests(name, device))
    assert len(chosen) > 10
    failed = []
    for request in chosen[part::parts]:
        try:
            result = testing.check(name, request, device=device)
        except Exception as error:  # noqa: BLE001 - the other corners are told of too
            failed.append(f"{request.describe()}: {type(error).__name__}: {error}")
        else:
            failed += [] if result.ok else [str(result)]
    assert not failed, f"{len(failed)} of {len(chosen[part::parts])} corners:\n" + "\n".join(failed)


@pytest.mark.parametrize("name", ["fa2.extend", "fa2.decode", "fa3.extend", "fa3.decode"])
def test_pages_of_every_size_hide_what_no_length_covers(name: str, device: hal.Device) -> None:
    # requirement D1, D2, D6, D15
    skip_unless_here(name, device)
    sizes = (256, 512) if name.startswith("fa2") else (1, 7, 16, 32, 64)
    failed = []
    for size, causal, heads in itertools.product(sizes, (True, False), ((14, 2, 64), (16, 1, 128), (4, 4, 256))):
        q_heads, kv_heads, dim = heads
        request = AttentionRequest(
            num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=dim, dtype="float16", page_size=size,
            kv_layout="NHD", causal=causal, phases=name.rpartition(".")[2],
        )  # fmt: skip
        result = testing.check(name, request, device=device)
        failed += [] if result.ok else [str(result)]
    assert not failed, "\n".join(failed)


def test_long_queries_over_small_pages(device: hal.Device) -> None:  # requirement D15, D7
    """More queries than a tile holds: the launch where flash-attention 3 would read larger pages whole."""
    skip_unless_here("fa3.extend", device)
    for dim, size, causal in itertools.product((64, 128, 192, 256), (16, 64), (True, False)):
        request = AttentionRequest(
            num_q_heads=8, num_kv_heads=2, head_dim=dim, dtype="bfloat16", page_size=size, kv_layout="NHD",
            causal=causal, phases="extend",
        )  # fmt: skip
        handle = hal.get_attention(**_arguments(request), device=device, kernel="fa3")
        case = make_case(request, "extend", device="cuda", lengths=((200, 333), (1, 65), (300, 300)))
        for comparison in case.check(handle.implementation("extend")):
            assert comparison.ok, f"{dim} {size} {causal}: {comparison}"


def _arguments(request: AttentionRequest) -> dict[str, Any]:
    names = ("num_q_heads", "num_kv_heads", "head_dim", "dtype", "page_size", "kv_layout", "causal", "phases", "graph")
    return {name: getattr(request, name) for name in names}


def test_two_libraries_and_two_streams_in_turns(device: hal.Device) -> None:  # requirement C3, P34, P36, A5
    """Each layer of one library, then of the other, on streams of their own: nothing is shared."""
    skip_unless_here("fa3.prefill", device)
    base: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 128, "phases": "prefill", "device": device}
    handles = [hal.get_attention(**base, kernel=name) for name in ("fa3", "sdpa_flash", "sdpa_cudnn")]
    streams = [torch.cuda.Stream() for _ in handles]
    torch.manual_seed(0)
    inputs = [[torch.randn(2, 300 + 64 * i, h, 128, device="cuda").bfloat16() for h in (8, 2, 2)] for i in range(3)]
    alone = [handle(*three) for handle, three in zip(handles, inputs, strict=True)]
    torch.cuda.synchronize()
    outs: list[tuple[int, Any]] = []
    for _ in range(20):
        for index, (handle, stream) in enumerate(zip(handles, streams, strict=True)):
            with torch.cuda.stream(stream):
                outs.append((index, handle(*inputs[index])))
    torch.cuda.synchronize()
    assert all(torch.equal(out, alone[index]) for index, out in outs)


def test_a_captured_decode_serves_smaller_batches(device: hal.Device) -> None:
    # requirement E12, E3, E4, P37, A3
    skip_unless_here("fa3.decode", device)
    handle = hal.get_attention(
        num_q_heads=14, num_kv_heads=2, head_dim=64, dtype="float16", page_size=16, graph=True, device=device,
        kernel={"decode": "fa3", "extend": "fa3", "prefill": "fa3"},
    )  # fmt: skip
    plain = hal.get_attention(
        num_q_heads=14, num_kv_heads=2, head_dim=64, dtype="float32", page_size=16, device="cpu", kernel="reference"
    )
    torch.manual_seed(0)
    cache, host = handle.allocate_kv_cache(64), plain.allocate_kv_cache(64)
    for mine, other in ((cache.k, host.k), (cache.v, host.v)):
        mine.copy_(torch.randn(mine.shape).half())
        other.copy_(mine.float().cpu())
    table = torch.randperm(64)[:48].int().view(6, 8)
    q = torch.randn(6, 14, 64, device="cuda").half()
    plan = handle.plan(q_lens=[1] * 6, kv_lens=[128] * 6, block_table=table, max_batch=6, max_pages=8)
    metadata = plan._payload.metadata
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        handle(q, cache=cache, plan=plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = handle(q, cache=cache, plan=plan)
    for kv_lens in ([128] * 6, [5, 17, 33, 1, 16, 100], [9, 128], [1]):
        rows = len(kv_lens)
        plan.update(q_lens=[1] * rows, kv_lens=kv_lens, block_table=table[:rows])
        assert plan._payload.metadata.data_ptr() == metadata.data_ptr()
        graph.replay()
        torch.cuda.synchronize()
        right = plain(q[:rows].float().cpu(), cache=host, plan=plain.plan(
            q_lens=[1] * rows, kv_lens=kv_lens, block_table=table[:rows]))  # fmt: skip
        assert (out[:rows].float().cpu() - right).abs().max() < 0.01


@pytest.mark.parametrize("name", ["fa2.prefill", "fa3.prefill", "sdpa_flash.prefill", "sdpa_efficient.prefill"])
def test_a_captured_prefill_serves_other_prompts(name: str, device: hal.Device) -> None:
    # requirement E12, P37, B8
    """Prompts that are attended to fresh and written afterwards: others, longer ones and fewer than were captured."""
    skip_unless_here(name, device)
    dims: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 4, "head_dim": 64, "page_size": 16}
    handle = hal.get_attention(
        **dims, dtype="float16", graph=True, device=device,
        kernel={"prefill": name, "extend": "triton", "decode": "triton"},
    )  # fmt: skip
    plain = hal.get_attention(**dims, dtype="float32", device="cpu", kernel="reference")
    torch.manual_seed(0)
    cache, host = handle.allocate_kv_cache(24), plain.allocate_kv_cache(24)
    table, place = torch.randperm(24).int().view(4, 6), handle.device.torch_device()
    q, k, v = (torch.randn(90, 4, 64).half().to(place) for _ in "qkv")
    sizes = {"max_batch": 4, "max_tokens": 90, "phase": "prefill"}
    lens = [20, 33, 1, 36]
    plan = handle.plan(q_lens=lens, kv_lens=lens, block_table=table, **sizes)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        handle(q, k, v, cache=cache, plan=plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = handle(q, k, v, cache=cache, plan=plan)
    for lens in ([20, 33, 1, 36], [7, 40], [1, 1, 1, 1], [88], [0, 5, 17]):
        n, step = sum(lens), {"q_lens": lens, "kv_lens": lens, "block_table": table[: len(lens)]}
        plan.update(**step)
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape))
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        right = plain(*(x[:n].float().cpu() for x in (q, k, v)), cache=host, plan=plain.plan(**step))
        assert (out[:n].float().cpu() - right).abs().max() < 0.01, lens
        assert not out[n:].any(), lens
        assert torch.equal(cache.k.float().cpu(), host.k)
        assert torch.equal(cache.v.float().cpu(), host.v)


def test_the_plan_of_flash_attention_3_changes_nothing(device: hal.Device) -> None:  # requirement A6
    skip_unless_here("fa3.decode", device)
    import flash_attn_interface

    request = AttentionRequest(
        num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16, kv_layout="NHD", phases=("extend", "decode"),
        return_lse=True,
    )  # fmt: skip
    for phase in ("extend", "decode"):
        case = make_case(request, phase, device="cuda")
        step = case.args[3]
        handle = hal.get_attention(
            num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16, kv_layout="NHD", return_lse=True,
            phases=("extend", "decode"), device=device, kernel="fa3",
        )  # fmt: skip
        planned = case.call(handle.implementation(phase))
        out, lse, *_ = flash_attn_interface.flash_attn_with_kvcache(
            *case.args[:3], cache_seqlens=step.kv_lens, page_table=step.block_table, cu_seqlens_q=step.cu_seqlens_q,
            max_seqlen_q=step.max_q_len, softmax_scale=request.softmax_scale, causal=True, return_softmax_lse=True,
        )  # fmt: skip
        torch.testing.assert_close(planned["out"], out)
        torch.testing.assert_close(planned["lse"], lse.t())


@pytest.mark.parametrize("name", ["fa3.prefill", "sdpa_flash.prefill", "sdpa_efficient.prefill", "sdpa_cudnn.prefill"])
def test_explained_kernels_are_the_ones_that_run(name: str, device: hal.Device) -> None:  # requirement P25, X1
    skip_unless_here(name, device)
    heads = 4 if name.startswith("sdpa_efficient") else 2
    handle = hal.get_attention(
        num_q_heads=4, num_kv_heads=heads, head_dim=64, phases="prefill", device=device, kernel=name
    )
    assert handle.kernels() == {"prefill": name}
    q, k, v = (torch.randn(1, 9, h, 64, device="cuda").bfloat16() for h in (4, heads, heads))
    assert handle(q, k, v).shape == q.shape


@pytest.mark.parametrize(
    "name", [f"{library}.prefill" for library, phases in PHASES.items() if "prefill" in phases] + ["triton.prefill"]
)
def test_many_more_queries_than_keys(name: str, device: hal.Device) -> None:  # requirement B15, D5
    """flashinfer's fa2 masks too few of a tile's keys where the first queries see none (``_flashinfer_prefill``)."""
    skip_unless_here(name, device)
    handle = hal.get_attention(
        num_q_heads=8,
        num_kv_heads=8 if "efficient" in name else 2,
        head_dim=128,
        dtype="bfloat16",
        phases="prefill",
        device=device,
        kernel=name,
    )
    request = handle.request
    for lengths in ([(200, 100)], [(300, 130), (70, 64)], [(400, 0), (129, 65)], [(64, 300), (513, 257)]):
        case = make_case(request, "prefill", device="cuda", lengths=lengths, oracle="cuda")
        for comparison in case.check(handle.implementation("prefill")):
            assert comparison.ok, str(comparison)
