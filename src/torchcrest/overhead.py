"""How much selection may cost: a share of the training steps' own cost, in seconds or in counted examples."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any, Literal

__all__ = ["Budget", "Clock", "Purpose"]

Purpose = Literal["selecting", "checking", "curvature"]
RECENT = 5  # costs of which the median is taken: the first are those of a cold machine, and some of a busy one
PROBING = 0.1  # of what may be spent, where coresets are too dear: to notice when they no longer are
FIXED_SHARE = 0.2  # of what may be spent, for checks and curvature; coresets do more for accuracy


class Budget:
    """Keeps an account of selection against a share of the cost of the training steps.

    Costs may be of any one unit. What has not been spent is kept, what was spent too much is paid back first,
    so the bound holds over the run and not in each step of it.

    Attributes:
        limit: largest cost of selection for each unit of training; None: no bound.
        worth: most that a coreset may cost, in training steps; None: whatever it costs.
        spent: cost of selection so far.
        trained: cost of the training steps so far.
    """

    def __init__(self, limit: float | None, worth: float | None = None) -> None:
        self.limit = limit
        self.worth = worth
        self.spent = 0.0
        self.trained = 0.0
        self._costs: dict[str, deque[float]] = {}

    def pay(self, purpose: Purpose, cost: float, count: int = 1) -> None:
        """Enter what was spent on so many pools, checks or curvatures."""
        self.spent += cost
        if count:
            self._enter(purpose, cost / count)

    def train(self, cost: float, steps: int) -> None:
        """Enter training steps that cost so much each."""
        self._enter("training", cost)
        self.trained += self._cost("training") * steps

    @property
    def overhead(self) -> float:
        """Cost of selection for each unit of training so far."""
        return self.spent / self.trained if self.trained else 0.0

    def affordable(self, purpose: Purpose, wanted: int, steps: int) -> int:
        """Return how many of the wanted can be paid for over the next steps.

        Before anything is known of what training and selection cost, that is one.

        >>> budget = Budget(0.25)
        >>> budget.train(1.0, 8)
        >>> budget.pay("selecting", 0.5)
        >>> budget.affordable("selecting", 10, steps=6)  # (8 + 6) / 4 less the 0.5 that are spent
        6
        """
        if self.limit is None:
            return wanted
        each = self._cost(purpose)
        if not self.trained or not each:
            return min(1, wanted)
        limit = self.selecting if purpose == "selecting" else self.limit
        left = limit * (self.trained + self._cost("training") * steps) - self.spent
        return min(wanted, max(0, math.floor(left / each + 1e-9)))

    def together(self, count: int, wanted: int) -> int:
        """Return how many coresets to pick now, if so many of the wanted can be paid for: none until all of them can.

        Coresets that are picked together cost less each than one alone, several times less on a GPU, so what is
        there is saved up. The first groups are smaller, as what one of many costs is not known before: 1, 1, 2, 4, ...

        >>> Budget(0.25).together(1, 10)
        1
        """
        known = len(self._costs.get("selecting", ()))
        return count if count >= min(wanted, 2 ** max(0, known - 1)) else 0

    @property
    def dear(self) -> bool:
        """Whether coresets are known to cost more than they are worth: from two groups on, if the cheaper one did."""
        known = self._costs.get("selecting", ())
        if self.worth is None or len(known) < 2:
            return False
        # The first groups are small, and one may be a cold machine's; that a group of many costs less is found out too.
        cost = median(known) if len(known) == RECENT else min(known)
        return cost > self.worth * self._cost("training")

    @property
    def selecting(self) -> float:
        """The largest cost of selection at present, where there is a bound: hardly any while coresets are too dear."""
        return math.inf if self.limit is None else PROBING * self.limit if self.dear else self.limit

    def stretched(self, interval: int, longest: int) -> int:
        """Return an interval so long that checks and curvature take their share of the budget at most.

        Args:
            interval: the steps between checks that are asked for.
            longest: the most that are allowed.
        """
        # The loss at the region's beginning, the check at its end, and gradient and curvature between them.
        fixed = 2 * self._cost("checking") + self._cost("curvature")
        if self.limit is None or not self.trained:
            return interval
        each = FIXED_SHARE * self.limit * self._cost("training")
        return max(interval, min(longest, math.ceil(fixed / each)))

    def state_dict(self) -> dict[str, Any]:
        """Return the account as plain numbers."""
        costs = {name: list(values) for name, values in self._costs.items()}
        return {"spent": self.spent, "trained": self.trained, "costs": costs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore an account."""
        self.spent, self.trained = float(state["spent"]), float(state["trained"])
        self._costs = {name: deque(values, maxlen=RECENT) for name, values in state["costs"].items()}

    def _enter(self, name: str, cost: float) -> None:
        self._costs.setdefault(name, deque(maxlen=RECENT)).append(cost)

    def _cost(self, name: str) -> float:
        known = self._costs.get(name)
        return median(known) if known else 0.0


class Clock:
    """Times training steps from outside: from handing out a batch to being asked for the next."""

    def __init__(self) -> None:
        self._gaps: list[float] = []
        self._handed: float | None = None

    def asked(self) -> None:
        """Note that the step on the batch handed out last is over, as far as the caller can tell."""
        if self._handed is not None:
            self._gaps.append(time.perf_counter() - self._handed)
        self._handed = None

    def handed(self) -> None:
        """Note that a batch is handed out."""
        self._handed = time.perf_counter()

    def step(self, wait: Callable[[], None]) -> float | None:
        """Return the seconds of a step since the last call, or None if there was none.

        Args:
            wait: waits for what the device has still to do; that is shared out among the steps.
        """
        start = time.perf_counter()
        wait()
        waited = time.perf_counter() - start
        gaps, self._gaps = self._gaps, []
        # The median, for there may be an evaluation between two steps, or a compilation.
        return median(gaps) + waited / len(gaps) if gaps else None
