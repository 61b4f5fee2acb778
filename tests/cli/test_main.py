"""The command group: help, misspelt names, errors, logging, and what is imported."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hal
from hal.cli._app import COMMANDS, app

WITHOUT_TORCH = [
    ["doctor"],
    ["devices", "-v"],
    ["kernels", "-v"],
    ["env"],
    ["version"],
    ["explain", "attention", "--num-q-heads", "8", "--num-kv-heads", "2", "--head-dim", "64"],
    [
        "explain",
        "attention",
        "--num-q-heads",
        "8",
        "--num-kv-heads",
        "2",
        "--head-dim",
        "64",
        "--device",
        "cpu:x86_64,memory=1GiB",
    ],
    ["lock", "decisions.lock"],
]

RUN_ALL = """
import json, sys
from hal.cli import main
codes = []
for args in json.loads(sys.argv[1]):
    try:
        main(args)
    except SystemExit as exit:
        codes.append(exit.code or 0)
print("CODES", codes, "TORCH", "torch" in sys.modules)
"""


def run_all(folder: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", RUN_ALL, json.dumps(WITHOUT_TORCH)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, **environ}, check=False
    )


def test_help_describes_every_command(hal_cli) -> None:
    text = hal_cli("--help").stdout
    for name in COMMANDS:
        described = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert len(described) == 1
        assert len(described[0].split()) > 3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(hal_cli, name: str) -> None:
    result = hal_cli(*([name, "attention", "--help"] if name in ("explain", "tune") else [name, "--help"]))
    assert result.exit_code == 0
    assert "--json" in result.stdout


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["devcies"], "'devices'"),
        (["explian", "attention"], "'explain'"),
        (["explain", "atention"], "'attention'"),
        (["tune", "attentoin"], "'attention'"),
        (["env", "--jsno"], "--json"),
        (["explain", "attention", "--num-q-haeds", "8"], "--num-q-heads"),
        (["kernels", "--op", "atention"], "'attention'"),
        (["verify", "--op", "atention"], "'attention'"),
        (["verify", "--kernel", "referense"], "'reference'"),
        (["doctor", "--device", "cup:x86_64"], "'cpu'"),
        (["doctor", "--library", "torhc==2.8"], "'torch'"),
    ],
)
def test_misspelt_names_are_usage_errors_with_the_nearest_match(hal_cli, args: list[str], hint: str) -> None:
    # requirement X3, P4
    result = hal_cli(*args)
    assert result.exit_code == 2
    assert "id you mean" in result.stderr
    assert hint in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [["explain", "attention"], ["doctor"], ["lock", "x"]])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--device", " "], "' ' describes no device: write platform:arch, such as cpu:x86_64"),
        (["--device", ";"], "';' describes no device"),
        (["--device", "cpu:x86_64;cpu:aarch64"], "describes 2 devices, and the answer is for one"),
        (["--library", "torch==2.9.0", "--library", "Torch==2.8"], "torch is given a second time, after ==2.9.0"),
    ],
)
def test_what_describes_no_one_machine_is_a_usage_error(
    hal_cli, command: list[str], options: list[str], text: str, llama_options: list[str], monkeypatch, tmp_path
) -> None:
    # requirement X3
    monkeypatch.chdir(tmp_path)
    result = hal_cli(*command, *(llama_options if "explain" in command else ()), *options)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.split())
    assert not (tmp_path / "x").exists()


def test_many_alike_are_one_kind_of_machine(hal_json, llama_options: list[str]) -> None:
    facts = hal_json("explain", "attention", *llama_options, "--device", "cpu:x86_64*8")
    assert facts["device"]["id"] == "cpu:0"


def test_version(hal_cli, hal_json) -> None:
    assert hal_cli("version").stdout == hal_cli("--version").stdout == f"{hal.__version__}\n"
    assert hal_json("version") == {"torch-hal": hal.__version__}


def test_errors_are_messages(hal_cli, monkeypatch) -> None:
    monkeypatch.setenv("HAL_PLATFROM", "cpu")
    result = hal_cli("devices")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "HAL_PLATFROM" in result.stderr
    assert "'HAL_PLATFORM'" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_log_shows_where_an_error_came_from(hal_cli, monkeypatch) -> None:
    monkeypatch.setenv("HAL_LOG", "debug")
    result = hal_cli("devices")
    assert result.exit_code == 0
    monkeypatch.setenv("HAL_PLATFORM", "cup")
    result = hal_cli("devices")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "Did you mean 'cpu'?" in result.stderr.splitlines()[-1]


def test_errors_are_json_where_json_is_asked_for(hal_json, monkeypatch) -> None:
    monkeypatch.setenv("HAL_PLATFORM", "cup")
    error = hal_json("devices", code=1)["error"]
    assert error["type"] == "SettingError"
    assert "Did you mean 'cpu'?" in error["message"]


def test_warnings_go_to_stderr_at_the_level_of_hal_log(hal_cli, fake_platform, monkeypatch) -> None:
    def probe(self, environ):
        raise RuntimeError("the bus is gone")

    fake_platform(probe=probe)
    shown = hal_cli("devices")
    assert "the bus is gone" in shown.stderr
    assert "cpu:0" in shown.stdout
    hal.reset()
    monkeypatch.setenv("HAL_LOG", "error")
    assert hal_cli("devices").stderr == ""


def test_importing_the_command_line_imports_nothing_else() -> None:
    code = "import sys, hal.cli; print([m for m in ('click', 'rich', 'torch', 'hal._plugins') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_imports_no_more_than_click() -> None:
    code = RUN_ALL + "print([m for m in ('rich', 'hal._plugins', 'hal_ops', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, '[["--help"]]'], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("CODES [0] TORCH False\n[]\n")


def test_no_command_that_only_answers_imports_torch(tmp_path: Path) -> None:
    # requirement X8, P16
    done = run_all(tmp_path)
    assert f"CODES {[0] * len(WITHOUT_TORCH)} TORCH False" in done.stdout, done.stderr


def test_every_answer_without_torch_installed(tmp_path: Path) -> None:
    # requirement X8, P17
    site = tmp_path / "site"
    site.mkdir()
    for name in ("click", "rich", "markdown-it-py", "mdurl", "Pygments", "packaging", "torch-hal"):
        distribution = importlib.metadata.distribution(name)
        _link(distribution, site)
    paths = [str(site), str(Path(hal.__file__).parents[1]), str(Path(sys.modules["hal_ops"].__file__ or "").parents[1])]
    done = run_all(tmp_path, "-S", PYTHONPATH=os.pathsep.join(paths))
    here = [int(args[0] in ("doctor", "lock", "explain")) for args in WITHOUT_TORCH]
    assert f"CODES {here} TORCH False" in done.stdout, done.stderr
    assert "torch      not installed" in done.stdout
    assert "torch is not installed; `pip install torch`" in done.stdout
    assert "torch is not installed: pip install torch" in done.stdout.partition("\nproblems\n")[2]
    assert "Traceback" not in done.stderr


def _link(distribution: importlib.metadata.Distribution, site: Path) -> None:
    """Make a distribution's modules, and its metadata, visible in ``site``."""
    for top in {Path(str(f)).parts[0] for f in distribution.files or ()} - {"..", "__pycache__"}:
        found = Path(str(distribution.locate_file(top)))
        if found.is_dir() and not (site / top).exists():
            (site / top).symlink_to(found)


def test_commands_leave_the_environment_alone(hal_cli, monkeypatch, tmp_path: Path) -> None:
    # requirement P49
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    for args in WITHOUT_TORCH:
        hal_cli(*args)
    assert dict(os.environ) == before


def test_app_is_what_main_runs(capsys) -> None:
    from hal.cli import main

    with pytest.raises(SystemExit) as exit_:
        main(["version"])
    assert not exit_.value.code
    assert capsys.readouterr().out == f"{hal.__version__}\n"
    assert app.name == "app"
