"""FedAvg: local SGD steps, then an average of the local weights."""

from dataclasses import dataclass

import torch

from pisa_dist.algorithms.base import (
    Algorithm,
    ConsensusResult,
    LocalResult,
    Round,
    State,
    Tensors,
    squared_distance,
    weighted_sum,
)


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
        start = round_.stacked_weights()
        local = start
        velocity: Tensors = {}
        for step in range(round_.num_local_steps):
            gradients = round_.gradients(local, step)
            if self.weight_decay:
                gradients = {n: torch.add(g, local[n], alpha=self.weight_decay) for n, g in gradients.items()}
            if self.momentum and velocity:
                gradients = {n: torch.add(g, velocity[n], alpha=self.momentum) for n, g in gradients.items()}
            velocity = gradients
            local = {n: torch.add(w, velocity[n], alpha=-self.lr) for n, w in local.items()}
        displacements = {n: w - start[n] for n, w in local.items()}
        message = {n: weighted_sum(u, round_.worker_weight) for n, u in displacements.items()}
        return LocalResult(state, message, squared_distance(displacements, round_.worker_weight))

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:  # noqa: D102
        weights = {n: w + message_sum[n].to(w.dtype) / round_.present_weight for n, w in round_.weights.items()}
        return ConsensusResult(weights, shared)
