"""Training on one weighted subset of the data, picked anew from everything every so often."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchcrest import tree
from torchcrest.active import Draws, stream
from torchcrest.checks import Checks
from torchcrest.config import steps_of
from torchcrest.errors import ConfigError, must
from torchcrest.feed import Feed, Reading, examples_in, reader_of, refuse_other_length
from torchcrest.measure import How, Meter, device_of
from torchcrest.objectives import Objective, as_objective
from torchcrest.passes import Passes
from torchcrest.types import Pool, WeightedBatch

__all__ = ["SubsetConfig", "SubsetLoader"]

Proxy = Literal["outputs", "last_layer"]


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """What the methods have in common that pick a subset of all the data.

    Attributes:
        batch_size: examples in a batch.
        subset: how many examples to train on: a number (an int) or a share of the data (a float up to 1).
        reselect: after how many steps the subset is picked anew: a number (an int) or a share of
            ``len(loader)`` (a float up to 1). 0.1 is what the CREST paper gave these methods, 20 of 200 epochs.
        proxy: what stands for an example's gradient: that of the ``outputs``, or that of the whole
            ``last_layer``.
        stratify: pick from each class its share, where there are class labels.
        measured_together: examples in a forward pass of the selection; None: ``batch_size``. More are faster
            on a GPU; on a CPU, where what they need leaves the cache, 1,024 took 2.7 times as long as 128.

    Raises:
        ConfigError: any setting is out of range; all problems are listed at once.
    """

    batch_size: int = 128
    subset: int | float = 0.1
    reselect: int | float = 0.1
    proxy: Proxy = "outputs"
    stratify: bool = True
    measured_together: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, naming all of them."""
        checks = Checks(self)
        self._check(checks)
        checks.close()

    def _check(self, checks: Checks) -> None:
        checks.whole("batch_size", 1, "Use for example 128.")
        checks.steps_or_share("subset", "Use for example 0.1, a tenth of the data.", "examples")
        checks.steps_or_share("reselect", "Use for example 0.1, a tenth of the run.")
        checks.choice("proxy", get_args(Proxy))
        checks.flag("stratify")
        if self.measured_together is not None:
            checks.whole("measured_together", 1, "None measures as many as are trained on together.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain numbers and strings."""
        return asdict(self)


Config = TypeVar("Config", bound=SubsetConfig)


class SubsetLoader(Passes, Generic[Config]):
    """Random mini-batches of a weighted subset that is picked anew, from everything, every so often.

    A method says in :meth:`_pick` which examples, and how they weigh. Each selection forwards all the data
    and holds its losses and proxy gradients. Arguments are those of :class:`torchcrest.Crest`; the seed is of
    the order in which the subset is gone through, and workers read batches ahead.
    """

    settings: type[Config]

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        config: Config | None = None,
        *,
        steps: int,
        seed: int = 0,
        objective: Objective | Callable[[Tensor, Any], Tensor] | None = None,
        last_layer: nn.Linear | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
    ) -> None:
        config = self.settings() if config is None else config
        if not isinstance(config, self.settings):
            want, do = f"be a {self.settings.__name__}", f"Write {self.settings.__name__}(batch_size=..., subset=...)."
            raise ConfigError(must("config", want, type(config).__name__, do))
        examples = examples_in(dataset)
        super().__init__(model, steps=steps, seed=seed, examples=examples)
        self.config, self._dataset = config, dataset
        self._candidates = self._candidates_among(examples)
        share, left = config.subset, int(self._candidates.sum())
        self._size = share if isinstance(share, int) else round(share * left)
        if not config.batch_size <= self._size <= left:
            want = f"give from batch_size = {config.batch_size} to all {left} examples to pick from"
            raise ConfigError(must("subset", want, share, "A batch's examples are distinct: change one of the two."))
        self._every = steps_of(config.reselect, steps)
        self._objective = as_objective(objective)
        self._meter = Meter(
            model, self._objective, How(), whole_layer=config.proxy == "last_layer", last_layer=last_layer
        )
        self._weights = torch.zeros(examples)  # of the subset's members; the others have none
        self._chosen = torch.zeros(examples, dtype=torch.bool)
        self._reading = Reading(num_workers, collate_fn, pin_memory, prefetch_factor)
        self._feed = Feed(dataset, Draws(self._chosen, seed), config.batch_size, self._reading, seed)

    def _candidates_among(self, examples: int) -> Tensor:
        """Return ``[examples]`` bool, True for those that may be picked."""
        return torch.ones(examples, dtype=torch.bool)

    @abstractmethod
    def _pick(self, everything: Pool) -> tuple[Tensor, Tensor]:
        """Return rows ``[k]`` of what was measured, distinct, and their weights ``[k]``, above 0."""

    def _next_batch(self) -> tuple[WeightedBatch, Tensor]:
        if self._step % self._every == 0:
            with self._timed("selecting"):
                self._reselect()
        indices, data = self._feed.next()
        weights = self._weights[indices]
        device = device_of(self._model)
        return WeightedBatch(tree.move(data, device), (weights / weights.mean()).to(device)), indices

    def _reselect(self) -> None:
        rows, weights = self._pick(self._measure(self._candidates.nonzero()[:, 0]))
        picked = self._candidates.nonzero()[:, 0][rows.cpu()]
        self._weights.zero_()
        self._weights[picked] = weights.float().cpu()
        self._chosen.copy_(self._weights > 0)
        self._feed.redraw()
        self.stats.active = len(picked)
        self._log("select", examples=len(picked))

    def _measure(self, indices: Tensor) -> Pool:
        """Forward examples of the training data; keep what is measured and no data."""
        held: dict[str, Tensor] = {}
        start, bias = 0, True
        for rows, data in self._read(indices, self._dataset):
            pool = self._meter.measure(rows, data)
            bias = pool.bias
            for name in ("losses", "gradients", "features", "labels"):
                part = getattr(pool, name)
                if part is not None:
                    # Into one tensor from the start: many small ones among large activations scatter the memory.
                    whole = held.setdefault(name, part.new_empty(len(indices), *part.shape[1:]))
                    whole[start : start + len(rows)] = part
            start += len(rows)
        self.stats.examples_forwarded = self._meter.forwarded
        labels = held.get("labels") if self.config.stratify else None
        pool = Pool(indices, None, held["losses"], held["gradients"], held.get("features"), bias, labels)
        self._refuse_non_finite(pool.indices, pool.losses)
        return pool

    def _read(self, indices: Tensor, dataset: Any) -> Iterator[tuple[Tensor, Any]]:
        """Read examples in their order, many at a time."""
        reading, together = self._reading, self.config.measured_together or self.config.batch_size
        parts = torch.split(indices, together)
        seeded, collate = reader_of(dataset, reading, self._seed)
        loader: DataLoader[Any] = DataLoader(
            seeded,
            batch_sampler=[part.tolist() for part in parts],
            num_workers=min(reading.num_workers, len(parts)),  # more would have nothing to read
            collate_fn=collate,
            pin_memory=reading.pin_memory,
            prefetch_factor=reading.prefetch_factor,
            generator=stream(self._seed, "workers"),
        )
        for rows, data in zip(parts, loader, strict=True):
            refuse_other_length(data, len(rows))
            yield rows, data

    def _settings(self) -> dict[str, Any]:
        return self.config.to_dict()

    def _state(self) -> dict[str, Any]:
        return {"place": self._feed.state_dict(), "weights": self._weights.clone()}

    def _load(self, state: dict[str, Any]) -> None:
        self._weights.copy_(state["weights"])
        self._chosen.copy_(self._weights > 0)
        self._feed.load_state_dict(state["place"])
        self._meter.forwarded = state["stats"]["examples_forwarded"]
