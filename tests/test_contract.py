"""What every loader promises: passes, streams, resuming, leaving the user's things alone."""

from __future__ import annotations

import functools
import io
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from conftest import (
    Blobs,
    MakeLoader,
    drain,
    events,
    make_crest,
    make_net,
    parameters_of,
    same,
    seeded,
    sgd,
    traces,
    train_pass,
    train_step,
)
from torchcrest import BatchLoader, CheckpointError, ConfigError, CrestConfig, DataError, WeightedBatch
from torchcrest.passes import FORMAT, Passes

STEPS = 20
TOTAL = 2 * STEPS
RESUMED = [0, 1, 6, 7, 13, 19, 20, 21, 34, 39]  # the steps after which runs are resumed


class Job:
    """A training run that can be stopped after any step and carried on by a fresh one."""

    def __init__(self, make_loader: MakeLoader, dataset: Blobs, seed: int = 0, **kw: Any) -> None:
        self.model = make_net()
        self.optimizer = sgd(self.model)
        self.loader = make_loader(self.model, dataset, steps=STEPS, seed=seed, **kw)
        self.trace: list[tuple[list[int], list[float]]] = []
        self.saved: dict[int, bytes] = {}

    def run(self, until: int, saving: Sequence[int] = ()) -> Job:
        """Go on to a step, over passes, and break out of the loop there; keep what is saved after some steps."""
        self.saved |= {0: self.save()} if 0 in saving else {}
        while len(self.trace) < until:
            for batch in self.loader:
                self.trace.append((self.loader.indices.tolist(), batch.weights.tolist()))
                train_step(self.model, self.optimizer, batch, self.loader)
                if len(self.trace) in saving:
                    self.saved[len(self.trace)] = self.save()
                if len(self.trace) == until:
                    break
        return self

    def save(self) -> bytes:
        file = io.BytesIO()
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "loader": self.loader}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> Job:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        self.trace = [([], [])] * state["loader"]["step"]
        return self

    def outcome(self) -> dict[str, Any]:
        """Return all but the clock."""
        stats = {name: value for name, value in asdict(self.loader.stats).items() if "seconds" not in name}
        return {"history": self.loader.history, "stats": stats, "parameters": parameters_of(self.model)}


def assert_same_outcome(left: Job, right: Job) -> None:
    a, b = left.outcome(), right.outcome()
    assert a["history"] == b["history"]
    assert a["stats"] == b["stats"]
    assert same(a["parameters"], b["parameters"])


@functools.cache
def undisturbed(make_loader: MakeLoader) -> Job:
    """Train through both passes and save on the way, once for all tests that only look at it."""
    return Job(make_loader, Blobs()).run(TOTAL, saving=RESUMED)


