"""The interface of a distributed method: what a worker does in a round, and what is made of the messages.

A method is a dataclass of its hyperparameters, whose range checks run at construction, and three pure functions. It
holds no state and knows no rank: state goes in and comes out, stacked over workers along dimension 0, so that the same
lines serve one worker in a process or a thousand. The trainer owns the state, the data, the participants and the sum.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.updates import state_dtype
from pisa_dist.checks import check_choice, check_ranges

Tensors = dict[str, Tensor]
"""A tensor per trainable parameter, by the parameter's name, in the model's order."""

State = dict[str, dict[str, Tensor]]
"""State by parameter and kind, as in `torch.optim.Optimizer.state`: state["fc.weight"]["dual"]. That of workers is
stacked: [num_workers_here, *parameter.shape]."""

Gradients = Callable[[Tensors, int], Tensors]
"""(local weights [workers, *shape], local step from 0) -> gradients of each worker's minibatch loss, same shapes."""


@dataclass(frozen=True)
class Round:
    """What a method may know of the round that it computes, for the workers that are present on this rank.

    Attributes:
        number: t, from 1.
        num_rounds: rounds that the run is to have, for what anneals.
        num_local_steps: gradient steps that each worker here takes; those of another call, for other workers or on
            another rank, may take another number.
        weights: consensus weights w by name, [*shape] each; in local work those that the workers here started from,
            which with `clock.period` may be those of an earlier round.
        workers: number of each present worker here, in stacking order.
        worker_weight: alpha_i of the present workers here, shape [workers].
        all_worker_weights: alpha_i of every worker of the run, float64 on the CPU, summing to 1.
        present_weight: sum of alpha_i over all workers that are present in this round, on any rank.
        num_participations: t_i, how often each present worker has taken part, this round included, shape [workers].
        num_steps_before: local steps that each present worker has taken in earlier rounds, int64 [workers].
        has_newcomers: whether a worker that is present, on any rank, takes part for the first time.
        is_summed: whether the messages are summed; a robust rule makes something else of them.
        gradients: the gradient oracle.
        shared: the method's shared state.
    """

    number: int
    num_rounds: int
    num_local_steps: int
    weights: Tensors
    workers: Sequence[int]
    worker_weight: Tensor
    all_worker_weights: Tensor
    present_weight: float
    num_participations: Tensor
    num_steps_before: Tensor
    gradients: Gradients
    shared: State = field(default_factory=dict)
    has_newcomers: bool = True
    is_summed: bool = True

    def stacked_weights(self) -> Tensors:
        """The consensus weights as every present worker's own copy, [workers, *shape], without copying memory."""
        return {name: w.expand(len(self.worker_weight), *w.shape) for name, w in self.weights.items()}

    def gradients_at(self, local: Tensors, step: int) -> Tensors:
        """The gradients of a local step, [workers, *shape], taken at `local` in the weights' type and given in its own.

        Local weights are kept in the `state_dtype` of the weights: in bfloat16 most steps would round to nothing.
        """
        rounded = {name: w.to(self.weights[name].dtype) for name, w in local.items()}
        return {name: g.to(local[name].dtype) for name, g in self.gradients(rounded, step).items()}


class LocalResult(NamedTuple):
    """Outcome of the local work of the present workers on this rank."""

    state: State  # next state of the present workers, stacked
    message: dict[str, Tensor]  # what they send, weighted and summed over them; keys are the method's own
    primal_residual: Tensor | None = None  # sum_i alpha_i ||w_i - w||^2, a scalar; None where w_i has no meaning


class ConsensusResult(NamedTuple):
    """Outcome of the consensus, the same on every rank."""

    weights: Tensors  # next consensus weights
    shared: State  # next shared state
    penalty: float | None = None  # sum_i alpha_i sigma_i, where the method has one


