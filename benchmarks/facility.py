"""Facility location against submodlib's in C++, one thread each: seconds as ratios, objectives side by side.

Three sizes of problem, from proxy gradients of a classifier (softmax - onehot), and three stretches of the way:

- ``solver``: the picks alone, both from the same array of similarities. ``torchcrest.solvers.facility.greedy`` against
  submodlib's ``maximize`` on objects that were made before, by the fastest of its exact optimizers (``NaiveGreedy``
  and ``LazyGreedy`` are tried).
- ``similarity``: from the same array again. ``torchcrest.facility_location``, which also checks it and counts the
  clusters, against making the objects (the fastest of submodlib's ways) and ``maximize``.
- ``gradients``: ``torchcrest.solvers.medoids`` against similarities by ``torch.cdist``, all problems in one call,
  objects, ``maximize`` and the clusters by ``argmax``. (``submodlib's kernel``, printed beside it, is the time of its
  own way from data to similarities, which is slower and counts in no ratio.)

Seconds are of the CPU, as other processes may run. Each pair times ours and theirs in turn; ratios are within pairs.
Members are given to submodlib in reverse, because of equal gains it takes the last and torchcrest the first: then the
picks can be compared as well. submodlib is no dependency: ``pip install submodlib-py``.

    OMP_NUM_THREADS=1 python benchmarks/facility.py --out benchmarks/facility.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import torchcrest
from torchcrest import facility_location
from torchcrest.solvers import medoids
from torchcrest.solvers.facility import greedy

PROBLEMS = {"500x50": (500, 50, 13), "10x1000": (10, 1000, 128), "1x5000": (1, 5000, 128)}  # how many, n, picks
OPTIMIZERS = ("NaiveGreedy", "LazyGreedy")  # the exact ones
TARGETS = {"500x50": 0.5, "10x1000": 1.0, "1x5000": 1.0}
Floats = NDArray[np.float32]


def proxy_gradients(count: int, n: int, classes: int, seed: int) -> Tensor:
    """Make ``[count, n, classes]``: softmax - onehot of an unsure classifier."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, n, classes, generator=generator)
    labels = torch.randint(classes, (count, n), generator=generator)
    return logits.softmax(-1) - torch.nn.functional.one_hot(labels, classes)


def similarities_of(gradients: Tensor) -> Tensor:
    """Return ``[count, n, n]``, at least 0, which submodlib needs."""
    d = torch.cdist(gradients, gradients)
    d.diagonal(dim1=-2, dim2=-1).zero_()
    return d.max() - d


def reverse(similarity: Tensor) -> list[Floats]:
    """Return submodlib's input: members in reverse."""
    return list(similarity.flip(-1, -2).numpy())


def make(similarities: list[Floats]) -> list[Any]:
    """Make submodlib's objects."""
    facility_location_function = _submodlib().FacilityLocationFunction
    return [
        facility_location_function(n=len(s), mode="dense", separate_rep=False, sijs=s, pybind_mode="array")
        for s in similarities
    ]


def maximize(functions: list[Any], budget: int, optimizer: str) -> list[list[int]]:
    """Return submodlib's picks, numbered from the end, in the order of picking."""
    return [
        [pick for pick, _ in function.maximize(budget=budget, optimizer=optimizer, show_progress=False)]
        for function in functions
    ]


