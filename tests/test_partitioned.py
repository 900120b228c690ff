from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from torchcrest import ConfigError, coreset
from torchcrest.solvers import Metric, oneshot, partitioned, shares
from torchcrest.solvers.partitioned import pick, pick_in_parts

Floats = NDArray[Any]


def clusters(n: int = 2000, d: int = 6, k: int = 40) -> Floats:
    """Clusters of very different sizes."""
    random = np.random.default_rng(0)
    of = random.choice(k, n, p=random.dirichlet(np.ones(k)))
    points: Floats = (2 * random.normal(size=(k, d)))[of] + random.normal(size=(n, d))
    return points


def cost(x: Floats, indices: Floats) -> float:
    """Mean distance to the nearest pick, the textbook way: what the picks minimise."""
    return float(np.sqrt(((x[:, None] - x[None, indices]) ** 2).sum(-1)).min(1).mean())


def random_cost(x: Floats, size: int) -> float:
    return float(np.mean([cost(x, np.random.default_rng(k).choice(len(x), size, replace=False)) for k in range(5)]))


def members(n: int) -> torch.Tensor:
    return torch.arange(n)


class Watched(np.ndarray[Any, Any]):
    """An array that notes how many rows are read at a time."""

    rows: list[int]

    def __array_finalize__(self, whole: Any) -> None:
        self.rows = getattr(whole, "rows", [])

    def __getitem__(self, key: Any) -> Any:
        self.rows.append(len(np.arange(len(self))[key]))
        return np.asarray(self)[key]

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("converted whole")


class TestPicks:
    @pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
    def test_one_part_is_the_whole(self, metric: Metric) -> None:
        x = clusters(300)
        split = coreset(x, 20, metric=metric, part_size=300, seed=7)
        assert [a.tolist() for a in split] == [a.tolist() for a in coreset(x, 20, metric=metric)]

    def test_picking_again_from_one_part_keeps_its_picks(self) -> None:
        x = torch.from_numpy(clusters(300))
        generator = torch.Generator().manual_seed(0)
        again = pick_in_parts(lambda rows: x[rows], members(300), 20, 300, torch.cdist, generator)
        assert sorted(again.tolist()) == sorted(pick(x, 20, torch.cdist).tolist())

    @pytest.mark.parametrize(("size", "kept"), [(20, 0.9), (100, 0.85), (300, 0.5)], ids=str)
    def test_nearly_as_good_as_the_whole(self, size: int, kept: float) -> None:
        """Of what selection gains over random subsets, at least a stated share is kept."""
        x = clusters()
        whole, split, random = (
            cost(x, coreset(x, size)[0]),
            cost(x, coreset(x, size, part_size=250)[0]),
            random_cost(x, size),
        )
        assert random - split > kept * (random - whole) > 0

    def test_nearly_as_good_with_few_judges(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(partitioned, "JUDGES", 500)
        monkeypatch.setattr(partitioned, "PARTS", 3)
        x = clusters()
        split = cost(x, coreset(x, 30, part_size=250)[0])
        assert random_cost(x, 30) - split > 0.7 * (random_cost(x, 30) - cost(x, coreset(x, 30)[0]))

    def test_rare_and_far_examples_are_found(self) -> None:
        """One part holds all of them or none; all parts are asked."""
        x = np.zeros((1000, 2))
        x[::2] = 1
        x[[17, 500, 983]] = [[1000, 0], [0, 1000], [-1000, 0]]
        assert {17, 500, 983} <= set(coreset(x, 5, part_size=100)[0].tolist())

    @settings(max_examples=60)
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 9), st.data())
    def test_shares_and_weights(self, labels: list[int], part_size: int, seed: int, data: st.DataObject) -> None:
        n, y = len(labels), np.array(labels)
        size = data.draw(st.integers(1, n))
        x = np.random.default_rng(seed).normal(size=(n, 2))
        indices, weights = coreset(x, size, y, part_size=part_size, seed=seed)
        assert len(set(indices.tolist())) == size
        assert (np.diff(indices) > 0).all()
        names, counts = np.unique(y, return_counts=True)
        assert [(y[indices] == name).sum() for name in names] == shares(counts, size).tolist()
        far = np.linalg.norm(x[:, None] - x[None, indices], axis=-1)
        own = np.isin(y, y[indices])
        far[own[:, None] & (y[:, None] != y[indices])] = np.inf
        assert weights.tolist() == np.bincount(far.argmin(1), minlength=size).tolist()
        assert weights.sum() == n

    def test_the_seed_decides(self) -> None:
        x = clusters()
        before = torch.get_rng_state()
        first, again, other = (coreset(x, 30, part_size=250, seed=seed)[0].tolist() for seed in (1, 1, 2))
        assert first == again != other
        assert torch.get_rng_state().equal(before)


