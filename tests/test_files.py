"""The files of a run directory: whole or not there, clear errors for damaged ones; stopping and resuming."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import BOUNDED, SMALL, Blobs, forkserver, same
from torchcrest.config import CrestConfig
from torchcrest.errors import CheckpointError, ConfigError, DataError
from torchcrest.train import run
from torchcrest.train.files import FORMAT, RunFiles, replacing
from torchcrest.train.run import Interrupted, train
from torchcrest.train.settings import RunSettings


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


def test_replaces_only_with_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    for content in (b"old", b"new"):
        with replacing(path) as file:
            file.write(content)
            file.flush()
            assert not path.exists() or path.read_bytes() == b"old"
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt], ids=["disk full", "Ctrl-C"])
def test_failing_midway_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half of the ne")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(files: RunFiles) -> None:
    files.write_checkpoint({"loader": {}, "settings": {}, "step": 1})
    with pytest.raises(AttributeError):
        files.write_checkpoint({"loader": {}, "settings": {}, "step": lambda: 2})  # cannot be pickled
    assert files.read_checkpoint()["step"] == 1
    assert os.listdir(files.folder) == ["checkpoint.pt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file") as file:
            file.write(b"x")
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode
        assert os.umask(umask) == umask, "writing changed the process's umask"
    finally:
        os.umask(before)


def test_reads_back_what_was_written(files: RunFiles) -> None:
    config = {"task": "npz:a b.npz", "epochs": None, "crest": {"exclude": True, "learned_interval": 0.1}}
    assert not files.began()
    files.write_config(config)
    assert files.read_config() == config
    assert list(files.read_config()) == list(config), "the order is the settings'"
    assert files.began()
    assert not files.finished()
    files.write_summary({"accuracy": 0.1 + 0.2, "active": 3})
    assert files.read_summary() == {"accuracy": 0.1 + 0.2, "active": 3}
    assert files.finished()
    files.append_metrics([{"step": 1}])
    files.append_metrics([{"step": 2}, {"step": 3}])
    assert files.read_metrics() == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_no_metrics_yet_is_an_empty_list(files: RunFiles) -> None:
    assert files.read_metrics() == []
    files.keep_metrics(3)
    assert files.read_metrics() == []


def test_a_last_line_that_was_cut_off_is_left_out(files: RunFiles) -> None:
    files.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "accu')
    assert files.read_metrics() == [{"step": 1}, {"step": 2}]
    files.keep_metrics(1)
    assert files.metrics.read_text() == '{"step": 1}\n'


DAMAGE = [
    ("config", "task: [digits", "settings"),
    ("config", "digits", "settings"),
    ("config", "", "settings"),
    ("config", "- task\n- digits\n", "settings"),
    ("config", "\0\1", "settings"),
    ("summary", '{"accuracy": 0.9', "figures"),
    ("summary", "0.9", "figures"),
    ("summary", '["accuracy"]', "figures"),
    ("summary", "", "figures"),
    ("metrics", '{"step": 1}\n{"st\n{"step": 3}\n', "a JSON object a line"),
    ("metrics", "\n", "a JSON object a line"),
    ("metrics", "[1]\n", "a JSON object a line"),
]


@pytest.mark.parametrize(("name", "content", "what"), DAMAGE)
def test_a_damaged_file_is_named(files: RunFiles, name: str, content: str, what: str) -> None:
    path: Path = getattr(files, name)
    path.write_text(content)
    with pytest.raises(DataError, match=rf"{path.name} must hold .*{what}.*, got .*move the run's folder away"):
        getattr(files, f"read_{name}")()
    assert path.read_text() == content


def test_a_file_that_is_not_text_is_named(files: RunFiles) -> None:
    for name in ("config", "summary", "metrics"):
        getattr(files, name).write_bytes(b"\xff\xfe\n")
        with pytest.raises(DataError, match="must hold"):
            getattr(files, f"read_{name}")()


def saved(state: Any) -> Any:
    return lambda path: torch.save(state, path)


CHECKPOINTS = {
    "text": lambda path: path.write_text("a checkpoint"),
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "a folder": lambda path: path.mkdir(),
    "code": saved({"loader": Path("x"), "settings": {}}),
    "a model": saved({"weight": torch.ones(2)}),
    "a tensor": saved(torch.ones(2)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_foreign_checkpoint_is_refused_and_left_in_place(files: RunFiles, kind: str) -> None:
    CHECKPOINTS[kind](files.checkpoint)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt must (be a checkpoint|hold a torchcrest run), got") as e:
        files.read_checkpoint()
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < len(str(files.checkpoint)) + 300
    assert files.checkpoint.exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_and_left_in_place(files: RunFiles, share: float) -> None:
    files.write_checkpoint({"loader": {"x": torch.ones(500)}, "settings": {}})
    whole = files.checkpoint.read_bytes()
    cut = whole[: int(share * len(whole))]
    files.checkpoint.write_bytes(cut)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt must be a checkpoint, got .* damaged"):
        files.read_checkpoint()
    assert files.checkpoint.read_bytes() == cut


def test_a_checkpoint_with_a_flipped_bit_is_refused(files: RunFiles) -> None:
    files.write_checkpoint({"loader": {"x": torch.ones(5000)}, "settings": {}})
    content = bytearray(files.checkpoint.read_bytes())
    content[len(content) // 2] ^= 64
    files.checkpoint.write_bytes(content)
    with pytest.raises(CheckpointError, match="must be a checkpoint"):
        files.read_checkpoint()


def test_a_checkpoint_of_another_format_is_refused_and_left_in_place(files: RunFiles) -> None:
    files.write_checkpoint({"loader": {}, "settings": {}})
    state = files.read_checkpoint()
    for other in (FORMAT + 1, None):
        torch.save({**state, "format": other}, files.checkpoint)
        content = files.checkpoint.read_bytes()
        match = rf"checkpoint\.pt must have format {FORMAT}, got {other}\. Go on with the torchcrest that wrote it"
        with pytest.raises(CheckpointError, match=match):
            files.read_checkpoint()
        assert files.checkpoint.read_bytes() == content


def test_sweeping_leaves_all_but_what_is_half_written(files: RunFiles) -> None:
    names = {"config.yaml", "metrics.jsonl", "checkpoint.pt", "summary.json"}
    for name in (*names, *(f".{name}.a1b2c3d4" for name in names), ".notes.txt", "checkpoint.pt.old"):
        (files.folder / name).touch()
    files.sweep()
    assert set(os.listdir(files.folder)) == {*names, ".notes.txt", "checkpoint.pt.old"}


# Stopping and resuming -------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> str:
    blobs = Blobs(240)
    x, y = blobs.x.numpy(), blobs.y.numpy()
    np.savez(tmp_path / "blobs.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:])
    return f"npz:{tmp_path / 'blobs.npz'}"


def settings(task: str, **changes: Any) -> RunSettings:
    """18 of 25 steps."""
    values: dict[str, Any] = {"model": "mlp", "batch_size": 16, "epochs": 2, "budget": 0.72, "evaluations": 3}
    return RunSettings(task=task, **(values | {"learning_rate": 0.05, "crest": SMALL} | changes))


def stop_at(*steps: int) -> Callable[[], bool]:
    """Ask to stop after these of the steps to come."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) in steps


