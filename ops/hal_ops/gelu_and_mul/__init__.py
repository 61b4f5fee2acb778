"""The gate of a gated feed-forward layer with GELU. Importing this imports no torch."""

from hal_ops.gelu_and_mul.op import GELU_AND_MUL, GeluAndMulRequest

__all__ = ["GELU_AND_MUL", "GeluAndMulRequest"]
