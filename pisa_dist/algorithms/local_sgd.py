"""Local SGD on stacked workers: what FedAvg and the methods that correct it have in common."""

from collections.abc import Callable

import torch

from pisa_dist.algorithms.base import Round, Tensors, in_state_dtype


def local_sgd(
    round_: Round,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    correction: Callable[[Tensors], Tensors] | None = None,
) -> Tensors:
    """Every present worker's displacement w_i - w after the round's local steps, stacked, in `state_dtype`.

    From w_i = w and b = 0, `num_local_steps` times:
        b <- mu b + g(w_i) + weight_decay w_i + correction(w_i),   w_i <- w_i - lr b

    Args:
        round_: gives gradients, consensus weights and the number of steps.
        lr: step size > 0.
        momentum: mu in [0, 1).
        weight_decay: L2 coefficient >= 0.
        correction: (local weights) -> what a method adds to the gradient, stacked by name.
    """
    start = in_state_dtype(round_.stacked_weights())
    local = start
    velocity: Tensors = {}
    for step in range(round_.num_local_steps):
        direction = round_.gradients_at(local, step)
        if weight_decay:
            direction = {n: torch.add(g, local[n], alpha=weight_decay) for n, g in direction.items()}
        if correction is not None:
            added = correction(local)
            direction = {n: g + added[n] for n, g in direction.items()}
        if momentum and velocity:
            direction = {n: torch.add(g, velocity[n], alpha=momentum) for n, g in direction.items()}
        velocity = direction
        local = {n: torch.add(w, velocity[n], alpha=-lr) for n, w in local.items()}
    return {n: w - start[n] for n, w in local.items()}
