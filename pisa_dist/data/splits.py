"""Splits of a training set over workers: (labels, seed) -> one list of sample indices per worker.

Pure functions: none reads or changes global random state, and the same arguments give the same split on
every rank. Index for index they are the partitions of NIID-Bench (Li, Diao, Chen, He, "Federated Learning
on Non-IID Data Silos: An Experimental Study", ICDE 2022) run with `numpy.random.seed(seed)` and
`random.seed(seed)`; where NIID-Bench crashes or never returns, these raise ValueError after a bounded search.
"""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

Labels = Sequence[int] | npt.NDArray[np.integer] | Tensor
Parts = list[list[int]]
_Indices = npt.NDArray[np.int64]

MIN_SAMPLES = 10
"""Least number of samples of a worker that `dirichlet` and `quantity` accept, as in NIID-Bench."""

MAX_TRIES = 10_000
"""Draws after which `label_k` and `dirichlet` give up; NIID-Bench would crash or go on for ever."""

MAX_QUANTITY_TRIES = 1_000_000
"""The same for `quantity`, whose draws are cheaper and fail more often."""

MAX_SEED = 2**32 - 1
"""Largest seed of numpy's legacy generator, whose stream the splits follow."""


def iid(labels: Labels, num_workers: int, *, seed: int) -> Parts:
    """Uniformly random shards of equal size (the sizes differ by at most one).

    Args:
        labels: class of each sample, n integers >= 0; only their number matters here.
        num_workers: number of shards, in 1..n.
        seed: in 0..2**32 - 1.

    Returns:
        One list of sample indices per worker: disjoint, together all of 0..n-1.

    Raises:
        ValueError: a setting is outside its range.
    """
    num_samples = len(_checked_labels(labels, num_workers, seed))
    permutation = np.random.RandomState(seed).permutation(num_samples)
    return [part.tolist() for part in np.array_split(permutation, num_workers)]


def feature_noise(labels: Labels, num_workers: int, *, seed: int) -> Parts:
    """The shards of `iid`; what differs is the noise on their features, see `pisa_dist.data.noise`."""
    return iid(labels, num_workers, seed=seed)


def label_k(
    labels: Labels, num_workers: int, *, seed: int, labels_per_worker: int, num_classes: int | None = None
) -> Parts:
    """Shards of at most k classes each ("#C = k").

    Worker i owns class i mod C and k-1 further classes drawn at random; each class is shuffled and divided
    evenly among its owners. With fewer workers than classes a draw may leave a class without an owner:
    the classes are then drawn again, from the continuing stream.

    Args:
        labels: class of each sample, n integers in 0..C-1.
        num_workers: m, in 1..n.
        seed: in 0..2**32 - 1.
        labels_per_worker: k, in 1..C, with k m >= C.
        num_classes: C; default: the largest label plus one.

    Returns:
        One list of sample indices per worker: disjoint, together all of 0..n-1, none empty.

    Raises:
        ValueError: a setting is outside its range, no draw gave every class an owner, or a worker would end
            without data because its classes have fewer samples than owners.
    """
    targets = _checked_labels(labels, num_workers, seed)
    by_class = _indices_by_class(targets, num_classes)
    if not 1 <= labels_per_worker <= len(by_class):
        raise ValueError(f"`split.labels_per_worker` must be in 1..{len(by_class)}, got {labels_per_worker}")
    if labels_per_worker * num_workers < len(by_class):
        raise ValueError(
            f"`split.labels_per_worker` times `num_workers` must be >= {len(by_class)}, the number of classes, "
            f"so that every class has an owner, got {labels_per_worker} * {num_workers}"
        )
    owners = _draw_owners(random.Random(seed), num_workers, labels_per_worker, len(by_class))
    stream = np.random.RandomState(seed)
    parts: Parts = [[] for _ in range(num_workers)]
    for indices, class_owners in zip(by_class, owners, strict=True):
        stream.shuffle(indices)
        for worker, share in zip(class_owners, np.array_split(indices, len(class_owners)), strict=True):
            parts[worker] += share.tolist()
    if not all(parts):
        raise ValueError(
            f"worker {parts.index([])} would have no samples, because its classes have fewer samples than "
            f"owners: lower `num_workers`, got {num_workers}, or change `split.labels_per_worker`, "
            f"got {labels_per_worker}"
        )
    return parts


