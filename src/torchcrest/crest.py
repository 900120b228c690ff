"""CREST: train on mini-batch coresets for as long as a quadratic model of the loss holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchcrest import tree
from torchcrest.active import ActiveSet, Draws, Place, stream
from torchcrest.config import CrestConfig
from torchcrest.errors import ConfigError, must
from torchcrest.feed import Feed, Reading, examples_in
from torchcrest.measure import Meter, device_of
from torchcrest.objectives import Objective, as_objective
from torchcrest.passes import Passes
from torchcrest.quadratic import QuadraticModel, relative_error
from torchcrest.region import Region
from torchcrest.solvers import medoids, weigh
from torchcrest.types import Coreset, Pool, WeightedBatch

__all__ = ["Crest"]

SOLVED_TOGETHER = 16  # pools held at a time; all that stays of them is their coresets


class Crest(Passes):
    """A loader of weighted mini-batch coresets for your own training loop.

    Asking for the next batch means that the last step is over, so checks and selection happen there. Your
    ``.grad``, buffers, training flags and random state stay as they are. ::

        crest = Crest(model, train_set, CrestConfig(batch_size=128, pool_size=512), steps=8000, seed=0)
        for (x, y), weights in crest:
            losses = F.cross_entropy(model(x), y, reduction="none")
            (losses * weights).mean().backward()
            optimizer.step(); optimizer.zero_grad(); scheduler.step()

    Args:
        model: the model in training. It is measured as it is when a batch is asked for.
        dataset: map-style: ``__len__`` and ``__getitem__``, or ``__getitems__`` as well.
        config: the settings; None: the defaults.
        steps: batches of a pass, ``len(crest)``. A further ``iter()`` carries the same run on, so one pass
            can be the whole training or one epoch of it.
        seed: of everything random in here. Same seed, same machine, same run.
        objective: how a batch becomes outputs and losses. None: classification by cross-entropy; a function
            ``(outputs, batch) -> losses [n]``; or any :class:`torchcrest.Objective`.
        last_layer: the layer that ``proxy="last_layer"`` compares; None: the last linear layer that runs.
        num_workers: processes that read pools ahead; as in :class:`torch.utils.data.DataLoader`, like all
            that follow. Only pools are read in them, so the stream is the same for any number.
        collate_fn: makes a batch of a list of examples. The batch may be any nesting of tensors with the
            examples along their first dimension.
        pin_memory: read into pinned memory.
        prefetch_factor: pools that each worker reads ahead.
        timeout: seconds to wait for a pool.
        worker_init_fn: called in each worker with its number.
        multiprocessing_context: how workers are started.

    Raises:
        ConfigError: settings that cannot work, all of them named.
        DataError: a data set that cannot be used.
    """

    method = "crest"

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        config: CrestConfig | None = None,
        *,
        steps: int,
        seed: int = 0,
        objective: Objective | Callable[[Tensor, Any], Tensor] | None = None,
        last_layer: nn.Linear | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
    ) -> None:
        config = CrestConfig() if config is None else config
        examples = examples_in(dataset)
        _refuse(model, config, examples, last_layer)
        super().__init__(model, steps=steps, seed=seed, examples=examples)
        self.config = config
        self._meter = Meter(
            model,
            as_objective(objective),
            config.measure_mode,
            whole_layer=config.proxy == "last_layer",
            last_layer=last_layer,
            layers=config.curvature_layers,
            product=config.curvature_product,
        )
        self._active = ActiveSet(examples)
        reading = Reading(
            num_workers,
            collate_fn,
            pin_memory,
            prefetch_factor,
            timeout,
            worker_init_fn,
            multiprocessing_context,
        )
        self._feed = Feed(dataset, Draws(self._active.mask, seed), config.pool_size, reading, seed)
        self._quadratic = QuadraticModel(config.curvature, config.gradient_decay, config.curvature_decay)
        self._modelled: list[nn.Parameter] = []  # whose gradient and curvature the quadratic model holds
        self._region: Region | None = None
        self._interval = config.interval_scale  # T1, before rounding and capping
        self._first_curvature: float | None = None  # ||H_0||
        share = config.learned_interval
        self._learned_steps = share if isinstance(share, int) else max(1, round(share * steps))

    # The loop of the algorithm, in the order of its steps -----------------------------------------------

    def _next_batch(self) -> tuple[WeightedBatch, Tensor]:
        fresh = self._check() if self._region and self._step >= self._region.check_at else None
        if self.config.exclude and self._step and self._step % self._learned_steps == 0:
            self._exclude()
        if self._region is None:
            self._region = self._begin_region(fresh)
        coreset = self._region.pick(self._step, self._seed)  # step 5
        # A copy: the region may hand the same coreset out again, and the batch is the user's to change.
        return WeightedBatch(tree.clone(coreset.data), coreset.weights.clone()), coreset.indices

    def _begin_region(self, fresh: Pool | None) -> Region:
        """Draw, measure, select and model anew (steps 1 to 4). A failed check's measurement is the first pool."""
        config = self.config
        # P and the interval both follow the curvature that was known before this region's coresets were.
        interval = int(min(max(self._interval, 1), config.max_interval))
        count = min(math.ceil(config.coresets_per_step * interval), config.max_coresets)
        with self._timed("selecting"):
            coresets: list[Coreset] = []
            while len(coresets) < count:
                pools = [fresh] if fresh else []
                fresh = None
                together = min(SOLVED_TOGETHER, count - len(coresets))
                pools += [self._measure() for _ in range(together - len(pools))]
                coresets += self._select(pools)
        region = Region(
            self.stats.regions, self._step, interval, self._step + interval, coresets, self._meter.parameters()
        )
        loss: float | None = None
        if config.check == "paired":
            with self._timed("checking"):
                pool = self._measure()
                region.check_indices, region.check_data = pool.indices, pool.data
                loss = float(pool.losses.mean(dtype=torch.float64))
        if config.check == "paired" or config.curvature != "first_order":
            with self._timed("curvature"):
                self._model_loss(coresets, region.number)
                self._adapt_interval()
        if loss is not None:
            self._quadratic.anchor(region.parameters, loss)
        self.stats.regions += 1
        self._log(
            "region",
            region=region.number,
            coresets=count,
            interval=interval,
            loss=loss,
            gradient_norm=self._quadratic.gradient_norm(),
            curvature_norm=self._quadratic.curvature_norm(),
            active=self.stats.active,
        )
        return region

    def _measure(self) -> Pool:
        """Draw the next pool and measure it (steps 1 and 2)."""
        indices, data = self._feed.next()
        return self._record(self._meter.measure(indices, data))

    def _select(self, pools: list[Pool]) -> list[Coreset]:
        """Pick a coreset from each pool, all together (step 3)."""
        config = self.config
        labels = None
        if config.stratify and all(pool.labels is not None for pool in pools):
            labels = torch.stack([pool.labels for pool in pools if pool.labels is not None])
            classes = len(torch.unique(labels))
            if classes > config.batch_size:
                self._warn_once(
                    "classes",
                    f"batch_size = {config.batch_size} is smaller than the number of classes, {classes}, so a coreset "
                    "cannot represent them all. Expect less than from random batches, or use a larger batch_size.",
                )
        features = [pool.features for pool in pools if pool.features is not None]
        rows, sizes = medoids(
            torch.stack([pool.gradients for pool in pools]),
            config.batch_size,
            labels,
            torch.stack(features) if features else None,
            bias=pools[0].bias,
        )
        weights = weigh(sizes, config.weight_power)
        return [Coreset.of(pool, row, weight) for pool, row, weight in zip(pools, rows, weights, strict=True)]

    def _model_loss(self, coresets: list[Coreset], region: int) -> None:
        """Feed gradient and curvature, means over the region's coresets, to the quadratic model (step 4)."""
        used = coresets[: self.config.curvature_coresets]
        device = device_of(self._meter.model)
        gradient: list[Tensor] = []
        curvature: list[Tensor] = []
        for k, coreset in enumerate(used):
            first_order = self.config.curvature == "first_order"
            generator = None if first_order else stream(self._seed, "signs", region, k, device=device)
            drawn = coreset.sample(self.config.curvature_examples, stream(self._seed, "examples", region, k))
            g, h = self._meter.differentiate(drawn, generator)
            gradient = _added(gradient, g, 1 / len(used))
            curvature = _added(curvature, h, 1 / len(used))
        self.stats.examples_forwarded = self._meter.forwarded
        parameters = self._meter.parameters()
        if [id(p) for p in parameters] != [id(p) for p in self._modelled]:
            self._quadratic.restart()
        self._modelled = parameters
        self._quadratic.update(gradient, curvature)

    def _check(self) -> Pool | None:
        """Compare the model with the loss on the check set (step 6).

        Returns:
            None if the region goes on; its measurement, or None where nothing is measured, if it has ended.
        """
        region = self._region
        assert region is not None
        if region.check_indices is None:
            self._region = None
            return None
        with self._timed("checking"):
            pool = self._record(self._meter.measure(region.check_indices, region.check_data))
            loss = float(pool.losses.mean(dtype=torch.float64))
            predicted = self._quadratic.predict(region.parameters)
        rho = relative_error(predicted, loss)
        passed = rho <= self.config.tolerance
        self.stats.checks += 1
        self._log("check", region=region.number, rho=rho, predicted=predicted, loss=loss, passed=passed)
        if passed:
            region.check_at = self._step + region.interval
            return None
        self._region = None
        return pool

    def _adapt_interval(self) -> None:
        """Stretch the interval as the curvature falls (step 7)."""
        norm = self._quadratic.curvature_norm()
        if self._first_curvature is None:
            self._first_curvature = norm
        if norm > 0:
            self._interval = self.config.interval_scale * self._first_curvature / norm

    def _exclude(self) -> None:
        """Set aside what was learned in the interval that ends here (step 8).

        Coresets that the region holds are still trained on; set-aside examples are no longer drawn.
        """
        excluded = self._active.close_interval(self.config.learned_loss, self.config.pool_size)
        if self._active.stopped:
            self._warn_once(
                "exclusion",
                f"Exclusion has stopped: the {self._active.count} examples that are left are what a pool of "
                f"pool_size = {self.config.pool_size} needs. The rest is learned; use a smaller pool_size to go on.",
            )
        self.stats.active = self._active.count
        if excluded:
            self._feed.redraw()
        self._log("exclude", excluded=excluded, active=self._active.count)

    # Book-keeping ----------------------------------------------------------------------------------------

    def _record(self, pool: Pool) -> Pool:
        """Refuse losses that are not finite; note the others for exclusion."""
        self._refuse_non_finite(pool)
        self._active.record(pool.indices, pool.losses)
        self.stats.examples_forwarded = self._meter.forwarded
        return pool

    # Stop and resume -------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return self.config.to_dict()

    def _state(self) -> dict[str, Any]:
        place, region = self._feed.place, self._region
        return {
            "place": [place.number, place.position, list(place.put_off)],
            "active": self._active.state_dict(),
            "quadratic": self._quadratic.state_dict(),
            "interval": self._interval,
            "first_curvature": self._first_curvature,
            "region": region and region.state_dict(self._meter.model),
        }

    def _load(self, state: dict[str, Any]) -> None:
        number, position, put_off = state["place"]
        self._active.load_state_dict(state["active"])
        self._feed.seek(Place(number, position, tuple(put_off)))
        self._interval, self._first_curvature = state["interval"], state["first_curvature"]
        self._meter.forwarded = state["stats"]["examples_forwarded"]
        saved = state["region"]
        self._region = saved and Region.read(saved, self._feed, self._meter.model)
        self._modelled = self._region.parameters if self._region else []
        self._quadratic.load_state_dict(state["quadratic"], self._modelled)


