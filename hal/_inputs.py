"""Checks of call arguments: one clear error before anything is written."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from hal import _kv_cache
from hal._argument_kinds import check_contiguous, check_no_gradients, check_tensor, count
from hal._rows import check_rows
from hal.errors import InputError
from hal_ops import is_fp8
from hal_ops.attention import Step

if TYPE_CHECKING:
    from torch import Tensor

    from hal._attention import Attention
    from hal._kv_cache import KVCache
    from hal._mla_cache import MlaCache
    from hal._plan import Plan


def check_extras(handle: Attention, sinks: Any, alibi_slopes: Any, return_lse: bool) -> dict[str, Any]:
    """The optional keywords that go to the kernel; each must be in the request, and those in it must be here."""
    request = handle.request
    extras: dict[str, Any] = {}
    for name, value, wanted, field in (
        ("sinks", sinks, request.sinks, "sinks"),
        ("alibi_slopes", alibi_slopes, request.alibi, "alibi"),
    ):
        if (value is not None) != wanted:
            how = f"is missing: the request says {field}=True" if wanted else f"is given: ask for it with {field}=True"
            raise InputError(f"{name} {how}")
        if value is not None:
            extras[name] = _per_head(handle, name, value)
    if return_lse and not request.return_lse:
        raise InputError("return_lse=True was not in the request: ask for it with get_attention(return_lse=True)")
    if return_lse:
        extras["return_lse"] = True
    return extras


def _per_head(handle: Attention, name: str, value: Tensor) -> Tensor:
    import torch

    heads = handle.request.num_q_heads
    check_tensor(name, value)
    if tuple(value.shape) != (heads,):
        raise InputError(f"{name} is {tuple(value.shape)}: give one number a query head, [{heads}]")
    if value.dtype != torch.float32:
        raise InputError(f"{name} is {value.dtype}: give float32")
    if value.device != handle._torch_device:
        raise InputError(f"{name} is on {value.device}, the handle on {handle._torch_device}")
    check_contiguous(name, value)
    if not handle.request.needs_grad:
        check_no_gradients(**{name: value})
    return value


def check_scales(handle: Attention, **scales: Tensor | None) -> dict[str, Any]:
    """The scales of FP8 q, k and v that are given, as keywords for the kernel."""
    import torch

    request = handle.request
    given = {name: value for name, value in scales.items() if value is not None}
    sizes = (1, request.num_kv_heads) if request.qkv_scale == "head" else (1,)
    for name, value in given.items():
        if not is_fp8(request.qkv_dtype):
            raise InputError(f"{name} is given, and q, k and v are {request.qkv_dtype}: ask for FP8 with qkv_dtype=")
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{name} is {value!r}: give a float32 tensor")
        if value.dtype != torch.float32 or value.dim() > 1 or value.numel() not in sizes:
            text = " or ".join(f"[{size}]" for size in dict.fromkeys(sizes))
            raise InputError(
                f"{name} is {value.dtype} {tuple(value.shape)}, and the request says qkv_scale={request.qkv_scale!r}: "
                f"give float32 {text}"
            )
        if value.device != handle._torch_device:
            raise InputError(f"{name} is on {value.device}, the handle on {handle._torch_device}")
        check_contiguous(name, value)
    return given


def check_no_lengths(*lengths: Any) -> None:
    """A plan holds the lengths of its step: none may come beside it."""
    if any(length is not None for length in lengths):
        raise InputError("cu_seqlens and max_seqlen are not for calls with a plan: the plan holds the step's lengths")


def check_no_maxima(max_seqlen_q: Any, max_seqlen_k: Any) -> None:
    """A dense call has the lengths of its tensors."""
    if max_seqlen_q is not None or max_seqlen_k is not None:
        raise InputError("max_seqlen_q and max_seqlen_k are for ragged calls: give cu_seqlens_q and cu_seqlens_k too")


def check_dense(handle: Attention, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Dense q, k, v against the request."""
    _check_tensors(handle, {"q": q, "k": k, "v": v}, 4, "[batch, len, heads, dim]")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise InputError(f"q, k, v have batches {q.shape[0]}, {k.shape[0]}, {v.shape[0]}: they must be equal")
    _same_length(k, v, 1)


def check_ragged(
    handle: Attention, q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, max_q: int | None, max_k: int | None
) -> dict[str, Any]:
    """Ragged q, k, v and their lengths; returns the keywords for the kernel."""
    if cu_q is None or cu_k is None:
        raise InputError(f"{'cu_seqlens_q' if cu_q is None else 'cu_seqlens_k'} is missing: ragged calls take both")
    _check_tensors(handle, {"q": q, "k": k, "v": v}, 3, "[tokens, heads, dim]")
    _same_length(k, v, 0)
    _check_form("cu_seqlens_q", cu_q)
    _check_form("cu_seqlens_k", cu_k)
    if cu_q.shape != cu_k.shape:
        raise InputError(f"cu_seqlens_q has {cu_q.shape[0] - 1} sequences, cu_seqlens_k {cu_k.shape[0] - 1}")
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": _check_cumulative(handle, "cu_seqlens_q", cu_q, q.shape[0], max_q),
        "max_seqlen_k": _check_cumulative(handle, "cu_seqlens_k", cu_k, k.shape[0], max_k),
    }


