"""What a comparison says: accuracy against random data, seed by seed, at equal time and at equal steps."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchcrest.train.methods import find_method

__all__ = [
    "FEW_SEEDS",
    "ROUNDS",
    "Difference",
    "Milestone",
    "Verdict",
    "bootstrap",
    "budgets_wanted",
    "judge",
    "label",
    "notes",
    "reach",
    "targets_of",
    "to_accuracy",
]

Summary = Mapping[str, Any]
Runs = dict[int, Summary]  # of one method at one budget, by seed

FEW_SEEDS = "95 % intervals of 2 to 4 seeds are too narrow: such a difference may be chance. Five seeds say more."
ENUMERATED = 6  # seeds up to which all resamples are looked at
RESAMPLES = 10_000
EQUAL = 0.02  # times that differ by a smaller share are equal
CLOSE = 1.5  # budgets within this factor may be interpolated between
TRIED = 0.05  # a run within this share of the time is one that was meant to take it
BEYOND = 1.03  # how far past the mark the next try aims
ROUNDS = 3  # tries


@dataclass(frozen=True)
class Difference:
    """A mean over seeds of accuracy differences, from -1 to 1.

    Attributes:
        mean: above 0 where the method is ahead.
        low: lower end of the 95 % interval; None for a single seed.
        high: upper end.
        n: seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Verdict:
    """How a method at one budget stands against random data.

    Attributes:
        method: its name.
        budget: share of the full run's steps.
        equal_steps: against random data of as many steps; None where it was not run.
        equal_time: against random data of as many seconds, or against full training where the method took
            longer than that; None where it was not run.
        budgets: random's at equal time: one, or two that were interpolated between.
        sentence: all of it in words; accuracies in points.
    """

    method: str
    budget: float
    equal_steps: Difference | None
    equal_time: Difference | None
    budgets: tuple[float, ...]
    sentence: str


@dataclass(frozen=True)
class Milestone:
    """When the runs of a method at one budget reach an accuracy: medians over the seeds that do.

    Attributes:
        method: its name.
        budget: share of the full run's steps.
        target: accuracy, from 0 to 1.
        seconds: on the training clock; None, like the next two, where no seed reaches it.
        examples: trained on.
        steps: optimizer steps.
        reached: seeds that reach it.
        n: seeds.
    """

    method: str
    budget: float
    target: float
    seconds: float | None
    examples: float | None
    steps: float | None
    reached: int
    n: int


def label(method: str, budget: float) -> str:
    """Name a method at a budget.

    >>> label("crest", 0.1), label("full", 1.0)
    ('crest 0.1', 'full')
    """
    return method if find_method(method).whole else f"{method} {budget:.4g}"


def bootstrap(differences: Sequence[float]) -> Difference:
    """Return the mean and its 95 % percentile interval, over resamples of the seeds with replacement.

    Up to 6 seeds all n^n resamples count; above, 10,000 drawn by a generator of its own.

    Args:
        differences: one a seed.
    """
    values, n = np.asarray(differences, dtype=float), len(differences)
    if n == 1:
        return Difference(float(values[0]), None, None, 1)
    if n <= ENUMERATED:
        resamples = np.array(list(itertools.product(values, repeat=n)))
    else:
        resamples = values[np.random.default_rng(0).integers(n, size=(RESAMPLES, n))]
    low, high = np.quantile(resamples.mean(axis=1), [0.025, 0.975])
    return Difference(float(values.mean()), float(low), float(high), n)


def judge(summaries: Sequence[Summary]) -> list[Verdict]:
    """Compare each method at each budget with random data, in order of appearance.

    Args:
        summaries: of finished runs. ``full`` counts as random data at budget 1.
    """
    random = _random(summaries)
    return [
        _verdict(method, budget, runs, random)
        for (method, budget), runs in _cells(summaries).items()
        if method != "random"
    ]


