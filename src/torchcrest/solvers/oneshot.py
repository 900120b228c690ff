"""One coreset of raw features, once, for models with convex losses (CRAIG, arXiv 1906.01827)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcrest.checks import suggest
from torchcrest.errors import ConfigError, DataError, must
from torchcrest.solvers.medoids import shares
from torchcrest.solvers.partitioned import Between, Read, pick_in_parts

__all__ = ["Metric", "coreset"]

Metric = Literal["euclidean", "sqeuclidean", "cosine"]
WHOLE, PART = 20_000, 4096  # a class of more examples than WHOLE is split into parts of PART
ROWS = 1024  # rows read at a time
ENTRIES = 1 << 22  # distances to picks held at a time; above 4096 picks, of fewer rows


@overload
def coreset(
    features: Tensor,
    size: int,
    labels: Tensor | None = None,
    metric: Metric = "euclidean",
    *,
    part_size: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]: ...


@overload
def coreset(
    features: NDArray[Any],
    size: int,
    labels: NDArray[Any] | None = None,
    metric: Metric = "euclidean",
    *,
    part_size: int | None = None,
    seed: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...


def coreset(
    features: Any,
    size: int,
    labels: Any = None,
    metric: Metric = "euclidean",
    *,
    part_size: int | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Pick a weighted subset of the examples that stands for all of them.

    Facility location on distances between features bounds, for a convex loss, the error of the subset's
    weighted gradient for all parameters at once (Mirzasoleiman, Bilmes and Leskovec, 2020).

    A class of up to 20,000 examples (without labels: all of them) is solved whole, in time n^2. For a larger
    one 16 random parts of 4,096 are solved, each for the full size, and 65,536 random examples decide between
    the picks (GreeDi: Mirzasoleiman, Karbasi, Sarkar and Krause, 2013). That keeps nine tenths or more of what
    selection gains over random picks, and takes under 500 MB beside the features (a million of 64 numbers,
    float32); only the weights' time, n times the size, grows with n. A size above that of a part is shared among
    random groups of examples, each solved by itself: about half of the gain is kept.

    Args:
        features: ``[n, d]`` array or tensor, real and finite. It is read by blocks of rows, never copied whole,
            so it may be a memory map, ``np.load(path, mmap_mode="r")``; parts are read in random order.
        size: how many examples to pick, 1 to n.
        labels: ``[n]`` integer classes: each gets its share of the size. None: pick from all alike, as for
            regression (there, appending the target to the features serves).
        metric: ``euclidean``, ``sqeuclidean`` or ``cosine``.
        part_size: the largest number of examples solved at once: classes of more are split into parts of at
            most this many. None: split those of more than 20,000 into parts of 4,096.
        seed: draws the parts. Where nothing is split it makes no difference.

    Returns:
        Indices ``[size]``, int64, ascending, and weights ``[size]``, float64: how many examples each stands
        for, n in all, ready for scikit-learn's ``sample_weight``. Arrays for arrays, tensors (on their
        device) for tensors.

    Raises:
        DataError: features or labels of the wrong shape or kind, or a size that does not fit them.
        ConfigError: unknown metric, or a part size or seed that is no whole number in range.

    >>> coreset(np.array([[0.0], [0.1], [0.2], [9.0]]), 2)
    (array([1, 3]), array([3., 1.]))
    """
    _check_settings(metric, part_size, seed)
    read = _reader(features, metric)
    n = len(features)
    if not _whole(size, 1) or size > n:
        want = f"be a whole number from 1 to the number of examples, {n}"
        raise DataError(must("size", want, size, "Pick no more than there are."))
    classes = torch.zeros(n, dtype=torch.int64) if labels is None else _labels(labels, n)
    between = _metric(metric)
    _, inverse, counts = classes.unique(return_inverse=True, return_counts=True)
    groups = inverse.argsort(stable=True).split(counts.tolist())
    generator = torch.Generator().manual_seed(int(seed))
    picked = torch.zeros(n, dtype=torch.bool)
    for members, quota in zip(groups, shares(counts.numpy(), int(size)).tolist(), strict=True):
        if quota:
            at_once = int(part_size or (WHOLE if len(members) <= WHOLE else PART))
            picked[pick_in_parts(read, members, quota, at_once, between, generator)] = True
    indices = picked.nonzero()[:, 0]
    weights = _weights(read, indices, groups, between)
    if isinstance(features, Tensor):
        return indices.to(features.device), weights.to(features.device)
    return indices.numpy(), weights.numpy()


