"""``ROCR_VISIBLE_DEVICES``, ``HIP_VISIBLE_DEVICES`` and ``CUDA_VISIBLE_DEVICES`` on eight MI300X."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hal._device import Probe
from hal.errors import VisibilityError

Ask = Callable[..., Probe]
ROCR, HIP, CUDA = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"
BUSES = ["0c", "22", "38", "5c", "9f", "af", "bf", "df"]

TABLE = [
    ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
    ({ROCR: "2,0"}, [2, 0]),
    ({ROCR: " 1 , 3 "}, [1, 3]),
    ({ROCR: ""}, []),
    ({ROCR: "-1"}, []),
    ({ROCR: "0,9,1"}, [0]),
    ({ROCR: "0,0,1"}, [0]),
    ({ROCR: "0x2,01"}, [2, 1]),
    ({ROCR: "08"}, []),
    ({ROCR: "1abc"}, []),
    ({ROCR: "GPU-c1b47cf2a1be3d50"}, [0]),
    ({ROCR: "gpu-C1B4,7"}, [0, 7]),
    ({ROCR: "GPU-00000000"}, []),
    ({ROCR: "GPU-c1b47cf2a1be3d50ff"}, []),
    ({HIP: "3,1"}, [3, 1]),
    ({HIP: "0, 1"}, [0]),
    ({HIP: "1,1,2"}, [1, 2]),
    ({HIP: "01"}, []),
    ({HIP: "-1"}, []),
    ({HIP: ""}, []),
    ({HIP: "8"}, []),
    ({HIP: "GPU-2a41d3370b6e5f92,0"}, [4, 0]),
    ({CUDA: "5"}, [5]),
    ({HIP: "5", CUDA: "5"}, [5]),
    ({HIP: "5,6", CUDA: "5, 6"}, [5, 6]),
    ({ROCR: "4,5,6", HIP: "2,0"}, [6, 4]),
    ({ROCR: "4,5,6", CUDA: "1"}, [5]),
    ({ROCR: "", HIP: ""}, []),
]


@pytest.mark.parametrize(("environ", "shown"), TABLE, ids=[str(row[0]) for row in TABLE])
def test_visible_devices(probe: Ask, environ: dict[str, str], shown: list[int]) -> None:
    # requirement P12, P13, P19
    found = probe("mi300x8", environ)
    assert [d.pci for d in found.devices] == [f"0000:{BUSES[i]}:00.0" for i in shown]
    assert [d.index for d in found.devices] == list(range(len(shown)))
    for name in environ:
        assert any(e.source == name for e in found.evidence) or (HIP in environ and name == CUDA)


def test_two_hip_variables_that_differ_are_one_error_with_both_values(probe: Ask) -> None:
    # requirement P19
    with pytest.raises(VisibilityError) as caught:
        probe("mi300x8", {HIP: "0", CUDA: "1,2"})
    assert "HIP_VISIBLE_DEVICES='0'" in str(caught.value)
    assert "CUDA_VISIBLE_DEVICES='1,2'" in str(caught.value)
    assert caught.value.variables == {HIP: "0", CUDA: "1,2"}


@pytest.mark.parametrize("name", [HIP, CUDA])
def test_an_ordinal_that_rocr_has_filtered_away_is_one_error_with_both_values(probe: Ask, name: str) -> None:
    # requirement P19
    with pytest.raises(VisibilityError, match="counts what is left") as caught:
        probe("mi300x8", {ROCR: "4,5", name: "4,5"})
    assert caught.value.variables == {ROCR: "4,5", name: "4,5"}


def test_cuda_visible_devices_is_nvidias_where_torch_is_built_for_cuda(probe: Ask) -> None:
    # requirement P2, P19
    found = probe("mi300x8", {HIP: "0", CUDA: "1"}, build={"torch": "2.11.0+cu130", "cuda": "13.0"})
    assert [d.pci for d in found.devices] == ["0000:0c:00.0"]


@pytest.mark.parametrize("name", [ROCR, HIP])
def test_an_ambiguous_uuid_is_an_error_that_names_the_matches(probe: Ask, name: str) -> None:
    # requirement P13
    with pytest.raises(VisibilityError, match="fits 2 GPUs: GPU-69c8f4b2fd3a70ee, GPU-69c8f4b2fd3a71aa"):
        probe("mi300x8", {name: "GPU-69c8"})


def test_why_a_list_is_shorter_than_written_is_told(probe: Ask) -> None:
    notes = [e.text for e in probe("mi300x8", {HIP: "0, 1"}).evidence if e.source == HIP]
    assert notes == ["'0, 1' shows 1 device: the list ends at ' 1': there is no such GPU"]
