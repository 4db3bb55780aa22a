"""How well a text is read on after its context was compressed: KL, agreement and perplexity against the dense run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mikv_compile.eval import texts
from mikv_compile.eval.methods import Session
from mikv_compile.eval.tasks import Advance, Tensors


@dataclass(frozen=True)
class Continuation:
    """Read a context, then the tokens that follow it in the text (teacher-forced), some at a time.

    Attributes:
        context: tokens whose cache is compressed.
        tokens: how many follow.
        chunk: tokens a call.
    """

    context: int = 3584
    tokens: int = 512
    chunk: int = 64
    name: ClassVar[str] = "continuation"
    needs_reference: ClassVar[bool] = True
    main: ClassVar[tuple[str, ...]] = ("kl", "top1", "perplexity")

    def __post_init__(self) -> None:
        if min(self.context, self.tokens, self.chunk) < 1:
            raise ValueError(f"context, tokens and chunk are numbers of tokens, at least 1: {self}")

    def prepare(self, tokenizer: Any, text: texts.Text) -> ContinuationExercise:
        """The tokens of the text, from its start on."""
        return ContinuationExercise(self, text.tokens(tokenizer, self.context + self.tokens + 1))


@dataclass(frozen=True)
class ContinuationExercise:
    """A context and what follows."""

    task: Continuation
    ids: list[int]
    """``context + tokens + 1``: the last one is only predicted."""

    @property
    def digest(self) -> str:
        """Of all token ids."""
        return texts.digest(self.ids)

    @property
    def steps(self) -> int:
        """The context, and each chunk."""
        return 1 + math.ceil(self.task.tokens / self.task.chunk)

    def reference(self, session: Session) -> dict[str, torch.Tensor]:
        """The dense run's log-probabilities ``log_probs`` [tokens, vocabulary], float32."""
        cache, _ = session.prefill(self._ids(0, self.task.context))
        parts = [session.forward(self._ids(*span), cache).float().log_softmax(-1).cpu() for span in self._spans()]
        return {"log_probs": torch.cat(parts)}

    def run(self, session: Session, reference: Tensors, advance: Advance) -> dict[str, Any]:
        """Compare each chunk with the dense run."""
        cache, _ = session.prefill(self._ids(0, self.task.context))
        size = session.size(cache)
        advance()
        kl, agree, nll, dense_nll = [], [], [], []
        for start, end in self._spans():
            got = session.forward(self._ids(start, end), cache).float().log_softmax(-1).cpu()
            want = reference["log_probs"][start - self.task.context : end - self.task.context]
            following = self._ids(start + 1, end + 1)[0]
            kl.append((want.exp() * (want - got)).sum(-1))
            agree.append((want.argmax(-1) == got.argmax(-1)).float())
            nll.append(-got.gather(1, following[:, None])[:, 0])
            dense_nll.append(-want.gather(1, following[:, None])[:, 0])
            advance()
        all_kl, all_nll, all_dense = torch.cat(kl), torch.cat(nll), torch.cat(dense_nll)
        return {
            "kl": all_kl.mean().item(),
            "kl_standard_error": all_kl.std(correction=0).item() / math.sqrt(len(all_kl)),
            "top1": torch.cat(agree).mean().item(),
            "perplexity": math.exp(all_nll.mean().item()),
            "dense_perplexity": math.exp(all_dense.mean().item()),
            "dnll": (all_nll - all_dense).mean().item(),
            "kl_by_chunk": [part.mean().item() for part in kl],
            "top1_by_chunk": [part.mean().item() for part in agree],
            "cache": size.to_json(),
            "cache_at_end": session.size(cache).to_json(),
        }

    def _spans(self) -> list[tuple[int, int]]:
        first, end = self.task.context, self.task.context + self.task.tokens
        return [(i, min(i + self.task.chunk, end)) for i in range(first, end, self.task.chunk)]

    def _ids(self, start: int, end: int) -> torch.Tensor:
        return torch.tensor([self.ids[start:end]])
