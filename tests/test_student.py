"""The small network that stands in for the model: what it looks at, and where it can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchcrest import Classification, Regression
from torchcrest.student import HIDDEN, Student, can_learn

Y = torch.tensor([0, 1, 2, 1, 0, 2])
N = len(Y)


def drawn(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("shape", "seen"),
    [
        ((7,), 7),
        ((500,), 500),
        ((2, 40), 80),
        ((1, 600), 256),
        ((3, 16, 16), 768),
        ((3, 33, 10), 3 * 16 * 10),
        ((1, 12, 4, 12), 6 * 4 * 6),
    ],
)
def test_what_it_looks_at(shape: tuple[int, ...], seen: int) -> None:
    student = Student.of((drawn(*shape), Y), 3, seed=0)
    assert student.hidden.weight.shape == (HIDDEN, seen)
    assert student(drawn(*shape)).shape == (N, 3)


def test_images_are_averaged_and_standardised() -> None:
    x = 5 + 3 * drawn(2, 32, 32)
    student = Student.of((x, Y), 3, seed=0)
    small = F.avg_pool2d(x, 2).flatten(1)
    variance = small.var(0, correction=0)
    standard = (small - small.mean(0)) / (variance + 0.01 * variance.mean()).sqrt()
    expected = student.head(student.hidden(standard).relu())
    torch.testing.assert_close(student(x), expected)


def test_inputs_that_never_change_are_harmless() -> None:
    x = torch.full((N, 4), 7.0)
    assert torch.equal(Student.of((x, Y), 3, seed=0)(x), Student.of((x - 7, Y), 3, seed=0)(x - 7))
    assert Student.of((x, Y), 3, seed=0)(x).isfinite().all()


def test_pixels_and_low_precision_and_names() -> None:
    pixels = (100 * drawn(1, 8, 8)).abs().byte()
    student = Student.of({"pixel_values": pixels, "labels": Y}, 3, seed=0)
    assert torch.equal(student(pixel_values=pixels), student(pixels.double()))
    assert torch.equal(student(torch.arange(N), pixels), student(pixels)), "the first that it can look at"


def test_the_seed_decides_and_random_states_stay() -> None:
    before = torch.get_rng_state()
    one, same, other = (Student.of((drawn(4), Y), 3, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.hidden.weight, same.hidden.weight)
    assert not torch.equal(one.hidden.weight, other.hidden.weight)


@pytest.mark.parametrize(
    ("data", "outputs", "objective", "can"),
    [
        ((drawn(4), Y), torch.zeros(1, 3), Classification(), True),
        ({"pixel_values": drawn(3, 8, 8), "labels": Y}, torch.zeros(1, 3), Classification(), True),
        (((drawn(4), [drawn(2)]), Y), torch.zeros(1, 3), Classification(), True),
        ((torch.zeros(N, 4, dtype=torch.int64), Y), torch.zeros(1, 3), Classification(), False),
        ((drawn(), Y), torch.zeros(1, 3), Classification(), False),
        (([["a"] * N], Y), torch.zeros(1, 3), Classification(), False),
        ((drawn(3, 8, 8), Y), torch.zeros(1, 3, 8, 8), Classification(), False),
        ((drawn(4), drawn(1)), torch.zeros(1, 1), Regression(), False),
    ],
)
def test_where_it_can_stand_in(data: Any, outputs: Tensor, objective: Any, can: bool) -> None:
    assert can_learn(objective, data, outputs) == can
