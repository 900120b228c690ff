"""Does CREST win at equal wall-clock? Every method at its own best learning rate, over tasks and budgets.

Images are the glyphs at half resolution (means of 2 x 2 pixels): as they are; with 20 and 40 % of the training labels
permuted; with class sizes falling to a tenth; and 12,000 of them with four near-duplicates each, shifted by up to a
pixel, with noise. Their test fonts are of other families than those trained on; in "familiar" a tenth of the training
characters is the test instead. Then MNIST-1D, and sentence pairs with a small text model. Test data are never spoilt.

For each task and method the rate is chosen on a tenth of the training data, held out, at one budget and with a seed of
its own; then the method is judged on test data with fresh seeds at all budgets. Random data is run again with so many
more steps as a method's selection has taken time beside its training, by the clock of the same runs: on a shared
machine the seconds of two runs differ by more than the few hundredths that are to be judged. A method wins a cell where
its difference from random data at equal time, seed by seed, has a 95 % interval above 0.

    OMP_NUM_THREADS=1 python benchmarks/study.py --data FOLDER --tasks glyphs noise40 --out benchmarks/study.jsonl
    python benchmarks/study.py --table benchmarks/study.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from torchcrest import CrestConfig
from torchcrest.train.compare import compare, plan
from torchcrest.train.settings import RunSettings
from torchcrest.train.tasks import Examples, Task, load
from torchcrest.train.verdict import Difference, bootstrap, judge

Arrays = dict[str, NDArray[Any]]

HELD_OUT = 0.1
TUNED_AT = 0.1  # budget at which rates are chosen
TUNED_WITH = 1000  # seed, no other run has it
PAIRS = 20_000  # sentence pairs of the small text task


@dataclass(frozen=True)
class Study:
    """A task: where its data come from, what is trained on it and for how long."""

    make: Callable[[Path, Path], Arrays | None] | None
    model: str
    full_steps: int
    proxy: str | None
    rates: tuple[float, ...]
    optimizer: Literal["sgd", "adamw"] = "sgd"


def glyphs(data: Path) -> Arrays:
    """Read the glyphs and halve their sides."""
    with np.load(data / "glyphs62.npz") as file:
        arrays = {name: file[name] for name in file.files}
    for name in ("x_train", "x_test"):
        n, height, width = arrays[name].shape
        arrays[name] = arrays[name].reshape(n, height // 2, 2, width // 2, 2).mean((2, 4)).round().astype(np.uint8)
    return arrays


def permuted(share: float) -> Callable[[Path, Path], Arrays]:
    """Permute a share of the training labels among themselves."""

    def make(data: Path, _: Path) -> Arrays:
        arrays, rng = glyphs(data), np.random.default_rng(0)
        y = arrays["y_train"].copy()
        rows = rng.choice(len(y), round(share * len(y)), replace=False)
        y[rows] = y[rng.permutation(rows)]
        return {**arrays, "y_train": y}

    return make


def imbalanced(data: Path, _: Path) -> Arrays:
    """Keep all of one class, a tenth of another, and of those between a share that falls by the same factor."""
    arrays, rng = glyphs(data), np.random.default_rng(0)
    y = arrays["y_train"]
    classes = rng.permutation(np.unique(y))
    kept = []
    for k, each in enumerate(classes):
        rows = rng.permutation(np.flatnonzero(y == each))
        kept.append(rows[: round(len(rows) * 10 ** (-k / (len(classes) - 1)))])
    rows = np.sort(np.concatenate(kept))
    return {**arrays, "x_train": arrays["x_train"][rows], "y_train": y[rows]}


def duplicated(data: Path, _: Path) -> Arrays:
    """Keep a fifth of the examples, and add four near-duplicates of each."""
    arrays, rng = glyphs(data), np.random.default_rng(0)
    rows = np.sort(rng.choice(len(arrays["y_train"]), len(arrays["y_train"]) // 5, replace=False))
    first = arrays["x_train"][rows].astype(np.float32)
    copies: list[NDArray[Any]] = [first]
    for _copy in range(4):
        shifts = rng.integers(-1, 2, (len(rows), 2))
        moved = np.stack([np.roll(image, shift, (0, 1)) for image, shift in zip(first, shifts.tolist(), strict=True)])
        copies.append(moved + rng.normal(0, 8, moved.shape))
    x = np.concatenate(copies).round().clip(0, 255).astype(np.uint8)
    order = rng.permutation(len(x))
    return {**arrays, "x_train": x[order], "y_train": np.tile(arrays["y_train"][rows], 5)[order]}


def familiar(data: Path, _: Path) -> Arrays:
    """Test on a tenth of the training characters, which are of the fonts that are trained on."""
    arrays = glyphs(data)
    order = np.random.default_rng(0).permutation(len(arrays["y_train"]))
    held, kept = np.split(order, [round(HELD_OUT * len(order))])
    return {
        f"{name}_{part}": arrays[f"{name}_train"][rows]
        for part, rows in (("train", kept), ("test", held))
        for name in "xy"
    }


def pairs(data: Path, folder: Path) -> None:
    """Write the first sentence pairs, with and without a tenth held out."""

    def rows(part: str) -> list[str]:
        with gzip.open(data / f"debian_pairs_{part}.jsonl.gz", "rt") as file:
            return file.readlines()

    train, test = rows("train")[:PAIRS], rows("test")
    held = round(HELD_OUT * len(train))
    for name, lines, judged in (("test", train, test), ("tuning", train[held:], train[:held])):
        for part, some in (("train", lines), ("test", judged)):
            with gzip.open(folder / f"{name}_{part}.jsonl.gz", "wt") as file:
                file.writelines(some)


STUDIES = {
    "glyphs": Study(lambda data, _: glyphs(data), "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "noise20": Study(permuted(0.2), "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "noise40": Study(permuted(0.4), "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "imbalance": Study(imbalanced, "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "duplicates": Study(duplicated, "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "familiar": Study(familiar, "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "mnist1d": Study(None, "conv1d", 9375, None, (0.1, 0.2, 0.4)),
    "pairs": Study(pairs, "bag", 3125, None, (0.001, 0.003, 0.01), "adamw"),
}

# What CREST is in the study, by name.
RECIPES = {
    "default": CrestConfig(),
    "a twentieth": CrestConfig(max_overhead=0.05, max_coreset_cost=0.5),
    "no exclusion": CrestConfig(exclude=False),
    "small proxy": CrestConfig.preset("forward", proxy_source="model", check="none", pool_size=512, weight_power=1.0),
}


def prepared(name: str, data: Path, folder: Path) -> tuple[str, Task]:
    """Write a task's files where they are not there; return its name, and the task to choose rates on."""
    make = STUDIES[name].make
    if make is None:
        return name, held_out(load(name))
    folder.mkdir(parents=True, exist_ok=True)
    if make is pairs:
        paths = [folder / f"{which}_train.jsonl.gz" for which in ("test", "tuning")]
        if not paths[-1].exists():
            make(data, folder)
        return f"text:{paths[0]}", load(f"text:{paths[1]}", model=STUDIES[name].model)
    path = folder / f"{name}.npz"
    if not path.exists():
        arrays: Any = make(data, folder)
        np.savez(path, **arrays)
    return f"npz:{path}", held_out(load(f"npz:{path}"))


