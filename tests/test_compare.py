"""A comparison: what is run, what is refused, the figures, the picture."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conftest import SMALL, Blobs, forkserver, same
from torchcrest.config import CrestConfig
from torchcrest.errors import CheckpointError, ConfigError, TorchcrestError
from torchcrest.train import compare as comparing
from torchcrest.train.collect import collect
from torchcrest.train.compare import COLUMNS, FailedRuns, cells, compare, plan, run_name
from torchcrest.train.console import Watcher, render
from torchcrest.train.files import RunFiles
from torchcrest.train.plot import plot
from torchcrest.train.run import Interrupted, Status, train
from torchcrest.train.settings import RunSettings


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    """10 of 20 steps."""
    blobs = Blobs(200)
    x, y = blobs.x.numpy(), blobs.y.numpy()
    np.savez(tmp_path / "blobs.npz", x_train=x[:160], y_train=y[:160], x_test=x[160:], y_test=y[160:])
    values: dict[str, Any] = {"batch_size": 16, "epochs": 2, "budget": 0.5, "evaluations": 2, "crest": SMALL}
    return RunSettings(task=f"npz:{tmp_path / 'blobs.npz'}", **values)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were trained, by name."""
    names: list[str] = []

    def noted(run: RunSettings, *args: Any, **kw: Any) -> Any:
        names.append(run_name(run))
        return train(run, *args, **kw)

    monkeypatch.setattr(comparing, "train", noted)
    return names


# The plan ----------------------------------------------------------------------------------------------------


def test_plans_each_run_once_and_full_once_a_seed(settings: RunSettings) -> None:
    runs = plan(settings, ["full", "random", "crest", "random"], [0.1, 0.2], [0, 7])
    assert [run_name(run) for run in runs] == [
        *("full-s0", "random-0.1-s0", "random-0.2-s0", "crest-0.1-s0", "crest-0.2-s0"),
        *("full-s7", "random-0.1-s7", "random-0.2-s7", "crest-0.1-s7", "crest-0.2-s7"),
    ]
    assert {run.budget for run in runs if run.method == "full"} == {1.0}
    assert {(run.method, run.budget, run.seed) for run in runs} >= {("crest", 0.2, 7)}
    assert {run.crest for run in runs} == {SMALL}


