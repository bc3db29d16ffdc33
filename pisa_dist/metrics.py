"""Loss, accuracy and their evaluation over a data set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pisa_dist.consensus import Consensus
from pisa_dist.data.datasets import Dataset

# Large enough to keep a device busy, small enough for a convolution's activations.
EVALUATION_BATCH = 1024

IGNORED = -100  # torch's mark for a target without a loss, such as padding

# Up to so many classes torch's CPU kernel is faster across samples than along classes, five times with ten.
_FEW_CLASSES = 32


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, or the `logits` of a transformers output."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model must return logits or an object with `logits`, got {type(output).__name__}")
    return logits


def cross_entropy(output: Any, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of logits [n, ..., classes] against class indices [n, ...]."""
    logits = logits_of(output)
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction=reduction)


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy` of each of many workers' minibatches, [workers, n, ..., classes] -> [workers]."""
    by_class, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if by_class.shape[1] <= _FEW_CLASSES:
        by_class, labels = by_class.t().unsqueeze(0), labels.unsqueeze(0)
    losses = nn.functional.cross_entropy(by_class, labels, reduction="none").view(len(targets), -1)
    # As in the mean over one minibatch, targets that are to be ignored do not count.
    return losses.sum(1) / (targets != IGNORED).view(len(targets), -1).sum(1)


class Evaluation(NamedTuple):
    """Mean loss in nats and share of correct predictions, over a data set's targets but for the `IGNORED`."""

    loss: float
    accuracy: float


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside, and afterwards each in its own again, such as a backbone kept in it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def require_logits(model: nn.Module, dataset: Dataset) -> None:
    """Refuse a model that cannot classify the samples of a data set; tried on the first.

    Args:
        model: called in evaluation mode; its buffers and each module's mode stay what they were.
        dataset: on the model's device, in the model's floating type.

    Raises:
        ValueError: the model raises an error, or has no logit for each class.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kind = f"inputs of shape {tuple(dataset.inputs.shape[1:])} and {dataset.inputs.dtype}"
    try:
        with torch.no_grad(), evaluation_mode(model), torch.random.fork_rng(devices=[]):
            logits = logits_of(functional_call(model, buffers, (dataset.inputs[:1],)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"the model cannot take {kind}: {type(error).__name__}: {error}") from error
    if logits.ndim < 2 or logits.shape[-1] < dataset.num_classes:
        raise ValueError(
            f"the model must return logits of shape [n, {dataset.num_classes}], at least, for n {kind}, "
            f"got {list(logits.shape)} for one"
        )


def evaluate(model: nn.Module, tensors: Mapping[str, Tensor], dataset: Dataset, *, consensus: Consensus) -> Evaluation:
    """Mean loss and accuracy of a model over a data set, each rank taking an equal slice of it.

    Args:
        model: called in evaluation mode, with `tensors` in place of its parameters and buffers; left in the mode that
            each of its modules was in.
        tensors: weights and buffers by name.
        dataset: on the model's device; every rank holds all of it.
        consensus: sums over the ranks.
    """
    first = len(dataset) * consensus.rank // consensus.num_ranks
    last = len(dataset) * (consensus.rank + 1) // consensus.num_ranks
    sums = torch.zeros(3, dtype=torch.float64, device=dataset.inputs.device)
    with torch.no_grad(), evaluation_mode(model):
        for start in range(first, last, EVALUATION_BATCH):
            part = slice(start, min(start + EVALUATION_BATCH, last))
            targets = dataset.targets[part]
            logits = logits_of(functional_call(model, dict(tensors), (dataset.inputs[part],)))
            sums[0] += cross_entropy(logits.double(), targets, reduction="sum")
            sums[1] += (logits.argmax(-1) == targets).sum()
            sums[2] += (targets != IGNORED).sum()
    consensus.sum_(sums)
    loss, accuracy = (sums[:2] / sums[2]).tolist()
    return Evaluation(loss, accuracy)
