"""What PISA, SISA and NSISA have in common: the step, the refusal of bad gradients, the state."""

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pisa_dist.admm.device import on_device
from pisa_dist.admm.preconditioners import Preconditioner
from pisa_dist.admm.updates import state_dtype
from pisa_dist.communication import Communication
from pisa_dist.consensus import MessageBuffer, widest
from pisa_dist.faults import NUM_FAULT_SCALARS, Fault, describe_faults, fault_tensor, first_bad
from pisa_dist.local import (
    RESIDUAL,
    Agreed,
    Work,
    count_step,
    group_settings,
    local_gradient,
    send_local_steps,
    settle_all,
    step_alone,
)
from pisa_dist.optim_worker import WorkerOptimizer
from pisa_dist.overlap import Flight, Sent, Used, make_buckets
from pisa_dist.sharding import local_part, sharded_like, sum_over
from pisa_dist.slots import Bucket, ParamGroup, Slot, fingerprint, make_slots


class Plan(NamedTuple):
    """What an iteration sends.

    Attributes:
        slots: in message order.
        buckets: in the order in which they go.
        made_for: fingerprint of the groups of which this is true.
    """

    slots: list[Slot]
    buckets: list[Bucket]
    made_for: list[Any]


class ADMMOptimizer(WorkerOptimizer):
    """One sum per step; a subclass says which preconditioner a group has. Arguments are those of `WorkerOptimizer`."""

    agreed = ("consensus_l2",)
    may_be_none = ("preconditioner_bound",)

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], communication: Communication) -> None:
        super().__init__(params, {**defaults, "num_steps": 0}, communication)
        self._refresh_plan()

    def _connect(self) -> None:
        super()._connect()
        self._plan = Plan([], [], [])
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._flight: Flight | None = None
        self._is_accumulating = False

    @abstractmethod
    def _group_preconditioner(self, group: ParamGroup) -> Preconditioner:
        """The rule for Q_i in one parameter group; raises ValueError where its settings are out of range."""

    def _check_group(self, settings: ParamGroup) -> None:
        self._group_preconditioner(settings)

    def add_param_group(self, param_group: ParamGroup) -> None:  # noqa: D102 - as in WorkerOptimizer
        super().add_param_group(param_group)
        if self._is_built:
            self._refresh_plan()

    def _refresh_plan(self) -> None:
        """Which parameters train, in which buckets; hooks on them where messages are to overlap the backward pass."""
        rules = [self._group_preconditioner(group) for group in self.param_groups]
        made_for = fingerprint(self.param_groups, rules)
        if made_for == self._plan.made_for:
            return
        slots = make_slots(self.param_groups, rules, self._communication.is_compiled)
        sizes = [slot.weights.numel() * state_dtype(slot.weights.dtype).itemsize for slot in slots]
        bucket_bytes = self._communication.bucket_bytes
        buckets = [Bucket.of(slots, positions) for positions in make_buckets(sizes, bucket_bytes=bucket_bytes)]
        self._plan = Plan(slots, buckets, made_for)
        parameters = [slot.parameter for slot in slots]
        for hook in self._hooks:
            hook.remove()
        this = weakref.ref(self)  # hooks must not keep a dropped optimizer alive, nor go on for it
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _, at=position: _arrived(this, at)
            )
            for position, parameter in enumerate(parameters if self._communication.overlap else ())
        ]

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes in this context only add to the gradients; with overlap=True nothing is sent.

        Put all backward passes of a step but the last into it. Without overlap it changes nothing.
        """
        before, self._is_accumulating = self._is_accumulating, True
        try:
            yield
        finally:
            self._is_accumulating = before

    def _gradient_arrived(self, position: int) -> None:
        if self._is_accumulating:
            return
        if self._flight is None:
            self._begin()
        if self._flight is not None:
            self._flight.arrive(position)

    def _begin(self) -> None:
        """Start an iteration: from here on its settings and its order of messages are fixed."""
        self._require_world()
        self._refresh_plan()
        self._settings = [group_settings(group) for group in self.param_groups]
        self._found: list[Tensor] = []
        buckets = [bucket.positions for bucket in self._plan.buckets]
        self._flight = Flight(buckets, self._send) if self._plan.slots else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One PISA iteration: local step, one sum over the ranks, consensus weights written to the parameters.

        Args:
            closure: recomputes the loss and its gradients and returns the loss; optional.

        Returns:
            What the closure returned, else None.

        Raises:
            FloatingPointError: a gradient on any rank was NaN or infinite and `on_nonfinite` is "raise". Raised on
                every rank; weights and state are as before the step. A sum of the messages that overflows although
                every gradient is finite is not looked for: it goes into the weights of every rank.
            ConsensusError: another rank is gone.
            RuntimeError: with overlap, gradients or settings changed after their messages went.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_early = self._flight is not None
        if not is_early:
            self._begin()
        flight, self._flight = self._flight, None
        if flight is None:
            return loss
        if self._consensus.num_ranks == 1 and not is_early:
            self._step_alone()
            return loss
        sent = flight.land()
        if is_early:
            self._require_unchanged()
        sums = self._refusals(sent[-1].buffer.scalars.tolist())
        self.bytes_sent += sum(bucket.total.num_bytes for bucket in sent)
        num_overflows, weight_sum, *penalty_sums = sums[NUM_FAULT_SCALARS:]
        if sums[0]:
            self._refuse(sums)
        elif num_overflows == 0:
            self._commit(sent, weight_sum, penalty_sums)
        return loss

    def _refuse(self, fault_sums: Sequence[float]) -> None:
        """Say whose gradient was not finite, unless that only means a step that is skipped."""
        if self.on_nonfinite == "skip" or self._communication.grad_scaler is not None:
            return
        first = min([float(found) for found in self._found], default=math.inf)
        own = Fault(self._consensus.rank, int(first)) if first < math.inf else None
        problem = describe_faults(fault_sums, own, [slot.name for slot in self._plan.slots])
        raise FloatingPointError(f"{problem}: step refused, weights and state are unchanged")

    def _require_unchanged(self) -> None:
        """With overlap the messages have gone: what is set now must be what they were made with."""
        if self._settings != [group_settings(group) for group in self.param_groups]:
            raise RuntimeError(
                "penalty, preconditioner_scale or lr was changed between backward() and step(), after overlap=True had "
                "sent the messages: change them after step()"
            )
        if getattr(self, "grad_scale", None) is not None and self._communication.grad_scaler is None:
            raise RuntimeError("overlap=True needs to know the GradScaler: pass grad_scaler=scaler to the optimizer")

    @torch.no_grad()  # a hook may call it
    def _send(self, number: int) -> Sent:
        """Local step of the parameters in one bucket, and their messages on their way."""
        bucket = self._plan.buckets[number]
        gradients = self._gradients(bucket)
        works = self._works(bucket, gradients)
        if getattr(self, "found_inf", None) is None:  # otherwise a GradScaler has looked
            self._found.append(first_bad(gradients, bucket.positions))
        weight = self.worker_weight or 1.0
        is_last = number == len(self._plan.buckets) - 1
        scalars = self._scalars() if is_last else []
        buffer = MessageBuffer(
            [gradient.shape for gradient in gradients],
            len(scalars) and len(scalars) + NUM_FAULT_SCALARS,
            dtype=widest(gradients),
            device=gradients[0].device,
        )
        outcomes = send_local_steps(bucket, works, self._settings, weight, buffer.tensors)
        if self._communication.compression is not None:
            for work, message in zip(works, buffer.tensors, strict=True):
                if RESIDUAL in work.state:
                    message += work.state[RESIDUAL]
        if is_last:
            buffer.scalars[:NUM_FAULT_SCALARS] = (
                fault_tensor(self._found, worker=self._consensus.rank) if self._found else 0
            )
            buffer.scalars[NUM_FAULT_SCALARS:] = on_device(scalars, dtype=buffer.flat.dtype, device=buffer.flat.device)
        return Sent(outcomes, self._consensus.start_sum(buffer), [Used.now(slot.parameter) for slot in bucket.slots])

    def _scale(self) -> Tensor | None:
        """The factor by which a GradScaler has multiplied the gradients; None where there is none."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        return self._communication.grad_scale(self._plan.slots[0].parameter.device) if scale is None else scale

    def _scalars(self) -> list[float]:
        """What rides along besides faults: overflow found by a GradScaler, alpha_i, alpha_i sigma_i of each group."""
        overflow = getattr(self, "found_inf", None)
        weight = self.worker_weight or 1.0
        has_overflow = overflow is not None and bool(overflow)
        return [float(has_overflow), weight, *(weight * group.penalty for group in self._settings)]

    def _gradients(self, bucket: Bucket) -> list[Tensor]:
        scale = self._scale()
        return [local_gradient(slot.parameter, scale) for slot in bucket.slots]

    def _works(self, bucket: Bucket, gradients: Sequence[Tensor]) -> list[Work]:
        return [Work(s, s.weights, self._state(s), g) for s, g in zip(bucket.slots, gradients, strict=True)]

    def _state(self, slot: Slot) -> dict[str, Tensor]:
        """A parameter's state, itself; of a sharded one this rank's part, in the memory of the state."""
        state: dict[str, Tensor] = self.state[slot.parameter]
        if "dual" not in state:
            dual = torch.zeros_like(slot.weights, dtype=state_dtype(slot.weights.dtype))
            self._keep(slot, {"dual": dual, **slot.preconditioner.init_state(dual)})
        if slot.weights is slot.parameter:
            return state
        return {name: local_part(value) for name, value in state.items()}

    def _keep(self, slot: Slot, state: dict[str, Tensor]) -> None:
        """Store state that a step has replaced; that of a sharded parameter is sharded alike."""
        kept = self.state[slot.parameter]
        for name, value in state.items():
            if kept.get(name) is not value:
                kept[name] = sharded_like(slot.parameter, value)

    def _keep_all(self, works: Sequence[Work]) -> None:
        for work in works:
            if work.state is not self.state[work.slot.parameter]:
                self._keep(work.slot, work.state)

    def _refusals(self, sums: list[float]) -> list[float]:
        """With the faults and overflows of all shards, where a worker is several ranks: all must refuse alike."""
        device = self._plan.slots[0].weights.device
        return [*sum_over(self._shards, sums[: NUM_FAULT_SCALARS + 1], device), *sums[NUM_FAULT_SCALARS + 1 :]]

    def _commit(self, sent: Sequence[Sent], weight_sum: float, penalty_sums: Sequence[float]) -> None:
        agreed = [
            Agreed(weight_sum, penalty_sum / weight_sum, group["consensus_l2"])
            for penalty_sum, group in zip(penalty_sums, self.param_groups, strict=True)
        ]
        for bucket, arrived in zip(self._plan.buckets, sent, strict=True):
            works = self._works(bucket, self._gradients(bucket))
            settle_all(bucket, works, arrived.outcomes, arrived.buffer.tensors, agreed)
            self._keep_all(works)
            if arrived.total.residual is not None:
                pieces = torch.split(arrived.total.residual, [work.weights.numel() for work in works])
                for work, piece in zip(works, pieces, strict=True):
                    self._keep(work.slot, {RESIDUAL: piece.view(work.weights.shape)})
        count_step(self.param_groups)

    def _step_alone(self) -> None:
        """The step where this worker is the only one: nothing to send, and no rank that could still refuse it."""
        buckets = self._plan.buckets
        gradients = [self._gradients(bucket) for bucket in buckets]
        overflow = getattr(self, "found_inf", None)
        if overflow is None:  # otherwise a GradScaler has looked
            self._found = [first_bad(own, bucket.positions) for own, bucket in zip(gradients, buckets, strict=True)]
        faults = fault_tensor(self._found, worker=0).tolist() if self._found else [0.0] * NUM_FAULT_SCALARS
        *faults, num_overflows = self._refusals([*faults, float(overflow is not None and bool(overflow))])
        if faults[0]:
            self._refuse(faults)
        if faults[0] or num_overflows:
            return
        consensus_l2 = [group["consensus_l2"] for group in self.param_groups]
        for bucket, own in zip(buckets, gradients, strict=True):
            works = self._works(bucket, own)
            step_alone(bucket, works, self._settings, consensus_l2)
            self._keep_all(works)
        count_step(self.param_groups)


def _arrived(optimizer: "weakref.ref[ADMMOptimizer]", position: int) -> None:
    this = optimizer()
    if this is not None:
        this._gradient_arrived(position)
