"""What the tests of the ops share: the attention formula once more, element by element, and requests to draw from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hal_ops.attention import AttentionRequest

Naive = Callable[..., tuple[Tensor, Tensor]]


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: AttentionRequest,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence, in Python's floats, a loop for every index. Shares no code with what it checks."""
    q_len, kv_len = len(q), len(k)
    out = torch.zeros(q_len, request.num_q_heads, request.v_head_dim, dtype=torch.float64)
    lse = torch.full((q_len, request.num_q_heads), -math.inf, dtype=torch.float64)
    lists = [x.double().tolist() for x in (q, k, v)]
    for i in range(q_len):
        position = kv_len - q_len + i
        for h in range(request.num_q_heads):
            g = h // (request.num_q_heads // request.num_kv_heads)
            terms = []
            for j in range(kv_len):
                left, right = request.window
                if request.causal and j > position:
                    continue
                if left is not None and j < position - left:
                    continue
                if right is not None and j > position + right:
                    continue
                score = request.softmax_scale * sum(a * b for a, b in zip(lists[0][i][h], lists[1][j][g], strict=True))
                if request.softcap > 0:
                    score = request.softcap * math.tanh(score / request.softcap)
                if slopes is not None:
                    score -= float(slopes[h]) * abs(j - position)
                terms.append((score, lists[2][j][g]))
            logits = [score for score, _ in terms] + ([] if sinks is None else [float(sinks[h])])
            if not logits:
                continue
            top = max(logits)
            total = sum(math.exp(x - top) for x in logits)
            lse[i, h] = top + math.log(total)
            for score, value in terms:
                out[i, h] += math.exp(score - top) / total * torch.tensor(value, dtype=torch.float64)
    return out, lse


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more threads, and lose much where test processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def naive() -> Naive:
    return naive_attention


@pytest.fixture(scope="session")
def request_of() -> Callable[..., AttentionRequest]:
    """An attention request of 6/2 heads of 32 elements, pages of 16, float32; keywords change it."""

    def make(**fields: Any) -> AttentionRequest:
        base = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 32, "dtype": "float32", "page_size": 16}
        return AttentionRequest(**{**base, "kv_layout": "NHD", **fields})

    return make


@pytest.fixture(scope="session")
def assert_right() -> Callable[[Sequence[Any]], None]:
    """Fails with the report of each comparison that is not right."""

    def check(comparisons: Sequence[Any]) -> None:
        assert comparisons, "nothing was compared"
        wrong = [c.report() for c in comparisons if not c.ok]
        assert not wrong, "\n".join(wrong)

    return check
