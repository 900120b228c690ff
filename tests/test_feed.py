"""Reading: what a data set draws from the global random states is a function of the pool, wherever it is read."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from conftest import Batch, Blobs, MakeLoader, make_crest, make_net, parameters_of, same, sgd, traces, train_step
from torchcrest.active import Draws
from torchcrest.feed import Feed, Reading, reader_of


class Noisy(Dataset[Batch]):
    """Adds noise from each of the global random states."""

    def __init__(self) -> None:
        self.blobs = Blobs()

    def __len__(self) -> int:
        return len(self.blobs)

    def __getitem__(self, i: int) -> Batch:
        x, index, y = self.blobs[i]
        noise = [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002
        return x + torch.tensor(noise + [0.0] * 5), index, y


class NoisyTogether(Noisy):
    def __getitems__(self, rows: list[int]) -> list[Batch]:
        return [self[row] for row in reversed(rows)][::-1]


def jitter(examples: list[Batch]) -> list[Tensor]:
    x, index, y = default_collate(examples)
    return [x + torch.rand(()) + random.random() + float(np.random.rand()), index, y]  # noqa: NPY002


NOISY = [(Blobs, jitter), (Noisy, None), (Noisy, jitter), (NoisyTogether, None)]
BY = ["collate", "example", "both", "examples together"]


def run(make: MakeLoader, kind: Any, steps: int = 12, stop: int | None = None, **kw: Any) -> dict[str, Tensor]:
    """Train, if asked stopping and carrying on with a fresh loader; nothing but reading draws."""
    model = make_net()
    optimizer, loader, step = sgd(model), make(model, kind(), steps=steps, **kw), 0
    while step < steps:
        for batch in loader:
            train_step(model, optimizer, batch, loader)
            step += 1
            if step == stop:
                state = pickle.loads(pickle.dumps(loader.state_dict()))
                random.seed(), np.random.seed(), torch.rand(9)  # noqa: NPY002
                loader = make(model, kind(), steps=steps, **kw)
                loader.load_state_dict(state)
                break
    return parameters_of(model)


def test_workers_and_resuming_change_no_augmentation(make_loader: MakeLoader) -> None:
    alone = run(make_loader, Noisy, collate_fn=jitter)
    random.seed(5), np.random.seed(5), torch.rand(3)  # noqa: NPY002
    assert same(alone, run(make_loader, Noisy, collate_fn=jitter, stop=8))
    assert same(alone, run(make_loader, Noisy, collate_fn=jitter, stop=8, num_workers=2))
    assert not same(alone, run(make_loader, Noisy, collate_fn=jitter, seed=1))


@pytest.mark.parametrize(("kind", "collate"), NOISY, ids=BY)
def test_however_it_is_drawn(kind: Any, collate: Any) -> None:
    alone = run(make_crest, kind, collate_fn=collate)
    random.seed(5), np.random.seed(5), torch.rand(3)  # noqa: NPY002
    assert same(alone, run(make_crest, kind, collate_fn=collate, stop=8, num_workers=2))


def test_the_users_random_states_stay(make_loader: MakeLoader) -> None:
    model = make_net()
    before = traces(model)
    for batch in make_loader(model, Noisy(), steps=3, collate_fn=jitter):
        assert len(batch.weights) == 16
    assert traces(model) == before


@pytest.mark.parametrize(("kind", "collate"), NOISY, ids=BY)
def test_an_example_is_augmented_anew_in_each_pass(kind: Any, collate: Any) -> None:
    feed = Feed(kind(), Draws(torch.ones(300, dtype=torch.bool), 0), 60, Reading(collate_fn=collate), 0)
    passes = []
    for _ in range(3):
        x, index, _ = _pass(feed)
        passes.append(x[index.argsort()] - Blobs().x)
    noise = torch.stack(passes)[:, :, :3]
    assert (noise[0] != noise[1]).all()
    assert (noise[1] != noise[2]).all()
    assert 0.2 < float(noise.std()) < 0.6


def _pass(feed: Feed) -> list[Tensor]:
    parts = [feed.next()[1] for _ in range(5)]
    return [torch.cat([part[k] for part in parts]) for k in range(3)]


def test_a_pool_is_read_again_as_it_was() -> None:
    feed = Feed(Noisy(), Draws(torch.ones(300, dtype=torch.bool), 0), 60, Reading(num_workers=2), 0)
    pools = [feed.next() for _ in range(4)]
    for indices, data in reversed(pools):
        again = feed.read(indices)
        assert all(torch.equal(left, right) for left, right in zip(data, again, strict=True))


def test_an_error_in_reading_leaves_the_states() -> None:
    class Broken(Noisy):
        def __getitem__(self, i: int) -> Batch:
            super().__getitem__(i)
            raise OSError("no such image")

    model = make_net()
    before = traces(model)
    dataset, collate = reader_of(Broken(), Reading(), 0)
    with pytest.raises(OSError, match="no such image"):
        next(iter(DataLoader(dataset, batch_sampler=[[1, 2]], collate_fn=collate, generator=torch.Generator())))
    assert traces(model) == before


def test_what_says_that_it_draws_nothing_is_not_seeded() -> None:
    class Still(Noisy):
        deterministic = True

    dataset, _ = reader_of(Still(), Reading(), 0)
    first, second = dataset.__getitems__([1, 2]), dataset.__getitems__([1, 2])
    assert not torch.equal(first[0], second[0])
