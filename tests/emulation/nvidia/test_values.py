"""Adapters by value, over emulations: at the corners of their declarations, for every arch, in every kept version."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from emulated import hardware, library, nvidia, operators, signatures, torch_attention

import hal
from hal import testing
from hal_ops.attention import AttentionRequest

KERNELS = [
    *(f"{name}.prefill" for name in nvidia.OPERATORS),
    *(f"{name}.{phase}" for name in nvidia.LIBRARIES for phase in ("prefill", "extend", "decode")),
]
RICH: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 16},
    "bidirectional": {"causal": False, "window": (5, 3)},
    "lse": {"return_lse": True, "deterministic": True},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "scale": {"softmax_scale": 0.3},
    "gradients": {"needs_grad": True},
    "HND": {"kv_layout": "HND"},
    "queries": {"max_q_len": 3},
    "graph": {"graph": True},
    "FP8": {"qkv_dtype": "float8_e4m3fn", "qkv_scale": "head", "num_kv_heads": 4, "return_lse": True},
}


def library_of(name: str) -> str:
    return name.partition(".")[0]


def requests(name: str, arch: str, limit: int | None = None) -> list[Any]:
    kernel = hardware.kernel_named(name)
    return testing.corners(kernel, device=hardware.device_of(arch), limit=limit)


def wrong(name: str, given: list[Any], arch: str) -> list[str]:
    return [str(r) for r in (hardware.check(name, request, arch) for request in given) if not r.ok]


def rich(name: str, arch: str = "sm_90") -> list[AttentionRequest]:
    """One request a feature, for those that the kernel serves."""
    phase = name.rpartition(".")[2]
    page = 256 if name.startswith("fa2") else 16
    kernel, device = hardware.kernel_named(name), hardware.device_of(arch)
    heads = 4 if library_of(name) == "sdpa_efficient" else 2
    found = []
    for fields in (f for f in RICH.values() if phase == "prefill" or "qkv_dtype" not in f):
        base = {"num_q_heads": 4, "num_kv_heads": heads, "head_dim": 64, "page_size": page, "kv_layout": "NHD"}
        request = AttentionRequest(**{**base, **fields}, phases=(phase,))
        refused = list(hal._eligibility._fields(kernel, request)) + list(
            kernel.check(request, device) if kernel.check else ()
        )
        found += [] if refused else [request]
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_right_at_the_corners_of_its_declaration(name: str) -> None:
    # requirement A4, C7, D1, D15, E8, E11, P22, P23, P24, X12
    with nvidia.running(library_of(name)):
        given = requests(name, "sm_90")
        assert len(given) > 15
        assert wrong(name, given, "sm_90") == []


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        (name, arch)
        for name in KERNELS
        for arch in ("sm_75", "sm_80", "sm_89", "sm_100", "sm_103", "sm_120", "sm_121")
        if not hal.Archs(only=hardware.kernel_named(name).platforms["nvidia"].only).refusal(
            hardware.device_of(arch).arch, hal.Arch
        )
        and not (arch == "sm_75" and "efficient" not in name)
    ],
)
def test_the_adapter_path_runs_for_every_arch(name: str, arch: str) -> None:  # requirement A5, D10, E14
    with nvidia.running(library_of(name)):
        given = requests(name, arch, 6)
        assert given
        assert wrong(name, given, arch) == []


@pytest.mark.parametrize(
    ("name", "distribution", "version"),
    [
        (f"{key}.{phase}", *pair)
        for key, emulated in nvidia.LIBRARIES.items()
        for pair in emulated.versions()
        for phase in ("prefill", "extend", "decode")
    ],
)
def test_calls_bind_to_the_signatures_of_every_version(name: str, distribution: str, version: str) -> None:
    # requirement A4, A5, D13
    with nvidia.running(library_of(name), distribution, version) as held:
        given = rich(name)
        assert len(given) > 5
        assert wrong(name, given, "sm_90") == []
        assert held is not None
        assert held.calls


@pytest.mark.parametrize("name", nvidia.OPERATORS)
def test_operator_calls_bind_to_the_schemas_of_every_torch(name: str) -> None:  # requirement A4
    kernel = hardware.kernel_named(f"{name}.prefill")
    oldest = hal.Version.parse(kernel.needs[0].versions.lstrip(">="))
    operator = next(iter(nvidia.OPERATORS[name]))
    with nvidia.running(name):
        module = __import__(f"hal_nvidia._{name}", fromlist=["forward"])
        with operators.spied(module, "forward") as calls:
            assert wrong(kernel.name, rich(kernel.name), "sm_90") == []
    versions = [v for v in signatures.versions("torch") if hal.Version.parse(v) >= oldest]
    assert len(versions) > 3
    assert calls
    for version in versions:
        schema = signatures.signature("torch", version, operator)
        for args, kwargs in calls:
            schema.bind(*args, **kwargs)


def test_a_renamed_parameter_fails(monkeypatch: pytest.MonkeyPatch) -> None:  # requirement A4
    """The check can fail: were the page table called otherwise, extend would not pass."""
    real = signatures.functions

    def renamed(name: str, version: str) -> dict[str, inspect.Signature]:
        found = dict(real(name, version))
        key = "flash_attn_interface:flash_attn_with_kvcache"
        parameters = [
            p.replace(name="block_table") if p.name == "page_table" else p for p in found[key].parameters.values()
        ]
        return {**found, key: inspect.Signature(parameters)}

    monkeypatch.setattr(library, "functions", renamed)
    with nvidia.running("fa3"):
        result = hardware.check("fa3.extend", rich("fa3.extend")[0])
        assert not result.ok
        assert "page_table" in result.detail


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("fa2.prefill", {"window_size": lambda w: (w[0] + (w[0] >= 0), w[1])}),
        ("fa2.extend", {"softmax_scale": lambda s: s * 1.05}),
        ("fa3.decode", {"causal": lambda c: not c}),
        ("fa3.prefill", {"softcap": lambda c: 0.0}),
    ],
)
def test_an_argument_that_is_mapped_wrongly_is_found(name: str, spoil: dict[str, Any]) -> None:  # requirement P24
    """The check can fail: each of these mistakes changes a value."""
    key = library_of(name)

    def spoiled(function: Any) -> Any:
        names = list(inspect.signature(function).parameters)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = {**dict(zip(names, args, strict=False)), **kwargs}
            return function(**{n: spoil[n](v) if n in spoil else v for n, v in bound.items()})

        return call

    emulated = nvidia.LIBRARIES[key]
    distribution = emulated.distributions[0]
    version = signatures.versions(distribution)[-1]
    functions = {n: spoiled(f) if n.startswith("flash_attn") else f for n, f in emulated.functions.items()}
    with (
        hal.simulate(libraries={"torch": "2.13.0", distribution: version}),
        library.installed(distribution, version, functions, adapters=[emulated.adapter], modules=emulated.modules),
    ):
        assert wrong(name, rich(name), "sm_90")


@pytest.mark.parametrize("given", [("q_scale",), ("k_scale",), ("v_scale",), ("q_scale", "v_scale")], ids=",".join)
def test_a_scale_that_is_not_given_is_one(given: tuple[str, ...]) -> None:  # requirement B6, D12, C7
    """Of FP8 values, dense and ragged: what is given counts, whatever else is."""
    fields = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "qkv_dtype": "float8_e4m3fn"}
    request = AttentionRequest(**fields, phases=("prefill",))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, heads, 64).to(torch.float8_e4m3fn) for heads in (4, 2, 2))
    ones = dict.fromkeys(("q_scale", "k_scale", "v_scale"), torch.ones(1))
    some = dict.fromkeys(given, torch.tensor([2.0]))
    cu = torch.tensor([0, 5, 10], dtype=torch.int32)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5}
    with nvidia.running("fa3"):
        prefill = hardware.build("fa3.prefill", request)
        found, right = prefill(q, k, v, **some), prefill(q, k, v, **{**ones, **some})
        ragged = prefill(*(x.flatten(0, 1) for x in (q, k, v)), **lengths, **some)
        plain = prefill(q, k, v)
    torch.testing.assert_close(found, right, atol=0, rtol=0)
    torch.testing.assert_close(ragged, right.flatten(0, 1), atol=0, rtol=0)
    assert not torch.equal(found, plain)
    if given == ("v_scale",):
        torch.testing.assert_close(found, plain * 2, atol=0, rtol=0)


def test_torch_rows_without_keys_need_the_adapters_care() -> None:  # requirement B15
    """The emulated operators have the habits that the adapters undo: without that, the LSE is 0, or +inf."""
    q, k = torch.randn(1, 5, 2, 8).half(), torch.randn(1, 3, 2, 8).half()
    efficient = torch_attention.EFFICIENT["_efficient_attention_forward"]
    assert efficient(q, k, k, None, None, None, None, None, 0.0, 2, True, scale=0.3)[1][0, :, :2].eq(0).all()
    flash = torch_attention.FLASH["_flash_attention_forward"]
    assert flash(q, k, k, None, None, 5, 3, 0.0, True, False, scale=0.3)[1][0, :, :2].isposinf().all()
