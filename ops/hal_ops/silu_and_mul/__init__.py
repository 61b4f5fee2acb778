"""The gate of a gated feed-forward layer with SiLU. Importing this imports no torch."""

from hal_ops.silu_and_mul.op import SILU_AND_MUL, SiluAndMulRequest

__all__ = ["SILU_AND_MUL", "SiluAndMulRequest"]
