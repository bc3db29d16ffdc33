"""Random draws keyed by (seed, worker, round): the same on every layout of ranks, with nothing to save or restore."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# First word of every key, so that draws for different purposes never share a stream.
_BATCHES, _PARTICIPANTS = 1, 2


class WorkerDraw(NamedTuple):
    """What one worker draws for one round."""

    positions: Tensor  # [local_steps, batch] int64, positions in the worker's shard
    torch_seeds: list[int]  # one per local step, for dropout and other randomness inside the model


def draw_batches(
    num_samples: int, *, batch_size: int, local_steps: int, seed: int, worker: int, round_number: int
) -> WorkerDraw:
    """Minibatches of one worker for one round, without replacement until its shard is used up.

    Args:
        num_samples: size of the worker's shard, >= 1.
        batch_size: samples per step; capped at the shard's size, whose gradient is then exact.
        local_steps: steps in the round.
        seed, worker, round_number: the key; nothing else decides the draw.
    """
    generator = np.random.default_rng([_BATCHES, seed, worker, round_number])
    size = min(batch_size, num_samples)
    needed = size * local_steps
    if needed <= num_samples:
        positions = generator.choice(num_samples, needed, replace=False)
    else:
        repeats = -(-needed // num_samples)
        positions = np.concatenate([generator.permutation(num_samples) for _ in range(repeats)])[:needed]
    torch_seeds = generator.integers(2**63, size=local_steps).tolist()
    return WorkerDraw(torch.from_numpy(positions.astype(np.int64)).view(local_steps, size), torch_seeds)


def num_present(num_workers: int, participation: float) -> int:
    """How many workers take part in a round: the nearest integer to participation * num_workers.

    Raises:
        ValueError: that is nobody.
    """
    count = round(participation * num_workers)
    if count < 1:
        raise ValueError(
            f"`participation` must select at least one of {num_workers} workers, got {participation!r}: "
            f"use at least {1 / num_workers:.3g}"
        )
    return count


def draw_participants(num_workers: int, participation: float, *, seed: int, round_number: int) -> Sequence[int]:
    """The workers that take part in a round, in increasing order; the same on every rank."""
    count = num_present(num_workers, participation)
    if count == num_workers:
        return range(num_workers)
    generator = np.random.default_rng([_PARTICIPANTS, seed, round_number])
    return sorted(generator.choice(num_workers, count, replace=False).tolist())


def hosted_workers(num_workers: int, *, rank: int, num_ranks: int) -> range:
    """The workers that a rank hosts: contiguous blocks whose sizes differ by at most one.

    Raises:
        ValueError: there are more ranks than workers.
    """
    if num_ranks > num_workers:
        raise ValueError(
            f"`num_workers` must be at least the number of ranks, got {num_workers} workers on {num_ranks} ranks: "
            f"raise num_workers or launch at most {num_workers} processes"
        )
    share, rest = divmod(num_workers, num_ranks)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))
