"""Seconds, memory and quality of `torchcrest.coreset`: solved whole, split into parts, and without it.

Quality is what facility location minimises, the mean distance to the nearest pick. ``random`` picks at random;
``sample`` is the simple way to save time, solving 20,000 random examples whole. Features are a mixture of 100
Gaussians of very different sizes and widths in 64 dimensions, float32. Each run has a process of its own;
memory is its peak while selecting above what was resident just before, so the features do not count.

    OMP_NUM_THREADS=1 python benchmarks/coreset.py --out benchmarks/coreset.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import torchcrest
from torchcrest import coreset
from torchcrest.train.memory import PeakMemory

PARTS = {5_000: 1024, 20_000: 4096}  # sizes of the parts where coreset would solve the whole
SAMPLE = 20_000  # examples that are solved whole in their place
BLOCK = 10_000  # rows made and judged at a time
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


def mixture(n: int, d: int = 64, clusters: int = 100) -> Floats:
    """Make features ``[n, d]``, a block at a time."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((clusters, d), dtype=np.float32)
    widths = random.uniform(0.2, 1.0, (clusters, 1)).astype(np.float32)
    chances = random.dirichlet(np.ones(clusters))
    x = np.empty((n, d), np.float32)
    for start in range(0, n, BLOCK):
        rows = x[start : start + BLOCK]
        of = random.choice(clusters, len(rows), p=chances)
        rows[:] = centres[of] + widths[of] * random.standard_normal(rows.shape, dtype=np.float32)
    return x


def select(method: str, x: Floats, size: int, seed: int) -> Integers:
    """Pick ``[size]`` examples."""
    random, n = np.random.default_rng(seed), len(x)
    if method == "random":
        return random.choice(n, size, replace=False)
    if method == "sample":
        rows = random.choice(n, SAMPLE, replace=False)
        return rows[coreset(x[rows], size, part_size=SAMPLE)[0]]
    return coreset(x, size, part_size=n if method == "whole" else PARTS.get(n), seed=seed)[0]


def mean_distance(x: Floats, picks: Integers) -> float:
    """Judge picks by the first 100,000 examples."""
    medoids = torch.from_numpy(x[picks])
    blocks = torch.from_numpy(x[: 10 * BLOCK]).split(BLOCK // 10)
    return float(torch.cat([torch.cdist(block, medoids).min(1).values for block in blocks]).double().mean())


def run(method: str, n: int, size: int, seed: int) -> dict[str, Any]:
    """Select once; return the record."""
    x = mixture(n)
    coreset(x[:100], 10)  # what is loaded on first use
    peak = PeakMemory(torch.device("cpu"))
    before = peak.read() or 0
    wall, cpu = time.perf_counter(), time.process_time()
    picks = select(method, x, size, seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = (peak.read() or 0) - before
    return {
        "method": method,
        "n": n,
        "d": x.shape[1],
        "size": size,
        "seed": seed,
        "mean_distance": mean_distance(x, picks),
        "seconds": wall,
        "cpu_seconds": cpu,
        "peak_mib": memory / 2**20,
        "versions": {"torchcrest": torchcrest.__version__, "torch": torch.__version__},
        "device": f"cpu, {platform.machine()}, {torch.get_num_threads()} threads",
    }


def main() -> None:
    """Run every method, number of examples and size; write JSON lines and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[5_000, 20_000, 1_000_000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    commit = git.stdout.strip()
    records: list[dict[str, Any]] = []
    print(f"{'n':>9} {'size':>5} {'method':>8} {'distance':>15} {'seconds':>8} {'on the CPU':>11} {'MiB':>5}")
    for n in args.examples:
        small = n in PARTS
        for size in args.sizes:
            for method in ("random", "whole" if small else "sample", "parts"):
                seeds = args.seeds if method == "random" or (small and method == "parts") else args.seeds[:1]
                group = []
                for seed in seeds:
                    with get_context("forkserver").Pool(1) as process:
                        group.append(process.apply(run, (method, n, size, seed)) | {"commit": commit})
                records += group
                args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
                distance, wall, cpu, memory = (
                    [r[key] for r in group] for key in ("mean_distance", "seconds", "cpu_seconds", "peak_mib")
                )
                spread = f" ± {statistics.stdev(distance):.3f}" if len(distance) > 1 else ""
                print(
                    f"{n:>9,} {size:>5} {method:>8} {f'{statistics.fmean(distance):.3f}{spread}':>15} "
                    f"{statistics.fmean(wall):>8.1f} {statistics.fmean(cpu):>11.1f} {max(memory):>5.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
