"""Checkpoints by worker: atomic, verified, rotated, written in the background; resumed on any number of ranks.

`python -m pisa_dist.checkpoint inspect PATH` shows what is inside.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from pisa_dist import checksums
from pisa_dist.checksums import seal
from pisa_dist.consensus import ConsensusError
from pisa_dist.snapshot import (
    Flat,
    contents,
    flatten,
    require_fit,
    require_sound,
    require_weights,
    resize_duals,
    restore,
    wanted_keys,
)
from pisa_dist.trainer import Trainer

CONTENTS = "contents.json"
UNFINISHED, REPLACED = ".unfinished", "-replaced"
METADATA = ".metadata"

# What the library raises for files that it cannot make sense of.
_UNREADABLE = (
    CheckpointException,
    RuntimeError,
    KeyError,
    AttributeError,
    ImportError,
    EOFError,
    pickle.UnpicklingError,
)


class Checkpointer:
    """Writes a run's checkpoints while training goes on, one at a time, on every rank alike.

    The state is copied at once; a thread writes it with torch.distributed.checkpoint over a process group of its own,
    so that its collectives never mix with training's. Writing overlaps with the round that follows: the run's loop
    calls `wait` before it counts that round as done, so that a kill repeats one interval at most. A checkpoint has
    another name until it is complete and its checksums are written, so that a half-written one is never picked. Call
    `close` at the end, or use it in a `with`: what is being written is then finished before the process group goes,
    unless another rank has failed.

    Args:
        directory: where checkpoints lie, `<run>/checkpoints`.
        every_seconds: when the next one is due after the last, or after the start; 0 for never.
        keep_last: number of complete checkpoints to keep, >= 1.
        asynchronous: False waits for each checkpoint.
        timeout: how long a rank waits for the others.

    Attributes:
        has_saved: whether any was begun.
    """

    def __init__(
        self,
        directory: Path,
        *,
        every_seconds: float = 0.0,
        keep_last: int = 3,
        asynchronous: bool = True,
        timeout: timedelta | None = None,
    ) -> None:
        self.directory = directory
        self.every_seconds = every_seconds
        self.has_saved = False
        self._since = time.monotonic()
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self._is_first = self._group is None or dist.get_rank() == 0
        if self._is_first:
            for half in directory.glob(f"round_*{UNFINISHED}"):  # of a run that was killed
                whole = half.with_name(half.name.removesuffix(f"{REPLACED}{UNFINISHED}"))
                if half.name.endswith(f"{REPLACED}{UNFINISHED}") and not whole.exists():
                    half.rename(whole)  # killed between two renames: this is that round's only one
                else:
                    shutil.rmtree(half, ignore_errors=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._is_complete = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A rank that waited here would keep its connections open, and others waiting: for one that is gone.
        if kind is None or not issubclass(kind, ConsensusError):
            self.close()

    def is_due(self) -> bool:
        """Whether it is time for one by this rank's clock; clocks differ, so that one rank should decide."""
        return 0 < self.every_seconds <= time.monotonic() - self._since

    def save(self, trainer: Trainer) -> None:
        """Begin to write the trainer's state as round_NNNNNN, after the one before is complete.

        One that could not be written (a full disk) is a warning on rank 0, and training goes on.
        """
        self.wait()
        self.has_saved, self._since = True, time.monotonic()
        state, about = flatten(trainer.state, trainer.hosted), contents(trainer)
        self._pending = self._thread.submit(self._write, state, about)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> bool:
        """Wait for the checkpoint that is being written; whether the last is complete (True where there is none).

        Raises:
            ConsensusError: another rank is gone: then nothing goes on.
        """
        if self._pending is None:
            return self._is_complete
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self._is_complete = True
        except (OSError, CheckpointException, RuntimeError) as error:
            if self._group is not None and isinstance(error, RuntimeError):  # the library's, of a collective
                raise ConsensusError(
                    f"a checkpoint could not be finished on rank {dist.get_rank()}: another rank has stopped ({error})"
                ) from error
            if self._is_first:
                reason = _last_line(error)
                print(f"warning: checkpoint not written, training goes on: {reason}", file=sys.stderr, flush=True)
            self._is_complete = False
        return self._is_complete

    def close(self) -> bool:
        """Wait for what is being written, and end the thread; whether the last checkpoint is complete."""
        complete = self.wait()
        self._thread.shutdown()
        return complete

    def _write(self, state: Flat, about: dict[str, Any]) -> Path:
        path = self.directory / f"round_{about['round']:06d}"
        unfinished = path.with_suffix(UNFINISHED)
        error: str | None = None
        if self._is_first:
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
                (unfinished / CONTENTS).write_text(json.dumps(about))
            except OSError as failure:
                error = str(failure)
        self._agree(error)
        try:
            with _single_process_allowed():
                # A list of plain tensors by unique names needs no replicated planning beyond the library's own.
                save_distributed(dict(state), storage_writer=FileSystemWriter(unfinished), process_group=self._group)
            error = self._publish(unfinished, path)
        except (OSError, CheckpointException, RuntimeError):
            if self._is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self._agree(error)
        return path

    def _publish(self, unfinished: Path, path: Path) -> str | None:
        """Checksums, then the final name, then the oldest checkpoints go; what went wrong, on rank 0."""
        if not self._is_first:
            return None
        try:
            seal(unfinished)
            if path.exists():  # a resumed run has come to this round again: never be without a whole one
                os.replace(path, path.with_name(f"{path.name}{REPLACED}{UNFINISHED}"))
            os.replace(unfinished, path)
            shutil.rmtree(path.with_name(f"{path.name}{REPLACED}{UNFINISHED}"), ignore_errors=True)
            # Later ones are damaged, or another history's: they must not push out the one just written.
            for old in [p for p in complete(self.directory) if _round(p) <= _round(path)][self.keep_last :]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            return str(error)
        return None

    def _agree(self, error: str | None) -> None:
        """Rank 0's file operations, seen by all: everyone goes on or everyone fails."""
        answer = [error]
        if self._group is not None:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[0] is not None:
            raise OSError(answer[0])


