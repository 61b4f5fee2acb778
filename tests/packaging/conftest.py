"""Wheels built from this tree, and clean environments to install them in. Needs no package index."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Mapping
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
VENDORS = ("nvidia", "rocm", "musa")
PROJECTS = {"torch-hal": ROOT, **{f"torch-hal-{v}": ROOT / "platforms" / v for v in VENDORS}}
PROJECTS["torch-hal-acme"] = ROOT / "examples/acme_platform"


def run(*command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command; its output, or a failure that shows everything it said."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("HAL_", "PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(c) for c in command],
        env={**plain, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A built wheel, read."""

    path: Path

    def names(self) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            return [name for name in archive.namelist() if not name.endswith("/")]

    def read(self, suffix: str) -> str:
        (name,) = [n for n in self.names() if n.endswith(f".dist-info/{suffix}")]
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(name).decode()

    def tops(self) -> set[str]:
        return {top for n in self.names() if not (top := n.split("/")[0]).endswith(".dist-info")}

    def metadata(self) -> Message:
        return Parser().parsestr(self.read("METADATA"))

    def requirements(self, *, extra: str = "") -> set[str]:
        """Names of what is needed: always, or for an extra."""
        wanted = [Requirement(text) for text in self.metadata().get_all("Requires-Dist") or []]
        of_extras = {r for r in wanted if r.marker and "extra ==" in str(r.marker)}
        if not extra:
            return {r.name for r in wanted if r not in of_extras}
        return {r.name for r in of_extras if r.marker is not None and r.marker.evaluate({"extra": extra})}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    """Distribution name to its wheel, built by pip with the backend that is installed here, or else a fetched one."""
    out = tmp_path_factory.mktemp("wheels")
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *here, "-w", out, *PROJECTS.values())
    built = {name: list(out.glob(f"{name.replace('-', '_')}-[0-9]*.whl")) for name in PROJECTS}
    assert all(len(found) == 1 for found in built.values()), built
    return {name: Wheel(found[0]) for name, found in built.items()}


def closure(names: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions of these names that are installed here, and all that they need."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = list(names)
    while pending:
        name = pending.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        needed = [Requirement(text) for text in found[name].requires or []]
        pending += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment of its own: no pip, nothing from outside but what is borrowed by name."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def site_packages(self) -> Path:
        code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        return Path(run(self.python, "-I", "-c", code).strip())

    def borrow(self, *names: str) -> None:
        """Link distributions that are installed around this test, and what they need, so that no index is needed."""
        site = self.site_packages()
        for dist in closure(names).values():
            for top in {file.parts[0] for file in dist.files or [] if file.parts[0] not in ("..", "__pycache__")}:
                source, link = Path(str(dist.locate_file(top))), site / top
                if not link.exists() and source.suffix != ".pth":
                    link.symlink_to(source, target_is_directory=source.is_dir())

    def install(self, *wheels: Wheel) -> None:
        self._pip("install", "-q", "--no-deps", "--no-index", *(w.path for w in wheels))

    def uninstall(self, name: str) -> None:
        self._pip("uninstall", "-q", "-y", name)

    def _pip(self, *command: str | Path) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, *command)

    def ask(self, code: str, **variables: str) -> Any:
        """Run code far from the sources; the last line that it printed, read as JSON."""
        said = run(self.python, "-I", "-W", "error", "-c", code, env=variables, cwd=self.folder)
        return json.loads(said.splitlines()[-1])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An empty environment."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    return Environment(folder)
