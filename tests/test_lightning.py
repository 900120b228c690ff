"""Lightning: the same run as a loop by hand, in one process and in two; its checkpoints; what is logged."""

from __future__ import annotations

import multiprocessing
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec, module_from_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, default_collate

from conftest import SMALL, Blobs, events, make_crest, make_net, parameters_of, same, sgd
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


def trainer_with(callback: CrestCallback | None = None, callbacks: Sequence[Callback] = (), **flags: Any) -> Trainer:
    """Build a trainer that is quiet."""
    flags = {"max_epochs": EPOCHS, "accelerator": "cpu", "logger": False, **flags}
    flags |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": bool(callbacks)}
    return Trainer(callbacks=[callback or CrestCallback(), *callbacks], **flags)


def fit(module: Module, ckpt_path: Path | None = None, **flags: Any) -> Module:
    """Train with Lightning."""
    trainer_with(**flags).fit(module, ckpt_path=ckpt_path)
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


def doubled(examples: list[Any]) -> list[Any]:
    """Collate what a model in double precision takes."""
    x, i, y = default_collate(examples)
    return [x.double(), i, y]


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


def test_double_precision() -> None:
    module, net = fit(Module(collate_fn=doubled), precision="64-true"), make_net().double()
    assert_same_run(module, *by_hand(net, collate_fn=doubled), parameters_of(net))
    assert module.net.layers[0].weight.dtype == torch.float64


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


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_the_crest_may_stand_beside_a_loader_without_a_state(tmp_path: Path) -> None:
    class Pair(Module):
        def train_dataloader(self) -> Any:
            return {"plain": DataLoader(Blobs(48), batch_size=16), "crest": super().train_dataloader()}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["crest"], batch_idx)

    whole = fit(Pair(), callbacks=[Saver(tmp_path)])
    for point in ("step-5", "epoch-7"):
        assert_same_run(fit(Pair(), tmp_path / f"{point}.ckpt"), whole.crest, whole.trace, parameters_of(whole.net))


def test_what_validation_restores_is_not_the_next_fit_s(tmp_path: Path) -> None:
    first = fit(Validated(), callbacks=[Saver(tmp_path)])
    trainer, module = trainer_with(max_epochs=1), Validated()
    trainer.validate(module, ckpt_path=tmp_path / "step-5.ckpt")
    module.net.load_state_dict(make_net().state_dict())
    trainer.fit(module)
    assert module.trace == first.trace[:STEPS]


# Two processes -----------------------------------------------------------------------------------------------


class Launched(LightningEnvironment):
    """Processes that are there already."""

    creates_processes_externally = True

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()


POINTS = ["step-3", "step-7", "epoch-7", "step-12", "epoch-14"]


def outcome(module: Module) -> dict[str, Any]:
    return {"trace": module.trace, "history": module.crest.history, "parameters": parameters_of(module.net)}


