"""Every setting trains, so does what people put around a loop; bad input is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from conftest import SMALL, Blobs, Net, events, make_crest, make_net, parameters_of, same, seeded, sgd, train_pass
from torchcrest import ConfigError, Crest, CrestConfig, DataError, Regression

VARIANTS: dict[str, list[Any]] = {
    "curvature": ["rms", "signed", "unsmoothed", "first_order"],
    "curvature_coresets": [1, 2, None],
    "curvature_examples": [1, 5, None],
    "curvature_layers": [1, 2, None],
    "curvature_product": ["double_backward", "finite_difference"],
    "check": ["paired", "none"],
    "proxy": ["outputs", "last_layer"],
    "stratify": [True, False],
    "quotas": ["share", "need"],
    "exclude": [True, False],
    "max_extra_visits": [None, 3],
    "weight_power": [0.0, 0.5, 1.0],
    "measure_mode": ["eval", "batch_statistics"],
    "learned_interval": [1, 0.5],
    "tolerance": [1e-9, 1e9],
    "gradient_decay": [0.0],
    "curvature_decay": [0.0],
    "pool_size": [16, 300],
    "batch_size": [48],
}


def loss_on(model: nn.Module, data: Blobs) -> float:
    model.eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(data.x), data.y))
    model.train()
    return loss


def assert_trains(config: CrestConfig, data: Blobs) -> Crest:
    model = make_net()
    before = loss_on(model, data)
    crest = make_crest(model, data, config=config, steps=40)
    train_pass(model, crest, lr=0.05)
    assert loss_on(model, data) < 0.8 * before
    assert crest.stats.regions == len(events(crest, "region")) > 0
    return crest


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in VARIANTS.items() for value in values],
    ids=lambda value: str(value),
)
def test_each_setting_trains(blobs: Blobs, name: str, value: Any) -> None:
    changes = {name: value, **({"exclude": False} if value == 300 else {})}  # all are needed: it would warn
    crest = assert_trains(replace(SMALL, **changes), blobs)
    assert (crest.stats.checks > 0) == (crest.config.check == "paired")


@pytest.mark.parametrize("curvature", VARIANTS["curvature"])
@pytest.mark.parametrize("check", VARIANTS["check"])
@pytest.mark.parametrize("proxy", VARIANTS["proxy"])
@pytest.mark.parametrize("measure_mode", VARIANTS["measure_mode"])
@pytest.mark.parametrize("stratify", VARIANTS["stratify"], ids=["stratified", "global"])
def test_settings_combine(
    blobs: Blobs, curvature: Any, check: Any, proxy: Any, measure_mode: Any, stratify: bool
) -> None:
    model = make_net()
    changes = {"curvature": curvature, "check": check, "proxy": proxy, "measure_mode": measure_mode}
    crest = make_crest(model, blobs, config=replace(SMALL, **changes, stratify=stratify))
    before = parameters_of(model)
    assert len(train_pass(model, crest)) == 20
    assert not same(parameters_of(model), before)


def test_batches_of_one(blobs: Blobs) -> None:
    model = make_net(norm=False)
    crest = make_crest(model, blobs, config=replace(SMALL, batch_size=1, stratify=False))
    assert [weights for _, weights in train_pass(model, crest, lr=0.01)] == [[1.0]] * 20


def test_default_settings_train() -> None:
    crest = assert_trains(CrestConfig(), Blobs(3000))
    assert len(crest.indices) == 128


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weights_are_cluster_sizes_to_a_power(blobs: Blobs, power: float) -> None:
    def weights(power: float) -> Tensor:
        return next(iter(make_crest(make_net(), blobs, config=replace(SMALL, weight_power=power)))).weights

    expected = weights(1.0).double() ** power

    assert torch.allclose(weights(power).double(), expected / expected.mean(), rtol=1e-6)
    assert len(set(weights(1.0).tolist())) > 1


def test_stratified_batches_have_their_share_of_each_class(blobs: Blobs) -> None:
    """With the pool the whole data set, a batch has the data set's classes up to one."""
    config = CrestConfig(
        batch_size=60, pool_size=300, exclude=False, max_overhead=None, quotas="share", label_noise=None
    )
    crest = make_crest(make_net(), blobs, config=config, steps=3)
    exact = blobs.y.bincount(minlength=4) * 60 / 300
    for (_, _, y), _ in crest:
        assert ((y.bincount(minlength=4) - exact).abs() < 1).all()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def nothing(_: nn.Module) -> None:
    return None


