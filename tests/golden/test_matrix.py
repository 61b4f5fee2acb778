"""The decision matrix: simulated device x request -> kernel a phase, held by a checked-in file.

A change of ``decisions.json`` is a reviewed change: ``pytest tests/golden --update-golden`` writes it anew.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import hal
from hal._selection import require
from hal.cli._models import MODELS, requests_for
from hal.errors import NoKernelError
from hal.testing import decision_matrix
from hal_ops.attention import AttentionRequest
from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.merge_states import MergeStatesRequest
from hal_ops.mla_attention import MlaAttentionRequest

GOLDEN = Path(__file__).parent / "decisions.json"

DEVICES = (
    "cpu:x86_64",
    "cpu:aarch64",
    "nvidia:sm_75,cuda=12.8,driver=570.86",
    "nvidia:sm_80,cuda=12.8,driver=570.86",
    "nvidia:sm_86,cuda=12.8,driver=570.86",
    "nvidia:sm_89,cuda=12.8,driver=570.86",
    "nvidia:sm_90,cuda=12.8,driver=570.86",
    "nvidia:sm_100,cuda=12.8,driver=570.86",
    "nvidia:sm_103,cuda=12.9,driver=575.51",
    "nvidia:sm_120,cuda=12.8,driver=570.86",
    "nvidia:sm_121,cuda=13.0,driver=580.65",
    "nvidia:sm_999,cuda=99.0",
    "rocm:gfx90a,hip=6.4",
    "rocm:gfx942,hip=6.4",
    "rocm:gfx950,hip=7.0",
    "rocm:gfx1100,hip=6.4",
    "rocm:gfx1151,hip=6.4",
    "rocm:gfx1201,hip=6.4",
    "rocm:gfx1250,hip=7.1",
    "rocm:gfx1999,hip=9.0",
    "musa:mp_21,musa=4.2",
    "musa:mp_22,musa=4.2",
    "musa:mp_31,musa=4.2",
    "musa:mp_99,musa=9.9",
)
"""Every arch that is named anywhere, and for each vendor one that nobody has heard of."""

LIBRARIES = {"torch": "2.11.0", "triton": "3.6.0"}


OPS: dict[str, dict[str, Any]] = {
    "rms_norm": {"hidden_size": 4096},
    "fused_add_rms_norm": {"hidden_size": 4096},
    "layer_norm": {"hidden_size": 4096},
    "silu_and_mul": {"hidden_size": 14336},
    "gelu_and_mul": {"hidden_size": 14336},
    "rotary_embedding": {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    "fp8_quantize": {"hidden_size": 4096},
    "rotary_kv_cache_write": {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    "kv_pages_copy": {"num_kv_heads": 8, "head_dim": 128},
    "kv_pages_gather": {"num_kv_heads": 8, "head_dim": 128},
}
"""The other ops of a decoder layer and of its cache, at a common size."""

HOST = hal.Device(platform="cpu", arch=hal.Arch("cpu", "any"), capabilities=frozenset({"bf16", "fp8_e4m3fn"}))
"""Whose formats the models' requests are made for: bfloat16, and FP8 by its generic name."""


