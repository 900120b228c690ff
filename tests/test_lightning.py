"""Lightning: the same run as a loop by hand, in one process and in two; its checkpoints; what is logged."""

from __future__ import annotations

import importlib
import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from conftest import BOUNDED, SMALL, Blobs, events, make_crest, make_net, parameters_of, same, sgd
from test_distributed import error_of, launch
from torchcrest import CheckpointError, ConfigError, Crest, WeightedBatch
from torchcrest.integrations.lightning import CrestCallback

STEPS, EPOCHS = 7, 3
CONFIG = replace(SMALL, tolerance=0.3)
EXPECTED = [  # what Lightning says of small runs, whatever the loader
    "The number of training batches .* is smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in EXPECTED]


class Module(LightningModule):
    """A `Net` that keeps its loader, and notes what it is trained on."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.net = make_net()
        self.settings = {"steps": STEPS, "config": CONFIG, **settings}
        self.trace: list[tuple[list[int], list[float]]] = []

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        out: Tensor = self.net(x, i)
        return out

    def train_dataloader(self) -> Any:
        self.crest = make_crest(self, Blobs(301), **self.settings)
        return self.crest

    def training_step(self, batch: WeightedBatch, batch_idx: int) -> Tensor:
        assert isinstance(batch, WeightedBatch)
        (x, i, y), weights = batch
        assert torch.equal(i, self.crest.indices)
        self.trace.append((i.tolist(), weights.tolist()))
        return (F.cross_entropy(self(x, i), y, reduction="none") * weights).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


class Validated(Module):
    """Validation in the middle and at the end of epochs."""

    def val_dataloader(self) -> Any:
        return DataLoader(Blobs(32), batch_size=16)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(*batch[:2])


def fit(module: Module, ckpt_path: Path | None = None, callbacks: Any = (), **flags: Any) -> Module:
    """Train with Lightning."""
    flags = {"max_epochs": EPOCHS, "accelerator": "cpu", "logger": False, "enable_checkpointing": bool(callbacks)} | flags
    flags |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(callbacks=[CrestCallback(), *callbacks], **flags)
    trainer.fit(module, ckpt_path=ckpt_path)
    return module


def by_hand(
    model: nn.Module,
    *,
    batches: int = STEPS,
    epochs: int = EPOCHS,
    last: int = 1000,
    accumulate: int = 1,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **settings: Any,
) -> tuple[Crest, list[Any]]:
    """Train without Lightning; return the loader and the trace."""
    crest = make_crest(model, Blobs(301), **{"steps": STEPS, "config": CONFIG, **settings})
    optimizer, trace, taken = sgd(model), [], 0
    for _ in range(epochs):
        for k, ((x, i, y), weights) in enumerate(islice(crest, batches), 1):
            trace.append((i.tolist(), weights.tolist()))
            with context():
                loss = (F.cross_entropy(model(x, i), y, reduction="none") * weights).mean()
            (loss / accumulate).backward()
            if k % accumulate == 0 or k == batches:
                optimizer.step()
                optimizer.zero_grad()
                taken += 1
            if taken == last:
                return crest, trace
    return crest, trace


def assert_same_run(module: Module, crest: Crest, trace: list[Any], net: dict[str, Tensor]) -> None:
    assert module.trace == trace[-len(module.trace) :]
    assert module.crest.history == crest.history
    assert same(parameters_of(module.net), net)


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epochs": ({}, {}),
    "limited epochs": ({"limit_train_batches": 5}, {"batches": 5}),
    "a share of an epoch": ({"limit_train_batches": 0.6}, {"batches": 4}),
    "steps": ({"max_steps": 9, "max_epochs": -1}, {"last": 9}),
    "accumulating": ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "mixed precision": ({"precision": "bf16-mixed"}, {"context": bfloat16}),
}


@pytest.mark.parametrize(("way", "num_workers"), [*((way, 0) for way in WAYS), ("epochs", 2), ("limited epochs", 2)])
def test_trains_as_a_loop_by_hand(way: str, num_workers: int) -> None:
    flags, loop = WAYS[way]
    module, net = fit(Module(num_workers=num_workers), **flags), make_net()
    crest, trace = by_hand(net, **loop)
    assert len(module.trace) == len(trace)
    assert_same_run(module, crest, trace, parameters_of(net))
    assert {event["passed"] for event in events(crest, "check")} == {True, False}
    assert not multiprocessing.active_children(), "workers are left"


# Stop and resume ---------------------------------------------------------------------------------------------


class Saver(Checkpoint):
    """Saves where `ModelCheckpoint` can: after steps, at the end of epochs, and after validation."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.step = folder, 0

    def save(self, trainer: Trainer, moment: str) -> None:
        trainer.save_checkpoint(self.folder / f"{moment}-{trainer.global_step}.ckpt", weights_only=False)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step != self.step:  # gradients that are half accumulated are in no checkpoint
            self.step = trainer.global_step
            self.save(trainer, "step")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "epoch")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.save(trainer, "validated")


RESUMED: dict[str, tuple[dict[str, Any], list[str]]] = {
    # The end of an epoch is step 7 and 14; validation is after batches 3 and 6 of each.
    "epochs": ({}, ["step-1", "step-5", "step-7", "step-9", "step-14", "epoch-7", "epoch-14", "validated-10"]),
    "validated epochs": ({"val_check_interval": 7}, ["step-7", "epoch-7", "validated-7", "validated-14"]),
    "steps": ({"max_steps": 18, "max_epochs": -1}, ["step-5", "step-7", "epoch-7", "step-11", "epoch-14"]),
    "limited epochs": ({"limit_train_batches": 5}, ["step-3", "step-5", "epoch-5", "step-7", "epoch-10"]),
    "accumulating": ({"accumulate_grad_batches": 3}, ["step-1", "step-3", "epoch-3", "step-5", "epoch-6"]),
}


@pytest.mark.parametrize("way", RESUMED)
def test_resumes_to_the_bit(way: str, tmp_path: Path) -> None:
    flags, points = RESUMED[way]
    flags = {"val_check_interval": 3, "num_sanity_val_steps": 0, **flags}
    whole = fit(Validated(), callbacks=[Saver(tmp_path)], **flags)
    for point in points:
        resumed = fit(Validated(), tmp_path / f"{point}.ckpt", **flags)
        assert 0 < len(resumed.trace) < len(whole.trace), point
        assert_same_run(resumed, whole.crest, whole.trace, parameters_of(whole.net))
        assert resumed.trainer.global_step == whole.trainer.global_step
