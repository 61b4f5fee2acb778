"""Serve requests that come at different times, then check every token.

Run as `python -m examples.tiny_llama.run [DEVICE]`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import fields

import torch
from tokenizers import Tokenizer

import hal
from examples.tiny_llama.engine import Engine, Request, Sequence, StepReport
from examples.tiny_llama.model import Config, HalLlama, load, read_config
from examples.tiny_llama.text import END, load_tokenizer

PAGE_SIZE = 16
NUM_PAGES = 32
TOKEN_BUDGET = 32

LONG_PROMPT = """\
The "while" statement
*********************

The "while" statement is used for repeated execution as long as an
expression is true:

   while_stmt ::= "while" assignment_expression ":" suite
                  ["else" ":" suite]

This repeatedly tests the expression and, if it is true, executes the
first suite; if the expression is false (which may be the first time
it is tested) the suite of the "else" clause, if present, is"""

# When each request comes (the number of a step), what it asks to continue, and for how many tokens.
ARRIVALS = [
    (0, 'The "if" statement is used for', 48),
    (0, "A class definition", 64),
    (0, LONG_PROMPT, 120),
    (3, "Numbers are created by", 40),
    (6, 'The "try" statement specifies exception handlers and/or cleanup code\nfor a group of statements', 64),
    (6, "A coroutine function", 40),
    (20, "An exception", 48),
    (45, 'The "for" statement is used to iterate over the elements of a', 56),
]


def get_attention(config: Config, device: str | None = None) -> hal.Attention:
    """The attention of the model: all phases, for both of the ways to run it."""
    return hal.get_attention(
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        page_size=PAGE_SIZE,
        device=device,
    )


def requests(tokenizer: Tokenizer) -> list[tuple[int, Request]]:
    """Each request, with the step at which it comes."""
    end = tokenizer.token_to_id(END)
    return [
        (step, Request(f"#{number}", tuple(tokenizer.encode(text).ids), count, end))
        for number, (step, text, count) in enumerate(ARRIVALS, start=1)
    ]


def serve(engine: Engine, arrivals: list[tuple[int, Request]]) -> list[Sequence]:
    """Step until all requests are served, telling what happens."""
    finished: list[Sequence] = []
    step = 0
    while engine.busy or step <= max(when for when, _ in arrivals):
        arrived = [request for when, request in arrivals if when == step]
        for request in arrived:
            engine.submit(request)
        report = engine.step()
        finished += report.finished
        show_step(step, arrived, report, engine.allocator.num_pages)
        step += 1
    return finished


def show_step(step: int, arrived: list[Request], report: StepReport, num_pages: int) -> None:
    """One line for a step in which something changed."""
    came, went = [request.name for request in arrived], [seq.request.name for seq in report.finished]
    if not (came or went or report.prefilled):
        return
    events = [f"{name} comes" for name in came] + [f"{name} done" for name in went]
    places = f"{report.running} running, {report.waiting} waiting, {report.pages_used:2d}/{num_pages} pages"
    work = f"{report.prefilled:2d} prefill + {report.decoded} decode tokens"
    print(f"  step {step:3d}  {work}  {places}  {', '.join(events)}".rstrip(), flush=True)


def recompute(model: HalLlama, request: Request) -> list[int]:
    """The same greedy text without any cache: the whole sequence anew for each token."""
    tokens = torch.tensor([request.prompt], device=model.embed.weight.device)
    new: list[int] = []
    while len(new) < request.max_new_tokens and (not new or new[-1] != request.end):
        choice = model.logits(model.forward_full(tokens)[:, -1]).argmax(dim=-1, keepdim=True)
        new.append(int(choice))
        tokens = torch.cat((tokens, choice), dim=1)
    return new


def show_text(tokenizer: Tokenizer, seq: Sequence) -> None:
    """Print the end of the prompt, a bar, and what the model made of it."""
    prompt, text = tokenizer.decode(list(seq.request.prompt)), tokenizer.decode(seq.generated)
    before = prompt if len(prompt) < 90 else "…" + prompt[-89:]
    lines = f"{before}▏{text}".splitlines()
    print(f"\n  {seq.request.name}  " + "\n      ".join(lines))


def check(model: HalLlama, finished: list[Sequence]) -> bool:
    """Compare each text with full recomputation, token for token."""
    wrong = [seq.request.name for seq in finished if seq.generated != recompute(model, seq.request)]
    total = sum(len(seq.generated) for seq in finished)
    if wrong:
        print(f"\n  NOT EQUAL TO FULL RECOMPUTATION: {', '.join(wrong)}")
    else:
        print(f"\n  all {len(finished)} texts equal full recomputation, token for token ({total} tokens)")
    return not wrong


def kernels(model: HalLlama) -> list[str]:
    """The names of all that runs: attention, cache write, and the ops between."""
    ops = (getattr(model.ops, field.name) for field in fields(model.ops))
    return [*model.attn.kernels().values(), *(str(op.selection.kernels()["call"]) for op in ops)]


def main(device: str | None = None) -> int:
    """Serve, print, check; 0 if every text is what full recomputation gives. Without `device`, HAL's own choice."""
    # On a CPU, work this small is slower when threads share it, and many times slower when the machine is busy.
    torch.set_num_threads(1)
    tokenizer = load_tokenizer()
    model = load(get_attention(read_config(), device))
    print(f"  on {model.attn.device}, with {', '.join(kernels(model))}")
    engine = Engine(model, num_pages=NUM_PAGES, page_size=PAGE_SIZE, token_budget=TOKEN_BUDGET)
    start = time.perf_counter()
    finished = serve(engine, requests(tokenizer))
    seconds = time.perf_counter() - start
    for seq in sorted(finished, key=lambda seq: seq.request.name):
        show_text(tokenizer, seq)
    total = sum(len(seq.generated) for seq in finished)
    print(f"\n  {total} tokens in {seconds:.2f} s: {total / seconds:.0f} tokens/s")
    return 0 if check(model, finished) and len(finished) == len(ARRIVALS) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
