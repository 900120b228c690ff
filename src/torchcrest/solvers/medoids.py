"""Mini-batch coresets: from every pool exactly m medoids of its gradients, and their clusters' sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcrest.solvers.distance import distances
from torchcrest.solvers.facility import LAZY_FROM, greedy, lazy_greedy
from torchcrest.types import Pool

__all__ = ["labels_of", "medoids", "pick", "shares", "weigh"]

Array = NDArray[np.int64]
CHUNK = 1 << 24  # similarities held at a time


def labels_of(pools: Sequence[Pool]) -> Tensor | None:
    """Return the class labels of pools, ``[p, r]``, or None where some have none."""
    labels = [pool.labels for pool in pools if pool.labels is not None]
    return torch.stack(labels) if len(labels) == len(pools) else None


def pick(
    pools: Sequence[Pool], labels: Tensor | None, size: int, power: float, *, shared: bool = True
) -> tuple[Tensor, Tensor]:
    """Pick a mini-batch coreset from each pool, all together.

    Args:
        pools: p of them.
        labels: ``[p, r]``, to pick from each class; None: from the whole pools.
        size: m, how many.
        power: of a cluster's size; that is its weight.
        shared: as for :func:`medoids`.

    Returns:
        rows ``[p, m]``, ascending, and weights ``[p, m]`` of mean 1.
    """
    features = [pool.features for pool in pools if pool.features is not None]
    rows, sizes = medoids(
        torch.stack([pool.gradients for pool in pools]),
        size,
        labels,
        torch.stack(features) if features else None,
        bias=pools[0].bias,
        shared=shared,
    )
    return rows, weigh(sizes, power)


def medoids(
    gradients: Tensor,
    size: int,
    labels: Tensor | None = None,
    features: Tensor | None = None,
    *,
    bias: bool = True,
    shared: bool = True,
) -> tuple[Tensor, Tensor]:
    """Pick mini-batch coresets from several pools at once.

    Facility location on Euclidean distances between proxy gradients, within each class where there are labels. A
    member counts for the nearest medoid of its class; where its class has none, for the nearest of all.

    Args:
        gradients: ``[p, r, d]``, a pool each.
        size: m, examples to pick from each pool, at most r.
        labels: ``[p, r]`` integer classes, or None to pick from the whole pool.
        features: ``[p, r, h]`` inputs of the last layer, to compare that whole layer's gradients.
        bias: the last layer has a bias.
        shared: each class gets its share of the medoids; False: as many as it needs. That is greedy facility location
            on the whole pool, where j represents i by 2 max ||g|| - ||g_i - g_j|| if they are of one class, else by 0.

    Returns:
        Rows ``[p, m]``, int64 positions in the pool, ascending, and cluster sizes ``[p, m]``, int64, r in all in
        each pool.
    """
    p, r, _ = gradients.shape
    flat = gradients.reshape(p * r, -1)
    flat_features = None if features is None else features.reshape(p * r, -1)
    members, counts, quotas = _problems(p, r, size, None if labels is None else labels.cpu().numpy())
    picked = torch.zeros(p * r, dtype=torch.bool, device=gradients.device)
    if shared or labels is None:
        whole = np.repeat(quotas == counts, counts)
        picked[torch.from_numpy(members[whole]).to(picked.device)] = True
        open_ = (quotas > 0) & (quotas < counts)
        for solved in _solve(members, counts, quotas, open_, flat, flat_features, bias):
            picked[solved.rows.gather(1, solved.picks)[solved.wanted]] = True
        rows = picked.view(p, r).nonzero()[:, 1].view(p, size)
        return rows, _cluster_sizes(gradients, rows, labels, features, bias)
    gains = torch.full((p * r,), -torch.inf, device=gradients.device)
    far = 2 * _norms(flat, flat_features, bias).view(p, r).amax(1)
    kept, held = [], 0
    for solved in _solve(members, counts, np.minimum(counts, size), counts > 0, flat, flat_features, bias):
        found = _gains(solved, far[solved.rows[:, 0] // r], flat, flat_features, bias)
        gains[solved.rows.gather(1, solved.picks)[solved.wanted]] = found[solved.wanted].to(gains)
        held += CHUNK if solved.distances is None else solved.distances.numel()
        kept += [solved] if held < CHUNK else []
    # Across classes nobody represents anybody, so the greedy picks are those of all classes, by their gains.
    rows = gains.view(p, r).sort(dim=1, descending=True, stable=True).indices[:, :size].sort(dim=1).values
    if held >= CHUNK:
        return rows, _cluster_sizes(gradients, rows, labels, features, bias)
    return rows, _sizes_within(kept, rows, flat, flat_features, bias)


def weigh(sizes: Tensor, power: float) -> Tensor:
    """Turn cluster sizes into weights: sizes to the power, scaled to mean 1 over the last dimension.

    >>> weigh(torch.tensor([3, 1]), 1.0)
    tensor([1.5000, 0.5000])
    """
    weights = sizes.float().pow(power)
    return weights / weights.mean(-1, keepdim=True)


def shares(counts: Array, size: int) -> Array:
    """Split ``size`` among classes in proportion to their counts, by largest remainders.

    Args:
        counts: ``[c]`` members of each class; they sum to at least ``size``.
        size: how many to share out.

    Returns:
        ``[c]``: sums to ``size``, no class gets more than it has, ties go to the first.

    >>> shares(np.array([6, 3, 1]), 5)
    array([3, 2, 0])
    """
    quotas, remainders = np.divmod(counts * size, counts.sum())
    left = size - int(quotas.sum())
    quotas[np.argsort(-remainders, kind="stable")[:left]] += 1
    return quotas


def _problems(p: int, r: int, size: int, labels: NDArray[np.generic] | None) -> tuple[Array, Array, Array]:
    """List the problems: members (problem after problem), how many each has, how many to pick from it."""
    if labels is None:
        return np.arange(p * r), np.full(p, r), np.full(p, size)
    members, counts, quotas = [], [], []
    for pool, of_pool in enumerate(labels.reshape(p, r)):
        members.append(pool * r + np.argsort(of_pool, kind="stable"))
        counts.append(np.unique(of_pool, return_counts=True)[1].astype(np.int64))
        quotas.append(shares(counts[-1], size))
    return np.concatenate(members), np.concatenate(counts), np.concatenate(quotas)


class _Solved(NamedTuple):
    """Problems of about one size, solved: rows ``[b, w]`` of the members and picks ``[b, q]`` among them, in order.

    ``wanted`` ``[b, q]`` and ``inside`` ``[b, w]`` tell picks and members from padding. The distances ``[b, w, w]``
    among members are None where they were too many to hold.
    """

    rows: Tensor
    picks: Tensor
    wanted: Tensor
    inside: Tensor
    distances: Tensor | None


def _solve(
    members: Array,
    counts: Array,
    quotas: Array,
    wanted: NDArray[np.bool_],
    gradients: Tensor,
    features: Tensor | None,
    bias: bool,
) -> Iterator[_Solved]:
    """Solve problems, those of about one size together.

    Args:
        members: of each problem, one problem after the other.
        counts: how many members each has.
        quotas: how many to pick from it.
        wanted: which to solve.
        gradients: ``[p * r, d]``.
        features: likewise, or None.
        bias: the last layer has a bias.
    """
    starts, device = np.cumsum(counts) - counts, gradients.device
    for group in _alike(counts, wanted):
        width = int(counts[group].max())
        inside = np.arange(width) < counts[group, None]
        places = np.where(inside, starts[group, None] + np.arange(width), starts[group, None])
        rows = torch.from_numpy(members[places]).to(device)
        f = None if features is None else features[rows]
        quota = int(quotas[group].max())
        between = None
        if width**2 > CHUNK:
            picks = _pick_from_many(gradients[rows[0]], None if f is None else f[0], bias, quota).unsqueeze(0)
        else:
            count = None if inside.all() else torch.from_numpy(counts[group]).to(device)
            between = _between(gradients[rows], f, bias)
            similarity = between.neg()
            # Distances are symmetric; turned, they lie in memory as the lazy way goes through them.
            picks = greedy(similarity if width < LAZY_FROM else similarity.mT, quota, count)
        own = torch.arange(picks.shape[1], device=device) < torch.from_numpy(quotas[group, None]).to(device)
        yield _Solved(rows, picks, own, torch.from_numpy(inside).to(device), between)


def _gains(solved: _Solved, far: Tensor, gradients: Tensor, features: Tensor | None, bias: bool) -> Tensor:
    """Return what each pick added, ``[b, q]``, where nobody is nearer than ``far``, ``[b]``, before the first."""
    rows, picks, _, inside, between = solved
    total = torch.zeros(picks.shape, dtype=gradients.dtype, device=gradients.device)
    chosen = rows.gather(1, picks)
    f = None if features is None else features[chosen]
    step = max(1, CHUNK // picks.numel())
    for start in range(0, rows.shape[1], step):
        part = rows[:, start : start + step]
        if between is None:
            of_part = None if features is None else features[part]
            d = distances(gradients[part], gradients[chosen], of_part, f, bias=bias)
            d.masked_fill_(part.unsqueeze(2) == chosen.unsqueeze(1), 0.0)  # not nearly 0
        else:
            some = between[:, start : start + step]
            d = some.gather(2, picks.unsqueeze(1).expand(-1, some.shape[1], -1))
        nearest = torch.cat([far.to(d).view(-1, 1, 1).expand(-1, d.shape[1], 1), d.cummin(2).values], 2)
        total -= (nearest.diff(dim=2) * inside[:, start : start + step].unsqueeze(2)).sum(1)
    return total


def _sizes_within(
    solved: Sequence[_Solved], rows: Tensor, gradients: Tensor, features: Tensor | None, bias: bool
) -> Tensor:
    """Count each medoid's cluster by distances within classes; where a class has no medoid, by those to all."""
    p, size = rows.shape
    r = len(gradients) // p
    every = rows + r * torch.arange(p, device=rows.device).unsqueeze(1)
    picked = torch.zeros(p * r, dtype=torch.bool, device=rows.device)
    picked[every] = True
    sizes = torch.zeros(p * r, dtype=torch.int64, device=rows.device)
    left = []
    for each in solved:
        assert each.distances is not None
        chosen = picked[each.rows] & each.inside
        own = torch.arange(chosen.shape[1], device=rows.device)
        nearest = each.distances.masked_fill(~chosen.unsqueeze(1), torch.inf).argmin(2)
        heads = each.rows.gather(1, torch.where(chosen, own, nearest))
        some = chosen.any(1, keepdim=True)
        # Padding is the first member once more, and must not count.
        sizes.scatter_add_(0, heads.flatten(), (each.inside & some).flatten().long())
        left.append(each.rows[each.inside & ~some])
    alone = torch.cat(left)
    for part in alone.split(max(1, CHUNK // (size * gradients.shape[1]))):
        heads = every[part // r]
        pair = (None, None) if features is None else (features[part].unsqueeze(1), features[heads])
        d = distances(gradients[part].unsqueeze(1), gradients[heads], *pair, bias=bias)
        nearest = heads.gather(1, d[:, 0].argmin(1, keepdim=True))[:, 0]
        sizes.scatter_add_(0, nearest, torch.ones_like(nearest))
    return sizes[every]


def _norms(gradients: Tensor, features: Tensor | None, bias: bool) -> Tensor:
    """Return the norms of the gradients, of the whole last layer where there are features."""
    norms: Tensor = gradients.norm(dim=-1)
    if features is not None:
        norms = norms * (features.square().sum(-1) + bias).sqrt()
    return norms


def _alike(counts: Array, wanted: NDArray[np.bool_]) -> list[Array]:
    """Group the problems that need solving by size, so that padding stays small, and by memory."""
    scale = np.ceil(np.log2(counts)).astype(np.int64)
    groups: list[Array] = []
    for value in np.unique(scale[wanted]):
        group = np.flatnonzero(wanted & (scale == value))
        width = int(counts[group].max())
        most = 1 if width >= LAZY_FROM else max(1, CHUNK // width**2)  # the lazy way is one problem's at a time
        groups.extend(group[start : start + most] for start in range(0, len(group), most))
    return groups


def _between(gradients: Tensor, features: Tensor | None, bias: bool) -> Tensor:
    """Return the distances among each problem's members, exactly 0 from a member to itself."""
    d = distances(gradients, gradients, features, features, bias=bias)
    d.diagonal(dim1=-2, dim2=-1).zero_()
    return d


def _pick_from_many(gradients: Tensor, features: Tensor | None, bias: bool, quota: int) -> Tensor:
    """Pick from one problem so large that its distances are computed as they are needed."""

    def candidates(rows: Tensor) -> Tensor:
        d = distances(gradients[rows], gradients, None if features is None else features[rows], features, bias=bias)
        d[torch.arange(len(rows), device=rows.device), rows] = 0
        return d.neg_()

    return lazy_greedy(candidates, len(gradients), quota, gradients.device)


def _cluster_sizes(
    gradients: Tensor, rows: Tensor, labels: Tensor | None, features: Tensor | None, bias: bool
) -> Tensor:
    """Count each medoid's cluster, for some pools, and some of their members, at a time."""
    p, r, _ = gradients.shape
    size = rows.shape[1]
    sizes = torch.zeros_like(rows)
    step = max(1, CHUNK // (r * size))
    members = max(1, CHUNK // (step * size))
    own = torch.arange(size, device=rows.device)
    for start in range(0, p, step):
        picked = rows[start : start + step]
        pools = torch.arange(start, start + len(picked), device=rows.device).unsqueeze(-1)
        g, f = gradients[pools, picked], None if features is None else features[pools, picked]
        nearest = torch.empty(len(picked), r, dtype=torch.int64, device=rows.device)
        for first in range(0, r, members):
            part = slice(start, start + step), slice(first, first + members)
            d = distances(gradients[part], g, None if features is None else features[part], f, bias=bias)
            if labels is not None:
                same = labels[part].unsqueeze(-1) == labels[pools, picked].unsqueeze(1)
                d.masked_fill_(same.any(-1, keepdim=True) & ~same, torch.inf)
            nearest[:, first : first + members] = d.argmin(-1)
        nearest.scatter_(1, picked, own.expand_as(picked))
        sizes[start : start + step].scatter_add_(1, nearest, torch.ones_like(nearest))
    return sizes
