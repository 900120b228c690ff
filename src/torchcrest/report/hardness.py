"""The figures about single examples: how hard they are, which are picked, which set aside, and what they are."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcrest.report.canvas import INKS, LETTER, axes_of, drawing, legend, name, scale, svg_of
from torchcrest.report.figures import Curve, Picture
from torchcrest.train.collect import Finished
from torchcrest.train.scores import Scores

__all__ = ["Gallery", "Tile", "excluded", "galleries", "selections", "trained_difficulty"]

TILES = 12  # examples in a gallery
BARS = 12  # counts that a histogram tells apart
# What a histogram tells apart: words, ink, mark, line.
KINDS: Sequence[tuple[str, str, str, Any]] = (
    ("never learned", "m-crest", "D", "-"),
    ("forgotten", "m-random", "s", (0, (4, 2))),
    ("kept", "soft", "o", (0, (1, 2))),
)

Array = NDArray[Any]


def trained_difficulty(curves: Sequence[tuple[Curve, Sequence[Scores]]], reference: Scores | None) -> Picture:
    """Draw how hard what was trained on is: mean forgetting events, in each tenth of the runs, and share not learned.

    Args:
        curves: one for each method at each budget, with the scores of its runs.
        reference: whose forgetting events to go by for all; None: each run goes by its own.
    """
    upper, lower = [], []
    for curve, runs in curves:
        means = []
        for scores in runs:
            forgotten = (reference or scores)["forgotten"].astype(np.float64)
            means.append([float(part @ forgotten) / max(int(part.sum()), 1) for part in scores.parts.astype(np.int64)])
        kept = runs[0].parts.sum(1) > 0  # a run of fewer steps has empty tenths
        ends = np.arange(1, len(kept) + 1) * curve.runs[0].summary["steps"] / len(kept)
        upper.append((curve, ends[kept], np.mean(means, 0)[kept]))
        lines = [[event for event in run.events if event["event"] == "difficulty"] for run in curve.runs]
        unlearned = np.array([[100 * event["trained_unlearned"] for event in each] for each in lines])
        lower.append((curve, np.array([event["step"] for event in lines[0]]), unlearned.mean(0)))
    title = "Difficulty of what is trained on"
    with drawing("trained-difficulty"):
        margin = 26 + LETTER * max(len(curve.label) for curve, _ in curves)
        figure, both = axes_of(420, left=40, right=margin, rows=2)
        for axes, found in zip(both, (upper, lower), strict=True):
            for curve, x, y in found:
                axes.plot(x, y, color=INKS[f"m-{curve.method}"], lw=curve.width)
            low, high = min(y.min() for *_, y in found), max(y.max() for *_, y in found)
            room = 0.1 * (high - low or 1)
            axes.set(xlim=(0, max(x[-1] for _, x, _ in found)), ylim=(max(0, low - room), high + room))
            scale(axes.xaxis, whole=True)
            scale(axes.yaxis)
            name(figure, axes, [(curve.method, curve.label, x[-1], y[-1]) for curve, x, y in found])
        both[0].set_title("mean forgetting events of an example")
        both[0].tick_params(labelbottom=False)
        both[1].set_title("share predicted wrong when trained on, %")
        both[1].set_xlabel("optimizer steps")
        said = [f"{curve.label} from {y[0]:.2f} to {y[-1]:.2f}" for curve, _, y in upper]
        wrong = [f"{curve.label} {y[-1]:.0f} %" for curve, _, y in lower]
        words = f"Forgetting events of an example trained on: {'; '.join(said)}. Predicted wrong: {'; '.join(wrong)}."
        svg = svg_of(figure, title, words)
    of = [reference] if reference else [scores for _, runs in curves for scores in runs]
    seen = np.mean([scores["seen"].mean() for scores in of])
    by = "the same count for all" if reference else "as each run counted them itself"
    caption = f"Means over seeds. Events of the whole run, {by}, which saw an example {seen:.1f} times."
    few = " That is few for a count of events." if seen < 10 else " Rising lines train on harder examples."
    return Picture(svg, title, caption + few)


def selections(scores: Scores, label: str) -> Picture:
    """Draw how often examples were picked for a coreset, for each kind of example.

    Args:
        scores: of a CREST run.
        label: of the run.
    """
    seen, ever, forgotten = scores["seen"] > 0, scores["ever_learned"], scores["forgotten"] > 0
    picked = scores["picked"].astype(np.int64)
    top = int(min(BARS - 1, picked.max()))
    title, said = f"Selections of {label}", []
    with drawing(f"selections-{label}"):
        figure, axes = axes_of(290, left=40, right=14, top=52)
        for (words, ink, mark, line), which in zip(
            KINDS, (seen & ~ever, ever & forgotten, ever & ~forgotten), strict=True
        ):
            if which.any():
                share = 100 * np.bincount(np.minimum(picked[which], top), minlength=top + 1) / which.sum()
                look: dict[str, Any] = {"mfc": INKS["paper"], "ms": 6, "mew": 1.3, "lw": 1.6, "ls": line}
                axes.plot(range(top + 1), share, mark, color=INKS[ink], **look)
                said.append(f"{words} ({which.sum():,}): {picked[which].mean():.2f} times")
        axes.set(xlabel="times picked for a coreset", ylim=(0, None))
        axes.set_title("share of the examples of a kind, %")
        more = top < picked.max()
        scale(axes.xaxis, lambda x, _: f"{x:.0f}+" if more and x == top else f"{x:.0f}", whole=True)
        scale(axes.yaxis)
        legend(figure, [(mark, INKS[ink], INKS["paper"], words) for words, ink, mark, _ in KINDS])
        svg = svg_of(figure, title, f"Picked on average: {'; '.join(said)}.")
    caption = f"On average: {'; '.join(said)}. Forgotten: learned, and later not; kept: learned and never forgotten."
    return Picture(svg, title, caption)


def excluded(run: Finished, label: str) -> Picture | None:
    """Draw the share of the data that was set aside, and whether it is still predicted right; None: nothing was.

    Args:
        run: with difficulty recorded.
        label: of the runs it stands for.
    """
    lines = [event for event in run.events if event["event"] == "difficulty"]
    measured = [event for event in lines if event["excluded_accuracy"] is not None]
    if not measured:
        return None
    ink, steps = INKS[f"m-{run.summary['method']}"], run.summary["steps"]
    title = f"Set aside by {label}"
    with drawing(f"excluded-{label}"):
        figure, (upper, lower) = axes_of(330, left=44, right=14, rows=2)
        shares = [100 * event["excluded"] / run.summary["examples"] for event in lines]
        rights = [100 * event["excluded_accuracy"] for event in measured]
        upper.plot([event["step"] for event in lines], shares, "o-", color=ink, mfc=INKS["paper"], ms=5.5, mew=1.4)
        lower.plot([event["step"] for event in measured], rights, "o-", color=ink, mfc=INKS["paper"], ms=5.5, mew=1.4)
        upper.set(title="share of the data set aside, %", ylim=(0, None))
        upper.tick_params(labelbottom=False)
        low = min(rights)
        lower.set(title="of these predicted right, %", xlabel="optimizer steps")
        lower.set_ylim(low - 0.15 * max(100 - low, 1), 100 + 0.15 * max(100 - low, 1))
        for axes in (upper, lower):
            axes.set_xlim(0, 1.02 * steps)
            scale(axes.xaxis, whole=True)
            scale(axes.yaxis)
        words = f"{shares[-1]:.0f} % set aside, of which {rights[-1]:.1f} % are predicted right"
        svg = svg_of(figure, title, f"At the end of training: {words}.")
    return Picture(svg, title, f"Seed {run.summary['seed']}, at the end: {words} (of a sample of 1,000 at most).")


@dataclass(frozen=True)
class Tile:
    """An example in a gallery.

    Attributes:
        picture: as a data address, or None.
        text: or None.
        label: words below it.
    """

    picture: str | None
    text: str | None
    label: str


@dataclass(frozen=True)
class Gallery:
    """Examples that have something in common.

    Attributes:
        title: what it is.
        tiles: the examples.
    """

    title: str
    tiles: list[Tile]


def galleries(scores: Scores, label: str) -> list[Gallery]:
    """Return the most and least selected examples and the suspected label errors, where there are pictures or texts.

    Args:
        scores: of a run.
        label: of the run.
    """
    if scores.pictures is None and scores.texts is None:
        return []
    ends = scores.ends(TILES)
    kinds = {
        f"Most selected by {label}": ends["most"],
        f"Least selected by {label}": ends["least"],
        f"Suspected label errors, by {label}": scores.suspects(TILES),
    }
    return [Gallery(title, [_tile(scores, row) for row in rows.tolist()]) for title, rows in kinds.items()]


def _tile(scores: Scores, row: int) -> Tile:
    (at, *_) = np.flatnonzero(scores.shown == row).tolist()
    picture = None if scores.pictures is None else f"data:image/png;base64,{_png(scores.pictures[at])}"
    text = None if scores.texts is None else str(scores.texts[at])
    times = scores["picked"][row] if scores["pooled"].any() else scores["trained"][row]
    return Tile(picture, text, f"No. {row}, label {scores['label'][row]}, {times} ×")


def _png(picture: Array) -> str:
    """Write a picture ``[H, W]`` or ``[H, W, 3]``, uint8, as PNG in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = picture.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if picture.ndim == 2 else 2, 0, 0, 0)
    rows = np.concatenate(
        [np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], 1
    )  # each begins with a filter
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()
