from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from torchcrest.solvers import facility, medoids, shares, weigh
from torchcrest.solvers.distance import distances

Counts = list[int]
class_counts = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def points(n: int, d: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels_of(counts: Counts, seed: int = 0) -> Tensor:
    """Make labels with gaps between the classes (some are absent), shuffled."""
    labels = torch.repeat_interleave(torch.arange(len(counts)) * 3 + 1, torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def on_a_line(n: int, seed: int = 0) -> Tensor:
    """Place points on whole numbers, so that distances and their sums are exact.

    They have to be: two members left over that gain from each other gain exactly alike, which rounding decides.
    """
    return torch.randint(40, (n, 1), generator=torch.Generator().manual_seed(seed)).float()


class TestShares:
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=15).filter(any), st.data())
    def test_largest_remainders(self, counts: Counts, data: st.DataObject) -> None:
        size = data.draw(st.integers(0, sum(counts)))
        quotas = shares(np.array(counts), size).tolist()
        assert quotas == reference.shares(counts, size)
        assert sum(quotas) == size
        for quota, count in zip(quotas, counts, strict=True):
            assert 0 <= quota <= count
            assert abs(quota * sum(counts) - count * size) < sum(counts), "further than 1 from the exact share"

    def test_ties_go_to_the_first(self) -> None:
        assert shares(np.array([1, 1, 1]), 2).tolist() == [1, 1, 0]

    def test_argument_is_left_alone(self) -> None:
        counts = np.array([5, 3])
        shares(counts, 3)
        assert counts.tolist() == [5, 3]


class TestExactlyM:
    @settings(max_examples=60, deadline=None)
    @given(class_counts, st.data())
    def test_any_class_counts(self, counts: Counts, data: st.DataObject) -> None:
        r = sum(counts)
        m = data.draw(st.integers(1, r))
        gradients = points(2 * r, dtype=torch.float32).view(2, r, 3)
        labels = torch.stack([labels_of(counts), labels_of(counts[::-1], seed=1)])
        rows, sizes = medoids(gradients, m, labels)
        assert rows.shape == sizes.shape == (2, m)
        for pool in range(2):
            picked = rows[pool].tolist()
            assert picked == sorted(set(picked))
            assert 0 <= picked[0] <= picked[-1] < r
            assert sizes[pool].sum() == r
            assert (sizes[pool] >= 1).all()
            present, of_class = labels[pool].unique(return_counts=True)
            quotas = [int((labels[pool][rows[pool]] == name).sum()) for name in present]
            assert quotas == reference.shares(of_class.tolist(), m)

    @given(class_counts)
    def test_duplicates(self, counts: Counts) -> None:
        """All gradients are alike, as they are once a class is learned."""
        r = sum(counts)
        rows, sizes = medoids(torch.ones(1, r, 2), r, labels_of(counts).unsqueeze(0))
        assert rows.tolist() == [list(range(r))]
        assert sizes.tolist() == [[1] * r]

    @pytest.mark.parametrize("m", [1, 4, 10])
    def test_duplicates_without_labels(self, m: int) -> None:
        rows, sizes = medoids(torch.ones(1, 10, 2), m)
        assert rows.tolist() == [list(range(m))]
        assert sizes.tolist() == [[10 - m + 1] + [1] * (m - 1)]

    def test_all_of_the_pool_whatever_the_distances(self) -> None:
        gradients = points(40).view(1, 40, 3).repeat(1, 2, 1)
        rows, sizes = medoids(gradients, 80)
        assert rows.tolist() == [list(range(80))]
        assert sizes.tolist() == [[1] * 80]

    def test_more_classes_than_places(self) -> None:
        rows, sizes = medoids(points(20).unsqueeze(0), 5, torch.arange(20).unsqueeze(0))
        assert rows.tolist() == [[0, 1, 2, 3, 4]]
        assert sizes.sum() == 20


