"""A residual sum and its RMS normalisation in one. Importing this imports no torch."""

from hal_ops.fused_add_rms_norm.op import FUSED_ADD_RMS_NORM, FusedAddRmsNormRequest

__all__ = ["FUSED_ADD_RMS_NORM", "FusedAddRmsNormRequest"]
