"""A Llama-shaped model (GQA, RoPE, RMSNorm, SwiGLU) that leaves its attention and its other ops to the caller.

The layers never know whether they are trained, run over a whole sequence, or served from a paged KV cache:
they hand q, k and v to an `attend` function. Training brings its own; `HalLlama` has two, made of one handle.
What lies between matrix products and attention are four ops: HAL's in `HalLlama`, plain torch in training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
class Ops:
    """What is computed beside matrix products and attention, called as `hal.get_op`'s ops of these names are."""

    rms_norm: Callable[[Tensor, Tensor], Tensor]
    fused_add_rms_norm: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotary_embedding: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]


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


class Attention(nn.Module):
    """Project, rotate, `attend`, project back."""

    def __init__(self, config: Config, layer: int, ops: Ops) -> None:
        super().__init__()
        self.layer, self.head_dim, self.ops = layer, config.head_dim, ops
        self.q = nn.Linear(config.hidden, config.num_q_heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden, config.num_kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden, config.num_kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.num_q_heads * config.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, rope: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """`[..., hidden]` to `[..., hidden]`."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        q, k = self.ops.rotary_embedding(q, k, rope[0], rope[1], positions)
        result: Tensor = self.o(attend(self.layer, q, k, v).flatten(-2))
        return result


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up = nn.Linear(config.hidden, 2 * config.intermediate, bias=False)
        self.down = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., hidden]`."""
        result: Tensor = self.down(self.ops.silu_and_mul(self.gate_up(x)))
        return result


class Block(nn.Module):
    """One layer: attention and MLP. What they make is added to the residual by the norm that comes after."""

    def __init__(self, config: Config, layer: int, ops: Ops) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config, layer, ops)
        self.mlp_norm = nn.RMSNorm(config.hidden)
        self.mlp = Mlp(config, ops)


class TinyLlama(nn.Module):
    """The model, with the attention and the other ops left open."""

    rope: Tensor

    def __init__(self, config: Config, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed = nn.Embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(Block(config, layer, ops) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.register_buffer("rope", rope_table(config), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states `[..., hidden]` of tokens `[...]` at positions that broadcast to them."""
        positions = positions.expand(tokens.shape).contiguous()
        embedded = self.embed(tokens)
        # A copy: the residual changes in place, and the first norm's backward needs what it was given.
        residual, made = embedded.clone(), None
        for block in self.blocks:
            if made is None:
                x = self.ops.rms_norm(embedded, block.attention_norm.weight)
            else:
                x = self.ops.fused_add_rms_norm(made, residual, block.attention_norm.weight)
            mixed = block.attention(x, self.rope, positions, attend)
            made = block.mlp(self.ops.fused_add_rms_norm(mixed, residual, block.mlp_norm.weight))
        return self.ops.fused_add_rms_norm(made, residual, self.norm.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., vocab_size]`, with the embedding as the output matrix."""
        return functional.linear(hidden, self.embed.weight)


def bind_ops(config: Config, device: hal.Device) -> Ops:
    """The model's ops by HAL, for float32."""
    import hal

    common: dict[str, Any] = {"dtype": torch.float32, "device": device}
    norm = {"hidden_size": config.hidden, "eps": config.norm_eps}
    heads = {n: getattr(config, n) for n in ("num_q_heads", "num_kv_heads", "head_dim")}
    return Ops(
        rms_norm=hal.get_op("rms_norm", **norm, **common),
        fused_add_rms_norm=hal.get_op("fused_add_rms_norm", **norm, **common),
        rotary_embedding=hal.get_op("rotary_embedding", **heads, **common),
        silu_and_mul=hal.get_op("silu_and_mul", hidden_size=config.intermediate, **common),
    )


class HalLlama(TinyLlama):
    """The model with a handle of `hal.get_attention`, and two ways to run it that must agree."""

    def __init__(self, config: Config, attn: hal.Attention) -> None:
        super().__init__(config, bind_ops(config, attn.device))
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
    for name in [name for name in state if "gate_up" in name]:
        gate, up = state.pop(name).chunk(2)
        state |= {name.replace("gate_up", "gate"): gate.clone(), name.replace("gate_up", "up"): up.clone()}
    save_file(state, folder / "model.safetensors")


def read_config(folder: Path = WEIGHTS) -> Config:
    """The shape of the saved model."""
    return Config(**json.loads((folder / "config.json").read_text()))


def load(attn: hal.Attention, folder: Path = WEIGHTS) -> HalLlama:
    """The saved model in float32, where a greedy choice does not hang on how a kernel orders its sums."""
    model = HalLlama(read_config(folder), attn)
    saved = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name in [name for name in saved if ".gate." in name]:
        both = (saved.pop(name), saved.pop(name.replace("gate", "up")))
        saved[name.replace("gate", "gate_up")] = torch.cat(both)
    model.load_state_dict(saved)
    return model.requires_grad_(False).eval().to(attn.device.torch_device())
