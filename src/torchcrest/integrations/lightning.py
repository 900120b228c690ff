"""Lightning: what CREST does in the loggers, and its state in Lightning's own checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchcrest import tree
from torchcrest.errors import ConfigError, must
from torchcrest.passes import Passes

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    do = "Run pip install 'torchcrest[lightning]'."
    raise ConfigError(must("the package for lightning", "be installed", str(error), do)) from error

__all__ = ["CrestCallback"]

LOADERS = "combined_loader"  # where Lightning keeps the states of training loaders, in that of the fit loop
# What stands there instead of a state if there are several processes: of each, the state of its loader, and those
# of its model's buffers that are not as rank 0's.
EACH_RANK, LOADER, BUFFERS = "torchcrest_each_rank", "loader", "buffers"


class CrestCallback(Callback):
    """Logs what selection does and makes ``trainer.fit(ckpt_path=...)`` go on with it, to the bit.

    Return the loader from ``train_dataloader``; a batch comes to ``training_step`` as a pair. ::

        def train_dataloader(self):
            config = CrestConfig(batch_size=128, learned_interval=1600)
            return Crest(self, train_set, config, steps=400)

        def training_step(self, batch, batch_idx):
            (x, y), weights = batch
            return (F.cross_entropy(self(x), y, reduction="none") * weights).mean()

        trainer = Trainer(max_epochs=20, callbacks=[CrestCallback()])

    An epoch is a pass of one run, so settings that may be a share of ``len(crest)``, as ``learned_interval``, are
    better given in steps.

    Give the trainer this callback when it resumes as well. Without it Lightning restores the loader only in the
    middle of an epoch and in a single process; at the end of one, the run of the loader would begin anew.

    Any strategy serves whose processes hold the whole model, as DDP. Every rank's state is in the checkpoint, so go
    on with as many. With ``accumulate_grad_batches``, what is measured between two optimizer steps is the model as
    it is then. With a precision of ``"bf16-mixed"`` or ``"16-mixed"``, CREST measures in the model's own precision,
    unless ``measure_dtype`` says otherwise; with ``"bf16-true"`` or ``"64-true"`` the data set must give what the
    converted model takes, for CREST measures before Lightning converts the batch.

    The loggers get each entry of the loader's ``history`` at once, as ``crest/check/rho`` or
    ``crest/region/interval``, and its ``stats`` every ``log_every_n_steps``, as ``crest/overhead``, with
    ``crest/active_share`` (of streams without that).

    Args:
        prefix: of the names in the loggers.

    Raises:
        ConfigError: from ``trainer.fit``, where the training loader is none of torchcrest's, or another one in a
            later epoch.
        CheckpointError: from ``trainer.fit``, where the checkpoint was made with other data, settings or processes.
    """

    def __init__(self, prefix: str = "crest") -> None:
        self._prefix = prefix
        self._loader: Passes | None = None
        self._state: Any = None  # of a checkpoint, until there is a loader to take it
        self._buffers: dict[str, Tensor] = {}
        self._told = 0  # entries of the history that were logged
        self._logged = -1  # step of the stats that were logged last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the loader, and restore its state."""
        self._loader = loader = _loader(trainer)
        state, self._state = self._state, None
        if state is not None:
            # Lightning asks for no batch after an epoch's last one, so the pass does not know that it is over.
            goes_on = trainer.fit_loop.restarting
            if isinstance(state, Mapping) and not (goes_on and state.get("position", 0) < trainer.num_training_batches):
                state = {**state, "position": 0}
            loader.load_state_dict(state)
        for name, buffer in self._buffers.items():
            pl_module.get_buffer(name).copy_(buffer)
        self._buffers = {}
        self._told, self._logged = len(loader.history), -1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse another loader than that of the epoch before."""
        if _loader(trainer) is not self._loader:
            do = "One loader carries the run on from epoch to epoch: set reload_dataloaders_every_n_epochs=0."
            raise ConfigError(must("train_dataloader", "return the loader of the epoch before", "a new one", do))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log what happened when the batch was asked for."""
        assert self._loader
        values: dict[str, float] = {}
        for event in self._loader.history[self._told :]:
            kind = event["event"]
            values |= {
                f"{kind}/{name}": float(value)
                for name, value in event.items()
                if name != "step" and isinstance(value, int | float)
            }
        self._told = len(self._loader.history)
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (step + 1) % every == 0 and step != self._logged:
            self._logged = step
            stats = self._loader.stats
            values |= asdict(stats)
            if self._loader.examples:  # a stream's are not counted, and none is set aside
                values["active_share"] = stats.active / self._loader.examples
        if values:
            for logger in trainer.loggers:
                logger.log_metrics({f"{self._prefix}/{name}": value for name, value in values.items()}, step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the workers, as Lightning does with those of a DataLoader."""
        if self._loader:
            self._loader.close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the states of all ranks in the place of this one's; rank 0 writes the file."""
        states = checkpoint["loops"]["fit_loop"]["state_dict"].get(LOADERS)
        if states and trainer.world_size > 1:
            # Running means, say: each rank measures with its own until rank 0's are broadcast with the next step.
            saved = checkpoint["state_dict"]
            buffers = {name: saved[name] for name, _ in pl_module.named_buffers() if name in saved}
            mine = tree.apply({LOADER: states[0], BUFFERS: buffers}, Tensor.cpu)
            each: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
            dist.gather_object(mine, each)
            for other in each or ():
                for name, tensor in mine[BUFFERS].items():
                    if torch.equal(other[BUFFERS][name], tensor):
                        del other[BUFFERS][name]
            states[0] = {EACH_RANK: each}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the state of this rank out, so that it is loaded at the ends of epochs too, and only here."""
        if trainer.state.fn == "fit":
            state, *_ = checkpoint["loops"]["fit_loop"]["state_dict"].pop(LOADERS, [None])
            if isinstance(state, Mapping) and EACH_RANK in state:
                each = state[EACH_RANK]
                mine = each[trainer.global_rank % len(each)]  # the loader refuses a number of ranks that differs
                state, self._buffers = mine[LOADER], mine[BUFFERS]
            self._state = state


def _loader(trainer: Trainer) -> Passes:
    """Return the trainer's training loader; beside it there may be others that have no state."""
    loaders = list(tree.leaves(trainer.train_dataloader))
    stateful = [loader for loader in loaders if hasattr(loader, "load_state_dict")]
    if len(stateful) != 1 or not isinstance(stateful[0], Passes):
        got = ", ".join(type(loader).__name__ for loader in loaders)
        do = "Or train without CrestCallback."
        raise ConfigError(must("train_dataloader", "return a Crest and no other loader with a state", got, do))
    return stateful[0]
