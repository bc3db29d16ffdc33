"""PISA with local steps as a drop-in `torch.optim.Optimizer`: every `local_steps`-th step is a consensus."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from pisa_dist.admm.device import on_device
from pisa_dist.admm.metrics import METRICS
from pisa_dist.checks import check_choice
from pisa_dist.communication import Communication
from pisa_dist.consensus import MessageBuffer, widest
from pisa_dist.faults import NUM_FAULT_SCALARS, Fault, describe_faults, describe_overflow, fault_scalars
from pisa_dist.local import local_gradient
from pisa_dist.optim_worker import WorkerOptimizer
from pisa_dist.rounds import (
    COUNTERS,
    begin_round,
    contribution,
    end_round,
    has_pull,
    is_seen,
    local_step,
    round_penalty,
    void_round,
)
from pisa_dist.slots import ParamGroup, Trainable, trainable

# Arguments of `PISA` without local steps and metric that have no meaning here.
_ONE_STEP_ONLY = ("preconditioner", "consensus_l2", "overlap", "bucket_mb", "compression", "grad_scaler", "fused")
# Those whose defaults are others here: None in `PISA` leaves them to the form.
_OTHER_DEFAULTS = ("local_steps", "metric", "penalty", "preconditioner_scale")


def asks_for_local_steps(settings: Mapping[str, Any]) -> bool:
    """Whether these arguments of `PISA` mean a `LocalPISA`: more than one local step, or a metric."""
    return settings.get("local_steps") not in (None, 1) or settings.get("metric") not in (None, "none")


class LocalPISA(WorkerOptimizer):
    """PISA with local steps and a metric penalty; `PISA(..., local_steps=20, metric="muon")` is one.

    Every rank is one worker, and no DDP wrapper is needed. `step()` is a local step and communicates nothing; every
    `local_steps`-th call ends a round with a consensus, one all-reduce of a tensor of the model's size, two where the
    metric is formed anew. The sum of the duals follows from the last one; where it does not, in the first round or
    after a change of ranks or weights, a second all-reduce brings it. After the consensus all ranks hold the same
    weights. The equations are those of `algorithm=pisa_local`, in which every worker takes part in every round.

    State per parameter: dual, two moments, metric and the sum of the duals (the dual alone without a metric, no sum
    with `enlarge_batch`), with metric="kron" its factors; the consensus weights and this worker's displacement from
    them while a round is under way, and a sum of gradients until the first consensus, with `enlarge_batch` in every
    round.

    Args:
        params: parameters, named parameters or parameter groups; all but `local_steps` may differ by group, such as
            metric="adam" for embeddings and the head.
        local_steps: calls of `step` in a round, >= 1.
        metric: P in the penalty: "none", "adam", "muon" or "kron", see `pisa_dist.admm.metrics`.
        penalty: sigma > 0; with a metric 1/sigma is the step of the consensus in units of P, like Adam's learning rate.
        preconditioner_scale: rho > 0, 1/rho is the learning rate of the local steps; None for sigma times their number.
        relaxation: kappa >= 0; 1 is ADMM.
        enlarge_batch: take all gradients of a round at the consensus weights and make one step of their mean, for
            workers whose data pull apart; with metric="muon" the metric is formed for vectors alone.
        lr: > 0, divides penalty and preconditioner_scale; the knob for `torch.optim.lr_scheduler`. It is read in every
            step; a consensus takes its mean over the round.
        penalty_growth: 1/gamma >= 1, factor on the penalty every `penalty_growth_interval` rounds.
        penalty_growth_interval: rounds from one growth to the next, >= 1.
        first_moment_decay, second_moment_decay: of the local steps, each in [0, 1); unused with metric="none".
        eps: added to the RMS of the gradients, >= 0.
        metric_rounds: rounds at the start that form P anew, >= 1.
        metric_interval: rounds from one P to the next after those, >= 1.
        worker_weight, process_group: as in `PISA`.
        on_nonfinite: what a NaN or infinite gradient does, which only its own rank sees at once and leaves out. With
            "skip" that is all. With "raise" the consensus tells it to all ranks, and all raise FloatingPointError: the
            round is void, weights, duals and metric are those of the last consensus; the moments keep what they have
            seen of finite gradients. Overflows that a GradScaler finds are left out either way. A sum of messages that
            overflows voids the round on every rank, silently with "skip".

    Raises:
        ValueError: a setting out of range, sharded parameters, or ranks whose parameters or settings differ.
    """

    agreed = (
        "local_steps",
        "metric",
        "penalty",
        "relaxation",
        "enlarge_batch",
        "penalty_growth",
        "penalty_growth_interval",
        "eps",
        "metric_rounds",
        "metric_interval",
    )
    may_be_none = ("preconditioner_scale",)

    def __init__(
        self,
        params: Iterable[Any],
        *,
        local_steps: int = 20,
        metric: str = "muon",
        penalty: float = 100.0,
        preconditioner_scale: float | None = None,
        relaxation: float = 1.0,
        enlarge_batch: bool = False,
        lr: float = 1.0,
        penalty_growth: float = 1.0,
        penalty_growth_interval: int = 1,
        first_moment_decay: float = 0.9,
        second_moment_decay: float = 0.99,
        eps: float = 1e-8,
        metric_rounds: int = 10,
        metric_interval: int = 5,
        worker_weight: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        defaults = {
            "local_steps": local_steps,
            "metric": metric,
            "penalty": penalty,
            "preconditioner_scale": preconditioner_scale,
            "relaxation": relaxation,
            "enlarge_batch": enlarge_batch,
            "lr": lr,
            "penalty_growth": penalty_growth,
            "penalty_growth_interval": penalty_growth_interval,
            "first_moment_decay": first_moment_decay,
            "second_moment_decay": second_moment_decay,
            "eps": eps,
            "metric_rounds": metric_rounds,
            "metric_interval": metric_interval,
        }
        super().__init__(params, defaults | COUNTERS, Communication(worker_weight, process_group, on_nonfinite))

    @classmethod
    def of(cls, *args: Any, **settings: Any) -> "LocalPISA":
        """The optimizer that `PISA` with these arguments is.

        Raises:
            ValueError: as in the constructor, or an argument that only the form without local steps and metric has.
        """
        for key in _ONE_STEP_ONLY:
            if settings.pop(key, None):
                raise ValueError(f"`{key}` must be left out with local_steps > 1 or a metric: it has no meaning there")
        return cls(*args, **{k: v for k, v in settings.items() if v is not None or k not in _OTHER_DEFAULTS})

    def _check_group(self, settings: ParamGroup) -> None:
        check_choice("metric", settings["metric"], tuple(METRICS))
        if settings["preconditioner_scale"] == 0:
            raise ValueError("`preconditioner_scale` (rho) must be > 0 or None for local steps, got 0")
        first = (self.param_groups or [self.defaults])[0]
        if settings["local_steps"] != first["local_steps"]:
            raise ValueError(
                f"`local_steps` must be the same in all parameter groups, got {first['local_steps']} and "
                f"{settings['local_steps']}"
            )

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add parameters where no round is under way; call it on every rank alike.

        Raises:
            ValueError: as in the constructor.
            RuntimeError: a round is under way.
        """
        if self._is_built:
            self._require_consensus("parameters were added")
        super().add_param_group(param_group)

    def _agree(self, groups: list[ParamGroup]) -> None:
        for parameter in (p for group in groups for p in group["params"]):
            if isinstance(parameter, DTensor):
                raise ValueError(
                    "`local_steps` > 1 and `metric` need parameters that are whole on each rank, got a sharded one of "
                    f"shape {tuple(parameter.shape)}"
                )
        super()._agree(groups)

    @property
    def at_consensus(self) -> bool:
        """Whether the parameters hold consensus weights, the same on every rank: no round is under way."""
        return self._steps_in_round == 0

    @property
    def _steps_in_round(self) -> int:
        steps: int = self.param_groups[0]["steps_in_round"]
        return steps

    def _require_consensus(self, change: str) -> None:
        if not self.at_consensus:
            raise RuntimeError(f"{change} in the middle of a round: do it where `optimizer.at_consensus` is true")

    def accumulate(self) -> AbstractContextManager[None]:
        """As in the form with one local step; here backward passes never send anything, so that it changes nothing."""
        return nullcontext()

    @contextmanager
    def consensus_weights(self) -> Iterator[None]:
        """The parameters hold the weights of the last consensus in this context, to evaluate or save the model.

        Nothing is communicated. Without it they hold this worker's own while a round is under way.
        """
        self._show(is_local=False)
        try:
            yield
        finally:
            self._show(is_local=True)

    @torch.no_grad()
    def _show(self, *, is_local: bool) -> None:
        """Write w + u_i or w into the parameters; between two rounds they hold w in any case."""
        for slot in () if self.at_consensus else trainable(self.param_groups):
            state = self.state[slot.parameter]
            slot.parameter.copy_(state["anchor"] + state["displacement"] if is_local else state["anchor"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything; if a round was under way, this worker's weights too, which no other rank has."""
        super().load_state_dict(state_dict)
        self._show(is_local=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One local step; the last one of a round ends with a consensus.

        Args:
            closure: recomputes the loss and its gradients and returns the loss; optional.

        Returns:
            What the closure returned, else None.

        Raises:
            ValueError: at a consensus, ranks differ in `enlarge_batch`, which was changed since the start.
            FloatingPointError: at a consensus, on every rank, if `on_nonfinite` is "raise": a gradient of the round was
                NaN or infinite on some rank, or the sum of the messages overflowed. The round is void.
            ConsensusError: another rank is gone.
            RuntimeError: a parameter was frozen or thawed in the middle of a round.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_world()
        slots = trainable(self.param_groups)
        if not slots:
            return loss
        if self.at_consensus:
            for slot in slots:
                begin_round(self.state[slot.parameter], slot.parameter, self.param_groups[slot.group])
        in_round = [p for group in self.param_groups for p in group["params"] if "anchor" in self.state.get(p, ())]
        if len(in_round) != len(slots) or any(p is not slot.parameter for p, slot in zip(in_round, slots, strict=True)):
            self._require_consensus("requires_grad was changed")
        gradients = [local_gradient(slot.parameter, getattr(self, "grad_scale", None)) for slot in slots]
        if self._are_finite(gradients):
            for slot, gradient in zip(slots, gradients, strict=True):
                state = self.state[slot.parameter]
                local_step(state, gradient, self.param_groups[slot.group])
                slot.parameter.copy_(state["anchor"] + state["displacement"])
        for group in self.param_groups:
            group["steps_in_round"] += 1
            group["lr_sum"] += float(group["lr"])
        if self._steps_in_round == self.param_groups[0]["local_steps"]:
            self._end_round(slots)
        return loss

    def _are_finite(self, gradients: Sequence[Tensor]) -> bool:
        """Whether this step counts; remembers which gradient is to blame if it does not."""
        overflow = getattr(self, "found_inf", None)
        if overflow is not None:  # a GradScaler has looked, and will lower its scale
            return not bool(overflow)
        fault = Fault.find(gradients, worker=self._consensus.rank)
        if fault is not None and self.param_groups[0]["first_fault"] is None:
            self.param_groups[0]["first_fault"] = fault.parameter
        return fault is None

    def _end_round(self, slots: Sequence[Trainable]) -> None:
        """The consensus: one sum over the ranks, and then the same on every one of them."""
        groups, states = self.param_groups, [self.state[slot.parameter] for slot in slots]
        # Under a schedule displacements are made of unequal steps, and the dual step takes their mean.
        penalties = [round_penalty(group, group["lr_sum"] / group["local_steps"]) for group in groups]
        weight, num_ranks = self.worker_weight or 1.0, self._consensus.num_ranks
        own = [
            contribution(state, groups[slot.group], penalty=penalties[slot.group], weight=weight, num_ranks=num_ranks)
            for slot, state in zip(slots, states, strict=True)
        ]
        first_fault = groups[0]["first_fault"]
        fault = None if first_fault is None else Fault(self._consensus.rank, first_fault)
        pulled = [place for place, slot in enumerate(slots) if has_pull(groups[slot.group])]
        scalars = [1.0, *penalties, *(float(is_seen(state)) for state in states)]
        buffer = self._weighted_sum(
            [message for mine in own for message in mine.message],
            weight,
            [
                *fault_scalars(fault),
                *(weight * scalar for scalar in scalars),
                float(all(mine.follows for mine in own)),
                float(len(pulled)),
            ],
        )
        *sums, num_following, num_pulled = buffer.scalars.tolist()
        if num_pulled != num_ranks * len(pulled):
            raise ValueError("`enlarge_batch` must be changed on every rank alike, got ranks that differ in it")
        problem = describe_faults(sums, fault, [slot.label for slot in slots])
        overflow = describe_overflow(buffer.flat[: buffer.num_values], loss=0.0)
        dual_sums: dict[int, Tensor] = {}
        if overflow is None and num_following < num_ranks:  # all know it: some dual, a first one, is in no sum yet
            others = self._weighted_sum([own[place].dual for place in pulled], weight, [])
            overflow = describe_overflow(others.flat, loss=0.0)
            dual_sums = dict(zip(pulled, others.tensors, strict=True))
        is_void = overflow is not None or (problem is not None and self.on_nonfinite == "raise")
        weight_sum, *sums = sums[NUM_FAULT_SCALARS:]
        message_sums = iter(buffer.tensors)
        for place, (slot, state, mine, seen) in enumerate(zip(slots, states, own, sums[len(groups) :], strict=True)):
            if is_void:
                void_round(state)
            else:
                end_round(
                    state,
                    mine.dual,
                    [next(message_sums) for _ in mine.message],
                    groups[slot.group],
                    penalty=sums[slot.group] / weight_sum,
                    weight_sum=weight_sum,
                    seen=seen,
                    dual_sum=dual_sums.get(place),
                    weight=weight,
                    num_ranks=num_ranks,
                )
            slot.parameter.copy_(state.pop("anchor"))
            del state["displacement"]
        for group in groups:
            group.update(num_rounds=group["num_rounds"] + (not is_void), steps_in_round=0, lr_sum=0.0, first_fault=None)
        if is_void and self.on_nonfinite == "raise":
            raise FloatingPointError(
                f"{problem or overflow}: the round is void, weights and duals are those of the last consensus"
            )

    def _weighted_sum(self, messages: Sequence[Tensor], weight: float, scalars: Sequence[float]) -> MessageBuffer:
        """sum_i alpha_i of the messages, and the sums of the scalars, in one all-reduce."""
        dtype, device = widest(messages), messages[0].device
        buffer = MessageBuffer([m.shape for m in messages], len(scalars), dtype=dtype, device=device)
        for message, view in zip(messages, buffer.tensors, strict=True):
            torch.mul(message, weight, out=view)
        buffer.scalars.copy_(on_device(scalars, dtype=dtype, device=device))
        self._consensus.sum_(buffer.flat)
        if self._consensus.num_ranks > 1:
            self.bytes_sent += buffer.num_bytes
        return buffer
