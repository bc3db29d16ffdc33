"""One worker's step for one parameter, as the drop-in optimizers take it, without a collective."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.fused import (
    StepSettings,
    can_fuse,
    newton_schulz_message,
    second_moment_commit_,
    second_moment_message,
    second_moment_step_,
)
from pisa_dist.admm.packing import pack, unpack_
from pisa_dist.admm.penalty import divided_by_lr
from pisa_dist.admm.preconditioners import NewtonSchulz, SecondMoment
from pisa_dist.admm.updates import consensus_update, state_dtype
from pisa_dist.admm.worker import worker_step
from pisa_dist.sharding import local_part
from pisa_dist.slots import Bucket, ParamGroup, Slot, group_penalty

RESIDUAL = "residual"  # state that no step reads: what compression has left out


class Settings(NamedTuple):
    """sigma_i, rho_i and t of a step in one parameter group."""

    penalty: float
    preconditioner_scale: float
    step: int


class Outcome(NamedTuple):
    """What the local step of one parameter leads to, to be kept once every rank knows that the step stands."""

    dual: Tensor
    preconditioner_state: dict[str, Tensor]

    def of_row(self, row: int) -> "Outcome":
        """That of one parameter, where several were stacked."""
        return Outcome(self.dual[row], {name: value[row] for name, value in self.preconditioner_state.items()})


class Work(NamedTuple):
    """What a step works on: one parameter's part on this rank, or copies of several of them.

    Attributes:
        slot: the parameter; of several the first, whose rule and settings are those of all.
        weights: w.
        state: dual and preconditioner state.
        gradient: g_i in the state's type.
    """

    slot: Slot
    weights: Tensor
    state: dict[str, Tensor]
    gradient: Tensor


class Agreed(NamedTuple):
    """What the ranks of an iteration know together about one parameter group.

    Attributes:
        weight_sum: sum of all alpha_i.
        penalty_sum: sum of alpha_i sigma_i divided by `weight_sum`.
        consensus_l2: lambda >= 0.
    """

    weight_sum: float
    penalty_sum: float
    consensus_l2: float


def describe_group(group: ParamGroup, names: Sequence[str]) -> list[str]:
    """What all ranks must agree on in one parameter group, a line each: the settings `names` and the parameters."""
    settings = ", ".join(f"{name}={group[name]}" for name in names)
    lines = [f"{settings} in a parameter group"]
    for p in group["params"]:
        here = local_part(p)
        part = "" if here is p else f", {tuple(here.shape)} of it on this rank"
        lines.append(f"a parameter of shape {tuple(p.shape)}, {p.dtype}, requires_grad={p.requires_grad}{part}")
    return lines


def group_settings(group: ParamGroup) -> Settings:
    """What the coming step uses in one parameter group."""
    step, lr = group["num_steps"] + 1, float(group["lr"])
    return Settings(group_penalty(group, step, lr), divided_by_lr(group["preconditioner_scale"], lr), step)


def count_step(groups: Iterable[ParamGroup]) -> None:
    """One more step has been taken."""
    for group in groups:
        group["num_steps"] += 1


def local_gradient(parameter: Tensor, scale: Tensor | None) -> Tensor:
    """The local gradient in the state's type, without the factor `scale`; zero where there is none."""
    gradient, dtype = parameter.grad, state_dtype(parameter.dtype)
    if gradient is None:
        return torch.zeros_like(local_part(parameter), dtype=dtype)
    gradient = local_part(gradient)
    if gradient.is_sparse:  # duals and messages are dense, so a sparse gradient saves nothing here
        gradient = gradient.to_dense()
    if gradient.dtype != dtype:
        gradient = gradient.to(dtype)
    return gradient if scale is None else gradient / scale.to(gradient.device)


