"""Forks, pickles and threads."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import pytest

import hal
from hal_ops.attention import AttentionRequest

Fresh = Callable[..., Any]

REQUEST: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("before", ["import hal", "import hal; hal.devices(); decide()"], ids=["import", "use"])
def test_a_fork_after_it_can_use_it(fresh: Fresh, before: str) -> None:
    # requirement P16
    child, parent = fresh(
        f"""
        def decide():
            import hal
            from hal_ops.attention import AttentionRequest
            request = AttentionRequest(num_q_heads=8, num_kv_heads=2, head_dim=64)
            devices = [d.id for d in hal.devices()]
            return [devices, hal.select(request, device="cpu").receipt()["digest"]]

        {before}
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, json.dumps(decide()).encode())
            os._exit(0)
        os.wait()
        answer([json.loads(os.read(read, 65536)), decide()])
        """
    )
    assert child == parent


def plain(value: Any) -> bool:
    """Whether a value is JSON's own: no enum, no subclass of a built-in."""
    if isinstance(value, dict):
        return type(value) is dict and all(type(k) is str and plain(v) for k, v in value.items())
    if isinstance(value, list):
        return type(value) is list and all(map(plain, value))
    return type(value) in (str, int, float, bool, type(None))


def test_what_a_decision_says_of_itself_is_plain(
    fake_platform: Callable[..., Any], attention_kernel: Callable[..., hal.Kernel]
) -> None:
    # requirement P48
    slow = hal.Erratum(id="F-1", kernels=("*",), summary="slow", url="https://fake.example/1", severity="slow")
    plain_kernel = attention_kernel("plain.prefill", copies="nothing")
    fake_platform("fake", kernels=[plain_kernel], errata=lambda self: [slow])
    selection = hal.select(AttentionRequest(**REQUEST, window=(7, None), softcap=30.0), device="fake")
    assert selection.near_misses()
    for facts in (selection.as_dict(), selection.receipt(), selection.device.as_dict(), selection.request.as_dict()):
        assert plain(facts), facts
        assert json.loads(json.dumps(facts)) == facts
    assert {type(name) for name in selection.kernels().values()} <= {str, type(None)}


def test_a_pickle_is_read_before_any_plugin_is_loaded(fresh: Fresh) -> None:
    # requirement P48
    with hal.simulate("cpu:x86_64,name=A CPU", libraries={"torch": "2.9.0"}):
        selection = hal.select(AttentionRequest(**REQUEST))
    reasons = [r for c in selection.choices["prefill"].candidates for r in c.reasons]
    sent = (
        selection.device,
        selection.request,
        selection.receipt(),
        selection.as_dict(),
        reasons,
        selection.near_misses(),
    )
    equal, device, described = fresh(
        f"""
        forbid_entry_points()
        block("torch")
        import pickle
        device, request, receipt, facts, reasons, near = pickle.loads({pickle.dumps(sent)!r})
        equal = facts["device"] == device.as_dict() and facts["request"] == request.as_dict()
        equal = equal and receipt["platform"] == device.platform
        answer([equal, str(device), request.describe()])
        """
    )
    assert equal is True
    assert device == str(selection.device)
    assert described == selection.request.describe()


class Even(hal.MultipleOf):
    """A kind of constraint that only this module has."""


def test_a_selection_is_read_from_a_pickle_without_what_decided_it(
    fresh: Fresh, fake_platform: Callable[..., Any], attention_kernel: Callable[..., hal.Kernel]
) -> None:
    # requirement P48
    plugged = attention_kernel(
        "first.prefill",
        fields={"head_dim": Even(2)},
        check=lambda request, device: [],
        built_archs=lambda: None,
        evidence=MappingProxyType({"*": "emulated"}),
    )
    fake_platform("fake", kernels=[plugged])
    selection = hal.select(AttentionRequest(**REQUEST, phases=("prefill",), sinks=True), device="fake")
    code = f"""
        forbid_entry_points()
        block("torch", {__name__!r})
        import pickle
        selection = pickle.loads({pickle.dumps(selection)!r})
        again = pickle.loads(pickle.dumps(selection))
        assert again == selection
        candidates = selection.choices["prefill"].candidates
        answer({{
            "kernels": selection.kernels(), "complete": selection.complete, "text": str(again),
            "facts": selection.as_dict(), "receipt": selection.receipt(),
            "near": [near.text() for near in selection.near_misses()],
            "candidates": [[c.kernel.name, c.status, *map(str, c.reasons)] for c in candidates],
        }})
    """
    read = fresh(code)
    assert read["kernels"] == selection.kernels()
    assert read["complete"] is True
    assert read["text"] == selection.explain()
    assert read["facts"] == selection.as_dict()
    assert read["receipt"] == selection.receipt()
    assert read["near"] == [near.text() for near in selection.near_misses()]
    shown = selection.choices["prefill"].candidates
    assert read["candidates"] == [[c.kernel.name, c.status, *map(str, c.reasons)] for c in shown]