class TestAgainstBruteForce:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 999), st.data())
    def test_per_class(self, counts: Counts, seed: int, data: st.DataObject) -> None:
        r = sum(counts)
        m = data.draw(st.integers(1, r))
        gradients, labels = on_a_line(r, seed), labels_of(counts, seed)
        rows, sizes = medoids(gradients.unsqueeze(0), m, labels.unsqueeze(0))
        assert (rows[0].tolist(), sizes[0].tolist()) == reference.medoids(gradients, m, labels.tolist())

    @pytest.mark.parametrize("m", [1, 3, 12, 24, 25])
    def test_whole_pool(self, m: int) -> None:
        gradients = on_a_line(25, seed=3)
        rows, sizes = medoids(gradients.unsqueeze(0), m)
        assert (rows[0].tolist(), sizes[0].tolist()) == reference.medoids(gradients, m)

    def test_unrepresented_classes_count_for_the_nearest_medoid(self) -> None:
        gradients = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2], [8.0]])
        rows, sizes = medoids(gradients.unsqueeze(0), 2, torch.tensor([[0, 0, 0, 1, 1, 1, 2]]))
        assert rows.tolist() == [[1, 4]]
        assert sizes.tolist() == [[3, 4]]

    def test_members_count_within_their_class(self) -> None:
        """The last one of class 0 lies among class 1."""
        gradients = torch.tensor([[0.0], [0.1], [0.2], [9.1], [9.0], [9.1], [9.2], [9.1]])
        rows, sizes = medoids(gradients.unsqueeze(0), 2, torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]))
        assert rows.tolist() == [[1, 5]]
        assert sizes.tolist() == [[4, 4]]

    def test_ties_go_to_the_lowest_index(self) -> None:
        gradients = torch.tensor([[[0.0], [1.0], [1.0], [0.0]]])
        assert medoids(gradients, 1)[0].tolist() == [[0]]
        assert medoids(gradients, 2)[0].tolist() == [[0, 1]]


class TestBatch:
    @pytest.mark.parametrize("with_features", [False, True])
    @pytest.mark.parametrize("with_labels", [False, True])
    @pytest.mark.parametrize("chunk", [1, 3000, 1 << 24])
    @pytest.mark.parametrize("shared", [False, True])
    def test_pools_are_solved_one_by_one(
        self, monkeypatch: pytest.MonkeyPatch, with_features: bool, with_labels: bool, chunk: int, shared: bool
    ) -> None:
        # The function hides the module of the same name.
        monkeypatch.setattr(sys.modules["torchcrest.solvers.medoids"], "CHUNK", chunk)
        gradients = points(7 * 50).view(7, 50, 3)
        features = points(7 * 50, 5, seed=1).view(7, 50, 5) if with_features else None
        labels = torch.randint(6, (7, 50), generator=torch.Generator().manual_seed(0)) if with_labels else None
        rows, sizes = medoids(gradients, 17, labels, features, shared=shared)
        for p in range(7):
            part = slice(p, p + 1)
            alone = medoids(
                gradients[part],
                17,
                None if labels is None else labels[part],
                None if features is None else features[part],
                shared=shared,
            )
            assert torch.equal(rows[part], alone[0])
            assert torch.equal(sizes[part], alone[1])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
    def test_labels_of_any_integer_type(self, dtype: torch.dtype) -> None:
        gradients, labels = points(30).unsqueeze(0), labels_of([12, 18]).unsqueeze(0) > 2
        expected = medoids(gradients, 8, labels.long())
        assert all(torch.equal(a, b) for a, b in zip(medoids(gradients, 8, labels.to(dtype)), expected, strict=True))

    def test_names_of_the_classes_do_not_matter_nor_does_the_order_of_members(self) -> None:
        gradients, labels = points(40), labels_of([10, 20, 10])
        rows, sizes = medoids(gradients.unsqueeze(0), 8, labels.unsqueeze(0))
        order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
        moved, moved_sizes = medoids(gradients[order].unsqueeze(0), 8, (labels[order] * 5 - 100).unsqueeze(0))
        counts = dict(zip(rows[0].tolist(), sizes[0].tolist(), strict=True))
        assert dict(zip(order[moved[0]].tolist(), moved_sizes[0].tolist(), strict=True)) == counts


