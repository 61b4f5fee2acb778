"""Well-known models as requests of attention: what ``hal doctor`` decides for, and what ``hal lock`` locks.

Head counts, dims, windows, caps and scales are those of each model's public configuration; ``source`` says which.
A window of W counts W keys, the query's own included, as these configurations do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from hal._device import Device
from hal_ops import Request
from hal_ops.attention import AttentionRequest
from hal_ops.mla_attention import MlaAttentionRequest

__all__ = ["MODELS", "Model", "requests_for"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's attention layers, which share one cache; ``layers`` maps each kind to what it adds to ``fields``.

    ``request`` is the op's: latent attention is an op of its own.
    """

    name: str
    source: str
    fields: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})
    request: type[Request] = AttentionRequest

    @property
    def cached(self) -> bool:
        """Whether the model keeps keys and values between steps."""
        return self.fields.get("phases") != ("prefill",)


def _heads(q: int, kv: int, dim: int, **features: Any) -> dict[str, Any]:
    return {"num_q_heads": q, "num_kv_heads": kv, "head_dim": dim, **features}


_DEEPSEEK = (
    "config.json of deepseek-ai/DeepSeek-V3, and MLA.__init__ in inference/model.py of its repository for the scale: "
    "rope_scaling has factor 40 and mscale_all_dim 1; prompts are attended to with a key and a value a head"
)
_YARN = 0.1 * math.log(40) + 1
_LATENT = {"num_q_heads": 128, "softmax_scale": 192**-0.5 * _YARN**2}

MODELS = (
    Model("Llama-3-8B", "config.json of meta-llama/Meta-Llama-3-8B", _heads(32, 8, 128)),
    Model("Llama-3-70B", "config.json of meta-llama/Meta-Llama-3-70B", _heads(64, 8, 128)),
    Model("Qwen3-32B", "config.json of Qwen/Qwen3-32B", _heads(64, 8, 128)),
    Model(
        "GPT-OSS-120B",
        "github.com/openai/gpt-oss, gpt_oss/torch/model.py, ModelConfig",
        _heads(64, 8, 64, sinks=True),
        {"sliding": {"window": 128}, "full": {}},
    ),
    Model(
        "Gemma-2-9B",
        "github.com/google/gemma_pytorch, gemma/config.py, get_config_for_9b",
        _heads(16, 8, 256, softcap=50.0),
        {"sliding": {"window": 4096}, "full": {}},
    ),
    Model(
        "Gemma-3-27B",
        "text_config of google/gemma-3-27b-it; query_pre_attn_scalar is 168",
        _heads(32, 16, 128, softmax_scale=168**-0.5),
        {"sliding": {"window": 1024}, "full": {}},
    ),
    Model("Mistral-7B-v0.1", "config.json of mistralai/Mistral-7B-v0.1", _heads(32, 8, 128, window=4096)),
    Model(
        "MiniLM-L6",
        "config.json of sentence-transformers/all-MiniLM-L6-v2",
        _heads(12, 12, 32, causal=False, phases=("prefill",)),
    ),
    Model("DeepSeek-V3", _DEEPSEEK, _LATENT, request=MlaAttentionRequest),
    Model(
        "DeepSeek-V3 prompts",
        _DEEPSEEK,
        {**_heads(128, 128, 192), **_LATENT, "v_head_dim": 128, "phases": ("prefill",)},
    ),
)


def requests_for(model: Model, device: Device) -> dict[str, dict[str, Request]]:
    """Name of a cache format to the requests of the model's layers, by kind.

    The formats are the compute dtype (bfloat16 where the device has it, else float16), and FP8 where the device
    declares a format of its own. A model without a cache has the one entry ``""``.
    """
    dtype = "float16" if device.capabilities and "bf16" not in device.capabilities else "bfloat16"
    has_fp8 = device.capabilities & {"fp8_e4m3fn", "fp8_e4m3fnuz"}
    caches = [dtype, "fp8"] if has_fp8 else [dtype]
    if not model.cached:
        return {"": _requests(model, dtype, dtype)}
    return {cache: _requests(model, dtype, cache) for cache in caches}


def _requests(model: Model, dtype: str, cache: str) -> dict[str, Request]:
    fields = {**model.fields, "dtype": dtype, "kv_dtype": cache}
    return {kind: model.request(**{**fields, **more}) for kind, more in model.layers.items()}
