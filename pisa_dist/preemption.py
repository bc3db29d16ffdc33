"""Stopping in good order: a signal or time limit ends a run after the round, with a checkpoint and a status."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Slurm signals all processes of a step, and a torchrun among them passes it on to its ranks: one request, two signals.
SAME_REQUEST_SECONDS = 5.0

# As near to the process's start as a module can get; a monotonic clock, which no change of the wall clock moves.
_STARTED = time.monotonic()


class Preempted(Exception):  # noqa: N818 - no error: the run did as it was told
    """The run was asked to stop and did so in good order; it can be resumed."""

    def __init__(self, path: Path, round_number: int) -> None:
        super().__init__(path, round_number)

    def __str__(self) -> str:
        path, round_number = self.args
        return f"stopped after round {round_number}: go on with run_dir={path} resume=auto"


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, by SIGUSR1, or by its time limit.

    Args:
        max_seconds: seconds since the process's start after which it shall stop; None for no limit.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self.max_seconds = max_seconds
        self._first_signal: float | None = None

    def __call__(self) -> bool:
        """True once asked to stop."""
        is_late = self.max_seconds is not None and time.monotonic() - _STARTED >= self.max_seconds
        return is_late or self._first_signal is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while inside; a further one, later than an echo of the first could be, ends the process at
        once with 128 + its number.
        """
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
        elif now - self._first_signal > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
