"""Which quadratic model predicts the loss best? Step 4 of the algorithm, variant against variant.

Trains on coresets; every 10 steps each variant models the loss anew, from the same gradients and the same
Hutchinson probes, and is compared with the measured loss 1, 2, 5 and 10 steps later, on the same examples.
``constant`` predicts that the loss does not change: what is no better than it predicts nothing.

    python benchmarks/curvature.py mnist1d npz:PATH --seeds 0 1 2 --out benchmarks/curvature.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import torchcrest
from torchcrest.active import Draws, stream
from torchcrest.config import Curvature
from torchcrest.feed import Feed, Reading
from torchcrest.measure import How, Meter
from torchcrest.objectives import Classification
from torchcrest.quadratic import QuadraticModel, relative_error
from torchcrest.solvers import medoids, weigh
from torchcrest.train.models import build
from torchcrest.train.schedule import learning_rate
from torchcrest.train.tasks import Examples, load
from torchcrest.types import Coreset

VARIANTS: tuple[Curvature, ...] = ("rms", "signed", "unsmoothed", "first_order")
FED = (1, 5)  # coresets that feed gradient and curvature
AHEAD = (1, 2, 5, 10)  # steps


def run(task_name: str, seed: int, steps: int, pool_size: int) -> list[dict[str, Any]]:
    """Train once, return a record for each variant and distance."""
    task = load(task_name)
    size = task.batch_size
    model = build(task.model, task.shape, task.classes, seed)
    meter = Meter(model, Classification(), How())
    everyone = torch.ones(len(task.train), dtype=torch.bool)
    feed = Feed(task.train, Draws(everyone, seed), pool_size, Reading(collate_fn=Examples.collate), seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=task.weight_decay)
    models = {(v, k): QuadraticModel(v, 0.9, 0.999) for v in VARIANTS for k in FED}
    errors: dict[tuple[str, int, int], list[float]] = {}
    seconds = dict.fromkeys(FED, 0.0)
    for step in range(steps):
        since = step % AHEAD[-1]
        if since == 0:
            pools = [meter.measure(*feed.next()) for _ in range(AHEAD[-1])]
            labels = torch.stack([p.labels for p in pools if p.labels is not None])
            rows, sizes = medoids(torch.stack([p.gradients for p in pools]), size, labels)
            coresets = [Coreset.of(p, r, w) for p, r, w in zip(pools, rows, weigh(sizes, 1.0), strict=True)]
            for k in FED:
                start = time.perf_counter()
                fed = [meter.differentiate(c, stream(seed, "signs", step, i)) for i, c in enumerate(coresets[:k])]
                seconds[k] += time.perf_counter() - start
                g = [torch.stack(parts).mean(0) for parts in zip(*(g for g, _ in fed), strict=True)]
                h = [torch.stack(parts).mean(0) for parts in zip(*(h for _, h in fed), strict=True)]
                for variant in VARIANTS:
                    models[variant, k].update(g, [] if variant == "first_order" else h)
            check = meter.measure(*feed.next())
            anchored = float(check.losses.mean())
            for quadratic in models.values():
                quadratic.anchor(meter.parameters(), anchored)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, base=task.learning_rate)
        (x, y), weights = coresets[since].data, coresets[since].weights
        (F.cross_entropy(model(x), y, reduction="none") * weights).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if since + 1 in AHEAD:
            loss = float(meter.measure(check.indices, check.data).losses.mean())
            for (variant, k), quadratic in models.items():
                rho = relative_error(quadratic.predict(meter.parameters()), loss)
                errors.setdefault((variant, k, since + 1), []).append(rho)
            errors.setdefault(("constant", 0, since + 1), []).append(relative_error(anchored, loss))
    return [
        {
            "task": task_name.rpartition("/")[2],
            "model": task.model,
            "curvature": variant,
            "coresets": k,
            "ahead": ahead,
            "seed": seed,
            "steps": steps,
            "regions": len(rhos),
            "median_rho": statistics.median(rhos),
            "mean_capped_rho": statistics.fmean(min(r, 1.0) for r in rhos),
            "share_within_0.05": statistics.fmean(r <= 0.05 for r in rhos),
            "seconds_curvature": seconds.get(k, 0.0),
            "versions": {"torchcrest": torchcrest.__version__, "torch": torch.__version__},
            "device": f"cpu, {platform.machine()}, {torch.get_num_threads()} threads",
        }
        for (variant, k, ahead), rhos in errors.items()
    ]


def main() -> None:
    """Run every task and seed; write JSON lines, print the medians over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=940)
    parser.add_argument("--pool-size", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    records = [r for task in args.tasks for seed in args.seeds for r in run(task, seed, args.steps, args.pool_size)]
    args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    for task in dict.fromkeys(r["task"] for r in records):
        print(f"\n{task}: median rho (share within 0.05), median over {len(args.seeds)} seeds")
        for variant, k in dict.fromkeys((r["curvature"], r["coresets"]) for r in records):
            cells = []
            for ahead in AHEAD:
                same = [
                    r
                    for r in records
                    if (r["task"], r["curvature"], r["coresets"], r["ahead"]) == (task, variant, k, ahead)
                ]
                rho, share = (statistics.median(r[key] for r in same) for key in ("median_rho", "share_within_0.05"))
                cells.append(f"{ahead:>2} ahead: {rho:.3f} ({share:.0%})")
            print(f"{variant:>12} x {k}   " + "   ".join(cells))


if __name__ == "__main__":
    main()
