from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchcrest.errors import ConfigError
from torchcrest.train.models import MODELS, build

SHAPES: dict[str, tuple[int, ...]] = {**dict.fromkeys(MODELS, (3, 8, 8)), "conv1d": (1, 40), "mlp": (64,)}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("resnet20", (3, 32, 32), 272_474),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("resnet50", (3, 32, 32), 23_520_842),
        ("cnn", (3, 32, 32), 94_762),
        ("cnn", (1, 28, 28), 94_762 - 2 * 32 * 9),
        ("conv1d", (1, 40), (5 + 1) * 32 + 2 * (3 * 32 + 1) * 32 + (5 * 32 + 1) * 10),
        ("mlp", (1, 8, 8), 65 * 256 + 257 * 256 + 257 * 10),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, ...], parameters: int) -> None:
    assert count(build(name, shape, classes=10, seed=0)) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_maps_a_batch_to_logits_through_body_and_head(name: str) -> None:
    model = build(name, SHAPES[name], classes=7, seed=0)
    head = model.get_submodule("head")
    x = torch.randn(2, *SHAPES[name], generator=torch.Generator().manual_seed(0))
    assert isinstance(head, nn.Linear)
    assert model.training
    assert model(x).shape == (2, 7)
    model.eval()
    assert torch.equal(head(model.get_submodule("body")(x)), model(x))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (4, 5, 9), (1, 4, 4)])
def test_image_models_take_any_image(shape: tuple[int, ...]) -> None:
    for name in ("resnet20", "cnn", "mlp"):
        assert build(name, shape, classes=3, seed=0)(torch.zeros(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 8), (1, 9), (2, 40), (1, 1000)])
def test_conv1d_takes_any_length(shape: tuple[int, ...]) -> None:
    assert build("conv1d", shape, classes=3, seed=0)(torch.zeros(2, *shape)).shape == (2, 3)


def test_resnets_reduce_only_by_stages() -> None:
    # A small-image stem keeps 32 x 32 pixels; three stages end at 8 x 8, four at 4 x 4.
    for name, side in (("resnet20", 8), ("resnet18", 4)):
        body = build(name, (3, 32, 32), classes=10, seed=0).get_submodule("body")
        assert isinstance(body, nn.Sequential)
        assert body[:-2](torch.zeros(2, 3, 32, 32)).shape[2:] == (side, side)


@pytest.mark.parametrize("name", ["resnet20", "cnn", "conv1d", "mlp"])
def test_seeded_and_the_global_random_state_is_left_alone(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(name, SHAPES[name], classes=10, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    with torch.device("meta"):  # the user's default device
        second = build(name, SHAPES[name], classes=10, seed=5)
    other = build(name, SHAPES[name], classes=10, seed=6)
    weights, again, different = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in (first, second, other))
    assert torch.equal(weights, again)
    assert not torch.equal(weights, different)


def test_convolutions_start_from_he_normal() -> None:
    for name in ("resnet20", "conv1d"):
        for layer in build(name, SHAPES[name], classes=10, seed=0).modules():
            if isinstance(layer, nn.Conv1d | nn.Conv2d):
                want = math.sqrt(2 / (layer.out_channels * math.prod(layer.kernel_size)))
                # A sample of n normals has a standard deviation within 5 / sqrt(2 n) of the true one.
                assert abs(layer.weight.std().item() / want - 1) < 5 / math.sqrt(2 * layer.weight.numel())
                assert layer.bias is None or not layer.bias.any()


def test_curvature_can_be_taken() -> None:
    model = build("resnet20", (3, 8, 8), classes=10, seed=0).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), torch.arange(4))
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    product = torch.autograd.grad(torch.cat([g.flatten() for g in gradients]).sum(), parameters)
    assert all(torch.isfinite(p).all() for p in product)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet_20", "Did you mean resnet20?"),
        ("resnet-50", "Did you mean resnet50?"),
        ("transformer", "Known: resnet20, resnet18, resnet50, cnn, conv1d, mlp."),
    ],
)
def test_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=r"model must be one of resnet20, .* mlp, got ") as error:
        build(name, (3, 32, 32), classes=10, seed=0)
    assert str(error.value).endswith(f"got {name!r}. {hint}")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet20", (64,), r"\(channels, height, width\) .* resnet20, got \(64,\)\. Models that fit: mlp\."),
        ("cnn", (1, 40), r"for the model cnn, got \(1, 40\)\. Models that fit: conv1d, mlp\."),
        ("cnn", (1, 3, 40), r"at least 4 pixels .* got \(1, 3, 40\)\. Models that fit: mlp\."),
        ("conv1d", (3, 32, 32), r"\(channels, length\) .* fit: resnet20, resnet18, resnet50, cnn, mlp\."),
        ("mlp", (), r"shape must be one or more sides .* got \(\)\. Models that fit: none\."),
        ("mlp", (3, 0), r"at least 1 for the model mlp, got \(3, 0\)\. Models that fit: none\."),
    ],
)
def test_shape_that_does_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, shape, classes=10, seed=0)


def test_no_classes() -> None:
    with pytest.raises(ConfigError, match=r"classes must be at least 1, got 0\. Count the labels"):
        build("mlp", (4,), classes=0, seed=0)
