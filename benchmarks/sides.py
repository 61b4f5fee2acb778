"""Whose attention is compared: kernels that HAL knows, taken by name, so that no adapter is written twice.

A side whose kernel is refused, fails to import or fails when it runs gives a :class:`MissingError` with the text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from grid import Inputs
from timing import Call, reason_of
from torch import Tensor

import hal
from hal.errors import HalError, NoKernelError
from hal_ops import is_fp8
from hal_ops.attention import AttentionRequest

__all__ = ["SIDES", "MissingError", "Runs", "Side", "refusal", "runs_of"]


@dataclasses.dataclass(frozen=True)
class Side:
    """``libraries``: names of kernels or libraries; the first that takes the case runs it. ``contiguous``: its keys lie
    one behind the other, whatever the case says, and its kernel is one for prefill."""

    name: str
    libraries: tuple[str, ...]
    contiguous: bool = False


SIDES = {
    "cuda": (
        Side("triton", ("triton",)),
        Side("fa3", ("fa3",)),
        Side("fa4", ("fa4",)),
        Side("flashinfer", ("flashinfer_fa3", "flashinfer_fa2", "flashinfer_sink", "flashinfer_cudnn")),
        Side("torch flash", ("sdpa_flash",), contiguous=True),
        Side("torch cudnn", ("sdpa_cudnn",), contiguous=True),
    ),
    "cpu": (
        Side("torch_cpu", ("torch_cpu",)),
        Side("reference", ("reference",)),
        Side("contiguous", ("torch_cpu",), contiguous=True),
        Side("fa3", ("fa3",)),
    ),
}
"""By type of device; the first is ours."""


class MissingError(Exception):
    """A side does not run a case, and why not."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """``calls``: one a set of inputs. ``kernel``: what runs. ``note``: what is not as the case says."""

    calls: list[Call]
    kernel: str
    note: str = ""


def runs_of(side: Side, inputs: Inputs) -> Runs:
    """The calls of a side for a case, planned.

    Raises:
        MissingError: with the reasons of each of its kernels.
    """
    case = inputs.case
    request = case.request(contiguous=side.contiguous)
    if side.contiguous and is_fp8(request.kv_dtype):
        raise MissingError("contiguous keys in FP8: no such request")
    if side.contiguous and side.libraries == ("sdpa_cudnn",) and not _one_call(inputs):
        raise MissingError("not one call of cuDNN's: it is causal from the first key, and knows no ragged rows")
    wanted = [(request, "")]
    if is_fp8(request.kv_dtype):
        wanted.append((request.replace(fp8_query=True), "queries rounded to FP8"))
    found = []
    for library in side.libraries:
        for one, note in wanted:
            try:
                return _bound(library, one, inputs, side.contiguous, note)
            except MissingError as error:
                found.append(f"{library}: {error}" if len(side.libraries) > 1 else str(error))
    raise MissingError(" | ".join(dict.fromkeys(found)))


def _one_call(inputs: Inputs) -> bool:
    lengths = inputs.case.lengths
    return inputs.case.uniform and (lengths[0][0] == lengths[0][1] or lengths[0][0] == 1)


def _bound(library: str, request: AttentionRequest, inputs: Inputs, contiguous: bool, note: str) -> Runs:
    phase = str((request.phases or ("",))[0])
    try:
        handle = hal.get_attentions([request], device=inputs.device, kernel=library)[0]
    except NoKernelError as error:
        raise MissingError(refusal(error, library, phase)) from error
    except HalError as error:
        raise MissingError(reason_of(error)) from error
    make = _fresh if phase == "prefill" else _paged
    return Runs(make(handle, inputs, contiguous), handle.kernels()[phase], note)


def refusal(error: NoKernelError, library: str, phase: str) -> str:
    """The reasons of the kernels that answer to the name; more than the error's first line says."""
    choices = {} if error.selection is None else error.selection.choices
    candidates = choices[phase].candidates if phase in choices else ()
    reasons = [str(r) for c in candidates if c.kernel.answers_to(library) for r in c.reasons]
    return "refused: " + "; ".join(dict.fromkeys(reasons)) if reasons else reason_of(error)


def _fresh(handle: hal.Attention, inputs: Inputs, contiguous: bool) -> list[Call]:
    run: Any = handle.implementation("prefill")
    lengths: dict[str, Any] = {}
    if contiguous and not inputs.case.uniform:
        for name, lens in zip("qk", zip(*inputs.case.lengths, strict=True), strict=True):
            lengths[f"cu_seqlens_{name}"] = torch.tensor([0, *lens]).cumsum(0).int().to(inputs.device)
            lengths[f"max_seqlen_{name}"] = max(lens)
    sinks = {name: x for name, x in inputs.kwargs.items() if name == "sinks"}
    sets = [inputs.contiguous(i) for i in range(len(inputs.sets))] if contiguous else inputs.sets

    def call(three: tuple[Tensor, Tensor, Tensor]) -> Any:
        return run(*three, **lengths, **sinks)

    return [lambda three=three: call(three) for three in sets]  # type: ignore[misc]


def _paged(handle: hal.Attention, inputs: Inputs, contiguous: bool) -> list[Call]:
    q_lens, kv_lens = zip(*inputs.case.lengths, strict=True)
    plan = handle.plan(q_lens=q_lens, kv_lens=kv_lens, block_table=inputs.table)
    run: Any = handle.implementation(plan.phase)
    step, payload, kwargs = plan._step, plan._payload, inputs.kwargs
    return [lambda three=three: run(*three, step, payload, **kwargs) for three in inputs.sets]  # type: ignore[misc]
