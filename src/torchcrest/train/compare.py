"""Several methods, budgets and seeds side by side: run what is missing, then put the figures in a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchcrest.errors import ConfigError, must
from torchcrest.train.files import RunFiles
from torchcrest.train.methods import find_method
from torchcrest.train.run import Status, prepare, train
from torchcrest.train.settings import RunSettings

__all__ = ["COLUMNS", "LEGEND", "Cell", "cells", "compare", "plan", "run_name"]

COLUMNS = [
    "method",
    "n",
    "accuracy %",
    "rel%",
    "steps",
    "train",
    "fwd",
    "seconds",
    "sel%",
    "reg.",
]
LEGEND = (
    "rel%: accuracy missing against full. train, fwd: examples trained on, measured.\n"
    "sel%: share of the seconds spent selecting and checking. reg.: regions."
)


def run_name(settings: RunSettings) -> str:
    """Return the folder of a run inside a comparison.

    >>> run_name(RunSettings(task="digits", method="crest", budget=0.1, seed=3))
    'crest-0.1-s3'
    """
    whole = find_method(settings.method).whole
    budget = "" if whole else f"-{settings.budget!r}"
    return f"{settings.method}{budget}-s{settings.seed}"


def plan(
    settings: RunSettings, methods: Sequence[str], budgets: Sequence[float], seeds: Sequence[int]
) -> list[RunSettings]:
    """List the runs of a comparison, each once, methods that ignore the budget once a seed.

    Raises:
        ConfigError: a list is empty, or an entry cannot work.
    """
    problems = [
        must(name, "name at least one", list(values), "Leave it out for the default.")
        for name, values in (("methods", methods), ("budget", budgets), ("seeds", seeds))
        if not values
    ]
    if problems:
        raise ConfigError(problems)
    for name, values in (("method", methods), ("budget", budgets), ("seed", seeds)):
        for value in values:
            try:
                changed: dict[str, Any] = {name: value}
                replace(settings, **changed)
            except ConfigError as error:
                problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    runs: dict[str, RunSettings] = {}
    for method in methods:
        for budget in budgets:
            for seed in seeds:
                share = 1.0 if find_method(method).whole else budget
                run = replace(settings, method=method, budget=share, seed=seed)
                runs.setdefault(run_name(run), run)
    return list(runs.values())


def compare(
    runs: Sequence[RunSettings],
    folder: Path,
    *,
    begin: Callable[[str], Callable[[Status], None]] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Run what is missing of a comparison and return all its summaries, in the order of the runs.

    Args:
        runs: from :func:`plan`.
        folder: holds a folder for each run.
        begin: called with the name of each run that is begun; returns its watcher.
        stop: asked after each step, as in :func:`torchcrest.train.run.train`.

    Raises:
        ConfigError: a run cannot work; found before any is begun, like the next.
        CheckpointError: a run that is there was made with other settings.
    """
    task = prepare(runs[0])[0]  # the same for all runs, but for the seed of augmentation
    for run in runs:
        resolved = prepare(run, task)[1]
        files = RunFiles(folder / run_name(run))
        if files.config.exists():
            resolved.refuse_other(files.read_config(), files.config)
    summaries = []
    for run in runs:
        files = RunFiles(folder / run_name(run))
        if files.finished():
            summaries.append(files.read_summary())
            continue
        watch = begin(run_name(run)) if begin else None
        summaries.append(train(run, files.folder, resume=True, watch=watch, stop=stop))
    return summaries


@dataclass(frozen=True)
class Cell:
    """The runs of one method at one budget, over seeds; figures are means, spreads standard deviations.

    Attributes:
        method: its name.
        budget: share of the full run's steps.
        n: runs.
        accuracy: from 0 to 1.
        accuracy_sd: 0 for a single run.
        relative_error: how much of full training's accuracy is missing, from 0 to 1; None without full runs.
        steps: optimizer steps.
        trained: examples trained on, repeats counted.
        forwarded: examples forwarded for selection.
        seconds: of training with selection.
        seconds_sd: 0 for a single run.
        selecting: share of the seconds spent on selection, checks and curvature.
        regions: quadratic models.
    """

    method: str
    budget: float
    n: int
    accuracy: float
    accuracy_sd: float
    relative_error: float | None
    steps: float
    trained: float
    forwarded: float
    seconds: float
    seconds_sd: float
    selecting: float
    regions: float

    def row(self) -> list[str]:
        """Return the entries of :data:`COLUMNS`, as text."""
        whole = find_method(self.method).whole
        spread = f" ± {100 * self.accuracy_sd:.2f}" if self.n > 1 else ""
        seconds_spread = f" ± {self.seconds_sd:.1f}" if self.n > 1 else ""
        return [
            self.method if whole else f"{self.method} {self.budget:.4g}",
            str(self.n),
            f"{100 * self.accuracy:.2f}{spread}",
            "-" if self.relative_error is None else f"{100 * self.relative_error:.2f}",
            f"{self.steps:,.0f}",
            _short(self.trained),
            _short(self.forwarded),
            f"{self.seconds:.1f}{seconds_spread}",
            f"{100 * self.selecting:.0f}",
            f"{self.regions:,.0f}",
        ]


def _short(count: float) -> str:
    """Write a count in three digits or so.

    >>> [_short(n) for n in (0, 950, 120_064, 1_200_000)]
    ['0', '950', '120k', '1.20M']
    """
    if count < 1000:
        return f"{count:.0f}"
    return f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.2f}M"


def cells(summaries: Sequence[dict[str, Any]]) -> list[Cell]:
    """Gather summaries into a cell for each method and budget, in order of appearance."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for summary in summaries:
        groups.setdefault((summary["method"], summary["budget"]), []).append(summary)
    full = [s["accuracy"] for s in summaries if s["method"] == "full"]
    best = statistics.fmean(full) if full else None

    def gather(method: str, budget: float, runs: list[dict[str, Any]]) -> Cell:
        def mean(key: str) -> float:
            return statistics.fmean(s[key] for s in runs)

        def spread(key: str) -> float:
            return statistics.stdev(s[key] for s in runs) if len(runs) > 1 else 0.0

        spent = sum(s["seconds_selecting"] + s["seconds_checking"] + s["seconds_curvature"] for s in runs)
        accuracy = mean("accuracy")
        return Cell(
            method=method,
            budget=budget,
            n=len(runs),
            accuracy=accuracy,
            accuracy_sd=spread("accuracy"),
            relative_error=1 - accuracy / best if best else None,
            steps=mean("steps"),
            trained=mean("examples_trained"),
            forwarded=mean("examples_forwarded"),
            seconds=mean("seconds"),
            seconds_sd=spread("seconds"),
            selecting=spent / sum(s["seconds"] for s in runs),
            regions=mean("regions"),
        )

    return [gather(method, budget, runs) for (method, budget), runs in groups.items()]
