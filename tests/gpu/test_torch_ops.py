"""On hardware: torch's operators behind the ops beside attention, which serve where nothing else is installed."""

from __future__ import annotations

import pytest
import torch

import hal
from hal import _plugins
from hal.testing import check, corners
from hal_ops.rms_norm import RmsNormRequest
from hal_ops.rms_norm.torch_norm import rms_norm

pytestmark = pytest.mark.gpu

KERNELS = [k for k in _plugins.registry().kernels.values() if (k.library, k.phase) == ("torch", "call")]


@pytest.mark.parametrize("name", [k.name for k in KERNELS])
def test_they_are_right_at_the_corners_of_their_declarations(name: str) -> None:  # requirement X11, P24
    found = [check(name, request, device=hal.device()) for request in corners(name, device=hal.device())]
    assert len(found) > 5
    wrong = [str(result) for result in found if not result.ok]
    assert not wrong, f"{len(wrong)} of {len(found)} corners:\n" + "\n".join(wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_are_rounded_once(dtype: torch.dtype) -> None:
    """By torch's own kernel too: two roundings miss the nearest number in one of some hundred elements."""
    torch.manual_seed(0)
    place = hal.device().torch_device()
    x, weight = torch.randn(400, 64, device=place).to(dtype), torch.randn(64, device=place).to(dtype)
    found = rms_norm(RmsNormRequest(hidden_size=64, dtype=str(dtype).removeprefix("torch.")), hal.device())(x, weight)
    wide = x.double()
    right = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()).to(dtype)
    assert (found != right).float().mean() < 1e-3
