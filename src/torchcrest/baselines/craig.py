"""CRAIG: train on the medoids of all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchcrest.baselines.subset import SubsetConfig, SubsetLoader
from torchcrest.checks import Checks
from torchcrest.objectives import Objective
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


class Craig(SubsetLoader):
    """CRAIG (Mirzasoleiman, Bilmes and Leskovec, ICML 2020, arXiv 1906.01827).

    Facility location over the proxy gradients of all the data, class by class; a medoid weighs as much as
    its cluster is large. Takes time and memory of the largest class's size squared where classes are small,
    and a block of similarities at a time where they are large.

    Args:
        model: the model in training.
        dataset: map-style, as for :class:`torchcrest.Crest`, like all that is not explained here.
        config: the settings; None: the defaults.
        steps: batches of a pass.
        seed: of the order in which the subset is gone through.
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

    method = "craig"
    config: CraigConfig

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        config: CraigConfig | None = None,
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
            config or CraigConfig(),
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
        labels, features = everything.labels, everything.features
        rows, sizes = medoids(
            everything.gradients.unsqueeze(0),
            self._size,
            None if labels is None else labels.unsqueeze(0),
            None if features is None else features.unsqueeze(0),
            bias=everything.bias,
        )
        return rows[0], weigh(sizes[0], self.config.weight_power)
