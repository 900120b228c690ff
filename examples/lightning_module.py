"""CREST in Lightning: a small net on scikit-learn's digits.

    pip install ".[tasks,lightning]" && python examples/lightning_module.py

The lines that differ from plain Lightning are marked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from torchcrest import Crest, CrestConfig  # CREST
from torchcrest.integrations.lightning import CrestCallback  # CREST

EPOCHS, STEPS, BATCH = 4, 40, 32  # as many steps in an epoch as you like


class Digits(LightningModule):
    """A small net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        x, y = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
        self.train_set, self.test_set = random_split(data, [1437, 360])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, 10]``."""
        logits: Tensor = self.net(x)
        return logits

    def train_dataloader(self) -> Crest:
        """Return the loader of one epoch after the other."""
        # An epoch is one pass of many, so the interval of exclusion is given in steps.
        config = CrestConfig(batch_size=BATCH, learned_interval=STEPS)  # CREST
        return Crest(self, self.train_set, config, steps=STEPS)  # CREST: instead of a DataLoader

    def training_step(self, batch: tuple[tuple[Tensor, Tensor], Tensor], batch_idx: int) -> Tensor:
        """Return the weighted mean of the losses."""
        (x, y), weights = batch  # CREST
        return (F.cross_entropy(self(x), y, reduction="none") * weights).mean()  # CREST

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test set in one batch."""
        return DataLoader(self.test_set, batch_size=360)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main() -> None:
    """Train and test."""
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=[CrestCallback()],  # CREST: logs what it does, and makes ckpt_path go on with it
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Digits()
    trainer.fit(model)
    (result,) = trainer.test(model, verbose=False)
    print(f"test accuracy {result['accuracy']:.1%} after {trainer.global_step} steps of {BATCH} examples")


if __name__ == "__main__":
    main()
