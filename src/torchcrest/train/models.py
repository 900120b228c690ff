"""The networks of the tasks and benchmarks, built by name for the shape of an example.

Every model is a `torch.nn.Sequential` of two named parts: `body`, from the inputs [n, *shape] to features
[n, width], and `head`, one `torch.nn.Linear` from the features to the logits [n, classes].
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchcrest.checks import suggest
from torchcrest.errors import ConfigError, must

__all__ = ["MODELS", "build"]


def build(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Build a model on the CPU; the same seed gives the same weights, whatever was drawn before.

    The global random state is left as it was. Convolutions start from He's normal initialisation (fan out),
    batch norms from the identity, linear layers from PyTorch's default.

    Args:
        name: A key of `MODELS`.
        shape: The shape of one example: (channels, height, width), (channels, length) or (length,).
        classes: The number of logits.
        seed: The seed of the initial weights.

    Returns:
        The model, in training mode. It maps [n, *shape] to [n, classes].

    Raises:
        ConfigError: The name is unknown, the shape doesn't fit the model, or there is no class.

    >>> model = build("resnet20", (3, 32, 32), classes=10, seed=0)
    >>> sum(parameter.numel() for parameter in model.parameters())
    272474
    >>> build("mlp", (64,), classes=10, seed=0)(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """
    if name not in MODELS:
        raise ConfigError(must("model", f"be one of {', '.join(MODELS)}", name, suggest(name, MODELS)))
    if not _SHAPES[name].fit(shape):
        fitting = ", ".join(other for other, shapes in _SHAPES.items() if shapes.fit(shape))
        want = f"be {_SHAPES[name].words} for the model {name}"
        raise ConfigError(must("shape", want, shape, f"Models that fit: {fitting or 'none'}."))
    if classes < 1:
        raise ConfigError(must("classes", "be at least 1", classes, "Count the labels: targets.max() + 1."))
    # torch.manual_seed would reseed the accelerators too, which fork_rng(devices=[]) doesn't restore.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        model = MODELS[name](shape, classes)
        for layer in model.modules():
            if isinstance(layer, nn.Conv1d | nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return model


class _Residual(nn.Module):
    """relu(branch(x) + shortcut(x)); the shortcut projects (1x1 convolution and BN) where shapes differ."""

    def __init__(self, branch: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        same = stride == 1 and inputs == outputs
        self.branch = branch
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        return torch.relu(self.branch(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, as the batch norm after it has one."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _basic(inputs: int, width: int, stride: int) -> _Residual:
    branch = nn.Sequential(_conv(inputs, width, 3, stride), nn.ReLU(), _conv(width, width, 3))
    return _Residual(branch, inputs, width, stride)


def _bottleneck(inputs: int, width: int, stride: int) -> _Residual:
    narrow = nn.Sequential(_conv(inputs, width, 1), nn.ReLU(), _conv(width, width, 3, stride), nn.ReLU())
    return _Residual(nn.Sequential(narrow, _conv(width, 4 * width, 1)), inputs, 4 * width, stride)


def _with_head(body: nn.Sequential, features: int, classes: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict([("body", body), ("head", nn.Linear(features, classes))]))


def _resnet(
    shape: tuple[int, ...],
    classes: int,
    *,
    block: Callable[[int, int, int], _Residual],
    expansion: int,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
) -> nn.Sequential:
    """A ResNet (He et al., 2016) whose stem keeps small images at full size: 3x3, stride 1, no max-pool."""
    channels = widths[0]
    layers: list[nn.Module] = [_conv(shape[0], channels, 3), nn.ReLU()]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for i in range(depth):
            layers.append(block(channels, width, 2 if stage > 0 and i == 0 else 1))
            channels = expansion * width
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return _with_head(body, channels, classes)


def _resnet20(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    return _resnet(shape, classes, block=_basic, expansion=1, widths=(16, 32, 64), depths=(3, 3, 3))


def _resnet18(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    return _resnet(shape, classes, block=_basic, expansion=1, widths=(64, 128, 256, 512), depths=(2, 2, 2, 2))


def _resnet50(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    widths = (64, 128, 256, 512)
    return _resnet(shape, classes, block=_bottleneck, expansion=4, widths=widths, depths=(3, 4, 6, 3))


def _cnn(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Three convolutions, about 95,000 parameters: for 28- to 32-pixel images on a CPU."""
    body = nn.Sequential(
        *(_conv(shape[0], 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(_conv(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(_conv(64, 128, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    return _with_head(body, 128, classes)


def _conv1d(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """The convolutional network of MNIST-1D (Greydanus & Kobak, 2024), with 32 channels in place of 25."""
    channels, length = shape
    body = nn.Sequential(
        *(nn.Conv1d(channels, 32, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv1d(32, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv1d(32, 32, 3, stride=2, padding=1), nn.ReLU()),
        nn.Flatten(),
    )
    return _with_head(body, 32 * math.ceil(length / 8), classes)  # each layer halves the length, rounding up


def _mlp(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    hidden = 256
    body = nn.Sequential(
        *(nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.ReLU()),
        *(nn.Linear(hidden, hidden), nn.ReLU()),
    )
    return _with_head(body, hidden, classes)


MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "resnet20": _resnet20,
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "cnn": _cnn,
    "conv1d": _conv1d,
    "mlp": _mlp,
}
"""Builders by name. They take the shape of an example and the number of classes; `build` adds the seed."""


class _Shapes(NamedTuple):
    """The example shapes that a model takes: in words, and as a test."""

    words: str
    fit: Callable[[tuple[int, ...]], bool]


_ANY = _Shapes("one or more sides of at least 1", lambda shape: len(shape) > 0 and min(shape) >= 1)
_SIGNAL = _Shapes("(channels, length)", lambda shape: len(shape) == 2 and _ANY.fit(shape))
_IMAGE = _Shapes(
    "(channels, height, width) with sides of at least 4 pixels",
    lambda shape: len(shape) == 3 and _ANY.fit(shape) and min(shape[1:]) >= 4,
)
_SHAPES = {name: {"conv1d": _SIGNAL, "mlp": _ANY}.get(name, _IMAGE) for name in MODELS}
