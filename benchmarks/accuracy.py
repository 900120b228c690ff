"""Accuracy and seconds of the methods at equal optimizer steps, each at several learning rates.

Every method has its own best rate, so a comparison at one rate decides little. Selection is inside the
clock. Runs are kept below ``--runs`` and not run again.

    python benchmarks/accuracy.py mnist1d --rates 0.1 0.2 0.3 --seeds 0 1 2 --out benchmarks/accuracy-mnist1d.jsonl
    python benchmarks/accuracy.py npz:PATH --model resnet20 --rates 0.3 --methods random crest --seeds 0 --out FILE
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from torchcrest import CrestConfig
from torchcrest.train.compare import COLUMNS, Cell, cells, compare, plan, run_name
from torchcrest.train.console import render
from torchcrest.train.files import RunFiles
from torchcrest.train.settings import RunSettings

VARIANTS = {
    "crest": CrestConfig(),
    "crest forward": CrestConfig.preset("forward"),
    "crest r=512": CrestConfig.preset("forward", pool_size=512),
    "crest no bound": CrestConfig.preset("forward", max_overhead=None),
    "crest used again": CrestConfig.preset("forward", renew=None),
    "crest no check": CrestConfig.preset("forward", check="none"),
    "crest bfloat16": CrestConfig.preset("forward", measure_dtype="bfloat16", channels_last=True),
    "crest bfloat16 no bound": CrestConfig.preset(
        "forward", measure_dtype="bfloat16", channels_last=True, max_overhead=None
    ),
    "crest history": CrestConfig.preset("forward", proxy_source="history"),
    "crest resolution": CrestConfig.preset("forward", proxy_source="resolution"),
    "crest proxy model": CrestConfig.preset("forward", proxy_source="model"),
    "crest paper weights": CrestConfig.preset("forward", weight_power=1.0),
    "crest uniform weights": CrestConfig.preset("forward", weight_power=0.0),
    "crest no exclusion": CrestConfig.preset("forward", exclude=False),
    "crest rms curvature": CrestConfig.preset("forward", curvature="rms"),
}


def main() -> None:
    """Run what is missing; write JSON lines and print a row for each method and rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--methods", nargs="+", default=["full", "truncated", "random", "crest"])
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--model")
    parser.add_argument("--proxy", help='the small model of "crest proxy model"')
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    short = args.task.rpartition("/")[2]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    records: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    for name in args.methods:
        method = name.partition(" ")[0]
        for rate in args.rates:
            settings = RunSettings(
                task=args.task,
                model=args.model,
                proxy_model=args.proxy,
                epochs=args.epochs,
                learning_rate=rate,
                evaluations=4,
                crest=VARIANTS.get(name, CrestConfig()),
            )
            folder = args.runs / args.out.stem / f"{name.replace(' ', '-')}-{rate:g}"
            runs = plan(settings, [method], [args.budget], args.seeds)
            summaries = compare(runs, folder)
            groups.append((f"{name}, rate {rate:g}", summaries))
            for run, summary in zip(runs, summaries, strict=True):
                config = RunFiles(folder / run_name(run)).read_config() | {"task": short}
                records.append({**summary, "task": short, "variant": name, "config": config, "commit": commit})
    full = max((cells(s)[0].accuracy for _, s in groups if s[0]["method"] == "full"), default=None)
    for label, summaries in groups:
        cell: Cell = cells(summaries)[0]
        error = None if full is None else 1 - cell.accuracy / full
        rows.append([label, *replace(cell, relative_error=error).row()[1:]])
    args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    Console(width=120).print(render(short, COLUMNS, rows))


if __name__ == "__main__":
    main()
