"""The budget: what is paid, what can be afforded, and that the bound holds over a run."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import BOUNDED, Blobs, events, make_bounded, make_net, sgd, train_step
from torchcrest import ConfigError, Crest, CrestConfig
from torchcrest.overhead import FIXED_SHARE, RECENT, Budget, Clock


def known(limit: float | None = 0.25, step: float = 1.0, pool: float = 0.5) -> Budget:
    """Build a budget that knows what a step and a pool cost, after 8 steps and one pool."""
    budget = Budget(limit)
    budget.train(step, 8)
    budget.pay("selecting", pool)
    return budget


class TestBudget:
    def test_overhead_is_spent_over_trained(self) -> None:
        budget = known()
        assert budget.overhead == 0.5 / 8
        assert Budget(0.25).overhead == 0.0

    def test_no_bound_affords_all(self) -> None:
        assert known(None).affordable("selecting", 1000, 1) == 1000

    @pytest.mark.parametrize("wanted", [0, 1, 7])
    def test_one_before_anything_is_known(self, wanted: int) -> None:
        assert Budget(0.25).affordable("selecting", wanted, 10) == min(1, wanted)

    def test_what_was_not_spent_is_kept_and_what_was_too_much_is_paid_back(self) -> None:
        budget = known()
        assert budget.affordable("selecting", 100, steps=0) == 3  # 8 / 4 - 0.5, each 0.5
        budget.pay("checking", 4.0)
        assert budget.affordable("selecting", 100, steps=10) == 0  # 18 / 4 - 4.5
        assert budget.affordable("selecting", 100, steps=12) == 1

    def test_never_more_than_wanted(self) -> None:
        assert known().affordable("selecting", 2, steps=100) == 2

    def test_the_cost_is_the_median_of_the_last(self) -> None:
        budget = known()
        for cost in (100.0, 0.5, 0.5):
            budget.pay("selecting", cost)
        budget.train(1.0, 1000)
        assert budget.affordable("selecting", 10**6, 0) == (1008 / 4 - 101.5) // 0.5
        for _ in range(RECENT):
            budget.pay("selecting", 2.0)
        assert budget.affordable("selecting", 10**6, 0) == (1008 / 4 - 111.5) // 2

    def test_count_zero_is_spent_without_a_price(self) -> None:
        budget = known()
        budget.pay("selecting", 1.0, count=0)
        assert budget.spent == 1.5
        assert budget.affordable("selecting", 100, steps=0) == 1  # still 0.5 each

    def test_intervals_stretch_until_the_fixed_costs_fit_their_share(self) -> None:
        budget = known()
        assert budget.stretched(7, 100) == 7
        budget.pay("checking", 0.3)
        budget.pay("curvature", 0.4)
        assert budget.stretched(7, 100) == round((2 * 0.3 + 0.4) / (FIXED_SHARE * 0.25))
        assert budget.stretched(7, 12) == 12
        assert budget.stretched(50, 100) == 50
        assert Budget(0.25).stretched(7, 100) == 7
        budget.limit = None
        assert budget.stretched(7, 100) == 7

    def test_coresets_that_are_too_dear_get_a_tenth(self) -> None:
        budget = Budget(0.25, worth=0.5)
        budget.train(1.0, 1000)
        for cost in (6.0, 0.4, 0.6, 0.6, 0.6):  # the first is a cold machine's
            assert not budget.dear
            budget.pay("selecting", cost)
        assert budget.dear
        assert budget.affordable("selecting", 10**6, 0) == (25 - 8.2) // 0.6
        assert budget.affordable("checking", 7, 0) == 1, "nothing is known of what others cost"
        for _ in range(RECENT):
            budget.pay("selecting", 0.4)
        assert not budget.dear, "they are cheaper now"
        assert budget.selecting == 0.25

    def test_two_groups_tell_that_coresets_are_dear(self) -> None:
        budget = Budget(0.25, worth=0.5)
        budget.train(1.0, 1000)
        budget.pay("selecting", 0.7)
        assert not budget.dear
        budget.pay("selecting", 0.6)
        assert budget.dear
        budget.pay("selecting", 0.4)
        assert not budget.dear, "a larger group was cheaper"

    def test_without_a_bound_nothing_is_too_dear(self) -> None:
        budget = Budget(None, worth=0.1)
        for _ in range(RECENT):
            budget.pay("selecting", 5.0)
        budget.train(1.0, 10)
        assert budget.affordable("selecting", 1000, 1) == 1000

    def test_coresets_are_saved_up_for_and_the_first_groups_are_small(self) -> None:
        budget = Budget(0.25)
        for least in (1, 1, 2, 4, 8, 10, 10):
            assert budget.together(least - 1, wanted=10) == 0
            assert budget.together(least, wanted=10) == least
            assert budget.together(10, wanted=10) == 10
            assert budget.together(1, wanted=1) == 1, "all that are wanted"
            budget.pay("selecting", 0.5)
        assert budget.together(16, wanted=100) == 16, "many cost as little each as all"
        assert budget.together(0, wanted=0) == 0

    def test_state(self) -> None:
        budget, other = known(), Budget(0.25)
        other.load_state_dict(budget.state_dict())
        assert other.state_dict() == budget.state_dict()
        assert other.affordable("selecting", 100, 3) == budget.affordable("selecting", 100, 3)

    @given(
        limit=st.floats(0.01, 2),
        costs=st.lists(st.tuples(st.floats(0.01, 3), st.floats(0.01, 3), st.integers(1, 20)), min_size=20, max_size=60),
    )
    def test_property_a_planner_that_asks_stays_within_the_limit(self, limit: float, costs: Any) -> None:
        budget = Budget(limit)
        for step, pool, steps in costs:
            count = budget.affordable("selecting", steps, steps)
            budget.pay("selecting", pool * count, count)
            budget.train(step, steps)
        # What a group may go over is what prices were wrong by: costs here are at most 3 and 300 times their least.
        dearest = 3 * 20 * (1 + limit)
        assert budget.spent <= limit * budget.trained + dearest

    @given(limit=st.floats(0.05, 2), pool=st.floats(0.05, 3), steps=st.integers(1, 20), groups=st.integers(20, 60))
    def test_property_at_constant_prices_the_limit_is_met_from_below(
        self, limit: float, pool: float, steps: int, groups: int
    ) -> None:
        budget = Budget(limit)
        for _ in range(groups):
            count = budget.together(budget.affordable("selecting", steps, steps), steps)
            budget.pay("selecting", pool * count, count)
            budget.train(1.0, steps)
        ideal = min(limit * groups * steps, pool * groups * steps)
        assert budget.spent <= ideal + pool + 1e-6
        assert budget.spent >= ideal - pool * (steps + 1) - limit * steps - 1e-6


@pytest.mark.parametrize(("worth", "share"), [(None, 0.25), (1.1, 0.25), (0.9, 0.025)])
def test_a_run_leaves_dear_coresets_alone(blobs: Blobs, worth: float | None, share: float) -> None:
    """A pool of 48 costs a step of 16 where a forward pass is a third of one."""
    model = make_net()
    changes: dict[str, Any] = {"pool_size": 48, "check": "none", "curvature": "first_order"}
    config = replace(BOUNDED, **changes, max_overhead=0.25, max_coreset_cost=worth)
    loader = make_bounded(model, blobs, config=config, steps=600)
    optimizer = sgd(model)
    for item in loader:
        train_step(model, optimizer, item)
    assert loader.stats.coresets / 600 == pytest.approx(share, abs=0.02)


class TestClock:
    def test_median_of_the_gaps_and_a_share_of_the_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = iter([0.0, 1.0, 10.0, 12.0, 20.0, 120.0, 200.0, 200.6])
        monkeypatch.setattr(time, "perf_counter", lambda: next(now))
        clock, waited = Clock(), []
        for _ in range(3):  # gaps of 1, 2 and 100
            clock.handed()
            clock.asked()
        assert clock.step(lambda: waited.append(1)) == pytest.approx(2 + 0.2)
        assert waited == [1]

    def test_nothing_to_tell(self) -> None:
        clock = Clock()
        clock.asked()
        assert clock.step(lambda: None) is None


def run(steps: int = 60, **changes: Any) -> Crest:
    model = make_net()
    crest = make_bounded(model, Blobs(), config=replace(BOUNDED, **changes), steps=steps)
    optimizer = sgd(model)
    for batch in crest:
        train_step(model, optimizer, batch, crest)
    return crest


class TestBoundInCrest:
    @pytest.mark.parametrize("limit", [0.3, 1.0, 3.0])
    def test_counted_cost_stays_within_the_bound(self, limit: float) -> None:
        crest = run(400, max_overhead=limit, exclude=False)
        config = crest.config
        counted = config.forward_cost * crest._meter.forwarded + 3 * crest._meter.differentiated
        trained = crest.stats.examples_trained
        # A region and a group of coresets may be begun before their steps are trained on.
        ahead = config.forward_cost * 40 * 5 + 3 * 16
        assert counted <= limit * trained + ahead
        # And what is allowed is used, unless every step has a coreset from when the costs are known.
        assert crest.stats.coresets >= 400 - 3 or counted >= 0.8 * limit * trained

    def test_checks_that_pass_are_stretched_as_well(self) -> None:
        crest = make_bounded(make_net(), Blobs(), config=replace(BOUNDED, max_overhead=0.25, exclude=False), steps=400)
        for _ in crest:  # nothing is trained, so the model of the loss holds and the first region never ends
            pass
        assert crest.stats.regions == 1
        fixed = crest.config.forward_cost * crest.stats.forwarded_checking + 3 * crest._meter.differentiated
        check, picked = crest.config.forward_cost * 40, 3 * 16
        assert fixed <= FIXED_SHARE * 0.25 * crest.stats.examples_trained + 2 * check + picked

    @pytest.mark.parametrize("renew", [4, 7])
    def test_a_bound_pays_for_whole_groups(self, renew: int) -> None:
        crest = make_bounded(
            make_net(), Blobs(), config=replace(BOUNDED, max_overhead=0.3, renew=renew, check="none"), steps=400
        )
        picked, groups = [], []
        for _ in crest:
            region = crest._region
            assert region is not None
            picked.append(region.pick(crest._step - 1, 0).picked)
            if crest._step - 1 == region.picked_at:
                groups.append((crest._step, sum(coreset.picked for coreset in region.coresets), len(region.coresets)))
        assert sum(picked) == crest.stats.coresets
        late = [(count, steps) for step, count, steps in groups if step > 100]
        assert {count for count, steps in late if steps == renew} == {0, renew}

    def test_more_is_selected_with_a_larger_bound(self) -> None:
        shares = [run(max_overhead=limit).stats.coresets for limit in (0.2, 0.8, 3.0)]
        assert 0 < shares[0] < shares[1] < shares[2]

    @pytest.mark.parametrize("steps", [1, 23, 57, 60])
    @pytest.mark.parametrize("extra", [None, 0.5])
    def test_without_a_bound_each_step_has_a_coreset_of_its_own(self, steps: int, extra: float | None) -> None:
        crest = run(steps, max_overhead=None, exclude=False, max_extra_visits=extra)
        region = crest._region
        assert region is not None
        ahead = region.picked_at + len(region.coresets) - steps  # picked for steps after the last
        assert crest.stats.coresets == steps
        # A pool a step, but for what a check's measurement saves; a check set a region.
        assert crest.stats.forwarded_selecting == (steps + ahead - crest.stats.checks) * 40
        assert crest.stats.forwarded_checking == (crest.stats.regions + crest.stats.checks) * 40

    def test_random_batches_are_unweighted_distinct_and_not_measured(self) -> None:
        model = make_net()
        crest = make_bounded(model, Blobs(), config=replace(BOUNDED, max_overhead=0.3, exclude=False), steps=40)
        plain, picked = 0, 0
        optimizer = sgd(model)
        for batch in crest:
            region = crest._region
            assert region is not None
            if region.pick(crest._step - 1, 0).picked:
                picked += 1
                assert not torch.equal(batch.weights, torch.ones(16))
            else:
                plain += 1
                assert torch.equal(batch.weights, torch.ones(16))
            assert len(set(crest.indices.tolist())) == 16
            train_step(model, optimizer, batch)
        assert (plain, picked) == (40 - crest.stats.coresets, crest.stats.coresets)
        assert plain > picked > 0

    def test_two_random_batches_of_one_pool_do_not_overlap(self) -> None:
        crest = make_bounded(make_net(), Blobs(), config=replace(BOUNDED, max_overhead=1e-9, exclude=False), steps=40)
        first, second = crest._random(), crest._random()
        assert torch.equal(first.pool_indices, second.pool_indices)
        assert not set(first.indices.tolist()) & set(second.indices.tolist())
        assert not torch.equal(first.pool_indices, crest._random().pool_indices)

    def test_a_passed_checks_measurement_renews_a_coreset(self) -> None:
        crest = run(250, tolerance=1e9, max_overhead=1e-9, exclude=False)
        assert crest.stats.regions == 1
        # Only the first pool was measured for selection; what each check measured was picked from as well.
        assert crest.stats.forwarded_selecting == 40
        assert crest.stats.coresets == 1 + crest.stats.checks > 2

    def test_regions_grow_longer_when_checks_are_dear(self) -> None:
        free, bound = (run(200, max_overhead=limit, max_interval=50, exclude=False) for limit in (None, 0.1))
        assert max(e["interval"] for e in events(bound, "region")) == 50
        assert bound.stats.checks < free.stats.checks

    def test_coresets_that_are_used_again_are_at_least_one(self) -> None:
        crest = run(renew=None, max_overhead=1e-9)
        assert crest.stats.coresets == 60
        assert {e["coresets"] for e in events(crest, "region")} == {1}

    def test_in_seconds_the_measured_overhead_is_told(self) -> None:
        crest = run(overhead_in="seconds", max_overhead=0.5)
        assert crest.stats.overhead == crest._account.budget.overhead > 0
        spent = crest.stats.seconds_selecting + crest.stats.seconds_checking + crest.stats.seconds_curvature
        assert crest._account.budget.spent == pytest.approx(spent)

    def test_counted_where_deterministic_algorithms_are_asked_for(self) -> None:
        before = torch.are_deterministic_algorithms_enabled()
        try:
            torch.use_deterministic_algorithms(True)
            crest = run(overhead_in="auto", max_overhead=0.5)
        finally:
            torch.use_deterministic_algorithms(before)
        counted = run(max_overhead=0.5)
        assert crest.stats.coresets == counted.stats.coresets
        assert crest.stats.overhead == counted.stats.overhead
        assert run(overhead_in="auto")._account.budget.trained < 60, "seconds, not examples"

    @pytest.mark.parametrize("steps", [1, 2, 9])
    def test_a_run_of_few_steps(self, steps: int) -> None:
        assert run(steps, renew=7).stats.examples_trained == 16 * steps


@pytest.mark.parametrize("source", ["history", "model"])
def test_sources_of_outputs_alone_cannot_compare_the_last_layer(source: str) -> None:
    match = f"proxy must be 'outputs' with proxy_source='{source}', got 'last_layer'"
    with pytest.raises(ConfigError, match=match):
        CrestConfig(proxy_source=source, proxy="last_layer")  # type: ignore[arg-type]