def notes(summaries: Sequence[Summary], verdicts: Sequence[Verdict]) -> list[str]:
    """Return what has to be said once about all verdicts: few seeds, times that are not alike."""
    found = []
    if any(d and 2 <= d.n <= 4 for verdict in verdicts for d in (verdict.equal_steps, verdict.equal_time)):
        found.append(FEW_SEEDS)
    for how, values in (
        ("{} at a time", {str(s.get("processes", 1)) for s in summaries}),
        ("on {}", {str(s["device"]) for s in summaries}),
    ):
        if len(values) > 1:
            found.append(f"Seconds are not alike: runs were made {how.format(' and '.join(sorted(values)))}.")
    return found


def budgets_wanted(summaries: Sequence[Summary]) -> list[float]:
    """Return the budgets at which random data must still be run, so that each method meets it at equal time.

    None for a method that random data of some budget equals in time (within 2 %), that two close budgets
    bracket, or that took longer than full training.

    Args:
        summaries: of finished runs.

    Returns:
        Budgets in (0, 1], the smallest first, no two within 2 %; each stands for a whole number of steps.
    """
    random = _random(summaries)
    wanted = set()
    for (method, _), runs in _cells(summaries).items():
        if method in ("random", "full") or not (shared := _shared(runs, random)):
            continue
        full_steps = next(iter(runs.values()))["full_steps"]
        paces, seconds = _paces(random, shared[0]), _seconds(runs, shared[0])
        if _opponents(paces, seconds, full_steps):
            continue
        steps = _steps_wanted(paces, seconds, full_steps)
        if steps not in {pace.steps for pace in paces}:
            wanted.add((steps, full_steps))
    kept: list[tuple[int, int]] = []
    for steps, full_steps in sorted(wanted):
        if not kept or steps > (1 + EQUAL) * kept[-1][0]:
            kept.append((steps, full_steps))
    return [_budget(*each) for each in kept]


def reach(evaluations: Iterable[Mapping[str, Any]], target: float) -> tuple[float, int, int] | None:
    """Return seconds, examples trained on and steps at the first evaluation at or above an accuracy.

    >>> reach([{"accuracy": 0.9, "seconds": 2.5, "examples_trained": 640, "step": 40}], 0.9)
    (2.5, 640, 40)
    """
    for e in evaluations:
        if e["accuracy"] >= target:
            return e["seconds"], e["examples_trained"], e["step"]
    return None


def targets_of(summaries: Sequence[Summary]) -> list[float]:
    """Return 90, 95 and 99 % of the best mean accuracy of any method."""
    best = max(statistics.fmean(s["accuracy"] for s in runs.values()) for runs in _cells(summaries).values())
    return [share * best for share in (0.9, 0.95, 0.99)]


def to_accuracy(
    runs: Sequence[tuple[Summary, Sequence[Mapping[str, Any]]]], targets: Sequence[float] | None = None
) -> list[Milestone]:
    """Tell when each method at each budget reaches each target.

    Args:
        runs: the summary and the evaluations of each.
        targets: accuracies, from 0 to 1; by default those of :func:`targets_of`.
    """
    groups: dict[tuple[str, float], list[Sequence[Mapping[str, Any]]]] = {}
    for summary, evaluations in runs:
        groups.setdefault((summary["method"], summary["budget"]), []).append(evaluations)
    found = []
    for target in targets_of([summary for summary, _ in runs]) if targets is None else targets:
        for (method, budget), curves in groups.items():
            reached = [point for point in (reach(curve, target) for curve in curves) if point]
            seconds, examples, steps = map(statistics.median, zip(*reached, strict=True)) if reached else (None,) * 3
            found.append(Milestone(method, budget, target, seconds, examples, steps, len(reached), len(curves)))
    return found


# Random data of as many steps, or seconds -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Pace:
    """Random data of one budget: mean seconds, and accuracies in the order of the seeds."""

    budget: float
    steps: int
    seconds: float
    accuracies: list[float]


def _cells(summaries: Iterable[Summary]) -> dict[tuple[str, float], Runs]:
    found: dict[tuple[str, float], Runs] = {}
    for summary in summaries:
        found.setdefault((summary["method"], summary["budget"]), {})[summary["seed"]] = summary
    return found


