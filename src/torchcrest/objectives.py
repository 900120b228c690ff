"""How a batch becomes outputs, per-example losses and, if there are any, class labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcrest.errors import ConfigError, DataError, must

__all__ = [
    "Classification",
    "LossObjective",
    "Objective",
    "Projecting",
    "Regression",
    "Trimming",
    "as_objective",
    "trimmed",
    "without_padding",
]

TARGET_KEYS = ("labels", "label", "targets", "target", "y")


@runtime_checkable
class Objective(Protocol):
    """The one place where CREST learns what a batch and a loss are.

    Write a class with these three methods for batches or losses of your own. They must not draw random
    numbers, and an example's loss must depend on that example's outputs alone.
    """

    def outputs(self, model: nn.Module, data: Any) -> Tensor:
        """Run the model. Returns ``[n, ...]``, an entry an example."""
        ...

    def losses(self, outputs: Tensor, data: Any) -> Tensor:
        """Return the loss of each example, ``[n]``, differentiable in the outputs."""
        ...

    def labels(self, data: Any) -> Tensor | None:
        """Return the class of each example, ``[n]`` integers, or None where there are no classes."""
        ...


@runtime_checkable
class Trimming(Objective, Protocol):
    """An objective that cuts padding off: a batch out of a pool is padded no further than its own longest example."""

    def trimmed(self, data: Any) -> Any:
        """Return the batch without the padding that none of its examples needs. It must not be changed in place."""
        ...


@runtime_checkable
class Projecting(Objective, Protocol):
    """An objective that gives proxy gradients of its own, where outputs are too large or differ in shape.

    ``outputs`` and ``losses`` serve for gradient and curvature of a coreset then, and not for pools.
    """

    def proxies(self, model: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
        """Run the model. Returns losses ``[n]`` and proxy gradients ``[n, d]``, d the same for every batch."""
        ...


def trimmed(objective: Objective, data: Any) -> Any:
    """Return the batch as the objective trims it; as it is if the objective doesn't."""
    return objective.trimmed(data) if isinstance(objective, Trimming) else data


