"""Small problems that several tests train on."""

import torch
from torch import nn

from pisa_dist.algorithms.base import Tensors
from pisa_dist.consensus import InProcess
from pisa_dist.data.datasets import Dataset
from pisa_dist.data.sampling import hosted_workers
from pisa_dist.trainer import Trainer, TrainingPlan


def quadratic_gradients(centres):
    """Oracle of F_i(w) = 1/2 ||w - c_i||^2, for centres [workers, *shape]."""

    def gradients(local_weights, step) -> Tensors:
        return {name: w - centres.to(w.dtype) for name, w in local_weights.items()}

    return gradients


def blobs(num_samples=90, num_classes=3, num_features=4, *, seed=0, dtype=torch.float64):
    """Gaussian blobs, sorted by class, so that contiguous shards are skewed."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(num_samples) * num_classes // num_samples
    centres = 2 * torch.randn(num_classes, num_features, generator=torch.Generator().manual_seed(99), dtype=dtype)
    noise = torch.randn(num_samples, num_features, generator=generator, dtype=dtype)
    return Dataset(centres[targets] + noise, targets, num_classes)


def on(device, dataset):
    return Dataset(dataset.inputs.to(device), dataset.targets.to(device), dataset.num_classes)


def small_net(*, seed=0, dtype=torch.float64, batch_norm=False, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 8), nn.Tanh()]
        if batch_norm:
            layers.insert(1, nn.BatchNorm1d(8))
        if dropout:
            layers.append(nn.Dropout(dropout))
        return nn.Sequential(*layers, nn.Linear(8, 3)).to(dtype)


def make_trainer(
    algorithm, *, num_workers=3, rounds=10, model=None, consensus=None, dtype=torch.float64, is_skewed=True, **plan
):
    """A trainer on blobs: sorted by class, so that three workers have one class each, or shuffled. Sizes differ."""
    consensus = consensus or InProcess()
    train, test = blobs(dtype=dtype), blobs(seed=1, dtype=dtype)
    if not is_skewed:
        train = train.select(torch.randperm(len(train), generator=torch.Generator().manual_seed(0)))
    model = model if model is not None else small_net(dtype=dtype)
    device = next(model.parameters()).device
    cuts = torch.linspace(0, len(train), num_workers + 1).long()
    if num_workers > 1:
        cuts[1] += 4
    sizes = (cuts[1:] - cuts[:-1]).tolist()
    hosted = hosted_workers(num_workers, rank=consensus.rank, num_ranks=consensus.num_ranks)
    plan = {"batch_size": 8, "eval_every": 5, **plan}
    return Trainer(
        model=model,
        algorithm=algorithm,
        shards={i: on(device, train.select(list(range(int(cuts[i]), int(cuts[i + 1]))))) for i in hosted},
        test=on(device, test),
        shard_sizes=sizes,
        worker_weight=[size / sum(sizes) for size in sizes],
        plan=TrainingPlan(rounds=rounds, **plan),
        consensus=consensus,
    )


def comparable(metrics):
    """A metrics line without wall time and without what the method does not have."""
    return {key: value for key, value in metrics.items() if key != "seconds" and value is not None}
