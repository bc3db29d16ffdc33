"""What PISA, SISA and NSISA have in common: the step, the refusal of bad gradients, the state."""

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pisa_dist.admm.device import keep_freed_memory, on_device
from pisa_dist.admm.preconditioners import Preconditioner
from pisa_dist.admm.updates import state_dtype
from pisa_dist.checks import check_ranges
from pisa_dist.communication import Communication
from pisa_dist.consensus import MessageBuffer, widest
from pisa_dist.distributed import broadcast_, require_same
from pisa_dist.faults import NUM_FAULT_SCALARS, Fault, describe_faults, fault_tensor, first_bad
from pisa_dist.local import (
    RESIDUAL,
    ParamGroup,
    Slot,
    count_step,
    describe_group,
    group_settings,
    group_slots,
    local_gradient,
    send_local_steps,
    settle,
    step_alone,
)
from pisa_dist.overlap import Flight, Sent, Used, make_buckets
from pisa_dist.sharding import local_part, require_replicas, shard_group, sharded_like, sum_over


class Plan(NamedTuple):
    """What an iteration sends: slots in message order, and positions of the slots in each bucket."""

    slots: list[Slot]
    buckets: list[list[int]]


class ADMMOptimizer(torch.optim.Optimizer):
    """One worker per rank and one sum per step; a subclass says which preconditioner a group has.

    Args:
        params: parameters, named parameters or parameter groups.
        defaults: settings of a parameter group that does not give its own.
        communication: how this worker talks to the others.

    Attributes:
        bytes_sent: bytes that this rank has put on the wire so far, before the collective's own factor.
    """

    # GradScaler then hands over its scale and whether *this* rank overflowed and always calls `step`. Without this,
    # one rank would skip the step and leave the others waiting in the all-reduce.
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], communication: Communication) -> None:
        self._communication = communication
        self._connect()
        self._is_built = False
        super().__init__(params, {**defaults, "num_steps": 0})
        self._is_built = True
        self._agree(self.param_groups)
        self._refresh_plan()
        if any(slot.parameter.device.type == "cpu" for slot in self._plan.slots):
            keep_freed_memory()

    def _connect(self) -> None:
        """Everything that depends on the process group and cannot be copied."""
        self._consensus = self._communication.consensus()
        self._plan = Plan([], [])
        self._shards: dist.ProcessGroup | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._flight: Flight | None = None
        self._is_accumulating = False
        self.bytes_sent = 0

    @property
    def worker_weight(self) -> float | None:
        """alpha_i of this worker before normalisation; None where all count alike."""
        return self._communication.worker_weight

    @property
    def on_nonfinite(self) -> str:
        """What a NaN or infinite gradient does: "raise" or "skip"."""
        return self._communication.on_nonfinite

    @abstractmethod
    def _group_preconditioner(self, group: ParamGroup) -> Preconditioner:
        """The rule for Q_i in one parameter group; raises ValueError where its settings are out of range."""

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add parameters, as in every torch optimizer; call it on every rank alike.

        Raises:
            ValueError: a setting out of range, a parameter that is not real floating point, or ranks that differ.
        """
        settings = {**self.defaults, **param_group}
        check_ranges({**settings, "lr": float(settings["lr"])}, optional=("preconditioner_bound",))
        self._group_preconditioner(settings)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            if not parameter.dtype.is_floating_point:
                self.param_groups.pop()
                raise ValueError(
                    f"parameters must be real floating point, got {parameter.dtype} of shape {tuple(parameter.shape)}"
                )
        if self._is_built:
            self._agree([group])
            self._refresh_plan()

    def _agree(self, groups: list[ParamGroup]) -> None:
        """Refuse ranks whose models differ; give all of them rank 0's weights, as DistributedDataParallel does."""
        parameters = [p for group in groups for p in group["params"]]
        self._shards = shard_group(parameters)
        require_replicas(self._communication.process_group, self._shards)
        if self._consensus.num_ranks == 1:
            return
        weighting = "uniform weights" if self.worker_weight is None else "a worker_weight"
        description = [f"{type(self).__name__} with {len(groups)} parameter groups and {weighting}"]
        description += [line for group in groups for line in describe_group(group)]
        require_same(description, group=self._communication.process_group, device=parameters[0].device)
        broadcast_([local_part(p).detach() for p in parameters], group=self._communication.process_group)

    def _slots(self) -> list[Slot]:
        slots: list[Slot] = []
        for index, group in enumerate(self.param_groups):
            slots += group_slots(
                group, index, self._group_preconditioner(group), self._communication.is_compiled, first=len(slots)
            )
        return slots

    def _refresh_plan(self) -> None:
        """Which parameters train, in which buckets; hooks on them where messages are to overlap the backward pass."""
        slots = self._slots()
        parameters = [slot.parameter for slot in slots]
        before = [slot.parameter for slot in self._plan.slots]
        if len(before) == len(parameters) and all(a is b for a, b in zip(before, parameters, strict=True)):
            self._plan = self._plan._replace(slots=slots)
            return
        overlap = self._communication.overlap
        sizes = [slot.weights.numel() * state_dtype(slot.weights.dtype).itemsize for slot in slots]
        self._plan = Plan(
            slots, make_buckets(sizes, bucket_bytes=self._communication.bucket_mb * 2**20 if overlap else None)
        )
        for hook in self._hooks:
            hook.remove()
        this = weakref.ref(self)  # hooks must not keep a dropped optimizer alive, nor go on for it
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _, at=position: _arrived(this, at)
            )
            for position, parameter in enumerate(parameters if overlap else ())
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

    @torch.no_grad()
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
        self._flight = Flight(self._plan.buckets, self._send) if self._plan.slots else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One PISA iteration: local step, one sum over the ranks, consensus weights written to the parameters.

        Args:
            closure: recomputes the loss and its gradients and returns the loss; optional.

        Returns:
            What the closure returned, else None.

        Raises:
            FloatingPointError: a gradient on any rank was NaN or infinite and `on_nonfinite` is "raise". Raised on
                every rank; weights and state are as before the step.
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
            self._commit(flight.buckets, sent, weight_sum, penalty_sums)
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

    def _send(self, number: int) -> Sent:
        """Local step of the parameters in one bucket, and their messages on their way."""
        bucket = self._plan.buckets[number]
        slots = [self._plan.slots[position] for position in bucket]
        scale = self._scale()
        gradients = [local_gradient(slot.parameter, scale) for slot in slots]
        if getattr(self, "found_inf", None) is None:  # otherwise a GradScaler has looked
            self._found.append(first_bad(gradients, bucket))
        weight = self.worker_weight or 1.0
        is_last = number == len(self._plan.buckets) - 1
        scalars = self._scalars() if is_last else []
        buffer = MessageBuffer(
            [slot.weights.shape for slot in slots],
            len(scalars) and len(scalars) + NUM_FAULT_SCALARS,
            dtype=widest(gradients),
            device=gradients[0].device,
        )
        outcomes = send_local_steps(
            slots, [self._state(slot) for slot in slots], gradients, self._settings, weight, buffer.tensors
        )
        if self._communication.compression is not None:
            for slot, message in zip(slots, buffer.tensors, strict=True):
                if RESIDUAL in self.state[slot.parameter]:
                    message += local_part(self.state[slot.parameter][RESIDUAL])
        if is_last:
            buffer.scalars[:NUM_FAULT_SCALARS] = (
                fault_tensor(self._found, worker=self._consensus.rank) if self._found else 0
            )
            buffer.scalars[NUM_FAULT_SCALARS:] = on_device(scalars, dtype=buffer.flat.dtype, device=buffer.flat.device)
        return Sent(outcomes, self._consensus.start_sum(buffer), [Used.now(slot.parameter) for slot in slots])

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

    def _state(self, slot: Slot) -> dict[str, Tensor]:
        """This rank's part of a parameter's state, in the memory of the state itself."""
        state = self.state[slot.parameter]
        if "dual" not in state:
            dual = torch.zeros_like(slot.weights, dtype=state_dtype(slot.weights.dtype))
            self._keep(slot, {"dual": dual, **slot.preconditioner.init_state(dual)})
        return {name: local_part(value) for name, value in state.items()}

    def _keep(self, slot: Slot, state: dict[str, Tensor]) -> None:
        """Store state that a step has replaced; that of a sharded parameter is sharded alike."""
        kept = self.state[slot.parameter]
        for name, value in state.items():
            if kept.get(name) is not value:
                kept[name] = sharded_like(slot.parameter, value)

    def _refusals(self, sums: list[float]) -> list[float]:
        """With the faults and overflows of all shards, where a worker is several ranks: all must refuse alike."""
        device = self._plan.slots[0].weights.device
        return [*sum_over(self._shards, sums[: NUM_FAULT_SCALARS + 1], device), *sums[NUM_FAULT_SCALARS + 1 :]]

    def _commit(
        self, buckets: Sequence[Sequence[int]], sent: Sequence[Sent], weight_sum: float, penalty_sums: Sequence[float]
    ) -> None:
        scale = self._scale()
        for bucket, arrived in zip(buckets, sent, strict=True):
            slots = [self._plan.slots[position] for position in bucket]
            for slot, outcome, message_sum in zip(slots, arrived.outcomes, arrived.buffer.tensors, strict=True):
                state = self._state(slot)
                settle(
                    slot,
                    state,
                    local_gradient(slot.parameter, scale),
                    self._settings[slot.group],
                    outcome,
                    message_sum,
                    weight_sum=weight_sum,
                    penalty_sum=penalty_sums[slot.group] / weight_sum,
                    consensus_l2=self.param_groups[slot.group]["consensus_l2"],
                )
                self._keep(slot, state)
            if arrived.total.residual is not None:
                pieces = torch.split(arrived.total.residual, [slot.weights.numel() for slot in slots])
                for slot, piece in zip(slots, pieces, strict=True):
                    self._keep(slot, {RESIDUAL: piece.view(slot.weights.shape)})
        count_step(self.param_groups)

    def _step_alone(self) -> None:
        """The step where this worker is the only one: nothing to send, and no rank that could still refuse it."""
        slots = self._plan.slots
        scale = self._scale()
        gradients = [local_gradient(slot.parameter, scale) for slot in slots]
        overflow = getattr(self, "found_inf", None)
        if overflow is None:  # otherwise a GradScaler has looked
            self._found = [first_bad(gradients, range(len(slots)))]
        faults = fault_tensor(self._found, worker=0).tolist() if self._found else [0.0] * NUM_FAULT_SCALARS
        *faults, num_overflows = self._refusals([*faults, float(overflow is not None and bool(overflow))])
        if faults[0]:
            self._refuse(faults)
        if faults[0] or num_overflows:
            return
        states = [self._state(slot) for slot in slots]
        step_alone(slots, states, gradients, self._settings, [group["consensus_l2"] for group in self.param_groups])
        for slot, state in zip(slots, states, strict=True):
            self._keep(slot, state)
        count_step(self.param_groups)

    def _require_world(self) -> None:
        """The process group must not appear or vanish after construction: ranks would silently train apart."""
        if self._consensus.num_ranks == 1 and self._communication.process_group is None:
            initialised = dist.is_available() and dist.is_initialized()
            if initialised and dist.get_world_size() > 1:
                raise RuntimeError(
                    f"{type(self).__name__} was built before torch.distributed.init_process_group: build it after"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore duals, preconditioner state and settings; bf16 parameters keep their float32 state."""
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's type, which would round the float32 state of bf16 parameters.
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for parameter, index in zip(parameters, indices, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = value.detach().to(
                    device=parameter.device, dtype=state_dtype(parameter.dtype), copy=True
                )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the process group and the hooks, which cannot be copied; a copy finds the default group."""
        kept = ("_is_built", "_preconditioner")
        communication = replace(self._communication, process_group=None, grad_scaler=None)
        mine = {key: value for key, value in vars(self).items() if key in kept}
        return {**super().__getstate__(), **mine, "_communication": communication}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # `load_state_dict` comes here too, with an optimizer that has its group; only a copy has none yet.
        if "_consensus" not in vars(self):
            self._connect()


def _arrived(optimizer: "weakref.ref[ADMMOptimizer]", position: int) -> None:
    this = optimizer()
    if this is not None:
        this._gradient_arrived(position)
