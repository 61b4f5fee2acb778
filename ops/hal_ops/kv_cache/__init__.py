"""Writing k and v into a paged cache. Importing it imports no torch."""

from hal_ops.kv_cache.op import KV_CACHE_WRITE, KvCacheWriteRequest

__all__ = ["KV_CACHE_WRITE", "KvCacheWriteRequest"]
