"""The command ``torchcrest``: train, compare, ablate, report, explain, select."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

import torchcrest
from torchcrest.checks import suggest
from torchcrest.config import PRESETS, CrestConfig
from torchcrest.errors import ConfigError, DataError, TorchcrestError, must
from torchcrest.report import explain, export, report, story, suspect_sheet, table
from torchcrest.solvers import coreset
from torchcrest.train import ablate as ablation
from torchcrest.train.compare import COLUMNS, LEGEND, FailedRuns, cells, compare, plan, run_name
from torchcrest.train.console import Watcher, render, stop_requests
from torchcrest.train.files import RunFiles, blocked, replacing
from torchcrest.train.methods import CONFIGS, METHODS
from torchcrest.train.plot import plot
from torchcrest.train.run import Interrupted, train
from torchcrest.train.settings import SHARED, RunSettings
from torchcrest.train.verdict import judge, label, notes

__all__ = ["main"]

COMMANDS = {
    "train": "train one model with one method",
    "compare": "run several methods and print the table",
    "ablate": "see what each part of CREST does",
    "report": "write a comparison's page, or print its table",
    "explain": "tell what a run has learned of its examples, and which labels may be wrong",
    "select": "pick one coreset of raw features",
}
TASK = (
    "digits, mnist1d, cifar10, cifar100, tinyimagenet, snli; npz:PATH with arrays x_train, y_train, x_test, y_test; "
    "imagefolder:DIR with train/CLASS and test/CLASS; text:FILE, a JSON object a line; hf:NAME[:CONFIG] of the Hugging "
    "Face hub, or hf:DIR"
)
KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text", "Path": "a path"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input, 130 when stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Off a terminal nothing has to fit into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
    try:
        parsed = _parse(arguments)
        acts = {
            "train": _train,
            "compare": _compare,
            "ablate": _ablate,
            "report": _report,
            "explain": _explain_run,
            "select": _select,
        }
        acts[parsed.subcommand](parsed[parsed.subcommand], console)
    except (TorchcrestError, ArgumentError) as error:
        _say(f"error: {error}")
        return 2
    except Interrupted as stopped:
        where = f"after step {stopped.step} of {stopped.steps}. The checkpoint is in {_plain(str(stopped.folder))}."
        console.print(
            f"Stopped {where if stopped.step else 'before the first step.'}\nGo on with: {_plain(_again(arguments))}",
            soft_wrap=True,
            highlight=False,
        )
        return 130
    except KeyboardInterrupt:
        _say("Stopped.")
        return 130
    finally:
        warnings.showwarning = shown
    return 0


def _train(args: Namespace, console: Console) -> None:
    """Train one model with one method."""
    settings = _settings(args, method=args.method, budget=args.budget, seed=args.seed)
    folder = _folder(args.out, settings.task, run_name(settings))
    finished = args.resume and RunFiles(folder).finished()
    with stop_requests(console) as stop, Watcher(console) as watcher:
        summary = train(
            settings,
            folder,
            resume=args.resume,
            watch=watcher.begin(run_name(settings)),
            stop=stop,
            trackers=args.track,
            energy=args.energy,
            say=_told(console),
        )
    if finished:
        console.print("This run was finished already.")
    _print_table(settings.task, [summary], console)
    console.print(f"Run: {_plain(str(folder))}", soft_wrap=True, highlight=False)


def _compare(args: Namespace, console: Console) -> None:
    """Train with several methods, budgets and seeds; print table and verdicts, and draw the picture."""
    runs = plan(_settings(args), args.methods, args.budget, args.seeds, _rates(args.rates))
    folder = _folder(args.out, args.task, "compare")
    failed: FailedRuns | None = None
    with stop_requests(console) as stop, Watcher(console) as watcher:
        try:
            summaries = compare(
                runs,
                folder,
                begin=watcher.begin,
                stop=stop,
                processes=args.processes,
                equal_time=args.equal_time,
                trackers=args.track,
                energy=args.energy,
                say=_told(console),
            )
        except FailedRuns as error:
            failed, summaries = error, error.summaries
    if not summaries and failed:
        raise failed
    _print_table(args.task, summaries, console)
    verdicts = judge(summaries)
    sentences = [*(verdict.sentence for verdict in verdicts), *notes(summaries, verdicts)]
    planned = {(run.method, run.budget) for run in runs}
    added = [(cell.method, cell.budget) for cell in cells(summaries) if (cell.method, cell.budget) not in planned]
    if added:
        sentences.append(f"Run as well, to meet others at equal time: {', '.join(label(*cell) for cell in added)}.")
    _print_sentences(sentences, console)
    done = {(summary["method"], summary["budget"], summary["seed"]) for summary in summaries}
    drawn = [run for run in runs if (run.method, run.budget, run.seed) in done]
    try:
        picture = f"Picture: {plot(drawn, folder, folder / 'comparison.png')}"
    except ConfigError as error:
        picture = f"No picture: {error}"
    page = f"A page of it: torchcrest report {shlex.quote(str(folder))}"
    console.print(_plain(f"\n{picture}\n{page}"), soft_wrap=True, highlight=False)
    if failed:
        raise failed


def _ablate(args: Namespace, console: Console) -> None:
    """Train CREST with one part changed at a time; print a table of errors and regions."""
    asked = ablation.variants(_settings(args), args.variants)
    folder = _folder(args.out, args.task, "ablate")
    failed: FailedRuns | None = None
    with stop_requests(console) as stop, Watcher(console) as watcher:
        try:
            summaries = ablation.ablate(
                asked,
                args.budget,
                args.seeds,
                folder,
                begin=watcher.begin,
                stop=stop,
                processes=args.processes,
                trackers=args.track,
                energy=args.energy,
                say=_told(console),
            )
        except FailedRuns as error:
            failed, summaries = error, error.summaries
    if summaries:
        _print_rows(args.task, ablation.COLUMNS, ablation.rows(summaries), ablation.LEGEND, console)
    same = [name for name in args.variants if name not in asked]
    _print_sentences([f"Left out, for they are the settings as they are: {', '.join(same)}."] if same else [], console)
    console.print(_plain(f"Runs: {folder}"), soft_wrap=True, highlight=False)
    if failed:
        raise failed


def _report(args: Namespace, console: Console) -> None:
    """Write the page of a comparison, or print its table."""
    if args.format == "html":
        path = report(args.folder, args.out or args.folder / "report.html", args.targets or None)
        console.print(f"Report: {_plain(str(path))}", soft_wrap=True, highlight=False)
        return
    text = table(args.folder, args.format)
    if args.out is None:
        sys.stdout.write(text)
        return
    if args.out.is_dir() or blocked(args.out.parent):
        raise ConfigError(must("out", "be a file in a folder", str(args.out), "Name the file to write."))
    with replacing(args.out) as file:
        file.write(text.encode())
    console.print(f"Table: {_plain(str(args.out))}", soft_wrap=True, highlight=False)


def _explain_run(args: Namespace, console: Console) -> None:
    """Tell what a run has learned of its examples, or of one of them."""
    if args.top < 1:
        raise ConfigError(must("top", "be at least 1", args.top, "Use for example 10."))
    lines = explain(args.folder, args.top) if args.example is None else story(args.folder, args.example)
    written = []  # first of all, so that what can't be written is refused before anything is told
    if args.export is not None:
        export(args.folder, args.export)
        written.append(f"Scores: {args.export}")
    if args.suspects is not None:
        suspect_sheet(args.folder, args.suspects, args.top)
        written.append(f"Suspected label errors: {args.suspects}")
    for line in [*lines, *written]:
        console.print(_plain(line), soft_wrap=True, highlight=False)


def _select(args: Namespace, console: Console) -> None:
    """Pick one weighted coreset from raw features."""
    if args.out.suffix != ".npz":
        raise ConfigError(must("out", "end in .npz", str(args.out), "It will hold the arrays indices and weights."))
    if blocked(args.out.parent):
        raise ConfigError(must("out", "be in a folder", str(args.out), "There is a file where the folder should be."))
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


# Arguments ------------------------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str]) -> Namespace:
    """Parse the arguments. A preset, wherever it is named, gives the defaults of a second reading."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        want = f"be one of {', '.join(COMMANDS)}"
        raise ConfigError(must("command", want, arguments[0], suggest(arguments[0], COMMANDS)))
    printing = [word for word in arguments if word.startswith("--print_config")]
    try:
        commands = _commands({}, arguments)
        parsed = _parser(commands).parse_args([word for word in arguments if word not in printing])
        name = parsed[parsed.subcommand].get("preset")
        if name is not None:
            CrestConfig.preset(name)
        if printing or name is not None:
            commands = _commands(PRESETS[name] if name else {}, arguments)
            parsed = _parser(commands).parse_args(list(arguments))
    except (ArgumentError, UnicodeDecodeError, TypeError, RuntimeError) as error:
        raise ConfigError(_explain(str(error), arguments)) from error
    # The parser takes null, in a file, for anything; the settings inside others refuse it themselves.
    defaults = commands[parsed.subcommand].get_defaults()
    empty = [name for name, value in parsed[parsed.subcommand].items() if value is None and "." not in name]
    if problems := [must(name, "have a value", None, "Leave it out.") for name in empty if defaults[name] is not None]:
        raise ConfigError(problems)
    return parsed


