"""Greedy facility location: the k members that are nearest to everyone, batched and exact.

The greedy algorithm picks the member that adds most to sum_i max_{j in S} s_ij, again and again; its value
is at least 1 - 1/e of the best possible (Nemhauser, Wolsey and Fisher, 1978). Two ways to the same picks:
all gains anew for every pick, for many small problems at once; and for a large problem only those whose
stale upper bound could still win (Minoux, 1978), refreshed in blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchcrest.errors import DataError, must

__all__ = ["facility_location", "greedy", "lazy_greedy"]

LAZY_FROM = 512  # members; below, recomputing all gains is faster than keeping bounds
BLOCK = 64  # bounds refreshed at first, at most; eight times as many later


def facility_location(similarity: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Pick the members that best represent all, greedily.

    Args:
        similarity: ``[..., n, n]``; entry i, j says how well j represents i. Any real numbers.
        budget: how many members to pick from each problem, 1 to n.

    Returns:
        Rows ``[..., budget]``, int64, the picks in the order in which they were made, ties going to the lowest
        index; and sizes ``[..., budget]``, int64, how many members each pick represents best, n in all.

    Raises:
        DataError: the similarity is not square, empty or not finite, or the budget does not fit it.

    >>> facility_location(torch.tensor([[3.0, 2.0, 0.0], [2.0, 3.0, 0.0], [0.0, 0.0, 3.0]]), 2)
    (tensor([0, 2]), tensor([2, 1]))
    """
    if not isinstance(similarity, Tensor):
        raise DataError(
            must("similarity", "be a tensor", type(similarity).__name__, "Use torch.as_tensor(similarity).")
        )
    if similarity.dim() < 2 or similarity.shape[-1] != similarity.shape[-2] or similarity.numel() == 0:
        got = tuple(similarity.shape)
        raise DataError(
            must("similarity", "have shape [..., n, n], n at least 1", got, "Compare all members with all.")
        )
    if similarity.is_complex() or not _finite(similarity):
        raise DataError(must("similarity", "hold finite real numbers", "others", "Look for NaN and infinity."))
    n = similarity.shape[-1]
    if not isinstance(budget, int) or isinstance(budget, bool) or not 1 <= budget <= n:
        raise DataError(must("budget", f"be a whole number from 1 to n = {n}", budget, "Pick no more than there are."))
    s = similarity.detach().reshape(-1, n, n)
    # Integers and doubles need 53 bits; float32 would make ties of what differs.
    s = s.float() if s.is_floating_point() and s.dtype != torch.float64 else s.double()
    rows = greedy(s, budget)
    sizes = _cluster_sizes(s, rows)
    shape = (*similarity.shape[:-2], budget)
    return rows.reshape(shape), sizes.reshape(shape)


def _finite(x: Tensor) -> bool:
    """Look at the extremes: NaN and infinity are among them, and one pass that stores nothing finds them."""
    return not x.is_floating_point() or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def greedy(similarity: Tensor, budget: int, counts: Tensor | None = None) -> Tensor:
    """Pick greedily from each problem of a batch.

    Args:
        similarity: ``[b, n, n]`` real.
        budget: picks from each problem.
        counts: ``[b]``, how many members a problem really has; the others are padding, take no part, and
            what a problem picks beyond its count means nothing. None: all have n.

    Returns:
        ``[b, budget]`` int64 in the order of picking. A shorter budget gives a prefix of a longer one's.
    """
    n = similarity.shape[-1]
    if counts is None and n >= LAZY_FROM:
        return torch.stack([_lazy(problem, budget) for problem in similarity])
    if counts is None:
        return _naive(similarity, budget, None)
    here = torch.arange(n, device=similarity.device) < counts.unsqueeze(-1)
    # Padding gains nothing from any pick and is never picked.
    return _naive(similarity * here.unsqueeze(-1), budget, ~here)


def _naive(similarity: Tensor, budget: int, barred: Tensor | None) -> Tensor:
    """Compute every gain for every pick."""
    b, n, _ = similarity.shape
    every = torch.arange(b, device=similarity.device)
    taken = torch.zeros(b, n, dtype=torch.bool, device=similarity.device) if barred is None else barred.clone()
    gains = similarity.sum(1).masked_fill_(taken, -torch.inf)
    picks, best = [], None
    above = torch.empty_like(similarity)
    for k in range(budget):
        pick = gains.argmax(1)
        picks.append(pick)
        if k == budget - 1:
            break
        taken[every, pick] = True
        column = similarity[every, :, pick]
        best = column if best is None else torch.maximum(best, column)
        torch.sub(similarity, best.unsqueeze(-1), out=above)
        gains = above.clamp_(min=0).sum(1).masked_fill_(taken, -torch.inf)
    return torch.stack(picks, 1)


