"""RMS normalisation. Importing this imports no torch."""

from hal_ops.rms_norm.op import RMS_NORM, RmsNormRequest

__all__ = ["RMS_NORM", "RmsNormRequest"]
