"""FedDyn: local SGD on a dynamically regularised objective; consensus ADMM for workers that come and go."""

from dataclasses import dataclass

from pisa_dist.algorithms.base import (
    Algorithm,
    ConsensusResult,
    LocalResult,
    Round,
    State,
    Tensors,
    moved_by_mean,
    shared_state,
    squared_distance,
    stacked_state,
    weighted_sums,
)
from pisa_dist.algorithms.local_sgd import local_sgd


@dataclass
class FedDyn(Algorithm):
    """FedDyn (Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, ICLR 2021).

    Each present worker takes SGD steps on F_i(w_i) - <h_i, w_i> + (regularization/2) ||w_i - w||^2, then
        h_i <- h_i - regularization (w_i - w)
        h   <- h - regularization sum_i alpha_i (w_i - w)
        w   <- w + sum_i alpha_i (w_i - w) / sum_i alpha_i - h / regularization,  over the present workers
    where the paper's step gives w its mean over the present workers. h_i starts at zero.

    Attributes:
        lr: local step size > 0.
        regularization: alpha of the paper, > 0, gradient per weight.
    """

    name: str = "feddyn"
    takes_local_steps = True

    lr: float = 0.05
    regularization: float = 0.1

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:  # noqa: D102 - as in Algorithm
        return stacked_state(parameters, num_workers, "gradient_memory")

    def init_shared_state(self, parameters: Tensors) -> State:  # noqa: D102 - as in Algorithm
        return shared_state(parameters, "gradient_memory")

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        memory = {n: kinds["gradient_memory"] for n, kinds in state.items()}

        def correction(local: Tensors) -> Tensors:
            return {n: self.regularization * (w - round_.weights[n]) - memory[n] for n, w in local.items()}

        moves = local_sgd(round_, lr=self.lr, correction=correction)
        new_state = {n: {"gradient_memory": memory[n] - self.regularization * u} for n, u in moves.items()}
        message = weighted_sums(moves, round_.worker_weight)
        return LocalResult(new_state, message, squared_distance(moves, round_.worker_weight))

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        memory = {
            n: kinds["gradient_memory"] - self.regularization * message_sum[n].to(kinds["gradient_memory"].dtype)
            for n, kinds in shared.items()
        }
        mean = moved_by_mean(round_, message_sum)
        weights = {n: (w - memory[n] / self.regularization).to(w.dtype) for n, w in mean.items()}
        return ConsensusResult(weights, {n: {"gradient_memory": h} for n, h in memory.items()})
