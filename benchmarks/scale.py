"""Time and memory as the data grow from ten thousand to ten million examples, and memory beyond plain training.

Default: an index-only data set (an example is a function of its index, so that nothing of it is stored) and a small
net. So that every size does the same work, all checks fail and every region is ten steps long. Every number of
examples has a process of its own, and all of them take turns; seconds are of the CPU, as other processes may run:

- ``start_up``: from constructing Crest to the first batch.
- ``step``: after that, a tenth of the median region: drawing, measuring, selection, check and training; and the mean,
  in which new passes count.
- ``exclude``: the end of an interval of exclusion, at which all examples are looked at. No region timed has one.
- ``rest``: the comparison of how often examples were in a batch, four times an epoch. No region timed has one.
- ``peak``: bytes of resident memory, at the most, above what the process held before Crest was made; the end of an
  interval and a comparison included.

``--memory``: a wide perceptron of a few million parameters, Crest against random batches, each in a process of its
own; how much larger Crest's peak is, beside ``3 x trainable parameters + the region's data + 16 bytes an example``.

    OMP_NUM_THREADS=1 python benchmarks/scale.py --out benchmarks/scale.jsonl
    OMP_NUM_THREADS=1 python benchmarks/scale.py --memory --out benchmarks/scale-memory.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import torchcrest
from torchcrest import Crest, CrestConfig
from torchcrest.baselines import RandomBatches
from torchcrest.train.memory import PeakMemory

CLASSES = 10
REGION = 10  # steps
Batch = tuple[Tensor, Tensor]


class Indexed:
    """Examples that are functions of their index: class k's lie around the k-th of ten directions."""

    def __init__(self, examples: int, width: int) -> None:
        self.examples = examples
        self.phases = torch.arange(1, width + 1, dtype=torch.float64)

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        at = torch.tensor(indices, dtype=torch.float64)
        labels = torch.tensor(indices) % CLASSES
        # An irrational stride: different at every index, and never random.
        noise = (at.unsqueeze(1) * self.phases * 0.6180339887498949).frac().float() - 0.5
        centres = torch.outer(labels.double() + 1, self.phases).cos().float()
        return list(zip(centres + 4 * noise, labels, strict=True))


def network(width: int, hidden: int) -> nn.Module:
    """Make a perceptron of two hidden layers; the same for every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )


def train(loader: Any, model: nn.Module, each: Callable[[], None]) -> None:
    """Train for a pass; call after each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for (x, y), weights in loader:
        losses = cross_entropy(model(x), y, reduction="none")
        (losses * weights).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        each()


def grow(examples: int, steps: int, repeat: int) -> dict[str, Any]:
    """Train on so many examples; return the record."""
    torch.set_num_threads(1)
    small, width = Indexed(1000, 16), 16
    # What torch loads and allocates on first use is no matter of the data's size.
    train(Crest(network(width, 32), small, steps=30), network(width, 32), lambda: None)
    data, model = Indexed(examples, width), network(width, 32)
    peak = PeakMemory(torch.device("cpu"))
    before = peak.read() or 0
    config = CrestConfig.preset(
        "forward",
        tolerance=1e-9,
        interval_scale=REGION,
        curvature="first_order",
        learned_interval=steps - REGION,
        max_extra_visits=0.5,
    )
    stamps: list[float] = [time.thread_time()]
    crest = Crest(model, data, config, steps=steps)
    train(crest, model, lambda: stamps.append(time.thread_time()))
    regions = [(b - a) / REGION for a, b in pairwise(stamps[1 : steps - REGION : REGION])]
    close = time.thread_time()
    crest._active.close_interval(config.learned_loss, config.pool)
    close = time.thread_time() - close
    assert crest._visits
    rest = time.thread_time()
    crest._visits.enter()
    crest._active.rest(crest._visits.level(crest._active.mask, crest._visits.counts), config.pool)
    rest = time.thread_time() - rest
    return {
        "examples": examples,
        "repeat": repeat,
        "steps": steps,
        "regions": crest.stats.regions,
        "start_up": stamps[1] - stamps[0],
        "step": statistics.median(regions),
        "step_mean": statistics.fmean(regions),
        "exclude": close,
        "rest": rest,
        "peak": (peak.read() or 0) - before,
    }


