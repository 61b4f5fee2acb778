"""The plan of kernels that split rows: work items on the device, and the memory for partial results."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hal_ops.attention._decode_work import FIELDS, Cut, Work, most_items, work_of
from hal_ops.attention.contract import Step
from hal_ops.uploads import staged

__all__ = ["Payload", "SplitWork"]


@dataclasses.dataclass(slots=True)
class Payload:
    """One step's work, and the memory that its programs share.

    Fields:
        programs: size of the launch. work: int32, the items, then a count of finished splits for each slot and program.
        counters: that second part. out, lse: float32 partial results. items, slots: how many there is memory for.
    """

    programs: int
    work: Tensor
    counters: Tensor
    out: Tensor
    lse: Tensor
    items: int
    slots: int


class SplitWork:
    """Plans steps, and fills a plan for another step in place.

    Fields:
        cut: how rows are cut. graph: whether plans are of the largest size that their step's buffers allow.
        rows: rows of a partial result. width: elements a row. counted: whether finished splits are counted.
    """

    cut: Cut
    graph: bool
    rows: int
    width: int
    counted: bool = True

    def plan(self, step: Step) -> Payload:
        work = self._work(step)
        items, slots = len(work), work.slots
        if self.graph:
            items, slots = self._most(step)
        return self._fill(self._allocate(items, slots, step.block_table.device), work)

    def update(self, step: Step, payload: Payload) -> Payload:
        """The payload, filled for another step; its memory stays where it is, if the step fits it.

        Raises:
            ValueError: the step needs more than the payload has, and the request says ``graph=True``.
        """
        work = self._work(step)
        if len(work) > payload.items or work.slots > payload.slots:
            if self.graph:
                raise ValueError(
                    f"the step takes {len(work)} work items and {work.slots} partial results, and the plan has memory "
                    f"for {payload.items} and {payload.slots}: plan the largest step before the capture"
                )
            payload = self._allocate(len(work), work.slots, payload.work.device)
        return self._fill(payload, work)

    def _work(self, step: Step) -> Work:
        return work_of(self.cut, step.q_lens, step.kv_lens_host, len(step.slot_mapping))

    def _most(self, step: Step) -> tuple[int, int]:
        """Most items, and most partial results, that a step of this size has."""
        return most_items(self.cut, step.batch, len(step.slot_mapping))

    def _allocate(self, items: int, slots: int, device: torch.device) -> Payload:
        counters = slots * self.cut.programs if self.counted else 0
        work = torch.empty(items * FIELDS + counters, dtype=torch.int32, device=device)
        rows = max(1, slots * self.cut.programs * self.rows)
        out = torch.empty(rows * self.width, dtype=torch.float32, device=device)
        lse = torch.empty(rows, dtype=torch.float32, device=device)
        return Payload(0, work, work[items * FIELDS :], out, lse, items, slots)

    def _fill(self, payload: Payload, work: Work) -> Payload:
        items = payload.items if self.graph else len(work)
        numbers = work.numbers
        numbers.frombytes(bytes(4 * (payload.work.numel() - len(numbers))))
        if numbers:
            given = staged(torch.frombuffer(numbers, dtype=torch.int32), payload.work.device)
            payload.work.copy_(given, non_blocking=True)
        payload.programs = items * self.cut.programs
        return payload
