"""One training run: its files, its steps and rates, its clock, its data, its errors."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import SMALL, Blobs, same
from torchcrest.errors import ConfigError, NonFiniteLossError
from torchcrest.train import run
from torchcrest.train.files import RunFiles
from torchcrest.train.methods import METHODS, Config
from torchcrest.train.models import build
from torchcrest.train.run import Interrupted, Status, prepare, train
from torchcrest.train.schedule import learning_rate
from torchcrest.train.settings import RunSettings
from torchcrest.train.tasks import Examples, Task, load

SUMMARY = {
    *("method", "accuracy", "test_loss", "seconds", "seconds_selecting", "seconds_checking", "seconds_curvature"),
    *("steps", "examples_trained", "examples_forwarded", "regions", "checks", "active", "seed", "versions", "device"),
}
EVALUATION = {
    *("event", "step", "seconds", "accuracy", "test_loss", "train_loss", "learning_rate", "examples_trained"),
    *("examples_forwarded", "active"),
}
REGION = {"event", "step", "region", "coresets", "interval", "loss", "gradient_norm", "curvature_norm", "active"}
CHECK = {"event", "step", "region", "rho", "predicted", "loss", "passed"}


@pytest.fixture
def blobs_file(tmp_path: Path) -> str:
    blobs = Blobs(480)
    x, y = blobs.x.numpy(), blobs.y.numpy()
    np.savez(tmp_path / "blobs.npz", x_train=x[:400], y_train=y[:400], x_test=x[400:], y_test=y[400:])
    return f"npz:{tmp_path / 'blobs.npz'}"


@pytest.fixture
def images_file(tmp_path: Path) -> str:
    random = np.random.default_rng(0)
    y = random.integers(3, size=90)
    x = (random.integers(0, 60, (90, 8, 8)) + 60 * y[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    return f"npz:{tmp_path / 'images.npz'}"


def settings(task: str, **changes: Any) -> RunSettings:
    """25 batches an epoch, 50 steps in full, 20 in the budget."""
    values: dict[str, Any] = {"model": "mlp", "batch_size": 16, "epochs": 2, "budget": 0.4, "evaluations": 4}
    values |= {"learning_rate": 0.05, "crest": SMALL, "device": "cpu"}
    return RunSettings(task=task, **(values | changes))


def final(folder: Path) -> dict[str, Tensor]:
    model: dict[str, Tensor] = RunFiles(folder).read_checkpoint()["model"]
    return model


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [line for line in RunFiles(folder).read_metrics() if line["event"] == "evaluation"]


def undated(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# What a run leaves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_fills_a_run_directory(
    tmp_path: Path, blobs_file: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(settings(blobs_file, method=method, seed=3), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoint.pt", "config.yaml", "metrics.jsonl", "summary.json"]
    assert capsys.readouterr() == ("", ""), "a library call prints nothing"
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert summary.keys() >= SUMMARY
    assert (summary["method"], summary["seed"]) == (method, 3)
    assert summary["accuracy"] in [right / 80 for right in range(81)]
    assert summary["accuracy"] > 0.4, "chance is 0.25"
    steps = 50 if method == "full" else 20
    assert summary["steps"] == steps
    assert summary["examples_trained"] == 16 * steps
    spent = summary["seconds_selecting"] + summary["seconds_checking"] + summary["seconds_curvature"]
    if method in ("crest", "craig", "gradmatch", "glister"):
        assert 0 < spent < summary["seconds"]
        assert summary["examples_forwarded"] > 0
    else:
        assert spent == summary["examples_forwarded"] == 0
    assert min(summary["regions"], summary["checks"]) >= 2 or method != "crest"
    active = {"crest": summary["active"], "craig": 160, "gradmatch": 160, "glister": 144}.get(method, 400)
    assert summary["active"] == active, "GLISTER holds a tenth out first"
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["device"].startswith("cpu")


def test_metrics_hold_evaluations_regions_and_checks(tmp_path: Path, blobs_file: str) -> None:
    summary = train(settings(blobs_file), tmp_path)
    lines = RunFiles(tmp_path).read_metrics()
    found = {kind: [line for line in lines if line["event"] == kind] for kind in ("evaluation", "region", "check")}
    for kind, fields in (("evaluation", EVALUATION), ("region", REGION), ("check", CHECK)):
        assert all(line.keys() == fields for line in found[kind]), kind
    assert [line["step"] for line in found["evaluation"]] == [5, 10, 15, 20]
    assert (len(found["region"]), len(found["check"])) == (summary["regions"], summary["checks"])
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert found["evaluation"][-1].items() >= {key: summary[key] for key in ("accuracy", "seconds")}.items()


def test_a_watcher_changes_nothing(tmp_path: Path, blobs_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", count().__next__)  # told after each step
    told: list[Status] = []
    train(settings(blobs_file), tmp_path / "alone")
    train(settings(blobs_file), tmp_path / "watched", watch=told.append)
    assert undated(RunFiles(tmp_path / "alone").read_metrics()) == undated(
        RunFiles(tmp_path / "watched").read_metrics()
    )
    assert [status.step for status in told] == list(range(1, 21))
    assert [status.step for status in told if status.evaluated] == [5, 10, 15, 20]
    assert {status.steps for status in told} == {20}
    assert [status.accuracy for status in told[:4]] == [None] * 4
    assert all(0 < status.loss < 5 for status in told), [status.loss for status in told]
    assert all(status.interval and 0 < status.active <= 1 and status.overhead > 0 for status in told)


# Steps and rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "epochs", "steps"), [(0.1, 2, 5), (0.25, 2, 12), (1.0, 0.5, 12), (0.001, 1, 1)])
def test_the_budget_is_a_share_of_the_full_steps(
    tmp_path: Path, blobs_file: str, budget: float, epochs: float, steps: int
) -> None:
    summary = train(settings(blobs_file, method="random", budget=budget, epochs=epochs), tmp_path)
    assert summary["full_steps"] == round(epochs * 400 / 16)
    assert summary["steps"] == steps == max(1, round(budget * summary["full_steps"]))
    assert evaluations(tmp_path)[-1]["step"] == steps


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
@pytest.mark.parametrize("method", METHODS)
def test_all_but_truncated_fit_the_schedule_into_their_steps(
    tmp_path: Path, blobs_file: str, method: str, schedule: str
) -> None:
    train(settings(blobs_file, method=method, schedule=schedule, epochs=1, evaluations=25), tmp_path)
    steps, length = {"full": (25, 25), "truncated": (10, 25)}.get(method, (10, 10))
    expected = [learning_rate(step, length, base=0.05, kind=schedule) for step in range(steps)]  # type: ignore[arg-type]
    assert [line["learning_rate"] for line in evaluations(tmp_path)] == expected


def test_adamw_is_used(tmp_path: Path, blobs_file: str) -> None:
    summary = train(settings(blobs_file, optimizer="adamw", learning_rate=0.01, schedule="cosine"), tmp_path)
    state = RunFiles(tmp_path).read_checkpoint()["optimizer"]
    assert "exp_avg_sq" in state["state"][0]
    assert summary["accuracy"] > 0.6


def test_weight_decay_and_momentum_reach_the_optimizer(tmp_path: Path, blobs_file: str) -> None:
    train(settings(blobs_file, method="random", momentum=0.5, weight_decay=0.0), tmp_path)
    group = RunFiles(tmp_path).read_checkpoint()["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.0)


# The same run, or one that is comparable -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "crest"])
def test_the_seed_decides_the_run(tmp_path: Path, blobs_file: str, method: str) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(list(tmp_path.iterdir())))  # whatever was drawn before
        train(settings(blobs_file, method=method, seed=seed), tmp_path / name)
    assert same(final(tmp_path / "a"), final(tmp_path / "b"))
    assert not same(final(tmp_path / "a"), final(tmp_path / "c"))
    a, b = (undated(RunFiles(tmp_path / name).read_metrics()) for name in "ab")
    assert a == b


def test_methods_start_from_the_same_model_and_random_order(tmp_path: Path, blobs_file: str) -> None:
    """A budget of 1 makes random, truncated and full one and the same run."""
    for method in ("full", "truncated", "random"):
        train(settings(blobs_file, method=method, budget=1.0, epochs=1), tmp_path / method)
    assert same(final(tmp_path / "full"), final(tmp_path / "random"))
    assert same(final(tmp_path / "full"), final(tmp_path / "truncated"))


def test_crest_with_pools_as_large_as_batches_weighs_all_alike(tmp_path: Path, blobs_file: str) -> None:
    """Then nothing is selected: each pool is its own coreset, and it trains as well as random batches."""
    crest = replace(SMALL, pool_size=16, exclude=False, check="none")
    task, resolved = prepare(settings(blobs_file, crest=crest))
    seen: list[Tensor] = []
    loaders: dict[str, Config | int] = {"random": 16, "crest": resolved.crest}
    for name, config in loaders.items():
        model = build("mlp", task.shape, task.classes, 0)
        loader = METHODS[name].build(model, task.train, config, 25, 0, 0)
        indices = []
        for batch in loader:
            assert torch.equal(batch.weights, torch.ones(16))
            indices.append(loader.indices)
        seen.append(torch.cat(indices))
    assert seen[0].sort()[0].equal(torch.arange(400)), "25 random batches are an epoch"
    assert len(seen[1].unique()) >= 300, "coresets left over at the end of the last region are not trained on"
    runs = [settings(blobs_file, method=name, crest=crest, budget=1.0) for name in loaders]
    random, crest_s = [train(each, tmp_path / each.method)["accuracy"] for each in runs]
    assert crest_s == pytest.approx(random, abs=0.1)


@pytest.mark.parametrize("method", ["random", "crest"])
def test_augments_images(tmp_path: Path, images_file: str, method: str) -> None:
    options: dict[str, Any] = {"method": method, "model": "cnn", "epochs": 1, "budget": 1.0, "evaluations": 1}
    options["crest"] = replace(SMALL, pool_size=32)
    for name, augment in (("plain", False), ("augmented", True), ("again", True)):
        train(settings(images_file, augment=augment, flip=augment, **options), tmp_path / name)
    assert same(final(tmp_path / "augmented"), final(tmp_path / "again"))
    assert not same(final(tmp_path / "augmented"), final(tmp_path / "plain"))


@pytest.mark.parametrize("method", ["random", "crest"])
def test_augmentation_is_the_same_with_workers_and_in_a_resumed_run(
    tmp_path: Path, images_file: str, method: str
) -> None:
    options: dict[str, Any] = {"method": method, "model": "cnn", "epochs": 5, "budget": 0.5, "evaluations": 1}
    run = settings(images_file, augment=True, flip=True, crest=replace(SMALL, pool_size=32), **options)
    train(run, tmp_path / "whole")
    for name, workers in (("alone", 0), ("helped", 2)):
        asked = count(1)
        part = replace(run, num_workers=workers)
        with pytest.raises(Interrupted):
            train(part, tmp_path / name, stop=lambda asked=asked: next(asked) == 4)  # type: ignore[misc]
        train(part, tmp_path / name, resume=True)
        assert same(final(tmp_path / "whole"), final(tmp_path / name)), name


# Data and clock ----------------------------------------------------------------------------------------------


def test_test_data_is_read_for_evaluation_only(
    tmp_path: Path, blobs_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[int] = Counter()
    evaluating = False
    read, evaluate = Examples.__getitems__, run._Run._evaluate

    def counted(self: Examples, indices: list[int]) -> tuple[Tensor, Tensor]:
        assert (len(self) == 80) == evaluating, "train and test examples differ in number"
        reads[len(self)] += len(indices)
        return read(self, indices)

    def marked(self: Any) -> None:
        nonlocal evaluating
        evaluating = True
        evaluate(self)
        evaluating = False

    monkeypatch.setattr(Examples, "__getitems__", counted)
    monkeypatch.setattr(run._Run, "_evaluate", marked)
    train(settings(blobs_file), tmp_path)
    assert reads[80] == 4 * 80
    assert reads[400] > 0


def test_poisoned_test_data_change_no_training(
    tmp_path: Path, blobs_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(*args: Any, **kw: Any) -> Task:
        task = load(*args, **kw)
        test = Examples(task.test.inputs + 100, task.test.targets.flip(0), mean=0.0, std=1.0)
        return replace(task, test=test)

    train(settings(blobs_file), tmp_path / "clean")
    monkeypatch.setattr("torchcrest.train.run.load", poisoned)
    train(settings(blobs_file), tmp_path / "poisoned")
    assert same(final(tmp_path / "clean"), final(tmp_path / "poisoned"))


def test_the_clock_counts_training_alone_and_all_of_it(
    tmp_path: Path, blobs_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that, as a GPU does, works while Python goes on: a step's second passes in the next wait for it."""
    now = queued = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "monotonic", count().__next__)  # told after each step

    def after(function: Callable[..., Any], seconds: float, work: float = 0, wait: bool = False) -> Callable[..., Any]:
        def slow(*args: Any, **kw: Any) -> Any:
            nonlocal now, queued
            now += seconds + wait * queued
            queued = work + (not wait) * queued
            return function(*args, **kw)

        return slow

    monkeypatch.setattr("torchcrest.train.run.synchronize", after(lambda device: None, 0, wait=True))
    monkeypatch.setattr(run._Run, "_look_at_losses", after(run._Run._look_at_losses, 0, wait=True))
    monkeypatch.setattr(run._Run, "_set_rate", after(run._Run._set_rate, 0, work=1))
    monkeypatch.setattr(run._Run, "_evaluate", after(run._Run._evaluate, 1000))
    monkeypatch.setattr(run._Run, "_save", after(run._Run._save, 1000))
    for name, watch in (("alone", None), ("watched", after(lambda status: None, 1000))):
        train(settings(blobs_file, method="random"), tmp_path / name, watch=watch)
        assert [line["seconds"] for line in evaluations(tmp_path / name)] == [5, 10, 15, 20], name


