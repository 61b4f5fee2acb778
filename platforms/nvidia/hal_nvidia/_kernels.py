"""Every kernel that NVIDIA devices are offered: one module of declarations a library."""

from __future__ import annotations

from hal import Kernel
from hal_nvidia import (
    flash_attn_2_kernels,
    flash_attn_3_kernels,
    flash_attn_3_mla_kernels,
    flash_attn_4_kernels,
    flashinfer_kernels,
    flashinfer_mla_kernels,
    flashinfer_op_kernels,
    flashinfer_trtllm_kernels,
    sdpa_kernels,
    trtllm_mla_kernels,
)

__all__ = ["KERNELS"]

KERNELS: tuple[Kernel, ...] = (
    *sdpa_kernels.KERNELS,
    *flash_attn_2_kernels.KERNELS,
    *flash_attn_3_kernels.KERNELS,
    *flash_attn_3_mla_kernels.KERNELS,
    *flash_attn_4_kernels.KERNELS,
    *flashinfer_kernels.KERNELS,
    *flashinfer_mla_kernels.KERNELS,
    *flashinfer_trtllm_kernels.KERNELS,
    *trtllm_mla_kernels.KERNELS,
    *flashinfer_op_kernels.KERNELS,
)
