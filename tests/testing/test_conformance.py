"""The conformance kit: a plugin that keeps the contract passes, and each breach of it is found by name."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hal
from hal.errors import PluginError
from hal.testing import _plugin_checks as checks
from hal.testing import conformance
from hal.testing._plugin_checks import Plugin
from hal.testing._targets import targets
from hal.testing._wins import fitting, simulated_homes, wins

pytest.importorskip("torch")

PLUGIN = """
import hal
{top}

FIELDS = {{
    "num_q_heads": hal.Anything((2,)), "num_kv_heads": hal.Anything((1,)), "head_dim": hal.MultipleOf(8, high=128),
    "v_head_dim": hal.SameAs("head_dim"), "dtype": hal.OneOf("float32"), "causal": hal.OneOf(True), {fields}
}}

KERNELS = [hal.Kernel(
    name="boost.prefill", op="attention", phase="prefill", target="{module}_kernels:factory", priority=400,
    platforms={{"boost": hal.Archs(at_least="b2")}}, runtime=">=2,<4", fields=FIELDS, {kernel}
)]


class BoostPlatform(hal.Platform):
    name = "boost"
    vendor = "Boost"
    visibility = ("BOOST_VISIBLE",)
    runtime_name = "brt"
    {attributes}

    def probe(self, environ):
        {probe}
        device = hal.Device(platform="boost", arch=self.parse_arch("b3"), runtime=hal.Version.parse("3.0"))
        found = (device,) if environ.get("BOOST_VISIBLE") == "0" else ()
        return hal.Probe(found, (hal.Evidence("bus", f"{{len(found)}} boards", len(found)),))

    def parse_arch(self, text):
        {parse}
        text = text.strip().lower()
        if not (text[:1] == "b" and text[1:].isdigit()):
            raise ValueError(f"{{text!r}} is no arch of boost: write b and a number")
        return hal.Arch("boost", text, "b", (int(text[1:]),))

    def capabilities(self, arch):
        return frozenset()

    def libraries(self):
        return [hal.Library("boost-blas", module="boost_blas_fake")]

    def kernels(self):
        {declare}
        return KERNELS
"""

KERNELS = """
from hal_ops.attention.reference import prefill
{top}

def factory(request, device{argument}):
    {body}
    return prefill(request, device)
"""

_numbers = itertools.count()


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Plugin]]:
    """Write a plugin as modules of its own; keywords replace parts of it."""
    made: list[str] = []
    monkeypatch.syspath_prepend(tmp_path)
    for variable in ("BOOST_VISIBLE", "BOOST_HOME", "BOOST_SEEN"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "boost_blas_fake.py").write_text("VALUE = 1\n")

    def make(*, kernels: dict[str, str] | None = None, **parts: str) -> Plugin:
        module = f"boost_{next(_numbers)}"
        made.extend((module, f"{module}_kernels"))
        blanks = dict.fromkeys(("top", "fields", "kernel", "attributes", "probe", "parse", "declare"), "")
        (tmp_path / f"{module}.py").write_text(PLUGIN.format(**{**blanks, **parts, "module": module}))
        blanks = dict.fromkeys(("top", "argument", "body"), "")
        (tmp_path / f"{module}_kernels.py").write_text(KERNELS.format(**{**blanks, **(kernels or {})}))
        importlib.invalidate_caches()
        return Plugin(importlib.import_module(module).BoostPlatform)

    yield make
    for name in [*made, "boost_blas_fake"]:
        sys.modules.pop(name, None)
    checks.fresh_process.cache_clear()


def statuses(report: hal.testing.ConformanceReport) -> dict[str, str]:
    return {c.name: c.status for c in report.checks}


def test_a_good_plugin_conforms(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """requirement X11, P25: everything is checked, kernels' values too where the hardware is."""
    cls = plugin().cls
    without = conformance(cls)
    assert without.ok, str(without)
    assert statuses(without)["values"] == "skipped"
    assert "no usable device of boost" in str(without)
    monkeypatch.setenv("BOOST_VISIBLE", "0")
    with_hardware = conformance(cls)
    assert set(statuses(with_hardware).values()) == {"passed"}, str(with_hardware)
    assert str(with_hardware).startswith("platform 'boost' conforms\n")


