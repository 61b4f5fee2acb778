"""torch's functions with the habits that torch_musa gives them. Read from its source at v2.7.1 (0bc05bf).

* ``scaled_dot_product_attention`` takes the flash kernel under ``SDPUtils.h``'s conditions, and else another without a
  word: here that fails, as such requests are not declared. Fewer kv heads than q heads need no flag.
* Masks are of the query's format, ``[q_len, kv_len]`` or four-dimensional, and none beside ``is_causal``, which is
  aligned to the first key (``SDP.cpp``: ``tril``). What a row without keys gives is not told: NaN here.
* A scale raises in builds for MUSA before 4.2 if it is not the default (``CheckScale``), and warns if it is.
* ``rms_norm`` and ``swish_glu`` take float32, float16 and bfloat16; the weight has the input's format; results are
  contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attention", "rms_norm", "swish_glu"]

FORMATS = (torch.float32, torch.float16, torch.bfloat16)
_fused = functional.scaled_dot_product_attention


def attention(musa: str = "4.3.6") -> Callable[..., Tensor]:
    """``scaled_dot_product_attention`` of a build for some version of MUSA."""
    old = tuple(map(int, musa.split("."))) < (4, 2)

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Any = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        dims = query.shape[-1], value.shape[-1]
        assert query.dtype in FORMATS[1:], "the flash kernel takes halves alone"
        assert max(dims) <= 128 or dims in ((192, 128), (160, 160)), f"no flash kernel for {dims}"
        assert query.dim() == key.dim() == value.dim() == 4
        assert key.shape[2], "no keys at all"
        if old and scale is not None:
            raise RuntimeError("Not support explicit `scale` parameter")
        if attn_mask is not None:
            assert not is_causal
            assert attn_mask.dtype == query.dtype
            assert attn_mask.shape[-2:] == (query.shape[2], key.shape[2])
            assert attn_mask.shape[:-2] in ((), (len(query), 1))
            attn_mask = attn_mask.masked_fill((attn_mask == -torch.inf).all(-1, keepdim=True), torch.nan)
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        out = _fused(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    return scaled_dot_product_attention


def rms_norm(input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:  # noqa: A002
    """``torch.rms_norm``."""
    assert input.dtype == weight.dtype
    assert input.dtype in FORMATS
    assert normalized_shape == input.shape[-1:]
    wide = input.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(input.dtype).contiguous()


def swish_glu(input: Tensor) -> Tensor:  # noqa: A002
    """``torch.swish_glu``."""
    assert input.dtype in FORMATS
    gate, up = input.float().chunk(2, -1)
    return (functional.silu(gate) * up).to(input.dtype).contiguous()
