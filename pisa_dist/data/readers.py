"""Readers of data: IDX, CIFAR-10's binary version and LIBSVM files, and arrays that a user's function returns.

Files may be compressed; nothing is unpickled. Every reader raises a ValueError of one line that names the
file or the object, what it expected and what it found.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_Bytes = npt.NDArray[np.uint8]
_IDX_UNSIGNED_BYTE = 0x08
CIFAR_RECORD = 1 + 3 * 32 * 32
"""Bytes of a CIFAR-10 record: the label, then a red, a green and a blue plane of 32 x 32."""


class SparseSamples(NamedTuple):
    """Content of a LIBSVM file: features [n, d], float64, columns numbered as in the file; labels [n], int64."""

    features: "csr_matrix"
    labels: npt.NDArray[np.int64]

    def dense(self, first: int, num_features: int) -> npt.NDArray[np.float32]:
        """Features as a dense matrix [n, num_features] whose column 0 is the file's column `first`."""
        num_samples = len(self.labels)
        matrix = np.zeros((num_samples, num_features), dtype=np.float32)
        rows = np.repeat(np.arange(num_samples), np.diff(self.features.indptr))
        matrix[rows, self.features.indices - first] = self.features.data
        return matrix


def read_bytes(path: Path) -> bytes:
    """Content of a file, decompressed where its name ends in .gz, .bz2 or .xz.

    Raises:
        ValueError: the compressed data are corrupt, cut short or followed by something else.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path.absolute()}")
    content = path.read_bytes()
    try:
        match path.suffix:
            case ".gz":
                return gzip.decompress(content)
            case ".bz2":
                return _decompress_streams(content, bz2.BZ2Decompressor)
            case ".xz":
                return _decompress_streams(content, lzma.LZMADecompressor)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: corrupt or truncated {path.suffix} data: {error}") from error
    return content


def read_idx(path: Path, num_dimensions: int) -> _Bytes:
    """Array of unsigned bytes in an IDX file (big endian: magic number, sizes, values).

    Args:
        path: an IDX file, plain or compressed.
        num_dimensions: 1 for labels, 3 for images.

    Returns:
        Values, uint8, with the sizes that the header states; read-only.

    Raises:
        ValueError: wrong magic number, or more or fewer values than the header states.
    """
    content = read_bytes(path)
    header_size = 4 * (1 + num_dimensions)
    if len(content) < header_size:
        raise ValueError(f"{path}: expected an IDX header of {header_size} bytes, found {len(content)} bytes")
    magic, *shape = (int(word) for word in np.frombuffer(content, dtype=">u4", count=1 + num_dimensions))
    expected_magic = (_IDX_UNSIGNED_BYTE << 8) | num_dimensions
    if magic != expected_magic:
        raise ValueError(f"{path}: expected IDX magic number {expected_magic}, found {magic}")
    expected_size = header_size + int(np.prod(shape, dtype=object))
    if len(content) != expected_size:
        sizes = " x ".join(map(str, shape))
        raise ValueError(f"{path}: expected {expected_size} bytes for {sizes} values, found {len(content)}")
    return np.frombuffer(content, dtype=np.uint8, offset=header_size).reshape(shape)


def read_idx_images(images_path: Path, labels_path: Path) -> tuple[_Bytes, _Bytes]:
    """Images [n, 28, 28] and labels [n] of a pair of IDX files, uint8.

    Raises:
        ValueError: as `read_idx`; or images of another size, or another number of labels than of images.
    """
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{images_path}: expected images of 28 x 28, found {images.shape[1]} x {images.shape[2]}")
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: expected {len(images)} labels, one for each image, found {len(labels)}")
    return images, labels


def read_cifar10(path: Path) -> tuple[_Bytes, _Bytes]:
    """Images [n, 3, 32, 32] and labels [n] of a file of CIFAR-10's binary version, uint8.

    Raises:
        ValueError: the file is empty or not a whole number of records.
    """
    content = read_bytes(path)
    if not content or len(content) % CIFAR_RECORD:
        raise ValueError(f"{path}: expected a multiple of {CIFAR_RECORD} bytes, found {len(content)}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, CIFAR_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def read_libsvm(path: Path) -> SparseSamples:
    """Samples of a LIBSVM (svmlight) file: lines of `label index:value index:value ...`.

    Raises:
        ValueError: no samples, a malformed line, labels that are not integers, or features that are not
            finite in float32.
    """
    from sklearn.datasets import load_svmlight_file  # slow to import, and only this format needs it

    content = read_bytes(path)
    try:
        # Columns as written: one file alone cannot tell whether the set counts from 0 or from 1.
        features, values = load_svmlight_file(io.BytesIO(content), zero_based=True)
    except (ValueError, OverflowError) as error:
        line = _first_bad_line(content.split(b"\n"))
        raise ValueError(f"{path}: line {line} is not `label index:value ...`: {error}") from error
    if len(values) == 0:
        raise ValueError(f"{path}: expected at least one sample, found none")
    not_integer = np.flatnonzero(~(np.isfinite(values) & (values == np.round(values)) & (np.abs(values) < 2**53)))
    if len(not_integer):
        sample = not_integer[0]
        raise ValueError(f"{path}: expected integer labels, found {values[sample]} at sample {sample}")
    # Written so that NaN fails too.
    unbounded = np.flatnonzero(~(np.abs(features.data) <= np.finfo(np.float32).max))
    if len(unbounded):
        sample = int(np.searchsorted(features.indptr, unbounded[0], side="right")) - 1
        raise ValueError(
            f"{path}: expected finite float32 features, found {features.data[unbounded[0]]} at sample {sample}"
        )
    return SparseSamples(features, values.astype(np.int64))


def read_object(part: object, name: str, *, keep_integers: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs [n, ...], float32 or int64, and targets [n], int64, of a set that a user's function returned.

    Args:
        part: a tuple (inputs, targets) of arrays or tensors, or a map-style data set of (input, target) pairs.
        name: what messages call it.
        keep_integers: whether integer inputs stay integers.

    Raises:
        ValueError: something else, no samples, targets that are not a vector of integers, or inputs that are
            not numbers or differ in shape.
    """
    if isinstance(part, tuple):
        if len(part) != 2:
            raise ValueError(f"{name}: expected (inputs, targets), found a tuple of {len(part)}")
        inputs, targets = _tensor(part[0], f"{name}: inputs"), _tensor(part[1], f"{name}: targets")
    elif hasattr(part, "__getitem__") and hasattr(part, "__len__") and not isinstance(part, Mapping):
        inputs, targets = _stack_pairs(part, name)
    else:
        raise ValueError(f"{name}: expected (inputs, targets) or a map-style data set, found {type(part).__name__}")
    if targets.ndim != 1 or len(targets) == 0:
        raise ValueError(f"{name}: expected targets of shape [n], n >= 1, found {list(targets.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"{name}: expected integer targets, found {targets.dtype}")
    if inputs.ndim < 2 or inputs.is_complex():
        raise ValueError(
            f"{name}: expected real inputs of shape [n, ...], found {inputs.dtype} of shape {list(inputs.shape)}"
        )
    is_integer = not inputs.is_floating_point() and inputs.dtype != torch.bool
    return inputs.to(torch.int64 if keep_integers and is_integer else torch.float32), targets.to(torch.int64)


def _stack_pairs(pairs: Any, name: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a map-style data set."""
    if len(pairs) == 0:
        raise ValueError(f"{name}: expected at least one sample, found none")
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for sample in range(len(pairs)):
        pair = pairs[sample]
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{name}: expected (input, target) at sample {sample}, found {type(pair).__name__}")
        for values, value, kind in ((inputs, pair[0], "input"), (targets, pair[1], "target")):
            values.append(_tensor(value, f"{name}: {kind} of sample {sample}"))
            if values[-1].shape != values[0].shape:
                shapes = f"{list(values[0].shape)} as at sample 0, found {list(values[-1].shape)}"
                raise ValueError(f"{name}: expected {kind} of sample {sample} to have shape {shapes}")
    return torch.stack(inputs), torch.stack(targets)


def _tensor(value: Any, name: str) -> Tensor:
    """A CPU tensor of an array, a tensor or nested lists of numbers."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        # A copy, because torch does not take read-only arrays nor negative strides.
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected numbers in an array or tensor, found {type(value).__name__}") from error


def _decompress_streams(content: bytes, decompressor: type[bz2.BZ2Decompressor] | type[lzma.LZMADecompressor]) -> bytes:
    """Decompress a file of one or more streams; unlike `lzma.decompress`, refuse anything after the last."""
    decoded = []
    while True:
        stream = decompressor()
        decoded.append(stream.decompress(content))
        if not stream.eof:
            raise EOFError("the data end before the end of the stream")
        content = stream.unused_data.lstrip(b"\0")  # xz pads streams with zero bytes
        if not content:
            return b"".join(decoded)


def _first_bad_line(lines: list[bytes]) -> int:
    """Number, from 1, of the first line that does not parse, by bisection: lines are independent."""
    from sklearn.datasets import load_svmlight_file

    good, bad = 0, len(lines)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            load_svmlight_file(io.BytesIO(b"\n".join(lines[good:middle])), zero_based=True)
            good = middle
        except (ValueError, OverflowError):
            bad = middle
    return bad
