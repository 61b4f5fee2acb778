"""Merging attention states. Importing it imports no torch."""

from hal_ops.merge_states.op import MERGE_STATES, MergeStatesRequest

__all__ = ["MERGE_STATES", "MergeStatesRequest"]
