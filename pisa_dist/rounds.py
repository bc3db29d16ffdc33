"""One worker's round for one parameter, as the drop-in optimizer with local steps takes it, without a collective.

A parameter's state is a dictionary that these functions change; a parameter group is its settings and counters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.local_round import (
    first_dual,
    is_forming_metric,
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
_COUNTS = ("num_steps", "num_summed", "num_rounds", "is_formed")
# The sum of all workers' duals, and what it was made of: the weight of this one's, and the number of ranks.
_SUM = ("dual_sum", "summed_weight", "summed_ranks")
# What a parameter's state holds besides the metric's own; the first two only while a round is under way.
_OWN = ("anchor", "displacement", "dual", *_MOMENTS, "gradient_sum", "metric", *_COUNTS, *_SUM)


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
            state.update(gradient_sum=zeros, num_summed=0, metric=zeros.clone(), is_formed=False)
            state.update(rule.init_state(zeros))
    state.setdefault("is_formed", True)  # one saved before this was kept
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
        message: what goes into the sums, before alpha_i is put to it: pull or dual, and the RMS of the gradients if it
            is due.
        follows: whether the sum of all duals needs this one no more: it is in the message, or takes a step that the
            pull tells and was in the last sum as it was.
    """

    dual: Tensor
    message: list[Tensor]
    follows: bool = True


def contribution(
    state: dict[str, Any], group: ParamGroup, *, penalty: float, weight: float = 1.0, num_ranks: int = 1
) -> Contribution:
    """The end of a worker's round, before the sum over the workers. Changes none of its inputs.

    Args:
        state: the parameter's, in a round.
        group: its settings.
        penalty: sigma of the round.
        weight: alpha_i.
        num_ranks: workers in the sum.
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
    message = [penalty * displacement if has_pull(group) else dual]
    rule = METRICS[group["metric"]]
    if rule is not None and is_forming_metric(
        state["num_rounds"] + 1,
        rule=rule,
        shape=dual.shape,
        is_formed=state["is_formed"],
        enlarge_batch=group["enlarge_batch"],
        metric_rounds=group["metric_rounds"],
        metric_interval=group["metric_interval"],
    ):
        message.append(solver.rms(state, count=max(state["num_steps"], 1)))
    was_summed = (state.get("summed_weight"), state.get("summed_ranks")) == (weight, num_ranks)
    return Contribution(dual, message, follows=not has_pull(group) or (was_summed and not has_sum))


def has_pull(group: ParamGroup) -> bool:
    """Whether a worker sends sigma u_i and not its dual."""
    return group["metric"] != "none" and not group["enlarge_batch"]


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
    dual_sum: Tensor | None,
    weight: float,
    num_ranks: int,
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
        dual_sum: sum_i alpha_i pi_i; None where the messages tell it.
        weight, num_ranks: as in `contribution`.
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
    first, *others = message_sum
    if dual_sum is None:
        dual_sum = dual_update(state["dual_sum"], first, penalty=state["metric"]) if has_pull(group) else first
    state["anchor"], state["metric"], metric_state = metric_consensus(
        state["anchor"],
        first if has_pull(group) else None,
        dual_sum,
        others[0] if others else None,
        seen=seen,
        rule=rule,
        metric=state["metric"],
        metric_state={name: value for name, value in state.items() if name not in _OWN},
        penalty=penalty,
        relaxation=group["relaxation"],
        eps=group["eps"],
    )
    state.update(metric_state, is_formed=bool(others) or state["is_formed"])
    if has_pull(group):
        state.update(dual_sum=dual_sum, summed_weight=weight, summed_ranks=num_ranks)
    else:
        for name in _SUM:
            state.pop(name, None)


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
