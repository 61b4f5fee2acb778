"""What is declared about TensorRT-LLM's decode over a cache of latents, inside flashinfer.

Read from flashinfer-python 0.6.13 to 0.7.4 (``flashinfer/mla/_core.py``, ``trtllm_batch_decode_with_kv_cache_mla``):

* backend ``trtllm-gen``, named here: ``"auto"`` may become cuTe DSL's by measurement. It is for sm_100 and sm_103.
* the output is bfloat16, whatever the queries are: bfloat16 alone is declared. An e4m3 cache goes with e4m3 queries
  (upstream's ``tests/attention/test_trtllm_gen_mla.py`` has these two pairs), hence ``fp8_query``. The two scales may
  be float32 tensors then, which the function takes to base 2 itself; one scale of the cache is in both. The LSE of
  that pair is tested by nobody upstream (``check_lse``), and not declared.
* heads: before 0.6.17 its tiles are of 16, 32 or 64 of them, and 24, 40 or 96 fail with some batches and lengths;
  afterwards any number up to 64, and 128 ("must be <= 64", ``fmhaKernels.cuh``; flashinfer pull request 4178).
* dims 512 and 64 (it has 256 and 64 too), made of keys of 128 or 64, as its documentation says; pages of 32 or 64
  tokens; the block table's width is a multiple of 128 tokens.
* queries are ``[rows, queries, heads, 576]``, read by shape, as many for each row; more than one are causal.
* the LSE is in base 2, as that of the other launches of ``csrc/trtllm_fmha_kernel_launcher.cu``.
* graphs are not declared: it has lengths of queries as cumulative ones since 0.6.15 alone, and what it does for a row
  without keys, as smaller steps in a graph have them, nothing says.

Band: that of trtllm-gen's other decode, the fastest there is on these chips: specialized; not measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import hal
from hal import Anything, Archs, Band, Constraint, Either, Kernel, Needs, OneOf, Pairs, Range, Reason, SameAs
from hal_nvidia.flashinfer_kernels import toolkit, versions_from
from hal_ops import is_fp8
from hal_ops.mla_attention import MlaAttentionRequest

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]

_FIELDS: dict[str, Constraint] = {
    "num_q_heads": Anything((16, 128)),
    "kv_lora_rank": OneOf(512),
    "qk_rope_head_dim": OneOf(64),
    "dtype": OneOf("bfloat16"),
    "kv_dtype": Either(SameAs("dtype"), Pairs("fp8_query", (True, "float8_e4m3fn"))),
    "fp8_query": OneOf(False, True),
    "page_size": OneOf(64, 32),
    "max_q_len": Range(1, 8, (4,)),
    "causal": OneOf(True),
    "softmax_scale": Range(2**-8, 8, (0.3,)),
    "return_lse": OneOf(False, True),
}
_NOPE_DIMS = (128, 64)
_ANY_HEADS = ">=0.6.17"
_WIDEST_TILE, _TWO_TILES = 64, 128


def _check(request: Request, device: Device) -> Sequence[Reason]:
    found = list(toolkit(request, device))
    assert isinstance(request, MlaAttentionRequest)
    if is_fp8(request.kv_dtype) and request.return_lse:
        text = "return_lse over an FP8 cache: what trtllm-gen gives there is tested by nobody"
        found.append(Reason("feature_unsupported", text, "return_lse"))
    if request.qk_nope_head_dim not in _NOPE_DIMS:
        text = f"qk_nope_head_dim {request.qk_nope_head_dim}; needs 128 or 64"
        found.append(Reason("head_dim", text, "qk_nope_head_dim", str(request.qk_nope_head_dim), "128 or 64"))
    return [*found, *_heads(request.num_q_heads)]


def _heads(count: int) -> Sequence[Reason]:
    """Why its tiles do not fit so many query heads."""
    version = hal.installed("flashinfer-python")
    whole = count in (_TWO_TILES, *(1 << i for i in range(7)))
    if whole or (count < _WIDEST_TILE and version is not None and version.satisfies(_ANY_HEADS)):
        return ()
    allowed = "1, 2, 4, 8, 16, 32, 64 or 128"
    text = f"num_q_heads {count}; needs {allowed}, or up to 64 with flashinfer-python {_ANY_HEADS}"
    return (Reason("feature_unsupported", text, "num_q_heads", str(count), allowed),)


KERNELS = (
    Kernel(
        name="trtllm_gen.mla_decode",
        op="mla_attention",
        phase="decode",
        target="hal_nvidia._trtllm_mla:decode",
        priority=Band.SPECIALIZED + 80,
        platforms={"nvidia": Archs(only=("sm_100", "sm_103"))},
        needs=(Needs("torch", ">=2.6"), versions_from(">=0.6.13", "it gives the LSE since then")),
        fields=_FIELDS,
        check=_check,
        copies="q, where it is a view that is not contiguous; a block table whose width is no multiple of 128 tokens; the "
        "output, where a plan of fixed size is called with more tokens than its rows have",
        copies_with={"kv_dtype": "q, into FP8"},
        row_alignment=16,
        evidence={"*": "emulated"},
        note="trtllm_batch_decode_with_kv_cache_mla",
    ),
)
