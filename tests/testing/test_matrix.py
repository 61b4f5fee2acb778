"""Decisions as tables, and made-up hardware to make them for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hal
from hal.errors import PluginError, SimulationError
from hal.testing import decision_matrix, make_platform, winners
from hal.testing.fixtures import fake_plugin, hal_clean, simulated_devices, simulated_libraries
from hal_ops.attention import AttentionRequest
from hal_ops.kv_cache import KvCacheWriteRequest

__all__ = ["fake_plugin", "hal_clean", "simulated_devices", "simulated_libraries"]

Make = Callable[..., Any]
PLAIN = AttentionRequest(num_q_heads=2, num_kv_heads=1, head_dim=64, phases=("decode", "prefill"))
DEVICES = ("maker:m_1", "maker:m_2*2", "cpu:x86_64")


@pytest.fixture
def maker(attention_kernel: Make, fake_plugin: Make) -> type[hal.Platform]:
    """A platform of two generations; the newer one has a better decode kernel, and FP8."""
    kernels = [
        attention_kernel("old.prefill", platforms={"maker": hal.Archs()}, priority=410),
        attention_kernel("old.decode", platforms={"maker": hal.Archs()}, priority=410),
        attention_kernel("new.decode", platforms={"maker": hal.Archs(at_least="m_2")}, priority=420),
        attention_kernel("never.decode", platforms={"maker": hal.Archs(at_least="m_2")}, priority=400),
    ]
    return fake_plugin("maker", archs={"m_1": ["bf16"], "m_2": ["bf16", "fp8_e4m3fn"]}, kernels=kernels)


def test_the_matrix_says_which_kernel_serves_what_where(maker: Any) -> None:  # requirement B2, P50, E14
    fp8 = PLAIN.replace(kv_dtype="fp8", phases=("decode",))
    matrix = decision_matrix(
        DEVICES, {"plain": PLAIN, "fp8": fp8, "write": KvCacheWriteRequest(num_kv_heads=1, head_dim=8)}
    )
    assert list(matrix) == list(DEVICES)
    assert all(list(row) == ["plain", "fp8", "write"] for row in matrix.values())
    assert matrix["maker:m_1"]["plain"] == {"prefill": "old.prefill", "decode": "old.decode"}
    assert matrix["maker:m_2*2"]["plain"] == {"prefill": "old.prefill", "decode": "new.decode"}
    assert matrix["maker:m_2*2"]["fp8"] == {"decode": "reference.decode"}
    assert matrix["cpu:x86_64"]["plain"]["decode"] not in (None, "old.decode", "new.decode")
    assert set(matrix["cpu:x86_64"]["write"]) == {"call"}


def test_what_a_device_cannot_name_is_nothing_there(maker: Any) -> None:  # requirement P29
    fp8 = PLAIN.replace(kv_dtype="fp8", phases=("decode",))
    assert decision_matrix(["maker:m_1"], {"fp8": fp8}) == {"maker:m_1": {"fp8": {"decode": None}}}


def test_a_device_that_does_not_parse_is_an_error(maker: Any) -> None:
    with pytest.raises(SimulationError, match="write letters and a number"):
        decision_matrix(["maker:!"], {"plain": PLAIN})


def test_devices_may_be_objects(maker: Any) -> None:
    device = maker().probe({}).devices[1]
    assert decision_matrix([device], {"plain": PLAIN})[str(device)]["plain"]["decode"] == "new.decode"


def test_winners_lacks_those_that_never_win(maker: Any) -> None:  # requirement R12
    won = winners({"plain": PLAIN}, DEVICES)
    assert won["new.decode"] == [("maker:m_2*2", "plain")]
    assert won["old.prefill"] == [("maker:m_1", "plain"), ("maker:m_2*2", "plain")]
    assert "never.decode" not in won
    unnamed = winners([PLAIN], ["maker:m_1"])
    assert unnamed["old.decode"] == [("maker:m_1", "num_q_heads=2,num_kv_heads=1,head_dim=64")]


def test_forcing_and_disabling_show_in_the_matrix(maker: Any) -> None:
    with hal.override(disable="new"):
        assert decision_matrix(["maker:m_2"], {"plain": PLAIN})["maker:m_2"]["plain"]["decode"] == "old.decode"


def test_made_up_hardware_is_found_like_any_other(fake_plugin: Make) -> None:  # requirement X10
    fake_plugin("maker", archs=("m_1", "m_2"), runtime_name="mrt")
    assert [(d.id, d.arch.name, d.torch_type) for d in hal.devices("maker")] == [
        ("maker:0", "m_1", "cpu"),
        ("maker:1", "m_2", "cpu"),
    ]
    assert hal.device().id == "maker:0"
    assert hal.devices("maker")[0].arch < hal.devices("maker")[1].arch
    with hal.simulate("maker:m_7,mrt=3.1"):
        assert hal.device().runtime == hal.Version.parse("3.1")
        assert hal.device().capabilities == frozenset()


def test_made_up_devices_may_be_few_or_none(fake_plugin: Make) -> None:
    fake_plugin("none", devices=())
    fake_plugin("some", archs=("s_1", "s_2"), devices=("s_2",), rank=60)
    assert hal.devices("none") == ()
    assert hal.device().arch.name == "s_2"
    assert "0 devices" in str(hal.probe_report()["none"].evidence[0])


def test_a_made_up_platform_keeps_the_contract() -> None:  # requirement P39
    with pytest.raises(PluginError, match="must be lower-case"):
        make_platform("Not A Name")
    with pytest.raises(ValueError, match="write letters and a number"):
        make_platform("maker", archs=("!",))


def test_made_up_hardware_computes(maker: Any) -> None:
    torch = pytest.importorskip("torch")
    attention = hal.get_attention(num_q_heads=2, num_kv_heads=1, head_dim=64, phases=["prefill"], device="maker")
    assert attention.kernels() == {"prefill": "old.prefill"}
    out = attention(*(torch.ones(1, 3, heads, 64, dtype=torch.bfloat16) for heads in (2, 1, 1)))
    assert bool((out == 1).all())


def test_the_fixtures_end_with_their_test(
    hal_clean: Path, simulated_devices: Make, simulated_libraries: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [d for d in hal.devices() if d.platform == "maker"]
    assert str(hal._settings.current().cache_dir()) == str(hal_clean)
    assert [d.id for d in simulated_devices("cpu:x86_64*2")] == ["cpu:0", "cpu:1"]
    simulated_libraries({"flash-attn": "2.8.3"})
    assert str(hal._libraries.installed("flash_attn")) == "2.8.3"
    assert hal._libraries.installed("torch") is None


def test_nothing_is_left_of_them() -> None:
    assert not any(d.simulated for d in hal.devices())
    assert hal._libraries.simulating() is None
    assert "maker" not in hal._plugins.registry().platforms
