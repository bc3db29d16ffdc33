"""The trainer's state as flat tensors by name and back, on any layout and for another number of workers.

Every worker's state has keys of its own ("workers/3/fc.weight/dual"), because torch.distributed.checkpoint silently
keeps one copy of plain tensors that share a name. What all ranks hold alike is kept once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pisa_dist.algorithms.base import State
from pisa_dist.checks import check_choice, check_ranges
from pisa_dist.state import TrainingState
from pisa_dist.trainer import Trainer

FORMAT = 2
RESIZE = ("refuse", "resplit", "drop")
_INTEGERS = ("round_number", "samples_seen", "bytes_sent", "loss_rounds")
_FLOATS = ("seconds", "loss_sum", "lr_factor")
_KINDS: dict[str, type] = {
    "algorithm": str,
    "choices": dict,
    "num_workers": int,
    "tensors": dict,
    "round": int,
    "worker_weight": list,
}

Flat = dict[str, Tensor]


@dataclass
class CheckpointConfig:
    """`every`: rounds from one checkpoint to the next; `every_seconds`: seconds from one to the next; 0 for none.

    With both 0 only a stopped run writes one. A run that has written any writes one at its end.
    `keep_last` whole ones are kept; `asynchronous` writes them while training goes on; `resize` says what to do when
    `num_workers` has changed at a resume: refuse, resplit (deal the data anew) or drop (the removed workers' data).
    """

    every: int = 0
    every_seconds: float = 600.0
    keep_last: int = 3
    asynchronous: bool = True
    resize: str = "refuse"

    def __post_init__(self) -> None:
        check_choice("checkpoint.resize", self.resize, RESIZE)
        check_ranges(vars(self), prefix="checkpoint.")


def contents(trainer: Trainer) -> dict[str, Any]:
    """What a person can read of a checkpoint without torch, and what must agree for it to fit."""
    state = trainer.state
    return {
        "format": FORMAT,
        "algorithm": trainer.algorithm.name,
        "choices": {key: value for key, value in vars(trainer.algorithm).items() if isinstance(value, str)},
        "num_workers": len(trainer.shard_sizes),
        "tensors": {name: [list(t.shape), str(t.dtype)] for name, t in (state.weights | state.buffers).items()},
        "round": state.round_number,
        "seed": trainer.plan.seed,
        "shard_sizes": list(trainer.shard_sizes),
        "worker_weight": list(trainer.worker_weight),
    }


def require_sound(found: object, *, source: str) -> dict[str, Any]:
    """What `contents` wrote, read again: of this format, with every entry of its type.

    Raises:
        ValueError: it is not; a checkpoint of another version, or changed by hand.
    """
    if not isinstance(found, dict):
        raise ValueError(f"`resume` {source!r} is not a checkpoint: contents.json holds no mapping")
    if found.get("format") != FORMAT:
        raise ValueError(
            f"`resume` {source!r} does not fit: its format is {found.get('format')!r}, this run's is {FORMAT}: use "
            "the version of pisa_dist that wrote it"
        )
    for key, kind in _KINDS.items():
        if type(found.get(key)) is not kind:  # a truth value is no number
            raise ValueError(
                f"`resume` {source!r} is damaged: {key} in contents.json must be of type {kind.__name__}, "
                f"got {found.get(key)!r}"
            )
    return found


def require_weights(found: Mapping[str, Any], *, source: str) -> None:
    """Refuse weights that `resize_duals` cannot use.

    Raises:
        ValueError: they are not one number for each worker.
    """
    weights, number = found["worker_weight"], found["num_workers"]
    if len(weights) != number or not all(isinstance(weight, float) and 0 <= weight <= 1 for weight in weights):
        raise ValueError(
            f"`resume` {source!r} is damaged: worker_weight in contents.json must be {number} numbers in [0, 1], "
            f"got {weights!r}"
        )


def require_fit(found: Mapping[str, Any], trainer: Trainer, *, source: str, resize: str) -> None:
    """Refuse a checkpoint of another method or model, or of another number of workers unless that may change.

    Raises:
        ValueError: says what was found, what was expected and what to do.
    """
    expected = contents(trainer)
    advice = {
        "algorithm": "set algorithm to the one that wrote it, or start a new run_dir",
        "choices": "set the algorithm's options to those that wrote it, or start a new run_dir",
        "tensors": "set model, data and dtype to those that wrote it, or start a new run_dir",
        "num_workers": "set num_workers to that, or allow the change with checkpoint.resize=resplit or drop",
        "seed": "set seed to that: it deals the data, and a dual stands for its worker's",
        "shard_sizes": "set data and split to those that wrote it: a dual stands for its worker's data",
    }
    may_change = () if resize == "refuse" else ("num_workers", "shard_sizes")
    for key, what_to_do in advice.items():
        if found.get(key) == expected[key] or key in may_change:
            continue
        was, wanted = _first_difference(found.get(key), expected[key])
        raise ValueError(f"`resume` {source!r} does not fit: its {key} is {was}, this run's is {wanted}: {what_to_do}")


def _first_difference(found: Any, expected: Any) -> tuple[Any, Any]:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for name in [*expected, *found]:
            if found.get(name) != expected.get(name):
                return f"{name} {found.get(name, 'absent')}", f"{name} {expected.get(name, 'absent')}"
    return found, expected


def flatten(state: TrainingState, hosted: Sequence[int]) -> Flat:
    """The state of this rank: what all ranks hold alike, and that of its workers. CPU copies that stay as they are."""
    flat: Flat = {f"weights/{name}": value for name, value in state.weights.items()}
    flat |= {f"buffers/{name}": value for name, value in state.buffers.items()}
    flat |= {f"shared/{n}/{kind}": v for n, kinds in state.shared.items() for kind, v in kinds.items()}
    for row, worker in enumerate(hosted):
        flat[f"workers/{worker}/num_participations"] = state.num_participations[row]
        flat[f"workers/{worker}/num_steps"] = state.num_steps[row]
        for name, kinds in state.workers.items():
            flat |= {f"workers/{worker}/{name}/{kind}": value[row] for kind, value in kinds.items()}
    flat |= {f"fetched/{number}/{n}": w for number, old in state.fetched.items() for n, w in old.items()}
    # Counters as tensors, so that nothing in a checkpoint needs unpickling.
    flat |= {f"counters/{name}": torch.tensor(getattr(state, name), dtype=torch.int64) for name in _INTEGERS}
    # Every rank has a time of its own; that of the first, which writes the metrics, is the run's.
    floats = [name for name in _FLOATS if name != "seconds" or 0 in hosted]
    flat |= {f"counters/{name}": torch.tensor(getattr(state, name), dtype=torch.float64) for name in floats}
    flat["counters/watch"] = torch.tensor(state.watch, dtype=torch.float64)
    return {key: value.detach().to("cpu", copy=True) for key, value in flat.items()}


def wanted_keys(keys: Sequence[str], workers: Sequence[int]) -> list[str]:
    """The keys that a rank needs which hosts `workers`: theirs, those of all ranks, and who has taken part."""
    mine = tuple(f"workers/{worker}/" for worker in workers)
    return [
        key
        for key in keys
        if key.startswith(mine) or not key.startswith("workers/") or key.endswith("/num_participations")
    ]


def restore(flat: Mapping[str, Tensor], trainer: Trainer) -> TrainingState:
    """The state that `flatten` made flat, for the workers that the trainer hosts here.

    A worker without keys in `flat` keeps the state that the trainer gave it at its start.

    Raises:
        ValueError: something else is missing in `flat`, or of another shape.
    """
    old = trainer.state
    device = next(iter(old.weights.values())).device

    def take(key: str, like: Tensor | None = None) -> Tensor:
        found = flat.get(key)
        if found is None or (like is not None and (found.shape, found.dtype) != (like.shape, like.dtype)):
            was = "nothing" if found is None else f"{list(found.shape)} {found.dtype}"
            wanted = "" if like is None else f" where this run has {list(like.shape)} {like.dtype}"
            raise ValueError(
                f"`resume` does not fit: it holds {was} for {key}{wanted}: set model and algorithm to what they "
                "were, or start a new run_dir"
            )
        return found

    shared: State = {name: dict(kinds) for name, kinds in old.shared.items()}
    for key in (key for key in flat if key.startswith("shared/")):
        _, name, kind = key.split("/")
        # torch's optimizers keep their step counts on the CPU.
        shared.setdefault(name, {})[kind] = flat[key] if kind == "step" else flat[key].to(device)
    workers = {name: {kind: value.clone() for kind, value in kinds.items()} for name, kinds in old.workers.items()}
    num_participations, num_steps = old.num_participations.clone(), old.num_steps.clone()
    for row, worker in enumerate(trainer.hosted):
        if f"workers/{worker}/num_participations" not in flat:
            continue
        num_participations[row] = take(f"workers/{worker}/num_participations", num_participations[row])
        # One written before steps were counted: all workers took equally many in a round.
        earlier = num_participations[row] * trainer.plan.local_steps
        num_steps[row] = flat.get(f"workers/{worker}/num_steps", earlier)
        for name, kinds in workers.items():
            for kind, value in kinds.items():
                value[row] = take(f"workers/{worker}/{name}/{kind}", value[row]).to(device)
    counters: dict[str, Any] = {name: take(f"counters/{name}").item() for name in (*_INTEGERS, *_FLOATS)}
    one_pass_rounds = trainer.algorithm.one_pass_rounds(shared)
    held = trainer.schedule.at(counters["round_number"], one_pass_rounds).held(trainer.hosted)
    kept = [number for number in held if all(f"fetched/{number}/{name}" in flat for name in old.weights)]
    return TrainingState(
        weights={name: take(f"weights/{name}", old.weights[name]).to(device) for name in old.weights},
        buffers={name: take(f"buffers/{name}", old.buffers[name]).to(device) for name in old.buffers},
        shared=shared,
        workers=workers,
        num_participations=num_participations,
        num_steps=num_steps,
        has_taken_part=torch.tensor(
            [bool(flat.get(f"workers/{worker}/num_participations", 0)) for worker in range(len(old.has_taken_part))]
        ),
        fetched={
            number: {name: take(f"fetched/{number}/{name}", like).to(device) for name, like in old.weights.items()}
            for number in kept
        },
        watch=take("counters/watch").tolist(),
        **counters,
    )


def resize_duals(
    trainer: Trainer, found: Mapping[str, Any], read: Callable[[Sequence[str]], Mapping[str, Tensor]], *, policy: str
) -> None:
    """Give the duals a mean that fits another number of workers.

    The fixed point of ADMM is exact from any duals: at it pi_i = -grad F_i(w) for the workers that there are. What a
    change of workers must not do is kick the weights, which move by Pi, the mean of the duals by alpha. Therefore
        resplit: Pi stays. New workers start at Pi; all are then shifted by what is missing, so that duals of removed
            workers go on standing for data that the others now hold. Where a method averages over the workers seen so
            far, a new one is not seen, and its dual counts once it has taken part.
        drop: removed workers' data are gone and so are their duals; the others' stay as they are.

    Args:
        trainer: with the state that `restore` gave it.
        found: the checkpoint's contents.
        read: keys of the checkpoint -> its tensors.
        policy: "resplit" or "drop".
    """
    if policy == "drop":
        return
    old_weight, new_weight = found["worker_weight"], trainer.worker_weight
    old_workers, seen_key = range(len(old_weight)), trainer.algorithm.dual_counts_if
    num_kept = min(len(old_weight), len(new_weight))
    counts = [True] * len(old_weight)
    if seen_key is not None:
        steps = read([f"workers/{worker}/{seen_key}" for worker in old_workers])
        counts = [bool(steps[f"workers/{worker}/{seen_key}"] > 0) for worker in old_workers]
    for name, kinds in trainer.state.workers.items():
        if "dual" not in kinds:
            continue
        dual = kinds["dual"]
        old = read([f"workers/{worker}/{name}/dual" for worker in old_workers])
        values = [old[f"workers/{worker}/{name}/dual"].to(dual) for worker in old_workers]
        mean = _weighted_mean([(old_weight[i], values[i]) for i in old_workers if counts[i]], like=dual[0])
        carriers = {worker: values[worker] for worker in range(num_kept) if counts[worker]}
        if seen_key is None:
            carriers |= dict.fromkeys(range(num_kept, len(new_weight)), mean)
        shift = mean - _weighted_mean([(new_weight[i], value) for i, value in carriers.items()], like=mean)
        for row, worker in enumerate(trainer.hosted):
            dual[row] = carriers[worker] + shift if worker in carriers else 0.0


def _weighted_mean(weighted: Sequence[tuple[float, Tensor]], *, like: Tensor) -> Tensor:
    """Zero of nothing."""
    total = sum((weight * value for weight, value in weighted), torch.zeros_like(like))
    return total / max(sum(weight for weight, _ in weighted), torch.finfo(like.dtype).tiny)
