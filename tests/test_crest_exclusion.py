"""Learned examples are set aside; what cannot go well is said in words."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import SMALL, Batch, Blobs, events, make_crest, make_net, sgd, train_pass, train_step
from torchcrest import CrestConfig, NonFiniteLossError

ALWAYS, NEVER = 1e9, 1e-12  # tolerances: every check passes, none does (while parameters move)


def config(**changes: Any) -> CrestConfig:
    return replace(SMALL, **{"exclude": False, **changes})


class TestExclusion:
    def test_dropped_examples_are_never_drawn_again(self) -> None:
        class Recorded(Blobs):
            reads: list[int]

            def __getitem__(self, i: int) -> Batch:
                self.reads.append(i)
                return super().__getitem__(i)

        data = Recorded()
        data.reads = []
        model = make_net()
        crest, optimizer, dropped = make_crest(model, data, steps=90), sgd(model), set[int]()
        for batch in crest:
            assert not dropped & set(data.reads)
            data.reads.clear()
            dropped = set((~crest._active.mask).nonzero()[:, 0].tolist())
            train_step(model, optimizer, batch)
        excluded = events(crest, "exclude")
        assert [event["step"] for event in excluded] == list(range(7, 90, 7))
        assert 20 < len(dropped) == sum(event["excluded"] for event in excluded)
        assert crest.stats.active == excluded[-1]["active"] == 300 - len(dropped)

    def test_only_what_was_below_alpha_all_along(self) -> None:
        """Losses by hand: the even ones are learned but for multiples of ten, which are high once, at the start."""
        data = Blobs(100)
        calls = 0

        def losses(outputs: Tensor, batch: Any) -> Tensor:
            nonlocal calls
            calls += 1
            index = batch[1]
            high = (index % 2 == 1) | ((index % 10 == 0) & (calls <= 1))
            result: Tensor = outputs.sum(1) * 0 + high.float()
            return result

        settings = config(
            exclude=True, pool_size=25, learned_interval=5, interval_scale=5, tolerance=ALWAYS, check="none"
        )
        crest = make_crest(make_net(), data, config=settings, objective=losses, steps=6)
        list(crest)
        gone = set((~crest._active.mask).nonzero()[:, 0].tolist())
        first_pool = set(crest._active.mask.nonzero()[:, 0].tolist()) & set(range(0, 100, 10))
        assert gone <= {i for i in range(100) if i % 2 == 0}
        assert len(gone) == 50 - len(first_pool)
        assert first_pool, "no multiple of ten was in the first pool"

    def test_never_below_what_a_pool_needs(self, blobs: Blobs) -> None:
        model = make_net()
        settings = config(exclude=True, learned_loss=1e6, pool_size=100, learned_interval=2)
        crest = make_crest(model, blobs, config=settings, steps=40)
        train_pass(model, crest)
        assert events(crest, "exclude")[-1]["stopped"]
        assert crest.stats.active == 100
        assert crest._active.mask.sum() == 100

    def test_interval_as_a_share(self, blobs: Blobs) -> None:
        model = make_net()
        crest = make_crest(model, blobs, config=config(exclude=True, learned_interval=0.25), steps=20)
        train_pass(model, crest)
        train_pass(model, crest)
        assert [event["step"] for event in events(crest, "exclude")] == [5, 10, 15, 20, 25, 30, 35]

    def test_off(self, blobs: Blobs) -> None:
        model = make_net()
        crest = make_crest(model, blobs, config=config(learned_loss=1e6))
        train_pass(model, crest)
        assert events(crest, "exclude") == []
        assert crest.stats.active == 300


class TestWarnings:
    def test_more_classes_than_places_warns_once(self) -> None:
        """Once, although each region's pools hold another number of the 60 classes."""
        model = make_net(classes=60)
        crest = make_crest(model, Blobs(classes=60), config=config(batch_size=6, tolerance=NEVER))
        with pytest.warns(UserWarning, match=r"batch_size = 6 is smaller than the number of classes, \d\d") as caught:
            train_pass(model, crest)
        assert len(caught) == 1

    @pytest.mark.parametrize("changes", [{"batch_size": 12}, {"batch_size": 6, "stratify": False}])
    def test_no_needless_warning(self, changes: dict[str, Any]) -> None:
        model = make_net(classes=12)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train_pass(model, make_crest(model, Blobs(classes=12), config=config(**changes)))


class TestNonFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_names_step_and_examples(self, bad: float) -> None:
        data = Blobs(60)
        data.x[37] = bad
        crest = make_crest(make_net(), data, config=config(pool_size=60))
        with pytest.raises(NonFiniteLossError, match=r"NaN or infinite after step 0 for 1 of 60 .*indices 37\)"):
            next(iter(crest))

    def test_parameters_that_went_bad(self, blobs: Blobs) -> None:
        model = make_net()
        crest = make_crest(model, blobs)
        with pytest.raises(NonFiniteLossError, match=r"after step 3 for 48 of 48 .*indices (\d+, ){10}\.\.\.\)"):  # noqa: PT012
            for step, _ in enumerate(crest):
                if step == 2:
                    with torch.no_grad():
                        model.layers[-1].bias.fill_(math.nan)  # type: ignore[operator]
