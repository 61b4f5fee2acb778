"""Quantisation to FP8. Importing this imports no torch."""

from hal_ops.fp8_quantize.op import FP8_QUANTIZE, Fp8QuantizeRequest

__all__ = ["FP8_QUANTIZE", "Fp8QuantizeRequest"]
