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

# As near to the process's start as a module can get; a monotonic clock, which no change of the wall clock moves.
_STARTED = time.monotonic()


class Preempted(Exception):  # noqa: N818 - no error: the run did as it was told
    """The run was asked to stop and did so in good order; it can be resumed."""

    def __init__(self, path: Path, round_number: int) -> None:
        super().__init__(f"stopped after round {round_number}: go on with run_dir={path} resume=auto")


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, by SIGUSR1, or by its time limit.

    Args:
        max_seconds: seconds since the process's start after which it shall stop; None for no limit.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self.max_seconds = max_seconds
        self._signalled = False

    def __call__(self) -> bool:
        """True once asked to stop."""
        return self._signalled or (self.max_seconds is not None and time.monotonic() - _STARTED >= self.max_seconds)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while inside; a second one ends the process at once with 128 + its number."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(128 + number)
        self._signalled = True
