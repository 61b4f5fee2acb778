"""The libraries that AMD's kernels come from.

Names are those of the wheels: amd-aiter 0.1.7 (the ``aiter`` of package registries is another project), flash-attn
2.8.3.
"""

from __future__ import annotations

from hal import Library

__all__ = ["LIBRARIES"]

LIBRARIES = (
    Library("torch", module="torch", install="install a ROCm build of torch"),
    Library("triton", ("triton", "pytorch-triton-rocm", "triton-rocm"), module="triton", install="comes with torch"),
    Library("amd-aiter", ("amd-aiter",), module="aiter", install="build github.com/ROCm/aiter for your ROCm"),
    Library("flash-attn", module="flash_attn", install="pip install torch-hal-rocm[flash-attn] --no-build-isolation"),
)
