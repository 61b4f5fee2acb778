"""torch_musa's adapters by value, against torch's functions with torch_musa's habits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import emulated.operators
import emulated.signatures
import emulated.torch_musa
import pytest
import torch
from torch.nn import functional

import hal
from hal import _bind, _plugins
from hal.testing import check, corners
from hal_musa import torch_musa_kernels
from hal_ops.attention import ATTENTION, AttentionRequest

KERNELS = {k.name: k for k in torch_musa_kernels.KERNELS}
HOMES = [(name, arch) for name, kernel in KERNELS.items() for arch in kernel.platforms["musa"].only]
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "kv_layout": "NHD"}

Device = Callable[..., hal.Device]


@pytest.fixture(autouse=True)
def torch_musa(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """torch's functions answer as torch_musa's do; may be called with another version of MUSA."""

    def use(musa: str = "4.3.6") -> None:
        monkeypatch.setattr(functional, "scaled_dot_product_attention", emulated.torch_musa.attention(musa))

    monkeypatch.setattr(torch, "rms_norm", emulated.torch_musa.rms_norm)
    monkeypatch.setattr(torch, "swish_glu", emulated.torch_musa.swish_glu, raising=False)
    use()
    return use


@pytest.mark.parametrize(("name", "arch"), HOMES)
def test_corners_by_value(name: str, arch: str, device: Device) -> None:
    # requirement A5, B5, B13, B16, C7, D1, D4, D15, E8, P22, P24
    kernel, place = KERNELS[name], device(arch)
    op = _plugins.registry().op(kernel.op)
    limit = None if arch == "mp_22" else 4
    results = [check(kernel, r, device=place) for r in corners(kernel, op=op, device=place, limit=limit)]
    assert results
    assert not [r for r in results if not r.ok], "\n".join(str(r) for r in results if not r.ok)


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("musa", ["4.1", "4.2"])
def test_a_scale_is_passed_where_it_is_taken(
    phase: str, scale: float | None, musa: str, device: Device, torch_musa: Callable[..., None]
) -> None:
    # requirement C7, X12
    torch_musa(musa)
    request = AttentionRequest(**HEADS, softmax_scale=scale, phases=(phase,))
    with hal.simulate((device("mp_22", musa),), libraries={"torch": "2.7.1", "torch_musa": "2.7.1"}):
        choice = hal.select(request, kernel="torch_musa").choices[phase]
    if scale is None or musa == "4.2":
        assert choice.kernel is KERNELS[f"torch_musa.{phase}"]
        assert check(choice.kernel, request, device=device("mp_22", musa)).ok
    else:
        (reason,) = next(c.reasons for c in choice.candidates if c.kernel.name == f"torch_musa.{phase}")
        assert (reason.code, reason.field) == ("runtime_too_old", "runtime")
        assert "this is 4.1" in reason.text


@pytest.mark.parametrize(
    ("dims", "codes"),
    [
        ((128, 128), []),
        ((192, 128), []),
        ((160, 160), []),
        ((192, 192), ["head_dim"]),
        ((256, 256), ["head_dim"]),
        ((160, 128), ["head_dim"]),
        ((100, 100), ["head_dim"]),
    ],
)
def test_dims_without_a_flash_kernel_are_refused(dims: tuple[int, int], codes: list[str]) -> None:
    # requirement B3, B5
    request = AttentionRequest(num_q_heads=4, num_kv_heads=2, head_dim=dims[0], v_head_dim=dims[1], phases=("prefill",))
    with hal.simulate("musa:mp_22,musa=4.3", libraries={"torch": "2.7.1", "torch_musa": "2.7.1"}):
        candidates = hal.select(request).choices["prefill"].candidates
    reasons = next(c.reasons for c in candidates if c.kernel.name == "torch_musa.prefill")
    assert [r.code for r in reasons] == codes


def test_ragged_batches_of_one_length_are_not_waited_for(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement P38
    request = AttentionRequest(**HEADS, phases=("prefill",))
    attend = _bind.build(KERNELS["torch_musa.prefill"], ATTENTION, request, device("mp_22"))
    q, kv = torch.randn(12, 4, 64, dtype=torch.bfloat16), torch.randn(12, 2, 64, dtype=torch.bfloat16)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)

    def waits(self: Any) -> Any:
        raise AssertionError("it waits for the device")

    with monkeypatch.context() as patch, emulated.operators.spied(functional, "scaled_dot_product_attention") as calls:
        patch.setattr(torch.Tensor, "tolist", waits)
        ragged = attend(q, kv, kv, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=6, max_seqlen_k=6)
    assert len(calls) == 1
    dense = attend(*(x.view(2, 6, *x.shape[1:]) for x in (q, kv, kv)))
    assert torch.equal(ragged.view_as(dense), dense)


def test_masks_stay_small_where_windows_hide_most_keys(device: Device) -> None:
    request = AttentionRequest(**HEADS, window=33, phases=("prefill",))
    attend = _bind.build(KERNELS["torch_musa.prefill"], ATTENTION, request, device("mp_22"))
    x = torch.randn(1, 2500, 4, 64, dtype=torch.bfloat16)
    with emulated.operators.spied(functional, "scaled_dot_product_attention") as calls:
        attend(x, x[:, :, :2], x[:, :, :2])
    shapes = [tuple(args[3].shape) for args, _ in calls]
    assert shapes == [(1024, 1024), (1024, 1056), (452, 484)]


def test_what_it_does_not_do_raises(device: Device) -> None:
    # requirement C7
    request = AttentionRequest(**HEADS)
    prefill = _bind.build(KERNELS["torch_musa.prefill"], ATTENTION, request, device("mp_22"))
    decode = _bind.build(KERNELS["torch_musa.decode"], ATTENTION, request, device("mp_22"))
    x = torch.randn(1, 2, 4, 64, dtype=torch.bfloat16)
    one = torch.ones(4)
    for keywords in ({"sinks": one}, {"alibi_slopes": one}, {"return_lse": True}):
        with pytest.raises(ValueError, match=r"sinks|alibi|LSE"):
            prefill(x, x[:, :, :2], x[:, :, :2], **keywords)
    for keywords in ({"k_scale": one}, {"v_scale": one}, {"return_lse": True}, {"sinks": one}):
        with pytest.raises(ValueError, match=r"sinks|FP8"):
            decode(x[0], x, x, None, [], **keywords)


@pytest.mark.parametrize("version", emulated.signatures.versions("torch_musa"))
def test_operators_have_the_kept_parameters(version: str) -> None:
    # requirement A4
    kept = emulated.signatures.functions("torch_musa", version)
    kept["aten:swish_glu"].bind("x")
    kept["aten:_fused_rmsnorm_forward"].bind("x", (64,), 1e-6, "weight")
    flash = kept["aten:_scaled_dot_product_attention_flash_musa"]
    flash.bind("q", "k", "v", None, 0.0, True, scale=0.3)
    ours = inspect.signature(emulated.torch_musa.attention()).parameters
    assert list(ours)[:6] == list(flash.parameters)[:6]
