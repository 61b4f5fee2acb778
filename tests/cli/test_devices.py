"""``hal devices``."""

from __future__ import annotations

import hal
from hal.cli._devices import size
from hal.errors import VisibilityError


def test_text_and_json_agree(hal_cli, hal_json, fake_platform) -> None:
    fake_platform(devices=2)
    text = hal_cli("devices").stdout
    facts = hal_json("devices")
    assert set(facts) == {"devices", "evidence"}
    assert [d["id"] for d in facts["devices"]] == [d.id for d in hal.devices()]
    for device in facts["devices"]:
        assert {"id", "platform", "arch", "name", "memory", "runtime", "driver", "capabilities", "unusable"} <= set(
            device
        )
        assert device["id"] in text
    assert facts["evidence"]["fake"] == [{"source": "fake bus", "text": "2 devices", "found": 2, "remedy": ""}]


def test_verbose_shows_what_every_probe_saw(hal_cli) -> None:
    # requirement P9
    text = hal_cli("devices", "-v").stdout
    report = hal.probe_report()
    assert report
    for probe in report.values():
        for evidence in probe.evidence:
            assert evidence.text in text


def test_a_machine_without_accelerators_is_told_where_to_look(hal_cli, monkeypatch) -> None:
    monkeypatch.setenv("HAL_DEVICES", "cpu:x86_64")
    assert "no accelerator was found; `hal devices -v`" in hal_cli("devices").stdout


def test_what_is_missing_says_why(hal_cli, fake_platform) -> None:
    # requirement X19
    unusable = hal.Device(
        platform="fake", arch=hal.Arch("fake", "f7", "f", (7,)), unusable="its firmware is too old", torch_type="xpu"
    )
    unread = hal.Device(
        platform="fake",
        arch=hal.Arch("fake", "f99", "f", (99,)),
        index=1,
        torch_type="xpu",
        driver=hal.Version.unknown("the library did not answer"),
    )
    fake_platform(probe=lambda self, environ: hal.Probe((unusable, unread)))
    text = hal_cli("devices").stdout
    assert "fake:0: not usable: its firmware is too old" in text
    assert "fake:1: driver version could not be read: the library did not answer" in text
    assert "does not know f99" in text
    assert "unknown" not in text


def test_contradicting_visibility_variables_are_one_message(hal_cli, fake_platform) -> None:
    # requirement P19
    def probe(self, environ):
        raise VisibilityError(
            "A_VISIBLE=0 and B_VISIBLE=1 contradict each other", variables={"A_VISIBLE": "0", "B_VISIBLE": "1"}
        )

    fake_platform(probe=probe)
    for command in ("devices", "doctor"):
        result = hal_cli(command)
        assert result.exit_code == 1
        assert "A_VISIBLE=0 and B_VISIBLE=1" in result.stderr


def test_no_device_of_the_platform_asked_for_lists_every_probe(
    hal_cli, fake_platform, monkeypatch, llama_options
) -> None:
    # requirement P9
    fake_platform(devices=0)
    monkeypatch.setenv("HAL_PLATFORM", "fake")
    result = hal_cli("explain", "attention", *llama_options)
    assert result.exit_code == 1
    assert "HAL_PLATFORM" in result.stderr
    assert "fake bus: 0 devices" in result.stderr


def test_sizes() -> None:
    assert [size(None), size(80 << 30), size(512 << 20)] == ["-", "80.0 GiB", "512 MiB"]
