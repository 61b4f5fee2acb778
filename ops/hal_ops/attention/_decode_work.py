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


@dataclasses.dataclass(frozen=True)
class Cut:
    """What decides how rows are cut.

    Fields:
        programs: programs an item has (kv heads, times tiles of queries).
        slots: programs that keep the device busy.
        block: keys that a program takes at a time; splits are multiples of it.
        shortest: keys that a split has at least, beside the last of a row.
        left: keys to the left of a query that it sees; None for all.
        fixed: batch-invariant mode.
        tokens: most query tokens an item.
    """

    programs: int
    slots: int
    block: int
    shortest: int
    left: int | None
    fixed: bool
    tokens: int

    def spare(self) -> int:
        """Most splits beyond one a row, in a step."""
        return 2 * max(1, self.slots // self.programs)


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
    split = _MOST_FIXED_SPLITS * batch if cut.fixed else batch + cut.spare()
    return split + padding, split


def work_of(cut: Cut, q_lens: Sequence[int], kv_lens: Sequence[int], tokens: int) -> Work:
    """The items of a step; longest first. ``tokens``: tokens that q may have; those past the rows' become zeros."""
    ranges = [_range(cut, q_len, kv_len) for q_len, kv_len in zip(q_lens, kv_lens, strict=True)]
    size = None if cut.fixed else _even_split(cut, [end - begin for begin, end in ranges])
    items: list[tuple[int, ...]] = []
    slots = token = 0
    for row, (q_len, (begin, end)) in enumerate(zip(q_lens, ranges, strict=True)):
        if q_len == 0:
            continue
        splits = max(1, -(-(end - begin) // (size or _fixed_split(cut, end - begin))))
        row_size = _rounded(-(-(end - begin) // splits), cut.block)
        splits = max(1, -(-(end - begin) // max(1, row_size)))
        for index in range(splits):
            first = begin + index * row_size
            last = min(end, first + row_size)
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


def _even_split(cut: Cut, lengths: Sequence[int]) -> int:
    """Keys a split, so that the device is filled: at most ``cut.spare()`` more items than rows.

    Programs over rows of like lengths end together. On an H200 a few more of them than the device runs at a time cost
    more than a few less, so these rows are cut in as many splits as fit, or in one more if that leaves much idle. Over
    rows of unlike lengths twice as many programs even out.
    """
    total, longest = sum(lengths), max(lengths, default=0)
    if longest * len(lengths) > _SKEW * total:
        even = -(-total // cut.spare())
    else:
        enough = cut.spare() // 2
        splits = max(1, enough // max(1, len(lengths)))
        even = -(-longest // (splits if splits * len(lengths) >= _NEARLY * enough else splits + 1))
    return _rounded(max(even, cut.shortest), cut.block)


def _fixed_split(cut: Cut, length: int) -> int:
    return _rounded(max(_FIXED_SPLIT, -(-length // _MOST_FIXED_SPLITS)), cut.block)


def _rounded(size: int, block: int) -> int:
    return -(-size // block) * block


def _padding(cut: Cut, first: int, tokens: int) -> Iterator[tuple[int, ...]]:
    """Items without keys for tokens that belong to no row."""
    for token in range(first, tokens, cut.tokens):
        yield (0, 0, token, min(cut.tokens, tokens - token), 0, 0, 0, 0, 1 << 16)
