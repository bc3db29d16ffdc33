"""Configuration dataclasses and their range checks; the trainer's and the methods' knobs under their one name each.

Hydra composes YAML and command line into these. `to_config` refuses unknown keys and runs the range checks; `validate`
checks what several keys decide together. Both run before any data is read.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pisa_dist import checkpoint
from pisa_dist.algorithms import ALGORITHMS, Algorithm
from pisa_dist.checks import check_choice, check_ranges
from pisa_dist.clock import Clock
from pisa_dist.data.datasets import default_root, resolve_custom
from pisa_dist.data.sampling import hosted_workers, num_present
from pisa_dist.distributed import select_device
from pisa_dist.faults import ON_NONFINITE
from pisa_dist.guards import ON_DIVERGENCE
from pisa_dist.models import check_model
from pisa_dist.participation import Availability
from pisa_dist.robust import CONSENSUS_RULES, check_consensus
from pisa_dist.schedule import Schedule
from pisa_dist.snapshot import CheckpointConfig
from pisa_dist.state import TrainingPlan
from pisa_dist.tracking import check_tracking
from pisa_dist.vectorize import VECTORIZE

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
WORKER_WEIGHTS = ("samples", "uniform")


def _check_option(group: str, config: Any) -> None:
    """The name says which option of a group this is; the option itself is chosen with `group=option`."""
    if config.name != type(config).name:
        options = ", ".join(SCHEMAS[group])
        raise ValueError(f"`{group}.name` cannot be set, got {config.name!r}: use {group}=..., one of {options}")


@dataclass
class DataConfig:
    """A data set. `num_train` takes a seeded subset of the training samples, null all of them.

    `validation_fraction` > 0 holds that part of them out, in place of the test set, which is then not looked at.
    """

    name: str = MISSING
    root: str | None = None
    num_train: int | None = None
    validation_fraction: float = 0.0

    def __post_init__(self) -> None:
        _check_option("data", self)
        check_ranges(vars(self), prefix="data.", optional=("num_train",))


@dataclass
class DigitsData(DataConfig):
    """scikit-learn's digits, embedded."""

    name: str = "digits"


@dataclass
class MnistData(DataConfig):
    """MNIST, IDX files."""

    name: str = "mnist"


@dataclass
class FashionMnistData(DataConfig):
    """Fashion-MNIST, IDX files."""

    name: str = "fashion_mnist"


@dataclass
class Cifar10Data(DataConfig):
    """CIFAR-10, binary version."""

    name: str = "cifar10"


@dataclass
class LibsvmData(DataConfig):
    """Two svmlight files; a relative path is looked up in the working directory, then in `root`, or in $PISA_DATA."""

    name: str = "libsvm"
    train_file: str = MISSING
    test_file: str = MISSING


@dataclass
class CustomData(DataConfig):
    """`_target_` names a callable that returns (train, test); further keys are its arguments.

    Its inputs become floating point, but `keep_integers` leaves whole numbers, such as those of tokens, as they are.
    """

    name: str = "custom"
    _target_: str = MISSING
    keep_integers: bool = False


@dataclass
class SplitConfig:
    """How samples are dealt to workers; the knobs are the keyword arguments of the function in `data.splits`."""

    name: str = MISSING

    def __post_init__(self) -> None:
        _check_option("split", self)
        check_ranges(vars(self), prefix="split.")


@dataclass
class IidSplit(SplitConfig):
    """Equal random parts."""

    name: str = "iid"


@dataclass
class LabelKSplit(SplitConfig):
    """Each worker holds samples of `labels_per_worker` classes."""

    name: str = "label_k"
    labels_per_worker: int = 1


@dataclass
class DirichletSplit(SplitConfig):
    """Class shares drawn from a Dirichlet distribution; the smaller the concentration, the more skewed."""

    name: str = "dirichlet"
    dirichlet_concentration: float = 0.5


@dataclass
class QuantitySplit(SplitConfig):
    """Sizes drawn from a Dirichlet distribution; the smaller the concentration, the more uneven."""

    name: str = "quantity"
    dirichlet_concentration: float = 0.5


@dataclass
class FeatureNoiseSplit(SplitConfig):
    """iid, with Gaussian noise on the inputs: standard deviation 0 at the first worker, `noise_level` at the last."""

    name: str = "feature_noise"
    noise_level: float = 0.1


@dataclass
class ModelConfig:
    """Any callable that returns a module; further keys are its arguments."""

    _target_: str = MISSING


