"""SCAFFOLD: local SGD steps corrected by control variates."""

from dataclasses import dataclass, replace

from pisa_dist.algorithms.base import (
    Algorithm,
    ConsensusResult,
    LocalResult,
    Round,
    State,
    Tensors,
    in_state_dtype,
    moved_by_mean,
    shared_state,
    squared_distance,
    stacked_state,
    weighted_sums,
)
from pisa_dist.algorithms.local_sgd import local_sgd


@dataclass
class Scaffold(Algorithm):
    """SCAFFOLD (Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, ICML 2020).

    Each present worker steps along g - c_i + c from the consensus weights; all controls start at zero. Then
        option 1:  c_i <- the gradient at the consensus weights, on the first minibatch of the round
        option 2:  c_i <- c_i - c + (w - w_i) / (K lr),  K the number of local steps
        w <- w + server_lr sum_i alpha_i (w_i - w) / sum_i alpha_i      over the present workers
        c <- c + sum_i alpha_i (change of c_i)
    A message is twice FedAvg's.

    Attributes:
        lr: local step size > 0.
        server_lr: factor > 0 on the averaged displacement.
        option: 1 or 2, how c_i is renewed.
    """

    name: str = "scaffold"
    takes_local_steps = True

    lr: float = 0.05
    server_lr: float = 1.0
    option: int = 2

    def init_worker_state(self, parameters: Tensors, num_workers: int) -> State:  # noqa: D102 - as in Algorithm
        return stacked_state(parameters, num_workers, "control")

    def init_shared_state(self, parameters: Tensors) -> State:  # noqa: D102 - as in Algorithm
        return shared_state(parameters, "control")

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        own = {n: kinds["control"] for n, kinds in state.items()}
        common = {n: kinds["control"] for n, kinds in round_.shared.items()}
        correction = {n: common[n] - c for n, c in own.items()}
        renewed: Tensors = {}

        def gradients(local: Tensors, step: int) -> Tensors:
            found = round_.gradients(local, step)
            if self.option == 1 and step == 0:  # the first step is taken at the consensus weights
                renewed.update(in_state_dtype(found))
            return found

        moves = local_sgd(replace(round_, gradients=gradients), lr=self.lr, correction=lambda _: correction)
        if self.option == 2:
            renewed = {n: -correction[n] - u / (round_.num_local_steps * self.lr) for n, u in moves.items()}
        changes = {n: renewed[n] - c for n, c in own.items()}
        message = weighted_sums(moves, round_.worker_weight)
        message |= {f"control of {n}": s for n, s in weighted_sums(changes, round_.worker_weight).items()}
        new_state = {n: {"control": c} for n, c in renewed.items()}
        return LocalResult(new_state, message, squared_distance(moves, round_.worker_weight))

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        new_shared = {
            n: {"control": kinds["control"] + message_sum[f"control of {n}"].to(kinds["control"].dtype)}
            for n, kinds in shared.items()
        }
        return ConsensusResult(moved_by_mean(round_, message_sum, factor=self.server_lr), new_shared)
