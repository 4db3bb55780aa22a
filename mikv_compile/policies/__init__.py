"""Policies: what scores tokens. One file each, one line here."""

from __future__ import annotations

from dataclasses import dataclass

from mikv_compile.kernels.formats import Watch
from mikv_compile.kernels.scoring import Scorer, register_scorer
from mikv_compile.policies import h2o, recent, snapkv


@dataclass(frozen=True)
class Policy:
    """A way to tell important tokens from others.

    Attributes:
        scorer: scores of a prompt's tokens, run once after the prompt was attended.
        watch: what later calls add to the scores of the high tier and give to their own tokens; None leaves the former
            alone, and the latter start at 0.
    """

    scorer: Scorer
    watch: Watch | None = None


POLICIES: dict[str, Policy] = {
    "h2o": Policy(h2o.scorer, h2o.WATCH),
    "recent": Policy(recent.scorer),
    "snapkv": Policy(snapkv.scorer, snapkv.WATCH),
}

for _name, _policy in POLICIES.items():
    register_scorer(_name, _policy.scorer)
