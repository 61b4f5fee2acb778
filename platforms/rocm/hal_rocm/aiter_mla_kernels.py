"""What is declared about aiter's decode over a cache of latents: ``mla_decode_fwd`` (``aiter/mla.py``), in assembly.

Read from github.com/ROCm/aiter at v0.1.7.post5 to v0.1.20.post1, and from the wheel 0.1.7.post2.dev18:

* its assembly is there for gfx942 and gfx950 (``hsa/*/mla``), in bf16 for a latent of 512 and a rotated part of 64. The
  numbers of heads that every version has, and that its test runs (``op_tests/test_mla.py``), are 16 and 128; others come
  and go with versions, archs and modes (``csrc/py_itfs_cu/asm_mla.cu``).
* one query a row is declared. For more, kernels are chosen by padded numbers of queries, and nothing says what the rest
  of a padded row does.
* no LSE: for these formats no assembly kernel writes it (``hsa/*/mla/mla_asm.csv``, column ``lse``), and where a row is
  not split the second stage (``_fwd_kernel_stage2_asm``) leaves it as it was allocated; before 0.1.13 it always does.
* q has to be contiguous. A row without keys divides 0 by 0 in the second stage: those rows are cleared afterwards.
* what assembly reads past a row's end is not known, and other MLA kernels of aiter's have let NaN in from there (aiter
  #4245): so it sees the cache as pages of one token, see :mod:`hal_rocm._slots`. Nor is it known to find tokens beyond
  2 GiB, which others did not (aiter#4452): larger caches are refused when they come.
* FP8 needs FP8 queries with scales, or the persistent mode's metadata; graphs hold a number of splits that depends on
  the lengths: neither is declared.

Band: AMD's assembly for this very op (aiter's README.md: "up to 17x"): specialized; not measured here.
"""

from __future__ import annotations

from collections.abc import Mapping

from hal import Anything, Archs, Band, Constraint, Kernel, Needs, OneOf, Range
from hal_rocm.aiter_kernels import AITER_ARCHS, needs_aiter

__all__ = ["KERNELS"]

_DECODE: Mapping[str, Constraint] = {
    "num_q_heads": OneOf(16, 128),
    "kv_lora_rank": OneOf(512),
    "qk_rope_head_dim": OneOf(64),
    "dtype": OneOf("bfloat16"),
    "kv_dtype": OneOf("bfloat16"),
    "page_size": Range(1, None, (16, 48)),
    "max_q_len": OneOf(1),
    "causal": OneOf(True, False),
    "softmax_scale": Anything((0.3,)),
    "deterministic": OneOf(False, True),
}

KERNELS = (
    Kernel(
        name="aiter.mla_decode",
        op="mla_attention",
        phase="decode",
        target="hal_rocm._aiter_mla:decode",
        priority=Band.SPECIALIZED + 20,
        platforms={"rocm": Archs(only=AITER_ARCHS)},
        needs=(Needs("torch", ">=2.6", install="install a ROCm build of torch"), needs_aiter()),
        capabilities=frozenset({"bf16", "mfma"}),
        fields=_DECODE,
        copies="q, where it is not contiguous",
        evidence={"*": "emulated"},
        note="mla_decode_fwd",
    ),
)
