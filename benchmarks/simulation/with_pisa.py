"""The problem under this package's trainer: `PYTHON with_pisa.py WORKERS ROUNDS METHOD VECTORIZE`.

Whole rounds of the trainer in one process, checks and residuals included. Prints seconds of each round.
"""

import sys

import torch
from problem import BATCH, CLASSES, HIDDEN, LEARNING_RATE, Clock, shards

from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.consensus import InProcess
from pisa_dist.data.datasets import Dataset
from pisa_dist.models import MLP
from pisa_dist.trainer import Trainer, TrainingPlan

SETTINGS = {"fedavg": {"lr": LEARNING_RATE}, "sisa": {"penalty": 1.0}}


def main(num_workers: int, rounds: int, method: str, vectorize: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = [Dataset(torch.from_numpy(x), torch.from_numpy(y), CLASSES) for x, y in shards(num_workers)]
    trainer = Trainer(
        model=MLP((64,), CLASSES, [HIDDEN]),
        algorithm=ALGORITHMS[method](**SETTINGS[method]),
        shards=dict(enumerate(data)),
        test=data[0],
        shard_sizes=[BATCH] * num_workers,
        worker_weight=[1 / num_workers] * num_workers,
        plan=TrainingPlan(rounds=rounds, batch_size=BATCH, vectorize=vectorize),
        consensus=InProcess(),
    )
    clock = Clock()
    clock.tick()
    for _ in range(rounds):
        trainer.run_round()
        clock.tick()
    clock.report()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
