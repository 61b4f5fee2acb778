"""What is declared about the TensorRT-LLM and cuDNN kernels inside flashinfer: trtllm-gen, xqa, fmha_v2, cuDNN.

Read from flashinfer-python 0.6.13, 0.6.15.post1, 0.6.18.post1 and 0.7.2.post1. Of these xqa alone has run for this
project, on an H200; the other adapters are emulated, and their calls bound to the signatures.

* trtllm-gen (``trtllm_batch_decode_with_kv_cache``, ``trtllm_batch_context_with_kv_cache``): sm_100 and sm_103; HND
  is what its kernels read; page sizes are powers of two, of which vLLM uses 16, 32 and 64; no softcap; LSE, since
  0.6.13, in base 2; sinks in float32. An e4m3 cache is read with e4m3 queries, output bfloat16; in decode, since 0.6.18,
  with bfloat16 queries too (``bf16q_fp8kv_transform_mode``).
* xqa (``xqa_batch_decode_with_kv_cache``): 9.x, 10.x and 12.x devices (``xqa.py``: ``not in [9, 10, 12]``), page sizes
  16 to 128, one query a row, no LSE. Over an e4m3 cache it computes in that format, which ``fp8_query`` permits. On 9.x
  such a cache is read by a kernel of its own (``mha_sm90.cu``), which copies whole pages and multiplies the values in slots
  past a row's end by 0: NaN there reaches the output (0.6.13; on an H200 of rows of 1 to 33 keys only those that fill their
  pages were right, with heads of 64, 128 and 256). Of heads whose rows it cannot cut into 64 or 128 bytes
  ``tensorMap.cpp`` throws. It is not declared there; on the others ``mha.cu`` reads FP8 too.
* fmha_v2 (``trtllm_fmha_v2_prefill``): on sm_12x causal or full masks, no window before 0.7 and no softcap for separate
  Q, K, V; its statistics are a maximum and a sum, for other layouts. Its paged layouts take K and V in one tensor,
  which two cache tensors are not.
* cuDNN (``cudnn_batch_decode_with_kv_cache``, ``cudnn_batch_prefill_with_kv_cache``): HND; since 0.7.2 alone, see
  ``because`` below. No LSE: for rows of one query with grouped heads cuDNN 9.26 and 9.27 write that of each group's
  first head only (NVBug 6783545, ``prefill.py:2535``). Its prefill has no windows, and head dim 128 for paged keys.

Bands: on a B200 one sample (flashinfer ``benchmarks/samples``) has trtllm-gen at 14 us, cuDNN at 15 us and fa2 at 22 us
for the same decode: specialized, in this order. xqa took 196 us on an H200 for what fa2 decodes in 140, and is wanted
for head dims that fa2 lacks; for fmha_v2 nothing is known: performant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import hal
from hal import (
    Anything,
    Archs,
    Band,
    Constraint,
    Either,
    Kernel,
    MultipleOf,
    Needs,
    OneOf,
    Pairs,
    Range,
    Reason,
    SameAs,
    Windows,
)
from hal_nvidia.flashinfer_kernels import toolkit, versions_from
from hal_ops.attention import AttentionRequest

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

__all__ = ["KERNELS"]

_DATACENTER = ("sm_100", "sm_103")
_MODULES = {"fmha_v2": "_fmha_v2", "flashinfer_cudnn": "_flashinfer_cudnn"}
_FP8 = "float8_e4m3fn"
_BF16_OVER_FP8 = ">=0.6.18"
_MOST_DRAFTS = 4
_GRAPH_KEY = "before it, cuDNN graphs are found by shape alone and replayed for another scale, stride or dtype"


def _fields(*dims: int, more: Mapping[str, Constraint]) -> dict[str, Constraint]:
    common: dict[str, Constraint] = {
        "num_q_heads": Anything((1, 6, 14)),
        "num_kv_heads": Anything((1, 2)),
        "head_dim": OneOf(*dims),
        "v_head_dim": SameAs("head_dim"),
        "dtype": OneOf("bfloat16", "float16"),
        "causal": OneOf(True),
        "softmax_scale": Range(2**-8, 8, (0.3,)),
    }
    return {**common, **more}


def _paged(layouts: tuple[str, ...], pages: tuple[int, ...], more: Mapping[str, Constraint]) -> dict[str, Constraint]:
    cache: dict[str, Constraint] = {
        "kv_dtype": SameAs("dtype"),
        "page_size": OneOf(*pages),
        "kv_layout": OneOf(*layouts),
        "max_q_len": Range(1, None, (4,)),
        "window": Windows(right=False),
    }
    return {**cache, **more}


def _without_windows() -> dict[str, Constraint]:
    return {name: rule for name, rule in _paged(("HND",), (16, 32, 64, 128), {}).items() if name != "window"}


_TRTLLM: dict[str, Constraint] = {
    "sinks": OneOf(False, True),
    "return_lse": OneOf(False, True),
    "graph": OneOf(False, True),
    "kv_dtype": Either(SameAs("dtype"), Pairs("fp8_query", (True, _FP8))),
    "fp8_query": OneOf(False, True),
    "kv_scale": OneOf("tensor"),
}
_TRTLLM_DECODE: dict[str, Constraint] = {**_TRTLLM, "kv_dtype": Either(SameAs("dtype"), OneOf(_FP8))}
_XQA: dict[str, Constraint] = {
    "max_q_len": OneOf(1),
    "sinks": OneOf(False, True),
    "graph": OneOf(False, True),
    "kv_dtype": Either(SameAs("dtype"), Pairs("fp8_query", (True, _FP8))),
    "fp8_query": OneOf(False, True),
}
_FMHA: dict[str, Constraint] = {"causal": OneOf(True, False), "sinks": OneOf(False, True), "graph": OneOf(False, True)}


def _trtllm(request: Request, device: Device) -> Sequence[Reason]:
    found = list(toolkit(request, device))
    if not isinstance(request, AttentionRequest) or request.kv_dtype != _FP8:
        return found
    if request.dtype != "bfloat16":
        text = f"dtype {request.dtype} with an FP8 cache; needs bfloat16, which the output has"
        found.append(Reason("dtype", text, "dtype", request.dtype, "bfloat16"))
    version = hal.installed("flashinfer-python")
    if not request.fp8_query and version is not None and version.satisfies(_BF16_OVER_FP8) is False:
        needs = f"flashinfer-python {_BF16_OVER_FP8}, or fp8_query"
        text = f"bfloat16 queries over an FP8 cache need {needs}; {version} is installed"
        remedy = f"`pip install 'flashinfer-python{_BF16_OVER_FP8}'`"
        found.append(Reason("version_too_old", text, "library", str(version), _BF16_OVER_FP8, remedy))
    return found


def _trtllm_decode(request: Request, device: Device) -> Sequence[Reason]:
    """Of eight queries a row in bfloat16 over an FP8 cache, single heads come out wrong where a window leaves keys out;
    of one, two and four they do not, nor in FP8 (flashinfer#3864, on a B200 with 0.6.14; open)."""
    found = list(_trtllm(request, device))
    if not isinstance(request, AttentionRequest) or request.kv_dtype != _FP8 or request.fp8_query:
        return found
    if request.window[0] is not None and request.max_q_len > _MOST_DRAFTS:
        text = (
            f"max_q_len {request.max_q_len} with a window, over an FP8 cache without fp8_query: wrong (flashinfer#3864)"
        )
        found.append(Reason("check", text, "max_q_len", str(request.max_q_len), f"<={_MOST_DRAFTS}"))
    return found


def _xqa(request: Request, device: Device) -> Sequence[Reason]:
    found = list(toolkit(request, device))
    if not isinstance(request, AttentionRequest) or request.kv_dtype != _FP8:
        return found
    if device.arch.name == "sm_90":
        text = f"kv_dtype {_FP8} on sm_90; needs a 16-bit cache, where NaN in unused slots changes nothing"
        found.append(Reason("dtype", text, "kv_dtype", _FP8, request.dtype))
    return found


def _kernel(
    name: str,
    versions: Needs,
    archs: tuple[str, ...],
    priority: int,
    fields: Mapping[str, Constraint],
    more: tuple[Needs, ...] = (),
    check: Callable[[Request, Device], Sequence[Reason]] = toolkit,
    copies: str = "q, where it is a view that is not contiguous",
    copies_with: Mapping[str, str] = MappingProxyType({}),
    evidence: Mapping[str, str] = MappingProxyType({"*": "emulated"}),
    evidence_with: Mapping[str, str] = MappingProxyType({}),
) -> Kernel:
    library, _, phase = name.partition(".")
    return Kernel(
        name=name,
        op="attention",
        phase=phase,
        target=f"hal_nvidia.{_MODULES.get(library, '_flashinfer_trtllm')}:{library}_{phase}",
        priority=priority,
        platforms={"nvidia": Archs(only=archs)},
        needs=(Needs("torch", ">=2.6"), versions, *more),
        fields=fields,
        check=check,
        copies=copies,
        copies_with=copies_with,
        row_alignment=16,
        evidence=evidence,
        evidence_with=evidence_with,
    )


_FP8_Q = {"kv_dtype": "q, into FP8 where fp8_query permits it; in captured graphs before that with zeros past the step"}
_SINCE_13 = versions_from(">=0.6.13", "its functions give the LSE since then")
_SINCE_72 = versions_from(">=0.7.2", _GRAPH_KEY)
_FRONTEND = Needs("nvidia-cudnn-frontend", ">=1.31", install="`pip install 'torch-hal-nvidia[cudnn]'`")

KERNELS = (
    _kernel(
        "trtllm_gen.extend",
        _SINCE_13,
        _DATACENTER,
        Band.SPECIALIZED + 80,
        _fields(128, 64, 256, more=_paged(("HND",), (16, 32, 64), _TRTLLM)),
        check=_trtllm,
        copies_with=_FP8_Q,
    ),
    _kernel(
        "trtllm_gen.decode",
        _SINCE_13,
        _DATACENTER,
        Band.SPECIALIZED + 80,
        _fields(128, 64, 256, more=_paged(("HND",), (16, 32, 64), _TRTLLM_DECODE)),
        check=_trtllm_decode,
        copies_with=_FP8_Q,
    ),
    _kernel(
        "flashinfer_cudnn.extend",
        _SINCE_72,
        _DATACENTER,
        Band.SPECIALIZED + 60,
        {**_fields(128, more=_without_windows()), "causal": OneOf(True, False)},
        (_FRONTEND,),
    ),
    _kernel(
        "flashinfer_cudnn.decode",
        _SINCE_72,
        _DATACENTER,
        Band.SPECIALIZED + 60,
        _fields(128, 64, more=_paged(("HND",), (16, 32, 64, 128), {})),
        (_FRONTEND,),
    ),
    _kernel(
        "xqa.decode",
        versions_from(">=0.6.4"),
        ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121"),
        Band.PERFORMANT + 20,
        {
            **_fields(128, more=_paged(("NHD", "HND"), (16, 32, 64, 128), _XQA)),
            "head_dim": MultipleOf(16, 16, 256, (64, 128)),
        },
        check=_xqa,
        evidence={"sm_90": "run", "*": "emulated"},
        evidence_with={"kv_dtype": "emulated"},
    ),
    _kernel(
        "fmha_v2.prefill",
        versions_from(">=0.6.7"),
        ("sm_120", "sm_121"),
        Band.PERFORMANT + 50,
        _fields(128, 64, 256, more=_FMHA),
        copies="q, k and v, where they are not contiguous",
    ),
)
