"""From a checked configuration to a finished run directory: data, split, model, trainer, files."""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pisa_dist import checkpoint
from pisa_dist.consensus import Consensus, make_consensus
from pisa_dist.data import datasets
from pisa_dist.data.datasets import Dataset, TrainTest
from pisa_dist.data.noise import add_feature_noise
from pisa_dist.data.sampling import hosted_workers
from pisa_dist.data.skew import class_counts, skew_measures
from pisa_dist.data.splits import SPLITS
from pisa_dist.distributed import launched_ranks, on_every_rank, on_first_rank, require_same, select_device
from pisa_dist.guards import RankError
from pisa_dist.metrics import require_logits
from pisa_dist.models import build_model
from pisa_dist.preemption import Preempted, StopRequest
from pisa_dist.progress import Progress
from pisa_dist.report import draw_run
from pisa_dist.rundir import RunDirectory
from pisa_dist.schema import (
    DTYPES,
    Config,
    CustomData,
    DataConfig,
    FeatureNoiseSplit,
    LibsvmData,
    WandbTracking,
    target_arguments,
)
from pisa_dist.state import TrainingPlan, Wishes
from pisa_dist.tracking import NoTracker, Tracker, make_tracker
from pisa_dist.trainer import Trainer

Parts = list[list[int]]


def run(config: Config, resolved: Mapping[str, Any]) -> Path:
    """Train as configured and write the run directory. Every rank calls it, inside the process group if there is one.

    Args:
        config: checked by `schema.validate`.
        resolved: the same configuration in plain containers, for config.yaml and trackers.

    Returns:
        The run directory.

    Raises:
        ValueError, FileNotFoundError: data, split, model, checkpoint or tracker do not fit; one line, on all ranks.
        RankError: this rank of several met a ValueError while it trained.
        FloatingPointError: a non-finite gradient, with on_nonfinite=raise.
        ConsensusError: another rank has stopped.
        OutOfMemory: training or evaluation needs more than the device has; says what takes it.
        Preempted: the run was asked to stop, and has written a checkpoint.
    """
    consensus = make_consensus()
    with ExitStack() as stack:
        stop = StopRequest(config.max_seconds)
        stack.enter_context(stop.listening())
        files = RunDirectory(on_first_rank(lambda: _claim_directory(config, stack)))
        data = on_every_rank(lambda: load_data(config))
        source = on_first_rank(lambda: _source(config, files.path))
        before = on_every_rank(lambda: None if source is None else checkpoint.read_contents(source)["num_workers"])
        parts = on_every_rank(lambda: split_data(config, data.train, before))
        trainer = _make_trainer(config, data, parts, consensus)
        if source is not None:
            checkpoint.load(trainer, source, resize=config.checkpoint.resize)
        if consensus.rank == 0:
            files.write_config({**resolved, "run_dir": str(files.path)})
            files.write_split(_describe_split(config, data.train, parts))
            if source is not None and config.resume != "auto":
                later = checkpoint.complete(files.path, after=trainer.state.round_number)
                files.set_aside(later, round_number=trainer.state.round_number)
            files.keep_metrics_until(trainer.state.round_number)
            if trainer.state.round_number >= config.rounds:
                print(f"the run is at round {trainer.state.round_number} of {config.rounds} already: nothing to train")
            if config.vectorize == "true" and trainer.choice.reason is not None:
                print(
                    f"vectorize=true: one worker after the other all the same: {trainer.choice.reason}", file=sys.stderr
                )
        trackers: list[Tracker] = []
        on_first_rank(lambda: trackers.append(_make_tracker(config, files.path, resolved)))
        tracker = trackers[0] if trackers else NoTracker()
        try:
            _train(config, trainer, files, tracker, stop, num_train=len(data.train))
        except ValueError as error:
            if consensus.num_ranks > 1:
                raise RankError(str(error)) from error
            raise
    return files.path


