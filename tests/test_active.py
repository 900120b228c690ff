from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchcrest import active as module
from torchcrest.active import ActiveSet, Draws, Place, Shuffle, stream


def everyone(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


def draw_all(draws: Draws, sizes: list[int]) -> list[int]:
    return [i for size in sizes for i in draws.draw(size).tolist()]


@pytest.fixture(scope="class", params=["whole passes", "passes in windows"])
def passes(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "passes in windows":
            patch.setattr(module, "WHOLE", 0)
            patch.setattr(module, "WINDOW", 7)
        yield


@pytest.mark.usefixtures("passes")
class TestDraws:
    @settings(max_examples=80)
    @given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any), st.integers(0, 9), st.data())
    def test_distinct_active_and_equally_often(self, active: list[bool], seed: int, data: st.DataObject) -> None:
        allowed = {i for i, here in enumerate(active) if here}
        size = data.draw(st.integers(1, len(allowed)))
        draws, seen = Draws(torch.tensor(active), seed), Counter(dict.fromkeys(allowed, 0))
        for _ in range(12):
            drawn = draws.draw(size).tolist()
            assert len(set(drawn)) == size
            assert set(drawn) <= allowed
            seen.update(drawn)
            assert max(seen.values()) - min(seen.values()) <= 1

    @given(st.integers(1, 30), st.integers(0, 99))
    def test_a_pass_is_a_permutation(self, n: int, seed: int) -> None:
        draws = Draws(everyone(n), seed)
        first, second = draws.draw(n).tolist(), draws.draw(n).tolist()
        assert sorted(first) == sorted(second) == list(range(n))

    @given(st.lists(st.integers(1, 8), min_size=1, max_size=5))
    def test_within_a_pass_the_cuts_do_not_matter(self, sizes: list[int]) -> None:
        assert draw_all(Draws(everyone(40), 3), sizes) == Draws(everyone(40), 3).draw(sum(sizes)).tolist()

    @settings(max_examples=40)
    @given(st.integers(2, 30), st.data())
    def test_place_is_all_the_state(self, n: int, data: st.DataObject) -> None:
        size, before, after = data.draw(st.integers(1, n)), data.draw(st.integers(0, 6)), 6
        draws = Draws(everyone(n), 1)
        draw_all(draws, [size] * before)
        place = draws.place
        expected = draw_all(draws, [size] * after)
        other = Draws(everyone(n), 1)
        other.place = Place(*place)
        assert draw_all(other, [size] * after) == expected
        draws.place = place
        assert draw_all(draws, [size] * after) == expected

    def test_those_set_aside_are_passed_over_from_the_next_draw(self) -> None:
        active = everyone(20)
        draws = Draws(active, 0)
        draws.draw(6)
        active[::2] = False
        drawn = draw_all(draws, [7] * 8)
        assert set(drawn) <= set(range(1, 20, 2))
        assert max(Counter(drawn).values()) - min(Counter(drawn).values()) <= 1

    def test_those_put_off_and_then_set_aside(self) -> None:
        active = everyone(10)
        draws = Draws(active, 0)
        while not draws.place.put_off:
            draws.draw(7)
        gone = list(draws.place.put_off)
        active[gone] = False
        assert not set(draw_all(draws, [3] * 5)) & set(gone)

    def test_seeds_and_passes_differ(self) -> None:
        orders = [tuple(draw_all(Draws(everyone(30), seed), [30, 30])) for seed in (0, 1)]
        passes = [order[start : start + 30] for order in orders for start in (0, 30)]
        assert len(set(passes)) == 4

    def test_order_is_uniform_enough(self) -> None:
        firsts = Counter(int(Draws(everyone(4), seed).draw(1)) for seed in range(400))
        assert all(60 < firsts[i] < 140 for i in range(4))  # 100 expected, deviation 8.7; the seeds are fixed


