"""Verdicts: intervals, comparisons at equal time and equal steps, their words, and the budgets they need."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcrest.train.methods import find_method
from torchcrest.train.verdict import (
    FEW_SEEDS,
    ROUNDS,
    Milestone,
    Verdict,
    bootstrap,
    budgets_wanted,
    judge,
    notes,
    reach,
    targets_of,
    to_accuracy,
)

Summary = dict[str, Any]


def runs(
    method: str, budget: float, accuracies: Sequence[float], seconds: float, *, first: int = 0, **changes: Any
) -> list[Summary]:
    """Make summaries of one method at a budget of 1000 steps, a seed each."""
    values = {"method": method, "budget": budget, "steps": round(1000 * budget), "full_steps": 1000, "device": "cpu"}
    values |= {"seconds": seconds, **changes}
    return [{**values, "seed": first + k, "accuracy": accuracy} for k, accuracy in enumerate(accuracies)]


def verdict(*groups: list[Summary]) -> Verdict:
    """Judge the last group."""
    return judge(list(itertools.chain(*groups)))[-1]


# Intervals ---------------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


@pytest.mark.parametrize("n", range(2, 7))
def test_the_interval_is_that_of_all_resamples(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.01, 0.02, n).tolist()
    places = itertools.product(range(n), repeat=n)
    means = [sum(differences[k] for k in resample) / n for resample in places]
    found = bootstrap(differences)
    assert found.n == n
    assert found.mean == pytest.approx(statistics.fmean(differences))
    assert (found.low, found.high) == pytest.approx((quantile(means, 0.025), quantile(means, 0.975)))


def test_the_interval_of_many_seeds_is_that_of_the_binomial() -> None:
    """Resamples of four 0 and four 1 count heads of 8: 0.4 % have none, 3.5 % at most one."""
    found = bootstrap([0.0, 1.0] * 4)
    assert (found.mean, found.low, found.high, found.n) == (0.5, 1 / 8, 7 / 8, 8)


@pytest.mark.parametrize("n", [2, 3, 6, 7, 20])
def test_equal_differences_leave_no_width(n: int) -> None:
    found = bootstrap([0.1] * n)
    assert found.low == found.high == pytest.approx(found.mean)


def test_intervals_do_not_vary_and_leave_numpys_random_state_alone() -> None:
    before = str(np.random.get_state())  # noqa: NPY002
    differences = np.random.default_rng(0).normal(size=9).tolist()
    assert bootstrap(differences) == bootstrap(differences)
    assert str(np.random.get_state()) == before  # noqa: NPY002


def test_one_seed_has_no_interval() -> None:
    found = bootstrap([0.25])
    assert (found.mean, found.low, found.high, found.n) == (0.25, None, None, 1)


# Words -------------------------------------------------------------------------------------------------------

# By hand, for two seeds: the four resamples have means a, m, m, b, so the interval is a + 0.075 (m - a) to its mirror.
SENTENCES = {
    "beats": (
        [0.93, 0.95],
        [0.92, 0.92],
        "beats random at equal time by 2.0 points (95 %: 1.1 to 2.9, n = 2)",
    ),
    "loses": (
        [0.89, 0.91],
        [0.92, 0.92],
        "loses to random at equal time by 2.0 points (95 %: 1.1 to 2.9, n = 2)",
    ),
    "ahead, perhaps": (
        [0.90, 0.96],
        [0.92, 0.92],
        "is no different from random at equal time (1.0 points ahead, 95 %: -1.8 to 3.8, n = 2)",
    ),
    "behind, perhaps": (
        [0.94, 0.88],
        [0.92, 0.92],
        "is no different from random at equal time (1.0 points behind, 95 %: -1.8 to 3.8, n = 2)",
    ),
    "level": (
        [0.50, 0.75],
        [0.75, 0.50],
        "is no different from random at equal time (level, 95 %: -23.1 to 23.1, n = 2)",
    ),
    "a little": (
        [0.9004, 0.9004],
        [0.90, 0.90],
        "beats random at equal time by 0.04 points (95 %: 0.04 to 0.04, n = 2)",
    ),
    "one seed ahead": (
        [0.924],
        [0.92],
        "is 0.4 points ahead of random at equal time, but one seed decides nothing",
    ),
    "one seed behind": (
        [0.916],
        [0.92],
        "is 0.4 points behind random at equal time, but one seed decides nothing",
    ),
    "one seed level": (
        [0.92],
        [0.92],
        "is level with random at equal time, but one seed decides nothing",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_verdict_at_equal_time(case: str) -> None:
    crest, random, words = SENTENCES[case]
    found = verdict(runs("random", 0.2, random, 20.0), runs("crest", 0.1, crest, 20.3))
    assert found.sentence == f"crest 0.1 {words}"
    assert (found.equal_steps, found.budgets) == (None, (0.2,))
    assert found.equal_time
    assert found.equal_time.mean == pytest.approx(statistics.fmean(crest) - statistics.fmean(random))


@pytest.mark.parametrize(
    ("crest", "random", "words"),
    [
        ([0.93, 0.95], [0.92, 0.92], "it is ahead by 2.0 points (95 %: 1.1 to 2.9)"),
        ([0.94, 0.88], [0.92, 0.92], "it is behind by 1.0 points (95 %: -1.8 to 3.8)"),
        ([0.50, 0.75], [0.75, 0.50], "it is level (95 %: -23.1 to 23.1)"),
        ([0.93], [0.92], "it is ahead by 1.0 points"),
        ([0.92], [0.92], "it is level"),
    ],
)
def test_verdict_at_equal_steps(crest: list[float], random: list[float], words: str) -> None:
    slow = runs("random", 0.2, crest, 20.0)  # level with the method, which took as long
    found = verdict(runs("random", 0.1, random, 10.0), slow, runs("crest", 0.1, crest, 20.0))
    assert found.sentence.split("; at equal steps ")[1] == words
    assert found.equal_steps == bootstrap([a - b for a, b in zip(crest, random, strict=True)])
    assert found.equal_time
    assert found.equal_time.mean == 0


def test_steps_count_not_budgets() -> None:
    """0.1004 and 0.1 of 1000 steps are the same run."""
    found = verdict(runs("random", 0.1004, [0.5], 10.0), runs("crest", 0.1, [0.75], 10.0))
    assert found.equal_steps
    assert found.equal_steps.mean == 0.25


def test_full_training_is_random_data_of_all_steps() -> None:
    full = runs("full", 1.0, [0.75, 0.5], 100.0)
    reference, found = judge([*full, *runs("crest", 1.0, [0.75, 0.75], 101.0)])
    assert reference == Verdict("full", 1.0, None, None, (), "full is the reference: 62.50 %")
    assert found.equal_time == found.equal_steps == bootstrap([0.0, 0.25])
    assert found.budgets == (1.0,)


def test_longer_than_full_training_is_compared_with_it() -> None:
    groups = [runs("full", 1.0, [0.92, 0.92], 100.0), runs("random", 0.5, [0.93, 0.93], 50.0)]
    found = verdict(*groups, runs("crest", 0.5, [0.89, 0.91], 130.0))
    words = "crest 0.5 loses to full training (which took less time) by 2.0 points (95 %: 1.1 to 2.9, n = 2); at equal"
    assert found.sentence.startswith(words)
    assert found.budgets == (1.0,)


NO_TIME = "has no random data of equal time to be compared with"


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([], "has no random data to be compared with: add random to --methods"),
        (runs("full", 1.0, [0.9], 100.0), "has no random data to be compared with: add random to --methods"),
        (
            runs("random", 0.1, [0.9], 10.0, first=1),
            "has no seed in common with random: give both the same --seeds",
        ),
        (
            runs("random", 0.1, [0.9], 10.0),
            f"{NO_TIME}: random 0.2 may take as long; at equal steps it is level",
        ),
        (
            [*runs("random", 0.1, [0.9], 10.0), *runs("full", 1.0, [0.9], 100.0)],
            f"{NO_TIME}: random 0.2 may take as long; at equal steps it is level",
        ),
    ],
    ids=["alone", "only full", "other seeds", "longer than random", "between far budgets"],
)
def test_without_a_comparison_the_way_to_one_is_told(others: list[Summary], words: str) -> None:
    found = verdict(others, runs("crest", 0.1, [0.9], 20.0))
    assert found.sentence == f"crest 0.1 {words}"
    assert (found.equal_time, found.budgets) == (None, ())


def test_only_seeds_that_both_have_are_compared() -> None:
    random = [*runs("random", 0.1, [0.5, 0.5, 0.0], 10.0), *runs("random", 0.125, [0.75, 0.75], 15.0)]
    crest = runs("crest", 0.1, [0.75, 0.75, 0.0], 12.5)
    for summaries in ([*random, *crest], [*reversed(random), *crest]):
        found = judge(summaries)[-1]
        assert found.equal_steps == bootstrap([0.25, 0.25, 0.0])
        assert found.equal_time == bootstrap([0.125, 0.125]), "the mean of two budgets, of the seeds that both have"
        assert found.budgets == (0.1, 0.125)


def test_more_seeds_go_before_closer_budgets() -> None:
    random = [*runs("random", 0.1, [0.5] * 3, 10.0), *runs("random", 0.102, [0.5] * 2, 10.2)]
    found = verdict(random, runs("crest", 0.1, [0.75] * 3, 10.2))
    assert (found.equal_time, found.budgets) == (bootstrap([0.25] * 3), (0.1,))


def test_seconds_are_means_over_the_seeds() -> None:
    """Seed by seed the method's time is none of random's; on average they are equal."""
    random = [*runs("random", 0.2, [0.5], 10.0), *runs("random", 0.2, [0.5], 30.0, first=1)]
    crest = [*runs("crest", 0.1, [0.75], 21.0), *runs("crest", 0.1, [0.75], 19.0, first=1)]
    assert verdict(random, crest).equal_time == bootstrap([0.25, 0.25])


def test_verdicts_come_in_order_and_random_gets_none() -> None:
    groups = [runs(m, b, [0.5], 1.0) for m, b in (("crest", 0.2), ("random", 0.1), ("truncated", 0.1), ("crest", 0.1))]
    found = judge(list(itertools.chain(*groups)))
    assert [(v.method, v.budget) for v in found] == [("crest", 0.2), ("truncated", 0.1), ("crest", 0.1)]
    assert judge([]) == []


RATIOS = st.lists(st.floats(1.03, 1.7), max_size=5)


@given(RATIOS, st.floats(0, 1), st.floats(0.0, 5.0), st.floats(-0.005, 0.005))
def test_a_straight_line_is_met_exactly_and_never_left(
    ratios: list[float], place: float, start: float, slope: float
) -> None:
    """Random's accuracy is a line in seconds; the method is on it, so the difference is 0."""
    steps = [round(70 * math.prod(ratios[:k])) for k in range(len(ratios) + 1)]
    shortest, longest = start + 6, start + 0.11 * steps[-1]
    seconds = shortest * (longest / shortest) ** place
    time = {k: start + 0.1 * k for k in steps}
    random = [runs("random", k / 1000, [0.5 + slope * time[k], 0.3 + slope * time[k]], time[k]) for k in steps]
    found = verdict(*random, runs("crest", 0.005, [0.5 + slope * seconds, 0.3 + slope * seconds], seconds))
    used = [time[round(1000 * budget)] for budget in found.budgets]
    if len(used) == 2:
        low, high = used
        assert low < seconds < high, "never beyond what was run"
        assert not any(low < other < high for other in time.values()), "neighbours"
        close = found.budgets[1] <= 1.5 * found.budgets[0] + 1e-9 or seconds <= 1.05 * low or seconds >= 0.95 * high
        assert close
        assert found.equal_time
        assert found.equal_time.mean == pytest.approx(0, abs=1e-12)
    elif len(used) == 1:
        assert abs(used[0] - seconds) <= 0.02 * seconds or (1000 in steps and max(time.values()) < seconds)
    else:
        assert found.equal_time is None
        assert all(abs(other - seconds) > 0.02 * seconds for other in time.values())


