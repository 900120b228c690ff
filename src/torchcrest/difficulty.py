"""How hard examples are: what each was seen to be, how often it was picked and forgotten, when it was dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchcrest.errors import CheckpointError, must

__all__ = ["Difficulty", "is_learned"]

Array = NDArray[Any]

MOST_NOTED = 64  # batches noted before the device is waited for
MOST_SEEN = 63  # observations that are counted
LARGEST = float(np.finfo(np.float16).max)
LAST, EVER, ONCE = 1, 2, 4  # of a status: learned when last seen, learned at some time; the rest counts observations


def is_learned(losses: Tensor, outputs: Tensor | None, labels: Tensor | None, learned_loss: float) -> Tensor:
    """Tell which examples are learned, ``[n]``: the prediction is right, or the loss low where there are no classes.

    Args:
        losses: ``[n]``.
        outputs: ``[n, classes]`` of a classifier; anything else is not looked at.
        labels: ``[n]`` classes, or None.
        learned_loss: the bound, where there are no classes.

    >>> is_learned(torch.tensor([0.05, 2.0]), None, None, 0.1)
    tensor([ True, False])
    """
    if outputs is not None and labels is not None and outputs.dim() == 2 and outputs.shape[1] > 1:
        return outputs.detach().argmax(1) == labels
    return losses.detach() < learned_loss


class Difficulty:
    """A record of each example, in 11 bytes, made of what training and selection see of it anyway.

    *Forgetting events* (Toneva et al., "An Empirical Study of Example Forgetting", ICLR 2019): an example was learned
    when it was seen, and is not the next time. What is noted is not waited for: it is entered where the device is
    waited for anyway, or when the record is read. Counts stop at the largest number that they hold.

    Args:
        examples: N.
        learned_loss: below it an example is learned, where there are no classes.

    Attributes:
        forgotten: ``[N]`` forgetting events, uint8.
        pooled: ``[N]`` how often a coreset was picked from a pool with it, uint16.
        picked: ``[N]`` how often it was in the coreset, uint16.
        loss: ``[N]`` loss when it was last seen, float16; NaN: never seen.
        mean_loss: ``[N]`` mean loss, float16; after 63 observations a new one counts for a 63rd.
        exclusions: steps at which examples were set aside.
        log: all that was noted, table by table, once :meth:`keep_log` was called.
    """

    def __init__(self, examples: int, learned_loss: float = 0.1) -> None:
        self.learned_loss = learned_loss
        self.forgotten: Array = np.zeros(examples, np.uint8)
        self.pooled: Array = np.zeros(examples, np.uint16)
        self.picked: Array = np.zeros(examples, np.uint16)
        self.loss: Array = np.full(examples, np.nan, np.float16)
        self.mean_loss: Array = np.full(examples, np.nan, np.float16)
        self.exclusions: list[int] = []
        self.log: dict[str, list[Array]] | None = None
        self._status: Array = np.zeros(examples, np.uint8)
        self._excluded: Array = np.zeros(examples, np.uint8)  # by which exclusion, from 1; the 255th and all later: 255
        self._trained = [0, 0, 0]  # observed in training since the last time: examples, events, not learned
        # Step, indices, losses, learned, in training: not waited for.
        self._noted: list[tuple[int, Tensor, Tensor, Tensor, bool]] = []

    @property
    def seen(self) -> Array:
        """``[N]`` how often it was seen, up to 63."""
        return self._status // ONCE

    @property
    def learned(self) -> Array:
        """``[N]`` bool: it was learned when it was last seen."""
        return (self._status & LAST).astype(bool)

    @property
    def ever_learned(self) -> Array:
        """``[N]`` bool: it was learned at some time."""
        return (self._status & EVER).astype(bool)

    @property
    def excluded(self) -> Array:
        """``[N]`` step at which it was set aside, or -1; int32."""
        return np.array([-1, *self.exclusions[:255]], np.int32)[self._excluded]

    def keep_log(self) -> None:
        """Keep all that is noted from now on, some 20 bytes for each example of a batch or pool."""
        self.log = {} if self.log is None else self.log

    def note(
        self,
        step: int,
        indices: Tensor,
        losses: Tensor,
        outputs: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        training: bool = False,
    ) -> None:
        """Take what was seen of examples; the device is not waited for.

        Args:
            step: steps taken so far.
            indices: ``[n]`` distinct positions in the data set, on the CPU.
            losses: ``[n]``.
            outputs: ``[n, ...]`` of the model, or None.
            labels: ``[n]`` classes, or None.
            training: they are trained on in this step; else they were only measured.
        """
        learned = is_learned(losses, outputs, labels, self.learned_loss)
        # A copy, as what is the user's may be changed in place.
        low = losses.detach().clamp(-LARGEST, LARGEST).to(torch.float16, copy=True)
        self._noted.append((step, indices, low, learned, training))
        if len(self._noted) == MOST_NOTED:
            self.enter()

    def enter(self) -> None:
        """Enter what was noted. Waits for the device."""
        if not self._noted:
            return
        noted, self._noted = self._noted, []
        losses = torch.cat([each[2] for each in noted]).cpu().numpy()
        learned = torch.cat([each[3] for each in noted]).cpu().numpy()
        ends = np.cumsum([len(each[1]) for each in noted])[:-1]
        parts = zip(noted, np.split(losses, ends), np.split(learned, ends), strict=True)
        for (step, indices, _, _, training), loss, right in parts:
            rows = indices.numpy()
            self._enter(rows, loss, right)
            if training:
                more = len(rows), int(self.forgotten[rows].sum(dtype=np.int64)), int((~right).sum())
                self._trained = [a + b for a, b in zip(self._trained, more, strict=True)]
            self.keep("seen", step, rows, loss=loss, learned=right)

    def _enter(self, rows: Array, losses: Array, learned: Array) -> None:
        status, forgotten = self._status[rows], self.forgotten[rows]
        lost = (status & LAST).astype(bool) & ~learned
        self.forgotten[rows] = forgotten + (lost & (forgotten < 255))
        count = np.minimum(status // ONCE + 1, MOST_SEEN).astype(np.uint8)
        before, new = self.mean_loss[rows].astype(np.float32), losses.astype(np.float32)
        self.mean_loss[rows] = np.where(count == 1, new, before + (new - before) / count)
        self.loss[rows] = losses
        ever = (status & EVER).astype(bool) | learned
        self._status[rows] = count * ONCE + ever * np.uint8(EVER) + learned * np.uint8(LAST)

    def pick(self, step: int, pool: Tensor, rows: Tensor, weights: Tensor) -> None:
        """Count what was picked from a pool.

        Args:
            step: steps taken so far.
            pool: ``[r]`` distinct positions in the data set, on the CPU.
            rows: ``[m]`` those that were picked, on the CPU.
            weights: ``[m]`` their weights; only read for the log.
        """
        indices, chosen = pool.numpy(), rows.numpy()
        for counts, at in ((self.pooled, indices), (self.picked, indices[chosen])):
            counts[at] += counts[at] < np.iinfo(counts.dtype).max
        if self.log is not None:
            given = np.zeros(len(indices), np.float32)
            given[chosen] = weights.detach().float().cpu().numpy()
            self.keep("pooled", step, indices, weight=given)

    def exclude(self, step: int, active: Tensor) -> None:
        """Note what was set aside at a step: all that is not ``active`` ``[N]`` and was not set aside before."""
        gone = ~active.numpy()
        gone &= self._excluded == 0
        self.exclusions.append(step)
        self._excluded[gone] = min(len(self.exclusions), 255)

    def trained_on(self) -> dict[str, float]:
        """Return how hard what was observed in training since the last call was. Waits for the device.

        Returns:
            ``trained_difficulty``, the mean forgetting events so far of the examples; ``trained_unlearned``, the share
            that was not learned when it was trained on; and ``mean_difficulty``, ``mean_unlearned`` over all examples.
        """
        self.enter()
        (count, events, unlearned), self._trained = self._trained, [0, 0, 0]
        return {
            "trained_difficulty": events / max(count, 1),
            "trained_unlearned": unlearned / max(count, 1),
            "mean_difficulty": float(self.forgotten.mean()),
            "mean_unlearned": float((~self.learned).mean()),
        }

    def keep(self, table: str, step: int, indices: Array, **columns: Array) -> None:
        """Add rows to a table of the log, if one is kept.

        Args:
            table: its name.
            step: steps taken.
            indices: ``[n]`` positions in the data set.
            columns: ``[n]`` what else is known of them.
        """
        if self.log is not None:
            steps = np.full(len(indices), step, np.int32)
            for name, values in {"step": steps, "index": indices, **columns}.items():
                self.log.setdefault(f"{table}_{name}", []).append(values)

    def state_dict(self) -> dict[str, Any]:
        """Return the record as tensors and numbers. Waits for the device."""
        self.enter()
        log = None
        if self.log is not None:
            self.log = {name: [np.concatenate(parts)] for name, parts in self.log.items()}
            log = {name: torch.from_numpy(whole.copy()) for name, (whole,) in self.log.items()}
        arrays = {name: torch.from_numpy(array.copy()) for name, array in self._arrays().items()}
        return {"arrays": arrays, "exclusions": list(self.exclusions), "trained": list(self._trained), "log": log}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore a record, in place.

        Raises:
            CheckpointError: the state holds none.
        """
        if state is None:
            do = "Go on without, or begin anew."
            raise CheckpointError(must("state", "hold a record of difficulty, which is asked for", None, do))
        self._noted.clear()
        for name, array in self._arrays().items():
            array[:] = state["arrays"][name].numpy()
        self.exclusions = [int(step) for step in state["exclusions"]]
        self._trained = [int(number) for number in state["trained"]]
        log = state["log"]
        self.log = None if log is None else {name: [tensor.numpy()] for name, tensor in log.items()}

    def _arrays(self) -> dict[str, Array]:
        return {
            "forgotten": self.forgotten,
            "pooled": self.pooled,
            "picked": self.picked,
            "loss": self.loss,
            "mean_loss": self.mean_loss,
            "status": self._status,
            "excluded": self._excluded,
        }
