"""What the command shows while it works, and the table at the end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from torchcrest.train.run import Status

__all__ = ["Watcher", "render", "stop_requests"]


class _Bars(Progress):
    """A bar a run, and under them the figures of the one that is running."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(self.figures, style="dim")


class Watcher:
    """A live progress bar on a terminal, a line an evaluation elsewhere.

    Use as a context manager; :meth:`begin` returns what :func:`torchcrest.train.run.train` calls.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = _Bars(
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[steps]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[accuracy]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Watcher:
        """Start the display."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bars as they are."""
        self._bars.figures = ""
        self._bars.stop()

    def begin(self, name: str) -> Callable[[Status], None]:
        """Begin a run of that name."""
        bar: TaskID | None = None

        def watch(status: Status) -> None:
            nonlocal bar
            if bar is None:
                bar = self._bars.add_task(name, total=status.steps, steps="", accuracy="")
            accuracy = "" if status.accuracy is None else f"{status.accuracy:.2%}"
            self._bars.figures = _figures(status)
            self._bars.update(bar, completed=status.step, steps=f"{status.step}/{status.steps}", accuracy=accuracy)
            if status.evaluated and not self._console.is_terminal:
                line = f"{name}: step {status.step}/{status.steps}, {_figures(status)}, {status.seconds:.1f} s"
                self._console.print(line, soft_wrap=True, highlight=False)

        return watch


def _figures(status: Status) -> str:
    parts = [f"loss {status.loss:.3f}"]
    if status.accuracy is not None:
        parts.append(f"accuracy {status.accuracy:.2%}")
    if status.interval is not None:
        parts.append(f"regions {status.regions} (interval {status.interval})")
        parts.append(f"active {status.active:.0%}")
        parts.append(f"overhead {status.overhead:.0%} (measured {status.forwarded:.0f} a step)")
    if status.effective_batch_size is not None:
        pay_off = "" if status.pay_off is None else f" (pay-off {status.pay_off:.2f})"
        parts.append(f"effective batch {status.effective_batch_size:.0f}{pay_off}")
    return ", ".join(parts)


@contextmanager
def stop_requests(console: Console) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second one acts as ever.

    Yields:
        A function that tells whether a stop was asked for.
    """
    asked = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        restore()
        console.print("\nStopping after this step; once more to stop at once.")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        restore()


def render(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """Return a table for the terminal; the first column is words, the others figures."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
