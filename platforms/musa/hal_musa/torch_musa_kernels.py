"""What is declared about torch_musa: torch's fused attention and rows over muDNN.

Read from github.com/MooreThreads/torch_musa at its tags v2.7.0 (7a6f07a) and v2.7.1 (0bc05bf); nothing was run. Paths
are below ``torch_musa/csrc/aten/ops``:

* ``attention/mudnn/SDPUtils.h``: the flash kernel from mp_22 on, for float16 and bfloat16, head dims up to 128, 160,
  and 192 with 128. Everything else silently takes a kernel that writes all scores out: not declared. Fewer kv heads
  than q heads are taken as they are.
* ``attention/mudnn/SDP.cpp``: no windows, sinks or caps; masks ``[q_len, kv_len]`` and ``[batch, 1, q_len, kv_len]``
  are tested (``test_attention_base.py``), so windows and unequal lengths are masks. A scale other than
  ``1/sqrt(head_dim)`` raises in builds for MUSA before 4.2 (``CheckScale``). The LSE comes from a private operator, its
  base undocumented.
* ``RMSNorm.cpp``, ``SwiGlu.cpp``: input and weight of one format; rows that are no matrix are made contiguous.

torch_musa has no paged attention and no cache write: pages are gathered, which Triton's kernels, where they run, need
not; torch's indexing writes caches (``torch.kv_cache_write``). MUSA graphs: nobody states that muDNN can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hal import (
    Anything,
    Archs,
    Band,
    Constraint,
    Either,
    Kernel,
    MultipleOf,
    Needs,
    OneOf,
    Pairs,
    Range,
    Reason,
    SameAs,
    Windows,
)

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]

_NEEDS = (Needs("torch_musa", ">=2.7", install="take the wheel from MooreThreads/torch_musa's releases"),)
_ARCHS = ("mp_22", "mp_31")
_SCALED = ">=4.2"


def _check(request: Request, device: Device) -> Sequence[Reason]:
    return (*_dims(request), *_scale(request, device))


def _dims(request: Any) -> Iterator[Reason]:
    """The flash kernel has 192 with 128, and not 192 with 192."""
    if request.head_dim == 192 and request.v_head_dim != 128:
        text = f"v_head_dim {request.v_head_dim}; needs 128 with head_dim 192"
        yield Reason("head_dim", text, "v_head_dim", str(request.v_head_dim), "128")


def _scale(request: Request, device: Device) -> Iterator[Reason]:
    """A scale of the request's own cannot be passed to every build of torch_musa."""
    if request.is_neutral("softmax_scale") or device.runtime.satisfies(_SCALED):
        return
    code = "runtime_too_old" if device.runtime.known else "version_unknown"
    text = f"torch_musa takes a softmax_scale of one's own in builds for musa {_SCALED}; this is {device.runtime}"
    yield Reason(code, text, "runtime", str(device.runtime), _SCALED)


_ATTENTION: Mapping[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "head_dim": Either(MultipleOf(8, 8, 128), OneOf(160, 192)),
    "v_head_dim": Either(SameAs("head_dim"), Pairs("head_dim", (192, 128))),
    "dtype": OneOf("float16", "bfloat16"),
    "causal": OneOf(True, False),
    "window": Windows(),
    "softmax_scale": Range(2**-8, 8, (0.3,)),
}
_CACHE: Mapping[str, Constraint] = {
    "kv_dtype": SameAs("dtype"),
    "page_size": Range(1, None, (16, 48)),
    "kv_layout": OneOf("NHD", "HND"),
    "max_q_len": Range(1, None, (4,)),
}
_ROWS: Mapping[str, Constraint] = {
    "hidden_size": Range(2, None, (64, 80, 300)),
    "dtype": OneOf("float32", "bfloat16", "float16"),
    "needs_grad": OneOf(False, True),
}
_RMS: Mapping[str, Constraint] = {"eps": Range(1e-8, None, (1e-5,))}


def _attention(phase: str, priority: int, fields: Mapping[str, Constraint], copies: str = "") -> Kernel:
    return _kernel(
        f"torch_musa.{phase}", "attention", phase, priority, fields, copies, "torch scaled_dot_product_attention, muDNN"
    )


def _rows(op: str, fields: Mapping[str, Constraint]) -> Kernel:
    copies = "rows that are no matrix of contiguous rows; the result, where out is given"
    return _kernel(f"torch_musa.{op}", op, "call", Band.PERFORMANT, fields, copies, "muDNN")


def _kernel(
    name: str, op: str, phase: str, priority: int, fields: Mapping[str, Constraint], copies: str, note: str
) -> Kernel:
    return Kernel(
        name=name,
        op=op,
        phase=phase,
        target=f"hal_musa._torch_musa:{op if phase == 'call' else phase}",
        priority=priority,
        platforms={"musa": Archs(only=_ARCHS)},
        needs=_NEEDS,
        fields=fields,
        check=_check if op == "attention" else None,
        copies=copies,
        evidence=dict.fromkeys(_ARCHS, "emulated"),
        note=note,
    )


_GATHERED = "the pages of each row into one block a call; the output of each into that of the step"
_TOGETHER = "the output of ragged batches of unequal lengths, and where it is made in tiles or has queries without keys"

KERNELS = (
    _attention("prefill", Band.PERFORMANT + 20, {**_ATTENTION, "needs_grad": OneOf(False, True)}, _TOGETHER),
    _attention("extend", Band.PORTABLE + 5, {**_ATTENTION, **_CACHE}, _GATHERED),
    _attention("decode", Band.PORTABLE + 5, {**_ATTENTION, **_CACHE}, _GATHERED),
    _rows("rms_norm", {**_ROWS, **_RMS}),
    _rows("silu_and_mul", _ROWS),
)
