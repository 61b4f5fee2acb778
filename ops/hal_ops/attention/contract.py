"""What an implementation of attention receives and returns.

Public semantics (shapes, masks, numerics) are those of ``docs/attention.md``; this module is the part that kernels see.

**prefill**: ``factory(request, device) -> fn`` with ::

    fn(q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
       sinks=None, alibi_slopes=None, return_lse=False) -> out | (out, lse)

Dense without ``cu_seqlens_*``: q ``[batch, q_len, num_q_heads, head_dim]``, k and v with ``num_kv_heads``. Ragged with
them: ``[tokens, heads, dim]``, int32 cumulative lengths in tokens on q's device, and host maxima. A kernel may have two
attributes for what is the same in many calls:

- ``fn.for_step(step) -> fn``: the call of a step whose keys are its queries' own, made once for all layers. It is given
  no lengths, and only keywords that the request allows.
- ``fn.for_dense(q, k, v) -> fn``: what is to be called with three tensors alone, while shapes, strides, dtypes and devices
  are those of these.

If the request has an FP8 ``qkv_dtype``, q, k and v are in it, ``out`` in ``request.dtype``, and ``fn`` takes ``q_scale``,
``k_scale`` and ``v_scale`` too: None (1.0), or float32 of one element or ``[num_kv_heads]``, that values were divided by.

**extend**, **decode**: ``factory(request, device) -> impl``, an object with ``impl.plan(step) -> payload`` (what this
kernel wants to know about the step; may be None; no device synchronisation) and ::

    impl(q, k_cache, v_cache, step, payload, *, sinks=None, alibi_slopes=None, k_scale=None, v_scale=None,
         return_lse=False) -> out | (out, lse)

It may have ``impl.update(step, payload) -> payload``, which fills a plan for another step; without it such a plan is made
anew. A graph holds what a call was captured with: whatever a launch of a ``graph=True`` kernel depends on beside its
tensors must hold for each step of the plan. Where it cannot, ``impl.refuses(step, payload) -> str`` says why this step is
none for the plan; it is asked before anything is changed, and ``""`` is no reason.

q is ``[tokens, num_q_heads, head_dim]``; the caches are in ``request.kv_layout``; the last ``q_len`` tokens of a row's
``kv_len`` are this step's, already written. With ``graph=True`` q, and fresh k and v, may hold more tokens than the step,
behind its own, and anything in them, NaN too: their results are nobody's, they have no part in others', and must not be
read from the cache or fail. No other request sees such a q.

``out`` has ``request.dtype`` and ``v_head_dim``; ``lse`` is float32 ``[batch, q_len, num_q_heads]`` or
``[tokens, num_q_heads]``, the natural log of the softmax denominator (the sink included). ``sinks`` and
``alibi_slopes`` are float32 ``[num_q_heads]``. ``k_scale`` and ``v_scale`` are None (1.0), or float32 tensors of one
element or ``[num_kv_heads]``. These four and cumulative lengths are contiguous.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from hal_ops._record import record

if TYPE_CHECKING:
    from torch import Tensor

    from hal_ops.attention.request import AttentionRequest

__all__ = ["PagedAttention", "PrefillAttention", "Step", "check_tensors", "with_lengths"]


@record(frozen=False)
class Step:
    """One step's metadata in neutral form, made once and shared by every layer.

    Fields:
        batch: rows. num_tokens: sum of ``q_lens``.
        max_q_len, max_kv_len: bounds on the lengths of a row, on the host, in tokens. A plan's that graphs hold are
            those of every step that it can be filled with, and not this step's alone, whose lengths are in ``q_lens``.
        q_lens, kv_lens_host: host lengths in tokens, a row each; ``kv_lens_host`` includes this step's tokens.
        cu_seqlens_q, cu_seqlens_k: int32 ``[batch + 1]`` on the device, in tokens, from 0 to the sum.
        kv_lens: int32 ``[batch]`` on the device.
        block_table: int32 ``[batch, max_pages]`` on the device; entries past a row's last page may hold anything.
            It is contiguous, as all tensors of a step are.
        slot_mapping: int64 ``[num_tokens]``: ``page * page_size + offset`` of each new token; negative is skipped.
        page_size: tokens a page.
    """

    batch: int
    num_tokens: int
    max_q_len: int
    max_kv_len: int
    q_lens: tuple[int, ...]
    kv_lens_host: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    kv_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    page_size: int


def with_lengths(call: Any, step: Step) -> Any:
    """``call``, a callable of the prefill phase, with the lengths of a step whose keys are its queries' own."""
    # A step without queries may come with a q that has room for some: no library is told of a bound of 0.
    cumulative, longest = step.cu_seqlens_q, max(1, step.max_q_len)
    return partial(call, cu_seqlens_q=cumulative, cu_seqlens_k=cumulative, max_seqlen_q=longest, max_seqlen_k=longest)


class PrefillAttention(Protocol):
    """Callable of the prefill phase."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any: ...


class PagedAttention(Protocol):
    """Callable and planner of the extend and decode phases."""

    def plan(self, step: Step) -> Any:
        """What this kernel wants to know about the step, from its host lengths alone."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        step: Step,
        payload: Any,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any: ...


def check_tensors(request: AttentionRequest, sinks: Tensor | None, alibi_slopes: Tensor | None) -> None:
    """Whether the call brings exactly the tensors that the request speaks of.

    Raises:
        ValueError: a tensor is missing, or one is given that the request does not mention.
    """
    for field, wanted, given in (("sinks", request.sinks, sinks), ("alibi", request.alibi, alibi_slopes)):
        if wanted and given is None:
            raise ValueError(f"the request has {field}=True, but the call brings no tensor for it: pass it at the call")
        if given is not None and not wanted:
            raise ValueError(f"the call brings a tensor for {field}, but the request has {field}=False: request it")
