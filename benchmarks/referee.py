"""All methods in one harness: at equal optimizer steps, and against random data of as many seconds.

Every method has its own best learning rate. With more than one of ``--search`` each method is tried with all of
them, on the first seed, and goes on with its best. Runs are kept below ``--runs`` and not made again.

    python benchmarks/referee.py mnist1d --search 0.05 0.1 0.2 0.3 --out benchmarks/referee-mnist1d.jsonl
    python benchmarks/referee.py npz:glyphs62.npz --model cnn --epochs 10 --search 0.3 --rates craig=0.1 \
        --out benchmarks/referee-glyphs62.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchcrest.report import report, table
from torchcrest.train.collect import Finished, collect
from torchcrest.train.compare import FailedRuns, compare, plan
from torchcrest.train.methods import METHODS
from torchcrest.train.run import Status
from torchcrest.train.settings import RunSettings
from torchcrest.train.verdict import judge, label, notes


def main() -> None:
    """Run what is missing; write JSON lines and a page, and print table and verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--search", type=float, nargs="+", required=True, help="learning rates to try")
    parser.add_argument("--rates", nargs="+", default=[], help="methods that need no search, as in craig=0.1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--model")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/referee"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = RunSettings(task=args.task, model=args.model, epochs=args.epochs, evaluations=5)
    folder = args.runs / args.out.stem
    known = {name: float(rate) for name, _, rate in (word.partition("=") for word in args.rates)}
    rates = {**search(settings, args.methods, args.search, args.budget, args.seeds[0], folder), **known}
    runs = plan(settings, args.methods, [args.budget], args.seeds, rates)
    try:
        summaries = compare(runs, folder / "all", begin=follow, processes=args.processes)
    except FailedRuns as error:
        print(error)
        summaries = error.summaries
    lines = [json.dumps(record(run)) + "\n" for run in collect(folder / "all").runs]
    args.out.write_text("".join(lines))
    verdicts = judge(summaries)
    print(table(folder / "all", "md"))
    print("\n".join(["rates: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()), ""]))
    print("\n".join([*(verdict.sentence for verdict in verdicts), *notes(summaries, verdicts)]))
    print(report(folder / "all", folder / "report.html"))


def search(
    settings: RunSettings, methods: Sequence[str], rates: Sequence[float], budget: float, seed: int, folder: Path
) -> dict[str, float]:
    """Return the rate at which each method does best on one seed."""
    if len(rates) == 1:
        return dict.fromkeys(methods, rates[0])
    best: dict[str, tuple[float, float]] = {}
    for rate in rates:
        runs = plan(replace(settings, learning_rate=rate), methods, [budget], [seed])
        try:
            summaries = compare(runs, folder / f"rate-{rate:g}", begin=follow, equal_time=False)
        except FailedRuns as error:  # a rate may be too high
            print(error)
            summaries = error.summaries
        for summary in summaries:
            print(f"rate {rate:g}: {label(summary['method'], budget)} {summary['accuracy']:.2%}", flush=True)
            best[summary["method"]] = max(best.get(summary["method"], (0.0, rate)), (summary["accuracy"], rate))
    return {method: rate for method, (_, rate) in best.items()}


def follow(name: str) -> Any:
    """Tell when a run begins and ends."""
    began = time.perf_counter()

    def watch(status: Status) -> None:
        if status.evaluated and status.step == status.steps:
            print(f"{name}: {status.accuracy:.2%}, {time.perf_counter() - began:.0f} s", flush=True)

    return watch


def record(run: Finished) -> dict[str, Any]:
    """Return a run's figures with its settings, without paths."""
    short = run.summary["task"].rpartition("/")[2]
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {**run.summary, "task": short, "config": run.config | {"task": short}, "commit": commit}


if __name__ == "__main__":
    main()
