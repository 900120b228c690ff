"""What a run has spent on selection and on training, in the unit that the bound is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchcrest.config import CrestConfig, counted
from torchcrest.measure import Meter, device_of, synchronize
from torchcrest.overhead import Budget, Clock, Purpose
from torchcrest.proxies import Forward
from torchcrest.types import Stats

__all__ = ["Account"]

LEARNING_SHARE = 0.5  # of what may be spent, for training a proxy model; the rest is for measuring it


class Account:
    """Charges phases of selection, and training steps, to a :class:`torchcrest.overhead.Budget`.

    In seconds as measured, or in counted examples: what is forwarded, differentiated and trained on, each at a
    cost relative to that of training on one.

    Args:
        config: says which, and the bound.
        meter: measures the model in training.
        source: of the proxy gradients; it may measure with others.

    Attributes:
        budget: what has been spent, and what that leaves.
        clock: times training steps.
        counts: whether the bound is in counted examples.
    """

    def __init__(self, config: CrestConfig, meter: Meter, source: Forward) -> None:
        self.budget = Budget(config.max_overhead, config.max_coreset_cost)
        self.clock = Clock()
        self.counts = counted(config)
        self._config = config
        self._meter = meter
        self._source = source
        self._entered = 0  # steps whose cost is in the budget
        self._taught = 0.0  # examples that the source was trained on, in the model's cost
        self._teaching = 0.0  # what that has cost, in the budget's unit

    @contextmanager
    def charged(self, stats: Stats, purpose: Purpose, count: int = 1) -> Iterator[None]:
        """Charge what is done inside, as so many pools, checks or curvatures; its seconds are in the stats."""
        seconds = f"seconds_{purpose}"
        before = getattr(stats, seconds), self._counted(), self._forwarded()
        yield
        spent = getattr(stats, seconds) - before[0], self._counted() - before[1], self._forwarded() - before[2]
        self.budget.pay(purpose, spent[1] if self.counts else spent[0], count)
        stats.overhead = self.budget.overhead
        stats.examples_forwarded = self._forwarded() + self._meter.differentiated
        stats.forwarded_selecting += spent[2] if purpose == "selecting" else 0
        stats.forwarded_checking += spent[2] if purpose == "checking" else 0

    @contextmanager
    def teaching(self, stats: Stats) -> Iterator[None]:
        """Charge the training of a proxy model, as :meth:`charged` does."""
        before = self.budget.spent
        with self.charged(stats, "selecting", 0):
            yield
        self._teaching += self.budget.spent - before

    def taught(self, examples: float) -> None:
        """Count examples that a proxy model was trained on, in the model's cost."""
        self._taught += examples

    @property
    def can_teach(self) -> bool:
        """Whether a proxy model may be trained on the next batch: it has half of what may be spent."""
        if self.budget.limit is None:
            return True
        return self._teaching <= LEARNING_SHARE * self.budget.selecting * self.budget.trained

    def coreset_step(self, stats: Stats) -> float:
        """Return what a step on a coreset has cost so far, in plain steps: selection, checks and curvature are its.

        0 where it is not known as yet.
        """
        known = stats.coresets and self.budget.trained
        return 1 + self.budget.overhead * self._entered / stats.coresets if known else 0.0

    def enter_steps(self, step: int) -> None:
        """Enter the training steps since the last time, up to this one."""
        steps, self._entered = step - self._entered, step
        seconds = self.clock.step(lambda: synchronize(device_of(self._meter.model)))
        cost = float(self._config.batch_size) if self.counts else seconds
        if steps and cost is not None:
            self.budget.train(cost, steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the account as plain numbers."""
        return {
            "budget": self.budget.state_dict(),
            "entered": self._entered,
            "taught": self._taught,
            "teaching": self._teaching,
            "counts": [(meter.forwarded, meter.differentiated) for meter in self._meters()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore an account. The step under way is not timed."""
        for meter, counts in zip(self._meters(), state["counts"], strict=True):
            meter.forwarded, meter.differentiated = counts
        self.budget.load_state_dict(state["budget"])
        self.clock = Clock()
        self._entered = int(state["entered"])
        self._taught, self._teaching = float(state["taught"]), float(state["teaching"])

    def _meters(self) -> list[Meter]:
        return [self._meter, *(meter for meter, _ in self._source.meters)]

    def _forwarded(self) -> int:
        """Count the examples that were measured, with whatever model."""
        return sum(meter.forwarded for meter in self._meters())

    def _counted(self) -> float:
        """Return the counted cost so far; training on an example is 1."""
        meter, config = self._meter, self._config
        forwarded = meter.forwarded + sum(share * other.forwarded for other, share in self._source.meters)
        twice = config.curvature != "first_order" and config.curvature_product == "double_backward"
        each = config.derivative_cost or (3.0 if twice else 1.0)
        return config.forward_cost * forwarded + each * meter.differentiated + self._taught
