"""Data sets in memory: digits, MNIST, Fashion-MNIST, CIFAR-10, LIBSVM files and what a user's function returns."""

import inspect
import logging
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pisa_dist.data import readers

logger = logging.getLogger(__name__)

MAX_DENSE_BYTES = 8 * 2**30
"""Memory that a LIBSVM set may take once its features are dense."""

# Mean and standard deviation of the training pixels, divided by 255; per channel for CIFAR-10.
_MNIST_SCALE = ((0.1307,), (0.3081,))
_FASHION_MNIST_SCALE = ((0.2860,), (0.3530,))
_CIFAR10_SCALE = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

_HELD_OUT = 3  # first word of the key of the validation set's draw

_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR10_TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_CIFAR10_TEST_FILE = "test_batch.bin"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of a classification problem, in memory.

    Attributes:
        inputs: features, shape [n, *input_shape]: float32 as read, in the run's type (`dtype`) once loaded for it; or
            integers, such as token numbers, which stay so.
        targets: classes, int64, shape [n], in 0..num_classes-1.
        num_classes: C >= 1.
    """

    inputs: Tensor
    targets: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample's features."""
        return tuple(self.inputs.shape[1:])

    def select(self, indices: Sequence[int] | npt.NDArray[np.integer] | Tensor) -> "Dataset":
        """The samples at `indices`, in that order, as a copy."""
        rows = torch.as_tensor(indices, dtype=torch.int64, device=self.targets.device)
        return Dataset(self.inputs[rows], self.targets[rows], self.num_classes)

    def validate(self, name: str) -> None:
        """Refuse samples that would spoil training without a word.

        Args:
            name: what the message calls the set, such as "MNIST train set".

        Raises:
            ValueError: no samples, another number of inputs than of targets, a NaN or infinite feature, or a
                label outside 0..num_classes-1; the message names the first such sample.
        """
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{name}: found {len(self.inputs)} inputs but {len(self.targets)} targets")
        if self.inputs.numel() == 0:
            raise ValueError(f"{name}: no samples or no features, got inputs of shape {tuple(self.inputs.shape)}")
        outside = (self.targets < 0) | (self.targets >= self.num_classes)
        if outside.any():
            sample = int(outside.int().argmax())
            found = int(self.targets[sample])
            raise ValueError(f"{name}: label of sample {sample} must be in 0..{self.num_classes - 1}, got {found}")
        unbounded = ~self.inputs.isfinite().flatten(start_dim=1).all(dim=1)
        if unbounded.any():
            sample = int(unbounded.int().argmax())
            raise ValueError(f"{name}: sample {sample} has a NaN or infinite feature")


class TrainTest(NamedTuple):
    """A training set and a test set with the same input shape and classes."""

    train: Dataset
    test: Dataset


def default_root() -> Path:
    """Folder of data sets where `data.root` is not given: the environment's PISA_DATA, else ~/.cache/pisa_dist."""
    return Path(os.environ.get("PISA_DATA") or "~/.cache/pisa_dist").expanduser()


def digits() -> TrainTest:
    """scikit-learn's digits: 1,437 and 360 images of 1 x 8 x 8 in [0, 1], 10 classes; needs no file.

    The split is stratified by class and always the same, whatever the seed of the run.
    """
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    inputs = torch.from_numpy(pixels.reshape(-1, 1, 8, 8).astype(np.float32) / 16)
    everything = Dataset(inputs, torch.from_numpy(labels.astype(np.int64)), num_classes=10)
    return TrainTest(everything.select(train), everything.select(test))


def mnist(root: str | Path | None = None) -> TrainTest:
    """MNIST: 60,000 and 10,000 grey images of 1 x 28 x 28, standardised, 10 classes.

    Args:
        root: folder with the four IDX files, plain or .gz, in `mnist/`, `MNIST/raw/` or itself;
            None: `default_root()`.

    Raises:
        FileNotFoundError: the set is not there; the message says which files go where.
        ValueError: a file is damaged; the message names it.
    """
    return _idx_set("MNIST", root, ("mnist", "MNIST/raw"), _MNIST_SCALE)


def fashion_mnist(root: str | Path | None = None) -> TrainTest:
    """Fashion-MNIST: as `mnist`, in `fashion-mnist/`, `FashionMNIST/raw/` or `root` itself."""
    return _idx_set("Fashion-MNIST", root, ("fashion-mnist", "FashionMNIST/raw"), _FASHION_MNIST_SCALE)


