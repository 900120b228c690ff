"""One training run: the loop, the clock, evaluation, the run directory."""

from __future__ import annotations

import math
import platform
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchcrest
from torchcrest import tree
from torchcrest.active import stream
from torchcrest.diagnostics import MEANS
from torchcrest.errors import CheckpointError, ConfigError, NonFiniteLossError, must
from torchcrest.measure import forked, synchronize
from torchcrest.objectives import Classification
from torchcrest.passes import Passes
from torchcrest.train.energy import EnergyMeter
from torchcrest.train.files import RunFiles, blocked
from torchcrest.train.memory import PeakMemory
from torchcrest.train.methods import find_method
from torchcrest.train.schedule import learning_rate
from torchcrest.train.scores import Recorder
from torchcrest.train.settings import RunSettings
from torchcrest.train.tasks import Task, load
from torchcrest.train.track import Tracking, refuse_missing
from torchcrest.types import Stats

__all__ = ["Interrupted", "Status", "prepare", "train"]

LOOK_EVERY = 16  # steps between looks at the training losses, which wait for the device
TELL_EVERY = 0.2  # seconds between calls of the watcher
SAVE_EVERY = 300.0  # seconds between checkpoints, where evaluations are further apart
OBJECTIVE = Classification()  # what the loaders take by default


class Interrupted(Exception):
    """The run was asked to stop, and has left a checkpoint."""

    def __init__(self, folder: Path, step: int, steps: int) -> None:
        self.folder, self.step, self.steps = folder, step, steps
        super().__init__(f"stopped after step {step} of {steps}")


@dataclass(frozen=True)
class Status:
    """How a run stands, for whoever watches it.

    Attributes:
        step: optimizer steps taken.
        steps: optimizer steps in all.
        loss: mean training loss of the last steps.
        accuracy: test accuracy at the last evaluation, from 0 to 1; None before the first.
        evaluated: an evaluation has just been made.
        regions: quadratic models so far.
        interval: steps between checks; None for methods without.
        active: share of the examples not set aside as learned.
        overhead: seconds of selection for each second of the rest.
        forwarded: examples measured and differentiated for each step.
        seconds: on the training clock.
        effective_batch_size: examples in a random batch with a coreset's variance; None where it is not known.
        pay_off: that in batches, for each plain step that a step on a coreset costs; likewise.
    """

    step: int
    steps: int
    loss: float
    accuracy: float | None
    evaluated: bool
    regions: int
    interval: int | None
    active: float
    overhead: float
    forwarded: float
    seconds: float
    effective_batch_size: float | None = None
    pay_off: float | None = None


def prepare(settings: RunSettings, task: Task | None = None) -> tuple[Task, RunSettings]:
    """Load the task and fill in its defaults, so that whatever cannot work is refused before training.

    Args:
        settings: of the run.
        task: the same task and model, prepared before, if for another seed.

    Raises:
        ConfigError: settings that cannot work.
        DataError: data that cannot be used.
    """
    if task is not None:
        return task.seeded(settings.seed), settings.resolved(task)
    s = settings
    task = load(
        s.task,
        data=s.data,
        augment=s.augment,
        flip=s.flip,
        seed=s.seed,
        model=s.model,
        max_length=s.max_length,
    )
    settings = settings.resolved(task)
    assert settings.model is not None
    task.build(settings.model, settings.seed)
    return task, settings