def _check_form(name: str, cu: Any) -> None:
    import torch

    check_tensor(name, cu)
    if cu.dtype != torch.int32 or cu.dim() != 1 or not cu.numel():
        raise InputError(f"{name} is {cu.dtype} {tuple(cu.shape)}: give int32 [batch + 1], in tokens")


def _check_cumulative(handle: Attention, name: str, cu: Tensor, tokens: int, longest: int | None) -> int:
    """Check one cumulative array; returns the longest sequence. Accelerators are read only if they must be."""
    if cu.device != handle._torch_device:
        raise InputError(f"{name} is on {cu.device}, the handle on {handle._torch_device}")
    check_contiguous(name, cu)
    if longest is not None:
        longest = count(f"max_seqlen_{name[-1]}", longest, 0)
    if longest is not None and cu.device.type != "cpu" and not handle._debug_checks:
        return longest
    values = cu.tolist()
    lengths = [b - a for a, b in itertools.pairwise(values)]
    if values[0] != 0 or min(lengths, default=0) < 0:
        raise InputError(f"{name} must start at 0 and never fall; it is {_few(values)}")
    if values[-1] != tokens:
        raise InputError(f"{name} ends at {values[-1]}, and there are {tokens} tokens")
    needed = max(lengths, default=0)
    if longest is not None and longest < needed:
        raise InputError(f"max_seqlen_{name[-1]}={longest}, and {name} holds a sequence of {needed}")
    return needed if longest is None else longest


def _few(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"


def check_cache(handle: Attention, cache: KVCache) -> None:
    """A cache against the request: layout by stride, format, sizes, scales."""
    found = _kv_cache.problems(cache, handle.request, handle._torch_device)
    if found:
        raise InputError(f"{cache!r} does not suit {handle}: {'; '.join(found)}")
    check_rows(handle._strictest, {"k": cache.k, "v": cache.v})


def check_step(handle: Attention, q: Tensor, k: Tensor | None, v: Tensor | None, plan: Plan) -> None:
    """q, k, v of a planned step."""
    if (k is None) != (v is None):
        raise InputError(f"{'k' if k is None else 'v'} is missing: give both, or neither when both are in the cache")
    tensors = {"q": q} if k is None or v is None else {"q": q, "k": k, "v": v}
    _check_tensors(handle, tensors, 3, "[tokens, heads, dim]")
    sizes = (plan.num_tokens,) if plan._buffers is None else (plan.num_tokens, plan._buffers.sizes["max_tokens"])
    for name, tensor in tensors.items():
        if tensor.shape[0] not in sizes or tensor.shape[0] != q.shape[0]:
            raise InputError(
                f"{name} has {tensor.shape[0]} tokens, the plan {' or '.join(map(str, dict.fromkeys(sizes)))}"
            )


def check_pages(step: Step, cache: KVCache | MlaCache) -> None:
    """``HAL_DEBUG_CHECKS``: every page that the step uses must be in the cache. Reads the device."""
    table = step.block_table.tolist()
    for row, length in enumerate(step.kv_lens_host):
        pages = -(-length // step.page_size)
        for column, page in enumerate(table[row][:pages]):
            if not 0 <= page < cache.num_pages:
                raise InputError(
                    f"block_table[{row}][{column}] is page {page}, and the cache has {cache.num_pages}: row {row} uses "
                    f"{pages} pages for its {length} tokens"
                )
    slots = step.slot_mapping
    if slots.numel() and int(slots.max()) >= cache.num_pages * step.page_size:
        raise InputError(
            f"a new token goes to slot {int(slots.max())}, and the cache has {cache.num_pages * step.page_size}"
        )


def _check_tensors(handle: Attention, tensors: dict[str, Tensor], dims: int, form: str) -> None:
    request = handle.request
    wanted = {
        "q": (request.num_q_heads, request.head_dim),
        "k": (request.num_kv_heads, request.head_dim),
        "v": (request.num_kv_heads, request.v_head_dim),
    }
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if tensor.dim() != dims:
            raise InputError(f"{name} is {tuple(tensor.shape)}: give {form} (ragged calls need cu_seqlens or a plan)")
        if tuple(tensor.shape[-2:]) != wanted[name]:
            raise InputError(f"{name} is {tuple(tensor.shape)}: its last dims must be {wanted[name]} (heads, dim)")
        if tensor.dtype != handle._dtype:
            raise InputError(f"{name} is {tensor.dtype}, and the request is {request.qkv_dtype}")
        if tensor.device != handle._torch_device:
            raise InputError(f"{name} is on {tensor.device}, and the handle on {handle._torch_device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise InputError(f"{name}'s last stride is {tensor.stride(-1)}: the head dim must be contiguous")
        if tensor.requires_grad and not request.needs_grad:
            check_no_gradients(**{name: tensor})
    check_rows(handle._strictest, tensors)


def _same_length(k: Tensor, v: Tensor, dim: int) -> None:
    if k.shape[dim] != v.shape[dim]:
        raise InputError(f"k has {k.shape[dim]} keys, v {v.shape[dim]}")
