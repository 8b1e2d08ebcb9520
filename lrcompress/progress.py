"""What a run shows while it works."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[..., None]


class Display:
    """Lines and progress bars on stderr; nothing at all when quiet."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        # the file itself: bars go on while a library's own output is redirected
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """One line (plain text: square brackets are not markup)."""
        self.console.print(text, markup=False)

    def detail(self, text: str) -> None:
        """One line that only `-v` shows."""
        if self.verbose:
            self.say(text)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """A bar; the value is called with the units done, and a text of figures to show beside it."""
        if not self.console.is_terminal:
            yield self._log(what, total)
            return
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self.console, transient=not self.verbose, expand=True) as progress:
            task = progress.add_task(what, total=total, figures="")

            def advance(amount: int = 1, figures: str = "") -> None:
                progress.update(task, advance=amount, figures=figures)

            yield advance

    @contextmanager
    def training_bar(self, what: str, steps: int) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
        """A bar for a training; the value is called with the steps done so far and the last point of the curve."""
        done = 0
        with self.bar(what, steps) as advance:

            def progress(step: int, point: Mapping[str, Any]) -> None:
                nonlocal done
                advance(step - done, figures=training_figures(point))
                done = step

            yield progress

    def _log(self, what: str, total: int) -> Advance:
        """Where there is no terminal: a line at each tenth."""
        done = tenth = 0
        began = time.monotonic()

        def advance(amount: int = 1, figures: str = "") -> None:
            nonlocal done, tenth
            done += amount
            if done * 10 // max(total, 1) > tenth:
                tenth = done * 10 // max(total, 1)
                self.say(f"  {what} {done}/{total}, {time.monotonic() - began:.0f} s  {figures}".rstrip())

        return advance


def training_figures(point: Mapping[str, Any]) -> str:
    """Loss, τ and speed of a step, for the bar."""
    speed = point["tokens_per_second"]
    return f"loss {point['loss']:.4f}  τ {point['tau']:.2f}  {speed:,.0f} tok/s"
