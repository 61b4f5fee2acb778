"""How many sequences a launch takes that gives each a place in the second or third dim of its grid.

So do flash-attention 2 (``flash_fwd_launch_template.h``: ``dim3 grid(num_m_block, params.b, params.h)``), torch's copy of
it, its memory-efficient attention (``kernel_forward.h``, ``getBlocksGrid``), cuDNN, and in flashinfer 0.6.13 xqa
(``mha.cu``) and fmha_v2 (``fa_kernel.jinja``), and flash-attention 4 in most of its dense calls
(``tile_scheduler.py``, ``SingleTileScheduler``). More of them CUDA refuses to launch, with "invalid argument" (70,001 on an
H200, torch 2.11.0); nobody asks for that error after fmha_v2's launch, which leaves the output as it was.
"""

from __future__ import annotations

__all__ = ["refuse_wide"]

_WIDEST = 65535


def refuse_wide(sequences: int, library: str) -> None:
    """Refuse more sequences than one launch of a library takes.

    Raises:
        ValueError: there are more.
    """
    if sequences > _WIDEST:
        raise ValueError(
            f"a call of {sequences} sequences, and {library} takes {_WIDEST}, as many as its grid is wide: give fewer at a "
            "time, or force another library"
        )