def _random(summaries: Sequence[Summary]) -> dict[int, Runs]:
    """Gather random data by steps; full training is random data of all steps."""
    found: dict[int, Runs] = {}
    for method in ("random", "full"):
        for summary in summaries:
            if summary["method"] == method:
                found.setdefault(summary["steps"], {}).setdefault(summary["seed"], summary)
    return found


def _shared(runs: Runs, random: dict[int, Runs]) -> list[list[int]]:
    """List the sets of seeds that the runs have in common with random data of one or two budgets, largest first."""
    sets = {frozenset(runs.keys() & a.keys() & b.keys()) for a in random.values() for b in random.values()}
    return sorted((sorted(seeds) for seeds in sets if seeds), key=lambda seeds: (-len(seeds), seeds))


def _seconds(runs: Runs, seeds: Sequence[int]) -> float:
    """Average over seeds: how the clock varies is the machine's doing, not the seed's."""
    return statistics.fmean(runs[seed]["seconds"] for seed in seeds)


def _paces(random: dict[int, Runs], seeds: Sequence[int]) -> list[_Pace]:
    """Return random data of each budget that has all the seeds, the fastest first."""
    paces = [
        _Pace(runs[seeds[0]]["budget"], steps, _seconds(runs, seeds), [runs[seed]["accuracy"] for seed in seeds])
        for steps, runs in random.items()
        if runs.keys() >= set(seeds)
    ]
    return sorted(paces, key=lambda pace: (pace.seconds, pace.steps))


def _around(paces: Sequence[_Pace], seconds: float) -> tuple[_Pace, ...]:
    """Return the two paces that the time lies between, or none."""
    pairs = itertools.pairwise(paces)
    return next((pair for pair in pairs if pair[0].seconds < seconds < pair[1].seconds), ())


def _opponents(paces: Sequence[_Pace], seconds: float, full_steps: int) -> tuple[_Pace, ...]:
    """Return the pace of that time, or two close ones around it, or full training if it was faster; else none.

    Accuracy bends: on a straight line between far budgets random data would look worse than it is.
    """
    nearest = min(paces, key=lambda pace: abs(pace.seconds - seconds))
    if abs(nearest.seconds - seconds) <= EQUAL * seconds:
        return (nearest,)
    if pair := _around(paces, seconds):
        low, high = pair
        tried = seconds <= (1 + TRIED) * low.seconds or seconds >= (1 - TRIED) * high.seconds
        return pair if tried or high.steps <= CLOSE * low.steps else ()
    return tuple(pace for pace in paces if pace.steps >= full_steps and pace.seconds < seconds)


def _accuracies(paces: tuple[_Pace, ...], seconds: float) -> list[float]:
    """Return random's accuracy a seed; of two paces, what a straight line between them says."""
    if len(paces) == 1:
        return paces[0].accuracies
    low, high = paces
    share = (seconds - low.seconds) / (high.seconds - low.seconds)
    return [a + share * (b - a) for a, b in zip(low.accuracies, high.accuracies, strict=True)]


def _steps_wanted(paces: Sequence[_Pace], seconds: float, full_steps: int) -> int:
    """Return how many steps of random data would take that time, where no pace there is will do."""
    if pair := _around(paces, seconds):
        low, high = pair
        share = (seconds - low.seconds) / (high.seconds - low.seconds)
        return round(low.steps + share * (high.steps - low.steps))
    longer = seconds > paces[-1].seconds
    by_steps = sorted(paces, key=lambda pace: pace.steps, reverse=longer)
    end, other = by_steps[0], by_steps[-1]
    rate = end.seconds / end.steps
    if other.seconds != end.seconds:  # what a run takes to get going drops out
        rate = (other.seconds - end.seconds) / (other.steps - end.steps)
    wanted = end.steps + (seconds - end.seconds) / rate
    if abs(seconds - end.seconds) <= TRIED * seconds:  # tried, and came out short or long: aim beyond
        wanted *= BEYOND if longer else 1 / BEYOND
    return min(max(end.steps + 1, round(wanted)), full_steps) if longer else max(1, min(end.steps - 1, round(wanted)))


