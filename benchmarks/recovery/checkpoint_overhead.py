"""What an asynchronous checkpoint a minute costs: a GPT-like model with 10 million parameters, with and without.

    python benchmarks/recovery/checkpoint_overhead.py [--pairs 5] [--seconds 60]

Two workers in one process train with SISA on random characters; minutes with a checkpoint at their start alternate with
minutes without, in one run. A minute's cost is its wall time a round, everything included. Other programs on the
machine disturb wall time, so there is a second measure that they disturb less: the processor time that a checkpoint
adds, all threads of this process counted, as a share of a minute. With a core to itself the process would be slowed by
at most that. Medians over the minutes and over pairs of neighbours. Adds to results.json beside this file.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from pisa_dist import checkpoint
from pisa_dist.algorithms import ALGORITHMS
from pisa_dist.consensus import InProcess
from pisa_dist.data.datasets import Dataset
from pisa_dist.rundir import commit
from pisa_dist.trainer import Trainer, TrainingPlan

VOCABULARY, LENGTH, WIDTH, LAYERS, WORKERS = 96, 64, 384, 6, 2


class CharacterModel(nn.Module):
    """Causal transformer; the next character after each of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.characters(inputs) + self.positions
        return self.head(self.layers(hidden, mask=self.mask, is_causal=True))[:, -1]


def make_trainer() -> Trainer:
    torch.manual_seed(0)
    inputs = torch.randint(VOCABULARY, (WORKERS * 64, LENGTH))
    data = Dataset(inputs, torch.randint(VOCABULARY, (len(inputs),)), VOCABULARY)
    shards = {i: data.select(list(range(64 * i, 64 * (i + 1)))) for i in range(WORKERS)}
    return Trainer(
        model=CharacterModel(),
        algorithm=ALGORITHMS["sisa"](penalty=100.0),
        shards=shards,
        test=data.select([0]),
        shard_sizes=[64] * WORKERS,
        worker_weight=[1 / WORKERS] * WORKERS,
        plan=TrainingPlan(rounds=10**9, batch_size=4, eval_every=10**9),
        consensus=InProcess(),
    )


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def minute(trainer: Trainer, checkpointer: checkpoint.Checkpointer | None, seconds: float) -> dict:
    """Rounds for so long, after a checkpoint where there is a checkpointer."""
    started, processor, rounds = time.perf_counter(), time.process_time(), 0
    blocked = timed(lambda: checkpointer.save(trainer)) if checkpointer else 0.0
    written = None
    while time.perf_counter() - started < seconds:
        trainer.run_round()
        rounds += 1
        if checkpointer and written is None:
            blocked += timed(checkpointer.wait)  # as the trainer's loop does
            written = time.perf_counter() - started
            if not checkpointer.wait():
                raise RuntimeError("the checkpoint was not written")
    return {
        "with_checkpoint": checkpointer is not None,
        "rounds": rounds,
        "wall_seconds_per_round": (time.perf_counter() - started) / rounds,
        "processor_seconds_per_round": (time.process_time() - processor) / rounds,
        "seconds_blocked": blocked,
        "seconds_until_written": written,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="minutes with and without a checkpoint")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trainer = make_trainer()
    minutes = []
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = checkpoint.Checkpointer(Path(folder), keep_last=1)
        for _ in range(2):  # the first round and the first checkpoint import and allocate
            trainer.run_round()
        checkpointer.save(trainer)
        checkpointer.wait()
        for pair in range(arguments.pairs):
            # Which of the two comes first changes, so that a drift of the machine favours neither.
            for used in (checkpointer, None) if pair % 2 == 0 else (None, checkpointer):
                minutes.append(minute(trainer, used, arguments.seconds))
                print(json.dumps(minutes[-1]), flush=True)
        checkpointer.close()
        size = sum(file.stat().st_size for file in checkpoint.complete(Path(folder))[0].iterdir())
    result = {
        "parameters": sum(w.numel() for w in trainer.state.weights.values()),
        "checkpoint_bytes": size,
        "minutes": len(minutes),
        "seconds": arguments.seconds,
    }
    for key in ("wall_seconds_per_round", "processor_seconds_per_round"):
        have, have_not = ([m[key] for m in minutes if m["with_checkpoint"] is flag] for flag in (True, False))
        ratios = [a / b - 1 for a, b in zip(have, have_not, strict=True)]
        result[key] = {
            "with": median(have),
            "without": median(have_not),
            "overhead": median(have) / median(have_not) - 1,
            "overhead_of_neighbours": median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    pairs = [sorted(minutes[i : i + 2], key=lambda m: m["with_checkpoint"]) for i in range(0, len(minutes), 2)]
    key = "processor_seconds_per_round"
    added = [(have[key] - have_not[key]) * have["rounds"] for have_not, have in pairs]
    result["processor_seconds_per_checkpoint"] = median(added)
    result["processor_share_of_a_minute"] = median(added) / 60
    for key in ("seconds_blocked", "seconds_until_written"):
        result[key] = median(m[key] for m in minutes if m["with_checkpoint"] and m[key] is not None)
    file = Path(__file__).with_name("results.json")
    others = json.loads(file.read_text()) if file.exists() else {}
    entry = {
        "checkpoint_overhead": result,
        "each_minute": minutes,
        "machine": f"{os.cpu_count()} x {platform.machine()}, {platform.system()}, torch {torch.__version__}",
        "load_average": os.getloadavg()[0],
        "commit": commit(),
        "command": "python benchmarks/recovery/checkpoint_overhead.py",
    }
    file.write_text(json.dumps({**others, "checkpoint_overhead": entry}, indent=2) + "\n")
    for key, value in result.items():
        shown = ", ".join(f"{k} {v:.4g}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{key.replace('_', ' '):30} {shown}")


if __name__ == "__main__":
    main()
