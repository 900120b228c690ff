"""Do proxy gradients tell of coresets what whole gradients tell, and what do the live diagnostics cost?

A run of CREST is stopped at some steps. There, bias and variance of coresets' gradients are measured by whole
gradients and by proxies, on the same pools, for pools of 2, 4 and 8 batches and three kinds of weights; a random batch
stands beside them. The correlation is Spearman's, over the ways to pick. Then runs with and without the diagnostics,
in pairs, in CPU seconds, and the share of the diagnostics themselves.

    python benchmarks/diagnostics.py npz:glyphs62.npz --draws 16 --out benchmarks/diagnostics-glyphs62-cnn.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from torchcrest import Crest, CrestConfig
from torchcrest.diagnostics import Gauge, GradientQuality, gradient_qualities
from torchcrest.train.schedule import learning_rate
from torchcrest.train.tasks import load

M = 128
CONFIGS = {
    f"r={times}m, weights^{power:g}": CrestConfig.preset(
        "forward", batch_size=M, pool_size=times * M, weight_power=power
    )
    for times in (2, 4, 8)
    for power in (1.0, 0.5, 0.0)
}
KEYS = ("bias", "deviation", "error", "effective_batch_size", "bias_to_norm", "random_to_norm")


class Part:
    """The training examples that quality is measured on."""

    def __init__(self, examples: Any, rows: list[int]) -> None:
        self._examples, self._rows = examples, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        return self._examples.__getitems__([self._rows[row]])

    def __getitems__(self, rows: list[int]) -> Any:
        return self._examples.__getitems__([self._rows[row] for row in rows])


def training(model: nn.Module, crest: Crest, rate: float) -> Iterator[int]:
    """Train, and yield the number of steps after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    model.train()
    for step, ((x, y), weights) in enumerate(crest, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, len(crest), base=rate, kind="step", warmup=0.1)
        (F.cross_entropy(model(x), y, reduction="none") * weights).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def told(quality: GradientQuality) -> dict[str, Any]:
    """Return the figures, bias and deviation and the root of the mean squared error relative to a random batch's."""
    values, unit = quality.to_dict(), quality.random_variance**0.5
    error = (max(quality.bias_square, 0) + quality.variance) ** 0.5
    relative = {"bias": values["bias"] / unit, "deviation": values["deviation"] / unit, "error": error / unit}
    noise, bound = (quality.relative(each) for each in (quality.random_variance, quality.bias_square))
    sizes = {"effective_batch_size": values["effective_batch_size"], "random_to_norm": noise, "bias_to_norm": bound}
    return {**asdict(quality), **relative, **sizes}


def spearman(left: list[float], right: list[float]) -> float:
    """Correlate the ranks."""
    first, second = (np.argsort(np.argsort(values)) for values in (left, right))
    return float(np.corrcoef(first, second)[0, 1])


