"""``import hal`` is free: nothing else is imported, nothing is looked for, nothing is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hal import _plugins

Fresh = Callable[..., Any]

USE = """
import hal
from hal_ops.attention import AttentionRequest

request = AttentionRequest(num_q_heads=8, num_kv_heads=2, head_dim=64)
facts = {
    "devices": [d.id for d in hal.devices()],
    "here": hal.select(request, device="cpu").kernels(),
    "there": hal.select(request, device=hal.devices()[0]).explain(),
    "report": sorted(hal.probe_report()),
    "plugins": {p.name: p.status for p in hal.plugins()},
    "receipt": hal.select(request, device="cpu").receipt()["digest"],
}
"""


def test_import_takes_nothing_with_it(fresh: Fresh) -> None:
    # requirement X8, P16
    loaded, modules = fresh(
        """
        forbid_entry_points()
        import hal
        answer([others(), sorted(name for name in sys.modules if name.startswith("hal"))])
        """
    )
    assert loaded == ["hal"]
    assert modules == ["hal"]


def test_no_public_name_needs_torch_or_entry_points(fresh: Fresh) -> None:
    # requirement X8, R11, P40
    loaded = fresh(
        """
        forbid_entry_points()
        block("torch", "numpy", "triton")
        import hal
        for name in hal.__all__:
            getattr(hal, name)
        answer(others())
        """
    )
    assert set(loaded) <= {"hal", "hal_ops", "packaging"}


def test_deciding_imports_no_torch_and_no_library_of_a_vendor(fresh: Fresh) -> None:
    # requirement X8, P16, P40
    loaded = fresh(USE + "answer([name for name in others() if not name.startswith('hal')])")
    assert set(loaded) <= {"packaging", "pynvml", "tomli"}


def test_it_works_where_torch_and_all_libraries_are_missing(fresh: Fresh) -> None:
    # requirement X8, B11, P17
    blocked = ("torch", "numpy", "triton", "click", "rich", "pynvml", "amdsmi", "pymtml", "torch_musa", "flash_attn",
               "flash_attn_interface", "flashinfer", "aiter", "mate")  # fmt: skip
    facts = fresh(f"block{blocked!r}\n{USE}\nanswer(facts)")
    assert "cpu:0" in facts["devices"]
    assert set(facts["here"]) == {"prefill", "extend", "decode"}
    assert "prefill" in facts["there"]
    assert {"cpu", "portable"} <= set(facts["report"])
    assert "failed" not in facts["plugins"].values()


def test_planning_for_other_hardware_works_where_there_is_none(fresh: Fresh) -> None:
    # requirement P17, E14
    text = fresh(
        """
        block("torch", "pynvml")
        import hal
        from hal_ops.attention import AttentionRequest
        with hal.simulate(devices="cpu:x86_64*4", libraries={"torch": "2.9.0"}):
            assert [d.id for d in hal.devices()] == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
            answer(hal.select(AttentionRequest(num_q_heads=8, num_kv_heads=2, head_dim=64)).explain())
        """
    )
    assert "cpu:x86_64" in text
    assert "simulated" in text


TORCH = '''
"""A torch that must not be touched."""
import sys
import types

__version__ = "2.9.0"


class Untouchable(types.ModuleType):
    def is_initialized(self):
        return False

    def __getattr__(self, name):
        raise AssertionError(f"{self.__name__}.{name} was touched")


for name in ("cuda", "musa", "ops"):
    globals()[name] = sys.modules[f"torch.{name}"] = Untouchable(f"torch.{name}")
'''


def test_a_torch_that_is_there_is_not_woken(fresh: Fresh, tmp_path: Path) -> None:
    # requirement P16, P40, X8
    package = tmp_path / "stub" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TORCH)
    (package / "version.py").write_text("__version__ = '2.9.0'\ncuda = '12.8'\nhip = None\n")
    devices, file = fresh(
        f"import torch\n{USE}\nhal.device()\nanswer([facts['devices'], torch.__file__])", path=(str(tmp_path / "stub"),)
    )
    assert "cpu:0" in devices
    assert file.startswith(str(tmp_path))


def test_the_environment_is_left_alone(fresh: Fresh) -> None:
    # requirement P49
    changed = fresh(
        f"""
        before = dict(os.environ)
        import hal
        {USE.replace(chr(10), chr(10) + "        ")}
        with hal.override(strict=True, platform="cpu"), hal.simulate(devices="cpu:x86_64"):
            hal.select(request)
        answer(sorted(k for k in {{*before, *os.environ}} if before.get(k) != os.environ.get(k)))
        """
    )
    assert changed == []


def test_nothing_is_written_by_looking(fresh: Fresh, tmp_path: Path) -> None:
    # requirement P49
    places = {name: str(tmp_path / name) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    fresh(USE, variables=places)
    assert [path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts] == []


LATER = ("packaging.specifiers", "packaging.requirements", "hal._checked", "hal._compile", "hal._errata_check",
         "hal._explain", "hal._lock", "hal._lock_file", "hal._log", "hal._measurements", "hal._near", "hal._pickled",
         "hal._simulate", "hal.testing", "hal.cli")  # fmt: skip
ONLY_WITH_DEVICES = (
    "_arch",
    "_capabilities",
    "_cards",
    "_devices",
    "_driver",
    "_gpus",
    "_mtml",
    "_names",
    "_nvml",
    "_order",
    "_products",
    "_visible",
)


def of_other_ops() -> list[str]:
    """What the modules of ops other than attention and the write of its cache have in their names."""
    contracts = {op.request.__module__.split(".")[1] for op in _plugins.registry().ops.values()}
    assert {"attention", "kv_cache", "rms_norm", "mla_attention"} <= contracts
    return [f"hal_ops.{name}" for name in contracts - {"attention", "kv_cache"}] + [
        "mla",
        "flashinfer_op_",
        "_portable_ops",
    ]


def test_the_first_handle_imports_nothing_that_only_others_need(fresh: Fresh) -> None:
    # requirement X8
    pytest.importorskip("torch")
    platforms, early, vendors, costly, text = fresh(
        """
        import hal
        def frozen(value):
            return isinstance(value, type) and getattr(vars(value).get("__dataclass_params__"), "frozen", False)
        handle = hal.get_attention(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="float32", device="cpu")
        loaded = list(sys.modules)
        platforms = {d.platform for d in hal.devices()}
        vendors = [name.partition(".") for name in loaded if name.startswith("hal_") and not name.startswith("hal_ops")]
        classes = {v for n in loaded if n.startswith("hal") for v in vars(sys.modules[n]).values() if frozen(v)}
        costly = sorted(c.__qualname__ for c in classes if "__record__" not in vars(c))
        answer([sorted(platforms), loaded, [[top, module] for top, _, module in vendors], costly, handle.explain()])
        """
    )
    assert [name for name in LATER if name in early] == []
    absent = [f"{top}.{module}" for top, module in vendors if top.removeprefix("hal_") not in platforms]
    assert [name for name in absent if name.rpartition(".")[2] in ONLY_WITH_DEVICES] == []
    assert costly == []  # hal_ops.record is what costs little
    assert [name for name in early if any(part in name for part in of_other_ops())] == []
    assert "prefill" in text


VENDORS = ("nvidia", "rocm", "musa")
VENDOR_KERNELS = f"""
import hal

