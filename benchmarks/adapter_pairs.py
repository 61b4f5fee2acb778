"""For each kernel of a device's libraries: a call through its adapter, and the library's own call that it leads to.

The library's function is watched while the adapter is called once: its arguments as they arrived are the direct call.
What the adapter looks up, chooses and converts is thereby what it adds, for every adapter by the same rule; views of the
contract's tensors are made on both sides. Shapes are so small that the device never holds the host up.

Three of flashinfer's functions are not the op without further launches. There the direct call is what a caller writes, of
:mod:`by_hand`; a second pair has the function alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from by_hand import BY_HAND
from torch import Tensor

import hal
from hal import _plugins
from hal._attention import for_step
from hal._plan import make_step
from hal.testing._verify import circumstances, refusals
from hal_ops import Request, resolve_target
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case
from hal_ops.fused_add_rms_norm import FusedAddRmsNormRequest
from hal_ops.gelu_and_mul import GeluAndMulRequest
from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.layer_norm import LayerNormRequest
from hal_ops.merge_states import MergeStatesRequest
from hal_ops.mla_attention import MlaAttentionRequest
from hal_ops.mla_attention.cases import make_case as make_latent_case
from hal_ops.rms_norm import RmsNormRequest
from hal_ops.rotary_embedding import RotaryEmbeddingRequest
from hal_ops.silu_and_mul import SiluAndMulRequest

__all__ = ["ALONE", "Call", "pairs"]

Call = Callable[[], Any]

_FLASH = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
_WRAPPERS = tuple(
    f"flashinfer:{name}.run"
    for name in (
        "BatchPrefillWithRaggedKVCacheWrapper",
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchDecodeWithPagedKVCacheWrapper",
        "BatchAttentionWithAttentionSinkWrapper",
    )
)
WATCHED: dict[str, tuple[str, ...]] = {
    **{f"sdpa_{name}": (f"hal_nvidia._sdpa_{name}:forward",) for name in ("flash", "efficient", "cudnn")},
    "fa2": tuple(f"hal_nvidia._flash_attn_2:{name}" for name in _FLASH),
    "fa3": tuple(f"hal_nvidia._flash_attn_3:{name}" for name in _FLASH),
    "fa4": tuple(f"flash_attn.cute:{name}" for name in _FLASH[:2]),
    **dict.fromkeys(("flashinfer_fa2", "flashinfer_fa3", "flashinfer_sink"), _WRAPPERS),
    "trtllm_gen": (
        "flashinfer.prefill:trtllm_batch_context_with_kv_cache",
        "flashinfer.decode:trtllm_batch_decode_with_kv_cache",
    ),
    "xqa": ("flashinfer.decode:xqa_batch_decode_with_kv_cache",),
    "flashinfer_cudnn": (
        "flashinfer.cudnn:cudnn_batch_prefill_with_kv_cache",
        "flashinfer.cudnn:cudnn_batch_decode_with_kv_cache",
    ),
    "fmha_v2": ("flashinfer.prefill:trtllm_fmha_v2_prefill",),
    "flashinfer": (
        *(f"flashinfer.norm:{name}" for name in ("rmsnorm", "fused_add_rmsnorm", "layernorm")),
        *(f"flashinfer.activation:{name}" for name in ("silu_and_mul", "gelu_tanh_and_mul")),
        "flashinfer.rope:apply_rope_with_cos_sin_cache",
        "flashinfer.page:append_paged_kv_cache",
        "flashinfer.cascade:merge_state",
    ),
}
"""Library to the functions that its adapters call, ``"module:name"``; what a version lacks is passed over."""

LATENT: dict[str, tuple[str, ...]] = {
    "fa3": ("hal_nvidia._flash_attn_3_mla:flash_attn_with_kvcache",),
    **dict.fromkeys(("flashinfer_fa2", "flashinfer_fa3"), ("flashinfer:BatchMLAPagedAttentionWrapper.run",)),
    "trtllm_gen": ("flashinfer.mla:trtllm_batch_decode_with_kv_cache_mla",),
}
"""The same for latent attention."""

_BASE: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
_CACHES: dict[str, dict[str, Any]] = {
    "fa2": {"page_size": 256},
    "flashinfer_sink": {"head_dim": 64, "sinks": True},
    **{name: {"kv_layout": "HND"} for name in ("trtllm_gen", "flashinfer_cudnn")},
}
_ROWS: dict[str, Request] = {
    "rms_norm": RmsNormRequest(hidden_size=128),
    "fused_add_rms_norm": FusedAddRmsNormRequest(hidden_size=128),
    "layer_norm": LayerNormRequest(hidden_size=128, weight_dtype="float32"),
    "silu_and_mul": SiluAndMulRequest(hidden_size=128),
    "gelu_and_mul": GeluAndMulRequest(hidden_size=128, approximate="tanh"),
    "rotary_embedding": RotaryEmbeddingRequest(num_q_heads=8, num_kv_heads=8, head_dim=128),
    "kv_cache_write": KvCacheWriteRequest(num_kv_heads=8, head_dim=128),
    "merge_attention_states": MergeStatesRequest(num_heads=8, v_head_dim=128),
}
ALONE = ", function alone"
"""Ends the name of a pair whose direct call is not the op yet: the library's function without the launches beside it."""
_LENGTHS = {"prefill": ((16, 16),), "extend": ((4, 16),) * 4, "decode": ((1, 16),) * 4}