def test_a_kernel_that_computes_something_else_is_found(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """requirement P24: what is accepted is honoured, or refused; there is no third."""
    monkeypatch.setenv("BOOST_VISIBLE", "0")
    body = "request = request.replace(softcap=0.0)"
    report = conformance(plugin(fields='"softcap": hal.Range(0, None, (5.0,)),', kernels={"body": body}).cls, limit=4)
    assert not report.ok
    assert [c.name for c in report.failures()] == ["values"]
    assert "softcap=5" in str(report)
    assert "largest error" in str(report)
    assert "breaks 1 of 9 promises" in str(report)


def test_a_plugin_whose_declarations_are_wrong_is_not_tried_further(plugin: Any) -> None:
    report = conformance(plugin(declare="return [1]").cls)
    assert statuses(report)["declarations"] == "failed"
    assert set(list(statuses(report).values())[2:]) == {"skipped"}


def problems(finding: checks.Finding) -> str:
    return "\n".join(finding.problems)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"attributes": 'torch_type = ""'}, "torch_type=''"),
        ({"attributes": 'runtime_name = ""'}, "runtime_name='': give a str"),
        ({"attributes": "api = 7"}, "it speaks plugin API 7"),
        ({"attributes": 'def __init__(self): raise OSError("no driver")'}, "OSError: no driver"),
    ],
    ids=str,
)
def test_breaches_of_the_contract(plugin: Any, parts: dict[str, str], says: str) -> None:  # requirement P39
    assert says in problems(checks.contract(plugin(**parts)))


ERRATUM = "def errata(self): return [hal.Erratum(id='B-1', summary='s', url='u', kernels=%s)]"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"declare": "return ['boost.prefill']"}, "kernels() holds 'boost.prefill', which is no Kernel"),
        ({"declare": "KERNELS.append(KERNELS[0])"}, "answers differently when asked again"),
        ({"fields": '"window_size": hal.Anything(),'}, "field 'window_size' is not in AttentionRequest"),
        ({"declare": "return KERNELS * 2"}, "is registered by boost"),
        (
            {"attributes": ERRATUM % "('bost.*',)"},
            "erratum 'B-1': no kernel here matches 'bost.*'. Did you mean 'boost.*'?",
        ),
        (
            {"attributes": ERRATUM % "('boost.*',), when={'dtype': hal.OneOf('bf16')}"},
            "erratum 'B-1': write when as {'dtype': OneOf(values=('bfloat16',))}",
        ),
        ({"attributes": 'name = "cpu"'}, "the name 'cpu' is taken by hal._cpu.CpuPlatform"),
    ],
    ids=str,
)
def test_wrong_declarations(plugin: Any, parts: dict[str, str], says: str) -> None:  # requirement X5
    assert says in problems(checks.declarations(plugin(**parts)))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"top": "import torch"}, "importing it imports torch"),
        ({"declare": "import boost_blas_fake"}, "importing it imports boost_blas_fake"),
        ({"top": "import os; os.environ['BOOST_HOME'] = '/opt'"}, "it writes the environment variable BOOST_HOME"),
        ({"probe": "import os; os.environ['BOOST_SEEN'] = '1'"}, "it writes the environment variable BOOST_SEEN"),
        ({"declare": "type(self).handle = open('/dev/ptmx')"}, "importing it opens /dev/"),
    ],
    ids=str,
)
def test_side_effects_of_importing(plugin: Any, parts: dict[str, str], says: str) -> None:  # requirement P49, X8, P16
    if "ptmx" in str(parts) and not Path("/dev/ptmx").exists():
        pytest.skip("this machine has no device file that anybody may open")
    assert says in problems(checks.imports(plugin(**parts)))


