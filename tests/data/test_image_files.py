"""MNIST, Fashion-MNIST and CIFAR-10 as users have them on disk, and one-line refusals of damaged files."""

import gzip
import logging
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pisa_dist.data.datasets import TrainTest, cifar10, fashion_mnist, mnist

Refused = Callable[[type[Exception], Callable[[], object]], str]

RANDOM = np.random.default_rng(0)
IMAGES = {name: RANDOM.integers(0, 256, (size, 28, 28), dtype=np.uint8) for name, size in [("train", 7), ("t10k", 5)]}
LABELS = {name: np.arange(len(images), dtype=np.uint8) for name, images in IMAGES.items()}
RECORDS = RANDOM.integers(0, 256, (6, 3073), dtype=np.uint8)
RECORDS[:, 0] = np.arange(6)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
}


def idx(array: np.ndarray) -> bytes:
    header = [0x0800 + array.ndim, *array.shape]
    return np.array(header, dtype=">u4").tobytes() + array.tobytes()


def write_idx_set(folder: Path, suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in IMAGES:
        (folder / f"{name}-images-idx3-ubyte{suffix}").write_bytes(COMPRESS[suffix](idx(IMAGES[name])))
        (folder / f"{name}-labels-idx1-ubyte{suffix}").write_bytes(COMPRESS[suffix](idx(LABELS[name])))
    return folder


def write_cifar(folder: Path, suffix: str = "", batches: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in batches:
        rolled = np.roll(RECORDS, number, axis=0).tobytes()
        (folder / f"data_batch_{number}.bin{suffix}").write_bytes(COMPRESS[suffix](rolled))
    (folder / f"test_batch.bin{suffix}").write_bytes(COMPRESS[suffix](RECORDS[:4].tobytes()))
    return folder


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("load", "folder", "mean", "deviation"),
    [
        (mnist, "mnist", 0.1307, 0.3081),
        (mnist, "MNIST/raw", 0.1307, 0.3081),
        (mnist, ".", 0.1307, 0.3081),
        (fashion_mnist, "fashion-mnist", 0.2860, 0.3530),
        (fashion_mnist, "FashionMNIST/raw", 0.2860, 0.3530),
        (fashion_mnist, ".", 0.2860, 0.3530),
    ],
)
def test_idx_sets_are_found_in_every_layout_and_standardised(
    load: Callable[..., TrainTest], folder: str, mean: float, deviation: float, suffix: str, tmp_path: Path
) -> None:
    write_idx_set(tmp_path / folder, suffix)
    for part, name in zip(load(tmp_path), ("train", "t10k"), strict=True):
        expected = (IMAGES[name].astype(np.float64)[:, None] / 255 - mean) / deviation
        np.testing.assert_allclose(part.inputs.numpy(), expected, rtol=1e-5, atol=1e-6)
        assert part.targets.tolist() == LABELS[name].tolist()
        assert part.inputs.dtype == torch.float32
        assert part.targets.dtype == torch.int64
        assert part.num_classes == 10


def test_the_root_defaults_to_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PISA_DATA", str(tmp_path))
    write_idx_set(tmp_path / "mnist")
    write_cifar(tmp_path / "cifar10")
    assert len(mnist().train) == 7
    assert len(cifar10().test) == 4


@pytest.mark.parametrize(
    ("load", "folder", "file"),
    [
        (mnist, "mnist", "t10k-labels-idx1-ubyte"),
        (fashion_mnist, "fashion-mnist", "train-images-idx3-ubyte"),
        (cifar10, "cifar10", "data_batch_1.bin"),
    ],
)
def test_a_missing_set_says_which_files_go_where(
    refused: Refused,
    load: Callable[..., TrainTest],
    folder: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(FileNotFoundError, lambda: load("nowhere"))
    for part in (str(tmp_path / "nowhere" / folder), file, "`data.root`", "PISA_DATA"):
        assert part in message


def test_an_incomplete_set_is_missing(refused: Refused, tmp_path: Path) -> None:
    (write_idx_set(tmp_path / "mnist") / "t10k-labels-idx1-ubyte").unlink()
    assert "t10k-labels-idx1-ubyte" in refused(FileNotFoundError, lambda: mnist(tmp_path))
    (write_cifar(tmp_path / "cifar10") / "test_batch.bin").unlink()
    assert "test_batch.bin" in refused(FileNotFoundError, lambda: cifar10(tmp_path))


LABEL_FILE, IMAGE_FILE = "train-labels-idx1-ubyte", "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (LABEL_FILE, b"", "expected an IDX header of 8 bytes, found 0 bytes"),
        (IMAGE_FILE, idx(IMAGES["train"])[:15], "expected an IDX header of 16 bytes, found 15 bytes"),
        (IMAGE_FILE, idx(IMAGES["train"])[:-1], "expected 5504 bytes for 7 x 28 x 28 values, found 5503"),
        (IMAGE_FILE, idx(IMAGES["train"]) + b"\0", "expected 5504 bytes for 7 x 28 x 28 values, found 5505"),
        (LABEL_FILE, idx(LABELS["train"]) + b"\n", "expected 15 bytes for 7 values, found 16"),
        (LABEL_FILE, b"\xff" * 8, "expected IDX magic number 2049, found 4294967295"),
        (IMAGE_FILE, idx(LABELS["train"]) + bytes(20), "expected IDX magic number 2051, found 2049"),
        (IMAGE_FILE, b"\0\0\x08\x03" + b"\xff" * 12, "4294967295 x 4294967295 x 4294967295 values, found 16"),
        (IMAGE_FILE, idx(IMAGES["train"][:, :27]), "expected images of 28 x 28, found 27 x 28"),
        (LABEL_FILE, idx(LABELS["train"][:6]), "expected 7 labels, one for each image, found 6"),
        (f"{LABEL_FILE}.gz", idx(LABELS["train"]), "corrupt or truncated .gz data: "),
        (f"{LABEL_FILE}.gz", gzip.compress(idx(LABELS["train"]), mtime=0)[:-9], "corrupt or truncated .gz data: "),
        (f"{LABEL_FILE}.gz", gzip.compress(idx(LABELS["train"]), mtime=0) + b"more", "corrupt or truncated .gz data: "),
        (
            f"{LABEL_FILE}.gz",
            gzip.compress(idx(LABELS["train"]), mtime=0)[:12]
            + b"\xff\xff"
            + gzip.compress(idx(LABELS["train"]), mtime=0)[14:],
            "corrupt or truncated .gz data: ",
        ),
    ],
)
def test_a_damaged_idx_file_is_refused_by_name(
    refused: Refused, file: str, content: bytes, message: str, tmp_path: Path
) -> None:
    folder = write_idx_set(tmp_path / "mnist")
    (folder / file.removesuffix(".gz")).unlink()
    (folder / file).write_bytes(content)
    found = refused(ValueError, lambda: mnist(tmp_path))
    assert found.startswith(f"{folder / file}: ")
    assert message in found