def _budget(steps: int, full_steps: int) -> float:
    """Return the shortest decimal that stands for so many steps, so that equal plans give equal folders.

    >>> _budget(1307, 8000)
    0.1634
    """
    shortened = (round(steps / full_steps, digits) for digits in range(1, 17))
    return next(budget for budget in shortened if round(budget * full_steps) == steps)


# Words ----------------------------------------------------------------------------------------------------------


def _verdict(method: str, budget: float, runs: Runs, random: dict[int, Runs]) -> Verdict:
    name = label(method, budget)
    if method == "full":
        reference = statistics.fmean(run["accuracy"] for run in runs.values())
        return Verdict(method, budget, None, None, (), f"{name} is the reference: {100 * reference:.2f} %")
    first = next(iter(runs.values()))
    alike = random.get(first["steps"], {})
    seeds = sorted(runs.keys() & alike.keys())
    equal_steps = _difference(runs, seeds, [alike[seed]["accuracy"] for seed in seeds]) if seeds else None
    tail = _steps_words(equal_steps) if equal_steps else ""
    shared = _shared(runs, random)
    for seeds in shared:
        seconds = _seconds(runs, seeds)
        if found := _opponents(_paces(random, seeds), seconds, first["full_steps"]):
            slower = seconds > (1 + EQUAL) * found[-1].seconds
            other = "full training (which took less time)" if slower else "random at equal time"
            difference = _difference(runs, seeds, _accuracies(found, seconds))
            budgets = tuple(pace.budget for pace in found)
            return Verdict(
                method, budget, equal_steps, difference, budgets, _time_words(name, other, difference) + tail
            )
    if not any(run["method"] == "random" for each in random.values() for run in each.values()):
        words = f"{name} has no random data to be compared with: add random to --methods"
    elif not shared:
        words = f"{name} has no seed in common with random: give both the same --seeds"
    else:
        steps = _steps_wanted(_paces(random, shared[0]), _seconds(runs, shared[0]), first["full_steps"])
        budget_wanted = _budget(steps, first["full_steps"])
        words = f"{name} has no random data of equal time to be compared with: random {budget_wanted} may take as long"
    return Verdict(method, budget, equal_steps, None, (), words + tail)


def _difference(runs: Runs, seeds: Sequence[int], others: Sequence[float]) -> Difference:
    return bootstrap([runs[seed]["accuracy"] - other for seed, other in zip(seeds, others, strict=True)])


def _time_words(name: str, other: str, difference: Difference) -> str:
    points, n = _points(abs(difference.mean)), difference.n
    ahead = difference.mean >= 0
    if difference.low is None or difference.high is None:
        lead = "level with" if points == "0" else f"{points} points {'ahead of' if ahead else 'behind'}"
        return f"{name} is {lead} {other}, but one seed decides nothing"
    if difference.low > 0 or difference.high < 0:
        return f"{name} {'beats' if ahead else 'loses to'} {other} by {points} points ({_span(difference)}, n = {n})"
    lead = "level" if points == "0" else f"{points} points {'ahead' if ahead else 'behind'}"
    return f"{name} is no different from {other} ({lead}, {_span(difference)}, n = {n})"


def _steps_words(difference: Difference) -> str:
    points = _points(abs(difference.mean))
    lead = f"{'ahead' if difference.mean >= 0 else 'behind'} by {points} points"
    span = "" if difference.low is None else f" ({_span(difference)})"
    return f"; at equal steps it is {'level' if points == '0' else lead}{span}"


def _span(difference: Difference) -> str:
    """Write the interval in the direction of the words: of points behind where the method is behind."""
    assert difference.low is not None
    assert difference.high is not None
    low, high = difference.low, difference.high
    if difference.mean < 0:
        low, high = -high, -low
    return f"95 %: {_points(low)} to {_points(high)}"


def _points(difference: float) -> str:
    """Write an accuracy difference in points, with a second decimal where the first says nothing.

    >>> [_points(x) for x in (0.0123, -0.0004, 0.0)]
    ['1.2', '-0.04', '0']
    """
    return next((text for text in (f"{100 * difference:.1f}", f"{100 * difference:.2f}") if float(text)), "0")
