"""Streams, read in their order; and data sets on disk, of which only what is drawn is read."""

from __future__ import annotations

import io
import itertools
import random
from collections import Counter, UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets.distributed import split_dataset_by_node
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from conftest import (
    BOUNDED,
    CRESTS,
    LOADERS,
    SMALL,
    Batch,
    Blobs,
    MakeLoader,
    drain,
    events,
    make_crest,
    make_history,
    make_net,
    parameters_of,
    same,
    sgd,
    train_pass,
)
from torchcrest import CheckpointError, ConfigError, DataError
from torchcrest.active import Draws, Place
from torchcrest.feed import Reading
from torchcrest.streaming import Spot, StreamFeed

STEPS = 13
R = SMALL.pool


class Endless(IterableDataset[Batch]):
    """Blobs in the order of their index, over and over: a stream without an end or a state."""

    def __init__(self) -> None:
        self.blobs = Blobs(300)

    def item(self, i: int) -> Batch:
        x, _, y = self.blobs[i % 300]
        return x + i // 300, torch.tensor(i), y

    def __iter__(self) -> Iterator[Batch]:
        return map(self.item, itertools.count())


class Ending(Endless):
    """The same, ends after 130 examples; every pass is shuffled by its number."""

    length = 130

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def order(self, epoch: int) -> list[int]:
        return random.Random(epoch).sample(range(self.length), self.length)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.item, self.order(self.epochs[-1]))


class Stateful(Ending):
    """The same, knows where it is; what it reads is counted."""

    def __init__(self) -> None:
        super().__init__()
        self.at = self.reads = 0

    def __iter__(self) -> Iterator[Batch]:
        order = self.order(self.epochs[-1])
        while self.at < self.length:
            self.at += 1
            self.reads += 1
            yield self.item(order[self.at - 1])
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state.pop("at")  # what it is given is its own


STREAMS: list[Callable[[], Endless]] = [Endless, Ending, Stateful]


def expected(stream: Endless) -> Iterator[int]:
    """Yield the indices of the items of a stream, by hand."""
    if not isinstance(stream, Ending):
        yield from itertools.count()
    else:
        yield from itertools.chain.from_iterable(stream.order(epoch) for epoch in itertools.count())


def feed_of(dataset: Any, size: int = R, workers: int = 0, **kw: Any) -> StreamFeed:
    return StreamFeed(dataset, size, Reading(num_workers=workers), seed=0, **kw)


@pytest.fixture(params=STREAMS, ids=lambda stream: stream.__name__)
def stream(request: pytest.FixtureRequest) -> Callable[[], Endless]:
    build: Callable[[], Endless] = request.param
    return build


class TestPools:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_pool_k_is_the_kth_r_examples(self, stream: Callable[[], Endless], workers: int) -> None:
        feed, items = feed_of(stream(), workers=workers), expected(stream())
        for k in range(9):
            indices, (x, i, y) = feed.next()
            assert indices.tolist() == list(range(k * R, (k + 1) * R))
            by_hand = [stream().item(next(items)) for _ in range(R)]
            for column, values in zip((x, i, y), zip(*by_hand, strict=True), strict=True):
                assert torch.equal(column, torch.stack(values))

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize(("stream", "by_state"), [(Ending, True), (Stateful, True), (Stateful, False)])
    def test_seek(self, stream: Callable[[], Endless], workers: int, by_state: bool) -> None:
        feed = feed_of(stream(), workers=workers, by_state=by_state)
        places, pools = [feed.place], []
        for _ in range(7):
            pools.append(feed.next())
            places.append(feed.place)
        for k in (5, 0):
            other = feed_of(stream(), workers=workers, by_state=by_state)
            for again in (feed, other):
                again.seek(places[k])
                assert again.place == places[k]
                for indices, data in pools[k:]:
                    got, batch = again.next()
                    assert torch.equal(got, indices)
                    assert all(map(torch.equal, batch, data))

    def test_a_state_spares_the_reading(self) -> None:
        feed = feed_of(Stateful())
        for _ in range(5):
            feed.next()
        place = feed.place
        assert place == Spot(5 * R, 1, 5 * R - 130, {"at": 5 * R - 130})
        for by_state, reads in ((True, R), (False, 6 * R)):
            stream = Stateful()
            again = feed_of(stream, by_state=by_state)
            again.seek(place)
            again.next()
            assert stream.reads == reads

    def test_a_pass_has_its_number(self) -> None:
        stream = Ending()
        feed = feed_of(stream)
        for _ in range(9):
            feed.next()
        assert stream.epochs == [0, 1, 2, 3]

    @pytest.mark.parametrize("ranks", [2, 3])
    def test_ranks_deal_the_examples_out(self, ranks: int) -> None:
        feeds = [feed_of(Ending(), 40, share=(rank, ranks)) for rank in range(ranks)]
        items = list(itertools.islice(expected(Ending()), 1000))
        for k in range(6):
            for rank, feed in enumerate(feeds):
                indices, (_, i, _) = feed.next()
                assert indices.tolist() == list(range(rank, 1000, ranks))[40 * k : 40 * (k + 1)]
                assert i.tolist() == [items[index] for index in indices.tolist()]
        place = feeds[1].place
        again = feed_of(Ending(), 40, share=(1, ranks))
        again.seek(place)
        assert torch.equal(again.next()[0], feeds[1].next()[0])

    def test_an_error_of_the_stream_costs_no_example(self) -> None:
        class Shaky(Endless):
            broken = True

            def item(self, i: int) -> Batch:
                if i == 60 and self.broken:
                    raise OSError("the line is dead")
                return super().item(i)

        stream = Shaky()
        feed = feed_of(stream)
        feed.next()
        for _ in range(2):
            with pytest.raises(OSError, match="the line is dead"):
                feed.next()
        stream.broken = False
        assert feed.next()[0].tolist() == list(range(R, 2 * R))


