"""A step's lengths and block table in flashinfer's form: host tables in CSR form, page ids on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hal_ops.attention import Step
from hal_ops.uploads import staged

__all__ = ["Tables", "cumulative", "page_tables"]


@dataclasses.dataclass(frozen=True, slots=True)
class Tables:
    """What ``plan`` of the paged wrappers takes. All but ``indices`` lie on the host, so that nothing waits for them.

    Fields:
        qo_indptr: int32 ``[rows + 1]``, cumulative query **tokens**.
        kv_indptr: int32 ``[rows + 1]``, cumulative **pages**.
        indices: int32 ``[pages]`` on the device, page ids of one row after the other.
        last_page_len: int32 ``[rows]``, **tokens** in a row's last page; 0 for a row without pages.
        seq_lens: int32 ``[rows]``, keys in **tokens**.
        tokens: query tokens, those of the tail included.
    """

    qo_indptr: Tensor
    kv_indptr: Tensor
    indices: Tensor
    last_page_len: Tensor
    seq_lens: Tensor
    tokens: int


def page_tables(step: Step, *, tail: bool) -> Tables:
    """The tables of a step, from its host lengths, without synchronisation.

    A step of fixed size has room for more tokens than its rows have. With ``tail`` a last row without keys takes those,
    so that the lengths add up to what ``q`` holds, whatever the step.
    """
    room = step.slot_mapping.shape[0]
    extra = ((room - sum(step.q_lens), 0),) if tail else ()
    kv_lens = torch.tensor([*step.kv_lens_host, *(kv for _, kv in extra)], dtype=torch.int32)
    pages = (kv_lens + (step.page_size - 1)).div(step.page_size, rounding_mode="floor")
    return Tables(
        qo_indptr=cumulative([*step.q_lens, *(q for q, _ in extra)]),
        kv_indptr=cumulative(pages),
        indices=_page_ids(step.block_table, pages[: step.batch]),
        last_page_len=kv_lens - (pages - 1).clamp_min(0) * step.page_size,
        seq_lens=kv_lens,
        tokens=room,
    )


def cumulative(counts: Sequence[int] | Tensor) -> Tensor:
    """``[0, a, a + b, ...]``, int32 on the host."""
    counts = torch.as_tensor(counts, dtype=torch.int32)
    indptr = torch.zeros(counts.shape[0] + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=indptr[1:])
    return indptr


def _page_ids(block_table: Tensor, pages: Tensor) -> Tensor:
    """The first ``pages[row]`` entries of each row; what lies behind them is not read."""
    total = int(pages.sum())
    rows = torch.arange(pages.shape[0], dtype=torch.int32)
    jumps = rows * block_table.shape[1] - (pages.cumsum(0, dtype=torch.int32) - pages)
    where = torch.repeat_interleave(jumps, pages, output_size=total) + torch.arange(total, dtype=torch.int32)
    there = staged(where, block_table.device).to(block_table.device, non_blocking=True)
    return block_table.reshape(-1).index_select(0, there)
