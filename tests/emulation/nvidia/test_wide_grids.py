"""Launches with a place in the grid for each sequence: more of them than that is wide are refused before the launch.

The width is made small here; ``tests/gpu/test_large_libraries.py`` goes past the real one.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia

from hal._attention import for_step
from hal._plan import make_step
from hal_nvidia import _grid
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

BASE: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}
ALL_HEADS: dict[str, Any] = {**BASE, "num_kv_heads": 4}
PAGED: dict[str, Any] = {**BASE, "page_size": 256, "kv_layout": "NHD"}
XQA: dict[str, Any] = {"head_dim": 128, "page_size": 16}
CPU = torch.device("cpu")
FORMS = ("dense", "ragged", "dense, planned", "ragged, planned")
PREFILLS = ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "fa2", "fmha_v2")
TAKES = "a call of {} sequences, and {} takes 4, as many as its grid is wide: give fewer"


def arch_of(library: str) -> str:
    return "sm_120" if library == "fmha_v2" else "sm_90"


@pytest.fixture
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the library is called with. A grid is four sequences wide."""
    monkeypatch.setattr(_grid, "_WIDEST", 4)
    library = request.getfixturevalue("library")
    seen: list[Any] = []
    with nvidia.running_on(arch_of(library), library) as installed:
        if installed is None:
            module = importlib.import_module(f"hal_nvidia._{library}")
            forward = module.forward
            monkeypatch.setattr(module, "forward", lambda *a, **k: (seen.append(a), forward(*a, **k))[1])
        yield seen if installed is None else installed.calls


def refused(library: str, held: list[Any], attend: Callable[[int], Any]) -> None:
    """Four sequences are served; five are refused, with the next step, and the library is not called."""
    attend(4)
    assert held
    held.clear()
    with pytest.raises(ValueError, match=TAKES.format(5, library)):
        attend(5)
    assert not held


@pytest.mark.parametrize(
    ("library", "form"), [*itertools.product(PREFILLS, FORMS), ("fa4", "dense"), ("fa4", "dense, planned")]
)
def test_prefill(library: str, form: str, held: list[Any]) -> None:  # requirement P24, C7
    fields = ALL_HEADS if library == "sdpa_efficient" else BASE
    request = AttentionRequest(**fields, phases=("prefill",))
    call = hardware.build(f"{library}.prefill", request, arch_of(library))
    form, _, planned = form.partition(", ")

    def attend(count: int) -> None:
        case = make_case(request, "prefill", lengths=((3, 3),) * count, form=form)
        if not planned:
            kwargs = dict(case.kwargs)
            if form == "ragged":  # as a planned step has it: keys are the queries' own
                kwargs["cu_seqlens_k"] = kwargs["cu_seqlens_q"]
            call(*case.args, **kwargs)
        elif form == "dense":
            getattr(call, "for_dense", lambda *tensors: call)(*case.args)(*case.args)
        else:
            step = make_step([3] * count, [3] * count, torch.zeros(count, 1, dtype=torch.int32), 16, CPU)
            for_step(call, step)(*case.args)

    refused(library, held, attend)


@pytest.mark.parametrize(
    ("library", "phase", "fields"), [("fa2", "extend", {}), ("fa2", "decode", {}), ("xqa", "decode", XQA)]
)
def test_paged(library: str, phase: str, fields: dict[str, Any], held: list[Any]) -> None:  # requirement P24, C7
    request = AttentionRequest(**{**PAGED, **fields}, phases=(phase,))
    call = hardware.build(f"{library}.{phase}", request)

    def attend(count: int) -> None:
        case = make_case(request, phase, lengths=((1, 9),) * count)
        call(*case.args, call.plan(case.args[3]), **case.kwargs)

    refused(library, held, attend)


@pytest.mark.parametrize("library", ["sdpa_efficient"])
def test_sequences_of_which_two_are_made(library: str, held: list[Any]) -> None:  # requirement P24, C7
    """The queries that see no key are a sequence of their own."""
    request = AttentionRequest(**ALL_HEADS, phases=("prefill",))
    call = hardware.build(f"{library}.prefill", request)
    case = make_case(request, "prefill", lengths=((3, 3), (5, 2), (1, 4)), form="ragged")
    with pytest.raises(ValueError, match=TAKES.format(6, "sdpa_efficient, which makes two of each,")):
        call(*case.args, **case.kwargs)
    assert not held
