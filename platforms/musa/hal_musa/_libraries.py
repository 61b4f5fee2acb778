"""The libraries that Moore Threads' kernels come from.

Names: torch_musa 2.7.1, MATE 0.2.2 (the ``mate`` of package registries is another project), torchada 0.1.103,
mthreads-ml-py 2.4.3.
"""

from __future__ import annotations

from hal import Library

__all__ = ["LIBRARIES"]

LIBRARIES = (
    Library("torch", module="torch", install="install the torch that your torch_musa names"),
    Library(
        "torch_musa",
        ("torch-musa",),
        module="torch_musa",
        install="take the wheel from MooreThreads/torch_musa's releases",
    ),
    Library(
        "mate", module="mate.mha_interface", install="build github.com/MooreThreads/mate (MUSA Toolkit 4.3.6 or newer)"
    ),
    Library("triton", ("triton", "triton-musa", "flagtree"), module="triton", install="install Moore Threads' Triton"),
)
