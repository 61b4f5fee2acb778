"""Attention whose calls are nodes of a traced graph: what ``get_attention(compile=True)`` hands out.

A call becomes one of a few ops of the torch library ``hal``, named after the decision. Behind each stands the handle's
own call, with its checks, run on the real tensors. A plan is a Python object and cannot be an argument of such an op,
so its :attr:`~hal._plan.Plan._token` is: a host tensor with the plan's number, of which compilers see dtype and shape.
Another step's plan is another number, and nothing is compiled again.

Results are contiguous, whatever the kernel's are. With ``needs_grad`` the backward is a node too, which runs the
kernel's forward once more and then its backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hal._argument_kinds import check_no_gradients, check_tensors
from hal._attention import Attention
from hal._compile import node
from hal._differentiate import can_record, gradients
from hal._kv_cache import KVCache, plain
from hal._plan import Plan, plan_of
from hal._selection import Selection
from hal.errors import InputError
from hal_ops import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TracedAttention"]

_FRESH = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, "
    "SymInt? max_seqlen_k, Tensor? sinks, Tensor? alibi_slopes, Tensor? q_scale=None, Tensor? k_scale=None, "
    "Tensor? v_scale=None"
)
_REST = "Tensor? k_scale, Tensor? v_scale, Tensor plan, Tensor? sinks, Tensor? alibi_slopes"
_STEP = f"Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, {_REST}"
_READ = f"Tensor q, Tensor k_cache, Tensor v_cache, {_REST}"
_GRADIENTS = {"q": 0, "k": 1, "v": 2, "sinks": 7, "alibi_slopes": 8}
"""Arguments of a fresh call that may require gradients, by place."""


class TracedAttention(Attention):
    """A handle whose call is one node for ``torch.compile(fullgraph=True)``; see :class:`hal.Attention`."""

    _traced = True

    def __init__(
        self,
        selection: Selection,
        implementations: Mapping[str, Any],
        write_selection: Selection | None,
        write: Any,
        *,
        debug_checks: bool,
    ) -> None:
        super().__init__(selection, implementations, write_selection, write, debug_checks=debug_checks)
        if self.request.needs_grad and not can_record():
            raise InputError(
                "this torch does not let autograd record inside an op, which gradients of a traced call need: leave out "
                "compile=True (torch.compile traces torch's own kernels as they are), or needs_grad=True"
            )
        self._layout = self.request.kv_layout
        nodes = _Nodes(self, _name(selection, write_selection))
        self._fresh_node, self._fresh_lse_node = nodes.fresh(False), nodes.fresh(True)
        self._step_node, self._step_lse_node = nodes.step(False), nodes.step(True)
        self._read_node, self._read_lse_node = nodes.read(False), nodes.read(True)

    def __call__(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        plan: Plan | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        q_scale: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attend, as one node. Arguments, results and errors are those of :meth:`hal.Attention.__call__`.

        Shapes are checked when the node runs, and gradients here: a compiler takes what requires them apart.
        """
        check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, sinks=sinks)
        check_tensors(alibi_slopes=alibi_slopes, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
        if not self.request.needs_grad:
            check_no_gradients(q=q, k=k, v=v, sinks=sinks, alibi_slopes=alibi_slopes)
        if plan is None and cache is None:
            if k is None or v is None:
                raise InputError("k and v are missing: give them, or a cache and a plan")
            fresh = self._fresh_lse_node if return_lse else self._fresh_node
            return fresh(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sinks, alibi_slopes,
                q_scale, k_scale, v_scale,
            )  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q_scale, k_scale, v_scale)
        wrong = any(x is not None for x in lengths) or (k is None) != (v is None)
        if wrong or not isinstance(plan, Plan) or not isinstance(cache, KVCache) or cache.layout != self._layout:
            return super().__call__(
                q, k, v, cache=cache, plan=plan, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, sinks=sinks, alibi_slopes=alibi_slopes,
                q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse,
            )  # fmt: skip
        plan.check_owner(self)
        rest = (cache.k, cache.v, cache.k_scale, cache.v_scale, plan._token, sinks, alibi_slopes)
        if k is None or v is None:
            return (self._read_lse_node if return_lse else self._read_node)(q, *rest)
        return (self._step_lse_node if return_lse else self._step_node)(q, k, v, *rest)


def _name(selection: Selection, write: Selection | None) -> str:
    """Equal where the decisions are, and the device."""
    kernels = (selection.kernels(), None if write is None else write.kernels())
    facts = (selection.request.digest(), kernels, str(selection.device.torch_device()), str(selection.device.arch))
    return f"attention_{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