def _train(
    config: Config, trainer: Trainer, files: RunDirectory, tracker: Tracker, stop: StopRequest, *, num_train: int
) -> None:
    is_first = trainer.consensus.rank == 0
    every, number = config.checkpoint.every, trainer.state.round_number
    is_stopped = False
    checkpointer = checkpoint.Checkpointer(
        files.path / "checkpoints",
        every_seconds=config.checkpoint.every_seconds,
        keep_last=config.checkpoint.keep_last,
        asynchronous=config.checkpoint.asynchronous,
        timeout=timedelta(seconds=config.timeout_seconds),
    )
    trainer.wishes = lambda: Wishes(stop(), is_first and checkpointer.is_due())
    with checkpointer, Progress(config.rounds, start_round=number, enabled=is_first) as progress:
        for number, outcome, metrics in trainer.run():
            # A round is only called done once the checkpoint before it is complete: a kill then costs one interval at
            # most, and writing still overlaps with the round that follows.
            checkpointer.wait()
            if outcome.problem and is_first:
                print(f"round {number}: {outcome.problem}: round skipped", file=sys.stderr, flush=True)
            if outcome.warning and is_first:
                print(f"round {number}: warning: {outcome.warning}", file=sys.stderr, flush=True)
            progress.advance(number, outcome.train_loss)
            if metrics is not None and is_first:
                files.append_metrics(metrics)
                tracker.log(metrics)
                progress.evaluated(metrics)
            is_last = number == config.rounds
            is_stopped = outcome.wishes.stop and not is_last
            is_due = outcome.wishes.save or (every and number % every == 0)
            if is_stopped or is_due or (is_last and (every or checkpointer.has_saved)):
                checkpointer.save(trainer)
        is_saved = checkpointer.close()
    tracker.finish()
    if is_stopped and not is_saved:
        raise OSError(f"stopped after round {number}, and its checkpoint could not be written")
    if is_first:
        status = "preempted" if is_stopped else "completed"
        files.write_summary(_facts(config, trainer, num_train), status=status)
    if is_stopped:
        raise Preempted(files.path, number)
    if is_first:
        draw_run(files.path)


def read_data(data: DataConfig) -> TrainTest:
    """The whole data set, as its files hold it.

    Raises:
        ValueError, FileNotFoundError: it is damaged or not there; one line that names the file.
    """
    loaders: dict[str, Callable[[], TrainTest]] = {
        "digits": datasets.digits,
        "mnist": partial(datasets.mnist, data.root),
        "fashion_mnist": partial(datasets.fashion_mnist, data.root),
        "cifar10": partial(datasets.cifar10, data.root),
    }
    if isinstance(data, CustomData):
        return datasets.custom(data._target_, target_arguments(data), keep_integers=data.keep_integers)
    if isinstance(data, LibsvmData):
        return datasets.libsvm(data.train_file, data.test_file)
    return loaders[data.name]()


def load_data(config: Config, read: Callable[[DataConfig], TrainTest] = read_data) -> TrainTest:
    """The configured data set, in the run's floating type, on the CPU.

    The training part is cut to `data.num_train`. With `data.validation_fraction` a part of that takes the place of the
    test set, which is dropped.

    Args:
        config: the run.
        read: reads the whole set; a caller of many runs passes one that remembers.
    """
    data = config.data
    train, test = read(data)
    if data.num_train is not None:
        train = datasets.subset(train, data.num_train, seed=config.seed)
    if data.validation_fraction > 0:
        train, test = datasets.hold_out(train, data.validation_fraction, seed=config.seed)
    return TrainTest(*(_placed(part, dtype=DTYPES[config.dtype]) for part in (train, test)))


def split_data(config: Config, train: Dataset, checkpoint_workers: int | None = None) -> Parts:
    """Indices of every worker's samples; a knob of the split is an argument of its function.

    Args:
        config: the run.
        train: the training set.
        checkpoint_workers: number of workers of the checkpoint that the run goes on from; with checkpoint.resize=drop
            the data stay dealt among them, and those of removed workers are left out.
    """
    num_workers = config.num_workers
    if checkpoint_workers is not None and config.checkpoint.resize == "drop":
        if num_workers > checkpoint_workers:
            raise ValueError(
                f"`checkpoint.resize`=drop needs num_workers of at most the checkpoint's {checkpoint_workers}, "
                f"got {num_workers}: use resplit to add workers"
            )
        num_workers = checkpoint_workers
    knobs = {name: value for name, value in vars(config.split).items() if name not in ("name", "noise_level")}
    return SPLITS[config.split.name](train.targets, num_workers, seed=config.seed, **knobs)[: config.num_workers]


