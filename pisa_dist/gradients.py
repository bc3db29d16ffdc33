"""The gradient oracle: gradients of many workers' minibatch losses, each at its own weights."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pisa_dist.algorithms.base import Tensors
from pisa_dist.data.datasets import Dataset
from pisa_dist.data.sampling import WorkerDraw
from pisa_dist.faults import Fault
from pisa_dist.metrics import cross_entropy


class Participant(NamedTuple):
    """A worker that is present on this rank in a round."""

    worker: int
    shard: Dataset
    draw: WorkerDraw


class RoundGradients:
    """Gradients for one round, called once per local step; what the trainer needs to know piles up on the way.

    Args:
        model: in training mode; its own parameters and buffers are never written.
        participants: the present workers of this rank, in stacking order.
        weights: consensus weights by name, for shapes and types.
        buffers: consensus buffers by name; each worker works on a copy.

    Attributes:
        workers: number of each participant.
        loss_sums: summed minibatch losses of each participant over the calls, float64 [workers].
        buffers: each participant's buffers after its steps.
        fault: the first non-finite gradient.
    """

    def __init__(
        self, model: nn.Module, participants: Sequence[Participant], weights: Tensors, buffers: Tensors
    ) -> None:
        self._model = model
        self._participants = participants
        self._weights = weights
        self.workers = [participant.worker for participant in participants]
        self.loss_sums = torch.zeros(len(participants), dtype=torch.float64)
        self.buffers = [{name: b.clone() for name, b in buffers.items()} for _ in participants]
        self.fault: Fault | None = None

    def __call__(self, local_weights: Tensors, step: int) -> Tensors:
        """Gradient of every participant's minibatch loss at its own weights, [workers, *shape] by name."""
        stacked = {
            name: torch.empty((len(self._participants), *w.shape), dtype=w.dtype, device=w.device)
            for name, w in self._weights.items()
        }
        for row, participant in enumerate(self._participants):
            gradients = self._gradient(row, participant, {n: w[row] for n, w in local_weights.items()}, step)
            for name, gradient in zip(stacked, gradients, strict=True):
                stacked[name][row] = gradient
        if self.fault is None:
            self.fault = self._find_fault(stacked)
        return stacked

    def _gradient(self, row: int, participant: Participant, weights: Tensors, step: int) -> Sequence[Tensor]:
        # Randomness inside the model (dropout) is keyed like the minibatch, so that no layout of ranks changes it.
        torch.manual_seed(participant.draw.torch_seeds[step])
        shard, positions = participant.shard, participant.draw.positions[step]
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        with torch.enable_grad():
            output = functional_call(self._model, {**leaves, **self.buffers[row]}, (shard.inputs[positions],))
            loss = cross_entropy(output, shard.targets[positions])
            gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
        self.loss_sums[row] += loss.detach().double().cpu()
        return gradients

    def _find_fault(self, stacked: Tensors) -> Fault | None:
        gradients = list(stacked.values())
        if Fault.find(gradients, worker=0) is None:
            return None
        faults = (
            Fault.find([g[row] for g in gradients], worker=participant.worker)
            for row, participant in enumerate(self._participants)
        )
        return next(fault for fault in faults if fault is not None)
