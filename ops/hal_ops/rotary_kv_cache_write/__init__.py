"""The rotary embedding and the write of the paged cache in one pass. Importing this imports no torch."""

from hal_ops.rotary_kv_cache_write.op import ROTARY_KV_CACHE_WRITE, RotaryKvCacheWriteRequest

__all__ = ["ROTARY_KV_CACHE_WRITE", "RotaryKvCacheWriteRequest"]
