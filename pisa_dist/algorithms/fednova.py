"""FedNova: FedAvg whose displacements are divided by how much each worker has worked, before they are averaged."""

from dataclasses import dataclass

from pisa_dist.algorithms.base import (
    ConsensusResult,
    LocalResult,
    Round,
    State,
    Tensors,
    moved_by_mean,
    squared_distance,
    weighted_sums,
)
from pisa_dist.algorithms.fedavg import FedAvg
from pisa_dist.algorithms.local_sgd import local_sgd

# Key of the message's number, beside the parameters' names.
STEPS = "effective steps"


@dataclass
class FedNova(FedAvg):
    """FedNova (Wang, Liu, Liang, Joshi, Poor, NeurIPS 2020).

    Local SGD with momentum as in FedAvg, K_i steps at worker i. With a_i the weights with which the gradients of those
    steps enter its displacement, over the present workers,
        tau = sum_i alpha_i ||a_i||_1 / sum_i alpha_i
        w <- w + tau sum_i alpha_i (w_i - w) / ||a_i||_1 / sum_i alpha_i
    Where workers take unequal numbers of steps FedAvg stops at the minimiser of another objective, in which those that
    take more count more; FedNova does not. With equal numbers it is FedAvg.
    """

    name: str = "fednova"

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        moves = local_sgd(round_, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        effective = effective_steps(round_.num_local_steps, self.momentum)
        normalised = {n: u / effective for n, u in moves.items()}
        message = weighted_sums(normalised, round_.worker_weight)
        # In the type of the rest: a wider number would widen the whole message.
        some = next(iter(message.values()))
        message[STEPS] = (effective * round_.worker_weight.sum()).to(some.dtype)
        return LocalResult(state, message, squared_distance(moves, round_.worker_weight))

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        mean_steps = float(message_sum[STEPS]) / round_.present_weight
        return ConsensusResult(moved_by_mean(round_, message_sum, factor=mean_steps), shared)


def effective_steps(num_steps: int, momentum: float) -> float:
    """||a_i||_1 of local SGD with momentum mu (section 3.1 of the paper, "local momentum").

    The gradient of step k of K enters the displacement 1 + mu + ... + mu^(K-k) times; over the steps that adds up to
        (K - mu (1 - mu^K) / (1 - mu)) / (1 - mu)
    """
    return (num_steps - momentum * (1 - momentum**num_steps) / (1 - momentum)) / (1 - momentum)
