"""Inexact solution of a worker's subproblem by preconditioned steps, and the consensus under a metric penalty.

The penalty is a matrix sigma P with one diagonal metric P > 0 for all workers, in units of the gradient, so that
1/sigma is a step size in units of P, like Adam's learning rate. The subproblem of worker i is

    min over w_i of  F_i(w_i) + <pi_i, w_i - w> + (sigma/2) (w_i - w)' P (w_i - w)

The fixed point is exact for any sigma, P, relaxation and number of steps: there u_i = 0, so pi_i = -grad F_i(w), and
the weights stand still only where sum_i alpha_i pi_i = 0.
"""

from typing import NamedTuple

from torch import Tensor

from pisa_dist.admm.updates import Scalar


class InnerMoments(NamedTuple):
    """Moments that a worker keeps from round to round, of the dual's shape."""

    first: Tensor  # average of g + pi
    second: Tensor  # average of g^2: of the gradient alone, because P is built from it


def inner_moments(
    moments: InnerMoments, dual: Tensor, gradient: Tensor, *, first_decay: float, second_decay: float
) -> InnerMoments:
    """Moments after one more gradient: b <- beta_1 b + (1 - beta_1)(g + pi),  v <- beta_2 v + (1 - beta_2) g^2."""
    first = first_decay * moments.first + (1 - first_decay) * (gradient + dual)
    return InnerMoments(first, second_decay * moments.second + (1 - second_decay) * gradient * gradient)


def inner_rms(moments: InnerMoments, *, second_decay: float, step: Scalar) -> Tensor:
    """Root mean square of a worker's gradients, bias-corrected: sqrt(v / (1 - beta_2^k)), k inner steps so far."""
    return (moments.second / (1 - second_decay**step)).sqrt()


def inner_step(
    displacement: Tensor,
    moments: InnerMoments,
    *,
    lr: float,
    penalty_metric: Scalar,
    first_decay: float,
    second_decay: float,
    eps: float,
    step: Scalar,
) -> Tensor:
    """Next displacement u_i = w_i - w: an AdamW-like step with the penalty taken implicitly.

    With s = lr / (rms + eps) and the bias-corrected b:
        u_i <- (u_i - s b) / (1 + s sigma P)
    Taken explicitly, the penalty would diverge where s sigma P > 2.

    Args:
        displacement: u_i, any shape.
        moments: after `inner_moments`.
        lr: inner step size > 0, in units of the weights.
        penalty_metric: sigma P, same shape or a number; 0 leaves the penalty out.
        first_decay, second_decay, eps: of the moments.
        step: k, inner steps of this worker so far, this one included.
    """
    size = lr / (inner_rms(moments, second_decay=second_decay, step=step) + eps)
    return (displacement - size * moments.first / (1 - first_decay**step)) / (1 + size * penalty_metric)


def metric_consensus(
    consensus_weights: Tensor,
    displacement_mean: Tensor,
    dual_mean: Tensor,
    *,
    penalty_metric: Tensor,
    relaxation: float,
) -> Tensor:
    """Next consensus weights: w <- w + kappa sum_i alpha_i u_i + (sigma P)^-1 sum_i alpha_i pi_i.

    Args:
        consensus_weights: w, any shape.
        displacement_mean: sum_i alpha_i u_i, same shape.
        dual_mean: sum_i alpha_i pi_i after the dual step, same shape.
        penalty_metric: sigma P > 0, same shape.
        relaxation: kappa >= 0; 1 is ADMM, 0 moves along the duals alone.
    """
    return consensus_weights + relaxation * displacement_mean + dual_mean / penalty_metric
