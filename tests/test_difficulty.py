"""The record of each example: counted by hand, kept through a resume, without a trace on the run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import IterableDataset

from conftest import (
    BOUNDED,
    LOADERS,
    SMALL,
    Blobs,
    MakeLoader,
    events,
    hand_over,
    make_crest,
    make_history,
    make_net,
    make_random,
    sgd,
    traces,
    train_pass,
    train_step,
)
from torchcrest import CheckpointError, ConfigError, Crest, Difficulty, Regression
from torchcrest.difficulty import is_learned
from torchcrest.passes import Passes

ON = replace(SMALL, difficulty=True)


def recorded(loader: Passes) -> Difficulty:
    assert loader.difficulty is not None
    loader.difficulty.enter()
    return loader.difficulty


def contents(record: Difficulty) -> dict[str, Any]:
    state = record.state_dict()
    arrays = {name: tensor.numpy().tobytes() for name, tensor in state["arrays"].items()}
    log = state["log"] and {name: tensor.numpy().tobytes() for name, tensor in state["log"].items()}
    return {**arrays, "exclusions": state["exclusions"], "trained": state["trained"], "log": log}


# The record by itself --------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), min_size=3, max_size=3), max_size=90))
def test_events_by_hand(history: list[list[tuple[bool, int]]]) -> None:
    """Three examples, all seen each time; what is noted stays as it was, whatever becomes of the user's tensors."""
    record = Difficulty(3)
    for step, seen in enumerate(history):
        outputs = torch.tensor([[0.0, 1.0] if right else [1.0, 0.0] for right, _ in seen])
        order = torch.tensor([2, 0, 1] if step % 2 else [0, 1, 2])
        losses, outputs = torch.tensor([float(loss) for _, loss in seen])[order], outputs[order]
        record.note(step, order, losses, outputs, torch.ones(3, dtype=torch.int64))
        losses += 1
        outputs.neg_()
    record.enter()
    for example in range(3):
        rights = [seen[example][0] for seen in history]
        assert record.forgotten[example] == sum(a and not b for a, b in pairwise(rights))
        assert record.seen[example] == min(len(rights), 63)
        assert record.learned[example] == (rights[-1] if rights else False)
        assert record.ever_learned[example] == any(rights)
        assert record.loss[example] == history[-1][example][1] if history else np.isnan(record.loss[example])


def test_the_mean_is_that_of_all_losses_and_fades_after_63() -> None:
    record, mean = Difficulty(1), 0.0
    for count, loss in enumerate([6.0, 2.0, 1.0, *(k % 9 for k in range(97))], 1):
        record.note(0, torch.tensor([0]), torch.tensor([loss]))
        record.enter()
        mean += (loss - mean) / min(count, 63)
        assert record.mean_loss[0] == pytest.approx(mean, rel=1e-2)
        assert count > 3 or record.mean_loss[0] == (6, 4, 3)[count - 1]


def test_counts_stop_at_the_largest_number() -> None:
    record = Difficulty(2)
    one = torch.tensor([0])
    for step in range(620):
        record.note(step, one, torch.tensor([float(step % 2)]))  # learned, forgotten, learned, ...
    record.enter()
    assert (record.forgotten[0], record.seen[0], record.forgotten[1]) == (255, 63, 0)
    assert not record.learned[0]
    record.pooled[:] = record.picked[:] = 65534
    for _ in range(3):
        record.pick(0, torch.tensor([1, 0]), one, torch.ones(1))
    assert record.pooled.tolist() == [65535, 65535]
    assert record.picked.tolist() == [65534, 65535]  # row 0 of the pool is example 1
    active = torch.ones(2, dtype=torch.bool)
    for step in range(1, 301):
        active[1] = step < 280
        record.exclude(step, active)
    assert record.excluded.tolist() == [-1, 255]  # the 255th stands for all that follow
    record.note(0, one, torch.tensor([1e9]))
    record.enter()
    assert record.loss[0] == np.finfo(np.float16).max


def test_it_takes_eleven_bytes_an_example() -> None:
    """With the active set's five that makes sixteen."""
    record = Difficulty(1000)
    held = [value for value in vars(record).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in held) == 11 * 1000
    assert {id(array) for array in held} == {id(array) for array in record._arrays().values()}
    sets = make_crest(make_net(), Blobs())._active
    assert sets.mask.nbytes + sets.largest.nbytes == 5 * 300


def test_the_device_is_not_waited_for_until_much_is_noted() -> None:
    record = Difficulty(1)
    for step in range(63):
        record.note(step, torch.tensor([0]), torch.zeros(1))
    assert record.seen[0] == 0
    record.note(63, torch.tensor([0]), torch.zeros(1))
    assert record.seen[0] == 63