def cifar10(root: str | Path | None = None) -> TrainTest:
    """CIFAR-10: up to 50,000 and 10,000 colour images of 3 x 32 x 32, standardised by channel, 10 classes.

    Args:
        root: folder with the files of the binary version, plain or .xz, in `cifar10/`,
            `cifar-10-batches-bin/` or itself; None: `default_root()`. Of the five training files those that
            are there are used, at least one.

    Raises:
        FileNotFoundError: the set is not there; the message says which files go where.
        ValueError: a file is damaged; the message names it.
    """
    root = default_root() if root is None else Path(root).expanduser()
    for folder in (root / "cifar10", root / "cifar-10-batches-bin", root):
        found = [_existing(folder, name, ".xz") for name in _CIFAR10_TRAIN_FILES]
        train_paths = [path for path in found if path is not None]
        test_path = _existing(folder, _CIFAR10_TEST_FILE, ".xz")
        if train_paths and test_path is not None:
            parts = [readers.read_cifar10(path) for path in train_paths]
            train = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            num_train = len(train[1])
            logger.info("CIFAR-10: %d training samples, %d of 5 files, %s", num_train, len(parts), folder)
            return TrainTest(
                _standardised(f"CIFAR-10 train set in {folder}", train[0], train[1], _CIFAR10_SCALE),
                _standardised(f"CIFAR-10 test set in {folder}", *readers.read_cifar10(test_path), _CIFAR10_SCALE),
            )
    files = (f"{_CIFAR10_TRAIN_FILES[0]} (to 5, at least one)", _CIFAR10_TEST_FILE)
    raise _missing("CIFAR-10", files, ".xz", root / "cifar10")


def libsvm(train_file: str | Path, test_file: str | Path) -> TrainTest:
    """A training and a test file in LIBSVM format, plain or .gz, .bz2 or .xz, as dense vectors.

    The integer labels of both files, in ascending order, become classes 0..C-1. Columns count from 0 if
    either file has an index 0, else from 1; the narrower file is padded with zeros.

    Args:
        train_file: lines of `label index:value ...`.
        test_file: the same.

    Returns:
        Sets with inputs of shape [n, d].

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty or damaged, its labels are not integers, a feature is not finite, or the
            dense features would take more than 8 GiB.
    """
    paths = Path(train_file).expanduser(), Path(test_file).expanduser()
    samples = [readers.read_libsvm(path) for path in paths]
    columns = np.concatenate([part.features.indices for part in samples])
    if len(columns) == 0:
        raise ValueError(f"{paths[0]}: expected features in it or in {paths[1]}, found labels only")
    first = 1 if columns.min() > 0 else 0
    num_features = int(columns.max()) + 1 - first
    num_bytes = 4 * num_features * sum(len(part.labels) for part in samples)
    if num_bytes > MAX_DENSE_BYTES:
        raise ValueError(
            f"{paths[0]}: {num_features} dense features would take {num_bytes / 2**30:.1f} GiB with the test set, "
            f"more than the {MAX_DENSE_BYTES / 2**30:g} GiB allowed: select features or samples first"
        )
    classes = np.unique(np.concatenate([part.labels for part in samples]))
    train, test = (
        Dataset(
            torch.from_numpy(part.dense(first, num_features)),
            torch.from_numpy(np.searchsorted(classes, part.labels).astype(np.int64)),
            num_classes=len(classes),
        )
        for part in samples
    )
    return TrainTest(train, test)


def custom(target: str, arguments: Mapping[str, Any], *, keep_integers: bool = False) -> TrainTest:
    """What a function of the user's returns, as a data set.

    Args:
        target: dotted path of the function, such as "my_package.my_module.load".
        arguments: its keyword arguments.
        keep_integers: whether inputs that are integers, such as token numbers, become int64 instead of float32.

    Returns:
        The function's pair (train, test). Each of the two is a tuple (inputs, targets) of arrays or tensors of
        shapes [n, ...] and [n], or a map-style torch data set of (input, target) pairs. Inputs become float32, but
        see `keep_integers`; the largest target plus one is the number of classes.

    Raises:
        ValueError: there is no such function, it does not take the arguments, or it returns something else:
            targets that are not integers, shapes that differ, labels below 0, NaN or infinite features.
    """
    pair = resolve_custom(target, arguments)(**arguments)
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"`data._target_` {target} must return (train, test), got {type(pair).__name__}")
    names = [f"`data._target_` {target}, {part} set" for part in ("train", "test")]
    samples = [
        readers.read_object(part, name, keep_integers=keep_integers) for part, name in zip(pair, names, strict=True)
    ]
    num_classes = max(1, 1 + max(int(targets.max()) for _, targets in samples))
    train, test = (Dataset(inputs, targets, num_classes) for inputs, targets in samples)
    for dataset, name in zip((train, test), names, strict=True):
        dataset.validate(name)
    if train.input_shape != test.input_shape:
        raise ValueError(f"{names[1]}: expected inputs of {train.input_shape} as in train, found {test.input_shape}")
    if train.inputs.dtype != test.inputs.dtype:
        raise ValueError(f"{names[1]}: expected {train.inputs.dtype} inputs as in train, found {test.inputs.dtype}")
    return TrainTest(train, test)


