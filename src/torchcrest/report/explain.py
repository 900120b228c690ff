"""What a run has learned of its examples: in words, as a table for others, and as a sheet of suspected label errors."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchcrest.config import steps_of
from torchcrest.errors import ConfigError, DataError, must
from torchcrest.train.collect import Finished, only_run
from torchcrest.train.files import blocked, replacing
from torchcrest.train.scores import COLUMNS, Scores, read_log, read_scores, shown_of
from torchcrest.train.sources import optional
from torchcrest.train.tasks import load

__all__ = ["explain", "export", "story", "suspect_sheet"]

LISTED = 10  # examples in a list
ACROSS = 10  # pictures side by side
RECORD = "Train with --difficulty true."


def explain(folder: Path, count: int = LISTED) -> list[str]:
    """Say what a run has learned of its examples: how many were forgotten, the most and least selected, suspects.

    Args:
        folder: of a finished run.
        count: how many examples of each kind.

    Returns:
        Sentences and lists, line by line.

    Raises:
        ConfigError: there is no finished run, or it kept no record.
        DataError: a file of the run is damaged.
    """
    run, scores = _run(folder)
    n, seen = len(scores), scores["seen"] > 0
    forgotten, ever = scores["forgotten"], scores["ever_learned"]
    gone = int((scores["excluded"] >= 0).sum())
    lines = [
        f"{run.name}: {n:,} examples, of which {_share(seen, n)} were seen, "
        f"{_share(scores['trained'] > 0, n)} trained on and {_share(scores['picked'] > 0, n)} picked for a coreset.",
        f"Learned at some time: {_share(ever, n)}; seen and never learned: {_share(seen & ~ever, n)}; "
        f"forgotten at least once: {_share(forgotten > 0, n)} ({forgotten.mean():.2f} times on average).",
    ]
    if gone:
        last = next((e["excluded_accuracy"] for e in reversed(run.events) if e["event"] == "difficulty"), None)
        right = "" if last is None else f"; in the end {100 * last:.1f} % of them were predicted right"
        lines.append(f"Set aside as learned: {_share(scores['excluded'] >= 0, n)}{right}.")
    ends = scores.ends(count)
    titles = {"most": "Most selected", "least": "Least selected"}
    for key, rows in [*ends.items(), ("suspects", scores.suspects(count))]:
        title = titles.get(key, "Suspected label errors: those never learned first, then by mean loss")
        lines += ["", f"{title}:", *(_line(scores, row) for row in rows.tolist())]
    return lines


def story(folder: Path, example: int) -> list[str]:
    """Tell what happened to an example: when it was seen, pooled, picked, trained on and set aside.

    Args:
        folder: of a finished run that kept a log.
        example: its position in the training data.

    Raises:
        ConfigError: there is no finished run, it kept no log, or has no such example.
        DataError: a file of the run is damaged.
    """
    run, scores = _run(folder)
    log = read_log(run.folder)
    if log is None:
        do = "Train with --difficulty true --picks true."
        raise ConfigError(must(str(folder), "hold picks.npz, the log that tells it", "none", do))
    if not 0 <= example < len(scores):
        do = "It is a position in the training data."
        raise ConfigError(must("example", f"be from 0 to {len(scores) - 1}", example, do))
    happened = sorted(_events(run, scores, log, example))
    return [_line(scores, example), *(f"  step {step:>6}  {words}" for step, _, words in happened)]


def _events(run: Finished, scores: Scores, log: dict[str, Any], example: int) -> Iterator[tuple[int, int, str]]:
    """Yield step, place within the step, and words."""

    def entries(table: str, *names: str) -> Iterator[tuple[Any, ...]]:
        if f"{table}_index" in log:
            at = np.flatnonzero(log[f"{table}_index"] == example)
            yield from zip(*(log[f"{table}_{name}"][at].tolist() for name in ("step", *names)), strict=True)

    for step, loss, learned in entries("seen", "loss", "learned"):
        yield step, 1, f"seen with loss {loss:.3g}, {'learned' if learned else 'not learned'}"
    for step, weight in entries("pooled", "weight"):
        yield step, 2, f"in a pool, {f'picked with weight {weight:.3g}' if weight else 'not picked'}"
    for step, weight in entries("trained", "weight"):
        yield step, 0, f"trained on with weight {weight:.3g}"
    gone = int(scores["excluded"][example])
    if gone >= 0:
        crest = run.config["crest"]
        interval = steps_of(crest["learned_interval"], run.summary["steps"])
        why = f"each loss measured in the {interval} steps before was below {crest['learned_loss']:g}"
        yield gone, 3, f"set aside: {why}"


def export(folder: Path, path: Path) -> None:
    """Write the scores of all examples, a row each, as comma-separated values or Parquet.

    Args:
        folder: of a finished run.
        path: ends in .csv or .parquet.

    Raises:
        ConfigError: there is no finished run, it kept no record, the file is of another kind or has no place, or
            what writes Parquet is missing.
        DataError: a file of the run is damaged.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(must("export", "end in .csv or .parquet", str(path), "Choose one of the two."))
    _refuse_no_place("export", path)
    scores = _run(folder)[1]
    rank = np.zeros(len(scores), np.int64)
    suspects = scores.suspects(len(scores))
    rank[suspects] = np.arange(1, len(suspects) + 1)
    columns = {"example": np.arange(len(scores)), **{name: scores[name] for name in COLUMNS}, "suspect_rank": rank}
    if path.suffix == ".parquet":
        table = optional("pyarrow", "Parquet").table(columns)
        parquet = optional("pyarrow.parquet", "Parquet")
        with replacing(path) as file:
            parquet.write_table(table, file)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def suspect_sheet(folder: Path, path: Path, count: int) -> None:
    """Draw the suspected label errors with their labels; read from the data once more.

    Args:
        folder: of a finished run on images.
        path: the picture, in the format of its ending.
        count: how many.

    Raises:
        ConfigError: there is no finished run, it kept no record, the data are no images, the file has no place, or
            matplotlib is missing.
        DataError: the data, or a file of the run, are damaged or gone.
    """
    _refuse_no_place("suspects", path)
    run, scores = _run(folder)
    rows = scores.suspects(count)
    if scores.pictures is None:
        do = "Leave --suspects out: the list names them."
        raise ConfigError(must("suspects", "be images", "texts" if scores.texts is not None else "vectors", do))
    task = load(run.config["task"], data=run.config.get("data"), augment=False)
    if len(task.train) != len(scores):
        do = "They have changed: train again."
        want = f"hold the {len(scores)} training examples of the run"
        raise DataError(must(run.config["task"], want, len(task.train), do))
    pictures = shown_of(task, rows)["pictures"]
    _draw(pictures, [f"{row}: {label}" for row, label in zip(rows, scores["label"][rows], strict=True)], path)