def requests() -> dict[str, Any]:
    base = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    found: dict[str, Any] = {
        "head_dim 80": AttentionRequest(**{**base, "head_dim": 80}),
        "head_dim 192/128": AttentionRequest(**{**base, "head_dim": 192, "v_head_dim": 128}),
        "float32": AttentionRequest(**base, dtype="float32"),
        "float16": AttentionRequest(**base, dtype="float16"),
        "float64": AttentionRequest(**base, dtype="float64"),
        "alibi": AttentionRequest(**base, alibi=True),
        "speculative": AttentionRequest(**base, max_q_len=4),
        "keys in vectors": AttentionRequest(**base, kv_layout="HDN"),
        "training": AttentionRequest(**base, needs_grad=True),
        "training float32": AttentionRequest(**base, dtype="float32", needs_grad=True),
        "deterministic with lse": AttentionRequest(**base, deterministic=True, return_lse=True),
        "kv float8_e5m2 per head": AttentionRequest(**base, kv_dtype="float8_e5m2", kv_scale="head"),
        "graph": AttentionRequest(**base, graph=True),
        "q, k, v float8_e4m3fn": AttentionRequest(**base, qkv_dtype="float8_e4m3fn"),
        "q, k, v float8_e4m3fnuz per head": AttentionRequest(**base, qkv_dtype="float8_e4m3fnuz", qkv_scale="head"),
        "cache write": KvCacheWriteRequest(num_kv_heads=8, head_dim=128),
        "cache write in vectors": KvCacheWriteRequest(num_kv_heads=8, head_dim=128, kv_layout="HDN"),
        "cache write fp8": KvCacheWriteRequest(num_kv_heads=8, head_dim=128, kv_dtype="float8_e4m3fn"),
        "DeepSeek-V3 latent": MlaAttentionRequest(num_q_heads=128),
        "DeepSeek-V3 latent graph": MlaAttentionRequest(num_q_heads=128, max_q_len=2, graph=True),
        "merge": MergeStatesRequest(num_heads=32, v_head_dim=128),
    }
    for name, fields in OPS.items():
        cls = hal._plugins.registry().op(name).request
        found[name] = cls(**fields)
        if "needs_grad" in cls.rules():
            found[f"{name} training"] = cls(**fields, needs_grad=True)
    for model in MODELS:
        for cache, layers in requests_for(model, HOST).items():
            for kind, request in layers.items():
                found[" ".join(part for part in (model.name, kind, cache) if part)] = request
    return found


@functools.cache
def matrix() -> dict[str, dict[str, str]]:
    """Device to request to its kernels in one line, so that a change is one line of the diff."""
    with hal.simulate(libraries=LIBRARIES):
        found = decision_matrix(DEVICES, requests())
    return {
        d: {r: ", ".join(k or "none" for k in cell.values()) for r, cell in row.items()} for d, row in found.items()
    }


def test_decisions_are_those_of_the_golden_file(request: pytest.FixtureRequest) -> None:
    # requirement B2, E13, P50, E14
    found = matrix()
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    expected = json.loads(GOLDEN.read_text())
    changed = [
        f"{device} | {name}: {expected.get(device, {}).get(name)} -> {cell}"
        for device, row in found.items()
        for name, cell in row.items()
        if expected.get(device, {}).get(name) != cell
    ]
    assert not changed, "decisions changed; if that is meant, pytest tests/golden --update-golden:\n" + "\n".join(
        changed
    )
    assert {d: set(r) for d, r in expected.items()} == {d: set(r) for d, r in found.items()}


def test_every_registered_kernel_wins_somewhere() -> None:  # requirement R12
    registry = hal._plugins.registry()
    winners = {kernel for row in matrix().values() for cell in row.values() for kernel in cell.split(", ")}
    needed = {k.name for k in registry.kernels.values() if any(n.library not in LIBRARIES for n in k.needs)}
    beaten = {k.name for k in registry.kernels.values() if k.band == hal.Band.REFERENCE and k.op != "attention"}
    assert set(registry.kernels) - winners - needed - beaten == set()


@pytest.mark.parametrize("name", ["reference.kv_cache_write", "reference.merge_attention_states"])
def test_a_reference_that_another_portable_kernel_always_beats_can_still_be_forced(
    name: str,
) -> None:  # requirement R12
    request = requests()["cache write" if "write" in name else "merge"]
    assert hal.select(request, device="cpu", kernel=name).kernels() == {"call": name}


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_gets_a_full_answer(device: str) -> None:  # requirement X16, X19, R2, D10
    with hal.simulate(device, libraries=LIBRARIES):
        for request in requests().values():
            selection = hal.select(request)
            text = selection.explain()
            assert hal.device().arch.name in text
            for choice in selection.choices.values():
                assert all(c.reasons for c in choice.candidates if c.status == "refused")
            try:
                require(selection)
            except NoKernelError as error:
                assert "next step" in str(error)  # noqa: PT017
