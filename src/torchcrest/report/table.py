"""The table of a comparison: what is in a row, and how it is written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchcrest.errors import ConfigError, must
from torchcrest.train.collect import Collected, collect
from torchcrest.train.compare import Cell, cells
from torchcrest.train.methods import find_method
from torchcrest.train.verdict import Difference, Verdict, judge, label

__all__ = ["FORMATS", "Column", "Entry", "Row", "columns", "rows_of", "short", "signed", "table"]

FORMATS = ("md", "csv", "json")
NOTHING = "-"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Row:
    """A method at a budget, beside random data.

    Attributes:
        cell: means and spreads over seeds.
        verdict: against random data; None for random data itself.
        extra: random data that was run only to meet others at equal time.
    """

    cell: Cell
    verdict: Verdict | None
    extra: bool

    @property
    def label(self) -> str:
        """The method, and the budget where it has one."""
        return label(self.cell.method, self.cell.budget)

    def plain(self) -> dict[str, Any]:
        """Return the row for machines: shares from 0 to 1, seconds, bytes; None where there is nothing."""
        found = {**asdict(self.cell), "extra": self.extra}
        for name in ("equal_steps", "equal_time"):
            difference: Difference | None = getattr(self.verdict, name, None)
            for part in ("mean", "low", "high", "n"):
                found[f"{name}_{part}"] = getattr(difference, part, None)
        return {**found, "verdict": self.verdict and self.verdict.sentence}


@dataclass(frozen=True)
class Entry:
    """What stands in a place of the table.

    Attributes:
        main: the figure.
        aside: its interval.
        sure: the interval leaves out 0.
    """

    main: str
    aside: str = ""
    sure: bool = False

    def __str__(self) -> str:
        return f"{self.main} ({self.aside})" if self.aside else self.main


@dataclass(frozen=True)
class Column:
    """A column of the table, an entry a row.

    Attributes:
        heading: with the unit.
        entries: as they are shown.
    """

    heading: str
    entries: list[Entry]


def rows_of(collected: Collected) -> list[Row]:
    """Put the figures of each method at each budget into a row, in order of appearance."""
    summaries = [run.summary for run in collected.runs]
    verdicts = {(verdict.method, verdict.budget): verdict for verdict in judge(summaries)}
    asked = {budget for method, budget in verdicts if not find_method(method).whole}

    def row(cell: Cell) -> Row:
        extra = cell.method == "random" and bool(asked) and cell.budget not in asked
        return Row(cell, verdicts.get((cell.method, cell.budget)), extra)

    return [row(cell) for cell in cells(summaries)]


def columns(rows: Sequence[Row]) -> list[Column]:
    """Write the table as it is shown; a column without any entry is left out."""

    def spread(mean: float, sd: float, n: int, digits: int) -> Entry:
        return Entry(f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if n > 1 else ""))

    found: dict[str, list[Entry]] = {}
    mixed = len({row.extra for row in rows}) > 1

    def enter(heading: str, entry: Entry | str | None) -> None:
        found.setdefault(heading, []).append(entry if isinstance(entry, Entry) else Entry(entry or NOTHING))

    for row in rows:
        cell, verdict = row.cell, row.verdict
        short_of, memory = cell.relative_error, cell.memory
        enter("Method", row.label + (" (for equal time)" if row.extra and mixed else ""))
        enter("Accuracy, %", spread(100 * cell.accuracy, 100 * cell.accuracy_sd, cell.n, 2))
        enter("Seeds", str(cell.n))
        enter("To random, equal time", _difference(verdict.equal_time if verdict else None))
        enter("To random, equal steps", _difference(verdict.equal_steps if verdict else None))
        enter("Seconds", spread(cell.seconds, cell.seconds_sd, cell.n, 2 if cell.seconds < 10 else 1))
        enter("Selecting, %", f"{100 * cell.selecting:.0f}")
        enter("Short of full, %", None if short_of is None else f"{100 * short_of:.2f}".replace("-", MINUS))
        enter("Steps", f"{cell.steps:,.0f}")
        enter("Trained on", short(cell.trained))
        enter("Measured", short(cell.forwarded))
        enter("Memory, MB", f"{memory / 1e6:,.0f}" if memory else None)
    return [Column(name, entries) for name, entries in found.items() if any(e.main != NOTHING for e in entries)]


def table(folder: Path, format: str) -> str:
    """Return the table of a comparison as text.

    Args:
        folder: of the runs.
        format: ``md``, rounded as on the page; ``csv`` or ``json``, in full and with the verdicts.

    Raises:
        ConfigError: no such format, or runs that cannot be compared.
        DataError: a file of a run is damaged.
    """
    if format not in FORMATS:
        raise ConfigError(must("format", f"be one of {', '.join(FORMATS)}", format, "For a page, use html."))
    rows = rows_of(collect(folder))
    if format == "json":
        return json.dumps([row.plain() for row in rows], indent=2) + "\n"
    if format == "md":
        shown = columns(rows)
        lines = [[column.heading for column in shown], ["---", *["---:"] * (len(shown) - 1)]]
        lines += [[str(column.entries[k]) for column in shown] for k in range(len(rows))]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].plain(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.plain() for row in rows)
    return text.getvalue()


def short(count: float) -> str:
    """Write a count in three digits or so.

    >>> [short(n) for n in (0, 950, 4320, 120_064, 1_200_000)]
    ['0', '950', '4.3k', '120k', '1.2M']
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.{1 if count < 10 * size else 0}f}{letter}"
    return f"{count:.0f}"


def signed(share: float) -> str:
    """Write an accuracy difference in points.

    >>> signed(0.0123), signed(-0.2), signed(-0.00001)
    ('+1.23', '−20.00', '0.00')
    """
    text = f"{100 * share:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", MINUS)


def _difference(difference: Difference | None) -> Entry | None:
    if difference is None:
        return None
    low, high = difference.low, difference.high
    if low is None or high is None:
        return Entry(signed(difference.mean))
    return Entry(signed(difference.mean), f"{signed(low)} to {signed(high)}", low > 0 or high < 0)
