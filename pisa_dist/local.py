"""One worker's step for one parameter, as the drop-in optimizers take it, without a collective."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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
from pisa_dist.admm.penalty import divided_by_lr, grown_penalty
from pisa_dist.admm.preconditioners import NewtonSchulz, Preconditioner, SecondMoment
from pisa_dist.admm.updates import consensus_update, state_dtype
from pisa_dist.admm.worker import worker_step
from pisa_dist.sharding import local_part, rule_for

ParamGroup = dict[str, Any]
BATCHED_ON = {"cuda"}  # kinds of device
RESIDUAL = "residual"  # state that no step reads: what compression has left out


class Slot(NamedTuple):
    """One trainable parameter, in message order."""

    parameter: Tensor
    name: str
    group: int
    preconditioner: Preconditioner
    is_compiled: bool

    @property
    def weights(self) -> Tensor:
        """What of the parameter lies on this rank: all of it, unless it is sharded."""
        return local_part(self.parameter)


class Settings(NamedTuple):
    """sigma_i, rho_i and t of a step in one parameter group."""

    penalty: float
    preconditioner_scale: float
    step: int


class Outcome(NamedTuple):
    """What the local step of one parameter leads to, to be kept once every rank knows that the step stands."""

    dual: Tensor
    preconditioner_state: dict[str, Tensor]


def group_slots(
    group: ParamGroup, index: int, rule: Preconditioner, is_compiled: Callable[[Tensor], bool], *, first: int
) -> list[Slot]:
    """The trainable parameters of the `index`-th group, numbered from `first`."""
    slots: list[Slot] = []
    names = group.get("param_names") or [None] * len(group["params"])
    for parameter, name in zip(group["params"], names, strict=True):
        if parameter.requires_grad:
            label = name or f"parameter {first + len(slots)} of shape {tuple(parameter.shape)}"
            own = rule_for(rule.for_parameter(name, parameter.shape), parameter)
            slots.append(Slot(parameter, label, index, own, is_compiled(parameter)))
    return slots


def describe_group(group: ParamGroup) -> list[str]:
    """What all ranks must agree on in one parameter group, a line each."""
    lines = [f"consensus_l2={group['consensus_l2']} in a parameter group"]
    for p in group["params"]:
        here = local_part(p)
        part = "" if here is p else f", {tuple(here.shape)} of it on this rank"
        lines.append(f"a parameter of shape {tuple(p.shape)}, {p.dtype}, requires_grad={p.requires_grad}{part}")
    return lines


def group_settings(group: ParamGroup) -> Settings:
    """What the coming step uses in one parameter group."""
    step, lr = group["num_steps"] + 1, float(group["lr"])
    penalty = grown_penalty(
        group["penalty"], step=step, growth=group["penalty_growth"], interval=group["penalty_growth_interval"]
    )
    return Settings(divided_by_lr(penalty, lr), divided_by_lr(group["preconditioner_scale"], lr), step)


def count_step(groups: Iterable[ParamGroup]) -> None:
    """One more step has been taken."""
    for group in groups:
        group["num_steps"] += 1


def local_gradient(parameter: Tensor, scale: Tensor | None) -> Tensor:
    """The local gradient in the state's type, without the factor `scale`; zero where there is none."""
    if parameter.grad is None:
        return torch.zeros_like(local_part(parameter), dtype=state_dtype(parameter.dtype))
    gradient = local_part(parameter.grad)
    # Duals and messages are dense, so a sparse gradient saves nothing here.
    gradient = (gradient.to_dense() if gradient.is_sparse else gradient).to(state_dtype(parameter.dtype))
    return gradient if scale is None else gradient / scale.to(gradient.device)


def send_local_steps(
    slots: Sequence[Slot],
    states: Sequence[dict[str, Tensor]],
    gradients: Sequence[Tensor],
    settings: Sequence[Settings],
    worker_weight: float,
    messages: Sequence[Tensor],
) -> "list[Outcome | None]":
    """`send_local_step` for several parameters; `settings` by group.

    On devices where many small products cost more than one batched one, parameters of one shape that NSISA
    orthogonalises are stacked and take their step together.
    """
    outcomes: list[Outcome | None] = [None] * len(slots)
    for positions in _alike(slots):
        first = positions[0]
        if len(positions) == 1:
            outcomes[first] = send_local_step(
                slots[first],
                states[first],
                gradients[first],
                settings[slots[first].group],
                worker_weight,
                messages[first],
            )
            continue
        rule, shape = slots[first].preconditioner, slots[first].parameter.shape
        step = worker_step(
            torch.stack([states[i]["dual"] for i in positions]),
            {
                name: torch.stack([states[i][name] for i in positions])
                for name in states[first]
                if name not in ("dual", RESIDUAL)
            },
            torch.stack([gradients[i] for i in positions]),
            preconditioner=rule,
            **settings[slots[first].group]._asdict(),
            worker_weight=worker_weight,
            shape=shape,
        )
        for row, i in enumerate(positions):
            messages[i].copy_(step.message[row])
            state = {name: value[row] for name, value in step.preconditioner_state.items()}
            outcomes[i] = Outcome(step.dual[row], state)
    return outcomes


