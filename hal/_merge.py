"""``merge_attention_states``: two attention results over different keys, made one by their LSEs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal._argument_kinds import check_tensor
from hal._front import get_op
from hal.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["merge_attention_states"]


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, kernel: Any = None
) -> tuple[Tensor, Tensor]:
    """The attention over both sets of keys, from the attention over each.

    Args:
        out_a, out_b: ``[..., num_q_heads, v_head_dim]``, one dtype. lse_a, lse_b: float32 ``[..., num_q_heads]``,
            natural log; -inf where a part had no key.

    Returns:
        ``(out, lse)`` in the shapes and dtypes of the first pair. Sinks are counted once a part: give them to one part.
        Where an input requires a gradient, a kernel with a backward is taken.

    Raises:
        InputError: tensors that do not go together.
        NoKernelError: ``kernel`` cannot serve them.
    """
    import torch

    four = (out_a, lse_a, out_b, lse_b)
    for name, x in zip(("out_a", "lse_a", "out_b", "lse_b"), four, strict=True):
        check_tensor(name, x)
    if out_a.dim() < 2:
        raise InputError(f"out_a is {tuple(out_a.shape)}: give [..., num_q_heads, v_head_dim]")
    op = get_op(
        "merge_attention_states",
        num_heads=out_a.shape[-2],
        v_head_dim=out_a.shape[-1],
        dtype=str(out_a.dtype).removeprefix("torch."),
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in four),
        device=out_a.device,
        kernel=kernel,
    )
    merged: tuple[Tensor, Tensor] = op(*four)
    return merged
