"""The problem that all simulators train on, with numpy and scikit-learn alone: every one of them can import it."""

import json
import time
from itertools import pairwise

import numpy as np
from sklearn.datasets import load_digits

BATCH, HIDDEN, CLASSES, LEARNING_RATE = 32, 64, 10, 0.05


def shards(num_workers: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Digits of each worker: one minibatch, drawn with replacement so that there are enough for all."""
    data = load_digits()
    inputs, targets = (data.data / 16).astype(np.float32), data.target.astype(np.int64)
    rows = np.random.default_rng(0).integers(len(targets), size=(num_workers, BATCH))
    return [(inputs[own], targets[own]) for own in rows]


class Clock:
    """Wall time and this process' processor time, each from one `tick` to the next."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._processor: list[float] = []

    def tick(self) -> None:
        self._wall.append(time.perf_counter())
        self._processor.append(time.process_time())

    def report(self) -> None:
        """Print what run.py reads: seconds between ticks."""
        found = {"wall": self._wall, "processor": self._processor}
        print(json.dumps({kind: [after - before for before, after in pairwise(t)] for kind, t in found.items()}))
