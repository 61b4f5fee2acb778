"""Merging attention over two sets of keys into attention over both. Importing this imports no torch."""

from hal_ops.merge_states.op import MERGE_STATES, MergeStatesRequest

__all__ = ["MERGE_STATES", "MergeStatesRequest"]
