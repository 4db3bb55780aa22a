"""Shows how far a run is: bars on a terminal, a line for each measurement elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Two bars: all measurements, and the steps of the one that runs."""

    def __init__(self, total: int, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        columns = (TextColumn("{task.description:<60.60}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars: Any = Bars(*columns, console=self._console, disable=quiet or not self._console.is_terminal)
        self._all = self._bars.add_task("measurements", total=total)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def line(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def done(self, count: int = 1) -> None:
        """Some measurements are finished."""
        self._bars.advance(self._all, count)

    @contextmanager
    def steps(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar for one measurement; gives what advances it."""
        task = self._bars.add_task(text.replace("[", r"\["), total=total)
        try:
            yield lambda: self._bars.advance(task)
        finally:
            self._bars.remove_task(task)
