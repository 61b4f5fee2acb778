"""The example's generation with each attention library forced in turn, token for token.

Our small Llama has heads of 32 and computes in float32, which few libraries take. So its heads are made as wide as the
library needs, with zeros that change no score, and attention alone runs in the library's format. Each token that is
generated is then held against a forward pass in float32 over the same text: it must be the most probable one, or as
probable as the format can tell.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

import hal  # noqa: E402
from examples.tiny_llama.engine import Engine, Request, Sequence  # noqa: E402
from examples.tiny_llama.model import Config, HalLlama, load, read_config  # noqa: E402
from hal import _plugins  # noqa: E402
from hal_ops.attention import PHASES  # noqa: E402

PROMPTS = {"short": (40, 41), "longer": tuple(range(50, 73)), "long": tuple(range(100, 145))}
LATE = Request("late", tuple(range(200, 230)), 10)
NEW_TOKENS = 24
BOUND = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.2}
"""How far below the largest logit the chosen token's may lie; logits of this model spread over some 20."""
NO_SINK = -100.0
SHAPES = tuple(itertools.product(("float16", "bfloat16", "float32"), (32, 64, 128), (2, 8), (False, True)))
"""Format, head dim, kv heads and sinks, in the order in which they are tried."""
COMPILED = (("bfloat16", 128, 2, False), ("bfloat16", 64, 2, True))
"""The same of flashinfer's, which compiles a module for each: those that its other tests use too, with pages of 16."""


class Widened:
    """A handle for heads that are wider, perhaps in another format and without groups, under the model's own shapes."""

    def __init__(self, handle: hal.Attention, config: Config) -> None:
        self.handle, self.device = handle, handle.device
        self._dim = config.head_dim
        self._more = handle.request.head_dim - config.head_dim
        self._copies = handle.request.num_kv_heads // config.num_kv_heads
        self._dtype = getattr(torch, handle.request.dtype)
        place = handle.device.torch_device()
        self._sinks = torch.full((config.num_q_heads,), NO_SINK, device=place) if handle.request.sinks else None
        self.phases: set[str] = set()

    def allocate_kv_cache(self, num_pages: int) -> hal.KVCache:
        return self.handle.allocate_kv_cache(num_pages)

    def plan(self, **lengths: Any) -> hal.Plan:
        plan = self.handle.plan(**lengths)
        self.phases.add(plan.phase)
        return plan

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        three = (q, *(x.repeat_interleave(self._copies, -2) for x in (k, v)))
        wide = (functional.pad(x, (0, self._more)).to(self._dtype) for x in three)
        more = {} if self._sinks is None else {"sinks": self._sinks}
        out: Tensor = self.handle(*wide, **given, **more)
        return out[..., : self._dim].to(q.dtype)


def forced(kernels: Mapping[str, str], device: hal.Device, scale: float, compiled: bool) -> hal.Attention | str:
    """A handle with these kernels, for the first shape that they take; else why they take none.

    The force comes from the variables that a user would set (see the test), so that it is checked as a user's is.
    """
    why = ""
    for dtype, dim, kv_heads, sinks in COMPILED if compiled else SHAPES:
        try:
            found = hal.get_attention(
                num_q_heads=8, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype, sinks=sinks, softmax_scale=scale,
                device=device, **({"page_size": 16} if compiled else {}),
            )  # fmt: skip
        except hal.errors.NoKernelError as error:
            why = why or str(error)
            continue
        assert {p: found.kernels()[p] for p in kernels} == dict(kernels), "a forced choice was replaced"
        return found
    return why


def generate(model: HalLlama) -> dict[str, Sequence]:
    """Requests of different lengths, one of which comes while others run: steps of all three phases."""
    page = model.attn.handle.request.page_size  # type: ignore[attr-defined]
    engine = Engine(model, num_pages=max(16, 4 * 96 // page), page_size=page, token_budget=64)
    for name, prompt in PROMPTS.items():
        engine.submit(Request(name, prompt, NEW_TOKENS))
    finished: dict[str, Sequence] = {}
    for step in range(6 + NEW_TOKENS + LATE.max_new_tokens):
        if step == 6:
            engine.submit(LATE)
        finished |= {seq.request.name: seq for seq in engine.step().finished}
    return finished


def logits_of(model: HalLlama, tokens: list[int]) -> Tensor:
    """What follows each token, computed for the whole text at once by the prefill phase: ``[len, vocab]``."""
    text = torch.tensor(tokens, device=model.embed.weight.device)
    return model.logits(model.forward_full(text[None])[0]).cpu()


def right_logits(tokens: list[int]) -> Tensor:
    """The same in float32, by the reference on the host."""
    shape: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 32, "dtype": torch.float32}
    return logits_of(load(hal.get_attention(**shape, phases="prefill", device="cpu", kernel="reference")), tokens)


def behind(logits: Tensor, chosen: Tensor) -> Tensor:
    """How far each chosen token's logit lies below the largest."""
    return logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]