def send_local_steps(
    bucket: Bucket,
    works: Sequence[Work],
    settings: Sequence[Settings],
    worker_weight: float,
    messages: Sequence[Tensor],
) -> "list[Outcome | StepSettings]":
    """`send_local_step` for a bucket: an outcome for each list of places in `bucket.together`.

    Small parameters go through one pass, end to end. On devices where many small products cost more than one batched
    one, parameters of one shape that NSISA orthogonalises are stacked and take their step together.

    Args:
        bucket: which parameters.
        works: of its slots.
        settings: by group.
        worker_weight: alpha_i > 0.
        messages: where the slots' messages go.
    """
    outcomes: list[Outcome | StepSettings] = []
    for places in bucket.together:
        first = places[0]
        own = settings[works[first].slot.group]
        if len(places) == 1:
            outcomes.append(send_local_step(works[first], own, worker_weight, messages[first]))
            continue
        several, chosen = [works[i] for i in places], [messages[i] for i in places]
        whole = _packed(several) if _is_packed(several[0]) else _stacked(several)
        message = torch.empty_like(whole.gradient)
        outcomes.append(send_local_step(whole, own, worker_weight, message))
        if _is_packed(whole):
            unpack_(message, chosen)
        else:
            torch._foreach_copy_(chosen, list(message))
    return outcomes


def send_local_step(work: Work, settings: Settings, worker_weight: float, message: Tensor) -> Outcome | StepSettings:
    """One parameter's local step; writes its message and changes nothing else, so that it can still be refused.

    Args:
        work: the parameter, its state and its gradient.
        settings: of the step.
        worker_weight: alpha_i > 0.
        message: where alpha_i (pi_i + sigma_i u_i) goes.

    Returns:
        What `settle` is to keep; where it costs less to compute it again, how.
    """
    slot, _, state, gradient = work
    fused = _fused(work, settings, message)
    if fused is not None:
        second_moment_message(
            state["dual"], state["second_moment"], gradient, fused, worker_weight=worker_weight, out=message
        )
        return fused
    rule = slot.preconditioner
    if isinstance(rule, NewtonSchulz) and _can_pass(work, message):
        dual, buffer = newton_schulz_message(
            state["dual"],
            state["momentum_buffer"],
            gradient,
            rule,
            penalty=settings.penalty,
            preconditioner_scale=settings.preconditioner_scale,
            worker_weight=worker_weight,
            shape=slot.parameter.shape,
            compiled=slot.is_compiled,
            out=message,
        )
        return Outcome(dual, {"momentum_buffer": buffer})
    step = worker_step(
        state["dual"],
        {name: value for name, value in state.items() if name not in ("dual", RESIDUAL)},
        gradient,
        preconditioner=rule,
        **settings._asdict(),
        worker_weight=worker_weight,
        shape=slot.parameter.shape,
    )
    message.copy_(step.message)
    return Outcome(step.dual, step.preconditioner_state)


def settle_all(
    bucket: Bucket,
    works: Sequence[Work],
    outcomes: "Sequence[Outcome | StepSettings]",
    message_sums: Sequence[Tensor],
    agreed: Sequence[Agreed],
) -> None:
    """`settle` for a bucket.

    Args:
        bucket, works: as `send_local_steps` had them.
        outcomes: what it returned.
        message_sums: sums of the slots' messages over all workers; may be overwritten.
        agreed: by group.
    """
    for places, outcome in zip(bucket.together, outcomes, strict=True):
        group = works[places[0]].slot.group
        if len(places) > 1 and _is_packed(works[places[0]]):
            several = [works[i] for i in places]
            whole = _packed(several)
            message_sum = pack([message_sums[i] for i in places]).to(whole.gradient.dtype)
            settle(whole, outcome, message_sum, agreed[group])
            _unpack_(whole, several)
            continue
        for row, i in enumerate(places):
            own = outcome.of_row(row) if len(places) > 1 and isinstance(outcome, Outcome) else outcome
            settle(works[i], own, message_sums[i], agreed[group])


def settle(work: Work, outcome: Outcome | StepSettings, message_sum: Tensor, agreed: Agreed) -> None:
    """The rest of one parameter's step, once it stands: dual, preconditioner state and consensus weights, in place.

    Args:
        work: as `send_local_step` had it.
        outcome: what it returned.
        message_sum: sum over all workers; may be overwritten.
        agreed: what else the ranks know together.
    """
    _, own, state, gradient = work
    if isinstance(outcome, Outcome):
        move(
            own,
            message_sum.div_(agreed.weight_sum),
            penalty_sum=agreed.penalty_sum,
            consensus_l2=agreed.consensus_l2,
        )
        state.update(dual=outcome.dual, **outcome.preconditioner_state)
        return
    weights = own.contiguous()  # itself, where its memory is in order
    second_moment_commit_(
        state["dual"], state["second_moment"], gradient, weights, message_sum, outcome, **agreed._asdict()
    )
    if weights is not own:
        own.copy_(weights)