def _parser(commands: dict[str, ArgumentParser]) -> ArgumentParser:
    parser = _new("Train on mini-batch coresets (CREST), and see whether it pays.", prog="torchcrest")
    parser.add_argument("--version", action="version", version=f"torchcrest {torchcrest.__version__}")
    subcommands = parser.add_subcommands()
    for name, command in commands.items():
        subcommands.add_subcommand(name, command, help=COMMANDS[name])
    return parser


def _commands(crest_defaults: dict[str, Any], arguments: Sequence[str]) -> dict[str, ArgumentParser]:
    """Return a parser for the command that is named first, or for each: one with all settings takes a while to build.

    A preset's settings are the defaults of --crest.
    """
    parsers: dict[str, Callable[[], ArgumentParser]] = {
        "train": lambda: _train_parser(crest_defaults),
        "compare": lambda: _compare_parser(crest_defaults),
        "ablate": lambda: _ablate_parser(crest_defaults),
        "report": _report_parser,
        "explain": _explain_parser,
        "select": _select_parser,
    }
    named = [name for name in arguments[:1] if name in parsers]
    return {name: parsers[name]() for name in named or parsers}


def _train_parser(crest_defaults: dict[str, Any]) -> ArgumentParser:
    parser = _new("Train one model with one method.", usage="torchcrest train TASK [options]")
    _add_run(parser, crest_defaults, skip={"task", *CONFIGS})
    out = "folder of the run; default: runs/TASK/METHOD-BUDGET-sSEED"
    parser.add_argument("--out", type=Path | None, default=None, help=out)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    return _without_markup(parser)


