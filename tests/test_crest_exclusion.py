"""Learned examples are set aside; what cannot go well is said in words."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from conftest import SMALL, Batch, Blobs, events, make_crest, make_net, sgd, train_pass, train_step
from torchcrest import Crest, CrestConfig, NonFiniteLossError

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


def classes_of(crest: Crest) -> Tensor:
    """Return the classes that the run knows for the comparison of visits."""
    assert crest._visits
    crest._visits.enter()
    return crest._visits.classes


class TestVisits:
    """`max_extra_visits`."""

    @staticmethod
    def visits(trace: list[tuple[list[int], list[float]]]) -> Tensor:
        return torch.tensor([i for indices, _ in trace for i in indices]).bincount(minlength=300)

    def run(self, steps: int = 120, **changes: Any) -> tuple[Crest, list[tuple[list[int], list[float]]]]:
        model = make_net()
        crest = make_crest(model, Blobs(), config=config(**changes), steps=steps)
        return crest, train_pass(model, crest)

    def test_none_is_far_ahead(self) -> None:
        """Coresets that are used once, 6.4 epochs."""
        once = {"renew": 2, "pool_size": 32, "interval_scale": 4}
        free, bound = (self.visits(self.run(max_extra_visits=extra, **once)[1]) for extra in (None, 0.5))
        classes = Blobs().y.bincount()
        mean = 120 * 16 / 300 * float(classes.float().mean() / classes.min())  # of the rarest class
        # Looked at four times an epoch; a pass over the pools, of two batches each, takes half of one.
        assert bound.max() <= mean + 0.5 + 2 < free.max()
        assert free.float().std() > 2 * bound.float().std()

    def test_not_in_the_first_epoch(self) -> None:
        (_, free), (_, bound) = (self.run(max_extra_visits=extra, steps=18) for extra in (None, 0.1))
        assert free == bound
        (_, free), (_, bound) = (self.run(max_extra_visits=extra, steps=60) for extra in (None, 0.1))
        assert free[:19] == bound[:19]
        assert free != bound

    def test_counts_what_is_handed_out(self) -> None:
        crest, trace = self.run(max_extra_visits=0.5, exclude=True)
        assert crest.stats.active < 300
        assert crest._visits
        assert torch.equal(crest._visits.counts, self.visits(trace))

    @pytest.mark.parametrize("bound", [None, 1e-9], ids=["coresets", "random batches"])
    def test_knows_the_classes_of_what_was_read(self, bound: float | None) -> None:
        crest, _ = self.run(max_extra_visits=0.5, max_overhead=bound, overhead_in="counted", renew=2)
        assert (crest.stats.coresets < 5) == (bound is not None)
        assert classes_of(crest).equal(Blobs().y.int())
        crest, _ = self.run(max_extra_visits=0.5, stratify=False)
        assert len(classes_of(crest).unique()) == 1, "one mean of all, where coresets are not picked by class"

    def test_a_batch_is_the_users_to_change(self) -> None:
        settings = config(max_extra_visits=0.5, max_overhead=1e-9, overhead_in="counted", renew=2)
        crest = make_crest(make_net(), Blobs(), config=settings, steps=120)
        for batch in crest:
            batch.data[1].zero_()
        assert classes_of(crest).equal(Blobs().y.int())

    @pytest.mark.parametrize("workers", [0, 2])
    def test_resumes_to_the_bit(self, workers: int) -> None:
        settings = config(max_extra_visits=0.5, exclude=True)

        def make(model: nn.Module) -> Crest:
            return make_crest(model, Blobs(), config=settings, steps=70, num_workers=workers)

        model = make_net()
        crest, optimizer, trace = make(model), sgd(model), []
        for step, batch in enumerate(crest):
            trace.append(crest.indices.tolist())
            train_step(model, optimizer, batch)
            if step == 40:
                state = copy.deepcopy([crest.state_dict(), model.state_dict(), optimizer.state_dict()])
        assert not crest._active.drawn.all()
        assert trace == [indices for indices, _ in self.run(max_extra_visits=0.5, exclude=True, steps=70)[1]]
        again = make_net(seed=1)
        resumed, optimizer = make(again), sgd(again)
        parts: list[Any] = [resumed, again, optimizer]
        for part, saved in zip(parts, state, strict=True):
            part.load_state_dict(saved)
        rest = []
        for batch in resumed:
            rest.append(resumed.indices.tolist())
            train_step(again, optimizer, batch)
        assert rest == trace[41:]

    def test_a_stream_is_left_alone(self) -> None:
        class Endless(IterableDataset[Batch]):
            def __iter__(self) -> Iterator[Batch]:
                data = Blobs()
                while True:
                    yield from (data[i] for i in range(300))

        def batches(extra: float | None) -> list[list[int]]:
            model = make_net()
            crest = make_crest(model, Endless(), config=config(max_extra_visits=extra), steps=60)
            return [indices for indices, _ in train_pass(model, crest)]

        assert batches(0.5) == batches(None)


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
