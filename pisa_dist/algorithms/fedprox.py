"""FedProx: FedAvg whose local objective is held near the consensus weights."""

from dataclasses import dataclass

from pisa_dist.algorithms.base import LocalResult, Round, State, squared_distance, weighted_sums
from pisa_dist.algorithms.fedavg import FedAvg
from pisa_dist.algorithms.local_sgd import local_sgd


@dataclass
class FedProx(FedAvg):
    """FedProx (Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, MLSys 2020).

    FedAvg on F_i(w_i) + (proximal/2) ||w_i - w||^2. With proximal = 0 it is FedAvg.

    Attributes:
        proximal: mu of the paper, >= 0, gradient per weight.
    """

    name: str = "fedprox"

    proximal: float = 0.01

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        moves = local_sgd(
            round_,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            correction=lambda local: {n: self.proximal * (w - round_.weights[n]) for n, w in local.items()},
        )
        message = weighted_sums(moves, round_.worker_weight)
        return LocalResult(state, message, squared_distance(moves, round_.worker_weight))
