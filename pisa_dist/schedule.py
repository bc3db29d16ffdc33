"""Who takes part in which round, and from which weights: participation, availability and the virtual clock together."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pisa_dist.data.sampling import draw_participants
from pisa_dist.participation import Integers, Trace, presence_of
from pisa_dist.state import TrainingPlan

IDLE = -1


class ScheduledRound(NamedTuple):
    """What the schedule says of one round, of all workers of the run.

    Attributes:
        number: from 1; 0 for what holds before the first.
        present: the workers that take part, in increasing order; there may be none.
        fetched: the round at whose end each of them got the weights that it started from, by worker.
        busy_since: for each worker that is still at work after the round, the same; `IDLE` for the others, [workers].
        virtual_seconds: the clock at the round's end.
    """

    number: int
    present: Sequence[int]
    fetched: dict[int, int]
    busy_since: Integers
    virtual_seconds: float

    def held(self, workers: Iterable[int]) -> set[int]:
        """Rounds whose weights some of these workers are still at work with."""
        return set(self.busy_since[list(workers)].tolist()) - {IDLE}


class Schedule:
    """A function of plan and numbers of steps alone: the same on every rank and after a resume.

    At the start of a round `participation` draws among the workers that are available and idle; those drawn fetch the
    weights and set to work. A worker takes part in the first consensus at or after it is done in whose round it is
    available. Without `clock.period` that is the consensus of the round in which it was drawn; with a period it may be
    a later one, and others have moved the weights meanwhile.

    Args:
        plan: of the run.
        num_steps: local steps of every worker in a round.

    Raises:
        ValueError: trace or speeds do not fit the run, or a worker is too slow to take part ever, or nobody ever does.
    """

    def __init__(self, plan: TrainingPlan, num_steps: Sequence[int]) -> None:
        num_workers = len(num_steps)
        self._plan = plan
        self._durations = plan.clock.durations(num_steps, seed=plan.seed)
        self._presence = presence_of(plan.availability, num_workers=num_workers, rounds=plan.rounds, seed=plan.seed)
        self._periods = np.ones(num_workers, dtype=np.int64)
        if plan.clock.period is not None:
            # The tolerance: three times 0.1 seconds are not more than a period of 0.3.
            needed = np.ceil(self._durations / plan.clock.period * (1 - 1e-12))
            slowest = int(needed.argmax())
            if needed[slowest] > plan.rounds:
                raise ValueError(
                    f"`clock.period` must let every worker finish within {plan.rounds} rounds, got "
                    f"{plan.clock.period:g}: worker {slowest} takes {self._durations[slowest]:g} virtual seconds, "
                    f"{needed[slowest]:g} rounds"
                )
            self._periods = np.maximum(needed, 1).astype(np.int64)
        if isinstance(self._presence, Trace):
            self._presence.check_time(self._periods)
        self._start = ScheduledRound(0, [], {}, np.full(num_workers, IDLE), 0.0)
        self._last = self._start
        self._check_participants()

    def at(self, number: int) -> ScheduledRound:
        """What holds in a round; 0 is before the first."""
        if self._last.number > number:
            self._last = self._start
        if self._last.number < number and not (self._plan.availability.is_limited or self._plan.clock.is_running):
            # Every round stands by itself.
            self._last = self._start._replace(number=number - 1)
        while self._last.number < number:
            self._last = self._next(self._last)
        return self._last

    def _check_participants(self) -> None:
        mean_down, rounds = self._plan.availability.mean_down, self._plan.rounds
        if mean_down is not None and not any(self.at(number).present for number in range(1, rounds + 1)):
            raise ValueError(
                f"`availability.mean_down` must let some worker take part within {rounds} rounds, got {mean_down}: "
                f"none of {len(self._periods)} workers does"
            )

    def _next(self, last: ScheduledRound) -> ScheduledRound:
        number = last.number + 1
        is_available = self._presence.at(number)
        since = last.busy_since.copy()
        drawn = draw_participants(
            len(since),
            self._plan.participation,
            seed=self._plan.seed,
            round_number=number,
            among=np.flatnonzero(is_available & (since == IDLE)),
        )
        since[drawn] = last.number
        present = np.flatnonzero(is_available & (since != IDLE) & (since + self._periods <= number))
        fetched = dict(zip(present.tolist(), since[present].tolist(), strict=True))
        since[present] = IDLE
        if self._plan.clock.period is not None:
            seconds = number * self._plan.clock.period
        else:
            seconds = last.virtual_seconds + float(self._durations[present].max(initial=0.0))
        return ScheduledRound(number, list(fetched), fetched, since, seconds)
