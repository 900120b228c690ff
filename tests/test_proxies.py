"""Where proxy gradients come from: what is known, a small model, smaller inputs; and how pools are forwarded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from conftest import (
    BOUNDED,
    Blobs,
    R,
    batch,
    hand_over,
    make_apprentice,
    make_bounded,
    make_history,
    make_net,
    parameters_of,
    same,
    seeded,
    sgd,
    traces,
    train_step,
)
from torchcrest import (
    Classification,
    ConfigError,
    Crest,
    CrestConfig,
    DataError,
    NonFiniteLossError,
    Regression,
    WeightedBatch,
)
from torchcrest.measure import How, Meter
from torchcrest.proxies import Apprentice, Auto, Coarse, History
from torchcrest.student import Student

SHAPE = (1, 8, 8)


def make_cnn(channels: int = 1) -> nn.Module:
    """Build a small convolutional net for images of any side."""

    def build() -> nn.Module:
        layers = [nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    net: nn.Module = seeded(build)
    return net


def images(examples: int = 300) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (examples,), generator=generator)
    x = torch.randn((examples, *SHAPE), generator=generator) + y[:, None, None, None]
    return TensorDataset(x, y)


def meter(how: How | None = None) -> Meter:
    return Meter(make_net(), Classification(), how or How())


class TestForwarding:
    @pytest.mark.parametrize("together", [1, 7, 39, 40, 1000])
    def test_in_parts_is_as_whole(self, blobs: Blobs, together: int) -> None:
        whole = meter().measure(torch.arange(R), batch(blobs))
        parts = meter(How(together=together)).measure(torch.arange(R), batch(blobs))
        torch.testing.assert_close(parts.losses, whole.losses)
        torch.testing.assert_close(parts.gradients, whole.gradients)

    def test_in_parts_of_the_size_asked_for(self, blobs: Blobs) -> None:
        measuring, sizes = meter(How(together=16)), []
        measuring.model.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
        measuring.measure(torch.arange(R), batch(blobs))
        assert sizes == [16, 16, 8]
        assert measuring.forwarded == R

    def test_batch_statistics_are_those_of_the_whole_pool(self, blobs: Blobs) -> None:
        how = How(mode="batch_statistics")
        whole = meter(how).measure(torch.arange(R), batch(blobs))
        parts = meter(replace(how, together=7)).measure(torch.arange(R), batch(blobs))
        assert torch.equal(parts.losses, whole.losses)

    def test_last_layers_inputs_in_parts(self, blobs: Blobs) -> None:
        whole = Meter(make_net(), Classification(), How(), whole_layer=True)
        parts = Meter(make_net(), Classification(), How(together=7), whole_layer=True)
        pools = [measuring.measure(torch.arange(R), batch(blobs)) for measuring in (whole, parts)]
        assert pools[0].features is not None
        assert pools[1].features is not None
        torch.testing.assert_close(pools[1].features, pools[0].features)

    def test_bfloat16_is_near_float32_and_comes_back_as_float32(self, blobs: Blobs) -> None:
        exact = meter().measure(torch.arange(R), batch(blobs))
        rough = meter(How(dtype=torch.bfloat16)).measure(torch.arange(R), batch(blobs))
        assert rough.losses.dtype == rough.gradients.dtype == torch.float32
        assert not torch.equal(rough.losses, exact.losses)
        torch.testing.assert_close(rough.losses, exact.losses, atol=0.03, rtol=0.03)

    def test_float32_even_under_autocast(self, blobs: Blobs) -> None:
        exact = meter().measure(torch.arange(R), batch(blobs))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = meter(How(dtype=torch.float32)).measure(torch.arange(R), batch(blobs))
            as_called = meter().measure(torch.arange(R), batch(blobs))
        assert torch.equal(inside.losses, exact.losses)
        assert not torch.equal(as_called.losses, exact.losses)

    def test_channels_last(self) -> None:
        x, y = images(R).tensors
        formats: list[bool] = []
        model = make_cnn(3)
        model.register_forward_pre_hook(
            lambda _m, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
        x = x.repeat(1, 3, 1, 1)
        last = Meter(model, Classification(), How(channels_last=True)).measure(torch.arange(R), [x, y])
        plain = Meter(make_cnn(3), Classification(), How()).measure(torch.arange(R), [x, y])
        assert formats == [True]
        torch.testing.assert_close(last.losses, plain.losses)

    @pytest.mark.parametrize("how", [How(together=7), How(dtype=torch.bfloat16), How(channels_last=True)])
    def test_leaves_no_trace(self, blobs: Blobs, how: How) -> None:
        measuring = meter(how)
        before = traces(measuring.model)
        measuring.measure(torch.arange(R), batch(blobs))
        assert traces(measuring.model) == before


class TestHistory:
    def make(self, age: int = 9, most: int = 10**6) -> History:
        return History(meter(), 300, age, most)

    def test_what_is_known_is_not_forwarded(self, blobs: Blobs) -> None:
        history = self.make()
        pool, rows = history.measure(0, torch.arange(R), batch(blobs))
        assert rows is not None
        assert rows.tolist() == list(range(R))
        again, rows = history.measure(3, torch.arange(R), batch(blobs))
        assert rows is not None
        assert len(rows) == 0
        assert history.meter.forwarded == R
        torch.testing.assert_close(again.losses, pool.losses, atol=2e-3, rtol=2e-3)  # float16 in between

    def test_only_the_unknown_and_the_old_are_forwarded(self, blobs: Blobs) -> None:
        history, other = self.make(age=5), meter()
        history.note(0, torch.arange(10), torch.zeros(10, 4))
        history.note(4, torch.arange(10, 20), torch.zeros(10, 4))
        pool, rows = history.measure(6, torch.arange(R), batch(blobs))
        assert rows is not None
        assert rows.tolist() == [*range(10), *range(20, R)]
        exact = other.measure(torch.arange(R), batch(blobs))
        torch.testing.assert_close(pool.losses[rows], exact.losses[rows])
        torch.testing.assert_close(pool.losses[10:20], torch.full((10,), float(torch.tensor(4.0).log())))

    def test_the_newest_counts(self, blobs: Blobs) -> None:
        history = self.make()
        history.note(0, torch.arange(R), torch.zeros(R, 4))
        newest = torch.eye(4)[blobs.y[:R]] * 5
        history.note(1, torch.arange(R), newest)
        pool, _ = history.measure(2, torch.arange(R), batch(blobs))
        torch.testing.assert_close(pool.losses, F.cross_entropy(newest, blobs.y[:R], reduction="none"))

    def test_noted_outputs_are_copies(self, blobs: Blobs) -> None:
        history = self.make()
        outputs = torch.zeros(R, 4, dtype=torch.float16)
        history.note(0, torch.arange(R), outputs)
        outputs.fill_(9)
        pool, _ = history.measure(1, torch.arange(R), batch(blobs))
        assert pool.outputs is not None
        assert float(pool.outputs.abs().max()) == 0

    def test_memory_is_bounded(self, blobs: Blobs) -> None:
        need = 300 * 4 * 2 + 300 * 4
        self.make(most=need).measure(0, torch.arange(R), batch(blobs))
        history = self.make(most=need - 1)
        history.measure(0, torch.arange(R), batch(blobs))
        with pytest.raises(ConfigError, match=f"history_bytes must be at least {need}, .*got {need - 1}"):
            history.measure(1, torch.arange(R), batch(blobs))

    def test_outputs_of_another_shape(self, blobs: Blobs) -> None:
        history = self.make()
        history.note(0, torch.arange(3), torch.zeros(3, 4))
        history.note(0, torch.arange(3), torch.zeros(3, 5))
        with pytest.raises(DataError, match=r"outputs must have the shape \(4,\) an example, as before, got \(5,\)"):
            history.measure(1, torch.arange(R), batch(blobs))

    def test_in_training_less_and_less_is_forwarded(self) -> None:
        model, data = make_net(), Blobs()
        loader = make_history(model, data, steps=80)
        optimizer = sgd(model)
        for item in loader:
            train_step(model, optimizer, item, loader)
        forward = make_bounded(make_net(), data, steps=80)
        optimizer = sgd(forward._model)
        for item in forward:
            train_step(forward._model, optimizer, item, forward)
        assert loader.stats.coresets > forward.stats.coresets
        assert loader.stats.forwarded_selecting / loader.stats.coresets < 25  # of pools of 40

    def test_observing_reduced_losses(self, blobs: Blobs) -> None:
        loader = make_history(make_net(), blobs)
        next(iter(loader))
        with pytest.raises(DataError, match=r"losses must have 16 entries, one an example of the last batch, got \(\)"):
            loader.observe(torch.tensor(1.0))
        with pytest.raises(DataError, match=r"outputs must have 16 entries, .* got \(3, 4\)"):
            loader.observe(torch.ones(16), torch.ones(3, 4))


class TestApprentice:
    def test_needs_a_model_and_the_source(self, blobs: Blobs) -> None:
        match = "proxy_model must be given with proxy_source='model', and otherwise only with 'auto', got"
        with pytest.raises(ConfigError, match=f"{match} None"):
            make_bounded(make_net(), blobs, config=replace(BOUNDED, proxy_source="model"))
        with pytest.raises(ConfigError, match=f"{match} 'Net'"):
            make_bounded(make_net(), blobs, proxy_model=make_net())
        with pytest.raises(ConfigError, match=r"proxy_model must be a torch\.nn\.Module, got 'int'"):
            make_bounded(make_net(), blobs, config=replace(BOUNDED, proxy_source="model"), proxy_model=3)

    def test_it_is_trained_on_the_batches_as_a_loop_would(self, blobs: Blobs) -> None:
        small, plain = make_net(3), make_net(3)
        loader = make_bounded(
            make_net(),
            blobs,
            config=replace(BOUNDED, proxy_source="model", max_overhead=None),
            proxy_model=small,
            proxy_optimizer=sgd(small, 0.05),
        )
        optimizer = sgd(plain, 0.05)
        for item in loader:
            train_step(plain, optimizer, item)
        assert same(parameters_of(small), parameters_of(plain))

    @pytest.mark.parametrize("limit", [0.25, 1.0])
    def test_its_training_takes_half_of_what_may_be_spent(self, limit: float, blobs: Blobs) -> None:
        small, steps = make_net(3), 400
        config = replace(BOUNDED, proxy_source="model", max_overhead=limit, overhead_in="counted")
        loader = Crest(make_net(), blobs, config, steps=steps, seed=0, proxy_model=small)
        taught = []
        small.register_forward_hook(lambda *_: taught.append(torch.is_grad_enabled()))
        for _ in loader:
            pass
        # It is as large as the model, so a batch for it is one for the model.
        assert sum(taught) / steps == pytest.approx(limit / 2, rel=0.1)
        spent = loader._account.budget.spent / (steps * BOUNDED.batch_size)
        assert spent == pytest.approx(limit, rel=0.05), "of the whole run: picks are paid for by the steps that follow"
        assert loader.stats.coresets > 0

    def test_pools_that_are_not_finite_are_refused(self, blobs: Blobs) -> None:
        small = make_net(3)
        with torch.no_grad():
            next(small.parameters()).fill_(torch.inf)
        loader = make_bounded(make_net(), blobs, config=replace(BOUNDED, proxy_source="model"), proxy_model=small)
        with pytest.raises(NonFiniteLossError, match=r"loss .*after step 0"):
            next(iter(loader))

    def test_selection_measures_it_and_checks_the_model(self, blobs: Blobs) -> None:
        model, small, counts = make_net(), make_net(3), {"model": 0, "small": 0}

        def count(name: str) -> Any:
            def hook(_m: nn.Module, inputs: Any, _o: Any) -> None:
                counts[name] += 0 if torch.is_grad_enabled() else len(inputs[0])

            return hook

        model.register_forward_hook(count("model"))
        small.register_forward_hook(count("small"))
        config = replace(BOUNDED, proxy_source="model")
        loader = make_bounded(model, blobs, config=config, proxy_model=small)
        optimizer = sgd(model)
        for item in loader:
            train_step(model, optimizer, item)
        assert counts == {"model": loader.stats.forwarded_checking, "small": loader.stats.forwarded_selecting}

    def test_a_loss_that_is_not_finite(self, blobs: Blobs) -> None:
        small = make_net(3)
        apprentice = Apprentice(meter(), small, None, 0)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.fill_(torch.nan)
        x, y = batch(blobs)
        apprentice.learn(WeightedBatch((x, y), torch.ones(R)), 5, torch.arange(R))
        with pytest.raises(NonFiniteLossError, match=r"proxy_model's loss .*in step 5"):
            apprentice.measure(5, torch.arange(R), (x, y))
        with pytest.raises(NonFiniteLossError, match=r"proxy_model's loss .*in step 5"):
            apprentice.state_dict()

    def test_it_may_be_trained_in_some_steps_only(self, blobs: Blobs) -> None:
        small, plain = make_net(3), make_net(3)
        apprentice, optimizer = Apprentice(meter(), small, None, 0, every=3), sgd(plain, 0.1)
        for step in range(1, 8):
            item = WeightedBatch(batch(Blobs(seed=step)), torch.ones(R))
            assert bool(apprentice.learn(item, step, torch.arange(R))) == (step in (3, 6))
            if step in (3, 6):
                train_step(plain, optimizer, item)
        assert same(parameters_of(small), parameters_of(plain))

    def test_random_state_is_the_users(self, blobs: Blobs) -> None:
        loader = make_apprentice(make_net(), blobs)
        before = torch.get_rng_state()
        next(iter(loader))
        assert torch.equal(torch.get_rng_state(), before)


class TestAuto:
    def test_makes_a_small_network_where_it_can(self) -> None:
        auto = Auto(Meter(make_cnn(), Classification(), How()), 0, counts=True)
        x, y = images(R).tensors
        pool, rows = auto.measure(0, torch.arange(R), [x, y])
        assert isinstance(auto.chosen, Apprentice)
        assert rows is not None
        assert len(rows) == 0, "these losses are not the model's"
        small = Student.of([x, y], 4, 0)
        torch.testing.assert_close(pool.gradients, small(x).softmax(1).detach() - F.one_hot(y, 4))
        # 64 inputs to 64 units to 4 classes; 9 weights for each of 6 maps of 8 x 8, and 6 to 4 classes.
        assert auto.meters[0][1] == pytest.approx((64 * 64 + 64 * 4) / (9 * 6 * 64 + 6 * 4))

    def test_measures_the_model_where_it_cannot(self) -> None:
        tokens = torch.randint(9, (R, 5), generator=torch.Generator().manual_seed(0))
        embedding = seeded(lambda: nn.Sequential(nn.EmbeddingBag(9, 6), nn.Linear(6, 4)))
        y = tokens[:, 0] % 4
        auto = Auto(Meter(embedding, Classification(), How()), 0, counts=True)
        pool, rows = auto.measure(0, torch.arange(R), [tokens, y])
        assert rows is None
        assert auto.meters == []
        expected = Meter(embedding, Classification(), How()).measure(torch.arange(R), [tokens, y])
        assert torch.equal(pool.gradients, expected.gradients)

    @pytest.mark.parametrize(
        "changes", [{"proxy": "last_layer"}, {"objective": Regression()}, {"objective": lambda o, b: o.sum(1) ** 2}]
    )
    def test_what_only_the_model_can_tell(self, changes: dict[str, Any]) -> None:
        config = replace(BOUNDED, proxy_source="auto", proxy=changes.get("proxy", "outputs"))
        x = images().tensors[0].flatten(1)
        dataset = TensorDataset(x, x[:, :1])
        model, kw = seeded(lambda: nn.Linear(64, 1)), {"objective": changes.get("objective", Regression())}
        twin = Crest(model, dataset, replace(config, proxy_source="forward"), steps=6, **kw)
        loader = Crest(model, dataset, config, steps=6, **kw)
        for one, other in zip(loader, twin, strict=True):
            assert torch.equal(one.weights, other.weights)
            assert torch.equal(loader.indices, twin.indices)

    def test_takes_a_model_of_yours(self, blobs: Blobs) -> None:
        small = make_net(3)
        config = replace(BOUNDED, proxy_source="auto")
        loader = make_bounded(make_net(), blobs, config=config, proxy_model=small)
        assert isinstance(loader._source, Apprentice)
        assert loader._source.small.model is small


class TestCoarse:
    def test_measures_smaller_inputs(self) -> None:
        x, y = images(R).tensors
        coarse = Coarse(Meter(make_cnn(), Classification(), How()), 0.5)
        pool, rows = coarse.measure(0, torch.arange(R), [x, y])
        assert rows is not None
        assert len(rows) == 0, "these losses are not the model's"
        expected = Meter(make_cnn(), Classification(), How()).measure(torch.arange(R), [F.avg_pool2d(x, 2), y])
        torch.testing.assert_close(pool.gradients, expected.gradients)
        assert torch.equal(pool.data[0], x), "the coreset is of the inputs as they are"

    def test_pools_that_are_not_finite_are_refused(self) -> None:
        model = nn.Sequential(make_cnn(), NotFiniteBelow(1.0))
        config = replace(BOUNDED, proxy_source="resolution")
        with pytest.raises(NonFiniteLossError, match=r"loss .*after step 0"):
            next(iter(Crest(model, images(), config, steps=1)))

    def test_refuses_inputs_without_sides(self, blobs: Blobs) -> None:
        config = replace(BOUNDED, proxy_source="resolution")
        match = "proxy_source must be another than 'resolution' where no input has sides to shrink"
        with pytest.raises(ConfigError, match=match):
            next(iter(make_bounded(make_net(), blobs, config=config)))

    def test_refuses_models_of_one_size(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        config = replace(BOUNDED, proxy_source="resolution")
        match = "proxy_source must be another than 'resolution' for a model that fails on smaller inputs"
        with pytest.raises(ConfigError, match=match):
            next(iter(Crest(model, images(), config, steps=1)))

    def test_same_stream_and_resume(self) -> None:
        config = replace(BOUNDED, proxy_source="resolution")

        def begin() -> tuple[Any, Any, Any]:
            model = make_cnn()
            return model, sgd(model), Crest(model, images(), config, steps=30, seed=0)

        def go(parts: tuple[Any, Any, Any], steps: int) -> list[list[int]]:
            model, optimizer, loader = parts
            seen = []
            for item in loader:
                train_step(model, optimizer, item)
                seen.append(loader.indices.tolist())
                if len(seen) == steps:
                    break
            return seen

        whole = begin()
        stream = go(whole, 30)
        half = begin()
        assert go(half, 13) == stream[:13]
        resumed = begin()
        hand_over(half, resumed)
        assert go(resumed, 17) == stream[13:]
        assert same(parameters_of(resumed[0]), parameters_of(whole[0]))


class NotFiniteBelow(nn.Module):
    """Spoils outputs that are small; nothing that is trained is."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.where(outputs >= self.least, torch.nan)


class Doubled(TensorDataset):
    """A data set that does something of its own."""

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        x, y = (tensor[row] for tensor in self.tensors)
        return 2 * x, y


class TestTensorsInMemory:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_batches_are_those_of_the_default_collate_function(self, workers: int) -> None:
        data = images(100)

        def drain(dataset: Any) -> list[Any]:
            config = CrestConfig(batch_size=8, pool_size=20, max_overhead=None)
            crest = Crest(make_cnn(), dataset, config, steps=4, num_workers=workers)
            return [(type(item.data), [t.tolist() for t in item.data]) for item in crest]

        assert drain(data) == drain([data[row] for row in range(100)])

    def test_a_subclass_is_read_as_it_wants(self) -> None:
        data = images(100)
        config = CrestConfig(batch_size=8, pool_size=20)
        crest = Crest(make_cnn(), Doubled(*data.tensors), config, steps=1)
        (item,) = crest
        assert torch.equal(item.data[0], 2 * data.tensors[0][crest.indices])
