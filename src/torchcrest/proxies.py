"""Where proxy gradients come from: the model's own forward pass, or something that costs less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchcrest import tree
from torchcrest.config import CrestConfig, counted, steps_of
from torchcrest.errors import ConfigError, DataError, NonFiniteLossError, must
from torchcrest.measure import Meter, device_of, forked, pool_of
from torchcrest.objectives import Projecting
from torchcrest.student import Student, can_learn
from torchcrest.types import Pool, WeightedBatch

__all__ = ["Apprentice", "Auto", "Coarse", "Forward", "History", "source_of"]

NEVER = -1  # when outputs came in that have not come yet


class Forward:
    """The model's own forward pass, and what all sources can be asked for.

    Attributes:
        meter: measures the model.
        blind: hardly any of its losses are the model's, so those of training are needed to tell what is learned.
    """

    blind = False

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    @property
    def meters(self) -> list[tuple[Meter, float]]:
        """The meters besides that of the model itself, and what a forward pass of theirs costs in the model's."""
        return []

    def measure(self, step: int, indices: Tensor, data: Any) -> tuple[Pool, Tensor | None]:
        """Return a pool ``[r]`` with its proxy gradients, at a step.

        Returns:
            The pool, its data on the model's device; and ``[n]`` rows whose losses are the model's own, of
            now (None: all of them).
        """
        return self.meter.measure(indices, data), None

    def note(self, step: int, indices: Tensor, outputs: Tensor) -> None:
        """Take outputs ``[n, ...]`` that the model gave for examples ``[n]``."""

    def learn(self, batch: WeightedBatch, step: int, indices: Tensor) -> float:
        """Take a batch that is handed out. Returns how many examples were trained on, in the model's cost."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


class Coarse(Forward):
    """The model's forward pass over smaller inputs. Their losses say nothing of what is learned."""

    def __init__(self, meter: Meter, resolution: float) -> None:
        super().__init__(meter)
        self.small = Meter(meter.model, meter.objective, replace(meter.how, resolution=resolution))
        self._share = resolution**2

    @property
    def meters(self) -> list[tuple[Meter, float]]:
        """The meter of smaller inputs."""
        return [(self.small, self._share)]

    def measure(self, step: int, indices: Tensor, data: Any) -> tuple[Pool, Tensor | None]:
        """Measure smaller inputs."""
        return self.small.measure(indices, data), torch.empty(0, dtype=torch.int64)


