"""Attention: its request, its contract, a reference, and kernels over torch. Importing this imports no torch.

Code is reached by target: :mod:`hal_ops.attention.reference` (the oracle), :mod:`hal_ops.attention.torch_sdpa`
(CPU kernels), :mod:`hal_ops.attention.cases` (inputs for tests and for the conformance kit).
"""

from hal_ops.attention.contract import PagedAttention, PrefillAttention, Step, with_lengths
from hal_ops.attention.op import ATTENTION
from hal_ops.attention.request import PHASES, AttentionRequest, Window, normalize_window

__all__ = [
    "ATTENTION",
    "AttentionRequest",
    "PHASES",
    "PagedAttention",
    "PrefillAttention",
    "Step",
    "Window",
    "normalize_window",
    "with_lengths",
]
