"""Where a step's time goes, by Python's own profiler: parts of the loop, in CPU milliseconds a step.

python benchmarks/profiling.py npz:glyphs62.npz --model cnn --steps 120 --out benchmarks/profiling-cnn.jsonl
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from torchcrest import Crest, CrestConfig
from torchcrest.train.models import build
from torchcrest.train.tasks import Examples, load

# The part, and the functions whose time (with all that they call) is its own. What a part's function is called
# from counts for the part alone.
PARTS = {
    "training: forward and loss": ("train_forward",),
    "training: backward and optimizer": ("train_backward",),
    "reading": ("next", "feed.py"),
    "measuring: forward": ("measure", "measure.py"),
    "measuring: proxy gradients": ("pool_of", "measure.py"),
    "facility location and weights": ("_select", "crest.py"),
    "curvature: gradient and Hessian probe": ("differentiate", "measure.py"),
    "curvature: running means, norms, prediction": ("update", "anchor", "predict", "curvature_norm", "gradient_norm"),
    "everything in the loader": ("_next_batch", "crest.py"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper's loop, no bound": {"max_overhead": None, "renew": None, "measured_together": 10**6},
    "no bound": {"max_overhead": None},
    "default": {},
    "bfloat16, channels last": {"measure_dtype": "bfloat16", "channels_last": True},
}


def train_forward(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the step's loss."""
    return (F.cross_entropy(model(x), y, reduction="none") * weights).mean()


def train_backward(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take the step."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def profile(task: str, name: str, steps: int, own: dict[str, Any]) -> dict[str, float]:
    """Return milliseconds a step for each part."""
    data = load(task)
    model = build(name, data.shape, data.classes, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    crest = Crest(model, data.train, CrestConfig.preset("forward", **own), steps=steps, collate_fn=Examples.collate)
    profiler = cProfile.Profile(time.process_time)  # what else the machine does is not counted
    profiler.enable()
    for (x, y), weights in crest:
        train_backward(train_forward(model, x, y, weights), optimizer)
    profiler.disable()
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    parts = {}
    for part, (first, *rest) in PARTS.items():
        file = next((word for word in rest if word.endswith(".py")), "")
        names = {first, *rest} - {file}
        found = [row[3] for (path, _, function), row in stats.items() if function in names and path.endswith(file)]
        parts[part] = 1000 * sum(found) / steps
    parts["measuring: forward"] -= parts["measuring: proxy gradients"]
    known = sum(parts[part] for part in PARTS if not part.startswith(("training", "everything")))
    parts["rest of the loader"] = parts.pop("everything in the loader") - known
    return parts


def main() -> None:
    """Profile each variant, write JSON lines, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    columns = {}
    for name in args.variants:
        columns[name] = profile(args.task, args.model, args.steps, VARIANTS[name])
        print(name, {part: round(value, 1) for part, value in columns[name].items()}, flush=True)
    about = {"task": args.task.rpartition("/")[2], "model": args.model, "steps": args.steps, "commit": commit}
    about |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    lines = [json.dumps({**about, "variant": name, "milliseconds": parts}) for name, parts in columns.items()]
    args.out.write_text("\n".join(lines) + "\n")
    print("| ms a step | " + " | ".join(columns) + " |\n|" + " --- |" * (1 + len(columns)))
    for part in next(iter(columns.values())):
        print(f"| {part} | " + " | ".join(f"{parts[part]:.1f}" for parts in columns.values()) + " |")


if __name__ == "__main__":
    main()
