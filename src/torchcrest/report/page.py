"""The page about a comparison: the verdict first, then what it rests on."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from torchcrest.errors import ConfigError, must
from torchcrest.report.canvas import PHASES
from torchcrest.report.figures import Curve, Picture, accuracy, checks, data_in_use, differences, quality, spending
from torchcrest.report.hardness import Gallery, excluded, galleries, selections, trained_difficulty
from torchcrest.report.reproduce import compare_command, flat, train_command
from torchcrest.report.table import NOTHING, Row, columns, rows_of, short
from torchcrest.train.collect import Collected, Finished, collect
from torchcrest.train.files import blocked, replacing
from torchcrest.train.methods import METHODS, find_method
from torchcrest.train.scores import Scores, read_scores
from torchcrest.train.verdict import Verdict, label, notes, to_accuracy

__all__ = ["render", "report"]

AXES = {"seconds": "seconds", "step": "optimizer steps", "examples_trained": "examples trained on"}
AGAIN = "again"  # folder of the commands: not the one that is there


def report(folder: Path, out: Path, targets: Sequence[float] | None = None) -> Path:
    """Write a page about the finished runs of a comparison: one HTML file that needs nothing else.

    Args:
        folder: of the runs.
        out: the file to write.
        targets: accuracies, from 0 to 1, to tell when each method reaches them; by default 90, 95 and 99 %
            of the best.

    Returns:
        The file.

    Raises:
        ConfigError: nothing to report, runs that cannot be compared, a target out of range, no place for the
            file, or matplotlib is missing.
        DataError: a file of a run is damaged.
    """
    collected = collect(folder)
    if out.is_dir() or blocked(out.parent):
        do = "There is a folder of that name, or a file where its folder should be: choose another --out."
        raise ConfigError(must("out", "be a file in a folder", str(out), do))
    for target in targets or ():
        if not 0 < target <= 1:
            raise ConfigError(must("targets", "be in (0, 1]", target, "0.95 asks when a method reaches 95 %."))
    page = render(collected, targets)
    with replacing(out) as file:
        file.write(page.encode())
    return out


def render(collected: Collected, targets: Sequence[float] | None = None) -> str:
    """Return the page as HTML; the same runs give the same text.

    Args:
        collected: the runs.
        targets: as in :func:`report`.
    """
    rows = rows_of(collected)
    extra = {(row.cell.method, row.cell.budget) for row in rows if row.extra}
    runs = [run for run in collected.runs if _cell(run) not in extra]
    config, first = runs[0].config, runs[0].summary
    summaries = [run.summary for run in collected.runs]
    verdicts = _ordered([row.verdict for row in rows if row.verdict])
    hardness, shown = _hardness(runs)
    template = resources.files("torchcrest.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(template).render(
        task=Path(config["task"].removeprefix("npz:")).name,
        config=config,
        first=first,
        seeds=len({run.summary["seed"] for run in runs}),
        methods=list(METHODS),
        verdicts=[(verdict, _clauses(verdict.sentence)) for verdict in verdicts],
        against_random=_against_random(verdicts),
        notes=notes(summaries, verdicts),
        missing=_missing(rows),
        tables=[columns([row for row in rows if row.extra is extra]) for extra in (False, True)],
        budgets=_by_budget(rows, collected.runs),
        inside=_inside(runs),
        hardness=hardness,
        galleries=shown,
        milestones=_milestones(runs, targets),
        energy=_energy(runs),
        settings=_settings(runs),
        compare=compare_command(runs, AGAIN),
        commands=[(run.name, train_command(run, f"{AGAIN}/{run.name}")) for run in collected.runs],
        caveats=_caveats(collected, verdicts, config),
    )


def _cell(run: Finished) -> tuple[str, float]:
    return run.summary["method"], run.summary["budget"]


def _mean(runs: Sequence[Finished], key: str) -> float:
    return statistics.fmean(run.summary[key] for run in runs)


def _groups(runs: Sequence[Finished]) -> dict[tuple[str, float], list[Finished]]:
    found: dict[tuple[str, float], list[Finished]] = {}
    for run in runs:
        found.setdefault(_cell(run), []).append(run)
    return found


# Words ----------------------------------------------------------------------------------------------------------


def _ordered(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Put CREST first and the reference last."""
    return sorted(verdicts, key=lambda verdict: (verdict.method != "crest", verdict.method == "full"))


