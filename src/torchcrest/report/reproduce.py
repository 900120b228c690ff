"""The commands that make the runs of a comparison again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torchcrest.train.collect import Finished
from torchcrest.train.methods import find_method
from torchcrest.train.settings import RunSettings

__all__ = ["compare_command", "flat", "train_command"]

APART = {"task", "method", "budget", "seed"}  # said before the other settings


def train_command(run: Finished, out: str) -> str:
    """Return the command of one run, with the settings that are not the defaults.

    Args:
        run: from :func:`torchcrest.train.collect.collect`.
        out: folder for what it makes.
    """
    config = run.config
    own = [*("--method", config["method"]), *("--budget", _word(config["budget"])), *("--seed", _word(config["seed"]))]
    return shlex.join(["torchcrest", "train", config["task"], *own, *_flags(config), "--out", out])


def compare_command(runs: Sequence[Finished], out: str) -> str:
    """Return the command of all the runs.

    Args:
        runs: without those of random data that the command adds by itself.
        out: folder for what it makes.
    """
    configs = [run.config for run in runs]
    methods = dict.fromkeys(config["method"] for config in configs)
    budgets = sorted({config["budget"] for config in configs if not find_method(config["method"]).whole})
    rates = {config["method"]: config["learning_rate"] for config in configs}
    usual = next(iter(rates.values()))
    own = [f"{method}={_word(rate)}" for method, rate in rates.items() if rate != usual]
    lists: dict[str, Iterable[Any]] = {
        "--methods": methods,
        "--budget": budgets,
        "--seeds": sorted({config["seed"] for config in configs}),
    }
    if own:
        lists["--rates"] = own
    flags = [word for flag, values in lists.items() if values for word in (flag, *map(_word, values))]
    settings: dict[str, Any] = {name: value for config in reversed(configs) for name, value in config.items()}
    return shlex.join(["torchcrest", "compare", configs[0]["task"], *flags, *_flags(settings), "--out", out])


def flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name the settings inside another one with a dot, as the command does.

    >>> dict(flat({"epochs": 3, "crest": {"pool_size": 64}}))
    {'epochs': 3, 'crest.pool_size': 64}
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items())
        else:
            yield name, value


def _flags(config: Mapping[str, Any]) -> list[str]:
    defaults = dict(flat(asdict(RunSettings(task=""))))
    changed = {name: value for name, value in flat(config) if name not in APART and value != defaults.get(name)}
    return [word for name, value in changed.items() for word in (f"--{name}", _word(value))]


def _word(value: Any) -> str:
    """Write a value as the command reads it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
