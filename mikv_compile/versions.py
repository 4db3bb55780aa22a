"""Which releases of torch this package runs with."""

from __future__ import annotations

import re

OLDEST = (2, 11)
"""The oldest release of torch that is meant to work."""

TESTED = (2, 13)
"""The newest one that the test suite has run with."""


def release(version: str) -> tuple[int, int]:
    """``(2, 13)`` of ``"2.13.0+cpu"``; (0, 0) of what is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def check_torch(version: str) -> None:
    """Raise ImportError, with what to do, if this release of torch is too old."""
    if release(version) < OLDEST:
        raise ImportError(
            f"mikv_compile needs torch {OLDEST[0]}.{OLDEST[1]} or later, and this is torch {version}: "
            f"pip install 'torch>={OLDEST[0]}.{OLDEST[1]}'"
        )


def untested(version: str) -> str | None:
    """What to say of a release of torch that is newer than any that was tested; None otherwise."""
    if release(version) <= TESTED:
        return None
    return f"torch {version} is newer than {TESTED[0]}.{TESTED[1]}, the newest that mikv_compile was tested with"