def _compare_parser(crest_defaults: dict[str, Any]) -> ArgumentParser:
    about = "Train with several methods, budgets and seeds, and compare them."
    parser = _new(about, usage="torchcrest compare TASK [options]")
    _add_run(parser, crest_defaults, skip={"task", *CONFIGS, "method", "budget", "seed"})
    methods = ["full", "random", "crest"]
    parser.add_argument("--methods", type=str, nargs="+", default=methods, help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.1], help="shares of the full run's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each method runs with each")
    rates = "learning rates of methods that have their own, as in crest=0.3 random=0.2"
    parser.add_argument("--rates", type=str, nargs="+", default=[], help=rates)
    parser.add_argument("--processes", type=int, default=1, help="runs to make at once")
    equal_time = "run random at further budgets too, so that each method meets it at equal time"
    parser.add_argument("--equal_time", type=bool, default=True, help=equal_time)
    parser.add_argument("--out", type=Path | None, default=None, help="folder of the runs; default: runs/TASK/compare")
    return _without_markup(parser)


def _ablate_parser(crest_defaults: dict[str, Any]) -> ArgumentParser:
    about = "Train CREST as it is set, then with one part changed at a time, and compare errors and regions."
    parser = _new(about, usage="torchcrest ablate TASK [options]")
    _add_run(parser, crest_defaults, skip={"task", *CONFIGS, "method", "budget", "seed"})
    names = list(ablation.VARIANTS)
    parser.add_argument("--variants", type=str, nargs="+", default=names, help=f"some of {', '.join(names)}")
    parser.add_argument("--budget", type=float, default=0.1, help="share of the full run's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each variant runs with each")
    parser.add_argument("--processes", type=int, default=1, help="runs of a variant to make at once")
    parser.add_argument("--out", type=Path | None, default=None, help="folder of the runs; default: runs/TASK/ablate")
    return _without_markup(parser)


def _report_parser() -> ArgumentParser:
    about = "Show what a comparison, or a single run, found: a page of its own, or the table alone."
    parser = _new(about, usage="torchcrest report DIR [options]")
    parser.add_argument("--config", action="config", help="a YAML file of settings")
    parser.add_argument("folder", type=Path, help="of torchcrest compare's --out, or of one run")
    parser.add_argument("--format", type=str, default="html", help="html, md, csv or json; all but html: the table")
    targets = "accuracies, from 0 to 1, to tell when they are reached; none: 0.9, 0.95 and 0.99 of the best"
    parser.add_argument("--targets", type=float, nargs="+", default=[], help=targets)
    out = "file to write; default: DIR/report.html, and the terminal for the other formats"
    parser.add_argument("--out", type=Path | None, default=None, help=out)
    return parser


