"""What is declared about flashinfer's wrapper for latent attention, beside :mod:`hal_nvidia.flashinfer_kernels`.

Read from flashinfer-python 0.6.13 to 0.6.18.post1 (``flashinfer/mla*``, ``include/flashinfer/attention/mla*.cuh``):

* archs: fa2 wants 92672 bytes of shared memory a multiprocessor, and has tiles for that, for 147968 and for 221696
  (``DISPATCH_SMEM_CONFIG``); fa3 is built for sm_90a alone, for CUDA 12.3 and newer.
* dims 512 and 64, of which its documentation speaks; float16 and bfloat16; any page size and strides, which are told
  for queries and caches apart. Slots past a row's length are read as zeros (``kFillZero``).
* an e4m3 cache on sm_90 alone, with bfloat16 queries, which keep their precision: fa3 since 0.6.14, fa2 since 0.6.18.
  Each block is converted to bfloat16 in shared memory (``repack_fp8_kv_to_bf16``).
* the LSE is in base 2. The scale is explicit. Rows without keys cannot be: a step's queries are among its keys.
* graphs are not declared: the size of the launch depends on the mean number of queries a row (``MLAPlan``,
  ``cluster_size``), and rows that a smaller step leaves empty change it.
* before 0.6.11 pages are found in 32 bits, so that those past 2**32 elements are read from elsewhere, without a word
  (flashinfer#3130): not declared.
* 0.7 is not declared: 0.7.4's ``plan`` reads page ids back from the device (``_fa_common.py``, ``torch.aminmax``).

Bands: as flashinfer's other decode kernels where fa3 is, and as its prefill where fa2 is. On an H200 fa3 takes 0.58 of the
time of the portable kernel over four shapes of DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import hal
from hal import Anything, Archs, Band, Constraint, Either, Kernel, Needs, OneOf, Pairs, Range, Reason, SameAs
from hal_nvidia.flashinfer_kernels import toolkit, toolkit_of_fa3, versions_from
from hal_ops import is_fp8
from hal_ops.mla_attention import MlaAttentionRequest

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]

_FA2_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
_BECAUSE = "before it large caches are read from elsewhere, and from 0.7 on planning may wait for the device"
_FIELDS: dict[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 16)),
    "kv_lora_rank": OneOf(512),
    "qk_rope_head_dim": OneOf(64),
    "dtype": OneOf("bfloat16", "float16"),
    "kv_dtype": Either(SameAs("dtype"), Pairs("dtype", ("bfloat16", "float8_e4m3fn"))),
    "page_size": Range(1, None, (16, 48)),
    "max_q_len": Range(1, None, (4,)),
    "causal": OneOf(True, False),
    "softmax_scale": Range(2**-8, 8, (0.3,)),
    "return_lse": OneOf(False, True),
}


def _fa2(request: Request, device: Device) -> Sequence[Reason]:
    return (*toolkit(request, device), *_fp8(request, device, ">=0.6.18"))


def _fa3(request: Request, device: Device) -> Sequence[Reason]:
    return (*toolkit_of_fa3(request, device), *_fp8(request, device, ">=0.6.14"))


def _fp8(request: Request, device: Device, versions: str) -> list[Reason]:
    """Why an FP8 cache is not read here."""
    assert isinstance(request, MlaAttentionRequest)
    found: list[Reason] = []
    if not is_fp8(request.kv_dtype):
        return found
    if device.arch.name != "sm_90":
        text = f"flashinfer reads a cache of FP8 latents on sm_90 alone; this is {device.arch}"
        found.append(Reason("dtype", text, "kv_dtype", request.kv_dtype, request.dtype))
    version = hal.installed("flashinfer-python")
    if version is not None and version.satisfies(versions) is False:
        text = f"a cache of FP8 latents needs flashinfer-python {versions}; {version} is installed"
        remedy = f"`pip install 'flashinfer-python{versions}'`"
        found.append(Reason("version_too_old", text, "library", str(version), versions, remedy))
    return found


def _kernel(backend: str, priority: int, archs: tuple[str, ...]) -> Kernel:
    return Kernel(
        name=f"flashinfer_{backend}.mla_decode",
        op="mla_attention",
        phase="decode",
        target=f"hal_nvidia._flashinfer_mla:{backend}_decode",
        priority=priority,
        platforms={"nvidia": Archs(only=archs)},
        needs=(Needs("torch", ">=2.6"), versions_from(">=0.6.11,<0.7", _BECAUSE)),
        capabilities=frozenset({"bf16"}),
        fields=_FIELDS,
        check=_fa3 if backend == "fa3" else _fa2,
        copies="the output, where a plan of fixed size is called with more tokens than its rows have",
        copies_with={"kv_dtype": "q, times the scale of the cache"},
        row_alignment=16,
        evidence={"sm_90": "run", "*": "emulated"},
        evidence_with={"kv_dtype": "emulated"},
        note=f"BatchMLAPagedAttentionWrapper, {backend}",
    )


KERNELS = (
    _kernel("fa3", Band.SPECIALIZED + 35, ("sm_90",)),
    _kernel("fa2", Band.PERFORMANT + 30, _FA2_ARCHS),
)
