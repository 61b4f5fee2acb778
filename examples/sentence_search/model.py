"""MiniLM, a small BERT, over ragged batches: all texts stand in one row of tokens, and nothing is padded.

The attention and the norms are HAL's.

Only the attention and the pooling have to know where a text ends; both are told by `cu_seqlens`, int32
`[texts + 1]`, which starts at 0 and ends at the number of tokens.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

import hal

HIDDEN, HEADS, INTERMEDIATE, LAYERS = 384, 12, 1536, 6
VOCAB, POSITIONS, EPS = 30522, 512, 1e-12

NAMES_IN_CHECKPOINT = {
    "words": "embeddings.word_embeddings",
    "places": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def get_attention(device: str | None = None) -> hal.Attention:
    """The attention of the model: bidirectional, over whole texts, no cache."""
    return hal.get_attention(
        num_q_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        dtype=torch.float32,
        causal=False,
        phases=("prefill",),
        device=device,
    )


def get_layer_norm(device: hal.Device) -> hal.BoundOp:
    """The norm of the model, called with x, weight and bias."""
    return hal.get_op("layer_norm", hidden_size=HIDDEN, dtype=torch.float32, eps=EPS, device=device)


class Layer(nn.Module):
    """Attention and MLP, each added to its input and then normalised.

    The MLP's GELU has no gate to multiply with, so there is no op for it.
    """

    def __init__(self, layer_norm: hal.BoundOp) -> None:
        super().__init__()
        self.layer_norm = layer_norm
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.attention_norm = nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)
        self.mlp_norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor, cu_seqlens: Tensor, attn: hal.Attention) -> Tensor:
        """`[tokens, hidden]` to `[tokens, hidden]`."""
        q, k, v = (project(x).unflatten(-1, (HEADS, -1)) for project in (self.q, self.k, self.v))
        out = attn(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
        x = self._normalised(x + self.o(out.flatten(-2)), self.attention_norm)
        return self._normalised(x + self.down(functional.gelu(self.up(x))), self.mlp_norm)

    def _normalised(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        result: Tensor = self.layer_norm(x, norm.weight, norm.bias)
        return result


class MiniLM(nn.Module):
    """The encoder; `attn` is a handle of `hal.get_attention`."""

    def __init__(self, attn: hal.Attention) -> None:
        super().__init__()
        self.attn, self.layer_norm = attn, get_layer_norm(attn.device)
        self.words, self.places = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(POSITIONS, HIDDEN)
        # There are two kinds of segment in BERT and one here, so one row is left to add.
        self.segment = nn.Parameter(torch.zeros(HIDDEN))
        self.norm = nn.LayerNorm(HIDDEN)
        self.layers = nn.ModuleList(Layer(self.layer_norm) for _ in range(LAYERS))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Unit vectors `[texts, hidden]` of tokens `[tokens]`."""
        lengths = cu_seqlens.diff().long()
        text_of = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths)
        positions = torch.arange(len(tokens), device=tokens.device) - cu_seqlens[text_of]
        x = self.words(tokens) + self.places(positions) + self.segment
        x = self.layer_norm(x, self.norm.weight, self.norm.bias)
        for layer in self.layers:
            x = layer(x, cu_seqlens, self.attn)
        return functional.normalize(mean_of_texts(x, text_of, lengths), dim=-1)


def mean_of_texts(x: Tensor, text_of: Tensor, lengths: Tensor) -> Tensor:
    """Mean over each text's tokens: `[tokens, hidden]` to `[texts, hidden]`."""
    sums = x.new_zeros(len(lengths), x.shape[-1]).index_add_(0, text_of, x)
    return sums / lengths.unsqueeze(-1)


def load(weights: dict[str, Tensor], attn: hal.Attention) -> MiniLM:
    """A model that holds the checkpoint's weights under our names."""
    model = MiniLM(attn).to(weights["embeddings.LayerNorm.weight"].device)
    state = {name: weights[_name_in_checkpoint(name)] for name in model.state_dict() if name != "segment"}
    model.load_state_dict(state | {"segment": weights["embeddings.token_type_embeddings.weight"][0]})
    return model.requires_grad_(False).eval()


def _name_in_checkpoint(name: str) -> str:
    prefix, (module, kind) = "", name.rsplit(".", 2)[-2:]
    if name.startswith("layers."):
        prefix = f"encoder.layer.{name.split('.')[1]}."
    return f"{prefix}{NAMES_IN_CHECKPOINT[module]}.{kind}"


def embed(model: MiniLM, ids: list[list[int]], tokens_a_batch: int = 1024) -> Tensor:
    """Unit vectors `[texts, hidden]`, in batches of about so many tokens."""
    device, vectors, texts = model.segment.device, [], list(ids)
    while texts:
        size = sum(total <= tokens_a_batch for total in accumulate(map(len, texts))) or 1
        taken, texts = texts[:size], texts[size:]
        tokens = torch.tensor([token for text in taken for token in text], device=device)
        cu_seqlens = torch.tensor([0, *accumulate(map(len, taken))], dtype=torch.int32, device=device)
        vectors.append(model(tokens, cu_seqlens))
    return torch.cat(vectors)