def pairs(device: hal.Device, *begin: str) -> Iterator[tuple[str, Call, Call]]:
    """(name, direct call, the adapter's call) of each kernel that can run here; of some, by how their names begin."""
    around = circumstances(device)
    for kernel in _plugins.registry().kernels.values():
        if not kernel.name.startswith(begin or ("",)):
            continue
        request = _request(kernel)
        if _watched_of(kernel) and request is not None and not refusals(kernel, request, around):
            for form in ("dense", "ragged") if kernel.phase == "prefill" else ("",):
                yield (f"{kernel.name} {form}".rstrip(), *_pair(kernel, request, device, form))
            if kernel.name in BY_HAND:
                yield (f"{kernel.name}{ALONE}", *_watched_pair(kernel, request, device, ""))


def _watched_of(kernel: hal.Kernel) -> tuple[str, ...]:
    return (LATENT if kernel.op == "mla_attention" else WATCHED).get(kernel.library, ())


def _request(kernel: hal.Kernel) -> Request | None:
    if kernel.op == "mla_attention":
        size = 32 if kernel.library == "trtllm_gen" else 16
        return MlaAttentionRequest(num_q_heads=16, page_size=size, phases=(kernel.phase,))
    if kernel.op != "attention":
        return _ROWS.get(kernel.op)
    cache = {"page_size": 16, "kv_layout": "NHD", **_CACHES.get(kernel.library, {})}
    return AttentionRequest(**{**_BASE, **cache}, phases=(kernel.phase,))


def _pair(kernel: hal.Kernel, request: Request, device: hal.Device, form: str) -> tuple[Call, Call]:
    if kernel.name not in BY_HAND:
        return _watched_pair(kernel, request, device, form)
    adapter = _prepared(kernel, request, device, form)
    return functools.partial(BY_HAND[kernel.name](request), *adapter.args), adapter


def _watched_pair(kernel: hal.Kernel, request: Request, device: hal.Device, form: str) -> tuple[Call, Call]:
    make = functools.partial(_prepared, kernel, request, device, form)
    with _watching(_watched_of(kernel)) as seen:
        watched = make()
        out = watched()
    if not seen:
        raise RuntimeError(f"{kernel.name} called none of {', '.join(_watched_of(kernel))}")
    return _with_views(seen[-1], watched, out), make()


def _with_views(call: functools.partial[Any], adapter: functools.partial[Any], out: Tensor) -> Call:
    """The direct call with the contract's tensors: axes and parts that the library wants otherwise belong to it, as views.

    It holds the adapter's call, whose plan is alive as long.
    """
    given = {_storage(x): x for x in adapter.args if isinstance(x, Tensor)}
    seen = {n: x for n, x in (*enumerate(call.args), *call.keywords.items()) if isinstance(x, Tensor)}
    views = {
        n: (given[_storage(x)], x.size(), x.stride(), x.storage_offset()) for n, x in seen.items() if _is_view(x, given)
    }

    def direct(adapter: Any = adapter) -> Any:
        args, keywords = list(call.args), dict(call.keywords)
        for name, (source, *form) in views.items():
            (args if isinstance(name, int) else keywords)[name] = source.as_strided(*form)  # type: ignore[index, call-overload]
        found = call.func(*args, **keywords)
        found = found[0] if isinstance(found, tuple) else found
        return found if found.shape == out.shape else found.as_strided(out.size(), out.stride())

    plain = functools.partial(call.func, *call.args, **call.keywords)
    plain.adapter = adapter  # type: ignore[attr-defined]
    return direct if views else plain


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _is_view(x: Tensor, given: dict[int, Tensor]) -> bool:
    source = given.get(_storage(x))
    return source is not None and x.numel() > 0 and source.shape != x.shape


