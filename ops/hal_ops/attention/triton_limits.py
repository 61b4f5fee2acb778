"""What the Triton attention kernels were seen to do wrong, as a function of arch and request. Imports no torch.

sm_90 is the only arch that they have been run on. What was wrong there, of a cause that nobody knows, is offered nowhere
else unproven.
"""

from __future__ import annotations

from hal_ops._dtypes import is_fp8
from hal_ops.attention.request import AttentionRequest

__all__ = ["fp8_heads", "fp8_heads_on", "heads"]

_ONLY = "on sm_90, the only arch that they were run on"


def fp8_heads(request: AttentionRequest, *, cached: bool) -> str:
    """Why prefill (or with ``cached`` extend) does not serve FP8 keys and values of such head dims; nothing where it does.

    On an H200 with Triton 3.6.0 a prefill with heads of 40 and values of 16 gave wrong values, and read illegally when
    padded further; 64, 80, 96 and 128 (256 in an extend), and values of 32, were right. Other rows whose bytes are no
    multiple of 16 were not run.
    """
    dim, v_dim = request.head_dim, request.v_head_dim
    fp8 = is_fp8(request.kv_dtype if cached else request.qkv_dtype)
    if not fp8 or (dim >= 64 and v_dim >= 32 and dim % 16 == v_dim % 16 == 0):
        return ""
    return (
        f"head_dim {dim} and v_head_dim {v_dim} in FP8: needs multiples of 16 from 64, and from 32 for values; some others "
        f"were wrong {_ONLY}"
    )


def fp8_heads_on(arch: str, request: AttentionRequest) -> str:
    """Why decode does not serve an FP8 cache of such head dims on an arch: those of the other phases, where those were."""
    return fp8_heads(request, cached=True) if arch == "sm_90" else ""


def heads(request: AttentionRequest, *, cached: bool) -> str:
    """Why prefill (or with ``cached`` extend) does not serve such head dims; nothing where it does.

    On an H200 with Triton 3.6.0, heads of 36, 40, 44, 72, 132 and 136 cut in two parts, and of 40 with values of 24 padded
    to one, gave wrong values and illegal reads in 16 bits, while 4, 12, 20, 60, 100, 204 and 250 were right, as were
    padded ones of 36 to 136 with values alike: which one is right cannot be told beforehand. 32, 64, 80, 96, 112, 128, 160,
    192 and 256 have been right in every run of every feature. Decode, which pads all, was right with any.
    """
    dim, v_dim = request.head_dim, request.v_head_dim
    if dim % 16 or v_dim % 16:
        return f"head_dim {dim} and v_head_dim {v_dim}: needs multiples of 16; some others were wrong {_ONLY}"
    return fp8_heads(request, cached=cached)
