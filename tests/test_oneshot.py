from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import reference
from torchcrest import ConfigError, DataError, coreset
from torchcrest.solvers import Metric

METRICS: list[Metric] = ["euclidean", "sqeuclidean", "cosine"]
Floats = NDArray[np.float64]


def blobs(n: int = 60, d: int = 3, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=(n, d)) + 3


def dissimilarity(x: Floats, metric: str) -> Floats:
    """Compare all with all, the textbook way."""
    if metric == "cosine":
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        result: Floats = 1 - (unit[:, None] * unit[None]).sum(-1)
        return result
    squares: Floats = ((x[:, None] - x[None]) ** 2).sum(-1)
    return squares if metric == "sqeuclidean" else np.sqrt(squares)


class TestCraig:
    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("size", [1, 7, 30])
    def test_as_good_as_brute_force(self, metric: Metric, size: int) -> None:
        x = blobs(40)
        similarity = (-dissimilarity(x, metric)).tolist()
        indices, weights = coreset(x, size, metric=metric)
        best = reference.value(similarity, reference.greedy(similarity, size))
        # Not the picks: where two gain alike, rounding decides.
        assert reference.value(similarity, indices.tolist()) == pytest.approx(best, rel=1e-9)
        assert weights.tolist() == reference.cluster_sizes(similarity, indices.tolist())

    @settings(max_examples=60)
    @given(st.lists(st.integers(0, 30), min_size=1, max_size=14), st.data())
    def test_equals_brute_force_on_a_line(self, places: list[int], data: st.DataObject) -> None:
        """Whole numbers: distances are exact, ties are many, and doubles stand for themselves."""
        labels = data.draw(st.lists(st.integers(0, 3), min_size=len(places), max_size=len(places)))
        size = data.draw(st.integers(1, len(places)))
        points = torch.tensor(places, dtype=torch.float64).unsqueeze(1)
        indices, weights = coreset(points, size, torch.tensor(labels))
        assert (indices.tolist(), weights.tolist()) == reference.medoids(points, size, labels)

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("size", [1, 3, 20, 60])
    def test_shape_of_the_result(self, metric: Metric, size: int) -> None:
        indices, weights = coreset(blobs(), size, metric=metric)
        assert indices.shape == weights.shape == (size,)
        assert (np.diff(indices) > 0).all()
        assert indices[0] >= 0
        assert indices[-1] < 60
        assert weights.sum() == 60
        assert (weights >= 1).all()

    def test_all(self) -> None:
        indices, weights = coreset(blobs(), 60)
        assert indices.tolist() == list(range(60))
        assert weights.tolist() == [1] * 60

    @pytest.mark.parametrize("size", [1, 4, 9])
    def test_duplicates(self, size: int) -> None:
        indices, weights = coreset(np.ones((9, 2)), size)
        assert indices.tolist() == list(range(size))
        assert weights.sum() == 9

    def test_stratified(self) -> None:
        labels = np.repeat([7, -2, 3], [40, 15, 5])
        indices, weights = coreset(blobs(), 12, labels)
        assert [int((labels[indices] == name).sum()) for name in (7, -2, 3)] == [8, 3, 1]
        # Each class keeps its total.
        assert [weights[labels[indices] == name].sum() for name in (7, -2, 3)] == [40, 15, 5]

    def test_weighted_sum_is_near_the_whole(self) -> None:
        """What the weights are for: a sum over the coreset instead of one over the data."""
        x = blobs(300)
        indices, weights = coreset(x, 60)
        random = np.random.default_rng(0).choice(300, 60, replace=False)
        whole = np.tanh(x).sum(0)
        error = np.abs(weights @ np.tanh(x[indices]) - whole).max()
        assert error < np.abs(5 * np.tanh(x[random]).sum(0) - whole).max()

    def test_far_from_the_origin(self) -> None:
        """Distances are the same there, and float32 has digits enough if they are not taken from the origin."""
        x = (blobs(200) * 64).round().astype(np.float32)
        assert coreset(x + 1e6, 20)[0].tolist() == coreset(x, 20)[0].tolist()

    def test_deterministic(self) -> None:
        first, second = (coreset(blobs(200), 20)[0].tolist() for _ in range(2))
        assert first == second


