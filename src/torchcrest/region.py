"""A region: the stretch of training over which one quadratic model, and what was picked with it, is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchcrest import tree
from torchcrest.active import stream
from torchcrest.distributed import reshard
from torchcrest.feed import Feed
from torchcrest.measure import device_of
from torchcrest.types import Coreset

__all__ = ["Region"]


@dataclass
class Region:
    """A region's coresets and check set, and where it stands.

    Attributes:
        number: counted from 0.
        begun: step at which it began.
        interval: steps between checks.
        check_at: step of the next check.
        coresets: P of them.
        parameters: those that were trainable when it began.
        check_indices: ``[r]`` examples of the check set V_r, or None where nothing is checked.
        check_data: their data, on the model's device.
    """

    number: int
    begun: int
    interval: int
    check_at: int
    coresets: list[Coreset]
    parameters: list[nn.Parameter] = field(default_factory=list)
    check_indices: Tensor | None = None
    check_data: Any = None

    def pick(self, step: int, seed: int) -> Coreset:
        """Return the coreset of a step: in random order, each once before any comes again."""
        turn, place = divmod(step - self.begun, len(self.coresets))
        order = torch.randperm(len(self.coresets), generator=stream(seed, "order", self.number, turn))
        return self.coresets[int(order[place])]

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Return what is needed to read the region again: indices, rows and weights, not the data."""
        names = {parameter: name for name, parameter in reshard(model).named_parameters()}
        return {
            "number": self.number,
            "begun": self.begun,
            "interval": self.interval,
            "check_at": self.check_at,
            "coresets": [(c.pool_indices, c.rows, c.weights) for c in self.coresets],
            "parameters": [names[parameter] for parameter in self.parameters],
            "check_indices": self.check_indices,
        }

    @classmethod
    def read(cls, state: Mapping[str, Any], feed: Feed, model: nn.Module) -> Region:
        """Read a region's data again. Whole pools: a collate function may pad to the longest of its batch."""
        device, named = device_of(model), dict(reshard(model).named_parameters())
        coresets = []
        for pool_indices, rows, weights in state["coresets"]:
            data = tree.move(tree.take(feed.read(pool_indices), rows), device)
            coresets.append(Coreset(pool_indices.cpu(), rows.cpu(), weights.to(device), data))
        check = state["check_indices"]
        return cls(
            number=state["number"],
            begun=state["begun"],
            interval=state["interval"],
            check_at=state["check_at"],
            coresets=coresets,
            parameters=[named[name] for name in state["parameters"]],
            check_indices=check,
            check_data=None if check is None else tree.move(feed.read(check), device),
        )