class TestManyExamples:
    def test_windows_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes, streams = [5, 40, 60, 17, 99], []
        monkeypatch.setattr(module, "WHOLE", 0)
        for window in (7, 64, 1000):
            monkeypatch.setattr(module, "WINDOW", window)
            streams.append(draw_all(Draws(everyone(100), 3), sizes))
        assert streams[0] == streams[1] == streams[2]

    def test_nothing_is_made_of_all_of_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "randperm", lambda *_, **__: pytest.fail("a permutation of all is made"))
        n = 200_000
        active = everyone(n)
        draws = Draws(active, 0)
        first = draws.draw(256)
        draws.place = Place(3, n - 100, ())
        last = draws.draw(256)
        assert draws.place.number == 4
        assert len(first.unique()) == len(last.unique()) == 256
        assert len(draws._window[2]) <= module.WINDOW

    def test_a_pass_is_a_permutation_and_can_be_entered_anywhere(self) -> None:
        n, size = 140_001, 1001
        draws, places = Draws(everyone(n), 5), []
        drawn = []
        for _ in range(n // size):
            places.append(draws.place)
            drawn.append(draws.draw(size))
        seen = torch.cat(drawn)
        assert len(seen.unique()) == len(seen)
        for k in (0, 70, 138):
            other = Draws(everyone(n), 5)
            other.place = places[k]
            assert torch.equal(other.draw(size), drawn[k])

    def test_few_are_active(self) -> None:
        active = torch.zeros(150_000, dtype=torch.bool)
        allowed = [3, 70_000, 149_999]
        active[allowed] = True
        draws = Draws(active, 0)
        assert sorted(draws.draw(3).tolist()) == sorted(draws.draw(3).tolist()) == allowed


def order_of(n: int, seed: int) -> Tensor:
    return Shuffle(n, stream(seed, "shuffle"))(torch.arange(n))


class TestShuffle:
    @settings(max_examples=200, deadline=None)
    @given(st.integers(1, 3000), st.integers(0, 2**40))
    def test_a_permutation(self, n: int, seed: int) -> None:
        assert order_of(n, seed).sort().values.equal(torch.arange(n))

    @pytest.mark.parametrize("n", [1, 2, 3, 2**16, 2**16 + 1, 257**2, 257**2 - 1, 10**6 + 3])
    def test_a_permutation_at_the_edges_of_the_grid(self, n: int) -> None:
        assert order_of(n, 0).sort().values.equal(torch.arange(n))

    @given(st.integers(1, 2000), st.integers(0, 99), st.data())
    def test_any_part_by_itself(self, n: int, seed: int, data: st.DataObject) -> None:
        places = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=torch.int64)
        shuffle = Shuffle(n, stream(seed, "shuffle"))
        before = places.clone()
        assert shuffle(places).equal(order_of(n, seed)[before])
        assert places.equal(before), "the argument is left alone"

    def test_holds_few_numbers(self) -> None:
        shuffle = Shuffle(10**8, stream(0, "shuffle"))
        assert sum(len(moves) for moves in shuffle._moves) <= 8 * (10**4 + 1)

    # The seeds are fixed, so these pass or fail for good; the bounds are 4 standard deviations or more away.

    @pytest.mark.parametrize("n", [150_000, 10**6])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_examples_are_spread_over_a_pass(self, n: int, seed: int) -> None:
        """Twenty parts of the places against twenty parts of the examples: 361 degrees of freedom."""
        order = order_of(n, seed)
        cells = torch.arange(n) * 20 // n * 20 + order * 20 // n
        assert_even(cells.bincount(minlength=400), 361)

    @pytest.mark.parametrize("n", [150_000, 10**6])
    @pytest.mark.parametrize("gap", [1, 2, 386, 387, 388, 1000])
    def test_neighbours_have_nothing_in_common(self, n: int, gap: int) -> None:
        """386 to 388 are about a column of the grid of 150,000 cells; 1000 is one of a million's."""
        order = order_of(n, 7)
        left, right = order[:-gap], order[gap:]
        correlation = np.corrcoef(left.numpy(), right.numpy())[0, 1]
        assert abs(correlation) < 4 / n**0.5
        assert_even(((right - left).remainder(n) * 200 // n).bincount(minlength=200), 199)
        cells = left * 20 // n * 20 + right * 20 // n
        assert_even(cells.bincount(minlength=400), 361)

    def test_batches_are_samples_of_all(self) -> None:
        """Of 256 in a row some 26 are of any tenth of the examples; the spread is that of draws without replacement."""
        n = 200_000
        tenths = (order_of(n, 3)[: 256 * 781].view(781, 256) * 10 // n).numpy()
        counts = np.stack([(tenths == k).sum(1) for k in range(10)])
        assert abs(counts.var() / (256 * 0.1 * 0.9) - 1) < 0.1

    def test_passes_have_nothing_in_common(self) -> None:
        n = 150_000
        first, second = order_of(n, 0), order_of(n, 1)
        assert abs(np.corrcoef(first.numpy(), second.numpy())[0, 1]) < 4 / n**0.5
        assert int((first == second).sum()) < 8  # one is expected

    def test_every_place_takes_every_example(self) -> None:
        """Over 2,000 seeds, where the grid is coarsest."""
        orders = torch.stack([order_of(20, seed) for seed in range(2000)])
        for place in (0, 7, 19):
            assert_even(orders[:, place].bincount(minlength=20), 19)
        assert_even((orders[:, 0] * 20 + orders[:, 1]).bincount(minlength=400)[orders_of_two(20)], 379)


def orders_of_two(n: int) -> Tensor:
    return torch.tensor([a * n + b for a in range(n) for b in range(n) if a != b])


def assert_even(counts: Tensor, freedom: int) -> None:
    """Chi-square against equal counts: its mean is the degrees of freedom, its variance twice that."""
    expected = counts.double().mean()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5, chi_square


def losses_of(active: ActiveSet, **losses: float) -> None:
    """Record the losses of the named examples (_3=0.5 for the loss of 3)."""
    indices = torch.tensor([int(name[1:]) for name in losses])
    active.record(indices, torch.tensor(list(losses.values())))


class TestActiveSet:
    def test_sets_aside_what_stayed_below(self) -> None:
        active = ActiveSet(5)
        losses_of(active, _0=0.05, _1=0.05, _2=0.5, _3=0.01)
        losses_of(active, _1=0.2, _2=0.05, _3=0.02)
        assert active.close_interval(0.1, least=1) == 2
        # 1 and 2 were above once, 4 was not seen.
        assert active.mask.tolist() == [False, True, True, False, True]
        assert active.count == 3
        assert not active.stopped

    @pytest.mark.parametrize(("loss", "out"), [(0.1, 0), (0.0999, 1), (0.0, 1), (-1.0, 1)])
    def test_boundary(self, loss: float, out: int) -> None:
        active = ActiveSet(3)
        losses_of(active, _1=loss)
        assert active.close_interval(0.1, least=1) == out

    def test_alpha_zero_keeps_all(self) -> None:
        active = ActiveSet(3)
        losses_of(active, _0=0.0, _1=0.0)
        assert active.close_interval(0.0, least=1) == 0

    def test_intervals_begin_anew(self) -> None:
        active = ActiveSet(3)
        losses_of(active, _0=9.0)
        assert active.close_interval(0.1, least=1) == 0
        losses_of(active, _0=0.01)
        assert active.close_interval(0.1, least=1) == 1
        assert active.close_interval(0.1, least=1) == 0

    def test_lowest_losses_go_where_not_all_can(self) -> None:
        active = ActiveSet(5)
        losses_of(active, _0=0.03, _1=0.01, _2=0.04, _3=0.02)
        assert active.close_interval(0.1, least=3) == 2
        assert active.mask.tolist() == [True, False, True, False, True]
        assert active.stopped
        assert active.count == 3

    def test_ties_go_to_the_lowest_index(self) -> None:
        active = ActiveSet(4)
        losses_of(active, _3=0.01, _1=0.01, _2=0.01)
        active.close_interval(0.1, least=3)
        assert active.mask.tolist() == [True, False, True, True]

    @settings(max_examples=60)
    @given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(0, 30))
    def test_those_that_go_are_the_first_by_loss_and_index(self, levels: list[int], least: int) -> None:
        active = ActiveSet(len(levels))
        losses = torch.tensor(levels) / 100
        active.record(torch.arange(len(levels)), losses)
        learned = sorted((level, i) for i, level in enumerate(levels) if level < 10)
        room = max(0, len(levels) - least)
        gone = {i for _, i in learned[:room]}
        assert active.close_interval(0.095, least) == len(gone)
        assert active.mask.tolist() == [i not in gone for i in range(len(levels))]
        assert active.count == len(levels) - len(gone)
        assert active.stopped == (len(learned) > room)

    def test_just_enough_room_is_no_stop(self) -> None:
        active = ActiveSet(4)
        losses_of(active, _0=0.0, _1=0.0)
        assert active.close_interval(0.1, least=2) == 2
        assert not active.stopped

    def test_those_set_aside_are_not_counted_again(self) -> None:
        active = ActiveSet(4)
        losses_of(active, _0=0.0)
        active.close_interval(0.1, least=1)
        losses_of(active, _0=0.0, _1=0.0)
        assert active.close_interval(0.1, least=1) == 1
        assert active.count == 2

    def test_no_room_at_all(self) -> None:
        active = ActiveSet(2)
        losses_of(active, _0=0.0)
        assert active.close_interval(0.1, least=5) == 0
        assert active.stopped

    def test_some_rest(self) -> None:
        active = ActiveSet(4, resting=True)
        drawn = active.drawn
        some = torch.tensor([False, False, True, True])
        assert active.rest(some, least=2)
        assert active.drawn is drawn, "draws share it"
        assert drawn.equal(some)
        assert not active.rest(some, least=2), "nothing has changed"
        assert active.mask.all(), "none is set aside"
        assert active.rest(some, least=3), "too few without those that rest"
        assert drawn.all()

    def test_what_is_set_aside_is_not_drawn(self) -> None:
        active = ActiveSet(4, resting=True)
        losses_of(active, _3=0.0)
        active.rest(torch.tensor([False, True, True, True]), least=1)
        assert active.close_interval(0.1, least=1) == 1
        assert active.drawn.tolist() == [False, True, True, False]
        losses_of(active, _1=0.0)
        assert active.close_interval(0.1, least=2) == 1
        assert active.drawn.tolist() == active.mask.tolist() == [True, False, True, False], "too few without"

    def test_none_rests_unasked(self) -> None:
        active = ActiveSet(3)
        assert active.drawn is active.mask
        assert set(active.state_dict()) == {"mask", "largest", "stopped"}

    def test_state_of_rest_round_trip(self) -> None:
        active, other = ActiveSet(4, resting=True), ActiveSet(4, resting=True)
        drawn = other.drawn
        active.rest(torch.tensor([False, False, True, True]), least=1)
        other.load_state_dict(active.state_dict())
        assert other.drawn is drawn, "draws share it"
        assert drawn.tolist() == [False, False, True, True]

    def test_state_round_trip(self) -> None:
        active, other = ActiveSet(6), ActiveSet(6)
        mask = other.mask
        losses_of(active, _0=0.0)
        active.close_interval(0.1, least=1)
        losses_of(active, _1=0.0, _2=5.0)
        state = active.state_dict()
        active.mask[5] = False  # the state is a copy
        active.mask[5] = True
        other.load_state_dict(state)
        assert other.mask is mask, "draws share the mask"
        assert other.count == 5
        assert [a.close_interval(0.1, least=1) for a in (active, other)] == [1, 1]
        assert active.mask.tolist() == other.mask.tolist() == [False, False, True, True, True, True]

    def test_a_state_stays_as_it_was(self) -> None:
        active = ActiveSet(4)
        state = active.state_dict()
        losses_of(active, _0=0.0)
        active.close_interval(0.1, least=1)
        assert state["mask"].all()
        assert (state["largest"] == -torch.inf).all()


class TestStream:
    @pytest.mark.parametrize(
        ("left", "right"),
        [((0, "a"), (1, "a")), ((0, "a"), (0, "b")), ((0, "a", 1), (0, "a", 2)), ((0, "a", 1, 2), (0, "a", 2, 1))],
    )
    def test_purposes_share_no_numbers(self, left: tuple[int, str], right: tuple[int, str]) -> None:
        first, second = (torch.rand(4, generator=stream(*keys)) for keys in (left, right))
        assert not torch.equal(first, second)

    def test_global_state_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        stream(0, "a")
        assert torch.equal(torch.get_rng_state(), before)

    def test_large_seeds(self) -> None:
        assert torch.rand(1, generator=stream(2**80, "a")).shape == (1,)
