"""Data-parallel training: what ranks tell each other, and models that are wrapped or sharded.

Each rank draws and measures on its own. What decides (loss, prediction, norms) is averaged over the ranks first,
so all decide alike, with no leader.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchcrest.errors import CheckpointError, ConfigError, RankError, must

__all__ = ["Ranks", "is_sharded", "reshard", "unwrapped", "whole_parameters"]

NUMBERS = 8  # that ranks exchange at once; always as many, so that a rank that fails can stand in anywhere
MESSAGE = 2000  # bytes of an error's message that reach the other ranks


class Ranks:
    """The processes that train one model together; all does nothing where there is only one.

    The collectives run on the model's device, as those of its gradients do, so any backend that trains the model
    serves. An error in a :meth:`guard` ends all ranks: the rank that fails takes its part in the exchange that the
    others come to, and says there that it has failed. A process that is killed, or fails elsewhere, can tell
    nobody: ending the others then is up to ``torchrun``, or to the backend's timeout.

    Args:
        device: returns the model's device.
        group: the processes; None: all of them, if ``torch.distributed`` is initialised.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        sharded: the model is sharded over them, so that its forward is a collective.
        collectives: how many this rank has taken part in.
        bytes: what they carried, as far as it was this rank's tensor that was reduced.

    Raises:
        ConfigError: no process group, or one that this process is not in.
    """

    def __init__(self, device: Callable[[], torch.device], group: Any = None) -> None:
        self.rank, self.size = 0, 1
        self.collectives = self.bytes = 0
        self._device = device
        self._group = group
        self.sharded = False
        self._told: Exception | None = None  # the error that the other ranks know of
        ready = dist.is_available() and dist.is_initialized()
        if group is not None and not (ready and isinstance(group, dist.ProcessGroup)):
            do = "Call init_process_group first and use what new_group or mesh.get_group returns; or leave it out."
            want = "be an initialised torch.distributed.ProcessGroup that this process is in"
            raise ConfigError(must("process_group", want, type(group).__name__, do))
        if ready:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    # Numbers ---------------------------------------------------------------------------------------------

    def average(self, *numbers: float, norms: Sequence[float] = ()) -> list[float]:
        """Return the mean over the ranks of each number, in one exchange and the same to the bit on all of them.

        Args:
            numbers: plain means are taken of them.
            norms: roots of the means of their squares are taken, and returned behind the others. Of the norms of
                the parts of a sharded tensor, times the root of their number, that is the norm of the whole.

        Raises:
            RankError: another rank has failed.
        """
        if self.size == 1:
            return [*numbers, *norms]
        rows = self._exchange([*numbers, *(norm * norm for norm in norms)])
        means = [sum(column) / self.size for column in zip(*rows, strict=True)]
        return [*means[: len(numbers)], *map(math.sqrt, means[len(numbers) : len(numbers) + len(norms)])]

    def maximise(self, values: Tensor) -> None:
        """Put the largest of the ranks' values in the place of each, in place."""
        if self.size > 1:
            there = values.to(self._device())
            self._reduce(there, dist.ReduceOp.MAX)
            values.copy_(there)

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of the ranks' values; of one process alone, its own."""
        if self.size == 1:
            return values
        there = values.to(self._device(), copy=True)
        self._reduce(there, dist.ReduceOp.SUM)
        return there.to(values.device)

    def spread(self, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Return of each tensor the mean over the ranks, sharded as its parameter is; of whole ones, its own."""
        return [self._scattered(t, p) if is_sharded(p) else t for t, p in zip(tensors, like, strict=False)]

    def _scattered(self, tensor: Tensor, like: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        if self.size > 1:
            self.collectives += 1
            self.bytes += tensor.nbytes
        parts = DTensor.from_local(tensor / self.size, like.device_mesh, [Partial()] * like.device_mesh.ndim)
        return parts.redistribute(placements=like.placements)

    # Failures --------------------------------------------------------------------------------------------

    @contextmanager
    def guard(self, tell: bool = True) -> Iterator[None]:
        """Tell the others of an error inside, at the exchange that they come to next; there must be one.

        Args:
            tell: False where the others wait in the model's own collectives, so that this rank can only end.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and error is not self._told:
                self._told = error
                if tell:
                    with suppress(RuntimeError):  # the connection's error must not hide this one
                        self._exchange((), error)
            raise

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Run the model inside. All ranks do, or none: a sharded model waits for the other ranks."""
        if self.sharded:
            self.average()
        with self.guard(tell=not self.sharded):
            yield

    def _exchange(self, numbers: Sequence[float], error: Exception | None = None) -> list[list[float]]:
        """Return every rank's numbers, one row a rank. A rank with an error only tells of it."""
        row = [float(error is not None), *numbers, *[0.0] * (NUMBERS - len(numbers))]
        assert len(row) == NUMBERS + 1
        rows: list[list[float]] = self._gather(torch.tensor(row, dtype=torch.float64)).tolist()
        failed = [rank for rank, (flag, *_) in enumerate(rows) if flag]
        if failed:
            text = f"{type(error).__name__}: {error}".encode()[:MESSAGE] if error else b""
            padded = torch.tensor(list(text.ljust(MESSAGE, b"\0")), dtype=torch.uint8)
            messages = [bytes(line).rstrip(b"\0").decode(errors="ignore") for line in self._gather(padded).tolist()]
            if error is None:
                self._told = RankError.of({rank: messages[rank] for rank in failed}, self.size)
                raise self._told
        return [numbers for _, *numbers in rows]

    def _gather(self, row: Tensor) -> Tensor:
        """Return ``[size, n]``, a row a rank, on the CPU: a sum in which all other summands are zero."""
        table = torch.zeros(self.size, len(row), dtype=row.dtype)
        table[self.rank] = row
        table = table.to(self._device())
        self._reduce(table, dist.ReduceOp.SUM)
        return table.cpu()

    def _reduce(self, tensor: Tensor, op: Any) -> None:
        dist.all_reduce(tensor, op, group=self._group)
        self.collectives += 1
        self.bytes += tensor.nbytes

    # Refusals --------------------------------------------------------------------------------------------

    def agree(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """Compare the settings with those of the other ranks, and see whether the model is sharded over them.

        Raises:
            ConfigError: they are not the same, or the model is sharded over other processes.
        """
        problems = []
        parameters: list[Any] = list(reshard(model).parameters())
        meshes = {p.device_mesh.size() for p in parameters if is_sharded(p)}
        self.sharded = bool(meshes)
        for got in meshes - {self.size}:
            want, do = f"be sharded over the {self.size} processes of process_group", "Use mesh.get_group()."
            problems.append(must("model", want, f"a mesh of {got}", do))
        if self.size > 1:
            sums = [zlib.crc32(repr(value).encode()) for value in settings.values()]
            theirs = self._gather(torch.tensor(sums, dtype=torch.int64))
            for (name, value), column in zip(settings.items(), theirs.T, strict=True):
                others = (column != column[self.rank]).nonzero()[:, 0].tolist()
                if others:
                    got = f"{value!r} on rank {self.rank} and another on {', '.join(map(str, others))}"
                    do = "Each rank draws other examples by itself."
                    problems.append(f"{name} must be the same on all ranks, got {got}. {do}")
        if problems:
            raise ConfigError(problems)

    def identity(self) -> dict[str, int]:
        """Return what a state says of the rank that made it; nothing where there is only one."""
        return {"ranks": self.size, "rank": self.rank} if self.size > 1 else {}

    def refuse_foreign(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another rank, or of another number of ranks.

        Raises:
            CheckpointError: it is one.
        """
        do = "Each rank saves and loads a state of its own; resume with as many processes."
        own, saved = (self.size, self.rank), (state.get("ranks", 1), state.get("rank", 0))
        problems = [
            must(f"{name} of the checkpoint", f"be {mine}, as of this process", got, do)
            for name, mine, got in zip(("ranks", "rank"), own, saved, strict=True)
            if mine != got
        ]
        if problems:
            raise CheckpointError("\n".join(problems))

    def refuse_other_step(self, step: int) -> None:
        """Refuse states that the ranks saved at different steps.

        Raises:
            CheckpointError: they did.
            RankError: another rank has failed to load.
        """
        if self.size > 1:
            steps = [int(numbers[0]) for numbers in self._exchange((float(step),))]
            if len(set(steps)) > 1:
                do = "Load states that were saved together."
                raise CheckpointError(must("step of the checkpoint", "be the same on all ranks", steps, do))


# Models ----------------------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """Return what is inside DistributedDataParallel, be it compiled or not; any other model as it is.

    Measuring goes past DDP: its forward would broadcast buffers and prepare for a backward that does not come.
    """
    inside = getattr(model, "_orig_mod", model)
    return unwrapped(inside.module) if isinstance(inside, nn.parallel.DistributedDataParallel) else model


def is_sharded(tensor: Any) -> bool:
    """Say whether a tensor is a DTensor, as the parameters of ``fully_shard`` are."""
    return hasattr(tensor, "device_mesh")


def reshard(model: nn.Module) -> nn.Module:
    """Have ``fully_shard`` register the parameters that the optimizer knows; return the model.

    A forward without a backward leaves the outermost ones gathered.
    """
    for module in _sharding(model):
        module.reshard()
    return model


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Yield the trainable parameters, gathered for the while if ``fully_shard`` has sharded them.

    Nothing is sharded inside, neither after the forward nor after the backward: a second derivative needs the
    parameters to stay. Nor are gradients reduced, as the user's may be half accumulated.
    """
    modules = list(_sharding(model))
    groups = [group for module in modules for group in _parameter_groups(module)]
    # The setters of FSDPModule are public, but there are no getters.
    names = ("post_forward_mesh_info", "reshard_after_backward", "reduce_grads")
    before = [[getattr(group, name) for name in names] for group in groups]
    try:
        for module in modules:
            module.unshard()
        for group in groups:
            for name, value in zip(names, (None, False, False), strict=True):
                setattr(group, name, value)
        yield [p for p in model.parameters() if p.requires_grad]
    finally:
        for group, values in zip(groups, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(group, name, value)
        reshard(model)


def _sharding(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that ``fully_shard`` was applied to."""
    for module in model.modules():
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            yield module


def _parameter_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # one at most before torch 2.12
    return [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]
