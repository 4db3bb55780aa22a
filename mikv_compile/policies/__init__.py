"""Policies: what scores tokens. One file each, one line here."""

from __future__ import annotations

from dataclasses import dataclass

from mikv_compile.kernels.scoring import Scorer, register_scorer
from mikv_compile.policies import h2o, recent, snapkv


@dataclass(frozen=True)
class Policy:
    """A way to tell important tokens from others.

    Attributes:
        scorer: scores of a prompt's tokens, run once after the prompt was attended.
        accumulate: in later steps, add the attention that each token of the high tier receives to its score.
    """

    scorer: Scorer
    accumulate: bool


POLICIES: dict[str, Policy] = {
    "h2o": Policy(h2o.scorer, accumulate=True),
    "recent": Policy(recent.scorer, accumulate=False),
    "snapkv": Policy(snapkv.scorer, accumulate=False),
}

for _name, _policy in POLICIES.items():
    register_scorer(_name, _policy.scorer)
