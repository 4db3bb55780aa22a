"""How generation drifts away from the dense model's: greedy decoding, and KL along what the dense model wrote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mikv_compile.eval import texts
from mikv_compile.eval.decoding import greedy
from mikv_compile.eval.methods import Session
from mikv_compile.eval.tasks import Advance, Tensors


@dataclass(frozen=True)
class Drift:
    """Both models read a context and go on by themselves.

    A method reads the context once, makes ``tokens`` calls of one token, and as many tokens again ``chunk`` a call.
    Once two runs have differed they write different texts, so agreement falls to that of unrelated texts.

    Attributes:
        context: tokens whose cache is compressed.
        tokens: how many are generated.
        chunk: tokens a call where the dense model's tokens are fed in, and those that a point of the curves is for.
    """

    context: int = 1024
    tokens: int = 512
    chunk: int = 64
    name: ClassVar[str] = "drift"
    needs_reference: ClassVar[bool] = True
    main: ClassVar[tuple[str, ...]] = ("first_divergence", "agreement", "kl")

    def __post_init__(self) -> None:
        if min(self.context, self.chunk) < 1 or self.tokens < 2:
            raise ValueError(f"context and chunk are numbers of tokens, and tokens at least 2: {self}")

    def prepare(self, tokenizer: Any, text: texts.Text) -> DriftExercise:
        """The context's tokens, from the text's start on."""
        return DriftExercise(self, text.tokens(tokenizer, self.context))


@dataclass(frozen=True)
class DriftExercise:
    """A context."""

    task: Drift
    ids: list[int]

    @property
    def digest(self) -> str:
        """Of the context."""
        return texts.digest(self.ids)

    @property
    def steps(self) -> int:
        """The context, what is generated, and each chunk."""
        return 2 + len(self._spans())

    def reference(self, session: Session) -> dict[str, torch.Tensor]:
        """The dense model's ``tokens`` [tokens], and ``log_probs`` [tokens - 1, vocabulary] of all but the first."""
        cache, logits = session.prefill(torch.tensor([self.ids]))
        written = greedy(session, session.fork(cache), logits, self.task.tokens)
        parts = [
            session.forward(torch.tensor([written[start:end]]), cache).float().log_softmax(-1).cpu()
            for start, end in self._spans()
        ]
        return {"tokens": torch.tensor(written), "log_probs": torch.cat(parts)}

    def run(self, session: Session, reference: Tensors, advance: Advance) -> dict[str, Any]:
        """Generate, and read what the dense model generated."""
        cache, logits = session.prefill(torch.tensor([self.ids]))
        size = session.size(cache)
        advance()
        dense: list[int] = reference["tokens"].tolist()
        own = greedy(session, session.fork(cache), logits, self.task.tokens)
        same = [a == b for a, b in zip(own, dense, strict=True)]
        advance()
        kl = []
        for start, end in self._spans():
            got = session.forward(torch.tensor([dense[start:end]]), cache).float().log_softmax(-1).cpu()
            want = reference["log_probs"][start:end]
            kl.append((want.exp() * (want - got)).sum(-1))
            advance()
        step = self.task.chunk
        parts = [same[i : i + step] for i in range(0, len(same), step)]
        return {
            "first_divergence": same.index(False) if False in same else len(same),
            "agreement": sum(same) / len(same),
            "agreement_by_chunk": [sum(part) / len(part) for part in parts],
            "kl": torch.cat(kl).mean().item(),
            "kl_by_chunk": [part.mean().item() for part in kl],
            "distinct_tokens": len(set(own)) / len(own),
            "dense_distinct_tokens": len(set(dense)) / len(dense),
            "cache": size.to_json(),
        }

    def _spans(self) -> list[tuple[int, int]]:
        """Of the written tokens that are fed in: all but the last, whose follower is not known."""
        end, step = self.task.tokens - 1, self.task.chunk
        return [(i * step, min((i + 1) * step, end)) for i in range(math.ceil(end / step))]