class _Nodes:
    """Makes the ops of one handle."""

    def __init__(self, handle: TracedAttention, name: str) -> None:
        self.handle, self.name = handle, name
        self.needs_grad = handle.request.needs_grad
        self.seen: set[Any] = set()
        """What was checked of caches: shapes, strides and formats."""

    def _node(self, kind: str, arguments: str, lse: bool, function: Callable[..., Any], **more: Any) -> Any:
        returns = "(Tensor, Tensor)" if lse else "Tensor"
        return node(f"{self.name}_{kind}{'_lse' * lse}", arguments, returns, function, self._empty(lse), **more)

    def _empty(self, lse: bool) -> Callable[..., Any]:
        dim, dtype = self.handle.request.v_head_dim, torch_dtype(self.handle.request.dtype)

        def empty(q: Tensor, *others: Any) -> Any:
            import torch

            out = q.new_empty((*q.shape[:-1], dim), dtype=dtype)
            return (out, q.new_empty(q.shape[:-1], dtype=torch.float32)) if lse else out

        return empty

    def fresh(self, lse: bool) -> Any:
        """Dense and ragged calls."""
        call = super(TracedAttention, self.handle).__call__

        def attend(
            q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, sinks: Any, slopes: Any,
            q_scale: Any = None, k_scale: Any = None, v_scale: Any = None,
        ) -> Any:  # fmt: skip
            return _contiguous(
                call(
                    q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
                    sinks=sinks, alibi_slopes=slopes, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale,
                    return_lse=lse,
                )
            )  # fmt: skip

        backward = self._backward(attend, lse) if self.needs_grad else None
        return self._node("fresh", _FRESH, lse, attend, backward=backward)

    def _backward(self, attend: Callable[..., Any], lse: bool) -> Any:
        """``setup_context`` and ``backward`` of a fresh call, of which the second is a node."""
        request = self.handle.request
        places = [_GRADIENTS[n] for n in ("q", "k", "v", *["sinks"] * request.sinks, *["alibi_slopes"] * request.alibi)]
        count = 1 + lse

        def differentiate(*args: Any) -> tuple[Tensor, ...]:
            return gradients(attend, args[count:], places, args[:count])

        def empty(*args: Any) -> tuple[Tensor, ...]:
            import torch

            given = args[count:]
            return tuple(torch.empty_like(given[i], memory_format=torch.contiguous_format) for i in places)

        outs = "Tensor grad_out, Tensor? grad_lse, " if lse else "Tensor grad_out, "
        returns = f"({', '.join(['Tensor'] * len(places))})"
        run = node(f"{self.name}_backward{'_lse' * lse}", outs + _FRESH, returns, differentiate, empty)
        return _keep, lambda ctx, *given: _spread(run(*given, *_kept(ctx)), places)

    def step(self, lse: bool) -> Any:
        """A planned call that writes k and v."""

        def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
            return self._planned(lse, q, k, v, *rest)

        return self._node("step", _STEP, lse, attend)

    def read(self, lse: bool) -> Any:
        """A planned call over what the cache holds."""

        def attend(q: Tensor, *rest: Any) -> Any:
            return self._planned(lse, q, None, None, *rest)

        return self._node("read", _READ, lse, attend)

    def _planned(
        self, lse: bool, q: Tensor, k: Any, v: Any, kc: Tensor, vc: Tensor, ks: Any, vs: Any, plan: Tensor, *extras: Any
    ) -> Any:
        made = plan_of(plan)
        handle: Any = made._owner
        cache = plain(kc, vc, handle.request.kv_layout, ks, vs)
        about = [(x.shape, x.stride(), x.dtype, x.device) for x in (kc, vc, ks, vs) if x is not None]
        key = (handle, *about)
        cache._checked_by = handle if key in self.seen else None
        out = Attention.__call__(
            handle, q, k, v, cache=cache, plan=made, sinks=extras[0], alibi_slopes=extras[1], return_lse=lse
        )
        self.seen.add(key)
        return _contiguous(out)


def _contiguous(found: Any) -> Any:
    return tuple(x.contiguous() for x in found) if isinstance(found, tuple) else found.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves the inputs; the ``output`` is made anew in the backward."""
    import torch

    del output
    ctx.tensors = [isinstance(x, torch.Tensor) for x in inputs]
    ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))


def _kept(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if tensor else other for tensor, other in zip(ctx.tensors, ctx.others, strict=True)]


def _spread(found: tuple[Tensor, ...], places: list[int]) -> tuple[Any, ...]:
    """Gradients at the places of their arguments, None elsewhere."""
    by_place = dict(zip(places, found, strict=True))
    return tuple(by_place.get(i) for i in range(12))