def vendors():
    ours = {tuple(f"hal_{vendor}." for vendor in VENDORS)!r}
    return sorted(name for name in sys.modules if name.startswith(ours) and name.endswith("_kernels"))

def attention(**more):
    return hal.get_attention(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="float32", device="cpu", **more)
"""


def test_kernels_of_vendors_whose_devices_are_not_asked_about_wait(fresh: Fresh) -> None:
    # requirement X8, X9
    pytest.importorskip("torch")
    for vendor in VENDORS:
        pytest.importorskip(f"hal_{vendor}")
    at_first, later, text = fresh(
        VENDOR_KERNELS
        + """
handle = attention()
at_first = vendors()
text = handle.selection.explain()
answer([at_first, vendors(), text])
"""
    )
    assert at_first == []
    assert {name.partition(".")[0] for name in later} == {f"hal_{vendor}" for vendor in VENDORS}
    assert [name for name in later if "mla" in name] == []
    lines = [line.partition(": ")[2] for line in text.splitlines() if "other vendors' devices only" in line]
    kernels = [k for k in _plugins.registry().kernels.values() if k.op == "attention"]
    assert {n for line in lines for n in line.split(", ")} == {
        k.library for k in kernels if "cpu" not in (k.platforms or "cpu")
    }


def test_it_makes_no_difference_who_looked_before(fresh: Fresh) -> None:
    # requirement X9, C2
    pytest.importorskip("torch")
    look = {"nobody": "pass", "an explanation": "attention().explain()", "all": "hal.plugins()"}
    told = {
        who: fresh(
            f"""{VENDOR_KERNELS}
from hal.errors import HalError
{what}
handle = attention()
facts = [handle.receipt(), list(hal.receipts()), handle.explain(), handle.kernels()]
for wrong in ("fa2", "aiter.decode", "torch_musa", "fa2.prefil", "flashinfer.rms_norm", {{"decode": "mate.prefill"}}):
    try:
        attention(kernel=wrong)
    except HalError as error:
        facts.append([type(error).__name__, str(error)])
with hal.override(disable=["fa2", "aiter.decode"]):
    facts.append([attention().explain(), attention().receipt()])
answer(facts)
"""
        )
        for who, what in look.items()
    }
    assert len(told["nobody"]) == 11
    assert told["an explanation"] == told["all"] == told["nobody"]
