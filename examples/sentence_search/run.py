"""Search a few dozen sentences by meaning, and check the vectors.

Run as `python -m examples.sentence_search.run [DEVICE]`.
"""

from __future__ import annotations

import sys
import time

from torch import Tensor

from examples.sentence_search import model as minilm
from examples.sentence_search import plain, weights
from examples.sentence_search.corpus import QUESTIONS, SENTENCES

TOLERANCE = 1e-5


def show_hits(question: str, scores: Tensor, count: int = 2) -> None:
    """Print a question and the sentences nearest to it."""
    print(f"\n  {question}")
    best = scores.topk(count)
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"    {score:.2f}  {SENTENCES[index]}")


def check(vectors: Tensor, expected: Tensor) -> bool:
    """Say how far the vectors are from those of plain torch, and whether that is near enough."""
    difference = (vectors - expected).abs().max().item()
    passed = difference < TOLERANCE
    verdict = "equal to plain torch" if passed else "NOT EQUAL TO PLAIN TORCH"
    print(f"\n  {verdict}: largest difference {difference:.1e}, allowed {TOLERANCE:.0e}")
    return passed


def main(device: str | None = None) -> int:
    """Embed, search, print, check; 0 if the check passes. Without `device`, HAL's own choice."""
    if weights.folder() is None:
        print(weights.MISSING, file=sys.stderr)
        return 1
    attn = minilm.get_attention(device)
    norm = minilm.get_layer_norm(attn.device).selection.kernels()["call"]
    print(f"  on {attn.device}, with {', '.join(attn.kernels().values())}, {norm}")
    parameters = weights.load_weights(attn.device.torch_device())
    ids = weights.tokenize(weights.load_tokenizer(), SENTENCES + QUESTIONS)
    model = minilm.load(parameters, attn)
    print(f"  {len(ids)} texts of {min(map(len, ids))} to {max(map(len, ids))} tokens, ragged, no padding")
    start = time.perf_counter()
    vectors = minilm.embed(model, ids)
    seconds = time.perf_counter() - start
    print(f"  embedded {sum(map(len, ids))} tokens in {seconds:.2f} s")
    sentences, questions = vectors[: len(SENTENCES)], vectors[len(SENTENCES) :]
    for question, scores in zip(QUESTIONS, questions @ sentences.T, strict=True):
        show_hits(question, scores)
    return 0 if check(vectors, plain.embed(parameters, ids)) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
