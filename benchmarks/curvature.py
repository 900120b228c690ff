"""Which quadratic model predicts the loss best, and at what cost? Step 4 of the algorithm, variant against variant.

Trains on coresets; every 10 steps each variant models the loss anew, from the same coresets, and is compared
with the measured loss 1, 2, 5, 10 and 50 steps later, on the same examples. ``constant`` predicts that the
loss does not change: what is no better than it predicts nothing.

The cost of a variant is the time of its gradient, curvature and smoothing relative to a training step. A step of a
twin of the model is timed right before each, and the median of the ratios is given.

    python benchmarks/curvature.py mnist1d --seeds 0 1 2 --out FILE
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchcrest
from torchcrest.active import Draws, stream
from torchcrest.config import Curvature, CurvatureProduct
from torchcrest.feed import Feed, Reading
from torchcrest.measure import How, Meter
from torchcrest.objectives import Classification
from torchcrest.quadratic import QuadraticModel, relative_error
from torchcrest.solvers import medoids, weigh
from torchcrest.train.models import build
from torchcrest.train.schedule import learning_rate
from torchcrest.train.tasks import Examples, load
from torchcrest.types import Coreset, Pool

EVERY = 10  # steps between two models
AHEAD = (1, 2, 5, 10, 50)  # steps


@dataclass(frozen=True)
class Variant:
    """Settings of the quadratic model, by the names of `CrestConfig` without ``curvature_``."""

    curvature: Curvature
    coresets: int = 1
    examples: int | None = None
    layers: int | None = None
    product: CurvatureProduct = "double_backward"


VARIANTS = (
    Variant("rms"),
    Variant("rms", coresets=5),
    Variant("unsmoothed"),
    Variant("unsmoothed", coresets=5),
    Variant("signed"),
    Variant("signed", coresets=5),
    Variant("signed", examples=64),
    Variant("signed", examples=32),
    Variant("signed", layers=2),
    Variant("signed", layers=1),
    Variant("signed", product="finite_difference"),
    Variant("signed", examples=32, product="finite_difference"),
    Variant("signed", examples=32, layers=1),
    Variant("first_order"),
    Variant("first_order", coresets=5),
    Variant("first_order", examples=64),
    Variant("first_order", examples=32),
    Variant("first_order", layers=1),
    Variant("first_order", examples=32, layers=1),
)


class Modeller:
    """Feeds the quadratic model of one variant, and keeps account of what that costs."""

    def __init__(self, variant: Variant, model: nn.Module) -> None:
        self.variant = variant
        self.meter = Meter(
            model,
            Classification(),
            How(),
            layers=variant.layers,
            product=variant.product,
        )
        self.quadratic = QuadraticModel(variant.curvature, 0.9, 0.999)
        self.norms: list[float] = []

    def update(self, coresets: list[Coreset], seed: int, step: int) -> None:
        """Do what `Crest` does with a region's coresets."""
        total: list[list[Tensor]] = []
        for i, coreset in enumerate(coresets[: self.variant.coresets]):
            signs = None if self.variant.curvature == "first_order" else stream(seed, "signs", step, i)
            drawn = coreset.sample(self.variant.examples, stream(seed, "examples", step, i))
            g, h = self.meter.differentiate(drawn, signs)
            total.append([*g, *h])
        means = [torch.stack(parts).mean(0) for parts in zip(*total, strict=True)]
        count = len(self.meter.parameters())
        self.quadratic.update(means[:count], means[count:])
        self.norms.append(self.quadratic.curvature_norm())


