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
from torchcrest.objectives import Objective, trimmed
from torchcrest.streaming import StreamFeed
from torchcrest.types import Coreset

__all__ = ["Region", "read_coresets", "states_of"]


@dataclass
class Region:
    """A region's coresets and check set, and where it stands.

    Attributes:
        number: counted from 0.
        begun: step at which it began.
        interval: steps between checks.
        check_at: step of the next check.
        coresets: what is trained on from ``picked_at`` on: P coresets, or as many batches as there are steps, some
            of them random ones.
        picked_at: step at which they were picked.
        renew_at: step at which they are picked anew; None: not before the region ends.
        parameters: those that were trainable when it began.
        check_indices: ``[r]`` examples of the check set V_r, or None where nothing is checked.
        check_data: their data, on the model's device.
    """

    number: int
    begun: int
    interval: int
    check_at: int
    coresets: list[Coreset]
    picked_at: int
    renew_at: int | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    check_indices: Tensor | None = None
    check_data: Any = None

    def pick(self, step: int, seed: int) -> Coreset:
        """Return the coreset of a step: in random order, each once before any comes again."""
        turn, place = divmod(step - self.picked_at, len(self.coresets))
        order = torch.randperm(len(self.coresets), generator=stream(seed, "order", self.picked_at, turn))
        return self.coresets[int(order[place])]

    def state_dict(self, model: nn.Module, feed: Feed | StreamFeed) -> dict[str, Any]:
        """Return what is needed to read the region again: indices, rows and weights; the data only of a stream."""
        names = {parameter: name for name, parameter in reshard(model).named_parameters()}
        return {
            "number": self.number,
            "begun": self.begun,
            "interval": self.interval,
            "check_at": self.check_at,
            "picked_at": self.picked_at,
            "renew_at": self.renew_at,
            "coresets": states_of(self.coresets, feed),
            "parameters": [names[parameter] for parameter in self.parameters],
            "check_indices": self.check_indices,
            "check_kept": () if self.check_indices is None else feed.kept(self.check_data),
        }

    @classmethod
    def read(cls, state: Mapping[str, Any], feed: Feed | StreamFeed, model: nn.Module, objective: Objective) -> Region:
        """Read a region's data again. Whole pools: a collate function may pad to the longest of its batch."""
        device, named = device_of(model), dict(reshard(model).named_parameters())
        check = state["check_indices"]
        return cls(
            number=state["number"],
            begun=state["begun"],
            interval=state["interval"],
            check_at=state["check_at"],
            picked_at=state["picked_at"],
            renew_at=state["renew_at"],
            coresets=read_coresets(state["coresets"], feed, device, objective),
            parameters=[named[name] for name in state["parameters"]],
            check_indices=check,
            check_data=None if check is None else tree.move(feed.read(check, *state["check_kept"]), device),
        )


def states_of(coresets: list[Coreset], feed: Feed | StreamFeed) -> list[tuple[Any, ...]]:
    """Return what is needed to read coresets again; their data where they cannot be."""
    return [(c.pool_indices, c.rows, c.weights, c.picked, *feed.kept(c.data)) for c in coresets]


def read_coresets(
    states: list[tuple[Any, ...]], feed: Feed | StreamFeed, device: torch.device, objective: Objective
) -> list[Coreset]:
    """Read coresets again, each pool once."""
    read: dict[tuple[int, ...], Any] = {}
    coresets = []
    for indices, rows, weights, picked, *kept in states:
        key = tuple(indices.tolist())
        if not kept and key not in read:
            read = {key: feed.read(indices)}  # random batches of one pool stand side by side
        # What was kept was trimmed before.
        data = feed.read(indices, *kept) if kept else trimmed(objective, tree.take(read[key], rows))
        coresets.append(Coreset(indices.cpu(), rows.cpu(), weights.to(device), tree.move(data, device), picked))
    return coresets
