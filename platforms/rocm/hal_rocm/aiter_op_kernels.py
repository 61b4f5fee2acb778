"""What is declared about aiter's kernels for rows, rotary embeddings and cache writes.

Read from the wheel 0.1.7.post2.dev18 and from github.com/ROCm/aiter at v0.1.7.post5 to v0.1.20.post1
(``aiter/ops/{rmsnorm,norm,activation,rope,cache}.py`` and their sources under ``csrc/kernels``):

* ``rmsnorm2d_fwd`` and ``rmsnorm2d_fwd_with_add`` sum in float32. ``rms_norm_cu`` and ``fused_add_rms_norm_cu`` are not
  used: up to 0.1.7 the first sums squares in the input's own format and leaves out what is past a multiple of 8
  (``rmsnorm_kernels.cu``), the second overwrites x. The weight has the input's format.
* ``rmsnorm2d_fwd_with_add`` reads one residual and writes another; that both may be one is said nowhere, so the sum is
  copied back. v0.1.17 put ``gemma_norm`` before its last argument: neither is given.
* ``layernorm2d_fwd`` takes a weight and a bias.
* The gates read and write rows by their number (``token_idx * 2 * d``): views are copied.
* ``rope_cached_positions_2c_fwd_impl`` takes q and k by their strides, int64 positions, and contiguous tables. A token
  whose position is outside the tables it skips; the contract wants an error or NaN, so outputs are NaN before the call,
  and what was skipped in place becomes NaN after it. That costs a pass over them: this kernel is behind Triton's.
* ``reshape_and_cache_flash`` writes NHD pages that lie contiguous, K and V with one page stride; ``reshape_and_cache``
  HDN caches that are contiguous as a whole. Negative slots are skipped. FP8 is not declared: the conversion does not
  clamp (``cache_kernels.cu``), as the contract wants.

Band: AMD's own for its archs, and what vLLM and SGLang take there: performant, but for the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Mapping

from hal import Anything, Archs, Band, Constraint, Kernel, MultipleOf, Needs, OneOf, Range, SameAs
from hal_rocm.aiter_kernels import AITER_ARCHS, needs_aiter

__all__ = ["KERNELS"]

_FORMATS: Mapping[str, Constraint] = {
    "dtype": OneOf("bfloat16", "float16"),
    "deterministic": OneOf(False, True),
    "graph": OneOf(False, True),
}
_ROWS: Mapping[str, Constraint] = {**_FORMATS, "hidden_size": MultipleOf(8, 8, 8192)}
_NORM: Mapping[str, Constraint] = {**_ROWS, "weight_dtype": SameAs("dtype"), "eps": Range(0, None, (1e-5,))}
_ROTARY: Mapping[str, Constraint] = {
    **_FORMATS,
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "head_dim": OneOf(64, 128, 256),
    "rotary_dim": OneOf(64, 128, 256),
    "style": OneOf("neox", "interleaved"),
    "table_dtype": OneOf("float32", "bfloat16", "float16"),
}
_WRITE: Mapping[str, Constraint] = {
    **_FORMATS,
    "num_kv_heads": Anything((1, 2)),
    "head_dim": MultipleOf(8, 8, 256),
    "v_head_dim": SameAs("head_dim"),
    "kv_dtype": SameAs("dtype"),
    "page_size": Range(1, None, (16, 48)),
    "kv_layout": OneOf("NHD", "HDN"),
}

_INPUT = "x, where it is not contiguous"
_RESULT = "the result, into out where that is given"
_GATED = "the result, into an out that is not contiguous"


def _kernel(
    op: str, fields: Mapping[str, Constraint], copies: str, *, module: str = "ops", band: Band = Band.PERFORMANT
) -> Kernel:
    return Kernel(
        name=f"aiter.{op}",
        op=op,
        phase="call",
        target=f"hal_rocm._aiter_{module}:{op}",
        priority=band + 10,
        platforms={"rocm": Archs(only=AITER_ARCHS)},
        needs=(Needs("torch", ">=2.6", install="install a ROCm build of torch"), needs_aiter()),
        capabilities=frozenset({"bf16"}),
        fields=fields,
        copies=copies,
        evidence={"*": "emulated"},
    )


KERNELS = (
    _kernel("rms_norm", _NORM, f"{_INPUT}; {_RESULT}"),
    _kernel("fused_add_rms_norm", _NORM, f"{_INPUT}; residual likewise, and the sum back into it; {_RESULT}"),
    _kernel("layer_norm", {**_NORM, "weight": OneOf(True), "bias": OneOf(True)}, f"{_INPUT}; {_RESULT}"),
    _kernel("silu_and_mul", _ROWS, f"{_INPUT}; {_GATED}"),
    _kernel("gelu_and_mul", {**_ROWS, "approximate": OneOf("none", "tanh")}, f"{_INPUT}; {_GATED}"),
    _kernel(
        "rotary_embedding",
        _ROTARY,
        "positions in int32; cos and sin, where they are not contiguous",
        module="rotary",
        band=Band.PORTABLE,
    ),
    _kernel("kv_cache_write", _WRITE, "k and v, where their heads do not follow each other in memory"),
)