def held_out(task: Task) -> Task:
    """Return a task whose test data are a tenth of the training data, which lacks them."""
    whole = task.train
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1))
    held, kept = order.tensor_split([round(HELD_OUT * len(order))])
    test, train = (
        Examples(whole.inputs[rows], whole.targets[rows], mean=whole.mean.flatten(), std=whole.std.flatten())
        for rows in (held, kept)
    )
    return replace(task, train=train, test=test)


def settings_of(name: str, task: str, recipe: CrestConfig) -> RunSettings:
    """Return what the runs of a task have in common."""
    study = STUDIES[name]
    batch = 128
    return RunSettings(
        task=task,
        epochs=study.full_steps * batch / len(load(task, model=study.model).train),
        batch_size=batch,
        model=study.model,
        proxy_model=study.proxy if recipe.proxy_source == "model" else None,
        optimizer=study.optimizer,
        evaluations=1,
        device="cpu",
        crest=recipe,
    )


def tuned(
    settings: RunSettings, task: Task, methods: list[str], rates: tuple[float, ...], folder: Path
) -> dict[str, float]:
    """Return each method's best rate; a run that diverges is no choice."""
    found: dict[str, dict[float, float]] = {method: {} for method in methods}
    for rate in rates:
        runs = plan(replace(settings, learning_rate=rate), methods, [TUNED_AT], [TUNED_WITH])
        for run in runs:
            (summary,) = compare([run], folder / f"{rate:g}", equal_time=False, task=task)
            found[run.method][rate] = summary["accuracy"]
    print({method: {rate: round(100 * a, 2) for rate, a in each.items()} for method, each in found.items()}, flush=True)
    return {method: max(each, key=lambda rate: each[rate]) for method, each in found.items()}


def overhead(summary: dict[str, Any]) -> float:
    """Return the seconds of selection, checks and curvature for each second of the rest of a run."""
    own: float = sum(summary[f"seconds_{name}"] for name in ("selecting", "checking", "curvature"))
    rest: float = summary["seconds"] - own
    return own / rest


def longer(summaries: list[dict[str, Any]], runs: list[RunSettings], folder: Path) -> list[dict[str, Any]]:
    """Run random data for as long as each other method took at each budget."""
    found = []
    for method, budget in dict.fromkeys((s["method"], s["budget"]) for s in summaries):
        share = statistics.fmean(overhead(s) for s in summaries if (s["method"], s["budget"]) == (method, budget))
        if method == "random" or not share:
            continue
        steps = summaries[0]["full_steps"]
        own = round(budget * steps * (1 + share)) / steps
        again = [replace(r, budget=own) for r in runs if (r.method, r.budget) == ("random", budget)]
        found += [{**s, "as_long_as": [method, budget]} for s in compare(again, folder, equal_time=False)]
    return found


