"""How good the gradients of mini-batch coresets are: bias and variance, against random batches.

With c the gradient of a coreset of m out of a pool of r, p that of its pool and g that of all data, the bias is
E[c] - g = E[c - p], and the variance is E||c - E[c]||^2, the trace of the covariance. A random batch of m has no
bias and the variance S^2 / m, S^2 being that of single examples. All estimates here are unbiased, so those of what
is nearly 0 may be negative. The theory of CREST asks for a bias of at most a third of ||g|| (arXiv 2306.01244).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcrest import tree
from torchcrest.active import stream
from torchcrest.config import CrestConfig
from torchcrest.errors import ConfigError, must
from torchcrest.feed import Reading, examples_in, reader_of, refuse_other_length
from torchcrest.measure import How, Meter, device_of, how_of
from torchcrest.noise import LabelNoise
from torchcrest.objectives import Objective, as_objective
from torchcrest.solvers import labels_of, pick
from torchcrest.types import Coreset, Pool, Stats

__all__ = [
    "MEANS",
    "Gauge",
    "GradientQuality",
    "Qualities",
    "estimates",
    "gradient_qualities",
    "gradient_quality",
    "means_of",
]

# What is left of a group's weight when the next one comes: in the gradient's square, in the ratios of bias and variance
# to the variance of single examples, and in that.
MEMORY = (0.5, 0.9, 0.9, 0.5)
MEANS = ("effective_batch_size", "pay_off", "bounded")  # of which the run's stats keep means over training
ENOUGH = 20  # degrees of freedom of an estimated variance: with fewer its spread is above a third
TOLERATED = 1 / 3  # bias, relative to the gradient's norm


@dataclass(frozen=True)
class GradientQuality:
    """Bias and variance of the gradients of coresets, and what they are to be compared with.

    Attributes:
        batch_size: m, examples in a coreset.
        pool_size: r, examples in the pool that it is picked from.
        gradient_square: squared norm of the mean gradient.
        bias_square: squared norm of the bias of coresets.
        variance: of coresets.
        random_variance: of random batches of m.
        pool_variance: of random batches of r.
    """

    batch_size: int
    pool_size: int
    gradient_square: float
    bias_square: float
    variance: float
    random_variance: float
    pool_variance: float

    @property
    def effective_batch_size(self) -> float | None:
        """Examples in a random batch with the variance of a coreset; None where that is 0. It leaves out the bias."""
        return self.batch_size * self.random_variance / self.variance if self.variance > 0 else None

    @property
    def bounded(self) -> bool:
        """Whether the bias is at most a third of the gradient's norm, as the theory asks."""
        return max(self.bias_square, 0.0) <= TOLERATED**2 * self.gradient_square

    def relative(self, square: float) -> float | None:
        """Return the root of a square, or of a variance, relative to the gradient's norm; None where that is 0."""
        return _root(square) / _root(self.gradient_square) if self.gradient_square > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return roots, in the gradients' own unit, where an estimate below 0 is 0, and what follows from them."""
        return {
            "gradient_norm": _root(self.gradient_square),
            "bias": _root(self.bias_square),
            "deviation": _root(self.variance),
            "random_deviation": _root(self.random_variance),
            "pool_deviation": _root(self.pool_variance),
            "effective_batch_size": self.effective_batch_size,
            "bounded": self.bounded,
        }


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))


# Estimates from proxy gradients ---------------------------------------------------------------------------------