class Trainer:
    """The training step."""

    def __init__(self, model: nn.Module, rate: float, weight_decay: float) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=weight_decay)

    def step(self, coreset: Coreset, rate: float) -> None:
        """Train on a coreset."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x, y = coreset.data
        (F.cross_entropy(self.model(x), y, reduction="none") * coreset.weights).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass
class Anchor:
    """A step at which the loss was modelled: the check set and the models as they were then."""

    step: int
    check: Pool
    loss: float
    models: list[QuadraticModel]


def run(task_name: str, model_name: str | None, seed: int, steps: int, pool_size: int) -> list[dict[str, Any]]:
    """Train once, return a record for each variant and distance."""
    task = load(task_name)
    model = build(model_name or task.model, task.shape, task.classes, seed)
    everyone = torch.ones(len(task.train), dtype=torch.bool)
    feed = Feed(task.train, Draws(everyone, seed), pool_size, Reading(collate_fn=Examples.collate), seed)
    trainer = Trainer(model, task.learning_rate, task.weight_decay)
    twin = Trainer(copy.deepcopy(model), task.learning_rate, task.weight_decay)
    modellers = [Modeller(variant, model) for variant in VARIANTS]
    meter = Meter(model, Classification(), How())
    anchors: list[Anchor] = []
    errors: defaultdict[tuple[Variant | None, int], list[float]] = defaultdict(list)
    ratios: defaultdict[Variant, list[float]] = defaultdict(list)
    for step in range(steps):
        if step % EVERY == 0:
            pools = [meter.measure(*feed.next()) for _ in range(EVERY)]
            labels = torch.stack([p.labels for p in pools if p.labels is not None])
            rows, sizes = medoids(torch.stack([p.gradients for p in pools]), task.batch_size, labels)
            coresets = [Coreset.of(p, r, w) for p, r, w in zip(pools, rows, weigh(sizes, 1.0), strict=True)]
            for modeller in modellers:
                begun = time.perf_counter()
                twin.step(coresets[0], rate=1e-3)
                middle = time.perf_counter()
                modeller.update(coresets, seed, step)
                ratios[modeller.variant].append((time.perf_counter() - middle) / (middle - begun))
            check = meter.measure(*feed.next())
            loss = float(check.losses.mean())
            for modeller in modellers:
                modeller.quadratic.anchor(modeller.meter.parameters(), loss)
            anchors.append(Anchor(step, check, loss, [copy.deepcopy(m.quadratic) for m in modellers]))
        trainer.step(coresets[step % EVERY], learning_rate(step, steps, base=task.learning_rate))
        for anchor in anchors:
            ahead = step + 1 - anchor.step
            if ahead not in AHEAD:
                continue
            loss = float(meter.measure(anchor.check.indices, anchor.check.data).losses.mean())
            for modeller, quadratic in zip(modellers, anchor.models, strict=True):
                rho = relative_error(quadratic.predict(modeller.meter.parameters()), loss)
                errors[modeller.variant, ahead].append(rho)
            errors[None, ahead].append(relative_error(anchor.loss, loss))
        anchors = [anchor for anchor in anchors if step + 1 - anchor.step < AHEAD[-1]]
    differentiated = {m.variant: m.meter.differentiated // len(m.norms) for m in modellers}
    stretch = {m.variant: m.norms[0] / m.norms[-1] if m.norms[-1] else 1.0 for m in modellers}
    return [
        {
            "task": task_name.rpartition("/")[2].removeprefix("npz:"),
            "model": model_name or task.model,
            "curvature": variant.curvature if variant else "constant",
            "coresets": variant.coresets if variant else 0,
            "examples": variant.examples if variant else 0,
            "layers": variant.layers if variant else 0,
            "product": variant.product if variant else None,
            "ahead": ahead,
            "seed": seed,
            "steps": steps,
            "pool_size": pool_size,
            "models": len(rhos),
            "median_rho": statistics.median(rhos),
            "mean_capped_rho": statistics.fmean(min(r, 1.0) for r in rhos),
            "share_within_0.05": statistics.fmean(r <= 0.05 for r in rhos),
            "seconds_over_step": statistics.median(ratios[variant]) if variant else 0.0,
            "examples_forwarded": differentiated[variant] if variant else 0,
            "interval_stretched": stretch[variant] if variant else 1.0,
            "versions": {"torchcrest": torchcrest.__version__, "torch": torch.__version__},
            "device": f"cpu, {platform.machine()}, {torch.get_num_threads()} threads",
        }
        for (variant, ahead), rhos in errors.items()
    ]


def table(records: list[dict[str, Any]]) -> str:
    """Lay out one task's records, medians over seeds, as Markdown."""
    lines = [
        "| variant | " + " | ".join(map(str, AHEAD)) + " ahead | mean | time | examples | stretch |",
        "|---" * (len(AHEAD) + 5) + "|",
    ]
    settings = ("curvature", "coresets", "examples", "layers", "product")
    for variant in dict.fromkeys(tuple(r[s] for s in settings) for r in records):
        same = [r for r in records if tuple(r[s] for s in settings) == variant]
        cells = []
        for ahead in AHEAD:
            there = [r for r in same if r["ahead"] == ahead]
            rho, share = (statistics.median(r[key] for r in there) for key in ("median_rho", "share_within_0.05"))
            cells.append(f"{rho:.3f} ({share:.0%})")
        ten = [r["mean_capped_rho"] for r in same if r["ahead"] == 10]
        spread = statistics.stdev(ten) if len(ten) > 1 else 0.0
        cells.append(f"{statistics.fmean(ten):.3f} ± {spread:.3f}")
        cells.append(f"{statistics.median(r['seconds_over_step'] for r in same):.2f}")
        cells.append(str(same[0]["examples_forwarded"]))
        cells.append(f"{statistics.median(r['interval_stretched'] for r in same):.2f}")
        curvature, coresets, examples, layers, product = variant
        name = curvature + (f" × {coresets}" if coresets > 1 else "")
        name += f", {examples} examples" if examples else ""
        name += f", last {layers}" if layers else ""
        name += ", difference" if product == "finite_difference" else ""
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run every task and seed; write JSON lines, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--model", default=None, help="the task's own by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=940)
    parser.add_argument("--pool-size", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    records = []
    for task in args.tasks:
        for seed in args.seeds:
            records += run(task, args.model, seed, args.steps, args.pool_size)
            args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    for task in dict.fromkeys(r["task"] for r in records):
        print(f"\n{task}: median rho (share within 0.05); mean of rho up to 1, 10 ahead; time of a training step")
        print(table([r for r in records if r["task"] == task]))


if __name__ == "__main__":
    main()
