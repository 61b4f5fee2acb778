"""Launches with a place in the grid for each sequence: more of them than that is wide are refused before the launch.

The width is made small here; ``tests/gpu/test_large_libraries.py`` goes past the real one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated import hardware, nvidia

from hal._plan import make_step
from hal_nvidia import _grid
from hal_ops.attention import AttentionRequest
from hal_ops.attention.cases import make_case

BASE: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float16"}
PAGED: dict[str, Any] = {**BASE, "page_size": 256, "kv_layout": "NHD"}
CPU = torch.device("cpu")
FORMS = ("dense", "ragged", "dense, planned", "ragged, planned")
PREFILLS = ("sdpa_flash", "sdpa_cudnn", "fa2")
XQA: dict[str, Any] = {"head_dim": 128, "page_size": 16}


@pytest.fixture
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the library is called with. A grid is four sequences wide."""
    monkeypatch.setattr(_grid, "_WIDEST", 4)
    library = request.getfixturevalue("library")
    seen: list[Any] = []
    with nvidia.running_on("sm_90", library) as installed:
        if installed is None:
            module = importlib.import_module(f"hal_nvidia._{library}")
            forward = module.forward
            monkeypatch.setattr(module, "forward", lambda *a, **k: (seen.append(a), forward(*a, **k))[1])
        yield seen if installed is None else installed.calls


def refused(held: list[Any], attend: Callable[[int], Any]) -> None:
    """Four sequences are served; five are refused, with the next step, and the library is not called."""
    attend(4)
    assert held
    held.clear()
    with pytest.raises(ValueError, match="a call of 5 sequences, and a grid of this kernel is 4 wide: give fewer"):
        attend(5)
    assert not held


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("library", PREFILLS)
def test_prefill(library: str, form: str, held: list[Any]) -> None:  # requirement P24, C7
    request = AttentionRequest(**BASE, phases=("prefill",))
    call = hardware.build(f"{library}.prefill", request)
    form, _, planned = form.partition(", ")

    def attend(count: int) -> None:
        case = make_case(request, "prefill", lengths=((3, 3),) * count, form=form)
        if not planned:
            call(*case.args, **case.kwargs)
        elif form == "dense":
            call.for_dense(*case.args)(*case.args)
        else:
            call.for_step(make_step([3] * count, [3] * count, torch.zeros(count, 1, dtype=torch.int32), 16, CPU))(
                *case.args
            )

    refused(held, attend)


@pytest.mark.parametrize(
    ("library", "phase", "fields"), [("fa2", "extend", {}), ("fa2", "decode", {}), ("xqa", "decode", XQA)]
)
def test_paged(library: str, phase: str, fields: dict[str, Any], held: list[Any]) -> None:  # requirement P24, C7
    request = AttentionRequest(**{**PAGED, **fields}, phases=(phase,))
    call = hardware.build(f"{library}.{phase}", request)

    def attend(count: int) -> None:
        case = make_case(request, phase, lengths=((1, 9),) * count)
        call(*case.args, call.plan(case.args[3]), **case.kwargs)

    refused(held, attend)