class TestTypes:
    def test_arrays_for_arrays(self) -> None:
        indices, weights = coreset(blobs(), 5, np.zeros(60, dtype=np.int8))
        assert isinstance(indices, np.ndarray)
        assert isinstance(weights, np.ndarray)
        assert (str(indices.dtype), str(weights.dtype)) == ("int64", "float64")

    def test_tensors_for_tensors(self) -> None:
        indices, weights = coreset(torch.from_numpy(blobs()).requires_grad_(), 5, torch.zeros(60, dtype=torch.uint8))
        assert (indices.dtype, weights.dtype) == (torch.int64, torch.float64)
        assert not weights.requires_grad

    def test_arrays_and_tensors_alike(self) -> None:
        x = blobs()
        of_tensor, of_array = coreset(torch.from_numpy(x), 9), coreset(x, 9)
        assert of_tensor[0].tolist() == of_array[0].tolist()
        assert of_tensor[1].tolist() == of_array[1].tolist()

    @pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "float16", "float32", "float64", ">f4"])
    def test_features_of_any_real_type(self, dtype: str) -> None:
        x = (blobs() > 3).astype(dtype)
        assert coreset(x, 4)[0].tolist() == coreset(x.astype("float32"), 4)[0].tolist()

    @pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "uint64"])
    def test_labels_of_any_integer_type(self, dtype: str) -> None:
        labels = (np.arange(60) % 2).astype(dtype)
        indices, _ = coreset(blobs(), 6, labels)
        assert indices.tolist() == coreset(blobs(), 6, np.arange(60) % 2)[0].tolist()

    def test_strided_and_read_only(self) -> None:
        x = np.repeat(blobs(), 2, 0)[::-2]
        x.flags.writeable = False
        assert coreset(x, 6)[0].tolist() == coreset(x.copy(), 6)[0].tolist()

    def test_sizes_of_numpy(self) -> None:
        size: Any = np.int64(5)
        assert len(coreset(blobs(), size, part_size=3 * size, seed=size)[0]) == 5


def test_never_builds_n_by_n(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[int] = []
    whole = torch.cdist

    def traced(left: Tensor, right: Tensor) -> Tensor:
        result: Tensor = whole(left, right)
        entries.append(result.numel())
        return result

    monkeypatch.setattr(torch, "cdist", traced)
    n = 6000
    indices, weights = coreset(blobs(n, 2).astype(np.float32), 30)
    assert len(indices) == 30
    assert weights.sum() == n
    assert max(entries) <= 1024 * n
    assert sum(entries) < 10 * n**2, "computing every gain takes 30 n^2"


GOOD = blobs(5)


def with_nan() -> Floats:
    x = blobs(5)
    x[3, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((GOOD.tolist(), 2), r"features must be an array or a tensor, got 'list'\. Use numpy\.asarray"),
        ((GOOD.astype(str), 2), "features must hold real numbers, got '<U"),
        ((GOOD.astype(complex), 2), "features must hold real numbers, got 'complex128'"),
        ((torch.zeros(5, 2, dtype=torch.complex64), 2), r"features must have shape \[n, d\], real, not empty"),
        ((GOOD[0], 1), r"features must have shape \[n, d\], real, not empty, got \(3,\)\. Flatten"),
        ((GOOD[:, :, None], 1), r"features must have shape .* got \(5, 3, 1\)"),
        ((GOOD[:0], 1), r"features must have shape .* got \(0, 3\)"),
        ((GOOD[:, :0], 1), r"features must have shape .* got \(5, 0\)"),
        ((with_nan(), 2), "features must be finite, got 'NaN or infinity in row 3'"),
        ((GOOD, 0), "size must be a whole number from 1 to the number of examples, 5, got 0"),
        ((GOOD, 6), "size must be a whole number .* 5, got 6"),
        ((GOOD, 2.5), r"size must be a whole number .* 5, got 2\.5"),
        ((GOOD, True), "size must be a whole number .* 5, got True"),
        ((GOOD, 2, np.zeros(4, int)), r"labels must have shape \(5,\), one for each row of features, got \(4,\)"),
        ((GOOD, 2, np.zeros((5, 1), int)), r"labels must have shape \(5,\), .* got \(5, 1\)"),
        ((GOOD, 2, np.zeros(5)), r"labels must be integers, got 'torch\.float64'\. For regression leave labels out"),
        ((GOOD, 2, np.array(list("aabbb"))), "labels must be integers, got '<U1'"),
    ],
)
def test_refuses(arguments: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        coreset(*arguments)


def test_unknown_metric() -> None:
    metric: Any = "euclidian"
    with pytest.raises(
        ConfigError, match=r"metric must be one of euclidean, .*, got 'euclidian'\. Did you mean euclid"
    ):
        coreset(GOOD, 2, metric=metric)
