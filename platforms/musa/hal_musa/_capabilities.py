"""What each Moore Threads arch can do.

Sources, all in torch_musa 2.7.1 at 8b583b3: ``core/device.py`` (bf16 and TF32 from mp_22); ``csrc/aten/ops/Matmul.cpp``
and ``tests/unittest/operator/test_mm.py`` (products of float8_e4m3fn and float8_e5m2 from mp_31);
``tests/unittest/graph/test_musa_graph.py`` (``torch.musa.MUSAGraph`` from mp_22); ``distributed/loss.py`` (Triton
kernels failed to launch on S4000, so Triton is claimed for mp_31 only); ``tests/unittest/distributed/test_dist.py``
(``torch.distributed``'s backend ``"mccl"`` from mp_22, FP8 over it from mp_31). Instructions of mp_31 that MATE 0.2.2
uses: tensor memory engine and warp-squad products (``include/mate/attention/fmha``).

Names: ``graph_capture`` is every vendor's word for it; ``mccl`` is Moore Threads' library of collectives, and never
``nccl``, whatever torchada answers to that name.
"""

from __future__ import annotations

from hal import Arch

__all__ = ["capabilities"]

_MP_21 = frozenset({"fp16"})
_MP_22 = _MP_21 | {"bf16", "tf32", "graph_capture", "mccl"}
_TRITON = frozenset({"triton", "triton_fp8_e4m3fn", "triton_fp8_e5m2"})
_MP_31 = _MP_22 | _TRITON | {"fp8_e4m3fn", "fp8_e5m2", "mccl_fp8", "sqmma", "tme"}

_TABLE = {"mp_21": _MP_21, "mp_22": _MP_22, "mp_31": _MP_31}


def capabilities(arch: Arch) -> frozenset[str]:
    """Names of what devices of ``arch`` can do; empty for an arch that is not known here."""
    return _TABLE.get(arch.name, frozenset()) if arch.platform == "musa" else frozenset()
