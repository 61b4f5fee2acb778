"""What is declared about aiter's HIP decode over keys in vectors: ``paged_attention_rocm`` (``csrc/cpp_itfs/pa``).

Read from the wheel 0.1.7.post2.dev18 and from github.com/ROCm/aiter at v0.1.7.post5 to v0.1.20.post1, where ``pa.cuh``
computes the same:

* K is ``[pages, heads, dim / x, page, x]`` with x elements of 16 bytes, V ``[pages, heads, dim, page]``: the layout
  ``"HDN"``, and nothing else. It goes by the strides of K's pages and heads, in V too; a head's part is one piece.
* a lane takes 16 tokens of V side by side, so pages are multiples of 16 (``VTOKENS_PER_LANE``); 16 is what its tests
  run (``op_tests/test_pa.py``, ``test_pa_mtp.py``), vLLM's also 32. Head dims are multiples of 64 (``VHELOOP``): tests
  run 128, and 64 is vLLM's other one.
* up to 16 query heads a kv head: beyond, heads of the second kv head on are found at half their distance
  (``wg_start_head_idx``), whatever ``paged_attn.py`` says of 32.
* ``mtp`` queries a row, aligned to the end of the keys and causal; tests run up to 4. A launch is made for one number
  of them, so graphs hold one query a row. Rows without keys are read before their scratch: they are cleared afterwards.
* Of V it reads the whole last page of a row, and multiplies what lies behind the last token by 0, which leaves NaN as it
  is; K there is masked. The contract lets it be NaN: what is not finite there is 0 during the call, see
  :mod:`hal_rocm._aiter_pa`.
* ALiBi; no cap, window, sinks or LSE. Any context: partial results are 256 keys apart.
* FP8 is not declared: 16-bit queries are rounded unscaled (above 240 or 448 that is NaN), and probabilities too, so that
  those below 2^-11 vanish: of 256 keys up to an eighth of the sum. Its scales a head are scales a token and head.
* archs: those that README.md calls supported. ``pa.cuh`` compiles for gfx90a too, which is not among them.

Band: not measured here. Where its layout is asked for it comes before the portable kernel, as AMD's own for these archs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hal import Anything, Archs, Band, Constraint, Kernel, Needs, OneOf, Range, Reason, SameAs
from hal_rocm.aiter_kernels import AITER_ARCHS, environment, needs_aiter

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]


def _check(request: Request, device: Device) -> Sequence[Reason]:
    """Several queries a row see each other causally, and outside of graphs."""
    reasons = list(environment(request, device))
    queries = getattr(request, "max_q_len", 1)
    if queries > 1 and not getattr(request, "causal", True):
        text = f"max_q_len {queries} without causality: it masks the queries of a row causally"
        reasons.append(Reason("feature_unsupported", text, "causal", "False", "True"))
    if queries > 1 and getattr(request, "graph", False):
        text = f"max_q_len {queries} in a graph: a launch holds one number of queries a row"
        reasons.append(Reason("feature_unsupported", text, "graph", "True", "False"))
    return reasons


_DECODE: Mapping[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "group_size": Range(1, 16),
    "head_dim": OneOf(64, 128),
    "v_head_dim": SameAs("head_dim"),
    "dtype": OneOf("bfloat16", "float16"),
    "kv_dtype": SameAs("dtype"),
    "page_size": OneOf(16, 32, 64, 128),
    "kv_layout": OneOf("HDN"),
    "max_q_len": Range(1, 4, (4,)),
    "causal": OneOf(True, False),
    "softmax_scale": Range(2**-8, 8, (0.3,)),
    "alibi": OneOf(False, True),
    "deterministic": OneOf(False, True),
    "graph": OneOf(False, True),
}

KERNELS = (
    Kernel(
        name="aiter_pa.decode",
        op="attention",
        phase="decode",
        target="hal_rocm._aiter_pa:decode",
        priority=Band.PERFORMANT + 20,
        platforms={"rocm": Archs(only=AITER_ARCHS)},
        needs=(Needs("torch", ">=2.6", install="install a ROCm build of torch"), needs_aiter()),
        fields=_DECODE,
        check=_check,
        copies="V's last page of each row, and back; q, where its heads are not contiguous",
        evidence={"*": "emulated"},
        note="paged_attention_rocm; compiles on first use",
    ),
)