def complete(directory: Path, *, after: int = -1) -> list[Path]:
    """The complete checkpoints in a `checkpoints/` directory or of a run, of rounds after `after`, newest first."""
    folder = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    found = [p for p in folder.glob("round_*") if _round(p) > after and (p / CONTENTS).is_file()]
    return sorted(found, key=_round, reverse=True)


def _round(path: Path) -> int:
    """The round in a complete checkpoint's name, which has more digits than six from a million on; else -1."""
    name = re.fullmatch("round_([0-9]+)", path.name)
    return int(name[1]) if name else -1


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, by their checksums; None if nothing is."""
    return checksums.damage(path, required=(CONTENTS, METADATA))


def newest(directory: Path) -> Path | None:
    """The newest checkpoint whose files are whole, or None; a damaged one is passed over with a warning."""
    for path in complete(directory):
        problem = damage(path)
        if problem is None:
            return path
        print(f"warning: checkpoint {path} is passed over: {problem}", file=sys.stderr, flush=True)
    return None


def find(source: Path, *, verify: bool = True) -> Path:
    """The checkpoint that a path stands for: itself, or the newest whole one of a run or of a `checkpoints/` directory.

    Args:
        source: the path.
        verify: check the checksums, which reads the files; False only looks whether there is one.

    Raises:
        ValueError: there is none, or the one named is damaged.
    """
    if (source / CONTENTS).is_file():
        problem = damage(source) if verify else None
        if problem is not None:
            raise ValueError(f"`resume` {str(source)!r} is damaged: {problem}: use an older one, or resume=auto")
        return source
    found = newest(source) if verify else next(iter(complete(source)), None)
    if found is None:
        raise ValueError(
            f"`resume` must be auto or a run or checkpoint directory, got {str(source)!r}, which holds no checkpoint "
            "(a run writes them with checkpoint.every=N)"
        )
    return found


def read_contents(path: Path) -> dict[str, Any]:
    """contents.json of a checkpoint.

    Raises:
        ValueError: it is not there, cannot be read, is of another format, or makes no sense.
    """
    try:
        found = json.loads((path / CONTENTS).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"`resume` {str(path)!r} is not a checkpoint: {error}") from error
    return require_sound(found, source=str(path))


def load(trainer: Trainer, path: Path, *, resize: str = "refuse") -> None:
    """Put a checkpoint's state into a trainer, whatever the number of ranks that saved it; every rank must call it.

    Args:
        trainer: of this run; its state is replaced.
        path: from `find` or `newest`.
        resize: what to do about another number of workers, see `snapshot.resize_duals`; "refuse" refuses.

    Raises:
        ValueError: it does not fit; says what was found, what was expected and what to do.
    """
    found = read_contents(path)
    require_fit(found, trainer, source=str(path), resize=resize)
    is_resized = found["num_workers"] != len(trainer.shard_sizes)
    if is_resized:
        require_weights(found, source=str(path))
    try:
        keys = _tensor_keys(path)
        trainer.state = restore(_read(path, wanted_keys(keys, trainer.hosted)), trainer)
        if found["worker_weight"] != list(trainer.worker_weight):
            trainer.state.shared = trainer.algorithm.without_sums(trainer.state.shared)
        if is_resized:
            resize_duals(trainer, found, lambda keys: _read(path, keys, alone=True), policy=resize)
    except _UNREADABLE as error:
        raise OSError(f"checkpoint {path} cannot be read: {_last_line(error)}") from error


def inspect(path: Path) -> str:
    """A page about a checkpoint: round, workers, norm of each dual, and of the sum of the weighted duals."""
    about = read_contents(path)
    numbers = [f"{key:16} {about[key]}" for key in ("format", "algorithm", "round", "num_workers")]
    numel = sum(torch.Size(shape).numel() for shape, _ in about["tensors"].values())
    lines = [
        *numbers,
        f"{'numbers':16} {numel} in {len(about['tensors'])} tensors",
        f"{'files':16} {damage(path) or 'whole'}",
    ]
    try:
        lines += _about_duals(path, about["worker_weight"])
    except _UNREADABLE as error:
        if damage(path) is None:
            raise
        lines.append(f"{'duals':16} cannot be read: {_last_line(error)}")
    return "\n".join(lines)


def _about_duals(path: Path, worker_weight: Sequence[float]) -> list[str]:
    keys = _tensor_keys(path)
    names = dict.fromkeys(key.split("/")[2] for key in keys if key.startswith("workers/") and key.endswith("/dual"))
    if not names:
        return []
    squares = [0.0] * len(worker_weight)
    square_of_sum = 0.0
    for name in names:
        duals = _read(path, [f"workers/{worker}/{name}/dual" for worker in range(len(squares))], alone=True)
        stacked = torch.stack(list(duals.values())).double().flatten(1)
        squares = [total + own for total, own in zip(squares, stacked.square().sum(1).tolist(), strict=True)]
        weights = torch.tensor(worker_weight, dtype=torch.float64)
        square_of_sum += float((weights @ stacked).square().sum())
    lines = ["worker  weight   norm of its dual"]
    lines += [
        f"{worker:6}  {weight:6.4f}   {square**0.5:.6g}"
        for worker, (weight, square) in enumerate(zip(worker_weight, squares, strict=True))
    ]
    norm = square_of_sum**0.5
    return [*lines, f"norm of sum_i alpha_i pi_i: {norm:.6g} (0 at a fixed point without consensus_l2)"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pisa_dist.checkpoint", description=__doc__.splitlines()[0] if __doc__ else None
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("inspect", help="show what is inside")
    shown.add_argument("path", type=Path, help="a checkpoint, or a run, whose newest is taken")
    arguments = parser.parse_args(argv)
    try:
        path = arguments.path if (arguments.path / CONTENTS).is_file() else find(arguments.path)
        print(path, inspect(path), sep="\n")
    except (ValueError, OSError, TypeError, *_UNREADABLE) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _tensor_keys(path: Path) -> list[str]:
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    return [key for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)]


def _read(path: Path, keys: Sequence[str], *, alone: bool = False) -> Flat:
    """Some tensors of a checkpoint; unless `alone`, a collective over the ranks, each with keys of its own."""
    reader = FileSystemReader(path)
    entries = reader.read_metadata().state_dict_metadata
    flat: Flat = {}
    for key in keys:
        entry = entries[key]
        if isinstance(entry, TensorStorageMetadata):
            flat[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with _single_process_allowed():
        load_distributed(dict(flat), storage_reader=reader, no_dist=alone)
    return flat


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


@contextmanager
def _single_process_allowed() -> Iterator[None]:
    """One process is a layout like any other; the library warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")
        yield


if __name__ == "__main__":
    sys.exit(main())
