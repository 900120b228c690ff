"""Does CREST win at equal wall-clock? Every method at its own best learning rate, over tasks and budgets.

Images are the glyphs at half resolution (means of 2 x 2 pixels): as they are; with 20 and 40 % of the training labels
permuted; with class sizes falling to a tenth; and 12,000 of them with four near-duplicates each, shifted by up to a
pixel, with noise. Their test fonts are of other families than those trained on; in "familiar" a tenth of the training
characters is the test instead. Then MNIST-1D, and sentence pairs with a small text model. Test data are never spoilt.

For each task and method the rate is chosen on a tenth of the training data, held out, at one budget (`--tuned-at`) and
with a seed of its own; then the method is judged on test data with fresh seeds at all budgets. Random data is run again
with so many more steps as a method's selection has taken time beside its training, by the clock of the same runs: on a
shared machine the seconds of two runs differ by more than the few hundredths that are to be judged. A method wins a
cell where its difference from random data at equal time, seed by seed, has a 95 % interval above 0.

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
from torchcrest.train.verdict import Difference, bootstrap

Arrays = dict[str, NDArray[Any]]

HELD_OUT = 0.1
SEEDS = 5
TUNED_WITH = 1000  # seed, no other run has it
PAIRS = 20_000  # sentence pairs of the small text task


@dataclass(frozen=True)
class Study:
    """A task: where its data come from, what is trained on it and for how long."""

    title: str
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
    "glyphs": Study("glyphs", lambda data, _: glyphs(data), "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "noise20": Study("20 % of the labels permuted", permuted(0.2), "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "noise40": Study("40 % of the labels permuted", permuted(0.4), "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "imbalance": Study("class sizes falling to a tenth", imbalanced, "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "duplicates": Study("four near-duplicates of each", duplicated, "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "familiar": Study("glyphs, tested on the fonts trained on", familiar, "cnn", 4690, "mlp", (0.3, 0.6, 1.2)),
    "mnist1d": Study("MNIST-1D, `conv1d`", None, "conv1d", 9375, None, (0.1, 0.2, 0.4)),
    "pairs": Study("sentence pairs, `bag`", pairs, "bag", 3125, None, (0.001, 0.003, 0.01), "adamw"),
}

# What CREST is in the study, by name.
RECIPES = {
    "default": CrestConfig(),
    "any visits": CrestConfig(max_extra_visits=None),
    "a twentieth": CrestConfig(max_overhead=0.05, max_coreset_cost=0.5, max_extra_visits=None),
    "no exclusion": CrestConfig(exclude=False, max_extra_visits=None),
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
    settings: RunSettings, task: Task, methods: list[str], rates: tuple[float, ...], budget: float, folder: Path
) -> dict[str, float]:
    """Return each method's best rate at a budget; a run that diverges is no choice."""
    found: dict[str, dict[float, float]] = {method: {} for method in methods}
    for rate in rates:
        runs = plan(replace(settings, learning_rate=rate), methods, [budget], [TUNED_WITH])
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
    """Run the methods that take no time of their own for as long as each other one took at each budget."""
    shares: dict[tuple[str, float], list[float]] = {}
    for summary in summaries:
        shares.setdefault((summary["method"], summary["budget"]), []).append(overhead(summary))
    free = {method for method, _ in shares} - {method for (method, _), each in shares.items() if any(each)}
    steps = summaries[0]["full_steps"]
    found = []
    for (method, budget), each in shares.items():
        if method in free:
            continue
        own = round(budget * steps * (1 + statistics.fmean(each))) / steps
        again = [replace(run, budget=own) for run in runs if run.method in free and run.budget == budget]
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

    Where none ran longer it is empty:

    >>> longer_for(0.9, 0.4, {0.1: 0.6, 0.4: 0.8})
    ''
    """
    budgets = sorted(random)
    best = np.maximum.accumulate([random[budget] for budget in budgets])
    if accuracy < best[0]:
        return f"< {budgets[0] / time:.1f}"
    if accuracy > best[-1]:
        longest = round(budgets[-1] / time, 1)
        return f"> {longest}" if longest > 1 else ""
    return f"{np.exp(np.interp(accuracy, best, np.log(budgets))) / time:.1f}"


@dataclass(frozen=True)
class Cell:
    """What a method reached on a task at a budget, and what others did that ran as long.

    Attributes:
        task: its name in the study.
        budget: share of the full run's steps.
        accuracies: from 0 to 1, by seed.
        others: the same of each other method.
        overhead: seconds of selection for each of the rest.
        on: share of the steps that are on coresets.
        needs: how many times as long random data takes to the accuracy; empty where the two are level.
    """

    task: str
    budget: float
    accuracies: dict[int, float]
    others: dict[str, dict[int, float]]
    overhead: float
    on: float
    needs: str

    def against(self, other: str) -> Difference | None:
        """Return the difference to another method, seed by seed; None where it was not run."""
        theirs = self.others.get(other, {})
        shared = [accuracy - theirs[seed] for seed, accuracy in self.accuracies.items() if seed in theirs]
        return bootstrap(shared) if shared else None


def cells_of(records: list[dict[str, Any]], recipe: str, method: str) -> list[Cell]:
    """Return the cells of a recipe of a method in the records of `--out`."""
    cells = []
    for task in [name for name in STUDIES if any(name == record["task"] for record in records)]:
        curve: dict[float, list[float]] = {}
        for r in records:
            if (r["task"], r["method"]) == (task, "random"):
                curve.setdefault(r["steps"] / r["full_steps"], []).append(r["accuracy"])
        random = {share: statistics.fmean(each) for share, each in curve.items()}
        of_task = [r for r in records if (r["task"], r["recipe"]) == (task, recipe)]
        own = [r for r in of_task if r["method"] == method and "as_long_as" not in r]
        for budget in sorted({r["budget"] for r in own}):
            runs = [r for r in own if r["budget"] == budget]
            others: dict[str, dict[int, float]] = {}
            for r in of_task:
                if r.get("as_long_as") == [method, budget]:
                    others.setdefault(r["method"], {})[r["seed"]] = r["accuracy"]
            share = statistics.fmean(map(overhead, runs))
            accuracies = {r["seed"]: r["accuracy"] for r in runs}
            on = statistics.fmean(r["coresets"] / r["steps"] for r in runs)
            cell = Cell(task, budget, accuracies, others, share, on, "")
            if place(cell.against("random")) in {"won", "lost"}:
                needs = longer_for(statistics.fmean(accuracies.values()), budget * (1 + share), random)
                cell = replace(cell, needs=needs)
            cells.append(cell)
    return cells


def place(difference: Difference | None) -> str:
    """Say whether a cell is won, tied or lost; empty where nothing tells."""
    if difference is None or difference.low is None or difference.high is None:
        return ""
    return "won" if difference.low > 0 else "lost" if difference.high < 0 else "tied"


def points(difference: Difference | None) -> str:
    """Write a difference in points, in bold where it is none of chance.

    >>> points(Difference(0.0123, 0.004, 0.02, 5)), points(Difference(-0.0004, -0.002, 0.001, 3))
    ('**+1.2 (+0.4 to +2.0)**', '0.0 (−0.2 to +0.1), n = 3')
    """
    if difference is None or difference.low is None or difference.high is None:
        return ""
    mean, low, high = (
        text if float(text) else "0.0"
        for text in (f"{100 * value:+.1f}" for value in (difference.mean, difference.low, difference.high))
    )
    bold = "" if place(difference) == "tied" else "**"
    few = "" if difference.n >= SEEDS else f", n = {difference.n}"
    return f"{bold}{mean} ({low} to {high}){bold}{few}".replace("-", "−")


def spread(accuracies: dict[int, float] | None) -> str:
    """Write mean and standard deviation in percent."""
    if not accuracies:
        return ""
    mean = f"{100 * statistics.fmean(accuracies.values()):.2f}"
    return f"{mean} ± {100 * statistics.stdev(accuracies.values()):.2f}" if len(accuracies) > 1 else mean


def differences(cells: list[Cell]) -> list[str]:
    """Return a table of the differences to random data, by task and budget."""
    budgets = sorted({cell.budget for cell in cells})
    lines = [f"| data | {' | '.join(f'{100 * budget:g} %' for budget in budgets)} |", "|---" * len(budgets) + "|---|"]
    for task in dict.fromkeys(cell.task for cell in cells):
        found = {cell.budget: points(cell.against("random")) for cell in cells if cell.task == task}
        lines.append(f"| {STUDIES[task].title} | {' | '.join(found.get(budget, '') for budget in budgets)} |")
    return lines


def table(records: list[dict[str, Any]]) -> str:
    """Return Markdown tables of the records of `--out`, and how many cells each method won, tied and lost.

    Of each method that takes time of its own: all there is, and the differences to random data by budget.
    """
    lines = []
    timed = {r["method"] for r in records if overhead(r)}
    for recipe, method in dict.fromkeys((r["recipe"], r["method"]) for r in records if r["method"] in timed):
        cells = cells_of(records, recipe, method)
        others = list(dict.fromkeys(name for cell in cells for name in cell.others))
        heads = ["data", "budget", method, *others, *(f"against {other}" for other in others)]
        heads += ["random needs", "selecting", "on coresets"]
        lines += ["", ", ".join([f"{method}, {recipe}: accuracy in %", *(f"{other} as long" for other in others)]), ""]
        lines += [f"| {' | '.join(heads)} |", f"|---{'|---:' * (len(heads) - 1)}|"]
        for cell in cells:
            row = [STUDIES[cell.task].title, f"{100 * cell.budget:g} %", spread(cell.accuracies)]
            row += [spread(cell.others.get(other)) for other in others]
            row += [points(cell.against(other)) for other in others]
            row += [cell.needs and f"{cell.needs} ×", f"{100 * cell.overhead:.1f} %", f"{100 * cell.on:.0f} %"]
            lines.append(f"| {' | '.join(row)} |")
        if others:
            lines += ["", *differences(cells)]
        for other in others:
            places = [place(cell.against(other)) for cell in cells if cell.task != "familiar"]
            counts = ", ".join(f"{places.count(which)} {which}" for which in ("won", "tied", "lost"))
            lines += ["", f"Against {other}: {counts}, without the fonts trained on."]
    return "\n".join(lines[1:])


def main() -> None:
    """Run what is missing; write JSON lines and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with glyphs62.npz and debian_pairs_*.jsonl.gz")
    parser.add_argument("--table", type=Path, help="print the table of these JSON lines, and run nothing")
    parser.add_argument("--tasks", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--methods", nargs="+", default=["random", "infobatch", "crest"])
    parser.add_argument("--recipe", default="default", choices=list(RECIPES))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--tuned-at", type=float, default=0.1, help="budget at which rates are chosen")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
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
        rates = tuned(settings, tuning, args.methods, STUDIES[name].rates, args.tuned_at, folder / "tuning")
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
