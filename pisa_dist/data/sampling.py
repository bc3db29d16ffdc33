"""Random draws keyed by (seed, worker, round): the same on every layout of ranks, with nothing to save or restore.

Minibatches are drawn for many workers at once. Each worker has a SplitMix64 stream of its own (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014) that starts at a hash of the key: a thousand streams are
a few array operations, where a thousand generator objects would take as long as the gradients of a small network.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# First word of every key, so that draws for different purposes never share a stream.
_BATCHES, _PARTICIPANTS, _TORCH_SEEDS = 1, 2, 3
AVAILABILITY, SPEEDS = 4, 5

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_MOST_STEPS = 1_000_000
_REPEAT_BITS = 20  # a shard is used up at most `local_steps` <= 1,000,000 times in a round
_SPARSE = 4  # a shard of at least so many times what is drawn from it is not permuted as a whole

Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]


class Draws(NamedTuple):
    """What some workers, whose minibatches are of one size, draw for one round."""

    positions: Integers  # [workers, local_steps, batch]: positions in each worker's shard
    torch_seeds: Integers  # [workers, local_steps]: for dropout and other randomness inside the model


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
        seed, worker, round_number: the key; with the shard's size nothing else decides the draw.
    """
    draws = draw_many(
        np.array([num_samples]),
        size=min(batch_size, num_samples),
        local_steps=local_steps,
        seed=seed,
        workers=np.array([worker]),
        round_number=round_number,
    )
    return WorkerDraw(torch.from_numpy(draws.positions[0]), draws.torch_seeds[0].tolist())


def draw_many(
    num_samples: Integers, *, size: int, local_steps: int, seed: int, workers: Integers, round_number: int
) -> Draws:
    """`draw_batches` for many workers, whose minibatches are all of one size.

    Args:
        num_samples: size of each worker's shard, [workers].
        size: samples per step, at most the smallest shard.
        local_steps: steps in the round.
        seed, round_number: with the worker's number its key.
        workers: number of each worker.
    """
    needed = size * local_steps
    positions = np.empty((len(workers), needed), dtype=np.int64)
    streams = _streams(_BATCHES, seed, round_number, workers)
    is_whole = num_samples == size  # every step takes all samples, in whatever order
    positions[is_whole] = np.tile(np.arange(size), local_steps)
    is_sparse = num_samples >= _SPARSE * needed
    for mask, draw in ((is_sparse & ~is_whole, _first_distinct), (~is_sparse & ~is_whole, _permuted)):
        if mask.any():
            positions[mask] = draw(streams[mask], num_samples[mask], needed)
    seeds = _words(_streams(_TORCH_SEEDS, seed, round_number, workers), local_steps) >> np.uint64(1)
    return Draws(positions.reshape(len(workers), local_steps, size), seeds.astype(np.int64))


def _mixed(words: Words) -> Words:
    """SplitMix64's finaliser: a bijection after which every bit of a word depends on all of its bits."""
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIERS[0]
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIERS[1]
    return words ^ (words >> np.uint64(31))


def _streams(purpose: int, seed: int, round_number: int, workers: Integers) -> Words:
    """Where each worker's stream starts: a hash of the key, word by word."""
    hashed = np.zeros(1, dtype=np.uint64)
    for word in (purpose, seed, round_number, workers):
        hashed = _mixed((hashed + _GOLDEN) ^ np.asarray(word).astype(np.uint64))
    return hashed


def _words(streams: Words, count: int) -> Words:
    """The first words of each stream, [streams] -> [streams, count]."""
    return _mixed(streams[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def draw_uniform(purpose: int, workers: Integers, *, seed: int, round_number: int = 0) -> npt.NDArray[np.float64]:
    """A number of each worker's own, uniform in (0, 1): [workers].

    Args:
        purpose: first word of the key, such as `AVAILABILITY`.
        workers: number of each worker.
        seed, round_number: the rest of the key.
    """
    words = _words(_streams(purpose, seed, round_number, workers), 1)[:, 0]
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _permuted(streams: Words, num_samples: Integers, needed: int) -> Integers:
    """Permutations of each shard, one after the other, cut to what is needed: [streams, needed].

    Each entry gets a random word behind the number of its permutation; their order is that of the entries.
    """
    shard = num_samples[:, None]
    lengths = -(-needed // shard) * shard
    entries = np.arange(lengths.max())
    permutation = (entries // shard).astype(np.uint64) << np.uint64(64 - _REPEAT_BITS)
    words = permutation | (_words(streams, len(entries)) >> np.uint64(_REPEAT_BITS))
    words[entries >= lengths] = np.iinfo(np.uint64).max  # not of this shard: behind all others
    return np.argsort(words, axis=1)[:, :needed] % shard


def _first_distinct(streams: Words, num_samples: Integers, needed: int) -> Integers:
    """Uniform positions in each shard, those left out that came before: [streams, needed]."""
    width = 2 * needed
    while True:
        uniform = (_words(streams, width) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        drawn = (uniform * num_samples[:, None]).astype(np.int64)
        order = np.argsort(drawn, axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, order, axis=1)
        is_repeat = np.zeros(drawn.shape, dtype=np.bool_)
        np.put_along_axis(is_repeat, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        if width - is_repeat.sum(1).max() >= needed:
            first = np.argsort(is_repeat, axis=1, kind="stable")[:, :needed]
            return np.take_along_axis(drawn, first, axis=1)
        width *= 2  # the words drawn so far stay the same


def check_local_steps(local_steps: int, local_epochs: float | None) -> None:
    """Refuse two answers to one question.

    Raises:
        ValueError: steps and passes are both given.
    """
    if local_epochs is not None and local_steps != 1:
        raise ValueError(
            f"`local_steps` must be 1 where `local_epochs` says how many a worker takes, got local_steps={local_steps} "
            f"and local_epochs={local_epochs:g}: set one of them"
        )


def num_local_steps(shard_size: int, batch_size: int, local_steps: int, local_epochs: float | None) -> int:
    """Local steps of a worker in a round: `local_steps`, or as many as `local_epochs` passes over its shard take.

    Passes take ceil(local_epochs * shard_size / batch_size) steps, at least one.

    Raises:
        ValueError: those are more than can be drawn in a round.
    """
    if local_epochs is None:
        return local_steps
    # The tolerance: 0.07 * 100 is 7.000000000000001.
    count = max(1, math.ceil(local_epochs * shard_size / batch_size - 1e-9))
    if count > _MOST_STEPS:
        raise ValueError(
            f"`local_epochs` must take at most {_MOST_STEPS} steps in a round, got {local_epochs:g}, which are {count} "
            f"for a shard of {shard_size} samples"
        )
    return count


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


def draw_participants(
    num_workers: int, participation: float, *, seed: int, round_number: int, among: Integers | None = None
) -> Sequence[int]:
    """The workers that take part in a round, in increasing order; the same on every rank.

    Args:
        num_workers: of the run.
        participation: share of the workers that can be drawn; their nearest number, but one at least.
        seed, round_number: the key.
        among: the workers that can be drawn, in increasing order; None for all. If there are none, none is drawn.
    """
    candidates = np.arange(num_workers) if among is None else among
    count = num_present(num_workers, participation)
    if len(candidates) < num_workers:
        count = min(len(candidates), max(1, round(participation * len(candidates))))
    if count == len(candidates):
        everyone: list[int] = candidates.tolist()
        return everyone
    generator = np.random.default_rng([_PARTICIPANTS, seed, round_number])
    return sorted(candidates[generator.choice(len(candidates), count, replace=False)].tolist())


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
