"""What a run is told and what it remembers: plan, state, and the outcome of a round."""

from dataclasses import dataclass, field, fields
from typing import NamedTuple, Self

from torch import Tensor

from pisa_dist.algorithms.base import State, Tensors
from pisa_dist.clock import Clock
from pisa_dist.data.sampling import check_local_steps
from pisa_dist.participation import Availability


@dataclass
class TrainingState:
    """All that a round depends on, besides configuration and data.

    Attributes:
        weights: trainable parameters by name, the same on every rank.
        buffers: the model's buffers by name, the same on every rank.
        shared: the method's shared state, the same on every rank.
        workers: the method's state of the hosted workers, stacked in worker order.
        num_participations: rounds that each hosted worker has taken part in, int64 [hosted].
        num_steps: local steps that each hosted worker has taken in those, int64 [hosted].
        has_taken_part: whether each worker of the run has, bool [workers].
        fetched: by round, the weights after it that some hosted worker is still at work with; only `clock.period` lets
            one be at work beyond a consensus.
        round_number: rounds done.
        samples_seen: samples that all workers have drawn so far.
        bytes_sent: bytes of the messages that all workers have sent so far; a worker counts as a sender wherever it is
            hosted, so that the number does not depend on the layout.
        seconds: time spent in rounds and evaluations, over all sessions of the run.
        loss_sum, loss_rounds: training loss since the last evaluation.
        lr_factor: what is left of the method's `lr` after cuts.
        watch: what the watch for divergence remembers.
    """

    weights: Tensors
    buffers: Tensors
    shared: State
    workers: State
    num_participations: Tensor
    num_steps: Tensor
    has_taken_part: Tensor
    fetched: dict[int, Tensors] = field(default_factory=dict)
    round_number: int = 0
    samples_seen: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_rounds: int = 0
    lr_factor: float = 1.0
    watch: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingPlan:
    """What to run, in the command line's names and units."""

    rounds: int
    batch_size: int
    local_steps: int = 1
    local_epochs: float | None = None
    participation: float = 1.0
    availability: Availability = field(default_factory=Availability)
    clock: Clock = field(default_factory=Clock)
    seed: int = 0
    eval_every: int = 10
    on_nonfinite: str = "raise"
    consensus: str = "sum"
    consensus_trim: float = 0.1
    on_divergence: str = "warn"
    vectorize: str = "auto"

    def __post_init__(self) -> None:
        check_local_steps(self.local_steps, self.local_epochs)
        reason = "availability" if self.availability.is_limited else "clock.period"
        if self.consensus != "sum" and (self.availability.is_limited or self.clock.period is not None):
            raise ValueError(
                f"`consensus` must be sum with {reason}, got {self.consensus!r}: a robust rule needs to know how many "
                "workers take part in a round"
            )

    @classmethod
    def of(cls, config: object) -> Self:
        """The plan in a configuration, whose keys have the same names."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})


class Wishes(NamedTuple):
    """What a rank may ask of all for the end of a round: that the run stops, that a checkpoint is written."""

    stop: bool = False
    save: bool = False


NO_WISHES = Wishes()


@dataclass(frozen=True)
class RoundOutcome:
    """What the log wants to know of one round: `problem` says why it was refused, `warning` that training diverges.

    `train_loss` is None where nobody took part. `wishes` are those of any rank, the same on each.
    """

    train_loss: float | None = None
    penalty: float | None = None
    primal_residual: float | None = None
    dual_residual: float | None = None
    problem: str | None = None
    warning: str | None = None
    wishes: Wishes = NO_WISHES
