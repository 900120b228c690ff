"""GradMatch: train on few examples whose weighted gradients add up to everyone's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchcrest.active import stream
from torchcrest.baselines.subset import Proxy, SubsetConfig, SubsetLoader
from torchcrest.checks import Checks
from torchcrest.objectives import Objective
from torchcrest.solvers import match_gradients, shares
from torchcrest.types import Pool

__all__ = ["GradMatch", "GradMatchConfig"]


@dataclass(frozen=True, kw_only=True)
class GradMatchConfig(SubsetConfig):
    """Settings of :class:`GradMatch`.

    Attributes:
        proxy: the whole ``last_layer``, as in the paper, or the ``outputs``.
        ridge: spreads the weight over many examples; relative to the mean square of the gradients' norms.
            Next to none of it matches the gradients with a few.
    """

    proxy: Proxy = "last_layer"
    ridge: float = 0.5

    def _check(self, checks: Checks) -> None:
        super()._check(checks)
        checks.above_zero("ridge", "0.5 is the public code's.")


class GradMatch(SubsetLoader):
    """GradMatch (Killamsetty et al., ICML 2021, arXiv 2103.00123).

    Orthogonal matching pursuit with non-negative weights, class by class. Where the gradients are matched
    with fewer examples than were asked for, random ones that stand for themselves alone (weight 1) fill
    the class's share, as in the authors' code.

    Args:
        model: the model in training.
        dataset: map-style, as for :class:`torchcrest.Crest`, like all that is not explained here.
        config: the settings; None: the defaults.
        steps: batches of a pass.
        seed: of the order in which the subset is gone through, and of the examples that fill the subset.
        objective: how a batch becomes outputs and losses.
        last_layer: the layer that ``proxy="last_layer"`` compares; None: the last linear layer that runs.
        num_workers: processes that read ahead; it and the rest as in :class:`torch.utils.data.DataLoader`.
        collate_fn: makes a batch of a list of examples.
        pin_memory: read into pinned memory.
        prefetch_factor: batches that each worker reads ahead.

    Raises:
        ConfigError: settings that cannot work.
        DataError: a data set that cannot be used.
    """

    method = "gradmatch"
    config: GradMatchConfig

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        config: GradMatchConfig | None = None,
        *,
        steps: int,
        seed: int = 0,
        objective: Objective | Callable[[Tensor, Any], Tensor] | None = None,
        last_layer: nn.Linear | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
    ) -> None:
        super().__init__(
            model,
            dataset,
            config or GradMatchConfig(),
            steps=steps,
            seed=seed,
            objective=objective,
            last_layer=last_layer,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
        )

    def _pick(self, everything: Pool) -> tuple[Tensor, Tensor]:
        rows, found = match_gradients(
            everything.gradients,
            self._size,
            everything.labels,
            everything.features,
            bias=everything.bias,
            ridge=self.config.ridge,
        )
        weights = torch.zeros(len(everything.indices))
        weights[rows.cpu()] = found.float().cpu()
        weights[self._fill(weights > 0, everything.labels)] = 1.0
        rows = weights.nonzero()[:, 0]
        return rows, weights[rows]

    def _fill(self, picked: Tensor, labels: Tensor | None) -> Tensor:
        """Choose at random what the classes' shares lack."""
        n = len(picked)
        classes = torch.zeros(n, dtype=torch.int64) if labels is None else torch.unique(labels, return_inverse=True)[1]
        classes = classes.cpu()
        lack = torch.from_numpy(shares(classes.bincount().numpy(), self._size))
        lack = lack - classes[picked].bincount(minlength=len(lack))
        order = torch.randperm(n, generator=stream(self._seed, "fill", self._step))
        order = order[~picked[order]]
        # Sorted by class, in random order within one: the first so many of each class.
        order = order[classes[order].argsort(stable=True)]
        free = classes[order].bincount(minlength=len(lack))
        place = torch.arange(len(order)) - (free.cumsum(0) - free)[classes[order]]
        return order[place < lack[classes[order]]]
