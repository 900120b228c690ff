"""What a run has learned of each example: kept while it trains, written into its folder, read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from torchcrest.active import stream
from torchcrest.difficulty import Difficulty
from torchcrest.errors import DataError, must
from torchcrest.passes import Passes
from torchcrest.train.files import RunFiles, replacing
from torchcrest.train.tasks import Task
from torchcrest.train.texts import Texts

__all__ = ["COLUMNS", "Recorder", "Scores", "read_log", "read_scores"]

Array = NDArray[Any]

PARTS = 10  # of a run, in which is counted what was trained on
SAMPLED = 1000  # excluded examples whose accuracy is measured
SHOWN = 24  # examples at each end of a gallery
SIDE = 64  # pixels of the pictures in it, at most
SNIPPET = 160  # letters of the texts in it
# Of the columns, what a torchcrest.Difficulty holds.
RECORDED = ("pooled", "picked", "forgotten", "seen", "learned", "ever_learned", "loss", "mean_loss", "excluded")
COLUMNS = ("label", "trained", "weight", *RECORDED)


@dataclass(frozen=True)
class Scores:
    """A run's record of each example, as its folder holds it. See :class:`torchcrest.Difficulty`.

    Attributes:
        columns: ``[N]`` arrays, named as in :data:`COLUMNS`.
        parts: ``[10, N]`` how often each example was trained on in each tenth of the run.
        shown: positions of the examples that there are pictures or texts of.
        pictures: ``[len(shown), H, W]`` or ``[len(shown), H, W, 3]``, uint8; or None.
        texts: ``[len(shown)]`` strings; or None.
    """

    columns: dict[str, Array]
    parts: Array
    shown: Array
    pictures: Array | None
    texts: Array | None

    def __len__(self) -> int:
        """Count the examples."""
        return int(self.parts.shape[1])

    def __getitem__(self, column: str) -> Array:
        """Return a column, ``[N]``."""
        return self.columns[column]

    def ends(self, count: int) -> dict[str, Array]:
        """Return positions of the examples at the ends: most and least selected of those there was a choice about."""
        chosen = "picked" if self["pooled"].any() else "trained"
        times, places, known = self[chosen].astype(np.int64), np.arange(len(self)), self["seen"] > 0
        most = np.lexsort((places, -self["weight"], -times))
        least = np.lexsort((places, self["weight"], -self["pooled"].astype(np.int64), times))  # often passed over
        return {"most": most[known[most]][:count], "least": least[known[least]][:count]}

    def suspects(self, count: int) -> Array:
        """Return positions of the examples whose labels are most likely wrong, the likeliest first.

        First come those that were never learned, then the others, both by their mean loss: a model that has learned
        what the others of a class have in common is sure of another label.
        """
        known = np.flatnonzero(self["seen"])
        order = np.lexsort((-self["mean_loss"][known], self["ever_learned"][known]))
        return known[order[:count]]


class Recorder:
    """Keeps the scores of a run in progress, whatever its method."""

    def __init__(self, loader: Passes, examples: int, steps: int, log: bool) -> None:
        if loader.difficulty is None:
            loader.difficulty = Difficulty(examples)
        self.record = loader.difficulty
        if log:
            self.record.keep_log()
        self._steps = steps
        self._weight: Array = np.zeros(examples, np.float32)
        self._parts: Array = np.zeros((PARTS, examples), np.uint16)

    def trained(self, step: int, indices: Tensor, weights: Tensor) -> None:
        """Count a batch ``[m]`` that was trained on in a step, from 1. The device has been waited for."""
        self.record.enter()
        rows, given = indices.numpy(), weights.float().cpu().numpy()
        np.add.at(self._weight, rows, given)
        part = self._parts[(step - 1) * PARTS // self._steps]
        np.add.at(part, rows, part[rows] < 65535)
        self.record.keep("trained", step, rows, weight=given)

    def event(self, step: int, excluded_accuracy: float | None) -> dict[str, Any]:
        """Return the metrics line on what was trained on since the last one."""
        return {
            "event": "difficulty",
            "step": step,
            **self.record.trained_on(),
            "excluded": int((self.record.excluded >= 0).sum()),
            "excluded_accuracy": excluded_accuracy,
        }

    def sample_excluded(self, seed: int, step: int) -> list[int]:
        """Return examples that were set aside, at most 1,000, drawn by the seed and the step."""
        rows = np.flatnonzero(self.record.excluded >= 0)
        order = torch.randperm(len(rows), generator=stream(seed, "excluded", step))[:SAMPLED]
        return sorted(rows[order.numpy()].tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the loader's own state."""
        weight, parts = torch.from_numpy(self._weight.copy()), torch.from_numpy(self._parts.copy())
        return {"weight": weight, "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._weight[:], self._parts[:] = state["weight"].numpy(), state["parts"].numpy()

    def write(self, files: RunFiles, task: Task) -> None:
        """Write examples.npz, and picks.npz where a log was kept."""
        record = self.record
        record.enter()
        columns = {
            "label": labels_of(task),
            "trained": self._parts.sum(0, dtype=np.uint32),
            "weight": self._weight,
            **{name: getattr(record, name) for name in RECORDED},
        }
        scores = Scores(columns, self._parts, np.empty(0, np.int64), None, None)
        ends = scores.ends(SHOWN)
        shown = np.unique(np.concatenate([*ends.values(), scores.suspects(SHOWN)]))
        arrays: Any = {**columns, "parts": self._parts, "shown": shown, **shown_of(task, shown)}
        with replacing(files.examples) as file:
            np.savez_compressed(file, **arrays)
        if record.log is not None:
            log: Any = {name: np.concatenate(parts) for name, parts in record.log.items()}
            with replacing(files.picks) as file:
                np.savez_compressed(file, **log)


def labels_of(task: Task) -> Array:
    """Return the labels of the training examples, ``[N]``."""
    labels: Tensor = task.train.labels if isinstance(task.train, Texts) else task.train.targets
    return labels.cpu().numpy()


def shown_of(task: Task, rows: Array) -> dict[str, Array]:
    """Return ``pictures`` or ``texts`` of examples, whichever there are: images in uint8, beginnings of texts."""
    if isinstance(task.train, Texts):
        texts = [task.train.text(row) for row in rows.tolist()]
        return {"texts": np.array([t[:SNIPPET] + ("…" if len(t) > SNIPPET else "") for t in texts], dtype=np.str_)}
    inputs = task.train.inputs
    if inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
        return {}
    pictures = inputs[torch.from_numpy(rows)].float().cpu()
    if inputs.dtype != torch.uint8:
        low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
        pictures = 255 * (pictures - low) / (high - low).clamp(min=1e-12)
    if max(pictures.shape[2:]) > SIDE:
        share = SIDE / max(pictures.shape[2:])
        size = [max(1, round(side * share)) for side in pictures.shape[2:]]
        pictures = F.interpolate(pictures, size=size, mode="area")
    last = pictures.round().to(torch.uint8).permute(0, 2, 3, 1)
    return {"pictures": (last[..., 0] if last.shape[3] == 1 else last).contiguous().numpy()}


def read_scores(folder: Path) -> Scores | None:
    """Read a run's examples.npz; None where it has none.

    Raises:
        DataError: it is damaged.
    """
    arrays = _read(RunFiles(folder).examples, "a run's scores of its examples", {*COLUMNS, "parts", "shown"})
    if arrays is None:
        return None
    columns = {name: arrays[name] for name in COLUMNS}
    return Scores(columns, arrays["parts"], arrays["shown"], arrays.get("pictures"), arrays.get("texts"))


def read_log(folder: Path) -> dict[str, Array] | None:
    """Read a run's picks.npz, a column an array; None where it has none.

    Raises:
        DataError: it is damaged.
    """
    return _read(RunFiles(folder).picks, "a run's log of its examples", {"trained_step", "trained_index"})


def _read(path: Path, what: str, names: set[str]) -> dict[str, Array] | None:
    if not path.exists():
        return None
    try:
        # Opened here, for where it is no archive numpy would leave it open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if missing := sorted(names - arrays.keys()):
            raise ValueError(f"no {missing[0]}")
    except Exception as error:  # a damaged archive can make anything of itself
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        do = "It is damaged: move the run's folder away and run it again."
        raise DataError(must(str(path), f"hold {what}", reason, do)) from error
    return arrays
