"""Counting visits and comparing them within classes, against a slow count."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
)
def test_compares_within_classes(examples: list[tuple[int, bool, int | None]], extra: float) -> None:
    visits = Visits(len(examples), extra)
    for i, (count, _, label) in enumerate(examples):
        for _ in range(count):
            visits.count(torch.tensor([i]))
        visits.label(torch.tensor([i]), None if label is None else torch.tensor([label]))
    visits.enter()
    there: dict[int | None, list[int]] = {}
    for count, here, label in examples:
        if here:
            there.setdefault(label, []).append(count)
    expected = [here and count <= sum(there[label]) / len(there[label]) + extra for count, here, label in examples]
    active = torch.tensor([here for _, here, _ in examples])
    assert visits.level(active).tolist() == expected
    assert visits.level(active).tolist() == expected, "nothing has changed"


def test_a_class_may_be_ahead() -> None:
    visits = visited(0.4, [[0, 1]] * 9 + [[2]], classes=[5, 5, 6, 6])
    assert visits.level(EVERY).tolist() == [True, True, False, True]


def test_the_others_catch_up() -> None:
    visits = visited(0.4, [[0, 1]])
    assert visits.level(EVERY).tolist() == [False, False, True, True]
    visits.count(torch.tensor([2]))
    assert visits.level(EVERY).tolist() == [True, True, True, True]


def test_only_active_ones_count() -> None:
    visits = visited(0.4, [[0, 1], [0, 1, 2]])
    assert visits.level(torch.tensor([True, True, True, False])).tolist() == [True, True, True, False], "mean 5 / 3"


def test_labels_are_copied() -> None:
    labels = torch.tensor([1, 2], dtype=torch.int32)
    visits = Visits(4, 0.5)
    visits.label(torch.tensor([3, 0]), labels)
    labels.zero_()
    visits.enter()
    assert visits.classes.tolist() == [2, UNKNOWN, UNKNOWN, 1]


def test_state_round_trip() -> None:
    visits, other = visited(0.4, [[0, 1]]), Visits(4, 0.4)
    visits.level(EVERY)
    visits.count(torch.tensor([2]))
    visits.label(torch.tensor([2, 3]), torch.tensor([1, 1]))
    state: dict[str, Tensor] = visits.state_dict()
    visits.count(torch.tensor([3]))  # the state is a copy
    other.load_state_dict(state)
    assert other.classes.tolist() == [UNKNOWN, UNKNOWN, 1, 1], "noted, not yet entered"
    assert other.level(EVERY).tolist() == [True, True, False, True], "of two classes, whose means are 1 and a half"