@dataclass
class MLPModel(ModelConfig):
    """Multilayer perceptron."""

    hidden_sizes: list[int] = field(default_factory=lambda: [128, 64])


@dataclass
class ResNet20Model(ModelConfig):
    """ResNet-20; `norm` is group or batch."""

    norm: str = "group"


@dataclass
class TrackingConfig:
    """Where metrics go besides the run directory."""

    name: str = MISSING

    def __post_init__(self) -> None:
        _check_option("tracking", self)


@dataclass
class NoTracking(TrackingConfig):
    """Nowhere."""

    name: str = "none"


@dataclass
class TensorboardTracking(TrackingConfig):
    """TensorBoard files in the run directory."""

    name: str = "tensorboard"


@dataclass
class WandbTracking(TrackingConfig):
    """Weights & Biases; `mode` is online or offline."""

    name: str = "wandb"
    project: str = "pisa_dist"
    run_name: str | None = None
    mode: str = "online"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tracking.mode", self.mode, ("online", "offline"))


@dataclass
class Config:
    """One training run. The README's table explains the keys."""

    data: Any = MISSING
    split: Any = MISSING
    model: Any = MISSING
    algorithm: Any = MISSING
    tracking: Any = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    availability: Availability = field(default_factory=Availability)
    clock: Clock = field(default_factory=Clock)
    num_workers: int = 10
    rounds: int = 100
    batch_size: int = 32
    local_steps: int = 1
    local_epochs: float | None = None
    participation: float = 1.0
    worker_weight: str = "samples"
    seed: int = 0
    run_dir: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    eval_every: int = 10
    on_nonfinite: str = "raise"
    consensus: str = "sum"
    consensus_trim: float = 0.1
    on_divergence: str = "warn"
    vectorize: str = "auto"
    resume: str | None = None
    max_seconds: float | None = None
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        # `worker_weight` is a rule here, not the optimizer's number of the same name.
        numbers = {name: value for name, value in vars(self).items() if name != "worker_weight"}
        check_ranges(numbers, optional=("max_seconds", "local_epochs"))
        if self.run_dir == "":
            raise ValueError("`run_dir` must be a path or null, got ''")
        check_choice("worker_weight", self.worker_weight, WORKER_WEIGHTS)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_choice("consensus", self.consensus, CONSENSUS_RULES)
        check_choice("on_divergence", self.on_divergence, ON_DIVERGENCE)
        self.vectorize = self.vectorize.lower()  # the command line's truth values come as "True" and "False"
        check_choice("vectorize", self.vectorize, VECTORIZE)


# What each group's YAML starts from: "<option>_schema" in the group of that name.
SCHEMAS: dict[str, dict[str, type]] = {
    "data": {s.name: s for s in (DigitsData, MnistData, FashionMnistData, Cifar10Data, LibsvmData, CustomData)},
    "split": {s.name: s for s in (IidSplit, LabelKSplit, DirichletSplit, QuantitySplit, FeatureNoiseSplit)},
    "model": {"mlp": MLPModel, "cnn": ModelConfig, "resnet20": ResNet20Model, "custom": ModelConfig},
    "algorithm": dict(ALGORITHMS),
    "tracking": {s.name: s for s in (NoTracking, WandbTracking, TensorboardTracking)},
}
# Keys of the root that have keys of their own.
NESTED: dict[str, type] = {"checkpoint": CheckpointConfig, "availability": Availability, "clock": Clock}


def explain_unknown(key: str) -> str:
    """One line about a key that the configuration does not have: which option has it, or which key is like it."""
    group, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    options = [option for option, schema in SCHEMAS.get(group, {}).items() if name in {f.name for f in fields(schema)}]
    if "dict" in str(next((f.type for s in SCHEMAS.get(group, {}).values() for f in fields(s) if f.name == name), "")):
        return f"`{key}` holds options of your own: add each with a plus, +{group}.{name}.NAME=VALUE"
    if options:
        return f"`{key}` is a key of {' and '.join(f'{group}={option}' for option in options)}, which is not chosen"
    keys = {f.name for f in fields(Config)}
    keys |= {f"{nested}.{f.name}" for nested, schema in NESTED.items() for f in fields(schema)}
    for known_group, schemas in SCHEMAS.items():
        keys |= {f"{known_group}.{f.name}" for schema in schemas.values() for f in fields(schema)}
    close = [k for k in sorted(keys) if k.endswith(f".{key}")] or difflib.get_close_matches(key, keys, n=1)
    if group in ("data", "model") and name:
        return f"`{key}` is not a known key here; an argument of {group}._target_ is added with +{key}=VALUE"
    return f"`{key}` is not a known key here" + (f"; did you mean {close[0]}?" if close else "")


