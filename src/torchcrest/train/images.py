"""Images decoded into arrays, and the original CIFAR archives."""

from __future__ import annotations

import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcrest.errors import DataError, must
from torchcrest.train.sources import Split, numbered, optional, require

__all__ = ["Arrays", "arrays_of", "cifar"]

Arrays = dict[str, NDArray[Any]]
SIDE, PIXELS = 32, 3 * 32 * 32  # of CIFAR's images

# By the number of classes: files of training and of test, the key of the labels, bytes before an image's pixels.
CIFAR = {
    10: ([f"data_batch_{k}" for k in range(1, 6)], "test_batch", "labels", 1),
    100: (["train"], "test", "fine_labels", 2),
}


def arrays_of(train: Split, test: Split) -> Arrays:
    """Decode the images, and number the classes.

    Raises:
        ConfigError: Pillow is not installed.
        DataError: an image cannot be read, or is not of the size of the first.
    """
    y_train, y_test = numbered(train, test)
    return {"x_train": _decode(train), "y_train": y_train, "x_test": _decode(test), "y_test": y_test}


def _decode(split: Split) -> NDArray[np.uint8]:
    """Return ``[n, C, H, W]``; C is 1 where all are grey, else 3."""
    image = optional("PIL.Image", "images")
    cells, grey = split.inputs[0], True
    decoded: NDArray[np.uint8] = np.empty((0, 0, 0, 3), np.uint8)
    for k, cell in enumerate(cells):
        if isinstance(cell, Mapping):
            cell = cell.get("bytes") or cell.get("path")
        name = f"image {k} of {split.where}" if isinstance(cell, bytes) else str(cell)
        try:
            with image.open(io.BytesIO(cell) if isinstance(cell, bytes) else cell) as opened:
                grey &= opened.mode in ("1", "L")
                pixels: NDArray[np.uint8] = np.asarray(opened.convert("RGB"))
        except Exception as error:  # what a damaged image makes the decoders raise can be anything
            raise DataError(must(name, "be an image", str(error), "Leave it out, or get it again.")) from error
        if k == 0:
            decoded = np.empty((len(cells), *pixels.shape), np.uint8)
        height, width = decoded.shape[1:3]
        want = f"be {width} x {height} pixels, like the first"
        ok = pixels.shape == decoded.shape[1:]
        require(ok, name, want, f"{pixels.shape[1]} x {pixels.shape[0]}", "Bring all to one size beforehand.")
        decoded[k] = pixels
    decoded = np.moveaxis(decoded, 3, 1)
    return decoded[:, :1] if grey else decoded


# CIFAR ----------------------------------------------------------------------------------------------------------


def cifar(path: Path, classes: int) -> Arrays | None:
    """Read CIFAR-10 or CIFAR-100 as its authors publish it: the Python or the binary version, packed or not.

    Nothing is written, and no code in a pickle is run.

    Args:
        path: the archive, or a folder with it or with its files.
        classes: 10 or 100.

    Returns:
        The arrays, or None where there are no such files.

    Raises:
        DataError: a file is damaged, or asks for more than plain data.
    """
    training, test, key, before = CIFAR[classes]
    kinds: dict[str, Callable[[str, bytes], tuple[Any, Any]]] = {
        "": lambda name, data: _unpickled(name, data, key),
        ".bin": lambda name, data: _binary(name, data, before),
    }
    for members in _members(path, classes):
        for ending, read in kinds.items():
            names = [f"{name}{ending}" for name in (*training, test)]
            if members.keys() >= set(names):
                parts = [read(name, members[name]()) for name in names]
                x, y = ([np.asarray(part[k]) for part in parts] for k in (0, 1))
                shape = (-1, 3, SIDE, SIDE)
                return {
                    "x_train": np.concatenate(x[:-1]).reshape(shape),
                    "y_train": np.concatenate(y[:-1]),
                    "x_test": np.concatenate(x[-1:]).reshape(shape),
                    "y_test": y[-1],
                }
    return None


def _members(path: Path, classes: int) -> list[dict[str, Callable[[], bytes]]]:
    """Return how to read the files, by their names, of each folder and archive that may be meant."""
    beside = [path, *sorted(path.glob(f"cifar-{classes}-*"))]
    folders = [folder.iterdir() for folder in beside if folder.is_dir()]
    found = [{file.name: file.read_bytes for file in files if file.is_file()} for files in folders]
    return found + [_packed(file) for file in beside if file.is_file() and file.name.endswith((".tar.gz", ".tar"))]


def _packed(archive: Path) -> dict[str, Callable[[], bytes]]:
    do = "Download it again."
    held: dict[str, bytes] = {}
    wanted = {f"{name}{end}" for names, test, *_ in CIFAR.values() for name in (*names, test) for end in ("", ".bin")}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member) if Path(member.name).name in wanted and member.isfile() else None
                if file:
                    held[Path(member.name).name] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(must(str(archive), "be an archive of CIFAR", str(error), do)) from error
    return {name: lambda data=data: data for name, data in held.items()}  # type: ignore[misc]


def _binary(name: str, data: bytes, before: int) -> tuple[Any, Any]:
    size = before + PIXELS
    require(len(data) % size == 0, name, f"hold {size} bytes an image", f"{len(data)} bytes", "Download it again.")
    rows = np.frombuffer(data, np.uint8).reshape(-1, size)
    return rows[:, before:], rows[:, before - 1].astype(np.int64)


def _unpickled(name: str, data: bytes, key: str) -> tuple[Any, Any]:
    """Return pixels ``[n, 3072]`` and labels ``[n]`` of a pickled batch."""
    do = "It is not as its authors publish it: download it again."
    try:
        held = _Plain(io.BytesIO(data), encoding="bytes").load()
        plain = {k.decode() if isinstance(k, bytes) else k: value for k, value in held.items()}
        pixels, labels = plain["data"].array(), np.asarray(plain[key], np.int64)
        if pixels.shape != (len(labels), PIXELS):
            raise ValueError(f"data of shape {pixels.shape} for {len(labels)} labels")
    except Exception as error:  # what a damaged pickle makes the unpickler raise can be anything
        want = "hold nothing but plain containers and arrays of bytes"
        raise DataError(must(name, want, f"{type(error).__name__}: {error}", do)) from error
    return pixels, labels


class _Array:
    """Stands in for a NumPy array while a pickle is read: NumPy's own would run what a crafted state asks it to."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8]:
        """Put the array together, of bytes alone."""
        _, shape, kind, by_columns, data = self.state
        if kind.code not in ("u1", b"u1") or by_columns or not isinstance(data, bytes) or len(data) != math.prod(shape):
            raise ValueError("an array of other than bytes")
        return np.frombuffer(data, np.uint8).reshape(shape)


class _Kind:
    """Stands in for an array's type."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and the like, which bytes have not


class _Plain(pickle.Unpickler):
    """Reads containers, text, numbers and stand-ins for arrays; whatever else a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands in for one of the names that a pickled array has.

        Raises:
            UnpicklingError: it is another name.
        """
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Kind,
            ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes, as Python 3 writes them for 2
            **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[module, name]
