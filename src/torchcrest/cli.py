"""The command ``torchcrest``: train, compare, select."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

import torchcrest
from torchcrest.config import PRESETS, CrestConfig, suggest
from torchcrest.errors import ConfigError, DataError, TorchcrestError, must
from torchcrest.solvers import coreset
from torchcrest.train.compare import COLUMNS, cells, compare, plan, run_name
from torchcrest.train.console import Watcher, render, stop_requests
from torchcrest.train.files import replacing
from torchcrest.train.methods import METHODS
from torchcrest.train.plot import plot
from torchcrest.train.run import Interrupted, train
from torchcrest.train.settings import RunSettings

__all__ = ["main"]

TASK = "digits, mnist1d, or npz:PATH with arrays x_train, y_train, x_test, y_test"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input, 130 when stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Off a terminal nothing has to fit into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    errors = Console(stderr=True)
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_: errors.print(
        f"[yellow]warning:[/] {_plain(str(message))}", soft_wrap=True, highlight=False
    )
    try:
        _refuse_unknown_command(arguments)
        parsed = _parser(_preset(arguments)).parse_args(arguments)
        {"train": _train, "compare": _compare, "select": _select}[parsed.subcommand](parsed[parsed.subcommand], console)
    except TorchcrestError as error:
        errors.print(f"[bold red]error:[/] {_plain(str(error))}", soft_wrap=True, highlight=False)
        return 2
    except Interrupted as stopped:
        again = _again(arguments)
        console.print(
            f"Stopped after step {stopped.step} of {stopped.steps}. "
            f"The checkpoint is in {_plain(str(stopped.folder))}.\nGo on with: {_plain(again)}",
            soft_wrap=True,
            highlight=False,
        )
        return 130
    finally:
        warnings.showwarning = shown
    return 0


def _train(args: Namespace, console: Console) -> None:
    """Train one model with one method."""
    settings = _settings(args, method=args.method, budget=args.budget, seed=args.seed)
    folder = _folder(args.out, settings.task, run_name(settings))
    with stop_requests(console) as stop, Watcher(console) as watcher:
        summary = train(settings, folder, resume=args.resume, watch=watcher.begin(run_name(settings)), stop=stop)
    _print_table(settings.task, [summary], console)
    console.print(f"Run: {_plain(str(folder))}", soft_wrap=True, highlight=False)


def _compare(args: Namespace, console: Console) -> None:
    """Train with several methods, budgets and seeds; print the table and draw the picture."""
    runs = plan(_settings(args), args.methods, args.budget, args.seeds)
    folder = _folder(args.out, args.task, "compare")
    with stop_requests(console) as stop, Watcher(console) as watcher:
        summaries = compare(runs, folder, begin=watcher.begin, stop=stop)
    _print_table(args.task, summaries, console)
    try:
        console.print(f"Picture: {_plain(str(plot(runs, folder, folder / 'comparison.png')))}", soft_wrap=True)
    except ConfigError as error:
        console.print(f"No picture: {_plain(str(error))}", soft_wrap=True)


def _select(args: Namespace, console: Console) -> None:
    """Pick one weighted coreset from raw features."""
    if args.out.suffix != ".npz":
        raise ConfigError(must("out", "end in .npz", str(args.out), "It will hold the arrays indices and weights."))
    features = _array(args.features)
    labels = None if args.labels is None else _array(args.labels)
    indices, weights = coreset(features, args.size, labels, args.metric)
    with replacing(args.out) as file:
        np.savez(file, indices=indices, weights=weights)
    console.print(
        f"Picked {len(indices):,} of {len(features):,}; the heaviest stands for {int(weights.max()):,}.\n"
        f"Arrays indices and weights: {_plain(str(args.out))}",
        soft_wrap=True,
        highlight=False,
    )


def _parser(crest_defaults: dict[str, Any]) -> ArgumentParser:
    """Return the parser; a preset's settings are the defaults of --crest."""
    parser = ArgumentParser(
        prog="torchcrest", description="Train on mini-batch coresets (CREST), and see whether it pays."
    )
    parser.add_argument("--version", action="version", version=f"torchcrest {torchcrest.__version__}")
    commands = parser.add_subcommands()
    one = ArgumentParser(usage="torchcrest train TASK [options]", description="Train one model with one method.")
    _add_run(one, crest_defaults, skip={"task", "crest"})
    one.add_argument(
        "--out", type=Path | None, default=None, help="folder of the run; default: runs/TASK/METHOD-BUDGET-sSEED"
    )
    one.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    commands.add_subcommand("train", one, help="train one model with one method")
    many = ArgumentParser(
        usage="torchcrest compare TASK [options]",
        description="Train with several methods, budgets and seeds, and compare them.",
    )
    _add_run(many, crest_defaults, skip={"task", "crest", "method", "budget", "seed"})
    many.add_argument("--methods", type=str, nargs="+", default=["full", "random", "crest"], help=", ".join(METHODS))
    many.add_argument("--budget", type=float, nargs="+", default=[0.1], help="shares of the full run's steps")
    many.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each method for each")
    many.add_argument("--out", type=Path | None, default=None, help="folder of the runs; default: runs/TASK/compare")
    commands.add_subcommand("compare", many, help="run several methods and print the table")
    pick = ArgumentParser(
        usage="torchcrest select FEATURES.npy --size N --out FILE.npz",
        description="Pick one weighted coreset from raw features, for a convex model.",
    )
    pick.add_argument("--config", action="config", help="a YAML file of settings")
    pick.add_argument("features", type=Path, help="array [n, d] in a .npy file")
    pick.add_argument("--labels", type=Path | None, default=None, help="classes [n] in a .npy file")
    pick.add_argument("--size", type=int, required=True, help="how many examples to pick")
    pick.add_argument("--metric", type=str, default="euclidean", help="euclidean, sqeuclidean or cosine")
    pick.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    commands.add_subcommand("select", pick, help="pick one coreset of raw features")
    return parser


