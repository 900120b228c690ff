"""Slow and obvious: what the clever functions of torchcrest are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from scipy.optimize import nnls  # type: ignore[import-untyped]
from torch import Tensor

Matrix = Sequence[Sequence[float]]


def value(similarity: Matrix, picks: Sequence[int]) -> float:
    """Add up how well each member is represented by its best pick."""
    return sum(max(row[j] for j in picks) for row in similarity)


def greedy(similarity: Matrix, budget: int) -> list[int]:
    """Pick the member that raises the value most, again and again; ties go to the lowest index."""
    picks: list[int] = []
    for _ in range(budget):
        rest = [j for j in range(len(similarity)) if j not in picks]
        # max() keeps the first of equals.
        picks.append(max(rest, key=lambda j: value(similarity, [*picks, j])))
    return picks


def optimum(similarity: Matrix, budget: int) -> float:
    """Try every subset."""
    return max(value(similarity, picks) for picks in itertools.combinations(range(len(similarity)), budget))


def cluster_sizes(similarity: Matrix, picks: Sequence[int]) -> list[int]:
    """Count whom each pick represents best; equals go to the earlier pick, but a pick to itself."""
    sizes = [0] * len(picks)
    for i, row in enumerate(similarity):
        best = max(row[j] for j in picks)
        winners = [k for k, j in enumerate(picks) if row[j] == best]
        own = [k for k in winners if picks[k] == i]
        sizes[(own or winners)[0]] += 1
    return sizes


def shares(counts: Sequence[int], size: int) -> list[int]:
    """Split by largest remainders, with fractions."""
    exact = [Fraction(count * size, sum(counts)) for count in counts]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda c: (-(exact[c] - quotas[c]), c))
    for c in by_remainder[: size - sum(quotas)]:
        quotas[c] += 1
    return quotas


def layer_gradients(gradients: Tensor, features: Tensor, bias: bool) -> Tensor:
    """Build each example's gradient of a whole linear layer, ``[n, d * (h + bias)]``."""
    rows = []
    for p, f in zip(gradients, features, strict=True):
        inputs = torch.cat([f, torch.ones(1, dtype=f.dtype)]) if bias else f
        rows.append(torch.outer(p, inputs).flatten())
    return torch.stack(rows)


def distances(left: Tensor, right: Tensor) -> Tensor:
    """Take the norm of every difference."""
    return torch.stack([torch.stack([(a - b).square().sum().sqrt() for b in right]) for a in left])


def medoids(points: Tensor, size: int, labels: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Pick within each class by brute force; count clusters within classes, and beyond for those without a pick."""
    classes = [0] * len(points) if labels is None else list(labels)
    d = distances(points, points).tolist()
    names = sorted(set(classes))
    quotas = shares([classes.count(name) for name in names], size)
    picks: list[int] = []
    for name, quota in zip(names, quotas, strict=True):
        members = [i for i, c in enumerate(classes) if c == name]
        inside = [[-d[i][j] for j in members] for i in members]
        picks += [members[k] for k in greedy(inside, quota)]
    picks.sort()
    sizes = [0] * size
    for i, c in enumerate(classes):
        own = [k for k, j in enumerate(picks) if classes[j] == c] or list(range(size))
        sizes[picks.index(i) if i in picks else min(own, key=lambda k: d[i][picks[k]])] += 1
    return picks, sizes


def quadratic(loss: float, gradient: Tensor, diagonal: Tensor, delta: Tensor) -> float:
    """Spell out L + g . delta + 1/2 delta . (H * delta)."""
    terms = zip(gradient.tolist(), diagonal.tolist(), delta.tolist(), strict=True)
    return float(loss + sum(g * d + 0.5 * d * h * d for g, h, d in terms))


def smoothed(terms: Sequence[Tensor], decay: float) -> Tensor:
    """Return the bias-corrected exponential mean: weights (1 - decay) decay^age, over their sum."""
    ages = range(len(terms) - 1, -1, -1)
    weights = [(1 - decay) * decay**age for age in ages]
    total = torch.zeros_like(terms[0])
    for weight, term in zip(weights, terms, strict=True):
        total = total + weight * term
    return total / sum(weights)


def match_gradients(atoms: Tensor, size: int, labels: Sequence[int] | None, ridge: float) -> list[float]:
    """Pursue class by class with the gradients themselves, the ridge as more rows of the equations."""
    g = atoms.double().numpy()
    classes = [0] * len(g) if labels is None else list(labels)
    names = sorted(set(classes))
    weights = [0.0] * len(g)
    for name, quota in zip(names, shares([classes.count(name) for name in names], size), strict=True):
        members = [i for i, c in enumerate(classes) if c == name]
        a = g[members].T
        total, norms = a.sum(1), np.linalg.norm(a, axis=0)
        noise = 1e-12 * norms.max() * norms.sum()
        support: list[int] = []
        found = np.zeros(0)
        for _ in range(quota):
            agreement = a.T @ (total - a[:, support] @ found)
            agreement[support] = -np.inf
            if agreement.max() <= noise:
                break
            support.append(int(np.flatnonzero(agreement >= agreement.max() - noise)[0]))
            penalty = np.sqrt(ridge * (norms**2).mean()) * np.eye(len(support))
            found = nnls(np.vstack([a[:, support], penalty]), np.concatenate([total, np.zeros(len(support))]))[0]
        for place, weight in zip(support, found, strict=True):
            weights[members[place]] = float(weight)
    return weights
