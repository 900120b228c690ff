"""Several processes over gloo train one model: same decisions, own shards, one fate."""

from __future__ import annotations

import gc
import io
import itertools
import multiprocessing
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from conftest import SMALL, Batch, Blobs, forkserver, make_crest, make_net, same, sgd, train_step
from torchcrest import ConfigError, WeightedBatch
from torchcrest.active import Draws
from torchcrest.distributed import is_sharded, unwrapped

STEPS = 24
CONFIG = replace(SMALL, tolerance=0.3)
Job = Callable[[int, int], Any]


def launch(job: Job, size: int, path: Path) -> list[Any]:
    """Run a job on each of some ranks; return what they return."""
    process = forkserver().Process(target=_fork, args=(job, size, path))
    process.start()
    process.join(330)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _fork(job: Job, size: int, path: Path) -> None:
    """Start the ranks from a process that has imported the job's module, for all of them, and done nothing else."""
    gc.freeze()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_process, args=(job, rank, size, path)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    for process in processes:
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * size


def _process(job: Job, rank: int, size: int, path: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=size)
    try:
        torch.save(job(rank, size), path / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def error_of(act: Callable[[], Any]) -> str:
    """Return the kind and the text of the error that comes; empty if none does."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Run:
    """A training run of one rank, and what it was trained on."""

    def __init__(self, model: nn.Module, dataset: Any, **kw: Any) -> None:
        self.model, self.optimizer = model, sgd(model)
        self.crest = make_crest(model, dataset, **{"steps": STEPS, "config": CONFIG, **kw})
        self.trace: list[list[int]] = []
        self.states: list[bytes] = []

    def go(self, keep: bool = False) -> Run:
        for batch in self.crest:
            self.trace.append(self.crest.indices.tolist())
            train_step(self.model, self.optimizer, batch)
            if keep:
                file = io.BytesIO()
                torch.save([part.state_dict() for part in (self.model, self.optimizer, self.crest)], file)
                self.states.append(file.getvalue())
        return self

    def load(self, saved: bytes) -> Run:
        states = torch.load(io.BytesIO(saved), weights_only=False)
        parts: list[Any] = [self.model, self.optimizer, self.crest]
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        return self

    def outcome(self) -> dict[str, Any]:
        return {
            "history": self.crest.history,
            "parameters": whole(unwrapped(self.model)),
            "mask": self.crest._active.mask,
            "trace": self.trace,
            "collectives": self.crest._ranks.collectives,
        }


def whole(model: nn.Module) -> dict[str, Any]:
    """Copy the parameters, gathered where they are sharded."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in parameters.items()
    }


def ddp(**settings: Any) -> DistributedDataParallel:
    return DistributedDataParallel(make_net(**settings))


