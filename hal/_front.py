"""The front doors: ``get_attention``, ``get_attentions`` and ``get_op``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hal import _devices, _kept, _plugins, _selection, _settings
from hal._attention import Attention, check_needs_cache
from hal._bind import bind
from hal._device import Device
from hal._in_process import InProcess
from hal._kept import receipts as receipts
from hal._selection import Selection
from hal.errors import InputError, did_you_mean
from hal_ops import AUTO, Request
from hal_ops.attention import AttentionRequest
from hal_ops.kv_cache import KvCacheWriteRequest

__all__ = ["BoundOp", "get_attention", "get_attentions", "get_op", "receipts"]


def get_attention(
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: Any = "bfloat16",
    kv_dtype: Any = AUTO,
    causal: bool = True,
    window: Any = None,
    softcap: float | None = None,
    sinks: bool = False,
    alibi: bool = False,
    softmax_scale: float | None = None,
    page_size: int | str = AUTO,
    kv_layout: str = AUTO,
    kv_scale: str = "tensor",
    fp8_query: bool = False,
    qkv_dtype: Any = None,
    qkv_scale: str = "tensor",
    max_q_len: int = 1,
    return_lse: bool = False,
    deterministic: bool = False,
    needs_grad: bool = False,
    graph: bool = False,
    phases: Sequence[str] | None = None,
    device: Any = None,
    kernel: Any = None,
    compile: bool = False,  # noqa: A002 - torch's word for it
) -> Attention:
    """Attention for this machine: the best kernels that are installed and compute the right thing, bound.

    All choosing happens here; the handle only calls. Equal requests give the same handle, however they are written.

    Args:
        num_q_heads, num_kv_heads: heads. head_dim, v_head_dim: elements a head; the second defaults to the first.
        dtype: of q, k, v and the output (a ``torch.dtype`` or its name).
        kv_dtype: of the cache; default ``dtype``; ``"fp8"`` is the device's own e4m3 format.
        causal: aligned to the end of the keys. window: ``(left, right)`` tokens beside the diagonal, inclusive, None
            unlimited; an int ``W`` is W keys, itself included.
        softcap: ``cap * tanh(score / cap)`` on scaled scores. sinks, alibi: the tensors are passed at the call.
        softmax_scale: default ``1 / sqrt(head_dim)``.
        page_size, kv_layout: of the cache; ``"auto"`` chooses what suits all phases best.
        kv_scale: scales of an FP8 cache, one a ``"tensor"`` or a ``"head"``.
        fp8_query: permits kernels to round q and the probabilities to the format of an FP8 cache: faster, less exact.
        qkv_dtype: of q, k and v in calls without a cache, if they are FP8; the output keeps ``dtype``. ``qkv_scale``: their
            scales, passed at the call, one a ``"tensor"`` or a ``"head"``. The default phases are then prefill alone.
        max_q_len: most query tokens a row of a decode step (above 1 for speculative decoding).
        return_lse: calls may ask for the LSE. deterministic: the same input gives the same bits.
        needs_grad: calls are differentiable (and the default phases are then prefill alone).
        graph: calls can be captured in a device graph.
        phases: those that will be used, of ``"prefill"``, ``"extend"``, ``"decode"``; default all.
        device: anything :func:`hal.device` takes; default: the default device.
        kernel: forces a kernel or library by name, or one a phase by a mapping; obeyed or refused, never replaced.
        compile: a call is one node in what ``torch.compile(fullgraph=True)`` traces, whatever the kernel is made of,
            its backward too; caches and plans are passed as in any call, and another plan compiles nothing anew.

    Raises:
        ValueError: a value that no kernel could honour.
        NoKernelError: no kernel can serve the request, or what is forced cannot; the text says why, and what to change.
        UnknownKernelError, DeviceError, SettingError, LockError: as their names say.
    """
    fields = dict(locals())
    where, forced, traced = fields.pop("device"), fields.pop("kernel"), fields.pop("compile")
    fields["phases"] = phases if phases is None or isinstance(phases, str) else tuple(phases)

    def make(request: Request) -> Attention:
        return _attention(lambda: _selection.select(request, device=where, kernel=forced), traced, forced)

    kept: Attention = _kept.handle(_kind(traced), fields, where, forced, lambda: AttentionRequest(**fields), make)
    return kept


def get_attentions(
    layers: Sequence[Any],
    *,
    device: Any = None,
    kernel: Any = None,
    compile: bool = False,  # noqa: A002 - torch's word for it
) -> tuple[Attention, ...]:
    """Attention for layers that share one pool of pages: a handle each, with one page size, KV layout and KV dtype.

    ``layers`` holds mappings of :func:`get_attention`'s arguments, or ``AttentionRequest`` objects; ``device``, ``kernel``
    and ``compile`` are as there.

    What one layer names of these, layers that leave it open get too. Layers with equal requests share one handle.

    Raises:
        InputError: layers that ask for different page sizes, layouts or KV dtypes; the clash is named.
        NoKernelError: some layer cannot be served.
    """
    requests = _with_common([x if isinstance(x, AttentionRequest) else AttentionRequest(**x) for x in layers])
    where = _devices.device(device)

    def decide() -> list[Selection]:
        return list(_selection.select_together(requests, device=where, kernel=kernel))

    decided = decide()

    def decisions(i: int) -> Iterator[Selection]:
        """Of layer i: the common one, and others if its kernels turn out to be broken."""
        yield decided[i]
        while True:
            decided[:] = decide()
            yield decided[i]

    made: dict[AttentionRequest, Attention] = {}
    for i, request in enumerate(requests):
        if request not in made:
            made[request] = _attention(functools.partial(next, decisions(i)), compile, kernel)
    return tuple(made[request] for request in requests)


def _with_common(requests: Sequence[AttentionRequest]) -> list[AttentionRequest]:
    """The requests with what one layer names of the cache they share in the place of what others leave open."""
    paged = [(i, r) for i, r in enumerate(requests) if check_needs_cache(r)]
    named: dict[str, Any] = {}
    for field in ("page_size", "kv_layout", "kv_dtype"):
        asked: dict[Any, list[int]] = {}
        for i, request in paged:
            if getattr(request, field) != AUTO:
                asked.setdefault(getattr(request, field), []).append(i)
        if len(asked) > 1:
            clash = "; ".join(f"{value!r} by layers {', '.join(map(str, which))}" for value, which in asked.items())
            raise InputError(f"the layers share one cache and ask for different {field}: {clash}")
        named.update((field, value) for value in asked)
    return [_filled(request, named) for request in requests]


def _filled(request: AttentionRequest, named: Mapping[str, Any]) -> AttentionRequest:
    given = {name: value for name, value in named.items() if getattr(request, name) == AUTO}
    return request.replace(**given) if given and check_needs_cache(request) else request


def _kind(traced: bool) -> str:
    return "attention, traced" if traced else "attention"


def _attention(decide: Callable[[], Selection], traced: bool, kernel: Any = None) -> Attention:
    first = [decide()]

    def make() -> tuple[Selection, Attention]:
        selection, made = bind(lambda: first.pop() if first else decide())
        return selection, _bound(selection, made, traced)

    found: Attention = _kept.together(_kind(traced), first[0], kernel, make)
    return found


def _bound(selection: Selection, made: Mapping[str, Any], traced: bool) -> Attention:
    _kept.keep_receipt(selection)
    write_selection, write = None, None
    decided = selection.request
    assert isinstance(decided, AttentionRequest)
    if check_needs_cache(decided):
        wanted = write_request(decided)
        write_selection, written = bind(lambda: _selection.select(wanted, device=selection.device))
        _kept.keep_receipt(write_selection)
        write = written["call"]
    debug = _settings.current()["debug_checks"]
    kind = Attention
    if traced:
        from hal._compile_attention import TracedAttention as kind  # noqa: N813
    return kind(selection, made, write_selection, write, debug_checks=debug)


def write_request(request: AttentionRequest) -> KvCacheWriteRequest:
    """The cache write of a handle whose request was decided to be this one."""
    return KvCacheWriteRequest(
        num_kv_heads=request.num_kv_heads,
        head_dim=request.head_dim,
        v_head_dim=request.v_head_dim,
        dtype=request.dtype,
        kv_dtype=request.kv_dtype,
        page_size=int(request.page_size),
        kv_layout=request.kv_layout,
        kv_scale=request.kv_scale,
        graph=request.graph,
        deterministic=request.deterministic,
    )


class BoundOp(InProcess):
    """An op of one phase, bound: call it, or take ``fn``, the chosen kernel's function with the checks of its op."""

    _instead = "send its arguments, and ask for the op where it is used (equal requests give the same handle)"
    __slots__ = ("__weakref__", "device", "fn", "request", "selection")

    def __init__(self, selection: Selection, fn: Any) -> None:
        self.selection: Selection = selection
        self.request: Request = selection.request
        self.device: Device = selection.device
        self.fn: Any = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.fn(*args, **kwargs)

    def explain(self) -> str:
        """Why this kernel, and why not each of the others."""
        return self.selection.explain()

    def receipt(self) -> dict[str, Any]:
        """The decision as JSON-ready data."""
        return self.selection.receipt()

    def __repr__(self) -> str:
        return f"<hal.BoundOp {self.selection.op.name} on {self.device.id}: {self.selection.kernels()['call']}>"


