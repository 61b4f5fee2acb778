"""A check finds what is wrong with a kernel, whatever it is, and passes what is right."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

import hal
from hal import _plugins
from hal.errors import DeviceError, InputError
from hal.testing import check, corners
from hal.testing._capture import capture_problems
from hal.testing._verify import circumstances, refusals
from hal_ops.attention import AttentionRequest
from hal_ops.kv_cache import KvCacheWriteRequest

torch = pytest.importorskip("torch")

Make = Callable[..., Any]
FEATURES: dict[str, hal.Constraint] = {
    "softcap": hal.Range(0, None, (5.0,)),
    "sinks": hal.OneOf(False, True),
    "alibi": hal.OneOf(False, True),
    "window": hal.Windows(),
    "softmax_scale": hal.Anything((0.5,)),
    "return_lse": hal.OneOf(False, True),
    "deterministic": hal.OneOf(False, True),
    "needs_grad": hal.OneOf(False, True),
    "graph": hal.OneOf(False, True),
    "num_q_heads": hal.Anything((2,)),
    "num_kv_heads": hal.Anything((1,)),
    "kv_dtype": hal.Anything(),
}


@pytest.fixture
def result(spoiled: Make, small: Make, fake_platform: Make) -> Make:
    """Check a kernel that is spoiled in one way, for a small request."""

    def run(name: str, spoil: Any, **fields: Any) -> hal.testing.Result:
        kernel = spoiled(name, spoil, fields=FEATURES)
        fake_platform(kernels=[kernel])
        found: hal.testing.Result = check(kernel.name, small(name.rpartition(".")[2], **fields))
        return found

    return run


def right(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    return right(*args, **kwargs)


@pytest.mark.parametrize("phase", ["prefill", "extend", "decode"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "float16", "softcap": 5.0, "sinks": True},
        {"window": (3, 0), "return_lse": True, "deterministic": True},
        {"alibi": True, "causal": False, "softmax_scale": 0.5, "dtype": "float32"},
    ],
    ids=str,
)
def test_a_right_kernel_passes(result: Make, phase: str, fields: dict[str, Any]) -> None:  # requirement X11, P25
    found = result(f"good.{phase}", right, **fields)
    assert found.ok, str(found)
    assert found.status == "verified"
    assert 0 < found.max_error < 0.1
    assert found.detail.startswith("max error ")


def zeros(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.zeros_like(right(*args, **kwargs))


def one_head_off(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    out = right(*args, **kwargs)
    out[..., 1, :] *= 1.2
    return out


def last_row_off(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    out = right(*args, **kwargs)
    out[-1] = 0
    return out


def half_the_shape(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    return right(*args, **kwargs)[..., :-1]


def other_dtype(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    return right(*args, **kwargs).float()


def scribbles(right: Any, request: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    out = right(q, *args, **kwargs)
    q[(0,) * q.dim()] += 1
    return out


def moves_a_length(right: Any, request: Any, q: Any, k: Any, v: Any, step: Any, *args: Any, **kwargs: Any) -> Any:
    out = right(q, k, v, step, *args, **kwargs)
    step.kv_lens[0] += 1
    return out


def crashes(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no kernel image is available")


# requirement X20: values are compared, not shapes
@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("bad.prefill", zeros, "largest error"),
        ("bad.decode", zeros, "largest error"),
        ("bad.prefill", one_head_off, "head 1"),
        ("bad.extend", one_head_off, "head 1"),
        ("bad.decode", last_row_off, "relative error"),
        ("bad.prefill", half_the_shape, "its shape is"),
        ("bad.decode", other_dtype, "its dtype is torch.float32; the contract says torch.bfloat16"),
        ("bad.prefill", scribbles, r"changed its input args\[0\]"),
        ("bad.decode", scribbles, r"changed its input args\[0\]"),
        ("bad.extend", moves_a_length, r"changed its input args\[3\].kv_lens"),
        ("bad.extend", crashes, "RuntimeError: no kernel image is available"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_wrong_kernel_fails_and_the_detail_says_how(result: Make, name: str, spoil: Any, says: str) -> None:
    found = result(name, spoil)
    assert found.status == "failed"
    assert not found.ok
    assert re.search(says, found.detail), found.detail


def without(field: str, value: Any) -> Any:
    """A kernel that takes an argument and drops it, as if the request had never said it."""

    def spoil(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        plain = dataclasses.replace(request, **{field: value})
        kwargs |= {"sinks": None} if field == "sinks" else {"alibi_slopes": None} if field == "alibi" else {}
        return hal._bind.build(_reference(request), _plugins.registry().op("attention"), plain, None)(*args, **kwargs)

    return spoil


def _reference(request: Any) -> hal.Kernel:
    return _plugins.registry().kernels[f"reference.{request.phases[0]}"]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("field", "asked", "dropped"),
    [
        ("softcap", 5.0, 0.0),
        ("sinks", True, False),
        ("alibi", True, False),
        ("window", (3, 0), None),
        ("softmax_scale", 0.5, None),
        ("causal", False, True),
    ],
)
def test_a_dropped_argument_is_found(result: Make, phase: str, field: str, asked: Any, dropped: Any) -> None:
    """requirement P24, P23, C7: what a kernel declares it honours; dropping it shows in the values."""
    fields = {"max_q_len": 4} if field == "causal" else {}
    found = result(f"deaf.{phase}", without(field, dropped), **{field: asked}, **fields)
    assert found.status == "failed"
    assert "WRONG" in found.detail, found.detail


def reads_past_the_end(right: Any, request: Any, q: Any, k: Any, v: Any, step: Any, *args: Any, **kwargs: Any) -> Any:
    """As a kernel that takes whole pages: the last page's unused slots come in."""
    longer = tuple(-(-n // step.page_size) * step.page_size for n in step.kv_lens_host)
    return right(q, k, v, dataclasses.replace(step, kv_lens_host=longer), *args, **kwargs)


@pytest.mark.parametrize("phase", ["extend", "decode"])
def test_reading_an_unused_slot_shows(result: Make, phase: str) -> None:  # requirement D15
    found = result(f"greedy.{phase}", reads_past_the_end, causal=False)
    assert found.status == "failed"
    assert "NaN in the wrong places" in found.detail


def trusts_the_bound(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """As a kernel that takes the padded bound of lengths for the length of every sequence."""
    out = right(*args, **kwargs)
    cu = kwargs["cu_seqlens_k"]
    loose = cu is not None and kwargs["max_seqlen_k"] != int(cu.diff().max())
    return out * 0.5 if loose else out


def test_bounds_that_are_too_large_change_nothing(result: Make) -> None:  # requirement D3
    found = result("padded.prefill", trusts_the_bound)
    assert found.status == "failed"
    assert "strided views, loose bounds" in found.detail


def ignores_strides(right: Any, request: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
    packed = torch.as_strided(v, v.shape, torch.empty(v.shape).stride())
    return right(q, k, packed, *args, **kwargs)


def test_strided_values_are_part_of_a_check(result: Make) -> None:  # requirement B3
    found = result("packed.prefill", ignores_strides)
    assert found.status == "failed"
    assert "strided views" in found.detail


def dense_is_broken(right: Any, request: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    out = right(q, *args, **kwargs)
    return out.flip(1) if q.dim() == 4 else out


def test_the_dense_form_is_part_of_a_check(result: Make) -> None:
    assert result("dense.prefill", dense_is_broken).status == "failed"


def log2_lse(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    out, lse = right(*args, **kwargs)
    return out, lse / 0.6931472


def half_lse(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    out, lse = right(*args, **kwargs)
    return out, lse.half()


@pytest.mark.parametrize(("spoil", "says"), [(log2_lse, "natural log"), (half_lse, "the contract says float32")])
def test_a_wrong_lse_is_found(result: Make, spoil: Any, says: str) -> None:  # requirement B15
    found = result("lse.decode", spoil, return_lse=True)
    assert found.status == "failed"
    assert says in found.detail


def always_lse(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    return right(*args, **{**kwargs, "return_lse": request.return_lse})


def test_the_lse_comes_when_the_call_asks_for_it_and_not_else(result: Make) -> None:  # requirement P24
    found = result("lse.prefill", always_lse, return_lse=True)
    assert found.status == "failed"
    assert "called without return_lse" in found.detail


def noisy(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    out = right(*args, **kwargs)
    bits = out.view(-1).view(torch.int16)
    bits[0] ^= 1 + noisy.calls % 2  # type: ignore[attr-defined]
    noisy.calls += 1  # type: ignore[attr-defined]
    return out


def test_determinism_is_checked_where_it_is_asked_for(result: Make) -> None:  # requirement D14
    noisy.calls = 0  # type: ignore[attr-defined]
    assert "two runs differ in out" in result("noisy.prefill", noisy, deterministic=True).detail


def test_noise_below_the_bounds_is_right_where_it_is_not(result: Make) -> None:
    noisy.calls = 0  # type: ignore[attr-defined]
    assert result("noisy.prefill", noisy).ok


def no_gradient(right: Any, request: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    return right(q.detach(), *args, **kwargs)


def wrong_gradient(right: Any, request: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
    return right(q, k, v * 0.5 + v.detach() * 0.5, *args, **kwargs)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(no_gradient, r"no gradient reaches args[0]"), (wrong_gradient, "gradient of args[2]: WRONG")],
)
def test_gradients_are_those_of_the_reference(result: Make, spoil: Any, says: str) -> None:
    found = result("grad.prefill", spoil, needs_grad=True, dtype="float32", sinks=True)
    assert found.status == "failed"
    assert says in found.detail


@pytest.mark.parametrize("fields", [{"dtype": "float32", "sinks": True}, {"return_lse": True}], ids=str)
def test_right_gradients_pass(result: Make, fields: dict[str, Any]) -> None:
    found = result("grad.prefill", right, needs_grad=True, **fields)
    assert found.ok, found.detail


def test_what_no_graph_exists_for_is_said(result: Make) -> None:
    found = result("graph.decode", right, graph=True)
    assert found.ok
    assert "graph capture was not tried: torch.cpu has no graphs" in found.detail


def syncs(right: Any, request: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    return q + 0 * q.sum().item()


def another_when_captured(right: Any, request: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.zeros_like(q) if torch.cuda.is_current_stream_capturing() else q


def copies(right: Any, request: Any, q: Any, *args: Any, **kwargs: Any) -> Any:
    return q * 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("spoil", "says"),
    [(syncs, "it cannot be captured in a graph: "), (another_when_captured, "after a replay differs"), (copies, "")],
)
def test_a_captured_call_is_replayed(spoil: Any, says: str) -> None:  # requirement P37, E12
    from hal_ops.attention.cases import make_case

    device = next(d for d in hal.devices() if d.platform != "cpu").torch_device()
    request = AttentionRequest(num_q_heads=2, num_kv_heads=1, head_dim=16)
    case = make_case(request, "prefill", device=device)
    problems, note = capture_problems(case, lambda *args, **kwargs: spoil(None, request, *args, **kwargs), device)
    assert not note
    assert says in "".join(problems)
    assert bool(problems) is bool(says)


def full(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("tried to allocate 80 GiB")


def test_running_out_of_memory_says_nothing_about_the_kernel(result: Make) -> None:
    found = result("large.prefill", full)
    assert found.status == "untested"
    assert not found.ok
    assert "tried to allocate" in found.detail


def nothing(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    return None


def detached(right: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    return right(*args, **kwargs).detach()


@pytest.mark.parametrize(
    ("spoil", "fields", "says"),
    [
        (nothing, {}, "TypeError: it returned no tensor: out is None"),
        (nothing, {"return_lse": True}, "TypeError"),
        (detached, {"needs_grad": True}, "does not require grad"),
    ],
)
def test_what_nobody_can_use_is_the_kernels_fault(result: Make, spoil: Any, fields: Any, says: str) -> None:
    found = result("odd.prefill", spoil, **fields)
    assert found.status == "failed"
    assert says in found.detail


@pytest.mark.parametrize("broken", ["make_case", "AttentionCase.low_precision", "AttentionCase.expected"])
def test_a_fault_of_ours_is_not_held_against_the_kernel(
    result: Make, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("our own mistake")

    monkeypatch.setattr(f"hal_ops.attention.cases.{broken}", fails)
    found = result("good.prefill", right)
    assert found.status == "untested"
    assert "the check itself failed" in found.detail
    assert "our own mistake" in found.detail


def test_an_implementation_without_a_plan_fails_with_words(
    attention_kernel: Make, kernel_module: Make, fake_platform: Make, small: Make
) -> None:  # requirement A4
    def factory(request: Any, device: Any) -> Any:
        return lambda q, k_cache, v_cache, step, payload, **kwargs: q

    kernel = attention_kernel("plan.decode", target=f"{kernel_module(factory=factory)}:factory")
    fake_platform(kernels=[kernel])
    found = check(kernel, small("decode"))
    assert found.status == "failed"
    assert "no attribute 'plan'" in found.detail
    assert "swallow" in found.detail


def test_a_request_that_the_kernel_does_not_declare_is_an_error(
    spoiled: Make, small: Make, fake_platform: Make
) -> None:
    kernel = spoiled("plain.decode")
    fake_platform(kernels=[kernel])
    with pytest.raises(InputError, match="does not say that it serves this request: softcap 5"):
        check(kernel, small("decode", softcap=5.0))
    with pytest.raises(InputError, match="page_size of the request is open"):
        check(kernel, small("decode", page_size="auto"))
    with pytest.raises(InputError, match="serves attention, and the request is for kv_cache_write"):
        check(kernel, KvCacheWriteRequest(num_kv_heads=1, head_dim=16))
    with hal.simulate("fake:f10"), pytest.raises(DeviceError, match="is simulated"):
        check(kernel, small("decode"))


def writer(kernel_module: Make, spoil: Any) -> hal.Kernel:
    def factory(request: Any, device: Any) -> Any:
        from hal_ops.kv_cache.reference import write

        right = write(request, device)

        def call(
            k: Any, v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, *, k_scale: Any = None, v_scale: Any = None
        ) -> None:
            spoil(right, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)

        return call

    declared = _plugins.registry().kernels["reference.kv_cache_write"]
    return dataclasses.replace(
        declared, name="acme.kv_cache_write", target=f"{kernel_module(factory=factory)}:factory", priority=400
    )


def writes_right(right: Any, k: Any, v: Any, kc: Any, vc: Any, slots: Any, ks: Any, vs: Any) -> None:
    right(k, v, kc, vc, slots, k_scale=ks, v_scale=vs)


def writes_skipped_tokens(right: Any, k: Any, v: Any, kc: Any, vc: Any, slots: Any, ks: Any, vs: Any) -> None:
    free = next(i for i in range(16) if i not in slots.tolist())
    right(k, v, kc, vc, slots.where(slots >= 0, free), k_scale=ks, v_scale=vs)


def forgets_scales(right: Any, k: Any, v: Any, kc: Any, vc: Any, slots: Any, ks: Any, vs: Any) -> None:
    right(k, v, kc, vc, slots, k_scale=None, v_scale=None)


@pytest.mark.parametrize(
    ("spoil", "fails"), [(writes_right, ""), (writes_skipped_tokens, "no token has them"), (forgets_scales, "differ")]
)
def test_ops_that_change_their_arguments_are_checked_too(
    fake_platform: Make, kernel_module: Make, spoil: Any, fails: str
) -> None:  # requirement B6, P30
    kernel = writer(kernel_module, spoil)
    fake_platform(kernels=[kernel])
    found = check(kernel, KvCacheWriteRequest(num_kv_heads=2, head_dim=16, kv_dtype="float8_e4m3fn"))
    assert found.ok is not bool(fails), found.detail
    assert fails in found.detail


def here() -> list[str]:
    """The registered kernels that may run on this machine's processor."""
    around = circumstances(hal.device("cpu"))
    kernels = around.registry.kernels.values()
    return [k.name for k in kernels if not refusals(k, corners(k, limit=1)[0], around)]


@pytest.mark.parametrize("kernel", here())
def test_kernels_of_this_machine_compute_what_they_claim(kernel: str) -> None:
    """requirement P25, P24, X11: what selection would admit is built, runs, and is right."""
    found = [check(kernel, request, device="cpu") for request in corners(kernel, limit=6)]
    assert not [str(f) for f in found if not f.ok]
