"""Errors that users of compressed caches can meet."""


class MikvError(Exception):
    """Base class of this package's errors."""


class OptionError(MikvError, ValueError):
    """An option is unknown, of the wrong type, out of range, or does not go with another."""


class EvictedTokensError(MikvError, RuntimeError):
    """Something reads the dense cache, but its plan has evicted tokens, so there is no dense cache to read."""


class UnusableCacheError(MikvError, RuntimeError):
    """A compressed cache can no longer be used, and the message says why and what to do."""


class SavedCacheError(MikvError, ValueError):
    """A cache cannot be saved, or a saved one cannot be used here; the message says which file, why and what to do."""


class CannotServe(MikvError):
    """A call is beyond what the rewritten graph can do, and the graph as it was runs instead; users never see this."""
