"""How many sequences a launch takes that gives each a place in the second or third dim of its grid.

So do flash-attention 2 (``flash_fwd_launch_template.h``: ``dim3 grid(num_m_block, params.b, params.h)``), torch's copy of
it, xqa (``mha.cu`` of flashinfer 0.6.13) and cuDNN. More of them CUDA refuses to launch, with "invalid argument" (70,001
on an H200, torch 2.11.0).
"""

from __future__ import annotations

__all__ = ["refuse_wide"]

_WIDEST = 65535


def refuse_wide(sequences: int) -> None:
    """Refuse more sequences than one launch takes.

    Raises:
        ValueError: there are more.
    """
    if sequences > _WIDEST:
        raise ValueError(
            f"a call of {sequences} sequences, and a grid of this kernel is {_WIDEST} wide: give fewer at a time, or force "
            "another library"
        )
