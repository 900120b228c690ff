"""The methods of the command: how each makes its batches, and how long it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from torchcrest.baselines import RandomBatches
from torchcrest.config import CrestConfig, suggest
from torchcrest.crest import Crest
from torchcrest.errors import ConfigError, must
from torchcrest.passes import Passes
from torchcrest.train.tasks import Examples

__all__ = ["METHODS", "Method", "find_method"]

Build = Callable[[nn.Module, Examples, CrestConfig, int, int, int], Passes]


@dataclass(frozen=True)
class Method:
    """A way to choose what is trained on.

    Attributes:
        about: what it does, in a line.
        build: makes the loader, from model, data, settings, steps, seed and number of workers.
        whole: it takes all the steps of the full run, whatever the budget.
        compressed: the learning-rate schedule is fitted into its steps; else it is the full run's, cut off.
    """

    about: str
    build: Build
    whole: bool = False
    compressed: bool = True

    def steps(self, full_steps: int, budget: float) -> int:
        """Return how many optimizer steps it takes."""
        return full_steps if self.whole else max(1, round(budget * full_steps))


def _random(model: nn.Module, data: Examples, config: CrestConfig, steps: int, seed: int, workers: int) -> Passes:
    return RandomBatches(
        model, data, config.batch_size, steps=steps, seed=seed, num_workers=workers, collate_fn=Examples.collate
    )


def _crest(model: nn.Module, data: Examples, config: CrestConfig, steps: int, seed: int, workers: int) -> Passes:
    return Crest(model, data, config, steps=steps, seed=seed, num_workers=workers, collate_fn=Examples.collate)


METHODS = {
    "full": Method("all data, all steps", _random, whole=True),
    "truncated": Method("the full run, cut off at the budget", _random, compressed=False),
    "random": Method("random data, with the whole schedule in the budget", _random),
    "crest": Method("mini-batch coresets, with the whole schedule in the budget", _crest),
}


def find_method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        raise ConfigError(must("method", f"be one of {', '.join(METHODS)}", name, suggest(name, METHODS)))
    return METHODS[name]
