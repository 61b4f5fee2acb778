"""Emulations compute many small things: one thread is several times as fast as many, and leaves others their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import hal


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_pool() -> Iterator[None]:
    """Work memory of its own for what flashinfer's adapters lease: none that another test has made larger."""
    from hal_nvidia import _flashinfer_pool as pool

    buffers = hal.workspace(torch.device("cpu"))._buffers
    before = dict(buffers)
    buffers.clear()
    yield
    buffers.clear()
    buffers.update(before)
    pool._idle.clear()
    pool._zeroed.clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a distribution of a name and version, with these files."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(name: str, version: str, *files: str) -> None:
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise AssertionError('imported to be considered')\n")
        hal.reset()

    yield put
    hal.reset()