@pytest.mark.parametrize("amp", [True, False], ids=["amp", "float32"])
@pytest.mark.parametrize("optimizer_of", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("before_step", [clip, nothing], ids=["clipped", "unclipped"])
def test_loops_people_write(
    blobs: Blobs,
    amp: bool,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    before_step: Callable[[nn.Module], None],
) -> None:
    model = make_net()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    before = loss_on(model, blobs)

    for (x, _, y), weights in make_crest(model, blobs, steps=60):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            losses = F.cross_entropy(model(x), y, reduction="none")
        (losses * weights).mean().backward()
        before_step(model)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert loss_on(model, blobs) < 0.95 * before


def test_regression() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    model = seeded(lambda: nn.Linear(3, 1))
    config = CrestConfig(batch_size=16, pool_size=48, interval_scale=3, exclude=False)
    crest = Crest(model, TensorDataset(x, y), config, objective=Regression(), steps=150)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for (inputs, target), weights in crest:
        ((model(inputs)[:, 0] - target).square() * weights).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(model.weight[0], torch.tensor([1.0, -2.0, 0.5]), atol=0.05)
    assert crest.stats.regions > 1


def test_loss_of_ones_own(blobs: Blobs) -> None:
    def hinge(outputs: Tensor, batch: Any) -> Tensor:
        right = outputs.gather(1, batch[-1].unsqueeze(1))
        return (1 + outputs - right).clamp(min=0).sum(1)

    model = make_net()
    crest = make_crest(model, blobs, objective=hinge)
    assert len(train_pass(model, crest)) == 20


class TestRefusals:
    def test_pool_larger_than_data(self) -> None:
        with pytest.raises(ConfigError, match=r"pool_size must be at most the 47 examples of the data set, got 48\."):
            make_crest(make_net(), Blobs(47))

    def test_pool_as_large_as_data(self) -> None:
        list(make_crest(make_net(), Blobs(48)))

    def test_pool_smaller_than_batch(self) -> None:
        with pytest.raises(ConfigError, match=r"pool_size must be at least batch_size = 128, got 64\."):
            CrestConfig(pool_size=64)

    @pytest.mark.parametrize("model", [torch.sin, None, Net])
    def test_no_module(self, blobs: Blobs, model: Any) -> None:
        with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, got '\w+'\. Wrap the function"):
            make_crest(model, blobs)

    def test_nothing_to_train(self, blobs: Blobs) -> None:
        with pytest.raises(ConfigError, match="model must have trainable parameters, got 'none'"):
            make_crest(make_net().requires_grad_(False), blobs)

    @pytest.mark.parametrize("config", [{"batch_size": 16}, 128, CrestConfig])
    def test_no_config(self, blobs: Blobs, config: Any) -> None:
        with pytest.raises(ConfigError, match=r"config must be a CrestConfig, got '\w+'\. Write CrestConfig\("):
            make_crest(make_net(), blobs, config=config)

    def test_no_last_layer(self, blobs: Blobs) -> None:
        layer: Any = nn.Tanh()
        with pytest.raises(ConfigError, match=r"last_layer must be a torch\.nn\.Linear, got 'Tanh'"):
            make_crest(make_net(), blobs, last_layer=layer)

    def test_all_at_once(self) -> None:
        model: Any = torch.sin
        with pytest.raises(ConfigError, match=r"(?s)model must be.*pool_size must be"):
            make_crest(model, Blobs(47))

    @pytest.mark.parametrize("objective", [Regression, nn.CrossEntropyLoss, "mse", 3])
    def test_no_objective(self, blobs: Blobs, objective: Any) -> None:
        with pytest.raises(ConfigError, match=r"objective must (be an instance|have outputs, losses and labels)"):
            make_crest(make_net(), blobs, objective=objective)

    def test_prefetching_without_workers(self, blobs: Blobs) -> None:
        with pytest.raises(ConfigError, match="The data loader refuses its settings: prefetch_factor"):
            make_crest(make_net(), blobs, prefetch_factor=2)

    def test_labels_out_of_range(self) -> None:
        with pytest.raises(DataError, match=r"labels must lie in \[0, 4\), the model's 4 outputs, got 5\. Widen"):
            next(iter(make_crest(make_net(), Blobs(classes=6))))

    def test_negative_labels(self, blobs: Blobs) -> None:
        blobs.y[blobs.y == 3] = -1
        with pytest.raises(DataError, match=r"labels must lie in \[0, 4\), the model's 4 outputs, got -1\."):
            next(iter(make_crest(make_net(), blobs)))

    def test_float_labels(self, blobs: Blobs) -> None:
        blobs.y = blobs.y.float()
        with pytest.raises(DataError, match=r"labels must be integers, got 'torch\.float32'\. Use labels\.long\(\)"):
            next(iter(make_crest(make_net(), blobs)))

    def test_mean_loss(self, blobs: Blobs) -> None:
        def mean(outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[-1])

        with pytest.raises(
            DataError, match=r"losses must have shape \(48,\), one an example, got \(\)\. Use reduction="
        ):
            next(iter(make_crest(make_net(), blobs, objective=mean)))

    def test_state_with_other_settings(self, blobs: Blobs) -> None:
        state = make_crest(make_net(), blobs).state_dict()
        other = make_crest(make_net(), blobs, config=replace(SMALL, tolerance=0.5))
        with pytest.raises(
            ValueError, match=r"^tolerance of the checkpoint must be 0\.5, as of this loader, got 0\.05"
        ):
            other.load_state_dict(state)

    def test_state_of_another_model(self, blobs: Blobs) -> None:
        crest = make_crest(make_net(), blobs)
        next(iter(crest))
        with pytest.raises(ValueError, match="The crest state is damaged"):
            make_crest(make_net(norm=False), blobs).load_state_dict(crest.state_dict())

    def test_state_of_another_models_widths(self, blobs: Blobs) -> None:
        crest = make_crest(make_net(classes=4), blobs)
        next(iter(crest))
        with pytest.raises(ValueError, match="The crest state is damaged"):
            make_crest(make_net(classes=5), blobs).load_state_dict(crest.state_dict())
