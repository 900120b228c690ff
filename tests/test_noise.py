"""How many labels are wrong, as it is estimated, and what is made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import SMALL, Blobs, make_crest, make_net, sgd, train_step
from torchcrest import Classification, CrestConfig, Objective, Regression
from torchcrest.measure import How, Meter
from torchcrest.noise import LabelNoise
from torchcrest.solvers import labels_of, pick
from torchcrest.types import Pool


def noise(label_noise: Any = "estimated", objective: Objective | None = None, **changes: Any) -> LabelNoise:
    config = CrestConfig(**{"batch_size": 16, "pool_size": 128, "label_noise": label_noise, **changes})
    return LabelNoise(config, objective or Classification())


def pool(outputs: Tensor, labels: Tensor) -> Pool:
    n = len(labels)
    return Pool(torch.arange(n), None, torch.zeros(n), torch.zeros(n, 1), labels=labels, outputs=outputs)


def predictions(examples: int, wrong: float, seed: int = 0, sure: float = 6.0) -> Pool:
    """Predict the right class of all, more or less surely, where a share of the labels are another's."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.randint(5, (examples,), generator=generator)
    outputs = sure * torch.rand(examples, 1, generator=generator) * torch.nn.functional.one_hot(right, 5)
    labels = (right + (torch.rand(examples, generator=generator) < wrong) * 1) % 5
    return pool(outputs, labels)


@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.4])
def test_the_share_is_found(wrong: float) -> None:
    estimate = noise()
    for k in range(10):
        estimate.add([predictions(1000, wrong, seed) for seed in range(10 * k, 10 * k + 10)])
        estimate.read()
    # The lowest of ten means over about three groups of a thousand.
    assert estimate.share == pytest.approx(wrong, abs=3.5 * (wrong * (1 - wrong) / 1000) ** 0.5)


def test_the_surest_are_asked_and_no_others() -> None:
    outputs = torch.tensor([[0.0, 9.0], [8.0, 0.0], *[[0.0, 1.0]] * 18])
    labels = torch.tensor([1, 1, *[0] * 18])
    estimate = noise()
    estimate.add([pool(outputs, labels)])
    estimate.read()
    assert estimate._lowest == 0.5, "of the surest two of twenty"


def test_those_without_a_label_are_not_asked() -> None:
    outputs, labels = torch.tensor([[0.0, 9.0], *[[0.0, 1.0]] * 9]), torch.tensor([-100, *[1] * 9])
    estimate = noise()
    estimate.add([pool(outputs, labels)])
    estimate.read()
    assert estimate._lowest == 0


def test_it_counts_once_it_no_longer_falls_and_the_lowest_does() -> None:
    estimate = noise()
    shares = estimate.numbers()
    for wrong in (0.9, 0.6, 0.4, 0.3, 0.3, *[0.35] * 8, 0.1, 0.1, 0.5):
        estimate.add([predictions(8000, wrong)])
        estimate.read()
        shares += estimate.numbers()
    falling = shares.index(next(filter(None, shares)))
    assert shares[:falling] == [0.0] * falling
    assert 8 <= falling <= 11
    assert shares[falling] == pytest.approx(0.35, abs=0.05)
    assert shares[falling:] == sorted(shares[falling:], reverse=True)
    assert shares[-1] == shares[-2] < 0.25


@pytest.mark.parametrize(
    ("share", "parts", "power"),
    [(0.0, 4, 0.5), (0.06, 4, 0.6), (0.15, 2, 0.75), (0.3, 2, 1.0), (1.0, 2, 1.0), (None, 1, 0.5)],
)
def test_what_it_asks_of_coresets(share: float | None, parts: int, power: float) -> None:
    asked = noise(share, pool_size=128, weight_power=0.5)
    assert asked.parts == parts
    assert asked.power == pytest.approx(power)


def test_small_pools_are_not_divided_and_higher_powers_stay() -> None:
    assert noise(0.0, pool_size=40).parts == 1
    assert noise(0.4, weight_power=1.5).power == 1.5


def test_nothing_is_estimated_without_classes() -> None:
    estimate = noise(objective=Regression())
    assert estimate.share is None
    assert estimate.numbers() == []
    plain = noise()
    plain.add([Pool(torch.arange(3), None, torch.zeros(3), torch.zeros(3, 1))])
    plain.read()
    assert plain._lowest == 1.0


def test_ranks_pick_alike() -> None:
    one, other = noise(), noise()
    one.share, other.share = 0.1, 0.3
    mean = [(a + b) / 2 for a, b in zip(one.numbers(), other.numbers(), strict=True)]
    one.take(mean)
    other.take(mean)
    assert one.share == other.share == 0.2


def test_resumed() -> None:
    one, other = noise(), noise()
    for seed in range(12):
        one.add([predictions(500, 0.3, seed)])
    other.load_state_dict(one.state_dict())
    for estimate in (one, other):
        estimate.add([predictions(500, 0.1, seed=1)])
        estimate.read()
    assert one.numbers() == other.numbers()
    assert 0 < one.numbers()[0] < 0.3


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_coresets_are_of_parts_of_pools(share: float, blobs: Blobs) -> None:
    model = make_net()
    config = replace(
        SMALL, pool_size=128, label_noise=share, check="none", renew=4, interval_scale=4, coresets_per_step=1.0
    )
    loader = make_crest(model, blobs, config=config, steps=4)
    got = {}
    for batch in loader:
        got[tuple(sorted(loader.indices.tolist()))] = batch.weights.sort().values
    # By hand: the pools that it drew, in parts of 2m or 4m.
    twin = make_crest(model, blobs, config=config, steps=4)
    size, power = (32, 0.5) if share == 0 else (64, 1.0)
    expected = {}
    for _ in range(4 * size // 128):
        indices, data = twin._feed.next()
        for start in range(0, 128, size):
            rows = slice(start, start + size)
            part = Meter(model, Classification(), How()).measure(indices[rows], [leaf[rows] for leaf in data])
            (picked,), (weights,) = pick([part], labels_of([part]), 16, power)
            expected[tuple(sorted(part.indices[picked].tolist()))] = weights.sort().values
    assert got.keys() == expected.keys()
    for key, weights in expected.items():
        torch.testing.assert_close(got[key], weights)


def test_a_run_finds_out(blobs: Blobs) -> None:
    shares = []
    for wrong in (0, 1):
        data = Blobs(3000, seed=0)
        flip = torch.rand(3000, generator=torch.Generator().manual_seed(1)) < 0.4 * wrong
        data.y = torch.where(flip, (data.y + 1) % 4, data.y)
        model = make_net()
        config = replace(SMALL, proxy_source="auto", label_noise="estimated", pool_size=64, renew=5, check="none")
        loader = make_crest(model, data, config=config, steps=80)
        optimizer = sgd(model)
        for item in loader:
            train_step(model, optimizer, item)
        shares += loader._noise.numbers()
    assert shares[0] < 0.1 < 0.3 < shares[1] < 0.5