def _explain_parser() -> ArgumentParser:
    about = "Tell what a run that was trained with --difficulty true has learned of its examples."
    parser = _new(about, usage="torchcrest explain RUN [options]")
    parser.add_argument("--config", action="config", help="a YAML file of settings")
    parser.add_argument("folder", type=Path, help="of a finished run")
    example = "tell the story of one example, by its position; needs a run with --picks true"
    parser.add_argument("--example", type=int | None, default=None, help=example)
    parser.add_argument("--top", type=int, default=10, help="examples in each list, and in the sheet")
    export = "write the scores of all examples: a .csv or .parquet file"
    parser.add_argument("--export", type=Path | None, default=None, help=export)
    suspects = "draw the suspected label errors with their labels, for images: a .png file"
    parser.add_argument("--suspects", type=Path | None, default=None, help=suspects)
    return parser


def _select_parser() -> ArgumentParser:
    about = "Pick one weighted coreset from raw features, for a convex model."
    parser = _new(about, usage="torchcrest select FEATURES.npy --size N --out FILE.npz [options]")
    parser.add_argument("--config", action="config", help="a YAML file of settings")
    parser.add_argument("features", type=Path, help="array [n, d] in a .npy file")
    parser.add_argument("--labels", type=Path | None, default=None, help="classes [n] in a .npy file")
    parser.add_argument("--size", type=int, required=True, help="how many examples to pick")
    parser.add_argument("--metric", type=str, default="euclidean", help="euclidean, sqeuclidean or cosine")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    return parser


def _add_run(parser: ArgumentParser, crest_defaults: dict[str, Any], skip: set[str | int]) -> None:
    parser.add_argument("--config", action="config", help="a YAML file of settings; flags after it override them")
    parser.add_argument("task", type=str, help=TASK)
    parser.add_class_arguments(RunSettings, skip=skip)
    track = "show the figures to some of tensorboard, trackio, wandb; give the task first"
    parser.add_argument("--track", type=str, nargs="*", default=[], help=track)
    parser.add_argument("--energy", action="store_true", help="measure the energy too, with codecarbon")
    parser.add_argument("--preset", type=str | None, default=None, help=f"settings by name: {', '.join(PRESETS)}")
    for name, config in CONFIGS.items():
        parser.add_class_arguments(config, name, skip=SHARED & {field.name for field in fields(config)})
    defaults = {f"crest.{name}": value for name, value in crest_defaults.items() if name != "batch_size"}
    if "batch_size" in crest_defaults:
        defaults["batch_size"] = crest_defaults["batch_size"]
    parser.set_defaults(defaults)


def _new(about: str, **settings: Any) -> ArgumentParser:
    # No abbreviations: one that names a preset, say, would be taken and not seen.
    return ArgumentParser(description=about, exit_on_error=False, allow_abbrev=False, **settings)


def _without_markup(parser: ArgumentParser) -> ArgumentParser:
    """Take the docstrings' markup out of the help."""
    for item in (*parser._actions, *parser._action_groups):
        for name in ("help", "title", "description"):
            text = getattr(item, name, None)
            if isinstance(text, str):
                words = re.sub(r":\w+:`([\w.]+\.)?(\w+)`", r"\2", text).replace("``", "")
                setattr(item, name, re.sub(r"\bNone\b", "null", words))  # as it is written here
    return parser


def _explain(message: str, arguments: Sequence[str]) -> str:
    """Put the parser's words into ours."""
    actions = next(iter(_commands({}, arguments).values()))._actions
    pattern = r'Parser key "([\w.]+)".*?(?:Expected an? ([^\n]+?)\. Got|Subtypes: ([^\n]+).*\n *Given) value: (.*)'
    if found := re.search(pattern, message, re.DOTALL):
        name, kind, got = found[1], found[2] or found[3], found[4]
        choices = re.findall(r"'(\w+)'", kind) if "Literal" in kind else []
        if choices:
            return must(name, f"be one of {', '.join(choices)}", got, suggest(got, choices))
        plain = next((words for word, words in KINDS.items() if word in kind), kind)
        plain += " or null" if "None" in kind else ""
        return must(name, f"be {plain}", got, "See --help.")
    if found := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        flag = found[1].partition("=")[0]
        known = [option for action in actions for option in action.option_strings]
        return must("flag", "be a known one", flag, suggest(flag, known) if flag.startswith("--") else "See --help.")
    lists = "not iterable|item assignment|changed size during|does not accept (nested )?(option|key) '(method|seed)'"
    if re.search(lists, message):
        names = [action.dest for action in actions if action.nargs in ("*", "+")]
        do = "A list is like [0, 1]; a single run's config.yaml is for torchcrest train --config."
        return must("config", f"hold {', '.join(names)} as lists", "something else", do)
    if "codec can't decode" in message:
        return must("config", "be a YAML file", "another kind of file", "See --print_config.")
    if found := re.search(r"required: (?:\w+\.)?(\w+)", message):
        return f"{found[1]} must be given. See --help."
    if "subcommand" in message:
        return f"command must be one of {', '.join(COMMANDS)}. See --help."
    return message