def resolve_custom(target: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The function of `custom`, checked to take the arguments; not called, so that no data are read.

    Raises:
        ValueError: there is no such function, or it does not take the arguments.
    """
    try:
        function = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`data._target_` must name a function to import, got {target!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"`data._target_` must name a function, got {target!r}, which is {function!r}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins do not tell; calling them is then the only check
        return cast(Callable[..., Any], function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"the arguments do not fit `data._target_` {target}: {error}") from error
    return cast(Callable[..., Any], function)


def subset(dataset: Dataset, num_samples: int, *, seed: int) -> Dataset:
    """A seeded random subset, in the original order.

    With one seed a smaller subset is part of every larger one.

    Args:
        dataset: n samples, unchanged.
        num_samples: size of the subset, in 1..n.
        seed: >= 0.

    Raises:
        ValueError: `num_samples` or `seed` is outside its range.
    """
    if not 1 <= num_samples <= len(dataset):
        raise ValueError(f"`data.num_train` must be in 1..{len(dataset)}, got {num_samples}")
    if seed < 0:
        raise ValueError(f"`seed` must be >= 0, got {seed}")
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(dataset))[:num_samples]
    return dataset.select(np.sort(chosen))


def hold_out(dataset: Dataset, fraction: float, *, seed: int) -> TrainTest:
    """A seeded random part of the training samples as validation set, the rest as training set; order is kept.

    The part does not depend on anything but the number of samples, `fraction` and `seed`.

    Args:
        dataset: n training samples, unchanged.
        fraction: in (0, 1); the nearest integer to fraction * n samples are held out.
        seed: >= 0.

    Raises:
        ValueError: one of the two parts would be empty.
    """
    num_held = round(fraction * len(dataset))
    if not 1 <= num_held < len(dataset):
        raise ValueError(
            f"`data.validation_fraction` must hold out between 1 and {len(dataset) - 1} of {len(dataset)} training "
            f"samples, got {fraction!r}, which is {num_held}"
        )
    order = np.random.default_rng([_HELD_OUT, seed]).permutation(len(dataset))
    return TrainTest(dataset.select(np.sort(order[num_held:])), dataset.select(np.sort(order[:num_held])))


def _idx_set(
    name: str,
    root: str | Path | None,
    folders: tuple[str, ...],
    scale: tuple[tuple[float, ...], tuple[float, ...]],
) -> TrainTest:
    root = default_root() if root is None else Path(root).expanduser()
    for folder in (*(root / relative for relative in folders), root):
        found = [_existing(folder, file, ".gz") for file in _IDX_FILES]
        paths = [path for path in found if path is not None]
        if len(paths) == len(_IDX_FILES):
            train, test = readers.read_idx_images(*paths[:2]), readers.read_idx_images(*paths[2:])
            return TrainTest(
                _standardised(f"{name} train set in {folder}", train[0][:, None], train[1], scale),
                _standardised(f"{name} test set in {folder}", test[0][:, None], test[1], scale),
            )
    raise _missing(name, _IDX_FILES, ".gz", root / folders[0])


def _standardised(
    name: str,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.uint8],
    scale: tuple[tuple[float, ...], tuple[float, ...]],
) -> Dataset:
    """Ten-class images [n, channels, height, width] as (x / 255 - mean) / deviation, checked."""
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in scale)
    inputs = torch.from_numpy(images.astype(np.float32)).div_(255).sub_(mean).div_(deviation)
    dataset = Dataset(inputs, torch.from_numpy(labels.astype(np.int64)), num_classes=10)
    dataset.validate(name)
    return dataset


def _existing(folder: Path, name: str, suffix: str) -> Path | None:
    """The file `name` in `folder`, plain or compressed, if it is there."""
    return next((path for path in (folder / name, folder / (name + suffix)) if path.is_file()), None)


def _missing(name: str, files: Sequence[str], suffix: str, folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{name} not found: put {', '.join(files)} (each plain or {suffix}) into {folder.absolute()}, or set "
        f"`data.root`, by default the environment's PISA_DATA, else ~/.cache/pisa_dist"
    )
