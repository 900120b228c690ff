"""Does a run that is killed again and again end as one that is left alone? SIGKILL at random moments, then --resume.

``torchcrest train`` on small images that it shifts and mirrors, with two workers and a bound on the overhead that is
counted; a checkpoint every second step. Each kill aims at a moment that is drawn: while the command starts, between
the first files and the first checkpoint, between two checkpoints, or while one is written; some of them in the last
two steps. What it has hit is read off the files that it leaves. In the end model, metrics and summary must be those
of the run that was left alone, but for the clock.

    OMP_NUM_THREADS=1 python benchmarks/kill.py --kills 20 --out benchmarks/kill.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchcrest
from torchcrest.train.files import RunFiles

STEPS, EVALUATIONS = 60, 30
OPTIONS = {
    "model": "cnn",
    "augment": "true",
    "flip": "true",
    "num_workers": 2,
    "batch_size": 16,
    "epochs": 3,
    "budget": 0.5,
    "evaluations": EVALUATIONS,
    "seed": 0,
    "crest.overhead_in": "counted",
    "crest.pool_size": 32,
    "crest.max_overhead": 1.0,
    "crest.interval_scale": 6,
    "crest.learned_loss": 0.5,
}
CLOCKED = {"peak_memory", "overhead"}  # of the summary, beside its seconds
START, SOON = 8.0, 0.003  # seconds: of importing, at the most; of writing a checkpoint, about


def images(path: Path) -> None:
    """Write 640 training and 160 test images of three classes: bars at an angle, and noise."""
    generator = np.random.default_rng(0)
    y = generator.integers(3, size=800)
    bars = np.zeros((3, 8, 8))
    bars[0, 3:5], bars[1, :, 3:5], bars[2] = 1, 1, np.eye(8)
    x = (90 * bars[y] + generator.integers(0, 160, (800, 8, 8))).astype(np.uint8)
    np.savez(path, x_train=x[:640], y_train=y[:640], x_test=x[640:], y_test=y[640:])


def start(task: Path, out: Path) -> subprocess.Popen[bytes]:
    """Begin the run, or go on with it."""
    command = [str(Path(sys.executable).with_name("torchcrest")), "train", f"npz:{task}", "--out", str(out), "--resume"]
    command += [f"--{name}={value}" for name, value in OPTIONS.items()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def evaluated(files: RunFiles) -> int:
    """Count the evaluations in the metrics."""
    return files.metrics.read_bytes().count(b'"event": "evaluation"') if files.metrics.exists() else 0


def writing(files: RunFiles) -> bool:
    """Tell whether a checkpoint is being written, or was when the run was killed."""
    return any(files.folder.glob(".checkpoint.pt.*"))


def phase(files: RunFiles) -> str:
    """Say what a kill has hit, by what it has left."""
    if files.finished():
        return "after the end"
    if writing(files):
        return "checkpoint half written"
    if not files.checkpoint.exists():
        return "before the first checkpoint" if files.config.exists() else "before the first file"
    known = files.read_checkpoint()
    if len(files.read_metrics()) > known["lines"]:
        return "lines without their checkpoint"
    return "before the summary" if known["step"] == STEPS else "between checkpoints"


def aims(kills: int, seconds: float, draw: random.Random) -> list[dict[str, Any]]:
    """Draw moments, in the order of the run: evaluations to wait for, then what else, then how many seconds."""
    early, late = max(1, kills // 7), max(1, kills // 5)
    inner = sorted(draw.randint(1, EVALUATIONS - 2) for _ in range(kills - early - late))
    found: list[dict[str, Any]] = [{"evaluations": 0, "at": "start", "wait": draw.uniform(0, START)}]
    found += [{"evaluations": 0, "at": "first files", "wait": draw.uniform(0, seconds)} for _ in range(1, early)]
    for wanted in [*inner, *[EVALUATIONS - 1] * late]:
        at = draw.choice(["any", "checkpoint"])
        found.append(
            {"evaluations": wanted, "at": at, "wait": draw.uniform(0, SOON if at == "checkpoint" else seconds)}
        )
    return found


def kill(task: Path, files: RunFiles, aim: dict[str, Any]) -> dict[str, Any]:
    """Let the run go on until the moment, and kill it; say what that has hit."""
    before, begun = evaluated(files), time.time()
    process = start(task, files.folder)

    def wait(until: Callable[[], bool]) -> None:
        while process.poll() is None and not until():
            time.sleep(0.0002)

    if aim["evaluations"]:  # one more than there are, for the process is to have begun
        wait(lambda: evaluated(files) >= max(aim["evaluations"], min(before + 1, EVALUATIONS - 1)))
    if aim["at"] == "first files":
        wait(lambda: files.config.exists() and files.config.stat().st_mtime > begun)
    if aim["at"] == "checkpoint":
        wait(lambda: writing(files))
    time.sleep(aim["wait"])
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    last = evaluated(files) >= EVALUATIONS - 1
    return {**aim, "killed": killed, "hit": phase(files), "in_the_last_steps": last, "evaluated": evaluated(files)}


def outcome(files: RunFiles) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    """Return the model, the metrics and the summary, less the clock."""
    lines = [{name: value for name, value in line.items() if name != "seconds"} for line in files.read_metrics()]
    summary = {k: v for k, v in files.read_summary().items() if "seconds" not in k and k not in CLOCKED}
    return files.read_checkpoint()["model"], lines, summary


def main() -> int:
    """Kill, compare, write a line a kill and one of the outcome; the exit status is 1 if there is a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/kill.jsonl"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        task, folder = Path(name, "images.npz"), Path(name)
        images(task)
        whole, parts = RunFiles(folder / "whole"), RunFiles(folder / "parts")
        if start(task, whole.folder).wait():
            return 2
        seconds = whole.read_summary()["seconds"] / EVALUATIONS
        records = []
        for number, aim in enumerate(aims(args.kills, seconds, random.Random(args.seed)), 1):
            records.append({"kill": number, **kill(task, parts, aim)})
            print(json.dumps(records[-1]), flush=True)
        if start(task, parts.folder).wait():
            return 2
        (model, lines, summary), (model_too, lines_too, summary_too) = outcome(whole), outcome(parts)
        same = {
            "same_parameters": all(torch.equal(model[key], model_too[key]) for key in {*model, *model_too}),
            "same_metrics": lines == lines_too,
            "same_summary": summary == summary_too,
            "same_files": sorted(p.name for p in whole.folder.iterdir())
            == sorted(p.name for p in parts.folder.iterdir()),
        }
    hits = Counter(record["hit"] for record in records if record["killed"])
    result = {
        "task": "images",
        "method": "crest",
        "config": OPTIONS,
        "seed": args.seed,
        "steps": STEPS,
        **{name: summary[name] for name in ("regions", "checks", "coresets", "active")},
        "kills": hits.total(),
        "hits": dict(hits),
        "in_the_last_steps": sum(record["in_the_last_steps"] for record in records),
        **same,
        "device": f"cpu, {platform.machine()}",
        "versions": {"torchcrest": torchcrest.__version__, "torch": torch.__version__},
    }
    with args.out.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in [*records, result])
    print(json.dumps(result))
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
