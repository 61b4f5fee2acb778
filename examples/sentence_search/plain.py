"""The same model in plain torch, to check the other one: padded, masked, softmax by hand, nothing shared."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

LAYERS, HEADS, EPS = 6, 12, 1e-12

Weights = dict[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """`x W^T + b`."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Normalised over the last dimension."""
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)


def attention(weights: Weights, name: str, x: Tensor, mask: Tensor) -> Tensor:
    """`[batch, len, hidden]` to the same; mask `[batch, len]` is true where there is a token."""

    def heads(part: str) -> Tensor:
        return linear(weights, f"{name}.{part}", x).view(*x.shape[:-1], HEADS, -1).transpose(1, 2)

    q, k, v = heads("query"), heads("key"), heads("value")
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(-2)


def encoder_layer(weights: Weights, name: str, x: Tensor, mask: Tensor) -> Tensor:
    """`[batch, len, hidden]` to the same."""
    mixed = attention(weights, f"{name}.attention.self", x, mask)
    mixed = linear(weights, f"{name}.attention.output.dense", mixed)
    x = layer_norm(weights, f"{name}.attention.output.LayerNorm", x + mixed)
    inner = functional.gelu(linear(weights, f"{name}.intermediate.dense", x))
    inner = linear(weights, f"{name}.output.dense", inner)
    return layer_norm(weights, f"{name}.output.LayerNorm", x + inner)


def embed(weights: Weights, ids: list[list[int]]) -> Tensor:
    """Unit vectors `[texts, hidden]`, all texts in one padded batch."""
    device = weights["embeddings.LayerNorm.weight"].device
    width = max(map(len, ids))
    tokens = torch.tensor([text + [0] * (width - len(text)) for text in ids], device=device)
    mask = torch.tensor([[place < len(text) for place in range(width)] for text in ids], device=device)
    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = x + weights["embeddings.position_embeddings.weight"][:width]
    x = layer_norm(weights, "embeddings.LayerNorm", x + weights["embeddings.token_type_embeddings.weight"][0])
    for number in range(LAYERS):
        x = encoder_layer(weights, f"encoder.layer.{number}", x, mask)
    mean = (x * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return mean / mean.square().sum(dim=-1, keepdim=True).sqrt()
