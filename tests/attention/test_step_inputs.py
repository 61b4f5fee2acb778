"""Lengths and block tables: whatever holds them, a page that is another row's is never used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_requests import LATENT, SMALL

import hal
from hal.errors import InputError


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"q_lens": np.ones(1), "kv_lens": [3], "block_table": [[0]]}, "q_lens holds float64"),
        ({"q_lens": [True], "kv_lens": [3], "block_table": [[0]]}, r"q_lens\[0\]=True"),
        (
            {"q_lens": [9, 9], "kv_lens": [9, 9], "block_table": [[0, 1, 2], [3]]},
            r"block_table\[1\] has 1 pages, and its kv_len \(9\) takes 3 of 4 tokens",
        ),
        ({"q_lens": [1, 1], "kv_lens": [1, 1], "block_table": [[0], []]}, r"block_table\[1\] has 0 pages"),
        ({"q_lens": [1], "kv_lens": [3], "block_table": [[0.5]]}, r"block_table\[0\]\[0\]=0.5: .* whole number"),
        ({"q_lens": [1], "kv_lens": [3], "block_table": [[True]]}, r"block_table\[0\]\[0\]=True"),
        ({"q_lens": [1], "kv_lens": [3], "block_table": [[2**40]]}, r"\[0\]\[0\] is 1099511627776: .* from 0 to"),
        ({"q_lens": [1], "kv_lens": [3], "block_table": [[0, 2**70]]}, r"\[0\]\[1\] is 1180591620717411303424"),
        ({"q_lens": [1], "kv_lens": [3], "block_table": [[-1]]}, r"block_table\[0\]\[0\] is -1: .* from 0 to"),
        ({"q_lens": [1], "kv_lens": [3], "block_table": [0]}, r"block_table\[0\]=0: give the pages of the row"),
        ({"q_lens": [1], "kv_lens": [3], "block_table": None}, "block_table=None: give a tensor"),
        ({"q_lens": [1], "kv_lens": [3], "block_table": ["a"]}, r"block_table\[0\]='a'"),
    ],
)
def test_what_is_no_step(step: dict[str, Any], text: str) -> None:  # requirement D9
    with pytest.raises(InputError, match=text):
        hal.get_attention(**SMALL).plan(**step)
    with pytest.raises(InputError, match=text):
        hal.get_mla_attention(**LATENT).plan(**step)


TABLES: dict[str, Any] = {
    "int32 tensor": lambda rows: torch.tensor(rows).to(torch.int32),
    "int64 tensor": torch.tensor,
    "array": np.array,
    "list": list,
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ([[-1, 0], [1, 2]], r"\[0\]\[0\] is -1"),
        ([[0, 3], [1, -7]], r"\[1\]\[1\] is -7"),
        ([[2**32 + 1, 0], [1, 2]], r"\[0\]\[0\] is 4294967297"),
        ([[0, -1], [2**31, 2]], r"\[1\]\[0\] is 2147483648"),
    ],
)
def test_a_page_that_is_none_is_found_in_any_table_of_the_host(kind: str, rows: Any, where: str) -> None:
    # requirement D9
    if kind == "int32 tensor" and max(map(max, rows)) >= 2**31:
        return
    for handle in (hal.get_attention(**SMALL), hal.get_mla_attention(**LATENT)):
        plan = handle.plan(q_lens=[1, 1], kv_lens=[3, 5], block_table=[[0, 0], [1, 2]], max_batch=2)
        step = {"q_lens": [1, 1], "kv_lens": [3, 6], "block_table": TABLES[kind](rows)}
        with pytest.raises(InputError, match=rf"block_table{where}: a page index is from 0 to 2147483647"):
            handle.plan(**step)
        with pytest.raises(InputError, match="a page index is from 0 to"):
            plan.update(**step)
        assert plan._step.kv_lens.tolist() == [3, 5]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_lies_past_the_last_page_may_be_anything(dtype: torch.dtype) -> None:  # requirement D9
    table = torch.tensor([[5, -1, -(2**31)], [2, 4, 2**31 - 1]]).to(dtype)
    if dtype == torch.int64:
        table[0, 2] = 2**40
    for handle in (hal.get_attention(**SMALL), hal.get_mla_attention(**LATENT)):
        assert handle.plan(q_lens=[1, 2], kv_lens=[3, 8], block_table=table)._step.slot_mapping.tolist() == [22, 18, 19]
        assert handle.plan(q_lens=[0, 0], kv_lens=[0, 0], block_table=table).num_tokens == 0


def test_a_row_that_is_too_short_changes_no_plan() -> None:
    handle = hal.get_attention(**SMALL)
    plan = handle.plan(q_lens=[1, 1], kv_lens=[9, 9], block_table=[[0, 1, 2], [3, 4, 5]], max_batch=2)
    with pytest.raises(InputError, match=r"block_table\[1\] has 2 pages"):
        plan.update(q_lens=[1, 1], kv_lens=[10, 10], block_table=[[0, 1, 2], [3, 4]])
    assert plan._step.kv_lens.tolist() == [9, 9]
    assert plan._step.block_table.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("make", [np.array, lambda values: np.array(values, np.uint8), torch.tensor, tuple])
def test_lengths_and_tables_of_any_kind(make: Any) -> None:  # requirement A3
    handle = hal.get_attention(**SMALL)
    wanted = handle.plan(q_lens=[1, 2], kv_lens=[3, 9], block_table=[[5], [2, 4, 1]])._step
    table = [[5, -1, -1], [2, 4, 1]] if make in (np.array, tuple) else [[5, 0, 0], [2, 4, 1]]
    for block_table in (make(table), [make(row) for row in table], [make([5]), make([2, 4, 1])]):
        step = handle.plan(q_lens=make([1, 2]), kv_lens=list(make([3, 9])), block_table=block_table)._step
        assert (step.q_lens, step.kv_lens_host) == (wanted.q_lens, wanted.kv_lens_host)
        assert {type(n) for n in (*step.q_lens, *step.kv_lens_host)} == {int}
        assert step.slot_mapping.tolist() == wanted.slot_mapping.tolist()


STRIDED: dict[str, Any] = {
    "columns first": lambda table: table.t().contiguous().t(),
    "part of wider rows": lambda table: torch.cat([table, table + 1], 1)[:, : table.shape[1]],
    "every other column": lambda table: torch.stack([table, table + 1], 2).flatten(1)[:, ::2],
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("how", STRIDED)
def test_tables_of_any_strides_become_contiguous(how: str, dtype: torch.dtype) -> None:  # requirement D9
    """Kernels step from page to page by one, and several libraries from row to row by the width."""
    table = torch.tensor([[5, 3, 1], [2, 4, 0]], dtype=dtype)
    given = STRIDED[how](table)
    assert torch.equal(given, table)
    assert not given.is_contiguous()
    for handle in (hal.get_attention(**SMALL), hal.get_mla_attention(**LATENT)):
        for more in ({}, {"max_batch": 2}):
            step = handle.plan(q_lens=[1, 1], kv_lens=[10, 12], block_table=given, **more)._step
            assert step.block_table.is_contiguous()
            assert step.block_table.tolist() == table.tolist()
            assert step.slot_mapping.tolist() == [1 * 4 + 1, 0 * 4 + 3]
