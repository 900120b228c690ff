"""CREST: train on mini-batch coresets for as long as a quadratic model of the loss holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchcrest import tree
from torchcrest.account import Account
from torchcrest.active import ActiveSet, Draws, stream
from torchcrest.config import CrestConfig, steps_of
from torchcrest.diagnostics import Gauge
from torchcrest.difficulty import Difficulty
from torchcrest.distributed import Ranks
from torchcrest.errors import ConfigError, DataError, must
from torchcrest.feed import Feed, Reading, examples_in
from torchcrest.measure import Meter, device_of, how_of, labels_in
from torchcrest.noise import LabelNoise
from torchcrest.objectives import Objective, Projecting, as_objective, trimmed
from torchcrest.overhead import Purpose
from torchcrest.passes import Passes
from torchcrest.proxies import source_of
from torchcrest.quadratic import QuadraticModel, relative_error
from torchcrest.region import Region, read_coresets, states_of
from torchcrest.solvers import labels_of, pick
from torchcrest.streaming import StreamFeed, is_stream
from torchcrest.types import Coreset, Pool, WeightedBatch
from torchcrest.visits import Visits

__all__ = ["Crest"]

RESTS = 4  # times an epoch
SOLVED_TOGETHER = 16  # pools held at a time; all that stays of them is their coresets


class Crest(Passes):
    """A loader of weighted mini-batch coresets for your own training loop.

    Asking for the next batch means that the last step is over, so checks and selection happen there. Your
    ``.grad``, buffers, training flags and random state stay as they are. ::

        crest = Crest(model, train_set, CrestConfig(batch_size=128), steps=8000, seed=0)
        for (x, y), weights in crest:
            losses = F.cross_entropy(model(x), y, reduction="none")
            (losses * weights).mean().backward()
            optimizer.step(); optimizer.zero_grad(); scheduler.step()

    Random augmentation needs no care: what the data set and ``collate_fn`` draw from the global random states of
    Python, NumPy and PyTorch's CPU is seeded for each pool, by ``seed`` and the list of its examples, and the states
    are put back. So it is the same for any number of workers and in a resumed run, and new in each pass (but for
    pools of one example). A generator of the data set's own is not seeded; draw from the global ones instead.

    Args:
        model: the model in training. It is measured as it is when a batch is asked for.
        dataset: map-style: ``__len__`` and ``__getitem__``, or ``__getitems__`` as well; it may be on disk, only what
            is drawn is read. Or a stream, any :class:`torch.utils.data.IterableDataset`: see below.
        config: the settings; None: the defaults.
        steps: batches of a pass, ``len(crest)``. A further ``iter()`` carries the same run on, so one pass
            can be the whole training or one epoch of it.
        seed: of everything random in here. Same seed, same machine, same run.
        objective: how a batch becomes outputs and losses. None: classification by cross-entropy; a function
            ``(outputs, batch) -> losses [n]``; or any :class:`torchcrest.Objective`.
        last_layer: the layer that ``proxy="last_layer"`` compares; None: the last linear layer that runs.
        proxy_model: what is measured in place of the model: a small one for the same batches and losses. It is
            trained here, on the batches that are handed out, in the mode that it is in, for at most half of what
            the bound allows. Where several processes train together, each has its own.
        proxy_optimizer: of the proxy model's parameters; None: SGD at a rate of 0.1 with momentum 0.9.
        num_workers: processes that read pools ahead; as in :class:`torch.utils.data.DataLoader`, like all
            that follow. Only pools are read in them, so the stream is the same for any number.
        collate_fn: makes a batch of a list of examples. The batch may be any nesting of tensors with the
            examples along their first dimension.
        pin_memory: read into pinned memory.
        prefetch_factor: pools that each worker reads ahead.
        timeout: seconds to wait for a pool.
        worker_init_fn: called in each worker with its number.
        multiprocessing_context: how workers are started.
        process_group: the processes that train the model together; None: all, where ``torch.distributed`` is
            initialised.
        stream_state: a resumed run goes on from the stream's own ``state_dict``, where it has one and
            ``load_state_dict``. False: the stream is read from the start again, as it is where it has none.
        stream_sharded: the stream gives each rank examples of its own already.

    A stream needs no length. A pool is the next ``pool_size`` examples, so shuffle the stream if its order is not
    random. ``indices`` are running numbers: 0, 1, 2, ... as read. At its end the stream is read over again, after
    ``set_epoch(pass)`` if it has that. ``exclude`` is off, as no example is known to come again, and
    ``proxy_source="history"`` is refused. One worker at most reads ahead, and gives what none would unless the stream
    asks for ``get_worker_info``, as Hugging Face's shuffled ones do: resume those with as many. States hold the data
    of coresets and check set. A resumed run is the same to the bit if the stream, built anew, gives the same and its
    state leaves nothing out; that of Hugging Face's shuffle buffer does, so use ``stream_state=False`` there. Of
    several ranks, rank k of n takes examples k, k + n, k + 2n, ..., unless ``stream_sharded``, as by
    ``datasets.distributed.split_dataset_by_node``.

    Where several processes train together (``torchrun``), nothing has to be switched on. Build it on every rank with
    the same arguments, the model wrapped in DistributedDataParallel or sharded by ``fully_shard``. Each rank gets
    batches from its own shard of the passes, ``steps`` and ``batch_size`` are a rank's, and all go through the same
    regions and set the same examples aside. ``stats`` and ``indices`` are this rank's. Each rank saves and loads a
    state of its own. An error in one rank's selection ends all with :class:`torchcrest.RankError`. Compiled models
    are measured compiled as ``DistributedDataParallel(torch.compile(model))``, eagerly the other way round. For the
    quadratic model, ``fully_shard`` gathers the whole model on each rank once a region; ``check="none"`` with
    ``curvature="first_order"`` does without it.

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
        proxy_model: nn.Module | None = None,
        proxy_optimizer: torch.optim.Optimizer | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        process_group: Any = None,
        stream_state: bool = True,
        stream_sharded: bool = False,
    ) -> None:
        config = CrestConfig() if config is None else config
        examples = None if is_stream(dataset) else examples_in(dataset)
        self._ranks = Ranks(lambda: device_of(model), process_group)
        _refuse(model, config, examples, last_layer, proxy_model, self._ranks.size)
        super().__init__(model, steps=steps, seed=seed, examples=examples)
        self.config = config
        self.difficulty = Difficulty(examples, config.learned_loss) if config.difficulty and examples else None
        self._stream_sharded = stream_sharded
        self._ranks.agree(model, {"examples": examples, "steps": steps, "seed": seed, **self._settings()})
        if self._ranks.sharded and config.proxy_source == "history":
            want = "be another than 'history' for a sharded model, whose ranks must all forward as many examples"
            raise ConfigError(must("proxy_source", want, config.proxy_source, "Use 'forward'."))
        objective = as_objective(objective)
        if isinstance(objective, Projecting) and config.proxy_source == "history":
            do = "The objective gives proxy gradients of its own: use 'forward'."
            raise ConfigError(must("proxy_source", "be another than 'history' with this objective", "history", do))
        self._objective = objective
        how = how_of(config, device_of(model))
        self._meter = Meter(
            model,
            objective,
            how,
            whole_layer=config.proxy == "last_layer",
            last_layer=last_layer,
            layers=config.curvature_layers,
            product=config.curvature_product,
        )
        self._source = source_of(config, self._meter, examples or 0, steps, seed, proxy_model, proxy_optimizer)
        self._unseen: list[tuple[Tensor, Tensor]] = []  # indices and losses that have not been waited for
        extra = config.max_extra_visits
        self._visits = Visits(examples, extra) if examples is not None and extra is not None else None
        self._active = ActiveSet(examples or 0, resting=self._visits is not None)
        reading = Reading(
            num_workers,
            collate_fn,
            pin_memory,
            prefetch_factor,
            timeout,
            worker_init_fn,
            multiprocessing_context,
        )
        rank, ranks = self._ranks.rank, self._ranks.size
        self._feed: Feed | StreamFeed
        if examples is None:
            share = (0, 1) if stream_sharded else (rank, ranks)
            self._feed = StreamFeed(dataset, config.pool, reading, seed + rank, share, stream_state)
        else:
            draws = Draws(self._active.drawn, seed, rank, ranks)
            self._feed = Feed(dataset, draws, config.pool, reading, seed + rank)
        self._quadratic = QuadraticModel(config.curvature, config.gradient_decay, config.curvature_decay)
        self._modelled: list[nn.Parameter] = []  # whose gradient and curvature the quadratic model holds
        self._region: Region | None = None
        self._interval = config.interval_scale  # T1, before rounding and capping
        self._first_curvature: float | None = None  # ||H_0||
        self._learned_steps = steps_of(config.learned_interval, steps)
        self._spare: list[Coreset] = []  # random batches that were read and not needed yet
        self._account = Account(config, self._meter, self._source)
        self._gauge = Gauge(config) if config.diagnostics else None
        self._noise = LabelNoise(config, objective)

    # The loop of the algorithm, in the order of its steps -----------------------------------------------

    def observe(self, losses: Tensor, outputs: Tensor | None = None) -> None:
        """Take losses and outputs of the training step; ``proxy_source="history"`` lives on them.

        Args:
            losses: ``[batch_size]``, unweighted, in the order of the batch. They are not waited for.
            outputs: ``[batch_size, ...]`` of the model, as the objective gives them; likewise.

        Raises:
            DataError: they are not one an example of the batch.
        """
        for name, values in (("losses", losses), ("outputs", outputs)):
            if values is not None and (values.dim() == 0 or len(values) != len(self.indices)):
                want = f"have {len(self.indices)} entries, one an example of the last batch"
                raise DataError(must(name, want, tuple(values.shape), "Observe after each batch, unreduced."))
        if self._source.blind:
            self._unseen.append((self.indices, losses.detach()))
        if outputs is not None:
            self._source.note(self._step, self.indices, outputs)
        super().observe(losses, outputs)

    def _next_batch(self) -> tuple[WeightedBatch, Tensor]:
        self._account.clock.asked()
        region, fresh = self._region, None
        with self._ranks.guard():
            if region is None or self._step >= min(region.check_at, region.renew_at or region.check_at):
                self._look()
                self._account.enter_steps(self._step)
            if region and self._step >= region.check_at:
                fresh = self._check()
            if self.config.exclude and self.examples and self._step and self._step % self._learned_steps == 0:
                self._exclude()
            self._rest()
            if self._region is None:
                self._region = self._begin_region(fresh)
            elif self._region.renew_at is not None and self._step >= self._region.renew_at:
                self._pick(self._region, fresh)
                self._ranks.average()  # so that a rank that fails here can say so
        coreset = self._region.pick(self._step, self._seed)  # step 5
        batch = WeightedBatch(coreset.data, coreset.weights)
        if self._region.renew_at is None:
            # A copy: the region may hand the same coreset out again, and the batch is the user's to change.
            batch = tree.clone(batch)
        self.stats.coresets += coreset.picked
        if self._visits:
            self._visits.count(coreset.indices)
        if self._account.can_teach:
            self._teach(batch, coreset.indices)
        self._account.clock.handed()
        return batch, coreset.indices

    def _begin_region(self, fresh: Pool | None) -> Region:
        """Draw, measure, select and model anew (steps 1 to 4). A failed check's measurement is the first pool."""
        config = self.config
        # P and the interval both follow the curvature that was known before this region's coresets were.
        interval = int(min(max(self._interval, 1), config.max_interval))
        interval = self._stretched(interval)
        region = Region(
            number=self.stats.regions,
            begun=self._step,
            interval=interval,
            check_at=self._step + interval,
            coresets=[],
            picked_at=self._step,
            parameters=self._meter.parameters(),
        )
        self._pick(region, fresh)
        loss: float | None = None
        if config.check == "paired":
            with self._charged("checking"):
                pool = self._measure_check(*self._feed.next())
                region.check_indices, region.check_data = pool.indices, pool.data
                loss = float(pool.losses.mean(dtype=torch.float64))
        modelled = config.check == "paired" or config.curvature != "first_order"
        with self._charged("curvature", int(modelled)):
            if modelled:
                self._model_loss(region.coresets, region.number)
            if loss is not None:
                self._quadratic.anchor(region.parameters, loss)
            norms = self._quadratic.gradient_norm(), self._quadratic.curvature_norm()
            mean, *quality, gradient_norm, curvature_norm = self._ranks.average(
                loss or 0.0, *self._quality_numbers(), norms=norms
            )
            if modelled:
                self._adapt_interval(curvature_norm)
        self.stats.regions += 1
        self._tell_quality(quality)
        self._log(
            "region",
            region=region.number,
            coresets=sum(coreset.picked for coreset in region.coresets),
            interval=interval,
            loss=None if loss is None else mean,
            gradient_norm=gradient_norm,
            curvature_norm=curvature_norm,
            active=self.stats.active,
        )
        return region

    def _pick(self, region: Region, fresh: Pool | None) -> None:
        """Give the region the coresets of its next steps: as many as are asked for, or can be paid for.

        Those of a whole interval, to be used again until the region ends; or, where coresets are renewed, as
        many batches as there are steps until then, random ones where there is no coreset.
        """
        config = self.config
        renewed = config.renew is not None
        steps = region.interval if config.renew is None else min(config.renew, region.check_at - self._step)
        wanted = min(math.ceil(config.coresets_per_step * steps), steps if renewed else config.max_coresets)
        affordable = self._account.budget.affordable("selecting", wanted, steps)
        count, *share = self._ranks.average(float(affordable), *self._noise.numbers())
        self._noise.take(share)
        parts = self._noise.parts
        many = self._account.budget.together(int(count), wanted) if renewed else int(count)
        left = math.ceil(max(many, int(fresh is not None or not renewed)) / parts)
        coresets: list[Coreset] = []
        with self._charged("selecting", (left - bool(fresh)) * parts):
            while left:
                pools = [fresh] if fresh else []
                fresh = None
                together = min(max(1, SOLVED_TOGETHER // parts), left)
                pools += [self._measure(*self._feed.next()) for _ in range(together - len(pools))]
                left -= together
                self._look()
                coresets += self._select(pools)
            self._noise.read()  # what is timed here ends with a wait for the device anyway
            if self._gauge:
                self._gauge.read()
        if renewed:
            del coresets[steps:]  # of a pool that gave more than there are steps
            coresets += [self._random() for _ in range(steps - len(coresets))]
        region.coresets, region.picked_at = coresets, self._step
        region.renew_at = self._step + steps if renewed else None

    def _random(self) -> Coreset:
        """Return a random batch. A pool that is read and not measured gives as many as it has room for."""
        if not self._spare:
            m = self.config.batch_size
            indices, data = self._feed.next()
            weights = torch.ones(m, device=device_of(self._meter.model))
            for start in range(0, len(indices) - m + 1, m):
                part = tree.move(trimmed(self._meter.objective, tree.part(data, start, start + m)), weights.device)
                rows = torch.arange(start, start + m)
                self._spare.append(Coreset(indices, rows, weights.clone(), part, False))
                if self._visits:
                    self._label(indices[rows], labels_in(self._meter.objective, part, m))
        return self._spare.pop(0)

    def _teach(self, batch: WeightedBatch, indices: Tensor) -> None:
        """Train the source of the proxy gradients on the batch that is handed out, where it can be."""
        if self.config.proxy_source in ("auto", "model"):
            with self._account.teaching(self.stats), self._timed("selecting"):
                self._account.taught(self._source.learn(batch, self._step + 1, indices))

    def _measure(self, indices: Tensor, data: Any) -> Pool:
        """Measure a pool for selection, by whatever gives the proxy gradients (step 2)."""
        with self._ranks.forward():
            pool, rows = self._source.measure(self._step, indices, data)
        if rows is not None:  # the other losses are old, or not the model's, but must be finite as well
            self._refuse_non_finite(indices, pool.losses)
            self._unseen.append((indices[rows], pool.losses[rows.to(pool.losses.device)]))
        else:
            self._unseen.append((indices, pool.losses))
        self._note(pool, rows)
        self._label(indices, pool.labels)
        return pool

    def _label(self, indices: Tensor, labels: Tensor | None) -> None:
        """Note the examples' classes for the comparison of visits, where coresets are picked by class."""
        if self._visits and self.config.stratify:
            self._visits.label(indices, labels)

    def _note(self, pool: Pool, rows: Tensor | None = None) -> None:
        """Enter the model's own losses and outputs of a pool, those of some rows or all, into the record."""
        if self.difficulty and (rows is None or len(rows)):
            at = slice(None) if rows is None else rows
            there = slice(None) if rows is None else rows.to(pool.losses.device)
            outputs = None if pool.outputs is None else pool.outputs[there]
            labels = None if pool.labels is None else pool.labels[there]
            self.difficulty.note(self._step, pool.indices[at], pool.losses[there], outputs, labels)

    def _measure_check(self, indices: Tensor, data: Any) -> Pool:
        """Measure a check set, always with the model itself."""
        with self._ranks.forward():
            pool = self._meter.measure(indices, data)
        self._unseen.append((indices, pool.losses))
        self._note(pool)
        self._label(indices, pool.labels)
        self._look()
        if pool.outputs is not None:
            self._source.note(self._step, indices, pool.outputs)
        return pool

    def _look(self) -> None:
        """Refuse losses that are not finite, and note the others for exclusion. Waits for the device, once."""
        if self._visits:
            self._visits.enter()
        if not self._unseen:
            return
        together = torch.cat([losses.detach().float() for _, losses in self._unseen]).cpu()
        parts = together.split([len(indices) for indices, _ in self._unseen])
        for (indices, _), losses in zip(self._unseen, parts, strict=True):
            self._refuse_non_finite(indices, losses)
            if self.examples:
                self._active.record(indices, losses)
        self._unseen.clear()
        if self.difficulty:
            self.difficulty.enter()

    def _select(self, pools: list[Pool]) -> list[Coreset]:
        """Pick a coreset from each pool, or from each part of it, all together (step 3)."""
        config, noise = self.config, self._noise
        noise.add(pools)
        size = config.pool // noise.parts
        places = [(pool, start) for pool in pools for start in range(0, size * noise.parts, size)]
        pools = [pool.part(start, start + size) for pool, start in places]
        labels = labels_of(pools) if config.stratify else None
        if labels is not None:
            classes = len(torch.unique(labels))
            if classes > config.batch_size:
                self._warn_once(
                    "classes",
                    f"batch_size = {config.batch_size} is smaller than the number of classes, {classes}, so a coreset "
                    "cannot represent them all. Expect less than from random batches, or use a larger batch_size.",
                )
        rows, weights = pick(pools, labels, config.batch_size, noise.power, shared=config.quotas == "share")
        if self._gauge:
            self._gauge.add(pools, rows, weights)
        if self.difficulty:
            for pool, row, weight in zip(pools, rows.cpu(), weights, strict=True):
                self.difficulty.pick(self._step, pool.indices, row, weight)
        # Of whole pools: a part that is read alone may not be what it is in them.
        picked = [
            Coreset.of(pool, row + start, weight)
            for (pool, start), row, weight in zip(places, rows, weights, strict=True)
        ]
        return [replace(coreset, data=trimmed(self._meter.objective, coreset.data)) for coreset in picked]

    def _model_loss(self, coresets: list[Coreset], region: int) -> None:
        """Feed gradient and curvature, means over the region's coresets, to the quadratic model (step 4)."""
        used = coresets[: self.config.curvature_coresets]
        device = device_of(self._meter.model)
        gradient: list[Tensor] = []
        curvature: list[Tensor] = []
        for k, coreset in enumerate(used):
            first_order = self.config.curvature == "first_order"
            key = k * self._ranks.size + self._ranks.rank
            generator = None if first_order else stream(self._seed, "signs", region, key, device=device)
            drawn = coreset.sample(self.config.curvature_examples, stream(self._seed, "examples", region, key))
            with self._ranks.forward():
                g, h = self._meter.differentiate(drawn, generator)
            gradient = _added(gradient, g, 1 / len(used))
            curvature = _added(curvature, h, 1 / len(used))
        parameters = self._meter.parameters()
        if [id(p) for p in parameters] != [id(p) for p in self._modelled]:
            self._quadratic.restart()
        self._modelled = parameters
        self._quadratic.update(self._ranks.spread(gradient, parameters), self._ranks.spread(curvature, parameters))

    def _check(self) -> Pool | None:
        """Compare the model with the loss on the check set (step 6).

        Returns:
            The measurement of the check set, or None where nothing is measured. ``_region`` is None if it has ended.
        """
        region = self._region
        assert region is not None
        if region.check_indices is None:
            self._region = None
            return None
        with self._charged("checking"):
            pool = self._measure_check(region.check_indices, region.check_data)
            loss = float(pool.losses.mean(dtype=torch.float64))
            predicted = self._quadratic.predict(region.parameters)
            predicted, loss, *quality = self._ranks.average(predicted, loss, *self._quality_numbers())
        rho = relative_error(predicted, loss)
        passed = rho <= self.config.tolerance
        self.stats.checks += 1
        if passed:  # else the new region tells
            self._tell_quality(quality)
        self._log("check", region=region.number, rho=rho, predicted=predicted, loss=loss, passed=passed)
        if passed:
            region.check_at = self._step + self._stretched(region.interval)
        else:
            self._region = None
        return pool

    def _adapt_interval(self, norm: float) -> None:
        """Stretch the interval as the curvature's norm falls (step 7)."""
        if self._first_curvature is None:
            self._first_curvature = norm
        if norm > 0:
            self._interval = self.config.interval_scale * self._first_curvature / norm

    def _exclude(self) -> None:
        """Set aside what was learned in the interval that ends here (step 8).

        Coresets that the region holds are still trained on; set-aside examples are no longer drawn. It comes to an end
        where as few are left as a pool needs.
        """
        self._ranks.maximise(self._active.largest)
        excluded = self._active.close_interval(self.config.learned_loss, self.config.pool * self._ranks.size)
        self.stats.active = self._active.count
        if excluded:
            self._feed.redraw()
            if self.difficulty:
                self.difficulty.exclude(self._step, self._active.mask)
        self._log("exclude", excluded=excluded, active=self._active.count, stopped=self._active.stopped)

    def _rest(self) -> None:
        """Let those rest that were in more batches than the others, four times an epoch and from the second one on."""
        visits, examples = self._visits, self.examples
        if visits is None or examples is None:
            return
        batch = self.config.batch_size * self._ranks.size
        every = max(1, examples // (RESTS * batch))  # steps
        if self._step * batch >= examples and self._step % every == 0:
            with self._charged("selecting", 0):
                visits.enter()
                self._ranks.maximise(visits.classes)
                level = visits.level(self._active.mask, self._ranks.summed(visits.counts))
                changed = self._active.rest(level, self.config.pool * self._ranks.size)
            if changed:
                self._feed.redraw()

    def _quality_numbers(self) -> list[float]:
        """Return what ranks tell each other of their gradients: four estimates, and what a coreset's step costs."""
        return [*self._gauge.numbers(), self._account.coreset_step(self.stats)] if self._gauge else []

    def _tell_quality(self, numbers: list[float]) -> None:
        """Log how good the coresets' gradients are, and whether they are worth what they cost."""
        if self._gauge and (values := self._gauge.tell(numbers, self.stats)):
            self._log("quality", **values)

    def _stretched(self, interval: int) -> int:
        """Return an interval that the bound allows, given what checks have cost."""
        return self._agreed(self._account.budget.stretched(interval, self.config.max_interval))

    def _agreed(self, number: int) -> int:
        """Return a number that every rank goes by: the clock may have told them different ones."""
        return int(self._ranks.average(float(number))[0])

    # Book-keeping ----------------------------------------------------------------------------------------

    @contextmanager
    def _charged(self, purpose: Purpose, count: int = 1) -> Iterator[None]:
        """Time a phase and charge it to the budget, as so many pools, checks or curvatures."""
        with self._account.charged(self.stats, purpose, count), self._timed(purpose):
            yield

    # Stop and resume -------------------------------------------------------------------------------------

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Carry on the run that made the state; the next ``iter()`` finishes its pass.

        Where several processes train together, each must load the state that it saved.

        Raises:
            CheckpointError: the state is no such state, or was made with other data, settings or processes.
        """
        with self._ranks.guard():
            super().load_state_dict(state)
            self._ranks.refuse_other_step(self._step)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), **self._ranks.identity()}

    def _refuse_foreign(self, state: Any) -> None:
        super()._refuse_foreign(state)
        self._ranks.refuse_foreign(state)

    def _settings(self) -> dict[str, Any]:
        stream = {"stream_sharded": self._stream_sharded} if self.examples is None else {}
        return {**self.config.to_dict(), **stream}

    def _state(self) -> dict[str, Any]:
        region = self._region
        return {
            "place": self._feed.state_dict(),
            "active": self._active.state_dict(),
            "visits": self._visits and self._visits.state_dict(),
            "quadratic": self._quadratic.state_dict(),
            "interval": self._interval,
            "first_curvature": self._first_curvature,
            "region": region and region.state_dict(self._meter.model, self._feed),
            "spare": states_of(self._spare, self._feed),
            "account": self._account.state_dict(),
            "unseen": [(indices, losses.cpu()) for indices, losses in self._unseen],
            "source": self._source.state_dict(),
            "gauge": self._gauge and self._gauge.state_dict(),
            "noise": self._noise.state_dict(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self._active.load_state_dict(state["active"])
        if self._visits:
            self._visits.load_state_dict(state["visits"])
        self._feed.load_state_dict(state["place"])
        self._interval, self._first_curvature = state["interval"], state["first_curvature"]
        self._source.load_state_dict(state["source"])
        self._account.load_state_dict(state["account"])
        self._noise.load_state_dict(state["noise"])
        device = device_of(self._meter.model)
        self._unseen = [(indices, losses.to(device)) for indices, losses in state["unseen"]]
        if self._gauge:
            self._gauge.load_state_dict(state["gauge"])
        self._spare = read_coresets(state["spare"], self._feed, device, self._meter.objective)
        saved = state["region"]
        self._region = saved and Region.read(saved, self._feed, self._meter.model, self._meter.objective)
        self._modelled = self._region.parameters if self._region else []
        self._quadratic.load_state_dict(state["quadratic"], self._modelled)


def _added(total: list[Tensor], terms: list[Tensor], share: float) -> list[Tensor]:
    """Add a share of each term to the total, in place; an empty total is zero, and takes the terms over."""
    if not total:
        return [term.mul_(share) for term in terms] if share != 1 else terms
    return [t.add_(term, alpha=share) for t, term in zip(total, terms, strict=True)]


def _refuse(model: Any, config: Any, examples: int | None, last_layer: Any, proxy_model: Any, ranks: int) -> None:
    """Refuse what cannot work, before anything is read."""
    problems = []
    if not isinstance(model, nn.Module):
        problems.append(must("model", "be a torch.nn.Module", type(model).__name__, "Wrap the function in a module."))
    elif not any(p.requires_grad for p in model.parameters()):
        problems.append(must("model", "have trainable parameters", "none", "Set requires_grad on those to train."))
    if not isinstance(config, CrestConfig):
        do = "Write CrestConfig(batch_size=..., pool_size=...)."
        problems.append(must("config", "be a CrestConfig", type(config).__name__, do))
    elif examples is None and config.proxy_source == "history":
        want = "be another than 'history' for a stream, as no example of it is known to come again"
        problems.append(must("proxy_source", want, config.proxy_source, "Use 'forward'."))
    elif examples is not None and config.pool * ranks > examples:
        want = f"be at most the {examples} examples of the data set" + (f" over {ranks} ranks" if ranks > 1 else "")
        problems.append(must("pool_size", want, config.pool, "A pool's examples are distinct: use a smaller one."))
    if isinstance(config, CrestConfig) and config.difficulty and examples is None:
        want = "be False for a stream, as no example of it is known to come again"
        problems.append(must("difficulty", want, True, "Leave it out."))
    if last_layer is not None and not isinstance(last_layer, nn.Linear):
        problems.append(must("last_layer", "be a torch.nn.Linear", type(last_layer).__name__, "Or leave it out."))
    if proxy_model is not None and not isinstance(proxy_model, nn.Module):
        problems.append(must("proxy_model", "be a torch.nn.Module", type(proxy_model).__name__, "Or leave it out."))
    sources = ("auto", "model") if proxy_model is not None else ("auto", "forward", "history", "resolution")
    if isinstance(config, CrestConfig) and config.proxy_source not in sources:
        want = "be given with proxy_source='model', and otherwise only with 'auto'"
        got = None if proxy_model is None else type(proxy_model).__name__
        problems.append(must("proxy_model", want, got, "Give both, or neither."))
    if problems:
        raise ConfigError(problems)
