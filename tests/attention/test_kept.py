"""Equal requests have one handle, however they are written; every decision has a receipt; copies of handles are handles."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_requests import LATENT

import hal
from hal import _kept

SMALL: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": "float32", "device": "cpu"}
NORM: dict[str, Any] = {"hidden_size": 8, "dtype": "float32", "device": "cpu"}
MAKERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "attention": (hal.get_attention, SMALL),
    "traced": (hal.get_attention, {**SMALL, "compile": True}),
    "latent": (hal.get_mla_attention, LATENT),
    "op": (lambda **fields: hal.get_op("rms_norm", **fields), NORM),
}


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    hal.reset()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "spelling",
    [
        {"dtype": torch.float32},
        {"dtype": "fp32"},
        {"device": torch.device("cpu")},
        {"device": "cpu:0"},
        {"device": torch.zeros(1)},
        {"device": None},
    ],
    ids=str,
)
def test_other_words_for_a_request_give_its_handle(kind: str, spelling: dict[str, Any]) -> None:  # requirement R6
    make, request = MAKERS[kind]
    made = make(**request)
    for _ in range(2):
        assert make(**{**request, **spelling}) is made
    assert make(**{**request, "dtype": "bfloat16"}) is not made


def test_what_a_request_has_of_itself_may_be_written_out() -> None:  # requirement R6
    plain, window = hal.get_attention(**SMALL), hal.get_attention(**SMALL, window=8)
    for more in (
        {"v_head_dim": 16},
        {"phases": ["decode", "prefill", "extend"]},
        {"softmax_scale": 0.25},
        {"kernel": {}},
    ):
        assert hal.get_attention(**SMALL, **more) is plain
    for same in ((7, 0), [7, 0], (7, None)):
        assert hal.get_attention(**SMALL, window=same) is window
    forced = hal.get_attention(**SMALL, kernel={"decode": "reference", "prefill": "reference"})
    assert hal.get_attention(**SMALL, kernel={"prefill": "reference", "decode": "reference"}) is forced
    assert forced is not plain


def test_layers_with_equal_requests_share_a_handle_and_a_plan() -> None:  # requirement R6
    layer = {name: value for name, value in SMALL.items() if name != "device"}
    layers = [layer, {**layer, "window": 8}, {**layer, "dtype": torch.float32}, {**layer, "window": (7, 0)}]
    first, window, second, _ = made = hal.get_attentions(layers, device="cpu")
    assert made == (first, window, first, window)
    assert hal.get_attentions(layers, device="cpu") == made
    assert hal.get_attention(**SMALL) is first
    plan = first.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
    q, k = torch.randn(1, 4, 16), torch.randn(1, 2, 16)
    second(q, k, k, cache=second.allocate_kv_cache(1), plan=plan)
    assert hal.get_attentions(layers, device="cpu", compile=True)[0] is not first


@pytest.mark.parametrize("wrong", [{"causal": 1}, {"num_kv_heads": 2.0}, {"sinks": 0}, {"window": (7.0, 0)}], ids=str)
def test_what_may_be_asked_does_not_depend_on_what_was(wrong: dict[str, Any]) -> None:  # requirement R6
    hal.get_attention(**SMALL)
    hal.get_attention(**SMALL, window=(7, 0))
    with pytest.raises(ValueError, match=next(iter(wrong))):
        hal.get_attention(**{**SMALL, **wrong})


@pytest.mark.parametrize("kind", MAKERS)
def test_threads_that_ask_at_once_get_one_handle(kind: str) -> None:  # requirement R6
    make, request = MAKERS[kind]
    together, made = threading.Barrier(8), []

    def ask() -> None:
        together.wait()
        made.append(make(**request))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1


def test_a_handle_in_use_is_found_after_more_calls_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kept, "_MOST", 2)
    made = hal.get_attention(**SMALL)
    for size in (16, 24, 32):
        hal.get_op("rms_norm", **{**NORM, "hidden_size": size})
    assert hal.get_attention(**SMALL) is made


def test_every_decision_of_a_request_has_a_receipt() -> None:
    handles = [hal.get_attention(**SMALL), hal.get_attention(**SMALL, kernel="reference")]
    kept = [r for r in hal.receipts() if r["op"] == "attention"]
    assert kept == [handle.receipt() for handle in handles]
    assert kept[0]["request_digest"] == kept[1]["request_digest"]
    assert kept[0]["digest"] != kept[1]["digest"]


def test_receipts_can_be_asked_for_while_handles_are_made() -> None:
    done, failed = threading.Event(), []

    def ask() -> None:
        try:
            while not done.is_set():
                hal.receipts()
        except RuntimeError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    for size in range(8, 400, 8):
        hal.get_op("rms_norm", **{**NORM, "hidden_size": size})
    done.set()
    asking.join()
    assert not failed
    assert len(hal.receipts()) == 49


class Layer(torch.nn.Module):
    """A module that holds what a model's layers hold."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = hal.get_attention(**SMALL, page_size=4)
        self.cache = self.attend.allocate_kv_cache(2)

    def forward(self, q: Any, k: Any, v: Any, plan: Any) -> Any:
        return self.attend(q, k, v, cache=self.cache, plan=plan)


