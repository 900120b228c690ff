"""Orthogonal matching pursuit: few members of each class, with weights, whose gradients add up to that of all.

GradMatch (Killamsetty et al., ICML 2021, arXiv 2103.00123). Classes are solved together; of the inner
products between gradients only the columns of picked members are computed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcrest.errors import DataError, must
from torchcrest.solvers.medoids import shares

__all__ = ["match_gradients"]

Array = NDArray[np.int64]
CHUNK = 1 << 24  # numbers held at a time
ROUNDING = 1e-12  # in float64, of the largest an inner product can be; what is smaller counts as 0


@torch.no_grad()
def match_gradients(
    gradients: Tensor,
    size: int,
    labels: Tensor | None = None,
    features: Tensor | None = None,
    *,
    bias: bool = True,
    ridge: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Pick members and weights so that their weighted gradients add up to the gradient of all.

    In each class separately, for its share of ``size``, orthogonal matching pursuit on

        min  |sum_i g_i - sum_{j in S} w_j g_j|^2 + ridge * mean_i |g_i|^2 * |w|^2,  w >= 0:

    it adds the member whose gradient agrees most with what is left of the sum, finds the best weights of
    all members added so far, and so on until the share is full or nobody agrees. Ties go to the first. The
    ridge keeps a few members from taking all the weight; it is relative to the class's mean square, so that
    the scale of the gradients does not matter (the authors' code adds a fixed 0.5).

    Memory: the members times the share of the largest classes, in float64.

    Args:
        gradients: ``[n, d]`` with respect to the outputs.
        size: how many members to pick at most, 1 to n.
        labels: ``[n]`` integer classes, or None for one problem of all.
        features: ``[n, h]`` inputs of the last layer, to match that whole layer's gradient p f^T, which is
            never built: <p_i f_i^T, p_j f_j^T> = <p_i, p_j> <f_i, f_j>.
        bias: the last layer has a bias; without features it plays no part.
        ridge: 0 or more. What keeps the equations solvable, 1e-12 of the largest square, is always added.

    Returns:
        Rows ``[k]``, int64, ascending, and weights ``[k]``, positive, float32 (float64 for float64
        gradients). k falls short of ``size`` where a class's sum is matched with fewer, or a member turned
        out useless once others were added. Weights are on the scale of counts: they would add up to n if
        all gradients of a class were alike and ridge 0, and to less as they cancel out or ridge grows.

    Raises:
        DataError: gradients, labels or features of the wrong shape or kind or not finite, or a size or ridge
            out of range.

    >>> gradients = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    >>> match_gradients(gradients, 2, ridge=0)
    (tensor([0, 3]), tensor([3.0000, 1.5000]))
    """
    _check(gradients, size, labels, features, ridge)
    n, device = len(gradients), gradients.device
    names = np.zeros(n, np.int64) if labels is None else labels.cpu().numpy()
    counts = np.unique(names, return_counts=True)[1].astype(np.int64)
    quotas = shares(counts, size)
    members, starts = np.argsort(names, kind="stable"), np.cumsum(counts) - counts
    weights = torch.zeros(n, dtype=torch.float64, device=device)
    for group in _alike(counts, quotas, gradients.shape[1] + (0 if features is None else features.shape[1])):
        place = np.arange(counts[group].max())
        inside = torch.from_numpy(place < counts[group, None]).to(device)
        rows = torch.from_numpy(members[np.minimum(starts[group, None] + place, n - 1)]).to(device)
        # Padding has gradient 0: it agrees with nothing, and is never picked.
        p = _columns(gradients[rows] * inside.unsqueeze(-1))
        f = None if features is None else _columns(features[rows])
        count, quota = (torch.from_numpy(x[group]).to(device) for x in (counts, quotas))
        weights[rows[inside]] = _pursue(p, f, bias, count, quota, ridge)[inside]
    weights = weights.to(gradients.dtype if gradients.dtype == torch.float64 else torch.float32)
    picked = weights.nonzero()[:, 0]
    return picked, weights[picked]