def test_what_fails_only_in_a_fresh_process(plugin: Any) -> None:
    made = plugin()
    Path(str(sys.modules[made.cls.__module__].__file__)).write_text("raise OSError('libboost.so: cannot open')\n")
    assert "OSError: libboost.so: cannot open" in problems(checks.imports(made))

    class LocalPlatform(made.cls):  # type: ignore[misc]
        pass

    assert "define the class at the top of a module" in problems(checks.imports(Plugin(LocalPlatform)))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"probe": "raise OSError('libboost.so.1: cannot open shared object file')"}, "cannot open shared object file"),
        ({"probe": "return ()"}, "which is no hal.Probe"),
        ({"probe": "return hal.Probe()"}, "gives no evidence (hardware hidden)"),
        (
            {"attributes": 'torch_type = "meta"', "probe": "environ = {'BOOST_VISIBLE': '0'}"},
            "torch_type is 'cpu', not",
        ),
    ],
    ids=str,
)
def test_probes_that_break_their_promise(plugin: Any, parts: dict[str, str], says: str) -> None:  # requirement P6, P2
    assert says in problems(checks.probe(plugin(**parts)))


@pytest.mark.parametrize(
    ("parse", "says"),
    [
        ("if text == 'b2': raise ValueError('too old')", "refuses an arch that its own declarations use: too old"),
        ("return hal.Arch('boost', text + 'x')", "is boost:b2x, and parse_arch('b2x') is boost:b2xx"),
        ("return hal.Arch('other', text)", "gives an arch of 'other'"),
        ("if text == '!!': return hal.Arch('boost', 'b1')", "text that is no arch must raise ValueError"),
        ("if text == '': raise KeyError(text)", "raises KeyError, not ValueError"),
    ],
)
def test_archs_that_do_not_come_back(plugin: Any, parse: str, says: str) -> None:  # requirement P18
    assert says in problems(checks.archs(plugin(parse=parse)))


def test_a_claim_that_nothing_tests_is_found(plugin: Any) -> None:  # requirement P24
    assert "boost.prefill: window is declared, and no corner uses it" in problems(
        checks.samples(plugin(fields='"window": hal.Anything(),'))
    )
    assert problems(checks.samples(plugin(fields='"sinks": hal.OneOf(False), "softcap": hal.OneOf(0.0),'))) == ""
    assert "no request meets" in problems(checks.samples(plugin(fields='"group_size": hal.OneOf(0),')))


NEEDS = 'needs=(hal.Needs("boost-blas"),)'


@pytest.mark.parametrize("needs", ["", NEEDS], ids=["imported", "read"])
@pytest.mark.parametrize(
    ("kernels", "parts", "says"),
    [
        (
            {},
            {"declare": "import dataclasses; return [dataclasses.replace(KERNELS[0], target='boost_gone:factory')]"},
            "boost_gone",
        ),
        (
            {"top": "renamed = prefill; del prefill\nif False:\n    pass"},
            {"declare": "import dataclasses; return [dataclasses.replace(k, target=k.target + 'y') for k in KERNELS]"},
            "'factoryy'",
        ),
        ({"top": "def extra(q, **options):\n    return q"}, {}, "extra takes **options and drops it"),
    ],
    ids=["module", "name", "swallowed"],
)
def test_targets_that_are_not_there(
    plugin: Any, kernels: dict[str, str], parts: dict[str, str], says: str, needs: str
) -> None:  # requirement A4, P24
    found = targets(plugin(kernels=kernels, kernel=needs, **parts))
    assert says in problems(found)
    assert bool(found.notes) is bool(needs)


def test_factories_of_another_shape(plugin: Any) -> None:
    assert "must take (request, device)" in problems(targets(plugin(kernels={"argument": ", stream"})))
    assert "undefined" not in problems(targets(plugin()))
    broken = targets(plugin(kernels={"top": "import boost_lib_that_is_gone"}))
    assert "though all it needs is installed: missing module: No module named 'boost_lib_that_is_gone'" in problems(
        broken
    )