def _lazy(similarity: Tensor, budget: int) -> Tensor:
    candidates = similarity.t().contiguous()
    return lazy_greedy(lambda rows: candidates.index_select(0, rows), len(candidates), budget, similarity.device)


def lazy_greedy(candidates: Callable[[Tensor], Tensor], n: int, budget: int, device: torch.device) -> Tensor:
    """Pick greedily from one large problem whose similarities need not be held all at once.

    Args:
        candidates: takes ``[k]`` members, returns ``[k, n]``, how well each represents everyone, in a new tensor.
        n: members.
        budget: picks.
        device: where the similarities are.

    Returns:
        ``[budget]`` int64, the same picks as computing every gain, but for rounding.
    """
    blocks = torch.arange(n, device=device).split(8 * BLOCK)
    # The first pick has nothing to improve on: it has the largest sum.
    sums = torch.cat([candidates(block).sum(1) for block in blocks])
    picks = [int(sums.argmax())]
    if budget == 1:
        return torch.tensor(picks, device=device)
    best = candidates(torch.tensor(picks, device=device))[0]
    # Sums bound no gains, so the second pick needs all of them. From there on gains only ever shrink.
    bounds = torch.cat([_gains(candidates, best, block) for block in blocks])
    bounds[picks[0]] = -torch.inf
    pick = int(bounds.argmax())
    while True:
        picks.append(pick)
        if len(picks) == budget:
            return torch.tensor(picks, device=device)
        bounds[pick] = -torch.inf
        best = torch.maximum(best, candidates(torch.tensor([pick], device=device))[0])
        pick = _best_candidate(candidates, best, bounds, n - len(picks))


def _gains(candidates: Callable[[Tensor], Tensor], best: Tensor, rows: Tensor) -> Tensor:
    return candidates(rows).sub_(best).clamp_(min=0).sum(1)


def _best_candidate(candidates: Callable[[Tensor], Tensor], best: Tensor, bounds: Tensor, left: int) -> int:
    """Refresh the largest bounds, in place, until no stale one can win; only those left have one."""
    size = min(BLOCK, max(8, len(bounds) // BLOCK), left)
    ordered, order = bounds.topk(min(size + 1, left))
    # Ascending, because of equal gains the first is found. What is equal to the last may be anywhere.
    block, rest = order[:size].sort().values, float(ordered[-1]) if size < left else -torch.inf
    top_gain, top = -torch.inf, len(bounds)
    stale: Tensor | None = None
    while True:
        gains = _gains(candidates, best, block)
        bounds.index_copy_(0, block, gains)
        most, place = gains.max(0)
        gain, member = float(most), int(block[place])
        if gain > top_gain or (gain == top_gain and member < top):
            top_gain, top = gain, member
        if rest < top_gain:
            return top
        stale = bounds.clone() if stale is None else stale
        stale.index_fill_(0, block, -torch.inf)
        rivals = stale >= top_gain
        rivals[top:] &= stale[top:] > top_gain
        block = rivals.nonzero()[:, 0]
        if not len(block):
            return top
        # The larger the bound, the likelier its member wins and spares the others the work.
        size = min(2 * size, 8 * BLOCK)
        if len(block) > size:
            block = block[stale[block].sort(descending=True, stable=True).indices[:size]].sort().values


def _cluster_sizes(similarity: Tensor, rows: Tensor) -> Tensor:
    """Count the members that each pick represents best; a pick represents itself before an equal one does."""
    b, n, _ = similarity.shape
    to_picks = similarity.gather(2, rows.unsqueeze(1).expand(b, n, -1))
    most, nearest = to_picks.max(2)
    own = to_picks.gather(1, rows.unsqueeze(-1).expand(-1, -1, rows.shape[1])).diagonal(dim1=1, dim2=2)
    keep = own == most.gather(1, rows)
    own_place = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    nearest = nearest.scatter(1, rows, torch.where(keep, own_place, nearest.gather(1, rows)))
    return torch.zeros_like(rows).scatter_add_(1, nearest, torch.ones_like(nearest))
