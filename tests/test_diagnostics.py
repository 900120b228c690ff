"""Bias and variance of coresets' gradients: unbiased, exact by whole gradients, free from proxies, and told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import reference
from conftest import BOUNDED, SMALL, Blobs, drain, events, make_crest, make_net, sgd, traces, train_pass, train_step
from torchcrest import Classification, Crest, CrestConfig, Regression
from torchcrest.active import stream
from torchcrest.diagnostics import (
    Gauge,
    GradientQuality,
    estimates,
    gradient_qualities,
    gradient_quality,
    means_of,
)
from torchcrest.errors import ConfigError
from torchcrest.solvers import pick
from torchcrest.types import Pool, Stats

M = 2


def square(vector: Tensor) -> float:
    return float(vector.square().sum())


def spread(vectors: Sequence[Tensor]) -> float:
    """Return the mean squared distance from the mean."""
    mean = torch.stack(list(vectors)).mean(0)
    return sum(square(vector - mean) for vector in vectors) / len(vectors)


def reference_coreset(proxies: Tensor, gradients: Tensor, power: float) -> Tensor:
    """Return the mean gradient of a pool's coreset of 2, by the slow solver."""
    picks, sizes = reference.medoids(proxies, M)
    weights = torch.tensor(sizes, dtype=torch.float64) ** power
    return (weights / weights.mean()) @ gradients[picks] / M


def close(value: float | list[float]) -> Any:
    return pytest.approx(value, rel=1e-5, abs=1e-9)


# Estimates from proxy gradients ---------------------------------------------------------------------------------


def points(n: int) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.4


def estimated(pools: Sequence[Tensor], power: float = 1.0) -> Tensor:
    made = [Pool(torch.arange(len(p)), None, torch.zeros(len(p)), p) for p in pools]
    rows, weights = pick(made, None, M, power)
    return estimates(*means_of(made, rows, weights), len(pools[0]))


def test_estimates_are_right_on_average_over_all_pairs_of_pools() -> None:
    all_, r = points(6), 4
    pools = [all_[list(rows)] for rows in combinations(range(6), r)]
    got = torch.stack([estimated(pair) for pair in product(pools, pools)]).mean(0)
    coresets = [reference_coreset(pool, pool, 1.0) for pool in pools]
    mean, single = all_.mean(0), spread(list(all_)) * 6 / 5
    bias = torch.stack(coresets).mean(0) - mean
    assert square(bias) > 0.001
    # The data stand for what they were drawn from, whose mean is less certain by single / 6.
    expected = [square(mean) - single / 12, square(bias), spread(coresets), single]
    assert got.tolist() == close(expected)


def test_the_norm_of_disjoint_pools_is_that_of_what_the_data_was_drawn_from() -> None:
    all_ = points(8)
    splits = [(rows, tuple(set(range(8)) - set(rows))) for rows in combinations(range(8), 4)]
    got = torch.stack([estimated([all_[list(a)], all_[list(b)]]) for a, b in splits]).mean(0)
    single = spread(list(all_)) * 8 / 7
    assert float(got[0]) == close(square(all_.mean(0)) - single / 8)
    assert float(got[3]) == close(single)


@pytest.mark.parametrize("bias", [True, False])
def test_of_the_whole_layer_it_is_as_of_its_gradients(bias: bool) -> None:
    gradients, features = points(20).view(2, 10, 3), points(40).view(2, 10, 6)
    layer = [reference.layer_gradients(g, f, bias) for g, f in zip(gradients, features, strict=True)]
    rows, weights = torch.tensor([[0, 3, 7], [1, 2, 9]]), torch.tensor([[0.5, 1.0, 1.5], [2.0, 0.5, 0.5]])

    def made(proxies: Sequence[Tensor], **more: Any) -> list[Pool]:
        each = [{name: value[k] for name, value in more.items()} for k in range(2)]
        return [
            Pool(torch.arange(10), None, torch.zeros(10), g, bias=bias, **m) for g, m in zip(proxies, each, strict=True)
        ]

    through = estimates(*means_of(made(list(gradients), features=features), rows, weights), 10)
    explicit = estimates(*means_of(made(layer), rows, weights), 10)
    assert through.tolist() == close(explicit.tolist())


def test_a_coreset_that_is_the_pool_has_no_bias_and_its_variance() -> None:
    pools = list(points(24).view(4, 6, 3))
    made = [Pool(torch.arange(6), None, torch.zeros(6), p) for p in pools]
    _, bias, variance, _ = estimates(*means_of(made, torch.arange(6).expand(4, 6), torch.ones(4, 6)), 6).tolist()
    assert bias == pytest.approx(0, abs=1e-15)
    assert variance == close(spread([pool.mean(0) for pool in pools]) * 4 / 3)


