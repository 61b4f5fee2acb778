"""What the Triton attention kernels were seen to do wrong, as a function of arch and request. Imports no torch."""

from __future__ import annotations

from hal_ops._dtypes import is_fp8
from hal_ops.attention.request import AttentionRequest

__all__ = ["fp8_heads_on"]


def fp8_heads_on(arch: str, request: AttentionRequest, *, cached: bool) -> str:
    """Why these kernels do not serve FP8 keys and values of such head dims on an arch; nothing where they do.

    On an H200 with Triton 3.6.0 a prefill with heads of 40 and values of 16 gave wrong values, and read illegally when
    padded further; 64, 80, 96 and 128 (256 in an extend), and values of 32, were right. Other rows whose bytes are no
    multiple of 16 were not run.
    """
    dim, v_dim = request.head_dim, request.v_head_dim
    if (
        arch != "sm_90"
        or not is_fp8(request.kv_dtype if cached else request.qkv_dtype)
        or (dim >= 64 and v_dim >= 32 and dim % 16 == v_dim % 16 == 0)
    ):
        return ""
    return (
        f"head_dim {dim} and v_head_dim {v_dim} in FP8 on {arch}: needs multiples of 16 from 64, and from 32 for values"
    )