def plugged(made: Plugin) -> Any:
    return hal._plugins.temporary_plugin("boost", made.cls)


def test_a_kernel_that_never_wins_is_found(plugin: Any) -> None:  # requirement R12
    twice = (
        "import dataclasses; return [*KERNELS, dataclasses.replace(KERNELS[0], name='boostold.prefill', priority=399)]"
    )
    made = plugin(declare=twice)
    with plugged(made):
        found = problems(wins(made))
    assert "boostold.prefill is chosen for none of its corners" in found
    assert "boost.prefill (priority 400) comes before it (priority 399)" in found
    old = plugin()
    with plugged(old):
        assert "needs b2 or newer; this is b1" in problems(wins(old, ["boost:b1,brt=3.0"]))
        assert problems(wins(old, ["boost:b1,brt=3.0", "boost:b2,brt=3.0"])) == ""


def test_the_devices_a_kernel_is_tried_on_come_from_its_own_words(plugin: Any) -> None:
    made = plugin(kernel='built_archs=lambda: frozenset({"b2", "b3"}), evidence={"b3": "run"},')
    registry = made.registry()
    homes = {d.arch.name: d for d in simulated_homes(registry.kernels["boost.prefill"], registry)}
    assert set(homes) == {"b2"}
    assert homes["b2"].runtime.satisfies(">=2,<4")
    assert homes["b2"].simulated


@pytest.mark.parametrize(
    ("specifier", "others", "version"),
    [
        ("", [], "1.0"),
        (">=12.3", [], "12.3.1"),
        (">=12.3,<13", ["<13.5"], "12.3.1"),
        ("", [">=12.8", ">=11"], "12.8.1"),
        ("==2.1.3", [">=3"], "2.1.3"),
        (">2.5", [">=1"], "2.5.1"),
    ],
)
def test_versions_that_fit(specifier: str, others: list[str], version: str) -> None:
    assert str(fitting(specifier, others)) == version


def test_installed_plugins_go_by_name() -> None:
    report = conformance("portable", limit=1)
    assert report.platform == "portable"
    assert {"contract", "imports", "wins"} <= {c.name for c in report.checks}
    with pytest.raises(PluginError, match="no plugin is called 'nvidea'; installed: "):
        conformance("nvidea")


def test_as_pytest_tests(plugin: Any, tmp_path: Path) -> None:
    """A vendor's test file: the class with the platform, and the fixtures by name."""
    module = plugin().cls.__module__
    (tmp_path / "test_vendor.py").write_text(
        textwrap.dedent(
            f"""
            import os
            import pytest
            import hal, hal.testing
            from {module} import BoostPlatform, KERNELS

            pytest_plugins = ["hal.testing.fixtures"]

            class TestBoost(hal.testing.PluginConformance):
                platform = BoostPlatform

            class TestOld(hal.testing.PluginConformance):
                platform = BoostPlatform
                devices = ("boost:b1",)

            def test_clean(hal_clean, fake_plugin, simulated_devices, simulated_libraries):
                assert os.environ["HAL_CACHE_DIR"] == str(hal_clean)
                fake_plugin(BoostPlatform)
                assert [d.arch.name for d in simulated_devices("boost:b2*2")] == ["b2", "b2"]
                simulated_libraries({{"torch": "2.8"}})
                assert str(hal._libraries.installed("torch")) == "2.8"
            """
        )
    )
    options = ["-q", "-rfs", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "HAL_LOG": "info"},
    )
    assert "FAILED test_vendor.py::TestOld::test_wins" in done.stdout, done.stdout + done.stderr
    assert "needs b2 or newer; this is b1" in done.stdout
    assert "1 failed, 16 passed, 2 skipped" in done.stdout
    assert "this machine has no usable device of boost" in done.stdout
