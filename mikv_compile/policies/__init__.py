"""Policies: what scores tokens. One file each, one line here; :func:`register` adds others from outside."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mikv_compile.kernels.formats import Watch
from mikv_compile.kernels.scoring import Scorer, register_scorer
from mikv_compile.policies import expected, h2o, keydiff, knorm, recent, snapkv, tova


@dataclass(frozen=True)
class Policy:
    """A way to tell important tokens from others.

    Attributes:
        scorer: scores of a prompt's tokens, run once after the prompt was attended.
        watch: what later calls add to the scores of the high tier and give to their own tokens; None leaves the former
            alone, and the latter start at 0.
        attention: scores depend on the query heads, so the option ``heads`` has a meaning.
        anew: scores depend on keys and values alone. When tokens have to leave the high tier, the scorer runs again on
            all that is stored there, with the stored keys in the place of the queries.
        by_age: scores are sums over queries; tokens are ranked by them divided by the number of queries behind a token.
        value_norm: default of the option ``value_norm``. floor: what is added to scores before values weigh them.
        recent_share: default of the option ``recent_share``.
    """

    scorer: Scorer
    watch: Watch | None = None
    attention: bool = True
    anew: bool = False
    by_age: bool = False
    value_norm: bool = False
    floor: float = 0.0
    recent_share: float = 0.0


POLICIES: dict[str, Policy] = {
    "expected": Policy(expected.scorer, expected.WATCH, value_norm=True, floor=expected.FLOOR),
    "h2o": Policy(h2o.scorer, h2o.WATCH, recent_share=0.5),
    "h2o-age": Policy(h2o.scorer_by_age, h2o.WATCH, by_age=True, recent_share=0.5),
    "keydiff": Policy(keydiff.scorer, attention=False, anew=True),
    "knorm": Policy(knorm.scorer, attention=False, anew=True),
    "recent": Policy(recent.scorer, attention=False),
    "snapkv": Policy(snapkv.scorer, snapkv.WATCH),
    "tova": Policy(tova.scorer, tova.WATCH),
}

_BUILT_IN = frozenset(POLICIES)


def register(name: str, policy: Policy) -> None:
    """Offer a policy to the option ``policy`` under a new name, for the rest of the process.

    Args:
        name: letters, digits, ``-`` and ``_``. Registering it again replaces the policy, also in graphs that were
            compiled with it.
        policy: what to offer.

    Raises:
        ValueError: if the name is malformed, or that of a built-in policy.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"policy name {name!r} is not made of letters, digits, '-' and '_'")
    if name in _BUILT_IN:
        raise ValueError(f"policy {name!r} is built in; choose another name")
    POLICIES[name] = policy
    register_scorer(name, policy.scorer)


for _name, _policy in POLICIES.items():
    register_scorer(_name, _policy.scorer)
