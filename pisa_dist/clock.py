"""A virtual clock: how long workers of unequal speed take, in seconds that nobody has to wait for."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from pisa_dist.checks import check_ranges
from pisa_dist.data.sampling import SPEEDS, draw_uniform

Floats = npt.NDArray[np.float64]


@dataclass
class Clock:
    """How fast workers are, and how long a consensus waits for them; with nothing set, there is no clock.

    Attributes:
        speeds: local steps per virtual second, > 0, one number for each worker.
        speed_spread: instead of those, the factor >= 1 between the quartiles of a log-normal distribution with median
            one step per second, from which each worker's speed is drawn.
        period: virtual seconds > 0 from one consensus to the next, for whoever is done by then; null waits for the
            slowest participant.
    """

    speeds: list[float] | None = None
    speed_spread: float | None = None
    period: float | None = None

    def __post_init__(self) -> None:
        check_ranges(vars(self), prefix="clock.", optional=("speeds", "speed_spread", "period"))
        if self.speeds is not None and self.speed_spread is not None:
            raise ValueError(
                f"`clock.speed_spread` must be null where `clock.speeds` are given, got {self.speed_spread:g}"
            )
        if self.period is not None and not self.is_running:
            raise ValueError(
                f"`clock.period` needs the speeds of the workers, got {self.period:g} alone: set clock.speeds or "
                "clock.speed_spread"
            )

    @property
    def is_running(self) -> bool:
        """Whether there are speeds, and so virtual seconds."""
        return self.speeds is not None or self.speed_spread is not None

    def speeds_of(self, num_workers: int, *, seed: int) -> Floats:
        """Local steps per virtual second of every worker of the run, [workers]; infinite without a clock.

        Args:
            num_workers: of the run.
            seed: with the worker the key of a drawn speed.

        Raises:
            ValueError: there are not as many speeds as workers.
        """
        if self.speed_spread is not None:
            return drawn_speeds(self.speed_spread, num_workers, seed=seed)
        if self.speeds is None:
            return np.full(num_workers, np.inf)
        if len(self.speeds) != num_workers:
            raise ValueError(
                f"`clock.speeds` must be one number for each of {num_workers} workers, got {len(self.speeds)}"
            )
        return np.array(self.speeds)


def drawn_speeds(spread: float, num_workers: int, *, seed: int) -> Floats:
    """Log-normal speeds with median 1, whose upper quartile is `spread` times the lower one: [workers].

    Args:
        spread: factor >= 1; with 1 all are 1.
        num_workers: of the run; a worker's speed does not depend on how many others there are.
        seed: with the worker the key of its draw.
    """
    normal = NormalDist()
    deviation = math.log(spread) / (2 * normal.inv_cdf(0.75))
    draws = draw_uniform(SPEEDS, np.arange(num_workers), seed=seed)
    speeds: Floats = np.exp(deviation * np.array([normal.inv_cdf(draw) for draw in draws]))
    return speeds
