"""The files of a run directory, each whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml

from torchcrest.errors import CheckpointError, DataError, must

__all__ = ["RunFiles", "replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name; it takes its own only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class RunFiles:
    """config.yaml, metrics.jsonl, checkpoint.pt and summary.json of one run.

    Attributes:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.metrics = folder / "metrics.jsonl"
        self.checkpoint = folder / "checkpoint.pt"
        self.summary = folder / "summary.json"

    def began(self) -> bool:
        """Tell whether a run has left anything here."""
        return any(path.exists() for path in (self.config, self.metrics, self.checkpoint, self.summary))

    def finished(self) -> bool:
        """Tell whether the run here came to its end."""
        return self.summary.exists()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml."""
        with replacing(self.config) as file:
            file.write(yaml.safe_dump(dict(config), sort_keys=False).encode())

    def read_config(self) -> dict[str, Any]:
        """Read config.yaml.

        Raises:
            DataError: it is damaged.
        """
        config = _read(self.config, "a run's settings", lambda path: yaml.safe_load(path.read_text()))
        return dict(config)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        with replacing(self.summary) as file:
            file.write((json.dumps(dict(summary), indent=2) + "\n").encode())

    def read_summary(self) -> dict[str, Any]:
        """Read summary.json.

        Raises:
            DataError: it is damaged.
        """
        return dict(_read(self.summary, "a finished run's figures", lambda path: json.loads(path.read_text())))

    def append_metrics(self, records: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the lines of metrics.jsonl; a last line that was cut off is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().split("\n")[:-1]
        parse: Callable[[Path], Any] = lambda _: [json.loads(line) for line in lines]  # noqa: E731
        return list(_read(self.metrics, "a JSON object a line", parse))

    def keep_metrics(self, count: int) -> None:
        """Drop the lines written after a checkpoint that knew ``count`` of them."""
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        with replacing(self.metrics) as file:
            file.writelines(lines[:count])

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write checkpoint.pt."""
        with replacing(self.checkpoint) as file:
            torch.save(dict(state), file)

    def read_checkpoint(self) -> dict[str, Any]:
        """Read checkpoint.pt, tensors on the CPU; code in it is not run.

        Raises:
            CheckpointError: it is no checkpoint of a run, or damaged.
        """
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            do = "It is damaged or another program's: delete it, or use another --out."
            raise CheckpointError(must(str(self.checkpoint), "be a checkpoint", reason, do)) from error
        if not isinstance(state, dict) or "loader" not in state or "settings" not in state:
            got = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
            do = "It is another program's: move it away, or use another --out."
            raise CheckpointError(must(str(self.checkpoint), "hold a torchcrest run", got, do))
        return state


def _read(path: Path, what: str, parse: Callable[[Path], Any]) -> Any:
    """Parse a file; objects and lists only."""
    try:
        value = parse(path)
        if not isinstance(value, dict | list):
            raise ValueError(f"a {type(value).__name__}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        do = "It is damaged: move the run's folder away and run it again."
        raise DataError(must(str(path), f"hold {what}", reason, do)) from error
    return value
