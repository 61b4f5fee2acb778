"""torch's own attention on ROCm: bound against torch's schemas, and by value against AOTriton's habits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import emulated.signatures
import pytest
import torch
from emulated import aotriton
from emulated.amd import KERNELS, built, check_corners, device_of, values
from emulated.operators import emulated_operators

import hal
from hal.testing import check
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case
from hal_rocm import sdpa_kernels

NAMES = [kernel.name for kernel in sdpa_kernels.KERNELS]
NEEDS = sdpa_kernels.KERNELS[0].needs[0].versions
VERSIONS = [v for v in emulated.signatures.versions("torch") if hal.Version.parse(v).satisfies(NEEDS)]
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "phases": ("prefill",)}

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


@pytest.fixture(autouse=True)
def calls() -> Iterator[Calls]:
    """torch's operators answer as AOTriton does; gives their calls."""
    found: Calls = []
    with emulated_operators(_watched({**aotriton.FLASH, **aotriton.EFFICIENT}, found)):
        yield found


def _watched(emulations: Mapping[str, Callable[..., Any]], found: Calls) -> dict[str, Callable[..., Any]]:
    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append((name, args, kwargs))
            return function(*args, **kwargs)

        return call

    return {name: watch(name, function) for name, function in emulations.items()}


def request(**fields: Any) -> AttentionRequest:
    return AttentionRequest(**{**HEADS, **fields})


@pytest.mark.parametrize("name", NAMES)
def test_corners_by_value(name: str) -> None:
    # requirement A5, B5, B15, C7, D4, D14, E8, P22, P24
    check_corners(name)
    for arch in ("gfx90a", "gfx950"):
        check_corners(name, arch, 2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_calls_bind_in_every_supported_version(name: str, version: str, calls: Calls) -> None:
    # requirement A4, P39
    values(make_case(request(), "prefill", lengths=((5, 5), (3, 9))), built(name, request()))
    assert calls
    for operator, args, kwargs in calls:
        emulated.signatures.signature("torch", version, f"aten:{operator}").bind(*args, **kwargs)


def test_causality_counts_from_the_first_key(calls: Calls) -> None:
    # requirement C7, E8
    wanted = request(num_kv_heads=4, return_lse=True)
    case = make_case(wanted, "prefill", lengths=((3, 9),) * 2, form="dense")
    q, k, v = case.args
    naive = aotriton.FLASH["_flash_attention_forward"](
        q, k, v, None, None, 3, 9, 0.0, True, False, scale=wanted.softmax_scale
    )
    assert not torch.allclose(naive[0].double(), case.expected()["out"], atol=2e-2)
    for name in NAMES:
        calls.clear()
        values(case, built(name, wanted))
        ((_, args, _),) = calls
        assert args[0].shape[1] == 9, "padded in front"
        assert not args[0][:, :6].any()


@pytest.mark.parametrize("shape", [((5, 5), (3, 3), (0, 0), (7, 7)), ((4, 4),)])
def test_ragged_calls_of_equal_lengths_wait_for_nothing(
    shape: tuple[tuple[int, int], ...], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    # requirement B15, P38
    wanted = request(return_lse=True)
    case = make_case(wanted, "prefill", lengths=shape)
    cu = case.kwargs["cu_seqlens_q"]
    attend = built("sdpa_aotriton_flash.prefill", wanted)
    with monkeypatch.context() as patch:
        patch.setattr(hal_rocm_sdpa(), "_runs", lambda *_: pytest.fail("it looks at the lengths"))
        out, lse = attend(*case.args, **{**case.kwargs, "cu_seqlens_k": cu})
    right = case.expected()
    torch.testing.assert_close(out.double(), right["out"], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), right["lse"], atol=2e-2, rtol=2e-2)
    assert len(calls) == 1


def hal_rocm_sdpa() -> Any:
    from hal_rocm import _sdpa

    return _sdpa


def test_other_ragged_calls_take_neighbours_of_one_length_together(calls: Calls) -> None:
    # requirement B15
    wanted = request(return_lse=True, causal=False)
    case = make_case(wanted, "prefill", lengths=((3, 5), (3, 5), (0, 4), (2, 0), (3, 5)))
    for name in NAMES:
        calls.clear()
        values(case, built(name, wanted))
        assert [args[0].shape[0] for _, args, _ in calls] == [2, 1]


def test_torch_builds_over_ck_write_the_lse_by_heads() -> None:
    # requirement B15
    by_heads = hal_rocm_sdpa()._by_heads
    lse = torch.arange(12.0).view(2, 6)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert by_heads(lse, cu, 6) is lse
    padded = torch.full((2, 2, 4), torch.nan)
    padded[0, :, :2], padded[1, :, :] = lse[:, :2], lse[:, 2:]
    assert torch.equal(by_heads(padded, cu, 6), lse)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "fields",
    [{"window": 4}, {"softcap": 2.0}, {"sinks": True}, {"alibi": True}, {"v_head_dim": 128}, {"head_dim": 36}],
    ids=lambda f: next(iter(f)),
)
def test_what_they_lack_is_refused(name: str, fields: dict[str, Any]) -> None:
    # requirement C7, P22
    with pytest.raises(hal.errors.InputError, match=next(iter(fields))):
        check(KERNELS[name], request(**fields), device=device_of())


def test_determinism_is_not_claimed_for_gradients() -> None:
    # requirement D14
    for name in NAMES:
        reasons = KERNELS[name].check(request(deterministic=True, needs_grad=True), device_of())
        assert [(r.code, r.field) for r in reasons] == [("feature_unsupported", "deterministic")]
        assert not KERNELS[name].check(request(deterministic=True), device_of())


def test_efficient_repeats_kv_heads_as_declared(calls: Calls) -> None:
    # requirement C7, D4
    assert "fewer heads than q" in KERNELS["sdpa_aotriton_efficient.prefill"].copies
    for kv_heads in (4, 2):
        wanted = request(num_kv_heads=kv_heads, dtype="float32")
        case = make_case(wanted, "prefill", lengths=((5, 5),) * 2, form="dense")
        values(case, built("sdpa_aotriton_efficient.prefill", wanted), 1e-4)
        _, (_, k, *_), _ = calls[-1]
        assert k.shape[2] == 4
        assert (k.data_ptr() == case.args[1].data_ptr()) == (kv_heads == 4)
