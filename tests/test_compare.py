"""A comparison: what is run, what is refused, the figures, the picture."""

from __future__ import annotations

import io
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conftest import SMALL, Blobs, same
from torchcrest.errors import CheckpointError, ConfigError, TorchcrestError
from torchcrest.train import compare as comparing
from torchcrest.train.compare import COLUMNS, cells, compare, plan, run_name
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
        *("full-s0", "full-s7"),
        *("random-0.1-s0", "random-0.1-s7", "random-0.2-s0", "random-0.2-s7"),
        *("crest-0.1-s0", "crest-0.1-s7", "crest-0.2-s0", "crest-0.2-s7"),
    ]
    assert {run.budget for run in runs if run.method == "full"} == {1.0}
    assert {(run.method, run.budget, run.seed) for run in runs} >= {("crest", 0.2, 7)}
    assert {run.crest for run in runs} == {SMALL}


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
    first = compare(few, tmp_path / "out")
    assert begun == ["random-0.5-s0", "random-0.5-s1"]
    begun.clear()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    second = compare(all_of_them, tmp_path / "out")
    assert begun == ["full-s0", "full-s1", "crest-0.5-s0", "crest-0.5-s1"]
    assert second[2:4] == first
    assert [(s["method"], s["seed"]) for s in second] == [(run.method, run.seed) for run in all_of_them]
    begun.clear()
    assert compare(all_of_them, tmp_path / "out") == second
    assert begun == []
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert capsys.readouterr() == ("", ""), "a library call prints nothing"


def test_a_run_of_a_comparison_is_the_run_alone(tmp_path: Path, settings: RunSettings) -> None:
    runs = plan(settings, ["random", "crest"], [0.5], [1])
    compare(runs, tmp_path / "out")
    train(runs[1], tmp_path / "alone")
    alone, inside = (RunFiles(tmp_path / name).read_checkpoint() for name in ("alone", "out/crest-0.5-s1"))
    assert same(alone["model"], inside["model"])


def test_goes_on_with_an_interrupted_run(tmp_path: Path, settings: RunSettings, begun: list[str]) -> None:
    runs = plan(settings, ["random", "crest"], [0.5], [0])
    compare(runs, tmp_path / "whole")
    asked = iter(range(1, 100))
    with pytest.raises(Interrupted) as stopped:
        compare(runs, tmp_path / "parts", stop=lambda: next(asked) == 14)
    assert (stopped.value.folder, stopped.value.step) == (tmp_path / "parts" / "crest-0.5-s0", 4)
    begun.clear()
    told: dict[str, list[Status]] = {}
    compare(runs, tmp_path / "parts", begin=lambda name: told.setdefault(name, []).append)
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
    large = RunSettings(task=settings.task, batch_size=16, epochs=2)
    with pytest.raises(ConfigError, match="pool_size must be at most the 160"):
        compare(plan(large, ["full", "random", "crest"], [0.5], [0]), tmp_path / "out")
    assert begun == []
    assert not (tmp_path / "out").exists()


# Figures and picture -----------------------------------------------------------------------------------------


def summary(method: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"method": method, "budget": 0.1, "accuracy": accuracy, "steps": 40, "regions": 0}
    values |= {"examples_trained": 640, "examples_forwarded": 0, "seconds": 10.0}
    values |= dict.fromkeys(("seconds_selecting", "seconds_checking", "seconds_curvature"), 0.0)
    return values | changes


def test_figures_equal_those_by_hand() -> None:
    crest = {"seconds_selecting": 2.0, "seconds_checking": 1.0, "seconds_curvature": 0.5, "examples_forwarded": 123_400}
    full, fast, slow = cells(
        [
            summary("full", 0.90, budget=1.0, steps=400),
            summary("full", 0.80, budget=1.0, steps=400),
            summary("crest", 0.70, regions=3, **crest),
            summary("crest", 0.76, regions=4, **{**crest, "seconds": 18.0}),
            summary("crest", 0.79, regions=4, **{**crest, "seconds": 14.0}),
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
    }
    assert slow.row()[:4] == ["crest 0.2", "1", "87.00", "-2.35"]
    assert full.row()[0] == "full"


def test_without_full_runs_there_is_no_relative_error() -> None:
    (cell,) = cells([summary("crest", 0.7)])
    assert cell.relative_error is None
    assert cell.row()[COLUMNS.index("rel%")] == "-"


def test_bar_and_table_fit_into_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, force_interactive=True)
    status = Status(227, 12674, 0.165, 0.9528, True, 114, 19, 0.36, 1.07, 87.2)
    with Watcher(console) as watcher:
        watcher.begin("crest-0.1-s0")(status)
    spent = dict.fromkeys(("seconds_selecting", "seconds_checking", "seconds_curvature"), 1.0)
    run = {"method": "crest", "budget": 0.1, "steps": 12674, "regions": 1140, "accuracy": 0.9528, "seconds": 1187.2}
    run |= {"examples_trained": 1_622_272, "examples_forwarded": 12_622_272, **spent}
    console.print(render("a task", COLUMNS, [cell.row() for cell in cells([run, {**run, "accuracy": 0.94}])]))
    shown = re.sub(r"\x1b\[[0-9;?]*\w", "", console.file.getvalue())  # type: ignore[attr-defined]
    for text in ("crest-0.1-s0", "227/12674", "95.28%", "94.64 ± 0.91", "12.62M", "1187.2 ± 0.0", "1,140", *COLUMNS):
        assert text in shown, shown


def test_draws_the_picture(tmp_path: Path, settings: RunSettings) -> None:
    runs = plan(settings, ["full", "crest"], [0.5], [0, 1])
    compare(runs, tmp_path / "out")
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
