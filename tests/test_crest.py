"""The algorithm inside the loader: what is forwarded, checked, reused, stretched and set aside."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import (
    SMALL,
    Batch,
    Blobs,
    Net,
    events,
    make_crest,
    make_net,
    parameters_of,
    same,
    seeded,
    sgd,
    train_pass,
    train_step,
)
from torchcrest import Crest, CrestConfig, WeightedBatch

ALWAYS, NEVER = 1e9, 1e-12  # tolerances: every check passes, none does (while parameters move)


class Counter:
    """Counts the examples that a model forwards, by why it does."""

    def __init__(self, model: nn.Module) -> None:
        self.measured: list[int] = []
        self.differentiated: list[int] = []
        self.training = 0
        self.busy = False
        model.register_forward_hook(self._count)

    def _count(self, _module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        if self.busy:
            self.training += len(inputs[0])
        else:
            (self.differentiated if torch.is_grad_enabled() else self.measured).append(len(inputs[0]))

    def take(self) -> tuple[list[int], list[int]]:
        """Return measured and differentiated since the last call."""
        taken = self.measured, self.differentiated
        self.measured, self.differentiated = [], []
        return taken


def config(**changes: Any) -> CrestConfig:
    return replace(SMALL, **{"exclude": False, **changes})


@pytest.mark.parametrize("stratify", [True, False])
@pytest.mark.parametrize("check", ["paired", "none"])
def test_null(blobs: Blobs, stratify: bool, check: Any) -> None:
    """With r = m, CREST is a plain loop over random batches, to the bit."""
    model, plain = make_net(), make_net()
    crest = make_crest(model, blobs, config=config(pool_size=16, stratify=stratify, check=check), steps=60)
    optimizer, plain_optimizer = sgd(model), sgd(plain)
    for batch in crest:
        assert torch.equal(batch.weights, torch.ones(16))
        train_step(model, optimizer, batch)
        x, y = blobs.x[crest.indices], blobs.y[crest.indices]
        F.cross_entropy(plain(x), y).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert same(parameters_of(model), parameters_of(plain))
    assert not same(parameters_of(model), parameters_of(make_net()))


class TestCost:
    """Who forwards what. r = 48, m = 16, and P = ceil(1.5 * 4) = 6 coresets a region of 4 steps."""

    def run(self, tolerance: float, steps: int = 20, **changes: Any) -> tuple[list[tuple[list[int], list[int]]], Crest]:
        model = make_net()
        counter, optimizer, taken = Counter(model), sgd(model), []
        changes = {"interval_scale": 4, "curvature": "first_order", **changes}
        crest = make_crest(model, Blobs(), config=config(tolerance=tolerance, **changes), steps=steps)
        for batch in crest:
            taken.append(counter.take())
            counter.busy = True
            train_step(model, optimizer, batch)
            counter.busy = False
        assert crest.stats.examples_forwarded == sum(sum(m) + sum(d) for m, d in taken)
        return taken, crest

    def test_a_check_forwards_exactly_r(self) -> None:
        taken, crest = self.run(ALWAYS)
        assert taken[0] == ([48] * 6 + [48], [16])  # the pools, the check set; one coreset for the curvature
        for step, (measured, differentiated) in enumerate(taken[1:], start=1):
            assert (measured, differentiated) == (([48], []) if step % 4 == 0 else ([], [])), step
        assert crest.stats.checks == 4
        assert crest.stats.regions == 1

    def test_a_failed_checks_measurement_is_the_first_pool(self) -> None:
        taken, crest = self.run(NEVER)
        assert taken[0] == ([48] * 7, [16])
        for step, (measured, differentiated) in enumerate(taken[1:], start=1):
            # The check, five pools more, and a new check set.
            assert (measured, differentiated) == (([48] * (1 + 5 + 1), [16]) if step % 4 == 0 else ([], [])), step
        assert crest.stats.checks == 4
        assert crest.stats.regions == 5

    def test_a_failed_checks_examples_are_those_of_the_first_coreset(self) -> None:
        crest = make_crest(make_net(), Blobs(), config=config(tolerance=NEVER))
        model = crest._meter.model
        optimizer = sgd(model)
        checked: set[int] = set()
        compared = 0
        for batch in crest:
            region = crest._region
            assert region is not None
            if crest._step - 1 == region.begun and checked:
                assert set(region.coresets[0].pool_indices.tolist()) == checked
                compared += 1
            assert region.check_indices is not None
            checked = set(region.check_indices.tolist())
            train_step(model, optimizer, batch)
        assert compared == crest.stats.regions - 1 > 3

    def test_without_check_and_curvature_only_pools(self) -> None:
        taken, crest = self.run(NEVER, check="none")
        assert all(t == (([48] * 6, []) if step % 4 == 0 else ([], [])) for step, t in enumerate(taken))
        assert crest.stats.checks == 0
        assert crest.stats.regions == 5

    @pytest.mark.parametrize(("coresets", "expected"), [(1, 1), (3, 3), (None, 6), (50, 6)])
    def test_curvature_coresets(self, coresets: int | None, expected: int) -> None:
        taken, _ = self.run(ALWAYS, curvature_coresets=coresets, curvature="signed", steps=3)
        assert taken == [([48] * 7, [16] * expected), ([], []), ([], [])]

    def test_gradient_is_the_mean_over_coresets(self, blobs: Blobs) -> None:
        settings = config(curvature="signed", curvature_coresets=3, interval_scale=4)
        crest = make_crest(make_net(), blobs, config=settings)
        next(iter(crest))
        assert crest._region is not None
        gradients = [crest._meter.differentiate(coreset, None)[0] for coreset in crest._region.coresets[:3]]
        mean = [torch.stack(of_one).mean(0) for of_one in zip(*gradients, strict=True)]
        (region,) = events(crest, "region")
        assert region["gradient_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in mean]).norm()), rel=1e-5)

    def test_user_batches_are_not_read_twice(self) -> None:
        class Reads(Blobs):
            reads = 0

            def __getitem__(self, i: int) -> Batch:
                self.reads += 1
                return super().__getitem__(i)

        data = Reads()
        crest = make_crest(make_net(), data, config=config(tolerance=ALWAYS, interval_scale=4))
        list(crest)
        assert data.reads == 7 * 48


class TestChecks:
    @pytest.mark.parametrize("measure_mode", ["eval", "batch_statistics"])
    @pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
    def test_rho_is_zero_where_nothing_moved(self, blobs: Blobs, norm: bool, measure_mode: Any) -> None:
        """Paired: the same examples, mode and weighting, so nothing but the displacement counts."""
        model = make_net(dropout=0.5, norm=norm)
        if norm:
            normalisation = model.layers[1]
            assert isinstance(normalisation, nn.BatchNorm1d)
            normalisation.momentum = 0.0  # running statistics are part of the model, and would move
        crest = make_crest(model, blobs, config=config(tolerance=NEVER, measure_mode=measure_mode))
        train_pass(model, crest, lr=0.0)
        checks = events(crest, "check")
        assert len(checks) == 6
        assert [(check["rho"], check["passed"]) for check in checks] == [(0.0, True)] * 6
        assert crest.stats.regions == 1

    def test_history_of_checks(self, blobs: Blobs) -> None:
        model = make_net()
        crest = make_crest(model, blobs, steps=60)
        train_pass(model, crest)
        checks = events(crest, "check")
        assert {check["passed"] for check in checks} == {True, False}
        for check in checks:
            assert check["rho"] == abs(check["predicted"] - check["loss"]) / check["loss"]
            assert check["passed"] == (check["rho"] <= SMALL.tolerance)
        assert len(checks) == crest.stats.checks
        failed = [check["step"] for check in checks if not check["passed"]]
        assert [region["step"] for region in events(crest, "region")] == [0, *failed]

    def test_check_loss_is_that_of_the_check_set(self, blobs: Blobs) -> None:
        model = make_net(dropout=0.5)
        crest, optimizer, compared = make_crest(model, blobs, config=config(tolerance=ALWAYS)), sgd(model), 0
        for batch in crest:
            region = crest._region
            assert region is not None
            assert region.check_indices is not None
            if crest.history[-1]["event"] == "check" and crest.history[-1]["step"] == crest._step - 1:
                rows = region.check_indices
                with torch.no_grad():
                    model.eval()
                    expected = F.cross_entropy(model(blobs.x[rows]), blobs.y[rows])
                    model.train()
                assert crest.history[-1]["loss"] == pytest.approx(float(expected), rel=1e-6)
                compared += 1
            train_step(model, optimizer, batch)
        assert compared == 6

    def test_displacement_is_measured(self, blobs: Blobs) -> None:
        """Parameters set by hand, by no optimizer's step, are seen as what they are."""
        model = make_net(norm=False)
        crest = make_crest(model, blobs, config=config(curvature="first_order", tolerance=ALWAYS, interval_scale=2))
        batches = iter(crest)
        next(batches)
        meter, region = crest._meter, crest._region
        assert region is not None
        gradient, _ = meter.differentiate(region.coresets[0], None)
        loss = float(meter.measure(region.check_indices, region.check_data).losses.mean())  # type: ignore[arg-type]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
        next(batches)
        next(batches)
        (check,) = events(crest, "check")
        expected = loss + 0.01 * sum(float(g.double().sum()) for g in gradient)
        assert check["predicted"] == pytest.approx(expected, rel=1e-5)

    def test_freezing_a_layer_within_a_region(self, blobs: Blobs) -> None:
        """Fine-tuning unfreezes layers as it goes on."""
        model = make_net(norm=False)
        model.layers[0].requires_grad_(False)
        crest = make_crest(model, blobs, config=config(tolerance=ALWAYS), steps=9)
        for step, batch in enumerate(crest):
            model.layers[0].requires_grad_(step >= 1)
            train_step(model, torch.optim.SGD(model.parameters(), lr=0.01), batch)
        assert crest.stats.checks > 0

    def test_swapping_trained_layers_of_the_same_shape_forgets_the_means(self, blobs: Blobs) -> None:
        class Twins(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

            def forward(self, x: Tensor, _index: Tensor) -> Tensor:
                out: Tensor = self.last(self.first(x).tanh())
                return out

        model = seeded(Twins)
        crest = make_crest(model, blobs, config=config(tolerance=NEVER, interval_scale=1.0), steps=8)
        updates = []
        for step, batch in enumerate(crest):
            model.first.requires_grad_(step < 3)
            model.last.requires_grad_(step >= 3)
            train_step(model, torch.optim.SGD(model.parameters(), lr=0.01), batch)
            updates.append(crest._quadratic.updates)
        assert updates[:2] == [1, 1]  # all parameters at first, then the first layer's alone
        assert updates[4] == 1
        assert updates[-1] > 1


class TestRegions:
    @pytest.mark.parametrize(
        ("per_step", "scale", "cap", "interval_cap", "interval", "count"),
        [
            (1.0, 3.0, 100, 100, 3, 3),
            (1.5, 3.0, 100, 100, 3, 5),
            (5.0, 1.0, 100, 100, 1, 5),
            (0.1, 4.0, 100, 100, 4, 1),
            (5.0, 4.0, 7, 100, 4, 7),
            (2.0, 50.0, 100, 6, 6, 12),
            (1.0, 0.2, 100, 100, 1, 1),
            (1.0, 2.9, 100, 100, 2, 2),
        ],
    )
    def test_sizes(
        self, blobs: Blobs, per_step: float, scale: float, cap: int, interval_cap: int, interval: int, count: int
    ) -> None:
        settings = config(coresets_per_step=per_step, interval_scale=scale, max_coresets=cap, max_interval=interval_cap)
        crest = make_crest(make_net(), blobs, config=settings)
        next(iter(crest))
        (region,) = events(crest, "region")
        assert (region["interval"], region["coresets"]) == (interval, count)
        assert crest._region is not None
        assert len(crest._region.coresets) == count

    def test_more_coresets_than_are_solved_together(self, blobs: Blobs) -> None:
        crest = make_crest(make_net(), blobs, config=config(interval_scale=40, coresets_per_step=1.0), steps=40)
        drawn = [tuple(crest.indices.tolist()) for _ in crest]
        assert len(set(drawn)) == 40

    def test_each_coreset_once_before_any_again(self, blobs: Blobs) -> None:
        crest = make_crest(make_net(), blobs, config=config(max_coresets=5, interval_scale=30), steps=25)
        drawn = [tuple(crest.indices.tolist()) for _ in crest]
        turns = [drawn[start : start + 5] for start in range(0, 25, 5)]
        assert all(set(turn) == set(drawn) and len(set(turn)) == 5 for turn in turns)
        assert len({tuple(turn) for turn in turns}) > 1, "the order is drawn anew for every turn"

    def test_repeats_have_their_weights(self, blobs: Blobs) -> None:
        crest = make_crest(make_net(), blobs, config=config(max_coresets=5, interval_scale=30), steps=25)
        weights: dict[tuple[int, ...], list[float]] = {}
        for batch in crest:
            assert weights.setdefault(tuple(crest.indices.tolist()), batch.weights.tolist()) == batch.weights.tolist()

    def test_interval_follows_the_curvature(self, blobs: Blobs) -> None:
        model = make_net()
        settings = config(tolerance=NEVER, curvature="unsmoothed", interval_scale=4, max_interval=12)
        crest = make_crest(model, blobs, config=settings, steps=80)
        train_pass(model, crest)
        regions = events(crest, "region")
        norms = [region["curvature_norm"] for region in regions]
        assert (
            [region["interval"] for region in regions]
            == [
                4,  # nothing is known yet
                *(int(min(max(4 * norms[0] / norm, 1), 12)) for norm in norms[:-1]),
            ]
        )
        assert len({region["interval"] for region in regions}) > 2, "it hardly moved"
        assert [r["coresets"] for r in regions] == [math.ceil(1.5 * r["interval"]) for r in regions]

    def test_first_order_keeps_the_interval(self, blobs: Blobs) -> None:
        model = make_net()
        crest = make_crest(model, blobs, config=config(tolerance=NEVER, curvature="first_order"))
        train_pass(model, crest)
        assert {(r["interval"], r["curvature_norm"]) for r in events(crest, "region")} == {(3, 0.0)}

    def test_history_of_regions(self, blobs: Blobs) -> None:
        model = make_net()
        crest = make_crest(model, blobs)
        train_pass(model, crest)
        regions = events(crest, "region")
        names = {"event", "step", "region", "coresets", "interval", "loss"}
        names |= {"gradient_norm", "curvature_norm", "active"}
        assert all(set(region) == names for region in regions)
        assert [region["region"] for region in regions] == list(range(crest.stats.regions))
        assert [event["step"] for event in crest.history] == sorted(event["step"] for event in crest.history)
        stats = crest.stats
        assert stats.seconds_selecting > 0
        assert stats.seconds_checking > 0
        assert stats.seconds_curvature > 0


def test_indices_name_the_batch_handed_out_last(blobs: Blobs) -> None:
    crest = make_crest(make_net(), blobs)
    assert crest.indices.shape == (0,)
    batch: WeightedBatch = next(iter(crest))
    assert isinstance(crest._meter.model, Net)
    assert torch.equal(batch.data[1], crest.indices)