def dirichlet(
    labels: Labels,
    num_workers: int,
    *,
    seed: int,
    dirichlet_concentration: float,
    num_classes: int | None = None,
) -> Parts:
    """Shards whose share of each class is drawn from a symmetric Dirichlet distribution.

    Classes are dealt out in order; a worker that already holds n/m samples gets none of the next class.
    The draw is repeated until every worker has at least 10 samples.

    Args:
        labels: class of each sample, n integers in 0..C-1.
        num_workers: m, in 1..n/10.
        seed: in 0..2**32 - 1.
        dirichlet_concentration: > 0; small is skewed, infinity would be iid.
        num_classes: C; default: the largest label plus one.

    Returns:
        One list of sample indices per worker: disjoint, together all of 0..n-1, at least 10 in each.

    Raises:
        ValueError: a setting is outside its range, or no draw gave every worker 10 samples.
    """
    targets = _checked_labels(labels, num_workers, seed)
    _check_concentration(dirichlet_concentration)
    _check_room(len(targets), num_workers)
    by_class = _indices_by_class(targets, num_classes)
    stream = np.random.RandomState(seed)
    for _ in range(MAX_TRIES):
        parts = _dirichlet_try(stream, by_class, np.repeat(dirichlet_concentration, num_workers))
        if parts is not None:
            for part in parts:
                stream.shuffle(part)
            return parts
    raise _gave_up(MAX_TRIES, num_workers, dirichlet_concentration)


def quantity(labels: Labels, num_workers: int, *, seed: int, dirichlet_concentration: float) -> Parts:
    """Shards with iid labels whose sizes are drawn from a symmetric Dirichlet distribution.

    The draw is repeated until every worker's share is at least 10 samples (9 after rounding).

    Args:
        labels: class of each sample, n integers >= 0; only their number matters here.
        num_workers: m, in 1..n/10.
        seed: in 0..2**32 - 1.
        dirichlet_concentration: > 0; small is skewed, infinity would be equal sizes.

    Returns:
        One list of sample indices per worker: disjoint, together all of 0..n-1, none empty.

    Raises:
        ValueError: a setting is outside its range, or no draw gave every worker 10 samples.
    """
    num_samples = len(_checked_labels(labels, num_workers, seed))
    _check_concentration(dirichlet_concentration)
    _check_room(num_samples, num_workers)
    stream = np.random.RandomState(seed)
    permutation = stream.permutation(num_samples)
    concentrations = np.repeat(dirichlet_concentration, num_workers)
    for _ in range(MAX_QUANTITY_TRIES):
        proportions = stream.dirichlet(concentrations)
        total = proportions.sum()
        if not 0 < total < math.inf:  # the draw underflowed
            continue
        proportions /= total
        if proportions.min() * num_samples >= MIN_SAMPLES:
            cuts = (np.cumsum(proportions) * num_samples).astype(int)[:-1]
            return [part.tolist() for part in np.split(permutation, cuts)]
    raise _gave_up(MAX_QUANTITY_TRIES, num_workers, dirichlet_concentration)


SPLITS: dict[str, Callable[..., Parts]] = {
    "iid": iid,
    "label_k": label_k,
    "dirichlet": dirichlet,
    "quantity": quantity,
    "feature_noise": feature_noise,
}
"""Splits by the name that `split=` takes on the command line."""


