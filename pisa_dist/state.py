"""What a run is told and what it remembers: plan, state, and the outcome of a round."""

from dataclasses import dataclass, field

from torch import Tensor

from pisa_dist.algorithms.base import State, Tensors
from pisa_dist.data.sampling import check_local_steps


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
    seed: int = 0
    eval_every: int = 10
    on_nonfinite: str = "raise"
    consensus: str = "sum"
    consensus_trim: float = 0.1
    on_divergence: str = "warn"
    vectorize: str = "auto"

    def __post_init__(self) -> None:
        check_local_steps(self.local_steps, self.local_epochs)


@dataclass(frozen=True)
class RoundOutcome:
    """What the log wants to know of one round: `problem` says why it was refused, `warning` that training diverges."""

    train_loss: float
    penalty: float | None = None
    primal_residual: float | None = None
    dual_residual: float | None = None
    problem: str | None = None
    warning: str | None = None
    stopped: bool = False
