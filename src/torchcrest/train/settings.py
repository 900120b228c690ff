"""The settings of one training run: what the command line takes and config.yaml holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from torchcrest.baselines import CraigConfig, GlisterConfig, GradMatchConfig, InfoBatchConfig
from torchcrest.baselines.subset import SubsetConfig
from torchcrest.checks import suggest
from torchcrest.config import CrestConfig
from torchcrest.errors import CheckpointError, ConfigError, must
from torchcrest.train.methods import CONFIGS, Config, find_method
from torchcrest.train.schedule import Kind
from torchcrest.train.tasks import Task
from torchcrest.train.texts import BAG, Texts

__all__ = ["RunSettings"]

Optimizer = Literal["sgd", "adamw"]
SHARED = {"batch_size", "subset", "difficulty"}  # settings of the methods that follow from the run's


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run; what is None is the task's default.

    Attributes:
        task: digits, mnist1d, cifar10, cifar100, tinyimagenet, snli, npz:PATH, imagefolder:DIR, text:FILE, hf:DATASET.
        method: full, truncated, random, crest, craig, gradmatch, glister or infobatch.
        budget: share of the full run's optimizer steps, in (0, 1]; full ignores it.
        epochs: length of the full run, in passes over the training data.
        seed: of the model's weights, the order of the data, selection and augmentation.
        data: folder with the files of cifar10, cifar100, tinyimagenet or snli; else the Hugging Face hub has them.
        model: resnet20, resnet18, resnet50, cnn, conv1d or mlp; for texts bag (means of word vectors), or a pretrained
            one: its name on the Hugging Face hub, or a folder.
        proxy_model: the small model that crest.proxy_source=auto or model measures, a name as for model. By default
            auto makes one of its own, or measures the model itself, and model takes mlp, and for texts bag.
        batch_size: examples in a batch, for every method.
        learning_rate: the highest of the schedule.
        schedule: step (x 0.1 at 60 and 85 %), cosine or constant; all after the warm-up.
        warmup: share of the steps over which the rate rises.
        optimizer: sgd, with momentum, or adamw; by default sgd, for texts adamw.
        momentum: of sgd.
        weight_decay: of either optimizer.
        augment: shift training images at random; the default of cifar10, cifar100 and tinyimagenet.
        flip: mirror them at random as well; likewise.
        max_length: tokens of a text that are kept, by default 128.
        evaluations: how many times to measure test accuracy, evenly over the run, outside the clock.
        num_workers: processes that read data.
        difficulty: write examples.npz: of each training example how often it was picked and trained on, forgotten,
            when it was set aside, its losses. See torchcrest explain.
        picks: write picks.npz as well, a log of all of that step by step, some 20 bytes an example of a batch or pool.
        device: auto, cpu, cuda, cuda:1, mps, ...
        crest: settings of CREST; batch_size is the run's, here and in the next.
        craig: settings of CRAIG; its subset is the budget's share of the data, as with the next two.
        gradmatch: settings of GradMatch.
        glister: settings of GLISTER.
        infobatch: settings of InfoBatch.
    """

    task: str
    method: str = "crest"
    budget: float = 0.1
    epochs: float | None = None
    seed: int = 0
    data: str | None = None
    model: str | None = None
    proxy_model: str | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    schedule: Kind = "step"
    warmup: float = 0.1
    optimizer: Optimizer | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    augment: bool | None = None
    flip: bool | None = None
    max_length: int | None = None
    evaluations: int = 10
    num_workers: int = 0
    difficulty: bool = False
    picks: bool = False
    device: str = "auto"
    crest: CrestConfig = field(default_factory=CrestConfig)
    craig: CraigConfig = field(default_factory=CraigConfig)
    gradmatch: GradMatchConfig = field(default_factory=GradMatchConfig)
    glister: GlisterConfig = field(default_factory=GlisterConfig)
    infobatch: InfoBatchConfig = field(default_factory=InfoBatchConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot work whatever the task, naming all of it."""
        problems = []
        try:
            find_method(self.method)
        except ConfigError as error:
            problems.append(str(error))
        if not 0 < self.budget <= 1:
            do = "0.1 takes a tenth of the full run's optimizer steps."
            problems.append(must("budget", "be in (0, 1]", self.budget, do))
        for name, least in (("seed", 0), ("evaluations", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                problems.append(must(name, f"be at least {least}", getattr(self, name), f"Use for example {least}."))
        for name in ("epochs", "batch_size", "learning_rate", "max_length"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                problems.append(must(name, "be above 0", value, "Leave it out for the task's default."))
        if not 0 <= self.momentum < 1:
            problems.append(must("momentum", "be in [0, 1)", self.momentum, "0.9 is usual."))
        if self.weight_decay is not None and not 0 <= self.weight_decay < float("inf"):
            problems.append(must("weight_decay", "be at least 0", self.weight_decay, "0 switches it off."))
        if not 0 <= self.warmup <= 0.5:
            problems.append(must("warmup", "be a share in [0, 0.5]", self.warmup, "0.1 is usual."))
        for name, kind in (("schedule", Kind), ("optimizer", Optimizer)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known and (name, value) != ("optimizer", None):
                problems.append(must(name, f"be one of {', '.join(known)}", value, suggest(value, known)))
        if self.picks and not self.difficulty:
            problems.append(must("picks", "be left out without difficulty", True, "Set difficulty=true as well."))
        if problems:
            raise ConfigError(problems)
        for name in ("budget", "epochs", "learning_rate", "warmup", "momentum", "weight_decay"):
            value = getattr(self, name)
            # 10 and 10.0 are the same setting, and must be written down alike.
            object.__setattr__(self, name, None if value is None else float(value))

    @property
    def own(self) -> Config | None:
        """The settings of the run's method, where it has some."""
        return getattr(self, self.method) if self.method in CONFIGS else None

    def resolved(self, task: Task) -> RunSettings:
        """Return the settings with the task's defaults in place of None, ready to be written down.

        Raises:
            ConfigError: they cannot work with this task.
        """
        batch_size = self.batch_size or task.batch_size
        examples = len(task.train)
        if batch_size > examples:
            want = f"be at most the {examples} training examples"
            raise ConfigError(must("batch_size", want, batch_size, "Use a smaller one."))
        own = self.own
        fitted: dict[str, Any] = {"batch_size": batch_size}
        if isinstance(own, CrestConfig):
            # What is left to us is 4m of data that have as many.
            pool_size = min(4 * batch_size, examples) if own.pool_size is None else own.pool_size
            if pool_size > examples:
                want = f"be at most the {examples} training examples"
                do = f"Use for example {min(2 * batch_size, examples)}."
                raise ConfigError(must("crest.pool_size", want, pool_size, do))
            fitted |= {"difficulty": self.difficulty, "pool_size": pool_size}
        if isinstance(own, SubsetConfig):
            fitted["subset"] = self.budget
            held = own.validation if isinstance(own, GlisterConfig) else 0
            left = examples - (held if isinstance(held, int) else round(held * examples))
            if round(self.budget * left) < batch_size:
                want = f"give {self.method} at least batch_size = {batch_size} of {left} examples to train on"
                raise ConfigError(must("budget", want, self.budget, "Raise it, or use a smaller batch_size."))
        source = own.proxy_source if isinstance(own, CrestConfig) else None
        small = (BAG if isinstance(task.train, Texts) else "mlp") if source == "model" else None
        changed: dict[str, Any] = {} if own is None else {self.method: replace(own, **fitted)}
        return replace(
            self,
            epochs=self.epochs or task.epochs,
            model=self.model or task.model,
            proxy_model=self.proxy_model or small if source in ("auto", "model") else None,
            batch_size=batch_size,
            learning_rate=self.learning_rate or task.learning_rate,
            optimizer=self.optimizer or task.optimizer,
            weight_decay=task.weight_decay if self.weight_decay is None else self.weight_decay,
            augment=task.augment,
            flip=task.flip,
            max_length=task.max_length,
            device=str(_device(self.device)),
            **changed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, in the order of the fields; they go into config.yaml."""
        plain = asdict(self)
        for name in ("proxy_model", "data", "max_length"):
            if plain[name] is None:
                del plain[name]  # says nothing about this run, like what follows
        for name in CONFIGS:
            if name != self.method:
                del plain[name]
        if self.own:
            for name in SHARED & plain[self.method].keys():
                del plain[self.method][name]  # the run's own say it
        return plain

    def refuse_other(self, found: Mapping[str, Any], path: Path) -> None:
        """Refuse to go on with, or to count in, a run that was made with other settings.

        Args:
            found: its settings, as :meth:`to_dict` gives them.
            path: where they were found.

        Raises:
            CheckpointError: naming all that differ.
        """
        saved, own = _flat(found), _flat(self.to_dict())
        problems = [
            must(f"{name} in {path}", f"be {own.get(name)!r}, as asked for", saved.get(name), "Use another --out.")
            for name in sorted({*saved, *own})
            if saved.get(name) != own.get(name)
        ]
        if problems:
            raise CheckpointError("\n".join(problems))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Name the settings inside another one with a dot, as the command does."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = {f"{name}.{key}": inside for key, inside in value.items()} if isinstance(value, dict) else {name: value}
        flat |= inner
    return flat


def _device(name: str) -> torch.device:
    """Return the device of that name; for auto, the accelerator if there is one."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(must("device", f"be usable ({reason})", name, "Use auto or cpu.")) from error
    return device