def step_alone(
    bucket: Bucket, works: Sequence[Work], settings: Sequence[Settings], consensus_l2: Sequence[float]
) -> None:
    """A whole iteration where this worker is the only one, in place; `settings` and `consensus_l2` by group."""
    for places in bucket.together:
        several = [works[i] for i in places]
        group = several[0].slot.group
        is_packed = len(places) > 1 and _is_packed(several[0])
        whole = _packed(several) if is_packed else several[0]
        fused = _fused(whole, settings[group])
        if fused is not None and whole.weights.is_contiguous() and whole.weights.dtype == whole.gradient.dtype:
            second_moment_step_(
                whole.state["dual"],
                whole.state["second_moment"],
                whole.gradient,
                whole.weights,
                fused,
                consensus_l2=consensus_l2[group],
            )
            if is_packed:
                _unpack_(whole, several)
            continue
        part = Bucket([], [], [list(range(len(places)))])
        messages = [torch.empty_like(work.gradient) for work in several]
        outcomes = send_local_steps(part, several, settings, 1.0, messages)
        agreed = [Agreed(1.0, own.penalty, l2) for own, l2 in zip(settings, consensus_l2, strict=True)]
        settle_all(part, several, outcomes, messages, agreed)


def _fused(work: Work, settings: Settings, *others: Tensor) -> StepSettings | None:
    """How the passes of `admm.fused` are to take this step; None where they do not apply."""
    rule, state = work.slot.preconditioner, work.state
    if not isinstance(rule, SecondMoment):
        return None
    if not can_fuse(state["dual"], state["second_moment"], work.gradient, *others):
        return None
    return StepSettings(rule, *settings, compiled=work.slot.is_compiled)


def _can_pass(work: Work, message: Tensor) -> bool:
    """Whether `newton_schulz_message` takes this: on a GPU it saves memory traffic only where it is compiled."""
    state = work.state
    is_worth = work.slot.is_compiled or message.device.type == "cpu"
    return is_worth and can_fuse(state["dual"], state["momentum_buffer"], work.gradient, message)


def _is_packed(work: Work) -> bool:
    """How several works become one: end to end, or stacked."""
    return isinstance(work.slot.preconditioner, SecondMoment)


def _packed(works: Sequence[Work]) -> Work:
    """Copies of several parameters, laid end to end."""
    state = {name: pack([work.state[name] for work in works]) for name in ("dual", "second_moment")}
    return Work(works[0].slot, pack([w.weights for w in works]), state, pack([w.gradient for w in works]))


def _unpack_(packed: Work, works: Sequence[Work]) -> None:
    """What a step has made of `_packed(works)`, back to where it came from."""
    unpack_(packed.weights, [work.weights for work in works])
    for name, value in packed.state.items():
        unpack_(value, [work.state[name] for work in works])


def _stacked(works: Sequence[Work]) -> Work:
    """Copies of state and gradients of parameters of one shape, with a new first dimension."""
    state = {name: torch.stack([work.state[name] for work in works]) for name in works[0].state if name != RESIDUAL}
    return Work(works[0].slot, works[0].weights, state, torch.stack([work.gradient for work in works]))


def move(parameter: Tensor, message_sum: Tensor, *, penalty_sum: float, consensus_l2: float) -> None:
    """The consensus step of one parameter, in place; both sums over workers whose weights sum to 1."""
    has_state_type = parameter.dtype == message_sum.dtype
    moved = consensus_update(
        parameter if has_state_type else parameter.to(message_sum.dtype),
        message_sum,
        penalty_sum=penalty_sum,
        consensus_l2=consensus_l2,
        out=parameter if has_state_type else None,
    )
    if not has_state_type:
        parameter.copy_(moved)