# Notes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "said"), [(1, []), (2, [FEW_SEEDS]), (4, [FEW_SEEDS]), (5, [])])
def test_few_seeds_are_noted_once(n: int, said: list[str]) -> None:
    summaries = [*runs("random", 0.1, [0.5] * n, 1.0), *runs("crest", 0.1, [0.5] * n, 1.0)]
    summaries += runs("truncated", 0.1, [0.5] * n, 1.0)
    assert notes(summaries, judge(summaries)) == said


def test_times_that_are_not_alike_are_noted() -> None:
    summaries = [*runs("random", 0.1, [0.5], 1.0, processes=2), *runs("crest", 0.1, [0.5], 1.0, device="cuda:0, H200")]
    assert notes(summaries, judge(summaries)) == [
        "Seconds are not alike: runs were made 1 and 2 at a time.",
        "Seconds are not alike: runs were made on cpu and cuda:0, H200.",
    ]


# Budgets -----------------------------------------------------------------------------------------------------

RANDOM = runs("random", 0.1, [0.5], 10.0)
WANTED: dict[str, tuple[list[Summary], list[float]]] = {
    "one budget": (runs("crest", 0.1, [0.5], 20.0), [0.2]),
    "between neighbours": ([*runs("full", 1.0, [0.5], 91.0), *runs("crest", 0.1, [0.5], 19.0)], [0.2]),
    "what a run takes to get going": ([*runs("random", 0.2, [0.5], 15.0), *runs("crest", 0.1, [0.5], 25.0)], [0.4]),
    "faster": (runs("infobatch", 0.1, [0.5], 6.0), [0.06]),
    "as fast": (runs("crest", 0.1, [0.5], 10.15), []),
    "nearly as fast": (runs("crest", 0.1, [0.5], 10.3), [0.106]),
    "close neighbours": ([*runs("random", 0.15, [0.5], 15.0), *runs("crest", 0.1, [0.5], 12.0)], []),
    "far neighbours": ([*runs("random", 0.16, [0.5], 16.0), *runs("crest", 0.1, [0.5], 12.0)], [0.12]),
    "tried": ([*runs("random", 0.2, [0.5], 21.0), *runs("crest", 0.1, [0.5], 20.0)], []),
    "tried, long": ([*runs("random", 0.2, [0.5], 21.3), *runs("crest", 0.1, [0.5], 20.0)], [0.188]),
    "tried, short": ([*runs("random", 0.2, [0.5], 19.2), *runs("crest", 0.1, [0.5], 20.0)], [0.215]),
    "as long as full": ([*runs("full", 1.0, [0.5], 100.0), *runs("crest", 0.1, [0.5], 140.0)], []),
    "not above 1": (runs("crest", 0.1, [0.5], 140.0), [1.0]),
    "alike": ([*runs("crest", 0.1, [0.5], 20.0), *runs("truncated", 0.1, [0.5], 20.3)], [0.2]),
    "several": ([*runs("crest", 0.1, [0.5], 30.0), *runs("truncated", 0.1, [0.5], 20.0)], [0.2, 0.3]),
    "other seeds": (runs("crest", 0.1, [0.5], 20.0, first=1), []),
}