def get_op(
    name: str,
    *,
    device: Any = None,
    kernel: Any = None,
    compile: bool = False,  # noqa: A002 - torch's word for it
    **fields: Any,
) -> BoundOp:
    """An op other than attention, bound the same way: ``hal.get_op("rms_norm", hidden_size=4096)``.

    ``fields`` are those of the op's request (``hal kernels`` and the docs list them). With ``compile=True`` the call is
    one node in what ``torch.compile(fullgraph=True)`` traces, whatever the kernel is made of.

    Raises:
        UnknownOpError: no op of that name. TypeError: a field that the op's request does not have, with the nearest.
        NoKernelError: no kernel can serve the request, or what is forced cannot.
        InputError: with ``compile=True``: the op's contract has no schema, or it works in place and needs gradients.
    """

    def ask() -> Request:
        op = _plugins.registry((name,), "portable").op(name)  # the contract is all it takes
        if op.phases != ("call",):
            raise TypeError(f"op {name!r} has phases {', '.join(op.phases)}: use hal.get_attention() or hal.select()")
        return _request(op.request, name, fields)

    def make(request: Request) -> BoundOp:
        return _op(lambda: _selection.select(request, device=device, kernel=kernel), compile)

    written = {"op": name, "fields": tuple(fields.items())}
    kept: BoundOp = _kept.handle("op, traced" if compile else "op", written, device, kernel, ask, make)
    return kept


def _op(decide: Callable[[], Selection], traced: bool) -> BoundOp:
    from hal._checked import checked, keeps_gradients

    selection, made = bind(decide)
    _kept.keep_receipt(selection)
    fn = checked(selection, made["call"])
    return BoundOp(selection, keeps_gradients(selection, _traceable(selection, fn) if traced else fn))


def _traceable(selection: Selection, fn: Any) -> Any:
    from hal._compile import traceable

    return traceable(selection, fn)


def _request(cls: type[Request], name: str, fields: Mapping[str, Any]) -> Request:
    known = [f.name for f in dataclasses.fields(cls)]
    for field in fields:
        if field not in known:
            raise TypeError(
                f"op {name!r} has no field {field!r}.{did_you_mean(field, known)} Fields: {', '.join(known)}"
            )
    return cls(**fields)