@pytest.mark.parametrize("load", [mnist, fashion_mnist])
def test_labels_above_nine_and_empty_idx_sets_are_refused(
    refused: Refused, load: Callable[..., TrainTest], tmp_path: Path
) -> None:
    write_idx_set(tmp_path)
    (tmp_path / LABEL_FILE).write_bytes(idx(LABELS["train"] + 4))
    message = refused(ValueError, lambda: load(tmp_path))
    assert f"train set in {tmp_path}: label of sample 6 must be in 0..9, got 10" in message
    (tmp_path / LABEL_FILE).write_bytes(idx(LABELS["train"][:0]))
    (tmp_path / IMAGE_FILE).write_bytes(idx(IMAGES["train"][:0]))
    assert "no samples" in refused(ValueError, lambda: load(tmp_path))


# CIFAR-10


@pytest.mark.parametrize("suffix", ["", ".xz"])
@pytest.mark.parametrize("folder", ["cifar10", "cifar-10-batches-bin", "."])
@pytest.mark.parametrize("batches", [(1, 2, 3, 4, 5), (2, 4), (5,)])
def test_cifar10_takes_the_training_files_that_are_there_and_says_how_many(
    folder: str, suffix: str, batches: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_cifar(tmp_path / folder, suffix, batches)
    with caplog.at_level(logging.INFO, logger="pisa_dist.data.datasets"):
        train, test = cifar10(tmp_path)
    assert f"{6 * len(batches)} training samples, {len(batches)} of 5 files" in caplog.text
    records = np.concatenate([np.roll(RECORDS, number, axis=0) for number in batches])
    for part, expected in ((train, records), (test, RECORDS[:4])):
        pixels = expected[:, 1:].reshape(-1, 3, 32, 32) / 255
        mean = np.array([0.4914, 0.4822, 0.4465])[:, None, None]
        deviation = np.array([0.2470, 0.2435, 0.2616])[:, None, None]
        np.testing.assert_allclose(part.inputs.numpy(), (pixels - mean) / deviation, rtol=1e-5, atol=1e-6)
        assert part.targets.tolist() == expected[:, 0].tolist()
        assert (part.inputs.dtype, part.targets.dtype, part.num_classes) == (torch.float32, torch.int64, 10)


XZ = lzma.compress(RECORDS.tobytes())


@pytest.mark.parametrize("content", [XZ + XZ, XZ + bytes(8), XZ + bytes(4) + XZ + bytes(4)])
def test_xz_files_may_have_several_streams_and_padding(content: bytes, tmp_path: Path) -> None:
    write_cifar(tmp_path, batches=())
    (tmp_path / "data_batch_1.bin.xz").write_bytes(content)
    assert len(cifar10(tmp_path).train) == 6 * content.count(XZ)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data_batch_3.bin", b"", "expected a multiple of 3073 bytes, found 0"),
        ("data_batch_3.bin", RECORDS.tobytes()[:-1], "expected a multiple of 3073 bytes, found 18437"),
        ("data_batch_3.bin", RECORDS.tobytes() + b"\n", "expected a multiple of 3073 bytes, found 18439"),
        ("test_batch.bin", RECORDS.tobytes()[:100], "expected a multiple of 3073 bytes, found 100"),
        ("data_batch_3.bin.xz", RECORDS.tobytes(), "corrupt or truncated .xz data: "),
        ("data_batch_3.bin.xz", b"", "corrupt or truncated .xz data: "),
        ("data_batch_3.bin.xz", XZ[:-1], "corrupt or truncated .xz data: "),
        ("data_batch_3.bin.xz", XZ[: len(XZ) // 2], "corrupt or truncated .xz data: "),
        ("data_batch_3.bin.xz", XZ[:100] + b"\xff\0\xff\0" + XZ[104:], "corrupt or truncated .xz data: "),
        ("test_batch.bin.xz", XZ + b"more", "corrupt or truncated .xz data: "),
    ],
)
def test_a_damaged_cifar10_file_is_refused_by_name(
    refused: Refused, file: str, content: bytes, message: str, tmp_path: Path
) -> None:
    folder = write_cifar(tmp_path / "cifar10")
    (folder / file.removesuffix(".xz")).unlink()
    (folder / file).write_bytes(content)
    found = refused(ValueError, lambda: cifar10(tmp_path))
    assert found.startswith(f"{folder / file}: ")
    assert message in found


def test_a_cifar10_label_above_nine_is_refused(refused: Refused, tmp_path: Path) -> None:
    write_cifar(tmp_path)
    records = RECORDS.copy()
    records[2, 0] = 10
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes())
    message = refused(ValueError, lambda: cifar10(tmp_path))
    assert message == f"CIFAR-10 test set in {tmp_path}: label of sample 2 must be in 0..9, got 10"