def check(handle: hal.Attention) -> set[str]:
    """Generate, and hold every token; returns the phases that ran."""
    attn, bound = Widened(handle, read_config()), BOUND[handle.request.dtype]
    model = load(attn)  # type: ignore[arg-type]
    finished = generate(model)
    wanted = {**dict.fromkeys(PROMPTS, NEW_TOKENS), LATE.name: LATE.max_new_tokens}
    assert {name: len(seq.generated) for name, seq in finished.items()} == wanted
    for name, sequence in finished.items():
        tokens, start = sequence.tokens, len(sequence.request.prompt)
        right = right_logits(tokens)
        gap = behind(right[start - 1 : -1], torch.tensor(sequence.generated))
        assert gap.max() <= bound, f"{name}: token {int(gap.argmax())} lies {gap.max():.3g} behind"
        whole = behind(right, logits_of(model, tokens).argmax(-1))
        assert whole.max() <= bound, f"{name} at once: token {int(whole.argmax())} lies {whole.max():.3g} behind"
    return attn.phases | {"prefill"}


def libraries() -> list[Any]:
    """Every registered attention library with its phases; flashinfer's, which are compiled on first use, say so."""
    found: dict[str, dict[str, str]] = {}
    for kernel in _plugins.registry().kernels.values():
        if kernel.op == "attention":
            library = kernel.library
            found.setdefault(library, {})[kernel.phase] = library
    return [
        pytest.param(
            name, tuple(p for p in PHASES if p in phases), id=f"flashinfer-{name}" if _is_compiled(name) else name
        )
        for name, phases in sorted(found.items())
    ]


def _is_compiled(library: str) -> bool:
    kernels = (k for k in _plugins.registry().kernels.values() if (k.op, k.library) == ("attention", library))
    return any(need.library == "flashinfer-python" for kernel in kernels for need in kernel.needs)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def force(library: str, phases: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """``HAL_ATTENTION`` for a library of all phases, else the variable of each phase that it has."""
    names = ["HAL_ATTENTION"] if set(phases) == set(PHASES) else [f"HAL_ATTENTION_{phase.upper()}" for phase in phases]
    for name in names:
        monkeypatch.setenv(name, library)
    hal.reset()


def run(library: str, phases: tuple[str, ...], device: hal.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    force(library, phases, monkeypatch)
    kernels = {p: k.name for p in phases for k in [_offered(library, p, device)] if k is not None}
    if len(kernels) < len(phases):
        pytest.skip(f"{library} has no {'/'.join(phases)} for {device.arch.name}")
    found = forced(kernels, device, read_config().head_dim ** -0.5, _is_compiled(library))
    if isinstance(found, str):
        pytest.skip(found)
    assert set(phases) <= check(found)


def _offered(library: str, phase: str, device: hal.Device) -> hal.Kernel | None:
    """The declaration of a library's phase that is for this arch; there may be one a family."""
    for kernel in _plugins.registry().kernels.values():
        if kernel.op == "attention" and (kernel.library, kernel.phase) == (library, phase):
            archs = kernel.platforms.get(device.platform) if kernel.platforms else hal.Archs()
            if archs is not None and (not archs.only or device.arch.name in archs.only):
                return kernel
    return None


@pytest.mark.gpu
@pytest.mark.parametrize(("library", "phases"), libraries())
def test_the_tokens_are_right_with_each_library(
    library: str, phases: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:  # requirement A5, B1, C1, P27, P34
    run(library, phases, hal.device(), monkeypatch)


@pytest.mark.parametrize("library", ["torch_cpu", "reference"])
def test_the_tokens_are_right_on_the_host(library: str, monkeypatch: pytest.MonkeyPatch) -> None:  # requirement A5, C1
    host = next(d for d in hal.devices() if d.platform == "cpu")
    run(library, tuple(PHASES), host, monkeypatch)


@pytest.mark.parametrize("change", [{"softmax_scale": 0.5}, {"window": 4}, {"causal": False}])
def test_a_wrong_attention_is_seen(change: dict[str, Any]) -> None:
    """A scale, a window and a mask that the model does not have."""
    scale = {"softmax_scale": read_config().head_dim ** -0.5, **change}
    handle = hal.get_attention(num_q_heads=8, num_kv_heads=2, head_dim=64, dtype="float32", device="cpu", **scale)
    with pytest.raises(AssertionError, match="behind"):
        check(handle)


@pytest.mark.parametrize(("dtype", "dim", "kv_heads", "sinks"), [*SHAPES[::5], COMPILED[1]])
def test_wider_heads_change_nothing(dtype: str, dim: int, kv_heads: int, sinks: bool) -> None:
    """Zeros behind each head, copies of kv heads, sinks of next to no weight, and each format."""
    handle = hal.get_attention(
        num_q_heads=8, num_kv_heads=kv_heads, head_dim=dim, dtype=dtype, sinks=sinks, device="cpu",
        softmax_scale=read_config().head_dim**-0.5,
    )  # fmt: skip
    assert check(handle) == set(PHASES)
