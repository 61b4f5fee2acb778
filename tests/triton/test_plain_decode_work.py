"""How a decode step is cut into work items: every key is in one, and there are as many as the device takes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal_ops.attention._decode_work import FIELDS, Cut, Work, most_items, work_of
from hal_ops.attention._triton_decode_configs import CONFIGS, DEFAULT, config_of, configs_of

H200 = Cut(programs=8, target=198, slots=396, block=64, left=None, fixed=False, tokens=1)


def items(work: Work) -> list[tuple[int, ...]]:
    numbers = list(work.numbers)
    return [tuple(numbers[i : i + FIELDS]) for i in range(0, len(numbers), FIELDS)]


def cut_of(lengths: Sequence[int], **changes: object) -> Work:
    return work_of(dataclasses.replace(H200, **changes), [1] * len(lengths), lengths, len(lengths))  # type: ignore[arg-type]


lengths = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 20_000)), max_size=40)
cuts = st.builds(
    Cut,
    programs=st.sampled_from([1, 2, 8, 32, 200]),
    target=st.sampled_from([1, 4, 198]),
    slots=st.sampled_from([4, 132, 396]),
    block=st.sampled_from([16, 64, 128]),
    left=st.sampled_from([None, 0, 100]),
    fixed=st.booleans(),
    tokens=st.sampled_from([1, 2, 4]),
)


@settings(max_examples=200, deadline=None)
@given(cut=cuts, kv_lens=lengths, spare=st.integers(0, 9), data=st.data())
def test_every_key_is_in_one_item(cut: Cut, kv_lens: list[int], spare: int, data: st.DataObject) -> None:
    q_lens = [data.draw(st.sampled_from([cut.tokens, 0])) for _ in kv_lens]
    tokens = sum(q_lens) + spare
    work = work_of(cut, q_lens, kv_lens, tokens)
    most, most_slots = most_items(cut, len(kv_lens), tokens)
    assert len(work) <= most
    assert work.slots <= most_slots
    assert most_slots <= (16 * len(kv_lens) if cut.fixed else 4 * len(kv_lens) + cut.items()), (
        "docs/attention.md says so"
    )
    found: dict[int, list[tuple[int, ...]]] = {}
    written = set()
    for row, token, count, kv_len, begin, end, slot, split in items(work):
        written |= set(range(token, token + count))
        if token < sum(q_lens):
            found.setdefault(row, []).append((begin, end, slot, split >> 16, split & 0xFFFF, kv_len))
    assert written == set(range(tokens)), "tokens that nobody writes"
    assert sorted(found) == [row for row, q_len in enumerate(q_lens) if q_len]
    slots = []
    for row, parts in found.items():
        parts.sort(key=lambda part: part[4])
        assert [part[4] for part in parts] == list(range(len(parts)))
        assert {part[3] for part in parts} == {len(parts)}
        assert {part[5] for part in parts} == {kv_lens[row]}
        first = max(0, kv_lens[row] - q_lens[row] - cut.left) if cut.left is not None else 0
        assert parts[0][0] == first // cut.block * cut.block
        assert parts[-1][1] == kv_lens[row]
        assert all(a[1] == b[0] and a[1] % cut.block == 0 for a, b in itertools.pairwise(parts))
        slots += [part[2] for part in parts if len(parts) > 1]
    assert sorted(slots) == list(range(work.slots))


@pytest.mark.parametrize(
    ("kv_lens", "programs"),
    [
        ([1024], 128),
        ([65536], 192),
        ([4096] * 16, 256),
        ([4096] * 20, 160),
        ([32768] * 8, 192),
        ([4096] * 32, 256),
        ([512] * 256, 2048),
        ([4096] * 49, 392),
        ([8192] * 64, 1536),
        ([8192] * 98, 784),
    ],
)
def test_rows_of_like_lengths_fill_the_device(kv_lens: list[int], programs: int) -> None:
    assert len(cut_of(kv_lens)) * H200.programs == programs


def test_a_long_row_among_short_ones_is_split() -> None:
    work = cut_of([100] * 15 + [60_000])
    assert len(work) > 15 + 20
    sizes = [item[5] - item[4] for item in items(work)]
    assert sizes == sorted(sizes, reverse=True), "the longest items come first"
    assert sizes[0] < 3000


@pytest.mark.parametrize("others", [[], [60_000], [100] * 200])
def test_fixed_splits_depend_on_the_row_alone(others: list[int]) -> None:
    def of_first(work: Work) -> list[tuple[int, ...]]:
        return sorted(item[3:6] for item in items(work) if item[0] == 0)

    assert of_first(cut_of([5000, *others], fixed=True)) == of_first(cut_of([5000], fixed=True))


def test_windows_leave_the_keys_before_them_out() -> None:
    work = cut_of([8192] * 64, left=127)
    assert {item[4] for item in items(work)} == {(8192 - 128) // 64 * 64}


def test_configurations_are_found_by_arch_rows_dims_and_size() -> None:
    assert config_of("sm_90", 4, 256, 2) == configs_of("sm_90")[1]
    assert config_of("sm_90", 17, 256, 2).rows == 32
    assert config_of("sm_90", 500, 256, 2).rows == 64
    assert configs_of("sm_103") == configs_of("sm_100")
    assert configs_of("gfx1151") == configs_of("gfx1201") != DEFAULT
    assert configs_of("sm_120") == configs_of("mp_31") == configs_of("") == DEFAULT
    with pytest.raises(ValueError, match="together 1024 elements of 2 bytes"):
        config_of("sm_90", 4, 1024, 2)


@pytest.mark.parametrize("table", [*CONFIGS.values(), DEFAULT])
def test_every_table_serves_every_head_dim_and_format(table: object) -> None:
    arch = next((pattern.replace("?", "0").replace("[12]*", "100") for pattern, t in CONFIGS.items() if t is table), "")
    for dims in (32, 128, 256, 384, 512):
        for item in (1, 2, 4):
            for rows in (1, 16, 24, 64, 128):
                assert config_of(arch, rows, dims, item).dims >= dims
