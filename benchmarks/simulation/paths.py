"""Both ways to the gradients of many workers, over models: the measurements behind `vectorize=auto`.

    python benchmarks/simulation/paths.py

Processor time of one thread a worker and step, gradients alone, at 4 and at 20 workers with 32 samples each: the two
paths take turns, and the median of the turns counts. Writes paths.json beside this file.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from pisa_dist.data.datasets import Dataset
from pisa_dist.gradients import Sequential, Vectorized
from pisa_dist.minibatches import Minibatches, ShardPool
from pisa_dist.models import CNN, MLP, ResNet20
from pisa_dist.vectorize import choose_path

BATCH, TURNS, SECONDS = 32, 7, 0.15
LENGTH, VOCABULARY = 16, 64


class Transformer(nn.Module):
    """Two causal layers on 16 characters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(inputs)))


def small_cnn(channels: int, side: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * (side // 4) ** 2, 10),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "MLP 64-16-10": (lambda: MLP((64,), 10, [16]), (64,)),
    "MLP 64-64-10": (lambda: MLP((64,), 10, [64]), (64,)),
    "MLP 64-64-64-10": (lambda: MLP((64,), 10, [64, 64]), (64,)),
    "MLP 784-128-64-10": (lambda: MLP((784,), 10, [128, 64]), (784,)),
    "MLP 784-200-200-10": (lambda: MLP((784,), 10, [200, 200]), (784,)),
    "MLP 784-512-512-10": (lambda: MLP((784,), 10, [512, 512]), (784,)),
    "CNN 4, 8 channels, 8 x 8": (lambda: small_cnn(4, 8), (1, 8, 8)),
    "CNN 16, 32 channels, 8 x 8": (lambda: small_cnn(16, 8), (1, 8, 8)),
    "CNN 4, 8 channels, 16 x 16": (lambda: small_cnn(4, 16), (1, 16, 16)),
    "CNN of NIID-Bench, 1 x 28 x 28": (lambda: CNN((1, 28, 28), 10), (1, 28, 28)),
    "CNN of NIID-Bench, 3 x 32 x 32": (lambda: CNN((3, 32, 32), 10), (3, 32, 32)),
    "ResNet-20, group norm, 3 x 32 x 32": (lambda: ResNet20((3, 32, 32), 10), (3, 32, 32)),
    "transformer, width 32": (lambda: Transformer(32), None),
    "transformer, width 128": (lambda: Transformer(128), None),
}


def microseconds(work: Callable[[], object]) -> float:
    """Processor time of one call, over as many as fit into a while."""
    started, calls = time.process_time(), 0
    while calls == 0 or time.process_time() - started < SECONDS:
        work()
        calls += 1
    return (time.process_time() - started) / calls * 1e6


def measured(model: nn.Module, shape: tuple[int, ...] | None, num_workers: int) -> dict[str, float]:
    weights = {n: p.detach().expand(num_workers, *p.shape).clone() for n, p in model.named_parameters()}
    if shape is None:
        inputs, targets = torch.randint(VOCABULARY, (2, num_workers, BATCH, LENGTH))
    else:
        inputs, targets = torch.randn(num_workers, BATCH, *shape), torch.randint(10, (num_workers, BATCH))
    batch = Minibatches(inputs, targets, list(range(num_workers)))
    paths = {"sequential": Sequential(model), "vectorized": Vectorized(model)}
    turns: dict[str, list[float]] = {name: [] for name in paths}
    for path in paths.values():
        path(weights, {}, batch)
    for _ in range(TURNS):
        for name, path in paths.items():
            turns[name].append(microseconds(lambda path=path: path(weights, {}, batch)) / num_workers)
    return {name: round(median(times), 1) for name, times in turns.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, (build, shape) in MODELS.items():
        model = build()
        inputs = torch.randint(VOCABULARY, (BATCH, LENGTH)) if shape is None else torch.randn(BATCH, *shape)
        targets = inputs if shape is None else torch.randint(10, (BATCH,))
        choice = choose_path(
            model,
            {n: p.detach() for n, p in model.named_parameters()},
            {},
            ShardPool([Dataset(inputs, targets, VOCABULARY)] * 2),
            vectorize="auto",
            batch_size=BATCH,
        )
        row = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
        for num_workers in (4, 20):
            found = measured(model, shape, num_workers)
            row[f"{num_workers} workers"] = {**found, "ratio": round(found["sequential"] / found["vectorized"], 2)}
        row["auto"] = "at once" if choice.reason is None else f"one after the other: {choice.reason}"
        print(json.dumps(row), flush=True)
        rows.append(row)
    result = {"unit": "microseconds of processor time a worker and step", "torch": torch.__version__, "rows": rows}
    (Path(__file__).parent / "paths.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
