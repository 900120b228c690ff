"""Does the list of suspected label errors find labels that were planted? A share of the training labels is permuted.

One run of ``torchcrest train --difficulty true`` for each method on the spoilt data; then the precision of its list,
the share of it whose label was changed, among its first 100, 300 and 1,000. Beside it, from the same runs: the base
rate, and the simple list that needs no record but all the losses, the mean of those that training itself computed.
Labels that were wrong before count as not found. With it the share of the run's seconds that the record took.

    OMP_NUM_THREADS=1 python benchmarks/suspects.py glyphs62.npz --out benchmarks/suspects-glyphs62.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchcrest
from torchcrest.difficulty import Difficulty
from torchcrest.train.run import train
from torchcrest.train.scores import Recorder, read_log, read_scores
from torchcrest.train.settings import RunSettings

FIRST = (100, 300, 1000)


class Watch:
    """Adds up the seconds inside some functions, those that one calls within another once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def over(self, owner: type, *names: str) -> None:
        """Time methods of a class."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kw: Any) -> Any:
            if self._inside:
                return function(*args, **kw)
            self._inside, begun = True, time.perf_counter()
            try:
                return function(*args, **kw)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - begun

        return timed


def plant(source: Path, path: Path, share: float, seed: int) -> np.ndarray[Any, Any]:
    """Write the data with a share of the training labels permuted among themselves; returns which have changed."""
    with np.load(source) as file:
        arrays = {name: file[name] for name in file.files}
    generator = np.random.default_rng(seed)
    right, y = arrays["y_train"], arrays["y_train"].copy()
    rows = generator.choice(len(y), round(share * len(y)), replace=False)
    y[rows] = y[generator.permutation(rows)]
    spoilt: dict[str, Any] = {**arrays, "y_train": y}
    np.savez(path, **spoilt)
    return np.asarray(y != right)


def precision(planted: np.ndarray[Any, Any], order: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return the share of planted labels among the first of a list."""
    return {str(k): float(planted[order[:k]].mean()) for k in FIRST}


def mean_losses(log: dict[str, np.ndarray[Any, Any]], examples: int) -> np.ndarray[Any, Any]:
    """Return each example's mean loss over the steps that it was trained on; 0 where there were none."""
    keys = log["seen_step"] * np.int64(examples) + log["seen_index"]
    trained = np.isin(keys, log["trained_step"] * np.int64(examples) + log["trained_index"])
    index, losses = log["seen_index"][trained], log["seen_loss"][trained].astype(np.float64)
    sums, counts = (np.bincount(index, weights, examples) for weights in (losses, None))
    return np.asarray(sums / np.maximum(counts, 1))


def main() -> int:
    """Train with each method and write a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="an npz file of x_train, y_train, x_test and y_test")
    parser.add_argument("--methods", nargs="+", default=["crest", "random"])
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="folder for the runs; by default one that is removed again")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        planted = plant(args.data, folder / "spoilt.npz", args.share, args.seed)
        for method in args.methods:
            settings = RunSettings(
                task=f"npz:{folder / 'spoilt.npz'}",
                method=method,
                model=args.model,
                epochs=args.epochs,
                budget=1.0,
                learning_rate=args.rate,
                seed=args.seed,
                evaluations=4,
                difficulty=True,
                picks=True,
                device="cpu",
            )
            watch.seconds = 0.0
            summary = train(settings, folder / method)
            scores, log = read_scores(folder / method), read_log(folder / method)
            assert scores is not None
            assert log is not None
            simple = np.argsort(-mean_losses(log, len(planted)), kind="stable")
            record = {
                "task": args.data.stem,
                "method": method,
                "config": {"model": args.model, "epochs": args.epochs, "learning_rate": args.rate, "share": args.share},
                "seed": args.seed,
                "base_rate": float(planted.mean()),
                "precision": precision(planted, scores.suspects(max(FIRST))),
                "precision_of_mean_loss": precision(planted, simple),
                "never_learned": int((~scores["ever_learned"] & (scores["seen"] > 0)).sum()),
                "seen": float(scores["seen"].mean()),
                "seconds_recording": watch.seconds,
                "share_recording": watch.seconds / summary["seconds"],
                **{name: summary[name] for name in ("accuracy", "seconds", "steps", "coresets", "active")},
                "device": f"cpu, {platform.machine()}",
                "versions": {"torchcrest": torchcrest.__version__, "torch": torch.__version__},
                "commit": commit.strip(),
            }
            print(json.dumps(record), flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    return 0


watch = Watch()
watch.over(Difficulty, "note", "enter", "pick", "exclude")
watch.over(Recorder, "trained")

if __name__ == "__main__":
    sys.exit(main())
