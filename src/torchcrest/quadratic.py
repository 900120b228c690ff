"""The loss as a quadratic around the parameters at the start of a region (steps 4 and 6; Eqs. 5 to 9)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from torchcrest.config import Curvature

__all__ = ["QuadraticModel", "gradient_and_curvature", "gradient_and_difference", "relative_error"]


def gradient_and_curvature(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], generator: torch.Generator | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Differentiate a loss once, and a second time along one random direction.

    Hutchinson's estimate of the Hessian's diagonal is z * (H z) with z of independent signs; its mean is
    diag(H), exactly so for every z where H is diagonal (Bekas, Kokiopoulou and Saad, 2007). Neither ``.grad``
    nor hooks that fill it are touched. Parameters outside the graph count as zero.

    Args:
        loss: computes the scalar loss, eagerly (fused attention has no second derivative).
        parameters: what to differentiate with respect to.
        generator: of z, on the parameters' device; None: no curvature, an empty list.

    Returns:
        gradient and estimate, a tensor like each parameter.
    """
    second = generator is not None
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), parameters, create_graph=second, materialize_grads=True)
        if not second:
            return [g.detach() for g in gradients], []
        signs = _signs(parameters, generator)
        # A loss linear in a parameter gives a gradient without a graph: its second derivative is zero.
        curved = [(g, z) for g, z in zip(gradients, signs, strict=True) if g.requires_grad]
        if curved:
            outputs, along = zip(*curved, strict=True)
            products = torch.autograd.grad(outputs, parameters, along, materialize_grads=True)
        else:
            products = tuple(torch.zeros_like(p) for p in parameters)
    return [g.detach() for g in gradients], [z.mul_(hz) for z, hz in zip(signs, products, strict=True)]


def gradient_and_difference(
    gradient: Callable[[Sequence[Tensor]], Sequence[Tensor]], parameters: Sequence[Tensor], generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Estimate the same as `gradient_and_curvature` from two gradients, without a second derivative.

    With a = g(w + eps z) and b = g(w - eps z), (a - b) / (2 eps) is H z, and (a + b) / 2 is g(w), both up to
    O(eps^2); exactly so where the loss is quadratic. One step serves both, so two evaluations do.

    eps = u^(1/3) (1 + ||w||) / ||z||, with u the machine precision of the parameters: the power balances what
    rounding and curvature's own change add to a central difference (Nocedal and Wright, Numerical Optimization,
    2006, section 8.1), and the step eps z is that small relative to w as a whole (Andrei, 2009). A kink within
    that step (ReLU, max-pooling) counts as curvature, which to a second derivative it is not.

    Args:
        gradient: computes the gradient of the loss at tensors given in the parameters' stead. If it draws random
            numbers, then the same each time.
        parameters: around which to differentiate; not changed.
        generator: of z, on the parameters' device.

    Returns:
        gradient and estimate, a tensor like each parameter. Synchronises with the device.
    """
    signs = _signs(parameters, generator)
    with torch.no_grad():
        squares = [p.detach().square().sum(dtype=torch.float64).cpu() for p in parameters]
        length = float(torch.stack(squares).sum().sqrt())
    precision = max(torch.finfo(p.dtype).eps for p in parameters)
    step = precision ** (1 / 3) * (1 + length) / sum(p.numel() for p in parameters) ** 0.5

    def at(shift: float) -> Sequence[Tensor]:
        shifted = [p.detach().add(z, alpha=shift).requires_grad_() for p, z in zip(parameters, signs, strict=True)]
        with torch.enable_grad():
            return gradient(shifted)

    ahead, behind = at(step), at(-step)
    pairs = list(zip(ahead, behind, strict=True))
    differences = [(a - b) / (2 * step) for a, b in pairs]
    return [(a + b) / 2 for a, b in pairs], [z * d for z, d in zip(signs, differences, strict=True)]


def _signs(parameters: Sequence[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Draw z: a sign for each entry of each parameter."""
    return [torch.randint(0, 2, p.shape, generator=generator, device=p.device).to(p.dtype) * 2 - 1 for p in parameters]


def relative_error(predicted: Tensor | float, measured: Tensor | float) -> float:
    """Return rho = |predicted - measured| / measured; 0 where both are 0.

    >>> relative_error(1.1, 1.0) < 0.11
    True
    """
    predicted, measured = float(predicted), float(measured)
    difference = abs(predicted - measured)
    return difference / abs(measured) if measured else (torch.inf if difference else 0.0)