# Whole gradients ------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """Predicts W x, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.2, -0.7]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T


def regression(n: int) -> tuple[TensorDataset, Tensor, Tensor]:
    """Return data, and each example's gradient (W x - y) x^T and its proxy W x - y, by hand."""
    x, y = points(n), points(n + 1)[:n, :2]
    proxies = x @ Line().w.detach().T - y  # the loss is the mean of two squares
    return TensorDataset(x, y), (proxies.unsqueeze(2) * x.unsqueeze(1)).flatten(1), proxies


@pytest.mark.parametrize("power", [1.0, 0.0])
def test_every_order_of_the_data_gives_the_expectation(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    n, r = 5, 4
    data, gradients, proxies = regression(n)
    orders = [torch.tensor(order) for order in permutations(range(n))]
    draws, turn = len(orders), iter(orders)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randperm", lambda size, **_: next(turn))
        config = CrestConfig(batch_size=M, pool_size=r, weight_power=power)
        found = gradient_quality(Line(), data, config, draws=draws, objective=Regression(), chunk=3)

    pools = [list(rows) for rows in permutations(range(n), r)]  # of two examples alike, the first is picked
    coresets = [reference_coreset(proxies[rows], gradients[rows], power) for rows in pools]
    errors = [coreset - gradients[rows].mean(0) for coreset, rows in zip(coresets, pools, strict=True)]
    mean = gradients.mean(0)
    bias = torch.stack(coresets).mean(0) - mean
    assert square(bias) > 0.01
    bessel = draws / (draws - 1)
    batches = {size: [gradients[list(rows)].mean(0) for rows in combinations(range(n), size)] for size in (M, r)}
    expected = GradientQuality(
        M,
        r,
        square(mean),
        square(bias) - spread(errors) * bessel / draws,
        spread(coresets) * bessel,
        *(sum(square(batch - mean) for batch in some) / len(some) for some in batches.values()),
    )
    for name in vars(expected):
        assert getattr(found, name) == close(getattr(expected, name)), name
    single = spread(list(gradients)) * n / (n - 1)
    assert found.random_variance == close(single / M * (1 - M / n))
    assert found.effective_batch_size == close(M * found.random_variance / found.variance)


def test_proxies_are_measured_on_the_same_coresets() -> None:
    data, _, proxies = regression(40)
    config = CrestConfig(batch_size=M, pool_size=8, label_noise=None)
    found = gradient_qualities(Line(), data, {"a": config}, draws=5, objective=Regression(), seed=4)["a"].proxies
    rows = [torch.randperm(40, generator=stream(4, "quality", k))[:8] for k in range(5)]
    gradient, bias, variance, single = estimated([proxies[each].float() for each in rows], 0.5).tolist()
    expected = GradientQuality(M, 8, gradient, bias, variance, single / M, single / 8)
    for name in vars(expected):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6), name


def test_ways_to_pick_share_their_pools(blobs: Blobs) -> None:
    model, objective = make_net(), Classification()
    configs = {
        "small": replace(SMALL, pool_size=24),
        "large": SMALL,
        "layer": replace(SMALL, proxy="last_layer"),
        "pool": replace(SMALL, batch_size=48),
    }
    together = gradient_qualities(model, blobs, configs, draws=3, objective=objective)
    for name, config in configs.items():
        alone = gradient_quality(model, blobs, config, draws=3, objective=objective, chunk=7)
        for field, value in vars(alone).items():
            assert getattr(together[name].whole, field) == pytest.approx(value, rel=1e-3, abs=1e-6), field
    assert together["large"].whole != together["layer"].whole
    nothing = together["pool"].whole
    assert nothing.bias_square == pytest.approx(0, abs=1e-9)
    assert nothing.random_variance == nothing.pool_variance


def test_layers_that_are_covered(blobs: Blobs) -> None:
    found = [gradient_quality(make_net(), blobs, SMALL, draws=2, layers=k).gradient_square for k in (1, None)]
    assert 0 < found[0] < found[1]


