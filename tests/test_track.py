"""Trackers: they change no run, hear of every line once, and cannot take a run down."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import SMALL, Blobs, same
from torchcrest.errors import ConfigError
from torchcrest.train.files import RunFiles
from torchcrest.train.run import Interrupted, train
from torchcrest.train.settings import RunSettings
from torchcrest.train.track import TRACKERS, numbers, refuse_missing

Rows = list[tuple[int, dict[str, float]]]


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    """20 steps."""
    blobs = Blobs(200)
    x, y = blobs.x.numpy(), blobs.y.numpy()
    np.savez(tmp_path / "blobs.npz", x_train=x[:160], y_train=y[:160], x_test=x[160:], y_test=y[160:])
    values: dict[str, Any] = {"batch_size": 16, "epochs": 2, "evaluations": 3, "crest": SMALL, "device": "cpu"}
    return RunSettings(task=f"npz:{tmp_path / 'blobs.npz'}", budget=1.0, **values)


class Service:
    """Stands in for trackio and wandb: keeps what it is told, prints unless told not to, fails when it is to."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.rows: Rows = []
        self.finished = 0
        self.fails_at = {"init": -1, "log": -1, "finish": -1}
        self.on_log: Callable[[], None] = lambda: None

    def _say(self, what: str) -> None:
        if not self.silent:
            print(what)  # noqa: T201

    def _fail(self, name: str) -> None:
        self.fails_at[name] -= 1
        if self.fails_at[name] == -1:
            raise OSError(f"no {name}\ntoday")

    def init(self, project: str, name: str, **settings: Any) -> Service:
        self.silent = settings.get("settings") == self.Settings(silent=True, console="off")
        self._say("initialized")
        self._fail("init")
        self.begun.append({"project": project, "name": name, **settings})
        return self

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self._fail("log")
        self.on_log()
        rest = dict(values)
        self.rows.append((int(rest.pop("step")) if step is None else step, rest))

    def finish(self) -> None:
        self._say("finished")
        self.finished += 1
        self._fail("finish")

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    Settings = SimpleNamespace


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> dict[str, Service]:
    services = {name: Service() for name in ("trackio", "wandb")}
    for name, service in services.items():
        monkeypatch.setitem(sys.modules, name, service)
    return services


def scalars(folder: Path) -> Rows:
    """Read what TensorBoard was told, a row an event."""
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, {tag: event.value}) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]


def expected(folder: Path) -> Rows:
    """Return the rows that a run's files call for."""
    files = RunFiles(folder)
    records = [
        *files.read_metrics(),
        {"event": "summary", "step": files.read_summary()["steps"], **files.read_summary()},
    ]
    return [(each["step"], numbers({**each, "step": None}, each["event"])) for each in records]


def single(rows: Rows) -> list[tuple[int, str, float]]:
    return sorted((step, name, float(np.float32(value))) for step, row in rows for name, value in row.items())


def train_with_stops(settings: RunSettings, folder: Path, trackers: tuple[str, ...], *steps: int) -> dict[str, Any]:
    stops = iter(step in steps for step in range(1, 100))
    for _ in steps:
        with pytest.raises(Interrupted):
            train(settings, folder, resume=True, stop=stops.__next__, trackers=trackers)
    return train(settings, folder, resume=True, trackers=trackers)


