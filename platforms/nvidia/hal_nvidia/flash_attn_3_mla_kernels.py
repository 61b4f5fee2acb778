"""What is declared about flash-attention 3 over a cache of latents, beside :mod:`hal_nvidia.flash_attn_3_kernels`.

Read from upstream's ``hopper/`` at 0251105a (2026-08-15): ``qv`` on sm_90 alone, in 16 bits, with head dims of q and k up
to 64 and of v from 256 to 512 (``flash_api.cpp``, the checks of ``q_v_``); declared is what models have, 64 and 512. Any
page size and strides; pages that its TMA path reads whole (a multiple of the key tile, 64, with more pairs of a query and
a head than 64: ``get_pagedkv_tma``, ``tile_size.h``) let NaN in unused slots through (flash-attention#1745), and are not
declared. The code of 64 and 512 (``HDIMDIFF64``) is inside that of 64 (``HDIM64``; ``run_mha_fwd_constexpr``).
tokenspeed-fa3 is built without these head dims.

Band: one pass over the cache by Hopper's tensor cores: specialized, by its authors' word; not measured here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hal import Anything, Archs, Band, Constraint, Kernel, OneOf, Range, Reason, SameAs
from hal_nvidia import flash_attn_3_kernels as attention
from hal_nvidia._flash_attn_3_build import SOURCE, build, unmet
from hal_ops.mla_attention import PHASES, MlaAttentionRequest

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]

_TILE = 64
"""Keys of a tile, and pairs of a query and a head (``hopper/tile_size.h``, head dim 64 with a v of 512)."""
_FLAGS = {
    "HDIM64": "head dim 64, whose code has the unequal ones",
    "HDIMDIFF64": "unequal head dims",
    "PAGEDKV": "paged attention",
    "VARLEN": "ragged batches",
}
_FIELDS: dict[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 16)),
    "kv_lora_rank": OneOf(512),
    "qk_rope_head_dim": OneOf(64),
    "dtype": OneOf("bfloat16", "float16"),
    "kv_dtype": SameAs("dtype"),
    "page_size": Range(1, None, (16, 48)),
    "max_q_len": Range(1, None, (4,)),
    "causal": OneOf(True, False),
    "softmax_scale": Anything((0.3,)),
    "return_lse": OneOf(False, True),
    "deterministic": OneOf(False, True),
    "graph": OneOf(False, True),
}


def _extend(request: Request, device: Device) -> Sequence[Reason]:
    return tuple(_reasons(request, device, None))


def _decode(request: Request, device: Device) -> Sequence[Reason]:
    assert isinstance(request, MlaAttentionRequest)
    return tuple(_reasons(request, device, request.max_q_len * request.num_q_heads))


def _reasons(request: Request, device: Device, pairs: int | None) -> Iterator[Reason]:
    """``pairs``: most pairs of a query and a head in a row; None for any number."""
    assert isinstance(request, MlaAttentionRequest)
    found = build()
    if found is not None:
        yield from unmet(found, device)
        for flag, words in _FLAGS.items():
            if flag in found.without:
                yield Reason("check", f"{found.name} was built without {words}", "library")
        if request.dtype == "float16" and "FP16" in found.without:
            yield Reason("dtype", f"{found.name} was built without float16", "dtype", "float16", "bfloat16")
    size = request.page_size
    if isinstance(size, int) and size % _TILE == 0 and (pairs is None or pairs > _TILE):
        text = f"page_size {size}; needs no multiple of {_TILE}, where NaN in unused slots changes nothing"
        yield Reason("page_size", text, "page_size", str(size), f"no multiple of {_TILE}")


_TORCH, _LIBRARY = attention.KERNELS[0].needs
KERNELS = tuple(
    Kernel(
        name=f"fa3.mla_{phase}",
        op="mla_attention",
        phase=phase,
        target=f"hal_nvidia._flash_attn_3_mla:{phase}",
        priority=Band.SPECIALIZED + 30,
        platforms={"nvidia": Archs(only=("sm_90",))},
        needs=(_TORCH, dataclasses.replace(_LIBRARY, install=SOURCE)),
        runtime=">=12.3",
        fields=_FIELDS,
        check=_decode if phase == "decode" else _extend,
        built_archs=attention.KERNELS[0].built_archs,
        row_alignment=16,
        evidence={"*": "emulated"},
        note="flash-attention 3 with qv",
    )
    for phase in PHASES
)
