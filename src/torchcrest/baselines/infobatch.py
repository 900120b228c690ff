"""InfoBatch: pass over some of the examples that are learned better than the mean, and make up for it by weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchcrest import tree
from torchcrest.active import Draws, Place, stream
from torchcrest.checks import Checks
from torchcrest.errors import ConfigError, DataError, NonFiniteLossError, must
from torchcrest.feed import Feed, Reading, examples_in
from torchcrest.measure import device_of
from torchcrest.passes import Passes
from torchcrest.types import WeightedBatch

__all__ = ["InfoBatch", "InfoBatchConfig"]


@dataclass(frozen=True, kw_only=True)
class InfoBatchConfig:
    """Settings of :class:`InfoBatch`; the defaults are the paper's.

    Attributes:
        batch_size: examples in a batch.
        prune: r, share of the examples with a loss below the mean that an epoch passes over.
        anneal: last steps (an int), or last share of the run (a float), that take all the data.

    Raises:
        ConfigError: any setting is out of range; all problems are listed at once.
    """

    batch_size: int = 128
    prune: float = 0.5
    anneal: int | float = 0.125

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, naming all of them."""
        checks = Checks(self)
        checks.whole("batch_size", 1, "Use for example 128.")
        checks.share("prune", "0.5 is the paper's.")
        if checks.at_least_zero("anneal", "0.125, the last eighth, is the paper's.") and isinstance(self.anneal, float):
            checks.that("anneal", self.anneal <= 1, "be steps (a whole number) or a share in [0, 1]", "Use 0.125.")
        checks.close()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain numbers and strings."""
        return asdict(self)


class InfoBatch(Passes):
    """InfoBatch (Qin et al., ICLR 2024, arXiv 2303.04947).

    An epoch leaves out a random share r of the examples whose last training loss was below the mean of all,
    and weighs the rest of those by 1 / (1 - r). It costs no forward pass: the loop gives the losses it has
    anyway to :meth:`observe`. Epochs end inside a pass; each is an event in the history, with how many
    examples it kept. The last eighth of the pass takes all the data. ::

        for (x, y), weights in loader:
            losses = F.cross_entropy(model(x), y, reduction="none")
            loader.observe(losses)
            (losses * weights).mean().backward()

    Weights have mean 1 in a batch, as with all methods here. The paper's are larger by the examples of
    an epoch over those kept: it takes larger steps, as a larger learning rate does.

    Args:
        model: only its device is read.
        dataset: map-style, as for :class:`torchcrest.Crest`.
        config: the settings; None: the defaults.
        steps: batches of a pass.
        total_steps: of the whole run, at the end of which stands ``anneal``; None: a pass is the whole run.
        seed: of the order and of what is passed over.
        num_workers: processes that read batches ahead; it and the rest as in
            :class:`torch.utils.data.DataLoader`.
        collate_fn: makes a batch of a list of examples.
        pin_memory: read into pinned memory.
        prefetch_factor: batches that each worker reads ahead.

    Raises:
        ConfigError: settings that cannot work, or an epoch in which no losses were observed.
        DataError: a data set that cannot be used.
        NonFiniteLossError: an observed loss is NaN or infinite; found at the end of its epoch.
    """

    method = "infobatch"
    _feed: Feed

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        config: InfoBatchConfig | None = None,
        *,
        steps: int,
        total_steps: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
    ) -> None:
        config = config or InfoBatchConfig()
        examples = examples_in(dataset)
        super().__init__(model, steps=steps, seed=seed, examples=examples)
        if config.batch_size > examples:
            want = f"be at most the {examples} examples"
            raise ConfigError(must("batch_size", want, config.batch_size, "Use a smaller one."))
        self.config = config
        self._total = steps if total_steps is None else total_steps
        last = config.anneal if isinstance(config.anneal, int) else round(config.anneal * self._total)
        self._anneal_from = max(0, self._total - last) if last else None
        self._losses = torch.full((examples,), torch.nan)  # the last one of each example; NaN: not trained on yet
        self._observed: list[tuple[Tensor, Tensor]] = []  # indices and losses of steps, not waited for
        self._heard = False  # of any losses in this epoch
        self._weights = torch.ones(examples)
        self._kept = torch.ones(examples, dtype=torch.bool)
        self._epoch = -1
        self._left = 0  # examples of the epoch that are still to come
        reading = Reading(num_workers, collate_fn, pin_memory, prefetch_factor)
        self._feed = Feed(dataset, Draws(self._kept, seed), config.batch_size, reading, seed)

    def observe(self, losses: Tensor, outputs: Tensor | None = None) -> None:
        """Take the training losses of the batch handed out last.

        Args:
            losses: ``[batch_size]``, unweighted, in the order of the batch. They are not waited for.
            outputs: not needed.

        Raises:
            DataError: they are not one an example of the batch.
        """
        if tuple(losses.shape) != tuple(self.indices.shape):
            want = f"have shape {tuple(self.indices.shape)}, one an example of the last batch"
            raise DataError(
                must("losses", want, tuple(losses.shape), 'Use reduction="none", and observe after each batch.')
            )
        self._observed.append((self.indices, losses.detach()))
        super().observe(losses, outputs)
        self._heard = True

    def _next_batch(self) -> tuple[WeightedBatch, Tensor]:
        if self._left < self.config.batch_size or self._step == self._anneal_from:
            self._begin_epoch()
        indices, data = self._feed.next()
        self._left -= len(indices)
        weights = self._weights[indices]
        device = device_of(self._model)
        return WeightedBatch(tree.move(data, device), (weights / weights.mean()).to(device)), indices

    def _begin_epoch(self) -> None:
        """Choose what the next epoch takes. What was left of the last one, less than a batch, is dropped."""
        if self._epoch >= 0 and not self._heard:
            do = "Call loader.observe(losses) in each step, with the losses of the batch."
            raise ConfigError(must("losses", "be observed", "none in a whole epoch", do))
        self._gather()
        self._epoch += 1
        self._heard = False
        self._weights.fill_(1.0)
        self._kept.fill_(True)
        if self._anneal_from is None or self._step < self._anneal_from:
            well = (self._losses < self._losses.nanmean()).nonzero()[:, 0]
            order = well[torch.randperm(len(well), generator=stream(self._seed, "prune", self._epoch))]
            dropped = min(round(self.config.prune * len(well)), len(self._kept) - self.config.batch_size)
            self._weights[well] = 1 / (1 - self.config.prune)
            self._kept[order[:dropped]] = False
        self._left = self.stats.active = int(self._kept.sum())
        self._feed.seek(Place(self._epoch, 0, ()))
        self._log("epoch", epoch=self._epoch, kept=self._left, examples=self.examples)

    def _gather(self) -> None:
        """Enter the observed losses. Waits for the device."""
        if not self._observed:
            return
        indices = torch.cat([indices for indices, _ in self._observed])
        losses = torch.cat([losses for _, losses in self._observed]).float().cpu()
        self._observed.clear()
        bad = ~losses.isfinite()
        if bad.any():
            raise NonFiniteLossError.about("loss", f"up to step {self._step}", indices[bad].tolist(), len(bad))
        self._losses[indices] = losses  # an epoch takes no example twice

    def _settings(self) -> dict[str, Any]:
        return {**self.config.to_dict(), "total_steps": self._total}

    def _state(self) -> dict[str, Any]:
        self._gather()
        return {
            "place": self._feed.state_dict(),
            "losses": self._losses.clone(),
            "weights": self._weights.clone(),
            "kept": self._kept.clone(),
            "epoch": self._epoch,
            "left": self._left,
            "heard": self._heard,
        }

    def _load(self, state: dict[str, Any]) -> None:
        self._observed.clear()
        for name in ("losses", "weights", "kept"):
            getattr(self, f"_{name}").copy_(state[name])
        self._epoch, self._left, self._heard = int(state["epoch"]), int(state["left"]), bool(state["heard"])
        self._feed.load_state_dict(state["place"])
