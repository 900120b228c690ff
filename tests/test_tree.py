from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch

from torchcrest import tree

Point = namedtuple("Point", ["x", "name"])
T = torch.arange(8).view(4, 2)
ROWS = torch.tensor([3, 0])
PICKED = T[ROWS]


def plain(data: Any) -> Any:
    """Turn tensors into lists, to compare."""
    if isinstance(data, torch.Tensor):
        return data.tolist()
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    return type(data)(map(plain, data)) if type(data) in (list, tuple) else data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (T, PICKED),
        ((T, T), (PICKED, PICKED)),
        ([T, T], [PICKED, PICKED]),
        ({"a": T, "b": {"c": (T,)}}, {"a": PICKED, "b": {"c": (PICKED,)}}),
        ({"text": ["a", "b", "c", "d"]}, {"text": ["d", "a"]}),
        ([T, ["a", "b", "c", "d"]], [PICKED, ["d", "a"]]),
        ((T, torch.tensor(5), "same", 3, None), (PICKED, torch.tensor(5), "same", 3, None)),
        ((), ()),
    ],
    ids=["tensor", "tuple", "list", "nested", "strings", "tensors and strings", "others", "empty"],
)
def test_take(data: Any, expected: Any) -> None:
    assert plain(tree.take(data, ROWS)) == plain(expected)


@pytest.mark.parametrize(
    "function",
    [tree.clone, lambda data: tree.move(data, torch.device("cpu")), lambda data: tree.take(data, ROWS)],
    ids=["clone", "move", "take"],
)
@pytest.mark.parametrize(
    "data",
    [
        Point(T, ["a", "b", "c", "d"]),
        OrderedDict(b=T, a=T),
        {"b": T, "a": T},
        [T, T],
        (T, T),
        defaultdict(torch.Tensor, a=T),
        MappingProxyType({"a": T}),
    ],
    ids=lambda data: type(data).__name__,
)
def test_kinds_are_kept(function: Any, data: Any) -> None:
    result = function(data)
    assert type(result) is type(data)
    if isinstance(data, dict):
        assert list(result) == list(data)


def test_named_tuples_keep_their_names() -> None:
    taken = tree.take(Point(T, ["a", "b", "c", "d"]), ROWS)
    assert torch.equal(taken.x, PICKED)
    assert taken.name == ["d", "a"]


def test_take_copies() -> None:
    data = {"x": T.clone()}
    tree.take(data, torch.arange(4))["x"].zero_()
    assert torch.equal(data["x"], T)


def test_clone_shares_no_tensor() -> None:
    data: Any = [T.clone(), {"x": T.clone(), "n": 3}]
    copy = tree.clone(data)
    assert plain(copy) == plain(data)
    for leaf in tree.leaves(copy):
        if isinstance(leaf, torch.Tensor):
            leaf.zero_()
    assert torch.equal(data[0], T)
    assert torch.equal(data[1]["x"], T)


def test_move() -> None:
    moved = tree.move({"x": T, "n": 3, "s": ["a"]}, torch.device("meta"))
    assert moved["x"].device.type == "meta"
    assert (moved["n"], moved["s"]) == (3, ["a"])


def test_leaves_in_order() -> None:
    assert list(tree.leaves([1, (2, {"a": 3, "b": [4, "five"]}), Point(6, 7)])) == [1, 2, 3, 4, "five", 6, 7]
