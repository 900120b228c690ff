from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchcrest.errors import ConfigError
from torchcrest.train.schedule import Kind, learning_rate

kinds = st.sampled_from(get_args(Kind))
lengths = st.integers(1, 500)
bases = st.floats(1e-6, 1e3)
warmups = st.floats(0, 0.5)


def rates(steps: int, base: float, kind: Kind, warmup: float) -> list[float]:
    return [learning_rate(step, steps, base=base, kind=kind, warmup=warmup) for step in range(steps + 1)]


def test_the_papers_schedule() -> None:
    # CIFAR-10: 200 epochs, 10 % warm-up, x0.1 at 60 % and 85 %; one step per epoch here.
    got = rates(200, 0.1, "step", 0.1)
    want = [0.1 * (step + 1) / 20 for step in range(20)]
    want += [0.1] * 100 + [0.01] * 50 + [0.001] * 31
    assert got == pytest.approx(want)


def test_cosine() -> None:
    got = rates(100, 2.0, "cosine", 0.2)
    assert got[:20] == pytest.approx([0.1 * (step + 1) for step in range(20)])
    assert got[20:] == pytest.approx([1 + math.cos(math.pi * i / 80) for i in range(81)])


def test_constant_without_warm_up() -> None:
    assert rates(50, 0.3, "constant", 0) == [0.3] * 51


@given(kinds, lengths, bases, warmups)
def test_bounds(kind: Kind, steps: int, base: float, warmup: float) -> None:
    got = rates(steps, base, kind, warmup)
    assert all(0 < rate <= base for rate in got[:-1])
    assert 0 <= got[-1] <= base
    assert max(got) == base


@given(kinds, lengths, bases, warmups)
def test_rises_linearly_to_base_and_then_never_rises(kind: Kind, steps: int, base: float, warmup: float) -> None:
    got = rates(steps, base, kind, warmup)
    warm = round(warmup * steps)
    for step in range(warm):
        assert got[step] == pytest.approx(base * (step + 1) / warm)
    assert got[max(warm - 1, 0)] == base
    after = got[max(warm - 1, 0) :]
    assert after == sorted(after, reverse=True)


@given(lengths, warmups)
def test_step_falls_at_the_first_step_past_each_share(steps: int, warmup: float) -> None:
    warm = round(warmup * steps)
    got = rates(steps, 1.0, "step", warmup)
    first, second = math.ceil(60 * steps / 100), math.ceil(85 * steps / 100)
    assert got[warm:first] == [1.0] * max(first - warm, 0)
    assert got[max(first, warm) : second] == pytest.approx([0.1] * max(second - max(first, warm), 0))
    assert got[second:] == pytest.approx([0.01] * (steps + 1 - second))


@given(kinds, st.integers(1, 60), st.integers(2, 9))
def test_a_longer_run_is_the_same_schedule_stretched(kind: Kind, steps: int, factor: int) -> None:
    short, long = (rates(n, 1.0, kind, 0) for n in (steps, factor * steps))
    assert long[::factor] == pytest.approx(short)


@given(lengths)
def test_cosine_ends_at_zero(steps: int) -> None:
    assert learning_rate(steps, steps, base=1.0, kind="cosine") == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("step", "steps", "options", "message"),
    [
        (0, 0, {}, r"steps must be at least 1, got 0\. Use epochs"),
        (-1, 5, {}, r"step must be from 0 to steps \(5\), got -1\. "),
        (6, 5, {}, r"step must be from 0 to steps \(5\), got 6\. Raise steps or stop there\."),
        (0, 5, {"base": 0.0}, r"base must be a positive finite number, got 0\.0\. Use for example 0\.1"),
        (0, 5, {"base": math.nan}, r"base must be .* got nan\. "),
        (0, 5, {"base": math.inf}, r"base must be .* got inf\. "),
        (0, 5, {"kind": "linear"}, r"kind must be one of step, cosine, constant, got 'linear'\. Use"),
        (0, 5, {"warmup": 0.6}, r"warmup must be from 0 to 0\.5, got 0\.6\. Use"),
        (0, 5, {"warmup": math.nan}, r"warmup must be from 0 to 0\.5, got nan\. "),
    ],
)
def test_errors(step: int, steps: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rate(step, steps, **{"base": 0.1, **options})  # type: ignore[arg-type]


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError, match=r"steps must .*\nbase must .*\nwarmup must "):
        learning_rate(0, -1, base=-1, warmup=2)
