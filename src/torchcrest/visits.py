"""How often examples were trained on: none is to be far ahead of the others, but for those of rare classes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["UNKNOWN", "Visits"]

BLOCK = 1 << 17  # examples looked at together; all at once would take several times the memory of what is held
RARE = 1.5  # times as many examples in the mean class as in a rare one; nearly even classes are better not told apart
UNKNOWN = torch.iinfo(torch.int32).min  # class of an example that was not read


class Visits:
    """How many batches each example was in, and of which class it is.

    Args:
        examples: how many there are.
        extra: batches by which an example may be ahead.

    Attributes:
        counts: ``[examples]`` int32, batches of this rank that each was in.
        classes: ``[examples]`` int32, each one's class as far as this rank knows; :data:`UNKNOWN` else.
    """

    def __init__(self, examples: int, extra: float) -> None:
        self.counts = torch.zeros(examples, dtype=torch.int32)
        self.classes = torch.full((examples,), UNKNOWN, dtype=torch.int32)
        self._extra = extra
        self._read: list[tuple[Tensor, Tensor]] = []  # indices and classes that have not been waited for

    def count(self, indices: Tensor) -> None:
        """Count a batch with the examples ``[m]`` (distinct ones)."""
        self.counts[indices] += 1

    def label(self, indices: Tensor, labels: Tensor | None) -> None:
        """Note the classes ``[n]`` of the examples ``[n]``, None where there are none. A copy, not waited for."""
        if labels is not None:
            self._read.append((indices, labels.to(torch.int32, copy=True)))

    def enter(self) -> None:
        """Enter the classes that were noted. Waits for the device, once."""
        if self._read:
            indices, labels = (torch.cat(parts) for parts in zip(*self._read, strict=True))
            self.classes[indices] = labels.cpu()
            self._read.clear()

    def level(self, active: Tensor, counts: Tensor) -> Tensor:
        """Tell which examples are not ahead of the others.

        That is, in no more batches than the mean of the active examples and ``extra``. Those of a rare class, under two
        thirds of the mean class, may be in as many times more as would make it as large as that.

        Args:
            active: ``[examples]`` bool, those that are compared. All whose class was not entered are one class.
            counts: ``[examples]`` batches of all ranks that each was in.

        Returns:
            ``[examples]`` bool, False for the others.
        """
        blocks = [slice(start, start + BLOCK) for start in range(0, len(active), BLOCK)]
        names, sizes = zip(*(self.classes[block].unique(return_counts=True) for block in blocks), strict=True)
        classes, at = torch.cat(names).unique(return_inverse=True)
        size = at.bincount(torch.cat(sizes))
        mean = sum(int(counts[block][active[block]].sum()) for block in blocks) / int(active.count_nonzero())
        times = size.mean() / size
        bounds = mean * times.where(times >= RARE, 1.0) + self._extra
        level = torch.zeros_like(active)
        for block in blocks:
            bound = bounds[torch.searchsorted(classes, self.classes[block])]
            level[block] = active[block] & (counts[block] <= bound)
        return level

    def state_dict(self) -> dict[str, Tensor]:
        """Return counts and classes."""
        self.enter()
        return {name: values.clone() for name, values in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state, in place."""
        self._read.clear()
        for name, values in self._tensors().items():
            values.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "classes": self.classes}
