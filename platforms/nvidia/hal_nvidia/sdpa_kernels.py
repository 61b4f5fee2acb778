"""What is declared about torch's own attention on NVIDIA GPUs: its flash, memory-efficient and cuDNN kernels.

Each is called by its operator (``native_functions.yaml``, torch 2.6 to 2.15), so that nothing chooses another one, the
math fallback least of all, and so that the LSE comes back.

* flash: ``_flash_attention_forward``, the operator behind ``torch.nn.attention.varlen``: dense and ragged, causal
  aligned to the last key, windows. Wheels are built without ALiBi (seen with 2.11). Before 2.7 the LSE of a ragged
  call is padded a row (``torch/_meta_registrations.py``).
* memory-efficient: ``_efficient_attention_forward``: any float dtype and head dims, no grouped heads
  (``TORCH_CHECK(query.size(2) == key.size(2))``). A row without keys gets the LSE 0 there, and, if ``v_head_dim`` is
  above 128, an output that is never written (``kernel_forward.h``: outputs are stored key block by key block).
* cuDNN: ``_scaled_dot_product_cudnn_attention``: dense, causal from the first key (``MHA.cpp``: ``set_causal_mask``).
  torch prefers it where cuDNN is above 9.15 on 9.x and 10.x devices, and not at all before, for what ``errata.json`` says.
  Wheels for CUDA 12.9 and 13 bring such a one since 2.11, those for 12.6 do not.

Bands: flash is flash-attention 2 without an installation: performant, below the library itself, which is newer. The
memory-efficient kernel is older than both, and first for what they lack (float32, unequal dims). cuDNN is as fast as
flash-attention 3 on dense batches, but ragged ones are cut up: last, and first for grouped heads with unequal dims;
``hal tune`` finds out where it pays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

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
    Reason,
    SameAs,
    Windows,
)

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]

_SINCE_FLASH = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
_WIDE_BACKWARD = ("sm_80", "sm_90", "sm_100", "sm_103")
_NOT_BOTH = ((False, False), (False, True), (True, False))
_EMULATED = {"*": "emulated"}


def _torch(versions: str, because: str = "") -> Needs:
    return Needs("torch", versions, install="`pip install --upgrade torch`", because=because)


def _common(*dtypes: str) -> dict[str, Constraint]:
    return {
        "num_q_heads": Anything((1, 6, 14)),
        "num_kv_heads": Anything((1, 2)),
        "v_head_dim": SameAs("head_dim"),
        "dtype": OneOf(*dtypes),
        "causal": OneOf(True, False),
        "softmax_scale": Anything((0.3,)),
        "needs_grad": OneOf(False, True),
        "return_lse": Pairs("needs_grad", *_NOT_BOTH),
        "deterministic": Pairs("needs_grad", *_NOT_BOTH),
    }


def _flash_check(request: Request, device: Device) -> Sequence[Reason]:
    if not getattr(request, "needs_grad", False):
        return ()
    dim, arch = int(getattr(request, "head_dim", 0)), device.arch.name
    if dim > 192 and arch not in _WIDE_BACKWARD:
        text = f"the backward pass with head_dim {dim} needs {' or '.join(_WIDE_BACKWARD)}; this is {arch}"
        return (Reason("head_dim", text, "head_dim", str(dim), "at most 192"),)
    return ()


def _efficient_check(request: Request, device: Device) -> Sequence[Reason]:
    found = []
    if getattr(request, "dtype", "") == "bfloat16" and "bf16" not in device.capabilities:
        found.append(Reason("dtype", f"{device.arch.name} has no bf16", "dtype", "bfloat16", "float16 or float32"))
    dim = int(getattr(request, "v_head_dim", 0))
    if getattr(request, "needs_grad", False) and dim > 128:
        text = f"v_head_dim {dim} with needs_grad; needs at most 128, where rows without keys are written"
        found.append(Reason("head_dim", text, "v_head_dim", str(dim), "at most 128"))
    return found


def _cudnn_check(request: Request, device: Device) -> Sequence[Reason]:
    """Without a mask, keys that pad a tile have the score 0 in the backward pass on 9.x: where a row's LSE is below -88 and
    its keys are 64 more than a multiple of 128, gradients of q are NaN (cudnn-frontend#628, pytorch#196678; seen on an
    H200 with 9.19). 9.26 mends it, and has NaN elsewhere (``errata.json``)."""
    if device.arch.name != "sm_90" or not getattr(request, "needs_grad", False) or getattr(request, "causal", True):
        return ()
    text = "causal=False with needs_grad: the gradient of q can be NaN on sm_90 (pytorch#196678)"
    return (Reason("feature_unsupported", text, "causal", "False", "True"),)


def _kernel(
    library: str,
    needs: Needs,
    archs: Archs,
    priority: int,
    fields: Mapping[str, Constraint],
    *,
    check: object = None,
    copies: str = "",
    copies_with: Mapping[str, str] = MappingProxyType({}),
    note: str = "",
    evidence: Mapping[str, str] = _EMULATED,
) -> Kernel:
    return Kernel(
        name=f"{library}.prefill",
        op="attention",
        phase="prefill",
        target=f"hal_nvidia._{library}:prefill",
        priority=priority,
        platforms={"nvidia": archs},
        needs=(needs,),
        fields=fields,
        check=check,  # type: ignore[arg-type]
        copies=copies,
        copies_with=copies_with,
        row_alignment=16,
        evidence=evidence,
        note=note,
    )


KERNELS = (
    _kernel(
        "sdpa_flash",
        _torch(">=2.7", "before it, the LSE of a ragged call is padded"),
        Archs(only=_SINCE_FLASH),
        Band.PERFORMANT + 40,
        {
            **_common("bfloat16", "float16"),
            "head_dim": MultipleOf(8, high=256),
            "window": Windows(),
            "graph": OneOf(False, True),
        },
        check=_flash_check,
        copies_with={
            "needs_grad": "dense q, k or v whose sequences do not follow each other, where gradients of q take 2**31 "
            "numbers or more"
        },
        note="flash-attention 2 inside torch",
        evidence={"sm_90": "run", **_EMULATED},
    ),
    _kernel(
        "sdpa_efficient",
        _torch(">=2.7", "wheels for Blackwell start there"),
        Archs(at_least="sm_75"),
        Band.PERFORMANT + 10,
        {
            **_common("bfloat16", "float16", "float32"),
            "head_dim": MultipleOf(8, high=512),
            "v_head_dim": MultipleOf(8, high=512),
            "group_size": OneOf(1),
            "graph": OneOf(False, True),
        },
        check=_efficient_check,
        copies="the output of a dense batch with more queries than keys that are causal (zeros are put before it)",
        copies_with={
            "needs_grad": "q of ragged batches (masked where no key is seen)",
            "return_lse": "the LSE of ragged batches (taken from rows of one length)",
        },
        note="CUTLASS kernels inside torch",
        evidence={"sm_90": "run", **_EMULATED},
    ),
    _kernel(
        "sdpa_cudnn",
        _torch(">=2.11", "earlier wheels bring a cuDNN that torch itself leaves out"),
        Archs(only=("sm_90", "sm_100", "sm_103")),
        Band.PERFORMANT,
        {
            **_common("bfloat16", "float16"),
            "head_dim": Either(MultipleOf(8, high=128), OneOf(192)),
            "v_head_dim": Pairs("head_dim", *((d, d) for d in range(8, 129, 8)), (192, 128)),
        },
        check=_cudnn_check,
        copies="q, where fewer queries than keys are causal (it is padded to as many), and one query on sm_10x (to two); "
        "the output, where more are (zeros are put before it), and of ragged batches of unequal lengths (put together)",
        copies_with={"needs_grad": "the output of dense batches of 2**31 elements or more (put together)"},
        note="ragged batches of unequal lengths: a call a sequence, with lengths read from the device",
        evidence={"sm_90": "run", **_EMULATED},
    ),
)
