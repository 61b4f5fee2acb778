"""Copies of pages inside a paged KV cache. Importing this imports no torch."""

from hal_ops.kv_pages_copy.op import KV_PAGES_COPY, KvPagesCopyRequest

__all__ = ["KV_PAGES_COPY", "KvPagesCopyRequest"]
