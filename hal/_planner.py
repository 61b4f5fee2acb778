"""``Planner``: what handles that run step by step have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hal._argument_kinds import count
from hal._in_process import InProcess
from hal._plan import Buffers, Plan, make_step
from hal.errors import InputError, did_you_mean
from hal_ops.attention import Step

if TYPE_CHECKING:
    import torch

__all__ = ["Planner"]


class Planner(InProcess):
    """Makes and refills plans. A subclass holds bound kernels and says which phase serves a step."""

    _instead = "send its arguments, and ask for the handle where it is used (equal requests give the same handle)"
    _implementations: Mapping[str, Any]
    _torch_device: torch.device
    _max_q_len: int
    _debug_checks: bool
    _graph: bool
    """Whether graphs may hold plans: what a launch depends on beside tensors is then that of any step."""
    _traced = False
    """Whether calls are nodes for compilers, which plans are then made for."""

    def _page_size(self) -> int:
        raise NotImplementedError

    def _postwrite_pays(self) -> bool:
        """Whether prompts without a prefix are better attended to directly, and written to the cache afterwards."""
        return False

    def _prepare(self, plan: Plan) -> None:
        """Anything else that a new or refilled plan needs."""

    def plan(
        self,
        *,
        q_lens: Any,
        kv_lens: Any,
        block_table: Any,
        max_batch: int | None = None,
        max_tokens: int | None = None,
        max_pages: int | None = None,
        phase: str | None = None,
    ) -> Plan:
        """The plan of one step, for every layer that uses this handle.

        Args:
            q_lens: query tokens a row in this step. kv_lens: tokens a row in the cache after the step.
            block_table: page indices, ``[batch, max_pages]``; entries past a row's last page may hold anything.
                Each may be a sequence, a host tensor or a device tensor; with host lengths nothing synchronises.
            max_batch, max_tokens, max_pages: make a plan of this size whose buffers stay (``plan.update(...)``).
                ``max_tokens`` defaults to ``max_batch * max_q_len``, ``max_pages`` to the table's width.
            phase: the one that serves the step, and every step that the plan is updated to; default: the one that suits
                this step best.

        Raises:
            InputError: lengths that disagree, a table too small or with a page that is no index, a size below 1, or a
                step that ``phase``, or none of the handle's phases, serves.
        """
        step = self._step(q_lens, kv_lens, block_table)
        phase, write = self._route(step) if phase is None else self._asked(phase, step)
        buffers = None
        if max_batch is not None:
            rows = count("max_batch", max_batch)
            tokens = rows * self._max_q_len if max_tokens is None else count("max_tokens", max_tokens)
            most = None if not self._graph else self._max_q_len if phase == "decode" else tokens
            pages = max(1, step.block_table.shape[1]) if max_pages is None else max_pages
            buffers = Buffers(rows, tokens, pages, self._torch_device, most)
            step = buffers.fill(step)
        elif max_tokens is not None or max_pages is not None:
            raise InputError("max_tokens and max_pages go with max_batch")
        payload = None if phase == "prefill" else self._implementations[phase].plan(step)
        plan = Plan(self, step, phase, write, payload, buffers)
        self._prepare(plan)
        return plan

    def _step(self, q_lens: Any, kv_lens: Any, block_table: Any) -> Step:
        return make_step(q_lens, kv_lens, block_table, self._page_size(), self._torch_device, debug=self._debug_checks)

    def _refill(self, plan: Plan, q_lens: Any, kv_lens: Any, block_table: Any) -> None:
        assert plan._buffers is not None
        step = self._step(q_lens, kv_lens, block_table)
        why = self._why_not(plan.phase, step)
        if why:
            raise InputError(f"the plan is for the {plan.phase} phase, and {why}: make another plan for this step")
        fresh = plan.phase == "prefill"
        # A plan over fresh keys has a payload only after a call over the cache alone: a graph may hold that, too.
        paged = None if fresh and plan._payload is None else self._implementations["extend" if fresh else plan.phase]
        refuses = getattr(paged, "refuses", None)
        if refuses is not None and (why := refuses(step, plan._payload)):
            raise InputError(why)
        plan._step = plan._buffers.fill(step)
        if fresh:
            self._prepare(plan)
        if paged is not None:
            update = getattr(paged, "update", None)
            plan._payload = paged.plan(plan._step) if update is None else update(plan._step, plan._payload)

    def _asked(self, phase: str, step: Step) -> tuple[str, str]:
        """A phase that was asked for, and when k and v of the step are written."""
        has = self._implementations
        if phase not in has:
            raise InputError(f"phase={phase!r}: this handle has {', '.join(has)}.{did_you_mean(str(phase), has)}")
        why = self._why_not(phase, step)
        if why:
            raise InputError(f"phase={phase!r} does not serve this step: {why}")
        return phase, "after" if phase == "prefill" else "before"

    def _why_not(self, phase: str, step: Step) -> str:
        """Why a phase's kernel does not serve a step; nothing where it does, as extend always does."""
        longest = step.max_q_len
        if phase == "decode" and not (longest <= self._max_q_len and all(n == longest for n in step.q_lens)):
            return f"decode serves equal q_lens up to {self._max_q_len} (max_q_len)"
        if phase == "prefill" and step.q_lens != step.kv_lens_host:
            row, (q_len, kv_len) = next(
                (i, pair)
                for i, pair in enumerate(zip(step.q_lens, step.kv_lens_host, strict=True))
                if pair[0] != pair[1]
            )
            return f"prefill attends to fresh keys alone, while row {row} has {kv_len - q_len} in the cache"
        return ""

    def _route(self, step: Step) -> tuple[str, str]:
        """The phase that serves a step, and when its k and v are written."""
        has = self._implementations
        longest = step.max_q_len
        if "decode" in has and not self._why_not("decode", step):
            return "decode", "before"
        if step.q_lens == step.kv_lens_host and "prefill" in has and ("extend" not in has or self._postwrite_pays()):
            return "prefill", "after"
        if "extend" in has:
            return "extend", "before"
        raise InputError(
            f"no phase of this handle ({', '.join(has)}) serves the step: its rows have q_lens up to {longest}, of "
            f"prefixes or of different lengths; decode serves equal q_lens up to {self._max_q_len} (max_q_len). "
            "Ask for the extend phase, or for a larger max_q_len"
        )