def test_a_module_is_copied_with_its_handle_and_its_cache() -> None:
    layer = Layer()
    plan = layer.attend.plan(q_lens=[3], kv_lens=[3], block_table=[[1]])
    q, k, v = (torch.randn(3, heads, 16) for heads in (4, 2, 2))
    out = layer(q, k, v, plan)
    layer.attend.explain()
    other = copy.deepcopy(layer)
    assert other.attend is layer.attend
    assert torch.equal(other.cache.k, layer.cache.k)
    other.cache.k.zero_()
    assert layer.cache.k.any()
    assert torch.equal(other(q, k, v, copy.deepcopy(plan)), out)


@pytest.mark.parametrize("kind", MAKERS)
def test_handles_are_copied_as_themselves_and_not_pickled(kind: str) -> None:
    make, request = MAKERS[kind]
    handle = make(**request)
    assert handle is copy.copy(handle) is copy.deepcopy([handle])[0]
    with pytest.raises(TypeError, match=r"cannot pickle <hal\..*send its arguments, and ask for the"):
        pickle.dumps(handle)
    if kind == "op":
        return
    plan = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[0]])
    assert plan is copy.copy(plan) is copy.deepcopy([plan])[0]
    with pytest.raises(TypeError, match=r"cannot pickle Plan\(.*call plan\(\) on the handle there"):
        pickle.dumps(plan)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickled, saved])
def test_caches_that_were_used_are_copied_and_pickled(how: Callable[[Any], Any]) -> None:
    fp8 = {} if how is pickled else {"kv_dtype": "float8_e4m3fn"}  # which torch unpickles from its own files alone
    handle = hal.get_attention(**{**SMALL, "dtype": "bfloat16", "page_size": 4, **fp8})
    cache = handle.allocate_kv_cache(2, k_scale=0.5 if fp8 else None)
    plan = handle.plan(q_lens=[1], kv_lens=[1], block_table=[[1]])
    q, k = torch.randn(1, 4, 16).bfloat16(), torch.randn(1, 2, 16).bfloat16()
    out = handle(q, k, k, cache=cache, plan=plan)
    other = how(cache)
    assert repr(other) == repr(cache)
    assert other.k_scale == cache.k_scale
    assert torch.equal(handle(q, cache=other, plan=plan), out)

    latent = hal.get_mla_attention(**LATENT)
    pages, step = latent.allocate_kv_cache(2), latent.plan(q_lens=[1], kv_lens=[1], block_table=[[1]])
    q, entry = torch.randn(1, 2, 24), torch.randn(1, 24)
    out = latent(q, entry, cache=pages, plan=step)
    assert torch.equal(latent(q, cache=how(pages), plan=step), out)