class History(Forward):
    """Each example's last known outputs in float16, and how old they are.

    They come from measurements and from the training loop's own forward passes. Those of training are in
    training mode and from before the step; for selection they serve, and cost nothing.

    Args:
        meter: measures what is not known.
        examples: N.
        age: oldest outputs, in steps, that are still used.
        most: bytes that may be taken.
    """

    blind = True

    def __init__(self, meter: Meter, examples: int, age: int, most: int) -> None:
        super().__init__(meter)
        self._age, self._most = age, most
        self._seen = torch.full((examples,), NEVER, dtype=torch.int32)
        self._outputs: Tensor | None = None
        self._heard: list[tuple[int, Tensor, Tensor]] = []  # not waited for

    def measure(self, step: int, indices: Tensor, data: Any) -> tuple[Pool, Tensor | None]:
        """Forward those of a pool that are not known, or whose outputs are too old."""
        self._gather()
        data = tree.move(data, device_of(self.meter.model))
        seen = self._seen[indices]
        unknown = ((seen == NEVER) | (step - seen > self._age)).nonzero()[:, 0]
        if len(unknown) == len(indices):
            outputs = self.meter.forward(data, len(indices))[0]
            self.note(step, indices, outputs)
        else:
            assert self._outputs is not None
            outputs = self._outputs[indices].float().to(device_of(self.meter.model))
            if len(unknown):
                fresh = self.meter.forward(tree.take(data, unknown), len(unknown))[0]
                self.note(step, indices[unknown], fresh)
                outputs[unknown.to(outputs.device)] = fresh.to(outputs.dtype)
        return pool_of(self.meter.objective, indices, data, outputs), unknown

    def note(self, step: int, indices: Tensor, outputs: Tensor) -> None:
        """Remember outputs; they are copied off the device when they are needed."""
        # A copy: the training loop may go on to change these in place.
        self._heard.append((step, indices, outputs.detach().to(torch.float16, copy=True)))

    def state_dict(self) -> dict[str, Any]:
        """Return what is known."""
        self._gather()
        return {"seen": self._seen.clone(), "outputs": None if self._outputs is None else self._outputs.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what was known."""
        self._heard.clear()
        self._seen.copy_(state["seen"])
        outputs = state["outputs"]
        self._outputs = None if outputs is None else outputs.clone()

    def _gather(self) -> None:
        """Enter what was noted. Waits for the device."""
        for step, indices, outputs in self._heard:
            if self._outputs is None:
                self._outputs = self._room(tuple(outputs.shape[1:]))
            shape, want = tuple(outputs.shape[1:]), tuple(self._outputs.shape[1:])
            if shape != want:
                do = "proxy_source='history' needs outputs of one shape."
                raise DataError(must("outputs", f"have the shape {want} an example, as before", shape, do))
            self._outputs[indices] = outputs.cpu()
            self._seen[indices] = step
        self._heard.clear()

    def _room(self, shape: tuple[int, ...]) -> Tensor:
        examples = len(self._seen)
        need = 2 * examples * torch.Size(shape).numel() + 4 * examples
        if need > self._most:
            want = f"be at least {need}, for {examples} examples with outputs {shape}"
            raise ConfigError(must("history_bytes", want, self._most, "Raise it, or use another proxy_source."))
        return torch.zeros((examples, *shape), dtype=torch.float16)


class Apprentice(Forward):
    """A small model that is trained alongside, on the same batches, and measured in place of the large one.

    Args:
        meter: measures the large one.
        model: the small one; trained in the mode that it is in.
        optimizer: of its parameters; None: SGD at a rate of 0.1 with momentum 0.9.
        seed: of random numbers that the small model draws in training.
        every: steps from one that it is trained in to the next.
        share: what a forward pass costs, in passes of the large one; None: the share of parameters, which is a guess
            that "seconds" does without.
    """

    blind = True

    def __init__(
        self,
        meter: Meter,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        seed: int,
        every: int = 1,
        share: float | None = None,
    ) -> None:
        super().__init__(meter)
        self._every = every
        self._heard: list[tuple[int, Tensor, Tensor]] = []  # losses that were not looked at
        # All of a pool at once: what a small model holds stays in the cache.
        self.small = Meter(model, meter.objective, replace(meter.how, together=None))
        self._optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self._seed = seed
        self._share = _size(model) / max(1, _size(meter.model)) if share is None else share

    @property
    def meters(self) -> list[tuple[Meter, float]]:
        """The small model's."""
        return [(self.small, self._share)]

    def measure(self, step: int, indices: Tensor, data: Any) -> tuple[Pool, Tensor | None]:
        """Measure the small model. Its losses say nothing of what the large one has learned.

        Raises:
            NonFiniteLossError: the small model's loss was NaN or infinite in training.
        """
        self._look()
        pool = self.small.measure(indices, data)
        data = tree.move(pool.data, device_of(self.meter.model))
        return replace(pool, data=data), torch.empty(0, dtype=torch.int64)

    def learn(self, batch: WeightedBatch, step: int, indices: Tensor) -> float:
        """Take a step on a batch that is handed out."""
        if step % self._every:
            return 0.0
        model, objective = self.small.model, self.small.objective
        device = device_of(model)
        data = tree.clone(tree.move(batch.data, device))
        # A seed a step, so that a resumed run draws the same.
        with forked(device, self._seed + step), torch.enable_grad():
            losses = objective.losses(objective.outputs(model, data).float(), data)
            loss = (losses * batch.weights.to(device)).mean()
            self._optimizer.zero_grad()
            loss.backward()
        self._heard.append((step, indices, losses.detach()))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return self._share * len(batch.weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the small model and its optimizer."""
        self._look()
        return {
            "model": tree.clone(dict(self.small.model.state_dict())),
            "optimizer": tree.clone(self._optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.small.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._heard.clear()

    def _look(self) -> None:
        """Refuse losses of training that are not finite. Waits for the device."""
        if self._heard and not torch.stack([losses.sum() for _, _, losses in self._heard]).isfinite().all():
            for step, indices, losses in self._heard:
                bad = ~losses.isfinite().cpu()
                if bad.any():
                    what = "proxy_model's loss", f"in step {step}"
                    raise NonFiniteLossError.about(*what, indices[bad].tolist(), len(bad))
        self._heard.clear()


class Auto(Forward):
    """A small network that fits the first pool, where one can be made; the model's own forward pass, where not.

    Args:
        meter: measures the model in training.
        seed: of the network's first weights.
        counts: the cost of its forward pass, in the model's, will be asked for: count operations.
    """

    def __init__(self, meter: Meter, seed: int, counts: bool = False) -> None:
        super().__init__(meter)
        self._seed, self._counts = seed, counts
        self.chosen: Forward | None = None

    @property
    def blind(self) -> bool:  # type: ignore[override]
        """Whether what was chosen is."""
        return self.chosen is not None and self.chosen.blind

    @property
    def meters(self) -> list[tuple[Meter, float]]:
        """Those of what was chosen."""
        return self.chosen.meters if self.chosen else []

    def measure(self, step: int, indices: Tensor, data: Any) -> tuple[Pool, Tensor | None]:
        """Measure what was chosen; choose, before the first pool."""
        if self.chosen is None:
            data = tree.move(data, device_of(self.meter.model))
            self.chosen = self._choose(data, min(2, len(indices)))
        return self.chosen.measure(step, indices, data)

    def learn(self, batch: WeightedBatch, step: int, indices: Tensor) -> float:
        """Train the small network, if there is one."""
        return self.chosen.learn(batch, step, indices) if self.chosen else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what was chosen, and its state."""
        if self.chosen is None:
            return {}
        small = isinstance(self.chosen, Apprentice)
        share = self.chosen.meters[0][1] if small else None
        return {"small": small, "share": share, "state": self.chosen.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.chosen = None
        if state:
            self.chosen = Forward(self.meter)
            if state["small"]:
                saved = state["state"]["model"]
                student = Student(len(saved["mean"]), len(saved["head.bias"]), self._seed)
                self.chosen = self._apprentice(student.to(device_of(self.meter.model)), state["share"])
            self.chosen.load_state_dict(state["state"])

    def _choose(self, data: Any, some: int) -> Forward:
        """Choose by what the model gives for some examples of a pool; two, where there may be statistics of a batch."""
        if isinstance(self.meter.objective, Projecting):
            return Forward(self.meter)
        first = tree.part(data, 0, some)
        outputs, large = self._count(lambda: self.meter.forward(first, some)[0])
        if not can_learn(self.meter.objective, data, outputs):
            return Forward(self.meter)
        student = Student.of(data, outputs.shape[1], self._seed)
        small = self._count(lambda: self.meter.objective.outputs(student, first))[1]
        return self._apprentice(student, small / large if small and large else None)

    def _count(self, call: Callable[[], Tensor]) -> tuple[Tensor, int]:
        """Return what a call returns, and the floating-point operations of its matrix products; 0: not counted."""
        with torch.no_grad():
            if not self._counts:
                return call(), 0
            with FlopCounterMode(display=False) as counter:
                return call(), counter.get_total_flops()

    def _apprentice(self, student: Student, share: float | None) -> Apprentice:
        # Trained in every second step it picks as well, for half of what costs most (benchmarks).
        return Apprentice(self.meter, student, None, self._seed, every=2, share=share)


def source_of(
    config: CrestConfig,
    meter: Meter,
    examples: int,
    steps: int,
    seed: int,
    model: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
) -> Forward:
    """Return the source that a configuration asks for.

    Args:
        config: the settings.
        meter: measures the model in training.
        examples: N.
        steps: of a pass.
        seed: of the run.
        model: the small one, for ``proxy_source="model"`` or ``"auto"``.
        optimizer: its optimizer, or None.
    """
    sources: dict[str, Callable[[], Forward]] = {
        "forward": lambda: Forward(meter),
        "history": lambda: History(meter, examples, steps_of(config.history_age, steps), config.history_bytes),
        "resolution": lambda: Coarse(meter, config.resolution),
        "auto": lambda: Auto(meter, seed, counted(config)) if config.proxy == "outputs" else Forward(meter),
    }
    if model is not None:
        return Apprentice(meter, model, optimizer, seed)
    return sources[config.proxy_source]()


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
