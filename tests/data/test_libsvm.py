"""LIBSVM files: labels, columns and one-line refusals of damaged files."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pisa_dist.data.datasets import libsvm
from pisa_dist.train import compose_config

Refused = Callable[[type[Exception], Callable[[], object]], str]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def write_pair(folder: Path, train: bytes | str, test: bytes | str, suffix: str = "") -> tuple[Path, Path]:
    paths = folder / f"train.svm{suffix}", folder / f"test.svm{suffix}"
    for path, content in zip(paths, (train, test), strict=True):
        path.write_bytes(COMPRESS[suffix](content.encode() if isinstance(content, str) else content))
    return paths


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_libsvm_columns_count_from_one_and_the_narrower_file_is_padded(suffix: str, tmp_path: Path) -> None:
    paths = write_pair(tmp_path, "+1 2:0.5 4:-1 # comment\r\n-1\r\n", "-1 5:2e-3\n\n+1 2:7", suffix)
    train, test = libsvm(*paths)
    assert torch.equal(train.inputs, torch.tensor([[0, 0.5, 0, -1, 0], [0, 0, 0, 0, 0]]))
    assert torch.equal(test.inputs, torch.tensor([[0, 0, 0, 0, 2e-3], [0, 7, 0, 0, 0]]))
    assert train.targets.tolist() == [1, 0]
    assert test.targets.tolist() == [0, 1]
    for part in (train, test):
        assert (part.inputs.dtype, part.targets.dtype, part.num_classes) == (torch.float32, torch.int64, 2)
        part.validate("libsvm")


@pytest.mark.parametrize(("train", "test"), [("0 0:1 1:2", "1 1:3 2:4"), ("1 1:3 2:4", "0 0:1 1:2")])
def test_libsvm_columns_of_both_files_count_from_zero_if_one_does(train: str, test: str, tmp_path: Path) -> None:
    parts = libsvm(*write_pair(tmp_path, train, test))
    rows = {int(part.targets[0]): part.inputs[0].tolist() for part in parts}
    assert rows == {0: [1, 2, 0], 1: [0, 3, 4]}


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([-1, 1, -1], [1], ([0, 1, 0], [1], 2)),
        ([0, 1], [1], ([0, 1], [1], 2)),
        ([1, 2, 3], [3, 1], ([0, 1, 2], [2, 0], 3)),
        ([7, -3], [100], ([1, 0], [2], 3)),
        ([1], [1], ([0], [0], 1)),
        (["1.0", "2e0"], ["+2"], ([0, 1], [1], 2)),
    ],
)
def test_libsvm_labels_of_both_files_become_classes_in_ascending_order(
    train: list[Any], test: list[Any], expected: tuple[list[int], list[int], int], tmp_path: Path
) -> None:
    lines = ["\n".join(f"{label} 1:1" for label in labels) for labels in (train, test)]
    parts = libsvm(*write_pair(tmp_path, *lines))
    assert (parts.train.targets.tolist(), parts.test.targets.tolist(), parts.train.num_classes) == expected


GOOD_LINES = "1 1:2\n-1 2:1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected at least one sample, found none"),
        ("# only a comment\n\n", "expected at least one sample, found none"),
        (GOOD_LINES + "1 abc\n" + GOOD_LINES, "line 3 is not `label index:value ...`: "),
        (GOOD_LINES * 50 + "1 1:x", "line 101 is not `label index:value ...`: "),
        ("1 1:\n", "line 1 is not"),
        ("hello\n", "line 1 is not"),
        ("1,2 1:3\n", "line 1 is not"),
        ("1 2:1 1:1\n", "line 1 is not"),
        ("1 1:1 1:2\n", "line 1 is not"),
        ("1 -3:1\n", "line 1 is not"),
        (GOOD_LINES + "1 99999999999999999999:1\n", "line 3 is not"),
        (b"\xff\xfe\x00\x01", "line 1 is not"),
        (GOOD_LINES + "0.5 1:1\n", "expected integer labels, found 0.5 at sample 2"),
        ("nan 1:1\n", "expected integer labels, found nan at sample 0"),
        ("inf 1:1\n", "expected integer labels, found inf at sample 0"),
        ("1e300 1:1\n", "expected integer labels, found 1e+300 at sample 0"),
        (GOOD_LINES + "1\n1 1:0 3:nan\n", "expected finite float32 features, found nan at sample 3"),
        ("1 1:1\n1 1:-inf\n", "expected finite float32 features, found -inf at sample 1"),
        ("1 1:1e39\n", "expected finite float32 features, found 1e+39 at sample 0"),
    ],
)
@pytest.mark.parametrize("position", [0, 1])
def test_a_damaged_libsvm_file_is_refused_by_name(
    refused: Refused, content: bytes | str, message: str, position: int, tmp_path: Path
) -> None:
    contents = (content, GOOD_LINES) if position == 0 else (GOOD_LINES, content)
    paths = write_pair(tmp_path, *contents)
    found = refused(ValueError, lambda: libsvm(*paths))
    assert found.startswith(f"{paths[position]}: ")
    assert message in found


def test_libsvm_files_that_are_missing_or_compressed_wrongly_are_refused_by_name(
    refused: Refused, tmp_path: Path
) -> None:
    train, test = write_pair(tmp_path, GOOD_LINES, GOOD_LINES)
    missing = tmp_path / "absent.svm"
    assert refused(FileNotFoundError, lambda: libsvm(train, missing)) == f"no such file: {missing}"
    assert refused(FileNotFoundError, lambda: libsvm(tmp_path, test)) == f"no such file: {tmp_path}"
    for suffix in (".gz", ".bz2", ".xz"):
        damaged = tmp_path / f"damaged{suffix}"
        damaged.write_bytes(COMPRESS[suffix](GOOD_LINES.encode())[:-2])
        message = refused(ValueError, lambda path=damaged: libsvm(path, test))
        assert message.startswith(f"{damaged}: corrupt or truncated {suffix} data: ")


def test_libsvm_files_without_features_are_refused(refused: Refused, tmp_path: Path) -> None:
    paths = write_pair(tmp_path, "1\n2\n", "1\n")
    assert "found labels only" in refused(ValueError, lambda: libsvm(*paths))


def test_a_libsvm_set_too_wide_for_memory_is_refused_before_it_is_made_dense(refused: Refused, tmp_path: Path) -> None:
    paths = write_pair(tmp_path, "1 2000000000:1\n", "2 1:1\n")
    message = refused(ValueError, lambda: libsvm(*paths))
    assert "2000000000 dense features would take 14.9 GiB" in message
    assert "8 GiB" in message
    assert str(paths[0]) in message


def test_relative_files_are_found_below_pisa_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("1 1:2\n")
    monkeypatch.setenv("PISA_DATA", str(tmp_path))
    data = compose_config(["data=libsvm", "data.train_file=a", "data.test_file=a"]).data
    assert vars(data)["train_file"] == str(tmp_path / "a")
