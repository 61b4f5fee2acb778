"""Writing keys and values into a paged cache. Importing this imports no torch."""

from hal_ops.kv_cache.op import KV_CACHE_WRITE, KvCacheWriteRequest

__all__ = ["KV_CACHE_WRITE", "KvCacheWriteRequest"]
