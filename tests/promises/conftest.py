"""Fresh processes to hold promises in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PRELUDE = '''
import importlib.metadata, json, os, sys

class Block:
    """Refuses to import some packages, as if they were not installed."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

def block(*names):
    sys.meta_path.insert(0, Block(names))

def forbid_entry_points():
    def refuse(**params):
        raise AssertionError("entry points were read")
    importlib.metadata.entry_points = importlib.metadata.distributions = refuse

def others():
    """Top-level modules that are neither ours nor Python's."""
    tops = {name.partition(".")[0] for name in sys.modules}
    known = {*sys.stdlib_module_names, *sys.builtin_module_names, *BEFORE}
    return sorted(t for t in tops if t not in known)

def answer(value):
    sys.stdout.write(json.dumps(value))

BEFORE = {name.partition(".")[0] for name in sys.modules}
'''


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Any]:
    """Run code in a new process, after the prelude above; returns what it gave to ``answer()``."""

    def run(code: str, *, variables: dict[str, str] | None = None, path: tuple[str, ...] = ()) -> Any:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HAL_")}
        env["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [env.get("PYTHONPATH", "")])])
        env.update(variables or {})
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(code)],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout else None

    return run
