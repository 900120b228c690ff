"""The energy of a run: how it is split, and that it adds up."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import SMALL, Blobs
from torchcrest.errors import ConfigError
from torchcrest.measure import Meter
from torchcrest.train import run
from torchcrest.train.energy import EnergyMeter
from torchcrest.train.run import Interrupted, train
from torchcrest.train.settings import RunSettings


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def slow(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def slowed(*args: Any, **kw: Any) -> Any:
            self.now += seconds
            return function(*args, **kw)

        return slowed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.read)
    return clock


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    """20 steps."""
    blobs = Blobs(200)
    x, y = blobs.x.numpy(), blobs.y.numpy()
    np.savez(tmp_path / "blobs.npz", x_train=x[:160], y_train=y[:160], x_test=x[160:], y_test=y[160:])
    values: dict[str, Any] = {"batch_size": 16, "epochs": 2, "evaluations": 2, "crest": SMALL, "device": "cpu"}
    return RunSettings(task=f"npz:{tmp_path / 'blobs.npz'}", budget=1.0, **values)


@pytest.fixture
def machine(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine that draws a kWh a second, with codecarbon to read it, and work that takes whole seconds."""
    machine = SimpleNamespace(readings=True)

    class Tracker:
        def __init__(self, *, output_handlers: list[Any], output_methods: list[Any], **settings: Any) -> None:
            assert output_methods == [], "no files"
            self.outputs, self.since = output_handlers, clock.now

        def start(self) -> None:
            self.flush()

        def flush(self) -> None:
            spent, self.since = clock.now - self.since, clock.now
            for output in self.outputs if machine.readings else []:
                output.live_out(None, SimpleNamespace(energy_consumed=spent))
                output.out(None, SimpleNamespace(energy_consumed=0.0))
                output.task_out([], "")

        def stop(self) -> None:
            self.flush()
            for output in self.outputs:
                output.exit()

    monkeypatch.setitem(sys.modules, "codecarbon", SimpleNamespace(OfflineEmissionsTracker=Tracker))
    logger = SimpleNamespace(set_logger_level=lambda level: None)
    monkeypatch.setitem(sys.modules, "codecarbon.external.logger", logger)
    monkeypatch.setattr(run._Run, "_set_rate", clock.slow(run._Run._set_rate, 3))
    monkeypatch.setattr(run._Run, "_evaluate", clock.slow(run._Run._evaluate, 1000))
    monkeypatch.setattr(Meter, "measure", clock.slow(Meter.measure, 2))
    return machine


def seconds(summary: dict[str, Any]) -> dict[str, float]:
    spent = {phase: summary[f"seconds_{phase}"] for phase in ("selecting", "checking", "curvature")}
    return {"training": summary["seconds"] - sum(spent.values()), **spent}


def positive(kwh: dict[str, float]) -> dict[str, float]:
    return {phase: spent for phase, spent in kwh.items() if spent}


def test_a_reading_is_split_by_seconds_and_pauses_are_dropped(clock: Clock) -> None:
    meter = EnergyMeter({"training": 100.0})
    for phase, length in (("training", 3), ("selecting", 1), (None, 4), ("training", 2)):
        meter.switch(phase)  # type: ignore[arg-type]
        clock.now += length
    meter.take(20.0)
    clock.now += 5  # still training, and at another power
    meter.take(1.0)
    meter.take(7.0)  # in no time at all
    assert meter._kwh == {"training": 100 + 10 + 1, "selecting": 2}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["training", "selecting", "checking"]), st.integers(1, 9), st.none() | st.floats(0, 9)
        )
    )
)
def test_the_split_adds_up_to_the_readings(parts: list[tuple[Any, int, float | None]]) -> None:
    """Without pauses nothing is lost, wherever the readings fall."""
    meter, now = EnergyMeter(), 0.0
    meter._since = now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now)
        for phase, length, kwh in parts:
            meter.switch(phase)
            now += length
            if kwh is not None:
                meter.take(kwh)
    assert sum(meter._kwh.values()) == pytest.approx(sum(kwh or 0 for _, _, kwh in parts))


@pytest.mark.parametrize("method", ["random", "crest"])
def test_energy_follows_the_seconds_of_each_phase(
    tmp_path: Path, settings: RunSettings, machine: SimpleNamespace, method: str
) -> None:
    summary = train(RunSettings(**{**vars(settings), "method": method}), tmp_path / "run", energy=True)
    assert positive(summary["energy_kwh"]) == pytest.approx(positive(seconds(summary)))
    assert summary["energy_kwh"]["training"] == 3 * 20
    assert (sum(summary["energy_kwh"].values()) > 100) == (method == "crest"), "selection costs"


def test_a_resumed_run_adds_up(tmp_path: Path, settings: RunSettings, machine: SimpleNamespace) -> None:
    stops = iter(step in (3, 11) for step in range(1, 100))
    for _ in range(2):
        with pytest.raises(Interrupted):
            train(settings, tmp_path / "run", resume=True, stop=stops.__next__, energy=True)
    resumed = train(settings, tmp_path / "run", resume=True, energy=True)
    whole = train(settings, tmp_path / "whole", energy=True)
    assert positive(resumed["energy_kwh"]) == pytest.approx(positive(whole["energy_kwh"]))


def test_a_run_that_began_without_has_none(tmp_path: Path, settings: RunSettings, machine: SimpleNamespace) -> None:
    stops = iter([True] + [False] * 100)
    with pytest.raises(Interrupted):
        train(settings, tmp_path, stop=stops.__next__)
    with pytest.warns(UserWarning, match="began without energy"):
        summary = train(settings, tmp_path, resume=True, stop=stops.__next__, energy=True)
    assert "energy_kwh" not in summary


def test_says_when_nothing_was_read(tmp_path: Path, settings: RunSettings, machine: SimpleNamespace) -> None:
    machine.readings = False
    with pytest.warns(UserWarning, match="codecarbon gave no readings"):
        summary = train(settings, tmp_path, energy=True)
    assert "energy_kwh" not in summary


def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ConfigError, match=r"package for energy must be installed.*torchcrest\[energy\]"):
        train(settings, tmp_path / "run", energy=True)
    assert not (tmp_path / "run").exists()


def test_the_real_codecarbon_measures_and_leaves_nothing_else(
    tmp_path: Path, settings: RunSettings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("codecarbon", minversion="3.3")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    summary = train(settings, tmp_path / "run", energy=True)
    assert summary["energy_kwh"].keys() >= {"training", "selecting"}
    assert 0 < sum(summary["energy_kwh"].values()) < 1
    assert os.listdir() == []
    assert capfd.readouterr() == ("", "")
    assert (root.level, list(root.handlers)) == before
