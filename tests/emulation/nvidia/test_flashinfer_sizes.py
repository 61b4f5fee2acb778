"""Work memory of flashinfer's wrappers: as much as their plans take, which the emulations know from the library's source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import hardware, nvidia

from hal._plan import Buffers, make_step
from hal_ops.attention import AttentionRequest
from hal_ops.mla_attention import MlaAttentionRequest

pytestmark = pytest.mark.usefixtures("own_pool")

CPU = torch.device("cpu")
GRAPHS = ("flashinfer_fa2.extend", "flashinfer_fa2.decode", "flashinfer_sink.extend", "flashinfer_sink.decode")
HEADS = [(4, 2), (8, 8), (8, 1)]


def made(name: str, arch: str, heads: tuple[int, int], **fields: Any) -> Any:
    sinks = {"sinks": True} if "sink" in name else {}
    given = {"num_q_heads": heads[0], "num_kv_heads": heads[1], "head_dim": 64, "page_size": 16, "kv_layout": "NHD"}
    request = AttentionRequest(**{**given, **sinks, **fields}, phases=(name.partition(".")[2],))
    return hardware.build(name, request, arch)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 10000), (300, 10000), (9, 9), (9, 3)])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_has_room_for_all_tiles_that_there_can_be(
    name: str, heads: tuple[int, int], rows: int, tokens: int
) -> None:  # requirement E12, P37
    """Of many rows, of many tokens, and of fewer tokens than rows."""
    tokens = rows if name == "flashinfer_fa2.decode" else tokens
    with nvidia.running_on("sm_80", "flashinfer"):
        paged = made(name, "sm_80", heads, graph=True)
        most = Buffers(rows, tokens, 2, CPU)
        step = most.fill(make_step([1], [9], torch.zeros(1, 1, dtype=torch.int32), 16, CPU))
        assert paged.plan(step).tokens == tokens


@pytest.mark.parametrize("arch", ["sm_120", "sm_121"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("name", ["flashinfer_fa2.prefill", "flashinfer_fa2.extend", "flashinfer_fa2.decode"])
def test_plans_of_any_step_fit_into_the_buffer_of_a_stream(
    name: str, dims: tuple[int, int], heads: tuple[int, int], arch: str
) -> None:  # requirement X13
    """It is made before the steps are known."""
    if dims[0] != dims[1] and not name.endswith("prefill"):
        return
    with nvidia.running_on(arch, "flashinfer"):
        assert made(name, arch, heads, head_dim=dims[0], v_head_dim=dims[1]) is not None


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("lens", [[1], [2, 2], [1] * 300])
def test_latent_plans_fit(lens: list[int], heads: int, backend: str) -> None:
    """Two blocks of 64 rows a cluster, of which there are as many as processors, or half as many of twice the rows."""
    with nvidia.running_on("sm_90", "flashinfer"):
        request = MlaAttentionRequest(num_q_heads=heads, page_size=16, max_q_len=2, phases=("decode",))
        latent = hardware.build(f"flashinfer_{backend}.mla_decode", request)
        step = make_step(lens, [9] * len(lens), torch.zeros(len(lens), 1, dtype=torch.int32), 16, CPU)
        assert latent.plan(step).tokens == sum(lens)
