"""Several methods, budgets and seeds side by side: run what is missing, then put the figures in a table."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchcrest.checks import suggest
from torchcrest.errors import ConfigError, NonFiniteLossError, TorchcrestError, must
from torchcrest.train.files import RunFiles
from torchcrest.train.methods import find_method
from torchcrest.train.run import Interrupted, Status, prepare, train
from torchcrest.train.settings import RunSettings
from torchcrest.train.tasks import Task
from torchcrest.train.track import refuse_missing
from torchcrest.train.verdict import ROUNDS, budgets_wanted, label

__all__ = ["COLUMNS", "LEGEND", "Cell", "FailedRuns", "cells", "compare", "plan", "run_name"]

COLUMNS = [
    "method",
    "n",
    "accuracy %",
    "rel%",
    "steps",
    "train",
    "fwd",
    "seconds",
    "sel%",
    "reg.",
    "MB",
]
LEGEND = (
    "rel%: accuracy missing against full. train, fwd: examples trained on, measured.\n"
    "sel%: share of seconds selecting and checking. reg.: regions. MB: peak memory."
)

Begin = Callable[[str], Callable[[Status], None]]


class FailedRuns(TorchcrestError):
    """Runs of a comparison failed; the others came to their end.

    Attributes:
        failed: the errors, by the runs' names.
        summaries: of the finished runs.
    """

    def __init__(self, failed: dict[str, TorchcrestError], summaries: list[dict[str, Any]]) -> None:
        """Name all of them in one message."""
        self.failed, self.summaries = failed, summaries
        reasons = "".join(f"\n{name}: {error}" for name, error in failed.items())
        diverged = any(isinstance(error, NonFiniteLossError) for error in failed.values())
        do = " A loss will be NaN or infinite again: use a lower learning_rate, or leave that method or seed out."
        super().__init__(
            f"{len(failed)} of {len(failed) + len(summaries)} runs failed, the others are finished.{reasons}\n"
            f"The same command tries them again.{do if diverged else ''}"
        )


def run_name(settings: RunSettings) -> str:
    """Return the folder of a run inside a comparison.

    >>> run_name(RunSettings(task="digits", method="crest", budget=0.1, seed=3))
    'crest-0.1-s3'
    """
    whole = find_method(settings.method).whole
    budget = "" if whole else f"-{settings.budget!r}"
    return f"{settings.method}{budget}-s{settings.seed}"


def plan(
    settings: RunSettings,
    methods: Sequence[str],
    budgets: Sequence[float],
    seeds: Sequence[int],
    rates: Mapping[str, float] | None = None,
) -> list[RunSettings]:
    """List the runs of a comparison, seed by seed, each once, methods that ignore the budget once a seed.

    Args:
        settings: what the runs have in common.
        methods: their names.
        budgets: shares of the full run's steps.
        seeds: each method runs with each.
        rates: learning rates of methods that have their own; the others take that of the settings.

    Raises:
        ConfigError: a list is empty, or an entry cannot work.
    """
    rates = rates or {}
    problems = [
        must(name, "name at least one", list(values), "Leave it out for the default.")
        for name, values in (("methods", methods), ("budget", budgets), ("seeds", seeds))
        if not values
    ]
    if problems:
        raise ConfigError(problems)
    for name, values in (("method", methods), ("budget", budgets), ("seed", seeds)):
        for value in values:
            try:
                changed: dict[str, Any] = {name: value}
                replace(settings, **changed)
            except ConfigError as error:
                problems.append(str(error))
    for method, rate in rates.items():
        if method not in methods:
            do = suggest(method, methods)
            problems.append(must("rates", "be of the methods that are run", method, do))
        elif not 0 < rate < math.inf:
            problems.append(must(f"rates of {method}", "be above 0", rate, "Use for example 0.1."))
    if problems:
        raise ConfigError(problems)
    runs: dict[str, RunSettings] = {}
    for seed in seeds:  # outermost: a machine that grows slower or faster does so for all methods alike
        for method in methods:
            for budget in budgets:
                share = 1.0 if find_method(method).whole else budget
                run = replace(settings, method=method, budget=share, seed=seed)
                if method in rates:
                    run = replace(run, learning_rate=rates[method])
                runs.setdefault(run_name(run), run)
    return list(runs.values())


def compare(
    runs: Sequence[RunSettings],
    folder: Path,
    *,
    begin: Begin | None = None,
    stop: Callable[[], bool] = lambda: False,
    processes: int = 1,
    equal_time: bool = True,
    trackers: Sequence[str] = (),
    energy: bool = False,
    say: Callable[[str], None] = lambda line: None,
    task: Task | None = None,
) -> list[dict[str, Any]]:
    """Run what is missing of a comparison and return all its summaries, in the order of the runs.

    Args:
        runs: from :func:`plan`.
        folder: holds a folder for each run.
        begin: called with the name of each run that is begun; returns its watcher.
        stop: asked after each step, as in :func:`torchcrest.train.run.train`, or now and then with several
            processes, which then all leave checkpoints.
        processes: how many runs to make at once, each with its share of the threads. Several are processes of
            their own, so a script that asks for them needs ``if __name__ == "__main__":``.
        equal_time: where ``random`` is among the methods, run it at further budgets too, so that each
            method meets it at equal time; their summaries come last.
        trackers: as in :func:`torchcrest.train.run.train`, like the next.
        energy: measure it as well.
        say: as in :func:`torchcrest.train.run.train`.
        task: the runs' task, prepared before; it tells nothing anew.

    Raises:
        ConfigError: a run cannot work; found before any is begun, like the next.
        CheckpointError: a run that is there was made with other settings.
        FailedRuns: some of the runs failed, after all others came to their end.
        Interrupted: stopped on request.
    """
    if processes < 1:
        raise ConfigError(must("processes", "be at least 1", processes, "1 makes one run after the other."))
    refuse_missing(trackers, energy)
    told, task = task, prepare(runs[0], task)[0]  # the same for all runs, but for the seed of augmentation
    for note in task.notes if told is None else ():
        say(note)
    job = _Job(folder, processes, tuple(trackers), energy, task if processes == 1 else None)
    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, TorchcrestError] = {}

    def finish(some: Sequence[RunSettings]) -> None:
        for run in some:
            resolved = prepare(run, task)[1]
            files = RunFiles(folder / run_name(run))
            if files.config.exists():
                resolved.refuse_other(files.read_config(), files.config)
        missing = [run for run in some if not RunFiles(folder / run_name(run)).finished()]
        if processes == 1:
            failed.update(_train_in_turn(missing, job, begin, stop))
        elif missing:
            failed.update(_train_together(missing, job, begin, stop))
        names = [run_name(run) for run in some]
        done.update({name: RunFiles(folder / name).read_summary() for name in names if name not in failed})

    finish(runs)
    random = {run.seed: run for run in runs if run.method == "random"}
    for _ in range(ROUNDS if equal_time and random else 0):
        budgets = budgets_wanted(list(done.values()))
        further = [replace(run, budget=budget) for budget in budgets for run in random.values()]
        finish([run for run in further if run_name(run) not in done | failed])
    if failed:
        raise FailedRuns(failed, list(done.values()))
    return list(done.values())


@dataclass(frozen=True)
class _Job:
    """How the runs of a comparison are made."""

    folder: Path
    processes: int
    trackers: tuple[str, ...]
    energy: bool
    task: Task | None  # where the runs are made in this process

    def train(self, run: RunSettings, watch: Callable[[Status], None] | None, stop: Callable[[], bool]) -> None:
        train(
            run,
            self.folder / run_name(run),
            resume=True,
            watch=watch,
            stop=stop,
            processes=self.processes,
            trackers=self.trackers,
            energy=self.energy,
            task=self.task,
        )


def _train_in_turn(
    runs: Sequence[RunSettings], job: _Job, begin: Begin | None, stop: Callable[[], bool]
) -> dict[str, TorchcrestError]:
    """Make one run after the other, and return the errors of those that failed."""
    failed = {}
    for run in runs:
        name = run_name(run)
        watch = begin(name) if begin else None
        try:
            job.train(run, watch, stop)
        except TorchcrestError as error:
            failed[name] = error
    return failed


# Several runs at once -------------------------------------------------------------------------------------------


def _train_together(
    runs: Sequence[RunSettings], job: _Job, begin: Begin | None, stop: Callable[[], bool]
) -> dict[str, TorchcrestError]:
    """Make several runs at once, and return the errors of those that failed."""
    context = multiprocessing.get_context("spawn")
    stopping, messages = context.Event(), context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // job.processes)
    watches: dict[str, Callable[[Status], None]] = {}

    def listen() -> None:
        while not messages.empty():
            name, said = messages.get()
            if isinstance(said, str):
                warnings.warn(said, stacklevel=2)
            elif begin and said is None:
                watches[name] = begin(name)
            elif said:
                watches[name](said)

    with ProcessPoolExecutor(job.processes, context, _enter, (stopping, messages, threads)) as pool:
        with _unseen_interrupts():
            futures = {run_name(run): pool.submit(_train_one, run, job, begin is not None) for run in runs}
        try:
            while wait(futures.values(), timeout=0.1).not_done:
                listen()
                if stop():
                    stopping.set()
            listen()
        finally:
            stopping.set()  # a watcher's error, too, waits for the processes
    failed: dict[str, TorchcrestError] = {}
    halted: list[Interrupted] = []
    for name, future in futures.items():
        try:
            if halt := future.result():
                halted.append(Interrupted(job.folder / name, *halt))
        except TorchcrestError as error:
            failed[name] = error
        except BrokenProcessPool:
            failed[name] = TorchcrestError("Its process died. If memory was short, use fewer processes.")
    if halted:
        raise max(halted, key=lambda each: each.step)
    return failed


@contextmanager
def _unseen_interrupts() -> Iterator[None]:
    """Let processes that are begun meanwhile not see a terminal's Ctrl-C, which comes to all: they are told to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_stopping: Any  # of a process: the event that asks it to stop,
