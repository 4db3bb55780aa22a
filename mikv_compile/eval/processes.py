"""The processes that share one run of the evaluation: ``accelerate launch -m ...`` or ``torchrun`` starts them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

LONGEST = timedelta(days=30)
"""How long processes that have nothing left to measure wait for the others."""


@dataclass(frozen=True)
class Processes:
    """This process among those that share a run; alone by default.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        local_rank: number among those on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process shows progress, and writes tables in the end."""
        return self.rank == 0

    def has(self, number: int) -> bool:
        """Whether measurement ``number`` is this process's own."""
        return number % self.count == self.rank

    def device(self, name: str) -> str:
        """``name`` with this process's number where it is ``"cuda"``: each process gets a GPU of its own."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.count > 1 else name

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, once all of them have come here."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def wait(self) -> None:
        """Come back once all processes have come here."""
        self.gathered(None)


def current() -> Processes:
    """The processes that a launcher has started, as the environment says; this one alone without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    from accelerate import PartialState

    # On the CPU also where models run on GPUs: processes tell each other a few words only.
    state = PartialState(cpu=True, backend="gloo", timeout=LONGEST)
    return Processes(state.process_index, state.num_processes, state.local_process_index)