def test_the_model_is_left_as_it_was(blobs: Blobs) -> None:
    model = make_net(dropout=0.5)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = traces(model)
    found = gradient_quality(model, blobs, SMALL, draws=2)
    assert traces(model) == before
    assert gradient_quality(model, blobs, SMALL, draws=2) == found


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"draws": 1}, {}, "draws must be at least 2, got 1"),
    ({"chunk": 0}, {}, "chunk must be at least 1, got 0"),
    ({}, {"pool_size": 301}, "pool_size must be at least 2 and at most the 300 examples of the data set, got 301"),
    ({}, {"batch_size": 1, "pool_size": 1}, "pool_size must be at least 2"),
    ({}, {"proxy_source": "history"}, "proxy_source must be 'forward' to measure whole gradients, got 'history'"),
]


@pytest.mark.parametrize(("arguments", "settings", "match"), BAD)
def test_what_cannot_work_is_refused(
    blobs: Blobs, arguments: dict[str, Any], settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        gradient_quality(make_net(), blobs, replace(SMALL, **settings), **arguments)
    with pytest.raises(ConfigError, match="configs must name at least one"):
        gradient_qualities(make_net(), blobs, {})


# In words -------------------------------------------------------------------------------------------------------


def quality(gradient: float, bias: float, variance: float = 1.0) -> GradientQuality:
    return GradientQuality(10, 40, gradient, bias, variance, 4.0, 1.0)


def test_what_follows_from_the_estimates() -> None:
    assert quality(9.0, 1.0).bounded
    assert not quality(9.0, 1.1).bounded
    assert quality(0.5, -0.1).bounded
    assert not quality(-0.1, -0.2).bounded
    assert quality(4.0, 1.0).relative(1.0) == 0.5
    assert quality(-1.0, 1.0).relative(1.0) is None
    assert quality(1.0, 1.0).effective_batch_size == 40
    assert quality(1.0, 1.0, 0.0).effective_batch_size is None
    assert quality(-1.0, -1.0).to_dict() == {
        "gradient_norm": 0.0,
        "bias": 0.0,
        "deviation": 1.0,
        "random_deviation": 2.0,
        "pool_deviation": 1.0,
        "effective_batch_size": 40.0,
        "bounded": False,
    }


# In training ----------------------------------------------------------------------------------------------------


def group(size: int, seed: int, scale: float = 1.0) -> tuple[list[Pool], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pools = [
        Pool(torch.arange(48), None, torch.zeros(48), scale * torch.randn(48, 3, generator=generator))
        for _ in range(size)
    ]
    return pools, *pick(pools, None, SMALL.batch_size, SMALL.weight_power)


def running(groups: Sequence[tuple[int, Tensor]]) -> list[float]:
    """Average estimates: those of squared scale over the newest, those relative to it over more."""

    def mean(values: Sequence[float], memory: float) -> float:
        weights = [freedom * memory**age for age, (freedom, _) in enumerate(reversed(groups))][::-1]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    gradient, bias, variance, single = zip(*(values.tolist() for _, values in groups), strict=True)
    scale = mean(single, 0.5)
    relative = [mean([a / s for a, s in zip(each, single, strict=True)], 0.9) * scale for each in (bias, variance)]
    return [mean(gradient, 0.5), *relative, scale]


def test_a_gauge_weighs_groups_by_their_freedom_and_their_age() -> None:
    gauge = Gauge(SMALL)
    assert gauge.tell([0.0] * 5, Stats()) is None
    gauge.add(*group(1, 0))
    gauge.read()
    assert gauge.tell([0.0] * 5, Stats()) is None, "a single pool shows no variance"
    groups = [group(5, 1), group(8, 2)]
    for each in (groups[0], group(3, 3, torch.inf), group(3, 3, 0.0), groups[1]):
        gauge.add(*each)
    gauge.read()
    expected = running([(len(each[0]) - 1, estimates(*means_of(*each), 48)) for each in groups])
    assert gauge.numbers() == pytest.approx(expected, rel=1e-5)


def test_few_pools_of_few_dimensions_say_nothing() -> None:
    gauge = Gauge(SMALL)
    gauge.add(*group(7, 1))  # 6 degrees of freedom in each of 3 dimensions
    gauge.read()
    assert gauge.numbers() == [0.0] * 4
    gauge.add(*group(2, 2))
    gauge.read()
    assert gauge.numbers() == [0.0] * 4, "the older ones count less: 0.9 * 18 + 3 are below 20"
    restored = Gauge(SMALL)
    restored.load_state_dict(gauge.state_dict())
    for each in (gauge, restored):
        each.add(*group(3, 3))
        each.read()
        assert each.numbers()[3] > 0, "0.81 * 18 + 0.9 * 3 + 6 are above"


def test_a_gauge_tells_and_keeps_means() -> None:
    gauge, stats = Gauge(SMALL), Stats()
    gauge.add(*group(4, 0))
    gauge.read()
    first = gauge.tell([9.0, 1.0, 1.0, 32.0, 1.6], stats)  # 32 / 16 = 2 for a random batch
    assert first == {
        "gradient_norm": 3.0,
        "bias": 1.0,
        "deviation": 1.0,
        "random_deviation": 2**0.5,
        "pool_deviation": (32 / 48) ** 0.5,
        "effective_batch_size": 32.0,
        "bounded": True,
        "cost": 1.6,
        "pay_off": 1.25,
    }
    restored = Gauge(SMALL)
    restored.load_state_dict(gauge.state_dict())
    second = restored.tell([1.0, 1.0, 2.0, 32.0, 0.0], stats)
    assert second is not None
    assert not {"cost", "pay_off"} & second.keys()
    assert not second["bounded"]
    assert (stats.effective_batch_size, stats.pay_off, stats.bounded) == (24.0, 1.25, 0.5)
    assert restored.numbers() == gauge.numbers()


@pytest.mark.parametrize(
    "config", [SMALL, BOUNDED, replace(SMALL, proxy="last_layer")], ids=["small", "bounded", "layer"]
)
def test_crest_tells_of_the_coresets_it_picks(
    blobs: Blobs, config: CrestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, Tensor]] = []
    add = Gauge.add

    def spy(gauge: Gauge, pools: Sequence[Pool], rows: Tensor, weights: Tensor) -> None:
        add(gauge, pools, rows, weights)
        if len(pools) > 1:
            seen.append((len(pools) - 1, estimates(*means_of(pools, rows, weights), config.pool)))

    monkeypatch.setattr(Gauge, "add", spy)
    crest = make_crest(model := make_net(), blobs, config=replace(config, exclude=False), steps=120)
    optimizer, told = sgd(model), 0
    for batch in crest:
        said = events(crest, "quality")
        if len(said) > told and said[-1]["step"] == crest._step - 1:
            told = len(said)
            gradient, bias, variance, single = running(seen)
            expected = GradientQuality(
                config.batch_size, config.pool, gradient, bias, variance, single / 16, single / config.pool
            )
            for name, value in expected.to_dict().items():
                assert said[-1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        train_step(model, optimizer, batch)
    assert told == len(events(crest, "quality")) >= 3
    stops = {e["step"] for e in crest.history if e["event"] == "region" or (e["event"] == "check" and e["passed"])}
    assert {e["step"] for e in events(crest, "quality")} <= stops, "once an interval at most"


def test_the_cost_of_a_coreset_s_step(blobs: Blobs) -> None:
    crest = make_crest(make_net(), blobs, config=BOUNDED, steps=40)
    train_pass(crest._model, crest)
    last, budget = events(crest, "quality")[-1], crest._account.budget
    assert 0 < crest.stats.coresets < 40
    assert last["pay_off"] == pytest.approx(last["effective_batch_size"] / 16 / last["cost"])
    step = budget.trained / crest._account._entered  # in examples; nothing is spent after the last event but checks
    assert step == 16
    assert crest._account.coreset_step(crest.stats) == pytest.approx(1 + budget.spent / crest.stats.coresets / step)
    fresh = make_crest(make_net(), blobs)
    assert fresh._account.coreset_step(fresh.stats) == 0.0


def test_nothing_changes_without_diagnostics(blobs: Blobs) -> None:
    def run(on: bool) -> tuple[Crest, Any]:
        model = make_net()
        crest = make_crest(model, blobs, config=replace(BOUNDED, diagnostics=on), steps=60)
        return crest, train_pass(model, crest)

    (with_, trace), (without, other) = run(True), run(False)
    assert trace == other
    assert events(with_, "quality")
    assert [e for e in with_.history if e["event"] != "quality"] == without.history
    assert without.stats.effective_batch_size == 0.0 < with_.stats.effective_batch_size


def test_with_pools_of_a_batch_a_coreset_is_a_random_batch(blobs: Blobs) -> None:
    config = replace(SMALL, pool_size=16, coresets_per_step=3.0)
    crest = make_crest(make_net(), blobs, config=config, steps=60)
    drain(crest)
    for event in events(crest, "quality"):
        assert event["bias"] == pytest.approx(0, abs=1e-4)
        assert event["pool_deviation"] == pytest.approx(event["random_deviation"])
    assert 10 < crest.stats.effective_batch_size < 25
