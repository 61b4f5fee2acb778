"""Plans: one step's metadata, in neutral form and in the form that the chosen kernel wants."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hal._argument_kinds import count
from hal._in_process import InProcess
from hal._step_inputs import host_lengths, page_table
from hal.errors import InputError, PlanMismatchError
from hal_ops.attention import Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hal._planner import Planner

__all__ = ["Plan"]

_numbers = itertools.count(1)
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


class Plan(InProcess):
    """What a handle needs to know about one step. Made by ``handle.plan(...)``, opaque, and only for that handle.

    ``phase`` is the phase that serves the step; ``write`` says when this step's k and v go into the cache:
    ``"before"`` (written, then read back: *prewrite*) or ``"after"`` (attended to directly: *postwrite*).

    A plan made with ``max_batch`` keeps its buffers for good: :meth:`update` fills them in place for another step, so
    addresses stay the same, and tails are zeroed.
    """

    _instead = "send the step's q_lens, kv_lens and block_table, and call plan() on the handle there"
    __slots__ = ("__weakref__", "_buffers", "_owner", "_payload", "_run", "_step", "_token", "phase", "write")

    def __init__(
        self, owner: Planner, step: Step, phase: str, write: str, payload: Any, buffers: Buffers | None
    ) -> None:
        self._owner = owner
        self._step = step
        self.phase: str = phase
        self.write: str = write
        self._payload = payload
        self._buffers = buffers
        self._run = owner._implementations[phase]
        self._token: Tensor | None = _numbered(self) if owner._traced else None

    @property
    def batch(self) -> int:
        """Rows of the step."""
        return self._step.batch

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return self._step.num_tokens

    def update(self, *, q_lens: Any, kv_lens: Any, block_table: Any) -> Plan:
        """Make the plan fit another step, in place. Returns the plan.

        Raises:
            InputError: the plan has no buffers of its own (``max_batch`` was not given), the step is larger than they
                are, or it is none for the plan's phase; nothing is changed then.
        """
        if self._buffers is None:
            raise InputError(
                "this plan is for one step: make it with max_batch= (and max_tokens=, max_pages=) to update it"
            )
        self._owner._refill(self, q_lens, kv_lens, block_table)
        return self

    def _paged(self) -> tuple[Any, Any]:
        """What attends to the cache alone. A postwrite plan needs it only if it is called without k and v."""
        if self.phase != "prefill":
            return self._run, self._payload
        extend = self._owner._implementations.get("extend")
        if extend is None:
            raise InputError("this step attends to fresh keys, and the handle has no extend phase: pass k and v")
        if self._payload is None:
            self._payload = extend.plan(self._step)
        return extend, self._payload

    def check_owner(self, handle: Planner) -> None:
        """Raise unless ``handle`` made the plan.

        Raises:
            PlanMismatchError: naming both handles.
        """
        if self._owner is not handle:
            raise PlanMismatchError(
                f"the plan was made by {self._owner}, and is given to {handle}: a plan holds metadata in the form "
                "of the kernels of its own handle; call plan() on this one"
            )

    def __repr__(self) -> str:
        return f"Plan({self.phase}, {self.batch} rows, {self.num_tokens} tokens, writes {self.write}, of {self._owner})"


def _numbered(plan: Plan) -> Tensor:
    """What stands for a plan in a traced graph: its number, int64 on the host, of no dims."""
    import torch

    number = next(_numbers)
    _plans[number] = plan
    return torch.tensor(number, dtype=torch.int64)


def plan_of(token: Tensor) -> Plan:
    """The plan that a token stands for.

    Raises:
        InputError: it was dropped before the call ran.
    """
    plan = _plans.get(int(token))
    if plan is None:
        raise InputError("the plan of this call is gone: keep it until the compiled function has run")
    return plan


class Buffers:
    """Device tensors of a fixed size that steps are copied into: addresses never change, tails are zeroed.

    ``most_queries``: queries that a row of any later step may have, where a graph holds the plan; without it each step has
    its own bound.
    """

    def __init__(
        self, max_batch: int, max_tokens: int, max_pages: int, device: torch.device, most_queries: int | None = None
    ) -> None:
        import torch

        self._most_queries = most_queries

        sizes = {"max_batch": max_batch, "max_tokens": max_tokens, "max_pages": max_pages}
        self.sizes: dict[str, int] = {name: count(name, value) for name, value in sizes.items()}
        max_batch, max_tokens, max_pages = self.sizes.values()
        self.cu_seqlens_q: Tensor = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self.cu_seqlens_k: Tensor = torch.zeros(max_batch + 1, dtype=torch.int32, device=device)
        self.kv_lens: Tensor = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.block_table: Tensor = torch.zeros((max_batch, max_pages), dtype=torch.int32, device=device)
        self.slot_mapping: Tensor = torch.full((max_tokens,), -1, dtype=torch.int64, device=device)

    def check(self, step: Step) -> None:
        """Raise unless the step fits.

        Raises:
            InputError: naming the size that is passed and the one that there is.
        """
        needs = {"max_batch": step.batch, "max_tokens": step.num_tokens, "max_pages": step.block_table.shape[1]}
        for name, value in needs.items():
            if value > self.sizes[name]:
                raise InputError(f"the step needs {name}={value}, and the plan was made for {self.sizes[name]}")

    def fill(self, step: Step) -> Step:
        """Copy a step in; rows past its batch become empty ones, and slots past its tokens are skipped."""
        self.check(step)
        for mine, given in ((self.cu_seqlens_q, step.cu_seqlens_q), (self.cu_seqlens_k, step.cu_seqlens_k)):
            mine[: step.batch + 1].copy_(given)
            mine[step.batch + 1 :] = given[-1]
        for mine, given in ((self.kv_lens, step.kv_lens), (self.slot_mapping, step.slot_mapping)):
            mine[: len(given)].copy_(given)
        self.kv_lens[step.batch :] = 0
        self.slot_mapping[step.num_tokens :] = -1
        self.block_table.zero_()
        self.block_table[: step.batch, : step.block_table.shape[1]].copy_(step.block_table)
        return self.view(step)

    def view(self, step: Step) -> Step:
        """The step with its tensors replaced by the buffers, at their full size; empty rows make up the rest."""
        rows, keys = self.sizes["max_batch"], self.sizes["max_pages"] * step.page_size
        padding = (0,) * (rows - step.batch)
        most = self._most_queries
        return Step(
            batch=rows,
            num_tokens=step.num_tokens,
            # A row has no more queries than keys.
            max_q_len=step.max_q_len if most is None else min(most, self.sizes["max_tokens"], keys),
            max_kv_len=keys,
            q_lens=step.q_lens + padding,
            kv_lens_host=step.kv_lens_host + padding,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            kv_lens=self.kv_lens,
            block_table=self.block_table,
            slot_mapping=self.slot_mapping,
            page_size=step.page_size,
        )


def make_step(
    q_lens: Any, kv_lens: Any, block_table: Any, page_size: int, device: torch.device, *, debug: bool = False
) -> Step:
    """The neutral metadata of a step, checked.

    Lengths and tables may be sequences, host tensors or device tensors; host lengths cause no synchronisation. With
    ``debug`` a table on the device is read, and checked, too.

    Raises:
        InputError: lengths that disagree, a table that is too small, or entries out of their types.
    """
    q_host, kv_host = host_lengths(q_lens, kv_lens)
    table = page_table(block_table, kv_host, page_size, device, debug=debug)
    return Step(
        batch=len(q_host),
        num_tokens=sum(q_host),
        max_q_len=max(q_host, default=0),
        max_kv_len=max(kv_host, default=0),
        q_lens=q_host,
        kv_lens_host=kv_host,
        cu_seqlens_q=_to_device([0, *itertools.accumulate(q_host)], device),
        cu_seqlens_k=_to_device([0, *itertools.accumulate(kv_host)], device),
        kv_lens=_to_device(kv_host, device),
        block_table=table,
        slot_mapping=_slots(q_host, kv_host, table, page_size, device),
        page_size=page_size,
    )


def _to_device(values: Sequence[int], device: torch.device) -> Tensor:
    import torch

    from hal_ops.uploads import staged

    return staged(torch.tensor(values, dtype=torch.int32), device).to(device, non_blocking=True)


def _slots(
    q_lens: tuple[int, ...], kv_lens: tuple[int, ...], table: Tensor, page_size: int, device: torch.device
) -> Tensor:
    """``page * page_size + offset`` of each new token, from host lengths, without synchronisation."""
    import torch

    from hal_ops.uploads import staged

    q, kv = torch.tensor(q_lens, dtype=torch.int64), torch.tensor(kv_lens, dtype=torch.int64)
    rows = torch.repeat_interleave(torch.arange(len(q_lens)), q, output_size=sum(q_lens))
    starts = kv - q.cumsum(0)
    positions = staged(torch.arange(len(rows)) + starts[rows], device).to(device, non_blocking=True)
    rows = staged(rows, device).to(device, non_blocking=True)
    if not len(q_lens) or not table.shape[1]:
        return positions
    pages = table[rows, torch.div(positions, page_size, rounding_mode="floor")].to(torch.int64)
    return pages * page_size + positions % page_size
