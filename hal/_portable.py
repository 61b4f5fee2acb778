"""The built-in platform ``portable``: no hardware of its own; the ops, and kernels for any device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hal._arch import Arch
from hal._by_op import ByOp
from hal._device import Evidence, Probe
from hal._kernel import Kernel
from hal._platform import Platform
from hal_ops import Op

__all__ = ["PortablePlatform"]

_OPS: ByOp[Op] = ByOp(
    {
        "hal_ops.attention:ATTENTION": ("attention",),
        "hal_ops.mla_attention:MLA_ATTENTION": ("mla_attention",),
        "hal_ops.kv_cache:KV_CACHE_WRITE": ("kv_cache_write",),
        "hal_ops.merge_states:MERGE_STATES": ("merge_attention_states",),
        "hal_ops.rotary_kv_cache_write:ROTARY_KV_CACHE_WRITE": ("rotary_kv_cache_write",),
        "hal_ops.kv_pages_copy:KV_PAGES_COPY": ("kv_pages_copy",),
        "hal_ops.kv_pages_gather:KV_PAGES_GATHER": ("kv_pages_gather",),
        "hal_ops.rms_norm:RMS_NORM": ("rms_norm",),
        "hal_ops.fused_add_rms_norm:FUSED_ADD_RMS_NORM": ("fused_add_rms_norm",),
        "hal_ops.layer_norm:LAYER_NORM": ("layer_norm",),
        "hal_ops.silu_and_mul:SILU_AND_MUL": ("silu_and_mul",),
        "hal_ops.gelu_and_mul:GELU_AND_MUL": ("gelu_and_mul",),
        "hal_ops.rotary_embedding:ROTARY_EMBEDDING": ("rotary_embedding",),
        "hal_ops.fp8_quantize:FP8_QUANTIZE": ("fp8_quantize",),
    }
)
_KERNELS: ByOp[Kernel] = ByOp(
    {
        "hal._portable_attention:KERNELS": ("attention", "kv_cache_write", "merge_attention_states"),
        "hal._portable_triton:KERNELS": ("attention", "kv_cache_write", "merge_attention_states"),
        "hal._portable_mla:KERNELS": ("mla_attention",),
        "hal._portable_cache:KERNELS": ("rotary_kv_cache_write", "kv_pages_copy", "kv_pages_gather"),
        "hal._portable_ops:KERNELS": (
            "rms_norm",
            "fused_add_rms_norm",
            "layer_norm",
            "silu_and_mul",
            "gelu_and_mul",
            "rotary_embedding",
            "fp8_quantize",
        ),
    }
)


class PortablePlatform(Platform):
    """Brings the op contracts, and for each the float32 reference on any torch device."""

    name = "portable"
    vendor = "none"
    rank = -1

    def probe(self, environ: Mapping[str, str]) -> Probe:
        return Probe((), (Evidence("portable", "has no devices of its own; its kernels run on the others'"),))

    def parse_arch(self, text: str) -> Arch:
        raise ValueError("platform 'portable' has no devices: name the platform whose device you mean")

    def capabilities(self, arch: Arch) -> frozenset[str]:
        return frozenset()

    def ops(self) -> Iterable[Op]:
        return _OPS

    def kernels(self) -> Iterable[Kernel]:
        return _KERNELS
