"""What is particular to each rival; what they share with CREST is in test_contract.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from conftest import (
    SUBSET,
    Blobs,
    drain,
    events,
    make_craig,
    make_glister,
    make_gradmatch,
    make_infobatch,
    make_net,
    make_random,
    seeded,
    train_pass,
)
from torchcrest import (
    ConfigError,
    Craig,
    CraigConfig,
    DataError,
    Glister,
    GlisterConfig,
    GradMatch,
    GradMatchConfig,
    InfoBatch,
    InfoBatchConfig,
    NonFiniteLossError,
    RandomBatches,
)
from torchcrest.baselines.subset import SubsetLoader
from torchcrest.solvers import match_gradients, medoids

MakeSubset = Callable[..., SubsetLoader[Any]]


@pytest.fixture(params=[make_craig, make_gradmatch, make_glister], ids=["craig", "gradmatch", "glister"])
def make_subset(request: pytest.FixtureRequest) -> MakeSubset:
    make: MakeSubset = request.param
    return make


def linear(features: int = 8, classes: int = 4) -> nn.Linear:
    """A model that is nothing but its last layer, so that gradients can be written down."""
    model: nn.Linear = seeded(lambda: nn.Linear(features, classes))
    return model


class Plain(TensorDataset):
    """The blobs without their indices."""

    def __init__(self, examples: int = 300) -> None:
        blobs = Blobs(examples)
        super().__init__(blobs.x, blobs.y)
        self.x, self.y = blobs.x, blobs.y


def gradients_by_hand(model: nn.Linear, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients with respect to the outputs, and to weight and bias, row by row."""
    with torch.no_grad():
        p = F.softmax(model(x), 1) - F.one_hot(y, 4)
    return p, torch.cat([(p[:, :, None] * x[:, None, :]).flatten(1), p], 1)


def weights_of(loader: SubsetLoader[Any]) -> dict[int, float]:
    return {i: float(loader._weights[i]) for i in loader._chosen.nonzero()[:, 0].tolist()}