def _prepared(kernel: hal.Kernel, request: Request, device: hal.Device, form: str) -> Call:
    """The adapter's call, ready to be made again and again: planned once, as a step is for all layers."""
    implementation = resolve_target(kernel.target)(request, device)
    place = device.torch_device()
    if isinstance(request, MlaAttentionRequest):
        latent = make_latent_case(request, kernel.phase, device=place, lengths=_LENGTHS[kernel.phase])
        return functools.partial(implementation, *latent.args, implementation.plan(latent.args[-1]), **latent.kwargs)
    if not isinstance(request, AttentionRequest):
        inputs = [x.to(place) for x in _inputs(request)]
        into = {"out": inputs[0]} if isinstance(request, FusedAddRmsNormRequest) else {}
        return functools.partial(implementation, *inputs, **into)
    lengths = _LENGTHS[kernel.phase]
    case = make_case(request, kernel.phase, device=place, lengths=lengths, **({"form": form} if form else {}))
    if form == "ragged":
        return functools.partial(_of_a_step(implementation, lengths[0][0], place), *case.args)
    if kernel.phase == "prefill":
        alike = implementation.for_dense(*case.args) if hasattr(implementation, "for_dense") else implementation
        return functools.partial(alike, *case.args)
    return functools.partial(implementation, *case.args, implementation.plan(case.args[3]), **case.kwargs)


def _of_a_step(implementation: Any, length: int, place: torch.device) -> Any:
    """The call of a planned step, whose keys are its queries' own, as a handle makes it."""
    return for_step(implementation, make_step([length], [length], torch.zeros(1, 1, dtype=torch.int32), 16, place))


def _inputs(request: Request) -> list[Any]:
    torch.manual_seed(0)
    heads = [torch.randn(4, 8, 128).bfloat16() for _ in range(2)]
    if isinstance(request, RotaryEmbeddingRequest):
        return [*heads, torch.rand(16, 64), torch.rand(16, 64), torch.arange(4)]
    if isinstance(request, KvCacheWriteRequest):
        return [*heads, *torch.zeros(2, 4, 16, 8, 128).bfloat16(), torch.arange(4)]
    if isinstance(request, MergeStatesRequest):
        return [heads[0], torch.zeros(4, 8), heads[1], torch.ones(4, 8)]
    width = request.hidden_size  # type: ignore[attr-defined]
    rows, weight = torch.randn(4, width).bfloat16(), torch.randn(width)
    if isinstance(request, FusedAddRmsNormRequest):
        return [rows, rows.flip(0), weight.bfloat16()]
    if isinstance(request, RmsNormRequest):
        return [rows, weight.bfloat16()]
    if isinstance(request, LayerNormRequest):
        return [rows, weight, weight.flip(0)]
    return [torch.randn(4, 2 * width).bfloat16()]


@contextlib.contextmanager
def _watching(targets: tuple[str, ...]) -> Iterator[list[Call]]:
    """Collect the calls of functions, each as a call that can be made again."""
    seen: list[Call] = []
    with contextlib.ExitStack() as stack:
        for target in targets:
            module, _, path = target.partition(":")
            *owners, name = path.split(".")
            owner = functools.reduce(lambda found, part: getattr(found, part, None), owners, _module(module))
            if hasattr(owner, name):
                stack.enter_context(_watched(owner, name, seen))
        yield seen


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@contextlib.contextmanager
def _watched(owner: Any, name: str, seen: list[Call]) -> Iterator[None]:
    original, own = getattr(owner, name), name in vars(owner)

    @functools.wraps(original)
    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(functools.partial(original, *args, **kwargs))
        return original(*args, **kwargs)

    setattr(owner, name, spy)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
