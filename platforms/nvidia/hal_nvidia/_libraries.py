"""The libraries that NVIDIA's kernels come from.

Distribution and module names were read from the wheels (flash-attn 2.8.3, tokenspeed-fa3 3.0.0, flash-attn-4 4.0.0b36,
tokenspeed-fa4 4.0.0.post20260923, flashinfer-python 0.7.2, nvidia-cudnn-frontend 1.32, nvidia-cutlass-dsl 4.8).
"""

from __future__ import annotations

from hal import Library

__all__ = ["LIBRARIES"]

LIBRARIES = (
    Library("torch", module="torch", install="pip install torch (a CUDA build)"),
    Library("triton", module="triton", install="pip install triton"),
    Library(
        "flash-attn",
        module="flash_attn_2_cuda",
        install="pip install torch-hal-nvidia[flash-attn] --no-build-isolation",
    ),
    Library(
        "flash-attn-3",
        ("flash-attn-3", "tokenspeed-fa3"),
        module="flash_attn_3._C",
        install="build hopper/ of github.com/Dao-AILab/flash-attention, or pip install tokenspeed-fa3 (sm_90, CUDA 13)",
    ),
    Library(
        "flash-attn-4",
        ("flash-attn-4", "tokenspeed-fa4"),
        module="flash_attn.cute",
        install="pip install --pre torch-hal-nvidia[flash-attn-4]",
    ),
    Library("flashinfer-python", module="flashinfer", install="pip install torch-hal-nvidia[flashinfer]"),
    Library("nvidia-cudnn-frontend", module="cudnn", install="pip install torch-hal-nvidia[cudnn]"),
    Library("nvidia-cutlass-dsl", module="cutlass", install="pip install nvidia-cutlass-dsl"),
)