def _dirichlet_try(
    stream: np.random.RandomState, by_class: list[_Indices], concentrations: npt.NDArray[np.float64]
) -> Parts | None:
    """One draw of `dirichlet`; None where a worker gets too few samples or a class cannot be dealt out."""
    num_workers, num_samples = len(concentrations), sum(map(len, by_class))
    sizes = np.zeros(num_workers, dtype=np.int64)
    deals: list[tuple[_Indices, _Indices]] = []
    possible = True
    for indices in by_class:
        # A failed try still makes all its draws: the next one must start where NIID-Bench's would.
        shuffled = indices.copy()
        stream.shuffle(shuffled)
        proportions = stream.dirichlet(concentrations)
        proportions[sizes >= num_samples / num_workers] = 0.0
        total = proportions.sum()
        # All belongs to workers that are full, or the draw underflowed: tiny concentrations give 0/0 and 1/0.
        if not 0 < total < math.inf:
            possible = possible and len(shuffled) == 0
            continue
        cuts = (np.cumsum(proportions / total) * len(shuffled)).astype(int)[:-1]
        sizes += np.diff(cuts, prepend=0, append=len(shuffled))
        deals.append((shuffled, cuts))
    if not possible or sizes.min() < MIN_SAMPLES:
        return None
    shares = [np.split(shuffled, cuts) for shuffled, cuts in deals]
    return [np.concatenate(worker_shares).tolist() for worker_shares in zip(*shares, strict=True)]


def _draw_owners(stream: random.Random, num_workers: int, labels_per_worker: int, num_classes: int) -> list[list[int]]:
    """Workers that own each class, in worker order; no class is without one."""
    if labels_per_worker == num_classes:
        return [list(range(num_workers)) for _ in range(num_classes)]
    for _ in range(MAX_TRIES):
        owners: list[list[int]] = [[] for _ in range(num_classes)]
        for worker in range(num_workers):
            own = {worker % num_classes}
            while len(own) < labels_per_worker:
                own.add(stream.randint(0, num_classes - 1))
            for label in own:
                owners[label].append(worker)
        if all(owners):
            return owners
    raise ValueError(
        f"`split.labels_per_worker` {labels_per_worker} is too low for `num_workers` {num_workers}: in "
        f"{MAX_TRIES} draws one of the {num_classes} classes was always without an owner"
    )


def _checked_labels(labels: Labels, num_workers: int, seed: int) -> _Indices:
    """Labels as an int64 vector, after the checks that every split makes."""
    targets = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if targets.ndim != 1 or targets.size == 0:
        raise ValueError(f"labels must be a vector of at least one integer, got shape {targets.shape}")
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {targets.dtype}")
    if targets.min() < 0:
        raise ValueError(f"labels must be >= 0, got {targets.min()}")
    if not 1 <= num_workers <= len(targets):
        raise ValueError(f"`num_workers` must be in 1..{len(targets)}, the number of samples, got {num_workers}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"`seed` must be in 0..{MAX_SEED} for a split, got {seed}")
    return targets.astype(np.int64)


def _indices_by_class(targets: _Indices, num_classes: int | None) -> list[_Indices]:
    """Indices of the samples of each class, ascending."""
    largest = int(targets.max())
    if num_classes is None:
        num_classes = largest + 1
    elif largest >= num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {largest}")
    return [np.flatnonzero(targets == label).astype(np.int64) for label in range(num_classes)]


def _check_concentration(dirichlet_concentration: float) -> None:
    if not (math.isfinite(dirichlet_concentration) and dirichlet_concentration > 0):
        raise ValueError(f"`split.dirichlet_concentration` must be > 0 and finite, got {dirichlet_concentration}")


def _check_room(num_samples: int, num_workers: int) -> None:
    if MIN_SAMPLES * num_workers > num_samples:
        raise ValueError(
            f"`num_workers` must be at most {num_samples // MIN_SAMPLES} for a Dirichlet split of {num_samples} "
            f"samples ({MIN_SAMPLES} for each worker), got {num_workers}"
        )


def _gave_up(num_tries: int, num_workers: int, dirichlet_concentration: float) -> ValueError:
    return ValueError(
        f"`split.dirichlet_concentration` {dirichlet_concentration} is too low for `num_workers` {num_workers}: "
        f"in {num_tries} draws some worker always had fewer than {MIN_SAMPLES} samples"
    )
