"""GLISTER: train on the examples whose gradient steps help held-out examples most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchcrest.active import stream
from torchcrest.baselines.subset import Proxy, SubsetConfig, SubsetLoader
from torchcrest.checks import Checks
from torchcrest.errors import ConfigError, must
from torchcrest.feed import examples_in
from torchcrest.objectives import Objective, Projecting
from torchcrest.solvers import shares
from torchcrest.types import Pool, no_indices

__all__ = ["Glister", "GlisterConfig"]


@dataclass(frozen=True, kw_only=True)
class GlisterConfig(SubsetConfig):
    """Settings of :class:`Glister`.

    Attributes:
        proxy: the last layer is the part of the model that the one step changes; with ``outputs`` only its
            bias.
        validation: how many training examples to hold out (an int), or which share of them (a float below
            1), where no validation data are given. They are never trained on.
        step_size: of the one gradient step on the summed loss of what is picked. It makes later picks correct
            what the earlier ones overdo: without it (a hundredth of it) MNIST-1D trained to 30 %, with it to 95 %.
        rounds: in so many equal parts the subset is picked; after each the validation gradient is computed
            anew, a step further.
    """

    proxy: Proxy = "last_layer"
    validation: int | float = 0.1
    step_size: float = 0.1
    rounds: int = 15

    def _check(self, checks: Checks) -> None:
        super()._check(checks)
        checks.steps_or_share("validation", "Use for example 0.1, a tenth of the data.", "examples")
        checks.above_zero("step_size", "Use the learning rate, for example 0.1.")
        checks.whole("rounds", 1, "The public code uses 15.")


class Glister(SubsetLoader[GlisterConfig]):
    """GLISTER (Killamsetty et al., AAAI 2021, arXiv 2012.10630).

    Greedy: pick the examples with whose gradient step on the last layer the loss on validation examples falls
    most, to first order; take that step; go on. All weights are 1.

    Takes the arguments of :class:`torchcrest.Crest`, with settings of its own, raises the same errors, and:

    Args:
        validation: data to judge by, of the same form as ``dataset``, for example a split of your own; never the
            test data. None: a part of ``dataset`` is held out. They are held in memory while it selects.
    """

    method = "glister"
    settings = GlisterConfig

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        config: GlisterConfig | None = None,
        *,
        steps: int,
        seed: int = 0,
        objective: Objective | Callable[[Tensor, Any], Tensor] | None = None,
        last_layer: nn.Linear | None = None,
        validation: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
    ) -> None:
        self._holds_out = validation is None
        self._validation = dataset if validation is None else validation
        self._judges = no_indices() if validation is None else torch.arange(examples_in(validation, "validation"))
        super().__init__(
            model,
            dataset,
            config,
            steps=steps,
            seed=seed,
            objective=objective,
            last_layer=last_layer,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
        )
        if isinstance(self._objective, Projecting):
            want = "give outputs for the step that Glister looks ahead, not proxy gradients of its own"
            raise ConfigError(must("objective", want, type(self._objective).__name__, "Use Crest or Craig."))

    def _candidates_among(self, examples: int) -> Tensor:
        """Hold out at random what is to judge, where no validation data were given."""
        candidates = super()._candidates_among(examples)
        if not self._holds_out:
            return candidates
        share = self.config.validation
        count = share if isinstance(share, int) else max(1, round(share * examples))
        if count >= examples:
            want = f"leave some of the {examples} examples to train on"
            raise ConfigError(must("validation", want, share, "Use for example 0.1."))
        order = torch.randperm(examples, generator=stream(self._seed, "validation"))
        self._judges = order[:count].sort().values
        candidates[self._judges] = False
        return candidates

    def _pick(self, everything: Pool) -> tuple[Tensor, Tensor]:
        judges = [self._meter.measure(rows, data) for rows, data in self._read(self._judges, self._validation)]
        self.stats.examples_forwarded = self._meter.forwarded
        n, config, labels = len(everything.indices), self.config, everything.labels
        gains = _Gains(everything, judges, self._objective, config.step_size)
        nothing = torch.zeros(n, dtype=torch.int64, device=everything.losses.device)
        classes = nothing if labels is None else torch.unique(labels, return_inverse=True)[1]
        quotas = torch.from_numpy(shares(classes.bincount().cpu().numpy(), self._size)).to(classes.device)
        taken = torch.zeros(n, dtype=torch.bool, device=classes.device)
        for k in range(1, config.rounds + 1):
            so_far = quotas * k // config.rounds - classes[taken].bincount(minlength=len(quotas))
            best = gains().masked_fill(taken, -torch.inf).argsort(descending=True, stable=True)
            best = best[classes[best].argsort(stable=True)]
            members = classes.bincount(minlength=len(quotas))
            place = torch.arange(n, device=best.device) - (members.cumsum(0) - members)[classes[best]]
            picked = best[place < so_far[classes[best]]]
            taken[picked] = True
            gains.step(picked)
        rows = taken.nonzero()[:, 0]
        return rows, torch.ones(len(rows))


class _Gains:
    """How much a step on each training example's gradient lowers the validation loss, to first order."""

    def __init__(self, everything: Pool, judges: list[Pool], objective: Objective, step_size: float) -> None:
        self._gradients, self._features, self._bias = everything.gradients, everything.features, everything.bias
        self._judges, self._objective = judges, objective
        self._step_size = step_size
        self._stepped = self._sums(self._gradients[:0], None if self._features is None else self._features[:0])

    def __call__(self) -> Tensor:
        """Return ``[n]`` gains."""
        layer, bias = self._stepped
        slope_layer, slope_bias = torch.zeros_like(layer), torch.zeros_like(bias)
        for judge in self._judges:
            assert judge.outputs is not None
            moved = bias.expand(len(judge.indices), -1)
            if judge.features is not None:
                moved = moved + judge.features @ layer.mT
            outputs = judge.outputs - self._step_size * moved.reshape(judge.outputs.shape)
            with torch.enable_grad():
                losses = self._objective.losses(outputs.requires_grad_(), judge.data)
                (gradients,) = torch.autograd.grad(losses.sum(), outputs)
            of_layer, of_bias = self._sums(gradients.flatten(1).float(), judge.features)
            slope_layer, slope_bias = slope_layer + of_layer, slope_bias + of_bias
        gains = self._gradients @ slope_bias
        return gains if self._features is None else gains + ((self._gradients @ slope_layer) * self._features).sum(1)

    def step(self, rows: Tensor) -> None:
        """Take the gradient step of these examples."""
        of_layer, of_bias = self._sums(self._gradients[rows], None if self._features is None else self._features[rows])
        layer, bias = self._stepped
        self._stepped = layer + of_layer, bias + of_bias

    def _sums(self, gradients: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add up the last layer's gradients: its matrix ``[d, h]`` and its bias ``[d]``."""
        layer = gradients.mT @ (gradients.new_zeros(len(gradients), 0) if features is None else features)
        return layer, gradients.sum(0) * float(self._bias)