def _clauses(sentence: str) -> list[list[tuple[str, bool]]]:
    """Split a sentence into clauses, and each into what is said and what is said aside, in brackets.

    >>> _clauses("crest is behind (95 %: 1 to 2); it took longer")
    [[('crest is behind ', False), ('(95 %: 1 to 2)', True)], [('it took longer.', False)]]
    """
    clauses = f"{sentence}.".split("; ")
    parts = [re.split(r"(\([^()]*\))", clause) for clause in clauses]
    return [[(words, words.startswith("(")) for words in each if words] for each in parts]


def _missing(rows: Sequence[Row]) -> list[str]:
    """Say what was not run, and what the page lacks for it; the verdicts themselves miss random data."""
    methods = {row.cell.method for row in rows}
    lacks = {
        "crest": "CREST itself was not run",
        "full": "Full training was not run, so it is not said how much each method falls short of it",
    }
    return [f"{words}: add {method} to --methods." for method, words in lacks.items() if method not in methods]


def _caveats(collected: Collected, verdicts: Sequence[Verdict], config: dict[str, Any]) -> list[str]:
    rates = {run.config["learning_rate"] for run in collected.runs}
    used = f"one, {rates.pop():g}, for all" if len(rates) == 1 else "the ones below"
    found = [
        f"Every method has its own best learning rate, and this comparison used {used}. Search it for each method "
        "before you decide between them.",
        "Accuracy is that of the last step, not the best on the way. The clock counts training and selection; it "
        "leaves out evaluation, writing and the first reading of the data.",
    ]
    between = [
        f"{label(v.method, v.budget)} between {' and '.join(label('random', b) for b in sorted(v.budgets))}"
        for v in verdicts
        if len(v.budgets) == 2
    ]
    if between:
        found.append(
            "Where no random data took the same time, its accuracy is read off a straight line: "
            f"{'; '.join(between)}. Accuracy rises fast, then slowly, so the line runs too low: kind to the method."
        )
    if len({run.summary["seed"] for run in collected.runs}) == 1:
        found.append("One seed shows no spread: a difference may be chance.")
    if collected.unfinished:
        found.append(f"Left out, for they are not finished: {', '.join(collected.unfinished)}.")
    return found


# Figures --------------------------------------------------------------------------------------------------------


def _against_random(verdicts: Sequence[Verdict]) -> Picture | None:
    rows = [(v.method, label(v.method, v.budget), v.equal_time, v.equal_steps) for v in verdicts]
    rows = [row for row in rows if row[2] or row[3]]
    return differences(rows) if rows else None


def _by_budget(rows: Sequence[Row], runs: Sequence[Finished]) -> list[tuple[float, list[Picture]]]:
    """Draw accuracy over training for each budget, with the methods that ignore it."""
    groups = _groups(runs)
    whole = [cell for cell in groups if find_method(cell[0]).whole]
    asked = dict.fromkeys(row.cell.budget for row in rows if not row.extra and not find_method(row.cell.method).whole)
    random = [cell for cell in groups if cell[0] == "random"]
    found = []
    for budget in asked or {1.0: None}:
        cells = whole + [cell for cell in groups if cell[1] == budget and cell not in whole]
        curves = [Curve(method, method, groups[method, share]) for method, share in cells]
        others = [Curve("random", "random", groups[cell]) for cell in random if cell not in cells]
        pictures = [accuracy(curves, others, key, name, f"{budget:g}") for key, name in AXES.items()]
        found.append((budget, pictures))
    return found


def _inside(runs: Sequence[Finished]) -> list[Picture]:
    """Draw where the time went, and what CREST and its like did with the data."""
    groups = _groups(runs)

    def spent(group: Sequence[Finished]) -> dict[str, float]:
        seconds = {phase: _mean(group, f"seconds_{phase}") for phase in PHASES if phase != "training"}
        return {"training": _mean(group, "seconds") - sum(seconds.values()), **seconds}

    short_ones = {cell: group for cell, group in groups.items() if not find_method(cell[0]).whole}
    aside = "Full training, which only trains, is left out." if len(groups) > len(short_ones) > 0 else ""
    drawn = [spending([(label(*cell), spent(group)) for cell, group in (short_ones or groups).items()], aside)]
    of_crest = [(group[0], label(*cell)) for cell, group in groups.items() if cell[0] == "crest"]
    drawn += [picture for draw in (checks, quality) for run in of_crest if (picture := draw(*run))]
    data = data_in_use([Curve(cell[0], label(*cell), group) for cell, group in groups.items()])
    return [*drawn, *([data] if data else [])]