def cost(task: Any, model: str, config: CrestConfig, steps: int, seed: int, rate: float) -> tuple[float, float]:
    """Return the CPU seconds of a run, and those of the diagnostics in it."""
    spent = 0.0
    kept = {name: getattr(Gauge, name) for name in ("add", "read", "tell")}

    def timed(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal spent
            start = time.process_time()
            try:
                return kept[name](*arguments)
            finally:
                spent += time.process_time() - start

        return call

    for name in kept:
        setattr(Gauge, name, timed(name))
    try:
        net = task.build(model, seed)
        crest = Crest(net, task.train, config, steps=steps, seed=seed, collate_fn=task.train.collate)
        start = time.process_time()
        for _ in training(net, crest, rate):
            pass
        return time.process_time() - start, spent
    finally:
        for name, method in kept.items():
            setattr(Gauge, name, method)


def main() -> None:
    """Measure, draw, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", help="left out: only draw what is in --out")
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--steps", type=int, default=469)
    parser.add_argument("--at", type=int, nargs="+", default=[50, 200, 469])
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--examples", type=int, default=20_000, help="training examples to measure on")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--pair-steps", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figure", type=Path, help="a .png of what proxies say against what whole gradients say")
    args = parser.parse_args()
    if args.task:
        measure(args)
    if args.figure:
        draw(args.out, args.figure)


def measure(args: argparse.Namespace) -> None:
    """Measure, write a JSON line a figure, and print tables."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    shared = {"task": args.task.rpartition("/")[2], "model": args.model, "commit": commit, "torch": torch.__version__}
    task = load(args.task)
    rows = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[: args.examples].tolist()
    data = Part(task.train, rows)
    with args.out.open("w") as file:

        def write(**record: Any) -> None:
            file.write(json.dumps({**shared, **record}) + "\n")
            file.flush()

        pairs = []
        plain = CrestConfig.preset("forward", batch_size=M)
        cost(task, args.model, plain, 10, 0, args.rate)  # the first run pays for a cold machine
        for pair in range(args.pairs):
            both = {}
            for on in (False, True) if pair % 2 else (True, False):
                config = replace(plain, diagnostics=on, overhead_in="counted")
                both[on], own = cost(task, args.model, config, args.pair_steps, pair, args.rate)
                share = own / both[on] if on else 0.0
                write(pair=pair, diagnostics=on, steps=args.pair_steps, cpu_seconds=both[on], share=share)
                if on:
                    pairs.append((share, 0.0))
            pairs[-1] = (pairs[-1][0], both[True] / both[False] - 1)
            print(f"pair {pair}: with {both[True]:.2f} s, without {both[False]:.2f} s", flush=True)
        names = ("share of the diagnostics", "with / without - 1")
        for words, values in zip(names, zip(*pairs, strict=True), strict=True):
            print(f"{words}: median {median(values):.2%} ({min(values):.2%} to {max(values):.2%})", flush=True)

        model = task.build(args.model, 0)
        crest = Crest(
            model,
            task.train,
            plain,
            steps=args.steps,
            seed=0,
            collate_fn=task.train.collate,
        )
        for step in training(model, crest, args.rate):
            if step not in args.at:
                continue
            start = time.perf_counter()
            found = gradient_qualities(
                model, data, CONFIGS, draws=args.draws, collate_fn=task.train.collate, chunk=M, seed=step
            )
            live = next((event for event in reversed(crest.history) if event["event"] == "quality"), None)
            write(step=step, live=live)
            print(f"\nstep {step}, {time.perf_counter() - start:.0f} s; live: {live}\n")
            print(f"| variant | {' | '.join(KEYS)} | proxies: {' | '.join(KEYS)} |")
            print(f"| --- | {'---: | ' * 2 * len(KEYS)}")
            table = {name: tuple(map(told, both)) for name, both in found.items()}
            for name, (whole, proxies) in table.items():
                write(step=step, variant=name, draws=args.draws, whole=whole, proxies=proxies)
                cells = [_written(each[key], key) for each in (whole, proxies) for key in KEYS]
                print(f"| {name} | {' | '.join(cells)} |")
            for key in KEYS[:4]:
                rank = spearman(*([each[k][key] for each in table.values()] for k in (0, 1)))
                write(step=step, rank_correlation=key, value=rank)
                print(f"Spearman, {key}: {rank:.2f}", flush=True)


def draw(results: Path, path: Path) -> None:
    """Draw bias and deviation of all ways to pick, by proxies and by whole gradients."""
    rows = [row for row in map(json.loads, results.read_text().splitlines()) if "variant" in row]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("deviation", "bias"), strict=True):
        for step, mark in zip(sorted({row["step"] for row in rows}), "osD^v", strict=False):
            some = [row for row in rows if row["step"] == step]
            x, y = ([row[kind][key] for row in some] for kind in ("proxies", "whole"))
            axes.plot(x, y, mark, mfc="none", label=f"step {step}")
        most = max(*axes.get_xlim(), *axes.get_ylim())
        axes.plot([0, most], [0, most], color="0.7", lw=0.8, zorder=0)
        axes.set(xlim=(0, most), ylim=(0, most), title=f"{key} of coresets", xlabel="by proxy gradients")
        axes.set_ylabel("by whole gradients")
    figure.axes[0].legend(frameon=False)
    figure.suptitle("in standard deviations of a random batch of m", fontsize=9)
    figure.savefig(path, dpi=110)


def _written(value: float | None, key: str) -> str:
    return "" if value is None else f"{value:.{0 if 'size' in key else 2}f}"


if __name__ == "__main__":
    main()
