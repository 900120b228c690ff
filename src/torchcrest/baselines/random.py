"""Random mini-batches: full training, truncated training, and the baseline to beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchcrest import tree
from torchcrest.active import Draws
from torchcrest.errors import ConfigError, must
from torchcrest.feed import Feed, Reading, examples_in
from torchcrest.measure import device_of
from torchcrest.passes import Passes
from torchcrest.types import WeightedBatch

__all__ = ["RandomBatches"]


class RandomBatches(Passes):
    """Random mini-batches without replacement, of exactly the batch size, all weights 1.

    With a learning-rate schedule compressed into fewer steps this is the baseline to beat (RS2, a fresh
    random subset each epoch); with the full run's steps it is full training; with the full schedule cut
    off, truncated training. The methods differ in the number of steps and the schedule alone.

    Args:
        model: only its device is read.
        dataset: map-style, as for :class:`torchcrest.Crest`.
        batch_size: examples in a batch; the last of a pass goes on into the next, none is smaller.
        steps: batches of a pass.
        seed: of the order.
        num_workers: processes that read batches ahead; it and the rest as in
            :class:`torch.utils.data.DataLoader`.
        collate_fn: makes a batch of a list of examples.
        pin_memory: read into pinned memory.
        prefetch_factor: batches that each worker reads ahead.

    Raises:
        ConfigError: settings that cannot work.
        DataError: a data set that cannot be used.
    """

    method = "random"

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        batch_size: int,
        *,
        steps: int,
        seed: int = 0,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
    ) -> None:
        examples = examples_in(dataset)
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or not 1 <= batch_size <= examples:
            raise ConfigError(
                must(
                    "batch_size",
                    f"be a whole number from 1 to the {examples} examples",
                    batch_size,
                    "Use for example 128.",
                )
            )
        super().__init__(model, steps=steps, seed=seed, examples=examples)
        self._batch_size = batch_size
        everyone = torch.ones(examples, dtype=torch.bool)
        reading = Reading(num_workers, collate_fn, pin_memory, prefetch_factor)
        self._feed = Feed(dataset, Draws(everyone, seed), batch_size, reading, seed)

    def _next_batch(self) -> tuple[WeightedBatch, Tensor]:
        indices, data = self._feed.next()
        device = device_of(self._model)
        return WeightedBatch(tree.move(data, device), torch.ones(len(indices), device=device)), indices

    def _settings(self) -> dict[str, Any]:
        return {"batch_size": self._batch_size}

    def _state(self) -> dict[str, Any]:
        return {"place": self._feed.state_dict()}

    def _load(self, state: dict[str, Any]) -> None:
        self._feed.load_state_dict(state["place"])
