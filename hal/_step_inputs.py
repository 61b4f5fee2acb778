"""What a plan is made of: lengths and block tables, as sequences, arrays, host tensors or device tensors.

What is on the host is read in full, since a page that is wrong there is another row's. What is on a device is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hal._argument_kinds import whole
from hal.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["host_lengths", "page_table"]

_MOST = 2**31 - 1


def host_lengths(q_lens: Any, kv_lens: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both lengths of each row on the host.

    Raises:
        InputError: something that is no length, or lengths that disagree.
    """
    q_host, kv_host = _lengths("q_lens", q_lens), _lengths("kv_lens", kv_lens)
    if len(q_host) != len(kv_host):
        raise InputError(f"q_lens has {len(q_host)} rows, kv_lens {len(kv_host)}")
    for row, (q_len, kv_len) in enumerate(zip(q_host, kv_host, strict=True)):
        if q_len > kv_len:
            raise InputError(
                f"row {row}: q_len {q_len} is more than kv_len {kv_len}; kv_lens counts the cache after the step, "
                "this step's tokens included"
            )
    return q_host, kv_host


def _lengths(name: str, values: Any) -> tuple[int, ...]:
    if hasattr(values, "tolist"):
        if "float" in str(getattr(values, "dtype", "")):
            raise InputError(f"{name} holds {values.dtype}: lengths are whole numbers of tokens")
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(f"{name}={values!r}: give a sequence or a tensor of lengths in tokens, a row each")
    return tuple(x if type(x) is int and x >= 0 else _length(name, row, x) for row, x in enumerate(values))


def _length(name: str, row: int, value: Any) -> int:
    """A length that is not plainly one: a number of numpy's, say."""
    length = whole(value)
    if length is None or length < 0:
        raise InputError(f"{name}[{row}]={value!r}: a length is a whole number of tokens, at least 0")
    return length


def page_table(
    block_table: Any, kv_lens: tuple[int, ...], page_size: int, device: torch.device, *, debug: bool = False
) -> Tensor:
    """The block table as an int32 tensor on the device, contiguous: several libraries know its rows by their width alone.

    With ``debug`` a table on a device is read too.

    Raises:
        InputError: it is no table of page indices, or has too few pages for a row.
    """
    import torch

    from hal_ops.uploads import staged

    table = block_table
    if not isinstance(table, torch.Tensor):
        table = _from_rows(_rows(block_table), kv_lens, page_size)
    if table.dim() != 2 or table.shape[0] != len(kv_lens):
        raise InputError(f"block_table is {tuple(table.shape)}: give [batch, max_pages] with batch {len(kv_lens)}")
    if table.dtype not in (torch.int32, torch.int64):
        raise InputError(f"block_table holds {table.dtype}: page indices are int32")
    longest = max(kv_lens, default=0)
    pages = -(-longest // page_size)
    if pages > table.shape[1]:
        raise InputError(
            f"block_table has {table.shape[1]} pages a row, and the longest kv_len ({longest}) takes {pages} "
            f"of {page_size} tokens"
        )
    if table is block_table and (debug or table.device.type == "cpu"):
        _check_used(table, kv_lens, page_size, pages)
    own = table is not block_table or table.dtype != torch.int32
    there: Tensor = staged(table.to(torch.int32), device, own=own).to(device, non_blocking=True)
    return there.contiguous()


def _check_used(table: Tensor, kv_lens: tuple[int, ...], page_size: int, pages: int) -> None:
    """Cast to int32, a page past it would be another row's; a negative one makes a slot that writes skip.

    The least and the most of all entries say enough of most tables; what lies past a row's last page may hold anything.
    """
    import torch

    host = table.cpu()
    if not pages or _are_pages(host):
        return
    counts = torch.tensor([-(-length // page_size) for length in kv_lens])
    used = host[:, :pages].masked_fill(torch.arange(pages) >= counts[:, None], 0)
    if not _are_pages(used):
        row, column = ((used < 0) | (used > _MOST)).nonzero()[0].tolist()
        raise _no_page(row, column, int(used[row, column]))


def _are_pages(table: Tensor) -> bool:
    import torch

    if table.dtype == torch.int32:
        return int(table.amin()) >= 0
    least, most = torch.aminmax(table)
    return int(least) >= 0 and int(most) <= _MOST


def _rows(block_table: Any) -> list[Sequence[int]]:
    """The rows of a table that is no tensor, as whole numbers."""
    if hasattr(block_table, "tolist"):
        block_table = block_table.tolist()
    if not isinstance(block_table, Sequence) or isinstance(block_table, str):
        raise InputError(f"block_table={block_table!r}: give a tensor [batch, max_pages], or the pages of each row")
    return [_row(i, row.tolist() if hasattr(row, "tolist") else row) for i, row in enumerate(block_table)]


def _row(i: int, row: Any) -> Sequence[int]:
    if not isinstance(row, Sequence) or isinstance(row, str):
        raise InputError(f"block_table[{i}]={row!r}: give the pages of the row, [page, ...]")
    if set(map(type, row)) <= {int}:
        return row
    pages = []
    for column, page in enumerate(row):
        index = whole(page)
        if index is None:
            raise InputError(f"block_table[{i}][{column}]={page!r}: a page index is a whole number")
        pages.append(index)
    return pages


def _from_rows(rows: list[Sequence[int]], kv_lens: tuple[int, ...], page_size: int) -> Tensor:
    """A table of rows, of which none may be too short: filled up, it would use a page that is another row's."""
    import torch

    width = max(map(len, rows), default=0)
    for i, (row, kv_len) in enumerate(zip(rows, kv_lens, strict=False)):
        pages = -(-kv_len // page_size)
        if len(row) < pages <= width:
            raise InputError(
                f"block_table[{i}] has {len(row)} pages, and its kv_len ({kv_len}) takes {pages} of {page_size} tokens"
            )
        if row and (min(row) < 0 or max(row) > _MOST):
            _check_pages(i, row[:pages])
            _check_pages(i, row, least=-_MOST)
    filled = [[*row, *([0] * (width - len(row)))] for row in rows]
    return torch.tensor(filled, dtype=torch.int32).reshape(len(rows), width)


def _check_pages(i: int, row: Sequence[int], least: int = 0) -> None:
    """Past its last page a row may hold anything that is int32."""
    for column, page in enumerate(row):
        if not least <= page <= _MOST:
            raise _no_page(i, column, page)


def _no_page(row: int, column: int, page: int) -> InputError:
    return InputError(f"block_table[{row}][{column}] is {page}: a page index is from 0 to {_MOST}")
