from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import Blobs, M, Net, R, batch, coreset_of, generator, make_net, measure, meter_of, seeded, traces
from torchcrest import Classification, DataError
from torchcrest.config import CurvatureProduct, MeasureMode
from torchcrest.measure import device_of, observing

MODES: list[MeasureMode] = ["eval", "batch_statistics"]
PRODUCTS: list[CurvatureProduct] = ["double_backward", "finite_difference"]


def eager(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Measure the plain way."""
    model.eval()
    with torch.no_grad():
        losses = F.cross_entropy(model(data[0]), data[1], reduction="none")
    model.train()
    return losses


class Noisy(Net):
    """Draws random numbers even in evaluation mode."""

    def forward(self, x: Tensor, _index: Tensor | None = None) -> Tensor:
        return super().forward(x + torch.randn_like(x))


@pytest.mark.parametrize("mode", MODES)
class TestNoTrace:
    @pytest.fixture
    def model(self) -> Net:
        model: Net = seeded(lambda: Noisy(dropout=0.5))
        model.layers[1].eval()
        model.layers.append(nn.BatchNorm1d(4))
        model.layers[-1].register_forward_pre_hook(lambda *_: None)
        for p in model.layers[0].parameters():
            p.grad = torch.ones_like(p)
        model.layers[4].weight.requires_grad_(False)
        return model

    @pytest.mark.parametrize("train", [True, False, None], ids=["train", "eval", "mixed"])
    @pytest.mark.parametrize("whole_layer", [True, False])
    def test_measure(self, model: Net, mode: MeasureMode, train: bool | None, whole_layer: bool, blobs: Blobs) -> None:
        if train is not None:
            model.train(train)
        meter = meter_of(nn.Sequential(model, nn.Linear(4, 4)), mode, whole_layer=whole_layer)
        before = traces(meter.model)
        assert measure(meter, batch(blobs)).losses.shape == (R,)
        assert traces(meter.model) == before

    @pytest.mark.parametrize("probe", [True, False])
    @pytest.mark.parametrize("product", PRODUCTS)
    @pytest.mark.parametrize("layers", [None, 1, 2])
    def test_differentiate(
        self, model: Net, mode: MeasureMode, probe: bool, product: CurvatureProduct, layers: int | None, blobs: Blobs
    ) -> None:
        before = traces(model)
        meter = meter_of(model, mode, product=product, layers=layers)
        meter.differentiate(coreset_of(batch(blobs, M)), generator() if probe else None)
        assert traces(model) == before

    @pytest.mark.parametrize("product", PRODUCTS)
    @pytest.mark.parametrize("layers", [None, 1])
    def test_after_an_error(
        self, model: Net, mode: MeasureMode, product: CurvatureProduct, layers: int | None, blobs: Blobs
    ) -> None:
        before = traces(model)
        meter = meter_of(model, mode, whole_layer=True, product=product, layers=layers)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            measure(meter, (torch.zeros(R, 3), blobs.y[:R]))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            meter.differentiate(coreset_of((torch.zeros(M, 3), blobs.y[:M])), generator())
        assert traces(model) == before

    def test_under_no_grad(self, model: Net, mode: MeasureMode, blobs: Blobs) -> None:
        with torch.no_grad():
            before = traces(model)
            measure(meter_of(model, mode), batch(blobs))
            assert traces(model) == before


class TestModes:
    def test_eval_losses_are_those_of_a_plain_forward(self, blobs: Blobs) -> None:
        model = make_net(dropout=0.5)
        pool = measure(meter_of(model), batch(blobs))
        assert torch.equal(pool.losses, eager(model, batch(blobs)))

    def test_losses_are_per_example(self, blobs: Blobs) -> None:
        """An example's loss does not depend on who else is in the pool."""
        model = make_net()
        whole = measure(meter_of(model), batch(blobs)).losses
        half = measure(meter_of(model), batch(blobs, R // 2), R // 2).losses
        assert torch.allclose(whole[: R // 2], half, rtol=1e-5)

    def test_batch_statistics_are_those_of_a_train_mode_forward(self, blobs: Blobs) -> None:
        model, twin = make_net(), make_net()
        pool = measure(meter_of(model, "batch_statistics"), batch(blobs))
        with torch.no_grad():
            expected = F.cross_entropy(twin(blobs.x[:R]), blobs.y[:R], reduction="none")
        assert torch.equal(pool.losses, expected)
        assert not torch.allclose(pool.losses, measure(meter_of(model), batch(blobs)).losses, rtol=1e-2)

    def test_batch_statistics_leave_a_frozen_layer_frozen(self, blobs: Blobs) -> None:
        model = make_net()
        model.layers[1].eval()
        both = [measure(meter_of(model, mode), batch(blobs)).losses for mode in MODES]
        assert torch.equal(*both)

    def test_dropout_is_inactive(self, blobs: Blobs) -> None:
        for mode in MODES:
            without = measure(meter_of(make_net(), mode), batch(blobs)).losses
            assert torch.equal(measure(meter_of(make_net(dropout=0.9), mode), batch(blobs)).losses, without)

    def test_differentiating_without_dropout(self, blobs: Blobs) -> None:
        for mode in MODES:
            with_, without = (
                meter_of(make_net(dropout=p), mode).differentiate(coreset_of(batch(blobs, M)), generator())
                for p in (0.9, 0.0)
            )
            assert all(torch.equal(a, b) for a, b in zip(with_[0] + with_[1], without[0] + without[1], strict=True))

    def test_flags_inside(self) -> None:
        model = make_net(dropout=0.5)
        with observing(model, "batch_statistics"):
            assert [m.training for m in model.layers] == [False, True, False, False, False]
        with observing(model):
            assert not any(m.training for m in model.modules())
        assert all(m.training for m in model.modules())


class TestMeasure:
    def test_proxy_gradient_is_softmax_minus_onehot(self, blobs: Blobs) -> None:
        model = make_net(norm=False)
        pool = measure(meter_of(model), batch(blobs))
        expected = model(blobs.x[:R]).softmax(1).detach() - F.one_hot(blobs.y[:R], 4)
        assert torch.allclose(pool.gradients, expected, atol=1e-6)
        assert not pool.gradients.requires_grad

    def test_pool(self, blobs: Blobs) -> None:
        indices = torch.arange(5, 5 + R)
        pool = meter_of(make_net()).measure(indices, batch(blobs))
        assert torch.equal(pool.indices, indices)
        assert torch.equal(pool.data[0], blobs.x[:R])
        assert pool.labels is not None
        assert torch.equal(pool.labels, blobs.y[:R])
        assert pool.features is None
        assert pool.losses.dtype == pool.gradients.dtype == torch.float32
        assert not pool.losses.requires_grad

    def test_counts_what_it_forwards(self, blobs: Blobs) -> None:
        meter = meter_of(make_net())
        measure(meter, batch(blobs))
        meter.differentiate(coreset_of(batch(blobs, M)), None)
        assert (meter.forwarded, meter.differentiated) == (R, M)

    def test_gradient_of_a_coreset(self, blobs: Blobs) -> None:
        model = make_net(norm=False)
        coreset = coreset_of(batch(blobs, M))
        gradient, _ = meter_of(model).differentiate(coreset, None)
        (F.cross_entropy(model(blobs.x[:M]), blobs.y[:M], reduction="none") * coreset.weights).mean().backward()
        for g, p in zip(gradient, model.parameters(), strict=True):
            assert p.grad is not None
            assert torch.allclose(g, p.grad, atol=1e-7)

    def test_frozen_parameters_are_left_out(self, blobs: Blobs) -> None:
        model = make_net()
        model.layers[0].requires_grad_(False)
        gradient, curvature = meter_of(model).differentiate(coreset_of(batch(blobs, M)), generator())
        assert [g.shape for g in gradient] == [h.shape for h in curvature] == [(16,), (16,), (4, 16), (4,)]

    def test_a_model_that_changes_its_input_in_place(self, blobs: Blobs) -> None:
        """It must not change the pool, or each look at the same examples sees other data."""

        class InPlace(Net):
            def forward(self, x: Tensor, _index: Tensor | None = None) -> Tensor:
                return super().forward(x.mul_(0.5))

        meter, data = meter_of(seeded(InPlace)), (blobs.x[:R].clone(), blobs.y[:R])
        first = measure(meter, data)
        again = meter.measure(first.indices, first.data)
        assert torch.equal(first.losses, again.losses)


class TestRefusals:
    def test_outputs_without_an_entry_an_example(self, blobs: Blobs) -> None:
        class Short(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x[1:, :4]

        with pytest.raises(DataError, match=r"model outputs must have 40 entries, one an example, got \(39, 4\)"):
            meter_of(Short()).measure(torch.arange(R), batch(blobs))

    def test_loss_of_a_wrong_shape(self, blobs: Blobs) -> None:
        class Mean(Classification):
            def losses(self, outputs: Tensor, data: Any) -> Tensor:
                return super().losses(outputs, data).mean()

        with pytest.raises(
            DataError, match=r"losses must have shape \(40,\), one an example, got \(\)\. Use reduction"
        ):
            measure(meter_of(make_net(), objective=Mean()), batch(blobs))

    def test_labels_of_a_wrong_shape(self, blobs: Blobs) -> None:
        class Pairs(Classification):
            def labels(self, data: Any) -> Tensor | None:
                return torch.zeros(R, 2)

        with pytest.raises(DataError, match=r"class labels must have shape \(40,\), got \(40, 2\)\. Return None from"):
            measure(meter_of(make_net(), objective=Pairs()), batch(blobs))


def test_device_of_a_model_without_tensors() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    assert device_of(nn.BatchNorm1d(1, affine=False, device="meta")) == torch.device("meta")


def test_traces_see_what_they_should() -> None:
    """The oracle of this file, on things that do leave a trace."""
    model = make_net()
    before = traces(model)
    spoilers: list[Callable[[], Any]] = [
        lambda: torch.rand(1),
        lambda: np.random.rand(),  # noqa: NPY002
        random.random,
        lambda: model(torch.ones(2, 8)),
        lambda: model(torch.ones(2, 8)).sum().backward(),
        model.layers[1].eval,
    ]
    for spoil in spoilers:
        spoil()
        after = traces(model)
        assert after != before
        before = after