@dataclass
class Algorithm(ABC):
    """A distributed method. A dataclass in this folder that sets `name` is found by it: no list to edit.

    Fields are hyperparameters with the names that YAML and the command line use. They are the structured config.
    """

    registry: ClassVar[dict[str, type["Algorithm"]]] = {}
    takes_local_steps: ClassVar[bool] = False
    may_be_none: ClassVar[tuple[str, ...]] = ("preconditioner_bound", "penalty_factors")

    name: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            Algorithm.registry[cls.name] = cls

    def __post_init__(self) -> None:
        check_choice("algorithm.name", self.name, (type(self).name,))
        check_ranges(vars(self), prefix="algorithm.", optional=self.may_be_none)

    def check_run(self, *, num_workers: int, local_steps: int) -> None:
        """Refuse a run that the method cannot do, before any data is read.

        Raises:
            ValueError: more than one local step where the method communicates after every gradient.
        """
        if local_steps > 1 and not self.takes_local_steps:
            raise ValueError(
                f"`local_steps` must be 1 for algorithm={self.name}, which communicates after every gradient, "
                f"got {local_steps}: raise batch_size instead"
            )

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:
        """State of `num_workers` new workers, stacked: [num_workers, *shape] each. None by default."""
        return {}

    def init_shared_state(self, parameters: Tensors) -> State:
        """State that every rank holds alike, such as a server's momentum. None by default."""
        return {}

    @property
    def dual_counts_if(self) -> str | None:
        """Where a worker's state says, by a number > 0, that its dual counts: NAME/KIND; None if all do from the start.

        A method that averages over the workers seen so far has such a number.
        """
        return None

    def one_pass_rounds(self, shared: State) -> float:
        """How many rounds, from the first, take every gradient at w, so that a second pass over a shard adds nothing.

        In those a worker takes as many of its local steps as go once through its shard. Infinite as long as the end of
        them is not known: what was said of a round holds once the round has begun.

        Args:
            shared: the shared state before the next round.
        """
        return 0

    def without_sums(self, shared: State) -> State:
        """The shared state where workers or their weights have changed: no sum over them that was kept holds any more.

        Args:
            shared: of before the change; it is not changed.
        """
        return shared

    @abstractmethod
    def local_work(self, round_: Round, state: State) -> LocalResult:
        """What the present workers of this rank do, and the sum of what they send. Changes none of its inputs.

        Args:
            round_: the round; its gradient oracle gives stacked gradients.
            state: state of the present workers, stacked; there may be none of them (dimension 0 is empty).
        """

    def standing_message(self, state: State, worker_weight: Tensor, round_: Round) -> dict[str, Tensor]:
        """What absent workers' memory adds to the sum without them working; nothing by default.

        Keys are among those of the round's message.

        Args:
            state: state of the absent workers hosted here, stacked.
            worker_weight: their alpha_i, shape [workers].
            round_: the round, as some that are present know it.
        """
        return {}

    @abstractmethod
    def consensus(self, round_: Round, message_sum: dict[str, Tensor], shared: State) -> ConsensusResult:
        """Next weights from the sum of all messages; every rank computes the same. Changes none of its inputs."""


def column(values: Tensor, like: Tensor) -> Tensor:
    """Per-worker numbers [workers] shaped to multiply stacked tensors such as `like` [workers, *shape]."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def weighted_sum(values: Tensor, worker_weight: Tensor) -> Tensor:
    """sum_i alpha_i x_i over the workers of stacked x, [workers, *shape] -> [*shape], in float32 at least."""
    values = values.to(state_dtype(values.dtype))
    total: Tensor = torch.tensordot(worker_weight.to(values.dtype), values, dims=1)
    return total


def weighted_sums(values: Tensors, worker_weight: Tensor) -> Tensors:
    """`weighted_sum` of every tensor, by name."""
    return {name: weighted_sum(value, worker_weight) for name, value in values.items()}


def stacked_state(parameters: Tensors, num_workers: int, *kinds: str) -> State:
    """Zeros in `state_dtype` for new workers, [num_workers, *shape] for each parameter and kind."""
    return {
        n: {kind: p.new_zeros((num_workers, *p.shape), dtype=state_dtype(p.dtype)) for kind in kinds}
        for n, p in parameters.items()
    }


def shared_state(parameters: Tensors, kind: str) -> State:
    """Zeros in `state_dtype`, [*shape] for each parameter."""
    return {n: {kind: torch.zeros_like(p, dtype=state_dtype(p.dtype))} for n, p in parameters.items()}


def in_state_dtype(tensors: Tensors) -> Tensors:
    """Every tensor in the `state_dtype` of its own, by name; without a copy where that is the same."""
    return {name: t.to(state_dtype(t.dtype)) for name, t in tensors.items()}


def moved_by_mean(round_: Round, message_sum: Tensors, *, factor: float = 1.0) -> Tensors:
    """w + factor sum_i alpha_i u_i / sum_i alpha_i over the present workers, for message_sum = sum_i alpha_i u_i."""
    scale = factor / round_.present_weight
    moves = {name: scale * message_sum[name].to(state_dtype(w.dtype)) for name, w in round_.weights.items()}
    return {name: (w + moves[name]).to(w.dtype) for name, w in round_.weights.items()}


def squared_distance(displacements: Tensors, worker_weight: Tensor) -> Tensor:
    """sum_i alpha_i ||u_i||^2 for stacked displacements u_i of all parameters, a scalar in float64."""
    flat = [u.flatten(1) for u in displacements.values()]
    per_worker = torch.stack([torch.linalg.vecdot(u, u).double() for u in flat])
    total: Tensor = per_worker.sum(0) @ worker_weight.double()
    return total
