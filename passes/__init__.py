"""Graph passes: find attention and its KV cache in a Dynamo graph, pair them into sites, rewrite the sites.

This package knows FX and nothing about bits: what a site becomes is decided by the `SiteLowering` that the caller
gives to `rewrite`. Import it as `mikv_compile.passes`.
"""

from mikv_compile.passes.analyze import Analysis, analyze
from mikv_compile.passes.attention import ATTENTION_RECOGNIZERS, find_attentions
from mikv_compile.passes.cache_updates import CACHE_UPDATE_RECOGNIZERS, find_cache_updates
from mikv_compile.passes.pair import pair
from mikv_compile.passes.records import Attention, CacheUpdate, Read, Site
from mikv_compile.passes.report import Declined
from mikv_compile.passes.rewrite import NewTokens, Operands, RewrittenGraph, RewrittenSite, SiteLowering, rewrite

__all__ = [
    "ATTENTION_RECOGNIZERS",
    "CACHE_UPDATE_RECOGNIZERS",
    "Analysis",
    "Attention",
    "CacheUpdate",
    "Declined",
    "NewTokens",
    "Operands",
    "Read",
    "RewrittenGraph",
    "RewrittenSite",
    "Site",
    "SiteLowering",
    "analyze",
    "find_attentions",
    "find_cache_updates",
    "pair",
    "rewrite",
]
