"""What all loaders share: passes of a set number of batches, and one run that goes on through them."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor, nn

from torchcrest.difficulty import Difficulty
from torchcrest.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, must
from torchcrest.feed import Feed
from torchcrest.measure import device_of, synchronize
from torchcrest.objectives import Classification, Objective
from torchcrest.streaming import StreamFeed
from torchcrest.types import Stats, WeightedBatch, no_indices

__all__ = ["FORMAT", "Passes", "Phase"]

FORMAT = 4  # of state_dict; to be raised when an older state can no longer be read

Phase = Literal["training", "selecting", "checking", "curvature"]


class Passes(ABC):
    """A sized loader that carries one run on from pass to pass, and can be stopped and resumed anywhere.

    It has a length and is no DataLoader, so trainers neither read ahead of it nor replace its sampler.

    Attributes:
        examples: in the data set; None for a stream.
        history: what happened, an entry an event, oldest first.
        stats: what selection has cost so far.
        indices: data-set positions of the batch handed out last (of a stream, running numbers), on the CPU.
        difficulty: a record of each example, made of what is observed; None: none is kept.
        on_phase: called when another phase of the work begins, with its name; None: nobody listens.
    """

    method: str
    _feed: Feed | StreamFeed
    _objective: Objective = Classification()

    def __init__(self, model: nn.Module, *, steps: int, seed: int, examples: int | None) -> None:
        problems = []
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            problems.append(
                must(
                    "steps",
                    "be a whole number of at least 1",
                    steps,
                    "It is the number of batches of a pass.",
                )
            )
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            problems.append(must("seed", "be a whole number of at least 0", seed, "Use for example 0."))
        if problems:
            raise ConfigError(problems)
        self.examples = examples
        self.history: list[dict[str, Any]] = []
        self.stats = Stats(active=examples or 0)
        self.indices: Tensor = no_indices()
        self.difficulty: Difficulty | None = None
        self._labels: Tensor | None = None  # of the batch handed out last, where a record is kept
        self.on_phase: Callable[[Phase], None] | None = None
        self._model = model
        self._seed = seed
        self._steps = steps
        self._step = 0  # batches handed out in the run
        self._position = 0  # batches handed out in the pass
        self._resuming = False
        self._warned: set[str] = set()

    def __len__(self) -> int:
        """Count the batches of one pass."""
        return self._steps

    def __iter__(self) -> Iterator[WeightedBatch]:
        """Yield the batches of a pass, or, right after :meth:`load_state_dict`, what is left of it."""
        if not self._resuming:
            self._position = 0
        self._resuming = False
        while self._position < self._steps:
            batch, self.indices = self._next_batch()
            self._step += 1
            self._position += 1
            self.stats.examples_trained += len(batch.weights)
            self._labels = self._objective.labels(batch.data) if self.difficulty else None
            yield batch
        self._position = 0

    def observe(self, losses: Tensor, outputs: Tensor | None = None) -> None:
        """Take what training computed on the batch handed out last; some methods, and :attr:`difficulty`, need it.

        Args:
            losses: ``[batch_size]``, unweighted, in the order of the batch. They are not waited for.
            outputs: ``[batch_size, ...]`` of the model, likewise.
        """
        if self.difficulty:
            self.difficulty.note(self._step, self.indices, losses, outputs, self._labels, training=True)

    def close(self) -> None:
        """End the worker processes now and not when the loader is collected; the next batch starts new ones."""
        self._feed.close()

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to carry the run on: tensors, numbers and strings only.

        Save the model, the optimizer and the schedule beside it. May be called at any time, within the
        loop too: the batch handed out last counts as trained on.
        """
        return {
            **self._identity(),
            "step": self._step,
            "position": self._position,
            "history": [dict(event) for event in self.history],
            "stats": asdict(self.stats),
            **({"difficulty": self.difficulty.state_dict()} if self.difficulty else {}),
            **self._state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Carry on the run that made the state; the next ``iter()`` finishes its pass.

        Raises:
            CheckpointError: the state is no such state, or was made with other data or settings.
        """
        self._refuse_foreign(state)
        try:
            self._load(state)
            if self.difficulty:
                self.difficulty.load_state_dict(state.get("difficulty"))
            self.history = [dict(event) for event in state["history"]]
            self.stats = Stats(**state["stats"])
            self._step, self._position = int(state["step"]), int(state["position"])
        except (CheckpointError, DataError):
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"The {self.method} state is damaged ({type(error).__name__}: {error}). Use an older one."
            ) from error
        self._resuming = True

    @abstractmethod
    def _next_batch(self) -> tuple[WeightedBatch, Tensor]:
        """Return the next batch and its indices. That it is asked for means that the last step is over."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Return the method's own state."""

    @abstractmethod
    def _load(self, state: dict[str, Any]) -> None:
        """Restore the method's own state."""

    @contextmanager
    def _timed(self, phase: Literal["selecting", "checking", "curvature"]) -> Iterator[None]:
        """Put what is done to the account of a phase, on a synchronised device."""
        device, purpose = device_of(self._model), f"seconds_{phase}"
        synchronize(device)
        if self.on_phase:
            self.on_phase(phase)
        start = time.perf_counter()
        try:
            yield
            synchronize(device)
        finally:
            setattr(self.stats, purpose, getattr(self.stats, purpose) + time.perf_counter() - start)
            if self.on_phase:
                self.on_phase("training")

    def _refuse_non_finite(self, indices: Tensor, losses: Tensor) -> None:
        """Stop where a loss is NaN or infinite."""
        bad = ~losses.isfinite()
        if bad.any():
            rows = indices[bad.cpu()].tolist()
            raise NonFiniteLossError.about("loss", f"after step {self._step}", rows, len(bad))

    def _log(self, event: str, **values: Any) -> None:
        self.history.append({"event": event, "step": self._step, **values})

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, UserWarning, stacklevel=5)

    def _identity(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "method": self.method,
            "examples": self.examples,
            "steps": self._steps,
            "seed": self._seed,
            "settings": self._settings(),
        }

    def _refuse_foreign(self, state: Any) -> None:
        """Compare who made the state with who is to load it."""
        if not isinstance(state, Mapping) or "format" not in state or "method" not in state:
            got = sorted(map(str, state))[:8] if isinstance(state, Mapping) else type(state).__name__
            raise CheckpointError(
                must("state", "come from state_dict()", got, "Is it another library's, or the model's?")
            )
        if state["format"] != FORMAT:
            raise CheckpointError(
                must(
                    "state",
                    f"have format {FORMAT}",
                    state["format"],
                    "Resume with the version that wrote it.",
                )
            )
        own = self._identity()
        problems = [
            must(
                f"{name} of the checkpoint",
                f"be {own[name]!r}, as of this loader",
                state.get(name),
                "Resume with what it was made with."
                + (" None stands for a stream." if None in (own[name], state.get(name)) else ""),
            )
            for name in ("method", "examples", "steps", "seed")
            if state.get(name) != own[name]
        ]
        saved = state.get("settings") or {}
        for name in sorted({*own["settings"], *saved}):
            if own["settings"].get(name) != saved.get(name):
                want = f"be {own['settings'].get(name)!r}, as of this loader"
                problems.append(
                    must(f"{name} of the checkpoint", want, saved.get(name), "Resume with the same settings.")
                )
        if problems:
            raise CheckpointError("\n".join(problems))