class TestSubsets:
    def test_trains_on_the_subset_and_picks_anew(self, make_subset: MakeSubset, blobs: Blobs) -> None:
        model = make_net()
        loader = make_subset(model, blobs, steps=21)
        trace = train_pass(model, loader)
        subsets = [set().union(*(indices for indices, _ in trace[k : k + 7])) for k in (0, 7, 14)]
        size = 54 if make_subset is make_glister else 60
        assert all(len(subset) <= size for subset in subsets)
        assert subsets[0] != subsets[1]
        assert [event["step"] for event in events(loader, "select")] == [0, 7, 14]
        assert [event["examples"] for event in events(loader, "select")] == [size] * 3

    def test_each_selection_forwards_everything_once(self, make_subset: MakeSubset, blobs: Blobs) -> None:
        loader = make_subset(make_net(), blobs, steps=15)
        drain(loader)
        assert loader.stats.examples_forwarded == 3 * 300
        assert loader.stats.seconds_selecting > 0

    def test_all_of_it_is_random_training(self, blobs: Blobs) -> None:
        """The null test: where nothing is left out, order and weights are those of random batches."""
        whole = {**SUBSET, "subset": 1.0}
        models = [make_net() for _ in range(3)]
        craig = Craig(models[0], blobs, CraigConfig(**whole), steps=20)
        glister = Glister(models[1], blobs, GlisterConfig(**whole), steps=20, validation=blobs)
        random = train_pass(models[2], make_random(models[2], blobs))
        assert train_pass(models[0], craig) == random
        assert train_pass(models[1], glister) == random

    def test_classes_keep_their_shares(self, make_subset: MakeSubset, blobs: Blobs) -> None:
        loader = make_subset(make_net(), blobs)
        next(iter(loader))
        picked = blobs.y[loader._chosen].bincount(minlength=4)
        there = blobs.y[loader._candidates].bincount(minlength=4)
        assert (picked / picked.sum() - there / there.sum()).abs().max() < 1 / 54

    def test_does_not_depend_on_how_many_are_measured_together(self, blobs: Blobs) -> None:
        def picked(together: int) -> dict[int, float]:
            loader = Craig(
                make_net(), blobs, CraigConfig(batch_size=16, subset=0.2, measured_together=together), steps=2
            )
            next(iter(loader))
            return weights_of(loader)

        assert picked(300) == picked(7)

    def test_losses_that_are_not_finite_stop_it(self, make_subset: MakeSubset, blobs: Blobs) -> None:
        blobs.x[blobs.y == 2] = torch.nan
        with pytest.raises(NonFiniteLossError, match="loss is NaN or infinite after step 0"):
            next(iter(make_subset(make_net(), blobs)))

    @pytest.mark.parametrize(("subset", "got"), [(8, "8"), (301, "301"), (0.01, "0.01")])
    def test_size_out_of_range(self, make_subset: MakeSubset, blobs: Blobs, subset: Any, got: str) -> None:
        configs = {make_craig: CraigConfig, make_gradmatch: GradMatchConfig, make_glister: GlisterConfig}
        loader = {make_craig: Craig, make_gradmatch: GradMatch, make_glister: Glister}[make_subset]
        config = configs[make_subset](batch_size=16, subset=subset)
        with pytest.raises(ConfigError, match=rf"subset must give from batch_size = 16 to all \d+ examples.*got {got}"):
            loader(make_net(), blobs, config, steps=3)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
            ({"subset": 1.5}, r"subset must be examples \(a whole number\) or a share in \(0, 1\], got 1.5"),
            ({"subset": 0}, "subset must be a whole number of at least 1, got 0"),
            ({"reselect": -0.1}, r"reselect must be steps \(a whole number\) or a share in \(0, 1\], got -0.1"),
            ({"proxy": "output"}, "proxy must be one of outputs, last_layer, got 'output'. Did you mean outputs?"),
            ({"stratify": 1}, "stratify must be True or False, got 1"),
            ({"measured_together": 0}, "measured_together must be a whole number of at least 1"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_config(self, change: dict[str, Any], match: str) -> None:
        for config in (CraigConfig, GradMatchConfig, GlisterConfig):
            with pytest.raises(ConfigError, match=match):
                config(**change)

    def test_config_of_another_method(self, blobs: Blobs) -> None:
        with pytest.raises(ConfigError, match="config must be a CraigConfig, got 'GlisterConfig'"):
            Craig(make_net(), blobs, GlisterConfig(), steps=3)  # type: ignore[arg-type]

    def test_config_names_all_problems(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)batch_size must.*ridge must"):
            GradMatchConfig(batch_size=0, ridge=0)


class TestCraig:
    @pytest.mark.parametrize("proxy", ["outputs", "last_layer"])
    def test_picks_the_medoids_of_all_gradients(self, proxy: Any) -> None:
        data, model = Plain(), linear()
        loader = Craig(model, data, CraigConfig(batch_size=16, subset=60, proxy=proxy), steps=3)
        next(iter(loader))
        gradients = gradients_by_hand(model, data.x, data.y)[proxy == "last_layer"]
        rows, sizes = medoids(gradients[None], 60, data.y[None])
        expected = dict(zip(rows[0].tolist(), (sizes[0] / sizes[0].float().mean()).tolist(), strict=True))
        assert weights_of(loader) == pytest.approx(expected)

    def test_weights_are_those_of_the_examples(self, blobs: Blobs) -> None:
        loader = make_craig(make_net(), blobs)
        for _, weights in loader:
            own = loader._weights[loader.indices]
            assert torch.equal(weights, own / own.mean())

    def test_weight_power(self) -> None:
        loader = Craig(make_net(), Blobs(), CraigConfig(**SUBSET, weight_power=0), steps=3)
        assert all(torch.equal(weights, torch.ones(16)) for _, weights in loader)
        with pytest.raises(ConfigError, match="weight_power must be a number of at least 0, got -1"):
            CraigConfig(weight_power=-1)


class TestGradMatch:
    def test_matches_all_gradients_of_the_last_layer(self) -> None:
        data, model = Plain(), linear()
        loader = GradMatch(model, data, GradMatchConfig(batch_size=16, subset=60), steps=3)
        next(iter(loader))
        whole = gradients_by_hand(model, data.x, data.y)[1]
        rows, weights = match_gradients(whole, 60, data.y)
        found = weights_of(loader)
        assert {int(i): found[int(i)] for i in rows} == pytest.approx(
            dict(zip(rows.tolist(), weights.tolist(), strict=True)), rel=1e-4
        )
        rest = found.keys() - set(rows.tolist())
        assert all(found[i] == 1.0 for i in rest), "those that fill the subset stand for themselves"

    def test_fills_each_class_at_random(self) -> None:
        """Where a class's gradients are all alike, one matches them; the rest is drawn, others each time."""
        data, model = Plain(), linear()
        for p in model.parameters():
            nn.init.zeros_(p)
        config = GradMatchConfig(batch_size=16, subset=60, reselect=1, proxy="outputs", ridge=1e-14)
        loader = GradMatch(model, data, config, steps=2)
        batches = iter(loader)
        fillers = []
        for _ in range(2):
            next(batches)
            found = weights_of(loader)
            assert len(found) == 60
            fillers.append({i for i, weight in found.items() if weight == 1.0})
            assert len(fillers[-1]) == 56
            picked = data.y[loader._chosen].bincount(minlength=4)
            assert (picked - data.y.bincount(minlength=4) * 60 / 300).abs().max() < 1
        assert fillers[0] != fillers[1]

    def test_ridge_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="ridge must be a number above 0, got 0"):
            GradMatchConfig(ridge=0)


