"""The command: what it refuses and how, configuration files, comparisons and reports, stopping and going on."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from rich.console import Console

import torchcrest
from conftest import Blobs, same
from torchcrest import cli
from torchcrest.errors import DataError
from torchcrest.report import table
from torchcrest.train import ablate
from torchcrest.train import compare as comparing
from torchcrest.train.files import RunFiles
from torchcrest.train.methods import CONFIGS
from torchcrest.train.verdict import FEW_SEEDS, judge

# 20 steps in full, 10 in the budget, of blobs.npz
QUICK = ["--epochs=2", "--batch_size=16", "--budget=0.5", "--evaluations=2"]
QUICK += ["--crest.pool_size=48", "--crest.interval_scale=3", "--crest.exclude=false"]
BLOBS = ["train", "npz:blobs.npz", *QUICK]


class Result(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with data in it."""
    monkeypatch.chdir(tmp_path)
    blobs = Blobs(200)
    x, y = blobs.x.numpy(), blobs.y.numpy()

    def save(name: str, y_train: Any = y[:160], x_train: Any = x[:160]) -> None:
        np.savez(name, x_train=x_train, y_train=y_train, x_test=x[160:], y_test=y[160:])

    save("blobs.npz")
    save("float.npz", y_train=y[:160].astype(float))
    save("empty.npz", x_train=x[:0], y_train=y[:0])
    save("negative.npz", y_train=y[:160] - 1)
    np.savez("missing.npz", x_train=x, y_train=y, x_test=x)
    np.save("x.npy", x)
    np.save("y.npy", y)
    np.save("float.npy", y.astype(float))
    Path("text.npy").write_text("1, 2")
    Path("file").touch()
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: str | Path) -> Result:
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return Result(status, *capsys.readouterr())

    return call


def final(folder: str) -> Any:
    return RunFiles(Path(folder)).read_checkpoint()["model"]