def _weights(read: Read, indices: Tensor, groups: Sequence[Tensor], between: Between) -> Tensor:
    """Count for each pick the examples of its class that are nearest to it (of any class, if its own has no pick)."""
    weights = torch.zeros(len(indices), dtype=torch.float64)
    place = torch.full((sum(map(len, groups)),), -1)
    place[indices] = torch.arange(len(indices))
    for members in groups:
        own = place[members]
        own = own[own >= 0] if (own >= 0).any() else torch.arange(len(indices))
        medoids = read(indices[own])
        for rows in members.split(max(1, min(ROWS, ENTRIES // len(own)))):
            nearest = own[between(read(rows), medoids).argmin(1).cpu()]
            # A pick stands for itself, before its double does.
            nearest = torch.where(place[rows] >= 0, place[rows], nearest)
            weights += nearest.bincount(minlength=len(indices))
    return weights


def _metric(metric: Metric) -> Between:
    if metric == "euclidean":
        return torch.cdist
    if metric == "sqeuclidean":
        return lambda left, right: torch.cdist(left, right).square_()
    unit = torch.nn.functional.normalize
    return lambda left, right: (unit(left, dim=-1) @ unit(right, dim=-1).mT).neg_().add_(1).clamp_(min=0)


def _check_settings(metric: str, part_size: object, seed: object) -> None:
    problems = []
    if metric not in get_args(Metric):
        want = f"be one of {', '.join(get_args(Metric))}"
        problems.append(must("metric", want, metric, suggest(metric, get_args(Metric))))
    if part_size is not None and not _whole(part_size, 1):
        want = "be a whole number of at least 1, or None"
        problems.append(must("part_size", want, part_size, "None chooses one."))
    if not _whole(seed, 0):
        problems.append(must("seed", "be a whole number of at least 0", seed, "Use for example 0."))
    if problems:
        raise ConfigError(problems)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= least


def _reader(features: Any, metric: Metric) -> Read:
    """Return what reads rows as floats, float64 only where the features are; check all of them, by blocks."""
    if not isinstance(features, Tensor | np.ndarray):
        raise DataError(
            must("features", "be an array or a tensor", type(features).__name__, "Use numpy.asarray(features).")
        )
    if isinstance(features, np.ndarray) and features.dtype.kind not in "fiub":
        raise DataError(must("features", "hold real numbers", str(features.dtype), "Convert them to float32."))
    if features.ndim != 2 or 0 in features.shape or (isinstance(features, Tensor) and features.is_complex()):
        got = tuple(features.shape)
        raise DataError(must("features", "have shape [n, d], real, not empty", got, "Flatten each example to a row."))

    def convert(rows: Tensor) -> Tensor:
        if isinstance(features, Tensor):
            x = features.detach()[rows.to(features.device)]
            return x if x.dtype == torch.float64 else x.float()
        wide = features.dtype.kind == "f" and features.dtype.itemsize >= 8
        return torch.from_numpy(np.asarray(features[rows.numpy()], dtype=np.float64 if wide else np.float32))

    everyone = torch.arange(len(features))
    for rows in everyone.split(ROWS):
        bad = ~convert(rows).isfinite().all(1)
        if bad.any():
            where = f"NaN or infinity in row {int(rows[bad.cpu()][0])}"
            raise DataError(must("features", "be finite", where, "Drop or mend such rows."))
    if metric == "cosine":
        return convert
    # Distances are the same from any origin; far from the origin float32 has no digits left for them.
    origin = convert(everyone[:1])
    return lambda rows: convert(rows) - origin


def _labels(labels: Any, n: int) -> Tensor:
    if not isinstance(labels, Tensor):
        labels = np.asarray(labels)
        if labels.dtype.kind not in "fiubc":
            raise DataError(must("labels", "be integers", str(labels.dtype), "Number the classes from 0."))
        labels = torch.from_numpy(labels.astype(labels.dtype.newbyteorder("=")))
    y: Tensor = labels.detach().cpu()
    if tuple(y.shape) != (n,):
        raise DataError(
            must(
                "labels",
                f"have shape ({n},), one for each row of features",
                tuple(y.shape),
                "Check that both are the same examples.",
            )
        )
    if y.is_floating_point() or y.is_complex():
        raise DataError(must("labels", "be integers", str(y.dtype), "For regression leave labels out."))
    return y.long()
