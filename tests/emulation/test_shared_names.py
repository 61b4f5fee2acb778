"""Names that two vendors' distributions share: what is installed is told by its content, what it is for by the device.

MATE's wrapper installs as ``flash_attn_3`` with a module ``flash_attn_interface``, as flash-attention 3 for NVIDIA does
(github.com/MooreThreads/mate at 9ac89cf, ``wrappers/flash-attention/pyproject.toml``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any

import pytest

import hal
from hal_ops.attention import AttentionRequest

Install = Callable[..., None]

LLAMA = AttentionRequest(num_q_heads=32, num_kv_heads=8, head_dim=128)
WRAPPER = ("flash_attn_3/__init__.py", "flash_attn_3/interface.py", "flash_attn_interface.py")
UPSTREAM = (f"flash_attn_3/_C{EXTENSION_SUFFIXES[0]}", "flash_attn_config.py", "flash_attn_interface.py")
HOPPER, S5000 = "nvidia:sm_90,cuda=12.8,driver=570.86", "musa:mp_31,musa=4.3.6"
NAMES = ("flash_attn_3", "flash_attn_interface", "mate")


def reasons(name: str) -> dict[str, hal.Reason]:
    candidates = hal.select(LLAMA).choices[name.rpartition(".")[2]].candidates
    return {
        r.code: r for c in candidates if c.kernel.name == name for r in c.reasons if r.field in ("library", "device")
    }


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_mates_wrapper_is_no_flash_attention_3_on_an_nvidia_device(install: Install, phase: str) -> None:
    # requirement X14, C9, P45
    install("flash_attn_3", "0.2.2", *WRAPPER)
    install("mate", "0.2.2", "mate/__init__.py", "mate/mha_interface.py")
    with hal.simulate(HOPPER):
        found = reasons(f"fa3.{phase}")
        assert found["not_installed"].text == (
            "flash-attn-3 0.2.2 here is another project of that name: it has no flash_attn_3._C"
        )
        assert "tokenspeed-fa3" in found["not_installed"].remedy
        assert "wrong_vendor" in reasons(f"mate.{phase}")
    assert not sys.modules.keys() & set(NAMES)


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
def test_flash_attention_3_is_no_mate_on_a_moore_threads_device(install: Install, phase: str) -> None:
    # requirement X14, C9, P34, P45
    install("flash_attn_3", "3.0.0.post9", *UPSTREAM)
    install("torch_musa", "2.7.1", "torch_musa/__init__.py")
    with hal.simulate(S5000):
        assert reasons(f"mate.{phase}")["not_installed"].text == "mate is not installed"
        assert "wrong_vendor" in reasons(f"fa3.{phase}")
    assert not sys.modules.keys() & set(NAMES)


def test_each_is_recognised_on_its_own_device(install: Install) -> None:
    # requirement X14, P45
    install("flash_attn_3", "3.0.0.post9", *UPSTREAM)
    install("torch_musa", "2.7.1", "torch_musa/__init__.py")
    install("mate", "0.2.2", "mate/__init__.py", "mate/mha_interface.py")
    with hal.simulate(HOPPER):
        assert "not_installed" not in reasons("fa3.decode")
    with hal.simulate(S5000):
        assert "not_installed" not in reasons("mate.decode")
    assert not sys.modules.keys() & set(NAMES)


def test_both_under_one_name_are_right_for_each_device(install: Install) -> None:
    """A container for both vendors, or a wrapper laid over the other's files: the device decides."""
    # requirement X14
    install("flash_attn_3", "0.2.2", *WRAPPER, UPSTREAM[0])
    install("torch_musa", "2.7.1", "torch_musa/__init__.py")
    for where, own, other in ((HOPPER, "fa3.decode", "mate.decode"), (S5000, "mate.decode", "fa3.decode")):
        with hal.simulate(where):
            assert "wrong_vendor" in reasons(other)
            assert "wrong_vendor" not in reasons(own)


def test_a_patched_torch_makes_no_other_vendor_of_a_device(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchada makes ``torch.cuda`` answer for MUSA; which library suits is asked of the device alone."""
    # requirement X14, P34
    torch: Any = pytest.importorskip("torch")
    install("flash_attn_3", "0.2.2", *WRAPPER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with hal.simulate(S5000):
        assert "wrong_vendor" in reasons("fa3.decode")
