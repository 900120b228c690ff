"""Batches of any nesting: tuples, lists, mappings and named tuples of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["apply", "clone", "filled", "flat", "leaves", "move", "part", "take"]


def _map(data: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every leaf; a list that holds no tensor is one leaf (a column of strings, say)."""
    if isinstance(data, Mapping):
        mapped = {key: _map(value, function) for key, value in data.items()}
        if isinstance(data, MutableMapping):  # keeps what the type carries besides, as a defaultdict's factory
            same = copy.copy(data)
            same.update(mapped)
            return same
        return type(data)(mapped)  # type: ignore[call-arg]
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(_map(value, function) for value in data))
    if isinstance(data, tuple) or (isinstance(data, list) and _holds_tensor(data)):
        return type(data)(_map(value, function) for value in data)
    return function(data)


def _holds_tensor(data: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves(data))


def leaves(data: Any) -> Iterator[Any]:
    """Yield what is inside the nesting, in order.

    >>> list(leaves({"x": 1, "y": (2, [3])}))
    [1, 2, 3]
    """
    if isinstance(data, Mapping):
        for value in data.values():
            yield from leaves(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from leaves(value)
    else:
        yield data


def flat(data: Any) -> list[Any]:
    """Return what is inside the nesting, in order; a list that holds no tensor (a column of strings, say) is one.

    >>> flat({"x": torch.tensor(1), "name": ["a", "b"]})
    [tensor(1), ['a', 'b']]
    """
    found = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    _map(data, note)
    return found


def filled(like: Any, leaves: Sequence[Any]) -> Any:
    """Return a batch that is nested as another is, of what :func:`flat` has given.

    >>> filled({"x": torch.tensor(0), "name": ["c"]}, [torch.tensor(1), ["a", "b"]])
    {'x': tensor(1), 'name': ['a', 'b']}
    """
    rest = list(leaves)
    return _map(like, lambda _: rest.pop(0))


def take(data: Any, rows: Tensor) -> Any:
    """Return the given rows of every tensor (and of every column of other things).

    Args:
        data: a batch; each tensor has the examples along its first dimension.
        rows: ``[m]`` int64 positions.

    >>> take({"x": torch.arange(4), "name": ["a", "b", "c", "d"]}, torch.tensor([0, 2]))
    {'x': tensor([0, 2]), 'name': ['a', 'c']}
    """
    positions: list[int] = []

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.index_select(0, rows.to(leaf.device)) if leaf.dim() else leaf
        if isinstance(leaf, list):
            positions[:] = positions or rows.tolist()
            return [leaf[row] for row in positions]
        return leaf

    return _map(data, pick)


def move(data: Any, device: torch.device) -> Any:
    """Return the batch with every tensor on the device; pinned memory is copied asynchronously."""
    return apply(data, lambda leaf: leaf.to(device, non_blocking=True))


def part(data: Any, start: int, stop: int) -> Any:
    """Return the rows from start to stop of every tensor (and of every column of other things), without a copy.

    >>> part({"x": torch.arange(4), "name": ["a", "b", "c", "d"]}, 1, 3)
    {'x': tensor([1, 2]), 'name': ['b', 'c']}
    """

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[start:stop] if leaf.dim() else leaf
        return leaf[start:stop] if isinstance(leaf, list) else leaf

    return _map(data, cut)


def apply(data: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the batch with the function's result for every tensor."""
    return _map(data, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def clone(data: Any) -> Any:
    """Return a copy of the batch that shares no tensor with it."""
    return apply(data, Tensor.clone)