# What they are told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(), (1, 9), (14,)], ids=["at once", "resumed twice", "resumed"])
def test_tensorboard_holds_every_number_of_the_files_once(
    tmp_path: Path, settings: RunSettings, steps: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    train_with_stops(settings, tmp_path / "run", ("tensorboard",), *steps)
    found = single(scalars(tmp_path / "run"))
    assert found == single(expected(tmp_path / "run"))
    names = {name for _, name, _ in found}
    assert names >= {"evaluation/accuracy", "region/interval", "check/rho", "check/passed", "summary/peak_memory"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_services_hold_every_number_of_the_files_once(
    tmp_path: Path, settings: RunSettings, services: dict[str, Service], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train_with_stops(settings, tmp_path / "run", (name,), 1, 9)
    service = services[name]
    assert service.rows == expected(tmp_path / "run")
    first, *later = service.begun
    assert later == [first, first], "a resumed run is the same one"
    assert (first["project"], first["resume"]) == ("torchcrest", "allow")
    assert first["name"].startswith("run")
    assert first["config"] == RunFiles(tmp_path / "run").read_config()
    assert service.finished == 3
    train(settings, tmp_path / "again" / "run", trackers=(name,))
    identity = {"trackio": "name", "wandb": "id"}[name]
    assert service.begun[-1][identity] != first[identity], "a run of the same name is another one"
    assert capsys.readouterr() == ("", "")


def test_they_are_never_ahead_of_the_checkpoint(
    tmp_path: Path, settings: RunSettings, services: dict[str, Service]
) -> None:
    service, known = services["wandb"], []
    service.on_log = lambda: known.append(RunFiles(tmp_path / "run").read_checkpoint()["lines"] - len(service.rows))
    train(settings, tmp_path / "run", trackers=("wandb",))
    *lines, summary = known
    assert min(lines) == 1
    assert summary == 0


@pytest.mark.parametrize("trackers", [("tensorboard",), ("trackio", "wandb")], ids="-".join)
def test_they_change_nothing(
    tmp_path: Path, settings: RunSettings, services: dict[str, Service], trackers: tuple[str, ...]
) -> None:
    before = torch.get_rng_state()
    train(settings, tmp_path / "plain")
    train(settings, tmp_path / "tracked", trackers=trackers)
    plain, tracked = (RunFiles(tmp_path / name) for name in ("plain", "tracked"))
    assert same(plain.read_checkpoint()["model"], tracked.read_checkpoint()["model"])
    undated = [[{**line, "seconds": 0} for line in files.read_metrics()] for files in (plain, tracked)]
    assert undated[0] == undated[1]
    assert torch.equal(before, torch.get_rng_state())


# Where they fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["log", "finish"])
def test_one_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, settings: RunSettings, services: dict[str, Service], where: str
) -> None:
    services["trackio"].fails_at[where] = 2 if where == "log" else 0
    with pytest.warns(UserWarning, match=rf"trackio failed \(OSError: no {where}\) and is left out") as warned:
        summary = train(settings, tmp_path, trackers=("trackio", "wandb"))
    assert len(warned) == 1
    assert RunFiles(tmp_path).read_summary() == summary
    assert services["wandb"].rows == expected(tmp_path)
    assert services["trackio"].rows == expected(tmp_path)[: 2 if where == "log" else None]


def test_one_that_cannot_begin_is_refused_before_training(
    tmp_path: Path, settings: RunSettings, services: dict[str, Service]
) -> None:
    services["wandb"].fails_at["init"] = 0
    with pytest.raises(ConfigError, match=r"wandb must begin, got 'OSError: no init'\. Mend that"):
        train(settings, tmp_path / "run", trackers=("trackio", "wandb"))
    assert services["trackio"].finished == 1
    assert not RunFiles(tmp_path / "run").checkpoint.exists()


def test_an_error_of_the_run_ends_them(tmp_path: Path, settings: RunSettings, services: dict[str, Service]) -> None:
    with pytest.raises(Interrupted):
        train(settings, tmp_path, trackers=("wandb",), stop=lambda: True)
    assert services["wandb"].finished == 1
    assert not any(name.startswith("summary") for _, row in services["wandb"].rows for name in row)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ConfigError, match=rf"package for {name} must be installed.*pip install 'torchcrest\[{name}\]'"):
        train(settings, tmp_path / "run", trackers=(name,))
    assert not (tmp_path / "run").exists()


def test_names_all_that_are_unknown_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("trackio", "codecarbon"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"got 'wand'\. Did you mean wandb\?") as error:
        refuse_missing(["trackio", "wand", "energy"], energy=True)
    found = [line.partition(" must")[0] for line in str(error.value).splitlines()]
    assert found == ["track", "track", "the package for trackio", "the package for energy"]
