"""Measuring and differentiating kinds of models, and finding their last layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import Blobs, M, R, batch, coreset_of, generator, make_net, measure, meter_of, seeded
from torchcrest import ConfigError
from torchcrest.objectives import as_objective


class Attention(nn.Module):
    """Attends over the features, each a token, by the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(1, 8), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(x.unsqueeze(-1))).chunk(3, -1)
        out: Tensor = self.head(F.scaled_dot_product_attention(q, k, v).mean(1))
        return out


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.embed(x.unsqueeze(-1))).mean(1))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])
        return out


def compiled() -> Any:
    return torch.compile(make_net(norm=False), backend="eager")


def compiled_inside() -> nn.Module:
    """Compile a layer, and the whole in place, by a backend without second derivatives: no wrapper to look behind."""
    net = make_net(norm=False)
    net.layers[0] = torch.compile(net.layers[0], backend="aot_eager")  # type: ignore[assignment]
    net.compile(backend="aot_eager")
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": make_net,
    "fused attention": Attention,
    "transformer encoder": Encoder,
    "lstm": Recurrent,
    "compiled": compiled,
    "compiled inside": compiled_inside,
    "bfloat16": lambda: make_net(norm=False).bfloat16(),
    "float64": lambda: make_net(norm=False).double(),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch.compile's own
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
class TestModels:
    def data(self, model: nn.Module, blobs: Blobs, rows: int) -> tuple[Tensor, Tensor]:
        return blobs.x[:rows].to(next(model.parameters()).dtype), blobs.y[:rows]

    def test_measure(self, build: Callable[[], nn.Module], blobs: Blobs) -> None:
        model = seeded(build)
        data = self.data(model, blobs, R)
        pool = measure(meter_of(model), data)
        model.eval()
        expected = F.cross_entropy(model(data[0]).float(), data[1], reduction="none").detach()
        assert torch.allclose(pool.losses.float(), expected, rtol=1e-4, atol=1e-5)
        assert pool.gradients.dtype == torch.float32

    def test_differentiate(self, build: Callable[[], nn.Module], blobs: Blobs) -> None:
        """The Hutchinson estimate equals z times a difference of gradients along z, in float64."""
        model = seeded(build)
        coreset = coreset_of(self.data(model, blobs, M))
        gradient, curvature = meter_of(model).differentiate(coreset, generator())
        assert all(t.isfinite().all() for t in (*gradient, *curvature))
        assert sum(float(h.float().norm()) for h in curvature) > 0
        exact = seeded(build)
        exact = getattr(exact, "_orig_mod", exact).double().eval()
        parameters = [p for p in exact.parameters() if p.requires_grad]
        signs = generator()
        zs = [torch.randint(0, 2, p.shape, generator=signs).double() * 2 - 1 for p in parameters]

        def gradient_at(shift: float) -> list[Tensor]:
            with torch.no_grad():
                for p, z in zip(parameters, zs, strict=True):
                    p += shift * z
            with torch.compiler.set_stance("force_eager"):
                outputs = exact(coreset.data[0].double())
            loss = (F.cross_entropy(outputs, coreset.data[1], reduction="none") * coreset.weights).mean()
            gradients = list(torch.autograd.grad(loss, parameters))
            with torch.no_grad():
                for p, z in zip(parameters, zs, strict=True):
                    p -= shift * z
            return gradients

        low = next(model.parameters()).dtype == torch.bfloat16
        tolerance: dict[str, Any] = {"rtol": 0.1, "atol": 0.05} if low else {"rtol": 1e-3, "atol": 1e-4}
        up, down, here = gradient_at(1e-4), gradient_at(-1e-4), gradient_at(0.0)
        for g, h, z, a, b, c in zip(gradient, curvature, zs, up, down, here, strict=True):
            assert torch.allclose(g.double(), c, **tolerance)
            assert torch.allclose(h.double(), z * (a - b) / 2e-4, **tolerance)


class TestLastLayer:
    @pytest.mark.parametrize("bias", [True, False])
    def test_features_are_the_inputs_of_the_last_linear_layer(self, blobs: Blobs, bias: bool) -> None:
        model = seeded(lambda: nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4, bias=bias)))
        pool = measure(meter_of(model, whole_layer=True), batch(blobs))
        assert pool.features is not None
        assert torch.equal(pool.features, model[:2](blobs.x[:R]).detach())
        assert pool.bias is bias

    def test_named_layer(self, blobs: Blobs) -> None:
        class TwoHeads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.head(x)
                self.other(2 * x)
                return out

        model = TwoHeads()
        named = measure(meter_of(model, whole_layer=True, last_layer=model.head), batch(blobs))
        found = measure(meter_of(model, whole_layer=True), batch(blobs))
        assert named.features is not None
        assert found.features is not None
        assert torch.equal(named.features, blobs.x[:R])
        assert torch.equal(found.features, 2 * blobs.x[:R])

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Conv1d(5, 4, 1), nn.Flatten()),
            nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Linear(1, 1), nn.Flatten(), nn.LogSoftmax(1)),
            nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 4, 1), nn.Flatten()),
        ],
        ids=["linear is not last", "linear on tokens", "no linear"],
    )
    def test_unsuitable_model(self, model: nn.Module, blobs: Blobs) -> None:
        if isinstance(model[2], nn.Conv1d):  # type: ignore[index]
            model = nn.Sequential(model[0], nn.Tanh(), nn.Unflatten(1, (5, 1)), *model[2:])  # type: ignore[index]
        with pytest.raises(ConfigError, match=r"proxy must be 'outputs' for this model: .* Crest\(\.\.\., last_layer="):
            measure(meter_of(model, whole_layer=True), (blobs.x[:R], blobs.y[:R] % 4))

    def test_hooks_are_removed(self, blobs: Blobs) -> None:
        model = make_net()
        measure(meter_of(model, whole_layer=True), batch(blobs))
        assert not any(m._forward_hooks for m in model.modules())


def test_a_loss_without_a_second_derivative(blobs: Blobs) -> None:
    def margin(outputs: Tensor, data: Any) -> Tensor:
        return F.multi_margin_loss(outputs, data[-1], reduction="none")

    meter, coreset = meter_of(make_net(), objective=as_objective(margin)), coreset_of(batch(blobs, M))
    with pytest.raises(ConfigError, match=r"curvature must be 'first_order' where the loss .* no second derivative"):
        meter.differentiate(coreset, generator())
    gradient, curvature = meter.differentiate(coreset, None)
    assert all(g.isfinite().all() for g in gradient)
    assert curvature == []


def test_autocast_around_the_whole_loop(blobs: Blobs) -> None:
    """Autocast keeps cast weights; those cast while measuring carry no gradient."""
    model = make_net()
    with torch.autocast("cpu", torch.bfloat16):
        measure(meter_of(model), batch(blobs, R))
        model(blobs.x[:M]).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
