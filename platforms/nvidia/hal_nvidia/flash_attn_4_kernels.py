"""What is declared about flash-attn 4 (CuTe DSL, ``flash_attn.cute``): a declaration a family of archs.

Read from the wheels of flash-attn-4 4.0.0b27, b31 and b36, ``flash_attn/cute/interface.py``, and of tokenspeed-fa4
4.0.0.post20260815, post20260829 and post20260923, whose ``flash_attn`` folder is that of b27, file for file. The kernels of
sm_90 have run at their corners on an H200 with b36; the others are emulated, and their calls bound to the signatures.

* Versions: b22 asks for exactly nvidia-cutlass-dsl 4.6.0.dev0, b27 and later for 4.6.2 or newer: one pair of bounds.
  tokenspeed-fa4 counts by dates: 4.0.0.post20260710 and those before it have older files, and 4.6.0 or older.
* No FP8, in any of these. On sm_10x alone q, k and v may be e4m3 or e5m2, all alike, and the output is bfloat16; but
  ``q_descale``, ``k_descale`` and ``v_descale`` are parameters of ``_flash_attn_fwd`` alone, and what the package exports
  (``flash_attn/cute/__init__.py``) are ``flash_attn_func`` and ``flash_attn_varlen_func``, which call it without them.
  Without scales an FP8 cache means nothing.
* sm_8x and sm_12x have no paged keys, no sinks (``flash_fwd.py``: "not supported in this kernel") and no limit on head
  dims but shared memory: 128 is declared. sm_8x has no backward.
* Blackwell has head dims 8 to 128, (192, 128) and 256; 256 went wrong there for a V that is a view (tokenspeed#445) and
  is not declared. Hopper has 8 to 256; that such views are right there is in ``tests/gpu``.
* Pages of the key tile's own size (64 to 144, by head dim and mask) are loaded whole, so that what lies behind the last
  token must be finite; the contract lets it be NaN. Of the sizes declared none is a tile of head dims up to 128.
* On sm_90 head dims from 65 to 96 have tiles of 144 keys where nothing is masked (``_tile_size_fwd_sm90``). Pages are
  copied to them in waves of 32 or 64 rows, the last of which overruns the buffer (``paged_kv.py``, ``load_KV``): wrong
  values, seen on an H200 with b36 at head dim 96.
* Its backward pass on sm_90 wants equal head dims of grouped heads (``flash_bwd_sm90.py``: "GQA backward requires
  head_dim == head_dim_v").
* The sink is added to sums that are relative to the largest score, so that 88 above it the LSE overflows to +inf; the
  adapter puts the sink in its place, which it is equal to then.
* Strides that are not multiples of 16 bytes make it copy (``maybe_contiguous``).

Bands: the fastest known on Blackwell (1613 TFLOP/s on a B200, arXiv 2603.05451): specialized. On Hopper behind
flash-attn 3, above all with ragged lengths (torchtitan#4413), and without a split over the keys in decode; on sm_8x and
sm_12x its code is that of Ampere: performant, and on Hopper below the portable kernels, which were measured there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import hal
from hal import Anything, Archs, Band, Constraint, Device, Kernel, Needs, OneOf, Pairs, Range, Reason, Windows
from hal_ops.attention import AttentionRequest

__all__ = ["DISTRIBUTIONS", "KERNELS"]

DISTRIBUTIONS = ("flash-attn-4", "tokenspeed-fa4")
_TOKENSPEED = ">=4.0.0.post20260815"
_NEEDS = (
    Needs("torch", ">=2.6"),
    Needs(
        "flash-attn-4",
        ">=4.0.0b27",
        DISTRIBUTIONS,
        install="`pip install --pre 'torch-hal-nvidia[flash-attn-4]'`",
    ),
    Needs("nvidia-cutlass-dsl", ">=4.6.2", because="flash-attn-4 4.0.0b27 and later are written for it"),
)
_HOPPER = ("sm_90",)
_BLACKWELL = ("sm_100", "sm_103")
_AMPERE_CODE = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121")
_SQUARE = ((128, 128), (64, 64), (80, 80), (96, 96))


def _fields(*pairs: tuple[int, int], more: Mapping[str, Constraint]) -> dict[str, Constraint]:
    return {
        "num_q_heads": Anything((1, 6, 14)),
        "num_kv_heads": Anything((1, 2)),
        "head_dim": OneOf(*(qk for qk, _ in pairs)),
        "v_head_dim": Pairs("head_dim", *pairs),
        "dtype": OneOf("bfloat16", "float16"),
        "causal": OneOf(True, False),
        "window": Windows(),
        "softcap": Range(0, None, (30.0,)),
        "softmax_scale": Range(2**-8, 8, (0.3,)),
        "return_lse": OneOf(False, True),
        "deterministic": OneOf(False, True),
        "graph": OneOf(False, True),
        **more,
    }


def _new_enough(request: AttentionRequest, device: Device) -> Iterator[Reason]:
    """Of the distribution that counts by dates."""
    first, version = (hal.installed(name) for name in DISTRIBUTIONS)
    if first is None and version is not None and version.satisfies(_TOKENSPEED) is False:
        text = f"needs tokenspeed-fa4 {_TOKENSPEED}, which is flash-attn-4 4.0.0b27; {version} is installed"
        remedy = f"`pip install 'tokenspeed-fa4{_TOKENSPEED}'`"
        yield Reason("version_too_old", text, "library", str(version), _TOKENSPEED, remedy)


def _hopper_prefill(request: AttentionRequest, device: Device) -> Iterator[Reason]:
    """Gradients on Hopper."""
    yield from _new_enough(request, device)
    if request.needs_grad and request.group_size > 1 and request.head_dim != request.v_head_dim:
        text = (
            f"needs_grad with group_size {request.group_size} and unequal head dims; needs as many kv heads as q heads"
        )
        yield Reason("feature_unsupported", text, "needs_grad", "True", "False")


def _fits(request: AttentionRequest, device: Device) -> Iterator[Reason]:
    """Pages on Hopper: no tile of 144 keys."""
    yield from _new_enough(request, device)
    if 64 < request.head_dim <= 96 and not request.causal and request.window == (None, None):
        text = f"head_dim {request.head_dim} without a mask: pages are copied to tiles of 144 keys, past their end"
        yield Reason("head_dim", text, "head_dim", str(request.head_dim), "64")


def _kernel(
    name: str, archs: tuple[str, ...], priority: int, fields: Mapping[str, Constraint], check: object = _new_enough
) -> Kernel:
    phase = name.partition("_")[0]
    return Kernel(
        name=f"fa4.{name}",
        op="attention",
        phase=phase,
        target=f"hal_nvidia._flash_attn_4:{phase}",
        priority=priority,
        platforms={"nvidia": Archs(only=archs)},
        needs=_NEEDS,
        fields=fields,
        check=check,  # type: ignore[arg-type]
        copies="q, k or v whose strides are no multiples of 16 bytes (the library copies them)",
        copies_with={"graph": "v, with zeros behind the last sequence"} if phase == "prefill" else {},
        evidence={"sm_90": "run", "*": "emulated"} if archs == _HOPPER else {"*": "emulated"},
        note="compiles on first use",
    )


_SINKS: Mapping[str, Constraint] = {"sinks": OneOf(False, True)}
_GRADIENTS: Mapping[str, Constraint] = {"needs_grad": OneOf(False, True)}
_CACHE: Mapping[str, Constraint] = {
    "kv_dtype": Pairs("dtype", ("bfloat16", "bfloat16"), ("float16", "float16")),
    "page_size": OneOf(16, 32, 64, 256),
    "kv_layout": OneOf("NHD"),
    "max_q_len": Range(1, None, (4,)),
}
_PREFILL = _fields(*_SQUARE, (192, 128), more={**_SINKS, **_GRADIENTS})
_PAGED = _fields(*_SQUARE, more={**_SINKS, **_CACHE})

KERNELS = (
    _kernel(
        "prefill",
        _HOPPER,
        Band.PERFORMANT + 45,
        _fields(*_SQUARE, (192, 128), (256, 256), more={**_SINKS, **_GRADIENTS}),
        _hopper_prefill,
    ),
    _kernel("prefill_sm100", _BLACKWELL, Band.SPECIALIZED + 70, _PREFILL),
    _kernel("prefill_sm80", _AMPERE_CODE, Band.PERFORMANT + 8, _fields(*_SQUARE, more={})),
    _kernel("extend", _HOPPER, Band.PERFORMANT + 40, _PAGED, _fits),
    _kernel("extend_sm100", _BLACKWELL, Band.SPECIALIZED + 30, _PAGED),
    _kernel("decode", _HOPPER, Band.PERFORMANT + 10, _PAGED, _fits),
    _kernel("decode_sm100", _BLACKWELL, Band.SPECIALIZED + 20, _PAGED),
)
