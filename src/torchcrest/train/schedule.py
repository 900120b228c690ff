"""Learning rates by optimizer step."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torchcrest.errors import ConfigError, must

__all__ = ["Kind", "learning_rate"]

Kind = Literal["step", "cosine", "constant"]


def learning_rate(step: int, steps: int, *, base: float, kind: Kind = "step", warmup: float = 0.1) -> float:
    """The learning rate of one optimizer step, counted in steps and not in epochs.

    Steps are what methods that train on different amounts of data per epoch have in common: with one budget
    of `steps`, all of them see the same learning rates.

    The rate rises linearly over the first round(warmup * steps) steps; the first of them is above 0 already
    and the last is at `base`. After that it is multiplied by 0.1 at 60 % and again at 85 % of all steps
    ("step"), falls to 0 at the end on half a cosine ("cosine"), or stays ("constant").

    Args:
        step: The number of optimizer steps taken before this one, from 0. `steps` itself is allowed, for
            the schedulers that ask once more after the last step.
        steps: The length of the run, in optimizer steps.
        base: The highest learning rate.
        kind: What follows the warm-up.
        warmup: The share of `steps` to warm up in, from 0 to 0.5.

    Returns:
        The learning rate.

    Raises:
        ConfigError: An argument is out of its range. The message lists all that are.

    >>> [round(learning_rate(step, 20, base=1.0), 4) for step in (0, 1, 2, 11, 12, 16, 17, 19)]
    [0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    >>> [round(learning_rate(step, 4, base=1.0, kind="cosine", warmup=0), 4) for step in range(5)]
    [1.0, 0.8536, 0.5, 0.1464, 0.0]
    """
    _check(step, steps, base, kind, warmup)
    warm = round(warmup * steps)
    if step < warm:
        return base * ((step + 1) / warm)  # the last one exactly base
    if kind == "cosine":
        return base * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
    if kind == "step":
        # In whole numbers: 0.6 * steps as a float can land just beside the step that is meant.
        return base * 0.1 ** ((100 * step >= 60 * steps) + (100 * step >= 85 * steps))
    return base


def _check(step: int, steps: int, base: float, kind: str, warmup: float) -> None:
    kinds = get_args(Kind)
    problems = []
    if steps < 1:
        problems.append(must("steps", "be at least 1", steps, "Use epochs * ceil(examples / batch_size)."))
    elif not 0 <= step <= steps:
        problems.append(must("step", f"be from 0 to steps ({steps})", step, "Raise steps or stop there."))
    if not 0 < base < math.inf:
        problems.append(must("base", "be a positive finite number", base, "Use for example 0.1."))
    if kind not in kinds:
        problems.append(must("kind", f"be one of {', '.join(kinds)}", kind, "Use for example 'step'."))
    if not 0 <= warmup <= 0.5:
        problems.append(must("warmup", "be from 0 to 0.5", warmup, "Use for example 0.1."))
    if problems:
        raise ConfigError(problems)
