"""The most memory a run had in use, on every kind of device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Blobs
from torchcrest import RandomBatches
from torchcrest.train import memory
from torchcrest.train.memory import PeakMemory
from torchcrest.train.run import Interrupted, train
from torchcrest.train.settings import RunSettings

MB = 1_000_000
LARGE = 200 * MB


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    blobs = Blobs(200)
    x, y = blobs.x.numpy(), blobs.y.numpy()
    np.savez(tmp_path / "blobs.npz", x_train=x[:160], y_train=y[:160], x_test=x[160:], y_test=y[160:])
    task = f"npz:{tmp_path / 'blobs.npz'}"
    return RunSettings(task=task, method="random", budget=1.0, batch_size=16, epochs=1, evaluations=2, device="cpu")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let loaders hold a large tensor while they make a batch; undo it to have small ones again."""
    make = RandomBatches._next_batch

    def allocate(self: RandomBatches) -> Any:
        held = torch.ones(LARGE // 4)
        batch = make(self)
        del held
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(RandomBatches, "_next_batch", allocate)
        yield patch


def test_what_a_loader_holds_is_seen_and_the_next_run_does_not_inherit_it(
    tmp_path: Path, settings: RunSettings, large: pytest.MonkeyPatch
) -> None:
    first = train(settings, tmp_path / "large")
    large.undo()
    second = train(settings, tmp_path / "small")
    assert first["peak_memory_of"] == second["peak_memory_of"] == "process"
    if sys.platform == "linux":  # elsewhere the peak is that of the process's whole life
        assert first["peak_memory"] - second["peak_memory"] == pytest.approx(LARGE, abs=40 * MB)
    assert first["peak_memory"] > LARGE


def test_a_resumed_run_keeps_the_larger_peak(tmp_path: Path, settings: RunSettings, large: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", stop=lambda: True)
    large.undo()
    resumed = train(settings, tmp_path / "run", resume=True)["peak_memory"]
    assert resumed >= train(settings, tmp_path / "small")["peak_memory"] + (LARGE - 40 * MB) * (sys.platform == "linux")


def test_cuda_tells_its_own_peak_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    device, peaks = torch.device("cuda:1"), {torch.device("cuda:1"): 10**9}
    fake = SimpleNamespace(
        max_memory_allocated=lambda of: peaks[of], reset_peak_memory_stats=lambda of: peaks.update({of: 7})
    )
    monkeypatch.setattr(torch, "get_device_module", lambda of: fake)
    peak = PeakMemory(device)
    assert (peak.of, peak.read()) == ("cuda", 7)
    assert PeakMemory(device, before=20).read() == 20


def test_mps_is_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([5, 9, 8])
    monkeypatch.setattr(torch, "get_device_module", lambda of: SimpleNamespace(driver_allocated_memory=held.__next__))
    peak = PeakMemory(torch.device("mps"))
    assert [peak.read() for _ in range(3)] == [5, 9, 9]
    assert peak.of == "mps"


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_without_proc_it_is_what_getrusage_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, unit: int
) -> None:
    resource = SimpleNamespace(getrusage=lambda who: SimpleNamespace(ru_maxrss=3), RUSAGE_SELF=0)
    for name in ("STATUS", "RESET"):
        monkeypatch.setattr(memory, name, tmp_path / "none" / "none")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setitem(sys.modules, "resource", resource)
    assert PeakMemory(torch.device("cpu")).read() == 3 * unit
    monkeypatch.setitem(sys.modules, "resource", None)
    assert PeakMemory(torch.device("cpu")).read() is None
