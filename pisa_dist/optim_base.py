"""What PISA, SISA and NSISA have in common: the step, the refusal of bad gradients, the state."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pisa_dist.admm.penalty import divided_by_lr, grown_penalty
from pisa_dist.admm.preconditioners import Preconditioner
from pisa_dist.admm.updates import consensus_update, state_dtype
from pisa_dist.admm.worker import WorkerStep, worker_step
from pisa_dist.checks import check_choice, check_ranges
from pisa_dist.consensus import make_consensus
from pisa_dist.distributed import broadcast_, require_same
from pisa_dist.faults import NUM_FAULT_SCALARS, ON_NONFINITE, Fault, describe_faults, fault_scalars

ParamGroup = dict[str, Any]


class Slot(NamedTuple):
    """One trainable parameter, in message order."""

    parameter: Tensor
    name: str
    group: int
    preconditioner: Preconditioner


class ADMMOptimizer(torch.optim.Optimizer):
    """One worker per rank and one all-reduce per step; a subclass says which preconditioner a group has.

    Args:
        params: parameters, named parameters or parameter groups.
        defaults: settings of a parameter group that does not give its own.
        worker_weight, process_group, on_nonfinite: as in `pisa_dist.PISA`.
    """

    # GradScaler then hands over its scale and whether *this* rank overflowed and always calls `step`. Without this,
    # one rank would skip the step and leave the others waiting in the all-reduce.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        worker_weight: float | None,
        process_group: dist.ProcessGroup | None,
        on_nonfinite: str,
    ) -> None:
        check_choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
        check_ranges({"worker_weight": worker_weight}, optional=("worker_weight",))
        self.worker_weight = worker_weight
        self.on_nonfinite = on_nonfinite
        self._process_group = process_group
        self._consensus = make_consensus(process_group)
        self._is_built = False
        super().__init__(params, {**defaults, "num_steps": 0})
        self._is_built = True
        self._agree(self.param_groups)

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

    def _agree(self, groups: list[ParamGroup]) -> None:
        """Refuse ranks whose models differ; give all of them rank 0's weights, as DistributedDataParallel does."""
        if self._consensus.num_ranks == 1:
            return
        parameters = [p for group in groups for p in group["params"]]
        weighting = "uniform weights" if self.worker_weight is None else "a worker_weight"
        description = [f"{type(self).__name__} with {len(groups)} parameter groups and {weighting}"]
        for group in groups:
            description.append(f"consensus_l2={group['consensus_l2']} in a parameter group")
            description += [
                f"a parameter of shape {tuple(p.shape)}, {p.dtype}, requires_grad={p.requires_grad}"
                for p in group["params"]
            ]
        require_same(description, group=self._process_group, device=parameters[0].device)
        broadcast_(parameters, group=self._process_group)

    def _slots(self) -> list[Slot]:
        slots: list[Slot] = []
        for index, group in enumerate(self.param_groups):
            rule = self._group_preconditioner(group)
            names = group.get("param_names") or [None] * len(group["params"])
            for parameter, name in zip(group["params"], names, strict=True):
                if parameter.requires_grad:
                    label = name or f"parameter {len(slots)} of shape {tuple(parameter.shape)}"
                    slots.append(Slot(parameter, label, index, rule.for_parameter(name, parameter.shape)))
        return slots

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One PISA iteration: local step, one all-reduce, consensus weights written to the parameters.

        Args:
            closure: recomputes the loss and its gradients and returns the loss; optional.

        Returns:
            What the closure returned, else None.

        Raises:
            FloatingPointError: a gradient on any rank was NaN or infinite and `on_nonfinite` is "raise". Raised on
                every rank; weights and state are as before the step.
            ConsensusError: another rank is gone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_world()
        slots = self._slots()
        if not slots:
            return loss
        gradients = [self._gradient(slot) for slot in slots]
        overflow = getattr(self, "found_inf", None)
        has_overflow = overflow is not None and bool(overflow)
        fault = None if has_overflow else Fault.find(gradients, worker=self._consensus.rank)
        refused = has_overflow or fault is not None

        settings = [self._group_settings(group) for group in self.param_groups]
        weight = self.worker_weight or 1.0
        if refused:
            steps = []
            messages = [torch.zeros_like(gradient) for gradient in gradients]
        else:
            steps = [
                self._worker_step(slot, gradient, weight=weight, **settings[slot.group])
                for slot, gradient in zip(slots, gradients, strict=True)
            ]
            messages = [step.message for step in steps]
        scalars = [*fault_scalars(fault), float(has_overflow), weight]
        scalars += [weight * group["penalty"] for group in settings]
        total = self._consensus.sum_message(messages, scalars)
        sums = total.scalars.tolist()
        self._refuse_or_commit(slots, fault, steps, total.tensors, sums)
        return loss

    def _refuse_or_commit(
        self,
        slots: list[Slot],
        fault: Fault | None,
        steps: list[WorkerStep],
        message_sums: list[Tensor],
        sums: list[float],
    ) -> None:
        problem = describe_faults(sums, fault, [slot.name for slot in slots])
        num_overflows, weight_sum, *penalty_sums = sums[NUM_FAULT_SCALARS:]
        if problem is not None and self.on_nonfinite == "raise":
            raise FloatingPointError(f"{problem}: step refused, weights and state are unchanged")
        if problem is not None or num_overflows > 0:
            return
        for slot, step, message_sum in zip(slots, steps, message_sums, strict=True):
            parameter = slot.parameter
            parameter.copy_(
                consensus_update(
                    parameter.to(message_sum.dtype),
                    message_sum / weight_sum,
                    penalty_sum=penalty_sums[slot.group] / weight_sum,
                    consensus_l2=self.param_groups[slot.group]["consensus_l2"],
                )
            )
            self.state[parameter].update(dual=step.dual, **step.preconditioner_state)
        for group in self.param_groups:
            group["num_steps"] += 1

    def _require_world(self) -> None:
        """The process group must not appear or vanish after construction: ranks would silently train apart."""
        if self._consensus.num_ranks == 1 and self._process_group is None:
            initialised = dist.is_available() and dist.is_initialized()
            if initialised and dist.get_world_size() > 1:
                raise RuntimeError(
                    f"{type(self).__name__} was built before torch.distributed.init_process_group: build it after"
                )

    def _gradient(self, slot: Slot) -> Tensor:
        """The local gradient in the state's type, unscaled if a GradScaler has scaled it; zero where there is none."""
        parameter = slot.parameter
        if parameter.grad is None:
            return torch.zeros_like(parameter, dtype=state_dtype(parameter.dtype))
        # Duals and messages are dense, so a sparse gradient saves nothing here.
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        gradient = gradient.to(state_dtype(parameter.dtype))
        scale = getattr(self, "grad_scale", None)
        return gradient if scale is None else gradient / scale.to(gradient.device)

    @staticmethod
    def _group_settings(group: ParamGroup) -> dict[str, float]:
        """sigma_i, rho_i and t of the coming step in one parameter group."""
        step, lr = group["num_steps"] + 1, float(group["lr"])
        penalty = grown_penalty(
            group["penalty"],
            step=step,
            growth=group["penalty_growth"],
            interval=group["penalty_growth_interval"],
        )
        scale = divided_by_lr(group["preconditioner_scale"], lr)
        return {"penalty": divided_by_lr(penalty, lr), "preconditioner_scale": scale, "step": step}

    def _worker_step(
        self,
        slot: Slot,
        gradient: Tensor,
        *,
        weight: float,
        penalty: float,
        preconditioner_scale: float,
        step: float,
    ) -> WorkerStep:
        state = self.state[slot.parameter]
        if "dual" not in state:
            dual = torch.zeros_like(gradient)
            state.update(dual=dual, **slot.preconditioner.init_state(dual))
        return worker_step(
            state["dual"],
            {name: value for name, value in state.items() if name != "dual"},
            gradient,
            preconditioner=slot.preconditioner,
            penalty=penalty,
            preconditioner_scale=preconditioner_scale,
            worker_weight=weight,
            step=step,
            shape=slot.parameter.shape,
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
        """Everything but the process group, which cannot be copied; a copy finds its group again."""
        kept = ("worker_weight", "on_nonfinite", "_is_built", "_preconditioner")
        return {**super().__getstate__(), **{k: v for k, v in vars(self).items() if k in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # `load_state_dict` comes here too, with an optimizer that has its group; only a copy has none yet.
        if "_consensus" not in vars(self):
            self._process_group = None
            self._consensus = make_consensus(None)
