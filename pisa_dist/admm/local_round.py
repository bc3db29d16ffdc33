"""A round of PISA with local steps, besides the steps: its settings, what a worker makes of them, the consensus.

Beyond the paper, with a metric P in the penalty, for alpha_i scaled to the workers that have been seen:
    u_i  <- local steps, see `admm.local_steps`
    pi_i <- pi_i + sigma P u_i
    w    <- w + kappa sum_i alpha_i u_i + (sigma P)^-1 sum_i alpha_i pi_i
sum_i alpha_i pi_i takes the step that every dual takes, with sigma sum_i alpha_i u_i. A message is therefore sigma u_i
alone, one tensor of the model's size, unless a dual has changed otherwise: it is a worker's first, or minus a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.local_steps import AdaptiveSolver, LocalSolver
from pisa_dist.admm.metrics import Metric
from pisa_dist.admm.penalty import divided_by_lr
from pisa_dist.admm.preconditioners.base import State
from pisa_dist.admm.updates import Scalar


def local_solver(
    metric: str, *, first_moment_decay: float, second_moment_decay: float, eps: float
) -> LocalSolver | AdaptiveSolver:
    """The rule of the local steps: plain ones where P = I, else AdamW-like ones."""
    return LocalSolver() if metric == "none" else AdaptiveSolver(first_moment_decay, second_moment_decay, eps)


def local_scale(preconditioner_scale: float | None, *, penalty: float, local_steps: int, lr: float) -> float:
    """rho of the local steps: 1/rho is their learning rate.

    Args:
        preconditioner_scale: rho > 0 as given; None for sigma times the number of steps, so that it grows with sigma
            and a round forgets the same share of a dual whatever their number is.
        penalty: sigma > 0 of this round, divided by `lr` already.
        local_steps: of the round, >= 1.
        lr: > 0, divides rho.
    """
    return local_steps * penalty if preconditioner_scale is None else divided_by_lr(preconditioner_scale, lr)


def is_forming_metric(
    round_number: int,
    *,
    rule: Metric,
    shape: torch.Size,
    is_formed: bool,
    enlarge_batch: bool,
    metric_rounds: int,
    metric_interval: int,
) -> bool:
    """Whether a round forms P's diagonal anew: when it is due, and where local steps begin without it.

    Args:
        round_number: from 1; it is due in the first `metric_rounds` and then every `metric_interval`.
        rule: P's; after large steps only the consensus has a use for the diagonal, and that where the rule looks at it.
        shape: of the parameter.
        is_formed: whether it ever was.
        enlarge_batch: whether the round is a large step.
        metric_rounds, metric_interval: >= 1.
    """
    is_due = round_number <= metric_rounds or round_number % metric_interval == 0
    return is_due and rule.uses_diagonal(shape) if enlarge_batch else is_due or not is_formed


def first_dual(gradient_sum: Tensor, num_steps: int) -> Tensor:
    """The dual of a worker after its first round, in which it had none: minus the mean of its gradients.

    Args:
        gradient_sum: sum of its gradients, any shape.
        num_steps: how many they are, >= 1.
    """
    return -gradient_sum / num_steps


def newcomers_displacement(displacement: Tensor, metric: Tensor) -> Tensor:
    """What of u_i counts after a worker's first round, whose steps knew no dual and drifted: nothing.

    While P is unknown, in the first round of all, that is so for everyone and still the way down.

    Args:
        displacement: u_i, [*workers, *shape].
        metric: P as the last consensus left it, [*shape]; 0 where it is unknown.
    """
    return torch.where(metric > 0, 0.0, displacement)


class MetricConsensus(NamedTuple):
    """Outcome of a consensus for one parameter."""

    weights: Tensor
    metric: Tensor
    metric_state: State


def metric_consensus(
    consensus_weights: Tensor,
    pull_sum: Tensor | None,
    dual_sum: Tensor,
    rms_sum: Tensor | None,
    *,
    seen: Scalar,
    rule: Metric,
    metric: Tensor,
    metric_state: State,
    penalty: float,
    relaxation: float,
    eps: float,
) -> MetricConsensus:
    """Next consensus weights under a metric, and the next diagonal P:

        w <- w + kappa sum_i alpha_i u_i + (sigma P)^-1 sum_i alpha_i pi_i

    The P that it uses is that of the local steps, which the duals were made with; the one that it forms is that of the
    next round. In the first round there is none yet, and it takes the one just formed.

    Args:
        consensus_weights: w, any shape.
        pull_sum: sum_i alpha_i sigma u_i over all workers, same shape; None where all stayed at w.
        dual_sum: sum_i alpha_i pi_i, same shape, pi_i after the dual step.
        rms_sum: sum_i alpha_i times the RMS of worker i's gradients, same shape; None keeps P.
        seen: sum of alpha_i over the workers that are in the sums, > 0.
        rule: P's rule beyond its diagonal.
        metric: P's diagonal, same shape; 0 where it is unknown.
        metric_state: the rule's.
        penalty: sigma > 0.
        relaxation: kappa >= 0.
        eps: added to the mean RMS, >= 0.
    """
    formed = metric if rms_sum is None else rms_sum / seen + eps
    used = torch.where(metric > 0, metric, formed)
    direction, new_state = rule.solve(dual_sum / seen, used, metric_state)
    if pull_sum is not None:
        direction = relaxation * pull_sum / seen + direction
    move = direction / penalty
    weights = (consensus_weights.to(move.dtype) + move).to(consensus_weights.dtype)
    return MetricConsensus(weights, formed, new_state)
