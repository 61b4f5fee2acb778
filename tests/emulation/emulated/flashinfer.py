"""flashinfer's habits over the formula.

Read from flashinfer-python 0.6.13 (0.7.2 for cuDNN) and, where a test on an H200 says so, seen there:

* metadata is fixed by ``plan``; ``run`` takes what ``plan`` was told, and has no word on masks, scale or softcap;
* the LSE is in base 2; masked logits are -5e4 until 0.7.2, which a row without keys shows: fa2 gives out 0 and an LSE
  near -5e4, fa3 the mean of what its tile holds and an LSE near -5e4 times the scale, or times the softcap; where a
  sequence has no keys at all, both give out 0 and -5e4, and fa3 does so even with sinks;
* ``run(sinks=...)`` of the plain wrappers is accepted and ignored; the sink wrapper takes sinks and scale by position;
* a row's pages are ``indices[indptr[row]:indptr[row + 1]]``; the tables may lie on the host, and here they must;
* fa2 counts the first block to mask in unsigned numbers: of more queries than keys, over more than a tile, too few are;
* in graph mode tables are copied into buffers of fixed size, and ``run`` reads those;
* its plain functions want work buffers of zeros, and read q by its shape.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal
from emulated.flashinfer_functions import FUNCTIONS, Masks, attention
from emulated.flashinfer_mla import Mla
from emulated.flashinfer_sizes import decode_plan, prefill_plan
from emulated.named import by_name
from emulated.signatures import functions, signature

__all__ = ["LIBRARY", "emulations"]

LIBRARY = "flashinfer-python"
IEEE_SINCE = ">=0.7.2"


def emulations(version: str, arch: str) -> dict[str, Any]:
    """Name to function or class, as a version behaves on an arch."""
    masked = -math.inf if hal.Version.parse(version).satisfies(IEEE_SINCE) else -5e4
    facts = {"arch": arch, "masked": masked, "version": version}
    kept = {name.partition(":")[2] for name in functions(LIBRARY, version)}
    found: dict[str, Any] = {f.__name__: _function(f, version, arch) for f in FUNCTIONS if f.__name__ in kept}
    for owner, base in CLASSES.items():
        found[owner] = _class(owner, base, version, facts)
    return found


def _function(core: Callable[..., Any], version: str, arch: str) -> Callable[..., Any]:
    known = inspect.signature(core).parameters
    here = functools.partial(core, arch=arch) if "arch" in known else core
    return by_name(here, signature(LIBRARY, version, core.__name__))


def _class(owner: str, base: type, version: str, facts: dict[str, Any]) -> type:
    """The class with its methods under the version's parameters; the sink wrapper inherits those of the paged one."""
    kept = {name.partition(":")[2] for name in functions(LIBRARY, version)}
    methods: dict[str, Any] = {}
    for method in ("__init__", "plan", "run"):
        name = f"{owner}.{method}" if f"{owner}.{method}" in kept else f"{PAGED}.{method}"
        methods[method] = by_name(getattr(base, method), signature(LIBRARY, version, name), method=True)
    inner = f"{owner}._plan_impl"
    if inner in kept:
        methods["_plan_impl"] = by_name(base.plan, signature(LIBRARY, version, inner), method=True)  # type: ignore[attr-defined]
        methods["plan"] = lambda self, *args, **kwargs: self._plan_impl(*args, **kwargs)
    return type(owner, (base,), {**facts, **methods})


class _Wrapper:
    arch = ""
    masked = -math.inf

    def _set(self, buffer: Tensor, kv_layout: str, backend: str) -> None:
        assert kv_layout in ("NHD", "HND")
        assert backend in ("fa2", "fa3"), f"backend={backend!r}: what it becomes depends on version and arch"
        assert backend != "fa3" or self.arch == "sm_90", "fa3 is built for sm_90a"
        assert buffer.dtype == torch.uint8
        self.device = buffer.device
        self._float_workspace_buffer = buffer
        self._layout, self._backend = kv_layout, backend

    def _remember(
        self, masks: Masks, q_data_type: torch.dtype, kv_data_type: torch.dtype, dims: tuple[int, int]
    ) -> None:
        assert dims in ((64, 64), (128, 128), (256, 256), (192, 128)), f"no kernel for head dims {dims}"
        assert q_data_type in (torch.float16, torch.bfloat16)
        assert self._backend == "fa2" or kv_data_type == q_data_type, "fa3 takes queries and keys of one format"
        self._masks, self._types = masks, (q_data_type, kv_data_type)

    def _fits(self, needed: int) -> None:
        if self._backend == "fa2":
            assert self._float_workspace_buffer.numel() >= needed, "Buffer overflow when allocating memory for tmp_v"

    def _check(self, q: Tensor, k: Tensor, rows: int) -> None:
        assert (q.dtype, k.dtype) == self._types, "dtypes differ from those of plan"
        if q.shape[0] != rows:
            raise ValueError(f"q.shape[0] ({q.shape[0]}) does not match qo_indptr[-1] ({rows})")

    def _join(self, pairs: list[tuple[Tensor, Tensor]], return_lse: bool) -> Any:
        out, lse = torch.cat([out for out, _ in pairs]), torch.cat([lse for _, lse in pairs])
        self._float_workspace_buffer[: 1 << 12].random_()
        return (out, lse) if return_lse else out