def train(rank: int, size: int, folder: Path) -> Any:
    """Train, resume and be refused, with Lightning; train with a plain loop."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    flags: dict[str, Any] = {"strategy": "ddp", "devices": size, "plugins": [Launched()]}
    whole = fit(Module(), callbacks=[Saver(folder)], **flags)
    resumed = {point: outcome(fit(Module(), folder / f"{point}.ckpt", **flags)) for point in POINTS}
    net = make_net()
    crest, trace = by_hand(DistributedDataParallel(net))
    return {
        "whole": outcome(whole),
        "resumed": resumed,
        "loop": {"trace": trace, "history": crest.history, "parameters": parameters_of(net)},
        "alone": error_of(lambda: fit(Module(), folder / "alone-5.ckpt", **flags)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def trained(folder: Path) -> list[Any]:
    with warnings.catch_warnings():
        for message in EXPECTED:
            warnings.filterwarnings("ignore", message)
        fit(Module(), callbacks=[Saver(folder / "one")])
    (folder / "one" / "step-5.ckpt").rename(folder / "alone-5.ckpt")
    return launch(partial(train, folder=folder), 2, folder)


class TestTwoProcesses:
    def test_train_as_a_loop_by_hand(self, trained: list[Any]) -> None:
        for each in trained:
            assert each["whole"]["trace"] == each["loop"]["trace"]
            assert each["whole"]["history"] == each["loop"]["history"]
            assert same(each["whole"]["parameters"], each["loop"]["parameters"])

    def test_go_alike_on_their_own_data(self, trained: list[Any]) -> None:
        zero, one = (each["whole"] for each in trained)
        assert zero["history"] == one["history"]
        assert same(
            *({name: p for name, p in each["parameters"].items() if "running" not in name} for each in (zero, one))
        )
        for (left, _), (right, _) in zip(zero["trace"], one["trace"], strict=True):
            assert not set(left) & set(right)

    @pytest.mark.parametrize("point", POINTS)
    def test_resume_to_the_bit(self, trained: list[Any], point: str) -> None:
        for each in trained:
            whole, resumed = each["whole"], each["resumed"][point]
            assert 0 < len(resumed["trace"]) < len(whole["trace"])
            assert resumed["trace"] == whole["trace"][-len(resumed["trace"]) :]
            assert resumed["history"] == whole["history"]
            assert same(resumed["parameters"], whole["parameters"])

    def test_another_number_of_processes_is_refused(self, trained: list[Any], folder: Path) -> None:
        for each in trained:
            assert "CheckpointError: ranks of the checkpoint must be 2, as of this process, got 1" in each["alone"]
        with pytest.raises(CheckpointError, match="ranks of the checkpoint must be 1, as of this process, got 2"):
            fit(Module(), folder / "step-3.ckpt")


# Logging -----------------------------------------------------------------------------------------------------


class Noting(Logger):
    """Notes what it is given."""

    name, version = "noting", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kw: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, metrics))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logs_each_event_once_and_stats_every_so_often(tmp_path: Path, accumulate: int) -> None:
    def flags(logger: Noting) -> dict[str, Any]:
        return {"logger": logger, "log_every_n_steps": 5, "accumulate_grad_batches": accumulate}

    noted = Noting()
    module = fit(Module(), callbacks=[Saver(tmp_path)], **flags(noted))
    crest = module.crest
    steps = sorted(
        {
            (event["step"] // STEPS) * -(-STEPS // accumulate) + event["step"] % STEPS // accumulate
            for event in crest.history
        }
    )
    told = [(step, row) for step, row in noted.rows if any(name.count("/") == 2 for name in row)]
    assert sorted({step for step, _ in told}) == steps
    for kind, name in (("check", "rho"), ("check", "passed"), ("region", "interval"), ("exclude", "active")):
        key = f"crest/{kind}/{name}"
        assert [row[key] for _, row in told if key in row] == [float(e[name]) for e in events(crest, kind)]
    assert not any(name.endswith(("/step", "/event")) for _, row in noted.rows for name in row)
    stats = [(step, row) for step, row in noted.rows if "crest/overhead" in row]
    assert [step for step, _ in stats] == [4, 9, 14, 19][: 4 // accumulate]
    last = stats[-1][1]
    assert {f"crest/{field.name}" for field in fields(crest.stats)} < last.keys()
    assert last["crest/active_share"] == last["crest/active"] / 301
    resumed = Noting()
    fit(Module(), tmp_path / "step-3.ckpt", **flags(resumed))
    later = [row for step, row in noted.rows if step >= 3]
    assert [undated(row) for _, row in resumed.rows] == [undated(row) for row in later]


def undated(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if "seconds" not in name}


def test_a_prefix_of_ones_own() -> None:
    noted = Noting()
    fit(Module(), callback=CrestCallback("selection"), logger=noted, max_steps=2)
    assert {name.partition("/")[0] for _, row in noted.rows for name in row} == {"selection"}


# What cannot work --------------------------------------------------------------------------------------------


class Odd(Module):
    """Loaders that are not one Crest."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> Any:
        if self.kind == "two":
            return [super().train_dataloader(), super().train_dataloader()]
        return DataLoader(Blobs(48), batch_size=16)


@pytest.mark.parametrize(("kind", "got"), [("two", "Crest, Crest"), ("none", "DataLoader")])
def test_another_loader_is_refused(kind: str, got: str) -> None:
    match = f"train_dataloader must return a Crest and no other loader with a state, got '{got}'. Or train"
    with pytest.raises(ConfigError, match=match):
        fit(Odd(kind))


def test_a_new_loader_each_epoch_is_refused() -> None:
    match = r"return the loader of the epoch before, got 'a new one'\. One .* set reload_dataloaders_every_n_epochs=0"
    with pytest.raises(ConfigError, match=match):
        fit(Module(), reload_dataloaders_every_n_epochs=1)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    fit(Module(), callbacks=[Saver(tmp_path)])
    for point in ("step-3", "epoch-7"):
        with pytest.raises(CheckpointError, match="seed of the checkpoint must be 1, as of this loader, got 0"):
            fit(Module(seed=1), tmp_path / f"{point}.ckpt")


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    spec = find_spec("torchcrest.integrations.lightning")
    assert spec is not None
    assert spec.loader is not None
    match = r"for lightning must be installed, got .*\. Run pip install 'torchcrest\[lightning\]'\."
    with pytest.raises(ConfigError, match=match):
        spec.loader.exec_module(module_from_spec(spec))


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    try:
        from lightning_module import main
    finally:
        sys.path.pop(0)
    with torch.random.fork_rng():
        main()
    accuracy = re.fullmatch(r"test accuracy (\d+\.\d)% after 160 steps of 32 examples\n", capsys.readouterr().out)
    assert accuracy
    assert float(accuracy[1]) > 90
