"""What is declared about flashinfer's wrappers: backends ``fa2`` and ``fa3``, and the wrapper for sinks.

Read from flashinfer-python 0.5.3, 0.6.4, 0.6.7, 0.6.13, 0.6.15.post1, 0.6.18.post1 and 0.7.2.post1:

* archs: ``fa2`` runs from sm_80 to sm_121. Code for sm_90 is compiled for sm_90a, which PTX 8.0 brought, of CUDA 12.0;
  sm_100a needs nvcc 12.8, sm_103a and every sm_12x 12.9, sm_120 12.8 since 0.7.2 (``flashinfer/compilation_context.py``).
  ``fa3`` is built for sm_90a alone (``csrc/batch_prefill_sm90.cu``), and is for CUDA 12.3 and newer: where backends are
  its own choice it asks for that (``flashinfer/utils.py``, ``is_sm90a_supported``), where they are named it does not.
* head dims: 64, 128, 256 (``DISPATCH_HEAD_DIM`` of ``include/flashinfer/utils.cuh``), and 192 with 128 where K and V do
  not share strides: the paged kernels of ``csrc/batch_prefill.cu`` and ``csrc/batch_decode.cu`` refuse that.
* windows: ``window_left`` alone; there is no right bound. Without a causal mask fa2 plans as if there were one: a tile of
  queries is given ``window_left`` keys and as many as it has rows (``scheduler.cuh``, ``prefill.cuh``), and loses the
  last ones where keys are split over blocks (flashinfer#4972, open in 0.7.4). One query alone sees no more than that.
* softcap: template flag of ``plan``; the sink wrapper's variant (``flashinfer/jit/attention/variants.py``) has none.
* ``run(sinks=...)`` of the plain wrappers is accepted and not used by fa2 and fa3 (``prefill.py``, ``paged_run``), so
  sinks are declared for ``BatchAttentionWithAttentionSinkWrapper`` alone. Its compiled module is named by the format of
  the queries, the window and the backend (``attention/_core.py``, until 0.7.2 at least), so that of two head dims or
  cache formats in one process the second would run the first's code: one is declared, the dim of the models with sinks.
* FP8: fa2 reads an FP8 cache under 16-bit queries, converting in software before sm_89; its loads say that they do not
  work for head dim 64 (``attention/prefill.cuh``), and 128 is what ran here. fa3 asks for FP8 queries too: not adapted.
* masked logits are -5e4 before 0.7.2 (``include/flashinfer/math.cuh``), multiplied by the scale afterwards: a scale so
  small that masked keys would gain weight is not declared. The largest score of a row begins there too, so that fa2 gives
  0 for rows of which every q.k is below -5e4 (flashinfer#4267, #4450): :data:`_FINITE` says so, as no request can.

Bands. Extend and decode need no copy and no synchronisation, take any page size, and decode is the fastest that has
been measured on Hopper (9.5 us against 16.2 us of flash-attn 3 for one row of 1k keys on an H200, TileOPs#2084; 35 us
against 98 us on an H20, sglang#5630): specialized. fa3's prefill reaches nine tenths of flash-attn 3's (flashinfer's
v0.2 figures), fa2's is that of flash-attn 2: performant. Measured here on an H200, 32/8 heads of 128, bfloat16: prefill
of 8192 tokens 631 TFLOP/s with fa3 and 352 with fa2, extend of 2048 queries over 8192 keys 548 and 313, decode of 32
rows of 4096 keys 140 us (3.8 TB/s), with sinks 171 us, over an FP8 cache 176 us.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import hal
from hal import Anything, Archs, Band, Constraint, Either, Kernel, Needs, OneOf, Pairs, Range, Reason, SameAs, Windows
from hal_ops.attention import AttentionRequest

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

    Check = Callable[[Request, Device], Sequence[Reason]]

__all__ = ["FLASHINFER", "KERNELS", "toolkit", "toolkit_of_fa3", "versions_from"]

_FA2_ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
_PREFILL_COPIES = (
    "dense q, k or v whose sequences do not follow each other in memory; the output, where a plan of fixed size is called "
    "with more tokens than its rows have"
)
_FA2_PREFILL_COPIES = f"{_PREFILL_COPIES}; q, where it has tokens that see no key"
_PADDED = "q, where a plan of fixed size is called with fewer tokens"
_FP8_COPIES = {"kv_dtype": "q, multiplied by the k scale"}

_CUDA: Mapping[str, str] = {
    "sm_90": ">=12.0",
    "sm_100": ">=12.8",
    "sm_103": ">=12.9",
    "sm_120": ">=12.9",
    "sm_121": ">=12.9",
}
"""CUDA versions that flashinfer compiles for an arch with."""
_SM120_WITH_12_8 = ">=0.7.2"
_FA3_CUDA = ">=12.3"


def versions_from(versions: str, because: str = "") -> Needs:
    """flashinfer in some versions."""
    install = "`pip install 'torch-hal-nvidia[flashinfer]'`"
    return Needs("flashinfer-python", versions, install=install, because=because)


FLASHINFER = versions_from(">=0.5.3")


def toolkit(request: Request, device: Device) -> Sequence[Reason]:
    """Why the CUDA version here cannot compile kernels for the device's arch: flashinfer compiles on first use."""
    wanted = _CUDA.get(device.arch.name, "")
    version = hal.installed("flashinfer-python")
    if device.arch.name == "sm_120" and version is not None and version.satisfies(_SM120_WITH_12_8):
        wanted = ">=12.8"
    return _compiled_with(device, wanted, device.arch.name)


