"""CREST in Hugging Face's Trainer: five lines more than, or other than, without.

    pip install ".[huggingface]" && python examples/transformers_trainer.py

Trains a small BERT, made here, on texts made here, to tell what they are about. With names it fine-tunes a model on
a data set of the hub, or of a folder: columns ``text`` and ``label``, splits ``train`` and ``test``.

    python examples/transformers_trainer.py --model distilbert-base-uncased --data ag_news --steps 1000

Several processes: ``torchrun --nproc_per_node 2 examples/transformers_trainer.py``. The lines that CREST adds or
changes are marked.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    TrainingArguments,
)

from torchcrest import CrestConfig  # CREST
from torchcrest.integrations.transformers import CrestTrainer  # CREST: instead of transformers.Trainer

BATCH, TOPICS, WORDS = 16, 4, 400


def texts(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of 5 to 40 words, numbers here, of which a third belong to one of four topics, and the others to none."""
    drawn, rows = random.Random(seed), []
    for _ in range(count):
        topic, words = drawn.randrange(TOPICS), range(drawn.randint(5, 40))
        telling = [drawn.random() < 0.3 for _ in words]
        ids = [1 + 10 * topic + drawn.randrange(10) if tells else drawn.randrange(41, WORDS) for tells in telling]
        rows.append({"input_ids": ids, "labels": topic})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest."""
    longest = max(len(row["input_ids"]) for row in rows)
    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]),
        "attention_mask": (torch.arange(longest) < sizes[:, None]).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def accuracy(found: Any) -> dict[str, float]:
    """Say how many predictions are right."""
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def prepare(model: str | None, data: str | None) -> tuple[Any, Any, Any, Any]:
    """Return a model, training data, test data and a collate function; those that are made here without names."""
    if model is None or data is None:
        config = BertConfig(
            vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
        )
        config.num_labels = TOPICS
        return BertForSequenceClassification(config), texts(4000, 1), texts(1000, 2), collate
    tokenizer = AutoTokenizer.from_pretrained(model)
    parts: Any = load_dataset(data)
    parts = parts.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), batched=True)
    train: Dataset = parts["train"].rename_column("label", "labels")
    test: Dataset = parts["test"].rename_column("label", "labels")
    classes = len(set(train["labels"]))
    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=classes)
    return network, train, test, DataCollatorWithPadding(tokenizer)


def main() -> None:
    """Train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model for sequence classification, by name or folder")
    parser.add_argument("--data", help="a data set, by name or folder")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, train, test, collator = prepare(options.model, options.data)

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=options.steps,
            learning_rate=options.rate,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
        )
        config = CrestConfig(batch_size=BATCH)  # CREST
        trainer = CrestTrainer(  # CREST: instead of Trainer
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=test,
            data_collator=collator,
            compute_metrics=accuracy,
            crest=config,  # CREST
        )
        trainer.train()
        print(trainer.evaluate())


if __name__ == "__main__":
    main()
