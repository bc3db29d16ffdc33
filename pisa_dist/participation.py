"""Which workers are available in a round: all, those that a trace names, or those that a random process has on.

What holds in a round is a function of the seed, the worker and the round: the same on every rank, and after a resume.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pisa_dist.checks import check_ranges
from pisa_dist.data.sampling import AVAILABILITY, draw_uniform

HEADER = ["worker", "start", "end"]
LATEST = 2**62  # what rounds in a trace lie below

Mask = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


@dataclass
class Availability:
    """When workers can be reached; with nothing set, always.

    Attributes:
        file: a trace, CSV with the header `worker,start,end`: a worker is available from round `start` up to, but
            without, round `end`. A worker may have several lines; rounds count from 1, workers from 0.
        mean_up: mean number of rounds that a worker stays available, >= 1; such times are geometric.
        mean_down: mean number of rounds that it then stays away, >= 1; geometric.
    """

    file: str | None = None
    mean_up: float | None = None
    mean_down: float | None = None

    def __post_init__(self) -> None:
        check_ranges(vars(self), prefix="availability.", optional=("mean_up", "mean_down"))
        given = [name for name in ("mean_up", "mean_down") if vars(self)[name] is not None]
        if self.file is not None and given:
            raise ValueError(
                f"`availability.{given[0]}` must be null where `availability.file` is given, got {self.file!r}: "
                "availability comes from a trace or from a random process"
            )
        if len(given) == 1:
            missing = "mean_down" if given[0] == "mean_up" else "mean_up"
            raise ValueError(f"`availability.{missing}` must be given with `availability.{given[0]}`, got null")

    @property
    def is_limited(self) -> bool:
        """Whether a worker may ever be away."""
        return self.file is not None or self.mean_up is not None


class Presence(ABC):
    """Availability of all workers of a run, round by round."""

    @abstractmethod
    def at(self, round_number: int) -> Mask:
        """Who is available in a round, from 1: bool [workers]."""


class Always(Presence):
    """Everyone, in every round."""

    def __init__(self, num_workers: int) -> None:
        self._everyone = np.ones(num_workers, dtype=np.bool_)

    def at(self, round_number: int) -> Mask:
        """As in `Presence`."""
        return self._everyone


class Trace(Presence):
    """What a trace file says, see `Availability`.

    Args:
        file: the file.
        num_workers: of the run.
        rounds: of the run.

    Raises:
        ValueError: the file cannot be read, a line makes no sense, or a worker is never available; one line that names
            file, line number or worker.
    """

    def __init__(self, file: str, *, num_workers: int, rounds: int) -> None:
        intervals = list(_intervals(Path(file).expanduser(), num_workers))
        self._workers, self._starts, self._ends = np.array(intervals, dtype=np.int64).reshape(-1, 3).T
        self._file, self._num_workers, self._rounds = file, num_workers, rounds
        never = sorted(set(range(num_workers)) - set(self._workers[self._starts <= rounds].tolist()))
        if never:
            raise ValueError(
                f"`availability.file` {file!r} must have every worker in some round from 1 to {rounds}, "
                f"worker {never[0]} is in none"
            )

    def at(self, round_number: int) -> Mask:
        """As in `Presence`."""
        up = np.zeros(self._num_workers, dtype=np.bool_)
        up[self._workers[(self._starts <= round_number) & (round_number < self._ends)]] = True
        return up

    def check_time(self, needed: Integers) -> None:
        """Refuse a worker that, even if it sets to work as soon as it is available, is never so when it is done.

        Args:
            needed: rounds that each worker's local work takes, >= 1, [workers].

        Raises:
            ValueError: one line that names file, worker and rounds.
        """
        first, last = np.full(self._num_workers, LATEST), np.zeros(self._num_workers, dtype=np.int64)
        within = self._starts <= self._rounds
        np.minimum.at(first, self._workers, self._starts)
        np.maximum.at(last, self._workers[within], np.minimum(self._ends[within] - 1, self._rounds))
        never = np.flatnonzero(first + needed - 1 > last)
        if never.size:
            worker = never[0]
            raise ValueError(
                f"`availability.file` {self._file!r} must have every worker when its local work is done, worker "
                f"{worker} takes {needed[worker]} rounds of `clock.period` from round {first[worker]} on and is in "
                f"none after {last[worker]}"
            )


def _intervals(path: Path, num_workers: int) -> Iterator[tuple[int, int, int]]:
    """(worker, start, end) of every line."""
    where = f"`availability.file` {str(path)!r}"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{where} must be a CSV file that can be read: {error}") from error
    first = lines[0] if lines else ""
    if [word.strip() for word in first.split(",")] != HEADER:
        raise ValueError(f"{where} must begin with the line {','.join(HEADER)}, got {first!r}")
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        try:
            worker, start, end = map(int, line.split(","))
        except ValueError:
            worker, start, end = 0, 0, 0
        if not 1 <= start < end < LATEST:
            raise ValueError(
                f"{where}, line {number}: must be worker,start,end in whole numbers with 1 <= start < end, got {line!r}"
            )
        if not 0 <= worker < num_workers:
            raise ValueError(
                f"{where}, line {number}: worker must be in [0, {num_workers - 1}], the run's workers, got {worker}"
            )
        yield worker, start, end


class OnOff(Presence):
    """Each worker goes on and off by itself, a two-state Markov chain in its stationary state from the first round on.

    A worker that is available is away in the next round with probability 1 / mean_up, one that is away is back with
    probability 1 / mean_down; times up and down are then geometric with these means, and a worker is available in the
    share mean_up / (mean_up + mean_down) of the rounds.

    Args:
        mean_up, mean_down: rounds, >= 1.
        num_workers: of the run.
        seed: with worker and round the key of a draw.
    """

    def __init__(self, mean_up: float, mean_down: float, *, num_workers: int, seed: int) -> None:
        self._mean_up, self._mean_down, self._seed = mean_up, mean_down, seed
        self._workers = np.arange(num_workers)
        # The chain is followed from the first round on; what it came to last is kept, not needed.
        self._last, self._up = 0, np.zeros(num_workers, dtype=np.bool_)

    def at(self, round_number: int) -> Mask:
        """As in `Presence`."""
        if round_number < self._last:
            self._last = 0
        while self._last < round_number:
            self._last += 1
            draw = draw_uniform(AVAILABILITY, self._workers, seed=self._seed, round_number=self._last)
            if self._last == 1:
                self._up = draw < self._mean_up / (self._mean_up + self._mean_down)
            else:
                self._up = np.where(self._up, draw >= 1 / self._mean_up, draw < 1 / self._mean_down)
        return self._up


def presence_of(availability: Availability, *, num_workers: int, rounds: int, seed: int) -> Presence:
    """What an `Availability` stands for in a run.

    Raises:
        ValueError: its trace does not fit the run, see `Trace`.
    """
    if availability.file is not None:
        return Trace(availability.file, num_workers=num_workers, rounds=rounds)
    if availability.mean_up is not None and availability.mean_down is not None:
        return OnOff(availability.mean_up, availability.mean_down, num_workers=num_workers, seed=seed)
    return Always(num_workers)
