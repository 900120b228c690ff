"""The figures of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from torchcrest.report.canvas import INKS, LETTER, PHASES, axes_of, drawing, legend, name, scale, svg_of, tick
from torchcrest.report.table import MINUS, signed
from torchcrest.train.collect import Finished
from torchcrest.train.verdict import Difference

__all__ = ["Curve", "Picture", "accuracy", "checks", "data_in_use", "differences", "late", "quality", "spending"]

MOST_MARKS = 400  # of a kind in a figure
LOUD = ("crest", "random")  # who stands against whom
IN_USE = ("active", "kept", "examples")  # of events: CREST's, InfoBatch's, those of methods that pick a subset


@dataclass(frozen=True)
class Picture:
    """A figure for the page.

    Attributes:
        svg: the drawing, with a name and a description for those who do not see it.
        title: what it shows.
        caption: how to read it.
    """

    svg: Markup
    title: str
    caption: str


@dataclass(frozen=True)
class Curve:
    """Runs that differ only in their seeds.

    Attributes:
        method: its name.
        label: as it is written beside the line.
        runs: one a seed.
    """

    method: str
    label: str
    runs: Sequence[Finished]

    def points(self, key: str) -> np.ndarray[Any, Any]:
        """Return a figure of the evaluations that all seeds have, ``[seeds, evaluations]``."""
        steps = set.intersection(*({e["step"] for e in run.evaluations} for run in self.runs))
        return np.array([[e[key] for e in run.evaluations if e["step"] in steps] for run in self.runs])

    def end(self, key: str) -> float:
        """Return the mean of a figure at the end of training."""
        return float(self.points(key)[:, -1].mean())

    @property
    def width(self) -> float:
        """How thick its line is, in pixels."""
        return 2.4 if self.method in LOUD else 1.6


def late(ends: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """Return limits, in %, that show the end of training, where methods differ; what fails may end below.

    Args:
        ends: methods and their last accuracies, in %.
    """
    core = [end for method, end in ends if method in (*LOUD, "full")] or [end for _, end in ends]
    reach = max(3 * (max(core) - min(core)), 3.0)
    shown = [end for _, end in ends if end >= min(core) - reach]
    span = max(max(shown) - min(shown), 1.0)
    return max(0.0, min(shown) - 0.8 * span), min(100.0, max(shown) + 0.15 * span)


def accuracy(curves: Sequence[Curve], others: Sequence[Curve], key: str, axis: str, salt: str) -> Picture:
    """Draw test accuracy over training: means over seeds, and the range of the seeds.

    Args:
        curves: one a method.
        others: random data of other lengths, of which only the ends are drawn.
        key: of the evaluations: what is on the horizontal axis.
        axis: its name.
        salt: as in :func:`torchcrest.report.canvas.drawing`.
    """
    ends = [(curve.method, 100 * curve.end("accuracy")) for curve in curves]
    last = [curve.end(key) for curve in (*curves, *others)]
    bottom, top = late(ends)
    log = max(last) > 6 * min(last)
    labels = [c.label if end >= bottom else f"{c.label} ↓ {end:.0f}" for c, (_, end) in zip(curves, ends, strict=True)]
    with drawing(f"accuracy-{key}-{salt}"):
        figure, axes = axes_of(290, left=34, right=26 + LETTER * max(map(len, labels)))
        seen = []
        for curve in curves:
            x, y = curve.points(key).mean(0), 100 * curve.points("accuracy")
            look: dict[str, Any] = {"color": INKS[f"m-{curve.method}"], "zorder": 4 if curve.method in LOUD else 3}
            axes.plot(x, y.mean(0), lw=curve.width, ls=(0, (4, 2)) if curve.method == "truncated" else "-", **look)
            if len(y) > 1:
                axes.fill_between(x, y.min(0), y.max(0), alpha=0.13, lw=0, **look)
            seen += x[y.mean(0) >= bottom].tolist()
            top = max(top, min(100.0, float(y[:, -1].max()) + 0.05 * (top - bottom)))
        for curve in others:
            look = {"mec": INKS["m-random"], "mfc": INKS["paper"], "ms": 5, "zorder": 5}
            axes.plot(curve.end(key), 100 * curve.end("accuracy"), "s", **look)
        left, right = min(seen), max(last)
        room = 0.06 * (right - left or right)
        left, right = (left / 1.25, right * 1.15) if log else (max(0.0, left - room), right + room)
        axes.set(xlim=(left, right), ylim=(bottom, top), xlabel=axis + (", log scale" if log else ""))
        axes.set_title("test accuracy, %")
        scale(axes.yaxis)
        scale(axes.xaxis)
        if log:
            axes.set_xscale("log")
            axes.set_xticks(_round(left, right), [tick(x) for x in _round(left, right)])
            axes.minorticks_off()
        at = [curve.end(key) for curve in curves]
        name(figure, axes, [(m, words, x, y) for (m, y), words, x in zip(ends, labels, at, strict=True)])
        said = [f"{c.label} {y:.2f} % at {tick(x)}" for c, (_, y), x in zip(curves, ends, at, strict=True)]
        svg = svg_of(figure, f"Test accuracy against {axis}", f"At the end of training: {'; '.join(said)}.")
    seeds = max(len(curve.runs) for curve in curves)
    caption = f"Lines: means of {seeds} seeds; bands: lowest to highest." if seeds > 1 else "One seed."
    if others:
        caption += " Hollow squares: where random data of other lengths ends."
    return Picture(svg, f"Against {axis}", caption)


def _round(low: float, high: float) -> list[float]:
    """Return few round numbers between the two for a logarithmic axis.

    >>> _round(0.15, 2.1), _round(90, 11_000)
    ([0.2, 0.5, 1.0, 2.0], [100.0, 300.0, 1000.0, 3000.0, 10000.0])
    """
    heads = (1, 2, 5) if high < 40 * low else (1, 3) if high < 300 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [x for power in powers for x in (float(f"{head}e{power}") for head in heads) if low <= x <= high]


def differences(rows: Sequence[tuple[str, str, Difference | None, Difference | None]]) -> Picture:
    """Draw how far methods are ahead of random data.

    Args:
        rows: method, label, difference at equal time, difference at equal steps; one of these at least.
    """
    ends = [(method, 100 * end) for method, _, *both in rows for d in both if d for end in _ends(d)]
    core = [abs(x) for method, x in ends if method == "crest"] or [statistics.median(abs(x) for _, x in ends)]
    reach = max(4 * max(core), 2.0)  # what fails must not press the others together
    with drawing("differences"):
        margin = 14 + LETTER * max(len(label) for _, label, *_ in rows)
        figure, axes = axes_of(78 + 40 * len(rows), left=margin, right=14, top=32, bottom=44)
        axes.axvline(0, color=INKS["ink"], lw=1.2, zorder=2)
        inside = [x for _, x in ends if abs(x) <= reach] + [-0.2, 0.2]
        room = 0.06 * (max(inside) - min(inside))
        axes.set(xlim=(min(inside) - room, max(inside) + room), ylim=(len(rows) - 0.5, -0.6))
        for k, (method, _, *both) in enumerate(rows):
            ink = INKS[f"m-{method}"]
            looks = ((k - 0.14, ink, 8, 2.4), (k + 0.16, INKS["paper"], 6.5, 1.4))
            for difference, (y, face, size, width) in zip(both, looks, strict=True):
                if difference is None:
                    continue
                mean, low, high = (100 * x for x in _ends(difference))
                if abs(mean) <= reach:
                    axes.plot([low, high], [y, y], color=ink, lw=width, zorder=3)
                    axes.plot(mean, y, "o", color=ink, mfc=face, ms=size, mew=1.4, zorder=4)
                else:
                    place, side = (0.02, "left") if mean < 0 else (0.98, "right")
                    words = f"{'←' if mean < 0 else '→'} {signed(difference.mean)}"
                    where = axes.get_yaxis_transform()
                    axes.text(place, y, words, color=ink, ha=side, va="center", transform=where)
        axes.yaxis.grid(False)
        axes.set_yticks(range(len(rows)), [label for _, label, *_ in rows], color=INKS["ink"])
        scale(axes.xaxis, lambda x, _: f"{x:+.3g}".replace("-", MINUS) if abs(x) > 1e-9 else "0")
        axes.set_xlabel("accuracy points ahead of random data")
        marks = (("equal time", INKS["ink"]), ("equal steps", INKS["paper"]))
        legend(figure, [("o", INKS["ink"], face, words) for words, face in marks])
        said = [
            f"{label} {signed(d.mean)} at equal {what}"
            for _, label, *both in rows
            for d, what in zip(both, ("time", "steps"), strict=True)
            if d
        ]
        title = "Accuracy against random data"
        svg = svg_of(figure, title, f"In points: {'; '.join(said)}.")
    caption = "Means over seeds, paired; bars: 95 % intervals. Right of the line: better than random data."
    return Picture(svg, title, caption)


def _ends(difference: Difference) -> tuple[float, float, float]:
    """Return the mean and the ends of the interval, which for one seed are the mean."""
    mean, low, high = difference.mean, difference.low, difference.high
    return mean, mean if low is None else low, mean if high is None else high


def spending(rows: Sequence[tuple[str, Mapping[str, float]]], aside: str = "") -> Picture:
    """Draw what the seconds went into.

    Args:
        rows: labels, and seconds for each of :data:`torchcrest.report.canvas.PHASES`.
        aside: said below.
    """
    totals = [sum(spent.values()) for _, spent in rows]
    selecting = [total - spent["training"] for total, (_, spent) in zip(totals, rows, strict=True)]
    with drawing("spending"):
        margin = 14 + LETTER * max(len(label) for label, _ in rows)
        figure, axes = axes_of(78 + 26 * len(rows), left=margin, right=88, top=32, bottom=44)
        left = np.zeros(len(rows))
        for phase in PHASES:
            part = np.array([spent[phase] for _, spent in rows])
            axes.barh(range(len(rows)), part, 0.62, left, color=INKS[f"p-{phase}"], edgecolor=INKS["paper"], lw=0.6)
            left += part
        for k, (total, spare) in enumerate(zip(totals, selecting, strict=True)):
            share = f", {100 * spare / total:.0f} %" if spare else ""
            axes.text(total + 0.02 * max(totals), k, _seconds(total) + share, va="center")
        axes.set(xlim=(0, max(totals)), ylim=(len(rows) - 0.5, -0.5), xlabel="seconds, mean over seeds")
        axes.yaxis.grid(False)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows], color=INKS["ink"])
        scale(axes.xaxis)
        legend(figure, [("s", INKS["paper"], INKS[f"p-{phase}"], phase) for phase in PHASES])
        said = [
            f"{label} {_seconds(total)}, of which {_seconds(part)} not training"
            for (label, _), total, part in zip(rows, totals, selecting, strict=True)
        ]
        title = "Where the time went"
        svg = svg_of(figure, title, f"{'; '.join(said)}.")
    return Picture(svg, title, f"Beside a bar: its seconds, and the share that is not training. {aside}".strip())


def checks(run: Finished, label: str) -> Picture | None:
    """Draw the checks of a CREST run against the tolerance, and its intervals.

    Args:
        run: of ``crest``.
        label: of the runs it stands for.

    Returns:
        The figure; None where the run was to make no checks.
    """
    if run.config["crest"]["check"] == "none":
        return None
    tolerance, steps, ink = run.config["crest"]["tolerance"], run.summary["steps"], INKS["m-crest"]
    regions = [e for e in run.events if e["event"] == "region"]
    made = [e for e in run.events if e["event"] == "check" and math.isfinite(e["rho"])]
    errors = [max(e["rho"], tolerance / 100) for e in made]  # an error of 0 has no place on the axis
    every = max(1, math.ceil(len(made) / MOST_MARKS))
    with drawing(f"checks-{label}"):
        figure, (upper, lower) = axes_of(330, left=44, right=14, top=52, rows=2)
        upper.axhline(tolerance, color=INKS["ink"], lw=1.2, ls=(0, (4, 3)), zorder=2)
        for passed, mark in ((True, "o"), (False, "x")):
            marks = [(e["step"], y) for e, y in zip(made, errors, strict=True) if e["passed"] is passed][::every]
            upper.plot(*np.array(marks).reshape(-1, 2).T, mark, color=ink, mfc=INKS["paper"], ms=5.5, mew=1.4, zorder=3)
        low, high = min([tolerance, *errors]) / 2, max([tolerance, *errors]) * 2
        upper.set(yscale="log", ylim=(low, high))
        upper.set_title(f"error of the quadratic model; dashed: tolerance {tolerance:g}")
        upper.set_yticks(_round(low, high), [tick(y) for y in _round(low, high)])
        upper.minorticks_off()
        upper.tick_params(labelbottom=False)
        intervals = [e["interval"] for e in regions]
        lower.step([*(e["step"] for e in regions), steps], [*intervals, *intervals[-1:]], where="post", color=ink)
        lower.set(ylim=(0, 1.15 * max(intervals)), title="interval: steps between checks", xlabel="optimizer steps")
        for axes in (upper, lower):
            axes.set_xlim(0, steps)
            scale(axes.xaxis, whole=True)
        scale(lower.yaxis, whole=True)
        legend(figure, [("o", ink, INKS["paper"], "passed"), ("x", ink, ink, "failed: a new region")])
        words = f"{sum(e['passed'] for e in made)} of {len(made)} checks passed; regions: {len(regions)}"
        title = f"Checks of {label}"
        svg = svg_of(figure, title, f"{words}; tolerance {tolerance:g}.")
    caption = f"Seed {run.summary['seed']}: {words}." + (f" One mark stands for {every} checks." if every > 1 else "")
    return Picture(svg, title, caption)


def quality(run: Finished, label: str) -> Picture | None:
    """Draw bias and standard deviation of the coresets' gradients over training, against random batches.

    Args:
        run: of ``crest``.
        label: of the runs it stands for.

    Returns:
        The figure; None where the run has no estimates.
    """
    told = [e for e in run.events if e["event"] == "quality" and e["random_deviation"] > 0]
    if not told:
        return None
    steps, unit = [e["step"] for e in told], np.array([e["random_deviation"] for e in told])
    size, pool = run.config["batch_size"], run.config["crest"]["pool_size"]
    lines: list[tuple[str, str, Any, float, Any]] = [
        (f"random {size}", "random", "-", 1.6, np.ones(len(told))),
        (f"random {pool}", "random", (0, (4, 2)), 1.6, np.array([e["pool_deviation"] for e in told]) / unit),
        ("coreset", "crest", "-", 2.4, np.array([e["deviation"] for e in told]) / unit),
        ("its bias", "crest", (0, (1, 1.5)), 2.0, np.array([e["bias"] for e in told]) / unit),
        ("gradient / 3", "full", (0, (4, 3)), 1.2, np.array([e["gradient_norm"] for e in told]) / unit / 3),
    ]
    with drawing(f"quality-{label}"):
        figure, axes = axes_of(290, left=34, right=26 + LETTER * max(len(words) for words, *_ in lines))
        highest = max(1.0, *(float(np.quantile(y, 0.98)) for *_, y in lines[2:4]))
        axes.set(xlim=(0, run.summary["steps"]), ylim=(0, 1.15 * highest), xlabel="optimizer steps")
        for _, method, dashes, width, y in lines:
            axes.plot(steps, y, color=INKS[f"m-{method}"], ls=dashes, lw=width, zorder=3)
        axes.set_title(f"noise of gradients, and bias; random {size} = 1")
        scale(axes.xaxis, whole=True)
        scale(axes.yaxis)
        ends = [(method, words, steps[-1], min(float(y[-1]), 1.15 * highest)) for words, method, *_, y in lines]
        name(figure, axes, ends)
        title = f"Gradients of {label}"
        means = "; ".join(f"{words} {y.mean():.2f}" for words, *_, y in lines)
        svg = svg_of(figure, title, f"Standard deviations, and the bias, means over training: {means}.")
    bounded = 100 * statistics.fmean(e["bounded"] for e in told)
    over = 100 * statistics.fmean(e["bias"] > e["gradient_norm"] for e in told)
    said = [
        f"Seed {run.summary['seed']}, by proxy gradients: standard deviations of batches' gradients, and the bias of "
        f"coresets. It is below a third of the gradient's norm, as the theory wants it, {bounded:.0f} % of the time"
        + (f", and above the norm, where nothing is guaranteed, {over:.0f} %." if over else ".")
    ]
    worth, pay_off = run.summary.get("effective_batch_size"), run.summary.get("pay_off")
    if worth:
        said.append(f"A coreset of {size} has the noise of {worth:.0f} random examples.")
    if pay_off:
        less = "more" if pay_off > 1 else "less"
        said.append(f"That is {pay_off:.2f} times what its cost buys of them, {less} than random batches would give.")
        said.append("It counts where noise limits progress, not early on, where the size of steps does.")
    return Picture(svg, title, " ".join(said))


def data_in_use(curves: Sequence[Curve]) -> Picture | None:
    """Draw the share of the data that batches are drawn from; None where it is always all of it.

    Args:
        curves: one for each method at each budget; their first runs are drawn.
    """
    found = []
    for curve in curves:
        run = curve.runs[0]
        counts = [(e["step"], next((e[key] for key in IN_USE if key in e), None)) for e in run.events]
        shares = [(step, 100 * count / run.summary["examples"]) for step, count in counts if count is not None]
        if any(share < 99.9 for _, share in shares):
            found.append((curve, [*shares, (run.summary["steps"], shares[-1][1])]))
    if not found:
        return None
    with drawing("data"):
        figure, axes = axes_of(290, left=34, right=26 + LETTER * max(len(curve.label) for curve, _ in found))
        for curve, shares in found:
            axes.step(*zip(*shares, strict=True), where="post", color=INKS[f"m-{curve.method}"], lw=curve.width)
        axes.set(xlim=(0, max(shares[-1][0] for _, shares in found)), ylim=(0, 104), xlabel="optimizer steps")
        axes.set_title("share of the data, %")
        scale(axes.xaxis, whole=True)
        scale(axes.yaxis)
        name(figure, axes, [(curve.method, curve.label, *shares[-1]) for curve, shares in found])
        said = [f"{curve.label} {shares[-1][1]:.0f} %" for curve, shares in found]
        title = "Data that batches are drawn from"
        svg = svg_of(figure, title, f"At the end of training: {'; '.join(said)}.")
    seeds = dict.fromkeys(str(curve.runs[0].summary["seed"]) for curve, _ in found)
    return Picture(svg, title, f"Seed {', '.join(seeds)}. The rest is learned, or not chosen at the time.")


def _seconds(seconds: float) -> str:
    """Write seconds for a bar.

    >>> [_seconds(x) for x in (0.071, 2.51, 61.2, 5400)]
    ['0.07 s', '2.5 s', '61 s', '1.5 h']
    """
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds:.{2 if seconds < 1 else 1 if seconds < 10 else 0}f} s"
