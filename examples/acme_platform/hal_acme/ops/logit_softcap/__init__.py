"""Bounded logits. Importing it imports no torch."""

from hal_acme.ops.logit_softcap.op import LOGIT_SOFTCAP, LogitSoftcapRequest

__all__ = ["LOGIT_SOFTCAP", "LogitSoftcapRequest"]