@pytest.mark.parametrize(
    ("outputs", "labels", "expected"),
    [
        (torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([0, 0]), [True, False]),
        (torch.tensor([[2.0], [1.0]]), torch.tensor([0, 0]), [False, True]),  # one output: no argmax to speak of
        (torch.tensor([2.0, 1.0]), torch.tensor([0, 0]), [False, True]),
        (torch.zeros(2, 3, 4), None, [False, True]),
        (None, torch.tensor([0, 0]), [False, True]),
    ],
    ids=["classes", "one output", "scores", "dense", "no outputs"],
)
def test_learned_is_right_or_a_low_loss(outputs: Tensor | None, labels: Tensor | None, expected: list[bool]) -> None:
    assert is_learned(torch.tensor([0.3, 0.05]), outputs, labels, 0.1).tolist() == expected


# In the loaders --------------------------------------------------------------------------------------------------


class ByHand:
    """What a record must hold, from what the model was seen to say, in dictionaries."""

    def __init__(self) -> None:
        self.rights: dict[int, list[bool]] = defaultdict(list)
        self.losses: dict[int, list[float]] = defaultdict(list)
        self.pooled: dict[int, int] = defaultdict(int)
        self.picked: dict[int, int] = defaultdict(int)
        self.trained: list[tuple[int, bool]] = []  # events so far, and whether the prediction was right

    def see(self, indices: Tensor, losses: Tensor, outputs: Tensor, labels: Tensor) -> None:
        for i, loss, output, label in zip(
            indices.tolist(), losses.tolist(), outputs.tolist(), labels.tolist(), strict=True
        ):
            self.rights[i].append(output.index(max(output)) == label)
            self.losses[i].append(loss)

    def step(self, model: Any, optimizer: torch.optim.Optimizer, batch: Any, loader: Passes) -> None:
        """Take a training step that is observed, and written down."""
        x, index, y = batch.data
        outputs = model(x)
        losses = F.cross_entropy(outputs, y, reduction="none")
        loader.observe(losses, outputs)
        self.see(index, losses, outputs, y)
        for i in index.tolist():
            self.trained.append((sum(a and not b for a, b in pairwise(self.rights[i])), self.rights[i][-1]))
        (losses * batch.weights).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def check(self, record: Difficulty, examples: int) -> None:
        for i in range(examples):
            rights = self.rights[i]
            forgotten = sum(a and not b for a, b in pairwise(rights))
            assert (record.forgotten[i], record.seen[i]) == (forgotten, len(rights))
            assert (record.pooled[i], record.picked[i]) == (self.pooled[i], self.picked[i])
            if rights:
                assert (record.learned[i], record.ever_learned[i]) == (rights[-1], any(rights))
                assert record.loss[i] == np.float16(self.losses[i][-1])

    def check_trained(self, record: Difficulty) -> None:
        forgotten, rights = zip(*self.trained, strict=True)
        found = record.trained_on()
        assert found["trained_difficulty"] == sum(forgotten) / len(forgotten) > 0
        assert found["trained_unlearned"] == rights.count(False) / len(rights)
        assert found["mean_difficulty"] == record.forgotten.mean()
        assert found["mean_unlearned"] == (~record.learned).mean()
        assert record.trained_on()["trained_difficulty"] == 0, "nothing since the last time"


@pytest.mark.parametrize("source", ["forward", "history"])
def test_crest_s_record_is_that_of_a_recorder_by_hand(monkeypatch: pytest.MonkeyPatch, source: Any) -> None:
    """Every measurement of the model and every step of training is seen, and every pool and coreset counted."""
    data, model, hand = Blobs(), make_net(), ByHand()
    config = replace(BOUNDED, difficulty=True, proxy_source=source)
    crest = make_crest(model, data, config=config, steps=40)
    forward, select = crest._meter.forward, crest._select

    def measured(inputs: Any, examples: int) -> Any:
        found = forward(inputs, examples)
        _, index, y = inputs
        hand.see(index, F.cross_entropy(found[0], y, reduction="none"), found[0], y)
        return found

    def selected(pools: list[Any]) -> list[Any]:
        coresets = select(pools)
        for pool, coreset in zip(pools, coresets, strict=True):
            for counts, indices in ((hand.pooled, pool.indices), (hand.picked, coreset.indices)):
                for i in indices.tolist():
                    counts[i] += 1
        return coresets

    monkeypatch.setattr(crest._meter, "forward", measured)
    monkeypatch.setattr(crest, "_select", selected)
    optimizer = sgd(model)
    for batch in crest:
        hand.step(model, optimizer, batch, crest)
    record = recorded(crest)
    hand.check(record, 300)
    hand.check_trained(record)
    assert record.forgotten.sum() > 20
    gone = {event["step"]: event["excluded"] for event in events(crest, "exclude") if event["excluded"]}
    steps, counts = np.unique(record.excluded, return_counts=True)
    assert dict(zip(steps.tolist(), counts.tolist(), strict=True)) == {-1: int(crest._active.mask.sum()), **gone}
    assert gone
    assert ((record.excluded == -1) == crest._active.mask.numpy()).all()


