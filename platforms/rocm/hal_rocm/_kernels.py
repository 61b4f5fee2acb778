"""Every kernel that the platform offers."""

from __future__ import annotations

from hal import Kernel
from hal_rocm import (
    aiter_kernels,
    aiter_mla_kernels,
    aiter_op_kernels,
    aiter_pa_kernels,
    aiter_triton_kernels,
    flash_attn_kernels,
    sdpa_kernels,
)

__all__ = ["KERNELS"]

KERNELS: tuple[Kernel, ...] = (
    *aiter_kernels.KERNELS,
    *aiter_pa_kernels.KERNELS,
    *aiter_mla_kernels.KERNELS,
    *aiter_triton_kernels.KERNELS,
    *aiter_op_kernels.KERNELS,
    *flash_attn_kernels.KERNELS,
    *sdpa_kernels.KERNELS,
)
