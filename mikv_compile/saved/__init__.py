"""Caches in files: what one process has compressed, another one goes on with.

A file is a safetensors file (:mod:`container`): the buffers of each store as tensors, and all that is known of them as
JSON (:mod:`stores`), together with the structure of the cache object (:mod:`tree`) and what tells its model from others
(:mod:`fingerprint`). Nothing in it is code, and nothing in it is trusted.
"""

from mikv_compile.saved.api import cached_tokens, load_cache, save_cache

__all__ = ["cached_tokens", "load_cache", "save_cache"]
