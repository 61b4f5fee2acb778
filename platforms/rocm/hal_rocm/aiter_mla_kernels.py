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
* graphs hold a number of splits that depends on the lengths: they are not declared.
* an FP8 cache takes queries of its format, the arch's e4m3, and a scale of each, float32 ``[1]`` (``asm_mla.cu``), hence
  ``fp8_query``; the formula is that of ``op_tests/test_mla_persistent.py``, ``ref_masked_attention``. How a row shorter
  than the mean is cut, the assembly alone knows, and the second stage has to guess the same (``mgc``, wrong for 128
  heads before 0.1.12, aiter#2319): each row is left in one piece, whose result goes straight to the output. bfloat16
  queries over FP8 are there in the persistent mode, with metadata made on the device.

Bands: AMD's assembly for this very op (aiter's README.md: "up to 17x"): specialized; over FP8, in one piece a row,
performant. Neither was measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hal import Anything, Archs, Band, Constraint, Kernel, Needs, OneOf, Range, Reason
from hal_rocm.aiter_kernels import AITER_ARCHS, needs_aiter

if TYPE_CHECKING:
    from hal import Device
    from hal_ops import Request

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

_FLAVOURS = ("float8_e4m3fn", "float8_e4m3fnuz")
_FP8: Mapping[str, Constraint] = {
    **_DECODE,
    "kv_dtype": OneOf(*_FLAVOURS),
    "fp8_query": OneOf(True),
}


def _own_format(request: Request, device: Device) -> Sequence[Reason]:
    given = str(request.kv_dtype)  # type: ignore[attr-defined]
    if given not in _FLAVOURS or given.replace("float8", "fp8") in device.capabilities:
        return ()
    text = f"kv_dtype {given}: {device.arch} multiplies the other e4m3"
    return (Reason("capability_missing", text, "kv_dtype", given),)


def _kernel(
    name: str, priority: int, needs: Needs, fields: Mapping[str, Constraint], copies: str, *, fp8: bool = False
) -> Kernel:
    return Kernel(
        name=f"aiter.mla_{name}",
        op="mla_attention",
        phase="decode",
        target=f"hal_rocm._aiter_mla:{name}",
        priority=priority,
        platforms={"rocm": Archs(only=AITER_ARCHS)},
        needs=(Needs("torch", ">=2.6", install="install a ROCm build of torch"), needs),
        capabilities=frozenset({"bf16", "mfma"}),
        fields=fields,
        check=_own_format if fp8 else None,
        copies=copies,
        evidence={"*": "emulated"},
        note="mla_decode_fwd",
    )


_Q = "q, where it is not contiguous"

KERNELS = (
    _kernel("decode", Band.SPECIALIZED + 20, needs_aiter(), _DECODE, _Q),
    _kernel("fp8_decode", Band.PERFORMANT + 20, needs_aiter(">=0.1.12"), _FP8, f"{_Q}; q, into FP8", fp8=True),
)
