"""Distributions that share their name with another project: a module that only the right one has tells them apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import hal
from hal import _libraries
from hal_ops.attention import AttentionRequest

NAME = "hal_test_shared"
REQUEST = AttentionRequest(num_q_heads=2, num_kv_heads=2, head_dim=64, phases=("decode",))


def install(folder: Path, *modules: str) -> None:
    """A distribution whose package must not be imported."""
    metadata = folder / f"{NAME}-1.5.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.5\n", encoding="utf-8")
    for module in ("__init__.py", *modules):
        file = folder / NAME / module
        file.parent.mkdir(exist_ok=True)
        file.write_text("raise AssertionError('imported')\n", encoding="utf-8")


@pytest.mark.parametrize(("modules", "right"), [(("proof.py",), True), ((), False), (("other.py",), False)])
def test_a_module_proves_the_right_distribution(
    fake_platform: Any,
    library: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    modules: tuple[str, ...],
    right: bool,
) -> None:
    # requirement P45
    needs = hal.Needs(NAME, ">=1.0", install="build it from source", module=f"{NAME}.proof")
    fake_platform(kernels=library("shared", needs=(needs,)))
    install(tmp_path, *modules)
    try:
        with monkeypatch.context() as patched:
            patched.syspath_prepend(str(tmp_path))
            _libraries.forget()
            choice = hal.select(REQUEST).choices["decode"]
    finally:
        _libraries.forget()
    (found,) = (c.reasons for c in choice.candidates if c.kernel.name == "shared.decode")
    assert NAME not in sys.modules
    if right:
        assert found == ()
        return
    (reason,) = found
    assert (reason.code, reason.wanted, reason.allowed) == ("not_installed", "1.5", ">=1.0")
    assert reason.text == f"{NAME} 1.5 here is another project of that name: it has no {NAME}.proof"
    assert reason.remedy == "build it from source"


def test_a_simulated_library_is_the_one_that_is_meant(fake_platform: Any, library: Any) -> None:
    fake_platform(kernels=library("shared", needs=(hal.Needs(NAME, module=f"{NAME}.proof"),)))
    with hal.simulate(libraries={NAME: "2.0"}):
        assert hal.select(REQUEST).kernels()["decode"] == "shared.decode"