def toolkit_of_fa3(request: Request, device: Device) -> Sequence[Reason]:
    """The same for kernels that take the backend fa3 on sm_90."""
    if device.arch.name != "sm_90":
        return toolkit(request, device)
    return _compiled_with(device, _FA3_CUDA, "sm_90 with the backend fa3")


def _fa2(request: Request, device: Device) -> Sequence[Reason]:
    """Of kernels that take the backend fa2 on every arch."""
    return (*toolkit(request, device), *_loses_keys(request))


def _fa2_decode(request: Request, device: Device) -> Sequence[Reason]:
    """The same for decode, where a row may have one query."""
    assert isinstance(request, AttentionRequest)
    return _fa2(request, device) if request.max_q_len > 1 else toolkit(request, device)


def _sink_extend(request: Request, device: Device) -> Sequence[Reason]:
    """Of the one that takes fa3 on sm_90, and fa2 elsewhere."""
    return toolkit_of_fa3(request, device) if device.arch.name == "sm_90" else _fa2(request, device)


def _loses_keys(request: Request) -> Sequence[Reason]:
    """Why fa2 cannot have a window to the left and keys to the right."""
    assert isinstance(request, AttentionRequest)
    if request.causal or request.window[0] is None:
        return ()
    text = "causal=False with a window: fa2 loses its last keys where they are split over blocks (flashinfer#4972)"
    return (Reason("feature_unsupported", text, "causal", "False", "True"),)


def _compiled_with(device: Device, wanted: str, what: str) -> Sequence[Reason]:
    if not wanted or device.runtime.satisfies(wanted) is not False:
        return ()
    text = f"compiling for {what} needs CUDA {wanted}; this is {device.runtime}"
    return (Reason("runtime_too_old", text, "runtime", str(device.runtime), wanted, "install a newer CUDA"),)


def _common(*dims: int) -> dict[str, Constraint]:
    return {
        "num_q_heads": Anything((1, 6, 14)),
        "num_kv_heads": Anything((1, 2)),
        "head_dim": OneOf(*dims),
        "v_head_dim": SameAs("head_dim"),
        "dtype": OneOf("bfloat16", "float16"),
        "causal": OneOf(True, False),
        "window": Windows(right=False),
        "softcap": Range(0, None, (30.0,)),
        "softmax_scale": Range(2**-8, 8, (0.3,)),
        "return_lse": OneOf(False, True),
        "deterministic": OneOf(False, True),
    }


