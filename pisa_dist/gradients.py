"""The gradient oracle: gradients of many workers' minibatch losses, each at its own weights.

Two paths lead to them, one worker after the other and all of them at once; `vectorize` chooses. They draw the same
minibatches and agree to rounding.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pisa_dist.algorithms.base import Tensors
from pisa_dist.faults import Fault
from pisa_dist.guards import is_out_of_memory
from pisa_dist.metrics import cross_entropies, cross_entropy, logits_of
from pisa_dist.minibatches import Minibatches, Section, ShardPool


class GradientPath(ABC):
    """How the gradients of stacked workers are computed.

    Args:
        model: in training mode; its own parameters and buffers are never written.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @abstractmethod
    def __call__(self, weights: Tensors, buffers: Tensors, batch: Minibatches) -> tuple[Tensors, Tensor]:
        """Gradients [workers, *shape] by name, and losses [workers].

        Args:
            weights: of each worker, [workers, *shape] by name.
            buffers: of each worker, [workers, *shape] by name; advanced in place by what the model does to them.
            batch: what each worker's loss is the mean over.
        """


class Sequential(GradientPath):
    """One worker after the other: serves any model."""

    def __call__(self, weights: Tensors, buffers: Tensors, batch: Minibatches) -> tuple[Tensors, Tensor]:
        """As in `GradientPath`."""
        stacked = {name: torch.empty(w.shape, dtype=w.dtype, device=w.device) for name, w in weights.items()}
        losses = []
        for row, seed in enumerate(batch.torch_seeds):
            # Randomness inside the model is keyed like the minibatch, so that no layout of ranks changes it.
            torch.manual_seed(seed)
            leaves = {name: w[row].detach().requires_grad_() for name, w in weights.items()}
            own = {name: b[row] for name, b in buffers.items()}
            with torch.enable_grad():
                output = functional_call(self._model, {**leaves, **own}, (batch.inputs[row],))
                loss = cross_entropy(output, batch.targets[row])
                gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
            for values, gradient in zip(stacked.values(), gradients, strict=True):
                values[row] = gradient
            losses.append(loss.detach())
        return stacked, torch.stack(losses)


class Vectorized(GradientPath):
    """All workers at once, by `torch.func.vmap`: for models that do the same to every worker's minibatch.

    A call that vmap refuses after all goes through `Sequential`, and each new reason is said once in a warning. It does
    so whatever happened in the calls before: a resumed run takes the same path as the uninterrupted one.

    Attributes:
        refusals: the different reasons for which vmap has refused a call, in one line each, the first one first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._sequential = Sequential(model)
        self.refusals: list[str] = []

    def __call__(self, weights: Tensors, buffers: Tensors, batch: Minibatches) -> tuple[Tensors, Tensor]:
        """As in `GradientPath`."""
        try:
            gradients, losses, advanced = self.compute(weights, buffers, batch)
        except Exception as error:  # vmap refuses in many ways; an error of the model's own comes again below
            if is_out_of_memory(error):
                raise
            found = self._sequential(weights, buffers, batch)
            self._refused((str(error).splitlines() or [type(error).__name__])[0])
            return found
        for name, value in advanced.items():
            buffers[name].copy_(value)
        return gradients, losses

    def _refused(self, reason: str) -> None:
        if reason not in self.refusals:
            self.refusals.append(reason)
            warnings.warn(
                "vectorize: one worker after the other after all, and a vain trial in every such call, which "
                f"vectorize=false saves: {reason}",
                stacklevel=2,
            )

    def compute(self, weights: Tensors, buffers: Tensors, batch: Minibatches) -> tuple[Tensors, Tensor, Tensors]:
        """Gradients, losses and advanced buffers; changes none of its inputs and passes vmap's errors on."""
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        own = {name: b.clone() for name, b in buffers.items()}
        with torch.enable_grad():
            logits = vmap(self._logits, randomness="error")(leaves, own, batch.inputs)
            losses = cross_entropies(logits, batch.targets)
            # A worker's weights are in no other worker's loss, so that the gradient of the sum holds each one's own.
            gradients = torch.autograd.grad(
                losses.sum(), list(leaves.values()), materialize_grads=True, allow_unused=True
            )
        return dict(zip(leaves, gradients, strict=True)), losses.detach(), own

    def _logits(self, weights: Tensors, buffers: Tensors, inputs: Tensor) -> Tensor:
        return logits_of(functional_call(self._model, {**weights, **buffers}, (inputs,)))


class RoundGradients:
    """Gradients for one round, called once per local step; what the trainer needs to know piles up on the way.

    Args:
        path: how they are computed.
        pool: the samples.
        workers: number of each present worker of this stack.
        sections: what they draw, in stacking order.
        weights: consensus weights by name, for shapes and types.
        buffers: consensus buffers by name; each worker works on a copy.

    Attributes:
        workers: number of each participant.
        loss_sums: summed minibatch losses of each participant over the calls, float64 [workers].
        buffers: the participants' buffers after their steps, [workers, *shape] by name.
        fault: the first non-finite gradient.
    """

    def __init__(
        self,
        path: GradientPath,
        pool: ShardPool,
        *,
        workers: Sequence[int],
        sections: Sequence[Section],
        weights: Tensors,
        buffers: Tensors,
    ) -> None:
        self._path = path
        self._pool = pool
        self._sections = sections
        self._weights = weights
        self.workers = workers
        device = next(iter(weights.values())).device
        self.loss_sums = torch.zeros(len(workers), dtype=torch.float64, device=device)
        self.buffers = {name: b.expand(len(workers), *b.shape).clone() for name, b in buffers.items()}
        self.fault: Fault | None = None

    def __call__(self, local_weights: Tensors, step: int) -> Tensors:
        """Gradient of every participant's minibatch loss at its own weights, [workers, *shape] by name."""
        parts = [self._of_section(section, local_weights, step) for section in self._sections]
        if len(parts) == 1:
            (stacked,) = parts
        else:
            empty = {name: w.new_empty((0, *w.shape)) for name, w in self._weights.items()}
            stacked = {name: torch.cat([value, *(part[name] for part in parts)]) for name, value in empty.items()}
        if self.fault is None:
            self.fault = self._find_fault(stacked)
        return stacked

    def _of_section(self, section: Section, local_weights: Tensors, step: int) -> Tensors:
        inputs, targets = self._pool.gather(section.indices[:, step])
        gradients, losses = self._path(
            {name: w[section.rows] for name, w in local_weights.items()},
            {name: b[section.rows] for name, b in self.buffers.items()},
            Minibatches(inputs, targets, section.torch_seeds[:, step].tolist()),
        )
        self.loss_sums[section.rows] += losses.double()
        return gradients

    def _find_fault(self, stacked: Tensors) -> Fault | None:
        gradients = list(stacked.values())
        if Fault.find(gradients, worker=0) is None:
            return None
        faults = (Fault.find([g[row] for g in gradients], worker=worker) for row, worker in enumerate(self.workers))
        return next(fault for fault in faults if fault is not None)
