"""The minibatches of the workers that a rank hosts: drawn for all of them at once and gathered from one place."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pisa_dist.data.datasets import Dataset
from pisa_dist.data.sampling import draw_many


class Minibatches(NamedTuple):
    """One minibatch of each of some workers, all of one size."""

    inputs: Tensor  # [workers, batch, *input_shape]
    targets: Tensor  # [workers, batch, ...]
    torch_seeds: Sequence[int]  # [workers]: for dropout and other randomness inside the model


class ShardPool:
    """Shards one after the other, so that minibatches of many workers are one gather.

    Args:
        shards: at least one; samples of one shape, on one device.

    Attributes:
        shards: the same samples, each shard a view of the pool, so that nothing is held twice.
        starts: position of each shard's first sample, int64 [shards].
        lengths: number of each shard's samples, int64 [shards].
    """

    def __init__(self, shards: Sequence[Dataset]) -> None:
        lengths = [len(shard) for shard in shards]
        starts = [0, *accumulate(lengths[:-1])]
        self.starts, self.lengths = np.array(starts), np.array(lengths)
        if len(shards) == 1:  # of any size, and not worth a copy
            self._inputs, self._targets = shards[0].inputs, shards[0].targets
            self.shards = list(shards)
            return
        self._inputs = torch.cat([shard.inputs for shard in shards])
        self._targets = torch.cat([shard.targets for shard in shards])
        self.shards = [
            Dataset(self._inputs[start:][:length], self._targets[start:][:length], shard.num_classes)
            for start, length, shard in zip(starts, lengths, shards, strict=True)
        ]

    def holds(self, shards: Iterable[Dataset]) -> bool:
        """Whether these are the pool's own `shards`, none exchanged for another."""
        return all(mine is other for mine, other in zip(self.shards, shards, strict=True))

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets at positions in the pool: int64 [...] -> [..., *input_shape] and [...]."""
        flat = indices.reshape(-1)
        inputs, targets = self._inputs.index_select(0, flat), self._targets.index_select(0, flat)
        return inputs.view(*indices.shape, *inputs.shape[1:]), targets.view(*indices.shape, *targets.shape[1:])


class Section(NamedTuple):
    """Workers next to each other in a stack whose minibatches are of one size, and what they draw in a round."""

    rows: slice  # in the stack
    indices: Tensor  # [workers, local_steps, batch] int64, positions in the pool
    torch_seeds: npt.NDArray[np.int64]  # [workers, local_steps]

    def cut(self, start: int, end: int) -> "Section":
        """The section's part of the stack's rows `start` to `end`, counted from there on."""
        first, last = max(self.rows.start, start), min(self.rows.stop, end)
        own = slice(first - self.rows.start, max(first, last) - self.rows.start)
        return Section(slice(first - start, last - start), self.indices[own], self.torch_seeds[own])


class Stack:
    """The present workers of a rank in the order in which they are stacked, and their minibatches of a round.

    Larger minibatches come first, so that workers whose minibatches are of one size stand together.

    Args:
        pool: the samples of the hosted workers.
        rows: rows of the present workers, that is, their places among the hosted, in increasing order.
        workers: number of each hosted worker.
        batch_size, local_steps, seed, round_number: as in `sampling.draw_batches`.
        device: of the samples.

    Attributes:
        rows: the rows in stacking order.
    """

    def __init__(
        self,
        pool: ShardPool,
        rows: Sequence[int],
        *,
        workers: Sequence[int],
        batch_size: int,
        local_steps: int,
        seed: int,
        round_number: int,
        device: torch.device,
    ) -> None:
        stacked = np.array(rows, dtype=np.int64)
        stacked = stacked[np.argsort(-np.minimum(pool.lengths[stacked], batch_size), kind="stable")]
        lengths = pool.lengths[stacked]
        self.rows: list[int] = stacked.tolist()
        self._sections = []
        sizes, firsts = np.unique(-np.minimum(lengths, batch_size), return_index=True)
        for size, (first, last) in zip(-sizes, pairwise([*firsts, len(rows)]), strict=True):
            own = slice(int(first), int(last))
            draws = draw_many(
                lengths[own],
                size=int(size),
                local_steps=local_steps,
                seed=seed,
                workers=np.array(workers)[stacked[own]],
                round_number=round_number,
            )
            indices = torch.from_numpy(draws.positions + pool.starts[stacked[own], None, None]).to(device)
            self._sections.append(Section(own, indices, draws.torch_seeds))

    def sections(self, start: int, end: int) -> list[Section]:
        """What the workers at places `start` to `end` of the stack draw."""
        cut = [section.cut(start, end) for section in self._sections]
        return [section for section in cut if len(section.indices)]
