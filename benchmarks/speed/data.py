"""Batches: random ones for timing, Tiny Shakespeare and skewed images for training."""

from typing import NamedTuple

import torch
from models import IMAGE, VOCABULARY
from torch import Tensor

from pisa_dist.data.datasets import cifar10, default_root
from pisa_dist.data.sampling import draw_batches

NUM_VALIDATION = 64  # sequences; images: 2,000

Batch = tuple[Tensor, Tensor]


def random_batch(model: str, batch_size: int, context: int, *, seed: int) -> Batch:
    """Samples of the right shape: the time of a step does not depend on what they hold."""
    generator = torch.Generator().manual_seed(seed)
    if model.startswith("gpt"):
        text = torch.randint(VOCABULARY, (batch_size, context + 1), generator=generator)
        return text[:, :-1], text[:, 1:]
    shape = (784,) if model == "mlp" else IMAGE
    inputs = torch.randn(batch_size, *shape, generator=generator)
    return inputs, torch.randint(10, (batch_size,), generator=generator)


class Shard(NamedTuple):
    """What one rank trains on, and what all validate on."""

    train: Batch  # images: inputs and targets; text: the characters twice
    validation: Batch
    context: int  # 0: images

    def batch(self, batch_size: int, *, seed: int, rank: int, step: int) -> Batch:
        """Batch number `step` of a rank; nothing else decides what is in it."""
        inputs, targets = self.train
        positions = draw_batches(
            len(inputs) - self.context, batch_size=batch_size, local_steps=1, seed=seed, worker=rank, round_number=step
        ).positions[0]
        if not self.context:
            return inputs[positions], targets[positions]
        windows = inputs[positions[:, None] + torch.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]


def text_shard(rank: int, num_ranks: int, context: int) -> Shard:
    """This rank's contiguous share of the first 90 % of Tiny Shakespeare; the rest validates.

    Raises:
        FileNotFoundError: the text is not there; the message says where it goes.
    """
    file = default_root() / "tinyshakespeare" / "input.txt"
    if not file.is_file():
        raise FileNotFoundError(f"put Tiny Shakespeare (input.txt) into {file.parent}, or set PISA_DATA")
    raw = file.read_bytes()
    code = {character: number for number, character in enumerate(sorted(set(raw)))}
    text = torch.tensor([code[character] for character in raw])
    end = int(0.9 * len(text))
    share = end // num_ranks
    mine = text[rank * share : (rank + 1) * share]
    starts = torch.linspace(end, len(text) - context - 1, NUM_VALIDATION).long()
    windows = text[starts[:, None] + torch.arange(context + 1)]
    return Shard((mine, mine), (windows[:, :-1], windows[:, 1:]), context)


def skewed_images(rank: int, num_ranks: int) -> Shard:
    """CIFAR-10 with the classes dealt out, so that no two ranks have one in common: the largest label skew there is.

    Raises:
        FileNotFoundError: the set is not there; the message says where it goes.
    """
    train, test = cifar10()
    own = torch.tensor([label % num_ranks == rank for label in range(train.num_classes)])
    mine = train.select(own[train.targets].nonzero().flatten())
    return Shard((mine.inputs, mine.targets), (test.inputs[:2000], test.targets[:2000]), 0)