def _add_run(parser: ArgumentParser, crest_defaults: dict[str, Any], skip: set[str | int]) -> None:
    parser.add_argument("--config", action="config", help="a YAML file of settings; flags after it override them")
    parser.add_argument("task", type=str, help=TASK)
    parser.add_class_arguments(RunSettings, skip=skip)
    parser.add_argument("--preset", type=str | None, default=None, help=f"the paper's settings: {', '.join(PRESETS)}")
    parser.add_class_arguments(CrestConfig, "crest", skip={"batch_size"})
    defaults = {f"crest.{name}": value for name, value in crest_defaults.items() if name != "batch_size"}
    if "batch_size" in crest_defaults:
        defaults["batch_size"] = crest_defaults["batch_size"]
    parser.set_defaults(defaults)


def _preset(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the preset that the arguments name, before they are parsed."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--preset" and (value or place + 1 < len(arguments)):
            value = value or arguments[place + 1]
            CrestConfig.preset(value)
            return PRESETS[value]
    return {}


def _refuse_unknown_command(arguments: Sequence[str]) -> None:
    commands = ("train", "compare", "select")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        want = f"be one of {', '.join(commands)}"
        raise ConfigError(must("command", want, arguments[0], suggest(arguments[0], commands)))


def _settings(args: Namespace, **chosen: Any) -> RunSettings:
    """Build the settings; what is wrong with the run and with CREST comes in one message."""
    problems: list[str] = []
    of_each_run = {"method", "budget", "seed"}  # lists, in a comparison
    known = {f.name for f in fields(RunSettings)} - {"crest"} - of_each_run
    values = {name: args[name] for name in known} | chosen
    batch_size = values.get("batch_size")
    crest = {**args.crest.as_dict(), "batch_size": batch_size or 1}  # the task's own is filled in later
    for build in (lambda: CrestConfig(**crest), lambda: RunSettings(**values)):
        try:
            build()
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return RunSettings(**values, crest=CrestConfig(**crest))


def _print_table(task: str, summaries: list[dict[str, Any]], console: Console) -> None:
    console.print(render(_plain(task), COLUMNS, [cell.row() for cell in cells(summaries)]))


def _folder(out: Path | None, task: str, name: str) -> Path:
    short = Path(task.removeprefix("npz:")).stem
    return out if out is not None else Path("runs") / short / name


def _array(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        do = "Write it with numpy.save(path, array)."
        raise DataError(must(str(path), "be a .npy file", str(error).splitlines()[0], do)) from error


def _again(arguments: Sequence[str]) -> str:
    """Return the command that goes on."""
    resume = [] if arguments[0] != "train" or "--resume" in arguments else ["--resume"]
    return shlex.join(["torchcrest", *arguments, *resume])


def _plain(text: str) -> str:
    """Keep rich from reading brackets as styles."""
    return text.replace("[", "\\[")


if __name__ == "__main__":
    sys.exit(main())
