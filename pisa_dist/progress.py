"""How far training is: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows rounds, loss, accuracy and speed while it is entered.

    On a terminal: one line that is redrawn, with the time left. Into a file or pipe: one line per evaluation,
    flushed, so that `tail -f` and a killed job show the last of them.

    Args:
        total_rounds: the round that training ends with.
        start_round: rounds done before this process started (a resumed run); they do not count as speed.
        enabled: False shows nothing; ranks other than 0 pass that.
        stream: where to write, by default standard output.
    """

    def __init__(
        self, total_rounds: int, *, start_round: int = 0, enabled: bool = True, stream: IO[str] | None = None
    ) -> None:
        self.total_rounds = total_rounds
        self.start_round = start_round
        self.enabled = enabled
        self.stream = sys.stdout if stream is None else stream
        self._bar: Bar | None = None
        self._loss: float | None = None
        self._accuracy: float | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        """Start the clock and draw the bar."""
        self._started = time.monotonic()
        # Asked of the stream, not of rich: rich also calls a pipe a terminal if the environment forces colour.
        if self.enabled and self.stream.isatty():
            console = Console(file=self.stream, force_terminal=True)
            if not console.is_dumb_terminal:
                self._bar = _make_bar(console)
                self._bar.start()
                self._bar.add_task("train", total=self.total_rounds, completed=self.start_round, state="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen and give the cursor back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, round: int, train_loss: float | None) -> None:  # noqa: A002
        """Report that a round is done.

        Args:
            round: number of rounds done, counted from the start of training.
            train_loss: its training loss, None if unknown.
        """
        self._loss = train_loss
        self._redraw(round)

    def evaluated(self, metrics: Mapping[str, float | int | None]) -> None:
        """Report an evaluation; `metrics` holds `round` and may hold `train_loss` and `test_accuracy`."""
        done = int(metrics["round"] or 0)
        self._loss = metrics.get("train_loss")
        self._accuracy = metrics.get("test_accuracy")
        if self._bar is not None:
            self._redraw(done)
        elif self.enabled:
            width = max(4, len(str(self.total_rounds)))
            parts = [f"round {done:>{width}}/{self.total_rounds}", self._state(done)]
            print("  ".join(part for part in parts if part), file=self.stream, flush=True)

    def _redraw(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, state=self._state(done))

    def _state(self, done: int) -> str:
        parts = [
            _labelled("loss", self._loss),
            _labelled("accuracy", self._accuracy),
            self._speed(done),
        ]
        return "  ".join(part for part in parts if part)

    def _speed(self, done: int) -> str:
        seconds = time.monotonic() - self._started
        rounds = done - self.start_round
        return f"{rounds / seconds:.1f} rounds/s" if rounds > 0 and seconds > 0 else ""


def _labelled(label: str, value: float | None) -> str:
    return "" if value is None else f"{label} {value:.4f}"


def _make_bar(console: Console) -> Bar:
    return Bar(
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[state]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )
