"""Reading a comparison's folder: what is found, what is refused, and that nothing there changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchcrest.errors import ConfigError, DataError
from torchcrest.train.collect import Collected, collect
from torchcrest.train.files import RunFiles

CONFIG: dict[str, Any] = {"task": "digits", "model": "mlp", "learning_rate": 0.1, "num_workers": 0, "device": "cpu"}
SUMMARY: dict[str, Any] = {"task": "digits", "accuracy": 0.5, "steps": 20, "full_steps": 200, "device": "cpu, x86_64"}
SUMMARY |= dict.fromkeys(("examples", "examples_trained", "examples_forwarded", "regions"), 320)
SUMMARY |= dict.fromkeys(("seconds", "seconds_selecting", "seconds_checking", "seconds_curvature"), 1.5)
EVALUATIONS = [
    {"event": "evaluation", "step": step, "seconds": 0.5, "accuracy": 0.5, "examples_trained": 160} for step in (10, 20)
]
REGION = {"event": "region", "step": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`crest` and `random` with two seeds, and a run of `full` that is under way."""
    for method in ("random", "crest"):
        for seed in (10, 2):
            write(tmp_path / f"{method}-0.1-s{seed}", method=method, seed=seed)
    begun = RunFiles(tmp_path / "full-s2")
    begun.write_config({**CONFIG, "method": "full"})
    (tmp_path / "comparison.png").write_bytes(b"a picture")
    (tmp_path / "notes").mkdir()
    return tmp_path


def write(folder: Path, *, method: str = "crest", budget: float = 0.1, seed: int = 0, **changes: Any) -> RunFiles:
    """Leave a finished run; changes are of its settings."""
    files = RunFiles(folder)
    own = {method: {"tolerance": 0.05}} if method == "crest" else {}
    files.write_config({**CONFIG, "method": method, "budget": budget, "seed": seed, **own, **changes})
    files.append_metrics([REGION, *EVALUATIONS])
    files.write_summary({**SUMMARY, "method": method, "budget": budget, "seed": seed})
    return files


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_collects_a_comparison(folder: Path) -> None:
    before = contents(folder)
    found = collect(folder)
    names = ["random-0.1-s2", "random-0.1-s10", "crest-0.1-s2", "crest-0.1-s10"]
    assert [run.name for run in found.runs] == names, "by method, budget and seed"
    assert [run.folder for run in found.runs] == [folder / name for name in names]
    assert found.unfinished == ["full-s2"]
    run = found.runs[3]
    assert run.config == {**CONFIG, "method": "crest", "budget": 0.1, "seed": 10, "crest": {"tolerance": 0.05}}
    assert run.summary == {**SUMMARY, "method": "crest", "budget": 0.1, "seed": 10}
    assert run.evaluations == EVALUATIONS
    assert run.events == [REGION]
    assert contents(folder) == before


def test_collects_a_single_run(folder: Path) -> None:
    one = folder / "crest-0.1-s2"
    found = collect(one)
    assert found == Collected([run for run in collect(folder).runs if run.folder == one], [])


def test_runs_may_differ_in_speed_and_methods_in_their_own_settings(folder: Path) -> None:
    free: dict[str, Any] = {"device": "cuda", "num_workers": 4, "learning_rate": 0.3}
    write(folder / "other", method="infobatch", infobatch={"prune": 0.2}, **free)
    assert len(collect(folder).runs) == 5


# What is refused ---------------------------------------------------------------------------------------------


def spoil(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the summary of the run with seed 2 of `crest`, or its last evaluation."""

    def apply(folder: Path) -> None:
        path = folder / "crest-0.1-s2" / name
        *lines, last = path.read_text().splitlines() if name == "metrics.jsonl" else [path.read_text()]
        record = json.loads(last)
        change(record)
        path.write_text("\n".join([*lines, json.dumps(record)]) + "\n")

    return apply


def cut(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "crest-0.1-s2" / name
        path.write_bytes(path.read_bytes()[:-9])

    return apply


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "crest-0.1-s2" / name).unlink()


def unset(name: str) -> Callable[[Path], None]:
    """Take a setting out of config.yaml."""

    def apply(folder: Path) -> None:
        files = RunFiles(folder / "crest-0.1-s2")
        files.write_config({key: value for key, value in files.read_config().items() if key != name})

    return apply


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "half a summary": (cut("summary.json"), r"summary\.json must hold a finished run's figures"),
    "half of the metrics": (
        cut("metrics.jsonl"),
        r"metrics\.jsonl must end with an evaluation at step 20, got 10\. Lines",
    ),
    "no config": (lose("config.yaml"), r"config\.yaml must be there, as the run is finished"),
    "no metrics": (lose("metrics.jsonl"), r"metrics\.jsonl must be there, as the run is finished"),
    "another config": (
        lambda folder: (folder / "crest-0.1-s2" / "config.yaml").write_text("- a list"),
        r"config\.yaml must hold a run's settings",
    ),
    "no learning rate": (unset("learning_rate"), r"learning_rate in .*config\.yaml must be a number, got None"),
    "no model": (unset("model"), r"model in .*config\.yaml must be text, got None"),
    "no settings of its method": (unset("crest"), r"crest in .*config\.yaml must hold the method's settings, got None"),
    "no lines": (
        lambda folder: (folder / "crest-0.1-s2" / "metrics.jsonl").write_text(""),
        r"metrics\.jsonl must end with an evaluation at step 20, got 'none'",
    ),
    "no accuracy": (
        spoil("summary.json", lambda s: s.pop("accuracy")),
        r"accuracy in .*summary\.json must be a number",
    ),
    "accuracy NaN": (spoil("summary.json", lambda s: s.update(accuracy=float("nan"))), "accuracy in .* got nan"),
    "seed true": (spoil("summary.json", lambda s: s.update(seed=True)), "seed in .* must be a number, got True"),
    "steps in words": (spoil("summary.json", lambda s: s.update(steps="20")), "steps in .* must be a number, got '20'"),
    "task a number": (spoil("summary.json", lambda s: s.update(task=3)), "task in .* must be text, got 3"),
    "no examples": (spoil("summary.json", lambda s: s.pop("examples")), "examples in .* must be a number, got None"),
    "no device": (spoil("summary.json", lambda s: s.pop("device")), "device in .* must be text, got None"),
    "unknown method": (spoil("summary.json", lambda s: s.update(method="best")), "method in .* must be one of .*newer"),
    "an evaluation's accuracy": (
        spoil("metrics.jsonl", lambda e: e.update(accuracy=None)),
        r"accuracy in .*metrics\.jsonl must be a number, got None.*damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named_and_left_alone(folder: Path, case: str) -> None:
    damage, message = DAMAGED[case]
    damage(folder)
    before = contents(folder)
    with pytest.raises(DataError, match=message) as raised:
        collect(folder)
    assert "crest-0.1-s2" in str(raised.value)
    assert contents(folder) == before


def test_other_settings_are_named_with_their_runs(folder: Path) -> None:
    write(folder / "crest-0.2-s0", budget=0.2, task="mnist1d", crest={"tolerance": 0.1, "alpha": 1})
    before = contents(folder)
    with pytest.raises(ConfigError) as raised:
        collect(folder)
    assert str(raised.value).splitlines() == [
        "task must be the same in all runs, got \"'digits' in random-0.1-s2, random-0.1-s10, crest-0.1-s2 and 1 more; "
        "'mnist1d' in crest-0.2-s0\". Report them apart: give each comparison its own --out.",
        "crest.tolerance must be the same in all runs, got '0.05 in crest-0.1-s2, crest-0.1-s10; 0.1 in crest-0.2-s0'. "
        "Report them apart: give each comparison its own --out.",
        "crest.alpha must be the same in all runs, got 'None in crest-0.1-s2, crest-0.1-s10; 1 in crest-0.2-s0'. "
        "Report them apart: give each comparison its own --out.",
    ]
    assert contents(folder) == before


def test_the_runs_of_a_method_have_one_learning_rate(folder: Path) -> None:
    write(folder / "crest-0.2-s0", budget=0.2, learning_rate=0.3)
    message = r"^learning_rate must be the same .*'0\.1 in crest-0\.1-s2, crest-0\.1-s10; 0\.3 in crest-0\.2-s0'[^\n]*$"
    with pytest.raises(ConfigError, match=message):
        collect(folder)


def test_the_same_run_twice_is_refused(folder: Path) -> None:
    write(folder / "copy", seed=2)
    with pytest.raises(ConfigError, match=r"must have one run, got 'copy, crest-0\.1-s2'\. Move the others away"):
        collect(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "nothing must be a folder of runs, got 'nothing there'"),
        ("comparison.png", "comparison.png must be a folder of runs, got 'a file'"),
        ("notes", "notes must hold runs, got 'none'.*--out of torchcrest compare"),
        (
            "full-s2",
            "full-s2 must hold finished runs, got 'only begun ones: full-s2'.*same torchcrest compare once more",
        ),
    ],
)
def test_a_folder_without_finished_runs_is_refused(folder: Path, name: str, message: str) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError, match=message):
        collect(folder / name)
    assert contents(folder) == before