def without_padding(data: Any, *, targets: bool) -> Any:
    """Cut off the tokens at both ends that ``attention_mask`` leaves out for every example.

    All tensors ``[n, tokens, ...]`` of the mask's size are cut, as a collate function would have padded these
    examples alone. Batches without a mask ``[n, tokens]`` stay as they are.

    Args:
        data: the batch.
        targets: whether targets are per token too; else they are left alone, whatever their shape.

    >>> ids, mask = torch.tensor([[5, 6, 0], [7, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    >>> without_padding({"input_ids": ids, "attention_mask": mask}, targets=True)["input_ids"].tolist()
    [[5, 6], [7, 0]]
    """
    mask = data.get("attention_mask") if isinstance(data, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return data
    used = [column for column, needed in enumerate(mask.bool().any(0).tolist()) if needed]
    if not used or used[-1] - used[0] + 1 == mask.shape[1]:
        return data
    cut = {
        name: value[:, used[0] : used[-1] + 1].contiguous()  # models call view()
        for name, value in data.items()
        if isinstance(value, Tensor) and value.shape[:2] == mask.shape and (targets or name not in TARGET_KEYS)
    }
    if not isinstance(data, MutableMapping):
        return {**data, **cut}
    same = copy.copy(data)
    same.update(cut)
    return same


def refuse_outside(target: Tensor, classes: int, ignore_index: int, do: str) -> None:
    """Check that class labels are classes, or ignored.

    Raises:
        DataError: one is not.
    """
    # cross_entropy would say this without the numbers, and on a GPU only after killing the context.
    kept = target[target != ignore_index]
    if kept.numel():
        low, high = int(kept.min()), int(kept.max())
        if low < 0 or high >= classes:
            want = f"lie in [0, {classes}), the model's {classes} outputs"
            raise DataError(must("labels", want, low if low < 0 else high, do))


def split_target(data: Any) -> tuple[Any, Any]:
    """Split a batch into the model's inputs and the target.

    Pairs and longer tuples: the last entry is the target. Mappings: the entry named labels, label,
    targets, target or y.

    Raises:
        DataError: the batch is neither, or has no target.
    """
    if isinstance(data, Mapping):
        for key in TARGET_KEYS:
            if key in data:
                return {k: v for k, v in data.items() if k != key}, data[key]
        raise DataError(
            must(
                "batch",
                f"have one of the keys {', '.join(TARGET_KEYS)}",
                sorted(data),
                "Or pass an objective of your own.",
            )
        )
    if isinstance(data, list | tuple) and len(data) >= 2:
        return tuple(data[:-1]), data[-1]
    raise DataError(
        must(
            "batch",
            "be a tuple (inputs, target) or a mapping",
            type(data).__name__,
            "Or pass an objective of your own.",
        )
    )


def call_model(model: nn.Module, inputs: Any) -> Tensor:
    """Call the model with a tuple's entries or a mapping's keywords; takes ``logits`` where there are some."""
    result = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    result = result.get("logits", result) if isinstance(result, Mapping) else getattr(result, "logits", result)
    if not isinstance(result, Tensor):
        raise DataError(
            must(
                "model",
                "return a tensor or something with logits",
                type(result).__name__,
                "Or pass an objective of your own.",
            )
        )
    return result


@dataclass(frozen=True)
class Classification:
    """Cross-entropy over classes.

    Integer targets ``[n]`` (or ``[n, ...]`` for dense predictions, then an example's loss is the mean
    over its positions that are not ignored), or class probabilities shaped like the outputs. Outputs are
    ``[n, classes, ...]``.

    Attributes:
        ignore_index: target value that contributes neither loss nor gradient.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0

    def outputs(self, model: nn.Module, data: Any) -> Tensor:
        """Return the logits ``[n, classes, ...]``."""
        return call_model(model, split_target(data)[0])

    def losses(self, outputs: Tensor, data: Any) -> Tensor:
        """Return the cross-entropy of each example, ``[n]``.

        Raises:
            DataError: labels are no integers or out of range, or do not fit the outputs' shape.
        """
        target = split_target(data)[1]
        self._validate(outputs, target)
        losses = F.cross_entropy(
            outputs,
            target,
            reduction="none",
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        if losses.dim() == 1:
            return losses
        counted = torch.ones_like(losses) if target.is_floating_point() else (target != self.ignore_index).to(losses)
        return losses.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)

    def labels(self, data: Any) -> Tensor | None:
        """Return the integer labels, the likeliest class of soft targets, or None for dense targets."""
        target = split_target(data)[1]
        if not isinstance(target, Tensor):
            return None
        if target.dim() == 1:
            return target.long()
        return target.argmax(1) if target.dim() == 2 and target.is_floating_point() else None

    def trimmed(self, data: Any) -> Any:
        """Cut off padding by ``attention_mask``, unless predictions are dense: their outputs would differ in shape."""
        mask = data.get("attention_mask") if isinstance(data, Mapping) else None
        if mask is None:
            return data
        target = split_target(data)[1]
        one_each = isinstance(target, Tensor) and target.dim() <= (2 if target.is_floating_point() else 1)
        return without_padding(data, targets=False) if one_each else data

    def _validate(self, outputs: Tensor, target: Any) -> None:
        if not isinstance(target, Tensor):
            raise DataError(must("labels", "be a tensor", type(target).__name__, "Let the collate function make one."))
        if outputs.dim() < 2:
            raise DataError(
                must(
                    "model",
                    "return logits [n, classes]",
                    tuple(outputs.shape),
                    "For one output an example use Regression().",
                )
            )
        if target.is_floating_point():
            if target.shape != outputs.shape:
                raise DataError(
                    must(
                        "labels",
                        "be integers",
                        str(target.dtype),
                        "Use labels.long(), class probabilities shaped like the outputs, or Regression().",
                    )
                )
            return
        want = (outputs.shape[0], *outputs.shape[2:])
        if tuple(target.shape) != want:
            raise DataError(must("labels", f"have shape {want}", tuple(target.shape), "One class an example."))
        do = "Widen the model's output, mend the labels, or set Classification(ignore_index=...)."
        refuse_outside(target, outputs.shape[1], self.ignore_index, do)


@dataclass(frozen=True)
class Regression:
    """Squared error, the mean over each example's outputs. Has no classes, so pools are not stratified."""

    def outputs(self, model: nn.Module, data: Any) -> Tensor:
        """Return the predictions ``[n, ...]``."""
        return call_model(model, split_target(data)[0])

    def losses(self, outputs: Tensor, data: Any) -> Tensor:
        """Return the squared error of each example, ``[n]``.

        Raises:
            DataError: targets and outputs differ in size.
        """
        target = split_target(data)[1]
        if not isinstance(target, Tensor) or target.numel() != outputs.numel():
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise DataError(
                must(
                    "targets",
                    f"have as many entries as the outputs {tuple(outputs.shape)}",
                    got,
                    "One target an output.",
                )
            )
        # Same size, not same shape: [n] against [n, 1] must not broadcast to [n, n].
        return (outputs - target.reshape(outputs.shape).to(outputs.dtype)).square().reshape(len(outputs), -1).mean(1)

    def labels(self, data: Any) -> Tensor | None:
        """Return None: there are no classes."""
        return None

    def trimmed(self, data: Any) -> Any:
        """Cut off padding by ``attention_mask``, unless targets are per token."""
        mask = data.get("attention_mask") if isinstance(data, Mapping) else None
        if mask is None:
            return data
        dense = getattr(split_target(data)[1], "shape", ())[:2] == mask.shape
        return data if dense else without_padding(data, targets=False)


@dataclass(frozen=True)
class LossObjective:
    """An objective around any per-example loss of yours.

    Attributes:
        loss: takes outputs ``[n, ...]`` and the batch, returns ``[n]``.
    """

    loss: Callable[[Tensor, Any], Tensor]

    def outputs(self, model: nn.Module, data: Any) -> Tensor:
        """Call the model with all of the batch but the target."""
        return call_model(model, split_target(data)[0])

    def losses(self, outputs: Tensor, data: Any) -> Tensor:
        """Return the user's loss of each example."""
        return self.loss(outputs, data)

    def labels(self, data: Any) -> Tensor | None:
        """Return integer targets as classes, if that is what the targets are."""
        target = split_target(data)[1]
        whole = isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
        return target.long() if whole else None


def as_objective(objective: Objective | Callable[[Tensor, Any], Tensor] | None) -> Objective:
    """Return an objective: the default for None, a wrapper for a loss function.

    Raises:
        ConfigError: the argument is neither.
    """
    if objective is None:
        return Classification()
    if isinstance(objective, type):
        raise ConfigError(must("objective", "be an instance", objective, f"Write {objective.__name__}()."))
    if isinstance(objective, Objective):
        return objective
    if callable(objective):
        return LossObjective(objective)
    raise ConfigError(
        must(
            "objective",
            "have outputs, losses and labels, or be a function (outputs, batch) -> losses",
            objective,
            "For example torchcrest.Regression().",
        )
    )
