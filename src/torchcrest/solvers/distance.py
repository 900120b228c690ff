"""Distances between gradients, without building them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["distances"]


def distances(
    left: Tensor,
    right: Tensor,
    left_features: Tensor | None = None,
    right_features: Tensor | None = None,
    *,
    bias: bool = True,
) -> Tensor:
    """Euclidean distances between two sets of gradients.

    With features, the gradients are those of a whole linear layer, the outer products p f^T (and p itself
    for the bias). Their inner products are <p_i, p_j> (<f_i, f_j> + 1), so they are never built.

    Args:
        left: ``[..., n, d]`` gradients with respect to the outputs.
        right: ``[..., k, d]``.
        left_features: ``[..., n, h]`` inputs of the layer, or None for plain distances.
        right_features: ``[..., k, h]``.
        bias: the layer has a bias.

    Returns:
        ``[..., n, k]`` float32 (float64 for float64 gradients).

    >>> distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[5.]])
    """
    left, right = _real(left), _real(right)
    inner = left @ right.mT
    left_square, right_square = left.square().sum(-1), right.square().sum(-1)
    if left_features is not None and right_features is not None:
        f, g = _real(left_features), _real(right_features)
        inner = inner * (f @ g.mT + float(bias))
        left_square = left_square * (f.square().sum(-1) + float(bias))
        right_square = right_square * (g.square().sum(-1) + float(bias))
    # A square root of what is left after cancellation: up to 3e-3 where it should be 0 in float32, so
    # callers that need exact zeros (a medoid and itself) set them.
    squares = left_square.unsqueeze(-1) + right_square.unsqueeze(-2)
    return squares.sub_(inner, alpha=2).clamp_(min=0).sqrt_()


def _real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