@pytest.mark.parametrize("case", WANTED)
def test_budgets_wanted(case: str) -> None:
    others, budgets = WANTED[case]
    assert budgets_wanted([*RANDOM, *others]) == budgets


@pytest.mark.parametrize(
    ("steps", "seconds", "budgets"),
    [([5], 5.2, [0.006]), ([10], 9.52, [0.009]), ([1], 0.5, []), ([1, 2], 1.4, [])],
    ids=["a step more", "a step less", "not below a step", "no step between"],
)
def test_budgets_of_few_steps(steps: list[int], seconds: float, budgets: list[float]) -> None:
    """A step takes a second."""
    random = [runs("random", k / 1000, [0.5], float(k)) for k in steps]
    assert budgets_wanted([*itertools.chain(*random), *runs("crest", 0.001, [0.5], seconds)]) == budgets


@given(st.integers(2, 3_000_000), st.data())
def test_a_budget_gives_back_its_steps(full_steps: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, full_steps // 2))
    random = runs("random", 0.5, [0.5], 1.0, steps=full_steps, full_steps=full_steps)
    crest = runs("crest", 0.5, [0.5], steps / full_steps, full_steps=full_steps)
    (budget,) = budgets_wanted([*random, *crest])
    assert 0 < budget <= 1
    assert find_method("random").steps(full_steps, budget) == steps


@pytest.mark.parametrize("with_full", [True, False], ids=["with full", "without full"])
@pytest.mark.parametrize(
    ("noise", "start"), [(0.0, 0.0), (0.02, 0.0), (0.02, 0.02)], ids=["exact", "noisy", "slow start"]
)
def test_a_few_rounds_give_every_method_its_equal_time(noise: float, start: float, with_full: bool) -> None:
    """Machines that take start + cost x steps, give or take some noise."""
    for machine in range(20):
        rng = np.random.default_rng(machine)
        full_steps = int(rng.integers(500, 20_000))

        def run(method: str, budget: float, cost: float = 1.0) -> list[Summary]:
            steps = max(1, round(budget * full_steps))  # noqa: B023
            exact = start * full_steps + cost * steps  # noqa: B023
            seeds = [exact * (1 + noise * z) for z in rng.standard_normal(3)]  # noqa: B023
            made = [runs(method, budget, [0.5], each, first=k) for k, each in enumerate(seeds)]
            return [{**each, "steps": steps, "full_steps": full_steps} for (each,) in made]  # noqa: B023

        summaries = run("full", 1.0) if with_full else []
        for budget in (0.05, 0.1, 0.2):
            summaries += run("random", budget)
            for method in ("crest", "truncated"):
                summaries += run(method, budget, float(rng.uniform(0.7, 6)))
        for _ in range(ROUNDS):
            for budget in budgets_wanted(summaries):
                summaries += run("random", budget)
        assert budgets_wanted(summaries) == []
        assert all(v.equal_time for v in judge(summaries) if v.method != "full")


# To an accuracy ----------------------------------------------------------------------------------------------


def curve(*points: tuple[int, float]) -> list[dict[str, Any]]:
    return [
        {"event": "evaluation", "step": step, "seconds": step / 4, "accuracy": a, "examples_trained": 16 * step}
        for step, a in points
    ]


def test_reach_is_the_first_evaluation_there() -> None:
    rising = curve((10, 0.5), (20, 0.75), (30, 0.625), (40, 0.8))
    assert reach(rising, 0.75) == (5.0, 320, 20)
    assert reach(rising, 0.76) == (10.0, 640, 40)
    assert reach(rising, 0.9) is None


def test_milestones_equal_those_by_hand() -> None:
    crest, full = runs("crest", 0.1, [0.8, 0.9, 0.7], 1.0), runs("full", 1.0, [0.95], 1.0)
    curves = [curve((10, 0.7), (20, 0.8)), curve((10, 0.9)), curve((40, 0.7)), curve((100, 0.5), (200, 0.95))]
    found = to_accuracy(list(zip([*crest, *full], curves, strict=True)), [0.7, 0.8, 0.99])
    assert found == [
        Milestone("crest", 0.1, 0.7, 2.5, 160, 10, 3, 3),
        Milestone("full", 1.0, 0.7, 50.0, 3200, 200, 1, 1),
        Milestone("crest", 0.1, 0.8, 3.75, 240, 15, 2, 3),
        Milestone("full", 1.0, 0.8, 50.0, 3200, 200, 1, 1),
        Milestone("crest", 0.1, 0.99, None, None, None, 0, 3),
        Milestone("full", 1.0, 0.99, None, None, None, 0, 1),
    ]


def test_targets_are_shares_of_the_best_mean() -> None:
    summaries = [*runs("crest", 0.1, [0.99, 0.01], 1.0), *runs("full", 1.0, [0.8, 0.6], 1.0)]
    assert targets_of(summaries) == pytest.approx([0.63, 0.665, 0.693])
    milestones = to_accuracy([(summary, curve((10, 0.7))) for summary in summaries])
    assert [m.target for m in milestones[::2]] == targets_of(summaries)
