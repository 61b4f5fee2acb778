"""A Llama-shaped model (GQA, RoPE, RMSNorm, SwiGLU) that leaves its attention to the caller.

The layers never know whether they are trained, run over a whole sequence, or served from a paged KV cache:
they hand q, k and v to an `attend` function. Training brings its own; `HalLlama` has two, made of one handle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    import hal

WEIGHTS = Path(__file__).parent / "weights"

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`attend(layer, q, k, v)`: q and the result `[..., num_q_heads, head_dim]`, k and v with `num_kv_heads`."""


@dataclass(frozen=True)
class Config:
    """The shape of the model; the defaults are those of the weights that come with it."""

    vocab_size: int = 1024
    hidden: int = 256
    intermediate: int = 512
    num_layers: int = 4
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    max_len: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def rope_table(config: Config) -> Tensor:
    """Cosines and sines of every position: `[2, max_len, head_dim / 2]`."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.outer(torch.arange(config.max_len).float(), config.rope_theta**-exponents)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[..., heads, head_dim]` by `[..., 1, head_dim / 2]`; the halves of a head are its pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Project, rotate, `attend`, project back."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.hidden, config.num_q_heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden, config.num_kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden, config.num_kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.num_q_heads * config.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """`[..., hidden]` to `[..., hidden]`."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        result: Tensor = self.o(out.flatten(-2))
        return result


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., hidden]`."""
        result: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return result


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """`[..., hidden]` to `[..., hidden]`."""
        x = x + self.attention(self.attention_norm(x), cos, sin, attend)
        result: Tensor = x + self.mlp(self.mlp_norm(x))
        return result


class TinyLlama(nn.Module):
    """The model, with the attention left open."""

    rope: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.register_buffer("rope", rope_table(config), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states `[..., hidden]` of tokens `[...]` at positions that broadcast to them."""
        cos, sin = self.rope[:, positions].unsqueeze(-2)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        result: Tensor = self.norm(x)
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., vocab_size]`, with the embedding as the output matrix."""
        return functional.linear(hidden, self.embed.weight)


class HalLlama(TinyLlama):
    """The model with a handle of `hal.get_attention`, and two ways to run it that must agree."""

    def __init__(self, config: Config, attn: hal.Attention) -> None:
        super().__init__(config)
        self.attn = attn

    def forward_full(self, tokens: Tensor) -> Tensor:
        """Hidden states of whole sequences `[batch, len]`, everything computed anew."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.attn(q, k, v)
            return out

        return self.forward(tokens, torch.arange(tokens.shape[1], device=tokens.device), attend)

    def forward_paged(self, tokens: Tensor, positions: Tensor, cache: Sequence[hal.KVCache], plan: hal.Plan) -> Tensor:
        """Hidden states of one serving step: ragged `[tokens]`, one cache a layer, one plan for all."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.attn(q, k, v, cache=cache[layer], plan=plan)
            return out

        return self.forward(tokens, positions, attend)


def save(model: TinyLlama, folder: Path = WEIGHTS) -> None:
    """Write the shape as JSON and the weights as bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    state = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def read_config(folder: Path = WEIGHTS) -> Config:
    """The shape of the saved model."""
    return Config(**json.loads((folder / "config.json").read_text()))


def load(attn: hal.Attention, folder: Path = WEIGHTS) -> HalLlama:
    """The saved model in float32, where a greedy choice does not hang on how a kernel orders its sums."""
    model = HalLlama(read_config(folder), attn)
    saved = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in saved.items()})
    return model.requires_grad_(False).eval().to(attn.device.torch_device())
