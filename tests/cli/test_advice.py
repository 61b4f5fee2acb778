"""What ``hal doctor`` tells to install: with it, what is promised is chosen."""

from __future__ import annotations

import pytest

import hal
from hal.cli._models import MODELS, requests_for
from hal.cli._report import select_model

BARE = {"torch": "2.13.0", "triton": "3.6.0"}
LIBRARIES = {
    "`pip install 'torch-hal-nvidia[flashinfer]'`": {"flashinfer-python": "0.6.18"},
    "`pip install 'torch-hal-nvidia[flash-attn]' --no-build-isolation`": {"flash-attn": "2.8.3"},
    "`pip install --pre 'torch-hal-nvidia[flash-attn-4]'`": {"flash-attn-4": "4.0.0b36"},
    "`pip install 'nvidia-cutlass-dsl>=4.6.2'`": {"nvidia-cutlass-dsl": "4.8.1"},
    "`pip install 'torch-hal-nvidia[cudnn]'`": {"nvidia-cudnn-frontend": "1.32.0"},
    "build github.com/ROCm/aiter for your ROCm; `pip install aiter` brings another project": {"amd-aiter": "0.1.13"},
    "`pip install 'torch-hal-rocm[flash-attn]' --no-build-isolation`": {"flash-attn": "2.8.3"},
}
DEVICES = ("rocm:gfx1100,hip=7.0", "rocm:gfx942,hip=7.0", "nvidia:sm_100,cuda=13.0", "nvidia:sm_120,cuda=13.0")


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_promised_is_chosen(device: str) -> None:
    seen = 0
    with hal.simulate(device, libraries=BARE):
        for model in MODELS:
            for requests in requests_for(model, hal.device()).values():
                for near in (n for s in select_model(requests, hal.device()) for n in s.near_misses()):
                    if near.first and not near.changes:
                        seen += 1
                        installed = {name: v for text in near.install for name, v in LIBRARIES[text].items()}
                        with hal.simulate(libraries={**BARE, **installed}):
                            now = {k for s in select_model(requests, hal.device()) for k in s.kernels().values()}
                        assert set(near.kernels) <= now, (model.name, near.text())
    assert seen > len(MODELS) // 2


def test_pages_of_another_size_are_no_obstacle(hal_json) -> None:
    advice = hal_json("doctor", "--device", "rocm:gfx1100", "--library", "torch==2.13.0")["advice"]
    (entry,) = (e for e in advice if "aiter" in e["install"])
    assert entry["kernels"] == ["aiter_triton.extend", "aiter_triton.decode"]


def test_the_best_that_a_library_brings_is_named(hal_json) -> None:
    advice = hal_json("doctor", "--device", "nvidia:sm_100,cuda=13.0", "--library", "torch==2.13.0")["advice"]
    (entry,) = (e for e in advice if e["install"].endswith("[flashinfer]'`"))
    assert {"trtllm_gen.extend", "trtllm_gen.decode"} <= set(entry["kernels"])
    assert not [k for k in entry["kernels"] if k.startswith(("xqa", "flashinfer_sink"))]
