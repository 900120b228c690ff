"""The methods of the command: how each makes its batches, and how long it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchcrest.baselines import (
    Craig,
    CraigConfig,
    Glister,
    GlisterConfig,
    GradMatch,
    GradMatchConfig,
    InfoBatch,
    InfoBatchConfig,
    RandomBatches,
)
from torchcrest.checks import suggest
from torchcrest.config import CrestConfig
from torchcrest.crest import Crest
from torchcrest.errors import ConfigError, must
from torchcrest.passes import Passes
from torchcrest.train.tasks import Examples
from torchcrest.train.texts import Texts

__all__ = ["CONFIGS", "METHODS", "Config", "Method", "find_method"]

Config = CrestConfig | CraigConfig | GradMatchConfig | GlisterConfig | InfoBatchConfig
CONFIGS: dict[str, type[Config]] = {
    "crest": CrestConfig,
    "craig": CraigConfig,
    "gradmatch": GradMatchConfig,
    "glister": GlisterConfig,
    "infobatch": InfoBatchConfig,
}


@dataclass(frozen=True)
class Method:
    """A way to choose what is trained on. Those in :data:`CONFIGS` have settings of their own.

    Attributes:
        about: what it does, in a line.
        loader: makes the batches.
        whole: it takes all the steps of the full run, whatever the budget.
        compressed: the learning-rate schedule is fitted into its steps; else it is the full run's, cut off.
    """

    about: str
    loader: Callable[..., Passes]
    whole: bool = False
    compressed: bool = True

    def steps(self, full_steps: int, budget: float) -> int:
        """Return how many optimizer steps it takes."""
        return full_steps if self.whole else max(1, round(budget * full_steps))

    def build(
        self,
        model: nn.Module,
        data: Examples | Texts,
        config: Config | int,
        steps: int,
        seed: int,
        workers: int,
        proxy: nn.Module | None = None,
    ) -> Passes:
        """Make the loader; a method without settings of its own takes its batch size for them."""
        more: dict[str, Any] = {} if proxy is None else {"proxy_model": proxy}
        return self.loader(
            model, data, config, steps=steps, seed=seed, num_workers=workers, collate_fn=data.collate, **more
        )


METHODS = {
    "full": Method("all data, all steps", RandomBatches, whole=True),
    "truncated": Method("the full run, cut off at the budget", RandomBatches, compressed=False),
    "random": Method("random data, with the whole schedule in the budget, like all that follow", RandomBatches),
    "crest": Method("mini-batch coresets of random pools", Crest),
    "craig": Method("medoids of all gradients, picked anew from time to time", Craig),
    "gradmatch": Method("few examples whose gradients match all, picked anew from time to time", GradMatch),
    "glister": Method("the examples that help held-out ones most, picked anew from time to time", Glister),
    "infobatch": Method("all data but a random part of what is learned, chosen anew each epoch", InfoBatch),
}


def find_method(name: str) -> Method:
    """Return the method of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METHODS:
        raise ConfigError(must("method", f"be one of {', '.join(METHODS)}", name, suggest(name, METHODS)))
    return METHODS[name]
