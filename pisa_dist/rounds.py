"""One worker's round for one parameter, as the drop-in optimizer with local steps takes it, without a collective.

A parameter's state is a dictionary that these functions change; a parameter group is its settings and counters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.local_round import (
    first_dual,
    is_metric_due,
    local_scale,
    local_solver,
    metric_consensus,
    newcomers_displacement,
)
from pisa_dist.admm.local_steps import AdaptiveSolver, LocalSolver
from pisa_dist.admm.metrics import METRICS
from pisa_dist.admm.updates import consensus_update, dual_update, state_dtype, worker_message
from pisa_dist.slots import ParamGroup, group_penalty

# How far a round is; kept in every parameter group, so that a state_dict holds it.
COUNTERS = {
    "num_rounds": 0,  # that have ended in a consensus
    "steps_in_round": 0,  # calls of `step` since then
    "lr_sum": 0.0,  # over those calls
    "first_fault": None,  # parameter whose gradient was not finite in them, in message order
}
_MOMENTS = ("first_moment", "second_moment")
_COUNTS = ("num_steps", "num_summed", "num_rounds")
# What a parameter's state holds besides the metric's own; the first two only while a round is under way.
_OWN = ("anchor", "displacement", "dual", *_MOMENTS, "gradient_sum", "metric", *_COUNTS)


def begin_round(state: dict[str, Any], weights: Tensor, group: ParamGroup) -> None:
    """A round starts where the parameter is, which is the same on every rank: w, kept as `anchor`.

    Args:
        state: the parameter's; empty before its first round.
        weights: the parameter.
        group: its settings.
    """
    if not state:
        dual = torch.zeros_like(weights, dtype=state_dtype(weights.dtype))
        state.update(num_rounds=0, num_steps=0, dual=dual, **_solver(group).init_state(dual))
        rule = METRICS[group["metric"]]
        if rule is not None:
            zeros = torch.zeros_like(dual)
            state.update(gradient_sum=zeros, num_summed=0, metric=zeros.clone(), **rule.init_state(zeros))
    if group["enlarge_batch"]:
        state.update(gradient_sum=torch.zeros_like(state["dual"]), num_summed=0)
    state["anchor"] = weights.to(state["dual"].dtype, copy=True)
    state["displacement"] = torch.zeros_like(state["dual"])


def round_penalty(group: ParamGroup, lr: float) -> float:
    """sigma of the round that is under way, for this learning rate."""
    return group_penalty(group, group["num_rounds"] + 1, lr)


def local_step(state: dict[str, Any], gradient: Tensor, group: ParamGroup) -> None:
    """One local step; `anchor` + `displacement` is then where the worker stands.

    Args:
        state: the parameter's, in a round.
        gradient: g_i there, finite and in the state's type.
        group: its settings; `lr` is that of this step.
    """
    solver = _solver(group)
    moments = {name: state[name] for name in _MOMENTS if name in state}
    state["num_steps"] += 1
    if group["enlarge_batch"]:
        moments = solver.direction(state["dual"], gradient, moments, count=state["num_steps"]).state
    else:
        lr = float(group["lr"])
        penalty = round_penalty(group, lr)
        state["displacement"], moments = solver.step(
            state["displacement"],
            state["dual"],
            gradient,
            moments,
            penalty_metric=penalty * state["metric"] if "metric" in state else penalty,
            preconditioner_scale=local_scale(
                group["preconditioner_scale"], penalty=penalty, local_steps=group["local_steps"], lr=lr
            ),
            count=state["num_steps"],
        )
    state.update(moments)
    if "gradient_sum" in state:
        state["gradient_sum"] += gradient
        state["num_summed"] += 1


class Contribution(NamedTuple):
    """What a round of a worker leads to for one parameter, to be kept once every rank knows that it stands.

    Attributes:
        dual: the next pi_i.
        message: what goes into the sums, before alpha_i is put to it.
    """

    dual: Tensor
    message: list[Tensor]


def contribution(state: dict[str, Any], group: ParamGroup, *, penalty: float) -> Contribution:
    """The end of a worker's round, before the sum over the workers. Changes none of its inputs.

    Args:
        state: the parameter's, in a round.
        group: its settings.
        penalty: sigma of the round.
    """
    displacement, solver, metric = state["displacement"], _solver(group), state.get("metric", 1.0)
    has_sum = "gradient_sum" in state and state["num_summed"] > 0
    if has_sum:
        dual = first_dual(state["gradient_sum"], state["num_summed"])
    else:
        dual = dual_update(state["dual"], displacement, penalty=penalty * metric)
    if not isinstance(solver, AdaptiveSolver):
        pull = group["relaxation"] * penalty
        return Contribution(dual, [worker_message(dual, displacement, penalty=pull, worker_weight=1.0)])
    if has_sum:
        displacement = newcomers_displacement(displacement, metric)
    message = [dual] if group["enlarge_batch"] else [displacement, dual]
    number = state["num_rounds"] + 1
    if is_metric_due(number, metric_rounds=group["metric_rounds"], metric_interval=group["metric_interval"]):
        message.append(solver.rms(state, count=max(state["num_steps"], 1)))
    return Contribution(dual, message)


def is_seen(state: dict[str, Any]) -> bool:
    """Whether this worker's dual stands for its data, or will with this consensus: it has taken a step yet."""
    return "gradient_sum" not in state or state["num_steps"] > 0


def end_round(
    state: dict[str, Any],
    dual: Tensor,
    message_sum: Sequence[Tensor],
    group: ParamGroup,
    *,
    penalty: float,
    weight_sum: float,
    seen: float,
) -> None:
    """The consensus: keeps the dual and puts the next consensus weights into `anchor`.

    Args:
        state: the parameter's, in a round.
        dual: of this worker's `Contribution`.
        message_sum: sum_i alpha_i times the workers' messages.
        group: its settings.
        penalty: sigma.
        weight_sum: sum of all alpha_i.
        seen: sum of those of the workers that are seen.
    """
    state["num_rounds"] += 1
    state["dual"] = dual
    rule = METRICS[group["metric"]]
    if rule is None:
        state["anchor"] = consensus_update(state["anchor"], message_sum[0] / weight_sum, penalty_sum=penalty)
        return
    if is_seen(state):
        state.pop("gradient_sum", None)
    if seen == 0:
        return
    arrived = iter(message_sum)
    displacement_sum = None if group["enlarge_batch"] else next(arrived)
    state["anchor"], state["metric"], metric_state = metric_consensus(
        state["anchor"],
        displacement_sum,
        next(arrived),
        next(arrived, None),
        seen=seen,
        rule=rule,
        metric=state["metric"],
        metric_state={name: value for name, value in state.items() if name not in _OWN},
        penalty=penalty,
        relaxation=group["relaxation"],
        eps=group["eps"],
    )
    state.update(metric_state)


def void_round(state: dict[str, Any]) -> None:
    """The round does not count: the next one starts from `anchor` with the duals and the metric as they were.

    What a worker remembers of its gradients stays, unless it has overflowed: then it begins anew.
    """
    memory = [state[name] for name in (*_MOMENTS, "gradient_sum") if name in state]
    if memory and not bool(torch.stack([m.isfinite().all() for m in memory]).all()):
        state.update(num_steps=0, num_summed=0)
        for tensor in memory:
            tensor.zero_()


def _solver(group: ParamGroup) -> LocalSolver | AdaptiveSolver:
    return local_solver(
        group["metric"],
        first_moment_decay=group["first_moment_decay"],
        second_moment_decay=group["second_moment_decay"],
        eps=group["eps"],
    )