def _ragged() -> dict[str, Constraint]:
    pairs = Pairs("head_dim", (64, 64), (128, 128), (256, 256), (192, 128))
    return {**_common(128, 64, 256, 192), "v_head_dim": pairs}


def _paged(*formats: str) -> dict[str, Constraint]:
    others = (Pairs("head_dim", *((128, f) for f in formats)),) if formats else ()
    cache: dict[str, Constraint] = {
        "kv_dtype": Either(SameAs("dtype"), *others),
        "page_size": Range(1, None, (16, 48)),
        "kv_layout": OneOf("NHD", "HND"),
        "max_q_len": Range(1, None, (4,)),
        "graph": OneOf(False, True),
        **({"kv_scale": OneOf("tensor", "head")} if formats else {}),
    }
    return {**_common(128, 64, 256), **cache}


def _sinks() -> dict[str, Constraint]:
    fields: dict[str, Constraint] = {**_paged(), "head_dim": OneOf(64), "sinks": OneOf(True)}
    return {name: rule for name, rule in fields.items() if name != "softcap"}


def _kernel(
    name: str,
    fields: Mapping[str, Constraint],
    priority: int,
    archs: tuple[str, ...],
    check: Check,
    note: str,
    copies: str,
    copies_with: Mapping[str, str] = MappingProxyType({}),
) -> Kernel:
    library, _, phase = name.partition(".")
    return Kernel(
        name=name,
        op="attention",
        phase=phase,
        target=f"hal_nvidia._flashinfer:{library.removeprefix('flashinfer_')}_{phase}",
        priority=priority,
        platforms={"nvidia": Archs(only=archs)},
        needs=(Needs("torch", ">=2.6"), FLASHINFER),
        capabilities=frozenset({"bf16"}),
        fields=fields,
        check=check,
        copies=copies,
        copies_with=copies_with,
        row_alignment=16,
        evidence={"sm_90": "run", "*": "emulated"},
        note=note,
    )


_FP8 = ("float8_e4m3fn", "float8_e5m2")
_WAITS = "ragged calls without a plan wait for the device"
_FINITE = "before flashinfer 0.7.2 rows of which every q.k is below -5e4 become 0"
_OF_FA3 = "fa3 on sm_90"

KERNELS = (
    _kernel(
        "flashinfer_fa2.prefill",
        _ragged(),
        Band.PERFORMANT + 5,
        _FA2_ARCHS,
        _fa2,
        f"{_WAITS}; {_FINITE}",
        _FA2_PREFILL_COPIES,
    ),
    _kernel(
        "flashinfer_fa3.prefill",
        _ragged(),
        Band.PERFORMANT + 60,
        ("sm_90",),
        toolkit_of_fa3,
        _WAITS,
        _PREFILL_COPIES,
    ),
    _kernel(
        "flashinfer_fa2.extend",
        _paged(*_FP8),
        Band.PERFORMANT + 30,
        _FA2_ARCHS,
        _fa2,
        _FINITE,
        _PADDED,
        copies_with=_FP8_COPIES,
    ),
    _kernel("flashinfer_fa3.extend", _paged(), Band.SPECIALIZED + 10, ("sm_90",), toolkit_of_fa3, "", _PADDED),
    _kernel(
        "flashinfer_fa2.decode",
        _paged(*_FP8),
        Band.SPECIALIZED + 40,
        _FA2_ARCHS,
        _fa2_decode,
        _FINITE,
        _PADDED,
        copies_with=_FP8_COPIES,
    ),
    _kernel(
        "flashinfer_sink.extend",
        _sinks(),
        Band.PERFORMANT + 60,
        _FA2_ARCHS,
        _sink_extend,
        f"{_OF_FA3}; else {_FINITE}",
        _PADDED,
    ),
    _kernel("flashinfer_sink.decode", _sinks(), Band.PERFORMANT + 60, _FA2_ARCHS, _fa2_decode, _FINITE, _PADDED),
)
