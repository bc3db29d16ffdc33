"""Who takes part in which round, and from which weights: participation, availability and the virtual clock together."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pisa_dist.clock import Floats
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
        num_steps: local steps that each of them has taken, by worker.
        busy_since: for each worker that is still at work after the round, the same; `IDLE` for the others, [workers].
        virtual_seconds: the clock at the round's end.
    """

    number: int
    present: Sequence[int]
    fetched: dict[int, int]
    num_steps: dict[int, int]
    busy_since: Integers
    virtual_seconds: float

    def held(self, workers: Iterable[int]) -> set[int]:
        """Rounds whose weights some of these workers are still at work with."""
        return set(self.busy_since[list(workers)].tolist()) - {IDLE}


class Schedule:
    """A function of plan and numbers of steps: the same on every rank and after a resume.

    At the start of a round `participation` draws among the workers that are available and idle; those drawn fetch the
    weights and set to work. A worker takes part in the first consensus at or after it is done in whose round it is
    available. Without `clock.period` that is the consensus of the round in which it was drawn; with a period it may be
    a later one, and others have moved the weights meanwhile.

    Args:
        plan: of the run.
        num_steps: local steps of every worker in a round, [workers].
        one_pass: the same for rounds that need one pass over a shard only (`Algorithm.one_pass_rounds`), not more than
            `num_steps`; None for as many. What is refused is decided by `num_steps`: such rounds may end at any time.

    Raises:
        ValueError: trace or speeds do not fit the run, or a worker is too slow to take part ever, or nobody ever does.
    """

    def __init__(self, plan: TrainingPlan, num_steps: Sequence[int], one_pass: Sequence[int] | None = None) -> None:
        num_workers = len(num_steps)
        self._plan = plan
        self._steps, self._one_pass = np.array(num_steps), np.array(num_steps if one_pass is None else one_pass)
        self._speeds = plan.clock.speeds_of(num_workers, seed=plan.seed)
        self._presence = presence_of(plan.availability, num_workers=num_workers, rounds=plan.rounds, seed=plan.seed)
        needed = self._periods(self._steps)
        slowest = int(needed.argmax())
        if plan.clock.period is not None and needed[slowest] > plan.rounds:
            raise ValueError(
                f"`clock.period` must let every worker finish within {plan.rounds} rounds, got {plan.clock.period:g}: "
                f"worker {slowest} takes {self._seconds(self._steps)[slowest]:g} virtual seconds, "
                f"{needed[slowest]:g} rounds"
            )
        if isinstance(self._presence, Trace):
            self._presence.check_time(needed.astype(np.int64))
        self._start = ScheduledRound(0, [], {}, {}, np.full(num_workers, IDLE), 0.0)
        self._last, self._one_pass_rounds = self._start, 0.0
        self._check_participants()

    def at(self, number: int, one_pass_rounds: float = 0) -> ScheduledRound:
        """What holds in a round; 0 is before the first.

        Args:
            number: of the round.
            one_pass_rounds: how many rounds, from the first, need one pass only, as far as that is known before it.
        """
        # What was found up to the last round holds if the same ones up to it needed one pass.
        is_known = min(one_pass_rounds, self._last.number) == min(self._one_pass_rounds, self._last.number)
        if self._last.number > number or not is_known:
            self._last = self._start
        self._one_pass_rounds = one_pass_rounds
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
                f"none of {len(self._steps)} workers does"
            )

    def _seconds(self, num_steps: Integers) -> Floats:
        """Virtual seconds that each worker takes for so many steps, [workers]."""
        return num_steps / self._speeds

    def _periods(self, num_steps: Integers) -> Floats:
        """Rounds until each worker is done with so many steps, whole numbers >= 1, [workers]."""
        # The tolerance: three times 0.1 seconds are not more than a period of 0.3.
        periods = np.ceil(self._seconds(num_steps) / (self._plan.clock.period or math.inf) * (1 - 1e-12))
        return np.maximum(periods, 1)

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
        # What a worker set to work at in a round, it finishes, whatever the rounds that follow need.
        steps = np.where(since < self._one_pass_rounds, self._one_pass, self._steps)
        present = np.flatnonzero(is_available & (since != IDLE) & (since + self._periods(steps) <= number))
        fetched = dict(zip(present.tolist(), since[present].tolist(), strict=True))
        num_steps = dict(zip(present.tolist(), steps[present].tolist(), strict=True))
        since[present] = IDLE
        if self._plan.clock.period is not None:
            seconds = number * self._plan.clock.period
        else:
            seconds = last.virtual_seconds + float(self._seconds(steps)[present].max(initial=0.0))
        return ScheduledRound(number, list(fetched), fetched, num_steps, since, seconds)
