"""Checkpoints by worker, with torch.distributed.checkpoint: saved on any number of ranks, resumed on any other.

Every worker's state has keys of its own ("workers/3/fc.weight/dual"), because the library silently keeps one copy of
plain tensors that share a name. What all ranks hold alike is kept once.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from pisa_dist.algorithms.base import State
from pisa_dist.trainer import Trainer, TrainingState

FORMAT = 1
_COUNTERS = ("round_number", "samples_seen", "bytes_sent", "seconds", "loss_sum", "loss_rounds")


def save(trainer: Trainer, directory: Path) -> Path:
    """Write the trainer's state as `directory`/round_NNNNNN; every rank must call it.

    The checkpoint has another name until it is complete, so that a half-written one is never picked.
    """
    path = directory / f"round_{trainer.state.round_number:06d}"
    unfinished = path.with_suffix(".unfinished")
    if trainer.consensus.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / "contents.json").write_text(json.dumps(_contents(trainer)))
    _barrier()
    with _single_process_allowed():
        save_distributed(_flat(trainer.state, trainer.hosted), storage_writer=FileSystemWriter(unfinished))
    _barrier()
    if trainer.consensus.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(unfinished, path)
    _barrier()
    return path


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint in a `checkpoints/` directory or of a run; None where there is none."""
    folder = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    complete = [path for path in folder.glob("round_*") if path.is_dir() and path.suffix != ".unfinished"]
    return max(complete, default=None)


def find(source: Path) -> Path:
    """The checkpoint that a path stands for: itself, or the newest of a run or of a `checkpoints/` directory.

    Raises:
        ValueError: there is none.
    """
    found = source if (source / "contents.json").is_file() else newest(source)
    if found is None:
        raise ValueError(
            f"`resume` must be auto or a run or checkpoint directory, got {str(source)!r}, which holds no checkpoint "
            "(a run writes them with checkpoint.every=N)"
        )
    return found


def load(trainer: Trainer, path: Path) -> None:
    """Put a checkpoint's state into a trainer, whatever the number of ranks that saved it; every rank must call it.

    Raises:
        ValueError: it is no checkpoint, or of another format, method, model or number of workers; says what was
            found and what was expected.
    """
    try:
        found = json.loads((path / "contents.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"`resume` {str(path)!r} is not a checkpoint: {error}") from error
    for key, expected in _contents(trainer).items():
        if found.get(key) != expected:
            was, wants = _first_difference(found.get(key), expected)
            raise ValueError(f"`resume` {str(path)!r} does not fit: its {key} is {was}, this run's is {wants}")
    reader = FileSystemReader(path)
    mine = tuple(f"workers/{worker}/" for worker in trainer.hosted)
    wanted: dict[str, Tensor] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and (key.startswith(mine) or not key.startswith("workers/"))
    }
    with _single_process_allowed():
        load_distributed(dict(wanted), storage_reader=reader)
    trainer.state = _unflat(wanted, trainer)


def _contents(trainer: Trainer) -> dict[str, Any]:
    """What must agree for a checkpoint to fit; also what a person can read without torch."""
    state = trainer.state
    return {
        "format": FORMAT,
        "algorithm": trainer.algorithm.name,
        "num_workers": len(trainer.shard_sizes),
        "tensors": {name: [list(t.shape), str(t.dtype)] for name, t in (state.weights | state.buffers).items()},
    }


def _first_difference(found: Any, expected: Any) -> tuple[Any, Any]:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for name in [*expected, *found]:
            if found.get(name) != expected.get(name):
                return f"{name} {found.get(name, 'absent')}", f"{name} {expected.get(name, 'absent')}"
    return found, expected


def _flat(state: TrainingState, hosted: Sequence[int]) -> dict[str, Any]:
    flat: dict[str, Any] = {f"weights/{name}": value for name, value in state.weights.items()}
    flat |= {f"buffers/{name}": value for name, value in state.buffers.items()}
    flat |= {f"shared/{n}/{kind}": v for n, kinds in state.shared.items() for kind, v in kinds.items()}
    for row, worker in enumerate(hosted):
        flat[f"workers/{worker}/num_participations"] = state.num_participations[row].clone()
        for name, kinds in state.workers.items():
            flat |= {f"workers/{worker}/{name}/{kind}": value[row].clone() for kind, value in kinds.items()}
    # Tensors, so that nothing in a checkpoint needs unpickling.
    flat |= {f"counters/{name}": torch.tensor(getattr(state, name)) for name in _COUNTERS}
    for name in ("seconds", "loss_sum"):
        flat[f"counters/{name}"] = torch.tensor(getattr(state, name), dtype=torch.float64)
    return flat


def _unflat(flat: Mapping[str, Tensor], trainer: Trainer) -> TrainingState:
    old = trainer.state
    device = next(iter(old.weights.values())).device
    shared: State = {}
    for key in (key for key in flat if key.startswith("shared/")):
        _, name, kind = key.split("/")
        shared.setdefault(name, {})[kind] = flat[key]
    workers = {
        name: {
            kind: torch.stack([flat[f"workers/{worker}/{name}/{kind}"] for worker in trainer.hosted]).to(device)
            for kind in kinds
        }
        for name, kinds in old.workers.items()
    }
    counters: dict[str, Any] = {name: flat[f"counters/{name}"].item() for name in _COUNTERS}
    return TrainingState(
        weights={name: flat[f"weights/{name}"].to(device) for name in old.weights},
        buffers={name: flat[f"buffers/{name}"].to(device) for name in old.buffers},
        shared=_on_device(shared, device),
        workers=workers,
        num_participations=torch.stack([flat[f"workers/{w}/num_participations"] for w in trainer.hosted]),
        **counters,
    )


def _on_device(shared: State, device: torch.device) -> State:
    # torch's optimizers keep their step counts on the CPU.
    return {n: {k: v if k == "step" else v.to(device) for k, v in kinds.items()} for n, kinds in shared.items()}


@contextmanager
def _single_process_allowed() -> Iterator[None]:
    """One process is a layout like any other; the library warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
        yield


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
