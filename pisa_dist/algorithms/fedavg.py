"""FedAvg: local SGD steps, then an average of the local weights."""

from dataclasses import dataclass

from pisa_dist.algorithms.base import (
    Algorithm,
    ConsensusResult,
    LocalResult,
    Round,
    State,
    Tensors,
    moved_by_mean,
    squared_distance,
    weighted_sums,
)
from pisa_dist.algorithms.local_sgd import local_sgd


@dataclass
class FedAvg(Algorithm):
    """FedAvg (McMahan, Moore, Ramage, Hampson, Aguera y Arcas, AISTATS 2017).

    Each present worker takes `local_steps` steps of SGD from the consensus weights, momentum starting at zero:
        b <- mu b + g + weight_decay w_i,   w_i <- w_i - lr b
    Then, over the present workers,
        w <- w + sum_i alpha_i (w_i - w) / sum_i alpha_i

    Attributes:
        lr: step size > 0.
        momentum: mu in [0, 1).
        weight_decay: L2 coefficient >= 0 of the local objective.
    """

    name: str = "fedavg"
    takes_local_steps = True

    lr: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        moves = local_sgd(round_, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        message = weighted_sums(moves, round_.worker_weight)
        return LocalResult(state, message, squared_distance(moves, round_.worker_weight))

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        return ConsensusResult(moved_by_mean(round_, message_sum), shared)
