"""InfoBatch in its own setting: as many epochs as full training, in fewer steps, and what that costs in accuracy.

How many steps its epochs take depends on the losses, so the budget at which as many epochs come to their end as
full training has is found on the first seed. The paper (arXiv 2303.04947) saves 30 to 40 % in classification.

    python benchmarks/infobatch.py mnist1d --rate 0.2 --out benchmarks/infobatch-mnist1d.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from torchcrest.train.collect import Finished, collect
from torchcrest.train.compare import compare, plan
from torchcrest.train.settings import RunSettings
from torchcrest.train.verdict import bootstrap


def main() -> None:
    """Find the budget, run what is missing, write JSON lines and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/infobatch"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = RunSettings(task=args.task, learning_rate=args.rate, evaluations=5)
    folder = args.runs / args.out.stem
    compare(plan(settings, ["full"], [1.0], args.seeds), folder / "all", equal_time=False)
    wanted = collect(folder / "all").runs[0].config["epochs"]
    budget = 0.7
    while True:
        budget = round(budget, 3)
        trial = folder / f"trial-{budget:g}"
        compare(plan(settings, ["infobatch"], [budget], args.seeds[:1]), trial, equal_time=False)
        epochs = passed(collect(trial).runs[0])
        print(f"budget {budget:g}: {epochs:.2f} epochs of {wanted:g}", flush=True)
        if wanted <= epochs < wanted + 1:
            break
        budget = min(budget * wanted / epochs + 0.002, 1.0)
    # Random data in as many steps says what the choice of examples is worth.
    compare(plan(settings, ["random", "infobatch"], [budget], args.seeds), folder / "all", equal_time=False)
    runs = collect(folder / "all").runs
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    lines = [{**run.summary, "epochs": passed(run), "config": run.config, "commit": commit} for run in runs]
    args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    full = {run.summary["seed"]: run.summary["accuracy"] for run in runs if run.summary["method"] == "full"}
    for method in ("full", "random", "infobatch"):
        own = [run for run in runs if run.summary["method"] == method]
        summaries: list[dict[str, Any]] = [run.summary for run in own]
        behind = bootstrap([s["accuracy"] - full[s["seed"]] for s in summaries])
        accuracies = [100 * s["accuracy"] for s in summaries]
        print(
            f"{method}: {statistics.fmean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %, "
            f"{100 * behind.mean:+.2f} points to full "
            f"({100 * (behind.low or 0):+.2f} to {100 * (behind.high or 0):+.2f}), "
            f"{100 * (1 - summaries[0]['steps'] / summaries[0]['full_steps']):.1f} % saved, "
            f"{statistics.fmean(passed(run) for run in own):.1f} epochs, "
            f"{statistics.fmean(s['seconds'] for s in summaries):.1f} s"
        )


def passed(run: Finished) -> float:
    """Return how many epochs a run went through; the last one may not have come to its end."""
    begun = [event for event in run.events if event["event"] == "epoch"]
    if not begun:
        return float(run.summary["examples_trained"] / run.summary["examples"])
    batch = run.summary["examples_trained"] / run.summary["steps"]
    part = (run.summary["steps"] - begun[-1]["step"]) * batch / begun[-1]["kept"]
    return len(begun) - 1 + float(part)


if __name__ == "__main__":
    main()