class TestPasses:
    def test_a_pass_has_len_batches_of_exactly_m(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        loader = make_loader(make_net(), blobs, steps=23)
        assert isinstance(loader, BatchLoader)
        batches = drain(loader)
        assert len(batches) == len(loader) == 23
        for (x, i, y), weights in batches:
            assert x.shape == (16, 8)
            assert i.shape == y.shape == weights.shape == (16,)
            assert len(set(i.tolist())) == 16

    def test_weights_have_mean_one(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        for _, weights in drain(make_loader(make_net(), blobs)):
            assert weights.dtype == torch.float32
            assert not weights.requires_grad
            assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
            assert (weights > 0).all()

    def test_data_is_that_of_the_indices(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        loader = make_loader(make_net(), blobs)
        for (x, i, y), weights in loader:
            loader.observe(weights)
            assert torch.equal(i, loader.indices)
            assert torch.equal(x, blobs.x[i])
            assert torch.equal(y, blobs.y[i])

    def test_unpacks_and_names_its_fields(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        batch = next(iter(make_loader(make_net(), blobs)))
        assert isinstance(batch, WeightedBatch)
        assert batch.data is batch[0]
        assert batch.weights is batch[1]

    def test_second_iter_carries_the_run_on(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        two_passes = undisturbed(make_loader)
        model = make_net()
        loader, optimizer, trace = make_loader(model, blobs, steps=TOTAL, seed=0), sgd(model), []
        for batch in loader:
            trace.append((loader.indices.tolist(), batch.weights.tolist()))
            train_step(model, optimizer, batch, loader)
        assert trace == two_passes.trace
        assert same(parameters_of(model), parameters_of(two_passes.model))

    def test_breaking_out_of_a_pass_begins_a_whole_one(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        job = Job(make_loader, blobs).run(5)
        assert len(drain(job.loader)) == STEPS
        assert job.loader.stats.examples_trained == (5 + STEPS) * 16
        assert job.trace == undisturbed(make_loader).trace[:5]

    def test_examples_trained(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        loader = make_loader(make_net(), blobs, steps=3)
        drain(loader)
        assert loader.stats.examples_trained == 48


class TestStreams:
    def test_same_seed_same_run(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        first = Job(make_loader, blobs, seed=3).run(TOTAL)
        torch.rand(7)  # the user's generator is nobody's business
        second = Job(make_loader, blobs, seed=3).run(TOTAL)
        assert first.trace == second.trace
        assert_same_outcome(first, second)

    def test_another_seed_another_run(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        assert Job(make_loader, blobs, seed=3).run(2).trace != Job(make_loader, blobs, seed=4).run(2).trace

    def test_workers_do_not_change_the_run(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        alone = undisturbed(make_loader)
        helped = Job(make_loader, blobs, num_workers=2, prefetch_factor=3).run(TOTAL)
        assert alone.trace == helped.trace
        assert_same_outcome(alone, helped)
        if "exclude" in {event["event"] for event in alone.loader.history}:
            assert sum(event["excluded"] for event in events(alone.loader, "exclude")) > 0, "nothing was drawn anew"

    def test_closing_ends_the_workers_and_not_the_run(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        alone = undisturbed(make_loader)
        helped = Job(make_loader, blobs, num_workers=2)
        before = set(multiprocessing.active_children())
        for step in (5, 12, TOTAL):
            helped.run(step)
            assert len(set(multiprocessing.active_children()) - before) == 2
            helped.loader.close()
            assert set(multiprocessing.active_children()) <= before
        assert alone.trace == helped.trace
        assert_same_outcome(alone, helped)

    def test_changing_a_batch_does_not_change_the_run(self, make_loader: MakeLoader) -> None:
        def collect(spoil: bool) -> list[Any]:
            # No training and few coresets, so that each comes again and again.
            config = CrestConfig(batch_size=16, pool_size=48, interval_scale=9, max_coresets=2)
            kw = {"config": config} if make_loader is make_crest else {}
            loader, seen = make_loader(make_net(), Blobs(), **kw), []
            for batch in loader:
                seen.append([batch.data[0].tolist(), batch.data[2].tolist(), batch.weights.tolist()])
                loader.observe(batch.weights.clone())
                if spoil:
                    for tensor in (*batch.data, batch.weights):
                        tensor.zero_()
            return seen

        assert collect(spoil=True) == collect(spoil=False)


class TestResume:
    @pytest.mark.parametrize("step", RESUMED)
    def test_resume_anywhere_is_the_same_run(self, make_loader: MakeLoader, blobs: Blobs, step: int) -> None:
        whole = undisturbed(make_loader)
        resumed = Job(make_loader, blobs).load(whole.saved[step]).run(TOTAL)
        assert resumed.trace[step:] == whole.trace[step:]
        assert_same_outcome(resumed, whole)

    def test_a_state_is_that_of_a_loop_that_is_left(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        left = Job(make_loader, blobs).run(7)
        state = torch.load(io.BytesIO(undisturbed(make_loader).saved[7]), weights_only=True)
        now = left.loader.state_dict()
        for each in (state["loader"]["stats"], now["stats"]):
            each.update({name: 0.0 for name in each if "seconds" in name})
        assert str(now) == str(state["loader"])

    def test_resume_with_workers(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        whole = Job(make_loader, blobs).run(STEPS)
        saved = Job(make_loader, blobs, num_workers=2).run(9).save()
        assert_same_outcome(Job(make_loader, blobs).load(saved).run(STEPS), whole)

    def test_resume_finishes_the_pass(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        resumed = Job(make_loader, blobs).load(Job(make_loader, blobs).run(13).save())
        assert [len(drain(resumed.loader)) for _ in range(2)] == [STEPS - 13, STEPS]
        resumed.load(Job(make_loader, blobs).run(13).save())
        next(iter(resumed.loader))  # and break out of what is left
        assert len(drain(resumed.loader)) == STEPS

    def test_saved_at_the_last_step_nothing_is_left_of_the_pass(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        resumed = Job(make_loader, blobs).load(Job(make_loader, blobs).run(STEPS).save())
        assert [len(drain(resumed.loader)) for _ in range(2)] == [0, STEPS]

    def test_saved_after_a_pass_the_next_is_whole(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        job = Job(make_loader, blobs)
        assert len(drain(job.loader)) == STEPS
        resumed = Job(make_loader, blobs).load(job.save())
        assert len(drain(resumed.loader)) == STEPS

    def test_a_state_in_memory_stays_as_it_was(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        job = Job(make_loader, blobs).run(9)
        on_disk = job.save()
        state = job.loader.state_dict()
        file = torch.load(io.BytesIO(on_disk), weights_only=True)
        job.run(TOTAL)
        assert str(state) == str(file["loader"])

    def test_going_back_within_a_loader(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        whole = undisturbed(make_loader)
        job = Job(make_loader, blobs).run(9)
        saved = job.save()
        job.run(31)
        job.load(saved).run(TOTAL)
        assert job.trace[9:] == whole.trace[9:]
        assert_same_outcome(job, whole)


class TestForeignStates:
    @pytest.mark.parametrize("state", [{"weight": 1}, {}, [1], None], ids=["model's", "empty", "list", "none"])
    def test_foreign(self, make_loader: MakeLoader, blobs: Blobs, state: Any) -> None:
        with pytest.raises(
            CheckpointError, match=r"state must come from state_dict\(\), got .* Is it another library's"
        ):
            make_loader(make_net(), blobs).load_state_dict(state)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"format": 99}, f"state must have format {FORMAT}, got 99"),
            ({"steps": 7}, "steps of the checkpoint must be 20, as of this loader, got 7"),
            ({"seed": 7}, "seed of the checkpoint must be 0, as of this loader, got 7"),
            ({"examples": 7}, "examples of the checkpoint must be 300, as of this loader, got 7"),
            (
                {"method": "magic"},
                r"method of the checkpoint must be '\w+', as of this loader, got 'magic'",
            ),
            ({"settings": {}}, "batch_size of the checkpoint must be 16, as of this loader, got None"),
        ],
        ids=["format", "steps", "seed", "examples", "method", "settings"],
    )
    def test_made_otherwise(self, make_loader: MakeLoader, blobs: Blobs, change: dict[str, Any], match: str) -> None:
        loader = make_loader(make_net(), blobs)
        with pytest.raises(CheckpointError, match=match):
            loader.load_state_dict({**loader.state_dict(), **change})

    def test_all_differences_at_once(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        loader = make_loader(make_net(), blobs)
        with pytest.raises(CheckpointError, match=r"(?s)steps of.*seed of"):
            loader.load_state_dict({**loader.state_dict(), "steps": 1, "seed": 1})

    def test_other_data(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        state = make_loader(make_net(), Blobs(200)).state_dict()
        with pytest.raises(CheckpointError, match="examples of the checkpoint must be 300"):
            make_loader(make_net(), blobs).load_state_dict(state)

    def test_damaged(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        job = Job(make_loader, blobs).run(3)
        state = job.loader.state_dict()
        for key in state.keys() - job.loader._identity().keys():
            damaged = {name: value for name, value in state.items() if name != key}
            with pytest.raises(CheckpointError, match=f"state is damaged .*{key}.* Use an older one"):
                make_loader(make_net(), blobs).load_state_dict(damaged)

    @pytest.mark.parametrize("key", ["history", "stats", "place", "step"])
    def test_damaged_values(self, make_loader: MakeLoader, blobs: Blobs, key: str) -> None:
        loader = make_loader(make_net(), blobs)
        with pytest.raises(CheckpointError, match="state is damaged"):
            loader.load_state_dict({**loader.state_dict(), key: ["nonsense"]})


class TestUsersThings:
    @pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
    def test_asking_for_batches_leaves_no_trace(self, make_loader: MakeLoader, blobs: Blobs, grad: bool) -> None:
        model = make_net(dropout=0.5)
        model.layers[1].eval()  # a frozen batch normalisation
        for p in model.parameters():
            p.grad = torch.full_like(p, 3.0) if grad else None
        loader = make_loader(model, blobs)
        before = traces(model)
        drain(loader)
        assert traces(model) == before

    def test_building_leaves_no_trace(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        model = make_net()
        before = traces(model)
        make_loader(model, blobs).load_state_dict(make_loader(model, blobs).state_dict())
        assert traces(model) == before


class TestBadInput:
    @pytest.mark.parametrize("steps", [0, -1, 1.5, True, "9"])
    def test_steps(self, make_loader: MakeLoader, blobs: Blobs, steps: Any) -> None:
        with pytest.raises(ConfigError, match=f"steps must be a whole number of at least 1, got {steps!r}"):
            make_loader(make_net(), blobs, steps=steps)

    @pytest.mark.parametrize("seed", [-1, 1.5, None])
    def test_seed(self, make_loader: MakeLoader, blobs: Blobs, seed: Any) -> None:
        with pytest.raises(ConfigError, match=f"seed must be a whole number of at least 0, got {seed!r}"):
            make_loader(make_net(), blobs, seed=seed)

    def test_empty(self, make_loader: MakeLoader) -> None:
        with pytest.raises(DataError, match="dataset must hold examples, got 'an empty one'"):
            make_loader(make_net(), TensorDataset(torch.empty(0, 8), torch.empty(0, dtype=torch.long)))

    @pytest.mark.parametrize("dataset", [(i for i in range(3)), {1, 2}], ids=["generator", "set"])
    def test_not_map_style(self, make_loader: MakeLoader, dataset: Any) -> None:
        with pytest.raises(DataError, match="dataset must be a map-style data set, with __len__ and __getitem__"):
            make_loader(make_net(), dataset)

    def test_data_loader_settings(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        with pytest.raises(ConfigError, match=r"The data loader refuses its settings: .*num_workers"):
            make_loader(make_net(), blobs, num_workers=-1)

    def test_collate_that_loses_examples(self, make_loader: MakeLoader, blobs: Blobs) -> None:
        def collate(examples: list[Any]) -> Any:
            return torch.zeros(3, 8), torch.zeros(3, dtype=torch.long)

        with pytest.raises(DataError, match=r"batch must have \d+ entries along the first dimension of each tensor"):
            next(iter(make_loader(make_net(), blobs, collate_fn=collate)))


def test_dict_batches(make_loader: MakeLoader, blobs: Blobs) -> None:
    def collate(examples: list[Any]) -> dict[str, Any]:
        x, i, y = zip(*examples, strict=True)
        return {"x": torch.stack(x), "name": [f"example {int(k)}" for k in i], "labels": torch.stack(y)}

    class Named(torch.nn.Linear):
        def forward(self, x: torch.Tensor, name: list[str]) -> torch.Tensor:  # type: ignore[override]
            assert len(name) == len(x)
            return super().forward(x)

    loader: Passes = make_loader(seeded(lambda: Named(8, 4)), blobs, collate_fn=collate)
    for batch, weights in loader:
        loader.observe(weights)
        assert batch["name"] == [f"example {i}" for i in loader.indices.tolist()]
        assert torch.equal(batch["x"], blobs.x[loader.indices])
        assert torch.equal(batch["labels"], blobs.y[loader.indices])


def test_small_config_does_all_that_it_should(blobs: Blobs) -> None:
    """The contract above means little where no check fails, none passes or nothing is excluded."""
    loader = make_crest(make_net(), blobs, steps=TOTAL)
    train_pass(loader._meter.model, loader)
    passed = [event["passed"] for event in events(loader, "check")]
    assert {True, False} <= set(passed)
    assert sum(event["excluded"] for event in events(loader, "exclude")) > 0