def _alike(counts: Array, quotas: Array, width: int) -> list[Array]:
    """Group the classes that have a share by size, so that padding stays small, and by memory."""
    scale = np.ceil(2 * np.log2(counts)).astype(np.int64)
    groups: list[Array] = []
    for value in np.unique(scale[quotas > 0]):
        group = np.flatnonzero((scale == value) & (quotas > 0))
        most = max(1, int(CHUNK // (counts[group].max() * (quotas[group].max() + width))))
        groups.extend(group[start : start + most] for start in range(0, len(group), most))
    return groups


def _columns(rows: Tensor) -> Tensor:
    """Return ``[b, d, n]`` float64 for ``[b, n, d]``, so that products with one member run along memory."""
    return rows.double().mT.contiguous()


def _pursue(p: Tensor, f: Tensor | None, bias: bool, count: Tensor, quota: Tensor, ridge: float) -> Tensor:
    """Return every member's weight, ``[b, n]``, for ``[b, d, n]`` gradients and ``[b, h, n]`` features."""
    b, _, n = p.shape
    k = int(quota.max())
    every = torch.arange(b, device=p.device)
    squares = p.square().sum(1) * (1 if f is None else f.square().sum(1) + float(bias))
    penalty = torch.maximum(ridge * squares.sum(1) / count, ROUNDING * squares.amax(1))
    noise = ROUNDING * squares.amax(1).sqrt() * squares.sqrt().sum(1)
    whole = _with_sum(p, f, bias)
    columns, gram, factor = p.new_zeros(b, k, n), p.new_zeros(b, k, k), p.new_zeros(b, k, k)
    target, weights = p.new_zeros(b, k), p.new_zeros(b, k)
    active = torch.zeros(b, k, dtype=torch.bool, device=p.device)
    picks = torch.zeros(b, k, dtype=torch.int64, device=p.device)
    taken = torch.zeros(b, n, dtype=torch.bool, device=p.device)
    for t in range(k):
        left = whole - _times(weights[:, :t], columns[:, :t])
        left.masked_fill_(taken, -torch.inf)
        most = left.amax(1)
        going = (most > noise) & (t < quota)
        if not going.any():
            break
        # Equal gradients differ by rounding, which depends on the batch: the first of all that are about best.
        pick = (left >= (most - noise).unsqueeze(1)).int().argmax(1)
        picks[:, t] = pick
        taken[every, pick] |= going
        columns[:, t] = _with(p, f, bias, pick)
        # In a class that has stopped, the place stays empty: zeros never become active.
        among = columns[every, : t + 1, pick] * going.unsqueeze(1)
        gram[:, t, : t + 1] = gram[:, : t + 1, t] = among
        gram[:, t, t] += penalty
        target[:, t] = whole[every, pick] * going
        active[:, t] = going
        here = slice(t + 1)
        _extend(factor[:, here, here], gram[:, here, here], active[:, here])
        weights[:, here] = _settle(
            gram[:, here, here], target[:, here], weights[:, here], active[:, here], factor[:, here, here], noise
        )
    return p.new_zeros(b, n).scatter_add_(1, picks, weights)


def _with(p: Tensor, f: Tensor | None, bias: bool, pick: Tensor) -> Tensor:
    """Return the inner products of all gradients with one of each problem, ``[b, n]``."""
    every = torch.arange(len(p), device=p.device)
    inner = _times(p[every, :, pick], p)
    return inner if f is None else inner * (_times(f[every, :, pick], f) + float(bias))


def _with_sum(p: Tensor, f: Tensor | None, bias: bool) -> Tensor:
    """Return the inner products of all gradients with their sum, ``[b, n]``."""
    inner = _times(p.sum(2), p)
    return inner if f is None else (f @ p.mT @ p * f).sum(1) + float(bias) * inner


def _times(row: Tensor, matrix: Tensor) -> Tensor:
    """Multiply ``[b, d]`` by ``[b, d, n]``."""
    return (row.unsqueeze(1) @ matrix).squeeze(1)


def _extend(factor: Tensor, gram: Tensor, active: Tensor) -> None:
    """Fill in the last row of the active rows' Cholesky factors; in place."""
    cross = gram[:, -1, :-1] * active[:, :-1]
    row = torch.linalg.solve_triangular(factor[:, :-1, :-1], cross.unsqueeze(-1), upper=False).squeeze(-1)
    factor[:, -1, :-1] = row
    factor[:, -1, -1] = torch.where(active[:, -1], (gram[:, -1, -1] - row.square().sum(1)).sqrt(), 1)


def _settle(gram: Tensor, target: Tensor, weights: Tensor, active: Tensor, factor: Tensor, noise: Tensor) -> Tensor:
    """Minimise w.gram.w / 2 - target.w over w >= 0 from a start that was best before the last place was added.

    The active-set method of Lawson and Hanson (1974): go towards the solution of the active places until one
    of them reaches 0 and leaves; at the solution, let the place enter that has most to gain. All problems of
    the batch do a step at a time. ``active`` and ``factor``, the Cholesky factors of the active places with
    ones for the others, are changed in place.
    """
    # It takes a handful of steps; the limit is for rounding, which could let a place enter and leave for ever.
    for _ in range(3 * gram.shape[-1]):
        solution = torch.cholesky_solve((target * active).unsqueeze(-1), factor).squeeze(-1)
        low = active & (solution <= 0)
        blocked = low.any(1)
        way = weights / (weights - solution).clamp(min=torch.finfo(weights.dtype).tiny)
        part, leaving = way.masked_fill(~low, torch.inf).min(1)
        weights = weights.lerp(solution, part.clamp(max=1).unsqueeze(-1)).clamp(min=0)
        gain = (target - _times(weights, gram)).masked_fill(active, -torch.inf)
        most, entering = gain.max(1)
        enters = ~blocked & (most > noise)
        moved = (blocked | enters).nonzero()[:, 0]
        if not len(moved):
            break
        place = torch.where(blocked, leaving, entering)[moved]
        active[moved, place] = enters[moved]
        both = active[moved].unsqueeze(1) & active[moved].unsqueeze(2)
        factor[moved] = torch.linalg.cholesky_ex(
            torch.where(both, gram[moved], torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
        ).L
    return weights


def _check(gradients: Tensor, size: int, labels: Tensor | None, features: Tensor | None, ridge: float) -> None:
    for name, values in (("gradients", gradients), ("features", features), ("labels", labels)):
        if values is not None and not isinstance(values, Tensor):
            raise DataError(must(name, "be a tensor", type(values).__name__, f"Use torch.as_tensor({name})."))
    for name, values in (("gradients", gradients), ("features", features)):
        if values is None:
            continue
        if values.dim() != 2 or len(values) != len(gradients) or len(values) == 0:
            want = "have shape [n, d], n at least 1" if name == "gradients" else f"have shape ({len(gradients)}, h)"
            raise DataError(must(name, want, tuple(values.shape), "Give one row for each example."))
        if values.is_complex() or not values.isfinite().all():
            raise DataError(must(name, "hold finite real numbers", "others", "Look for NaN and infinity."))
    n = len(gradients)
    if labels is not None and (tuple(labels.shape) != (n,) or labels.is_floating_point() or labels.is_complex()):
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise DataError(must("labels", f"be integers of shape ({n},)", got, "Number the classes."))
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= n:
        raise DataError(must("size", f"be a whole number from 1 to n = {n}", size, "Pick no more than there are."))
    if not 0 <= ridge < math.inf:
        raise DataError(must("ridge", "be 0 or more, and finite", ridge, "Use for example 0.5."))