class TestReading:
    def test_memory_map(self, tmp_path: Path) -> None:
        x = clusters(1500).astype(np.float32)
        np.save(tmp_path / "x.npy", x)
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        assert isinstance(mapped, np.memmap)
        got, want = coreset(mapped, 30, part_size=200), coreset(x, 30, part_size=200)
        assert [a.tolist() for a in got] == [a.tolist() for a in want]
        assert type(got[0]) is np.ndarray

    @pytest.mark.parametrize("labels", [None, np.arange(5000) % 2], ids=["one class", "two"])
    def test_never_reads_all_at_once(self, labels: NDArray[np.int64] | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(partitioned, "JUDGES", 1000)
        x = clusters(5000).view(Watched)
        coreset(x, 40, labels, part_size=250)
        assert sum(x.rows) >= 2 * 5000, "checked and weighed"
        assert max(x.rows) <= 1024

    @pytest.mark.parametrize("dtype", ["float16", "int16", "uint8", ">f8"])
    def test_any_real_type(self, dtype: str) -> None:
        x = (8 * clusters(600)).clip(0, 250).astype(dtype)
        got, want = coreset(x, 20, part_size=100), coreset(x.astype(np.float64), 20, part_size=100)
        # Not the picks: where two gain alike, rounding decides.
        assert cost(x.astype(float), got[0]) == pytest.approx(cost(x.astype(float), want[0]), rel=0.02)

    def test_tensors_and_arrays_alike(self) -> None:
        x = clusters(600)
        of_tensor, of_array = coreset(torch.from_numpy(x), 20, part_size=100), coreset(x, 20, part_size=100)
        assert of_tensor[0].tolist() == of_array[0].tolist()

    def test_a_late_row_that_is_not_finite(self) -> None:
        x = clusters(3000)
        x[2500, 1] = np.inf
        with pytest.raises(ValueError, match="features must be finite, got 'NaN or infinity in row 2500'"):
            coreset(x, 20, part_size=100)


def test_compares_a_small_part_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[int] = []
    whole = torch.cdist

    def traced(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = whole(left, right)
        entries.append(result.numel())
        return result

    monkeypatch.setattr(torch, "cdist", traced)
    monkeypatch.setattr(partitioned, "JUDGES", 2000)
    n = 40_000
    coreset(np.random.default_rng(0).normal(size=(n, 2)), 20, part_size=500)
    assert max(entries) <= 512 * 2000
    assert sum(entries) < n**2 / 100


def test_large_classes_are_split_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oneshot, "WHOLE", 1000)
    monkeypatch.setattr(oneshot, "PART", 100)
    x = clusters(1001)
    first, other = (coreset(x, 5, seed=seed)[0].tolist() for seed in (0, 1))
    assert first != other, "split"
    assert coreset(x[:-1], 5, seed=0)[0].tolist() == coreset(x[:-1], 5, seed=1)[0].tolist(), "solved whole"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"part_size": 0}, r"part_size must be a whole number of at least 1, or None, got 0\. None chooses"),
        ({"part_size": 2.5}, r"part_size must be a whole number .* got 2\.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": True}, "seed must be a whole number of at least 0, got True"),
        ({"part_size": 0, "metric": "manhatan"}, r"(?s)metric must be one of .*part_size must"),
    ],
    ids=str,
)
def test_refuses(arguments: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        coreset(clusters(10), 2, **arguments)