class InOrder(Draws):
    """Draws 0, 1, 2, ..."""

    def draw(self, size: int) -> Tensor:
        start = self.place.position
        self.place = self.place._replace(position=start + size)
        return torch.arange(start, start + size)


class Indexed(Dataset[Batch]):
    """A stream, as it would be with a length and an index."""

    def __init__(self, stream: Endless, length: int) -> None:
        self.items = [stream.item(i) for i in itertools.islice(expected(stream), length)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Batch:
        return self.items[i]


MAKERS = [make for make in CRESTS if make is not make_history]
MAKER_NAMES = [make.__name__.removeprefix("make_") for make in MAKERS]


class TestCrest:
    @pytest.mark.parametrize("make", MAKERS, ids=MAKER_NAMES)
    @pytest.mark.parametrize("stream", [Endless, Ending])
    def test_as_a_data_set_with_an_index_that_is_drawn_in_order(
        self, stream: Callable[[], Endless], make: MakeLoader
    ) -> None:
        config = {"config": replace(SMALL, exclude=False)} if make is make_crest else {}
        outcomes = []
        for dataset in (stream(), Indexed(stream(), 2000)):
            model = make_net()
            crest: Any = make(model, dataset, steps=STEPS, **config)
            if isinstance(dataset, Indexed):
                crest._feed._plan.draws = InOrder(crest._active.mask, 0)
            trace = train_pass(model, crest)
            regions = [{**event, "active": None} for event in crest.history if event["event"] != "exclude"]
            outcomes.append((trace, regions, parameters_of(model)))
        (trace, history, parameters), (other_trace, other_history, other_parameters) = outcomes
        assert trace == other_trace
        assert history == other_history
        assert same(parameters, other_parameters)

    def test_a_worker_does_not_change_the_run(self, stream: Callable[[], Endless]) -> None:
        whole = Job(stream, make_crest).run(STEPS)
        helped = Job(stream, make_crest, num_workers=1, prefetch_factor=3).run(STEPS)
        whole.assert_same(helped)

    def test_exclusion_is_off(self) -> None:
        crest = make_crest(make_net(), Endless(), config=replace(SMALL, learned_loss=99.0))
        drain(crest)
        assert crest.config.exclude
        assert events(crest, "exclude") == []
        assert crest.stats.active == 0

    def test_errors(self) -> None:
        with pytest.raises(ConfigError, match=r"proxy_source must be another than 'history' for a stream, .* got 'his"):
            make_history(make_net(), Endless())
        with pytest.raises(ConfigError, match=r"num_workers must be 0 or 1 for a stream, got 2\. Each would read a"):
            make_crest(make_net(), Endless(), num_workers=2)
        with pytest.raises(ConfigError, match=r"The data loader refuses its settings: .*prefetch"):
            make_crest(make_net(), Endless(), prefetch_factor=2)

    @pytest.mark.parametrize("length", [0, R - 1])
    def test_shorter_than_a_pool(self, length: int) -> None:
        class Short(Ending):
            pass

        Short.length = length
        crest = make_crest(make_net(), Short())
        match = rf"dataset must hold at least pool_size = 48 examples, got {length}\. Check its path and split, or"
        with pytest.raises(DataError, match=match):
            next(iter(crest))

    def test_as_short_as_the_pools_of_the_ranks(self) -> None:
        feed_of(Ending(), 65, share=(1, 2)).next()
        feed = feed_of(Ending(), 66, share=(1, 2))
        with pytest.raises(DataError, match="hold at least pool_size = 66 examples on each of 2 ranks, got 130"):
            feed.next()

    def test_collate_that_loses_examples(self) -> None:
        crest = make_crest(make_net(), Endless(), collate_fn=lambda examples: torch.zeros(3, 8))
        with pytest.raises(DataError, match="batch must have 48 entries along the first dimension of each tensor"):
            next(iter(crest))

    @pytest.mark.parametrize("make", [make for make in LOADERS if make not in CRESTS], ids=lambda m: m.__name__[5:])
    def test_rivals_need_an_index(self, make: MakeLoader) -> None:
        with pytest.raises(DataError, match=r"dataset must be a map-style data set, .* Crest reads a torch\.utils"):
            make(make_net(), Endless())


# Resuming --------------------------------------------------------------------------------------------------


class Open(nn.Module):
    """A net for batches of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor, i: Tensor | None = None, name: list[str] | None = None) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Job:
    """A run on a stream that can be stopped after any step and carried on by a fresh one."""

    def __init__(self, stream: Callable[[], Any], make: Callable[..., Any], **kw: Any) -> None:
        self.model = Open()
        self.optimizer = sgd(self.model)
        self.crest = make(self.model, stream(), steps=STEPS, **kw)
        self.trace: list[Any] = []

    def run(self, until: int, states: list[bytes] | None = None) -> Job:
        if states is not None:
            states.append(self.save())
        for batch in self.crest:
            x, i, y = inputs_of(batch.data)
            self.trace.append((self.crest.indices.tolist(), i.tolist(), batch.weights.tolist()))
            losses = F.cross_entropy(self.model(x), y, reduction="none")
            (losses * batch.weights).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if states is not None:
                states.append(self.save())
            if len(self.trace) == until:
                break
        return self

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (self.model, self.optimizer, self.crest)], file)
        return file.getvalue()

    def load(self, saved: bytes) -> Job:
        model, optimizer, crest = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.crest.load_state_dict(crest)
        self.trace = [None] * crest["step"]
        return self

    def assert_same(self, other: Job, since: int = 0) -> None:
        assert self.trace[since:] == other.trace[since:]
        assert self.crest.history == other.crest.history
        assert same(parameters_of(self.model), parameters_of(other.model))


def inputs_of(data: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Take points, indices and labels out of the batches of these tests."""
    x, i, y = data if isinstance(data, Sequence) else (data[name] for name in ("x", "i", "labels"))
    return x, i, y


def assert_resumes(stream: Callable[[], Any], make: Callable[..., Any], every: int = 1, **kw: Any) -> Job:
    states: list[bytes] = []
    whole = Job(stream, make, **kw).run(STEPS, states)
    assert len(states) == STEPS + 1
    for step in range(0, STEPS + 1, every):
        resumed = Job(stream, make, **kw).load(states[step]).run(STEPS)
        whole.assert_same(resumed, step)
    return whole


class TestResume:
    def test_at_every_step(self, stream: Callable[[], Endless]) -> None:
        assert_resumes(stream, make_crest)

    @pytest.mark.parametrize("make", MAKERS[1:], ids=MAKER_NAMES[1:])
    def test_with_other_settings(self, make: MakeLoader) -> None:
        assert_resumes(Stateful, make, every=2)

    @pytest.mark.parametrize("by_state", [False, True])
    def test_of_random_augmentation(self, by_state: bool) -> None:
        class Noisy(Stateful):
            def item(self, i: int) -> Batch:
                x, index, y = super().item(i)
                return x + torch.randn(8) + random.random() + np.random.rand(), index, y  # noqa: NPY002

        before = torch.get_rng_state()
        kw: dict[str, Any] = {"stream_state": by_state}
        whole = assert_resumes(Noisy, make_crest, every=5, **kw)
        whole.assert_same(Job(Noisy, make_crest, num_workers=1, **kw).run(STEPS))
        assert torch.equal(torch.get_rng_state(), before)
        other = Job(Noisy, make_crest, seed=1, **kw).run(STEPS)
        assert whole.trace != other.trace

    def test_without_the_state(self) -> None:
        assert_resumes(Stateful, make_crest, every=3, stream_state=False)

    def test_with_a_worker(self, stream: Callable[[], Endless]) -> None:
        assert_resumes(stream, make_crest, every=9, num_workers=1)

    @pytest.mark.parametrize("by_state", [False, True])
    def test_going_back_within_a_loader(self, by_state: bool) -> None:
        whole, job = (Job(Stateful, make_crest, stream_state=by_state) for _ in range(2))
        whole.run(STEPS)
        early, late = job.save(), job.run(7).save()
        for step, saved in ((7, late), (0, early)):
            whole.assert_same(job.run(step + 5).load(saved).run(STEPS), step)

    def test_a_state_in_memory_stays_as_it_was(self) -> None:
        job = Job(Stateful, make_crest).run(7)
        state = job.crest.state_dict()
        before = str(state)
        job.run(STEPS)
        other = Job(Stateful, make_crest)
        other.crest.load_state_dict(state)
        for batch in other.crest:
            for leaf in batch.data:
                leaf.zero_()
        assert str(state) == before

    def test_foreign_states(self) -> None:
        crest, indexed = make_crest(make_net(), Endless()), make_crest(make_net(), Blobs())
        match = r"examples of the checkpoint must be None, .* got 300\. .* None stands for a stream"
        with pytest.raises(CheckpointError, match=match):
            crest.load_state_dict(indexed.state_dict())
        with pytest.raises(CheckpointError, match=r"examples of the checkpoint must be 300, .* got None\. .* None st"):
            indexed.load_state_dict(crest.state_dict())
        sharded = make_crest(make_net(), Endless(), stream_sharded=True)
        with pytest.raises(CheckpointError, match="stream_sharded of the checkpoint must be True, as of this loader"):
            sharded.load_state_dict(crest.state_dict())
        with pytest.raises(CheckpointError, match="state is damaged"):
            crest.load_state_dict({**crest.state_dict(), "place": [1]})

    def test_batches_of_another_kind(self) -> None:
        crest = make_crest(make_net(), Endless())
        next(iter(crest))
        other = make_crest(make_net(), Endless(), collate_fn=lambda examples: torch.zeros(R, 8))
        with pytest.raises(CheckpointError, match=r"batches of the checkpoint must have 1 parts, .* got 3\. Resume wi"):
            other.load_state_dict(crest.state_dict())

    def test_a_stream_that_is_gone(self) -> None:
        class Gone(Ending):
            length = 0

        state = Job(Endless, make_crest).run(1).crest.state_dict()
        with pytest.raises(DataError, match="dataset must hold at least pool_size = 48 examples, got 0"):
            make_crest(make_net(), Gone(), steps=STEPS).load_state_dict(state)


class Row(NamedTuple):
    x: Tensor
    i: Tensor
    y: Tensor


class Encoding(UserDict[str, Any]):
    """Like what tokenizers return."""


def as_row(examples: list[Batch]) -> Row:
    return Row(*map(torch.stack, zip(*examples, strict=True)))


def as_encoding(examples: list[Batch]) -> Encoding:
    x, i, y = map(torch.stack, zip(*examples, strict=True))
    return Encoding({"x": x, "i": i, "labels": y, "name": [f"example {int(k)}" for k in i]})


class TestKinds:
    @pytest.mark.parametrize("collate", [as_row, as_encoding])
    def test_batches_come_back_as_what_they_were(self, collate: Callable[[list[Batch]], Any]) -> None:
        kw: dict[str, Any] = {"collate_fn": collate, "config": BOUNDED}
        whole = assert_resumes(Ending, make_crest, every=4, **kw)
        resumed = Job(Ending, make_crest, **kw).load(whole.save())
        for crest in (whole.crest, resumed.crest):
            assert crest._region is not None
            kinds = {type(coreset.data) for coreset in crest._region.coresets}
            assert len(kinds | {type(crest._region.check_data)}) == 1
            assert kinds < {Row, Encoding}


# Hugging Face ----------------------------------------------------------------------------------------------


def table(examples: int = 150) -> datasets.Dataset:
    blobs = Blobs(examples)
    rows = {"x": blobs.x.tolist(), "i": list(range(examples)), "labels": blobs.y.tolist()}
    return datasets.Dataset.from_dict(rows)


def hf_stream(shuffled: bool = False) -> Any:
    rows = table().to_iterable_dataset(num_shards=3)
    return (rows.shuffle(seed=1, buffer_size=20) if shuffled else rows).with_format("torch")


class TestHuggingFace:
    def test_pools(self) -> None:
        feed, by_hand = feed_of(hf_stream(shuffled=True)), hf_stream(shuffled=True)
        passes: list[list[int]] = []
        for epoch in range(3):
            by_hand.set_epoch(epoch)
            passes.append([int(row["i"]) for row in by_hand])
        assert passes[0] != passes[1]
        found = [i for _ in range(9) for i in feed.next()[1]["i"].tolist()]
        assert found == list(itertools.chain(*passes))[: 9 * R]

    @pytest.mark.parametrize("workers", [0, 1])
    def test_resume(self, workers: int) -> None:
        assert_resumes(hf_stream, make_crest, every=9, num_workers=workers)

    def test_resume_of_a_shuffled_one(self) -> None:
        assert_resumes(lambda: hf_stream(shuffled=True), make_crest, every=9, stream_state=False)

    def test_ranks_that_have_their_own(self) -> None:
        for rank in range(2):
            feed = feed_of(split_dataset_by_node(hf_stream(), rank, 2), 40)
            found = [i for _ in range(3) for i in feed.next()[1]["i"].tolist()]
            assert found[:75] == list(range(150))[rank::2]


# On disk, with an index ------------------------------------------------------------------------------------


class Counted(Dataset[Any]):
    """Counts what is read of a data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.read: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        self.read[i] += 1
        return self.dataset[i]


class CountedTogether(Counted):
    """Reads many examples at a time."""

    def __getitem__(self, i: int) -> Any:
        raise AssertionError("one by one")

    def __getitems__(self, rows: list[int]) -> Any:
        self.read.update(rows)
        together = getattr(self.dataset, "__getitems__", None)
        return together(rows) if together else [self.dataset[i] for i in rows]


class Mapped(Dataset[Batch]):
    """Points in a file."""

    def __init__(self, path: Path, blobs: Blobs) -> None:
        self.y = blobs.y
        np.save(path, blobs.x.numpy())
        self.x = np.load(path, mmap_mode="c")
        assert isinstance(self.x, np.memmap)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], i, self.y[i]


class TestOnDisk:
    LENGTH = 20_000

    @pytest.mark.parametrize("counted", [Counted, CountedTogether])
    @pytest.mark.parametrize("kind", ["memmap", "arrow"])
    def test_only_what_is_drawn_is_read(self, tmp_path: Path, counted: type[Counted], kind: str) -> None:
        def build() -> Any:
            if kind == "memmap":
                return Mapped(tmp_path / "x.npy", Blobs(self.LENGTH))
            on_disk = datasets.load_from_disk(tmp_path / "rows", keep_in_memory=False).with_format("torch")
            assert on_disk.cache_files, "it is in memory"
            return on_disk

        if kind == "arrow":
            table(self.LENGTH).save_to_disk(tmp_path / "rows")
        config = replace(SMALL, exclude=False)  # so that the place in the pass tells what was drawn
        dataset = counted(build())
        job = Job(lambda: dataset, make_crest, config=config).run(9)
        saved = job.save()
        job.run(STEPS)
        place = job.crest._feed.place
        assert isinstance(place, Place)
        assert set(dataset.read.values()) == {1}
        assert len(dataset.read) == place.position < 0.2 * self.LENGTH
        again = counted(build())
        resumed = Job(lambda: again, make_crest, config=config).load(saved)
        region = resumed.crest._region
        assert region is not None
        assert sum(again.read.values()) == (len(region.coresets) + 1) * R, "more than its coresets and check set"
        job.assert_same(resumed.run(STEPS), 9)