def count_clusters(similarities: list[Floats], picks: list[list[int]]) -> list[Any]:
    """Count for each pick the members nearest to it."""
    return [np.bincount(s[:, of].argmax(1), minlength=len(of)) for s, of in zip(similarities, picks, strict=True)]


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU seconds of this thread, and the result."""
    start = time.thread_time()
    result = function()
    return time.thread_time() - start, result


def value(gradients: Tensor, rows: Tensor) -> float:
    """Return the mean distance to the nearest pick, in float64: what both make small."""
    of = gradients.double()
    return float(torch.stack([torch.cdist(g, g[r]).min(1).values.mean() for g, r in zip(of, rows, strict=True)]).mean())


def compare(name: str, pairs: int, classes: int, seed: int) -> list[dict[str, Any]]:
    """Time every stretch of one size in pairs; return a record of each."""
    count, n, budget = PROBLEMS[name]
    gradients = proxy_gradients(count, n, classes, seed)
    similarity = similarities_of(gradients)
    similarities = reverse(similarity)
    reversed_gradients = gradients.flip(1).contiguous()
    tried: dict[str, float] = {}
    for optimizer in OPTIMIZERS:
        functions = make(similarities)
        tried[optimizer], _ = seconds(lambda: maximize(functions, budget, optimizer))  # noqa: B023
    optimizer = min(tried, key=lambda key: tried[key])

    def from_similarity() -> list[list[int]]:
        return maximize(make(similarities), budget, optimizer)

    def from_gradients() -> list[list[int]]:
        made = list(similarities_of(reversed_gradients).numpy())
        picks = maximize(make(made), budget, optimizer)
        count_clusters(made, picks)
        return picks

    ours: dict[str, Callable[[], Any]] = {
        "solver": lambda: greedy(similarity, budget),
        "similarity": lambda: facility_location(similarity, budget)[0],
        "gradients": lambda: medoids(gradients, budget)[0],
    }
    records = []
    for stretch, own in ours.items():
        times: list[tuple[float, float]] = []
        for pair in range(pairs + 1):
            if stretch == "solver":
                functions = make(similarities)
                theirs: Callable[[], Any] = lambda: maximize(functions, budget, optimizer)  # noqa: B023, E731
            else:
                theirs = from_similarity if stretch == "similarity" else from_gradients
            own_seconds, own_rows = seconds(own)
            their_seconds, their_picks = seconds(theirs)
            if pair:  # the first only warms up
                times.append((own_seconds, their_seconds))
        their_rows = n - 1 - torch.tensor(their_picks)
        same = (own_rows.sort().values == their_rows.sort().values).all(-1)
        ratios = [own / other for own, other in times]
        records.append(
            {
                "problems": name,
                "count": count,
                "n": n,
                "picks": budget,
                "classes": classes,
                "seed": seed,
                "stretch": stretch,
                "optimizer": optimizer,
                "optimizers_seconds": tried,
                "pairs": times,
                "ratio": statistics.median(ratios),
                "ratio_least": min(ratios),
                "ratio_most": max(ratios),
                "target": TARGETS[name],
                "mean_distance": value(gradients, own_rows),
                "mean_distance_submodlib": value(gradients, their_rows),
                "same_picks": int(same.sum()),
                "own_kernel_seconds": _own_kernel(gradients) if stretch == "gradients" else None,
                "versions": {
                    "torchcrest": torchcrest.__version__,
                    "torch": torch.__version__,
                    "submodlib-py": version("submodlib-py"),
                    "numpy": np.__version__,
                },
                "device": f"cpu, {platform.machine()}, {torch.get_num_threads()} threads",
            }
        )
    return records


def _own_kernel(gradients: Tensor) -> float:
    """Time submodlib's own way from data to similarities, on one problem; return it times the problems."""
    data = gradients[0].numpy()
    function = _submodlib().FacilityLocationFunction
    spent, _ = seconds(lambda: function(n=len(data), mode="dense", data=data, separate_rep=False, metric="euclidean"))
    return spent * len(gradients)


def _submodlib() -> Any:
    try:
        return import_module("submodlib")
    except ImportError as error:
        sys.exit(f"This benchmark compares with submodlib, which is not there ({error}). Run pip install submodlib-py.")


def main() -> None:
    """Compare every size; write JSON lines and print a row for each stretch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # submodlib's, of scipy
    _submodlib()
    torch.set_num_threads(1)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    commit = git.stdout.strip()
    records: list[dict[str, Any]] = []
    print(
        f"{'problems':>9} {'stretch':>10} {'ours, ms':>9} {'submodlib':>9} {'ratio':>22} "
        f"{'distance: ours, theirs':>23} same picks"
    )
    for name in args.problems:
        for record in compare(name, args.pairs, args.classes, args.seed):
            records.append(record | {"commit": commit})
            args.out.write_text("".join(json.dumps(record) + "\n" for record in records))
            own, other = (1000 * statistics.median(times) for times in zip(*record["pairs"], strict=True))
            spread = f"{record['ratio']:.2f} ({record['ratio_least']:.2f} to {record['ratio_most']:.2f})"
            distance = f"{record['mean_distance']:.6f}, {record['mean_distance_submodlib']:.6f}"
            kernel = record["own_kernel_seconds"]
            print(
                f"{name:>9} {record['stretch']:>10} {own:>9.1f} {other:>9.1f} {spread:>22} {distance:>23} "
                f"{record['same_picks']} of {record['count']}"
                + ("" if kernel is None else f"; submodlib's kernel {1000 * kernel:.0f} ms"),
                flush=True,
            )


if __name__ == "__main__":
    main()
