"""Train the tiny Llama on Python's help topics.

    python -m examples.tiny_llama.train

The attention is injected: `--attention sdpa` is plain torch, `--attention hal` is a kernel with a backward. The other
ops are plain torch too, since autocast mixes formats between them.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from examples.tiny_llama.model import WEIGHTS, Attend, Config, Ops, TinyLlama, save
from examples.tiny_llama.text import END, topics, train_tokenizer

HELD_OUT_EVERY = 16


def sdpa(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch over `[batch, len, heads, dim]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[..., heads, head_dim]` by `[..., 1, head_dim / 2]`; the halves of a head are its pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def plain_ops(config: Config) -> Ops:
    """The model's ops by torch, with gradients."""

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, config.norm_eps)

    def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        total = residual + x
        residual.copy_(total)
        return rms_norm(total, weight)

    def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def silu_and_mul(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up

    return Ops(rms_norm, fused_add_rms_norm, rotary_embedding, silu_and_mul)


def hal_attention(config: Config) -> Attend:
    """Causal attention by whichever kernel HAL binds for training."""
    import hal

    attn = hal.get_attention(
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        phases=("prefill",),
        needs_grad=True,
        device="cpu",
    )
    # Autocast leaves v in bfloat16, but not q and k, whose rotation is in float32.
    return lambda layer, q, k, v: attn(q.float(), k.float(), v.float())


def encode(config: Config, folder: Path) -> tuple[Tensor, Tensor]:
    """Train and save the tokenizer; the tokens to learn from, and those held out, each `[tokens]`."""
    pages = topics()
    tokenizer = train_tokenizer(pages, config.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    ids = [[end, *tokenizer.encode(page).ids] for page in pages]
    held_out = [t for page in ids[::HELD_OUT_EVERY] for t in page]
    learned = [t for number, page in enumerate(ids) if number % HELD_OUT_EVERY for t in page]
    return torch.tensor(learned), torch.tensor(held_out)


def batch(tokens: Tensor, size: int, length: int) -> Tensor:
    """Random windows `[size, length + 1]`."""
    starts = torch.randint(len(tokens) - length, (size, 1))
    return tokens[starts + torch.arange(length + 1)]


def loss_of(model: TinyLlama, windows: Tensor, attend: Attend) -> Tensor:
    """Mean cross entropy of each next token, in nats."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    hidden = model(inputs, torch.arange(inputs.shape[1]), attend)
    return functional.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten())


def initialise(model: TinyLlama) -> None:
    """Small normal weights, smaller still where a block writes into the residual."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("o.weight", "down.weight"))
            scale = 1 / math.sqrt(2 * model.config.num_layers) if residual else 1.0
            torch.nn.init.normal_(parameter, std=0.02 * scale)


def optimizer_for(model: TinyLlama) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def held_out_loss(model: TinyLlama, tokens: Tensor, length: int, attend: Attend) -> float:
    """Mean loss over the held-out pages, cut into windows."""
    windows = tokens[: (len(tokens) - 1) // length * length + 1].unfold(0, length + 1, length)
    return loss_of(model, windows, attend).item()


def learn(model: TinyLlama, optimizer: torch.optim.Optimizer, windows: Tensor, attend: Attend, bf16: bool) -> float:
    """One step of the optimizer; the loss before it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = loss_of(model, windows, attend)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(args: argparse.Namespace) -> None:
    """Train, reporting as it goes, and save what comes out."""
    torch.manual_seed(args.seed)
    config = Config()
    learned, held_out = encode(config, args.out)
    model = TinyLlama(config, plain_ops(config))
    initialise(model)
    attend = hal_attention(config) if args.attention == "hal" else sdpa
    optimizer = optimizer_for(model)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.2f}M parameters, {len(learned)} tokens to learn, {len(held_out)} held out", flush=True)
    start, running = time.perf_counter(), 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = learn(model, optimizer, batch(learned, args.batch, args.length), attend, args.bf16)
        running = loss if step == 0 else 0.95 * running + 0.05 * loss
        if step % args.report_every == 0 or step == args.steps - 1:
            unseen = held_out_loss(model, held_out, args.length, attend)
            seconds = time.perf_counter() - start
            print(f"step {step:5d}  loss {running:.3f}  held out {unseen:.3f}  {seconds:.0f} s", flush=True)
            save(model, args.out)


def main() -> None:
    """Read the arguments and train."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--attention", choices=("sdpa", "hal"), default="sdpa")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="multiply matrices in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report-every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
