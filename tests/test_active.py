from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchcrest.active import ActiveSet, Draws, Place, stream


def everyone(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bool)


def draw_all(draws: Draws, sizes: list[int]) -> list[int]:
    return [i for size in sizes for i in draws.draw(size).tolist()]


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
