"""What a library is called with is the caller's own memory, or ``explain()`` says which tensor is copied, and when.

Each NVIDIA kernel is called in each way that might make it copy. A tensor that reaches the library in a storage of its own
must be named by a part of ``Kernel.copies_for(request)`` that is about this way; and each part of the texts must have been
needed by one of the ways, or stand in ``NOT_SEEN``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from emulated import flashinfer, hardware, nvidia, operators, signatures
from torch import Tensor

import hal
from hal import _eligibility, _plugins, testing
from hal._attention import for_step
from hal._plan import Buffers, make_step
from hal.testing._cases import tensors_of
from hal_nvidia import NvidiaPlatform, _flash
from hal_nvidia._flashinfer_pool import _idle, _zeroed
from hal_ops import Request, resolve_target

KERNELS = {kernel.name: kernel for kernel in NvidiaPlatform().kernels()}
ARCHS = ("sm_90", "sm_100", "sm_120")
FP8: dict[str, Any] = {"kv_dtype": "float8_e4m3fn"}
LENGTHS = {"prefill": ((9, 9), (5, 5)), "extend": ((9, 20), (3, 7)), "decode": ((1, 20), (1, 7))}
ROOM = 1


def same(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args


def of_queries(change: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Any, ...]]:
    """Of a paged call q is changed, which is a view more often than its caches are; of another all that is read."""

    def changed(args: tuple[Any, ...]) -> tuple[Any, ...]:
        count = 1 if dataclasses.is_dataclass(args[-1]) else len(args)
        return (*(change(x) if x.is_floating_point() else x for x in args[:count]), *args[count:])

    return changed


def gapped(x: Tensor) -> Tensor:
    """The same numbers as a view of longer rows, which begin at multiples of 16 bytes."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + 16)[..., : x.shape[-1]].copy_(x)


def apart(x: Tensor) -> Tensor:
    """The same numbers as the first tokens of longer sequences."""
    return x.new_zeros(x.shape[0], x.shape[1] + 1, *x.shape[2:])[:, : x.shape[1]].copy_(x)


def odd(x: Tensor) -> Tensor:
    """The same numbers from an address that is no multiple of 16 bytes."""
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


def longer(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1].expand(ROOM, *x.shape[1:])])