def means_of(pools: Sequence[Pool], rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Average the proxy gradients of pools and of the coresets that were picked from them.

    Args:
        pools: p of r examples each. With features, the gradients are those of the whole last layer.
        rows: ``[p, m]`` positions of the picked in the pools.
        weights: ``[p, m]`` of the picked, mean 1.

    Returns:
        means ``[2, p, d]``, of the pools and of the coresets, and a scalar: the mean of all squared norms. Neither
        waits for the device.
    """
    gradients = torch.stack([pool.gradients for pool in pools])
    p, r, _ = gradients.shape
    shares = torch.zeros(p, r, dtype=gradients.dtype, device=gradients.device)
    shares.scatter_(1, rows, weights.to(shares.dtype) / rows.shape[1])
    both = torch.stack([torch.full_like(shares, 1 / r), shares])
    squares = gradients.square().sum(-1)
    if pools[0].features is None:
        return torch.einsum("spr,prd->spd", both, gradients), squares.mean()
    features = torch.stack([pool.features for pool in pools if pool.features is not None])
    if pools[0].bias:
        features = torch.cat([features, torch.ones_like(features[..., :1])], -1)
    layers = [torch.bmm((part.unsqueeze(-1) * gradients).mT, features).flatten(1) for part in both]
    return torch.stack(layers), (squares * features.square().sum(-1)).mean()


def estimates(means: Tensor, square: Tensor, pool_size: int) -> Tensor:
    """Estimate bias and variance from pools that were drawn independently and measured at the same parameters.

    Pools that are disjoint, as CREST draws them, stand for the distribution that all data was drawn from.

    Args:
        means: ``[2, p, d]`` gradients of p pools, at least 2, and of their coresets, as from :func:`means_of`.
        square: mean squared norm of the gradients of the pools' examples, a scalar.
        pool_size: r, at least 2.

    Returns:
        ``[4]``: squared norm of the mean gradient, squared norm of the bias, variance of coresets, and variance of
        single examples.
    """
    pools, coresets = means
    p, errors = len(pools), coresets - pools
    single = (square - pools.square().sum(-1).mean()) * (pool_size / (pool_size - 1))
    gradient = pools.mean(0).square().sum() - single / (p * pool_size)
    bias = errors.mean(0).square().sum() - errors.var(0).sum() / p
    return torch.stack([gradient, bias, coresets.var(0).sum(), single])


class Gauge:
    """Running estimates of the quality of coresets in training, from the proxy gradients that are there anyway.

    Groups of pools that are measured at the same parameters count by their degrees of freedom, and less whenever the
    next group comes. The scale of gradients can fall tenfold within some steps, as when the learning rate drops, so
    it is taken from the last few groups; bias and variance relative to the variance of single examples change slowly
    and are noisy, so they are means over more. A random batch is drawn from all data, so its variance is S^2 / m
    without a correction for finite pools.

    Args:
        config: says how large coresets and pools are.
    """

    def __init__(self, config: CrestConfig) -> None:
        self._m, self._r = config.batch_size, config.pool  # r, until there are parts of pools
        self._sums, self._weights = [0.0] * 4, [0.0] * 4
        self._unread: list[tuple[int, Tensor]] = []
        self._dimensions = 1  # of proxy gradients
        self._told: dict[str, int] = {}

    def add(self, pools: Sequence[Pool], rows: Tensor, weights: Tensor) -> None:
        """Take a group of pools and their coresets. Does not wait for the device."""
        self._r = len(pools[0].indices)
        if len(pools) > 1 and self._r > 1:
            self._dimensions = pools[0].gradients.shape[1]
            self._unread.append((len(pools) - 1, estimates(*means_of(pools, rows, weights), self._r)))

    def read(self) -> None:
        """Enter the groups that were taken. Waits for the device."""
        if not self._unread:
            return
        table = torch.stack([values for _, values in self._unread]).tolist()
        for (freedom, _), (gradient, bias, variance, single) in zip(self._unread, table, strict=True):
            if not 0 < single < math.inf:  # losses are refused elsewhere; where gradients overflow or vanish, skip
                continue
            values = (gradient, bias / single, variance / single, single)
            for k, (value, memory) in enumerate(zip(values, MEMORY, strict=True)):
                self._sums[k] = memory * self._sums[k] + freedom * value
                self._weights[k] = memory * self._weights[k] + freedom
        self._unread.clear()

    def numbers(self) -> list[float]:
        """Return the four estimates, as :func:`estimates` does; zeros before there is enough to estimate them from."""
        if self._weights[2] * self._dimensions < ENOUGH:
            return [0.0] * 4
        means = [total / weight for total, weight in zip(self._sums, self._weights, strict=True)]
        gradient, bias, variance, single = means
        return [gradient, bias * single, variance * single, single]

    def tell(self, numbers: Sequence[float], stats: Stats) -> dict[str, Any] | None:
        """Return what the history is told, and enter it into the means over training; None before there is anything.

        What is not known is left out.

        The pay-off is the effective batch size, in batches, for each plain step that a step on a coreset costs.
        Above 1, selection is worth its time where the noise of gradients limits progress. It does not tell whether
        it does: early in training the size of steps limits it, and less noise gains little. Nor does it count the
        bias, or what a coreset does to the statistics of batch normalisation.

        Args:
            numbers: the four estimates, and the cost of a step on a coreset in plain steps; 0 where it is not known.
            stats: of the run.
        """
        gradient, bias, variance, single, cost = numbers
        if single <= 0:  # of the mean over ranks, so that all of them tell, or none
            return None
        quality = GradientQuality(self._m, self._r, gradient, bias, variance, single / self._m, single / self._r)
        size = quality.effective_batch_size
        pay_off = size / self._m / cost if size and cost else None
        values = quality.to_dict() | {"cost": cost or None, "pay_off": pay_off}
        values = {name: value for name, value in values.items() if value is not None}
        for name in values.keys() & set(MEANS):
            self._told[name] = self._told.get(name, 0) + 1
            mean = getattr(stats, name)
            setattr(stats, name, mean + (values[name] - mean) / self._told[name])
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the running sums."""
        return {
            "sums": [*self._sums],
            "weights": [*self._weights],
            "dimensions": self._dimensions,
            "pool_size": self._r,
            "told": dict(self._told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the running sums."""
        self._sums, self._weights = list(map(float, state["sums"])), list(map(float, state["weights"]))
        self._dimensions, self._r = int(state["dimensions"]), int(state["pool_size"])
        self._told = {name: int(count) for name, count in state["told"].items()}


# Whole gradients ------------------------------------------------------------------------------------------------


class Qualities(NamedTuple):
    """The same coresets, by whole gradients and by their proxies.

    Attributes:
        whole: from gradients with respect to the parameters.
        proxies: from the gradients that they were picked by, on a scale of their own.
    """

    whole: GradientQuality
    proxies: GradientQuality


def gradient_quality(
    model: nn.Module,
    dataset: Any,
    config: CrestConfig,
    *,
    draws: int = 16,
    objective: Objective | Callable[[Tensor, Any], Tensor] | None = None,
    last_layer: nn.Linear | None = None,
    layers: int | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    chunk: int = 256,
    seed: int = 0,
) -> GradientQuality:
    """Measure bias and variance of coresets' whole gradients, by picking some from random pools of all data.

    It costs a pass over the data, and a pool and a coreset for each draw, forward and backward. The model is
    measured in evaluation mode, where an example's loss does not depend on the others of its batch, and left as it
    was. What is in memory are a few vectors as long as the parameters.

    Args:
        model: as it is in training.
        dataset: map-style; pools are drawn from all of it, whatever CREST has set aside.
        config: how coresets are picked. ``label_noise`` of ``estimated``, which a run finds out, counts as 0, and
            ``proxy_source`` of ``auto`` as ``forward``.
        draws: pools, at least 2. The estimates' own spread falls with their root.
        objective: as for :class:`torchcrest.Crest`, like the next.
        last_layer: as there.
        layers: how many of the model's last layers the gradients cover; None: all.
        collate_fn: makes a batch of a list of examples.
        chunk: examples in a forward and backward pass.
        seed: of the pools.

    Raises:
        ConfigError: too few draws, or settings that cannot work with this data.
        DataError: data that cannot be used.
    """
    found = gradient_qualities(
        model,
        dataset,
        {"config": config},
        draws=draws,
        objective=objective,
        last_layer=last_layer,
        layers=layers,
        collate_fn=collate_fn,
        chunk=chunk,
        seed=seed,
    )
    return found["config"].whole


def gradient_qualities(
    model: nn.Module,
    dataset: Any,
    configs: Mapping[str, CrestConfig],
    *,
    draws: int = 16,
    objective: Objective | Callable[[Tensor, Any], Tensor] | None = None,
    last_layer: nn.Linear | None = None,
    layers: int | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    chunk: int = 256,
    seed: int = 0,
) -> dict[str, Qualities]:
    """Measure several ways to pick coresets on the same pools, or beginnings of them, as :func:`gradient_quality` does.

    Args:
        model: as there, like all that is not named here.
        dataset: as there.
        configs: how coresets are picked, by name.
        draws: as there.
        objective: as there.
        last_layer: as there.
        layers: as there.
        collate_fn: as there.
        chunk: as there.
        seed: as there.

    Returns:
        by name, what whole gradients say and what proxies say.

    Raises:
        ConfigError: too few draws, or settings that cannot work with this data.
        DataError: data that cannot be used.
    """
    examples = examples_in(dataset)
    _refuse(configs, draws, chunk, examples)
    device = device_of(model)
    reader, collate = reader_of(dataset, Reading(collate_fn=collate_fn), seed)
    whole = Meter(model, as_objective(objective), How(), layers=layers)

    def read(indices: Tensor) -> Any:
        data = collate(reader.__getitems__(indices.tolist()))
        refuse_other_length(data, len(indices))
        return tree.move(data, device)

    def summed(data: Any, weights: Tensor) -> Tensor:
        """Return the gradient of the weighted sum of losses, over all the parameters in a row."""
        total: Tensor | None = None
        for start in range(0, len(weights), chunk):
            rows = torch.arange(start, min(start + chunk, len(weights)))
            part = Coreset(rows, rows, weights[start : start + chunk], tree.part(data, start, start + len(rows)))
            gradients, _ = whole.differentiate(part, None)
            row = torch.cat([g.flatten() for g in gradients]) * len(rows)
            total = row if total is None else total.add_(row)
        assert total is not None
        return total

    mean: Tensor | None = None
    for indices in torch.arange(examples).split(chunk):
        row = summed(read(indices), torch.ones(len(indices), device=device)) / examples
        mean = row if mean is None else mean.add_(row)
    assert mean is not None
    gradient = _square(mean)
    tallies = {name: _Tally(config, model, whole.objective, last_layer) for name, config in configs.items()}
    sizes = sorted({size for tally in tallies.values() for size in (tally.config.batch_size, tally.pool_size)})
    random = dict.fromkeys(sizes, 0.0)  # squared distances of random batches from the mean gradient
    for draw in range(draws):
        drawn = torch.randperm(examples, generator=stream(seed, "quality", draw))[: sizes[-1]]
        data = read(drawn)
        batches: dict[int, Tensor] = {}  # gradients of the first so many of the pool
        sums = torch.zeros_like(mean)
        for start, end in pairwise([0, *sizes]):
            sums += summed(tree.part(data, start, end), torch.ones(end - start, device=device))
            batches[end] = sums / end
            random[end] += _square(batches[end] - mean)
        for tally in tallies.values():
            r = tally.pool_size
            picked = tally.pick(drawn[:r], tree.part(data, 0, r))
            tally.add(summed(picked.data, picked.weights) / tally.config.batch_size, batches[r])
    variances = {size: total / draws for size, total in random.items()}
    return {name: tally.found(gradient, variances) for name, tally in tallies.items()}


class _Tally:
    """Sums up the draws of one way to pick coresets.

    Attributes:
        config: how they are picked.
        pool_size: of how many examples.
    """

    def __init__(
        self, config: CrestConfig, model: nn.Module, objective: Objective, last_layer: nn.Linear | None
    ) -> None:
        self.config = config
        self._noise = LabelNoise(
            replace(config, label_noise=0.0) if config.label_noise == "estimated" else config, objective
        )
        self.pool_size = config.pool // self._noise.parts
        how = how_of(config, device_of(model))
        self._meter = Meter(model, objective, how, whole_layer=config.proxy == "last_layer", last_layer=last_layer)
        self._coresets, self._errors = _Spread(), _Spread()
        self._means: list[tuple[Tensor, Tensor]] = []

    def pick(self, indices: Tensor, data: Any) -> Coreset:
        """Pick a coreset from a pool, and note its proxies."""
        config = self.config
        pool = self._meter.measure(indices, data)
        rows, weights = pick(
            [pool],
            labels_of([pool]) if config.stratify else None,
            config.batch_size,
            self._noise.power,
            shared=config.quotas == "share",
        )
        self._means.append(means_of([pool], rows, weights))
        return Coreset.of(pool, rows[0], weights[0])

    def add(self, coreset: Tensor, pool: Tensor) -> None:
        """Take the gradients of a coreset and of its pool."""
        self._coresets.add(coreset)
        self._errors.add(coreset - pool)

    def found(self, gradient: float, variances: Mapping[int, float]) -> Qualities:
        """Return the estimates."""
        m, r = self.config.batch_size, self.pool_size
        bias = _square(self._errors.mean) - self._errors.variance / self._errors.count
        whole = GradientQuality(m, r, gradient, bias, self._coresets.variance, variances[m], variances[r])
        means, squares = zip(*self._means, strict=True)
        gradient, bias, variance, single = estimates(torch.cat(means, 1), torch.stack(squares).mean(), r).tolist()
        return Qualities(whole, GradientQuality(m, r, gradient, bias, variance, single / m, single / r))


class _Spread:
    """Mean and sample variance of vectors, one at a time (Welford, 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self._total = 0.0

    def add(self, vector: Tensor) -> None:
        """Take a vector."""
        self.count += 1
        if self.count == 1:
            self.mean = vector.clone()
            return
        step = vector - self.mean
        self.mean += step / self.count
        self._total += _square(step) * (1 - 1 / self.count)

    @property
    def variance(self) -> float:
        """Trace of the sample covariance."""
        return self._total / (self.count - 1)


def _square(vector: Tensor) -> float:
    """Return the squared norm."""
    return float(vector.square().sum(dtype=torch.float64))


def _refuse(configs: Mapping[str, CrestConfig], draws: int, chunk: int, examples: int) -> None:
    problems = []
    if draws < 2:
        problems.append(must("draws", "be at least 2", draws, "A variance needs two; 16 is usual."))
    if chunk < 1:
        problems.append(must("chunk", "be at least 1", chunk, "Use for example 256."))
    if not configs:
        problems.append(must("configs", "name at least one", dict(configs), 'Use {"crest": CrestConfig()}.'))
    for config in configs.values():
        if not 1 < config.pool <= examples:
            want = f"be at least 2 and at most the {examples} examples of the data set"
            problems.append(must("pool_size", want, config.pool, "Use for example 2 * batch_size."))
        if config.proxy_source not in ("auto", "forward"):
            do = "The others depend on the run so far."
            problems.append(must("proxy_source", "be 'forward' to measure whole gradients", config.proxy_source, do))
    if problems:
        raise ConfigError(problems)