def _settings(args: Namespace, **chosen: Any) -> RunSettings:
    """Build the settings; what is wrong with the run and with CREST comes in one message."""
    problems: list[str] = []
    of_each_run = {"method", "budget", "seed"}  # lists, in a comparison
    known = {f.name for f in fields(RunSettings)} - CONFIGS.keys() - of_each_run
    values = {name: args[name] for name in known} | chosen
    configs: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        given = args[name].as_dict()
        if name == "crest":
            methods = args.get("methods", [values.get("method")])
            idle = METHODS.keys() - {name} >= set(methods)
            given["batch_size"] = 1 if idle else max(1, values["batch_size"] or 1)  # the task's is filled in later
        try:
            configs[name] = config(**given)
        except ConfigError as error:
            problems += [f"{name}.{problem}" for problem in str(error).splitlines()]
    try:
        settings = RunSettings(**values, **configs)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return settings


def _rates(words: Sequence[str]) -> dict[str, float]:
    """Read learning rates, method=rate."""
    rates: dict[str, float] = {}
    for word in words:
        name, _, rate = word.partition("=")
        if name in rates:
            raise ConfigError(must("rates", f"name {name} once", " ".join(words), "Give each method one rate."))
        try:
            rates[name] = float(rate)
        except ValueError as error:
            raise ConfigError(must("rates", "be like crest=0.3", word, "Name the method and its rate.")) from error
    return rates


# Words and files ------------------------------------------------------------------------------------------------


def _print_table(task: str, summaries: list[dict[str, Any]], console: Console) -> None:
    _print_rows(task, COLUMNS, [cell.row() for cell in cells(summaries)], LEGEND, console)


def _print_rows(task: str, columns: list[str], rows: list[list[str]], legend: str, console: Console) -> None:
    widths = [max(map(len, column)) + 1 for column in zip(columns, *rows, strict=True)]
    # Half a figure is a wrong one: the last columns are left out where the terminal is too narrow.
    fitting = max(1, sum(end - 1 <= console.width for end in accumulate(widths)))
    console.print(render(_plain(task), columns[:fitting], [row[:fitting] for row in rows]))
    console.print(legend, style="dim", highlight=False)


def _print_sentences(sentences: Sequence[str], console: Console) -> None:
    """Print a sentence a line; on a terminal, what does not fit goes on below, indented."""
    for line in ["", *sentences] if sentences else []:
        if console.is_terminal:
            line = textwrap.fill(line, console.width, subsequent_indent="  ", break_on_hyphens=False)
        console.print(_plain(line), soft_wrap=True, highlight=False)


def _folder(out: Path | None, task: str, name: str) -> Path:
    path = Path(task.partition(":")[2] or task)
    short = (path.with_suffix("") if path.suffix == ".gz" else path).stem.replace(":", "-")
    return out if out is not None else Path("runs") / short / name


def _array(path: Path) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # it may be larger than memory
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("an archive of several arrays")
    except (OSError, ValueError, EOFError) as error:
        do = "Write it with numpy.save(path, array)."
        raise DataError(must(str(path), "be a .npy file", str(error).splitlines()[0], do)) from error
    return array


def _again(arguments: Sequence[str]) -> str:
    """Return the command that goes on."""
    resume = [] if arguments[0] != "train" or "--resume" in arguments else ["--resume"]
    return shlex.join(["torchcrest", *arguments, *resume])


def _say(line: str) -> None:
    # Not a console of its own: while a bar is live, it is sys.stderr that knows how to write above it.
    sys.stderr.write(line + "\n")


def _told(console: Console) -> Callable[[str], None]:
    """Return what prints a sentence about the data."""
    return lambda line: console.print(_plain(line), soft_wrap=True, highlight=False)


def _plain(text: str) -> str:
    """Keep rich from reading brackets as styles."""
    return text.replace("[", "\\[")


if __name__ == "__main__":
    sys.exit(main())