def planned_larger(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A step in a plan with room for more tokens and rows than it has."""
    *rest, step = args
    room = Buffers(step.batch + 1, step.num_tokens + ROOM, step.block_table.shape[1], torch.device("cpu"))
    return (*rest, room.fill(step))


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to call kernels. ``about``: how texts say what it copies; ``form`` and ``lengths`` are those of the op's cases.
    ``planned``: prompts are called as a plan's steps are."""

    about: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    change: Callable[..., tuple[Any, ...]] = same
    lengths: tuple[tuple[int, int], ...] = ()
    phases: tuple[str, ...] = ("prefill", "extend", "decode", "call")
    form: str = ""
    planned: bool = False


PROMPTS, PAGED, ROWS = ("prefill",), ("extend", "decode"), ("call",)
EVEN = ((9, 9), (9, 9))
WAYS = {
    "plain": Way("nothing"),
    "sinks": Way("into bfloat16", {"sinks": True}),
    "FP8 cache": Way("scale", FP8, phases=PAGED),
    "FP8 queries": Way("scale|into FP8", {**FP8, "fp8_query": True}, phases=PAGED),
    "FP8 prompts": Way("nothing", {"qkv_dtype": "float8_e4m3fn"}, phases=PROMPTS),
    "gradients": Way("masked where no key is seen", {"needs_grad": True}),
    "LSE": Way("nothing", {"return_lse": True}),
    "deterministic": Way("nothing", {"deterministic": True}, phases=(*PROMPTS, *PAGED)),
    "graph with room": Way("zeros behind the last sequence", {"graph": True}, of_queries(longer), phases=PROMPTS),
    "plan with room": Way("fewer tokens", {}, planned_larger, phases=PAGED),
    "graph of a plan with room": Way("fewer tokens", {"graph": True}, planned_larger, phases=PAGED),
    "dense": Way("nothing", form="dense", lengths=EVEN, phases=PROMPTS),
    "dense, with the LSE": Way("nothing", {"return_lse": True}, form="dense", lengths=EVEN, phases=PROMPTS),
    "planned": Way("nothing", phases=PROMPTS, planned=True),
    "planned, of one length": Way("nothing", lengths=EVEN, phases=PROMPTS, planned=True),
    "planned, with the LSE": Way("nothing", {"return_lse": True}, phases=PROMPTS, planned=True),
    "more queries": Way("see no key", lengths=((9, 4), (5, 5)), phases=PROMPTS),
    "more keys": Way("fewer queries than keys", lengths=((4, 9), (5, 5)), phases=PROMPTS),
    "one query": Way("one query", lengths=((1, 9), (1, 9)), phases=PROMPTS),
    "view": Way("contiguous", {}, of_queries(gapped), phases=(*PROMPTS, *PAGED)),
    "dense view": Way("contiguous|do not follow each other", {}, of_queries(apart), EVEN, PROMPTS, form="dense"),
    "rows apart": Way("contiguous|evenly spaced", phases=ROWS, form="strided"),
    "rows of an odd address": Way("16 bytes", {}, of_queries(odd), phases=ROWS),
    "rows apart, for weights less one": Way("evenly spaced", {"weight_offset": 1.0}, phases=ROWS, form="strided"),
}
WHATEVER = "unless out is x|the tokens'|repeats one|where there are no keys|in base 2"
"""What is copied in each of the ways."""
NAMES = {"query": "q", "q_nope": "q", "q_pe": "q", "qv": "q", "append_key": "k", "append_value": "v"}
NAMES |= {"qkv[0]": "q", "qkv[1]": "k", "qkv[2]": "v", "key": "k"}
NAMES |= {"v_a": "outs", "v_b": "outs", "s_a": "LSEs", "s_b": "LSEs", "input": "x", "cos_sin_cache": "cosines"}
"""What the contracts call the arguments of libraries."""
NOT_READ = re.compile("scale|out$|out_|workspace|buffer")
OUTPUTS = "of what comes back, which no library is called with: see test_habits.py and test_flashinfer_rows.py"
MLA_DECODE = "flashinfer_fa2.mla_decode flashinfer_fa3.mla_decode trtllm_gen.mla_decode"
NOT_SEEN = {
    "dense q, k or v whose sequences do not follow each other, where gradients of q take 2**31 numbers or more": (
        "fa2.prefill sdpa_flash.prefill",
        "the last test has them",
    ),
    "q, k or v whose strides are no multiples of 16 bytes (the library copies them)": (
        "fa4.prefill fa4.prefill_sm100 fa4.prefill_sm80 fa4.extend fa4.extend_sm100 fa4.decode fa4.decode_sm100",
        "the library itself does: see test_odd_rows.py",
    ),
    "in captured graphs before that with zeros past the step": (
        "fa3.extend fa3.decode trtllm_gen.extend trtllm_gen.decode",
        "what is made of it, in FP8, is what the library gets: see test_graph_bounds.py",
    ),
    "a block table whose width is no multiple of 128 tokens": (
        "trtllm_gen.mla_decode",
        "no numbers that are computed with: see test_trtllm_mla.py",
    ),
    "the output, where a plan of fixed size is called with more tokens than its rows have": (
        f"fa2.decode flashinfer_fa2.prefill flashinfer_fa3.prefill {MLA_DECODE}",
        OUTPUTS,
    ),
    "the output of a dense batch with more queries than keys that are causal (zeros are put before it)": (
        "sdpa_efficient.prefill",
        OUTPUTS,
    ),
    "the LSE of ragged batches (taken from rows of one length)": ("sdpa_efficient.prefill", OUTPUTS),
    "the output, where more are (zeros are put before it), and of ragged batches of unequal lengths (put together)": (
        "sdpa_cudnn.prefill",
        OUTPUTS,
    ),
    "the output of dense batches of 2**31 elements or more (put together)": ("sdpa_cudnn.prefill", OUTPUTS),
    "the result, into an out": ("flashinfer.layer_norm", OUTPUTS),
    "the results, into an out that is not q and k": ("flashinfer.rotary_embedding", OUTPUTS),
    "out, where it is given and not contiguous": ("flashinfer.silu_and_mul flashinfer.gelu_and_mul", OUTPUTS),
}
"""Parts of texts that none of the ways needs: the kernels, and why."""


@contextlib.contextmanager
def calls_of(kernel: hal.Kernel, arch: str) -> Iterator[Callable[[], list[Mapping[str, Any]]]]:
    """The kernel's library, in the newest version that it is declared for; gives what it was called with so far."""
    library = kernel.library
    with installed(kernel, arch) as held:
        if library in nvidia.OPERATORS:
            with operators.spied(importlib.import_module(f"hal_nvidia._{library}"), "forward") as calls:
                yield lambda: [dict(zip("qkv", args, strict=False)) for args, _ in calls]
        elif library == "flashinfer_sink":  # whose methods are those of the paged wrapper, and in no signature
            wrapper = importlib.import_module("flashinfer").BatchAttentionWithAttentionSinkWrapper
            with operators.spied(wrapper, "run") as calls:
                yield lambda: [dict(zip(("", "q", "caches", "sinks"), args, strict=False)) for args, _ in calls]
        else:
            yield lambda: [call.arguments for call in held.calls]
    _idle.clear()
    _zeroed.clear()


def installed(kernel: hal.Kernel, arch: str) -> Any:
    if (kernel.library, kernel.op) == ("fa3", "mla_attention"):
        return nvidia.running("fa3", libraries=nvidia.MLA)
    needs = next((n.versions for n in kernel.needs if n.library == flashinfer.LIBRARY), None)
    kept = signatures.versions(flashinfer.LIBRARY)
    fit = [v for v in kept if needs is not None and hal.Version.parse(v).satisfies(needs)]
    return nvidia.running_on(arch, kernel.library, fit[-1] if fit else "")


class Watched:
    """An implementation that keeps what it was called with."""

    def __init__(self, implementation: Any) -> None:
        self._implementation = implementation
        self.given: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._implementation, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.given.append((args, kwargs))
        return self._implementation(*args, **kwargs)


def case_of(kernel: hal.Kernel, request: Request, way: Way) -> Any:
    """Inputs of the op, or None where it has no such form."""
    make = resolve_target(str(_plugins.registry().op(kernel.op).cases))
    more = {"lengths": way.lengths or LENGTHS.get(kernel.phase), "form": way.form}
    more = {name: value for name, value in more.items() if value}
    if not more.keys() <= inspect.signature(make).parameters.keys():
        return None
    case = make(request, kernel.phase, **more)
    if way.change is same:
        return case
    return dataclasses.replace(case, args=way.change(case.args)) if hasattr(case, "args") else None


def as_step(made: Watched, case: Any) -> None:
    lens = [q_len for q_len, _ in case.lengths]
    step = make_step(lens, lens, torch.zeros(len(lens), 1, dtype=torch.int32), 16, torch.device("cpu"))
    for_step(made, step)(*case.args, **({"return_lse": True} if case.request.return_lse else {}))


def copied(kernel: hal.Kernel, arch: str, way: Way) -> tuple[Request, set[str]]:
    """The request, and the tensors that the library got in a storage of their own: none where the kernel is not for it."""
    device = hardware.device_of(arch)
    request = testing.corners(kernel, device=device, limit=1)[0]
    if kernel.phase not in way.phases or not way.fields.keys() <= {f.name for f in dataclasses.fields(request)}:
        return request, set()
    with calls_of(kernel, arch) as calls:
        request = request.replace(**way.fields)
        if [*_eligibility._fields(kernel, request), *(kernel.check(request, device) if kernel.check else ())]:
            return request, set()
        case = case_of(kernel, request, way)
        if case is None:
            return request, set()
        made, before = Watched(hardware.build(kernel, request, arch)), len(calls())
        as_step(made, case) if way.planned else case.call(made)
        own = {x.untyped_storage().data_ptr() for _, x in tensors_of([vars(case), made.given])}
        seen = [pair for call in calls()[before:] for pair in tensors_of(call)]
    assert seen
    got = (name for name, x in seen if x.is_floating_point() and x.untyped_storage().data_ptr() not in own)
    return request, {NAMES.get(name, name) for name in got if not NOT_READ.search(name)}


def parts(text: str) -> set[str]:
    return set(filter(None, text.split("; ")))


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_copied_is_declared_and_what_is_declared_is_copied(name: str) -> None:  # requirement B4
    kernel = KERNELS[name]
    undeclared, needed = [], set()
    for arch, (title, way) in itertools.product(archs_of(kernel), WAYS.items()):
        request, tensors = copied(kernel, arch, way)
        for tensor in tensors:
            about, named = re.compile(f"{way.about}|{WHATEVER}"), re.compile(rf"\b({tensor}|what)\b")
            told = {part for part in parts(kernel.copies_for(request)) if about.search(part) and named.search(part)}
            undeclared += [] if told else [f"{title} on {arch}: {tensor}"]
            needed |= told
    assert undeclared == []
    declared = parts("; ".join([*kernel.copies_with.values(), kernel.copies]))
    assert declared - needed == {part for part, (names, _) in NOT_SEEN.items() if name in names.split()}


def archs_of(kernel: hal.Kernel) -> list[str]:
    only = kernel.platforms["nvidia"].only
    return [arch for arch in ARCHS if not only or arch in only]


@pytest.mark.parametrize("name", ["fa2.prefill", "sdpa_flash.prefill"])
def test_batches_whose_gradients_lie_far_are_made_ragged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # requirement B4
    """Which copies those whose sequences do not follow each other, and others not."""
    monkeypatch.setattr(_flash, "_FAR_GRADIENTS", 1)
    kernel = KERNELS[name]
    followed = Way("", {"needs_grad": True}, same, EVEN, PROMPTS, "dense")
    request, tensors = copied(kernel, "sm_90", followed)
    assert tensors == set()
    assert copied(kernel, "sm_90", dataclasses.replace(followed, change=of_queries(apart)))[1] == {"q", "k", "v"}
    assert "q, k or v whose sequences do not follow each other" in kernel.copies_for(request)
    assert kernel.copies_for(request.replace(needs_grad=False)) == ""
