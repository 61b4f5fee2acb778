"""NVIDIA's libraries by the name of their kernels: which distribution, which emulation, which of our modules."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import hal
from emulated import (
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    flashinfer,
    library,
    operators,
    signatures,
    torch_attention,
)
from emulated.library import Installed

__all__ = ["LIBRARIES", "MLA", "OPERATORS", "Emulated", "running", "running_on"]


@dataclasses.dataclass(frozen=True)
class Emulated:
    """One library: the distributions that carry it, its emulated functions, our adapter, and what else it brings."""

    distributions: tuple[str, ...]
    functions: Mapping[str, Callable[..., Any]]
    adapter: str
    modules: tuple[str, ...] = ()

    def versions(self) -> list[tuple[str, str]]:
        """(distribution, version) of every kept one."""
        return [(d, v) for d in self.distributions for v in signatures.versions(d)]


LIBRARIES = {
    "fa2": Emulated(("flash-attn",), flash_attn_2.FUNCTIONS, "hal_nvidia._flash_attn_2", ("flash_attn_2_cuda",)),
    "fa3": Emulated(("flash-attn-3", "tokenspeed-fa3"), flash_attn_3.FUNCTIONS, "hal_nvidia._flash_attn_3"),
}
MLA = {
    "fa3": Emulated(("flash-attn-3",), flash_attn_3.FUNCTIONS, "hal_nvidia._flash_attn_3_mla"),
}
"""Latent attention: the same distributions, other adapters."""
OPERATORS = {
    "sdpa_flash": torch_attention.FLASH,
    "sdpa_efficient": torch_attention.EFFICIENT,
    "sdpa_cudnn": torch_attention.CUDNN,
}


@contextlib.contextmanager
def running(
    name: str, distribution: str = "", version: str = "", *, libraries: Mapping[str, Emulated] = LIBRARIES
) -> Iterator[Installed | None]:
    """A library emulated and simulated as installed, in the newest kept version unless told otherwise.

    Gives its record of calls; None for torch's own operators.
    """
    if name in OPERATORS:
        with operators.emulated_operators(OPERATORS[name]), hal.simulate(libraries={"torch": "2.13.0"}):
            yield None
        return
    emulated = libraries[name]
    distribution = distribution or emulated.distributions[0]
    version = version or signatures.versions(distribution)[-1]
    with (
        hal.simulate(libraries={"torch": "2.13.0", distribution: version}),
        library.installed(
            distribution, version, emulated.functions, adapters=[emulated.adapter], modules=emulated.modules
        ) as held,
    ):
        yield held


@contextlib.contextmanager
def running_on(arch: str, name: str, version: str = "") -> Iterator[Installed | None]:
    """The library of any NVIDIA kernel, by the part of its name before the dot, as it behaves on an arch."""
    if name in OPERATORS or name in LIBRARIES:
        # The prebuilt flash-attention 3 has sinks, upstream's none.
        with running(name, LIBRARIES[name].distributions[-1] if name in LIBRARIES else "", version) as held:
            yield held
        return
    module: Any = flash_attn_4 if name == "fa4" else flashinfer
    version = version or signatures.versions(module.LIBRARY)[-1]
    beside = {"torch": "2.13.0", "nvidia-cutlass-dsl": "4.8.1", "nvidia-cudnn-frontend": "1.32"}
    functions = module.emulations(version, arch)
    distribution = flash_attn_4.distribution(version) if name == "fa4" else module.LIBRARY
    with (
        hal.simulate(libraries={**beside, distribution: version}),
        library.installed(distribution, version, functions) as held,
    ):
        yield held
