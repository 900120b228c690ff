"""The files of a run directory, each whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml

from torchcrest.errors import CheckpointError, DataError, must

__all__ = ["FORMAT", "RunFiles", "blocked", "replacing"]

FORMAT = 1  # of checkpoint.pt; to be raised when an older one can no longer be read


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


def blocked(folder: Path) -> bool:
    """Tell whether a file stands where the folder, or one above it, should be."""
    return any(path.exists() and not path.is_dir() for path in (folder, *folder.parents))


class RunFiles:
    """config.yaml, metrics.jsonl, checkpoint.pt and summary.json of one run, and what it has learned of examples.

    Attributes:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.metrics = folder / "metrics.jsonl"
        self.checkpoint = folder / "checkpoint.pt"
        self.summary = folder / "summary.json"
        self.examples = folder / "examples.npz"
        self.picks = folder / "picks.npz"

    def began(self) -> bool:
        """Tell whether a run has left anything here."""
        return any(path.exists() for path in (self.config, self.metrics, self.checkpoint, self.summary))

    def finished(self) -> bool:
        """Tell whether the run here came to its end."""
        return self.summary.exists()

    def sweep(self) -> None:
        """Remove what a process that was killed has left half written."""
        for path in (self.config, self.metrics, self.checkpoint, self.summary, self.examples, self.picks):
            for left in self.folder.glob(f".{path.name}.*"):
                left.unlink()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml."""
        with replacing(self.config) as file:
            file.write(yaml.safe_dump(dict(config), sort_keys=False).encode())

    def read_config(self) -> dict[str, Any]:
        """Read config.yaml.

        Raises:
            DataError: it is damaged.
        """
        config: dict[str, Any] = _read(self.config, "a run's settings", yaml.safe_load, dict)
        return config

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        with replacing(self.summary) as file:
            file.write((json.dumps(dict(summary), indent=2) + "\n").encode())

    def read_summary(self) -> dict[str, Any]:
        """Read summary.json.

        Raises:
            DataError: it is damaged.
        """
        summary: dict[str, Any] = _read(self.summary, "a finished run's figures", json.loads, dict)
        return summary

    def append_metrics(self, records: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that knows of them must not be older

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the lines of metrics.jsonl; a last line that was cut off is left out."""
        if not self.metrics.exists():
            return []

        def parse(text: str) -> list[dict[str, Any]]:
            records = [json.loads(line) for line in text.split("\n")[:-1]]
            if not all(isinstance(record, dict) for record in records):
                raise ValueError("something else in a line")
            return records

        records: list[dict[str, Any]] = _read(self.metrics, "a JSON object a line", parse, list)
        return records

    def keep_metrics(self, count: int) -> None:
        """Drop the lines written after a checkpoint that knew ``count`` of them."""
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        with replacing(self.metrics) as file:
            file.writelines(lines[:count])

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write checkpoint.pt."""
        with replacing(self.checkpoint) as file:
            torch.save({**state, "format": FORMAT}, file)

    def read_checkpoint(self) -> dict[str, Any]:
        """Read checkpoint.pt, tensors on the CPU; code in it is not run.

        Raises:
            CheckpointError: it is no checkpoint of a run, damaged, or of another format.
        """
        try:
            with zipfile.ZipFile(self.checkpoint) as file:
                if damaged := file.testzip():  # torch.load does not look at the checksums
                    raise zipfile.BadZipFile(f"bad checksum of {damaged}")
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file makes the unpickler raise can be anything
            do = "It is damaged or another program's: move it away, or use another --out."
            unread = f"a file that cannot be read ({type(error).__name__})"
            raise CheckpointError(must(str(self.checkpoint), "be a checkpoint", unread, do)) from error
        if not isinstance(state, dict) or "loader" not in state or "settings" not in state:
            got = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
            do = "It is another program's: move it away, or use another --out."
            raise CheckpointError(must(str(self.checkpoint), "hold a torchcrest run", got, do))
        if state.get("format") != FORMAT:
            do = "Go on with the torchcrest that wrote it, or use another --out."
            raise CheckpointError(must(str(self.checkpoint), f"have format {FORMAT}", state.get("format"), do))
        return state


def _read(path: Path, what: str, parse: Callable[[str], Any], kind: type) -> Any:
    """Parse a text file that holds one thing of a kind."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"a {type(value).__name__}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        do = "It is damaged: move the run's folder away and run it again."
        raise DataError(must(str(path), f"hold {what}", reason, do)) from error
    return value
