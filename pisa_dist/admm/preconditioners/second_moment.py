"""SISA's diagonal preconditioners: Q_i = diag(sqrt(second moment of pi_i + g_i))."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pisa_dist.admm.preconditioners.base import Preconditioned, Preconditioner, State
from pisa_dist.admm.updates import Scalar
from pisa_dist.checks import check_choice, check_ranges

SCHEMES = ("adam", "rmsprop", "adagrad")


def clipped_square(direction: Tensor, bound: float | None) -> Tensor:
    """n_i = min(d_i * d_i, eta_i^2), elementwise, with d_i = pi_i + g_i (SISA, Algorithm 2).

    Args:
        direction: d_i, any shape.
        bound: eta_i > 0, or None for no bound.
    """
    square = direction * direction
    # Without a bound, the largest float: an infinite moment would never come down again.
    return square.clamp_(max=torch.finfo(square.dtype).max if bound is None else bound * bound)


def adagrad_moment(second_moment: Tensor, square: Tensor) -> Tensor:
    """m_i <- m_i + n_i (SISA, Algorithm 2, AdaGrad scheme)."""
    return second_moment + square


def averaged_moment(second_moment: Tensor, square: Tensor, decay: float) -> Tensor:
    """m_i <- beta m_i + (1 - beta) n_i (SISA, Algorithm 2, RMSProp and Adam schemes)."""
    return (decay * second_moment).add_(square, alpha=1 - decay)


def bias_corrected(second_moment: Tensor, decay: float, step: Scalar) -> Tensor:
    """m_i / (1 - beta^t), t counted from 1 (SISA, Algorithm 2, Adam scheme)."""
    correction = 1 - decay**step
    # A tensor of steps comes in float64, where 1 - beta^t keeps its digits; it must not widen the moment.
    return second_moment / (correction.to(second_moment.dtype) if isinstance(correction, Tensor) else correction)


@dataclass(frozen=True)
class SecondMoment(Preconditioner):
    """Q_i = diag(sqrt(m_i)) + eps, m_i the second moment of d_i = pi_i + g_i (SISA, Algorithm 2).

    The dual is inside: it is d_i^2 that is averaged, not g_i^2.

    Args:
        scheme: "adam" (bias-corrected average), "rmsprop" (average) or "adagrad" (sum).
        second_moment_decay: beta in [0, 1); not used by "adagrad".
        eps: added to sqrt(m_i), >= 0, in units of the gradient.
        preconditioner_bound: eta_i > 0 clips |d_i|, in units of the gradient; None for no bound.
    """

    scheme: str = "adam"
    second_moment_decay: float = 0.999
    eps: float = 1e-8
    preconditioner_bound: float | None = None

    def __post_init__(self) -> None:
        check_choice("preconditioner", self.scheme, SCHEMES)
        check_ranges(vars(self), optional=("preconditioner_bound",))

    def init_state(self, dual: Tensor) -> State:  # noqa: D102 - as in the protocol
        return {"second_moment": torch.zeros_like(dual)}

    def precondition(  # noqa: D102 - as in the protocol
        self, state: State, dual: Tensor, gradient: Tensor, *, step: Scalar, shape: torch.Size
    ) -> Preconditioned:
        square = clipped_square(dual + gradient, self.preconditioner_bound)
        if self.scheme == "adagrad":
            moment = adagrad_moment(state["second_moment"], square)
        else:
            moment = averaged_moment(state["second_moment"], square, self.second_moment_decay)
        if self.scheme == "adam":
            root = bias_corrected(moment, self.second_moment_decay, step).sqrt_()
        else:
            root = moment.sqrt()
        return Preconditioned(gradient, root.add_(self.eps), {"second_moment": moment})
