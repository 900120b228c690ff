"""What travels between the parts: pools, coresets, weighted batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from torchcrest import tree

__all__ = ["BatchLoader", "Coreset", "Pool", "Stats", "WeightedBatch"]


class WeightedBatch(NamedTuple):
    """A mini-batch and the weight of each of its examples.

    Unpacks in the ``for`` statement: ``for (x, y), weights in crest``.

    Attributes:
        data: the batch as the collate function made it, on the model's device.
        weights: ``[batch_size]``, mean 1.
    """

    data: Any
    weights: Tensor


@dataclass(frozen=True)
class Pool:
    """A random subset of the examples, measured once.

    Attributes:
        indices: ``[r]`` positions in the data set, int64, on the CPU.
        data: the loaded examples, so that a coreset is a slice of what was read.
        losses: ``[r]`` float32 loss of each example.
        gradients: ``[r, d]`` float32 proxy gradients, one row an example.
        features: ``[r, k]`` inputs of the last layer where the whole layer's gradient is asked for.
        bias: the last layer has a bias (only read where there are features).
        labels: ``[r]`` class labels, or None where there are none.
        outputs: ``[r, ...]`` what the model returned, without a graph; None where the objective gives the proxies.
    """

    indices: Tensor
    data: Any
    losses: Tensor
    gradients: Tensor
    features: Tensor | None = None
    bias: bool = True
    labels: Tensor | None = None
    outputs: Tensor | None = None

    def part(self, start: int, stop: int) -> Pool:
        """Return some of the examples that stand next to each other, without a copy."""
        cut = {
            name: getattr(self, name) for name in ("indices", "losses", "gradients", "features", "labels", "outputs")
        }
        cut = {name: None if value is None else value[start:stop] for name, value in cut.items()}
        return replace(self, data=tree.part(self.data, start, stop), **cut)


@dataclass(frozen=True)
class Coreset:
    """Exactly m weighted examples that stand for the pool from which they were picked.

    Attributes:
        pool_indices: ``[r]`` data-set positions of the whole pool, to read the same batch again.
        rows: ``[m]`` positions in the pool, ascending.
        weights: ``[m]`` float32, mean 1.
        data: the m examples, as loaded with the pool.
        picked: they were selected; else they are any m of the pool, with weights 1.
    """

    pool_indices: Tensor
    rows: Tensor
    weights: Tensor
    data: Any
    picked: bool = True

    @property
    def indices(self) -> Tensor:
        """``[m]`` positions in the data set, on the CPU."""
        return self.pool_indices[self.rows]

    @classmethod
    def of(cls, pool: Pool, rows: Tensor, weights: Tensor) -> Coreset:
        """Slice the picked rows out of a pool."""
        return cls(pool.indices, rows.cpu(), weights, tree.take(pool.data, rows))

    def sample(self, size: int | None, generator: torch.Generator) -> Coreset:
        """Draw some of the examples, without replacement; their weights are scaled to mean 1 again.

        Args:
            size: how many; None, or no fewer than there are: the coreset itself.
            generator: of the draw, on the CPU.
        """
        if size is None or size >= len(self.rows):
            return self
        kept = torch.randperm(len(self.rows), generator=generator)[:size].sort().values
        weights = self.weights[kept.to(self.weights.device)]
        return Coreset(self.pool_indices, self.rows[kept], weights / weights.mean(), tree.take(self.data, kept))


@dataclass
class Stats:
    """What selection has cost so far. Seconds are wall-clock, on a synchronised device.

    Attributes:
        seconds_selecting: loading and measuring pools, and picking coresets from them.
        seconds_checking: measuring the check set at the start of a region and at each check.
        seconds_curvature: gradients and Hessian probes of the quadratic model.
        examples_forwarded: examples that went through the model for any of these, outside training.
        forwarded_selecting: how many of them for selection,
        forwarded_checking: and for checks.
        examples_trained: examples in the batches that were handed out.
        coresets: batches handed out that were coresets; the others were random.
        overhead: cost of selection, checks and curvature for each unit of training's, as it was budgeted.
        regions: quadratic models fitted.
        checks: checks of a quadratic model against the loss.
        active: examples that are drawn from at present; the others are set aside, or not picked. 0 for a stream.
        effective_batch_size: examples in a random batch with a coreset's variance, by proxy gradients: the mean of
            the history's ``quality`` events, like the next two; 0 before there is one.
        pay_off: the effective batch size in batches, for each plain step that a step on a coreset costs.
        bounded: share of the events at which the bias was at most a third of the gradient's norm.
    """

    seconds_selecting: float = 0.0
    seconds_checking: float = 0.0
    seconds_curvature: float = 0.0
    examples_forwarded: int = 0
    forwarded_selecting: int = 0
    forwarded_checking: int = 0
    examples_trained: int = 0
    coresets: int = 0
    overhead: float = 0.0
    regions: int = 0
    checks: int = 0
    active: int = 0
    effective_batch_size: float = 0.0
    pay_off: float = 0.0
    bounded: float = 0.0


@runtime_checkable
class BatchLoader(Protocol):
    """What every method offers, CREST and its rivals alike.

    Attributes:
        history: what happened, an entry an event, oldest first.
        stats: what selection has cost so far.
        indices: data-set positions of the batch handed out last, on the CPU.
    """

    history: list[dict[str, Any]]
    stats: Stats
    indices: Tensor

    def __iter__(self) -> Iterator[WeightedBatch]:
        """Yield the batches of one pass."""
        ...

    def __len__(self) -> int:
        """Count the batches of one pass."""
        ...

    def observe(self, losses: Tensor, outputs: Tensor | None = None) -> None:
        """Take losses ``[batch_size]``, and outputs, of the batch handed out last; most methods don't need them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to carry the run on: tensors, numbers and strings only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Carry on the run that made the state."""
        ...


def no_indices() -> Tensor:
    """Return the positions of no examples."""
    return torch.empty(0, dtype=torch.int64)
