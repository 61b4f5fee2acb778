"""The habits of aiter's MLA decode over the formula (github.com/ROCm/aiter, v0.1.7.post5 to v0.1.20.post1).

* ``mla_decode_fwd`` (``aiter/mla.py``) writes ``o`` in place, and returns what it worked with. It is assembly in bf16 for
  16 and 128 heads, one query a row here, q contiguous, one kv head of 576 (``csrc/py_itfs_cu/asm_mla.cu``).
* what the assembly reads past a row's end is not known. Here it is as with aiter's other paged kernels: a tile of page
  indices, whose values are multiplied by 0.
* FP8 queries and caches come with a scale of each, ``[1]``, and in the format of the arch. A row in one piece is written
  to ``o`` by the assembly itself; how rows are cut is not emulated for FP8.
* a row without keys is 0 / 0 (``_fwd_kernel_stage2_asm``); rows of ``o`` that no row of the batch has stay as they are.
* tokens beyond 2 GiB are found by 32 bits (aiter#4452, of other kernels of the same source).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import emulated.library
import hal
from emulated.aiter import TILE, of_version, require
from emulated.attend import attend
from emulated.signatures import versions

__all__ = ["installed"]


@contextlib.contextmanager
def installed(version: str = "", library: str = "amd-aiter") -> Iterator[emulated.library.Installed]:
    """A version of aiter, the newest one by default, with its MLA decode."""
    version = version or versions(library)[-1]
    functions = of_version(library, version, {"mla_decode_fwd": _decode})
    with emulated.library.installed(library, version, functions, adapters=["hal_rocm._aiter_mla"]) as held:
        yield held


def _decode(
    *, q: Tensor, kv_buffer: Tensor, o: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor,
    kv_last_page_lens: Tensor, max_seqlen_q: int, sm_scale: float, version: hal.Version,
    num_kv_splits: int | None = None, q_scale: Tensor | None = None, kv_scale: Tensor | None = None,
) -> Any:  # fmt: skip
    pages, size, kv_heads, dim = kv_buffer.shape
    require(q.dtype == kv_buffer.dtype, "cannot get heuristic kernel!")
    require(q.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz), "unsupport Q dtype")
    factors = (1.0, 1.0)
    if q.itemsize == 1:
        require(q_scale is not None and kv_scale is not None, "fp8 Q requires q_scale and kv_scale")
        require(all(x.dtype == torch.float32 and x.shape == (1,) for x in (q_scale, kv_scale)), "float32 [1]")
        require(num_kv_splits == 1 and version.satisfies(">=0.1.12"), "what splits are merged to is not known")
        factors = float(q_scale) * float(kv_scale), float(kv_scale)
    require(q.shape[1] in (16, 128) and max_seqlen_q == 1, "cannot get heuristic kernel!")
    require(q.is_contiguous(), "only support Q.is_contiguous() for now")
    require((kv_heads, dim, o.shape[2]) == (1, 576, 512), "only support head_size == KV.size(3) for now")
    require(size == 1 and kv_last_page_lens.eq(1).all(), "page_size > 1 is not used here")
    tables = (qo_indptr, kv_indptr, kv_indices, kv_last_page_lens)
    require(all(t.dtype == torch.int32 and t.is_contiguous() for t in tables), "int32")
    require(len(qo_indptr) == len(kv_indptr) == len(kv_last_page_lens) + 1 == len(q) + 1, "not one query a row")
    require(pages * kv_buffer.stride(0) * q.itemsize <= 1 << 32, "an offset of 32 bits")
    entries = kv_buffer[:, 0]
    bounds = kv_indptr.tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        found = _row(q[row : row + 1], entries, kv_indices, begin, end - begin, sm_scale * factors[0])
        o[row] = found * factors[1]
    return o.unsqueeze(1), None


def _row(q: Tensor, entries: Tensor, indices: Tensor, begin: int, length: int, scale: float) -> Tensor:
    if not length:
        return torch.full((q.shape[1], 512), math.nan)
    read = -(-length // TILE) * TILE
    require(begin + read <= len(indices), "a tile reads outside of kv_indices")
    places = indices[begin : begin + read].long()
    require(bool(((places >= 0) & (places < len(entries))).all()), "a tile reads outside of the cache")
    keys = entries.view(torch.uint8)[places].view(entries.dtype) if entries.itemsize == 1 else entries[places]
    out, _ = attend(q, keys[:length], keys[:length, :, :512], scale=scale)
    return out[0] + (keys[length:, :, :512].float() * 0).sum(0)