# Errors ------------------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, where: int) -> None:
    """Make one training example NaN, past the checks of the file."""

    def poisoned(*args: Any, **kw: Any) -> Task:
        task = load(*args, **kw)
        task.train.inputs[where] = float("nan")
        return task

    monkeypatch.setattr("torchcrest.train.run.load", poisoned)


@pytest.mark.parametrize("method", ["random", "crest"])
def test_a_nan_in_the_training_data_is_named(
    tmp_path: Path, blobs_file: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    poison(monkeypatch, 123)
    with pytest.raises(NonFiniteLossError, match=r"(step \d+.*1 of 16|after step \d+ for 1 of 48).*indices 123\)"):
        train(settings(blobs_file, method=method, budget=1.0), tmp_path)
    assert not RunFiles(tmp_path).finished()


@pytest.mark.parametrize("evaluations", [1, 20], ids=["looks every 16 steps", "looks each step"])
@pytest.mark.parametrize("method", ["random", "crest"])
def test_a_loss_that_explodes_is_named(tmp_path: Path, blobs_file: str, method: str, evaluations: int) -> None:
    exploding = settings(blobs_file, method=method, learning_rate=1e6, warmup=0.0, evaluations=evaluations)
    with pytest.raises(NonFiniteLossError, match=r"(in|after) step \d+.*data-set indices \d+.*Lower the learning rate"):
        train(exploding, tmp_path)
    assert not RunFiles(tmp_path).finished()


@pytest.mark.parametrize("method", ["random", "crest"])
def test_a_run_whose_last_step_explodes_is_not_finished(tmp_path: Path, blobs_file: str, method: str) -> None:
    """The training losses are finite up to the end; the model isn't."""
    exploding = settings(blobs_file, method=method, budget=0.001, learning_rate=1e30, warmup=0.0)
    with pytest.raises(NonFiniteLossError, match="step 1"):
        train(exploding, tmp_path)
    assert not RunFiles(tmp_path).finished()


def test_a_hint_for_the_pool_size_works(tmp_path: Path, blobs_file: str) -> None:
    with pytest.raises(ConfigError, match=r"Use for example") as error:
        train(settings(blobs_file, batch_size=128, crest=replace(SMALL, pool_size=512, batch_size=128)), tmp_path)
    assert 128 <= int(str(error.value).split()[-1].strip(".")) <= 400


def test_lists_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        RunSettings(task="digits", method="x", budget=2, epochs=-1, warmup=1, evaluations=0)
    named = [line.split()[0] for line in str(error.value).splitlines()]
    assert named == ["method", "budget", "evaluations", "epochs", "warmup"]


@pytest.mark.parametrize(
    ("method", "budget", "left"), [("craig", 0.03, 400), ("gradmatch", 0.03, 400), ("glister", 0.04, 360)]
)
def test_a_budget_too_small_for_a_subset_is_refused_first(
    tmp_path: Path, blobs_file: str, method: str, budget: float, left: int
) -> None:
    with pytest.raises(ConfigError, match=f"budget must give {method} at least batch_size = 16 of {left} examples"):
        train(settings(blobs_file, method=method, budget=budget), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_whole_numbers_are_written_down_as_the_command_gives_them() -> None:
    written = [RunSettings(task="digits", epochs=epochs).to_dict()["epochs"] for epochs in (10, 10.0)]
    assert [repr(each) for each in written] == ["10.0", "10.0"]
