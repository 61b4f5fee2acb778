"""What an implementation of latent attention receives and returns, in both phases.

``factory(request, device) -> impl``, an object with ``impl.plan(step) -> payload`` (what this kernel wants to know
about the step; may be None; no device synchronisation), optionally ``impl.update(step, payload) -> payload``, and ::

    impl(q, cache, step, payload, *, kv_scale=None, return_lse=False) -> out | (out, lse)

q is ``[tokens, num_q_heads, kv_lora_rank + qk_rope_head_dim]`` in ``dtype``: the absorbed part, then the rotated one.
The cache is ``[num_pages, page_size, kv_lora_rank + qk_rope_head_dim]`` in ``kv_dtype``: a token's latent, which is its
value too, then its rotated key. An FP8 cache holds both divided by ``kv_scale``, a float32 tensor of one element (None:
1.0). The last ``q_len`` tokens of a row's ``kv_len`` are this step's, already written. The step is attention's
(:class:`hal_ops.attention.Step`).

``out`` is ``[tokens, num_q_heads, kv_lora_rank]`` in q's dtype: sums of latents, which the caller projects to values.
``lse`` is float32 ``[tokens, num_q_heads]``, the natural log of the softmax denominator. A query without keys gives out
0 and lse -inf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from hal_ops.attention.contract import Step

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MlaAttention"]


class MlaAttention(Protocol):
    """Callable and planner of both phases."""

    def plan(self, step: Step) -> Any:
        """What this kernel wants to know about the step, from its host lengths alone."""

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        step: Step,
        payload: Any,
        *,
        kv_scale: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any: ...
