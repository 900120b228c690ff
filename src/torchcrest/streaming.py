"""Streams: pools of data sets that are read in order, without a length and without an index."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from torchcrest import tree
from torchcrest.errors import CheckpointError, ConfigError, DataError, must
from torchcrest.feed import Reading, drawing, loader_of, refuse_other_length

__all__ = ["Spot", "StreamFeed", "is_stream"]


def is_stream(dataset: Any) -> bool:
    """Say whether a data set is a stream, as those of Hugging Face are that load with ``streaming=True``."""
    return isinstance(dataset, IterableDataset)


class Spot(NamedTuple):
    """How far a stream has been read: examples in all, the pass, examples of the pass, the stream's own state."""

    read: int
    number: int
    position: int
    state: Any


class _Pools(IterableDataset[tuple[Tensor, Any, Spot]]):
    """Cuts a stream into pools, each with the spot behind it, for the worker may be further by then."""

    def __init__(
        self, dataset: Any, size: int, reading: Reading, seed: int, share: tuple[int, int], by_state: bool
    ) -> None:
        self._dataset = dataset
        self._size = size
        self._collate = reading.collate_fn or default_collate
        self._seed = seed
        self._rank, self._ranks = share
        self._has_state = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        self._by_state = by_state and self._has_state
        self._origin: Any = None  # the state before anything was read, to read again from there
        self.start = Spot(0, 0, 0, None)

    def __iter__(self) -> Iterator[tuple[Tensor, Any, Spot]]:
        by_state = self._by_state and self.start.state is not None
        spot = self.start if by_state else Spot(0, 0, 0, self._origin)
        if self._has_state and self._origin is None:
            self._origin = self._state()
        examples = self._examples(spot)
        while True:
            chosen: dict[int, Any] = {}
            with drawing(self._seed, [spot.read]):  # each pool for itself, and so the same in a resumed run
                while len(chosen) < self._size:
                    spot, example = next(examples)
                    if (spot.read - 1) % self._ranks == self._rank:
                        chosen[spot.read - 1] = example
                if spot.read <= self.start.read:  # handed over before the run was resumed
                    continue
                data = self._collate(list(chosen.values()))
            yield torch.tensor(list(chosen)), data, self.here(spot)

    def _examples(self, spot: Spot) -> Iterator[tuple[Spot, Any]]:
        """Yield the examples from a spot on, each with the spot behind it, and start over at the end of the stream."""
        read, number, position, state = spot
        while True:
            if hasattr(self._dataset, "set_epoch"):
                self._dataset.set_epoch(number)
            if state is not None:
                self._dataset.load_state_dict(copy.deepcopy(state))
                state = None
            for example in self._dataset:
                read, position = read + 1, position + 1
                yield Spot(read, number, position, None), example
            if position < self._size * self._ranks:
                want = f"hold at least pool_size = {self._size} examples"
                want += f" on each of {self._ranks} ranks" if self._ranks > 1 else ""
                raise DataError(must("dataset", want, position, "Check its path and split, or use a smaller pool."))
            number, position = number + 1, 0

    def here(self, spot: Spot) -> Spot:
        """Return the spot with the state that the stream is in."""
        return spot._replace(state=self._state()) if self._by_state else spot

    def _state(self) -> Any:
        return copy.deepcopy(self._dataset.state_dict())


class StreamFeed:
    """Reads pools of a stream in its order, as :class:`torchcrest.feed.Feed` reads those of a data set with an index.

    An example's index is its running number: 0, 1, 2, ... as read, over all passes. Nothing can be read a second
    time by its index, so states hold what is still to be trained on.

    Args:
        dataset: the stream; at its end it is started over.
        size: examples in a pool.
        reading: how to read. One worker at most: each reads a copy of the stream.
        seed: of what is drawn from the global random states in reading.
        share: rank and number of ranks; each takes as its own every so many-th example.
        by_state: go on from a place by the stream's ``load_state_dict``, where it has one and ``state_dict``;
            else by reading it from the start.

    Attributes:
        place: how far the pools handed over have come in the stream.

    Raises:
        ConfigError: several workers, or settings that the data loader refuses.
    """

    def __init__(
        self,
        dataset: Any,
        size: int,
        reading: Reading,
        seed: int,
        share: tuple[int, int] = (0, 1),
        by_state: bool = True,
    ) -> None:
        if reading.num_workers > 1:
            do = "Each would read a copy of the whole stream; one reads ahead, in order."
            raise ConfigError(must("num_workers", "be 0 or 1 for a stream", reading.num_workers, do))
        self._pools = _Pools(dataset, size, reading, seed, share, by_state)
        self._loader = loader_of(self._pools, reading, seed, batch_size=None, collate_fn=_as_it_is)
        self._batches: Iterator[tuple[Tensor, Any, Spot]] | None = None
        self._ahead: tuple[Tensor, Any, Spot] | None = None
        self.place = self._pools.here(self._pools.start)

    def next(self) -> tuple[Tensor, Any]:
        """Return the next pool: its running numbers ``[size]`` and its data, on the CPU.

        Raises:
            DataError: a tensor of the batch does not have an entry an example, or the stream is shorter than a pool.
        """
        indices, data, self.place = self._peek()
        self._ahead = None
        return indices, data

    def _peek(self) -> tuple[Tensor, Any, Spot]:
        """Read the next pool, unless it has been read."""
        if self._ahead is None:
            try:
                if self._batches is None:
                    self._batches = iter(self._loader)
                pool = next(self._batches)
                refuse_other_length(pool[1], len(pool[0]))
            except BaseException:
                self.seek(self.place)  # so that whoever goes on misses nothing
                raise
            self._ahead = pool
        return self._ahead

    def kept(self, data: Any) -> tuple[Any, ...]:
        """Return what a state has to hold of data: all, on the CPU, as a plain list of what is in the batch."""
        copied = tree.apply(data, lambda leaf: leaf.detach().to("cpu", copy=True))
        return (tree.flat(copied),)

    def read(self, indices: Tensor, kept: Sequence[Any] = ()) -> Any:
        """Return data of a state, nested as those of the next pool are.

        Raises:
            CheckpointError: that has other parts.
        """
        like = self._peek()[1]
        if len(tree.flat(like)) != len(kept):
            want = f"have {len(tree.flat(like))} parts, as those of the stream"
            do = "Resume with the same data set and collate_fn."
            raise CheckpointError(must("batches of the checkpoint", want, len(kept), do))
        return tree.filled(like, kept)

    def state_dict(self) -> list[Any]:
        """Return the place, with the stream's own state."""
        return list(self.place)

    def load_state_dict(self, state: list[Any]) -> None:
        """Go on from the place of a state."""
        self.seek(Spot(*state))

    def redraw(self) -> None:
        """Do nothing: of a stream no example is set aside."""

    def seek(self, place: Spot) -> None:
        """Go on from a place."""
        self.place = self._pools.start = place
        self._batches = self._ahead = None

    def close(self) -> None:
        """End the worker. The next pool starts a new one, which reads again what this has read ahead."""
        self.seek(self.place)


def _as_it_is(pool: Any) -> Any:
    """Leave what is a pool already."""
    return pool