def train(
    settings: RunSettings,
    folder: Path,
    *,
    resume: bool = False,
    watch: Callable[[Status], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    processes: int = 1,
    trackers: Sequence[str] = (),
    energy: bool = False,
    task: Task | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train once and fill a run directory.

    What is random in the training step, dropout for one, is drawn from the global random states of PyTorch, which
    are seeded for the run and put back at its end.

    Args:
        settings: what to train, and how.
        folder: where config.yaml, metrics.jsonl, checkpoint.pt and summary.json go.
        resume: go on from the checkpoint there, if there is one; return the summary if the run is finished.
        watch: called with the status, a few times a second and after each evaluation.
        stop: asked after each step; True writes a checkpoint and raises :class:`Interrupted`.
        processes: runs going on at once on this machine; only written down, for whoever compares seconds.
        trackers: some of tensorboard, trackio and wandb, which are shown what is written into metrics.jsonl.
        energy: measure the energy as well; a run that is resumed must have measured it from its beginning.
        task: the same task and model, prepared before; it tells nothing anew.
        say: called with what is to be told about the data, a sentence each time.

    Returns:
        The summary.

    Raises:
        ConfigError: settings that cannot work, a folder that already holds a run, or a tracker that is not
            there or cannot begin. One that fails later is left out from there on, with a warning.
        DataError: data that cannot be used.
        CheckpointError: a checkpoint that is damaged or of other settings.
        NonFiniteLossError: a loss is NaN or infinite.
        Interrupted: stopped on request.
    """
    if blocked(folder):
        raise ConfigError(
            must("out", "be a folder", str(folder), "There is a file of that name: choose another --out.")
        )
    files = RunFiles(folder)
    if files.began() and not resume:
        do = "Add --resume to go on with it, or choose another --out."
        raise ConfigError(must("out", "be a folder without a run", str(folder), do))
    refuse_missing(trackers, energy)
    told, (task, settings) = task, prepare(settings, task)
    for note in task.notes if told is None else ():
        say(note)
    if files.config.exists():
        settings.refuse_other(files.read_config(), files.config)
    if files.finished():
        return files.read_summary()
    return _Run(task, settings, files, watch, stop, processes, Tracking(trackers, folder), energy).go()


class _Run:
    """A run in progress. Everything that a resumed run needs is in its checkpoint."""

    def __init__(
        self,
        task: Task,
        settings: RunSettings,
        files: RunFiles,
        watch: Callable[[Status], None] | None,
        stop: Callable[[], bool],
        processes: int,
        tracking: Tracking,
        energy: bool,
    ) -> None:
        assert settings.model and settings.batch_size and settings.epochs and settings.learning_rate
        method = find_method(settings.method)
        self.task, self.settings, self.files = task, settings, files
        self.full_steps = max(1, round(settings.epochs * len(task.train) / settings.batch_size))
        self.steps = method.steps(self.full_steps, settings.budget)
        self.schedule_steps = self.steps if method.compressed else self.full_steps
        self.device = torch.device(settings.device)
        self.model = task.build(settings.model, settings.seed).to(self.device)
        self.optimizer = _optimizer(self.model, settings)
        self.loader: Passes = method.build(
            self.model,
            task.train,
            settings.own or settings.batch_size,
            self.steps,
            settings.seed,
            settings.num_workers,
            self._proxy(),
        )
        self.recorder = (
            Recorder(self.loader, len(task.train), self.steps, settings.picks) if settings.difficulty else None
        )
        every = np.linspace(0, self.steps, settings.evaluations + 1)[1:]
        self.evaluate_at = {max(1, round(step)) for step in every.tolist()}
        self.step = 0
        self.seconds = 0.0  # training and selection; without evaluation and writing
        self.lines = 0  # of metrics.jsonl
        self.events = 0  # of the loader's history that were written
        self.accuracy: float | None = None
        self.test_loss = float("nan")
        self.pending: list[tuple[int, Tensor, Tensor, Tensor]] = []  # step, losses, indices, weights: not looked at
        self.recent: list[float] = []  # mean training losses since the last evaluation
        self.latest: deque[float] = deque(maxlen=LOOK_EVERY)  # and of the last steps
        self.watch, self.stop, self.processes = watch, stop, processes
        self.identity = uuid.uuid4().hex[:8]  # for trackers
        self.tracking = tracking
        self.memory = PeakMemory(self.device)
        self.energy = EnergyMeter() if energy else None
        self._told = -math.inf
        self._saved = time.monotonic()

    def _proxy(self) -> nn.Module | None:
        """Build the small model that CREST measures, if one is named."""
        s = self.settings
        return None if s.proxy_model is None else self.task.build(s.proxy_model, s.seed).to(self.device)

    def go(self) -> dict[str, Any]:
        """Train, with random states of the run's own."""
        with forked(self.device, stream(self.settings.seed, "training").initial_seed()):
            return self._go()

    def _go(self) -> dict[str, Any]:
        """Train, between the beginning and the end of what measures and tracks."""
        self.files.sweep()
        if self.files.checkpoint.exists():
            self._load()
        else:
            self.files.keep_metrics(0)
            self.files.write_config(self.settings.to_dict())
        self.tracking.begin(self.files.folder.resolve().name, self.identity, self.settings.to_dict())
        if self.energy:
            self.energy.start()
            self.loader.on_phase = self.energy.switch
        summary = None
        try:
            self._train()
            summary = self._summary()
            if self.recorder:
                self.recorder.write(self.files, self.task)
            self.files.write_summary(summary)
        finally:
            if self.energy:
                self.energy.stop()
            self.tracking.finish(summary)
        return summary

    def _train(self) -> None:
        self.model.train()
        started = self._start_clock()
        for batch in self.loader:
            self._set_rate()
            outputs = OBJECTIVE.outputs(self.model, batch.data)
            losses = _losses(outputs, batch.data)
            self.loader.observe(losses, outputs)
            (losses * batch.weights).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.pending.append((self.step, losses.detach(), self.loader.indices, batch.weights))
            now = time.monotonic()
            evaluate = self.step in self.evaluate_at
            stopping = self.stop() and self.step < self.steps
            saving = stopping or now - self._saved > SAVE_EVERY
            telling = self.watch is not None and (evaluate or now - self._told > TELL_EVERY)
            pause = evaluate or saving or telling
            if pause or len(self.pending) == LOOK_EVERY:
                self._look_at_losses()
            if pause:
                synchronize(self.device)
                self._stop_clock(started)
                if evaluate:
                    self._evaluate()
                elif saving:
                    self._save()
                if stopping:
                    raise Interrupted(self.files.folder, self.step, self.steps)
                if telling:
                    self._tell(evaluate)
                started = self._start_clock()

    def _start_clock(self) -> float:
        if self.energy:
            self.energy.switch("training")
        return time.perf_counter()

    def _stop_clock(self, started: float) -> None:
        self.seconds += time.perf_counter() - started
        if self.energy:
            self.energy.switch(None)

    def _set_rate(self) -> None:
        assert self.settings.learning_rate
        rate = learning_rate(
            self.step,
            self.schedule_steps,
            base=self.settings.learning_rate,
            kind=self.settings.schedule,
            warmup=self.settings.warmup,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _look_at_losses(self) -> None:
        """Refuse training losses that are not finite. Waits for the device."""
        if not self.pending:
            return
        for (step, losses, indices, weights), mean in zip(
            self.pending, torch.stack([each[1].mean() for each in self.pending]).tolist(), strict=True
        ):
            bad = (~losses.isfinite()).cpu()
            if bad.any():
                raise NonFiniteLossError.about("training loss", f"in step {step}", indices[bad].tolist(), len(bad))
            self.recent.append(mean)
            self.latest.append(mean)
            if self.recorder:
                self.recorder.trained(step, indices, weights)
        self.pending.clear()

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Measure test accuracy and loss, write a metrics line and a checkpoint."""
        test = self.task.test
        right, loss = self._forward(test, range(len(test)))
        if not loss.isfinite().all():  # the training loss need not show what the very last step did
            bad = (~loss.isfinite()).nonzero()[:, 0].tolist()
            raise NonFiniteLossError.about("test loss", f"after step {self.step}", bad, len(test))
        self.accuracy, self.test_loss = right / len(test), float(loss.mean())
        stats = self.loader.stats
        record = {
            "event": "evaluation",
            "step": self.step,
            "seconds": self.seconds,
            "accuracy": self.accuracy,
            "test_loss": self.test_loss,
            "train_loss": float(np.mean(self.recent)),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "examples_trained": stats.examples_trained,
            "examples_forwarded": stats.examples_forwarded,
            "active": stats.active,
        }
        self.recent.clear()
        self._save(record, *self._difficulty())

    def _forward(self, data: Any, rows: Sequence[int]) -> tuple[int, Tensor]:
        """Return how many of some examples are predicted right, and the losses ``[len(rows)]`` of all of them."""
        self.model.eval()
        right, losses = 0, []
        for start in range(0, len(rows), data.evaluated_together):
            some = tree.move(data.__getitems__(list(rows[start : start + data.evaluated_together])), self.device)
            outputs = OBJECTIVE.outputs(self.model, some).float()
            right += int((outputs.argmax(1) == _labels(some)).sum())
            losses.append(_losses(outputs, some).double().cpu())
        self.model.train()
        return right, torch.cat(losses)

    def _difficulty(self) -> list[dict[str, Any]]:
        """Return the metrics line on what was trained on, where a record is kept; measures what was set aside."""
        if self.recorder is None:
            return []
        rows = self.recorder.sample_excluded(self.settings.seed, self.step)
        accuracy = self._forward(self.task.train, rows)[0] / len(rows) if rows else None
        return [self.recorder.event(self.step, accuracy)]

    def _save(self, *records: dict[str, Any]) -> None:
        """Write metrics lines and a checkpoint that knows of them."""
        self._saved = time.monotonic()
        lines = [*self.loader.history[self.events :], *records]
        self.files.append_metrics(lines)
        self.events = len(self.loader.history)
        self.lines += len(lines)
        self.files.write_checkpoint(
            {
                "settings": self.settings.to_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "lines": self.lines,
                "accuracy": self.accuracy,
                "test_loss": self.test_loss,
                "recent": self.recent,
                "identity": self.identity,
                "peak_memory": self.memory.read(),
                "energy_kwh": self.energy.read() if self.energy else None,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "loader": self.loader.state_dict(),
                "scores": self.recorder.state_dict() if self.recorder else None,
                "random": _random_states(self.device),
            }
        )
        self.tracking.log(lines)

    def _load(self) -> None:
        state = self.files.read_checkpoint()
        self.settings.refuse_other(state["settings"], self.files.checkpoint)
        self.files.write_config(self.settings.to_dict())
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.lines = int(state["step"]), float(state["seconds"]), int(state["lines"])
            self.accuracy, self.test_loss = state["accuracy"], float(state["test_loss"])
            self.recent = [float(loss) for loss in state["recent"]]
            self.identity = str(state["identity"])
            self.memory = PeakMemory(self.device, before=state["peak_memory"] or 0)
            before = state["energy_kwh"]
            _set_random_states(self.device, state["random"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            do = "Move it away, or use another --out."
            reason = str(error).splitlines()[0]
            raise CheckpointError(must(str(self.files.checkpoint), "fit this run", reason, do)) from error
        if self.energy and before is None:
            warnings.warn("The run began without energy, so there will be no energy_kwh.", stacklevel=2)
        self.energy = EnergyMeter(before) if self.energy and before is not None else None
        self.loader.load_state_dict(state["loader"])
        if self.recorder:
            self.recorder.load_state_dict(state["scores"])
        self.events = len(self.loader.history)
        self.files.keep_metrics(self.lines)

    def _tell(self, evaluated: bool) -> None:
        assert self.watch is not None
        self._told = time.monotonic()
        stats = self.loader.stats
        latest = {event["event"]: event for event in self.loader.history[-100:]}
        quality = latest.get("quality", {})
        self.watch(
            Status(
                step=self.step,
                steps=self.steps,
                loss=float(np.mean(self.latest)),
                accuracy=self.accuracy,
                evaluated=evaluated,
                regions=stats.regions,
                interval=latest["region"]["interval"] if "region" in latest else None,
                active=stats.active / len(self.task.train),
                overhead=_overhead(stats, self.seconds),
                forwarded=stats.examples_forwarded / self.step,
                seconds=self.seconds,
                effective_batch_size=quality.get("effective_batch_size"),
                pay_off=quality.get("pay_off"),
            )
        )

    def _summary(self) -> dict[str, Any]:
        s, stats = self.settings, self.loader.stats
        energy = self.energy.read() if self.energy else None
        return {
            "task": s.task,
            "method": s.method,
            "budget": 1.0 if find_method(s.method).whole else s.budget,
            "seed": s.seed,
            "accuracy": self.accuracy,
            "test_loss": self.test_loss,
            "seconds": self.seconds,
            "seconds_selecting": stats.seconds_selecting,
            "seconds_checking": stats.seconds_checking,
            "seconds_curvature": stats.seconds_curvature,
            "steps": self.step,
            "full_steps": self.full_steps,
            "examples_trained": stats.examples_trained,
            "examples_forwarded": stats.examples_forwarded,
            "forwarded_selecting": stats.forwarded_selecting,
            "forwarded_checking": stats.forwarded_checking,
            "forwarded_per_step": stats.examples_forwarded / self.step,
            "coresets": stats.coresets,
            "overhead": _overhead(stats, self.seconds),
            "regions": stats.regions,
            "checks": stats.checks,
            "active": stats.active,
            "examples": len(self.task.train),
            "versions": {
                "torchcrest": torchcrest.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "device": _describe(self.device),
            "processes": self.processes,
            "peak_memory": self.memory.read(),
            "peak_memory_of": self.memory.of,
            **({name: getattr(stats, name) for name in MEANS} if stats.effective_batch_size else {}),
            **({"energy_kwh": energy} if energy else {}),
        }


def _losses(outputs: Tensor, data: Any) -> Tensor:
    """Return the objective's losses ``[n]``, without its look at the labels, which waits for the device."""
    return F.cross_entropy(outputs, _labels(data), reduction="none")


def _labels(data: Any) -> Tensor:
    labels = OBJECTIVE.labels(data)
    assert labels is not None
    return labels


def _random_states(device: torch.device) -> list[Tensor]:
    """Return PyTorch's global random states, that of the CPU and that of the device."""
    of = [device] if device.type != "mps" else []
    module = torch.get_device_module(device)
    return [torch.get_rng_state(), *([module.get_rng_state(*of)] if device.type != "cpu" else [])]


def _set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], *([device] if device.type != "mps" else []))


def _overhead(stats: Stats, seconds: float) -> float:
    spent = stats.seconds_selecting + stats.seconds_checking + stats.seconds_curvature
    return spent / max(seconds - spent, 1e-9)


def _optimizer(model: nn.Module, s: RunSettings) -> torch.optim.Optimizer:
    assert s.learning_rate and s.weight_decay is not None
    if s.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=s.learning_rate, weight_decay=s.weight_decay)
    return torch.optim.SGD(model.parameters(), lr=s.learning_rate, momentum=s.momentum, weight_decay=s.weight_decay)


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {platform.machine()}, {torch.get_num_threads()} threads"