def test_a_method_may_have_a_rate_of_its_own(settings: RunSettings) -> None:
    runs = plan(
        replace(settings, learning_rate=0.1), ["full", "random", "crest"], [0.1], [0], {"crest": 0.3, "full": 1}
    )
    assert {run.method: run.learning_rate for run in runs} == {"full": 1, "random": 0.1, "crest": 0.3}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"crets": 0.1}, r"^rates must be of the methods that are run, got 'crets'\. Did you mean crest\?$"),
        ({"full": 0.1}, "rates must be of the methods that are run, got 'full'. Known: random, crest"),
        ({"crest": 0.0}, r"rates of crest must be above 0, got 0\.0"),
        ({"crest": float("nan")}, "rates of crest must be above 0, got nan"),
        ({"crest": float("inf")}, "rates of crest must be above 0, got inf"),
        ({"random": -1.0, "full": 0.1}, r"(?s)rates of random must.*rates must be of"),
    ],
    ids=str,
)
def test_rates_that_cannot_work_are_refused(settings: RunSettings, rates: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(settings, ["random", "crest"], [0.1], [0], rates)


def test_budgets_that_hardly_differ_are_different_runs(settings: RunSettings) -> None:
    assert len(plan(settings, ["random"], [0.12345671, 0.12345672], [0])) == 2


@pytest.mark.parametrize(
    ("methods", "budgets", "seeds", "message"),
    [
        ([], [0.1], [0], "methods must name at least one"),
        ([], [], [], r"(?s)methods must .*budget must .*seeds must name at least one"),
        (["crestt"], [0.1], [0], "method must be one of .*Did you mean crest"),
        (["random"], [0.1, 2.0], [0], r"budget must be in \(0, 1\], got 2.0"),
        (["full"], [2.0], [0], r"budget must be in \(0, 1\], got 2.0"),
        (["random"], [0.1], [-1], "seed must be at least 0"),
        (["random", "crets"], [7], [-1], r"(?s)(?=.*method must)(?=.*budget must)(?=.*seed must)"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(
    settings: RunSettings, methods: list[str], budgets: list[float], seeds: list[int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(settings, methods, budgets, seeds)


# What is run -------------------------------------------------------------------------------------------------


def test_runs_what_is_missing(
    tmp_path: Path, settings: RunSettings, begun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    few, all_of_them = (plan(settings, methods, [0.5], [0, 1]) for methods in (["random"], ["full", "random", "crest"]))
    first = compare(few, tmp_path / "out", equal_time=False)
    assert begun == ["random-0.5-s0", "random-0.5-s1"]
    begun.clear()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    second = compare(all_of_them, tmp_path / "out", equal_time=False)
    assert begun == ["full-s0", "crest-0.5-s0", "full-s1", "crest-0.5-s1"]
    assert [summary for summary in second if summary["method"] == "random"] == first
    assert [(s["method"], s["seed"]) for s in second] == [(run.method, run.seed) for run in all_of_them]
    begun.clear()
    assert compare(all_of_them, tmp_path / "out", equal_time=False) == second
    assert begun == []
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert capsys.readouterr() == ("", ""), "a library call prints nothing"


def test_a_run_of_a_comparison_is_the_run_alone(tmp_path: Path, settings: RunSettings) -> None:
    runs = plan(settings, ["random", "crest"], [0.5], [1])
    compare(runs, tmp_path / "out", equal_time=False)
    train(runs[1], tmp_path / "alone")
    alone, inside = (RunFiles(tmp_path / name).read_checkpoint() for name in ("alone", "out/crest-0.5-s1"))
    assert same(alone["model"], inside["model"])


def test_goes_on_with_an_interrupted_run(tmp_path: Path, settings: RunSettings, begun: list[str]) -> None:
    runs = plan(settings, ["random", "crest"], [0.5], [0])
    compare(runs, tmp_path / "whole", equal_time=False)
    asked = iter(range(1, 100))
    with pytest.raises(Interrupted) as stopped:
        compare(runs, tmp_path / "parts", equal_time=False, stop=lambda: next(asked) == 14)
    assert (stopped.value.folder, stopped.value.step) == (tmp_path / "parts" / "crest-0.5-s0", 4)
    begun.clear()
    told: dict[str, list[Status]] = {}
    compare(runs, tmp_path / "parts", equal_time=False, begin=lambda name: told.setdefault(name, []).append)
    assert begun == ["crest-0.5-s0"]
    assert list(told) == ["crest-0.5-s0"]
    assert all(status.step > 4 for status in told["crest-0.5-s0"]), "what was done is not done again"
    whole, parts = (RunFiles(tmp_path / name / "crest-0.5-s0").read_checkpoint() for name in ("whole", "parts"))
    assert same(whole["model"], parts["model"])


def test_other_settings_are_refused_before_any_run(tmp_path: Path, settings: RunSettings, begun: list[str]) -> None:
    compare(plan(settings, ["crest"], [0.5], [0]), tmp_path / "out")
    begun.clear()
    other = RunSettings(task=settings.task, batch_size=16, epochs=3, crest=SMALL)
    with pytest.raises(CheckpointError, match=r"epochs in .*crest-0\.5-s0.* must be 3.*got 2"):
        compare(plan(other, ["full", "random", "crest"], [0.5], [0]), tmp_path / "out")
    assert begun == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["crest-0.5-s0"]


def test_what_cannot_work_is_refused_before_any_run(tmp_path: Path, settings: RunSettings, begun: list[str]) -> None:
    """`random` could train; `crest`, whose pools are too large, comes last."""
    large = RunSettings(task=settings.task, batch_size=16, epochs=2, crest=CrestConfig(pool_size=256))
    with pytest.raises(ConfigError, match="pool_size must be at most the 160"):
        compare(plan(large, ["full", "random", "crest"], [0.5], [0]), tmp_path / "out")
    assert begun == []
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_fails_does_not_lose_the_others(tmp_path: Path, settings: RunSettings, processes: int) -> None:
    runs = plan(settings, ["crest", "random"], [0.5], [0, 1])
    with pytest.raises(Interrupted):
        compare(runs, tmp_path, stop=lambda: True)
    checkpoint = RunFiles(tmp_path / "crest-0.5-s0").checkpoint
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(b"damaged")
    message = r"(?s)1 of 4 runs failed, the others are fin.*\.5-s0: .*must be a checkpoint.*\nThe same .* them again\.$"
    with pytest.raises(FailedRuns, match=message) as raised:
        compare(runs, tmp_path, processes=processes, equal_time=False)
    assert list(raised.value.failed) == ["crest-0.5-s0"]
    names = [f"{s['method']}-{s['budget']}-s{s['seed']}" for s in raised.value.summaries]
    assert names == ["random-0.5-s0", "crest-0.5-s1", "random-0.5-s1"]
    assert collect(tmp_path).unfinished == ["crest-0.5-s0"]
    checkpoint.write_bytes(whole)
    assert compare(runs, tmp_path, equal_time=False)[1:] == raised.value.summaries


def test_all_runs_that_diverge_are_named(tmp_path: Path, settings: RunSettings) -> None:
    runs = plan(replace(settings, learning_rate=1e30), ["random"], [0.5], [0, 1])
    for _ in range(2):  # the same again
        with pytest.raises(
            FailedRuns, match=r"(?s)2 of 2 .*-s0: The training loss is NaN.*-s1: The .*lower learn"
        ) as raised:
            compare(runs, tmp_path)
        assert raised.value.summaries == []


# Equal time --------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were trained; a step takes a second, one of `crest` 1.8."""
    names: list[str] = []

    def clocked(run: RunSettings, folder: Path, **kw: Any) -> dict[str, Any]:
        names.append(run_name(run))
        summary = train(run, folder, **kw)
        summary["seconds"] = summary["steps"] * (1.8 if run.method == "crest" else 1.0)
        RunFiles(folder).write_summary(summary)
        return summary

    monkeypatch.setattr(comparing, "train", clocked)
    return names


def test_random_is_run_at_equal_time(tmp_path: Path, settings: RunSettings, timed: list[str]) -> None:
    """10 of 20 steps at 1.8 seconds are 18 steps of random, at its own rate."""
    runs = plan(settings, ["random", "crest"], [0.5], [3, 1], {"random": 0.2})
    planned = [run_name(run) for run in runs]
    summaries = compare(runs, tmp_path)
    assert timed == [*planned, "random-0.9-s3", "random-0.9-s1"]
    assert [(s["method"], s["steps"], s["seed"]) for s in summaries[4:]] == [("random", 18, 3), ("random", 18, 1)]
    rates = {
        path.parent.name: RunFiles(path.parent).read_config()["learning_rate"] for path in tmp_path.glob("*/*.yaml")
    }
    assert {name for name, rate in rates.items() if rate == 0.2} == {name for name in rates if "random" in name}
    timed.clear()
    assert compare(runs, tmp_path) == summaries
    assert timed == []
    assert compare(runs, tmp_path, equal_time=False) == summaries[:4]
    (tmp_path / "random-0.9-s1" / "summary.json").unlink()
    assert [s["test_loss"] for s in compare(runs, tmp_path)] == [s["test_loss"] for s in summaries]
    assert timed == ["random-0.9-s1"], "an interrupted one is gone on with"


def test_without_random_there_is_nothing_to_add(tmp_path: Path, settings: RunSettings, timed: list[str]) -> None:
    compare(plan(settings, ["full", "crest"], [0.5], [0]), tmp_path)
    assert timed == ["full-s0", "crest-0.5-s0"]


def test_random_is_added_three_times_at_most(
    tmp_path: Path, settings: RunSettings, begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = iter((0.6, 0.7, 0.8, 0.9))
    monkeypatch.setattr(comparing, "budgets_wanted", lambda _: [next(budgets)])
    compare(plan(settings, ["random"], [0.5], [0]), tmp_path)
    assert begun == ["random-0.5-s0", "random-0.6-s0", "random-0.7-s0", "random-0.8-s0"]


# Several at once ---------------------------------------------------------------------------------------------


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that need not import PyTorch first: that those of a comparison do is left to the tests without this."""
    context = forkserver()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


def test_runs_at_once_are_the_runs_one_by_one(tmp_path: Path, settings: RunSettings) -> None:
    runs = plan(
        replace(settings, batch_size=2, crest=replace(SMALL, exclude=False)), ["random", "crest"], [0.5], [0, 1]
    )
    told: dict[str, list[Status]] = {}
    more: dict[str, Any] = {"begin": lambda name: told.setdefault(name, []).append, "processes": 2}
    warning = "batch_size = 2 is smaller than the number of classes"
    with pytest.warns(UserWarning, match=warning):
        together = compare(runs, tmp_path / "two", equal_time=False, **more)
    with pytest.warns(UserWarning, match=warning):
        alone = compare(runs, tmp_path / "one", equal_time=False)
    for key in ("method", "seed", "accuracy", "test_loss", "steps", "examples_forwarded", "regions"):
        assert [summary[key] for summary in together] == [summary[key] for summary in alone]
    for name in map(run_name, runs):
        left, right = (RunFiles(tmp_path / folder / name).read_checkpoint()["model"] for folder in ("one", "two"))
        assert same(left, right)
        assert told[name][-1].step == 80, "what happens reaches the watchers"
    assert len(told) == 4
    assert [{s["processes"] for s in summaries} for summaries in (together, alone)] == [{2}, {1}]
    assert collect(tmp_path / "two").unfinished == []


@pytest.mark.parametrize("processes", [0, -2])
def test_processes_are_counted(tmp_path: Path, settings: RunSettings, processes: int) -> None:
    with pytest.raises(ConfigError, match=f"processes must be at least 1, got {processes}"):
        compare([settings], tmp_path, processes=processes)


@pytest.fixture
def long(settings: RunSettings) -> list[RunSettings]:
    """Two runs of 50,000 steps."""
    return plan(replace(settings, epochs=10_000), ["random", "crest"], [0.5], [0])


def after(steps: int) -> Callable[[], bool]:
    asked = iter(range(1, steps + 1))
    return lambda: next(asked) == steps


@pytest.mark.usefixtures("imported")
def test_a_stop_leaves_a_checkpoint_of_each(tmp_path: Path, long: list[RunSettings]) -> None:
    told: dict[str, list[Status]] = {}
    with pytest.raises(Interrupted) as stopped:
        compare(
            long,
            tmp_path,
            begin=lambda name: told.setdefault(name, []).append,
            stop=lambda: len(told) == 2 and all(told.values()),
            processes=2,
        )
    steps = {run_name(run): RunFiles(tmp_path / run_name(run)).read_checkpoint()["step"] for run in long}
    assert min(steps.values()) > 0
    assert steps[stopped.value.folder.name] == stopped.value.step == max(steps.values()), "the one that got furthest"
    assert (stopped.value.folder.parent, stopped.value.steps) == (tmp_path, 50_000)
    for run in long:
        last = steps[run_name(run)] + 1
        with pytest.raises(Interrupted, match=f"after step {last} "):
            train(run, tmp_path / run_name(run), resume=True, stop=lambda: True)
        with pytest.raises(Interrupted):
            train(run, tmp_path / "alone" / run_name(run), stop=after(last))
        left, right = (
            RunFiles(folder / run_name(run)).read_checkpoint()["model"] for folder in (tmp_path, tmp_path / "alone")
        )
        assert same(left, right)


def test_a_stop_before_the_start_leaves_nothing(tmp_path: Path, long: list[RunSettings]) -> None:
    with pytest.raises(Interrupted, match="stopped after step 0"):
        compare(long[:1], tmp_path / "out", stop=lambda: True, processes=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("imported")
def test_a_process_that_dies_is_named(tmp_path: Path, long: list[RunSettings]) -> None:
    def kill(status: Status) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    message = r"(?s)1 of 1 runs failed.*random-0\.5-s0: Its process died\. If memory was short"
    with pytest.raises(FailedRuns, match=message):
        compare(long[:1], tmp_path, begin=lambda name: kill, processes=2)


SCRIPT = """
from pathlib import Path
from rich.console import Console
from torchcrest.train.compare import compare, plan
from torchcrest.train.console import stop_requests
from torchcrest.train.run import Interrupted
from torchcrest.train.settings import RunSettings

def say(*words):
    print(*words, flush=True)

if __name__ == "__main__":
    runs = plan(RunSettings(task={task!r}, epochs=100_000, batch_size=16), ["random"], [0.5], [0, 1])
    with stop_requests(Console(quiet=True)) as stop:
        try:
            compare(
                runs,
                Path("out"),
                begin=lambda name: lambda status: say(name),
                stop=lambda: say("asked") or stop(),
                processes=2,
            )
        except Interrupted as stopped:
            say("stopped after", stopped.step)
"""


@pytest.mark.parametrize("how", ["Ctrl-C", "Ctrl-C while they start", "killed"])
def test_processes_end_with_the_comparison(tmp_path: Path, settings: RunSettings, how: str) -> None:
    """A terminal's Ctrl-C reaches all processes; a kill only the first one."""
    (tmp_path / "script.py").write_text(SCRIPT.format(task=settings.task))
    wanted = {"asked\n"} if how == "Ctrl-C while they start" else {"random-0.5-s0\n", "random-0.5-s1\n"}
    with subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout
        while wanted:
            line = process.stdout.readline()
            assert line, "it has ended"
            wanted -= {line}
        if how == "killed":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=300)  # ends when the last process lets go of the pipes
    if how != "killed":
        assert (err, process.returncode) == ("", 0)
        step = int(re.findall(r"stopped after (\d+)", out)[0])
        steps = [RunFiles(folder).read_checkpoint()["step"] for folder in (tmp_path / "out").glob("*")]
        assert step == max(steps, default=0)
        assert (step == 0) == (how == "Ctrl-C while they start")


# Figures and picture -----------------------------------------------------------------------------------------


def summary(method: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"method": method, "budget": 0.1, "accuracy": accuracy, "steps": 40, "regions": 0}
    values |= {"examples_trained": 640, "examples_forwarded": 0, "seconds": 10.0}
    values |= dict.fromkeys(("seconds_selecting", "seconds_checking", "seconds_curvature"), 0.0)
    return values | changes


def test_figures_equal_those_by_hand() -> None:
    crest = {"seconds_selecting": 2.0, "seconds_checking": 1.0, "seconds_curvature": 0.5, "examples_forwarded": 123_400}
    crest["peak_memory"] = 1_000_000
    full, fast, slow = cells(
        [
            summary("full", 0.90, budget=1.0, steps=400),
            summary("full", 0.80, budget=1.0, steps=400),
            summary("crest", 0.70, regions=3, **crest),
            summary("crest", 0.76, regions=4, **{**crest, "seconds": 18.0}),
            summary("crest", 0.79, regions=4, **{**crest, "seconds": 14.0, "peak_memory": 2_500_000_000}),
            summary("crest", 0.87, budget=0.2),
        ]
    )
    assert (fast.n, fast.budget) == (3, 0.1)
    assert fast.accuracy == pytest.approx(0.75)
    assert fast.accuracy_sd == pytest.approx((((0.05**2) + (0.01**2) + (0.04**2)) / 2) ** 0.5), "n - 1 in the divisor"
    assert fast.relative_error == pytest.approx((0.85 - 0.75) / 0.85)
    assert (fast.seconds, fast.seconds_sd) == (14.0, 4.0)
    assert fast.selecting == pytest.approx(3 * 3.5 / 42)
    assert fast.regions == pytest.approx(11 / 3)
    assert full.relative_error == pytest.approx(0.0)
    assert slow.relative_error == pytest.approx(-0.02 / 0.85), "better than full is negative"
    assert dict(zip(COLUMNS, fast.row(), strict=True)) == {
        "method": "crest 0.1",
        "n": "3",
        "accuracy %": "75.00 ± 4.58",
        "rel%": "11.76",
        "steps": "40",
        "train": "640",
        "fwd": "123k",
        "seconds": "14.0 ± 4.0",
        "sel%": "25",
        "reg.": "4",
        "MB": "2,500",
    }
    assert slow.row()[:4] == ["crest 0.2", "1", "87.00", "-2.35"]
    assert slow.row()[-1] == "-", "memory is not known"
    assert full.row()[0] == "full"


def test_without_full_runs_there_is_no_relative_error() -> None:
    (cell,) = cells([summary("crest", 0.7)])
    assert cell.relative_error is None
    assert cell.row()[COLUMNS.index("rel%")] == "-"


def test_bar_and_table_fit_into_100_columns() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, force_interactive=True)
    status = Status(227, 12674, 0.165, 0.9528, True, 114, 19, 0.36, 1.07, 1280.4, 87.2)
    with Watcher(console) as watcher:
        watcher.begin("crest-0.1-s0")(status)
    spent = dict.fromkeys(("seconds_selecting", "seconds_checking", "seconds_curvature"), 1.0)
    run = {"method": "crest", "budget": 0.1, "steps": 12674, "regions": 1140, "accuracy": 0.9528, "seconds": 1187.2}
    run |= {"examples_trained": 1_622_272, "examples_forwarded": 12_622_272, "peak_memory": 20_622_272_000, **spent}
    console.print(render("a task", COLUMNS, [cell.row() for cell in cells([run, {**run, "accuracy": 0.94}])]))
    shown = re.sub(r"\x1b\[[0-9;?]*\w", "", console.file.getvalue())  # type: ignore[attr-defined]
    for text in (
        "crest-0.1-s0",
        "227/12674",
        "95.28%",
        "94.64 ± 0.91",
        "12.62M",
        "1187.2 ± 0.0",
        "1,140",
        "20,622",
        *COLUMNS,
    ):
        assert text in shown, shown


def test_draws_the_picture(tmp_path: Path, settings: RunSettings) -> None:
    runs = plan(settings, ["full", "crest"], [0.5], [0, 1])
    compare(runs, tmp_path / "out", equal_time=False)
    path = plot(runs, tmp_path / "out", tmp_path / "out" / "comparison.png")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1000 <= width <= 3000
    assert 400 <= height <= 2000
    assert len(content) > 20_000, "not an empty picture"


def test_lost_metrics_are_named(tmp_path: Path, settings: RunSettings) -> None:
    runs = plan(settings, ["random"], [0.5], [0])
    compare(runs, tmp_path)
    (tmp_path / "random-0.5-s0" / "metrics.jsonl").unlink()
    with pytest.raises(TorchcrestError, match=r"metrics\.jsonl"):
        plot(runs, tmp_path, tmp_path / "comparison.png")


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"matplotlib must be installed.*torchcrest\[plot\]"):
        plot([], tmp_path, tmp_path / "comparison.png")
