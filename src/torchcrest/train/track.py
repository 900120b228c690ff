"""Experiment trackers: TensorBoard, trackio and Weights & Biases, shown what goes into metrics.jsonl.

A tracker hears of a line once the checkpoint that knows of it is written, so it is never ahead of what a
resumed run goes on from, and no line comes twice. What a kill between the two takes from it is in metrics.jsonl.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

import yaml

from torchcrest.checks import suggest
from torchcrest.errors import ConfigError, must

__all__ = ["TRACKERS", "TensorBoard", "Tracker", "Tracking", "Trackio", "Wandb", "numbers", "refuse_missing"]

PROJECT = "torchcrest"


class Tracker(Protocol):
    """What a run tells its trackers. Made with the folder of the run."""

    def begin(self, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        """Begin a run, or go on with it.

        Args:
            name: for people.
            identity: of this run alone, the same after each resume.
            settings: of the run, as config.yaml holds them.
        """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take figures of a step; steps never fall, and may repeat."""

    def finish(self) -> None:
        """End the run, or leave it until it is resumed."""


class TensorBoard:
    """Event files in the folder ``tensorboard`` of the run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"

    def begin(self, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        """Open the files; the settings are a text in them."""
        new = not self._folder.exists()
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(str(self._folder))
        if new:
            self._writer.add_text("settings", f"```\n{yaml.safe_dump(dict(settings), sort_keys=False)}```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        """Close the files."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, with its files in the folder ``wandb`` of the run.

    What its environment variables say goes, as ``WANDB_MODE=offline``. It neither prints nor captures the output.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        """Begin the run beside others of this process."""
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            id=identity,
            resume="allow",
            config=dict(settings),
            dir=str(self._folder),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Its own counter would refuse what a resumed run does in the step of its checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log a row."""
        self._run.log({"step": step, **values})

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


class Trackio:
    """A run of trackio, on this machine unless its environment variables name a place.

    It knows runs by their names alone, so the identity is part of the name. See them with
    ``trackio show --project torchcrest``.
    """

    def __init__(self, folder: Path) -> None:
        pass

    def begin(self, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        """Begin the run; one that another part of this process began is ended by trackio."""
        self._trackio = import_module("trackio")
        with redirect_stdout(StringIO()):  # what it prints cannot be switched off
            self._run = self._trackio.init(PROJECT, f"{name}-{identity}", config=dict(settings), resume="allow")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log a row."""
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        """End the run."""
        with redirect_stdout(StringIO()):
            self._trackio.finish()


TRACKERS: dict[str, Callable[[Path], Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}
MODULES = {  # of the extras
    "tensorboard": "torch.utils.tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
    "energy": "codecarbon",
}


def refuse_missing(trackers: Sequence[str], energy: bool = False) -> None:
    """Refuse trackers that there aren't, and those, or energy, whose packages are not installed.

    Raises:
        ConfigError: naming all of them.
    """
    problems = [
        must("track", f"name some of {', '.join(TRACKERS)}", name, suggest(name, TRACKERS))
        for name in trackers
        if name not in TRACKERS
    ]
    for extra in [*(name for name in TRACKERS if name in trackers), *(["energy"] if energy else [])]:
        try:
            import_module(MODULES[extra])
        except ImportError as error:
            do = f"Run pip install 'torchcrest[{extra}]'."
            problems.append(must(f"the package for {extra}", "be installed", str(error), do))
    if problems:
        raise ConfigError(problems)


def numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Name the numbers among the values with a prefix; those of mappings inside with two.

    >>> numbers({"event": "check", "rho": 0.25, "passed": True, "of": {"loss": 2}}, "check")
    {'check/rho': 0.25, 'check/passed': 1.0, 'check/of/loss': 2.0}
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            found[f"{prefix}/{name}"] = float(value)
    return found


class Tracking:
    """The trackers of a run. One that fails once the run goes on is left from there on, with a warning."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._trackers = {name: TRACKERS[name](folder) for name in names}
        self._begun: dict[str, Tracker] = {}

    def begin(self, name: str, identity: str, settings: Mapping[str, Any]) -> None:
        """Begin with all of them.

        Raises:
            ConfigError: one cannot begin, say for want of an account; nothing is lost as yet.
        """
        for each, tracker in self._trackers.items():
            try:
                tracker.begin(name, identity, settings)
            except Exception as error:  # whatever another package raises
                self.finish(None)
                raise ConfigError(must(each, "begin", _reason(error), "Mend that, or leave it out.")) from error
            self._begun[each] = tracker

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Log the numbers of metrics lines, named ``event/name``."""
        for record in records:
            values = numbers({name: value for name, value in record.items() if name != "step"}, record["event"])
            self._each(methodcaller("log", values, record["step"]))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End, with the summary's numbers if the run came to its end, named ``summary/name``."""
        if summary is not None:
            self.log([{"event": "summary", "step": summary["steps"], **summary}])
        self._each(methodcaller("finish"))
        self._begun.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._begun.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._begun[name]
                about = f"{name} failed ({_reason(error)}) and is left out from here on; the run and its files go on."
                warnings.warn(about, stacklevel=2)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
