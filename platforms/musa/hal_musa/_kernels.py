"""Every kernel that Moore Threads devices are offered: one module of declarations a library."""

from __future__ import annotations

from hal import Kernel
from hal_musa import mate_kernels, torch_musa_kernels

__all__ = ["KERNELS"]

KERNELS: tuple[Kernel, ...] = (*mate_kernels.KERNELS, *torch_musa_kernels.KERNELS)
