"""What does selection cost a rank as processes are added? Random batches against CREST on 1, 2, 4 processes.

Wall-clock means nothing where the processes share cores, so what is counted is each rank's CPU time, all threads:
of a step in all, and of asking for the batch (reading, selecting, checking, curvature, and the exchanges between
ranks that selection makes). The exchanges are counted too. ``random`` is a DataLoader with a DistributedSampler.

    python benchmarks/ranks.py --seeds 0 1 2 --out benchmarks/ranks.jsonl
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchcrest
from torchcrest import Crest, CrestConfig

EXAMPLES, FEATURES, CLASSES = 20_001, 256, 10
WARM_UP = 10  # steps that are not counted


def data() -> TensorDataset:
    """Points around a centre a class, hard to tell apart; a number of them that no number of processes divides."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    return TensorDataset(centres[y] + 6 * torch.randn(EXAMPLES, FEATURES, generator=generator), y)


def build(wrap: str, size: int) -> nn.Module:
    """A net of three layers, 0.4 million parameters, copied or sharded."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))
    if wrap == "ddp":
        return DistributedDataParallel(net)
    mesh = init_device_mesh("cpu", (size,))
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def random_batches(dataset: TensorDataset, steps: int, batch_size: int, seed: int) -> Iterator[Any]:
    """The usual sharded loader, as long as it takes."""
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, seed=seed, drop_last=True)
    loader = DataLoader(dataset, batch_size, sampler=sampler, drop_last=True)
    weights = torch.ones(batch_size)
    for epoch in range(1 + steps // len(loader)):
        sampler.set_epoch(epoch)
        for batch in loader:
            yield batch, weights


def train(model: nn.Module, batches: Iterable[tuple[tuple[Tensor, Tensor], Tensor]], steps: int) -> tuple[float, float]:
    """Return CPU seconds a step in all, and of asking for batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    iterator, asking, begun = iter(batches), 0.0, 0.0
    for step in range(steps):
        if step == WARM_UP:
            asking, begun = 0.0, time.process_time()
        start = time.process_time()
        (x, y), weights = next(iterator)
        asking += time.process_time() - start
        (F.cross_entropy(model(x), y, reduction="none") * weights).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    counted = steps - WARM_UP
    return (time.process_time() - begun) / counted, asking / counted


def work(rank: int, size: int, meeting: str, wrap: str, method: str, seed: int, steps: int, config: Any) -> None:
    """One rank of a run; leaves its record beside the meeting point."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    model, dataset = build(wrap, size), data()
    crest = Crest(model, dataset, config, steps=steps, seed=seed) if method == "crest" else None
    batches = crest or random_batches(dataset, steps, config.batch_size, seed)
    in_all, asking = train(model, batches, steps)
    record: dict[str, Any] = {"rank": rank, "cpu_seconds_per_step": in_all, "cpu_seconds_per_step_asking": asking}
    if crest:
        ranks = crest._ranks
        record["collectives_per_step"] = ranks.collectives / steps
        record["bytes_per_step"] = ranks.bytes / steps
        record["regions"], record["checks"] = crest.stats.regions, crest.stats.checks
        record["examples_forwarded_per_step"] = crest.stats.examples_forwarded / steps
    Path(f"{meeting}.{rank}").write_text(json.dumps(record))
    dist.destroy_process_group()


def main() -> None:
    """Run all, write a record a rank, and print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--wraps", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ranks.jsonl"))
    args = parser.parse_args()
    config = CrestConfig.preset("forward", batch_size=64, pool_size=128)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchcrest", "torch.distributed.fsdp"])
    for wrap, method, size in ((w, m, n) for w in args.wraps for m in ("random", "crest") for n in args.processes):
        found: list[dict[str, Any]] = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                meeting = f"{folder}/meeting"
                given = (size, meeting, wrap, method, seed, args.steps, config)
                processes = [context.Process(target=work, args=(rank, *given)) for rank in range(size)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
                for rank in range(size):
                    record = json.loads(Path(f"{meeting}.{rank}").read_text())
                    about = {"task": "points", "model": "mlp512", "wrap": wrap, "method": method, "processes": size}
                    versions = {"torchcrest": torchcrest.__version__, "torch": torch.__version__}
                    found.append({**about, "seed": seed, "steps": args.steps, **record})
                    with args.out.open("a") as file:
                        line = {**found[-1], "config": asdict(config), "device": platform.processor(), **versions}
                        file.write(json.dumps(line) + "\n")
        names = ("cpu_seconds_per_step", "cpu_seconds_per_step_asking", "collectives_per_step", "bytes_per_step")
        shown = [statistics.mean(each[name] for each in found) for name in names if name in found[0]]
        spread = [statistics.pstdev(1e3 * each[name] for each in found) for name in names[:2]]
        print(
            f"{wrap:5} {method:7} {size} processes: {1e3 * shown[0]:6.2f} ± {spread[0]:.2f} ms a step, "
            f"{1e3 * shown[1]:6.2f} ± {spread[1]:.2f} ms of it asking"
            + (f"; {shown[2]:.2f} collectives, {shown[3]:.0f} bytes" if len(shown) > 2 else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()