_messages: Any  # and the way back


def _enter(stopping: Any, messages: Any, threads: int) -> None:
    """Begin a process: it shares the threads, hears of stopping, and ends with its parent."""
    global _stopping, _messages
    _stopping, _messages = stopping, messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    warnings.showwarning = lambda message, *_: messages.put(("", str(message)))
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:
        parent.join()
        os._exit(1)  # else, killed and started again, a comparison would have two processes for a run

    threading.Thread(target=follow, daemon=True).start()


def _train_one(run: RunSettings, job: _Job, watched: bool) -> tuple[int, int] | None:
    """Make one of several runs; returns step and steps where it was stopped."""
    name = run_name(run)
    if _stopping.is_set():
        return 0, 0
    if watched:
        _messages.put((name, None))
    watch = (lambda status: _messages.put((name, status))) if watched else None
    try:
        job.train(run, watch, _stopping.is_set)
    except Interrupted as stopped:  # which does not pickle
        return stopped.step, stopped.steps
    return None


# The table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """The runs of one method at one budget, over seeds; figures are means, spreads standard deviations.

    Attributes:
        method: its name.
        budget: share of the full run's steps.
        n: runs.
        accuracy: from 0 to 1.
        accuracy_sd: 0 for a single run.
        relative_error: how much of full training's accuracy is missing, from 0 to 1; None without full runs.
        steps: optimizer steps.
        trained: examples trained on, repeats counted.
        forwarded: examples forwarded for selection.
        seconds: of training with selection.
        seconds_sd: 0 for a single run.
        selecting: share of the seconds spent on selection, checks and curvature.
        regions: quadratic models.
        memory: most bytes in use at a time, over the runs; None where it is not known.
    """

    method: str
    budget: float
    n: int
    accuracy: float
    accuracy_sd: float
    relative_error: float | None
    steps: float
    trained: float
    forwarded: float
    seconds: float
    seconds_sd: float
    selecting: float
    regions: float
    memory: float | None

    def row(self) -> list[str]:
        """Return the entries of :data:`COLUMNS`, as text."""
        spread = f" ± {100 * self.accuracy_sd:.2f}" if self.n > 1 else ""
        seconds_spread = f" ± {self.seconds_sd:.1f}" if self.n > 1 else ""
        return [
            label(self.method, self.budget),
            str(self.n),
            f"{100 * self.accuracy:.2f}{spread}",
            "-" if self.relative_error is None else f"{100 * self.relative_error:.2f}",
            f"{self.steps:,.0f}",
            _short(self.trained),
            _short(self.forwarded),
            f"{self.seconds:.1f}{seconds_spread}",
            f"{100 * self.selecting:.0f}",
            f"{self.regions:,.0f}",
            "-" if self.memory is None else f"{self.memory / 1e6:,.0f}",
        ]


def _short(count: float) -> str:
    """Write a count in three digits or so.

    >>> [_short(n) for n in (0, 950, 1280, 120_064, 1_200_000)]
    ['0', '950', '1.3k', '120k', '1.20M']
    """
    if count < 1000:
        return f"{count:.0f}"
    return f"{count / 1e3:.{int(count < 9950)}f}k" if count < 999_500 else f"{count / 1e6:.2f}M"


def cells(summaries: Sequence[dict[str, Any]]) -> list[Cell]:
    """Gather summaries into a cell for each method and budget, in order of appearance."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for summary in summaries:
        groups.setdefault((summary["method"], summary["budget"]), []).append(summary)
    full = [s["accuracy"] for s in summaries if s["method"] == "full"]
    best = statistics.fmean(full) if full else None

    def gather(method: str, budget: float, runs: list[dict[str, Any]]) -> Cell:
        def mean(key: str) -> float:
            return statistics.fmean(s[key] for s in runs)

        def spread(key: str) -> float:
            return statistics.stdev(s[key] for s in runs) if len(runs) > 1 else 0.0

        spent = sum(s["seconds_selecting"] + s["seconds_checking"] + s["seconds_curvature"] for s in runs)
        accuracy = mean("accuracy")
        known = [s["peak_memory"] for s in runs if s.get("peak_memory") is not None]
        return Cell(
            method=method,
            budget=budget,
            n=len(runs),
            accuracy=accuracy,
            accuracy_sd=spread("accuracy"),
            relative_error=1 - accuracy / best if best else None,
            steps=mean("steps"),
            trained=mean("examples_trained"),
            forwarded=mean("examples_forwarded"),
            seconds=mean("seconds"),
            seconds_sd=spread("seconds"),
            selecting=spent / sum(s["seconds"] for s in runs),
            regions=mean("regions"),
            memory=max(known) if known else None,
        )

    return [gather(method, budget, runs) for (method, budget), runs in groups.items()]