def to_config(composed: DictConfig) -> Config:
    """The checked dataclass of what Hydra composed.

    Raises:
        ValueError: an unknown or missing key, or a value out of range; one line that names it.
    """
    _refuse_unknown_keys(composed)
    missing = OmegaConf.missing_keys(composed)
    if missing:
        key = min(missing)
        raise ValueError(f"`{key}` must be given: {key}=...")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(config, Config):
        raise ValueError(f"the configuration must have the schema of Config, got {type(config).__name__}")
    for group in SCHEMAS:
        if not is_dataclass(getattr(config, group)):
            raise ValueError(f"`{group}` must be one of {', '.join(SCHEMAS[group])}, got {getattr(config, group)!r}")
    return config


def _refuse_unknown_keys(node: DictConfig, prefix: str = "") -> None:
    """Hydra accepts `+group.key=1` silently; only what a `_target_` is called with may be new."""
    kind = OmegaConf.get_type(node)
    if kind is None or not is_dataclass(kind):
        return
    known = {f.name for f in fields(kind)}
    for name in map(str, node):
        key = f"{prefix}{name}"
        if name not in known and "_target_" not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"`{key}` is not a known key{hint}")
        if not OmegaConf.is_missing(node, name) and isinstance(node._get_node(name), DictConfig):
            child = node[name]
            if child is not None:
                _refuse_unknown_keys(child, f"{key}.")


def target_arguments(config: ModelConfig | CustomData) -> dict[str, Any]:
    """The keyword arguments that a `_target_` is called with: every key that is not the package's own."""
    own = {"_target_"} | ({f.name for f in fields(config)} if isinstance(config, CustomData) else set())
    return {name: value for name, value in vars(config).items() if name not in own}


def validate(config: Config, *, num_ranks: int = 1) -> None:
    """Check what several keys, or key and machine, decide together. Reads no data.

    Raises:
        ValueError: one line that names key, value and range.
    """
    present = num_present(config.num_workers, config.participation)
    check_consensus(config.consensus, config.consensus_trim, num_present=present)
    hosted_workers(config.num_workers, rank=0, num_ranks=num_ranks)
    algorithm: Algorithm = config.algorithm
    algorithm.check_run(num_workers=config.num_workers, local_steps=config.local_steps)
    # Of steps that follow from shards it is known only that there is one at least.
    Schedule(TrainingPlan.of(config), [config.local_steps] * config.num_workers)
    if config.local_epochs is not None and not algorithm.takes_local_steps:
        raise ValueError(
            f"`local_epochs` must be null for algorithm={algorithm.name}, which communicates after every gradient, "
            f"got {config.local_epochs}: raise batch_size instead"
        )
    select_device(config.device)
    check_model(config.model._target_, target_arguments(config.model))
    check_tracking(config.tracking.name)
    if config.resume == "auto" and config.run_dir is None:
        raise ValueError("`resume`=auto needs `run_dir`, the run to go on with")
    if config.resume not in (None, "auto"):
        checkpoint.find(Path(str(config.resume)), verify=False)
    if isinstance(config.data, CustomData):
        resolve_custom(config.data._target_, target_arguments(config.data))
        if config.data.keep_integers and isinstance(config.split, FeatureNoiseSplit):
            raise ValueError(
                "`data.keep_integers` must be false with split=feature_noise, got true: noise is no integer"
            )
    if isinstance(config.data, LibsvmData):
        config.data.train_file, config.data.test_file = (
            str(_found(config.data, name)) for name in ("train_file", "test_file")
        )


def _found(data: LibsvmData, key: str) -> Path:
    path = Path(getattr(data, key)).expanduser()
    root = default_root() if data.root is None else Path(data.root).expanduser()
    places = [path] if path.is_absolute() else [path, root / path]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"`data.{key}` must be a file, got {str(path)!r} (looked for {', '.join(map(str, places))})")


def as_plain(composed: DictConfig) -> Mapping[str, Any]:
    """The resolved configuration in plain containers, for config.yaml and trackers."""
    plain = OmegaConf.to_container(composed, resolve=True)
    if not isinstance(plain, dict):
        raise ValueError(f"the configuration must be a mapping, got {type(plain).__name__}")
    return {str(key): value for key, value in plain.items()}
