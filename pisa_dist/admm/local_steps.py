"""Inexact solution of a worker's subproblem by preconditioned steps.

The penalty is a matrix sigma P with one metric P > 0 for all workers. The subproblem of worker i is

    min over w_i of  F_i(w_i) + <pi_i, w_i - w> + (sigma/2) (w_i - w)' P (w_i - w)

of which the paper's local step is one linearised step from w_i = w. The fixed point is exact for any sigma, P and
number of steps: there u_i = w_i - w = 0, so pi_i = -grad F_i(w).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.preconditioners.base import State
from pisa_dist.admm.updates import Scalar


def inner_step(
    displacement: Tensor,
    direction: Tensor,
    *,
    penalty_metric: Scalar,
    preconditioner_scale: Scalar,
    preconditioner: Scalar,
) -> Tensor:
    """Next displacement u_i = w_i - w: a preconditioned step on the subproblem, the penalty taken implicitly.

    With d the direction, an estimate of grad F_i(w + u_i) + pi_i, it minimises
    <d, u> + (rho/2) ||u - u_i||_Q^2 + (sigma/2) ||u||_P^2:
        u_i <- (rho Q u_i - d) / (sigma P + rho Q)
    From u_i = 0 and with P = I it is the primal step of PISA, Algorithm 1. 1/rho is a learning rate, and taken
    explicitly the penalty would diverge where sigma P > 2 rho Q.

    Args:
        displacement: u_i, any shape, in units of the weights.
        direction: d, same shape, in units of the gradient.
        penalty_metric: sigma P, same shape or a number, >= 0; 0 leaves the penalty out.
        preconditioner_scale: rho > 0.
        preconditioner: diagonal of Q, same shape or a number, > 0.
    """
    pull = preconditioner_scale * preconditioner
    return (pull * displacement - direction) / (penalty_metric + pull)


class Direction(NamedTuple):
    """What a `LocalSolver` makes of a gradient."""

    direction: Tensor  # d, an estimate of grad F_i(w + u_i) + pi_i
    preconditioner: Scalar  # diagonal of Q
    state: State


class InnerStep(NamedTuple):
    """Outcome of one step of a `LocalSolver`."""

    displacement: Tensor
    state: State


@dataclass(frozen=True)
class LocalSolver:
    """Plain steps on the subproblem: d = g_i + pi_i and Q = I. It keeps no state."""

    def init_state(self, dual: Tensor) -> State:
        """State before the first step of a worker, or of several whose duals are stacked."""
        return {}

    def direction(self, dual: Tensor, gradient: Tensor, state: State, *, count: Scalar) -> Direction:
        """d and Q of a step; arguments as in `step`. Changes none of its inputs."""
        return Direction(gradient + dual, 1.0, state)

    def step(
        self,
        displacement: Tensor,
        dual: Tensor,
        gradient: Tensor,
        state: State,
        *,
        penalty_metric: Scalar,
        preconditioner_scale: Scalar,
        count: Scalar,
    ) -> InnerStep:
        """One step of a worker, or of several stacked ones, for one parameter. Changes none of its inputs.

        Args:
            displacement: u_i, shape [*workers, *shape].
            dual: pi_i, same shape.
            gradient: g_i at w + u_i, same shape and dtype.
            state: what the last step (or `init_state`) returned; it is kept from round to round.
            penalty_metric: sigma P >= 0 of this round.
            preconditioner_scale: rho > 0 of this round.
            count: steps that the worker has taken in all rounds, this one included.
        """
        direction, preconditioner, new_state = self.direction(dual, gradient, state, count=count)
        displacement = inner_step(
            displacement,
            direction,
            penalty_metric=penalty_metric,
            preconditioner_scale=preconditioner_scale,
            preconditioner=preconditioner,
        )
        return InnerStep(displacement, new_state)


@dataclass(frozen=True)
class AdaptiveSolver(LocalSolver):
    """AdamW-like steps whose moments are kept from round to round.

        b <- beta_1 b + (1 - beta_1)(g + pi),   d = b / (1 - beta_1^k)
        v <- beta_2 v + (1 - beta_2) g^2,       Q = sqrt(v / (1 - beta_2^k)) + eps
    for the worker's k-th step. The second moment is that of the gradient alone, because P is built from it and g + pi
    vanishes at the solution.

    Args:
        first_moment_decay: beta_1 in [0, 1).
        second_moment_decay: beta_2 in [0, 1).
        eps: >= 0.
    """

    first_moment_decay: float = 0.9
    second_moment_decay: float = 0.99
    eps: float = 1e-8

    def init_state(self, dual: Tensor) -> State:  # noqa: D102 - as in LocalSolver
        return {"first_moment": torch.zeros_like(dual), "second_moment": torch.zeros_like(dual)}

    def direction(self, dual: Tensor, gradient: Tensor, state: State, *, count: Scalar) -> Direction:  # noqa: D102
        first = torch.lerp(gradient + dual, state["first_moment"], self.first_moment_decay)
        second = torch.lerp(gradient * gradient, state["second_moment"], self.second_moment_decay)
        new_state = {"first_moment": first, "second_moment": second}
        preconditioner = self.rms(new_state, count=count).add_(self.eps)
        return Direction(first / (1 - self.first_moment_decay**count), preconditioner, new_state)

    def rms(self, state: State, *, count: Scalar) -> Tensor:
        """Root mean square of a worker's gradients after `count` >= 1 steps: sqrt(v / (1 - beta_2^k))."""
        return (state["second_moment"] / (1 - self.second_moment_decay**count)).sqrt()