def test_random_batches_are_recorded_as_they_are_observed(blobs: Blobs) -> None:
    model, hand = make_net(), ByHand()
    loader = make_random(model, blobs, steps=60)
    loader.difficulty = Difficulty(300)
    optimizer = sgd(model)
    for batch in loader:
        hand.step(model, optimizer, batch, loader)
    hand.check(recorded(loader), 300)
    hand.check_trained(recorded(loader))


def test_without_classes_a_low_loss_is_learned() -> None:
    class Points(Blobs):
        def __getitem__(self, i: int) -> Any:
            return self.x[i], self.x[i, :1]

    model = make_net(classes=1)
    config = replace(ON, learned_loss=0.5, curvature="first_order")
    crest = make_crest(model, Points(), config=config, objective=Regression(), steps=20)
    optimizer = sgd(model)
    for batch in crest:
        x, y = batch.data
        (batch.weights * (model(x) - y).square()[:, 0]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    record = recorded(crest)
    seen = record.seen > 0
    assert (record.learned[seen] == (record.loss < 0.5)[seen]).all()
    assert 0 < record.learned.sum() < seen.sum()


@pytest.mark.parametrize("make", LOADERS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_the_batches_are_the_same_and_nothing_else_changes(make: MakeLoader, blobs: Blobs) -> None:
    def run(on: bool) -> tuple[Any, Any]:
        model = make_net(dropout=0.2)
        torch.manual_seed(5)
        loader = make(model, blobs)
        loader.difficulty = Difficulty(300) if on else None
        trace = train_pass(model, loader)
        return trace, {name: found for name, found in traces(model).items() if name != "parameters"}

    with torch.random.fork_rng(devices=[]):
        plain, marked = run(False), run(True)
    assert plain == marked


def test_the_setting_is_the_same_as_a_record_of_one_s_own(blobs: Blobs) -> None:
    runs = []
    for config in (ON, SMALL):
        model = make_net()
        crest = make_crest(model, blobs, config=config)
        if config is SMALL:
            crest.difficulty = Difficulty(300, SMALL.learned_loss)
        runs.append((train_pass(model, crest), contents(recorded(crest))))
    assert runs[0] == runs[1]
    assert "difficulty" not in make_crest(make_net(), blobs).state_dict()


@pytest.mark.parametrize("make", [make_crest, make_history, make_random], ids=["crest", "history", "random"])
@pytest.mark.parametrize("stop", [3, 11, 26])
def test_a_resumed_run_keeps_the_same_record(make: MakeLoader, blobs: Blobs, stop: int) -> None:
    def fresh() -> tuple[Any, Any, Passes]:
        model = make_net()
        loader = make(model, blobs, steps=30)
        loader.difficulty = Difficulty(300)
        loader.difficulty.keep_log()
        return model, sgd(model), loader

    def go(model: Any, optimizer: Any, loader: Passes, until: int | None) -> None:
        for batch in loader:
            train_step(model, optimizer, batch, loader)
            if loader._step == until:
                break

    whole = fresh()
    go(*whole, None)
    first = fresh()
    go(*first, stop)
    again = fresh()
    hand_over(first, again)
    go(*again, None)
    assert contents(recorded(again[2])) == contents(recorded(whole[2]))


def test_a_state_is_a_copy() -> None:
    record = Difficulty(3)
    record.keep_log()
    record.note(0, torch.tensor([0]), torch.ones(1))
    state = record.state_dict()
    record.note(1, torch.tensor([0]), torch.zeros(1))
    record.enter()
    assert state["log"]["seen_step"].tolist() == [0]
    assert state["arrays"]["loss"][0] == 1
    other = Difficulty(3)
    other.load_state_dict(state)
    other.note(1, torch.tensor([0]), torch.zeros(1))
    other.enter()
    assert contents(other) == contents(record)
    assert state["arrays"]["loss"][0] == 1


def test_a_state_without_a_record_is_refused(blobs: Blobs) -> None:
    state = make_random(make_net(), blobs).state_dict()
    loader = make_random(make_net(), blobs)
    loader.difficulty = Difficulty(300)
    with pytest.raises(CheckpointError, match="state must hold a record of difficulty, which is asked for, got None"):
        loader.load_state_dict(state)


def test_a_stream_has_no_record() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield Blobs()[0]

    with pytest.raises(ConfigError, match="difficulty must be False for a stream"):
        Crest(make_net(), Stream(), ON, steps=5)
    with pytest.raises(ConfigError, match="difficulty must be True or False, got 1"):
        replace(SMALL, difficulty=1)  # type: ignore[arg-type]
