from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from torchcrest import DataError, facility_location
from torchcrest.solvers import facility


@st.composite
def problems(draw: st.DrawFn, largest: int = 9, low: int = -4, high: int = 4) -> list[list[int]]:
    """Draw small integers, so that ties are many and exact; not symmetric."""
    n = draw(st.integers(1, largest))
    row = st.lists(st.integers(low, high), min_size=n, max_size=n)
    return draw(st.lists(row, min_size=n, max_size=n))


def random_problem(n: int, seed: int = 0, levels: int = 50) -> Tensor:
    return torch.randint(-levels, levels, (n, n), generator=torch.Generator().manual_seed(seed)).float()


def solve_lazily(similarity: Tensor, budget: int) -> list[int]:
    rows: list[int] = facility._lazy(similarity, budget).tolist()
    return rows


def solve_naively(similarity: Tensor, budget: int) -> list[int]:
    rows: list[int] = facility._naive(similarity.unsqueeze(0), budget, None)[0].tolist()
    return rows


class TestAgainstBruteForce:
    @given(problems())
    def test_every_budget(self, problem: list[list[int]]) -> None:
        for budget in range(1, len(problem) + 1):
            rows, sizes = facility_location(torch.tensor(problem), budget)
            assert rows.tolist() == reference.greedy(problem, budget)
            assert sizes.tolist() == reference.cluster_sizes(problem, rows.tolist())

    @given(problems())
    def test_sizes_sum_to_n_and_all_are_wanted(self, problem: list[list[int]]) -> None:
        n = len(problem)
        rows, sizes = facility_location(torch.tensor(problem), n)
        assert sorted(rows.tolist()) == list(range(n))
        assert sizes.sum() == n

    @given(problems(largest=7, low=0, high=9))
    def test_gains_do_not_increase_and_the_value_is_near_the_best(self, problem: list[list[int]]) -> None:
        n = len(problem)
        rows = facility_location(torch.tensor(problem), n)[0].tolist()
        values = [0.0, *(reference.value(problem, rows[: k + 1]) for k in range(n))]
        gains = [after - before for before, after in itertools.pairwise(values)]
        assert gains == sorted(gains, reverse=True)
        for budget in range(1, n + 1):
            assert values[budget] >= (1 - 1 / math.e) * reference.optimum(problem, budget)

    @given(st.lists(st.integers(-20, 20), min_size=1, max_size=12))
    def test_distances(self, places: list[int]) -> None:
        problem = [[-abs(a - b) for b in places] for a in places]
        rows, sizes = facility_location(torch.tensor(problem), len(places))
        assert rows.tolist() == reference.greedy(problem, len(places))
        assert sizes.tolist() == [1] * len(places)


class TestShapes:
    def test_batch_is_one_by_one(self) -> None:
        batch = torch.stack([random_problem(12, seed, levels=5) for seed in range(6)]).view(2, 3, 12, 12)
        rows, sizes = facility_location(batch, 5)
        assert rows.shape == sizes.shape == (2, 3, 5)
        for a in range(2):
            for b in range(3):
                alone = facility_location(batch[a, b], 5)
                assert torch.equal(rows[a, b], alone[0])
                assert torch.equal(sizes[a, b], alone[1])

    def test_types(self) -> None:
        rows, sizes = facility_location(random_problem(4).requires_grad_(), 2)
        assert rows.dtype == sizes.dtype == torch.int64
        assert not rows.requires_grad

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.bfloat16, torch.float32, torch.float64])
    def test_any_numbers(self, dtype: torch.dtype) -> None:
        problem = random_problem(8, levels=1).abs().to(dtype)
        rows, _ = facility_location(problem, 4)
        assert rows.tolist() == reference.greedy(problem.double().tolist(), 4)

    def test_double_precision_is_kept(self) -> None:
        # In float32 the two columns would be equal, and the lower index would win.
        similarity = torch.tensor([[1.0, 1.0 + 1e-12], [0.0, 0.0]], dtype=torch.float64)
        assert facility_location(similarity, 1)[0].tolist() == [1]

    def test_large_integers_are_kept(self) -> None:
        assert facility_location(torch.tensor([[2**24, 2**24 + 1], [0, 0]]), 1)[0].tolist() == [1]

    def test_argument_is_left_alone(self) -> None:
        problem = random_problem(6)
        before = problem.clone()
        facility_location(problem, 3)
        assert torch.equal(problem, before)

    def test_one_member(self) -> None:
        assert [t.tolist() for t in facility_location(torch.zeros(1, 1), 1)] == [[0], [1]]


