"""Which examples are drawn, and in which order: the active set and its shuffled passes (steps 1 and 8)."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["ActiveSet", "Draws", "Place", "Shuffle", "stream"]

WHOLE = 1 << 17  # examples; up to so many a pass is one random permutation, above it is computed as it is needed
WINDOW = 8192  # places of a pass computed at a time
ROUNDS = 8


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
    """The examples not yet learned, and those of them that are drawn.

    Over an interval it keeps each example's largest measured loss; those that were measured in it and
    stayed below a bound all along are set aside at its end. Others may rest for a while.

    Args:
        examples: how many there are.
        resting: some may rest, see :meth:`rest`.

    Attributes:
        mask: ``[examples]`` bool, True for those not set aside.
        drawn: ``[examples]`` bool, True for those that do not rest either; the mask itself where none may.
        stopped: exclusion came to its end because pools need the examples that are left.
        largest: ``[examples]`` largest loss measured in the running interval; -inf: none.
    """

    def __init__(self, examples: int, resting: bool = False) -> None:
        self.mask = torch.ones(examples, dtype=torch.bool)
        self.drawn = self.mask.clone() if resting else self.mask
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
        learned = self.largest > -torch.inf
        learned &= self.largest < learned_loss
        learned &= self.mask
        # A sum would first make whole numbers of all, eight bytes each.
        count, room = int(learned.count_nonzero()), max(0, self.count - least)
        if count > room:
            self.stopped = True
            count = room
            self._keep_lowest(learned, room)
        self.mask &= learned.logical_not_()
        self.count -= count
        if self.drawn is not self.mask:
            self.rest(self.drawn & self.mask, least)
        self.largest.fill_(-torch.inf)
        return count

    def rest(self, ready: Tensor, least: int) -> bool:
        """Draw some of the active examples only, until told otherwise.

        Args:
            ready: ``[examples]`` bool, those of them that do not rest.
            least: examples that must be drawn. If fewer would be, none rest.

        Returns:
            Whether others are drawn than before.
        """
        chosen = ready if int(ready.count_nonzero()) >= least else self.mask
        changed = not chosen.equal(self.drawn)
        self.drawn.copy_(chosen)
        return changed

    def _keep_lowest(self, learned: Tensor, room: int) -> None:
        """Clear all but the lowest losses, in place; no list of examples is made, which takes more than they do."""
        if room == 0:
            learned.zero_()
            return
        bound = float(np.partition(self.largest[learned].numpy(), room - 1)[room - 1])
        ties = learned & (self.largest == bound)
        learned &= self.largest < bound
        learned[ties.nonzero()[: room - int(learned.count_nonzero()), 0]] = True

    def state_dict(self) -> dict[str, Any]:
        """Return the masks and the running interval's losses."""
        state = {"mask": self.mask.clone(), "largest": self.largest.clone(), "stopped": self.stopped}
        return state if self.drawn is self.mask else {**state, "drawn": self.drawn.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, in place."""
        self.mask.copy_(state["mask"])
        self.largest.copy_(state["largest"])
        self.count = int(self.mask.count_nonzero())
        self.stopped = bool(state["stopped"])
        if self.drawn is not self.mask:
            self.drawn.copy_(state["drawn"])


class Place(NamedTuple):
    """How far the drawing has come: the pass, the position in it, and examples put off to the next draw."""

    number: int
    position: int
    put_off: tuple[int, ...]


class Shuffle:
    """A random order of many examples, of which any part can be computed by itself.

    A Feistel network: places are cells of a grid with just over n of them, and each round moves all cells of a
    row, or a column, by a random distance. Every round can be undone, so together they are a permutation of the
    cells (Luby and Rackoff, 1988). What lands outside n goes on until it is inside, which leaves a permutation of
    n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). It holds four random
    distances for each row and each column, some 8 sqrt(n) numbers in place of n.

    Args:
        examples: n.
        generator: draws the distances.

    >>> Shuffle(10, torch.Generator().manual_seed(0))(torch.arange(10)).sort().values
    tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """

    def __init__(self, examples: int, generator: torch.Generator) -> None:
        rows = math.isqrt(examples - 1) + 1
        self._examples = examples
        self._sides = rows, -(-examples // rows)
        self._moves = [
            torch.randint(self._sides[turn % 2], (self._sides[1 - turn % 2],), generator=generator)
            for turn in range(ROUNDS)
        ]

    def __call__(self, places: Tensor) -> Tensor:
        """Return ``[k]`` examples, those at the places ``[k]``, int64."""
        found = self._move(places)
        while len(outside := (found >= self._examples).nonzero()[:, 0]):
            found[outside] = self._move(found[outside])
        return found

    def _move(self, cells: Tensor) -> Tensor:
        columns = self._sides[1]
        at = [cells // columns, cells % columns]
        for turn, moves in enumerate(self._moves):
            moved, still = turn % 2, 1 - turn % 2
            at[moved] = (at[moved] + moves.index_select(0, at[still])).remainder_(self._sides[moved])
        return at[0].mul_(columns).add_(at[1])


class Draws:
    """Draw distinct active examples through shuffled passes, so that all are seen equally often.

    Several ranks draw together, and each keeps its share: with all their draws they go through the same passes.

    A pass is a permutation of all examples, a function of the seed and the pass's number; the inactive
    ones are passed over. So the place in it is all the state there is. A draw that reaches into the next
    pass puts off the examples that it already holds. Of more than 131,072 examples the permutation is a
    :class:`Shuffle`: a new pass takes no more time than any draw does, and no memory.
    """

    def __init__(self, active: Tensor, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.place = Place(0, 0, ())
        self._rank, self._ranks = rank, ranks
        self._active = active
        self._seed = seed
        self._shuffle: tuple[int, Shuffle | None] = (-1, None)
        self._window: tuple[int, int, Tensor] = (-1, 0, torch.empty(0, dtype=torch.int64))

    def draw(self, size: int) -> Tensor:
        """Return ``[size]`` distinct active examples, no other rank's among them. There must be enough for all."""
        size *= self._ranks
        number, position, put_off = self.place
        chosen = torch.tensor(put_off, dtype=torch.int64)
        chosen = chosen[self._active[chosen]]
        later: list[int] = []
        examples, reach = len(self._active), 4
        while len(chosen) < size:
            if position == examples:
                number, position = number + 1, 0
            need = size - len(chosen)
            ahead = self._ahead(number, position)[: reach * need]
            reach *= 2  # where few are active
            usable = self._active[ahead].nonzero()[:need, 0]
            position += int(usable[-1]) + 1 if len(usable) == need else len(ahead)
            found = ahead[usable]
            again = torch.isin(found, chosen)
            later += found[again].tolist()
            chosen = torch.cat([chosen, found[~again]])
        self.place = Place(number, position, tuple(later))
        return chosen[self._rank :: self._ranks]

    def _ahead(self, number: int, position: int) -> Tensor:
        """Return some of what comes in a pass from a position on, at least one example."""
        examples = len(self._active)
        size = examples if examples <= WHOLE else WINDOW
        start = position // size * size
        if self._window[:2] != (number, start):
            self._window = number, start, self._order(number, start, min(start + size, examples))
        return self._window[2][position - start :]

    def _order(self, number: int, start: int, stop: int) -> Tensor:
        examples = len(self._active)
        generator = stream(self._seed, "pass", number)
        if examples <= WHOLE:
            return torch.randperm(examples, generator=generator)
        known, shuffle = self._shuffle
        if shuffle is None or known != number:
            shuffle = Shuffle(examples, generator)
            self._shuffle = number, shuffle
        return shuffle(torch.arange(start, stop))
