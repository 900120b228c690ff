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
from torchcrest import DataError
from torchcrest.solvers import match_gradients, matching

Counts = list[int]
class_counts = st.lists(st.integers(1, 15), min_size=1, max_size=6)
seeds = st.integers(0, 9999)
ridges = st.sampled_from([0.0, 1e-3, 0.5, 5.0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(counts: Counts, seed: int = 0) -> Tensor:
    """Make labels with gaps between the classes (some are absent), shuffled."""
    labels = torch.repeat_interleave(torch.arange(len(counts)) * 3 - 4, torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def dense(found: tuple[Tensor, Tensor], n: int) -> list[float]:
    """Return every member's weight, 0 for those that were not picked."""
    rows, weights = found
    out: list[float] = torch.zeros(n, dtype=torch.float64).index_put_((rows,), weights.double()).tolist()
    return out


def assert_same(found: tuple[Tensor, Tensor], expected: list[float], tolerance: float = 1e-6) -> None:
    assert found[0].tolist() == [i for i, weight in enumerate(expected) if weight > 0]
    assert dense(found, len(expected)) == pytest.approx(expected, abs=tolerance * max(1.0, *expected))


class TestAgainstReference:
    @settings(max_examples=60)
    @given(class_counts, seeds, ridges, st.data())
    def test_outputs(self, counts: Counts, seed: int, ridge: float, data: st.DataObject) -> None:
        n = sum(counts)
        size = data.draw(st.integers(1, n))
        # Without a ridge, (nearly) dependent gradients have (nearly) many best weights.
        d = data.draw(st.integers(1, 8)) if ridge else max(counts) + 8
        gradients, labels = normal(n, d, seed=seed), labels_of(counts, seed)
        expected = reference.match_gradients(gradients, size, labels.tolist(), ridge)
        assert_same(match_gradients(gradients, size, labels, ridge=ridge), expected)

    @settings(max_examples=40)
    @given(class_counts, seeds, ridges, st.booleans(), st.data())
    def test_last_layer(self, counts: Counts, seed: int, ridge: float, bias: bool, data: st.DataObject) -> None:
        n = sum(counts)
        size = data.draw(st.integers(1, n))
        gradients, features, labels = normal(n, 3, seed=seed), normal(n, 6, seed=seed + 1), labels_of(counts, seed)
        whole = reference.layer_gradients(gradients, features, bias)
        expected = reference.match_gradients(whole, size, labels.tolist(), ridge)
        assert_same(match_gradients(gradients, size, labels, features, bias=bias, ridge=ridge), expected)

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("size", [40, 80])
    def test_many_picks_that_turn_out_useless(self, size: int, seed: int) -> None:
        gradients = normal(80, 30, seed=seed)
        assert_same(
            match_gradients(gradients, size, ridge=1e-3), reference.match_gradients(gradients, size, None, 1e-3)
        )

    @pytest.mark.parametrize("seed", range(40))
    def test_ties(self, seed: int) -> None:
        """Whole numbers: many agree equally, which rounding must not decide."""
        gradients = torch.randint(-1, 2, (24, 3), generator=torch.Generator().manual_seed(seed)).double()
        for size in (5, 10):
            assert_same(match_gradients(gradients, size), reference.match_gradients(gradients, size, None, 0.5))


class TestConditions:
    @given(st.integers(1, 40), st.integers(1, 6), seeds, ridges)
    def test_of_the_best_weights_when_all_may_be_picked(self, n: int, d: int, seed: int, ridge: float) -> None:
        """What is left agrees with nobody, and for those picked by just their penalty (Karush, Kuhn and Tucker)."""
        gradients = normal(n, d, seed=seed)
        weights = torch.tensor(dense(match_gradients(gradients, n, ridge=ridge), n), dtype=torch.float64)
        squares = gradients.square().sum(1)
        slope = gradients @ (gradients.sum(0) - weights @ gradients) - ridge * squares.mean() * weights
        scale = 1e-9 * squares.max().sqrt() * squares.sqrt().sum()
        assert (weights >= 0).all()
        assert (slope <= scale).all()
        assert (slope.abs()[weights > 0] <= scale).all()

    @settings(max_examples=20)
    @given(st.integers(2, 15), seeds, ridges)
    def test_more_members_match_better(self, n: int, seed: int, ridge: float) -> None:
        gradients = normal(n, 6, seed=seed)
        penalty = ridge * gradients.square().sum(1).mean()
        values = [gradients.sum(0).square().sum()]
        for size in range(1, n + 1):
            weights = torch.tensor(dense(match_gradients(gradients, size, ridge=ridge), n), dtype=torch.float64)
            left = gradients.sum(0) - weights @ gradients
            values.append(left.square().sum() + penalty * weights.square().sum())
        assert all(after <= before + 1e-9 * values[0] for before, after in itertools.pairwise(values))

    @given(st.integers(2, 20), seeds, st.sampled_from([torch.float32, torch.float64]))
    def test_dependent_gradients_without_ridge(self, n: int, seed: int, dtype: torch.dtype) -> None:
        """Doubles, opposites, nearly opposites and a plane of them, in many sizes."""
        plane = normal(n, 2, seed=seed) @ normal(2, 5, seed=seed + 1)
        gradients = torch.cat([plane, plane[:2], -plane[1:], 1e-7 * normal(n, 5, seed=seed + 2) - plane, 1e4 * plane])
        rows, weights = match_gradients(gradients.to(dtype), len(gradients), ridge=0)
        assert weights.isfinite().all()
        assert (weights > 0).all()
        left = gradients.sum(0) - weights.double() @ gradients[rows]
        assert left.norm() <= 1e-3 * gradients.sum(0).norm()


class TestByHand:
    @pytest.mark.parametrize("ridge", [0.0, 0.5])
    def test_orthogonal_gradients(self, ridge: float) -> None:
        """Each weight stands alone, a^2 / (a^2 + ridge * mean a^2), and the longest are picked."""
        lengths = torch.tensor([1.0, 4.0, 2.0, 3.0])
        rows, weights = match_gradients(lengths.diag(), 3, ridge=ridge)
        assert rows.tolist() == [1, 2, 3]
        squares = lengths[rows] ** 2
        assert weights.tolist() == pytest.approx((squares / (squares + ridge * 7.5)).tolist())

    def test_without_ridge_one_of_equals_takes_all_and_with_it_they_share(self) -> None:
        gradients = torch.ones(10, 3)
        assert_same(match_gradients(gradients, 4, ridge=0), [10.0] + [0.0] * 9)
        assert_same(match_gradients(gradients, 4, ridge=0.5), [10 / 4.5] * 4 + [0.0] * 6)

    @pytest.mark.parametrize("shift", range(9))
    def test_ties_go_to_the_lowest_index(self, shift: int) -> None:
        """Wherever the doubles lie, and so however their products are rounded."""
        both = normal(20, 18).abs().repeat(2, 1)
        both = torch.cat([both[:1].expand(shift, -1) / 10, both])
        rows, _ = match_gradients(both[:, :7], 1, features=both[:, 7:])
        assert shift <= rows[0] < shift + 20

    def test_a_useless_member_is_left_out(self) -> None:
        """The first is picked first; the best weights of the other two picks leave it none."""
        gradients = torch.tensor([[-1.0, 1.0, 2.0], [-2.0, -2.0, 3.0], [2.0, 0.0, -1.0], [2.0, 3.0, 0.0]])
        assert_same(match_gradients(gradients, 1, ridge=0), [9 / 6, 0, 0, 0])
        assert_same(match_gradients(gradients, 3, ridge=0), [0, 158 / 121, 0, 196 / 121])

    @pytest.mark.parametrize("ridge", [0.0, 0.5])
    def test_a_learned_class_has_nothing_to_match(self, ridge: float) -> None:
        labels = torch.tensor([0, 0, 0, 1, 1, 1])
        gradients = normal(6, 2) * (labels == 1).unsqueeze(1)
        rows, weights = match_gradients(gradients, 6, labels, ridge=ridge)
        assert_same((rows, weights), [0.0] * 3 + reference.match_gradients(gradients[3:], 3, None, ridge))
        nothing = match_gradients(torch.zeros(4, 2), 2, ridge=ridge)
        assert [t.tolist() for t in nothing] == [[], []]

    def test_gradients_that_cancel_out(self) -> None:
        half = normal(30, 5)
        gradients = torch.cat([half, -half])[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
        assert match_gradients(gradients, 10)[0].tolist() == []

    def test_more_classes_than_places_and_classes_of_one(self) -> None:
        gradients = normal(6, 3)
        rows, weights = match_gradients(gradients, 2, torch.arange(6), ridge=0.25)
        assert rows.tolist() == [0, 1]
        assert weights.tolist() == pytest.approx([0.8, 0.8])


class TestBatch:
    @pytest.mark.parametrize("chunk", [1, 2000, 1 << 24])
    @pytest.mark.parametrize("with_features", [False, True])
    def test_classes_are_solved_one_by_one(
        self, monkeypatch: pytest.MonkeyPatch, chunk: int, with_features: bool
    ) -> None:
        monkeypatch.setattr(matching, "CHUNK", chunk)
        counts = [30, 24, 25, 10, 3, 28, 1]
        gradients, labels = normal(sum(counts), 4), labels_of(counts)
        features = normal(sum(counts), 6, seed=1) if with_features else None
        found = match_gradients(gradients, 60, labels, features)
        expected = [0.0] * len(gradients)
        for name, quota in zip(labels.unique(), reference.shares(counts, 60), strict=True):
            members = (labels == name).nonzero()[:, 0]
            if quota:
                f = None if features is None else features[members]
                alone = match_gradients(gradients[members], quota, features=f)
                for i, weight in zip(members.tolist(), dense(alone, len(members)), strict=True):
                    expected[i] = weight
        assert_same(found, expected, tolerance=1e-9)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
    def test_labels_of_any_integer_type(self, dtype: torch.dtype) -> None:
        gradients, labels = normal(30, 3), labels_of([12, 18]) > -2
        expected = match_gradients(gradients, 8, labels.long())
        assert all(map(torch.equal, match_gradients(gradients, 8, labels.to(dtype)), expected))


class TestShapes:
    @pytest.mark.parametrize(
        ("dtype", "result"),
        [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    )
    def test_types(self, dtype: torch.dtype, result: torch.dtype) -> None:
        rows, weights = match_gradients(normal(9, 3).to(dtype).requires_grad_(), 4)
        assert (rows.dtype, weights.dtype) == (torch.int64, result)
        assert not weights.requires_grad

    def test_no_features_are_features_of_width_0(self) -> None:
        gradients = normal(25, 4)
        plain = match_gradients(gradients, 8)
        assert_same(match_gradients(gradients, 8, features=torch.zeros(25, 0)), dense(plain, 25))
        assert match_gradients(gradients, 8, features=torch.zeros(25, 0), bias=False)[0].tolist() == []

    @given(st.integers(-30, 30))
    def test_the_scale_of_the_gradients_does_not_matter(self, power: int) -> None:
        gradients = normal(25, 4)
        assert all(map(torch.equal, match_gradients(2.0**power * gradients, 8), match_gradients(gradients, 8)))

    def test_arguments_are_left_alone(self) -> None:
        gradients, features = normal(25, 4), normal(25, 3, seed=1)
        before = gradients.clone(), features.clone()
        match_gradients(gradients, 8, features=features)
        assert all(map(torch.equal, (gradients, features), before))


X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gradients": [[1.0]]}, r"gradients must be a tensor, got 'list'\. Use torch\.as_tensor"),
        ({"gradients": torch.ones(3)}, r"gradients must have shape \[n, d\], n at least 1, got \(3,\)\. Give one row"),
        ({"gradients": torch.ones(0, 2)}, r"gradients must have shape .* got \(0, 2\)"),
        ({"gradients": X * math.nan}, "gradients must hold finite real numbers"),
        ({"gradients": X.to(torch.complex64)}, "gradients must hold finite real numbers"),
        ({"features": [[1.0]]}, "features must be a tensor, got 'list'"),
        ({"labels": [0, 0, 1]}, "labels must be a tensor, got 'list'"),
        ({"features": torch.ones(2, 4)}, r"features must have shape \(3, h\), got \(2, 4\)"),
        ({"features": torch.ones(3)}, r"features must have shape \(3, h\), got \(3,\)"),
        ({"features": X * math.inf}, "features must hold finite real numbers"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels must be integers of shape \(3,\), got .*\(2,\)"),
        ({"labels": torch.zeros(3)}, r"labels must be integers of shape \(3,\), got 'torch.float32 of shape \(3,\)'"),
        ({"size": 0}, r"size must be a whole number from 1 to n = 3, got 0\. Pick no more"),
        ({"size": 4}, "size must be a whole number from 1 to n = 3, got 4"),
        ({"size": 2.0}, r"size must be a whole number from 1 to n = 3, got 2\.0"),
        ({"size": True}, "size must be a whole number from 1 to n = 3, got True"),
        ({"ridge": -0.1}, r"ridge must be 0 or more, and finite, got -0\.1\. Use for example 0\.5"),
        ({"ridge": math.inf}, "ridge must be 0 or more, and finite, got inf"),
        ({"ridge": math.nan}, "ridge must be 0 or more, and finite, got nan"),
    ],
)
def test_refuses(change: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        match_gradients(**{"gradients": X, "size": 1, **change})
