"""A torch optimizer on each rank that is one worker: what ranks agree on at the start, how it is saved and copied."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from pisa_dist.admm.device import keep_freed_memory
from pisa_dist.admm.updates import state_dtype
from pisa_dist.checks import RANGES, check_ranges, plain_number
from pisa_dist.communication import Communication
from pisa_dist.distributed import broadcast_, require_same
from pisa_dist.local import describe_group
from pisa_dist.sharding import local_part, require_replicas, shard_group
from pisa_dist.slots import ParamGroup


class WorkerOptimizer(torch.optim.Optimizer):
    """One worker per rank; a subclass says what a step is.

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

    agreed: ClassVar[tuple[str, ...]] = ()
    """Settings of a parameter group that must be the same on every rank."""
    may_be_none: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], communication: Communication) -> None:
        self._communication = communication
        self._connect()
        self._is_built = False
        super().__init__(params, _with_plain_numbers(defaults))
        self._is_built = True
        self._agree(self.param_groups)
        if any(p.device.type == "cpu" and p.requires_grad for group in self.param_groups for p in group["params"]):
            keep_freed_memory()

    def _connect(self) -> None:
        """Everything that depends on the process group and cannot be copied."""
        self._consensus = self._communication.consensus()
        self._shards: dist.ProcessGroup | None = None
        self.bytes_sent = 0

    @property
    def worker_weight(self) -> float | None:
        """alpha_i of this worker before normalisation; None where all count alike."""
        return self._communication.worker_weight

    @property
    def on_nonfinite(self) -> str:
        """What a NaN or infinite gradient does: "raise" or "skip"."""
        return self._communication.on_nonfinite

    def _check_group(self, settings: ParamGroup) -> None:
        """Raise ValueError where a group's settings are wrong beyond the range of each."""

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add parameters, as in every torch optimizer; call it on every rank alike.

        Raises:
            ValueError: a setting out of range, a parameter that is not real floating point, or ranks that differ.
        """
        settings = _with_plain_numbers({**self.defaults, **param_group})
        check_ranges({**settings, "lr": plain_number(settings["lr"])}, optional=self.may_be_none)
        self._check_group(settings)
        param_group.update({name: settings[name] for name in param_group})
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
        parameters = [p for group in groups for p in group["params"]]
        self._shards = shard_group([p for group in self.param_groups for p in group["params"]])
        require_replicas(self._communication.process_group, self._shards)
        if self._consensus.num_ranks == 1:
            return
        weighting = "uniform weights" if self.worker_weight is None else "a worker_weight"
        description = [f"{type(self).__name__} with {len(groups)} parameter groups and {weighting}"]
        description += [line for group in groups for line in describe_group(group, self.agreed)]
        require_same(description, group=self._communication.process_group, device=parameters[0].device)
        broadcast_([local_part(p).detach() for p in parameters], group=self._communication.process_group)

    def _require_world(self) -> None:
        """The process group must not appear or vanish after construction: ranks would silently train apart."""
        if self._consensus.num_ranks == 1 and self._communication.process_group is None:
            initialised = dist.is_available() and dist.is_initialized()
            if initialised and dist.get_world_size() > 1:
                raise RuntimeError(
                    f"{type(self).__name__} was built before torch.distributed.init_process_group: build it after"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore duals, the rest of the state and settings; bf16 parameters keep their float32 state."""
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's type, which would round the float32 state of bf16 parameters.
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for parameter, index in zip(parameters, indices, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if torch.is_tensor(value):
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


def _with_plain_numbers(settings: ParamGroup) -> ParamGroup:
    """Numbers as Python's own, to be saved and compared; a learning rate in a tensor stays there, for others to set."""
    return {
        name: plain_number(value) if name in RANGES and not (name == "lr" and torch.is_tensor(value)) else value
        for name, value in settings.items()
    }
