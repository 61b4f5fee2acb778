"""Continuous batching over a paged KV cache: requests come and go, and each step serves whoever is there.

A step mixes decode and prefill: every sequence whose prompt is done adds one token, and what is left of the
step's token budget goes to prompts, in chunks, oldest first. To HAL it is one ragged batch and one plan.

A request is admitted when the pages for its prompt and for all it may generate are free. So a running
sequence never waits for a page, and nothing has to be preempted; the price is reserved pages that an early
end leaves unused.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.tiny_llama.model import HalLlama


@dataclass(frozen=True)
class Request:
    """What to continue, and for how many tokens at most; `end` is the token that ends a text early."""

    name: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    end: int | None = None


@dataclass
class Sequence:
    """A request under way: its tokens so far, its pages, and how many of the tokens they hold."""

    request: Request
    pages: list[int]
    tokens: list[int] = field(init=False)
    cached: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens that the cache does not hold yet: one when decoding, more while the prompt is prefilled."""
        return len(self.tokens) - self.cached

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def finished(self) -> bool:
        """Whether it is as long as it may be, or has said that it ends."""
        new = self.generated
        return len(new) == self.request.max_new_tokens or (bool(new) and new[-1] == self.request.end)


class PageAllocator:
    """Hands out the numbers of free pages, and takes them back."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = deque(range(num_pages))

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many free pages, in no order worth relying on."""
        if count > self.free:
            raise ValueError(f"{count} pages asked for, {self.free} free")
        return [self._free.popleft() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Make pages free again; what they hold stays in them until somebody writes over it."""
        self._free.extend(pages)


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    decoded: int
    prefilled: int
    running: int
    waiting: int
    pages_used: int
    finished: list[Sequence]


class Engine:
    """Serves requests with a model whose attention handle has a paged cache; greedy decoding."""

    def __init__(self, model: HalLlama, *, num_pages: int, page_size: int, token_budget: int) -> None:
        self.model, self.page_size, self.token_budget = model, page_size, token_budget
        self.allocator = PageAllocator(num_pages)
        self.cache = [model.attn.allocate_kv_cache(num_pages=num_pages) for _ in model.blocks]
        self.waiting: deque[Request] = deque()
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """Whether a step would have anything to do."""
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> None:
        """Queue a request; one that could never be served is refused here."""
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError(f"{request.name}: needs a prompt, and at least one token to generate")
        if len(request.prompt) + request.max_new_tokens > self.model.config.max_len:
            raise ValueError(f"{request.name}: longer than the model's {self.model.config.max_len} tokens")
        needed, there = self._pages_for(request), self.allocator.num_pages
        if needed > there:
            raise ValueError(f"{request.name}: needs {needed} pages of {there}")
        self.waiting.append(request)

    def step(self) -> StepReport:
        """Admit whom there is room for, run one ragged batch, and let go of those who finished."""
        self._admit()
        batch = self._schedule()
        decoded = sum(seq.pending == 1 and bool(seq.generated) for seq, _ in batch)
        if batch:
            self._run(batch)
        finished = [seq for seq in self.running if seq.finished]
        used = self.allocator.num_pages - self.allocator.free
        for seq in finished:
            self.running.remove(seq)
            self.allocator.give_back(seq.pages)
        prefilled = sum(count for _, count in batch) - decoded
        return StepReport(decoded, prefilled, len(batch), len(self.waiting), used, finished)

    def _pages_for(self, request: Request) -> int:
        # The last token is never fed back, so it needs no slot.
        return -(-(len(request.prompt) + request.max_new_tokens - 1) // self.page_size)

    def _admit(self) -> None:
        # First come, first served: a small request does not overtake a big one that waits for pages.
        while self.waiting and self._pages_for(self.waiting[0]) <= self.allocator.free:
            request = self.waiting.popleft()
            self.running.append(Sequence(request, self.allocator.take(self._pages_for(request))))

    def _schedule(self) -> list[tuple[Sequence, int]]:
        """Who runs in this step, and with how many tokens."""
        budget, batch = self.token_budget, []
        for seq in sorted(self.running, key=lambda seq: not seq.generated):
            count = min(seq.pending, budget)
            if count:
                batch.append((seq, count))
            budget -= count
        return batch

    def _run(self, batch: list[tuple[Sequence, int]]) -> None:
        tokens = [token for seq, count in batch for token in seq.tokens[seq.cached : seq.cached + count]]
        positions = [place for seq, count in batch for place in range(seq.cached, seq.cached + count)]
        for seq, count in batch:
            seq.cached += count
        counts = [count for _, count in batch]
        plan = self.model.attn.plan(
            q_lens=counts,
            kv_lens=[seq.cached for seq, _ in batch],
            block_table=[seq.pages for seq, _ in batch],
        )
        hidden = self.model.forward_paged(self._tensor(tokens), self._tensor(positions), self.cache, plan)
        last = self._tensor(counts).cumsum(0) - 1
        choices = self.model.logits(hidden[last]).argmax(dim=-1).tolist()
        for (seq, _), choice in zip(batch, choices, strict=True):
            # In the middle of a prompt the next token is known already.
            if seq.pending == 0:
                seq.tokens.append(choice)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.model.embed.weight.device)
