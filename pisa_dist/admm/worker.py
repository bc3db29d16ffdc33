"""One worker's step for one parameter: the equations of `updates` in Algorithm 1's order."""

from typing import NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.preconditioners.base import Preconditioner, State
from pisa_dist.admm.updates import Scalar, dual_update, local_step, worker_message


class WorkerStep(NamedTuple):
    """What a worker keeps (dual, preconditioner state) and what it sends (message)."""

    dual: Tensor
    preconditioner_state: State
    message: Tensor
    displacement: Tensor


def worker_step(
    dual: Tensor,
    preconditioner_state: State,
    gradient: Tensor,
    *,
    preconditioner: Preconditioner,
    penalty: Scalar,
    preconditioner_scale: Scalar,
    worker_weight: Scalar,
    step: Scalar,
    shape: torch.Size,
) -> WorkerStep:
    """Preconditioner, primal and dual step and message of one worker, or of several stacked ones, for one parameter.

    The drop-in optimizer and the trainer both call this; neither has an equation of its own.

    Args:
        dual: pi_i, shape [*workers, *shape].
        preconditioner_state: what the preconditioner's last step (or `init_state`) returned.
        gradient: g_i at the consensus weights, same shape and dtype as `dual`.
        preconditioner: the rule for Q_i.
        penalty: sigma_i > 0 of this step.
        preconditioner_scale: rho_i >= 0 of this step.
        worker_weight: alpha_i > 0.
        step: t, this step included, from 1.
        shape: the parameter's own shape.

    Returns:
        New tensors; the inputs are unchanged, so that a step can still be refused.
    """
    direction, q, state = preconditioner.precondition(preconditioner_state, dual, gradient, step=step, shape=shape)
    displacement = local_step(
        dual, direction, penalty=penalty, preconditioner_scale=preconditioner_scale, preconditioner=q
    )
    new_dual = dual_update(dual, displacement, penalty=penalty)
    message = worker_message(new_dual, displacement, penalty=penalty, worker_weight=worker_weight)
    return WorkerStep(new_dual, state, message, displacement)