def _added(total: list[Tensor], terms: list[Tensor], share: float) -> list[Tensor]:
    """Add a share of each term to the total, in place; an empty total is zero."""
    if not total:
        return [term * share for term in terms]
    return [t.add_(term, alpha=share) for t, term in zip(total, terms, strict=True)]


def _refuse(model: Any, config: Any, examples: int, last_layer: Any) -> None:
    """Refuse what cannot work, before anything is read."""
    problems = []
    if not isinstance(model, nn.Module):
        problems.append(must("model", "be a torch.nn.Module", type(model).__name__, "Wrap the function in a module."))
    elif not any(p.requires_grad for p in model.parameters()):
        problems.append(must("model", "have trainable parameters", "none", "Set requires_grad on those to train."))
    if not isinstance(config, CrestConfig):
        do = "Write CrestConfig(batch_size=..., pool_size=...)."
        problems.append(must("config", "be a CrestConfig", type(config).__name__, do))
    elif config.pool_size > examples:
        want = f"be at most the {examples} examples of the data set"
        problems.append(must("pool_size", want, config.pool_size, "A pool's examples are distinct: use a smaller one."))
    if last_layer is not None and not isinstance(last_layer, nn.Linear):
        problems.append(must("last_layer", "be a torch.nn.Linear", type(last_layer).__name__, "Or leave it out."))
    if problems:
        raise ConfigError(problems)
