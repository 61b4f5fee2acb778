"""The ops of a decoder layer beside attention: which are measured, on which shapes, and their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_ops import Request, resolve_target, torch_dtype
from hal_ops.rotary_embedding.tables import rotary_tables

__all__ = ["ROWS", "SMALL", "OpCall", "OpRow", "call_of"]

_E4M3 = "float8_e4m3fn"
_PAGE = 16


@dataclasses.dataclass(frozen=True)
class OpRow:
    """One op on one shape: tokens and hidden size, or tokens and heads of 128."""

    op: str
    shape: tuple[int, ...]
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    inplace: bool = False

    @property
    def name(self) -> str:
        fields = ", ".join(f"{n} {v}" for n, v in self.fields.items())
        return " ".join(filter(None, [self.op, "x".join(map(str, self.shape)), fields, self.inplace * "in place"]))

    def request_fields(self) -> dict[str, Any]:
        return {**dict(zip(_SIZES.get(self.op, ("hidden_size",)), self.shape[1:], strict=True)), **self.fields, **(
            {_DIM[self.op]: 128} if self.op in _DIM else {})}  # fmt: skip

    def quick(self) -> OpRow:
        """The same in small, to try it out."""
        sizes = (64,) if len(self.shape) == 2 and self.op not in _SIZES else (2,) * (len(self.shape) - 1)
        return dataclasses.replace(self, shape=(min(self.shape[0], 16), *sizes))


_HEADS = ("num_q_heads", "num_kv_heads")
_SIZES = {
    "rotary_embedding": _HEADS,
    "rotary_kv_cache_write": _HEADS,
    "kv_cache_write": ("num_kv_heads",),
    "kv_pages_copy": ("num_kv_heads",),
    "kv_pages_gather": ("num_kv_heads",),
    "merge_attention_states": ("num_heads",),
}
_DIM = dict.fromkeys(_SIZES, "head_dim") | {"merge_attention_states": "v_head_dim"}
ROWS = (
    OpRow("rms_norm", (8192, 8192)),
    OpRow("rms_norm", (16384, 4096)),
    OpRow("rms_norm", (8192, 5120)),
    OpRow("rms_norm", (4096, 16384)),
    OpRow("rms_norm", (131072, 128)),
    OpRow("rms_norm", (8192, 8192), {"dtype": "float32"}),
    OpRow("rms_norm", (8192, 8192), inplace=True),
    OpRow("fused_add_rms_norm", (8192, 8192)),
    OpRow("fused_add_rms_norm", (16384, 4096)),
    OpRow("layer_norm", (8192, 8192)),
    OpRow("layer_norm", (8192, 8192), {"weight_dtype": "float32"}),
    OpRow("silu_and_mul", (8192, 8192)),
    OpRow("silu_and_mul", (8192, 14336)),
    OpRow("silu_and_mul", (8192, 11008)),
    OpRow("gelu_and_mul", (8192, 8192), {"approximate": "none"}),
    OpRow("gelu_and_mul", (8192, 8192), {"approximate": "tanh"}),
    OpRow("rotary_embedding", (8192, 64, 8)),
    OpRow("rotary_embedding", (8192, 64, 8), inplace=True),
    OpRow("rotary_embedding", (8192, 64, 8), {"style": "interleaved"}),
    OpRow("rotary_embedding", (8192, 64, 8), {"rotary_dim": 64}),
    OpRow("rotary_embedding", (16384, 32, 8), inplace=True),
    OpRow("kv_cache_write", (8192, 64)),
    OpRow("kv_cache_write", (8192, 64), {"kv_layout": "HND"}),
    OpRow("kv_cache_write", (8192, 64), {"kv_dtype": _E4M3}),
    OpRow("kv_cache_write", (8192, 8)),
    OpRow("rotary_kv_cache_write", (8192, 64, 8)),
    OpRow("rotary_kv_cache_write", (8192, 64, 8), {"kv_dtype": _E4M3, "kv_layout": "HND"}),
    OpRow("kv_pages_copy", (32768, 8)),
    OpRow("kv_pages_gather", (32768, 8)),
    OpRow("kv_pages_gather", (32768, 8), {"kv_dtype": _E4M3}),
    OpRow("merge_attention_states", (8192, 32)),
    OpRow("fp8_quantize", (8192, 8192), {"granularity": "token", "fp8_dtype": _E4M3}),
    OpRow("fp8_quantize", (8192, 8192), {"granularity": "tensor", "fp8_dtype": _E4M3}),
    OpRow("fp8_quantize", (8192, 8192), {"granularity": "tensor", "fp8_dtype": _E4M3, "static": True}),
    OpRow("fp8_quantize", (8192, 8192), {"granularity": "block", "fp8_dtype": _E4M3}),
    OpRow("fp8_quantize", (8192, 8192), {"granularity": "block", "fp8_dtype": _E4M3, "block_rows": 128}),
)
"""The first row of an op is the one that targets speak of."""
SMALL = (
    OpRow("rms_norm", (1, 4096)),
    OpRow("fused_add_rms_norm", (1, 4096)),
    OpRow("silu_and_mul", (1, 14336)),
    OpRow("rotary_embedding", (1, 32, 8), inplace=True),
    OpRow("kv_cache_write", (1, 8)),
    OpRow("fp8_quantize", (1, 4096), {"granularity": "token", "fp8_dtype": _E4M3}),
)
"""Whose host time is taken."""


@dataclasses.dataclass
class OpCall:
    """Inputs of one call. ``num_bytes``: what must be read and written once.

    ``results`` turns what an implementation returned into the tensors to judge: those it made or changed.
    """

    args: tuple[Any, ...]
    num_bytes: int
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    changed: tuple[int, ...] = ()

    def __call__(self, implementation: Callable[..., Any]) -> Any:
        return implementation(*self.args, **self.kwargs)

    def results(self, implementation: Callable[..., Any]) -> list[Tensor]:
        """What the implementation makes of copies of the inputs, in float64; caches as they are after the call."""
        args = tuple(x.clone() if isinstance(x, Tensor) else x for x in self.args)
        made = implementation(*args, **self.kwargs)
        found = made if isinstance(made, tuple) else () if made is None else (made,)
        return [x.to(torch.float64) for x in (*found, *(args[i] for i in self.changed))]


def call_of(row: OpRow, request: Request, device: str) -> OpCall:
    """Random inputs of a row, in the request's formats."""
    makers = {
        "rotary_embedding": _rotary, "kv_cache_write": _write, "merge_attention_states": _merge,
        "rotary_kv_cache_write": _rotary_write, "kv_pages_copy": _copy, "kv_pages_gather": _gather,
    }  # fmt: skip
    return makers.get(row.op, _rows)(row, request, device)


