"""Fixtures for tests of plugins and kernels. Opt in with ``pytest_plugins = ["hal.testing.fixtures"]``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import hal
from hal._plugins import temporary_plugin
from hal.testing._platforms import make_platform

__all__ = ["fake_plugin", "hal_clean", "simulated_devices", "simulated_libraries"]


@pytest.fixture
def hal_clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing of this machine's settings reaches the test: no ``HAL_*`` variable, config file, ledger or measurement.

    Gives the folder that stands in for the cache folder. To use it everywhere: ``pytestmark =
    pytest.mark.usefixtures("hal_clean")``, or an autouse fixture that takes it.
    """
    for name in [n for n in os.environ if n.startswith("HAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HAL_CACHE_DIR", str(tmp_path / "cache"))
    hal.reset()
    yield tmp_path / "cache"
    hal.reset()


@pytest.fixture
def simulated_devices() -> Iterator[Callable[[str | Iterable[hal.Device]], tuple[hal.Device, ...]]]:
    """Pretend until the test ends: ``simulated_devices("nvidia:sm_90,cuda=12.8*2")`` gives the devices."""
    with contextlib.ExitStack() as stack:

        def pretend(devices: str | Iterable[hal.Device]) -> tuple[hal.Device, ...]:
            stack.enter_context(hal.simulate(devices=devices))
            return hal.devices()

        yield pretend


@pytest.fixture
def simulated_libraries() -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Pretend until the test ends that these are all the distributions: ``simulated_libraries({"torch": "2.8"})``."""
    with contextlib.ExitStack() as stack:

        def pretend(libraries: Mapping[str, str]) -> None:
            stack.enter_context(hal.simulate(libraries=libraries))

        yield pretend


@pytest.fixture
def fake_plugin() -> Iterator[Callable[..., type[hal.Platform]]]:
    """Plug a platform in until the test ends: a class, or what :func:`hal.testing.make_platform` makes one of."""
    with contextlib.ExitStack() as stack:

        def plug(platform: type[hal.Platform] | str = "fake", **parts: Any) -> type[hal.Platform]:
            made = make_platform(platform, **parts) if isinstance(platform, str) else platform
            stack.enter_context(temporary_plugin(made.name, made))
            return made

        yield plug