def longer_for(accuracy: float, time: float, random: dict[float, float]) -> str:
    """Say how many times as long random data takes to an accuracy.

    Args:
        accuracy: of a method that is not level with random data.
        time: that it took, as a share of a full run's steps.
        random: accuracy of random data by that share. Between two of them it grows with the log of time.

    >>> longer_for(0.7, 0.1, {0.1: 0.6, 0.4: 0.8})
    '2.0'
    >>> longer_for(0.9, 0.1, {0.1: 0.6, 0.4: 0.8})
    '> 4.0'
    """
    budgets = sorted(random)
    best = np.maximum.accumulate([random[budget] for budget in budgets])
    if accuracy < best[0]:
        return f"< {budgets[0] / time:.1f}"
    if accuracy > best[-1]:
        return f"> {budgets[-1] / time:.1f}"  # longer than any of them
    return f"{np.exp(np.interp(accuracy, best, np.log(budgets))) / time:.1f}"


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the records of `--out`, and how many cells each method won, tied and lost."""
    lines = [
        "| task | budget | method | rate | accuracy % | equal steps | equal time | random needs × the time |"
        " selecting % | on coresets % |",
        "|---|" + "---:|" * 9,
    ]
    cells: dict[str, list[int]] = {}

    def points(difference: Difference | None) -> str:
        if difference is None or difference.low is None or difference.high is None:
            return ""
        return f"{100 * difference.mean:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"

    keys = dict.fromkeys((record["recipe"], record["task"]) for record in records)
    for recipe, task in keys:
        of_task = [r for r in records if (r["recipe"], r["task"]) == (recipe, task)]
        some = [r for r in of_task if "as_long_as" not in r]
        random: dict[float, list[float]] = {}
        for r in records:
            if (r["task"], r["method"]) == (task, "random"):
                random.setdefault(r["steps"] / r["full_steps"], []).append(r["accuracy"])
        curve = {share: statistics.fmean(accuracies) for share, accuracies in random.items()}
        verdicts = {(v.method, v.budget): v for v in judge(some)}
        for budget in sorted({r["budget"] for r in some}):
            for method in dict.fromkeys(r["method"] for r in some):
                runs = [r for r in some if (r["method"], r["budget"]) == (method, budget)]
                if not runs:
                    continue
                accuracies = [r["accuracy"] for r in runs]
                verdict = verdicts.get((method, budget))
                times = verdict.equal_time if verdict else None
                share = statistics.fmean(map(overhead, runs))
                if verdict and not share:
                    times = verdict.equal_steps
                if others := {r["seed"]: r for r in of_task if r.get("as_long_as") == [method, budget]}:
                    times = bootstrap(
                        [r["accuracy"] - others[r["seed"]]["accuracy"] for r in runs if r["seed"] in others]
                    )
                place = 1
                if times and times.low is not None and times.high is not None:
                    place = 0 if times.low > 0 else 2 if times.high < 0 else 1
                    cells.setdefault(f"{recipe}: {method}", [0, 0, 0])[place] += 1
                row = [task, f"{budget:g}", method, f"{runs[0]['rate']:g}"]
                row += [f"{100 * statistics.fmean(accuracies):.2f} ± {100 * statistics.stdev(accuracies):.2f}"]
                row += [points(verdict.equal_steps if verdict else None), points(times)]
                time = budget * (1 + share)
                row += ["" if place == 1 else longer_for(statistics.fmean(accuracies), time, curve)]
                on = statistics.fmean(r.get("coresets", 0) / r["steps"] for r in runs)
                lines.append(f"| {' | '.join([*row, f'{100 * share:.1f}', f'{100 * on:.0f}' if on else ''])} |")
    counts = [f"{name}: {won} won, {tied} tied, {lost} lost" for name, (won, tied, lost) in cells.items()]
    return "\n".join([*lines, "", *counts])


def main() -> None:
    """Run what is missing; write JSON lines and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with glyphs62.npz and debian_pairs_*.jsonl.gz")
    parser.add_argument("--table", type=Path, help="print the table of these JSON lines, and run nothing")
    parser.add_argument("--tasks", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--methods", nargs="+", default=["random", "infobatch", "crest"])
    parser.add_argument("--recipe", default="default", choices=list(RECIPES))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return
    if not args.data or not args.out:
        parser.error("--data and --out are needed to run anything")
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    for name in args.tasks:
        folder = args.runs / name
        task, tuning = prepared(name, args.data, folder / "data")
        settings = settings_of(name, task, RECIPES[args.recipe])
        rates = tuned(settings, tuning, args.methods, STUDIES[name].rates, folder / "tuning")
        runs = plan(settings, args.methods, args.budgets, args.seeds, rates)
        summaries = compare(runs, folder / "runs", equal_time=False)
        summaries += longer(summaries, runs, folder / "runs")
        with args.out.open("a") as file:
            for summary in summaries:
                own = {"task": name, "recipe": args.recipe, "rate": rates[summary["method"]], "commit": commit}
                file.write(json.dumps({**summary, **own}) + "\n")
        print(
            table([{**s, "task": name, "recipe": args.recipe, "rate": rates[s["method"]]} for s in summaries]),
            flush=True,
        )


if __name__ == "__main__":
    main()
