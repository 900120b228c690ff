"""The picture of a comparison: accuracy against examples trained and against seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchcrest.errors import ConfigError, DataError, must
from torchcrest.train.compare import run_name
from torchcrest.train.files import RunFiles, replacing
from torchcrest.train.settings import RunSettings

__all__ = ["plot"]


def plot(runs: Sequence[RunSettings], folder: Path, path: Path) -> Path:
    """Draw test accuracy over training for the finished runs of a comparison.

    Args:
        runs: from :func:`torchcrest.train.compare.plan`.
        folder: where they are.
        path: the picture, in the format of its ending.

    Returns:
        The path.

    Raises:
        ConfigError: matplotlib is missing.
        DataError: a run has lost its metrics.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter
    except ImportError as error:
        raise ConfigError(
            must("matplotlib", "be installed", str(error), "Run pip install 'torchcrest[plot]'.")
        ) from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours: dict[str, str] = {}
    lowest, curves = [], []
    for run in runs:
        name = run_name(run).rpartition("-s")[0].replace("-", " ")
        first = name not in colours
        colour = colours.setdefault(name, f"C{len(colours)}")
        files = RunFiles(folder / run_name(run))
        points = [e for e in files.read_metrics() if e["event"] == "evaluation"]
        if not points:
            do = "Move the run's folder away and run it again."
            raise DataError(must(str(files.metrics), "hold evaluations", "none", do))
        accuracy = [100 * e["accuracy"] for e in points]
        lowest += accuracy[len(accuracy) // 3 :]
        curves.append((points, accuracy))
        for axis, key in zip(axes, ("examples_trained", "seconds"), strict=True):
            axis.plot(
                [e[key] for e in points], accuracy, color=colour, lw=1.2, alpha=0.8, label=name if first else None
            )
            axis.plot([points[-1][key]], accuracy[-1:], "o", color=colour, ms=5)
    for axis, label in zip(axes, ("examples trained on", "seconds, selection included"), strict=True):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[1].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[0].set_ylabel("test accuracy, %")
    # Later training is what tells methods apart: leave out what is far below, and the time before it.
    bottom = max(0.0, min(lowest, default=0.0) - 5)
    axes[0].set_ylim(bottom, min(100.5, max(lowest, default=100.0) + 2))
    for axis, key in zip(axes, ("examples_trained", "seconds"), strict=True):
        left = [p[key] for points, accuracy in curves for p, a in zip(points, accuracy, strict=True) if a >= bottom]
        axis.set_xlim(left=0.7 * min(left))
    axes[1].legend(loc="lower right", frameon=False)
    seeds = len({run.seed for run in runs})
    figure.suptitle(f"{_short(runs[0].task)}: {seeds} seed{'s' if seeds > 1 else ''}, a dot ends each run", fontsize=11)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.lstrip("."), dpi=150)
    return path


def _short(task: str) -> str:
    return Path(task.removeprefix("npz:")).name
