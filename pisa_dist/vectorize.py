"""Whether the gradients of many workers are computed at once or one worker after the other, and for how many at a time.

The choice is a rule and not a race: it depends on model, device, batch size, the number of workers that this process
hosts and their two largest shards. A run that is resumed on as many ranks, or repeated on a busy machine, is then the
same to the last bit. `benchmarks/simulation` holds the measurements behind it.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pisa_dist.admm.device import keep_freed_memory
from pisa_dist.algorithms.base import Tensors
from pisa_dist.gradients import GradientPath, Sequential, Vectorized
from pisa_dist.minibatches import Minibatches, ShardPool

VECTORIZE = ("auto", "true", "false")

# Arithmetic of one worker's step, forward and backward, up to which computing workers at once pays on a CPU: it saves
# a worker's 0.3 ms of calls, and loses where layers become grouped convolutions or many small attention products.
_CPU_MEGAFLOPS = 40.0
# What a block of workers may take, in bytes. On the CPU about the last-level cache.
_BLOCK_BYTES = {"cpu": 32 * 2**20, "cuda": 2 * 2**30}
# Tensors of the model's size that a method handles at a time for each worker: state, gradients, messages.
_TENSORS_IN_FLIGHT = 8
# A block of fewer workers is not worth the calls.
_SMALLEST_BLOCK = 4


class Choice(NamedTuple):
    """How gradients are computed: by which path, for at most how many workers at a time, and why not vectorised."""

    path: GradientPath
    block: int
    reason: str | None


class Cost(NamedTuple):
    """What one worker's step takes."""

    megaflops: float  # millions of floating-point operations in layers with weights
    activation_bytes: int  # what autograd keeps for the backward pass


