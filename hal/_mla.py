"""Latent attention handles (DeepSeek's MLA): the chosen kernels of one request, bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hal import _devices, _front, _kept, _same, _selection, _settings
from hal._argument_kinds import check_step_kinds
from hal._attention import Attention
from hal._bind import bind
from hal._device import Device
from hal._inputs import check_pages
from hal._mla_cache import MlaCache, allocate, check_cache, check_tensors
from hal._padding import lengthened
from hal._plan import Plan
from hal._planner import Planner
from hal._rows import strictest
from hal._selection import Selection
from hal.errors import InputError
from hal_ops import AUTO, Request, torch_dtype
from hal_ops.kv_cache import KvCacheWriteRequest
from hal_ops.mla_attention import PHASES, MlaAttentionRequest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MlaAttention", "get_mla_attention"]


class MlaAttention(Planner):
    """Latent attention for one request on one device. Made by :func:`hal.get_mla_attention`.

    ``request`` is the decided request, ``device`` the device, ``selection`` the decision with every reason.
    ``prefill`` is a :class:`hal.Attention` for fresh tokens whose keys and values were projected a head each.
    """

    def __init__(
        self,
        selection: Selection,
        implementations: Mapping[str, Any],
        write_selection: Selection,
        write: Any,
        prefill: Attention,
        *,
        debug_checks: bool,
    ) -> None:
        assert isinstance(selection.request, MlaAttentionRequest)
        self.selection = selection
        self.request: MlaAttentionRequest = selection.request
        self.device: Device = selection.device
        self.prefill: Attention = prefill
        self._implementations = dict(implementations)
        self._write_selection = write_selection
        self._write = write
        self._debug_checks = debug_checks
        self._torch_device = selection.device.torch_device()
        self._dtype = torch_dtype(self.request.dtype)
        self._max_q_len = self.request.max_q_len
        self._graph = self.request.graph
        self._rank = self.request.kv_lora_rank
        self._strictest = strictest(selection)
        self._known_step: tuple[_same.Same, int, int, Any] = (_same.never, 0, 0, None)

    def __call__(
        self, q: Tensor, latent: Tensor | None = None, *, cache: MlaCache, plan: Plan, return_lse: bool = False
    ) -> Any:
        """Attend to the cache.

        Args:
            q: ``[tokens, num_q_heads, kv_lora_rank + qk_rope_head_dim]``: the part with the key projection absorbed,
                then the rotated part.
            latent: this step's entries, ``[tokens, kv_lora_rank + qk_rope_head_dim]`` (normed latent, then rotated
                key); written to the cache first. Without it they are taken to be there already.
            return_lse: also return the natural-log LSE, float32 ``[tokens, num_q_heads]``, if the request has it.

        Returns:
            ``[tokens, num_q_heads, kv_lora_rank]`` in q's dtype, to be projected to values; or ``(output, lse)``.

        Raises:
            InputError: an argument that does not fit, before anything is written.
            PlanMismatchError: the plan was made by another handle.
        """
        if return_lse and not self.request.return_lse:
            raise InputError(
                "return_lse=True was not in the request: ask for it with get_mla_attention(return_lse=True)"
            )
        tensors = {"q": q} if latent is None else {"q": q, "latent": latent}
        self._check(tensors, cache, plan)
        if latent is not None:
            self._put(latent, cache, plan)
        count, real = q.shape[0], plan._step.num_tokens
        cut = plan._buffers is not None and count != real and not self.request.graph
        found = plan._run(
            q[:real] if cut else q,
            cache.data,
            plan._step,
            plan._payload,
            kv_scale=cache.kv_scale,
            return_lse=return_lse,
        )
        return lengthened(found, count) if cut else found

    def write(self, latent: Tensor, *, cache: MlaCache, plan: Plan) -> None:
        """Write this step's entries to the cache and attend to nothing: for prompts that ``prefill`` attends to.

        Raises:
            InputError, PlanMismatchError: as for a call.
        """
        self._check({"latent": latent}, cache, plan)
        self._put(latent, cache, plan)

    def _put(self, latent: Tensor, cache: MlaCache, plan: Plan) -> None:
        slots = plan._step.slot_mapping
        entry, rank = latent.unsqueeze(1), self._rank
        if plan._buffers is not None:
            slots = slots[: latent.shape[0]]
        self._write(
            entry[..., :rank],
            entry[..., rank:],
            *cache.parts(rank),
            slots,
            k_scale=cache.kv_scale,
            v_scale=cache.kv_scale,
        )

    def _check(self, tensors: Mapping[str, Tensor], cache: MlaCache, plan: Plan) -> None:
        if not isinstance(plan, Plan) or not isinstance(cache, MlaCache):
            check_step_kinds(plan, cache, MlaCache)
        plan.check_owner(self)
        if cache._checked_by is not self:
            check_cache(self, cache)
            cache._checked_by = self
        given = tensors.values()
        same, count, tokens, buffers = self._known_step
        if (count, tokens) != (len(given), plan.num_tokens) or buffers is not plan._buffers or not same(*given):
            sizes = [plan.num_tokens] if plan._buffers is None else [plan.num_tokens, plan._buffers.sizes["max_tokens"]]
            check_tensors(self, tensors, sizes)
            if not (self._debug_checks or _same.learnt(*given)):
                self._known_step = _same.like(*given), len(given), plan.num_tokens, plan._buffers
        if self._debug_checks:
            check_pages(plan._step, cache)

    def _page_size(self) -> int:
        return int(self.request.page_size)

    def allocate_kv_cache(self, num_pages: int, *, kv_scale: Any = None) -> MlaCache:
        """A zero-filled cache for one layer, in this request's page size and format.

        Args:
            num_pages: pages.
            kv_scale: for an FP8 cache, what its entries are stored divided by: a number or a tensor of one element.

        Raises:
            InputError: ``num_pages`` is below 1, or there is a scale for a cache that has none.
        """
        return allocate(self, num_pages, kv_scale)

    def explain(self) -> str:
        """Why these kernels, and why not each of the others; those of the cache write and of ``prefill`` too."""
        return "\n\n".join([self.selection.explain(), self._write_selection.explain(), self.prefill.explain()])

    def receipt(self) -> dict[str, Any]:
        """The decision as JSON-ready data; see :func:`hal.write_lock`."""
        return self.selection.receipt()

    def implementation(self, phase: str) -> Any:
        """The chosen kernel's own callable for a phase, without any check; see ``hal_ops.mla_attention.contract``.

        Raises:
            InputError: the handle was not made for this phase.
        """
        if phase not in self._implementations:
            raise InputError(f"this handle was made for {', '.join(self._implementations)}, not for {phase!r}")
        return self._implementations[phase]

    def kernels(self) -> dict[str, str]:
        """Phase to the name of its kernel; ``"prefill"`` is of ``prefill``, ``"write"`` the cache write."""
        names = {p: name for p, name in self.selection.kernels().items() if name is not None}
        return {**self.prefill.kernels(), **names, "write": str(self._write_selection.kernels()["call"])}

    def __repr__(self) -> str:
        names = ", ".join(f"{p} {name}" for p, name in self.kernels().items())
        return f"<hal.MlaAttention of {self.request.describe()} on {self.device.id}: {names}>"


def get_mla_attention(
    *,
    num_q_heads: int,
    kv_lora_rank: int = 512,
    qk_rope_head_dim: int = 64,
    qk_nope_head_dim: int = 128,
    v_head_dim: int = 128,
    dtype: Any = "bfloat16",
    kv_dtype: Any = AUTO,
    fp8_query: bool = False,
    page_size: int | str = AUTO,
    max_q_len: int = 1,
    softmax_scale: float | None = None,
    causal: bool = True,
    return_lse: bool = False,
    deterministic: bool = False,
    graph: bool = False,
    phases: Sequence[str] | None = None,
    device: Any = None,
    kernel: Any = None,
) -> MlaAttention:
    """Multi-head latent attention for this machine: over a paged cache of latents, and, expanded, over fresh tokens.

    Equal requests give the same handle, however they are written. The defaults are the dims of DeepSeek-V2 and DeepSeek-V3.

    Args:
        num_q_heads: query heads on this device. kv_lora_rank, qk_rope_head_dim: elements of the latent and of the
            rotated key of a token. qk_nope_head_dim, v_head_dim: elements a head before absorption.
        dtype: of q, of the latents and of the output. kv_dtype: of the cache; default ``dtype``; ``"fp8"`` is the
            device's e4m3 flavour.
        fp8_query: permits kernels to round q and the probabilities to the format of an FP8 cache: faster, less exact.
        page_size: tokens a page; ``"auto"`` chooses.
        max_q_len: most query tokens a row of a decode step (above 1 for speculative decoding).
        softmax_scale: default ``1 / sqrt(qk_nope_head_dim + qk_rope_head_dim)``.
        causal: aligned to the end of the keys.
        return_lse: calls may ask for the LSE. deterministic: the same input gives the same bits.
        graph: calls can be captured in a device graph; those of ``prefill`` need not be.
        phases: those that will be used, of ``"extend"``, ``"decode"``; default both.
        device: anything :func:`hal.device` takes; default: the default device.
        kernel: forces a kernel or library by name, or one a phase by a mapping; obeyed or refused, never replaced. It
            does not force the kernels of ``prefill``.

    Raises:
        ValueError: a value that no kernel could honour.
        NoKernelError: no kernel can serve the request, or what is forced cannot; the text says why, and what to change.
        UnknownKernelError, DeviceError, SettingError, LockError: as their names say.
    """
    fields = dict(locals())
    where, forced = fields.pop("device"), fields.pop("kernel")
    fields["phases"] = PHASES if phases is None else (phases,) if isinstance(phases, str) else tuple(phases)

    def make(request: Request) -> MlaAttention:
        return _make(request, _devices.device(where), forced)

    kept: MlaAttention = _kept.handle("latent", fields, where, forced, lambda: MlaAttentionRequest(**fields), make)
    return kept


def _make(request: Request, device: Device, kernel: Any) -> MlaAttention:
    selection, made = bind(lambda: _selection.select(request, device=device, kernel=kernel))
    _kept.keep_receipt(selection)
    decided = selection.request
    assert isinstance(decided, MlaAttentionRequest)
    wanted = write_request(decided)
    write_selection, written = bind(lambda: _selection.select(wanted, device=device))
    _kept.keep_receipt(write_selection)
    expanded = decided.expanded()
    prefill = _front._attention(lambda: _selection.select(expanded, device=device), False)
    debug = _settings.current()["debug_checks"]
    return MlaAttention(selection, made, write_selection, written["call"], prefill, debug_checks=debug)


def write_request(request: MlaAttentionRequest) -> KvCacheWriteRequest:
    """The cache write of a handle whose request was decided to be this one."""
    return KvCacheWriteRequest(
        num_kv_heads=1,
        head_dim=request.kv_lora_rank,
        v_head_dim=request.qk_rope_head_dim,
        dtype=request.dtype,
        kv_dtype=request.kv_dtype,
        page_size=int(request.page_size),
        kv_layout="NHD",
        graph=request.graph,
        deterministic=request.deterministic,
    )
