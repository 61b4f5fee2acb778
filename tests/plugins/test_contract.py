"""The contract is checked when a platform is defined, and its version before anything of it is used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

import hal
from hal.errors import PluginError

Install = Callable[..., str]
Status = Callable[[str], hal.PluginRecord]

GOOD: dict[str, Any] = {
    "name": "acme",
    "vendor": "Acme",
    "probe": lambda self, environ: hal.Probe(),
    "parse_arch": lambda self, text: hal.Arch("acme", text),
    "capabilities": lambda self, arch: frozenset(),
}


def define(**members: Any) -> type[hal.Platform]:
    return type("Acme", (hal.Platform,), {**GOOD, **members})


def test_a_platform_of_the_contract_can_be_defined_and_made() -> None:
    assert define()().name == "acme"
    assert define(_helper=1, __doc__="words")().name == "acme"


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"name": ""}, "name='' must be lower-case"),
        ({"name": "Acme"}, "name='Acme' must be lower-case"),
        ({"name": "ac-me"}, "name='ac-me'"),
        ({"name": "2acme"}, "name='2acme'"),
        ({"name": "acme\n"}, "name="),
        ({"api": "1"}, "api='1' must be the integer plugin API"),
        ({"visibility": "ACME_VISIBLE"}, "visibility must be a tuple of variable names"),
        ({"visibility": ("ACME_VISIBLE", 1)}, "must be a tuple of variable names"),
        ({"rank": "high"}, "rank='high' must be a whole number"),
        ({"torch_type": None}, "torch_type=None must be a text"),
        ({"is_available": lambda self: True}, "'is_available' is no part of it"),
        ({"get_attn_backend_cls": classmethod(lambda cls, name: name)}, "'get_attn_backend_cls' is no part of it"),
        ({"probe": lambda self: hal.Probe()}, r"probe\(self\) must take \(self, environ\)"),
        (
            {"parse_arch": lambda self, name: hal.Arch("acme", name)},
            r"parse_arch\(self, name\) must take \(self, text\)",
        ),
        ({"capabilities": frozenset({"bf16"})}, r"capabilities\(\) must take \(self, arch\)"),
        ({"kernels": lambda self, device: ()}, r"kernels\(self, device\) must take \(self\)"),
        ({"ops": ()}, r"ops\(\) must take \(self\)"),
        ({"errata": lambda self, **options: ()}, r"errata\(self, options\) must take \(self\)"),
    ],
)
def test_a_breach_is_an_error_where_the_class_is_defined(members: dict[str, Any], text: str) -> None:
    # requirement P39
    with pytest.raises(PluginError, match=text):
        define(**members)


def test_every_breach_is_named_at_once() -> None:
    # requirement P39
    with pytest.raises(PluginError) as caught:
        define(name="Acme", extra=1, probe=lambda self: hal.Probe())
    lines = str(caught.value).splitlines()
    assert "breaks the Platform contract" in lines[0]
    assert len(lines) == 4


def test_a_platform_without_its_probe_cannot_be_made() -> None:
    # requirement P39
    members = {k: v for k, v in GOOD.items() if k != "probe"}
    with pytest.raises(TypeError, match="probe"):
        type("Acme", (hal.Platform,), members)()


VENDOR_CODE = """
def kernels(self):
    import hal_test_vendor_code
    return hal_test_vendor_code.KERNELS
"""


@pytest.mark.parametrize(("api", "side"), [(0, "upgrade the plugin"), (2, "upgrade torch-hal")])
def test_another_api_version_is_refused_before_its_kernels_are_imported(
    install: Install, status: Status, api: int, side: str
) -> None:
    # requirement P39, X9
    install("acme", members=f"api = {api}\n{VENDOR_CODE}")
    install("other")
    text = status("acme").error
    assert f"plugin acme (acme-hal 1.2) speaks plugin API {api}, this hal speaks {hal.PLUGIN_API}: {side}" in text
    assert "hal_test_vendor_code" not in sys.modules
    assert status("other").status == "loaded"
    assert "acme" not in {d.platform for d in hal.devices()}


def test_a_plugin_of_a_newer_contract_is_told_apart_from_a_broken_one(install: Install, status: Status) -> None:
    # requirement P39
    install("acme", members="api = 2\ndef probe(self, environ, policy): ...\ndef power(self): ...")
    assert "upgrade torch-hal" in status("acme").error


def test_a_broken_class_is_reported_like_any_failure(install: Install, status: Status) -> None:
    # requirement P39, X9
    install("acme", members="def is_available(self): return True")
    assert status("acme").status == "failed"
    assert "'is_available' is no part of it" in status("acme").error
