"""What is declared about torch's own attention on ROCm: its flash and its efficient operator, both over AOTriton.

Read from torch 2.6 to 2.13, ``aten/src/ATen/native/transformers/hip/flash_attn/aot/mha_all_aot.hip``,
``.../cuda/attention.cu`` and ``sdp_utils.cpp``:

* The causal mask is aligned to the first key (``WindowValue::TopLeftAligned``): it is used where queries and keys are
  equally many; fewer queries are padded in front.
* flash: 16-bit, head dims in eights; the LSE of a ragged call is ``[sequences, heads, longest]``, not ``[heads,
  tokens]``. efficient: float32 too; its kv heads must be as many as the query heads.
* No windows (AOTriton before 0.10 ignores them with a warning), caps, sinks, ALiBi.
* archs: gfx90a and gfx942; gfx950 with the AOTriton of torch 2.8. gfx11 and gfx12 are experimental
  (``TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL``) and not declared.

Bands: flash is written for these archs; efficient pays for copies of k and v, and is the only one for float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hal import Anything, Archs, Band, Constraint, Kernel, MultipleOf, Needs, OneOf, Range, Reason, SameAs

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]


def _backward(request: Request, device: Device) -> Sequence[Reason]:
    if not (getattr(request, "needs_grad", False) and getattr(request, "deterministic", False)):
        return ()
    text = "deterministic with needs_grad: nothing is known about the order of its backward's sums"
    return (Reason("feature_unsupported", text, "deterministic", "True"),)


def _fields(*dtypes: str) -> Mapping[str, Constraint]:
    return {
        "num_q_heads": Anything((1, 6, 14)),
        "num_kv_heads": Anything((1, 2)),
        "head_dim": MultipleOf(8, 8, 256),
        "v_head_dim": SameAs("head_dim"),
        "dtype": OneOf(*dtypes),
        "causal": OneOf(True, False),
        "softmax_scale": Range(2**-8, 8, (0.3,)),
        "return_lse": OneOf(False, True),
        "deterministic": OneOf(False, True),
        "needs_grad": OneOf(False, True),
    }


def _kernel(name: str, priority: int, fields: Mapping[str, Constraint], copies: str) -> Kernel:
    return Kernel(
        name=f"{name}.prefill",
        op="attention",
        phase="prefill",
        target=f"hal_rocm._sdpa:{name.removeprefix('sdpa_aotriton_')}",
        priority=priority,
        platforms={"rocm": Archs(only=("gfx90a", "gfx942", "gfx950"))},
        needs=(Needs("torch", ">=2.8", install="install a ROCm build of torch"),),
        fields=fields,
        check=_backward,
        copies=copies,
        evidence={"*": "emulated"},
        note="a ragged call waits for the device, unless cu_seqlens_q is cu_seqlens_k",
    )


_PADDED = (
    "q, where a causal call has fewer queries than keys; the output, where it has more, and of ragged batches whose queries "
    "are not its keys' own"
)

KERNELS = (
    _kernel("sdpa_aotriton_flash", Band.PERFORMANT + 5, _fields("bfloat16", "float16"), _PADDED),
    _kernel(
        "sdpa_aotriton_efficient",
        Band.PORTABLE + 5,
        _fields("float32", "bfloat16", "float16"),
        f"k and v, where they have fewer heads than q (to as many); {_PADDED}",
    ),
)
