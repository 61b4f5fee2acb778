"""Keys and values of rows, taken out of a paged KV cache. Importing this imports no torch."""

from hal_ops.kv_pages_gather.op import KV_PAGES_GATHER, KvPagesGatherRequest

__all__ = ["KV_PAGES_GATHER", "KvPagesGatherRequest"]
