"""Attention handles: the chosen kernels of one request, bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hal import _inputs, _kv_cache, _same
from hal._argument_kinds import check_step_kinds
from hal._device import Device
from hal._kernel import Band
from hal._kv_cache import KVCache
from hal._padding import cleared, lengthened
from hal._plan import Plan
from hal._planner import Planner
from hal._rows import strictest
from hal._selection import Selection
from hal.errors import InputError
from hal_ops import is_fp8, torch_dtype
from hal_ops.attention import AttentionRequest, Step, with_lengths

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Attention"]


class Attention(Planner):
    """Attention for one request on one device. Made by :func:`hal.get_attention`; holds bound functions only.

    ``request`` is the decided request, ``device`` the device, ``selection`` the decision with every reason.
    """

    def __init__(
        self,
        selection: Selection,
        implementations: Mapping[str, Any],
        write_selection: Selection | None,
        write: Any,
        *,
        debug_checks: bool,
    ) -> None:
        assert isinstance(selection.request, AttentionRequest)
        self.selection = selection
        self.request: AttentionRequest = selection.request
        self.device: Device = selection.device
        self._write_selection = write_selection
        self._implementations = dict(implementations)
        self._prefill = implementations.get("prefill")
        self._write = write
        self._debug_checks = debug_checks
        self._strictest = strictest(selection)
        self._max_q_len = self.request.max_q_len
        self._graph = self.request.graph
        self._torch_device = selection.device.torch_device()
        self._dtype = torch_dtype(self.request.qkv_dtype)
        self._known: _same.Known = (_same.never, self._prefill)  # type: ignore[assignment]
        self._known_step: tuple[_same.Same, int, int, Any] = (_same.never, 0, 0, None)
        self._quick = not (self.request.sinks or self.request.alibi or debug_checks)

    @_same.known_first
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
        """Attend.

        Without ``cache`` and ``plan``, over fresh keys: dense q ``[batch, q_len, num_q_heads, head_dim]`` with k, v
        ``[batch, kv_len, num_kv_heads, dim]``; or ragged ``[tokens, heads, dim]`` with int32 ``cu_seqlens_q`` and
        ``cu_seqlens_k`` ``[batch + 1]`` in tokens (``max_seqlen_*``, host numbers, spare a synchronisation).

        With ``cache`` and ``plan``: q, k, v ragged; k and v are this step's and are written to the cache. Without k and
        v they are taken to be there already.

        Args:
            sinks: float32 ``[num_q_heads]``, if the request has ``sinks=True``.
            alibi_slopes: float32 ``[num_q_heads]``, if the request has ``alibi=True``.
            q_scale, k_scale, v_scale: float32 ``[1]``, or ``[num_kv_heads]`` with ``qkv_scale="head"``, if the request
                has an FP8 ``qkv_dtype``: what q, k and v were divided by. None is 1.
            return_lse: also return the natural-log LSE, float32 ``[..., num_q_heads]``, if the request has it.

        Returns:
            The output in q's shape (with ``v_head_dim``) and the request's dtype, or ``(output, lse)``.

        Raises:
            InputError: an argument that does not fit, before anything is written.
            PlanMismatchError: the plan was made by another handle.
        """
        extras = _inputs.check_extras(self, sinks, alibi_slopes, return_lse)
        if not q_scale is k_scale is v_scale is None:
            extras |= _inputs.check_scales(self, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
        if plan is not None or cache is not None:
            _inputs.check_no_lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return self._run_step(q, k, v, cache, plan, extras)
        if k is None or v is None:
            raise InputError("k and v are missing: give them, or a cache and a plan")
        if cu_seqlens_q is None and cu_seqlens_k is None:
            _inputs.check_no_maxima(max_seqlen_q, max_seqlen_k)
            return self._dense(q, k, v, extras)
        lengths = _inputs.check_ragged(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return self._fresh()(q, k, v, **lengths, **extras)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Any]) -> Any:
        if extras:
            _inputs.check_dense(self, q, k, v)
            return self._fresh()(q, k, v, **extras)
        same, run = self._known
        if not same(q, k, v):
            _inputs.check_dense(self, q, k, v)
            run = self._fresh()
            run = run.for_dense(q, k, v) if hasattr(run, "for_dense") else run
            if not self._debug_checks and (self.request.needs_grad or not _same.learnt(q, k, v)):
                self._known = _same.like(q, k, v), run
        return run(q, k, v)

    def _fresh(self) -> Any:
        if self._prefill is None:
            raise InputError(
                f"this handle was made for {', '.join(self._implementations)}: ask for phases=('prefill', ...) too"
            )
        return self._prefill

    def _run_step(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: KVCache | None,
        plan: Plan | None,
        extras: dict[str, Any],
    ) -> Any:
        if not isinstance(plan, Plan) or not isinstance(cache, KVCache):
            check_step_kinds(plan, cache, KVCache)
            assert plan is not None
            assert cache is not None
        plan.check_owner(self)
        if cache._checked_by is not self:
            _inputs.check_cache(self, cache)
            cache._checked_by = self
        given = (q,) if k is None and v is None else (q, k, v)
        same, count, tokens, buffers = self._known_step
        step = plan._step
        if (count, tokens) != (len(given), step.num_tokens) or buffers is not plan._buffers or not same(*given):
            _inputs.check_step(self, q, k, v, plan)
            if not (self._debug_checks or _same.learnt(*given)):
                self._known_step = _same.like(*given), len(given), step.num_tokens, plan._buffers
        if self._debug_checks:
            _inputs.check_pages(step, cache)
        return self._attend(q, k, v, cache, plan, extras)

    def _is_known(self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: Any, plan: Any) -> bool:
        """Whether a step without anything else is like the last one, and its cache and plan are this handle's."""
        same, count, tokens, buffers = self._known_step
        return (
            self._quick
            and type(plan) is Plan
            and type(cache) is KVCache
            and plan._owner is self
            and cache._checked_by is self
            and plan._buffers is buffers
            and plan._step.num_tokens == tokens
            and (same(q, k, v) if count == 3 else k is v is None and same(q))
        )

    def _attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: KVCache, plan: Plan, extras: dict[str, Any]
    ) -> Any:
        """A step that was checked."""
        step = plan._step
        if plan._buffers is not None and q.shape[0] != step.num_tokens and not self.request.graph:
            n = step.num_tokens
            k, v = (None, None) if k is None or v is None else (k[:n], v[:n])
            return lengthened(self._attend(q[:n], k, v, cache, plan, extras), q.shape[0])
        if k is None or v is None:
            run, payload = plan._paged()
            return run(q, cache.k, cache.v, step, payload, k_scale=cache.k_scale, v_scale=cache.v_scale, **extras)
        slots = step.slot_mapping if plan._buffers is None else step.slot_mapping[: k.shape[0]]
        if plan.write == "before":
            self._write(k, v, cache.k, cache.v, slots, k_scale=cache.k_scale, v_scale=cache.v_scale)
            return plan._run(
                q, cache.k, cache.v, step, plan._payload, k_scale=cache.k_scale, v_scale=cache.v_scale, **extras
            )
        out = plan._run(q, k, v, **extras)
        if plan._buffers is not None and self.request.graph:
            out = cleared(out, slots)
        self._write(k, v, cache.k, cache.v, slots, k_scale=cache.k_scale, v_scale=cache.v_scale)
        return out

    def _prepare(self, plan: Plan) -> None:
        """What all layers have in common is given to a prefill kernel here, once."""
        if plan.phase == "prefill":
            plan._run = for_step(self._prefill, plan._step)

    def _page_size(self) -> int:
        if not isinstance(self.request.page_size, int) or self._write is None:
            raise InputError(
                f"this handle was made for {', '.join(self._implementations)} and has no cache: ask for more phases"
            )
        return self.request.page_size

    def _postwrite_pays(self) -> bool:
        kernel = self.selection.choices["prefill"].kernel
        fast = kernel is not None and kernel.priority_on(self.selection.device) >= Band.PERFORMANT
        return fast and not is_fp8(self.request.kv_dtype)

    def allocate_kv_cache(self, num_pages: int, *, k_scale: Any = None, v_scale: Any = None) -> KVCache:
        """A zero-filled cache for one layer, in this request's page size, layout and format.

        Args:
            num_pages: pages.
            k_scale, v_scale: for FP8 caches, a number, or ``[num_kv_heads]`` with ``kv_scale="head"``.

        Raises:
            InputError: a scale for a cache that has none, or of the wrong size.
        """
        self._page_size()
        if is_fp8(self.request.kv_dtype) and self.request.kv_scale == "head":
            ones = [1.0] * self.request.num_kv_heads
            k_scale, v_scale = ones if k_scale is None else k_scale, ones if v_scale is None else v_scale
        cache = _kv_cache.allocate(self.request, num_pages, self._torch_device, k_scale, v_scale)
        _inputs.check_cache(self, cache)
        return cache

    def explain(self) -> str:
        """Why these kernels, and why not each of the others."""
        texts = [self.selection.explain()]
        if self._write_selection is not None:
            texts.append(self._write_selection.explain())
        return "\n\n".join(texts)

    def receipt(self) -> dict[str, Any]:
        """The decision as JSON-ready data; see :func:`hal.write_lock`."""
        return self.selection.receipt()

    def implementation(self, phase: str) -> Any:
        """The chosen kernel's own callable for a phase, without any check; see ``hal_ops.attention.contract``.

        Raises:
            InputError: the handle was not made for this phase.
        """
        if phase not in self._implementations:
            raise InputError(f"this handle was made for {', '.join(self._implementations)}, not for {phase!r}")
        return self._implementations[phase]

    def kernels(self) -> dict[str, str]:
        """Phase to the name of its kernel; ``"write"`` is the cache write."""
        names = {p: name for p, name in self.selection.kernels().items() if name is not None}
        if self._write_selection is not None:
            names.update(write=str(self._write_selection.kernels()["call"]))
        return names

    def __repr__(self) -> str:
        names = ", ".join(f"{p} {name}" for p, name in self.kernels().items())
        return f"<hal.Attention of {self.request.describe()} on {self.device.id}: {names}>"


def for_step(prefill: Any, step: Step) -> Any:
    """The call of a step whose keys are its queries' own, without its lengths."""
    return prefill.for_step(step) if hasattr(prefill, "for_step") else with_lengths(prefill, step)


def check_needs_cache(request: AttentionRequest) -> bool:
    """Whether any phase of the request uses a cache."""
    return bool({"extend", "decode"} & set(request.phases or ()))
