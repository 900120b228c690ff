"""Cheaper curvature: fewer examples, fewer layers, no second derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conftest import (
    SMALL,
    Blobs,
    M,
    Net,
    batch,
    coreset_of,
    drain,
    events,
    generator,
    make_crest,
    make_net,
    meter_of,
    seeded,
    traces,
    train_pass,
)
from test_contract import TOTAL, Job, assert_same_outcome
from test_measure_models import MODELS, Attention
from torchcrest import ConfigError, Crest
from torchcrest.active import stream
from torchcrest.config import CurvatureProduct
from torchcrest.measure import last_layers
from torchcrest.objectives import as_objective
from torchcrest.quadratic import gradient_and_curvature
from torchcrest.types import Coreset

PRODUCTS: list[CurvatureProduct] = ["double_backward", "finite_difference"]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def loss_of(model: nn.Module, coreset: Coreset) -> Tensor:
    """Compute the weighted loss the plain way."""
    *inputs, y = coreset.data
    model.eval()
    loss = (F.cross_entropy(model(*inputs), y, reduction="none") * coreset.weights).mean()
    model.train()
    return loss


class TestSample:
    def test_examples_travel_with_data_and_weights(self) -> None:
        weights = torch.rand(10, generator=generator())
        data = {"x": torch.arange(10.0), "name": [f"example {i}" for i in range(10)], "pair": (torch.arange(10) * 2,)}
        coreset = Coreset(torch.arange(100, 120), torch.arange(3, 13), weights / weights.mean(), data)
        drawn = coreset.sample(4, generator())
        kept = (drawn.rows - 3).tolist()
        assert len(set(kept)) == 4
        assert kept == sorted(kept)
        assert drawn.indices.tolist() == [103 + k for k in kept]
        assert drawn.data["x"].tolist() == kept
        assert drawn.data["name"] == [f"example {k}" for k in kept]
        assert drawn.data["pair"][0].tolist() == [2 * k for k in kept]
        assert float(drawn.weights.mean()) == pytest.approx(1, abs=1e-6)
        assert torch.allclose(drawn.weights / drawn.weights[0], weights[kept] / weights[kept[0]])

    def test_any_subset_is_as_likely(self, blobs: Blobs) -> None:
        coreset, signs, rounds = coreset_of(batch(blobs, M)), generator(), 2000
        drawn = torch.cat([coreset.sample(3, signs).rows for _ in range(rounds)]).bincount(minlength=M)
        expected = rounds * 3 / M
        assert (drawn - expected).abs().max() < 5 * (expected * (1 - 3 / M)) ** 0.5

    @pytest.mark.parametrize("size", [None, M, M + 1])
    def test_all(self, blobs: Blobs, size: int | None) -> None:
        coreset = coreset_of(batch(blobs, M))
        assert coreset.sample(size, generator()) is coreset


class TestLayers:
    @pytest.mark.parametrize(
        ("count", "names"),
        [
            (1, ["layers.4.weight", "layers.4.bias"]),
            (2, ["layers.1.weight", "layers.1.bias", "layers.4.weight", "layers.4.bias"]),
        ],
    )
    def test_last_layers(self, count: int, names: list[str]) -> None:
        net = make_net()
        named = {id(p): name for name, p in net.named_parameters()}
        assert [named[id(p)] for p in last_layers(net, count)] == names

    @pytest.mark.parametrize("count", [None, 3, 99])
    def test_all_layers(self, count: int | None) -> None:
        net = make_net()
        assert [id(p) for p in last_layers(net, count)] == [id(p) for p in net.parameters()]

    def test_frozen_layers_do_not_count(self) -> None:
        net = make_net()
        net.layers[4].requires_grad_(False)
        net.layers[1].weight.requires_grad_(False)
        assert [id(p) for p in last_layers(net, 1)] == [id(net.layers[1].bias)]
        assert last_layers(net.requires_grad_(False), 1) == []

    @pytest.mark.parametrize("probe", [True, False])
    @pytest.mark.parametrize("layers", [1, 2])
    def test_gradient_is_that_slice_of_the_whole(self, blobs: Blobs, layers: int, probe: bool) -> None:
        net, coreset = make_net(), coreset_of(batch(blobs, M))
        whole, _ = meter_of(net).differentiate(coreset, None)
        part, _ = meter_of(net, layers=layers).differentiate(coreset, generator() if probe else None)
        assert len(part) == 2 * layers
        assert torch.allclose(flat(part), flat(whole[-2 * layers :]), atol=1e-7)

    @pytest.mark.parametrize("layers", [1, 2])
    def test_curvature_is_that_of_the_layers(self, blobs: Blobs, layers: int) -> None:
        net, coreset = make_net(), coreset_of(batch(blobs, M))
        _, found = meter_of(net, layers=layers).differentiate(coreset, generator())
        _, exact = gradient_and_curvature(lambda: loss_of(net, coreset), last_layers(net, layers), generator())
        assert torch.allclose(flat(found), flat(exact), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("product", PRODUCTS)
    @pytest.mark.parametrize("probe", [True, False])
    def test_what_lies_below_has_no_graph(self, blobs: Blobs, product: CurvatureProduct, probe: bool) -> None:
        net, grads = make_net(norm=False), []
        net.layers[3].register_forward_hook(lambda _module, inputs, _output: grads.append(inputs[0].requires_grad))
        for layers in (1, None):
            meter = meter_of(net, layers=layers, product=product)
            meter.differentiate(coreset_of(batch(blobs, M)), generator() if probe else None)
        half = len(grads) // 2
        assert grads == [False] * half + [True] * half

    def test_tied_parameters(self) -> None:
        """The gradient of a shared weight is that of all its uses."""

        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
                self.head.weight = self.first.weight

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.head(self.middle(self.first(x).tanh()).tanh())
                return out

        model = seeded(Tied)
        coreset = coreset_of((torch.randn(M, 4, generator=generator()), torch.arange(M) % 4))
        whole, _ = meter_of(model).differentiate(coreset, None)
        for product in PRODUCTS:
            meter = meter_of(model, layers=1, product=product)
            assert [id(p) for p in meter.parameters()] == [id(model.first.weight), id(model.head.bias)]
            part, _ = meter.differentiate(coreset, generator())
            assert torch.allclose(flat(part), flat([whole[0], whole[4]]), atol=1e-4)

    @pytest.mark.parametrize("product", PRODUCTS)
    def test_layers_that_the_loss_does_not_depend_on(self, blobs: Blobs, product: CurvatureProduct) -> None:
        class Spare(Net):
            def __init__(self) -> None:
                super().__init__()
                self.spare = nn.Linear(4, 4)

        model = seeded(Spare)
        before = traces(model)
        with pytest.raises(ConfigError, match=r"curvature_layers must reach a layer that the loss .* got 1\. Layers"):
            meter_of(model, layers=1, product=product).differentiate(coreset_of(batch(blobs, M)), generator())
        assert traces(model) == before
        gradient, _ = meter_of(model, layers=2, product=product).differentiate(coreset_of(batch(blobs, M)), generator())
        assert [bool(g.any()) for g in gradient] == [True, True, False, False]


SMOOTH = {name: build for name, build in MODELS.items() if name not in ("bfloat16", "transformer encoder")}


class TestFiniteDifference:
    @pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch.compile's own
    @pytest.mark.parametrize("layers", [None, 1])
    @pytest.mark.parametrize("build", SMOOTH.values(), ids=SMOOTH.keys())
    def test_agrees_with_double_backward(
        self, build: Callable[[], nn.Module], layers: int | None, blobs: Blobs
    ) -> None:
        """In float32 to a thousandth of the whole estimate's norm, in float64 to a millionth."""
        model = seeded(build)
        dtype = next(model.parameters()).dtype
        coreset = coreset_of((blobs.x[:M].to(dtype), blobs.y[:M]))
        exact, found = (
            meter_of(model, layers=layers, product=product).differentiate(coreset, generator()) for product in PRODUCTS
        )
        tolerance = 1e-6 if dtype == torch.float64 else 1e-3
        for a, b in zip(exact, found, strict=True):
            assert [t.shape for t in a] == [t.shape for t in b]
            assert (flat(a) - flat(b)).norm() <= tolerance * flat(a).norm()

    def test_a_model_with_kinks(self, blobs: Blobs) -> None:
        """A transformer encoder's ReLUs."""
        model = seeded(MODELS["transformer encoder"])
        gradient, found = meter_of(model, product="finite_difference").differentiate(
            coreset_of(batch(blobs, M)), generator()
        )
        exact, _ = meter_of(model).differentiate(coreset_of(batch(blobs, M)), None)
        assert (flat(gradient) - flat(exact)).norm() <= 0.02 * flat(exact).norm()
        assert flat(found).isfinite().all()

    def test_low_precision(self, blobs: Blobs) -> None:
        model = seeded(MODELS["bfloat16"])
        coreset = coreset_of((blobs.x[:M].bfloat16(), blobs.y[:M]))
        gradient, found = meter_of(model, product="finite_difference").differentiate(coreset, generator())
        exact, _ = meter_of(model).differentiate(coreset, None)
        assert (flat(gradient) - flat(exact)).norm() <= 0.2 * flat(exact).norm()
        assert flat(found).isfinite().all()

    def test_counts_both_forwards(self, blobs: Blobs) -> None:
        meter = meter_of(make_net(), product="finite_difference")
        meter.differentiate(coreset_of(batch(blobs, M)), None)
        assert meter.differentiated == M
        meter.differentiate(coreset_of(batch(blobs, M)), generator())
        assert meter.differentiated == 3 * M
        assert meter.forwarded == 0

    def test_keeps_fused_attention(self, blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
        fused: list[bool] = []
        attend = F.scaled_dot_product_attention

        def noting(*inputs: Any) -> Tensor:
            fused.append(torch.backends.cuda.flash_sdp_enabled())
            out: Tensor = attend(*inputs)
            return out

        monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
        model, coreset = seeded(Attention), coreset_of(batch(blobs, M))
        meter_of(model, product="finite_difference").differentiate(coreset, generator())
        meter_of(model).differentiate(coreset, generator())
        assert fused == [True, True, False]

    def test_a_loss_without_a_second_derivative(self, blobs: Blobs) -> None:
        def margin(outputs: Tensor, data: Any) -> Tensor:
            return F.multi_margin_loss(outputs, data[-1], p=2, reduction="none")

        def plain(outputs: Tensor, data: Any) -> Tensor:
            right = outputs.gather(1, data[-1].unsqueeze(1))
            others = torch.ones_like(outputs).scatter(1, data[-1].unsqueeze(1), 0)
            return ((1 + outputs - right).clamp(min=0).square() * others).mean(1)

        net, coreset = make_net(), coreset_of(batch(blobs, M))
        with pytest.raises(ConfigError, match=r"curvature must be 'first_order' .* or curvature_product='finite_diff"):
            meter_of(net, objective=as_objective(margin)).differentiate(coreset, generator())
        found, same = (
            meter_of(net, objective=as_objective(loss), product="finite_difference").differentiate(coreset, generator())
            for loss in (margin, plain)
        )
        assert torch.allclose(flat(found[1]), flat(same[1]), rtol=1e-2, atol=1e-2)

    def test_a_kernel_of_ones_own(self, blobs: Blobs) -> None:
        class Tanh(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                y = x.tanh()
                ctx.save_for_backward(y)
                return y

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                (y,) = ctx.saved_tensors
                slope: Tensor = 1 - y * y
                return grad * slope

        class Kernel(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = Tanh.apply(x)  # type: ignore[no-untyped-call]
                return out

        plain, model, coreset = make_net(), make_net(), coreset_of(batch(blobs, M))
        model.layers[2] = Kernel()
        double, exact = (meter_of(net).differentiate(coreset, generator()) for net in (model, plain))
        found = meter_of(model, product="finite_difference").differentiate(coreset, generator())
        # torch drops the second derivative of such a kernel without a word.
        assert not torch.allclose(flat(double[1]), flat(exact[1]), rtol=0.1, atol=0.01)
        assert torch.allclose(flat(found[1]), flat(exact[1]), rtol=1e-3, atol=1e-4)

    def test_both_forwards_draw_the_same_numbers(self, blobs: Blobs) -> None:
        class Noisy(Net):
            def forward(self, x: Tensor, _index: Tensor | None = None) -> Tensor:
                noisy.append(x + torch.randn_like(x))
                return super().forward(noisy[-1])

        noisy: list[Tensor] = []
        meter_of(seeded(Noisy), product="finite_difference").differentiate(coreset_of(batch(blobs, M)), generator())
        assert torch.equal(*noisy)

    def test_checkpointed_activations(self, blobs: Blobs) -> None:
        """They run the model once more while the gradient goes backward."""

        class Checkpointed(Net):
            def forward(self, x: Tensor, _index: Tensor | None = None) -> Tensor:
                hidden: Tensor = checkpoint(self.layers[:3], x, use_reentrant=False)
                out: Tensor = self.layers[3:](hidden)
                return out

        coreset = coreset_of(batch(blobs, M))
        found, plain = (
            meter_of(seeded(build), product="finite_difference").differentiate(coreset, generator())
            for build in (Checkpointed, Net)
        )
        assert torch.allclose(flat(found[1]), flat(plain[1]), rtol=1e-4, atol=1e-5)

    def test_autocast_is_off(self, blobs: Blobs) -> None:
        meter, coreset = meter_of(make_net(), product="finite_difference"), coreset_of(batch(blobs, M))
        plain = meter.differentiate(coreset, generator())
        with torch.autocast("cpu", torch.bfloat16):
            cast = meter.differentiate(coreset, generator())
            assert torch.is_autocast_enabled("cpu")
        assert torch.equal(flat(plain[1]), flat(cast[1]))


VARIANTS: dict[str, dict[str, Any]] = {
    "examples": {"curvature_examples": 5},
    "one example": {"curvature_examples": 1},
    "last layer": {"curvature_layers": 1},
    "last two layers": {"curvature_layers": 2},
    "difference": {"curvature_product": "finite_difference"},
    "all at once": {"curvature_examples": 5, "curvature_layers": 1, "curvature_product": "finite_difference"},
    "rms of several": {"curvature": "rms", "curvature_coresets": 3, "curvature_examples": 5, "curvature_layers": 2},
    "first order": {"curvature": "first_order", "curvature_examples": 5, "curvature_layers": 1},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
class TestCrest:
    def test_trains_and_checks(self, blobs: Blobs, changes: dict[str, Any]) -> None:
        crest = make_crest(make_net(), blobs, config=replace(SMALL, **changes), steps=TOTAL)
        train_pass(crest._meter.model, crest)
        assert {event["passed"] for event in events(crest, "check")} == {True, False}

    def test_resumes_to_the_bit(self, blobs: Blobs, changes: dict[str, Any]) -> None:
        def job() -> Job:
            return Job(make_crest, blobs, config=replace(SMALL, **changes))

        whole = job().run(TOTAL, saving=(steps := [0, 7, 20, 34]))
        for step in steps:
            resumed = job().load(whole.saved[step]).run(TOTAL)
            assert resumed.trace[step:] == whole.trace[step:], step
            assert_same_outcome(resumed, whole)

    def test_leaves_no_trace(self, blobs: Blobs, changes: dict[str, Any]) -> None:
        model = make_net(dropout=0.5)
        model.layers[1].eval()
        for p in model.parameters():
            p.grad = torch.full_like(p, 3.0)
        crest = make_crest(model, blobs, config=replace(SMALL, **changes))
        before = traces(model)
        drain(crest)
        assert crest.stats.checks > 0
        assert traces(model) == before


def begun(blobs: Blobs, **changes: Any) -> Crest:
    """Begin a first region of few steps, whose checks all pass."""
    config = replace(SMALL, tolerance=1e9, interval_scale=2, exclude=False, **changes)
    crest = make_crest(make_net(), blobs, config=config)
    next(iter(crest))
    return crest


def test_gradient_is_that_of_the_drawn_examples(blobs: Blobs) -> None:
    crest = begun(blobs, curvature="first_order", curvature_coresets=2, curvature_examples=5)
    region = crest._region
    assert region is not None
    gradients = []
    for k, coreset in enumerate(region.coresets[:2]):
        kept = torch.randperm(16, generator=stream(0, "examples", 0, k))[:5].sort().values
        x, _, y = coreset.data
        weights = coreset.weights[kept] / coreset.weights[kept].mean()
        few = Coreset(coreset.pool_indices, coreset.rows[kept], weights, (x[kept], y[kept]))
        gradients.append(
            flat(list(torch.autograd.grad(loss_of(crest._meter.model, few), [*crest._meter.parameters()])))
        )
    mean = torch.stack(gradients).mean(0)
    assert events(crest, "region")[0]["gradient_norm"] == pytest.approx(float(mean.norm()), rel=1e-5)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("examples", [None, 5])
def test_examples_forwarded(blobs: Blobs, examples: int | None, product: CurvatureProduct) -> None:
    crest = begun(blobs, curvature_coresets=2, curvature_examples=examples, curvature_product=product)
    pools = len(events(crest, "region")) * (3 + 1) * 48  # three coresets and the check set
    twice = 2 if product == "finite_difference" else 1
    assert crest.stats.examples_forwarded == pools + 2 * (examples or 16) * twice


def test_prediction_sees_the_covered_layers_alone(blobs: Blobs) -> None:
    crest = begun(blobs, curvature="first_order", curvature_layers=1)
    head = last_layers(crest._meter.model, 1)
    region = crest._region
    assert region is not None
    assert [id(p) for p in region.parameters] == [id(p) for p in head]
    gradient, _ = crest._meter.differentiate(region.coresets[0], None)
    anchored = events(crest, "region")[0]["loss"]
    with torch.no_grad():
        for p in crest._meter.model.parameters():
            p.add_(0.01)
    assert crest._quadratic.predict(head) == pytest.approx(anchored + 0.01 * float(flat(gradient).sum()), rel=1e-5)
