"""What is declared about MATE, the MUSA AI Tensor Engine.

Read from github.com/MooreThreads/mate at its tags v0.2.1 (9ac89cf) and v0.2.2 (3f58cc3): ``mate/mha_interface.py``,
``mate/jit/attention/fmha/*.py``, ``include/mate/attention/fmha/*.hpp``, ``docs/flash_attention.md``; nothing was run.

* It needs MUSA toolkit 4.3.6, torch_musa 2.7 and mp_31 ("README.md": Pinghu). Its distribution is called ``mate``, as
  an unrelated project of the package registries is. Its wrapper puts functions of the same shape under flash-attn 3's
  names (distribution ``flash_attn_3``, module ``flash_attn_interface``); those are neither looked for nor called.
* Head dims up to 512, K's and V's rounded up to the same tile (``_get_fwd_kernel_config``), or 192 with 128.
* bfloat16 and float16, no FP8 ("docs/flash_attention.md").
* The scale must be positive: the maximum is taken before scaling (``softmax.hpp``, ``online_softmax``).
* ``learnable_sink`` is bfloat16 alone, promised and tested for local attention alone, and turns splits off ("FIXME" in
  ``fmha_fwd.py``). Sinks are applied here from the LSE, in float32, whatever the mask.
* Its backward (``csrc/flash_atten_bwd.mu``) drops windows and takes ragged calls alone: not declared.
* 0.2.0 drops softcap where ``backend="auto"`` takes a mubin kernel, and its planner knows no windows.

Bands: Moore Threads' own kernels for the arch, and what vllm-musa serves with (MooreThreads/vllm-musa#82: Qwen3-8B at
16.9 ms a token on an S5000 with the planner's metadata, 18.5 ms without): specialized.
"""

from __future__ import annotations

from collections.abc import Mapping

from hal import (
    Anything,
    Archs,
    Band,
    Constraint,
    Either,
    Kernel,
    MultipleOf,
    Needs,
    OneOf,
    Pairs,
    Range,
    SameAs,
    Windows,
)

__all__ = ["KERNELS"]

_NEEDS = (
    Needs("torch_musa", ">=2.7", install="take the wheel from MooreThreads/torch_musa's releases"),
    Needs(
        "mate",
        ">=0.2.1",
        install="build github.com/MooreThreads/mate",
        because="0.2.0 drops softcap, and plans without windows",
        module="mate.mha_interface",
    ),
)
_FLAG = OneOf(False, True)
_SINKS = {"sinks": "the output once more"}

_COMMON: Mapping[str, Constraint] = {
    "num_q_heads": Anything((1, 6, 14)),
    "num_kv_heads": Anything((1, 2)),
    "head_dim": Either(MultipleOf(8, 8, 512), OneOf(64, 192)),
    "v_head_dim": Either(SameAs("head_dim"), Pairs("head_dim", (192, 128))),
    "dtype": OneOf("bfloat16", "float16"),
    "causal": OneOf(True, False),
    "window": Windows(),
    "softcap": Range(0, None, (30.0,)),
    "sinks": _FLAG,
    "softmax_scale": Range(2**-8, 8, (0.3,)),
    "return_lse": _FLAG,
    "graph": _FLAG,
}
_CACHE: Mapping[str, Constraint] = {
    "kv_dtype": SameAs("dtype"),
    "page_size": Range(1, None, (16, 48)),
    "kv_layout": OneOf("NHD"),
    "max_q_len": Range(1, None, (4,)),
}


def _kernel(phase: str, priority: int, fields: Mapping[str, Constraint], note: str) -> Kernel:
    return Kernel(
        name=f"mate.{phase}",
        op="attention",
        phase=phase,
        target=f"hal_musa._mate:{phase}",
        priority=priority,
        platforms={"musa": Archs(only=("mp_31",))},
        needs=_NEEDS,
        runtime=">=4.3.6",
        fields=fields,
        copies_with=_SINKS,
        evidence={"mp_31": "emulated"},
        note=note,
    )


KERNELS = (
    _kernel("prefill", Band.SPECIALIZED + 20, _COMMON, "mubin kernels where every query surely sees a key"),
    _kernel("extend", Band.SPECIALIZED + 20, {**_COMMON, **_CACHE}, "planned by MATE, a slot a page"),
    _kernel("decode", Band.SPECIALIZED + 20, {**_COMMON, **_CACHE}, "planned by MATE, a slot a page"),
)