def _draw(pictures: Any, titles: Sequence[str], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        do = "Run pip install 'torchcrest[plot]'."
        raise ConfigError(must("matplotlib", "be installed", str(error), do)) from error
    down = -(-len(titles) // ACROSS)
    figure = Figure(figsize=(ACROSS, 1.25 * down), layout="constrained")
    for axes in figure.subplots(down, ACROSS, squeeze=False).flat:
        axes.axis("off")
    for axes, picture, title in zip(figure.axes, pictures, titles, strict=False):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=8)
    try:
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix.lstrip(".") or "png", dpi=100)
    except ValueError as error:
        raise ConfigError(must("suspects", "be a picture, like suspects.png", str(path), str(error))) from error


def _run(folder: Path) -> tuple[Finished, Scores]:
    run = only_run(folder)
    scores = read_scores(run.folder)
    if scores is None:
        raise ConfigError(must(str(folder), "hold examples.npz, a record of its examples", "none", RECORD))
    return run, scores


def _refuse_no_place(name: str, path: Path) -> None:
    if path.is_dir() or blocked(path.parent):
        raise ConfigError(must(name, "be a file in a folder", str(path), "Name the file to write."))


def _line(scores: Scores, row: int) -> str:
    """Describe an example in a line."""
    of = {name: scores[name][row].item() for name in COLUMNS}
    chosen = f"picked {of['picked']} of {of['pooled']} times, " if of["pooled"] else ""
    learned = "never learned" if not of["ever_learned"] else f"forgotten {of['forgotten']} x"
    words = f"{chosen}trained on {of['trained']} x, {learned}, mean loss {of['mean_loss']:.3g}"
    text = "" if scores.texts is None else "".join(scores.texts[scores.shown == row])
    return f"  {row:>7}  label {of['label']:>3}  {words}" + (f"  {text!r}" if text else "")


def _share(which: Any, n: int) -> str:
    return f"{100 * float(np.sum(which)) / n:.1f} %"
