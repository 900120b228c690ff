"""GradMatch: train on few examples whose weighted gradients add up to everyone's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchcrest.active import stream
from torchcrest.baselines.subset import Proxy, SubsetConfig, SubsetLoader
from torchcrest.checks import Checks
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


class GradMatch(SubsetLoader[GradMatchConfig]):
    """GradMatch (Killamsetty et al., ICML 2021, arXiv 2103.00123).

    Orthogonal matching pursuit with non-negative weights, class by class. Where the gradients are matched
    with fewer examples than were asked for, random ones that stand for themselves alone (weight 1) fill
    the class's share, as in the authors' code. It solves in float64, which MPS has not.

    Takes the arguments of :class:`torchcrest.Crest`, with settings of its own, and raises the same errors.
    """

    method = "gradmatch"
    settings = GradMatchConfig

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