def on_host(*tables: Tensor) -> None:
    assert all(t.device.type == "cpu" and t.dtype == torch.int32 for t in tables)


_TILE = 16


class Ragged(_Wrapper):
    """``BatchPrefillWithRaggedKVCacheWrapper``."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str = "auto") -> None:
        self._set(float_workspace_buffer, kv_layout, backend)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        *,
        causal: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        on_host(qo_indptr, kv_indptr)
        scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        masks = Masks(causal, window_left, logits_soft_cap or 0.0, scale)
        self._remember(masks, q_data_type, kv_data_type or q_data_type, (head_dim_qk, head_dim_vo or head_dim_qk))
        self._fits(prefill_plan(self.arch, (num_qo_heads, num_kv_heads), head_dim_vo or head_dim_qk))
        self._lengths = qo_indptr.diff().tolist(), kv_indptr.diff().tolist()
        pairs = zip(*self._lengths, strict=True)
        assert not (causal and self._backend == "fa2") or all(q <= kv or kv < _TILE for q, kv in pairs), "unmasked"

    def run(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, return_lse: bool = False) -> Any:
        q_lens, kv_lens = self._lengths
        self._check(q, k, sum(q_lens))
        rows = zip(q.split(q_lens), k.split(kv_lens), v.split(kv_lens), strict=True)
        return self._join([attention(*row, self._masks, None, self._backend, self.masked) for row in rows], return_lse)


class _Paged(_Wrapper):
    _graph: dict[str, Tensor] | None = None

    def _keep(self, tables: dict[str, Tensor]) -> None:
        """In graph mode into the buffers, whose sizes are fixed."""
        if self._graph is None:
            self._tables = tables
            return
        for name, table in tables.items():
            buffer = self._graph[name]
            assert len(table) == len(buffer) or (name == "indices" and len(table) <= len(buffer)), f"size of {name}"
            buffer[: len(table)].copy_(table)
        self._tables = self._graph

    def _attend(self, q: Tensor, caches: tuple[Tensor, Tensor], q_lens: list[int], causal: bool, sinks: Any) -> Any:
        masks = dataclasses.replace(self._masks, causal=causal)
        pairs, start = [], 0
        for row, q_len in enumerate(q_lens):
            k, v = (self._keys(cache, row).to(q.dtype) for cache in caches)
            pairs.append(attention(q[start : start + q_len], k, v, masks, sinks, self._backend, self.masked))
            start += q_len
        return pairs

    def _keys(self, cache: Tensor, row: int) -> Tensor:
        cache = cache if self._layout == "NHD" else cache.transpose(1, 2)
        first, end = self._tables["kv_indptr"][row : row + 2].tolist()
        pages = cache[self._tables["indices"][first:end].long()]
        size = cache.shape[1]
        return pages.flatten(0, 1)[: max(end - first - 1, 0) * size + int(self._tables["last_page_len"][row])]


class PagedPrefill(_Paged):
    """``BatchPrefillWithPagedKVCacheWrapper``."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        self._set(float_workspace_buffer, kv_layout, backend)
        if use_cuda_graph:
            buffers = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
            assert all(isinstance(b, Tensor) for b in buffers), "graph mode needs every buffer"
            names = ("qo_indptr", "kv_indptr", "indices", "last_page_len")
            self._graph = dict(zip(names, buffers, strict=True))  # type: ignore[arg-type]
        self._most_rows: int | None = None

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        seq_lens: Tensor | None = None,
    ) -> None:
        on_host(qo_indptr, paged_kv_indptr, paged_kv_last_page_len)
        scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        masks = Masks(causal, window_left, logits_soft_cap or 0.0, scale)
        self._remember(masks, q_data_type, kv_data_type or q_data_type, (head_dim_qk, head_dim_vo or head_dim_qk))
        self._rows = int(qo_indptr[-1])
        if self._graph is not None:
            self._most_rows = self._most_rows or self._rows
            assert self._rows <= self._most_rows, "more rows than the first plan had"
        sizes = {"rows": self._most_rows, "batch": len(paged_kv_last_page_len)}
        self._fits(prefill_plan(self.arch, (num_qo_heads, num_kv_heads), head_dim_vo or head_dim_qk, **sizes))
        self._page_size = page_size
        tables = {"kv_indptr": paged_kv_indptr, "indices": paged_kv_indices, "last_page_len": paged_kv_last_page_len}
        self._keep({"qo_indptr": qo_indptr, **tables})
        check_seq_lens(tables, seq_lens, page_size)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *args: Any,
        return_lse: bool = False,
        sinks: Tensor | None = None,
    ) -> Any:
        return self._run(q, paged_kv_cache, None, return_lse)

    def _run(self, q: Tensor, caches: tuple[Tensor, Tensor], sinks: Tensor | None, return_lse: bool) -> Any:
        self._check(q, caches[0], self._rows)
        assert caches[0].stride() == caches[1].stride(), "k/v strides differ"
        assert caches[0].shape[1 if self._layout == "NHD" else 2] == self._page_size
        pairs = self._attend(q, caches, self._tables["qo_indptr"].diff().tolist(), self._masks.causal, sinks)
        return self._join(pairs, return_lse)


