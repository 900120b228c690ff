"""A small network that learns beside the model, and whose gradients are compared in place of the model's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcrest import tree
from torchcrest.objectives import Classification, Objective, split_target

__all__ = ["Student", "can_learn"]

HIDDEN = 64
# The longest side of what it looks at, by how many sides an example has besides its channels.
SIDES = {1: 256, 2: 16, 3: 6}


class Student(nn.Module):
    """One hidden layer of 64 units over the first tensor of the inputs, shrunk and standardised.

    Signals, images and volumes are averaged down to at most 256, 16 x 16 or 6 x 6 x 6 a channel.

    Args:
        inputs: d, numbers of an example after shrinking.
        classes: c, outputs.
        seed: of the first weights. The global random state is left as it was.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: int, classes: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            self.hidden = nn.Linear(inputs, HIDDEN)
            self.head = nn.Linear(HIDDEN, classes)

    @classmethod
    def of(cls, data: Any, classes: int, seed: int) -> Student:
        """Build one for batches like this, on their device, and standardise by what is in it."""
        x = _flat(_leaf(split_target(data)[0]))
        student = cls(x.shape[1], classes, seed).to(x.device)
        variance, mean = torch.var_mean(x, 0, correction=0)
        # What hardly ever changes, as the corner of an image, must not count as much as all the rest.
        spread = (variance + 0.01 * variance.mean()).sqrt()
        student.mean.copy_(mean)
        student.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)).reciprocal())
        return student

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return logits ``[n, c]`` for the inputs of the model."""
        x = (_flat(_leaf((inputs, named))) - self.mean) * self.scale
        logits: Tensor = self.head(F.relu(self.hidden(x)))
        return logits


def can_learn(objective: Objective, data: Any, outputs: Tensor) -> bool:
    """Tell whether a student can stand in for a model that gives these outputs for a batch.

    It takes classes, one an example, and pixels or real numbers to tell them by. Other integers, as those of tokens,
    say nothing by their size.
    """
    return type(objective) is Classification and outputs.dim() == 2 and _leaf(split_target(data)[0]) is not None


def _leaf(inputs: Any) -> Tensor | None:
    """Return the first of the inputs that a student can look at."""
    for leaf in tree.leaves(inputs):
        if (
            isinstance(leaf, Tensor)
            and (leaf.is_floating_point() or leaf.dtype == torch.uint8)
            and 2 <= leaf.dim() <= 5
        ):
            return leaf
    return None


def _flat(leaf: Tensor | None) -> Tensor:
    """Return a row an example."""
    assert leaf is not None
    x, most = leaf.float(), SIDES.get(leaf.dim() - 2)
    if most and max(x.shape[2:]) > most:
        x = F.interpolate(x, size=[min(side, most) for side in x.shape[2:]], mode="area")
    return x.flatten(1)
