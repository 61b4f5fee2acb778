"""What is declared about flashinfer's kernels for rows: RMS normalisation and gated activations.

Read from flashinfer-python 0.6.13 (``norm/__init__.py``, ``csrc/norm.cu``, ``activation.py``,
``include/flashinfer/activation.cuh``):

* ``rmsnorm`` and ``gemma_rmsnorm`` (weight + 1) take the weight in the input's format. The latter takes ``[rows, hidden]``
  alone, the former ``[rows, heads, hidden]`` too.
* The gates read 16 bytes at a time from both halves of a row, by the row's number and not by its stride: the hidden
  size is a multiple of 8 (the library checks twice of it, and half of such sizes are misaligned), and a view is copied.

What else it has for our ops is not declared, since the contract would cost more than another kernel does the whole for:
``fused_add_rmsnorm`` overwrites x; ``apply_rope_with_cos_sin_cache`` wants both tables in one tensor;
``append_paged_kv_cache`` cannot skip a token and does not scale; ``merge_state`` gives NaN for two states without keys,
and for one whose out holds NaN.

Band: these kernels wait for memory, whoever wrote them; flashinfer's have to be compiled on first use: portable.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hal import Archs, Band, Constraint, Kernel, MultipleOf, Needs, OneOf, Range, SameAs
from hal_nvidia.flashinfer_kernels import FLASHINFER, toolkit

__all__ = ["KERNELS"]

_COMMON: Mapping[str, Constraint] = {
    "hidden_size": MultipleOf(8, 8),
    "dtype": OneOf("bfloat16", "float16"),
    "deterministic": OneOf(False, True),
    "graph": OneOf(False, True),
}


def _kernel(
    op: str, more: Mapping[str, Constraint], copies: str = "", copies_with: Mapping[str, str] = MappingProxyType({})
) -> Kernel:
    return Kernel(
        name=f"flashinfer.{op}",
        op=op,
        phase="call",
        target=f"hal_nvidia._flashinfer_ops:{op}",
        priority=Band.PORTABLE + 5,
        platforms={"nvidia": Archs(at_least="sm_80")},
        needs=(Needs("torch", ">=2.6"), FLASHINFER),
        fields={**_COMMON, **more},
        check=toolkit,
        copies=copies,
        copies_with=copies_with,
        evidence={"sm_90": "run", "*": "emulated"},
        note="compiles on first use",
    )


_GATE_COPIES = "x, where it is not contiguous; out, where it is given and not contiguous"

KERNELS = (
    _kernel(
        "rms_norm",
        {"weight_dtype": SameAs("dtype"), "eps": Range(0, None, (1e-5,)), "weight_offset": OneOf(0.0, 1.0)},
        copies_with={"weight_offset": "x and out, where their rows are not evenly spaced"},
    ),
    _kernel("silu_and_mul", {}, _GATE_COPIES),
    _kernel("gelu_and_mul", {"approximate": OneOf("none", "tanh")}, _GATE_COPIES),
)
