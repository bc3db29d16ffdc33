"""PISA's update equations (Algorithm 1 of arXiv 2502.10784) in delta form, one pure function each.

Notation: w consensus weights, w_i local weights, u_i = w_i - w displacement, pi_i dual, g_i gradient at w,
sigma_i penalty, rho_i preconditioner scale, Q_i diagonal preconditioner, alpha_i worker weight (sum 1),
lambda consensus L2. The delta form never stores w_i: what a worker sends is small, so that it survives
bf16 and int8.

Every tensor may carry leading worker dimensions; scalars may then be tensors that broadcast against them,
so that one call serves one worker or a thousand. What an equation allocates it goes on using in place: for many workers
the time goes into memory.
"""

import torch
from torch import Tensor

Scalar = float | Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which duals, moments and messages are kept: float32 for half-precision weights, else the same."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def local_step(
    dual: Tensor, gradient: Tensor, *, penalty: Scalar, preconditioner_scale: Scalar, preconditioner: Scalar
) -> Tensor:
    """Displacement of one worker from the consensus point.

    PISA, Algorithm 1 (primal step), for a diagonal Q_i:
        u_i = w_i - w = -(pi_i + g_i) / (sigma_i + rho_i Q_i)

    Args:
        dual: pi_i, any shape, in units of the gradient.
        gradient: g_i, same shape, at the consensus weights, not divided by the number of workers.
        penalty: sigma_i > 0, gradient per weight.
        preconditioner_scale: rho_i >= 0, gradient per weight and unit of Q.
        preconditioner: diagonal of Q_i, same shape or a scalar, >= 0.

    Returns:
        u_i, same shape and dtype as `dual`. Inputs are unchanged; nothing is communicated.
    """
    return (dual + gradient).div_(penalty + preconditioner_scale * preconditioner).neg_()


def dual_update(dual: Tensor, displacement: Tensor, *, penalty: Scalar) -> Tensor:
    """New dual of one worker.

    PISA, Algorithm 1 (dual step):
        pi_i <- pi_i + sigma_i (w_i - w) = pi_i + sigma_i u_i

    Args:
        dual: pi_i, any shape, in units of the gradient.
        displacement: u_i, same shape, in units of the weights.
        penalty: sigma_i > 0, the one that the primal step used.
    """
    return (penalty * displacement).add_(dual)


def worker_message(dual: Tensor, displacement: Tensor, *, penalty: Scalar, worker_weight: Scalar) -> Tensor:
    """What one worker adds to the all-reduce.

    Delta form of the consensus step:
        msg_i = alpha_i (pi_i + sigma_i u_i)

    Args:
        dual: pi_i *after* the dual step, any shape.
        displacement: u_i, same shape; zero for an absent worker, whose dual then keeps standing for its data.
        penalty: sigma_i > 0, the one that the primal step used.
        worker_weight: alpha_i > 0.
    """
    return (penalty * displacement).add_(dual).mul_(worker_weight)


def consensus_update(
    consensus_weights: Tensor,
    message_sum: Tensor,
    *,
    penalty_sum: Scalar,
    consensus_l2: Scalar = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Next consensus weights.

    PISA, Algorithm 1 (consensus step) in delta form; equal to
    sum_i alpha_i (sigma_i w_i + pi_i) / (sum_i alpha_i sigma_i + lambda):
        w <- w + (sum_i msg_i - lambda w) / (sum_i alpha_i sigma_i + lambda)

    Args:
        consensus_weights: w, any shape.
        message_sum: sum_i msg_i over all workers, same shape.
        penalty_sum: sum_i alpha_i sigma_i > 0, gradient per weight.
        consensus_l2: lambda >= 0, gradient per weight.
        out: where to write the result, such as `consensus_weights` itself; None for a new tensor.
    """
    total = penalty_sum + consensus_l2
    if isinstance(consensus_l2, Tensor) or consensus_l2:
        message_sum = message_sum - consensus_l2 * consensus_weights
    if isinstance(total, Tensor):
        return torch.add(consensus_weights, message_sum / total, out=out)
    return torch.add(consensus_weights, message_sum, alpha=1 / total, out=out)