def _placed(dataset: Dataset, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Dataset:
    inputs = dataset.inputs.to(device)
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    return Dataset(inputs, dataset.targets.to(device), dataset.num_classes)


def _claim_directory(config: Config, stack: ExitStack) -> Path:
    """The run directory, made and locked for as long as `stack` is open."""
    name = f"{config.data.name}-{config.split.name}-{config.algorithm.name}"
    is_new = config.run_dir is None or not Path(config.run_dir).expanduser().exists()
    path = RunDirectory.prepare(config.run_dir, name=name, resume=config.resume)
    if is_new:  # data that are not there, or a split that cannot be, leave nothing behind
        stack.callback(RunDirectory(path).remove_unused)
    stack.enter_context(RunDirectory(path).locked())
    return path


def _source(config: Config, path: Path) -> Path | None:
    """The checkpoint to go on from; None to start afresh."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        return checkpoint.find(Path(config.resume))
    found = checkpoint.newest(path)
    if found is None:
        RunDirectory(path).require_restart(len(checkpoint.complete(path)))
    return found


def trainer_alone(config: Config, data: TrainTest) -> Trainer:
    """The run's trainer with all workers in this process, for callers that want no run directory.

    Args:
        config: checked by `schema.validate`.
        data: what `load_data` returns for it.

    Raises:
        ValueError: the split or the model does not fit the data.
    """
    return _make_trainer(config, data, split_data(config, data.train), make_consensus())


def _make_trainer(config: Config, data: TrainTest, parts: Parts, consensus: Consensus) -> Trainer:
    device = select_device(config.device, local_rank=launched_ranks()[2])
    sizes = [len(part) for part in parts]
    if config.worker_weight == "samples":
        weights = [size / sum(sizes) for size in sizes]
    else:
        weights = [1 / len(sizes)] * len(sizes)
    model = on_every_rank(lambda: _make_model(config, data.train, device))
    if consensus.num_ranks > 1:
        description = [f"{n}: {tuple(t.shape)} {t.dtype}" for n, t in model.state_dict().items()]
        description += [f"{len(data.train)} training samples", f"split {parts[0][:5]}..."]
        require_same(description, group=None, device=device)
    hosted = hosted_workers(config.num_workers, rank=consensus.rank, num_ranks=consensus.num_ranks)
    return Trainer(
        model=model,
        algorithm=config.algorithm,
        shards={worker: _shard(config, data.train, parts[worker], worker, device) for worker in hosted},
        test=_placed(data.test, device=device),
        shard_sizes=sizes,
        worker_weight=weights,
        plan=TrainingPlan.of(config),
        consensus=consensus,
    )


def _make_model(config: Config, train: Dataset, device: torch.device) -> nn.Module:
    target = config.model._target_
    model = build_model(
        target,
        target_arguments(config.model),
        input_shape=train.input_shape,
        num_classes=train.num_classes,
        seed=config.seed,
    ).to(device, DTYPES[config.dtype])
    try:
        require_logits(model, _placed(train.select([0]), device=device))
    except ValueError as error:
        raise ValueError(f"`model._target_` {target} does not fit data={config.data.name}: {error}") from error
    return model


def _shard(config: Config, train: Dataset, indices: list[int], worker: int, device: torch.device) -> Dataset:
    shard = train.select(indices)
    if isinstance(config.split, FeatureNoiseSplit):
        inputs = add_feature_noise(
            shard.inputs,
            indices,
            worker=worker,
            num_workers=config.num_workers,
            noise_level=config.split.noise_level,
            seed=config.seed,
        )
        shard = Dataset(inputs, shard.targets, shard.num_classes)
    return _placed(shard, device=device)


def _make_tracker(config: Config, path: Path, resolved: Mapping[str, Any]) -> Tracker:
    tracking = config.tracking
    options: dict[str, Any] = {}
    if isinstance(tracking, WandbTracking):
        options = {"project": tracking.project, "run_name": tracking.run_name, "mode": tracking.mode}
    return make_tracker(tracking.name, run_dir=path, config=resolved, **options)


def _describe_split(config: Config, train: Dataset, parts: Parts) -> dict[str, Any]:
    counts = class_counts(train.targets, parts, train.num_classes)
    return {
        "split": config.split.name,
        "num_workers": config.num_workers,
        "num_classes": train.num_classes,
        "counts": counts.tolist(),
        "sizes": [len(part) for part in parts],
        "skew": skew_measures(counts),
    }


def _facts(config: Config, trainer: Trainer, num_train: int) -> dict[str, Any]:
    state = trainer.state
    return {
        "algorithm": config.algorithm.name,
        "data": config.data.name,
        "split": config.split.name,
        "model": config.model._target_,
        "num_workers": config.num_workers,
        "num_ranks": trainer.consensus.num_ranks,
        "num_parameters": sum(w.numel() for w in state.weights.values()),
        "num_train": num_train,
        "rounds": state.round_number,
        "passes": state.samples_seen / num_train,
        "bytes_sent": state.bytes_sent,
        "wall_seconds": state.seconds,
        "seed": config.seed,
        "vectorized": trainer.choice.reason is None and trainer.vectorize_refusal is None,
        "vectorized_why_not": trainer.choice.reason or trainer.vectorize_refusal,
    }
