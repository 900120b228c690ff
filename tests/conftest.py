"""Small models and data that many tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor, Tensor]


class Blobs(Dataset[Batch]):
    """Points around a centre a class; an example is (point, its index, its label)."""

    def __init__(self, examples: int = 300, classes: int = 4, features: int = 8, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(classes, features, generator=generator)
        self.y = torch.randint(classes, (examples,), generator=generator)
        self.x = centres[self.y] + torch.randn(examples, features, generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Batch:
        return self.x[i], torch.tensor(i), self.y[i]


class Net(nn.Module):
    """A small net with batch normalisation and dropout; takes (and ignores) the indices of `Blobs`."""

    def __init__(self, features: int = 8, classes: int = 4, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(features, 16)]
        layers += [nn.BatchNorm1d(16)] if norm else []
        layers += [nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, _index: Tensor | None = None) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def make_net(seed: int = 0, **settings: float | bool) -> Net:
    """Build a `Net` without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(**settings)  # type: ignore[arg-type]


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


@pytest.fixture
def net() -> Callable[..., Net]:
    return make_net


