"""SISA's step for one parameter in one or two passes over memory, without temporaries of the parameter's size.

The same numbers as `worker.worker_step` with `SecondMoment` and `updates.consensus_update`, to rounding, in a form that
needs one root and one division a number. `torch.compile` makes one kernel of each pass (C++ on the CPU, Triton on
CUDA); without it a pass is worked off in pieces that stay in the processor's cache. With d = pi + g:

    m <- beta m + (1 - beta) min(d^2, eta^2)                             (adagrad: m + min(d^2, eta^2))
    r  = d / (1 + (rho/sigma) (sqrt(m / (1 - beta^t)) + eps))            = -sigma u
    pi <- pi - r,   msg = alpha (pi - r),   w <- w + (sum_i msg_i - lambda w) / (sum_i alpha_i sigma_i + lambda)

A worker that has others first makes its message and changes nothing, because any rank may still refuse the step; once
it stands, the second pass computes pi and m again, which costs less than keeping both while the messages travel.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.device import on_device
from pisa_dist.admm.preconditioners.newton_schulz import NewtonSchulz, momentum_update, nesterov_momentum
from pisa_dist.admm.preconditioners.second_moment import SecondMoment
from pisa_dist.admm.updates import dual_update, local_step, worker_message

# Numbers in a piece, by measurement: a temporary stays in the cache, and is too small for malloc to map it anew.
PIECE = 30000
Constants = Tensor | tuple[float, ...]
COMPILED_FROM = 4096  # smaller parameters are not worth a compiled kernel's call


def can_fuse(*tensors: Tensor) -> bool:
    """Whether `second_moment_step` takes these: contiguous, of one type and device."""
    first = tensors[0]
    return all(t.is_contiguous() and t.dtype == first.dtype and t.device == first.device for t in tensors)


class StepSettings(NamedTuple):
    """What a step is taken with.

    Attributes:
        rule: scheme of the second moment, its decay, eps and bound.
        penalty: sigma > 0.
        preconditioner_scale: rho >= 0.
        step: t, this step included, from 1.
        compiled: make kernels with torch.compile.
    """

    rule: SecondMoment
    penalty: float
    preconditioner_scale: float
    step: int
    compiled: bool = False


def second_moment_message(
    dual: Tensor, second_moment: Tensor, gradient: Tensor, settings: StepSettings, *, worker_weight: float, out: Tensor
) -> None:
    """Write the message alpha (pi + sigma u) of a step to `out`; changes nothing else.

    Args:
        dual, second_moment, gradient: pi, m, g before the step; contiguous, of one shape, type and device.
        settings: of the step.
        worker_weight: alpha > 0.
        out: as the others.
    """
    constants = _constants(settings, dual.dtype, dual.device, worker_weight)
    _work_off(_message_kernel, (dual, second_moment, gradient, out), constants, compiled=settings.compiled)


def second_moment_commit_(
    dual: Tensor,
    second_moment: Tensor,
    gradient: Tensor,
    weights: Tensor,
    message_sum: Tensor,
    settings: StepSettings,
    *,
    weight_sum: float,
    penalty_sum: float,
    consensus_l2: float,
) -> None:
    """The step itself, in place: dual, second moment, and the consensus weights, which may be of another float type.

    Args:
        dual, second_moment, gradient: as `second_moment_message` had them.
        weights: w.
        message_sum: sum over all workers.
        settings: of the step.
        weight_sum: sum of the weights alpha_i with which the messages were made.
        penalty_sum: sum of alpha_i sigma_i over all workers, divided by `weight_sum`.
        consensus_l2: lambda >= 0.
    """
    total = penalty_sum + consensus_l2
    constants = _constants(settings, dual.dtype, dual.device, 1 / (weight_sum * total), consensus_l2 / total)
    tensors = (dual, second_moment, gradient, weights, message_sum)
    _work_off(_commit_kernel, tensors, constants, compiled=settings.compiled)


def second_moment_step_(
    dual: Tensor,
    second_moment: Tensor,
    gradient: Tensor,
    weights: Tensor,
    settings: StepSettings,
    *,
    consensus_l2: float,
) -> None:
    """Both at once, in place, for a worker that is alone: its message is the sum."""
    total = settings.penalty + consensus_l2
    constants = _constants(settings, dual.dtype, dual.device, 1 / total, consensus_l2 / total)
    _work_off(_alone_kernel, (dual, second_moment, gradient, weights), constants, compiled=settings.compiled)


def newton_schulz_message(
    dual: Tensor,
    momentum_buffer: Tensor,
    gradient: Tensor,
    rule: NewtonSchulz,
    *,
    penalty: float,
    preconditioner_scale: float,
    worker_weight: float,
    shape: torch.Size,
    compiled: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """`worker_step` with `NewtonSchulz`: a pass, the iterations, a pass; the same equations, fewer temporaries.

    Args:
        dual, momentum_buffer, gradient: pi, b, g before the step; contiguous, of one type and device; not changed.
        rule: of the step.
        penalty, preconditioner_scale, worker_weight: sigma, rho, alpha.
        shape: the parameter's own shape.
        compiled: make kernels with torch.compile.
        out: where the message alpha (pi + sigma u) goes.

    Returns:
        The new dual and the new momentum buffer.
    """
    numbers = (rule.momentum, rule.eps, penalty, preconditioner_scale, worker_weight)
    constants = on_device(numbers, dtype=dual.dtype, device=dual.device) if compiled else numbers
    buffer, averaged, new_dual = (torch.empty_like(dual) for _ in range(3))
    _work_off(_momentum_kernel, (momentum_buffer, gradient, buffer, averaged), constants, compiled=compiled)
    direction = rule.orthogonalize(averaged, shape=shape).contiguous()
    _work_off(_direction_kernel, (dual, direction, new_dual, out), constants, compiled=compiled)
    return new_dual, buffer


def _momentum_kernel(
    momentum_buffer: Tensor, gradient: Tensor, buffer: Tensor, averaged: Tensor, constants: Constants
) -> None:
    momentum: Any = constants[0]
    buffer.copy_(momentum_update(momentum_buffer, gradient, momentum=momentum))
    averaged.copy_(nesterov_momentum(buffer, gradient, momentum=momentum))


def _direction_kernel(dual: Tensor, direction: Tensor, new_dual: Tensor, message: Tensor, constants: Constants) -> None:
    _, eps, penalty, scale, worker_weight = constants
    q = (dual + direction).abs_().add_(eps)
    displacement = local_step(dual, direction, penalty=penalty, preconditioner_scale=scale, preconditioner=q)
    new_dual.copy_(dual_update(dual, displacement, penalty=penalty))
    message.copy_(worker_message(new_dual, displacement, penalty=penalty, worker_weight=worker_weight))


@lru_cache(maxsize=64)  # the same for all parameters of a group
def _constants(settings: StepSettings, dtype: torch.dtype, device: torch.device, *more: float) -> Constants:
    """What `_local` takes, in its order, and what a kernel needs besides."""
    rule, ratio = settings.rule, settings.preconditioner_scale / settings.penalty
    decay, is_sum, bound = rule.second_moment_decay, rule.scheme == "adagrad", rule.preconditioner_bound
    correction = 1 - decay**settings.step if rule.scheme == "adam" else 1.0
    constants = (
        torch.finfo(dtype).max if bound is None else bound * bound,
        1.0 if is_sum else decay,
        1.0 if is_sum else 1 - decay,
        ratio / correction**0.5,
        1.0 + ratio * rule.eps,
        *more,
    )
    # torch.compile would compile each new number anew, but not each new tensor.
    return on_device(constants, dtype=dtype, device=device) if settings.compiled else constants


def _work_off(kernel: Callable[..., None], tensors: Sequence[Tensor], constants: Constants, *, compiled: bool) -> None:
    flat = [t.detach().view(-1) for t in tensors]
    if compiled and flat[0].numel() >= COMPILED_FROM:
        _compiled(kernel)(*flat, constants)
        return
    length = PIECE if flat[0].device.type == "cpu" else max(1, flat[0].numel())
    for pieces in zip(*(torch.split(t, length) for t in flat), strict=True):
        kernel(*pieces, constants)


def _message_kernel(dual: Tensor, moment: Tensor, gradient: Tensor, message: Tensor, constants: Constants) -> None:
    *local, worker_weight = constants
    pi, _, r = _local(dual, moment, gradient, *local)
    message.copy_(pi.sub_(r).mul_(worker_weight))


def _commit_kernel(
    dual: Tensor, moment: Tensor, gradient: Tensor, weights: Tensor, message_sum: Tensor, constants: Constants
) -> None:
    *local, rate, shrinkage = constants
    pi, m, _ = _local(dual, moment, gradient, *local)
    weights.copy_((message_sum * rate).add_(weights * (1 - shrinkage)))
    dual.copy_(pi)
    moment.copy_(m)


def _alone_kernel(dual: Tensor, moment: Tensor, gradient: Tensor, weights: Tensor, constants: Constants) -> None:
    *local, rate, shrinkage = constants
    pi, m, r = _local(dual, moment, gradient, *local)
    dual.copy_(pi)
    moment.copy_(m)
    weights.mul_(1 - shrinkage).add_(pi.sub_(r).mul_(rate))


def _local(
    dual: Tensor, moment: Tensor, gradient: Tensor, largest: Any, decay: Any, mix: Any, slope: Any, offset: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """New dual, new moment, and r = -sigma u, in new memory.

    The constants are numbers, or scalar tensors under torch.compile. Without it, what goes on in place stays in the
    processor's nearest cache.
    """
    d = dual + gradient
    m = (d * d).clamp_(max=largest).mul_(mix).add_(decay * moment)
    r = d.div_(m.sqrt().mul_(slope).add_(offset))
    return dual - r, m, r


@cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(kernel, dynamic=True)
