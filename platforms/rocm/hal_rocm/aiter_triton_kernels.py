"""What is declared about aiter's Triton kernel for paged keys, ``unified_attention``.

Read from github.com/ROCm/aiter, v0.1.12 to v0.1.20.post1, ``aiter/ops/triton/attention/unified_attention.py`` and the
kernels under ``aiter/ops/triton/_triton_kernels/attention``:

* causal only; of the window the left side counts; caps, sinks (in float32), ALiBi; no LSE; queries and keys of equal
  head dims; FP8 caches under 16-bit queries with one k and one v scale, in the arch's own e4m3 flavour.
* Where its tile is as large as a page it loads whole pages (``TILE_SIZE == BLOCK_SIZE``), so that NaN behind a row's
  last token reaches the output, which the contract forbids. Tiles are 16 to 64 tokens from v0.1.12 on: pages of 128 and
  256 are declared. On gfx1250 a tile always is a page, so it is left out.
* With one query a row it takes row i for token i (``ALL_DECODE``): such steps are told to it as such only where that
  is true.
* archs: README.md calls gfx942 and gfx950 supported, gfx1100, gfx1151 and gfx1201 experimental, Triton included.

Band: written for these archs, and what vLLM runs GPT-OSS on (vllm#43817): performant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hal import Anything, Archs, Band, Constraint, Kernel, Needs, OneOf, Range, Reason, SameAs, Windows
from hal_rocm.aiter_kernels import needs_aiter

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]

_ARCHS = ("gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201")
_FP8 = ("float8_e4m3fn", "float8_e4m3fnuz")


def _own_formats(request: Request, device: Device) -> Sequence[Reason]:
    """A cache is in the format of the queries, or in the FP8 flavour that the arch multiplies."""
    found = str(getattr(request, "kv_dtype", ""))
    own = [f"float8_{f}" for f in ("e4m3fn", "e4m3fnuz") if f"fp8_{f}" in device.capabilities]
    dtype = getattr(request, "dtype", found)
    if found in (dtype, "fp8", "auto", *own):
        return ()
    allowed = " or ".join([str(dtype), *own])
    text = f"kv_dtype {found}; on {device.arch.name} it needs {allowed}"
    return (Reason("dtype", text, "kv_dtype", found, allowed),)


_FIELDS: Mapping[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "head_dim": OneOf(128, 64, 256),
    "v_head_dim": SameAs("head_dim"),
    "dtype": OneOf("bfloat16", "float16"),
    "kv_dtype": OneOf("bfloat16", "float16", *_FP8),
    "page_size": OneOf(128, 256),
    "kv_layout": OneOf("NHD", "HND"),
    "max_q_len": Range(1, None, (4,)),
    "causal": OneOf(True),
    "window": Windows(right=False),
    "softcap": Range(0, None, (30.0,)),
    "sinks": OneOf(False, True),
    "alibi": OneOf(False, True),
    "softmax_scale": Range(2**-8, 8, (0.3,)),
    "deterministic": OneOf(False, True),
    "graph": OneOf(False, True),
}


def _kernel(phase: str) -> Kernel:
    return Kernel(
        name=f"aiter_triton.{phase}",
        op="attention",
        phase=phase,
        target=f"hal_rocm._aiter_triton:{phase}",
        priority=Band.PERFORMANT + 40,
        platforms={"rocm": Archs(only=_ARCHS)},
        needs=(
            Needs("torch", ">=2.6", install="install a ROCm build of torch"),
            needs_aiter(">=0.1.12"),
            Needs("triton", ">=3.2", ("triton", "pytorch-triton-rocm", "triton-rocm")),
        ),
        fields=_FIELDS,
        check=_own_formats,
        evidence={"*": "emulated"},
        note="unified_attention; compiles on first use",
    )


KERNELS = (_kernel("extend"), _kernel("decode"))
