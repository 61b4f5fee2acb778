"""What is declared about flashinfer's kernels for rows, heads and pages: all but attention.

Read from flashinfer-python 0.5.3, 0.6.13 and 0.7.4 (``norm/__init__.py``, ``norm.cuh``, ``activation.cuh``, ``rope.py``,
``pos_enc.cuh``, ``page.cuh``, ``attention/cascade.cuh`` and their ``csrc``):

* ``rmsnorm`` and ``gemma_rmsnorm`` (weight + 1) take the weight in the input's format. The latter takes ``[rows, hidden]``
  alone, the former ``[rows, heads, hidden]`` too. ``fused_add_rmsnorm`` puts the result into x, and normalises the sum
  before it is rounded; it keeps a row in shared memory. ``layernorm`` is for bfloat16 with a weight and a bias in float32.
  In 0.6.7 and later (not in 0.6.4), where nvidia-cutlass-dsl is installed, they are CuTe programs, compiled for each
  hidden size, unless ``FLASHINFER_USE_CUDA_NORM=1`` asks for the CUDA code. Both ran; declared is what both serve.
* The gates, and ``layernorm``, read rows by their number and not by their stride: a view is copied.
* ``apply_rope_with_cos_sin_cache`` has kernels for head dims 64, 128 and 256 in every version, and loads 8 cosines at a
  time. ``append_paged_kv_cache`` and ``merge_state`` give each head of a token 16 bytes a thread, and a token to one
  block: :func:`_heads`. What else they want is said in their adapters.
* All read 16 bytes at a time: what does not begin at a multiple of that is copied, and hidden sizes are multiples of 8
  (the gates check twice of it, and half of such sizes are misaligned).

Band: these kernels wait for memory, whoever wrote them; flashinfer's have to be compiled on first use, and some need more
than their one pass to keep the contract (a table made for the tokens, states cleared, tokens gathered): portable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from hal import Archs, Band, Constraint, Kernel, MultipleOf, Needs, OneOf, Range, Reason, SameAs
from hal_nvidia.flashinfer_kernels import FLASHINFER, toolkit
from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.merge_states import MergeStatesRequest

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]

_HALVES: Mapping[str, Constraint] = {
    "dtype": OneOf("bfloat16", "float16"),
    "deterministic": OneOf(False, True),
    "graph": OneOf(False, True),
}
_ROWS: Mapping[str, Constraint] = {**_HALVES, "hidden_size": MultipleOf(8, 8)}
_NORM: Mapping[str, Constraint] = {
    **_ROWS,
    "weight_dtype": SameAs("dtype"),
    "eps": Range(0, None, (1e-5,)),
    "weight_offset": OneOf(0.0, 1.0),
}
_LAYER_NORM: Mapping[str, Constraint] = {
    **_ROWS,
    "dtype": OneOf("bfloat16"),
    "weight_dtype": OneOf("float32"),
    "weight": OneOf(True),
    "bias": OneOf(True),
    "eps": Range(0, None, (1e-6,)),
}
_ROTARY: Mapping[str, Constraint] = {
    **_HALVES,
    "num_q_heads": Range(1, None, (6, 14)),
    "num_kv_heads": Range(1, None, (2,)),
    "head_dim": OneOf(64, 128, 256),
    "rotary_dim": MultipleOf(16, 16, 256),
    "style": OneOf("neox", "interleaved"),
    "table_dtype": OneOf("float32", "bfloat16", "float16"),
}
_WRITE: Mapping[str, Constraint] = {
    **_HALVES,
    "num_kv_heads": Range(1, 128, (2, 3)),
    "head_dim": OneOf(64, 128, 256),
    "v_head_dim": SameAs("head_dim"),
    "kv_dtype": SameAs("dtype"),
    "page_size": Range(1, None, (16, 48)),
    "kv_layout": OneOf("NHD", "HND"),
}
_STATES: Mapping[str, Constraint] = {
    **_HALVES,
    "num_heads": Range(1, 128, (6, 32)),
    "v_head_dim": OneOf(64, 128, 256),
}
_MOST_THREADS = 1024
_THREAD_BYTES = 16
_SHARED_ROW = 16384
"""Elements of a row of ``fused_add_rmsnorm`` that fit, as float32, into the shared memory of every arch."""


def _heads(request: Request, device: Device) -> Sequence[Reason]:
    """One block has a thread for each 16 bytes of a token's heads."""
    found = list(toolkit(request, device))
    if isinstance(request, MergeStatesRequest):
        name, heads, dim = "num_heads", request.num_heads, request.v_head_dim
    elif isinstance(request, KvCacheWriteRequest):
        name, heads, dim = "num_kv_heads", request.num_kv_heads, request.head_dim
    else:
        return found
    most = _MOST_THREADS // (2 * dim // _THREAD_BYTES)
    if heads > most:
        text = f"{name} {heads} with head dim {dim}; a block of {_MOST_THREADS} threads takes {most}"
        found.append(Reason("check", text, name, str(heads), f"<={most}"))
    return found


def _kernel(
    op: str,
    module: str,
    fields: Mapping[str, Constraint],
    copies: str,
    *,
    copies_with: Mapping[str, str] = MappingProxyType({}),
    note: str = "",
) -> Kernel:
    return Kernel(
        name=f"flashinfer.{op}",
        op=op,
        phase="call",
        target=f"hal_nvidia._flashinfer_{module}:{op}",
        priority=Band.PORTABLE + 5,
        platforms={"nvidia": Archs(at_least="sm_80")},
        needs=(Needs("torch", ">=2.6"), FLASHINFER),
        fields=fields,
        check=_heads,
        copies=copies,
        copies_with=copies_with,
        evidence={"sm_90": "run", "*": "emulated"},
        note=f"compiles on first use{note and '; '}{note}",
    )


_READS = "what does not begin at multiples of 16 bytes"
_GATE_COPIES = f"x, where it is not contiguous; out, where it is given and not contiguous; {_READS}"

KERNELS = (
    _kernel(
        "rms_norm",
        "ops",
        _NORM,
        _READS,
        copies_with={"weight_offset": "x and out, where their rows are not evenly spaced"},
    ),
    _kernel(
        "fused_add_rms_norm",
        "ops",
        {**_NORM, "hidden_size": MultipleOf(8, 8, _SHARED_ROW)},
        f"x, unless out is x; residual and out, where their rows are not evenly spaced; {_READS}",
        note="normalises the sum before it is rounded",
    ),
    _kernel("layer_norm", "ops", _LAYER_NORM, f"x, where it is not contiguous; the result, into an out; {_READS}"),
    _kernel("silu_and_mul", "ops", _ROWS, _GATE_COPIES),
    _kernel("gelu_and_mul", "ops", {**_ROWS, "approximate": OneOf("none", "tanh")}, _GATE_COPIES),
    _kernel(
        "rotary_embedding",
        "rotary",
        _ROTARY,
        "the tokens' cosines and sines; q and k, where their tokens are not evenly spaced; the results, into an out that "
        f"is not q and k; {_READS}",
    ),
    _kernel(
        "kv_cache_write",
        "write",
        _WRITE,
        "k and v, in which each token that is skipped repeats one that is not",
        note="where all tokens are skipped, one slot is given what it holds",
    ),
    _kernel(
        "merge_attention_states",
        "states",
        _STATES,
        "both outs, with zeros where there are no keys; both LSEs, in base 2",
    ),
)
