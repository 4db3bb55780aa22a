"""What a stage says about something it looked at and left as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["canonicalize", "find cache updates", "pair", "rewrite"]


@dataclass(frozen=True)
class Declined:
    """One thing that stays exactly as the model wrote it, and why."""

    site: str
    """Name of the graph node that was looked at."""
    stage: Stage
    reason: str
    """A sentence for users; where possible it says what to change."""

    def __str__(self) -> str:
        return f"{self.site} ({self.stage}): {self.reason}"
