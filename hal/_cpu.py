"""The built-in platform ``cpu``: torch's own kernels on the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hal._arch import Arch
from hal._by_op import ByOp
from hal._constraints import Anything, Constraint, OneOf, Range, Windows
from hal._cpu_probe import cpu_capabilities, parse_cpu_arch, probe_cpu
from hal._device import Probe
from hal._kernel import Archs, Band, Kernel, Needs
from hal._libraries import Library
from hal._platform import Platform
from hal_ops import FP8_DTYPES
from hal_ops.kv_layout import KV_LAYOUTS

__all__ = ["CpuPlatform"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_TORCH = Needs("torch", ">=2.6", install="`pip install torch`")


class CpuPlatform(Platform):
    """The host's processor. Always there, and the default only where no accelerator is."""

    name = "cpu"
    vendor = "host"
    rank = 0

    def probe(self, environ: Mapping[str, str]) -> Probe:
        return probe_cpu(environ)

    def parse_arch(self, text: str) -> Arch:
        return parse_cpu_arch(text)

    def capabilities(self, arch: Arch) -> frozenset[str]:
        return cpu_capabilities(arch)

    def kernels(self) -> Iterable[Kernel]:
        return ByOp({"hal._cpu:KERNELS": ("attention",)})

    def libraries(self) -> Iterable[Library]:
        return (Library("torch", ("torch",), "torch", "pip install torch"),)


def _common() -> dict[str, Constraint]:
    return {
        "num_q_heads": Anything((1, 6, 14)),
        "num_kv_heads": Anything((1, 2)),
        "head_dim": Range(1, None, (64, 80, 13)),
        "v_head_dim": Range(1, None, (64, 48)),
        "dtype": OneOf(*_DTYPES),
        "causal": OneOf(True, False),
        "window": Windows(),
        "alibi": OneOf(False, True),
        "sinks": OneOf(False, True),
        "softmax_scale": Anything((0.3,)),
        "return_lse": OneOf(False, True),
        "deterministic": OneOf(False, True),
    }


def _prefill() -> Kernel:
    return _kernel("prefill", {**_common(), "needs_grad": OneOf(False, True)})


def _paged(phase: str) -> Kernel:
    cache: dict[str, Constraint] = {
        "kv_dtype": OneOf(*_DTYPES, *FP8_DTYPES),
        "page_size": Range(1, None, (16, 48)),
        "kv_layout": OneOf(*KV_LAYOUTS),
        "kv_scale": OneOf("tensor", "head"),
        "max_q_len": Range(1, None, (4,)),
    }
    return _kernel(phase, {**_common(), **cache}, copies="the pages of each row into one block a call")


def _kernel(phase: str, fields: Mapping[str, Constraint], copies: str = "") -> Kernel:
    return Kernel(
        name=f"torch_cpu.{phase}",
        op="attention",
        phase=phase,
        target=f"hal_ops.attention.torch_sdpa:{phase}",
        priority=Band.PERFORMANT,
        platforms={"cpu": Archs()},
        needs=(_TORCH,),
        fields=fields,
        evidence={"x86_64": "run", "*": "claimed"},
        note="torch scaled_dot_product_attention",
        copies=copies,
    )


KERNELS = (_prefill(), _paged("extend"), _paged("decode"))