class TestGlister:
    def test_picks_as_written_down(self) -> None:
        """Every gradient of the last layer in full, an example at a time, the step taken for real."""
        data, model = Plain(120), linear()
        config = GlisterConfig(batch_size=16, subset=30, rounds=5, step_size=0.05, stratify=False, validation=20)
        loader = Glister(model, data, config, steps=3, seed=3)
        next(iter(loader))
        held = loader._judges
        train = [i for i in range(120) if i not in set(held.tolist())]
        gradients = gradients_by_hand(model, data.x, data.y)[1]
        moved, picked = linear(), []
        for _ in range(5):
            slope = gradients_by_hand(moved, data.x[held], data.y[held])[1].sum(0)
            left = [i for i in train if i not in picked]
            gains = torch.stack([gradients[i] @ slope for i in left])
            picked += [left[k] for k in gains.argsort(descending=True)[:6]]
            step = gradients[picked].sum(0) * config.step_size
            with torch.no_grad():
                moved.weight.copy_(model.weight - step[:32].view(4, 8))
                moved.bias.copy_(model.bias - step[32:])
        assert set(weights_of(loader)) == set(picked)
        assert set(weights_of(loader).values()) == {1.0}

    def test_what_is_held_out_is_never_trained_on(self, blobs: Blobs) -> None:
        model = make_net()
        loader = make_glister(model, blobs, steps=30)
        trained = {i for indices, _ in train_pass(model, loader) for i in indices}
        assert len(loader._judges) == 30
        assert not trained & set(loader._judges.tolist())

    def test_another_seed_holds_out_others(self, blobs: Blobs) -> None:
        one, two = (make_glister(make_net(), blobs, seed=seed)._judges for seed in (1, 2))
        assert not torch.equal(one, two)

    def test_validation_data_of_the_users_own(self, blobs: Blobs) -> None:
        loader = make_glister(make_net(), blobs, validation=Blobs(50, seed=1))
        drain(loader)
        assert loader._candidates.all()
        assert loader.stats.examples_forwarded == 3 * 350

    def test_picks_what_the_validation_data_need(self) -> None:
        """Validation examples of one class only: without stratification their class is picked first."""
        data = Plain()
        config = GlisterConfig(batch_size=16, subset=40, stratify=False, rounds=1)
        judges = TensorDataset(data.x[data.y == 2], data.y[data.y == 2])
        loader = Glister(linear(), data, config, steps=2, validation=judges)
        next(iter(loader))
        assert (data.y[loader._chosen] == 2).float().mean() > 0.9

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"validation": 0.0}, r"validation must be examples .* or a share in \(0, 1\], got 0.0"),
            ({"step_size": 0}, "step_size must be a number above 0, got 0"),
            ({"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
        ],
    )
    def test_config(self, change: dict[str, Any], match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            GlisterConfig(**change)

    @pytest.mark.parametrize("validation", [300, 1.0])
    def test_nothing_left_to_train_on(self, blobs: Blobs, validation: Any) -> None:
        with pytest.raises(ConfigError, match="validation must leave some of the 300 examples to train on"):
            Glister(make_net(), blobs, GlisterConfig(batch_size=16, validation=validation), steps=3)

    def test_validation_data_that_are_none(self, blobs: Blobs) -> None:
        with pytest.raises(DataError, match="validation must hold examples"):
            make_glister(make_net(), blobs, validation=TensorDataset(torch.empty(0, 8)))


class Told:
    """Hands an InfoBatch losses of our choosing and notes what it hands out."""

    def __init__(self, loader: InfoBatch, losses: Tensor) -> None:
        self.epochs: list[list[int]] = []
        self.weights: list[Tensor] = []
        self.rows: list[Tensor] = []
        for _, weights in loader:
            if len(events(loader, "epoch")) > len(self.epochs):
                self.epochs.append([])
            self.epochs[-1] += loader.indices.tolist()
            self.rows.append(loader.indices)
            self.weights.append(weights)
            loader.observe(losses[loader.indices])


class TestInfoBatch:
    # 200 of 320 examples below the mean, which is 0.5: an epoch passes over 100 of them and takes 220.
    LOSSES = torch.where(torch.arange(320) < 200, 0.1, 7 / 6)

    def loader(self, steps: int = 60, **settings: Any) -> InfoBatch:
        return InfoBatch(make_net(), Blobs(320), InfoBatchConfig(batch_size=10, **settings), steps=steps, seed=5)

    def test_ends_its_epochs(self) -> None:
        """The public release never ends one. Whole ones are of 32, then of 22 batches; the last eighth is of all."""
        loader = self.loader(steps=128)
        told = Told(loader, self.LOSSES)
        found = events(loader, "epoch")
        assert [event["step"] for event in found] == [0, 32, 54, 76, 98, 112]
        assert [event["kept"] for event in found] == [320, 220, 220, 220, 220, 320]
        assert [len(epoch) for epoch in told.epochs] == [320, 220, 220, 220, 140, 160]

    def test_an_epoch_takes_no_example_twice(self) -> None:
        told = Told(self.loader(), self.LOSSES)
        assert all(len(set(epoch)) == len(epoch) for epoch in told.epochs)

    def test_passes_over_well_learned_examples_only_others_each_time(self) -> None:
        told = Told(self.loader(steps=128), self.LOSSES)
        for epoch in told.epochs[1:4]:
            assert set(range(200, 320)) <= set(epoch)
        assert len({tuple(sorted(epoch)) for epoch in told.epochs[1:4]}) == 3

    @pytest.mark.parametrize("prune", [0.5, 0.2, 0.9])
    def test_weights_make_up_for_what_is_passed_over(self, prune: float) -> None:
        """Within a batch 1 / (1 - r) to 1; over an epoch every group counts for all its members."""
        loader = self.loader(prune=prune, anneal=0)
        told = Told(loader, self.LOSSES)
        for rows, weights in zip(told.rows[32:44], told.weights[32:44], strict=True):
            well = rows < 200
            assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
            if well.any() and not well.all():
                ratio = float(weights[well][0] / weights[~well][0])
                assert ratio == pytest.approx(1 / (1 - prune), rel=1e-5)
        kept = events(loader, "epoch")[1]["kept"]
        assert (kept - 120) / (1 - prune) == pytest.approx(200)

    def test_prune_nothing_is_random_training(self) -> None:
        """The null test, where batches fill an epoch."""
        data = Blobs(320)
        one, two = make_net(), make_net()
        loader = InfoBatch(one, data, InfoBatchConfig(batch_size=16, prune=0.0, anneal=0), steps=50)
        assert train_pass(one, loader) == train_pass(two, RandomBatches(two, data, 16, steps=50))

    def test_the_end_takes_everything_unweighted(self) -> None:
        loader = self.loader(anneal=9)
        told = Told(loader, self.LOSSES)
        assert events(loader, "epoch")[-1]["step"] == 51
        assert all(torch.equal(weights, torch.ones(10)) for weights in told.weights[51:])
        assert not all(torch.equal(weights, torch.ones(10)) for weights in told.weights[32:51])
        assert len(told.epochs[-1]) == 90

    def test_the_run_may_be_of_several_passes(self) -> None:
        config = InfoBatchConfig(batch_size=10)
        loader = InfoBatch(make_net(), Blobs(320), config, steps=32, total_steps=128)
        for _ in range(4):
            Told(loader, self.LOSSES)
        assert [event["step"] for event in events(loader, "epoch")] == [0, 32, 54, 76, 98, 112]

    def test_goes_by_the_last_loss(self) -> None:
        loader = self.loader()
        Told(loader, self.LOSSES)
        _, kept_before = loader._losses.clone(), events(loader, "epoch")[1]["kept"]
        Told(loader, self.LOSSES.flip(0))
        assert torch.equal(loader._losses[200:], torch.full((120,), 7 / 6)) or kept_before == 220
        assert events(loader, "epoch")[-1]["kept"] == 320, "the pass is over: the end takes everything"

    def test_small_data_keep_a_batch(self) -> None:
        losses = torch.where(torch.arange(20) < 19, 0.0, 9.0)
        loader = InfoBatch(make_net(), Blobs(20), InfoBatchConfig(batch_size=16, prune=0.9, anneal=0), steps=9)
        told = Told(loader, losses)
        assert {event["kept"] for event in events(loader, "epoch")[1:]} == {16}
        assert all(len(rows) == 16 for rows in told.rows)

    def test_not_observed(self, blobs: Blobs) -> None:
        loader = make_infobatch(make_net(), blobs)
        with pytest.raises(ConfigError, match=r"losses must be observed, got .none in a whole epoch.\. Call loader"):
            list(loader)

    def test_losses_of_another_shape(self, blobs: Blobs) -> None:
        loader = make_infobatch(make_net(), blobs)
        next(iter(loader))
        with pytest.raises(DataError, match=r"losses must have shape \(16,\), one an example of the last batch"):
            loader.observe(torch.tensor(1.0))

    def test_losses_that_are_not_finite(self, blobs: Blobs) -> None:
        losses = torch.where(torch.arange(300) == 7, torch.nan, 1.0)
        with pytest.raises(
            NonFiniteLossError, match=r"loss is NaN or infinite up to step 18 for 1 of 288 examples .data-set indices 7"
        ):
            Told(make_infobatch(make_net(), blobs), losses)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
            ({"prune": 1.0}, r"prune must be in \[0, 1\), got 1.0"),
            ({"anneal": -1}, "anneal must be a number of at least 0, got -1"),
            ({"anneal": 1.5}, r"anneal must be steps \(a whole number\) or a share in \[0, 1\], got 1.5"),
        ],
    )
    def test_config(self, change: dict[str, Any], match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            InfoBatchConfig(**change)

    def test_batch_size_above_the_data(self, blobs: Blobs) -> None:
        with pytest.raises(ConfigError, match="batch_size must be at most the 300 examples, got 301"):
            InfoBatch(make_net(), blobs, InfoBatchConfig(batch_size=301), steps=3)
