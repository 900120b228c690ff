"""How many labels are wrong, and what that asks of coresets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchcrest.config import CrestConfig
from torchcrest.objectives import Classification, Objective
from torchcrest.types import Pool

__all__ = ["LabelNoise"]

SUREST = 0.1  # share of the predictions that are asked
MEMORY = 0.7  # what is left of a group's weight when the next one comes
FALLING, PATIENCE = 0.9, 5  # an estimate that falls below this share of the lowest still falls; groups without one
SOME, MANY = 0.1, 0.3  # wrong labels: from here on pools are larger; from here on clusters count in full


class LabelNoise:
    """Estimates the share of wrong labels in training, and says how coresets are to be picked with so many.

    The examples of a pool have mostly not been trained on of late. Where a prediction is among the surest tenth of
    such examples and the label is another, the label is at fault more often than not: the accuracy among them tends to
    the share of right labels as the predictions get better. They get better in training, so the lowest estimate so far
    counts; and until it no longer falls, none does, and labels count as right. Of classes that cannot be told apart it
    takes some labels for wrong; wrong labels that are learned by heart it takes for right.

    Args:
        config: says what is known, and how coresets are picked where labels are right.
        objective: whose outputs are logits, if any are.

    Attributes:
        share: of wrong labels, from 0 to 1; None: no account is taken of it.
    """

    def __init__(self, config: CrestConfig, objective: Objective) -> None:
        known = isinstance(objective, Classification)
        self._estimates = config.label_noise == "estimated" and known
        self.share: float | None = None
        if self._estimates:
            self.share = 0.0
        elif not isinstance(config.label_noise, str):
            self.share = config.label_noise
        self._m, self._r, self._power = config.batch_size, config.pool, config.weight_power
        self._wrong = self._weight = 0.0
        self._lowest, self._still = 1.0, 0
        self._unread: list[Tensor] = []

    @property
    def parts(self) -> int:
        """Into how many pools of about 2m, or 4m, what is read together is divided, each to give a coreset."""
        return 1 if self.share is None else max(1, self._r // ((4 if self.share >= SOME else 2) * self._m))

    @property
    def power(self) -> float:
        """The power of a cluster's size that is its weight."""
        share = 0.0 if self.share is None else min(1.0, self.share / MANY)
        return self._power + share * max(0.0, 1 - self._power)

    def add(self, pools: Sequence[Pool]) -> None:
        """Take pools that were measured. Does not wait for the device."""
        known = [(pool.outputs, pool.labels) for pool in pools if pool.outputs is not None and pool.labels is not None]
        if not self._estimates or not known:
            return
        outputs, labels = (torch.cat(parts) for parts in zip(*known, strict=True))
        if outputs.dim() == 2 and outputs.shape[1] > 1:
            sure, predicted = outputs.softmax(1).max(1)
            sure = torch.where(labels < 0, -1.0, sure)  # those without a label are not counted
            surest = sure.topk(max(1, round(SUREST * len(sure)))).indices
            self._unread.append((predicted[surest] != labels[surest]).float().mean())

    def read(self) -> None:
        """Enter what was taken. Waits for the device."""
        if not self._unread or self.share is None:
            return
        for wrong in torch.stack(self._unread).tolist():
            self._wrong = MEMORY * self._wrong + wrong
            self._weight = MEMORY * self._weight + 1
            estimate = self._wrong / self._weight
            if self._still < PATIENCE:
                self._still = 0 if estimate < FALLING * self._lowest else self._still + 1
            self._lowest = min(self._lowest, estimate)
            self.share = self._lowest if self._still == PATIENCE else 0.0
        self._unread.clear()

    def numbers(self) -> list[float]:
        """Return what ranks tell each other."""
        return [] if self.share is None else [self.share]

    def take(self, numbers: Sequence[float]) -> None:
        """Take the mean over ranks, so that all of them pick alike."""
        if numbers:
            self.share = numbers[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the estimate."""
        self.read()
        names = ("share", "_wrong", "_weight", "_lowest", "_still")
        return {name.strip("_"): getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.share, self._wrong, self._weight = state["share"], float(state["wrong"]), float(state["weight"])
        self._lowest, self._still = float(state["lowest"]), int(state["still"])
