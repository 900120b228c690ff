"""The DataLoader side: pools are drawn, read ahead by workers, and handed over in the order of drawing."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from torchcrest import tree
from torchcrest.active import Draws, Place, stream
from torchcrest.errors import ConfigError, DataError, must

__all__ = ["Feed", "Reading", "drawing", "examples_in", "loader_of", "reader_of", "refuse_other_length"]


@dataclass(frozen=True)
class Reading:
    """How examples are read: the settings of :class:`torch.utils.data.DataLoader`, with its meanings.

    ``prefetch_factor`` counts pools for each worker.
    """

    num_workers: int = 0
    collate_fn: Callable[[list[Any]], Any] | None = None
    pin_memory: bool = False
    prefetch_factor: int | None = None
    timeout: float = 0
    worker_init_fn: Callable[[int], None] | None = None
    multiprocessing_context: Any = None


def examples_in(dataset: Any, name: str = "dataset") -> int:
    """Return how many examples a data set has; errors call it by the name.

    Raises:
        DataError: it is an iterable one, has no length or no ``__getitem__``, or is empty.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not isinstance(dataset, Sized):
        want = "be a map-style data set, with __len__ and __getitem__"
        raise DataError(
            must(
                name,
                want,
                type(dataset).__name__,
                "Wrap a stream in a list; Crest reads a torch.utils.data.IterableDataset, too.",
            )
        )
    if len(dataset) == 0:
        raise DataError(must(name, "hold examples", "an empty one", "Check its path and split."))
    return len(dataset)


def loader_of(dataset: Any, reading: Reading, seed: int, **what: Any) -> DataLoader[Any]:
    """Build the loader of a data set; the rest says what it reads.

    Raises:
        ConfigError: settings that it refuses.
    """
    try:
        return DataLoader(
            dataset,
            num_workers=reading.num_workers,
            pin_memory=reading.pin_memory,
            prefetch_factor=reading.prefetch_factor,
            timeout=reading.timeout,
            worker_init_fn=reading.worker_init_fn,
            multiprocessing_context=reading.multiprocessing_context,
            # Its own generator: DataLoader would otherwise draw the workers' seed from the user's.
            generator=stream(seed, "workers"),
            **what,
        )
    except ValueError as error:
        raise ConfigError(f"The data loader refuses its settings: {error}") from error


def refuse_other_length(data: Any, examples: int) -> None:
    """Check that a batch has an entry an example.

    Raises:
        DataError: a tensor in it has not.
    """
    for leaf in tree.leaves(data):
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) != examples:
            want = f"have {examples} entries along the first dimension of each tensor"
            raise DataError(must("batch", want, tuple(leaf.shape), "Check collate_fn."))


class _InMemory(Dataset[Any]):
    """Reads many examples of tensors in memory at once, where the data set would give one at a time."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        """Return what the default collate function makes of the examples."""
        chosen = torch.tensor(rows, dtype=torch.int64)
        return [tensor[chosen] for tensor in self._tensors]


class _Seeded(Dataset[Any]):
    """Reads many examples at once, and seeds what reading and collating them draws from the global random states.

    The seed is a function of the run's and the list of examples alone: the same list gives the same batch,
    in whichever process it is read and as often as it is, and the same examples in another order another one.
    A data set that says ``deterministic = True`` draws nothing, and is spared the tenth of a millisecond.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self._dataset = dataset
        self._collate = collate
        self._seed = seed

    def __getitems__(self, rows: list[int]) -> Any:
        """Return the batch."""
        together = getattr(self._dataset, "__getitems__", None)
        draws = getattr(self._dataset, "deterministic", False) is not True
        with drawing(self._seed, rows) if draws else nullcontext():
            return self._collate(together(rows) if together else [self._dataset[row] for row in rows])


@contextmanager
def drawing(seed: int, rows: list[int]) -> Iterator[None]:
    """Seed the global random states of Python, NumPy and PyTorch's CPU; afterwards they are as before."""
    key = f"{seed}:reading:".encode() + np.asarray(rows, dtype="<i8").tobytes()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(number)
        np.random.seed(number & 0xFFFFFFFF)  # noqa: NPY002
        # torch.manual_seed would seed the accelerators too, which nobody restores.
        torch.default_generator.manual_seed(number)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _whole(batch: Any) -> Any:
    """Collate what is a batch already."""
    return batch


def reader_of(dataset: Any, reading: Reading, seed: int) -> tuple[Any, Callable[[Any], Any]]:
    """Return a data set that gives whole batches, the same for the same list of examples, and its collate function."""
    # No subclass: it may do something of its own.
    if type(dataset) is TensorDataset and reading.collate_fn is None:
        return _InMemory(dataset.tensors), _whole
    return _Seeded(dataset, reading.collate_fn or default_collate, seed), _whole


class _Plan:
    """Draws the next pool whenever the loader asks for one, and keeps what was drawn until it is read.

    Apart from :class:`Feed`, so that the loader does not refer back to it: with the feed go the workers.
    """

    def __init__(self, draws: Draws, size: int) -> None:
        self.draws = draws
        self.size = size
        self.ahead: deque[tuple[Tensor, Place]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            indices = self.draws.draw(self.size)
            self.ahead.append((indices, self.draws.place))
            yield indices.tolist()


class Feed:
    """Reads pools in the order in which they are drawn, whether or not workers read ahead.

    What workers read ahead depends on the active set alone. When that changes, what was drawn ahead is
    drawn anew, so that the stream is the same for any number of workers.

    Attributes:
        place: how far the pools handed over have come in the drawing.
    """

    def __init__(self, dataset: Dataset[Any], draws: Draws, size: int, reading: Reading, seed: int) -> None:
        self.place = draws.place
        self._dataset, self._collate = reader_of(dataset, reading, seed)
        self._plan = _Plan(draws, size)
        self._stale = 0  # pools drawn ahead that are no longer wanted
        self._batches: Iterator[Any] | None = None
        self._loader = loader_of(self._dataset, reading, seed, batch_sampler=self._plan, collate_fn=self._collate)

    def next(self) -> tuple[Tensor, Any]:
        """Return the next pool: its indices ``[size]`` and its data, on the CPU.

        Raises:
            DataError: a tensor of the batch does not have an entry an example.
        """
        if self._batches is None:
            self._batches = iter(self._loader)
        data = next(self._batches)
        while self._stale:
            self._plan.ahead.popleft()
            self._stale -= 1
            data = next(self._batches)
        indices, self.place = self._plan.ahead.popleft()
        refuse_other_length(data, len(indices))
        return indices, data

    def read(self, indices: Tensor) -> Any:
        """Read a pool again, in this process, as the workers would."""
        return self._dataset.__getitems__(indices.tolist())

    def kept(self, data: Any) -> tuple[Any, ...]:
        """Return what a state has to hold of data: nothing, they can be read again."""
        return ()

    def state_dict(self) -> list[Any]:
        """Return the place, as plain numbers."""
        return [self.place.number, self.place.position, list(self.place.put_off)]

    def load_state_dict(self, state: list[Any]) -> None:
        """Go on from the place of a state."""
        number, position, put_off = state
        self.seek(Place(number, position, tuple(put_off)))

    def redraw(self) -> None:
        """Forget what was drawn ahead: the active set has changed."""
        self.seek(self.place)

    def seek(self, place: Place) -> None:
        """Go on from a place."""
        self.place = self._plan.draws.place = place
        self._stale = len(self._plan.ahead)

    def close(self) -> None:
        """End the workers. The next pool starts new ones, which read again what these have read ahead."""
        self.redraw()
        self._batches = None
        self._plan.ahead.clear()
        self._stale = 0
