"""MIFA: FedAvg in which an absent worker is stood for by its last update."""

from dataclasses import dataclass

from torch import Tensor

from pisa_dist.algorithms.base import (
    Algorithm,
    ConsensusResult,
    LocalResult,
    Round,
    State,
    Tensors,
    in_state_dtype,
    squared_distance,
    stacked_state,
    weighted_sum,
    weighted_sums,
)
from pisa_dist.algorithms.local_sgd import local_sgd


@dataclass
class Mifa(Algorithm):
    """MIFA (Gu, Huang, Zhang, Huang, NeurIPS 2021): memory-augmented impatient federated averaging.

    Each worker's last displacement is kept, zero before its first round. A present worker renews its own with
    `local_steps` steps of SGD; then over all workers  w <- w + sum_i alpha_i (last displacement of i).

    Attributes:
        lr: local step size > 0.
    """

    name: str = "mifa"
    takes_local_steps = True

    lr: float = 0.05

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:  # noqa: D102 - as in Algorithm
        return stacked_state(parameters, num_workers, "last_update")

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        moves = local_sgd(round_, lr=self.lr)
        message = weighted_sums(moves, round_.worker_weight)
        new_state = {n: {"last_update": u} for n, u in moves.items()}
        return LocalResult(new_state, message, squared_distance(moves, round_.worker_weight))

    def standing_message(self, state: State, worker_weight: Tensor, round_: Round) -> Tensors:  # noqa: D102 - as in Algorithm
        return {n: weighted_sum(kinds["last_update"], worker_weight) for n, kinds in state.items()}

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        moves = in_state_dtype(message_sum)
        return ConsensusResult({n: (w + moves[n]).to(w.dtype) for n, w in round_.weights.items()}, shared)
