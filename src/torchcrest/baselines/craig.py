"""CRAIG: train on the medoids of all gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchcrest.baselines.subset import SubsetConfig, SubsetLoader
from torchcrest.checks import Checks
from torchcrest.solvers import medoids, weigh
from torchcrest.types import Pool

__all__ = ["Craig", "CraigConfig"]


@dataclass(frozen=True, kw_only=True)
class CraigConfig(SubsetConfig):
    """Settings of :class:`Craig`.

    Attributes:
        weight_power: an example's weight is its cluster's size to this power; 1 is the paper's.
    """

    weight_power: float = 1.0

    def _check(self, checks: Checks) -> None:
        super()._check(checks)
        checks.at_least_zero("weight_power", "1 is the paper's, 0 gives uniform weights.")


class Craig(SubsetLoader[CraigConfig]):
    """CRAIG (Mirzasoleiman, Bilmes and Leskovec, ICML 2020, arXiv 1906.01827).

    Facility location over the proxy gradients of all the data, class by class; a medoid weighs as much as
    its cluster is large. Takes time and memory of the largest class's size squared where classes are small,
    and a block of similarities at a time where they are large.

    Takes the arguments of :class:`torchcrest.Crest`, with settings of its own, and raises the same errors.
    """

    method = "craig"
    settings = CraigConfig

    def _pick(self, everything: Pool) -> tuple[Tensor, Tensor]:
        labels, features = everything.labels, everything.features
        rows, sizes = medoids(
            everything.gradients.unsqueeze(0),
            self._size,
            None if labels is None else labels.unsqueeze(0),
            None if features is None else features.unsqueeze(0),
            bias=everything.bias,
        )
        return rows[0], weigh(sizes[0], self.config.weight_power)
