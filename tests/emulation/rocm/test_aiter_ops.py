"""aiter's kernels for rows, rotary embeddings and cache writes: bound against the kept signatures, and by value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import emulated.aiter_ops
import emulated.library
import emulated.signatures
import pytest
import torch
from emulated.amd import KERNELS, built, check_corners, device_of

import hal
from hal import _plugins
from hal.testing import check
from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.rms_norm import RmsNormRequest
from hal_ops.rotary_embedding import RotaryEmbeddingRequest
from hal_ops.silu_and_mul import SiluAndMulRequest
from hal_rocm import aiter_op_kernels

NAMES = [kernel.name for kernel in aiter_op_kernels.KERNELS]
ADAPTERS = ("hal_rocm._aiter_ops", "hal_rocm._aiter_rotary")
VERSIONS = [
    *(("amd-aiter-wheel", v) for v in emulated.signatures.versions("amd-aiter-wheel")),
    *(("amd-aiter", v) for v in emulated.signatures.versions("amd-aiter")),
]
SMALL = {
    "rotary_embedding": {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64},
    "kv_cache_write": {"num_kv_heads": 2, "head_dim": 64, "page_size": 16, "kv_layout": "NHD"},
}


@contextlib.contextmanager
def aiter_ops(version: str = "", library: str = "amd-aiter") -> Iterator[emulated.library.Installed]:
    version = version or emulated.signatures.versions(library)[-1]
    found = emulated.aiter_ops.emulations(version, library)
    with emulated.library.installed(library, version, found, adapters=ADAPTERS) as installed:
        yield installed


def smallest(name: str) -> Any:
    op = _plugins.registry().op(KERNELS[name].op)
    return op.request(**SMALL.get(op.name, {"hidden_size": 64}))


@pytest.mark.parametrize("name", NAMES)
def test_corners_by_value(name: str) -> None:
    # requirement A5, C7, D14, P24
    with aiter_ops():
        assert len(check_corners(name)) > 6
        check_corners(name, "gfx950", 2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_calls_bind_in_every_supported_version(name: str, version: tuple[str, str]) -> None:
    # requirement A4, P39
    with aiter_ops(version[1], version[0]) as library:
        result = check(KERNELS[name], smallest(name), device=device_of())
        assert result.ok, result
    assert library.calls


@pytest.mark.parametrize("name", [n for n in NAMES if n != "aiter.kv_cache_write"])
def test_nothing_is_launched_over_no_rows(name: str) -> None:
    wanted = smallest(name)
    wide = 128 if name in ("aiter.silu_and_mul", "aiter.gelu_and_mul") else 64
    row, ones = torch.empty(0, wide, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    with aiter_ops() as library:
        call = built(name, wanted)
        if name == "aiter.rotary_embedding":
            q, k = (torch.empty(0, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
            table = torch.ones(8, 32)
            found = call(q, k, table, table, torch.empty(0, dtype=torch.int64))
            assert [x.shape for x in found] == [q.shape, k.shape]
        elif name == "aiter.fused_add_rms_norm":
            assert call(row, row.clone(), ones).shape == row.shape
        elif name == "aiter.layer_norm":
            assert call(row, ones, ones).shape == row.shape
        elif name == "aiter.rms_norm":
            assert call(row, ones).shape == row.shape
        else:
            assert call(row).shape == (0, 64)
    assert not library.calls


def test_norms_copy_as_declared() -> None:
    # requirement C7
    x, weight = torch.randn(6, 64).bfloat16(), torch.ones(64).bfloat16()
    out = torch.empty(6, 80).bfloat16()[:, :64]
    with aiter_ops() as library:
        norm = built("aiter.rms_norm", RmsNormRequest(hidden_size=64))
        norm(x, weight)
        assert norm(x, weight, out=out) is out
        norm(torch.cat([x, x], 1)[:, :64], weight)
    first, second, third = (c.arguments["input"] for c in library.calls)
    assert first.data_ptr() == second.data_ptr() == x.data_ptr()
    assert third.is_contiguous()
    assert KERNELS["aiter.rms_norm"].copies == "x, where it is not contiguous; the result, into out where that is given"


def test_gates_copy_as_declared() -> None:
    # requirement C7
    x, wide = torch.randn(6, 64).bfloat16(), torch.empty(6, 80).bfloat16()
    straight, slice_of = torch.empty(6, 32).bfloat16(), wide[:, :32]
    with aiter_ops() as library:
        gate = built("aiter.silu_and_mul", SiluAndMulRequest(hidden_size=32))
        assert gate(x, out=straight) is straight
        assert gate(x, out=slice_of) is slice_of
    first, second = (c.arguments for c in library.calls)
    assert first["out"] is straight
    assert first["input"].data_ptr() == second["input"].data_ptr() == x.data_ptr()
    assert second["out"].is_contiguous()
    assert "an out that is not contiguous" in KERNELS["aiter.silu_and_mul"].copies


@pytest.mark.parametrize("inplace", [False, True])
def test_positions_outside_of_the_tables_become_nan(inplace: bool) -> None:
    # requirement P24
    wanted = RotaryEmbeddingRequest(num_q_heads=4, num_kv_heads=2, head_dim=64)
    q, k = (torch.randn(5, heads, 64).bfloat16() for heads in (4, 2))
    table = torch.ones(8, 32)
    with aiter_ops():
        rotate = built("aiter.rotary_embedding", wanted)
        found = rotate(
            q, k, table, table, torch.tensor([0, -1, 7, 8, 1000], dtype=torch.int32), out=(q, k) if inplace else None
        )
    for x in found:
        assert x.isnan().flatten(1).all(1).tolist() == [False, True, False, True, True]
        assert x.isnan().flatten(1).any(1).tolist() == [False, True, False, True, True]


@pytest.mark.parametrize("oddity", ["apart", "heads"])
def test_pages_that_it_would_write_elsewhere_are_refused(oddity: str) -> None:
    # requirement D8, P32
    wanted = KvCacheWriteRequest(num_kv_heads=2, head_dim=64, page_size=16, kv_layout="NHD")
    plain = torch.zeros(4, 16, 2, 64).bfloat16()
    strange = {
        "apart": torch.zeros(4, 2, 16, 2, 64).bfloat16()[:, 0],
        "heads": torch.zeros(4, 2, 16, 64).bfloat16().transpose(1, 2),
    }[oddity]
    k = torch.randn(3, 2, 64).bfloat16()
    with aiter_ops() as library:
        write = built("aiter.kv_cache_write", wanted)
        with pytest.raises(ValueError, match="choose another write kernel"):
            write(k, k, plain, strange, torch.arange(3))
        assert not library.calls
        write(k, k, plain, plain.clone(), torch.empty(0, dtype=torch.int64))
    assert not library.calls


@pytest.mark.parametrize("version", VERSIONS)
def test_keys_in_vectors_are_written_in_every_version(version: tuple[str, str]) -> None:
    # requirement A4, D8, P39
    wanted = KvCacheWriteRequest(num_kv_heads=2, head_dim=64, page_size=16, kv_layout="HDN")
    with aiter_ops(version[1], version[0]) as library:
        result = check(KERNELS["aiter.kv_cache_write"], wanted, device=device_of())
        assert result.ok, result
    assert library.called("reshape_and_cache")
    assert not library.called("reshape_and_cache_flash")


def test_keys_in_vectors_are_written_to_whole_caches_alone() -> None:
    # requirement D8, P32
    wanted = KvCacheWriteRequest(num_kv_heads=2, head_dim=64, page_size=16, kv_layout="HDN")
    k, both = torch.randn(3, 2, 64).bfloat16(), torch.zeros(4, 2, 2 * 64 * 16).bfloat16()
    halves = both[:, 0].view(4, 2, 8, 16, 8), both[:, 1].view(4, 2, 64, 16)
    with aiter_ops() as library:
        write = built("aiter.kv_cache_write", wanted)
        with pytest.raises(ValueError, match="contiguous caches where keys lie in vectors"):
            write(k, k, *halves, torch.arange(3))
    assert not library.calls


def test_interleaved_caches_and_split_inputs_are_written() -> None:
    # requirement D8
    wanted = KvCacheWriteRequest(num_kv_heads=2, head_dim=64, page_size=16, kv_layout="NHD")
    both = torch.zeros(4, 2, 16, 2, 64).bfloat16()
    fused = torch.randn(3, 4, 64).bfloat16()
    k, v = fused[:, :2], fused[:, 2:]
    with aiter_ops() as library:
        built("aiter.kv_cache_write", wanted)(k, v, both[:, 0], both[:, 1], torch.tensor([0, -1, 33]))
    assert torch.equal(both[0, 0, 0], k[0])
    assert torch.equal(both[2, 1, 1], v[2])
    assert int(both.bool().sum()) <= 2 * 2 * 2 * 64
    assert library.calls[0].arguments["key"].data_ptr() == k.data_ptr()


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        ("aiter.rms_norm", {"hidden_size": 68}, "hidden_size"),
        ("aiter.rms_norm", {"hidden_size": 64, "weight_dtype": "float32"}, "weight_dtype"),
        ("aiter.rms_norm", {"hidden_size": 64, "needs_grad": True}, "needs_grad"),
        ("aiter.rms_norm", {"hidden_size": 64, "weight_offset": 1.0}, "weight_offset"),
        ("aiter.rms_norm", {"hidden_size": 16384}, "hidden_size"),
        ("aiter.layer_norm", {"hidden_size": 64, "bias": False}, "bias"),
        ("aiter.kv_cache_write", {**SMALL["kv_cache_write"], "kv_dtype": "float8_e4m3fnuz"}, "kv_dtype"),
        ("aiter.kv_cache_write", {**SMALL["kv_cache_write"], "kv_layout": "HND"}, "kv_layout"),
    ],
)
def test_what_is_refused(name: str, fields: dict[str, Any], field: str) -> None:
    # requirement C7, P30
    op = _plugins.registry().op(KERNELS[name].op)
    with pytest.raises(hal.errors.InputError, match=field):
        check(KERNELS[name], op.request(**fields), device=device_of())