def test_tells_what_was_left_out_of_the_data(command: Command) -> None:
    lines = [{"text": f"{['good', 'bad'][k % 2]} thing", "label": k % 2 if k else -1} for k in range(41)]
    with gzip.open("opinions.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    words = ["text:opinions.jsonl.gz", "--model=bag", *QUICK, "--crest.pool_size=20"]
    want = (
        "1 of 41 examples in train have no label and are left out.\n"
        "There are no test examples: 4 of 40 in train are held out at random for that.\n"
    )
    result = command("train", *words, "--seed=1")
    assert (result.status, result.out[: len(want)], result.err) == (0, want, "")
    assert "Run: runs/opinions/crest-0.5-s1" in result.out
    result = command("compare", *words, "--methods=random", "--equal_time=false")
    assert result.out.startswith(want)
    assert Path("runs/opinions/compare/random-0.5-s0/summary.json").exists()


# Bad input ---------------------------------------------------------------------------------------------------

BAD = {
    "": "train, compare, ablate, report, explain, select",
    "trian digits": "command must be one of .*Did you mean train",
    "train": "task",
    "train digitz": "task must be one of .*Did you mean digits",
    "train blobs.npz": "Did you mean npz:blobs.npz",
    "train npz:nothing.npz": "nothing.npz must be readable.*No such file",
    "train npz:missing.npz": "missing.npz must hold .*Add y_test",
    "train npz:float.npz": "y_train must be whole numbers.*float64",
    "train npz:empty.npz": r"x_train must hold one example or more, got \(0, 8\)",
    "train npz:negative.npz": "y_train must be 0 or more",
    "BLOBS --method crets": "method must be one of .*Did you mean crest",
    "BLOBS --model resnet21": "model must be one of .*Did you mean resnet2?0?",
    "BLOBS --preset cifar": "preset must be one of .*Did you mean cifar10",
    "BLOBS --budget 0": r"budget must be in \(0, 1\], got 0.0",
    "BLOBS --budget lots": "budget must be a number, got 'lots'",
    "BLOBS --epochs lots": "epochs must be a number or null, got 'lots'",
    "BLOBS --epochs 0": "epochs must be above 0",
    "BLOBS --batch_size 0": "batch_size must be above 0|batch_size must be a whole number of at least 1",
    "BLOBS --learning_rate -0.1": "learning_rate must be above 0",
    "BLOBS --seed -1": "seed must be at least 0",
    "BLOBS --warmup 0.6": "warmup must be a share in",
    "BLOBS --momentum 7": "momentum must be",
    "BLOBS --weight_decay -1": "weight_decay must be",
    "BLOBS --schedule cosin": "schedule.*cosine",
    "BLOBS --optimizer adam": "optimizer.*adamw",
    "BLOBS --device gpu": "device must be usable",
    "BLOBS --augment true": "augment must be False here",
    "BLOBS --crest.pool_size 161": "pool_size must be at most the 160 training examples",
    "BLOBS --crest.pool_size 8": "pool_size must be at least batch_size = 16",
    "BLOBS --batch_size 161 --method random --crest.pool_size 161": "batch_size must be at most the 160",
    "BLOBS --crest.curvature none": "curvature.*first_order",
    "BLOBS --craig.reselect 2.5": r"craig\.reselect must be steps .* or a share in \(0, 1\], got 2\.5",
    "BLOBS --craig.reselect often": r"craig\.reselect must be a number, got 'often'",
    "BLOBS --gradmatch.proxy last": r"gradmatch\.proxy must be one of outputs, last_layer, got 'last'",
    "BLOBS --glister.round 3": r"got '--glister\.round'. Did you mean --glister\.rounds",
    "BLOBS --glister.rounds 0": r"glister\.rounds must be a whole number of at least 1, got 0",
    "BLOBS --infobatch.prune 1": r"infobatch\.prune must be in \[0, 1\), got 1",
    "BLOBS --track tensorbord": "track must name some of .*Did you mean tensorboard",
    "BLOBS --bugdet 0.1": "--bugdet",
    "BLOBS --config nothing.yaml": "nothing.yaml",
    "BLOBS --config blobs.npz": "config",
    "BLOBS --out file": "out must be a folder|file",
    "BLOBS --out file/run": "out must be a folder|file/run",
    "compare npz:blobs.npz --methods full crets": "method must be one of .*Did you mean crest",
    "compare npz:blobs.npz --budget 0.1 2": r"budget must be in \(0, 1\], got 2.0",
    "compare npz:blobs.npz --rates crest": "rates must be like crest=0.3, got 'crest'",
    "compare npz:blobs.npz --rates crest=x": "rates must be like crest=0.3, got 'crest=x'",
    "compare npz:blobs.npz --rates magic=0.1": "rates must be of the methods that are run, got 'magic'. Known: full",
    "compare npz:blobs.npz --rates crets=0.1": "rates must be .*Did you mean crest",
    "compare npz:blobs.npz --rates crest=-1": "rates of crest must be above 0, got -1.0",
    "compare npz:blobs.npz --rates crest=1 crest=2": "rates must name crest once, got 'crest=1 crest=2'",
    "compare npz:blobs.npz --track tensorbord": "track must name some of .*Did you mean tensorboard",
    "compare npz:blobs.npz --processes 0": "processes must be at least 1, got 0",
    "compare npz:blobs.npz --processes 1.5": "processes must be a whole number, got '1.5'",
    "compare npz:blobs.npz --equal_time maybe": "equal_time must be true or false, got 'maybe'",
    "ablate npz:blobs.npz --variants no-smothing": "variants must be some of .*Did you mean no-smoothing",
    "ablate npz:blobs.npz --variants whole-last-layer --crest.proxy_source history": "whole-last-layer: .*Leave that",
    "ablate npz:blobs.npz --budget 2": r"budget must be in \(0, 1\], got 2.0",
    "ablate npz:blobs.npz --method random": "got '--method'",
    "report": "folder must be given",
    "report nothing": "nothing must be a folder of runs, got 'nothing there'",
    "report file": "file must be a folder of runs, got 'a file'",
    "report .": "must hold runs, got 'none'",
    "report nothing --format xls": "format must be one of md, csv, json, got 'xls'. For a page, use html",
    "report nothing --target 0.9": "Did you mean --targets",
    "select nothing.npy --size 3 --out o.npz": "nothing.npy must be a .npy file.*No such file",
    "select text.npy --size 3 --out o.npz": "text.npy must be a .npy file",
    "select blobs.npz --size 3 --out o.npz": "blobs.npz must be a .npy file",
    "select x.npy --size 3 --out o.npy": "out must end in .npz",
    "select x.npy --size 3 --out file/o.npz": "out must|file",
    "select x.npy --size 201 --out o.npz": "size must be .* 200, got 201",
    "select x.npy --out o.npz": "size",
    "select y.npy --size 3 --out o.npz": r"features must have shape \[n, d\]",
    "select x.npy --labels float.npy --size 3 --out o.npz": "labels must be integers, got '?(torch.)?float64",
    "select x.npy --size 3 --metric manhatan --out o.npz": "metric must be one of",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_exits_with_2_and_one_error(folder: Path, command: Command, line: str) -> None:
    before = sorted(folder.rglob("*"))
    result = command(*[part for word in line.split() for part in (BLOBS if word == "BLOBS" else [word])])
    assert result.status == 2
    assert result.out == ""
    assert re.search(BAD[line], result.err, re.DOTALL), result.err
    assert len(re.findall(r"^error: \S", result.err, re.MULTILINE)) == 1, result.err
    assert not re.search(r"Traceback|<class|typing\.", result.err), "words that only Python programmers know"
    assert sorted(folder.rglob("*")) == before, "nothing is written"


def test_all_problems_come_in_one_message(command: Command) -> None:
    wrong = ["--budget=2", "--method=crestt", "--crest.tolerance=-1", "--crest.pool_size=8"]
    error = command(*BLOBS, *wrong).err
    assert error.count("error:") == 1
    for name in ("budget", "method", "tolerance", "pool_size"):
        assert f"{name} must" in error, error


def test_a_batch_larger_than_a_pool_matters_to_crest_alone(command: Command) -> None:
    flags = ["npz:blobs.npz", "--epochs=1", "--batch_size=32", "--crest.pool_size=16", "--out=runs"]
    assert command("train", *flags[:-1], "--out=run", "--method=random").status == 0
    assert command("compare", *flags, "--methods", "full", "infobatch").status == 0
    error = "error: crest.pool_size must be at least batch_size = 32, got 16"
    assert command("train", *flags).err.startswith(error)
    assert command("compare", *flags, "--methods", "full", "crest").err.startswith(error)


def test_a_loss_that_explodes_is_named(command: Command) -> None:
    for method in ("random", "crest"):
        result = command(*BLOBS, "--learning_rate=1e6", "--budget=1", f"--method={method}")
        assert result.status == 2
        assert re.search(r"error: The (training )?loss is .* step \d+.*data-set indices \d+", result.err)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\3\4 half"], ids=["empty", "foreign", "truncated"])
def test_a_damaged_checkpoint_is_named_and_left_in_place(command: Command, content: bytes) -> None:
    assert command(*BLOBS, "--out=run").status == 0
    Path("run/summary.json").unlink()
    Path("run/checkpoint.pt").write_bytes(content)
    result = command(*BLOBS, "--out=run", "--resume")
    assert result.status == 2
    assert re.match(r"error: run/checkpoint\.pt must be a checkpoint, got .*\n$", result.err), result.err
    assert Path("run/checkpoint.pt").read_bytes() == content


# Ablations ---------------------------------------------------------------------------------------------------

ABLATE = ["ablate", "npz:blobs.npz", *QUICK, "--crest.overhead_in=counted", "--seeds", "0", "1", "--out=parts"]


def test_an_ablation_changes_one_part_at_a_time(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    result = command(*ABLATE, "--crest.weight_power=0.0", "--crest.exclude=true")
    assert (result.status, result.err) == (0, "")
    same_ = ("first-order", "uniform-weights")
    assert f"Left out, for they are the settings as they are: {', '.join(same_)}." in result.out
    names = ["crest", *(name for name in ablate.VARIANTS if name not in same_)]
    assert sorted(path.name for path in Path("parts").iterdir()) == sorted(names)
    accuracies: dict[str, list[float]] = {}
    for name in names:
        files = [RunFiles(Path("parts") / name / f"crest-0.5-s{seed}") for seed in (0, 1)]
        base = RunFiles(Path("parts/crest/crest-0.5-s0")).read_config()["crest"]
        changed = {key: value for key, value in files[0].read_config()["crest"].items() if value != base[key]}
        assert changed == ({} if name == "crest" else ablate.VARIANTS[name])
        accuracies[name] = [each.read_summary()["accuracy"] for each in files]
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.split()[:1] and line.split()[0] in names}
    assert list(lines) == names
    for name, line in lines.items():
        errors = [100 * (1 - accuracy) for accuracy in accuracies[name]]
        more = [100 * (b - a) for a, b in zip(accuracies[name], accuracies["crest"], strict=True)]
        assert f" 2 {sum(errors) / 2:.2f} ± " in re.sub(" +", " ", line)
        assert (f"{sum(more) / 2:+.2f} ± " in line) == (name != "crest")
    before = {path: path.stat().st_mtime_ns for path in Path("parts").rglob("*")}
    monkeypatch.setattr(comparing, "train", None)  # nothing is run twice
    again = command(*ABLATE, "--crest.weight_power=0.0", "--crest.exclude=true")
    assert again.out.splitlines()[-12:] == result.out.splitlines()[-12:]
    assert {path: path.stat().st_mtime_ns for path in Path("parts").rglob("*")} == before


def test_an_ablation_is_stopped_and_goes_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*ABLATE, "--variants", "no-smoothing"]
    assert command(*words, "--out=whole").status == 0
    polls = iter([False] * 27 + [True])  # ten steps a run: in the third, the variant's first

    @contextmanager
    def requests(console: Console) -> Iterator[Callable[[], bool]]:
        yield lambda: next(polls, False)

    with monkeypatch.context() as patched:
        patched.setattr(cli, "stop_requests", requests)
        stopped = command(*words)
    assert stopped.status == 130
    assert f"Go on with: torchcrest {shlex.join(words)}" in stopped.out
    assert not Path("parts/no-smoothing/crest-0.5-s0/summary.json").exists()
    assert command(*words).status == 0
    for run in ("crest/crest-0.5-s1", "no-smoothing/crest-0.5-s0", "no-smoothing/crest-0.5-s1"):
        assert same(final(f"parts/{run}"), final(f"whole/{run}")), run


def test_runs_of_an_ablation_that_fail_are_named_and_the_others_shown(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = vars(comparing)["train"]

    def fail(run: Any, *args: Any, **kw: Any) -> Any:
        if run.crest.curvature == "unsmoothed":
            raise DataError("the data is gone")
        return made(run, *args, **kw)

    monkeypatch.setattr(comparing, "train", fail)
    result = command(*ABLATE, "--variants", "no-smoothing", "global-selection")
    assert result.status == 2
    assert "2 of 6 runs failed" in result.err
    assert "no-smoothing/crest-0.5-s1: the data is gone" in result.err
    assert "global-selection" in result.out
    other = command(*ABLATE, "--crest.tolerance=0.3", "--variants", "no-exclusion")
    assert re.search("tolerance in parts/crest/.* must be 0.3", other.err)


# Configuration -----------------------------------------------------------------------------------------------


def printed(command: Command, *arguments: str) -> dict[str, Any]:
    return dict(yaml.safe_load(command(*arguments, "--print_config").out))


def test_help_and_version(command: Command) -> None:
    assert command("--version") == (0, f"torchcrest {torchcrest.__version__}\n", "")
    texts = {name: command(*name.split(), "--help") for name in ("", *cli.COMMANDS)}
    for text in texts.values():
        assert (text.status, text.err) == (0, "")
        assert ":class:" not in text.out
        assert "``" not in text.out, "markup in the help"
    for option in ("--method", "--budget", "--epochs", "--seed", "--out", "--resume", "--preset", "--crest.tolerance"):
        assert option in texts["train"].out
    for option in ("--methods", "--budget", "--seeds", "--out", "--rates", "--processes", "--equal_time"):
        assert option in texts["compare"].out
    for option in ("--track", "--energy", "--crest.tolerance", "--glister.rounds", "--infobatch.prune"):
        assert option in texts["train"].out
        assert option in texts["compare"].out
    for option in ("--variants", "--budget", "--seeds", "--out", "--processes", "--crest.tolerance"):
        assert option in texts["ablate"].out
    for option in ("--format", "--targets", "--out"):
        assert option in texts["report"].out
    assert "--resume" not in texts["compare"].out
    for option in ("--labels", "--size", "--metric", "--out"):
        assert option in texts["select"].out


def test_the_printed_configuration_gives_the_same_run(command: Command) -> None:
    # Seconds are never the same again.
    flags = ["--seed=3", "--optimizer=adamw", "--learning_rate=0.01", "--crest.overhead_in=counted"]
    Path("printed.yaml").write_text(command(*BLOBS, *flags, "--print_config").out)
    assert command(*BLOBS, *flags, "--out=flags").status == 0
    assert command("train", "--config=printed.yaml", "--out=copy").status == 0
    assert Path("flags/config.yaml").read_text() == Path("copy/config.yaml").read_text()
    assert same(final("flags"), final("copy"))


@pytest.mark.parametrize("method", CONFIGS)
def test_a_run_s_configuration_gives_the_same_run(command: Command, method: str) -> None:
    own: dict[str, dict[str, Any]] = {"glister": {"rounds": 3}, "craig": {"reselect": 4}, "infobatch": {"prune": 0.4}}
    flags = [f"--{name}.{key}={value}" for name, each in own.items() for key, value in each.items()]
    flags.append("--crest.overhead_in=counted")
    assert command(*BLOBS, *flags, f"--method={method}", "--seed=3", "--out=run").status == 0
    config = RunFiles(Path("run")).read_config()
    assert CONFIGS.keys() & config.keys() == {method}, "the others' settings say nothing about this run"
    assert config[method].items() >= own.get(method, {}).items()
    result = command("train", "--config=run/config.yaml", "--out=again")
    assert (result.status, result.err) == (0, "")
    assert "Run: again" in result.out
    assert same(final("run"), final("again"))


def test_a_run_s_configuration_is_no_comparison_s(command: Command) -> None:
    assert command(*BLOBS, "--seed=3", "--out=run").status == 0
    result = command("compare", "--config=run/config.yaml", "--out=comparison")
    assert result.status == 2
    assert "config must hold track, methods, budget, seeds, rates as lists" in result.err


LINES = ["methods: crest", "budget: 0.5", "seeds: 1", "rates: crest=0.3", "rates: {crest: 0.3}", "track: tensorboard"]


@pytest.mark.parametrize("line", LINES)
def test_a_comparison_s_configuration_holds_lists(command: Command, line: str) -> None:
    Path("my.yaml").write_text(line)
    result = command("compare", "digits", "--config=my.yaml")
    assert result.status == 2
    assert re.fullmatch("error: config must hold track, methods, budget, seeds, rates as lists, .*\n", result.err)


@pytest.mark.parametrize("name", ["rates", "methods", "track", "processes"])
def test_an_empty_setting_in_a_file_is_named(command: Command, name: str) -> None:
    Path("my.yaml").write_text(f"{name}: null\n")
    result = command("compare", "digits", "--config=my.yaml")
    assert (result.status, result.err) == (2, f"error: {name} must have a value, got None. Leave it out.\n")


def test_the_printed_configuration_of_a_comparison_is_accepted(command: Command) -> None:
    flags = ["--rates", "crest=0.3", "random=1e-3", "--track", "tensorboard", "--processes=2", "--equal_time=false"]
    flags += ["--craig.reselect=3", "--gradmatch.ridge=1.0", "--glister.validation=0.2", "--infobatch.anneal=1"]
    flags += ["--energy", "--preset=snli", "--methods", "random", "crest", "--seeds", "1", "2"]
    text = command("compare", "digits", *flags, "--print_config").out
    Path("printed.yaml").write_text(text)
    assert command("compare", "--config=printed.yaml", "--print_config").out == text
    config = yaml.safe_load(text)
    assert (config["rates"], config["equal_time"], config["craig"]["reselect"]) == (flags[1:3], False, 3)


def test_flags_override_the_file(command: Command) -> None:
    Path("my.yaml").write_text("task: npz:blobs.npz\nbudget: 0.5\nseed: 4\ncrest:\n  tolerance: 0.3\n  pool_size: 60\n")
    config = printed(command, "train", "--config=my.yaml", "--budget=0.25", "--crest.tolerance=0.4")
    assert (config["budget"], config["seed"]) == (0.25, 4)
    assert (config["crest"]["tolerance"], config["crest"]["pool_size"]) == (0.4, 60)


@pytest.mark.parametrize("name", ["train", "compare"])
def test_a_preset_sets_what_flags_do_not(command: Command, name: str) -> None:
    for flags in (["--preset", "snli"], ["--preset=snli"]):
        config = printed(command, name, "digits", "--crest.tolerance=0.4", *flags)
        assert config["batch_size"] == 32
        expected = {"pool_size": 2850, "interval_scale": 4.0, "curvature": "rms", "tolerance": 0.4}
        assert config["crest"].items() >= expected.items()
    short = command(name, "digits", "--pre=snli", "--print_config")
    assert short.status == 2 or yaml.safe_load(short.out)["crest"]["pool_size"] == 2850, "taken, and ignored"


def test_a_preset_in_a_file_is_heeded(command: Command) -> None:
    Path("my.yaml").write_text("preset: snli\nbatch_size: 16\n")
    config = printed(command, "train", "digits", "--config=my.yaml")
    assert (config["crest"]["pool_size"], config["batch_size"]) == (2850, 16)


# Output, stopping, going on ----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_comparison_ends_with_table_verdicts_and_picture(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    start = ["compare", "npz:blobs.npz", *QUICK, "--methods", "full", "random", "crest", "--seeds", "0", "1"]
    start += ["--rates", "crest=0.02", "random=0.2", "--track", "tensorboard"]
    result = command(*start, "--processes=2", "--equal_time=false")
    assert (result.status, result.err) == (0, "")
    names = [f"{name}-s{seed}" for name in ("full", "random-0.5", "crest-0.5") for seed in (0, 1)]
    assert {line.partition(":")[0] for line in result.out.splitlines() if ": step" in line} == set(names)
    monkeypatch.setattr(comparing, "budgets_wanted", lambda _: [0.75])
    result = command(*start)
    assert (result.status, result.err) == (0, "")
    *_, first, second = names = [*names, "random-0.75-s0", "random-0.75-s1"]
    lines = result.out.splitlines()
    assert {line.partition(":")[0] for line in lines if ": step" in line} == {first, second}, "only what was missing"
    assert re.findall(r"^(\w+(?: 0\.\d+)?) +2 +\d+\.\d\d ± ", result.out, re.MULTILINE) == [
        *("full", "random 0.5", "crest 0.5", "random 0.75")
    ]
    assert not re.search("nan|…", result.out)
    folder = Path("runs/blobs/compare")
    runs = [RunFiles(folder / name) for name in names]
    summaries = [run.read_summary() for run in runs]
    assert [summary["processes"] for summary in summaries] == [2] * 6 + [1] * 2
    usual, *_ = rates = [run.read_config()["learning_rate"] for run in runs]
    assert rates == [usual, usual, 0.2, 0.2, 0.02, 0.02, 0.2, 0.2]
    assert usual not in (0.2, 0.02)
    assert all((run.folder / "tensorboard").is_dir() for run in runs)
    ending = [
        "",
        *(verdict.sentence for verdict in judge(summaries)),
        FEW_SEEDS,
        "Seconds are not alike: runs were made 1 and 2 at a time.",
        "Run as well, to meet others at equal time: random 0.75.",
        "",
        f"Picture: {folder}/comparison.png",
        f"A page of it: torchcrest report {folder}",
    ]
    assert lines[-len(ending) :] == ending
    assert (folder / "comparison.png").exists()


def test_a_method_that_fails_does_not_lose_the_others(command: Command) -> None:
    start = ["compare", "npz:blobs.npz", *QUICK, "--methods", "random", "crest", "--seeds", "0", "1"]
    start += ["--rates", "random=1e30", "--out=out"]
    for first in (True, False):
        result = command(*start)
        assert result.status == 2
        assert re.match(
            r"error: 2 of 4 runs failed, the others are finished\.\nrandom-0\.5-s0: The training", result.err
        )
        assert re.search(
            r"\nrandom-0\.5-s1: The .*\nThe same command tries them again\..* lower learning_rate", result.err
        )
        assert re.search(r"^crest 0\.5 +2 ", result.out, re.MULTILINE)
        assert "\ncrest 0.5 has no random data to be compared with" in result.out
        assert ("crest-0.5-s1: step 10/10" in result.out) == first, "it goes on with what has failed"
        assert "random-0.5-s1: step 10/10" not in result.out
        assert "Picture: out/comparison.png" in result.out
    start[-2:] = ["random=1e30", "crest=1e30", "--out=all"]
    result = command(*start)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: 4 of 4 runs failed")


@pytest.mark.parametrize("name", ["train", "compare"])
def test_trackers_and_energy_are_passed_on(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given: dict[str, Any] = {}

    def noted(*args: Any, **kw: Any) -> None:
        given.update(kw)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, name, noted)
    assert command(name, *BLOBS[1:], "--track", "tensorboard", "wandb", "--energy").status == 130
    assert (given["trackers"], given["energy"]) == (["tensorboard", "wandb"], True)
    command(name, *BLOBS[1:])
    assert (given["trackers"], given["energy"]) == ([], False)


def test_sentences_are_whole_but_on_a_terminal_that_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "crest [0.1] is level-headed: " + "and so on, " * 30 + "at last"
    shown = []
    for terminal in (False, True):
        console = Console(file=io.StringIO(), width=60, force_terminal=terminal, color_system=None)
        cli._print_sentences([sentence, "Short."], console)
        shown.append(console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    assert shown[0] == ["", sentence, "Short."]
    assert max(map(len, shown[1])) <= 60
    assert [line[:2] for line in shown[1]] == ["", "cr", *["  "] * (len(shown[1]) - 3), "Sh"]
    assert " ".join(line.strip() for line in shown[1][1:-1]) == sentence


@pytest.mark.parametrize(("width", "shown"), [(30, 3), (64, 8), (80, 11)])
def test_columns_that_do_not_fit_are_left_out(width: int, shown: int) -> None:
    """Figures are never cut."""
    run: dict[str, Any] = {"method": "infobatch", "budget": 0.1, "steps": 12674, "regions": 0, "accuracy": 0.95}
    run |= {"examples_trained": 1_622_272, "examples_forwarded": 0, "seconds": 1187.2, "peak_memory": 20_622_272_000}
    run |= dict.fromkeys(("seconds_selecting", "seconds_checking", "seconds_curvature"), 1.0)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    cli._print_table("a task", [run, {**run, "accuracy": 0.94}], console)
    _, heading, _, row, *_ = (line.split() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    figures = ["infobatch 0.1", "2", "94.50 ± 0.71", "-", "12,674", "1.62M", "0", "1187.2 ± 0.0", "0", "0", "20,622"]
    assert heading == " ".join(comparing.COLUMNS[:shown]).split()
    assert row == " ".join(figures[:shown]).split()


def test_a_report_is_a_page_or_a_table(command: Command) -> None:
    for method in ("random", "crest"):
        assert command(*BLOBS, f"--method={method}", f"--out=my [bold] runs/{method}").status == 0
    folder = Path("my [bold] runs")
    before = contents(folder)
    for format in ("md", "csv", "json"):
        expected = table(folder, format)
        assert command("report", folder, "--format", format) == (0, expected, "")
        assert command("report", folder, "--format", format, "--out=new/table") == (0, "Table: new/table\n", "")
        assert Path("new/table").read_text() == expected
    assert command("report", folder, "--out=page.html", "--targets", "0.2", "0.3") == (0, "Report: page.html\n", "")
    assert "20.0 %" in Path("page.html").read_text()
    assert contents(folder) == before
    assert command("report", folder) == (0, f"Report: {folder}/report.html\n", "")
    assert contents(folder) == before | {folder / "report.html": (folder / "report.html").read_bytes()}
    assert command("report", "--help").status == 0
    for out in (folder, Path("file/table")):
        for format in ("html", "csv"):
            result = command("report", folder, "--format", format, "--out", out)
            assert (result.status, result.err.count("\n")) == (2, 1)
            assert f"out must be a file in a folder, got '{out}'" in result.err


def test_what_cannot_be_reported_is_named_and_left_as_it_is(command: Command, folder: Path) -> None:
    def refused(message: str) -> None:
        before = contents(folder)
        for format in ("html", "json"):
            result = command("report", "runs", "--format", format)
            assert (result.status, result.out) == (2, "")
            assert re.fullmatch(f"error: {message}.*\n", result.err), result.err
        assert contents(folder) == before

    Path("other.npz").write_bytes(Path("blobs.npz").read_bytes())
    assert command(*BLOBS, "--method=random", "--out=runs/one").status == 0
    assert command("train", "npz:other.npz", *QUICK, "--method=full", "--out=runs/two").status == 0
    refused("task must be the same in all runs, got \"'npz:other.npz' in two; 'npz:blobs.npz' in one\"")
    Path("runs/two/metrics.jsonl").write_text('{"event": "evalu')
    refused(r"runs/two/metrics\.jsonl must end with an evaluation at step 20, got 'none'")
    Path("runs/two/summary.json").write_text('{"task": "npz:oth')
    refused(r"runs/two/summary\.json must hold a finished run's figures")
    for name in ("one", "two"):
        Path(f"runs/{name}/summary.json").unlink()
    refused("runs must hold finished runs, got 'only begun ones: one, two'")


def test_warnings_are_a_line_on_stderr(command: Command) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = command(*BLOBS, "--batch_size=2")
    assert result.status == 0
    assert re.fullmatch(r"warning: batch_size = 2 is smaller than the number of classes.*\n", result.err)


TWO = ["compare", *BLOBS[1:], "--methods", "random", "crest", "--equal_time=false"]
GLISTER = [*BLOBS, "--method=glister", "--glister.rounds=3"]


@pytest.mark.parametrize(
    "start", [BLOBS, [*BLOBS, "--resume"], GLISTER, TWO], ids=["train", "resume", "glister", "compare"]
)
def test_the_command_to_go_on_goes_on(command: Command, monkeypatch: pytest.MonkeyPatch, start: list[str]) -> None:
    out = "my [bold] 'run'"
    stops = iter(step == 7 for step in range(1, 100))

    @contextmanager
    def stop_after_7(console: Console) -> Iterator[Callable[[], bool]]:
        yield lambda: next(stops)

    with monkeypatch.context() as patch:
        patch.setattr(cli, "stop_requests", stop_after_7)
        stopped = command(*start, "--out", out)
    assert stopped.status == 130
    assert re.search(rf"Stopped after step 7 of 10\. The checkpoint is in {re.escape(out)}", stopped.out)
    (line,) = re.findall(r"^Go on with: (.*)$", stopped.out, re.MULTILINE)
    assert line.count("--resume") == (start[0] == "train")
    assert command(*shlex.split(line)[1:]).status == 0
    assert command(*start, "--out=whole").status == 0
    runs = [path.parent.relative_to(out) for path in Path(out).rglob("checkpoint.pt")]
    assert len(runs) == (1 if start[0] == "train" else 2)
    assert all(same(final(str(Path(out, run))), final(str(Path("whole", run)))) for run in runs)


def test_ctrl_c_at_another_time_leaves_no_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second Ctrl-C, or one while features are read."""

    def interrupted(*args: Any, **kw: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupted)
    try:
        assert command(*BLOBS).status == 130
    except KeyboardInterrupt:
        pytest.fail("a traceback")


def test_ctrl_c_and_the_printed_command_in_a_real_shell(folder: Path, command: Command) -> None:
    bin_ = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
    # To the bit only where the bound on overhead does not go by the clock.
    long, pipe = [*BLOBS, "--epochs=40", "--evaluations=20", "--crest.overhead_in=counted"], subprocess.PIPE
    start = [str(bin_ / "torchcrest"), *long, "--out", "my run"]
    with subprocess.Popen(start, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout
        assert "step 10/200" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130, "")
    files = RunFiles(folder / "my run")
    assert f"Stopped after step {files.read_checkpoint()['step']} of 200" in out
    assert not files.finished()
    (line,) = re.findall(r"^Go on with: (.*)$", out, re.MULTILINE)
    again = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert (again.returncode, again.stderr) == (0, "")
    assert "step 10/200" not in again.stdout, "it goes on, it doesn't begin anew"
    assert json.loads(files.summary.read_text())["steps"] == 200
    assert command(*long, "--out=whole").status == 0
    assert same(final("my run"), final("whole"))


# select ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[], ["--labels=y.npy"]], ids=["no labels", "labels"])
def test_select_writes_a_weighted_coreset(command: Command, labels: list[str]) -> None:
    result = command("select", "x.npy", *labels, "--size=20", "--out=new folder/coreset.npz")
    assert (result.status, result.err) == (0, "")
    assert "20 of 200" in result.out
    with np.load("new folder/coreset.npz") as file:
        indices, weights = file["indices"], file["weights"]
    expected = torchcrest.coreset(np.load("x.npy"), 20, np.load("y.npy") if labels else None)
    assert np.array_equal(indices, expected[0])
    assert np.array_equal(weights, expected[1])
    assert len(set(indices.tolist())) == 20
    assert weights.sum() == 200
    assert weights.min() >= 1
    if labels:
        y = np.load("y.npy")
        assert [weights[y[indices] == k].sum() for k in range(4)] == np.bincount(y).tolist()