class TestLastLayer:
    @pytest.mark.parametrize("bias", [True, False])
    def test_gram_identity(self, bias: bool) -> None:
        gradients, features = points(12, 4), points(12, 6, seed=1)
        whole = reference.layer_gradients(gradients, features, bias)
        got = distances(gradients, gradients, features, features, bias=bias)
        assert torch.allclose(got, reference.distances(whole, whole), atol=1e-7)

    def test_gradient_of_a_real_layer(self) -> None:
        """Not the identity, but autograd says what the gradient is."""
        layer, inputs = torch.nn.Linear(5, 3).double(), points(6, 5)
        outputs = layer(inputs)
        y = torch.tensor([0, 1, 2, 0, 1, 2])
        losses = torch.nn.functional.cross_entropy(outputs, y, reduction="none")
        rows = []
        for loss in losses:
            parts = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
        proxy = outputs.softmax(1).detach() - torch.nn.functional.one_hot(y, 3)
        whole = torch.stack(rows)
        expected = reference.distances(whole, whole)
        assert torch.allclose(distances(proxy, proxy, inputs, inputs), expected, atol=1e-7)

    @pytest.mark.parametrize("bias", [True, False])
    def test_picks_are_those_of_whole_gradients(self, bias: bool) -> None:
        gradients, features = points(30, 4), points(30, 6, seed=1)
        whole = reference.layer_gradients(gradients, features, bias)
        rows, sizes = medoids(gradients.unsqueeze(0), 9, features=features.unsqueeze(0), bias=bias)
        similarity = (-reference.distances(whole, whole)).tolist()
        picks = rows[0].tolist()
        best = reference.value(similarity, reference.greedy(similarity, 9))
        assert reference.value(similarity, picks) == pytest.approx(best, rel=1e-9)
        assert sizes[0].tolist() == reference.cluster_sizes(similarity, picks)
        plain = medoids(gradients.unsqueeze(0), 9)[0][0].tolist()
        assert reference.value(similarity, plain) < best - 0.01, "the features make no difference here"

    def test_bias_matters(self) -> None:
        gradients, features = points(2, 4), points(2, 6, seed=1)
        with_bias, without = (distances(gradients, gradients, features, features, bias=b) for b in (True, False))
        assert (with_bias[0, 1] > without[0, 1]).item()


class TestDistances:
    def test_plain(self) -> None:
        left, right = points(7), points(9, seed=1)
        assert torch.allclose(distances(left, right), reference.distances(left, right), atol=1e-7)

    @pytest.mark.parametrize(
        ("dtype", "result"),
        [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    )
    def test_types(self, dtype: torch.dtype, result: torch.dtype) -> None:
        x = points(4, dtype=torch.float32).to(dtype)
        assert distances(x, x).dtype == result

    def test_never_nan(self) -> None:
        x = points(50, 20, dtype=torch.float32).repeat(2, 1) * 1000
        assert distances(x, x).isfinite().all()


class TestWeigh:
    @pytest.mark.parametrize(
        ("power", "expected"), [(0.0, [1.0, 1.0, 1.0]), (0.5, [0.5, 1.0, 1.5]), (1.0, [3 / 14, 12 / 14, 27 / 14])]
    )
    def test_power(self, power: float, expected: list[float]) -> None:
        assert torch.allclose(weigh(torch.tensor([1, 4, 9]), power), torch.tensor(expected))

    @given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.floats(0, 3))
    def test_mean_is_one(self, sizes: list[int], power: float) -> None:
        weights = weigh(torch.tensor([sizes, sizes]), power)
        assert weights.dtype == torch.float32
        assert weights.mean(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)

    def test_equal_sizes_weigh_exactly_one(self) -> None:
        for m in range(1, 200):
            assert torch.equal(weigh(torch.ones(m, dtype=torch.int64), 1.0), torch.ones(m))
            assert torch.equal(weigh(torch.ones(m, dtype=torch.int64), 0.5), torch.ones(m))