def _random(request: Any, device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(torch_dtype(request.dtype))


def _size(*tensors: Tensor) -> int:
    return sum(x.nbytes for x in tensors)


def _rows(row: OpRow, request: Any, device: str) -> OpCall:
    tokens, hidden = row.shape
    x = _random(request, device, tokens, hidden * (2 if row.op.endswith("_and_mul") else 1))
    if row.op == "fp8_quantize":
        args = (x, torch.full((1,), 0.01, device=device)) if request.static else (x,)
        groups = resolve_target("hal_ops.fp8_quantize.torch_quantize:fp8_quantize")(request, device)(*args)
        return OpCall(args, _size(x, *groups))
    weights = {"rms_norm": 1, "fused_add_rms_norm": 1, "layer_norm": 2}.get(row.op, 0)
    residual = (_random(request, device, tokens, hidden),) if row.op == "fused_add_rms_norm" else ()
    wide = torch_dtype(request.weight_dtype) if weights else x.dtype
    args = (x, *residual, *(_random(request, device, hidden).to(wide) for _ in range(weights)))
    size = _size(*args, *residual) + tokens * hidden * x.itemsize
    return OpCall(args, size, {"out": x} if row.inplace else {}, (1,) if residual else ())


def _rotary(row: OpRow, request: Any, device: str) -> OpCall:
    """Of what passes a partial rotary in place nothing need be touched; here it is counted."""
    tokens = row.shape[0]
    q, k = (_random(request, device, tokens, n, request.head_dim) for n in row.shape[1:3])
    tables = rotary_tables(request.rotary_dim, tokens, device=device)
    positions = torch.arange(tokens, device=device)
    size = 2 * _size(q, k) + _size(*tables, positions)
    return OpCall((q, k, *tables, positions), size, {"out": (q, k)} if row.inplace else {})


def _caches(request: Any, pages: int, device: str) -> list[Tensor]:
    middle = (_PAGE, request.num_kv_heads) if request.kv_layout == "NHD" else (request.num_kv_heads, _PAGE)
    dtype = torch_dtype(request.kv_dtype)
    return [torch.randn(pages, *middle, request.head_dim, device=device).to(dtype) for _ in range(2)]


def _slots(tokens: int, device: str) -> Tensor:
    """Whole pages in disorder, in a cache twice as large."""
    pages = -(-tokens // _PAGE)
    first = torch.randperm(2 * pages, device=device)[:pages, None] * _PAGE
    return (first + torch.arange(_PAGE, device=device)).flatten()[:tokens]


def _write(row: OpRow, request: Any, device: str) -> OpCall:
    tokens = row.shape[0]
    k, v = (_random(request, device, tokens, request.num_kv_heads, request.head_dim) for _ in range(2))
    caches = _caches(request, 2 * -(-tokens // _PAGE), device)
    slots = _slots(tokens, device)
    size = _size(k, v, slots) + 2 * k.numel() * caches[0].itemsize
    return OpCall((k, v, *caches, slots), size, changed=(2, 3))


def _merge(row: OpRow, request: Any, device: str) -> OpCall:
    outs = [_random(request, device, *row.shape, request.v_head_dim) for _ in range(2)]
    lses = [torch.randn(*row.shape, device=device) for _ in range(2)]
    args = (outs[0], lses[0], outs[1], lses[1])
    return OpCall(args, _size(*args, outs[0], lses[0]))


def _rotary_write(row: OpRow, request: Any, device: str) -> OpCall:
    turned, written = _rotary(row, request, device), _write(row, request, device)
    q, k, cos, sin, positions = turned.args
    _, v, *others = written.args
    # k is read once, and its turned form goes to the cache alone.
    size = turned.num_bytes - 2 * k.nbytes + written.num_bytes
    return OpCall((q, k, v, cos, sin, positions, *others), size, changed=(6, 7))


def _copy(row: OpRow, request: Any, device: str) -> OpCall:
    """The first half of the pages, each to one of the second half, in disorder."""
    pages = row.shape[0] // _PAGE
    caches = _caches(request, 2 * pages, device)
    source, target = torch.randperm(pages, device=device), torch.randperm(pages, device=device) + pages
    return OpCall((*caches, source, target), _size(*caches, source, target), changed=(0, 1))


def _gather(row: OpRow, request: Any, device: str) -> OpCall:
    """Eight rows of equal length, their pages in disorder."""
    tokens, rows = row.shape[0], min(8, row.shape[0] // _PAGE)
    caches = _caches(request, tokens // _PAGE, device)
    table = torch.randperm(tokens // _PAGE, device=device).int().view(rows, -1)
    lengths = (torch.arange(rows + 1, device=device) * (tokens // rows)).int()
    size = _size(*caches) + 2 * caches[0].numel() * torch_dtype(request.dtype).itemsize
    return OpCall((*caches, table, lengths, tokens, tokens // rows), size)