def fsdp(mesh: Any, **settings: Any) -> nn.Module:
    net = make_net(norm=False, **settings)
    fully_shard(net.layers[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def assert_alike(outcomes: list[dict[str, Any]]) -> None:
    """All ranks have gone through the same, on data of their own."""
    first, *others = outcomes
    for other in others:
        assert other["history"] == first["history"]
        assert same(other["parameters"], first["parameters"])
        assert torch.equal(other["mask"], first["mask"])
    for batches in zip(*(outcome["trace"] for outcome in outcomes), strict=True):
        assert len({i for batch in batches for i in batch}) == 16 * len(outcomes), "an example on two ranks"
    checks = [event["passed"] for event in first["history"] if event["event"] == "check"]
    assert {True, False} <= set(checks)
    assert not first["mask"].all()
    # One exchange a check and an exclusion, another where a check has passed (interval), three a region (interval,
    # coresets, norms), and the comparison of settings.
    regions = sum(event["event"] == "region" for event in first["history"])
    told = sum(event["event"] == "quality" for event in first["history"])  # beside what is exchanged anyway
    assert told
    expected = 1 + len(first["history"]) - told + 2 * regions + sum(checks)
    assert {outcome["collectives"] for outcome in outcomes} == {expected}


def test_a_group_without_torch_distributed() -> None:
    with pytest.raises(ConfigError, match=r"process_group must be an initialised .*, got 'str'\. Call init"):
        make_crest(make_net(), Blobs(), process_group="all")


# Shards ----------------------------------------------------------------------------------------------------


class TestShards:
    @settings(max_examples=60)
    @given(st.integers(1, 5), st.integers(1, 6), st.lists(st.booleans(), min_size=30, max_size=60), st.integers(0, 9))
    def test_disjoint_and_equally_often(self, ranks: int, size: int, active: list[bool], seed: int) -> None:
        mask = torch.tensor(active)
        mask[: ranks * size] = True
        draws = [Draws(mask, seed, rank, ranks) for rank in range(ranks)]
        seen = Counter(dict.fromkeys(mask.nonzero()[:, 0].tolist(), 0))
        for _ in range(12):
            drawn = [draw.draw(size).tolist() for draw in draws]
            assert all(len(each) == size for each in drawn)
            together = [i for each in drawn for i in each]
            assert len(set(together)) == ranks * size
            seen.update(together)
            assert set(seen) <= set(mask.nonzero()[:, 0].tolist())
            assert max(seen.values()) - min(seen.values()) <= 1
            assert len({draw.place for draw in draws}) == 1

    def test_a_rank_takes_every_so_many_of_the_pass(self) -> None:
        everyone = torch.ones(20, dtype=torch.bool)
        whole = Draws(everyone, 3).draw(20)
        for rank in range(3):
            assert Draws(everyone, 3, rank, 3).draw(6).tolist() == whole[rank:18:3].tolist()


# DistributedDataParallel -----------------------------------------------------------------------------------


def train(rank: int, size: int) -> Any:
    """Train; resume; be refused."""
    data = Blobs(901)
    whole = Run(ddp(), data).go(keep=True)
    resumed = Run(ddp(), data).load(whole.states[16]).go()

    def load(saved: bytes) -> str:
        return error_of(lambda: Run(ddp(), data).load(saved))

    mine: dict[str, Any] = whole.crest.state_dict()
    alone = {name: value for name, value in mine.items() if name not in ("rank", "ranks")}
    fresh = make_crest(ddp(), data, config=CONFIG, steps=STEPS)
    refusals = {
        "alone": error_of(lambda: fresh.load_state_dict(alone)),
        "other rank": error_of(lambda: fresh.load_state_dict({**mine, "rank": 1 - rank})),
        "more ranks": error_of(lambda: fresh.load_state_dict({**mine, "ranks": 3})),
        "other step": load(whole.states[16 + rank]),
        "one damaged": error_of(lambda: fresh.load_state_dict({**mine, "place": 3} if rank else mine)),
        "seed": error_of(lambda: make_crest(ddp(), data, config=CONFIG, steps=STEPS, seed=rank)),
        "pool": error_of(lambda: make_crest(ddp(), Blobs(90), steps=STEPS)),
        "group": error_of(lambda: make_crest(ddp(), data, config=CONFIG, steps=STEPS, process_group="gloo")),
    }
    pair = dist.new_group([0, 1])
    by_group = Run(ddp(), data, process_group=pair).go()
    return [run.outcome() for run in (whole, resumed, by_group)], refusals


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(train, 2, tmp_path_factory.mktemp("train"))


class TestDDP:
    def test_ranks_go_alike_on_their_own_shards(self, trained: list[Any]) -> None:
        assert_alike([outcomes[0] for outcomes, _ in trained])

    def test_resumes_to_the_bit(self, trained: list[Any]) -> None:
        for (whole, resumed, _), _ in trained:
            assert resumed["trace"] == whole["trace"][17:]
            assert resumed["history"] == whole["history"]
            assert same(resumed["parameters"], whole["parameters"])

    def test_a_group_by_name(self, trained: list[Any]) -> None:
        for (whole, _, by_group), _ in trained:
            assert by_group["history"] == whole["history"]
            assert same(by_group["parameters"], whole["parameters"])

    @pytest.mark.parametrize(
        ("case", "match"),
        [
            ("alone", "CheckpointError: ranks of the checkpoint must be 2, as of this process, got 1. Each rank saves"),
            ("more ranks", "CheckpointError: ranks of the checkpoint must be 2, as of this process, got 3"),
            ("other step", "CheckpointError: step of the checkpoint must be the same on all ranks, got [17, 18]"),
            ("pool", "ConfigError: pool_size must be at most the 90 examples of the data set over 2 ranks, got 48"),
            ("group", "ConfigError: process_group must be an initialised torch.distributed.ProcessGroup that"),
        ],
    )
    def test_refused_on_both(self, trained: list[Any], case: str, match: str) -> None:
        for _, refusals in trained:
            assert match in refusals[case]

    def test_refused_with_the_ranks_named(self, trained: list[Any]) -> None:
        (_, zero), (_, one) = trained
        assert "rank of the checkpoint must be 0, as of this process, got 1" in zero["other rank"]
        assert "rank of the checkpoint must be 1, as of this process, got 0" in one["other rank"]
        assert "seed must be the same on all ranks, got 0 on rank 0 and another on 1. Each rank draws" in zero["seed"]
        assert one["seed"].startswith("ConfigError: seed must be the same on all ranks, got 1 on rank 1")
        assert one["one damaged"].startswith("CheckpointError: The crest state is damaged")
        assert zero["one damaged"].startswith("RankError: Rank 1 of 2 has failed: CheckpointError: The crest state is")


def resting(rank: int, size: int) -> Any:
    """Train for two and a half epochs, those that are ahead of the others rest."""
    run = Run(ddp(), Blobs(307), config=replace(CONFIG, max_extra_visits=0.5)).go()
    visits = run.crest._visits
    assert visits
    return run.trace, run.crest._active.drawn, visits.counts, visits.classes


def test_the_same_examples_rest_on_all_ranks(tmp_path: Path) -> None:
    (trace, drawn, visits, classes), (other, *theirs) = launch(resting, 2, tmp_path)
    assert torch.equal(drawn, theirs[0])
    assert not drawn.all()
    assert classes.equal(Blobs(307).y.int()), "of what the other rank has read, too"
    seen = torch.tensor([*trace, *other]).flatten().bincount(minlength=307)
    assert torch.equal(visits + theirs[1], seen)


# With what else people train -------------------------------------------------------------------------------


def replayed(
    make: Callable[[], nn.Module], accumulate: Callable[[nn.Module, bool], Any], half: bool = False, **changes: Any
) -> Any:
    """Train with Crest, every second batch with a step; then on the same batches without. Nothing may differ."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: WeightedBatch, k: int) -> list[bool]:
        (x, i, y), weights = batch
        found = [p.grad is None for p in optimizer.param_groups[0]["params"]]
        with accumulate(model, k % 2 == 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = model(x, i)
            (F.cross_entropy(out.float(), y, reduction="none") * weights).mean().backward()
        if k % 2:
            optimizer.step()
            optimizer.zero_grad()
        return found

    model = make()
    optimizer, batches, found = sgd(model), [], []
    crest = make_crest(model, Blobs(901), config=replace(SMALL, tolerance=1e-9, **changes), steps=8)
    for k, batch in enumerate(crest):
        batches.append(batch)
        found.append(step(model, optimizer, batch, k))
    plain = make()
    optimizer = sgd(plain)
    found_plain = [step(plain, optimizer, batch, k) for k, batch in enumerate(batches)]
    left = whole(model)
    return same(left, whole(plain)) and found == found_plain, crest.history, left


def no_sync(model: nn.Module, last: bool) -> Any:
    inside: Any = getattr(model, "_orig_mod", model)
    return nullcontext() if last else inside.no_sync()


@contextmanager
def no_gradient_sync(model: Any, last: bool) -> Any:
    """Accumulate whole gradients; between the backwards, selection meets a model that would reduce them."""
    model.set_requires_gradient_sync(last)
    yield
    model.set_requires_gradient_sync(True)


def kept_whole(model: Any, last: bool) -> Any:
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)
    return nullcontext()


def train_otherwise(rank: int, size: int) -> Any:
    mesh = init_device_mesh("cpu", (size,))

    def always(model: nn.Module, last: bool) -> Any:
        return nullcontext()

    compile_model: Any = torch.compile

    def compiled_fsdp() -> nn.Module:
        model = fsdp(mesh)
        model.compile(backend="eager")
        return model

    return {
        "no_sync": replayed(ddp, no_sync),
        "autocast": replayed(ddp, no_sync, True),
        "compiled outside": replayed(lambda: compile_model(ddp(), backend="eager"), no_sync),
        "compiled inside": replayed(
            lambda: DistributedDataParallel(compile_model(make_net(), backend="aot_eager")), no_sync
        ),
        "fsdp": replayed(lambda: fsdp(mesh), always),
        "fsdp accumulating": replayed(lambda: fsdp(mesh), no_gradient_sync),
        "fsdp kept whole": replayed(lambda: fsdp(mesh), kept_whole),
        "fsdp autocast": replayed(lambda: fsdp(mesh), no_gradient_sync, True),
        "fsdp compiled": replayed(compiled_fsdp, no_gradient_sync),
        "fsdp, last layer": replayed(lambda: fsdp(mesh), always, proxy="last_layer"),
        "last layer": replayed(ddp, always, proxy="last_layer", measure_mode="batch_statistics"),
    }


OTHERWISE = [
    "no_sync",
    "autocast",
    "compiled outside",
    "compiled inside",
    "fsdp",
    "fsdp accumulating",
    "fsdp kept whole",
    "fsdp autocast",
    "fsdp compiled",
    "fsdp, last layer",
    "last layer",
]


@pytest.fixture(scope="module")
def trained_otherwise(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(train_otherwise, 2, tmp_path_factory.mktemp("otherwise"))


@pytest.mark.parametrize("way", OTHERWISE)
def test_measuring_does_not_disturb_the_training(trained_otherwise: list[Any], way: str) -> None:
    (zero, history, parameters), (one, other_history, other_parameters) = (each[way] for each in trained_otherwise)
    assert zero
    assert one
    assert history == other_history
    assert same(parameters, other_parameters)
    assert [event for event in history if event["event"] == "check"]


# Streams ---------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Batch]):
    """The same examples over and over, or every so many-th of them."""

    def __init__(self, start: int = 0, step: int = 1) -> None:
        self.blobs, self.start, self.step = Blobs(), start, step

    def __iter__(self) -> Iterator[Batch]:
        return (self.blobs[i % 300] for i in itertools.count(self.start, self.step))


def train_on_stream(rank: int, size: int) -> Any:
    whole = Run(ddp(), Stream()).go(keep=True)
    resumed = Run(ddp(), Stream()).load(whole.states[16]).go()
    sharded = Run(ddp(), Stream(rank, size), stream_sharded=True).go()
    refusal = error_of(lambda: make_crest(ddp(), Stream(), steps=STEPS, stream_sharded=rank == 1))
    return [run.outcome() for run in (whole, resumed, sharded)], refusal


def test_ranks_share_a_stream(tmp_path: Path) -> None:
    ranks = launch(train_on_stream, 2, tmp_path)
    for rank, ((whole, resumed, sharded), refusal) in enumerate(ranks):
        assert {i % 2 for batch in whole["trace"] for i in batch} == {rank}
        assert [[(i - rank) // 2 for i in batch] for batch in whole["trace"]] == sharded["trace"]
        for other in (resumed, sharded, ranks[1 - rank][0][0]):
            assert other["history"] == whole["history"]
            assert same(other["parameters"], whole["parameters"])
        assert "stream_sharded must be the same on all ranks, got" in refusal


# FSDP2 -----------------------------------------------------------------------------------------------------


CURVATURES: dict[str, Any] = {
    "signed": {"curvature": "signed"},
    "first_order": {"curvature": "first_order"},
    "finite_difference": {"curvature": "signed", "curvature_product": "finite_difference"},
}


def train_sharded(rank: int, size: int) -> Any:
    data = Blobs(901)
    mesh = init_device_mesh("cpu", (size,))
    runs = {}
    for curvature, own in CURVATURES.items():
        # DDP averages the norms of the ranks' curvatures, not the curvatures: so intervals may differ.
        kw = {"config": replace(CONFIG, max_interval=1, **own), "steps": 10}
        copied = Run(ddp(norm=False), data, **kw).go()
        sharded = Run(fsdp(mesh), data, **kw).go(keep=True)
        resumed = Run(fsdp(mesh), data, **kw).load(sharded.states[4]).go()
        runs[curvature] = [run.outcome() for run in (copied, sharded, resumed)]
    # A forward of the user's, without gradients, leaves the outermost parameters gathered.
    looked = Run(fsdp(mesh), data)
    with torch.no_grad():
        looked.model(data.x)
    crest = make_crest(looked.model, data, config=replace(CONFIG, tolerance=1e9), steps=8)
    at_rest = all(is_sharded(p) for _ in crest for p in looked.model.parameters())
    assert crest.stats.checks == 2
    names = crest.state_dict()["region"]["parameters"]
    alone = init_device_mesh("cpu", (size, 1), mesh_dim_names=("outer", "inner"))["inner"]
    refusal = error_of(lambda: make_crest(fsdp(alone), data, steps=STEPS))
    return runs, names if at_rest else [], refusal


@pytest.fixture(scope="module")
def trained_sharded(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch(train_sharded, 2, tmp_path_factory.mktemp("sharded"))


def assert_close(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Compare runs but for rounding."""
    assert left["trace"] == right["trace"]
    for events in zip(left["history"], right["history"], strict=True):
        # The norm of a mean is not the mean of norms.
        a, b = ({name: value for name, value in event.items() if "norm" not in name} for event in events)
        assert a.pop("event") == b.pop("event")
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    for name, p in left["parameters"].items():
        torch.testing.assert_close(p, right["parameters"][name], rtol=1e-4, atol=1e-5)


class TestFSDP:
    @pytest.mark.parametrize("curvature", CURVATURES)
    def test_goes_as_ddp_does(self, trained_sharded: list[Any], curvature: str) -> None:
        for runs, _, _ in trained_sharded:
            copied, sharded, _ = runs[curvature]
            assert_close(copied, sharded)

    @pytest.mark.parametrize("curvature", CURVATURES)
    def test_resumes_to_the_bit(self, trained_sharded: list[Any], curvature: str) -> None:
        for runs, _, _ in trained_sharded:
            _, sharded, resumed = runs[curvature]
            assert resumed["history"] == sharded["history"]
            assert same(resumed["parameters"], sharded["parameters"])

    def test_left_sharded_and_under_the_model_s_names(self, trained_sharded: list[Any]) -> None:
        for _, names, _ in trained_sharded:
            assert names == [name for name, _ in make_net(norm=False).named_parameters()]

    def test_another_mesh_is_refused(self, trained_sharded: list[Any]) -> None:
        for _, _, refusal in trained_sharded:
            assert "model must be sharded over the 2 processes of process_group, got 'a mesh of 1'" in refusal


def train_with_a_proxy(own: bool, rank: int, size: int) -> Any:
    config = replace(CONFIG, proxy_source="model", renew=4, max_overhead=1.0, overhead_in="counted")
    if not own:
        config = replace(config, proxy_source="auto", label_noise="estimated", quotas="need", pool_size=64)
    results = []
    builds: list[Callable[[], nn.Module]] = [ddp, lambda: fsdp(init_device_mesh("cpu", (size,)))]
    for build in builds:
        small = [make_net(3) if own else None for _ in range(2)]
        whole, resumed = (Run(build(), Blobs(901), config=config, proxy_model=each) for each in small)
        whole.go(keep=True)
        results.append((whole.outcome(), resumed.load(whole.states[9]).go().outcome()))
    return results


@pytest.mark.parametrize("own", [True, False], ids=["yours", "made"])
def test_each_rank_has_a_proxy_model_of_its_own(own: bool, tmp_path: Path) -> None:
    ranks = launch(partial(train_with_a_proxy, own), 2, tmp_path)
    for (zero, resumed), (one, _) in zip(*ranks, strict=True):
        assert zero["history"] == one["history"]
        assert same(zero["parameters"], one["parameters"])
        assert zero["trace"][10:] == resumed["trace"]
        assert same(zero["parameters"], resumed["parameters"])


# One fate --------------------------------------------------------------------------------------------------


class Faulty(Blobs):
    """Fails at the so-many-th read; or gives an example that has no finite loss, from then on."""

    def __init__(self, at: int, nan: bool = False) -> None:
        super().__init__()
        self.at, self.nan, self.reads = at, nan, 0

    def __getitem__(self, i: int) -> Batch:
        self.reads += 1
        if self.reads == self.at and not self.nan:
            raise OSError("the disk is gone")
        x, index, y = super().__getitem__(i)
        return (x * torch.nan if self.reads == self.at else x), index, y


def fail(rank: int, size: int) -> Any:
    mesh = init_device_mesh("cpu", (size,))
    said = {}
    builds: dict[str, Callable[[], nn.Module]] = {"ddp": ddp, "fsdp": lambda: fsdp(mesh)}
    for name, build in builds.items():
        for at in (1, 12 * 48):  # in the first region, and in a later one
            for nan in (False, True):
                run = Run(build(), Faulty(at if rank == 1 else -1, nan))
                said[name, at, nan] = error_of(run.go), len(run.trace)
    return said


def test_one_rank_fails_and_all_end_with_its_error(tmp_path: Path) -> None:
    zero, one = launch(fail, 2, tmp_path)
    assert len(zero) == 8
    for case, (said, steps) in one.items():
        what = "NonFiniteLossError: The loss is NaN or infinite" if case[2] else "OSError: the disk is gone"
        assert said.startswith(what)
        assert zero[case] == (f"RankError: Rank 1 of 2 has failed: {said}\nIts own output has the traceback.", steps)
        assert (steps > 0) == (case[1] > 1)


# Other numbers of processes --------------------------------------------------------------------------------


def train_alone(rank: int, size: int) -> Any:
    run = Run(make_net(), Blobs()).go()
    return run.outcome(), list(run.crest.state_dict()), run.crest._ranks.collectives


def test_a_single_process_is_as_without_torch_distributed(tmp_path: Path) -> None:
    ((there, keys, collectives),) = launch(train_alone, 1, tmp_path)
    here, own_keys, _ = train_alone(0, 1)
    assert there["history"] == here["history"]
    assert there["trace"] == here["trace"]
    assert same(there["parameters"], here["parameters"])
    assert keys == own_keys
    assert collectives == 0


def train_four(rank: int, size: int) -> Any:
    data = Blobs(1601)
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    config = replace(CONFIG, max_interval=1)
    copied, sharded = (Run(m, data, config=config, steps=4).go() for m in (ddp(norm=False), fsdp(hybrid)))
    return Run(ddp(), data).go().outcome(), copied.outcome(), sharded.outcome()


def test_four_processes(tmp_path: Path) -> None:
    outcomes = launch(train_four, 4, tmp_path)
    assert_alike([plain for plain, _, _ in outcomes])
    for _, copied, sharded in outcomes:
        assert_close(copied, sharded)


def test_the_example_runs() -> None:
    example = Path(__file__).parents[1] / "examples" / "distributed.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(example)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("2 processes, 100 steps, ")
    assert float(second.removeprefix("test accuracy ").rstrip("%")) > 85