class TestByNeed:
    """Greedy facility location on the whole pool, where nobody represents anybody of another class."""

    @given(
        counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
        seed=st.integers(0, 2**20),
        layer=st.booleans(),
        data=st.data(),
    )
    @settings(max_examples=40)
    def test_as_good_as_the_slow_way(self, counts: Counts, seed: int, layer: bool, data: st.DataObject) -> None:
        n = sum(counts)
        m = data.draw(st.integers(1, n))
        gradients, labels = points(n, seed=seed), labels_of(counts, seed)
        features = points(n, 4, seed=seed + 1) if layer else None
        one = None if features is None else features.unsqueeze(0)
        rows, sizes = medoids(gradients.unsqueeze(0), m, labels.unsqueeze(0), one, shared=False)
        whole = gradients if features is None else reference.layer_gradients(gradients, features, True)
        far = 2 * whole.norm(dim=1).max()
        similarity = ((far - reference.distances(whole, whole)) * (labels.unsqueeze(1) == labels)).tolist()
        # The last two of a class add the same, so the picks themselves may differ.
        best = reference.value(similarity, reference.greedy(similarity, m))
        assert reference.value(similarity, rows[0].tolist()) == pytest.approx(best, rel=1e-9)
        assert rows[0].tolist() == sorted(set(rows[0].tolist()))
        # Each member counts for the nearest medoid of its class, or of all.
        between = reference.distances(whole, whole)[:, rows[0]]
        same = labels.unsqueeze(1) == labels[rows[0]]
        between = between.masked_fill(same.any(1, keepdim=True) & ~same, torch.inf)
        between[rows[0], torch.arange(m)] = -1.0
        assert sizes[0].tolist() == between.argmin(1).bincount(minlength=m).tolist()

    def test_classes_that_are_all_alike_get_one(self) -> None:
        gradients = torch.cat([torch.zeros(20, 2), 5 + points(10, 2).float()]).unsqueeze(0)
        labels = torch.tensor([0] * 20 + [1] * 10).unsqueeze(0)
        rows, sizes = medoids(gradients, 9, labels, shared=False)
        assert rows[0].tolist()[0] == 0
        assert rows[0].tolist()[1] >= 20
        assert sizes[0].tolist()[0] == 20
        assert (medoids(gradients, 9, labels)[0] < 20).sum() == 6, "its share"

    def test_without_labels_there_is_nothing_to_share(self) -> None:
        gradients = points(60).view(2, 30, 3)
        for shared, one in zip(medoids(gradients, 7), medoids(gradients, 7, shared=False), strict=True):
            assert torch.equal(shared, one)


@pytest.mark.parametrize("shared", [True, False])
def test_a_large_class_is_solved_the_lazy_way(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Whole numbers on a line, so that sums are exact and ties are ties in both ways."""
    gradients = torch.randint(0, 10_000, (2, 1300, 1), generator=torch.Generator().manual_seed(0)).float()
    labels = (torch.arange(1300) % 20 == 0).long().expand(2, -1)
    calls: list[int] = []
    lazy = facility._lazy

    def counted(similarity: torch.Tensor, budget: int) -> torch.Tensor:
        calls.append(len(similarity))
        return lazy(similarity, budget)

    monkeypatch.setattr(facility, "_lazy", counted)
    rows, sizes = medoids(gradients, 60, labels, shared=shared)
    assert calls == [1235, 1235]
    monkeypatch.setattr(facility, "LAZY_FROM", 10_000)
    monkeypatch.setattr(sys.modules["torchcrest.solvers.medoids"], "LAZY_FROM", 10_000)
    naive = medoids(gradients, 60, labels, shared=shared)
    assert calls == [1235, 1235]
    assert torch.equal(rows, naive[0])
    assert torch.equal(sizes, naive[1])


@pytest.mark.parametrize("held", [5_000, 700, 64], ids=["classes", "members", "few"])
@pytest.mark.parametrize("layer", [False, True], ids=["outputs", "last-layer"])
@pytest.mark.parametrize("shared", [True, False], ids=["share", "need"])
def test_little_memory_picks_the_same(monkeypatch: pytest.MonkeyPatch, held: int, layer: bool, shared: bool) -> None:
    """Distances are computed as they are needed, and members counted a few at a time: the same picks and sizes."""
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randint(0, 1_000, (2, 90, 1), generator=generator).float()
    features = torch.randint(1, 4, (2, 90, 1), generator=generator).float() if layer else None
    labels = torch.arange(90).remainder(3).clamp(max=1).expand(2, -1)
    module = sys.modules["torchcrest.solvers.medoids"]
    rows, sizes = medoids(gradients, 20, labels, features, bias=False, shared=shared)
    monkeypatch.setattr(module, "CHUNK", held)
    again = medoids(gradients, 20, labels, features, bias=False, shared=shared)
    assert torch.equal(rows, again[0])
    assert torch.equal(sizes, again[1])
