"""How a decode step is cut into work items. Plain numbers; needs no torch.

A row's keys are cut into splits where rows and heads alone do not fill the device. How many depends on the step's
lengths and on the device, so the sums of one row may be rounded differently in another batch; in batch-invariant mode
the cut depends on nothing but the row's own length.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator, Sequence

__all__ = ["Cut", "FIELDS", "Work", "most_items", "work_of"]

FIELDS = 8
"""Numbers an item: see :mod:`hal_ops.attention._triton_decode_kernels`."""
_FIXED_SPLIT = 512
_MOST_FIXED_SPLITS = 16
_SKEW = 2
"""Times the mean length that a row is long, where rows count as of unlike lengths."""
_NEARLY = 0.75
_MOST_ROUNDED = 4
"""Most splits a row where there are programs enough, to make their number suit the device."""
_WORTH = 512
"""Keys of a split that make up for the merge."""
_MERGE = 0.02
"""Share of the time that one more split a row costs."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """What decides how rows are cut.

    Fields:
        programs: programs an item has (kv heads, times tiles of queries).
        target: programs that keep the device busy. slots: programs that it runs at a time.
        block: keys that a program takes at a time; splits are multiples of it.
        left: keys to the left of a query that it sees; None for all.
        fixed: batch-invariant mode.
        tokens: most query tokens an item.
    """

    programs: int
    target: int
    slots: int
    block: int
    left: int | None
    fixed: bool
    tokens: int

    def items(self) -> int:
        """Items that keep the device busy."""
        return max(1, self.target // self.programs)


@dataclasses.dataclass
class Work:
    """``numbers``: ``FIELDS`` int32 an item. ``slots``: partial results that the items leave in memory."""

    numbers: array[int]
    slots: int

    def __len__(self) -> int:
        return len(self.numbers) // FIELDS


def most_items(cut: Cut, batch: int, tokens: int) -> tuple[int, int]:
    """Most items, and most partial results, that any step of ``batch`` rows and ``tokens`` tokens has."""
    padding = -(-tokens // cut.tokens)
    split = _MOST_FIXED_SPLITS * batch if cut.fixed else batch + cut.items()
    if not cut.fixed and batch * cut.programs > cut.slots:
        split = max(split, _MOST_ROUNDED * batch)
    return split + padding, split


def work_of(cut: Cut, q_lens: Sequence[int], kv_lens: Sequence[int], tokens: int) -> Work:
    """The items of a step; longest first. ``tokens``: tokens that q may have; those past the rows' become zeros."""
    ranges = [_range(cut, q_len, kv_len) for q_len, kv_len in zip(q_lens, kv_lens, strict=True)]
    seen = [end - begin for (begin, end), q_len in zip(ranges, q_lens, strict=True) if q_len]
    size = None if cut.fixed else _split_size(cut, seen)
    items: list[tuple[int, ...]] = []
    slots = token = 0
    for row, (q_len, (begin, end)) in enumerate(zip(q_lens, ranges, strict=True)):
        if q_len == 0:
            continue
        splits, step = _row_splits(end - begin, size or _fixed_split(end - begin), cut.block)
        for index in range(splits):
            first = begin + index * step
            last = min(end, first + step)
            items.append((first - last, row, token, q_len, end, first, last, slots + index, splits << 16 | index))
        slots += splits if splits > 1 else 0
        token += q_len
    items.sort()
    items += _padding(cut, token, tokens)
    numbers = array("i", [number for item in items for number in item[1:]])
    return Work(numbers, slots)


def _range(cut: Cut, q_len: int, kv_len: int) -> tuple[int, int]:
    """Keys of a row that any of its queries sees; the first one is a multiple of the block."""
    if cut.left is None or not q_len:
        return 0, kv_len
    low = max(0, kv_len - q_len - cut.left)
    return low // cut.block * cut.block, kv_len


def _row_splits(length: int, size: int, block: int) -> tuple[int, int]:
    """Splits of a row, all of about one length of at most ``size`` keys, in blocks; and that length."""
    step = _rounded(-(-length // max(1, -(-length // _rounded(size, block)))), block)
    return (-(-length // step), step) if length else (1, block)


def _split_size(cut: Cut, lengths: Sequence[int]) -> int:
    """Keys a split at most, so that the device is filled.

    Where all rows have about one length all programs end together, and a few more of them than the device takes cost as
    much as another round of all. Fewer programs than it takes are enough if they keep the memory busy.
    """
    total, longest, rows = sum(lengths), max(lengths, default=0), max(1, len(lengths))
    if longest * rows > _SKEW * total:
        return max(1, -(-total // cut.items()))
    if rows * cut.programs > cut.slots:
        return -(-longest // _round_splits(cut, rows, longest))
    splits = max(1, cut.items() // rows)
    return max(1, -(-longest // (splits if splits * rows >= _NEARLY * cut.items() else splits + 1)))


def _round_splits(cut: Cut, rows: int, length: int) -> int:
    """Splits a row with which the last round of programs leaves the least of the device idle."""

    def share(splits: int) -> float:
        rounds = rows * cut.programs * splits / cut.slots
        return rounds / -(-rounds // 1) - _MERGE * splits

    return max((n for n in range(1, _MOST_ROUNDED + 1) if n == 1 or length >= n * _WORTH), key=share)


def _fixed_split(length: int) -> int:
    return max(_FIXED_SPLIT, -(-length // _MOST_FIXED_SPLITS))


def _rounded(size: int, block: int) -> int:
    return -(-size // block) * block


def _padding(cut: Cut, first: int, tokens: int) -> Iterator[tuple[int, ...]]:
    """Items without keys for tokens that belong to no row."""
    for token in range(first, tokens, cut.tokens):
        yield (0, 0, token, min(cut.tokens, tokens - token), 0, 0, 0, 0, 1 << 16)
