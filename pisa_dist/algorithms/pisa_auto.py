"""PISA that needs no tuning: one knob, the learning rate."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pisa_dist.algorithms.base import Algorithm, ConsensusResult, LocalResult, Round, State, Tensors
from pisa_dist.algorithms.pisa_local import DUAL, SEEN, PisaLocal

# sigma in the first and in the last round. Its inverse is the consensus step in units of the metric.
FIRST_PENALTY, LAST_PENALTY = 30.0, 300.0
# Local steps begin where the workers' gradients have a quarter of their square in common.
AGREEMENT = 0.25
# With local steps P is formed when they begin, until this round and then every so many: each time costs a tensor.
METRIC_ROUNDS, METRIC_INTERVAL = 3, 10

# Key of a message, and of the shared state; no parameter's name has a space.
SQUARES, LOCAL = "squares of duals", "local steps"


@dataclass
class PisaAuto(Algorithm):
    """`pisa_local` with Muon's metric, everything but the learning rate set by what a run shows and is.

    - The scale of the gradients, which the penalty must match in the paper's form, is measured: P is made of it.
    - 1/sigma, the step, falls linearly from 1/30 in the first round to 1/300 in the last, whatever their number.
    - Whether a round's gradients are spent on one step of a large batch or on local steps is measured too. A run begins
      with `enlarge_batch`, in which a dual is minus a worker's gradient; once the duals of the workers seen agree, see
      `agreement`, local steps begin, and go on to the end.
    - rho follows sigma and the number of local steps, so that a round's steps together forget about two thirds of a
      dual.

    A message is one tensor of the model's size; with local steps one more where a new worker is present, and one
    more in the rounds that form P.

    Attributes:
        lr: factor on all steps, > 0.
    """

    name: str = "pisa_auto"
    takes_local_steps = True

    lr: float = 1.0

    def at(self, round_: Round) -> PisaLocal:
        """The method of a round."""
        progress = min((round_.number - 1) / max(round_.num_rounds - 1, 1), 1.0)
        step = (1 - progress) / FIRST_PENALTY + progress / LAST_PENALTY
        if not local_steps_begun(round_.shared):
            return PisaLocal(penalty=1 / step, lr=self.lr, enlarge_batch=True)
        return PisaLocal(penalty=1 / step, lr=self.lr, metric_rounds=METRIC_ROUNDS, metric_interval=METRIC_INTERVAL)

    @property
    def dual_counts_if(self) -> str | None:  # noqa: D102 - as in Algorithm
        return PisaLocal().dual_counts_if

    def one_pass_rounds(self, shared: State) -> float:  # noqa: D102 - as in Algorithm
        begun = local_steps_begun(shared)
        return begun - 1 if begun else math.inf

    def without_sums(self, shared: State) -> State:  # noqa: D102 - as in Algorithm
        return PisaLocal().without_sums(shared)

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:  # noqa: D102 - as in Algorithm
        return PisaLocal().init_worker_state(parameters, num_workers)

    def init_shared_state(self, parameters: Tensors) -> State:  # noqa: D102 - as in Algorithm
        return PisaLocal().init_shared_state(parameters) | {LOCAL: {"begun": torch.tensor(0)}}

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        result = self.at(round_).local_work(round_, state)
        return result._replace(message=result.message | self._squares(round_, result.state, round_.worker_weight))

    def standing_message(self, state: State, worker_weight: Tensor, round_: Round) -> Tensors:
        """As in `PisaLocal`, and the squares of the duals until local steps begin."""
        message = self.at(round_).standing_message(state, worker_weight, round_)
        return message | self._squares(round_, state, worker_weight)

    def _squares(self, round_: Round, state: State, worker_weight: Tensor) -> Tensors:
        """The `squares` of `agreement` for some workers, while they are asked for."""
        if local_steps_begun(round_.shared):
            return {}
        duals = [state[name]["dual"] for name in round_.weights]
        square = torch.stack([dual.flatten(1).square().sum(1) for dual in duals]).sum(0)
        weight = torch.where(state[SEEN]["steps"] > 0, worker_weight.to(square.dtype), 0.0)
        return {SQUARES: torch.stack([weight @ square, weight.square() @ square, weight @ weight])}

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        result, begun = self.at(round_).consensus(round_, message_sum, shared), shared[LOCAL]["begun"]
        if local_steps_begun(shared):
            return result._replace(shared=result.shared | {LOCAL: {"begun": begun}})
        share = agreement(
            torch.stack([message_sum[DUAL + n].square().sum() for n in round_.weights]).sum(),
            message_sum[SQUARES],
            seen=message_sum[SEEN],
        )
        if len(round_.all_worker_weights) == 1:  # nobody to disagree with
            share = torch.ones_like(share)
        begun = torch.where(share >= AGREEMENT, round_.number + 1, 0).to(begun.device)
        return result._replace(shared=result.shared | {LOCAL: {"begun": begun}})


def local_steps_begun(shared: State) -> int:
    """The first round that takes local steps, or 0 where it is not known yet."""
    return int(shared[LOCAL]["begun"])


def agreement(square_of_sum: Tensor, squares: Tensor, *, seen: Tensor) -> Tensor:
    """What part of their mean square the duals of two different workers have in common, on average over all pairs.

        mean over i != j of <pi_i, pi_j>  /  mean over i of ||pi_i||^2
    with weights a_i a_j and a_i, where a_i is alpha_i of the workers seen: 1 if all duals are equal, 0 if they are
    orthogonal, and 0 where there is no pair.

    Args:
        square_of_sum: ||sum_i a_i pi_i||^2, a scalar.
        squares: sum_i a_i ||pi_i||^2, sum_i a_i^2 ||pi_i||^2 and sum_i a_i^2, shape [3].
        seen: sum_i a_i, a scalar, > 0.
    """
    square, own_square, own_weight = squares
    pairs = seen * seen - own_weight
    common = (square_of_sum - own_square) / (pairs * square) * seen
    # A worker alone leaves nothing but rounding.
    return torch.where((pairs > 1e-6 * own_weight) & (square > 0), common, 0.0)