def interrupt(settings: RunSettings, folder: Path, steps: int) -> None:
    with pytest.raises(Interrupted, match=r"stopped after step \d+ of \d+"):
        train(settings, folder, resume=True, stop=stop_at(steps))


CLOCKED = {"peak_memory", "overhead"}


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Return the model, and all that the files say, but for the seconds and the memory."""
    files = RunFiles(folder)
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in files.read_metrics()]
    summary = {k: v for k, v in files.read_summary().items() if "seconds" not in k and k not in CLOCKED}
    return files.read_checkpoint()["model"], lines, summary


@pytest.mark.parametrize("stops", [(1,), (5,), (6,), (11,), (17,), (4, 3), (2, 10), (6, 6, 1)], ids=str)
@pytest.mark.parametrize("method", ["random", "truncated", "crest"])
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    tmp_path: Path, task: str, method: str, stops: tuple[int, ...]
) -> None:
    train(settings(task, method=method), tmp_path / "whole")
    for stop in stops:
        interrupt(settings(task, method=method), tmp_path / "parts", stop)
    before = RunFiles(tmp_path / "parts").read_checkpoint()["seconds"]
    summary = train(settings(task, method=method), tmp_path / "parts", resume=True)
    whole, parts = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    assert same(whole[0], parts[0])
    assert whole[1:] == parts[1:]
    assert summary["seconds"] > before, "the clock goes on, it doesn't start anew"


def test_a_stop_at_the_last_step_finishes(tmp_path: Path, task: str) -> None:
    summary = train(settings(task), tmp_path / "run", stop=stop_at(18))
    assert summary["steps"] == 18
    assert RunFiles(tmp_path / "run").finished()


def test_lines_beyond_the_checkpoint_are_written_anew(tmp_path: Path, task: str) -> None:
    """As after a power cut between the lines and the checkpoint that knows of them."""
    train(settings(task), tmp_path / "whole")
    interrupt(settings(task), tmp_path / "cut", 8)
    with RunFiles(tmp_path / "cut").metrics.open("a") as file:
        file.write('{"event": "check", "step": 9}\n{"event": "evaluation", "step": 12}\n{"event": "ev')
    train(settings(task), tmp_path / "cut", resume=True)
    assert outcome(tmp_path / "cut")[1] == outcome(tmp_path / "whole")[1]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path, task: str) -> None:
    train(settings(task), tmp_path / "whole")
    files = RunFiles(tmp_path / "killed")
    train(settings(task), files.folder)
    files.summary.unlink()
    files.checkpoint.unlink()
    train(settings(task), files.folder, resume=True)
    assert outcome(tmp_path / "whole")[1:] == outcome(files.folder)[1:]


def die(settings: RunSettings, folder: Path, moment: str, times: int) -> None:
    """Go on with a run until something has been done so many times, and be killed there."""
    left, place = iter(range(times - 1, -1, -1)), os if moment == "replace" else RunFiles
    act = getattr(place, moment)

    def counted(*args: Any) -> None:
        half = moment == "replace"  # a checkpoint that is written and has not its name yet
        if not half:
            act(*args)
        if (not half or Path(args[1]).name == "checkpoint.pt") and not next(left):
            os.kill(os.getpid(), signal.SIGKILL)
        if half:
            act(*args)

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # As in a process of its own; workers that hang on a fork server do not see that the run is dead.
    multiprocessing.set_start_method("fork", force=True)
    setattr(place, moment, counted)
    train(settings, folder, resume=True)


# Lines before the first checkpoint; a checkpoint that is half written; the last checkpoint, and no summary.
KILLS = [("append_metrics", 1), ("replace", 3), ("write_checkpoint", 4)]


def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """A checkpoint every third step; each process is killed where it has no chance to tidy up."""
    random = np.random.default_rng(0)
    y = random.integers(3, size=90)
    x = (random.integers(0, 90, (90, 8, 8)) + 60 * y[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "images.npz", x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    given = {"augment": True, "flip": True, "num_workers": 2, "epochs": 6, "budget": 0.75, "evaluations": 6}
    run = settings(f"npz:{tmp_path / 'images.npz'}", **given, crest=BOUNDED)
    assert train(run, tmp_path / "whole")["steps"] == 18
    context = forkserver()
    for kill in KILLS:
        process = context.Process(target=die, args=(run, tmp_path / "killed", *kill))
        process.start()
        process.join(100)
        assert process.exitcode == -signal.SIGKILL, kill
    train(run, tmp_path / "killed", resume=True)
    assert sorted(os.listdir(tmp_path / "killed")) == sorted(os.listdir(tmp_path / "whole"))
    whole, killed = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert same(whole[0], killed[0])
    assert whole[1:] == killed[1:]


def test_resuming_what_is_not_there_begins(tmp_path: Path, task: str) -> None:
    assert train(settings(task), tmp_path / "new", resume=True)["steps"] == 18


def test_resuming_a_finished_run_returns_its_summary(
    tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = train(settings(task), tmp_path / "run")
    monkeypatch.delattr(run._Run, "go")
    assert train(settings(task), tmp_path / "run", resume=True) == summary


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoint.pt", "summary.json"])
def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path, task: str, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    with pytest.raises(ConfigError, match=r"out must be a folder without a run, got .*run.*--resume"):
        train(settings(task), tmp_path / "run")
    assert (tmp_path / "run" / name).read_text() == "precious"


def test_other_settings_are_refused_by_name(tmp_path: Path, task: str) -> None:
    interrupt(settings(task), tmp_path / "run", 5)
    other = settings(task, seed=1, learning_rate=0.1, epochs=3)
    with pytest.raises(CheckpointError, match=r"(?s)epochs .* 3.*2.*learning_rate .* 0\.1.*0\.05.*seed .* 1.*0"):
        train(other, tmp_path / "run", resume=True)
    train(settings(task), tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="seed"):
        train(other, tmp_path / "run", resume=True)


def test_of_other_crest_settings_only_those_that_differ_are_named(tmp_path: Path, task: str) -> None:
    interrupt(settings(task), tmp_path / "run", 5)
    other = settings(task, crest=CrestConfig(**{**SMALL.to_dict(), "pool_size": 64}))
    with pytest.raises(CheckpointError, match=r"crest\.pool_size .*64.*48") as error:
        train(other, tmp_path / "run", resume=True)
    assert "tolerance" not in str(error.value)


@pytest.mark.parametrize("other", [{"method": "random"}, {"seed": 1}, {"epochs": 4}, {"learning_rate": 0.1}], ids=str)
def test_another_run_s_checkpoint_is_refused(tmp_path: Path, task: str, other: dict[str, Any]) -> None:
    interrupt(settings(task), tmp_path / "run", 5)
    interrupt(settings(task, **other), tmp_path / "other", 5)
    (tmp_path / "other" / "checkpoint.pt").replace(tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        train(settings(task), tmp_path / "run", resume=True)


DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no step": lambda state: state.pop("step"),
    "no model": lambda state: state.pop("model"),
    "a model of another shape": lambda state: state["model"].update({"head.bias": torch.ones(9)}),
    "a model with more": lambda state: state["model"].update({"tail.bias": torch.ones(9)}),
    "no optimizer": lambda state: state.update(optimizer={}),
    "an optimizer of another model": lambda state: state["optimizer"]["param_groups"].append({"params": [99]}),
    "no loader": lambda state: state.update(loader={}),
    "a damaged loader": lambda state: state["loader"].pop("place"),
    "no list": lambda state: state.update(lines="many"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_checkpoint_that_does_not_fit_is_refused_and_left_in_place(tmp_path: Path, task: str, damage: str) -> None:
    interrupt(settings(task), tmp_path / "run", 5)
    files = RunFiles(tmp_path / "run")
    state = files.read_checkpoint()
    DAMAGED[damage](state)
    files.write_checkpoint(state)
    damaged, metrics = files.checkpoint.read_bytes(), files.metrics.read_bytes()
    with pytest.raises(CheckpointError):
        train(settings(task), tmp_path / "run", resume=True)
    assert files.checkpoint.read_bytes() == damaged
    assert files.metrics.read_bytes() == metrics
