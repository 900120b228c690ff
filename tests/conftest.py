"""Small models, data and loaders that many tests share."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchcrest import (
    Classification,
    Craig,
    CraigConfig,
    Crest,
    CrestConfig,
    Glister,
    GlisterConfig,
    GradMatch,
    GradMatchConfig,
    InfoBatch,
    InfoBatchConfig,
    Objective,
    RandomBatches,
    WeightedBatch,
)
from torchcrest.config import MeasureMode
from torchcrest.measure import How, Meter
from torchcrest.passes import Passes
from torchcrest.types import Coreset, Pool

# Tiny tensors: threads would only wait for each other, the more so on a busy machine.
torch.set_num_threads(1)

# How long an example takes is no property of the code on a shared machine.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Spare the garbage collector, and the processes that are forked, all that was imported for the tests."""
    gc.collect()
    gc.freeze()


def forkserver() -> ForkServerContext:
    """Return what starts processes from one that has imported what they need, once for all, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchcrest.train.run", "torch.distributed.fsdp", "torch._dynamo", "hypothesis"])
    return context


Batch = tuple[Tensor, Tensor, Tensor]

# Regions of a few steps, checks that pass and checks that fail, coresets left over, examples that are set aside.
# No bound, and coresets used until the region ends, as in the paper.
SMALL = CrestConfig(
    batch_size=16,
    pool_size=48,
    tolerance=0.05,
    interval_scale=3,
    coresets_per_step=1.5,
    curvature="signed",
    learned_loss=0.3,
    learned_interval=7,
    max_overhead=None,
    overhead_in="counted",
    renew=None,
    check="paired",
    proxy_source="forward",
    label_noise=None,
    quotas="share",
    max_coreset_cost=None,
    measured_together=48,
)
# A bound that pays for some of the coresets only, and random batches between them; two to a pool, and some over.
BOUNDED = replace(SMALL, max_overhead=0.9, renew=4, pool_size=40, interval_scale=6, measured_together=16)


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


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """Build a model without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed notes the stack, for each kind of accelerator
        return build()


def make_net(seed: int = 0, **settings: float | bool) -> Net:
    """Build a `Net` without touching the global random state."""
    net: Net = seeded(lambda: Net(**settings), seed)  # type: ignore[arg-type]
    return net


def make_crest(model: nn.Module, dataset: Any, *, config: CrestConfig = SMALL, steps: int = 20, **kw: Any) -> Crest:
    """Build a `Crest` of short regions."""
    return Crest(model, dataset, config, steps=steps, **kw)


def make_bounded(model: nn.Module, dataset: Any, *, config: CrestConfig = BOUNDED, steps: int = 20, **kw: Any) -> Crest:
    """Build a `Crest` that cannot pay for a coreset in each step."""
    return Crest(model, dataset, config, steps=steps, **kw)


def make_reusing(model: nn.Module, dataset: Any, *, steps: int = 20, **kw: Any) -> Crest:
    """Build a `Crest` that can pay for few coresets and uses them again."""
    return make_bounded(model, dataset, config=replace(BOUNDED, renew=None), steps=steps, **kw)


def make_history(model: nn.Module, dataset: Any, *, steps: int = 20, **kw: Any) -> Crest:
    """Build a `Crest` that goes by what it knows of an example."""
    config = replace(BOUNDED, proxy_source="history", history_age=9)
    return make_bounded(model, dataset, config=config, steps=steps, **kw)


def make_apprentice(model: nn.Module, dataset: Any, *, steps: int = 20, **kw: Any) -> Crest:
    """Build a `Crest` that measures a small model."""
    config = replace(BOUNDED, proxy_source="model")
    return make_bounded(model, dataset, config=config, steps=steps, proxy_model=copy.deepcopy(model), **kw)


def make_auto(model: nn.Module, dataset: Any, *, steps: int = 20, **kw: Any) -> Crest:
    """Build a `Crest` that makes itself a small model, and picks by how many labels are wrong."""
    config = replace(BOUNDED, proxy_source="auto", label_noise="estimated", quotas="need", pool_size=64)
    return make_bounded(model, dataset, config=config, steps=steps, **kw)


def make_random(model: nn.Module, dataset: Any, *, steps: int = 20, **kw: Any) -> RandomBatches:
    """Build `RandomBatches` of the same size."""
    return RandomBatches(model, dataset, SMALL.batch_size, steps=steps, **kw)


# A subset of 60 of the 300 examples, picked anew within a pass and across passes.
SUBSET: dict[str, Any] = {"batch_size": 16, "subset": 0.2, "reselect": 7, "measured_together": 100}


def make_craig(model: nn.Module, dataset: Any, *, steps: int = 20, **kw: Any) -> Craig:
    """Build a `Craig` that selects every 7 steps."""
    return Craig(model, dataset, CraigConfig(**SUBSET), steps=steps, **kw)


