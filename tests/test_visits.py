"""Counting visits and comparing them, against a slow count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchcrest import visits as module
from torchcrest.visits import UNKNOWN, Visits

EVERY = torch.ones(4, dtype=torch.bool)


def visited(extra: float, batches: list[list[int]], classes: list[int] | None = None) -> Visits:
    """Return the visits of four examples after these batches."""
    visits = Visits(4, extra)
    if classes:
        visits.label(torch.arange(4), torch.tensor(classes))
        visits.enter()
    for batch in batches:
        visits.count(torch.tensor(batch))
    return visits


@settings(max_examples=80)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.booleans(), st.sampled_from([None, -100, 0, 7])), min_size=1, max_size=30
    ).filter(lambda some: any(here for _, here, _ in some)),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    st.sampled_from([1, 7, 1000]),
)
def test_rare_classes_may_come_oftener(examples: list[tuple[int, bool, int | None]], extra: float, block: int) -> None:
    visits = Visits(len(examples), extra)
    for i, (count, _, label) in enumerate(examples):
        for _ in range(count):
            visits.count(torch.tensor([i]))
        visits.label(torch.tensor([i]), None if label is None else torch.tensor([label]))
    visits.enter()
    classes = [label for _, _, label in examples]
    seen = [count for count, here, _ in examples if here]
    mean = sum(seen) / len(seen)

    def bound(label: int | None) -> float:
        times = len(examples) / len(set(classes)) / classes.count(label)
        return mean * (times if times >= 1.5 else 1) + extra

    expected = [here and count <= bound(label) + 1e-9 for count, here, label in examples]
    active = torch.tensor([here for _, here, _ in examples])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        assert visits.level(active, visits.counts).tolist() == expected


def test_a_large_class_may_not() -> None:
    visits = visited(0.4, [[0, 3]] * 3 + [[1]], classes=[5, 5, 5, 6])  # mean 7 / 4; half a mean class: 7 / 2
    assert visits.level(EVERY, visits.counts).tolist() == [False, True, True, True]
    visits.count(torch.tensor([3]))  # mean 2
    assert visits.level(EVERY, visits.counts).tolist() == [False, True, True, True]
    visits.count(torch.tensor([3]))  # mean 9 / 4
    assert visits.level(EVERY, visits.counts).tolist() == [False, True, True, False]


def test_nearly_even_classes_are_not_told_apart() -> None:
    for small, rare in ((67, False), (66, True)):  # the mean class has 100
        visits = Visits(200, 0.5)
        visits.label(torch.arange(200), (torch.arange(200) < small).long())
        visits.enter()
        counts = torch.full((200,), 2)
        counts[[0, 199]] = 3
        level = visits.level(torch.ones(200, dtype=torch.bool), counts)
        assert (~level).nonzero()[:, 0].tolist() == ([199] if rare else [0, 199])


def test_other_ranks_batches_count() -> None:
    visits = visited(0.4, [[0, 1]])
    assert visits.level(EVERY, torch.tensor([1, 1, 1, 2])).tolist() == [True, True, True, False]


def test_the_others_catch_up() -> None:
    visits = visited(0.4, [[0, 1]])
    assert visits.level(EVERY, visits.counts).tolist() == [False, False, True, True]
    visits.count(torch.tensor([2]))
    assert visits.level(EVERY, visits.counts).tolist() == [True, True, True, True]


def test_only_active_ones_count() -> None:
    visits = visited(0.4, [[0, 1], [0, 1, 2]])
    assert visits.level(torch.tensor([True, True, True, False]), visits.counts).tolist() == [True, True, True, False], (
        "mean 5 / 3"
    )


def test_labels_are_copied() -> None:
    labels = torch.tensor([1, 2], dtype=torch.int32)
    visits = Visits(4, 0.5)
    visits.label(torch.tensor([3, 0]), labels)
    labels.zero_()
    visits.enter()
    assert visits.classes.tolist() == [2, UNKNOWN, UNKNOWN, 1]


def test_state_round_trip() -> None:
    visits, other = visited(0.4, [[0, 1]]), Visits(4, 0.4)
    visits.level(EVERY, visits.counts)
    visits.count(torch.tensor([2]))
    visits.count(torch.tensor([2]))
    visits.label(torch.tensor([2, 3]), torch.tensor([1, 1]))
    state: dict[str, Tensor] = visits.state_dict()
    visits.count(torch.tensor([3]))  # the state is a copy
    other.load_state_dict(state)
    assert other.classes.tolist() == [UNKNOWN, UNKNOWN, 1, 1], "noted, not yet entered"
    assert other.level(EVERY, other.counts).tolist() == [True, True, False, True], "mean 1"