def _hardness(runs: Sequence[Finished]) -> tuple[list[Picture], list[Gallery]]:
    """Draw what runs that kept a record have learned of the examples."""
    scores: dict[str, Scores] = {}
    for run in runs:
        if (found := read_scores(run.folder)) is not None:
            scores[run.name] = found
    kept = {cell: [run for run in group if run.name in scores] for cell, group in _groups(runs).items()}
    kept = {cell: group for cell, group in kept.items() if group}
    if not kept:
        return [], []
    whose = [group[0] for method in ("full", "random") for (name, _), group in kept.items() if name == method]
    reference = scores[whose[0].name] if whose else None
    curves = [(Curve(c[0], label(*c), g), [scores[run.name] for run in g]) for c, g in kept.items()]
    pictures = [trained_difficulty(curves, reference)]
    shown: list[Gallery] = []
    for cell, (run, *_) in kept.items():
        if cell[0] == "crest":
            pictures += [selections(scores[run.name], label(*cell)), *filter(None, [excluded(run, label(*cell))])]
            shown = shown or galleries(scores[run.name], label(*cell))
    return pictures, shown


# Tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """When a method reaches a target, as it is written: medians over the seeds that do."""

    seconds: str
    examples: str
    fastest: bool
    aside: str


def _milestones(runs: Sequence[Finished], targets: Sequence[float] | None) -> dict[str, Any]:
    """Return targets, and for each method at each budget when it reaches them."""
    found = to_accuracy([(run.summary, run.evaluations) for run in runs], targets)
    fastest = {
        target: min((m.seconds for m in found if m.target == target and m.seconds and m.reached == m.n), default=None)
        for target in dict.fromkeys(m.target for m in found)
    }
    rows: dict[str, list[Reached]] = {}
    for m in found:
        some = f"{m.reached} of {m.n}" if 0 < m.reached < m.n else ""
        seconds = NOTHING if m.seconds is None else f"{m.seconds:.{2 if m.seconds < 10 else 1}f}"
        examples = NOTHING if m.examples is None else short(m.examples)
        best = m.reached == m.n and m.seconds == fastest[m.target]
        rows.setdefault(label(m.method, m.budget), []).append(Reached(seconds, examples, best, some))
    return {"targets": [f"{100 * target:.1f} %" for target in fastest], "rows": rows}


def _energy(runs: Sequence[Finished]) -> dict[str, list[float]]:
    """Return watt-hours for training, for all else and in all, means over seeds, where they were measured."""
    found = {}
    for cell, group in _groups(runs).items():
        measured = [run.summary["energy_kwh"] for run in group if run.summary.get("energy_kwh")]
        if measured:
            training = 1000 * statistics.fmean(each.get("training", 0.0) for each in measured)
            total = 1000 * statistics.fmean(sum(each.values()) for each in measured)
            found[label(*cell)] = [training, total - training, total]
    return found


def _settings(runs: Sequence[Finished]) -> dict[str, list[tuple[str, str]]]:
    """Return what was set, and what it ran on: for all, then for methods that have settings of their own."""
    found: dict[str, dict[str, list[str]]] = {"All runs": {}, "Made with": {}}

    def note(group: str, name: str, value: Any) -> None:
        values = found.setdefault(group, {}).setdefault(name, [])
        if str(value) not in values:
            values.append(str(value))

    own_rates = len({run.config["learning_rate"] for run in runs}) > 1
    for run in runs:
        for name, value in flat(run.config):
            if name in ("method", "budget", "seed"):
                continue
            if name == "learning_rate" and own_rates:
                name = f"{run.config['method']}.{name}"
            group, _, own = name.rpartition(".")
            note(group or "All runs", own, value)
    for run in runs:
        for name, value in run.summary.get("versions", {}).items():
            note("Made with", name, value)
        note("Made with", "device", run.summary["device"])
        note("Made with", "runs at a time", run.summary.get("processes", 1))
    return {group: [(name, ", ".join(values)) for name, values in each.items()] for group, each in found.items()}