# Real files


@pytest.fixture
def real_root() -> Path:
    if "PISA_DATA" not in os.environ:
        pytest.skip("needs PISA_DATA")
    return Path(os.environ["PISA_DATA"])


@pytest.mark.parametrize(
    ("load", "scale", "train_labels", "test_labels", "train_mean", "test_mean"),
    [
        (
            mnist,
            (0.1307, 0.3081),
            [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
            0.13066,
            0.13251,
        ),
        (fashion_mnist, (0.2860, 0.3530), [6000] * 10, [1000] * 10, 0.28604, 0.28685),
    ],
)
def test_the_real_idx_sets_have_their_published_counts_and_means(
    load: Callable[..., TrainTest],
    scale: tuple[float, float],
    train_labels: list[int],
    test_labels: list[int],
    train_mean: float,
    test_mean: float,
    real_root: Path,
) -> None:
    train, test = load(real_root)
    assert train.inputs.shape == (60_000, 1, 28, 28)
    assert test.inputs.shape == (10_000, 1, 28, 28)
    assert train.targets.bincount().tolist() == train_labels
    assert test.targets.bincount().tolist() == test_labels
    for part, mean in ((train, train_mean), (test, test_mean)):
        assert float(part.inputs.double().mean() * scale[1] + scale[0]) == pytest.approx(mean, abs=1e-5)
    assert float(train.inputs.std()) == pytest.approx(1, abs=1e-3)


def test_the_real_cifar10_has_its_published_counts(real_root: Path) -> None:
    train, test = cifar10(real_root)
    assert test.inputs.shape == (10_000, 3, 32, 32)
    assert test.targets.bincount().tolist() == [1000] * 10
    first_file = [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]
    assert train.targets[:10_000].bincount().tolist() == first_file
    assert len(train) % 10_000 == 0
    assert train.inputs.mean((0, 2, 3)).abs().max() < 0.02
    assert train.inputs.std((0, 2, 3)).sub(1).abs().max() < 0.01