class TestClusters:
    def test_equal_members_each_represent_themselves(self) -> None:
        rows, sizes = facility_location(torch.zeros(5, 5), 5)
        assert rows.tolist() == [0, 1, 2, 3, 4]
        assert sizes.tolist() == [1] * 5

    def test_equal_representatives_the_earlier_pick(self) -> None:
        assert facility_location(torch.zeros(5, 5), 2)[1].tolist() == [4, 1]

    def test_sizes_match_argmax(self) -> None:
        problem = random_problem(40, levels=10**6)
        rows, sizes = facility_location(problem, 7)
        nearest = problem[:, rows].argmax(1)
        assert sizes.tolist() == nearest.bincount(minlength=7).tolist()


class TestLazy:
    @given(problems(), st.integers(1, 5))
    def test_small_blocks(self, problem: list[list[int]], block: int) -> None:
        n = len(problem)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(facility, "BLOCK", block)
            assert solve_lazily(torch.tensor(problem).float(), n) == reference.greedy(problem, n)

    @settings(max_examples=25)
    @given(st.integers(60, 200), st.integers(0, 9999), st.sampled_from([1, 2, 10, 1000]))
    def test_ties(self, n: int, seed: int, levels: int) -> None:
        problem = random_problem(n, seed, levels)
        assert solve_lazily(problem, n // 2) == solve_naively(problem, n // 2)

    @settings(max_examples=15)
    @given(st.integers(0, 9999))
    def test_duplicates(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        points = torch.randint(4, (150, 2), generator=generator).double()
        # Squared distances of integers: sums are exact.
        problem = -(points.unsqueeze(1) - points).square().sum(-1)
        assert solve_lazily(problem, 150) == solve_naively(problem, 150)

    def test_large_problems_are_solved_lazily_and_alike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = random_problem(1100, levels=1000).double()
        expected = solve_naively(problem, 40)
        monkeypatch.setattr(facility, "_naive", lambda *_: pytest.fail("all gains are computed anew"))
        rows, sizes = facility_location(problem, 40)
        assert rows.tolist() == expected
        assert sizes.tolist() == problem[:, rows].argmax(1).bincount(minlength=40).tolist()

    def test_batch_of_large_problems(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(facility, "LAZY_FROM", 8)
        batch = torch.stack([random_problem(12, seed, levels=5) for seed in range(3)])
        rows, _ = facility_location(batch, 6)
        assert rows.tolist() == [reference.greedy(problem.tolist(), 6) for problem in batch]

    def test_refreshes_few_of_many(self) -> None:
        """Clustered points: after the first round most bounds are stale and low, and stay so."""
        generator = torch.Generator().manual_seed(0)
        points = 100 * torch.randn(30, 2, generator=generator).repeat(40, 1)
        points += torch.randn(1200, 2, generator=generator)
        similarity = -torch.cdist(points, points)
        asked: list[int] = []

        def candidates(rows: Tensor) -> Tensor:
            asked.append(len(rows))
            return similarity[rows]

        facility.lazy_greedy(candidates, 1200, 30, points.device)
        assert sum(asked) < 0.5 * 30 * 1200


def test_padding_takes_no_part() -> None:
    sizes = [9, 4, 6, 1]
    small = [random_problem(n, seed=n, levels=4) for n in sizes]
    padded = torch.full((4, 9, 9), 77.0)
    for problem, into in zip(small, padded, strict=True):
        into[: len(problem), : len(problem)] = problem
    picks = facility.greedy(padded, 9, torch.tensor(sizes))
    for problem, row in zip(small, picks.tolist(), strict=True):
        assert row[: len(problem)] == reference.greedy(problem.tolist(), len(problem))


SQUARE = torch.eye(3)


@pytest.mark.parametrize(
    ("similarity", "budget", "match"),
    [
        ([[1.0]], 1, r"similarity must be a tensor, got 'list'\. Use torch\.as_tensor"),
        (torch.ones(3), 1, r"similarity must have shape \[\.\.\., n, n\], n at least 1, got \(3,\)"),
        (torch.ones(2, 3), 1, r"similarity must have shape .* got \(2, 3\)"),
        (torch.ones(0, 0), 1, r"similarity must have shape .* got \(0, 0\)"),
        (torch.ones(0, 2, 2), 1, r"similarity must have shape .* got \(0, 2, 2\)"),
        (SQUARE * math.nan, 1, "similarity must hold finite real numbers"),
        (SQUARE.masked_fill(SQUARE == 0, math.inf), 1, "similarity must hold finite real numbers"),
        (SQUARE.to(torch.complex64), 1, "similarity must hold finite real numbers"),
        (SQUARE, 0, r"budget must be a whole number from 1 to n = 3, got 0\. Pick no more"),
        (SQUARE, 4, "budget must be a whole number from 1 to n = 3, got 4"),
        (SQUARE, 2.0, r"budget must be a whole number from 1 to n = 3, got 2\.0"),
        (SQUARE, True, "budget must be a whole number from 1 to n = 3, got True"),
    ],
)
def test_refuses(similarity: Any, budget: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        facility_location(similarity, budget)
