"""Refuse settings that cannot work: all problems of a configuration in one message."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from torchcrest.errors import ConfigError, must

__all__ = ["Checks", "suggest"]


def suggest(word: str, known: Iterable[Any]) -> str:
    """Say which of the known words may have been meant.

    >>> suggest("randm", ["random", "crest"])
    'Did you mean random?'
    """
    known = [str(k) for k in known]
    close = get_close_matches(str(word), known, n=1)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."


class Checks:
    """Looks at the fields of a configuration one by one and collects what is wrong with them.

    Each check takes the field's name, and what to do where it fails; it returns whether the field is fine.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._problems: dict[str, str] = {}

    def close(self) -> None:
        """Raise what was found.

        Raises:
            ConfigError: anything was.
        """
        if self._problems:
            raise ConfigError(list(self._problems.values()))

    def fine(self, name: str) -> bool:
        """Tell whether nothing was found about a field."""
        return name not in self._problems

    def that(self, name: str, good: bool, want: str, do: str) -> bool:
        """Note a problem unless the field is good."""
        if not good:
            self._problems[name] = must(name, want, getattr(self._config, name), do)
        return good

    def whole(self, name: str, least: int, do: str) -> bool:
        """A whole number."""
        value = getattr(self._config, name)
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return self.that(name, good, f"be a whole number of at least {least}", do)

    def above_zero(self, name: str, do: str) -> bool:
        """A finite number above 0."""
        return self.that(name, self._number(name) and getattr(self._config, name) > 0, "be a number above 0", do)

    def at_least_zero(self, name: str, do: str) -> bool:
        """A finite number of at least 0."""
        good = self._number(name) and getattr(self._config, name) >= 0
        return self.that(name, good, "be a number of at least 0", do)

    def share(self, name: str, do: str) -> bool:
        """A share, less than all."""
        return self.that(name, self._number(name) and 0 <= getattr(self._config, name) < 1, "be in [0, 1)", do)

    def steps_or_share(self, name: str, do: str, unit: str = "steps") -> bool:
        """A whole number of something, or a share of all of it."""
        value = getattr(self._config, name)
        if isinstance(value, int):
            return self.whole(name, 1, f"Give {unit}, or a share such as 0.1.")
        return self.that(
            name, self._number(name) and 0 < value <= 1, f"be {unit} (a whole number) or a share in (0, 1]", do
        )

    def choice(self, name: str, choices: tuple[str, ...]) -> bool:
        """One of some words."""
        value = getattr(self._config, name)
        return self.that(name, value in choices, f"be one of {', '.join(choices)}", suggest(value, choices))

    def flag(self, name: str) -> bool:
        """True or False."""
        good = isinstance(getattr(self._config, name), bool)
        return self.that(name, good, "be True or False", "It switches a part of the algorithm.")

    def _number(self, name: str) -> bool:
        value = getattr(self._config, name)
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