def test_an_error_of_a_decision_can_be_pickled() -> None:
    # requirement P48
    with pytest.raises(hal.errors.NoKernelError) as caught:
        hal.get_attention(**REQUEST, window=(3, 4), causal=False, softcap=1.0, kernel="torch_cpu", device="cpu")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.as_dict() == caught.value.as_dict()


def test_a_copy_of_a_request_is_the_same_request() -> None:
    # requirement P48
    request = AttentionRequest(**REQUEST, window=(15, None))
    again = pickle.loads(pickle.dumps(request))
    assert again == request
    assert hash(again) == hash(request)
    assert again.digest() == request.digest()


def test_overrides_stay_in_their_thread(
    fake_platform: Callable[..., Any], attention_kernel: Callable[..., hal.Kernel]
) -> None:
    # requirement C8
    fake_platform("fake", kernels=[attention_kernel("first.prefill", priority=499), attention_kernel("other.prefill")])
    inside, done = threading.Barrier(2, timeout=10), threading.Barrier(2, timeout=10)

    def chosen() -> str | None:
        request = AttentionRequest(**REQUEST, phases=("prefill",))
        return hal.select(request, device="fake").kernels()["prefill"]

    def choose(name: str | None) -> list[str | None]:
        with hal.override(**({"attention": name} if name else {})):
            inside.wait()
            within = chosen()
            done.wait()
        return [within, chosen()]

    with ThreadPoolExecutor(2) as pool:
        forced, free = pool.map(choose, ["other", None])
    assert forced == ["other.prefill", "first.prefill"]
    assert free == ["first.prefill", "first.prefill"]


def test_simulations_stay_in_their_thread() -> None:
    # requirement C8
    barrier = threading.Barrier(2, timeout=10)

    def count(devices: int) -> int:
        with hal.simulate(f"cpu:x86_64*{devices}"):
            barrier.wait()
            found = len(hal.devices())
            barrier.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(count, [2, 5])) == [2, 5]


class InterruptedTestError(Exception):
    """Raised by a test inside a block."""


def test_leaving_a_block_restores_what_held_outside() -> None:
    # requirement C8
    request = AttentionRequest(**REQUEST, phases=("prefill",))

    def steered() -> tuple[str, int]:
        choice = hal.select(request, device="cpu:0").choices["prefill"]
        return ("" if choice.forced is None else choice.forced.name, len(hal.devices("cpu")))

    def fail_inside(name: str) -> None:
        with hal.override(attention=name), hal.simulate("cpu:x86_64*3"):
            assert steered() == (name, 3)
            raise InterruptedTestError

    outside = steered()
    with hal.override(attention="reference"), hal.simulate("cpu:x86_64*2"):
        assert steered() == ("reference", 2)
        with pytest.raises(InterruptedTestError):
            fail_inside("torch_cpu")
        assert steered() == ("reference", 2)
        with hal.override(strict=False):
            assert steered() == ("reference", 2)
        with hal.override(attention=None):
            assert steered() == ("", 2)
        assert steered() == ("reference", 2)
    with pytest.raises(InterruptedTestError):
        fail_inside("reference")
    assert steered() == outside


def test_threads_that_start_together_see_one_registry() -> None:
    from hal import _plugins

    hal.reset()
    start = threading.Barrier(8, timeout=10)

    def look() -> int:
        start.wait()
        return _plugins.registry().generation

    with ThreadPoolExecutor(8) as pool:
        found = {future.result() for future in [pool.submit(look) for _ in range(8)]}
    assert len(found) == 1
