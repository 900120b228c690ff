"""What a step with selection costs beside a plain one: crest and random data in turn, in pairs, in one process.

Each pair is a run of random data and then one of each variant, of as many steps, in the harness of `torchcrest
train`: selection inside the clock, evaluation outside. The ratio is that of a pair; medians are printed. Beside it
is the share of selection in one run, over the time of that run's own steps: a machine that is busy for a while
moves the ratio and not the share.

    python benchmarks/overhead.py npz:glyphs62.npz --model resnet20 --steps 60 --pairs 3 \
        --out benchmarks/overhead-resnet20.jsonl
    python benchmarks/overhead.py npz:glyphs62.npz --model cnn --steps 120 --pairs 3 --out benchmarks/overhead-cnn.jsonl
    python benchmarks/overhead.py npz:glyphs62.npz --model resnet20 --steps 300 --pairs 3 --device cuda \
        --variants default "default, no bound" forward --out benchmarks/overhead-cuda.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from torchcrest import CrestConfig
from torchcrest.train.run import train
from torchcrest.train.settings import RunSettings
from torchcrest.train.tasks import load

QUICK: dict[str, Any] = {"measure_dtype": "bfloat16", "channels_last": True}


def forward(**own: Any) -> CrestConfig:
    """Return selection by the model itself, with some settings changed."""
    return CrestConfig.preset("forward", **own)


VARIANTS: dict[str, CrestConfig | None] = {
    "random": None,
    "default": CrestConfig(),
    "default, no bound": CrestConfig(max_overhead=None),
    "forward": forward(),
    "r=256": forward(pool_size=256),
    "r=512": forward(pool_size=512),
    "r=256, no bound": forward(pool_size=256, max_overhead=None),
    "r=512, no bound": forward(pool_size=512, max_overhead=None),
    "r=256, counted": forward(pool_size=256, overhead_in="counted"),
    "r=256, bfloat16, channels last": forward(pool_size=256, **QUICK),
    "r=512, bfloat16, channels last": forward(pool_size=512, **QUICK),
    "r=256, bfloat16, channels last, no bound": forward(pool_size=256, max_overhead=None, **QUICK),
}


def main() -> None:
    """Run the pairs, write a JSON line for each run, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS)[1:], choices=list(VARIANTS)[1:])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    short = args.task.rpartition("/")[2]
    examples = len(load(args.task).train)
    ratios: dict[str, list[float]] = {name: [] for name in args.variants}
    shares: dict[str, list[float]] = {name: [] for name in args.variants}
    with args.out.open("w") as file:
        for pair in range(args.pairs):
            plain = 0.0
            for name in ("random", *args.variants):
                own = VARIANTS[name]
                settings = RunSettings(
                    task=args.task,
                    model=args.model,
                    method="random" if own is None else "crest",
                    epochs=1,
                    budget=args.steps * 128 / examples,
                    batch_size=128,
                    learning_rate=0.1,
                    seed=pair,
                    evaluations=1,
                    device=args.device,
                    crest=own or CrestConfig(),
                )
                with tempfile.TemporaryDirectory() as folder:
                    summary = train(settings, Path(folder))
                plain = summary["seconds"] if own is None else plain
                ratio = summary["seconds"] / plain
                config = settings.to_dict() | {"task": short}
                record = {**summary, "task": short, "variant": name, "pair": pair, "ratio": ratio, "config": config}
                file.write(json.dumps({**record, "commit": commit}) + "\n")
                file.flush()
                if own is not None:
                    ratios[name].append(ratio)
                    spent = sum(summary[f"seconds_{phase}"] for phase in ("selecting", "checking", "curvature"))
                    shares[name].append(spent / (summary["seconds"] - spent))
                step, coresets = summary["seconds"] / summary["steps"], summary["coresets"] / summary["steps"]
                print(f"{name}: {step * 1000:.0f} ms a step, ratio {ratio:.2f}, coresets {coresets:.0%}", flush=True)
    print("| variant | crest / random seconds: median (least to most) | selection / own steps |\n| --- | ---: | ---: |")
    for name in args.variants:
        columns = [f"{median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in (ratios[name], shares[name])]
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