class QuadraticModel:
    """F(delta) = L + g . delta + 1/2 delta . (H * delta), with g and the diagonal H smoothed over regions.

    delta is measured: the parameters now minus a snapshot. So the model is right for any optimizer.

    Attributes:
        anchored_loss: L, the loss at the snapshot.
        updates: how many regions have fed g and H.
    """

    def __init__(self, curvature: Curvature, gradient_decay: float, curvature_decay: float) -> None:
        self.curvature = curvature
        self.gradient_decay = 0.0 if curvature == "unsmoothed" else gradient_decay
        self.curvature_decay = 0.0 if curvature == "unsmoothed" else curvature_decay
        self.updates = 0
        self.anchored_loss = 0.0
        self._gradient: list[Tensor] = []
        self._curvature: list[Tensor] = []
        self._snapshot: list[Tensor] = []
        self._shards: list[int] = []  # over how many processes each parameter is spread

    @torch.no_grad()
    def update(self, gradient: Iterable[Tensor], curvature: Iterable[Tensor]) -> None:
        """Add a region's gradient and Hutchinson estimate to the running means.

        Means of squares for ``rms`` (Eq. 9), plain means otherwise.
        """
        gradient = list(gradient)
        self._shards = [_shards(g) for g in gradient]
        gradient = [_local(g).float() for g in gradient]
        curvature = [_local(h).float() for h in curvature]
        if self.curvature == "rms":
            curvature = [h.square() for h in curvature]
        if not self.updates:
            self._gradient = [torch.zeros_like(g) for g in gradient]
            self._curvature = [torch.zeros_like(h) for h in curvature]
        for mean, g in zip(self._gradient, gradient, strict=True):
            mean.lerp_(g, 1 - self.gradient_decay)
        for mean, h in zip(self._curvature, curvature, strict=True):
            mean.lerp_(h, 1 - self.curvature_decay)
        self.updates += 1

    def restart(self) -> None:
        """Forget the running means: other parameters are trained from now on."""
        self.updates = 0

    @torch.no_grad()
    def anchor(self, parameters: Iterable[Tensor], loss: float) -> None:
        """Begin a region: remember the parameters and the loss there."""
        self._snapshot = [_local(p.detach()).clone() for p in parameters]
        self.anchored_loss = loss

    @torch.no_grad()
    def predict(self, parameters: Iterable[Tensor]) -> float:
        """Return F at the given parameters. Synchronises with the device.

        Where parameters are sharded, it is the mean over the processes that is F; likewise with the norms' squares.
        """
        terms = []
        undo_g = 1 / (1 - self.gradient_decay**self.updates)
        # One parameter at a time, in place: models are large.
        curvature: Iterable[Tensor | None] = self._diagonal() if self._curved() else repeat(None, len(self._gradient))
        columns = (parameters, self._snapshot, self._gradient, curvature, self._shards)
        for now, then, g, h, shards in zip(*columns, strict=True):
            delta = (_local(now.detach()) - then).float()
            slope = g * undo_g if h is None else h.mul_(delta).mul_(0.5).add_(g, alpha=undo_g)
            terms.append(_sum(slope.mul_(delta)) * shards)
        # Doubles: the loss is compared with itself at delta = 0.
        return self.anchored_loss + _total(terms)

    @torch.no_grad()
    def curvature_norm(self) -> float:
        """Return the Euclidean norm of the smoothed diagonal; 0 without curvature. Synchronises."""
        return self._norm(self._diagonal())

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Return the Euclidean norm of the smoothed gradient. Synchronises."""
        undo = 1 / (1 - self.gradient_decay**self.updates) if self.updates else 0.0
        return undo * self._norm(self._gradient)

    def state_dict(self) -> dict[str, Any]:
        """Return the running means, the snapshot and the anchored loss."""
        return {
            "updates": self.updates,
            "anchored_loss": self.anchored_loss,
            "gradient": [g.clone() for g in self._gradient],
            "curvature": [h.clone() for h in self._curvature],
            "snapshot": [w.clone() for w in self._snapshot],
        }

    def load_state_dict(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Restore a state, each tensor onto the device of its parameter."""
        self._shards = [_shards(p) for p in parameters]
        parameters = [_local(p.detach()) for p in parameters]

        def home(tensors: Sequence[Tensor], like: bool) -> list[Tensor]:
            shapes = [t.shape for t in tensors]
            if shapes and shapes != [p.shape for p in parameters]:
                raise ValueError("the model's parameters have other shapes")
            return [
                t.detach().clone().to(device=p.device, dtype=p.dtype if like else None)
                for t, p in zip(tensors, parameters, strict=False)
            ]

        self.updates = int(state["updates"])
        self.anchored_loss = float(state["anchored_loss"])
        self._gradient = home(state["gradient"], False)
        self._curvature = home(state["curvature"], False)
        self._snapshot = home(state["snapshot"], True)

    def _norm(self, tensors: Iterable[Tensor]) -> float:
        return math.sqrt(_total([_sum(t.square()) * n for t, n in zip(tensors, self._shards, strict=False)]))

    def _curved(self) -> bool:
        return bool(self._curvature) and self.curvature != "first_order" and self.updates > 0

    def _diagonal(self) -> Iterator[Tensor]:
        """Yield the bias-corrected diagonal (Eq. 9 for ``rms``), a new tensor a parameter; nothing without one."""
        if self._curved():
            undo = 1 / (1 - self.curvature_decay**self.updates)
            for h in self._curvature:
                corrected = h * undo
                yield corrected.sqrt_() if self.curvature == "rms" else corrected


def _sum(tensor: Tensor) -> Tensor:
    """Return the sum in doubles, where the device has them."""
    return tensor.sum(dtype=None if tensor.device.type == "mps" else torch.float64)


def _total(terms: Sequence[Tensor]) -> float:
    """Return the sum of scalars; waits once for each device that they are on."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for term in terms:
        by_device.setdefault(term.device, []).append(term)
    return sum(float(torch.stack(some).cpu().double().sum()) for some in by_device.values())


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor (DTensor); any other as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _shards(tensor: Any) -> int:
    """Return over how many processes a tensor is spread; 1: it is whole, or copied."""
    if not hasattr(tensor, "to_local"):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(d) for d, placement in enumerate(tensor.placements) if placement.is_shard())
