"""Layer normalisation. Importing this imports no torch."""

from hal_ops.layer_norm.op import LAYER_NORM, LayerNormRequest

__all__ = ["LAYER_NORM", "LayerNormRequest"]
