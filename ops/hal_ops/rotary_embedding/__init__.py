"""Rotary position embedding. Importing this imports no torch."""

from hal_ops.rotary_embedding.op import ROTARY_EMBEDDING, RotaryEmbeddingRequest
from hal_ops.rotary_embedding.scaling import LinearScaling, Llama3Scaling, Scaling, YarnScaling

__all__ = ["LinearScaling", "Llama3Scaling", "ROTARY_EMBEDDING", "RotaryEmbeddingRequest", "Scaling", "YarnScaling"]
