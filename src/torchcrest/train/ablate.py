"""What each part of CREST does: runs with one part changed at a time, against those as they are set."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchcrest.checks import suggest
from torchcrest.errors import ConfigError, TorchcrestError, must
from torchcrest.train.compare import Begin, FailedRuns, compare, plan, run_name
from torchcrest.train.files import RunFiles
from torchcrest.train.run import Status, prepare
from torchcrest.train.settings import RunSettings

__all__ = ["COLUMNS", "LEGEND", "VARIANTS", "ablate", "rows", "variants"]

BASE = "crest"
VARIANTS: dict[str, dict[str, Any]] = {
    "first-order": {"curvature": "first_order"},
    "rms-curvature": {"curvature": "rms"},
    "signed-curvature": {"curvature": "signed"},
    "no-smoothing": {"curvature": "unsmoothed"},
    "no-exclusion": {"exclude": False},
    "any-visits": {"max_extra_visits": None},
    "uniform-weights": {"weight_power": 0.0},
    "global-selection": {"stratify": False},
    "equal-shares": {"quotas": "share"},
    "labels-as-right": {"label_noise": 0.0},
    "own-forward": {"proxy_source": "forward"},
    "checked": {"check": "paired"},
    "whole-last-layer": {"proxy": "last_layer"},
}
COLUMNS = ["variant", "n", "error %", "more", "reg.", "sel%", "seconds"]
LEGEND = (
    "error: 1 - test accuracy. more: than crest as set, seed by seed. reg.: regions.\n"
    "sel%: share of seconds selecting and checking."
)


def variants(settings: RunSettings, names: Sequence[str] = tuple(VARIANTS)) -> dict[str, RunSettings]:
    """List the settings to compare: as they are, then with one part changed, where that changes something.

    Args:
        settings: of ``crest``.
        names: of :data:`VARIANTS`.

    Raises:
        ConfigError: an unknown name, or a change that does not go with the settings.
    """
    problems = [
        must("variants", f"be some of {', '.join(VARIANTS)}", name, suggest(name, VARIANTS))
        for name in names
        if name not in VARIANTS
    ]
    if problems:
        raise ConfigError(problems)
    found = {BASE: settings}
    for name in names:
        try:
            changed = replace(settings.crest, **VARIANTS[name])
        except ConfigError as error:
            problems.append(f"{name}: {error} Leave that variant out.")
            continue
        if changed != settings.crest:
            found[name] = replace(settings, crest=changed)
    if problems:
        raise ConfigError(problems)
    return found


def ablate(
    asked: dict[str, RunSettings],
    budget: float,
    seeds: Sequence[int],
    folder: Path,
    *,
    begin: Begin | None = None,
    say: Callable[[str], None] = lambda line: None,
    **how: Any,
) -> list[dict[str, Any]]:
    """Run what is missing and return all summaries, variant by variant; a folder each holds its runs.

    Args:
        asked: from :func:`variants`.
        budget: share of the full run's steps.
        seeds: each variant runs with each.
        folder: holds the folders.
        begin: as for :func:`torchcrest.train.compare.compare`, like the others.
        say: as there.
        how: as there.

    Returns:
        the summaries, with their ``variant``.

    Raises:
        ConfigError: a run cannot work; found before any is begun, like the next.
        CheckpointError: a run that is there was made with other settings.
        FailedRuns: some of the runs failed, after all others came to their end.
        Interrupted: stopped on request.
    """
    runs = {name: plan(settings, ["crest"], [budget], seeds) for name, settings in asked.items()}
    task = prepare(runs[BASE][0])[0]
    for note in task.notes:
        say(note)
    for name, some in runs.items():
        for run in some:
            resolved, files = prepare(run, task)[1], RunFiles(folder / name / run_name(run))
            if files.config.exists():
                resolved.refuse_other(files.read_config(), files.config)
    found: list[dict[str, Any]] = []
    failed: dict[str, TorchcrestError] = {}
    for name, some in runs.items():

        def named(run: str, name: str = name) -> Callable[[Status], None]:
            assert begin
            return begin(f"{name}/{run}")

        try:
            done = compare(some, folder / name, begin=begin and named, equal_time=False, task=task, **how)
        except FailedRuns as error:
            failed |= {f"{name}/{run}": reason for run, reason in error.failed.items()}
            done = error.summaries
        found += [{**summary, "variant": name} for summary in done]
    if failed:
        raise FailedRuns(failed, found)
    return found


def rows(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the entries of :data:`COLUMNS`, as text, a row a variant."""
    found: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        found.setdefault(summary["variant"], []).append(summary)
    base = {summary["seed"]: summary["accuracy"] for summary in found.get(BASE, [])}
    return [_row(name, runs, base) for name, runs in found.items()]


def _row(name: str, runs: Sequence[dict[str, Any]], base: dict[int, float]) -> list[str]:
    errors = [100 * (1 - run["accuracy"]) for run in runs]
    more = [100 * (base[run["seed"]] - run["accuracy"]) for run in runs if run["seed"] in base]
    spent = sum(run["seconds_selecting"] + run["seconds_checking"] + run["seconds_curvature"] for run in runs)
    seconds = [run["seconds"] for run in runs]
    return [
        name,
        str(len(runs)),
        f"{statistics.fmean(errors):.2f}{_spread(errors)}",
        "" if name == BASE or not more else f"{statistics.fmean(more):+.2f}{_spread(more)}",
        f"{statistics.fmean(run['regions'] for run in runs):,.0f}",
        f"{100 * spent / sum(seconds):.0f}",
        f"{statistics.fmean(seconds):.1f}",
    ]


def _spread(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
