"""How different the workers' shards are: class counts and measures of label and size skew."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

_Counts = npt.NDArray[np.int64]
_Shares = npt.NDArray[np.float64]


def class_counts(
    targets: Sequence[int] | npt.NDArray[np.integer] | Tensor,
    parts: Sequence[Sequence[int]],
    num_classes: int,
) -> _Counts:
    """Samples of each class that each worker holds.

    Args:
        targets: class of each sample, n integers in 0..num_classes-1.
        parts: one sequence of indices into `targets` per worker, as a split returns them.
        num_classes: C >= 1.

    Returns:
        Counts, shape [workers, C].

    Raises:
        ValueError: a label is outside 0..num_classes-1.
    """
    labels = targets.detach().cpu().numpy() if isinstance(targets, Tensor) else np.asarray(targets)
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}")
    counts = np.zeros((len(parts), num_classes), dtype=np.int64)
    for worker, part in enumerate(parts):
        counts[worker] = np.bincount(labels[np.asarray(part, dtype=np.int64)], minlength=num_classes)
    return counts


def skew_measures(counts: npt.ArrayLike) -> dict[str, float]:
    """Label skew and size skew of a split, each 0 for one worker or equal shards.

    Args:
        counts: samples of each class per worker, shape [workers, classes], as from `class_counts`.

    Returns:
        `hellinger` and `jensen_shannon`, means over all pairs of workers of the distance between their label
        distributions, in [0, 1] (1: no class in common; Jensen-Shannon is the square root of the divergence
        in bits); and `size_variation` >= 0, the standard deviation of the shard sizes over their mean.

    Raises:
        ValueError: counts are not a matrix, negative, or zero for a whole worker.
    """
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2 or table.size == 0 or not (np.isfinite(table).all() and table.min() >= 0):
        raise ValueError(f"counts must be >= 0 with shape [workers, classes], got shape {table.shape}")
    sizes = table.sum(axis=1)
    if sizes.min() == 0:
        raise ValueError(f"worker {int(sizes.argmin())} has no samples, so that its skew is undefined")
    shares = table / sizes[:, None]
    return {
        "hellinger": _mean_over_pairs(_hellinger, shares),
        "jensen_shannon": _mean_over_pairs(_jensen_shannon, shares),
        "size_variation": float(sizes.std() / sizes.mean()),
    }


def _mean_over_pairs(distance: Callable[[_Shares, _Shares], _Shares], shares: _Shares) -> float:
    """Mean distance over unordered pairs of rows; one row at a time, since all pairs at once can fill memory."""
    num_workers = len(shares)
    if num_workers == 1:
        return 0.0
    total = sum(float(distance(shares[i], shares[i + 1 :]).sum()) for i in range(num_workers - 1))
    return total / (num_workers * (num_workers - 1) / 2)


def _hellinger(one: _Shares, others: _Shares) -> _Shares:
    """sqrt(sum_c (sqrt p_c - sqrt q_c)^2 / 2) of p `one` [classes] and each q of `others` [k, classes]."""
    squares = (np.sqrt(others) - np.sqrt(one)) ** 2
    # Rounding can pass the ends of [0, 1] by an ulp.
    distances: _Shares = np.sqrt(np.clip(squares.sum(axis=1) / 2, 0.0, 1.0))
    return distances


def _jensen_shannon(one: _Shares, others: _Shares) -> _Shares:
    """sqrt(KL(p || m) / 2 + KL(q || m) / 2) in bits, m = (p + q) / 2; shapes as in `_hellinger`."""
    middle = (one + others) / 2
    divergence = _relative_entropy(np.broadcast_to(one, others.shape), middle) + _relative_entropy(others, middle)
    distances: _Shares = np.sqrt(np.clip(divergence / 2, 0.0, 1.0))
    return distances


def _relative_entropy(shares: _Shares, reference: _Shares) -> _Shares:
    """KL divergence in bits of each row of `shares` from that of `reference`, with 0 log 0 = 0."""
    ratio = np.divide(shares, reference, out=np.ones_like(reference), where=shares > 0)
    row_sums: _Shares = (shares * np.log2(ratio)).sum(axis=1)
    return row_sums
