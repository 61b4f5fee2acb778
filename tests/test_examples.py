"""The examples compute what plain torch and full recomputation compute."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.sentence_search import model as minilm  # noqa: E402
from examples.sentence_search import plain, weights  # noqa: E402
from examples.tiny_llama import run as generation  # noqa: E402
from examples.tiny_llama import train as training  # noqa: E402
from examples.tiny_llama.engine import Engine, PageAllocator, Request, Sequence  # noqa: E402
from examples.tiny_llama.model import HalLlama, TinyLlama, load, read_config, save  # noqa: E402

TEXTS = [
    "Stars twinkle.",
    "A cat purrs when it is content, and when it is hurt.",
    "Salt",
    "Two threads wait.",
]
PROMPTS = {"short": (40, 41), "longer": tuple(range(50, 73)), "long": tuple(range(100, 140))}
NEW_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama() -> HalLlama:
    return load(generation.get_attention(read_config(), "cpu"))


def engine_for(model: HalLlama, num_pages: int = 16, token_budget: int = 16) -> Engine:
    return Engine(model, num_pages=num_pages, page_size=generation.PAGE_SIZE, token_budget=token_budget)


def requests() -> list[Request]:
    return [Request(name, prompt, NEW_TOKENS) for name, prompt in PROMPTS.items()]


def drain(engine: Engine) -> dict[str, Sequence]:
    finished: dict[str, Sequence] = {}
    while engine.busy:
        finished |= {seq.request.name: seq for seq in engine.step().finished}
    return finished


@pytest.mark.skipif(weights.folder() is None, reason=weights.MISSING)
def test_ragged_minilm_equals_padded_plain_torch() -> None:
    parameters = weights.load_weights()
    ids = weights.tokenize(weights.load_tokenizer(), TEXTS)
    assert len({len(text) for text in ids}) > 1
    vectors = minilm.embed(minilm.load(parameters, minilm.get_attention("cpu")), ids)
    assert vectors.shape == (len(TEXTS), minilm.HIDDEN)
    torch.testing.assert_close(vectors, plain.embed(parameters, ids), atol=1e-5, rtol=0)


@pytest.mark.skipif(weights.folder() is None, reason=weights.MISSING)
def test_minilm_vectors_do_not_depend_on_the_batch() -> None:
    ids = weights.tokenize(weights.load_tokenizer(), TEXTS)
    model = minilm.load(weights.load_weights(), minilm.get_attention("cpu"))
    together, in_batches = minilm.embed(model, ids), minilm.embed(model, ids, tokens_a_batch=8)
    torch.testing.assert_close(together, in_batches, atol=1e-5, rtol=0)


# 16 pages hold all three at once; 5 hold only "long", so that the others wait and then get its used pages.
@pytest.mark.parametrize("num_pages", [16, 5])
@pytest.mark.parametrize("token_budget", [7, 128])
def test_engine_equals_full_recomputation(llama: HalLlama, num_pages: int, token_budget: int) -> None:
    engine = engine_for(llama, num_pages, token_budget)
    for request in requests():
        engine.submit(request)
    finished = drain(engine)
    assert engine.allocator.free == num_pages
    for request in requests():
        assert finished[request.name].generated == generation.recompute(llama, request), request.name


def test_a_request_that_comes_later_joins_the_running_batch(llama: HalLlama) -> None:
    early, _, late = requests()
    engine = engine_for(llama)
    engine.submit(early)
    engine.step()
    engine.submit(late)
    report = engine.step()
    assert (report.decoded, report.prefilled) == (1, engine.token_budget - 1)
    assert drain(engine)[late.name].generated == generation.recompute(llama, late)


def test_the_ops_of_both_models_are_hals(llama: HalLlama) -> None:
    """Whatever lies between matrix products and attention, and has an op."""
    names = generation.kernels(llama)
    assert {name.partition(".")[2] for name in names[4:]} == {
        "rms_norm", "fused_add_rms_norm", "rotary_embedding", "silu_and_mul",
    }  # fmt: skip
    assert minilm.get_layer_norm(llama.attn.device).selection.kernels() == {"call": "torch.layer_norm"}


def test_training_has_the_same_model(llama: HalLlama, tmp_path: Path) -> None:
    """Its plain ops compute what HAL's do, and what it saves is what is loaded."""
    trained = TinyLlama(llama.config, training.plain_ops(llama.config))
    trained.load_state_dict(llama.state_dict())
    tokens = torch.randint(llama.config.vocab_size, (2, 20))
    loss = training.loss_of(trained, tokens, training.sdpa)
    torch.autograd.backward(loss)
    assert all(p.grad is not None and p.grad.ne(0).any() for p in trained.parameters())
    with torch.no_grad():
        hidden = trained(tokens, torch.arange(20), training.sdpa)
        torch.testing.assert_close(hidden, llama.forward_full(tokens), atol=1e-4, rtol=1e-4)
    save(trained, tmp_path)
    again = load(llama.attn, tmp_path).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in llama.state_dict().items())


def test_the_end_token_ends_a_text(llama: HalLlama) -> None:
    whole = generation.recompute(llama, requests()[0])
    end = whole[3]
    engine = engine_for(llama)
    engine.submit(Request("ends", PROMPTS["short"], NEW_TOKENS, end))
    assert drain(engine)["ends"].generated == whole[: whole.index(end) + 1]


def test_a_request_that_can_never_be_served_is_refused(llama: HalLlama) -> None:
    engine = engine_for(llama, num_pages=2)
    with pytest.raises(ValueError, match="needs 4 pages of 2"):
        engine.submit(Request("big", PROMPTS["long"], 20))
    with pytest.raises(ValueError, match="longer than the model's 1024 tokens"):
        engine.submit(Request("endless", PROMPTS["long"], 1000))
    with pytest.raises(ValueError, match="needs a prompt"):
        engine.submit(Request("empty", (), 20))


def test_pages_are_counted() -> None:
    allocator = PageAllocator(4)
    pages = allocator.take(3)
    assert len(set(pages)) == 3
    assert allocator.free == 1
    with pytest.raises(ValueError, match="2 pages asked for, 1 free"):
        allocator.take(2)
    allocator.give_back(pages)
    assert allocator.free == 4
