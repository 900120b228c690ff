"""One coreset of raw features, once, for models with convex losses (CRAIG, arXiv 1906.01827)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcrest.config import suggest
from torchcrest.errors import ConfigError, DataError, must
from torchcrest.solvers.distance import distances
from torchcrest.solvers.facility import lazy_greedy
from torchcrest.solvers.medoids import shares

__all__ = ["Metric", "coreset"]

Metric = Literal["euclidean", "sqeuclidean", "cosine"]
ROWS = 1024  # members compared with all medoids at a time


@overload
def coreset(
    features: Tensor, size: int, labels: Tensor | None = None, metric: Metric = "euclidean"
) -> tuple[Tensor, Tensor]: ...


@overload
def coreset(
    features: NDArray[Any], size: int, labels: NDArray[Any] | None = None, metric: Metric = "euclidean"
) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...


def coreset(features: Any, size: int, labels: Any = None, metric: Metric = "euclidean") -> tuple[Any, Any]:
    """Pick a weighted subset of the examples that stands for all of them.

    Facility location on distances between features bounds, for a convex loss, the error of the subset's
    weighted gradient for all parameters at once (Mirzasoleiman, Bilmes and Leskovec, 2020). Similarities
    are computed as they are needed: memory is some ``[512, n]``, time about n^2 for the first picks.

    Args:
        features: ``[n, d]`` array or tensor, real and finite.
        size: how many examples to pick, 1 to n.
        labels: ``[n]`` integer classes: each gets its share of the size. None: pick from all alike, as for
            regression (there, appending the target to the features serves).
        metric: ``euclidean``, ``sqeuclidean`` or ``cosine``.

    Returns:
        Indices ``[size]``, int64, ascending, and weights ``[size]``, float64: how many examples each stands
        for, n in all, ready for scikit-learn's ``sample_weight``. Arrays for arrays, tensors (on their
        device) for tensors.

    Raises:
        DataError: features or labels of the wrong shape or kind, or a size that does not fit them.
        ConfigError: unknown metric.

    >>> coreset(np.array([[0.0], [0.1], [0.2], [9.0]]), 2)
    (array([1, 3]), array([3., 1.]))
    """
    if metric not in get_args(Metric):
        raise ConfigError(
            must(
                "metric",
                f"be one of {', '.join(get_args(Metric))}",
                metric,
                suggest(metric, get_args(Metric)),
            )
        )
    x = _features(features)
    n = len(x)
    if not isinstance(size, int | np.integer) or isinstance(size, bool) or not 1 <= size <= n:
        raise DataError(
            must(
                "size",
                f"be a whole number from 1 to the number of examples, {n}",
                size,
                "Pick no more than there are.",
            )
        )
    classes = torch.zeros(n, dtype=torch.int64) if labels is None else _labels(labels, n)
    between = _metric(metric)
    _, inverse = torch.unique(classes, return_inverse=True)
    quotas = shares(inverse.bincount().numpy(), int(size))
    picked = torch.zeros(n, dtype=torch.bool)
    for label, quota in enumerate(quotas.tolist()):
        if quota:
            members = (inverse == label).nonzero()[:, 0]
            picked[members[_pick(x[members.to(x.device)], quota, between).cpu()]] = True
    indices = picked.nonzero()[:, 0]
    weights = _weights(x, indices, inverse, between)
    if isinstance(features, Tensor):
        return indices.to(x.device), weights.to(x.device)
    return indices.numpy(), weights.numpy()


def _pick(x: Tensor, quota: int, between: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    n = len(x)
    if quota == n:
        return torch.arange(n)

    def candidates(rows: Tensor) -> Tensor:
        d = between(x[rows], x)
        d[torch.arange(len(rows), device=x.device), rows] = 0
        return d.neg_()

    return lazy_greedy(candidates, n, quota, x.device)


def _weights(x: Tensor, indices: Tensor, classes: Tensor, between: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Count for each pick the examples of its class that are nearest to it (of any class, if its own has no pick)."""
    weights = torch.zeros(len(indices), dtype=torch.float64)
    of_pick = classes[indices]
    medoids = x[indices.to(x.device)]
    for rows in torch.split(torch.arange(len(x)), ROWS):
        same = classes[rows].unsqueeze(1) == of_pick
        barred = same.any(1, keepdim=True) & ~same
        d = between(x[rows.to(x.device)], medoids).cpu().masked_fill_(barred, torch.inf)
        d[indices == rows.unsqueeze(1)] = -1  # a pick stands for itself, before its double does
        weights += d.argmin(1).bincount(minlength=len(indices))
    return weights


def _metric(metric: Metric) -> Callable[[Tensor, Tensor], Tensor]:
    if metric == "euclidean":
        return distances
    if metric == "sqeuclidean":
        return lambda left, right: distances(left, right).square_()
    unit = torch.nn.functional.normalize
    return lambda left, right: (1 - unit(left, dim=-1) @ unit(right, dim=-1).mT).clamp_(min=0)


def _features(features: Any) -> Tensor:
    if not isinstance(features, Tensor | np.ndarray):
        raise DataError(
            must("features", "be an array or a tensor", type(features).__name__, "Use numpy.asarray(features).")
        )
    if isinstance(features, np.ndarray) and features.dtype.kind not in "fiub":
        raise DataError(must("features", "hold real numbers", str(features.dtype), "Convert them to float32."))
    if isinstance(features, np.ndarray):  # torch takes native byte order only
        features = torch.from_numpy(np.ascontiguousarray(features, dtype=features.dtype.newbyteorder("=")))
    x: Tensor = features.detach()
    if x.dim() != 2 or x.numel() == 0 or x.is_complex():
        raise DataError(
            must(
                "features",
                "have shape [n, d], real, not empty",
                tuple(x.shape),
                "Flatten each example to a row.",
            )
        )
    x = x if x.dtype == torch.float64 else x.float()
    if not x.isfinite().all():
        row = int((~x.isfinite()).any(1).nonzero()[0])
        raise DataError(must("features", "be finite", f"NaN or infinity in row {row}", "Drop or mend such rows."))
    return x


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
