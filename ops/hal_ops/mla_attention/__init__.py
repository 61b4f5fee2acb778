"""Multi-head latent attention: its request, its contract, a reference and kernels. Importing this imports no torch."""

from hal_ops.mla_attention.contract import MlaAttention
from hal_ops.mla_attention.op import MLA_ATTENTION
from hal_ops.mla_attention.request import PHASES, MlaAttentionRequest

__all__ = ["MLA_ATTENTION", "MlaAttention", "MlaAttentionRequest", "PHASES"]
