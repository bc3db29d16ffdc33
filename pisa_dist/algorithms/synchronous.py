"""Synchronous data-parallel training: any torch optimizer on the averaged gradient."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pisa_dist.algorithms.base import (
    Algorithm,
    ConsensusResult,
    LocalResult,
    Round,
    State,
    Tensors,
    in_state_dtype,
    weighted_sum,
)


@dataclass
class Synchronous(Algorithm):
    """What DistributedDataParallel with a torch optimizer does: w <- optimizer(w, sum_i alpha_i g_i).

    The gradient is the weighted mean over the present workers. Muon takes the matrices only, as torch's does;
    everything else then takes AdamW at the same lr.

    Attributes:
        optimizer: name of a class in `torch.optim`, such as AdamW, SGD or Muon.
        lr: step size > 0.
        optimizer_options: further arguments of that class, such as {weight_decay: 0.0}.
    """

    name: str = "synchronous"

    optimizer: str = "AdamW"
    lr: float = 1e-3
    optimizer_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = getattr(torch.optim, self.optimizer, None)
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
            raise ValueError(
                "`algorithm.optimizer` must be a class in torch.optim, such as AdamW, SGD or Muon, "
                f"got {self.optimizer!r}"
            )
        accepted = inspect.signature(kind).parameters
        for key in self.optimizer_options:
            if key not in accepted or key in ("params", "lr"):
                raise ValueError(
                    f"`algorithm.optimizer_options.{key}` is not an option of torch.optim.{self.optimizer}"
                )
        try:
            self._trial_step()
        except Exception as error:  # torch's optimizers refuse in every way there is
            raise ValueError(
                f"`algorithm.optimizer` {self.optimizer} cannot step on an averaged gradient with "
                f"`algorithm.optimizer_options` {dict(self.optimizer_options)}: {error}"
            ) from error

    def _trial_step(self) -> None:
        """One step on a small matrix: an optimizer that needs a closure or sparse gradients fails here."""
        parameter = nn.Parameter(torch.zeros(2, 2))
        parameter.grad = torch.zeros(2, 2)
        for optimizer in self._optimizers([parameter]):
            optimizer.step()

    def _optimizers(self, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        kind = getattr(torch.optim, self.optimizer)
        if self.optimizer != "Muon":
            return [kind(parameters, lr=self.lr, **self.optimizer_options)]
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            optimizers.append(kind(matrices, lr=self.lr, **self.optimizer_options))
        if others:
            optimizers.append(torch.optim.AdamW(others, lr=self.lr))
        return optimizers

    def local_work(self, round_: Round, state: State) -> LocalResult:  # noqa: D102 - as in Algorithm
        gradients = round_.gradients(round_.stacked_weights(), 0)
        return LocalResult(state, {n: weighted_sum(g, round_.worker_weight) for n, g in gradients.items()})

    def consensus(self, round_: Round, message_sum: Tensors, shared: State) -> ConsensusResult:
        """One step of the torch optimizer, whose state is rebuilt from `shared`, so that nothing is kept here.

        It steps on the weights in `state_dtype`, and so keeps its moments in that.
        """
        parameters = {n: nn.Parameter(w.clone()) for n, w in in_state_dtype(round_.weights).items()}
        for name, parameter in parameters.items():
            parameter.grad = message_sum[name].to(parameter.dtype) / round_.present_weight
        optimizers = self._optimizers(list(parameters.values()))
        new_shared: State = {}
        for optimizer in optimizers:
            members = {n: p for n, p in parameters.items() if any(p is q for q in optimizer.param_groups[0]["params"])}
            for name, parameter in members.items():
                optimizer.state[parameter] = {kind: value.clone() for kind, value in shared.get(name, {}).items()}
            optimizer.step()
            for name, parameter in members.items():
                memory = optimizer.state[parameter]
                new_shared[name] = {kind: v for kind, v in memory.items() if isinstance(v, Tensor)}
        weights = {n: p.detach().to(round_.weights[n].dtype) for n, p in parameters.items()}
        return ConsensusResult(weights, new_shared)
