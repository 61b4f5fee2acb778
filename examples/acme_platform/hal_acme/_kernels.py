"""What Acme's kernels handle: data, from which HAL derives refusals, near misses, tables and tests.

A kernel that says too little is refused where it would do; one that says too much is caught by the conformance tests.
"""

from __future__ import annotations

from hal import Anything, Archs, Band, Kernel, MultipleOf, OneOf, Range, SameAs, Windows

__all__ = ["KERNELS"]

_PREFILL = Kernel(
    name="acme.prefill",
    op="attention",
    phase="prefill",
    target="hal_acme.attention:prefill",
    priority=Band.PLUGIN,
    platforms={"acme": Archs(at_least="acme1")},
    runtime=">=2.0",
    fields={
        "num_q_heads": Anything((1, 6, 14)),
        "num_kv_heads": Anything((1, 2)),
        "head_dim": MultipleOf(8, high=256),
        "v_head_dim": SameAs("head_dim"),
        "dtype": OneOf("float16", "bfloat16", "float32"),
        "causal": OneOf(True, False),
        "window": Windows(right=False),
        "softcap": Range(0, None, (30.0,)),
        "softmax_scale": Anything((0.3,)),
        "return_lse": OneOf(False, True),
        "deterministic": OneOf(False, True),
    },
    evidence={"acme1": "emulated", "acme2": "emulated"},
    note="Acme's attention, emulated in torch",
)

_SOFTCAP = Kernel(
    name="acme.logit_softcap",
    op="logit_softcap",
    phase="call",
    target="hal_acme.ops.logit_softcap.kernels:tanh_unit",
    priority=Band.PLUGIN,
    platforms={"acme": Archs(only=("acme*",))},
    capabilities=frozenset({"tanh_unit"}),
    fields={"cap": Range(1, 1000, (30.0,)), "dtype": OneOf("float16", "bfloat16", "float32")},
    evidence={"acme2": "emulated"},
    note="Acme's tanh unit, emulated in torch",
)

_SOFTCAP_REFERENCE = Kernel(
    name="reference.logit_softcap",
    op="logit_softcap",
    phase="call",
    target="hal_acme.ops.logit_softcap.kernels:reference",
    priority=Band.REFERENCE,
    fields={
        "cap": Range(0, None, (30.0,)),
        "dtype": OneOf("float16", "bfloat16", "float32"),
        "needs_grad": OneOf(False, True),
    },
    note="float32 reference, any device",
)

KERNELS = (_PREFILL, _SOFTCAP, _SOFTCAP_REFERENCE)
