"""One attention kernel with one configuration, ready to be launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

from hal_ops._gpu import Gpu
from hal_ops._launch import Launch
from hal_ops.attention._triton_configs import HOPPER_PLAIN, Config, Hopper
from hal_ops.attention._triton_features import Features, pack_heads

__all__ = ["Way", "gluon_works", "key_of", "known_turns", "no_boxes"]

Constants = dict[str, Any]
Boxes = Callable[[Tensor, int], "tuple[Any, ...] | None"]

_GLUON = ((3, 6), (3, 10))
"""Versions of Triton from and before which the Gluon kernels compile; Gluon's names change between versions."""
_TURNS = (3, 6)


def gluon_works() -> bool:
    """Whether this Triton compiles the kernels in :mod:`hal_ops.attention.triton_hopper`."""
    return _GLUON[0] <= _version() < _GLUON[1]


def known_turns(config: Hopper | None) -> Hopper | None:
    """The configuration, without turns but with the Triton that they were run with.

    They use named barriers, which other versions may number otherwise, and with Triton 3.9 their copying warps spill.
    """
    return HOPPER_PLAIN if config is not None and config.turns and _version() != _TURNS else config


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def no_boxes(x: Tensor, block_n: int) -> tuple[Any, ...] | None:
    """For a kernel that is compiled to copy row by row: the tensor in the place of boxes. None if it is not aligned."""
    aligned = x.data_ptr() % 16 == 0 and not any(stride % 16 for stride in x.stride()[:3])
    return (x, x, 0, 0, 0) if aligned and x.numel() else None


class Way:
    """``kernel`` with ``config``.

    ``extra`` makes the constants that depend on the call, from the first item of a launch's key. ``boxes`` describes
    keys or values to a :class:`Hopper` kernel.
    """

    def __init__(
        self,
        kernel: Any,
        config: Config | Hopper,
        features: Features,
        gpu: Gpu,
        extra: Callable[[Any], Constants],
        *,
        boxes: Boxes | None = None,
        short: bool = False,
    ) -> None:
        group, heads = features.constants["GROUP"], features.constants["HEADS"]
        self.block_m, self.block_n = config.block_m, config.block_n
        self.pack = pack_heads(group, self.block_m, short=short)
        self.tokens = self.block_m // self.pack
        self.tile_heads = heads // self.pack
        self._kernel = kernel
        self._boxes = boxes
        self._extra = extra
        self._known = {**features.constants, "PACK": self.pack, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        if isinstance(config, Hopper):
            self._known.update(config.constants)
            options = {"num_warps": 4, "maxnreg": config.most_registers}
        else:
            options = {"num_warps": config.warps, "num_stages": config.stages}
        # Triton 3.10 no longer contracts multiplications and additions unless told to.
        self.launch = Launch(kernel, self._constants, gpu.device, **options)
        self.multiprocessors = gpu.multiprocessors if isinstance(config, Hopper) else 0

    def _constants(self, key: Any) -> Constants:
        known = {**self._known, **self._extra(key[0]), "LOOP": key[-1]}
        return {name: known[name] for name in self._kernel.arg_names if name in known}

    def run(self, tiles: int, key: Any, boxes: tuple[Any, ...], *arguments: Any, loop: bool = True) -> None:
        """Launches the kernel for so many tiles.

        That of a :class:`Hopper` has a program a multiprocessor, which goes from tile to tile without a pause. Without
        ``loop`` it has a program a tile, as the kernel for every arch: the hardware hands out tiles to whoever is free,
        which is better for tiles that take long and are not alike.
        """
        if self.multiprocessors:
            programs = min(tiles, self.multiprocessors) if loop else tiles
            self.launch(programs, (*key, programs < tiles), *boxes, tiles, *arguments)
        else:
            self.launch(tiles, key, *arguments)

    def boxes(self, k: Tensor, v: Tensor) -> tuple[Any, ...] | None:
        """The first arguments, about k and v ``[outer, tokens, heads, dim]``. None if the kernel cannot run on them."""
        if self._boxes is None:
            return ()
        k_boxes, v_boxes = self._boxes(k, self.block_n), self._boxes(v, self.block_n)
        return None if k_boxes is None or v_boxes is None else (*k_boxes, *v_boxes)


def key_of(call: tuple[Any, ...], *tensors: Tensor) -> tuple[Any, ...]:
    """The key of a launch: ``call``, and what Triton compiles in of the tensors, each ``[..., tokens, heads, dim]``."""
    address = 0
    strides: list[int] = []
    for x in tensors:
        address |= x.data_ptr()
        strides += x.stride()[-3:-1]
    return (call, *strides, address & 15 == 0)