def choose_path(
    model: nn.Module, weights: Tensors, buffers: Tensors, pool: ShardPool, *, vectorize: str, batch_size: int
) -> Choice:
    """The path that `vectorize` stands for.

    With "auto" all workers of a block are computed at once, unless
    - this process hosts one worker, or vmap cannot serve the model, see `require_agreement`;
    - on a CPU, a worker's step takes more than 40 million floating-point operations in layers with weights; or
    - fewer than four workers would fit into a block.
    With "true" only the first counts. A block bounds memory: it holds as many workers as fit into 32 MiB (2 GiB on a
    GPU), each with eight tensors of the model's size and the activations of its minibatch.

    Args:
        model: in training mode; a copy of it is tried, itself it is not called.
        weights: trainable parameters by name.
        buffers: by name.
        pool: samples of the hosted workers.
        vectorize: auto, true or false.
        batch_size: samples per worker and step.
    """
    device = next(iter(weights.values())).device
    if device.type == "cpu":
        keep_freed_memory()
    budget = _BLOCK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    worker_bytes = _TENSORS_IN_FLIGHT * sum(w.nbytes for w in weights.values())
    block = max(1, budget // worker_bytes)
    if vectorize == "false":
        return Choice(Sequential(model), block, "vectorize=false")
    if len(pool.shards) == 1:
        return Choice(Sequential(model), block, "there is one worker in this process")
    if vectorize == "auto" and block < _SMALLEST_BLOCK:
        return Choice(Sequential(model), block, f"{worker_bytes:,} bytes for a worker are too many")
    batch = _first_batch(pool, batch_size, device)
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.no_grad(),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            trial = copy.deepcopy(model)
            cost = _cost(trial, weights, buffers, batch)
            if vectorize == "auto" and device.type == "cpu" and cost.megaflops > _CPU_MEGAFLOPS:
                return Choice(Sequential(model), block, f"{cost.megaflops:.3g} megaflops for a worker are too many")
            for spread in (0.0, 0.01):
                require_agreement(trial, weights, buffers, batch, spread=spread)
    except Exception as error:  # of any kind: a model that fails by itself does so again in the first round
        return Choice(Sequential(model), block, _first_sentence(error))
    slow = [str(warning.message) for warning in caught if "performance drop" in str(warning.message)]
    if slow and vectorize == "auto":
        return Choice(Sequential(model), block, _first_sentence(slow[0]))
    fitting = budget // (worker_bytes + cost.activation_bytes)
    if vectorize == "auto" and fitting < _SMALLEST_BLOCK:
        return Choice(Sequential(model), block, f"{cost.activation_bytes:,} bytes of activations are too many")
    return Choice(Vectorized(model), max(_SMALLEST_BLOCK, fitting), None)


def require_agreement(
    model: nn.Module, weights: Tensors, buffers: Tensors, batch: Minibatches, *, spread: float
) -> None:
    """Refuse a model that vmap cannot serve, or to which it does something else.

    So it is where a model draws random numbers (dropout), which are keyed by worker, decides by what is in its data, or
    changes buffers in a way that vmap cannot follow.

    Args:
        model: is called, and may change if it keeps something outside of its buffers.
        weights: trainable parameters by name.
        buffers: by name.
        batch: of some workers.
        spread: by what share one worker's weights differ from the next one's.

    Raises:
        ValueError: gradients, losses or buffers differ by more than the square root of the weights' precision.
        RuntimeError: vmap's own.
    """
    count = len(batch.torch_seeds)
    stacked = {n: torch.stack([(1 + spread * row) * w for row in range(count)]) for n, w in weights.items()}
    expected_buffers = _stacked(buffers, count)
    gradients, losses, advanced = Vectorized(model).compute(stacked, _stacked(buffers, count), batch)
    expected, expected_losses = Sequential(model)(stacked, expected_buffers, batch)
    tolerance = torch.finfo(losses.dtype).eps ** 0.5
    for what, found, wanted in (
        ("gradients", list(gradients.values()), list(expected.values())),
        ("losses", [losses], [expected_losses]),
        ("buffers", list(advanced.values()), list(expected_buffers.values())),
    ):
        if _distance(found, wanted) > tolerance:
            raise ValueError(f"its {what} under vmap differ from those of one worker at a time")


def _first_batch(pool: ShardPool, batch_size: int, device: torch.device) -> Minibatches:
    """The first samples of the two largest shards."""
    largest = np.argsort(-pool.lengths, kind="stable")[:2]
    size = min(batch_size, int(pool.lengths[largest].min()))
    indices = torch.from_numpy(pool.starts[largest, None] + np.arange(size)).to(device)
    return Minibatches(*pool.gather(indices), torch_seeds=[0, 1])


def _cost(model: nn.Module, weights: Tensors, buffers: Tensors, batch: Minibatches) -> Cost:
    one = Minibatches(batch.inputs[:1], batch.targets[:1], batch.torch_seeds[:1])
    operations, kept = 0.0, {}

    def count(module: nn.Module, _inputs: object, output: object) -> None:
        nonlocal operations
        if isinstance(output, Tensor) and not isinstance(module, nn.Embedding):
            # A matrix product or a convolution: each output takes a multiplication and an addition for every weight
            # of its channel, and the backward pass twice that.
            matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
            operations += sum(6 * output.numel() * p.numel() / len(p) for p in matrices)

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        Sequential(model)(_stacked(weights, 1), _stacked(buffers, 1), one)
    for hook in hooks:
        hook.remove()
    return Cost(operations / 1e6, sum(kept.values()))


def _stacked(tensors: Tensors, count: int) -> Tensors:
    return {name: t.expand(count, *t.shape).clone() for name, t in tensors.items()}


def _first_sentence(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]


def _distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference, as a share of the largest value; NaN equals NaN."""
    pairs = [(a.double().nan_to_num(), b.double().nan_to_num()) for a, b in zip(found, wanted, strict=True)]
    pairs = [pair for pair in pairs if pair[0].numel()]
    if not pairs:
        return 0.0
    largest = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / max(largest, torch.finfo(torch.float32).tiny)
