"""Draws the pictures of `how.md`, from the library's own selection and a run of it.

python docs/pictures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from torchcrest import Crest, CrestConfig, facility_location

FOLDER = Path(__file__).parent / "pictures"


def coreset() -> None:
    """A pool of points, the medoids, and a line from each point to the one that stands for it."""
    generator = torch.Generator().manual_seed(4)
    centres = torch.tensor([[-2.0, 0.0], [1.5, 1.5], [1.0, -1.8]])
    drawn = [c + s * torch.randn(60, 2, generator=generator) for c, s in zip(centres, (0.5, 0.9, 0.4), strict=True)]
    points = torch.cat(drawn)
    distances = torch.cdist(points, points)
    picked, sizes = facility_location(-distances, 14)
    nearest = picked[distances[:, picked].argmin(1)]
    figure, axes = plt.subplots(figsize=(5.5, 4))
    for point, medoid in zip(points, points[nearest], strict=True):
        axes.plot(*zip(point.tolist(), medoid.tolist(), strict=True), color="#c8c8c8", linewidth=0.6, zorder=1)
    axes.scatter(*points.T, s=10, color="#7a8ca5", zorder=2, label="pool: 180 points")
    axes.scatter(
        *points[picked].T, s=14 * sizes, color="#d1495b", alpha=0.75, zorder=3, label="coreset: 14 (area: weight)"
    )
    axes.set_aspect("equal")
    axes.axis("off")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    figure.savefig(FOLDER / "coreset.png", dpi=130, bbox_inches="tight")


def regions() -> None:
    """What the model of the loss predicted at each check, and what the loss was."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 20, generator=generator)
    classes = torch.randint(10, (4000,), generator=generator)
    points = centres[classes] + 1.2 * torch.randn(4000, 20, generator=generator)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    config = CrestConfig(
        batch_size=32, pool_size=64, tolerance=0.1, interval_scale=10, max_overhead=None, exclude=False
    )
    crest = Crest(model, TensorDataset(points, classes), config, steps=400, seed=0)
    for (x, y), weights in crest:
        (F.cross_entropy(model(x), y, reduction="none") * weights).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    checks = [event for event in crest.history if event["event"] == "check"]
    steps = [event["step"] for event in checks]
    figure, axes = plt.subplots(figsize=(7, 3.4))
    axes.plot(steps, [event["loss"] for event in checks], color="#30486b", label="loss of the region's check set")
    for passed, colour, label in (
        (True, "#66a182", "predicted: held"),
        (False, "#d1495b", "off by more than τ: a region ends"),
    ):
        some = [event for event in checks if event["passed"] is passed]
        axes.scatter(
            [e["step"] for e in some], [e["predicted"] for e in some], s=22, color=colour, label=label, zorder=3
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(FOLDER / "regions.png", dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    coreset()
    regions()
