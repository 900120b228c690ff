"""Read the runs of a comparison back from its folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchcrest.errors import ConfigError, DataError, must
from torchcrest.train.files import RunFiles
from torchcrest.train.methods import CONFIGS, METHODS

__all__ = ["Collected", "Finished", "collect", "only_run"]

AGAIN = "Move the run's folder away and run it again."
# Of config.yaml: what tells the runs of a comparison apart, and what changes only how fast they are.
FREE = {"method", "budget", "seed", "device", "num_workers"}
OWN = ("learning_rate",)  # settings that each method may have its own of
TEXT = {"task", "method", "device"}  # of summary.json; the others are numbers
NUMBERS = {
    *(
        "budget",
        "seed",
        "accuracy",
        "steps",
        "full_steps",
        "examples_trained",
        "examples_forwarded",
        "regions",
        "examples",
    ),
    *("seconds", "seconds_selecting", "seconds_checking", "seconds_curvature"),
}
EVALUATION = {"step", "seconds", "accuracy", "examples_trained"}


@dataclass(frozen=True)
class Finished:
    """A run that came to its end.

    Attributes:
        name: of its folder.
        folder: where it is.
        config: config.yaml.
        summary: summary.json.
        evaluations: the lines of metrics.jsonl that measure accuracy, the last one at the last step.
        events: its other lines.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]


@dataclass(frozen=True)
class Collected:
    """The runs below a folder.

    Attributes:
        runs: the finished ones, by method, budget and seed.
        unfinished: names of the others.
    """

    runs: list[Finished]
    unfinished: list[str]


def collect(folder: Path) -> Collected:
    """Read the runs of a comparison, or a single one.

    Args:
        folder: holds a folder for each run, or is that of a run.

    Raises:
        ConfigError: there is no finished run, or runs that cannot be compared: of other tasks or settings, or
            the same one twice.
        DataError: a file of a finished run is damaged or lost.
    """
    found = _find(folder)
    if problems := [*_differing(found.runs), *_twice(found.runs)]:
        raise ConfigError(problems)
    return found


def only_run(folder: Path) -> Finished:
    """Read one run: the folder's own, or the only one in it.

    Args:
        folder: of a run, or holds a single one; what lies beside a run in its own folder is not looked at.

    Raises:
        ConfigError: there is no finished run, or several.
        DataError: a file of the run is damaged or lost.
    """
    files = RunFiles(folder)
    if files.finished():
        return _read(files)
    runs = _find(folder).runs
    if len(runs) > 1:
        some = ", ".join(str(run.folder) for run in runs[:3])
        do = f"Name one of them: {some}{', ...' if len(runs) > 3 else '.'}"
        raise ConfigError(must(str(folder), "be the folder of one run", f"{len(runs)} runs", do))
    return runs[0]


def _find(folder: Path) -> Collected:
    """Read all runs, whether or not they can be compared."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        raise ConfigError(must(str(folder), "be a folder of runs", got, "Give the --out of torchcrest compare."))
    files = [RunFiles(path) for path in (folder, *sorted(folder.iterdir())) if path.is_dir()]
    begun = [each for each in files if each.began()]
    unfinished = [each.folder.resolve().name for each in begun if not each.finished()]
    if not begun:
        raise ConfigError(must(str(folder), "hold runs", "none", "Give the --out of torchcrest compare."))
    if len(unfinished) == len(begun):
        do = "Give the same torchcrest compare once more: it goes on with them."
        raise ConfigError(must(str(folder), "hold finished runs", f"only begun ones: {', '.join(unfinished)}", do))
    return Collected(sorted((_read(each) for each in begun if each.finished()), key=_place), unfinished)


def _place(run: Finished) -> tuple[int, float, int]:
    summary = run.summary
    return list(METHODS).index(summary["method"]), summary["budget"], summary["seed"]


def _read(files: RunFiles) -> Finished:
    for path in (files.config, files.metrics):
        if not path.exists():
            raise DataError(must(str(path), "be there, as the run is finished", "nothing", AGAIN))
    config, summary, lines = files.read_config(), files.read_summary(), files.read_metrics()
    _require(files.summary, summary, TEXT, NUMBERS)
    if summary["method"] not in METHODS:
        do = "A newer torchcrest made it: use that one."
        raise DataError(must(f"method in {files.summary}", f"be one of {', '.join(METHODS)}", summary["method"], do))
    _require(files.config, config, {"task", "method", "model"}, {"budget", "seed", "learning_rate"})
    own = config["method"]
    if own in CONFIGS and not isinstance(config.get(own), dict):
        raise DataError(must(f"{own} in {files.config}", "hold the method's settings", config.get(own), AGAIN))
    evaluations = [line for line in lines if line.get("event") == "evaluation"]
    for evaluation in evaluations:
        _require(files.metrics, evaluation, set(), EVALUATION)
    last = evaluations[-1]["step"] if evaluations else "none"
    if last != summary["steps"]:
        want = f"end with an evaluation at step {summary['steps']}"
        raise DataError(must(str(files.metrics), want, last, f"Lines are lost. {AGAIN}"))
    events = [line for line in lines if line.get("event") != "evaluation"]
    return Finished(files.folder.resolve().name, files.folder, config, summary, evaluations, events)


def _require(path: Path, found: Mapping[str, Any], text: set[str], numbers: set[str]) -> None:
    """Refuse entries that are lost or of another kind."""
    for name in sorted(text | numbers):
        value = found.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not (isinstance(value, str) if name in text else number):
            want = "be text" if name in text else "be a number"
            raise DataError(must(f"{name} in {path}", want, value, f"The file is damaged. {AGAIN}"))


def _differing(runs: Sequence[Finished]) -> Iterator[str]:
    """Name the settings that differ and should not; a method's own ones need not be those of another."""
    common: dict[str, dict[str, Any]] = {}
    own: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        common[run.name] = {k: v for k, v in run.config.items() if not isinstance(v, dict) and k not in FREE}
        groups = {k: v for k, v in run.config.items() if isinstance(v, dict)}
        flat = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
        flat |= {name: common[run.name].pop(name) for name in OWN if name in common[run.name]}
        own.setdefault(run.summary["method"], {})[run.name] = flat
    for settings in (common, *own.values()):
        for name in dict.fromkeys(name for each in settings.values() for name in each):
            found: dict[str, list[str]] = {}
            for run_name, each in settings.items():
                found.setdefault(repr(each.get(name)), []).append(run_name)
            if len(found) > 1:
                got = "; ".join(f"{value} in {_some(names)}" for value, names in found.items())
                do = "Report them apart: give each comparison its own --out."
                yield must(name, "be the same in all runs", got, do)


def _twice(runs: Sequence[Finished]) -> Iterator[str]:
    names: dict[tuple[int, float, int], list[str]] = {}
    for run in runs:
        names.setdefault(_place(run), []).append(run.name)
    for same in names.values():
        if len(same) > 1:
            yield must("a method, budget and seed", "have one run", ", ".join(same), "Move the others away.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