def _alike(slots: Sequence[Slot]) -> list[list[int]]:
    """Positions of the slots that take their step together."""
    alike: dict[Any, list[int]] = {}
    for i, slot in enumerate(slots):
        is_batched = type(slot.preconditioner) is NewtonSchulz and slot.weights.device.type in BATCHED_ON
        alike.setdefault((slot.preconditioner, slot.parameter.shape, slot.group) if is_batched else i, []).append(i)
    return list(alike.values())


def send_local_step(
    slot: Slot, state: dict[str, Tensor], gradient: Tensor, settings: Settings, worker_weight: float, message: Tensor
) -> Outcome | None:
    """One parameter's local step; writes its message and changes nothing else, so that it can still be refused.

    Args:
        slot: the parameter and its preconditioner.
        state: dual and preconditioner state.
        gradient: g_i in the state's type.
        settings: of the step.
        worker_weight: alpha_i > 0.
        message: where alpha_i (pi_i + sigma_i u_i) goes.

    Returns:
        What `settle` is to keep; None where it costs less to compute it again.
    """
    fused = _fused(slot, state, gradient, settings, message)
    if fused is not None:
        second_moment_message(
            state["dual"], state["second_moment"], gradient, fused, worker_weight=worker_weight, out=message
        )
        return None
    rule = slot.preconditioner
    if isinstance(rule, NewtonSchulz) and slot.is_compiled:
        dual, buffer = newton_schulz_message(
            state["dual"],
            state["momentum_buffer"],
            gradient,
            rule,
            penalty=settings.penalty,
            preconditioner_scale=settings.preconditioner_scale,
            worker_weight=worker_weight,
            shape=slot.parameter.shape,
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


def settle(
    slot: Slot,
    state: dict[str, Tensor],
    gradient: Tensor,
    settings: Settings,
    outcome: Outcome | None,
    message_sum: Tensor,
    *,
    weight_sum: float,
    penalty_sum: float,
    consensus_l2: float,
) -> None:
    """The rest of one parameter's step, once it stands: dual, preconditioner state and consensus weights, in place.

    Args:
        slot, state, gradient, settings: as `send_local_step` had them.
        outcome: what it returned.
        message_sum: sum over all workers; may be overwritten.
        weight_sum: sum of all alpha_i.
        penalty_sum: sum of alpha_i sigma_i divided by `weight_sum`.
        consensus_l2: lambda >= 0.
    """
    if outcome is not None:
        move(slot.weights, message_sum.div_(weight_sum), penalty_sum=penalty_sum, consensus_l2=consensus_l2)
        state.update(dual=outcome.dual, **outcome.preconditioner_state)
        return
    fused = _fused(slot, state, gradient, settings, message_sum)
    own = slot.weights
    weights = own.contiguous()  # itself, where its memory is in order
    if fused is not None:
        second_moment_commit_(
            state["dual"],
            state["second_moment"],
            gradient,
            weights,
            message_sum,
            fused,
            weight_sum=weight_sum,
            penalty_sum=penalty_sum,
            consensus_l2=consensus_l2,
        )
    if weights is not own:
        own.copy_(weights)


def step_alone(
    slots: Sequence[Slot],
    states: Sequence[dict[str, Tensor]],
    gradients: Sequence[Tensor],
    settings: Sequence[Settings],
    consensus_l2: Sequence[float],
) -> None:
    """A whole iteration where this worker is the only one, in place; `settings` and `consensus_l2` by group."""
    for positions in _alike(slots):
        slot, state, gradient = slots[positions[0]], states[positions[0]], gradients[positions[0]]
        weights, group = slot.weights, slot.group
        fused = _fused(slot, state, gradient, settings[group])
        if fused is not None and weights.is_contiguous() and weights.dtype == gradient.dtype:
            second_moment_step_(
                state["dual"], state["second_moment"], gradient, weights, fused, consensus_l2=consensus_l2[group]
            )
            continue
        own_slots, own_states = [slots[i] for i in positions], [states[i] for i in positions]
        own_gradients = [gradients[i] for i in positions]
        messages = [torch.empty_like(g) for g in own_gradients]
        outcomes = send_local_steps(own_slots, own_states, own_gradients, settings, 1.0, messages)
        for i, outcome, message in zip(positions, outcomes, messages, strict=True):
            settle(
                slots[i],
                states[i],
                gradients[i],
                settings[group],
                outcome,
                message,
                weight_sum=1.0,
                penalty_sum=settings[group].penalty,
                consensus_l2=consensus_l2[group],
            )


def _fused(
    slot: Slot, state: dict[str, Tensor], gradient: Tensor, settings: Settings, *others: Tensor
) -> StepSettings | None:
    """How the passes of `admm.fused` are to take this step; None where they do not apply."""
    rule = slot.preconditioner
    if not isinstance(rule, SecondMoment) or not can_fuse(state["dual"], state["second_moment"], gradient, *others):
        return None
    return StepSettings(rule, *settings, compiled=slot.is_compiled)


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