def remember(
    method: str, examples: int, steps: int, hidden: int, pool: int, batch: int, curvature: str
) -> dict[str, Any]:
    """Train a wide net; return the record, with the peak above what was resident before the model was made."""
    torch.set_num_threads(1)
    width = 256
    small = network(width, 32)
    train(Crest(small, Indexed(1000, width), steps=10), small, lambda: None)
    data = Indexed(examples, width)
    peak = PeakMemory(torch.device("cpu"))
    before = peak.read() or 0
    model = network(width, hidden)
    config = CrestConfig.preset("forward", batch_size=batch, pool_size=pool, curvature=curvature)
    loader: Any = (
        Crest(model, data, config, steps=steps)
        if method == "crest"
        else RandomBatches(model, data, batch_size=batch, steps=steps)
    )
    most = [0]
    example = 4 * width + 8

    def look() -> None:
        region = getattr(loader, "_region", None)
        if region:
            held = sum(len(c.rows) for c in region.coresets) + (0 if region.check_indices is None else pool)
            most[0] = max(most[0], held * example)

    train(loader, model, look)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    return {
        "method": method,
        "curvature": curvature,
        "examples": examples,
        "steps": steps,
        "pool_size": pool,
        "batch_size": batch,
        "parameters_bytes": parameters,
        "region_bytes": most[0],
        "peak": (peak.read() or 0) - before,
        "allowed": 3 * parameters + most[0] + 16 * examples,
    }


def _apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run in a fresh process."""
    with get_context("forkserver").Pool(1) as process:
        return process.apply(function, arguments)


def _common(commit: str) -> dict[str, Any]:
    return {
        "versions": {"torchcrest": torchcrest.__version__, "torch": torch.__version__},
        "device": f"cpu, {platform.machine()}, 1 threads",
        "commit": commit,
    }


def main() -> None:
    """Measure; write JSON lines and print a row for each number of examples, or for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--memory", action="store_true", help="measure memory beyond plain training instead")
    parser.add_argument("--hidden", type=int, default=1600, help="width of the net of --memory")
    parser.add_argument("--pool", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    common = _common(git.stdout.strip())
    records: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        records.append(record | common)
        args.out.write_text("".join(json.dumps(record) + "\n" for record in records))

    if args.memory:
        for method, curvature in (("random", "first_order"), ("crest", "first_order"), ("crest", "signed")):
            for _ in range(args.repeats):
                keep(_apart(remember, method, 10**5, 40, args.hidden, args.pool, args.batch, curvature))
        _report_memory(records)
        return
    for repeat in range(args.repeats):
        for examples in args.examples:
            keep(_apart(grow, examples, args.steps, repeat))
    _report_growth(records, args.examples)


def _report_growth(records: list[dict[str, Any]], sizes: list[int]) -> None:
    print(
        f"{'examples':>10} {'start-up s':>10} {'step ms':>8} {'ratio':>20} {'mean':>20} "
        f"{'exclude ms':>10} {'rest ms':>10} {'bytes each':>10}"
    )
    turns = {size: [record for record in records if record["examples"] == size] for size in sizes}
    base = turns[sizes[0]]

    def against(group: list[dict[str, Any]], key: str) -> str:
        ratios = [own[key] / first[key] for own, first in zip(group, base, strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    for size, group in turns.items():
        start = statistics.median(own["start_up"] - first["start_up"] for own, first in zip(group, base, strict=True))
        peak = statistics.median(own["peak"] - first["peak"] for own, first in zip(group, base, strict=True)) / size
        step, close, rest = (1000 * statistics.median(own[key] for own in group) for key in ("step", "exclude", "rest"))
        print(
            f"{size:>10,} {start:>10.3f} {step:>8.2f} {against(group, 'step'):>20} {against(group, 'step_mean'):>20} "
            f"{close:>10.1f} {rest:>10.1f} {peak:>10.1f}"
        )


def _report_memory(records: list[dict[str, Any]]) -> None:
    mib = 2**20
    plain = statistics.median(record["peak"] for record in records if record["method"] == "random")
    print(f"plain training: {plain / mib:.0f} MiB, parameters {records[0]['parameters_bytes'] / mib:.1f} MiB")
    for curvature in ("first_order", "signed"):
        group = [record for record in records if record["method"] == "crest" and record["curvature"] == curvature]
        beyond = statistics.median(record["peak"] for record in group) - plain
        allowed = statistics.median(record["allowed"] for record in group)
        region = statistics.median(record["region_bytes"] for record in group)
        print(
            f"crest, {curvature}: {beyond / mib:.0f} MiB more; allowed {allowed / mib:.0f} MiB, of which the region's "
            f"data {region / mib:.1f}"
        )


if __name__ == "__main__":
    main()