class Sinks(PagedPrefill):
    """``BatchAttentionWithAttentionSinkWrapper``: compiled for its formats, dims and window when it is made."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        *,
        backend: str = "auto",
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype = torch.bfloat16,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        buffers = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, *buffers, backend=backend)
        self._compiled = (q_data_type, kv_data_type, window_left >= 0)

    def run(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *args: Any, return_lse: bool = False, sinks: Any = None
    ) -> Any:
        sink, scale = args
        assert (*self._types, self._masks.left >= 0) == self._compiled, "plan differs from what was compiled"
        assert self._masks.softcap == 0.0, "the sink variant has no softcap"
        assert sink.dtype == torch.float32
        assert sink.shape == (q.shape[1],)
        self._masks = dataclasses.replace(self._masks, scale=scale)
        return self._run(q, paged_kv_cache, sink, return_lse)


class Decode(_Paged):
    """``BatchDecodeWithPagedKVCacheWrapper``: one query a row."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        self._set(float_workspace_buffer, kv_layout, backend)
        self._tensor_cores = use_tensor_cores
        if use_cuda_graph:
            buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
            assert all(isinstance(b, Tensor) for b in buffers), "graph mode needs every buffer"
            self._graph = dict(zip(("kv_indptr", "indices", "last_page_len"), buffers, strict=True))  # type: ignore[arg-type]

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
        seq_lens: Tensor | None = None,
    ) -> None:
        on_host(indptr, last_page_len)
        group = num_qo_heads // num_kv_heads
        assert self._tensor_cores or group in (1, 2, 3, 4, 8), f"group size {group} needs tensor cores"
        scale = head_dim**-0.5 if sm_scale is None else sm_scale
        masks = Masks(False, window_left, logits_soft_cap or 0.0, scale)
        self._remember(masks, q_data_type, kv_data_type or q_data_type, (head_dim, head_dim))
        heads, rows = (num_qo_heads, num_kv_heads), len(last_page_len)
        sizes = {"rows": None if self._graph is None else rows, "batch": rows}
        tensor = self._tensor_cores
        self._fits(
            prefill_plan(self.arch, heads, head_dim, **sizes) if tensor else decode_plan(self.arch, heads, head_dim)
        )
        tables = {"kv_indptr": indptr, "indices": indices, "last_page_len": last_page_len}
        self._keep(tables)
        check_seq_lens(tables, seq_lens, page_size)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *args: Any,
        return_lse: bool = False,
        sinks: Tensor | None = None,
    ) -> Any:
        rows = self._tables["last_page_len"].shape[0]
        self._check(q, paged_kv_cache[0], rows)
        assert paged_kv_cache[0].stride() == paged_kv_cache[1].stride(), "k/v strides differ"
        return self._join(self._attend(q, paged_kv_cache, [1] * rows, False, None), return_lse)


def check_seq_lens(tables: dict[str, Tensor], seq_lens: Tensor | None, page_size: int) -> None:
    if seq_lens is not None:
        pages = tables["kv_indptr"].diff().cpu()
        lengths = (pages - 1).clamp_min(0) * page_size + tables["last_page_len"].cpu()
        assert seq_lens.tolist() == lengths.tolist(), "seq_lens and the tables speak of different lengths"


PAGED = "BatchPrefillWithPagedKVCacheWrapper"
CLASSES: dict[str, type] = {
    "BatchPrefillWithRaggedKVCacheWrapper": Ragged,
    PAGED: PagedPrefill,
    "BatchAttentionWithAttentionSinkWrapper": Sinks,
    "BatchDecodeWithPagedKVCacheWrapper": Decode,
    "BatchMLAPagedAttentionWrapper": Mla,
}
