"""Which examples are drawn, and in which order: the active set and its shuffled passes (steps 1 and 8)."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["ActiveSet", "Draws", "Place", "stream"]


def stream(seed: int, *keys: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator of its own for each purpose, a function of the seed and the keys alone.

    Nothing of it has to be saved to resume a run, and no two purposes share numbers.

    >>> torch.randint(9, (3,), generator=stream(0, "pass", 1)).equal(
    ...     torch.randint(9, (3,), generator=stream(0, "pass", 1)))
    True
    """
    words = [seed, *(zlib.crc32(key.encode()) if isinstance(key, str) else key for key in keys)]
    value = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(value >> np.uint64(1)))


class ActiveSet:
    """The examples not yet learned.

    Over an interval it keeps each example's largest measured loss; those that were measured in it and
    stayed below a bound all along are set aside at its end.

    Attributes:
        mask: ``[examples]`` bool, True for those still drawn.
        stopped: exclusion came to its end because pools need the examples that are left.
        largest: ``[examples]`` largest loss measured in the running interval; -inf: none.
    """

    def __init__(self, examples: int) -> None:
        self.mask = torch.ones(examples, dtype=torch.bool)
        self.count = examples
        self.stopped = False
        self.largest = torch.full((examples,), -torch.inf)

    def record(self, indices: Tensor, losses: Tensor) -> None:
        """Note the losses ``[n]`` of the examples ``[n]`` (distinct ones)."""
        self.largest[indices] = torch.maximum(self.largest[indices], losses.detach().float().cpu())

    def close_interval(self, learned_loss: float, least: int) -> int:
        """End an interval: set aside what was learned in it.

        Args:
            learned_loss: alpha.
            least: examples that must stay. If dropping would leave fewer, the lowest losses go first.

        Returns:
            How many examples were set aside.
        """
        learned = (self.largest > -torch.inf) & (self.largest < learned_loss) & self.mask
        candidates = learned.nonzero()[:, 0]
        room = max(0, self.count - least)
        if len(candidates) > room:
            self.stopped = True
            candidates = candidates[self.largest[candidates].argsort(stable=True)[:room]]
        self.mask[candidates] = False
        self.count -= len(candidates)
        self.largest.fill_(-torch.inf)
        return len(candidates)

    def state_dict(self) -> dict[str, Any]:
        """Return the mask and the running interval's losses."""
        return {"mask": self.mask.clone(), "largest": self.largest.clone(), "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, in place."""
        self.mask.copy_(state["mask"])
        self.largest.copy_(state["largest"])
        self.count = int(self.mask.sum())
        self.stopped = bool(state["stopped"])


class Place(NamedTuple):
    """How far the drawing has come: the pass, the position in it, and examples put off to the next draw."""

    number: int
    position: int
    put_off: tuple[int, ...]


class Draws:
    """Draw distinct active examples through shuffled passes, so that all are seen equally often.

    Several ranks draw together, and each keeps its share: with all their draws they go through the same passes.

    A pass is a permutation of all examples, a function of the seed and the pass's number; the inactive
    ones are passed over. So the place in it is all the state there is. A draw that reaches into the next
    pass puts off the examples that it already holds.
    """

    def __init__(self, active: Tensor, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.place = Place(0, 0, ())
        self._rank, self._ranks = rank, ranks
        self._active = active
        self._seed = seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    def draw(self, size: int) -> Tensor:
        """Return ``[size]`` distinct active examples, no other rank's among them. There must be enough for all."""
        size *= self._ranks
        number, position, put_off = self.place
        chosen = torch.tensor(put_off, dtype=torch.int64)
        chosen = chosen[self._active[chosen]]
        later: list[int] = []
        examples = len(self._active)
        while len(chosen) < size:
            if position == examples:
                number, position = number + 1, 0
            need = size - len(chosen)
            ahead = self._pass(number)[position : position + 4 * need]
            usable = self._active[ahead].nonzero()[:need, 0]
            position += int(usable[-1]) + 1 if len(usable) == need else len(ahead)
            found = ahead[usable]
            again = torch.isin(found, chosen)
            later += found[again].tolist()
            chosen = torch.cat([chosen, found[~again]])
        self.place = Place(number, position, tuple(later))
        return chosen[self._rank :: self._ranks]

    def _pass(self, number: int) -> Tensor:
        if self._order[0] != number:
            generator = stream(self._seed, "pass", number)
            self._order = (number, torch.randperm(len(self._active), generator=generator))
        return self._order[1]
