"""``trtllm_fmha_v2_prefill`` behind the attention contract: fresh keys, Q, K and V apart (sm_12x)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

import hal
from hal_nvidia import _flashinfer_pool as pool
from hal_nvidia._flash import nothing, sequences_of
from hal_nvidia._grid import refuse_wide
from hal_ops.attention import AttentionRequest, Step, with_lengths

__all__ = ["fmha_v2_prefill"]


def fmha_v2_prefill(request: AttentionRequest, device: hal.Device) -> _FmhaV2:
    """The prefill phase."""
    return _FmhaV2(request, device)


class _FmhaV2:
    """Lengths stay on the device; a dense call's are made there.

    What a query without keys gets is anybody's guess, and is set to 0 where there may be one: not in a dense call with
    enough keys, nor in a planned step, whose keys are its queries' own.

    The library wants a bound on the keys that is not below that on the queries, and asserts it where that is compiled in
    (``fmha_v2_run.cu``, flashinfer 0.6.13 to 0.7.4). So it gets one: lengths are read on the device, where a row's queries
    begin at its keys less its queries, and those before 0 are masked (``..._noloop_tiled.h``, ``q_sequence_start``).

    Its kernels for sm_12x write nothing to the work buffer, which graphs may therefore share with eager calls.
    """

    def __init__(self, request: AttentionRequest, device: hal.Device, *, all_see: bool = False) -> None:
        self._request, self._device, self._all_see = request, device, all_see
        self._function = importlib.import_module("flashinfer.prefill").trtllm_fmha_v2_prefill
        self._place = device.torch_device()
        self._scale = request.softmax_scale
        self._causal = request.causal

    def for_step(self, step: Step) -> Any:
        """The same for a step whose keys are its queries' own."""
        return with_lengths(_FmhaV2(self._request, self._device, all_see=True), step)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        if not q.numel() or not k.numel():
            return nothing(q, v.shape[-1], False)
        if cu_seqlens_q is None or cu_seqlens_k is None:
            lengths = self._even(q.shape[0], q.shape[1]), self._even(q.shape[0], k.shape[1])
            out = self._attend(
                q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *lengths, q.shape[1], k.shape[1], sinks,
                all_see=q.shape[1] <= k.shape[1],
            )  # fmt: skip
            return out.view(*q.shape[:2], *out.shape[1:])
        return self._attend(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sinks, all_see=self._all_see
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: Any, max_k: Any, sinks: Tensor | None,
        *, all_see: bool,
    ) -> Tensor:  # fmt: skip
        refuse_wide(cu_q.shape[0] - 1, "fmha_v2")
        out: Tensor = self._function(
            (q.contiguous(), k.contiguous(), v.contiguous()),  # read by their shapes; declared in Kernel.copies
            "SEPARATE_Q_K_V",
            pool.for_functions(self._place, pool.stream_of(self._place)),
            cu_k.diff(),
            max_q_len=max_q,
            max_kv_len=max(max_q, max_k),
            bmm1_scale=self._scale,
            bmm2_scale=1.0,
            batch_size=cu_q.shape[0] - 1,
            cum_seq_lens_q=cu_q,
            cum_seq_lens_kv=cu_k,
            sinks=sinks,
            mask_mode="causal" if self._causal else "padding",
        )
        if all_see:
            return out
        return out.masked_fill_(_unseeing(cu_q, cu_k, q.shape[0], self._causal).view(-1, 1, 1), 0.0)

    def _even(self, batch: int, length: int) -> Tensor:
        """Cumulative lengths of a dense batch, made on the device."""
        return torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=self._place)


def _unseeing(cu_q: Tensor, cu_k: Tensor, tokens: int, causal: bool) -> Tensor:
    """Whether a token sees no key, bool ``[tokens]``, from lengths on the device and without waiting for it."""
    q_lens, kv_lens = cu_q.diff(), cu_k.diff()
    blind = (q_lens - kv_lens).clamp_min(0) if causal else q_lens * (kv_lens == 0)
    numbers = torch.arange(tokens, device=cu_q.device, dtype=cu_q.dtype)
    rows = sequences_of(numbers, cu_q)
    return numbers - cu_q[rows] < blind[rows]