def make_gradmatch(model: nn.Module, dataset: Any, *, steps: int = 20, **kw: Any) -> GradMatch:
    """Build a `GradMatch` that selects every 7 steps."""
    return GradMatch(model, dataset, GradMatchConfig(**SUBSET), steps=steps, **kw)


def make_glister(model: nn.Module, dataset: Any, *, steps: int = 20, **kw: Any) -> Glister:
    """Build a `Glister` that selects every 7 steps."""
    return Glister(model, dataset, GlisterConfig(**SUBSET, rounds=3), steps=steps, **kw)


def make_infobatch(model: nn.Module, dataset: Any, *, steps: int = 20, **kw: Any) -> InfoBatch:
    """Build an `InfoBatch` with an epoch of everything, pruned ones, and everything from step 34 on."""
    return InfoBatch(model, dataset, InfoBatchConfig(batch_size=16, anneal=3), steps=steps, total_steps=37, **kw)


MakeLoader = Callable[..., Passes]
CRESTS = [make_crest, make_bounded, make_reusing, make_history, make_apprentice, make_auto]
LOADERS = [*CRESTS, make_random, make_craig, make_gradmatch, make_glister, make_infobatch]


@pytest.fixture(params=LOADERS, ids=lambda make: make.__name__.removeprefix("make_"))
def make_loader(request: pytest.FixtureRequest) -> MakeLoader:
    """Run a test over every loader."""
    make: MakeLoader = request.param
    return make


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    """Build the usual optimizer, which has a state."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: WeightedBatch, loader: Passes | None = None
) -> None:
    """Take the step of the README's loop; the loader may observe the losses."""
    *inputs, y = batch.data
    outputs = model(*inputs)
    losses = F.cross_entropy(outputs, y, reduction="none")
    if loader is not None:
        loader.observe(losses, outputs)
    (losses * batch.weights).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def train_pass(model: nn.Module, loader: Passes, lr: float = 0.1) -> list[tuple[list[int], list[float]]]:
    """Train for a pass; return indices and weights of each batch."""
    optimizer, trace = sgd(model, lr), []
    for batch in loader:
        trace.append((loader.indices.tolist(), batch.weights.tolist()))
        train_step(model, optimizer, batch, loader)
    return trace


def drain(loader: Passes) -> list[WeightedBatch]:
    """Take a pass, or what is left of it, without training."""
    batches = []
    for batch in loader:
        batches.append(batch)
        loader.observe(batch.weights)
    return batches


def events(loader: Passes, kind: str) -> list[dict[str, Any]]:
    """Return the history's entries of one kind."""
    return [event for event in loader.history if event["event"] == kind]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def hand_over(parts: Iterable[Any], others: Iterable[Any]) -> None:
    """Load the states of parts of a run, by way of a file, into others of their kind."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    for other, state in zip(others, torch.load(file, weights_only=True), strict=True):
        other.load_state_dict(state)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Compare to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def traces(model: nn.Module) -> dict[str, Any]:
    """Record all that measuring must leave alone."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "state": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "grad": {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()},
        "parameters": [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": {name: module.training for name, module in model.named_modules()},
        "tracking": {
            name: module.track_running_stats for name, module in model.named_modules() if "Norm1d" in str(type(module))
        },
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "torch": torch.get_rng_state().tolist(),
        "numpy": (kind, np.asarray(keys).tolist(), position, has_gauss, cached),
        "python": random.getstate(),
        "grad_enabled": torch.is_grad_enabled(),
    }


R, M = 40, 12  # examples in a pool and in a coreset, for what is measured by hand


def meter_of(
    model: nn.Module,
    mode: MeasureMode = "eval",
    objective: Objective | None = None,
    whole_layer: bool = False,
    last_layer: nn.Linear | None = None,
    **curvature: Any,
) -> Meter:
    """Build a meter, by default one that measures classification in evaluation mode."""
    objective = objective or Classification()
    return Meter(model, objective, How(mode), whole_layer=whole_layer, last_layer=last_layer, **curvature)


def batch(blobs: Blobs, rows: int = R) -> tuple[Tensor, Tensor]:
    """Take the first examples."""
    return blobs.x[:rows], blobs.y[:rows]


def measure(meter: Meter, data: Any, rows: int = R) -> Pool:
    """Measure a pool of the first examples."""
    return meter.measure(torch.arange(rows), data)


def coreset_of(data: Any, rows: int = M) -> Coreset:
    """Weight the examples unequally."""
    weights = torch.arange(1.0, rows + 1)
    return Coreset(torch.arange(rows), torch.arange(rows), weights / weights.mean(), data)


def generator() -> torch.Generator:
    """Begin the stream of signs."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


@pytest.fixture
def net() -> Callable[..., Net]:
    return make_net
