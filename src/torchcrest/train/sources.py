"""Where the examples of image and text tasks come from: rows of training and test splits, in the usual formats."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchcrest.errors import ConfigError, DataError, must

__all__ = [
    "Split",
    "Splits",
    "beside",
    "choose",
    "from_files",
    "from_folders",
    "from_hub",
    "from_jsonl",
    "numbered",
    "optional",
    "require",
]

TEST = ("test", "validation", "valid", "val", "dev")  # the first that is there, and labelled, is tested on
HELD_OUT = 10  # without any of them, one in so many training examples is
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
LABELS = ("fine_label", "gold_label", "label", "labels", "target", "class", "category", "y")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("text1", "text2"), ("question1", "question2"))
TEXTS = ("text", "sentence", "content", "document", "review")
UNLABELLED = (None, -1, "-", "")
WORD = re.compile(rf"(?<![a-z])(train|{'|'.join(TEST)})(?![a-z])")


def require(ok: bool, name: str, want: str, got: Any, do: str, error: type[Exception] = DataError) -> None:
    """Raise an error, unless all is well."""
    if not ok:
        raise error(must(name, want, got, do))


def optional(module: str, what: str) -> Any:
    """Import a package of the extra ``huggingface``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        do = "Run pip install 'torchcrest[huggingface]'."
        raise ConfigError(must(f"the package for {what}", "be installed", str(error), do)) from error


@dataclass(frozen=True)
class Split:
    """Examples as they were found.

    Attributes:
        inputs: a column of texts, two of pairs of texts, or one of images: paths, encoded bytes, or both in
            a mapping as Hugging Face's ``Image`` feature stores them.
        labels: whole numbers, or names; None, -1, "-" or "": there is none.
        images: whether these are images.
        where: what to call it in an error.
    """

    inputs: tuple[Sequence[Any], ...]
    labels: Sequence[Any]
    images: bool
    where: str

    def take(self, rows: Sequence[int]) -> Split:
        """Return some of the examples."""
        inputs = tuple([column[row] for row in rows] for column in self.inputs)
        return Split(inputs, [self.labels[row] for row in rows], self.images, self.where)

    def labelled(self) -> Split:
        """Return those with a label."""
        rows = [row for row, label in enumerate(self.labels) if label not in UNLABELLED]
        return self if len(rows) == len(self.labels) else self.take(rows)


Splits = Mapping[str, Callable[[], Split]]


def choose(splits: Splits, where: str) -> tuple[Split, Split, tuple[str, ...]]:
    """Return training and test examples, those with labels, and what to tell about the choice.

    Without test examples, a random tenth of the training ones is held out, always the same.

    Raises:
        DataError: there are no training examples.
    """
    require("train" in splits, where, "have a split called train", sorted(splits), "Name its files, or folder, so.")
    notes: list[str] = []

    def labelled(name: str) -> Split:
        split = splits[name]()
        kept = split.labelled()
        if dropped := len(split.labels) - len(kept.labels):
            notes.append(f"{dropped:,} of {len(split.labels):,} examples in {name} have no label and are left out.")
        return kept

    train = labelled("train")
    require(len(train.labels) > 1, train.where, "hold two labelled examples or more", len(train.labels), "Check it.")
    for name in TEST:
        if name in splits and (test := labelled(name)).labels:
            if name != "test":
                notes.append(f"The test examples are those of {name}.")
            return train, test, tuple(notes)
    count = len(train.labels)
    order = np.random.default_rng(0).permutation(count)
    held = max(1, count // HELD_OUT)
    notes.append(f"There are no test examples: {held:,} of {count:,} in train are held out at random for that.")
    return train.take(sorted(order[held:].tolist())), train.take(sorted(order[:held].tolist())), tuple(notes)


def numbered(train: Split, test: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the classes of training and test examples, ``[n]``; names are numbered in alphabetical order.

    Raises:
        DataError: labels are neither names nor whole numbers, or a test label is not among the training ones.
    """
    labels = [*train.labels, *test.labels]
    if all(isinstance(label, str) for label in labels):
        known = {name: number for number, name in enumerate(sorted(set(train.labels)))}
        strange = sorted(set(test.labels) - known.keys())
        do = "Leave those examples out."
        require(not strange, f"labels of {test.where}", f"be among {', '.join(known)}"[:200], strange[:5], do)
        labels = [known[name] for name in labels]
    odd = next((label for label in labels if not isinstance(label, int | float) or label < 0 or label % 1), None)
    want, do = "be whole numbers from 0, or names", "Use one or the other for all."
    require(odd is None, f"labels of {train.where}", want, odd, do)
    y = np.asarray(labels, dtype=np.int64)
    return y[: len(train.labels)], y[len(train.labels) :]


# Rows -----------------------------------------------------------------------------------------------------------


def _roles(row: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], str, bool]:
    """Tell by their names and an example which columns are inputs, which is the label, and whether these are images."""
    names = list(row)
    label = next((name for name in LABELS if name in row), None)
    do = f"Its columns: {', '.join(names)}."
    require(label is not None, where, f"have its labels in one of the columns {', '.join(LABELS)}", names, do)
    images = [name for name in names if _is_image(row[name])]
    if images:
        require(len(images) == 1, where, "have one column of images", images, do)
        return (images[0],), str(label), True
    texts = [name for name in names if isinstance(row[name], str) and name not in LABELS]
    for pair in PAIRS:
        if set(pair) <= set(texts):
            return pair, str(label), False
    named = [name for name in TEXTS if name in texts]
    inputs = tuple(named[:1]) or tuple(texts)
    want = f"have one column of images, or texts in {', '.join(TEXTS)}, or {', or '.join(map(' and '.join, PAIRS))}"
    require(len(inputs) in (1, 2), where, want, names, "Rename those that are meant.")
    return inputs, str(label), False


def _is_image(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and {"bytes", "path"} & value.keys() != set())


def from_table(table: Any, where: str) -> Split:
    """Take the columns that are needed from an Arrow table."""
    require(table.num_rows > 0, where, "hold examples", "none", "Check how it was made.")
    inputs, label, images = _roles(table.slice(0, 1).to_pylist()[0], where)
    columns = {name: table.column(name).to_pylist() for name in (*inputs, label)}
    return Split(tuple(columns[name] for name in inputs), columns[label], images, where)


def from_rows(rows: Iterable[Mapping[str, Any]], where: str) -> Split:
    """Take what is needed from mappings, one an example.

    Raises:
        DataError: there is none, or one lacks what the first has.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise DataError(must(where, "hold examples", "none", "Check how it was made."))
    inputs, label, images = _roles(first, where)
    columns: dict[str, list[Any]] = {name: [] for name in (*inputs, label)}
    for number, row in enumerate(chain([first], rows), 1):
        for name, column in columns.items():
            require(name in row or name == label, f"line {number} of {where}", f"have {name}", sorted(row), "Mend it.")
            column.append(row.get(name))
    return Split(tuple(columns[name] for name in inputs), columns[label], images, where)


def from_jsonl(path: Path) -> Split:
    """Read a file of a JSON object a line, which may end in .gz.

    Raises:
        DataError: it cannot be read.
    """

    def rows() -> Iterator[dict[str, Any]]:
        number = 0
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                for line in file:
                    number += 1
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"a {type(row).__name__}")
                    yield row
        except (OSError, ValueError, EOFError, zlib.error) as error:
            name = f"line {number} of {path}" if number else str(path)
            raise DataError(must(name, "be a JSON object", str(error), "Write one a line, in UTF-8.")) from error

    return from_rows(rows(), str(path))


# Files, folders, the hub ----------------------------------------------------------------------------------------


def split_of(path: Path) -> str | None:
    """Return the split that a file's name, or else a folder's above it, speaks of.

    >>> [split_of(Path(name)) for name in ("snli_1.0_train.jsonl", "val/0000.parquet", "training.json")]
    ['train', 'val', None]
    """
    found = (WORD.findall(part.lower()) for part in reversed(path.parts))
    return next((words[-1] for words in found if words), None)


def from_files(folder: Path) -> Splits:
    """Find the splits in a folder's Parquet or JSON-lines files, by their names, as on the Hugging Face hub."""
    files = sorted(path for path in folder.rglob("*") if path.name.endswith((".parquet", ".jsonl", ".jsonl.gz")))
    grouped: dict[str, list[Path]] = {}
    for path in files:
        if name := split_of(path.relative_to(folder)):
            grouped.setdefault(name, []).append(path)
    return {name: partial(_read, paths) for name, paths in grouped.items()}


def beside(path: Path) -> Splits:
    """Find the splits of a JSON-lines file: itself, and the file that has test in place of train in its name."""
    start, train, end = path.name.rpartition("train")
    others = {name: path.with_name(start + name + end) for name in TEST} if train else {}
    found = {name: partial(from_jsonl, other) for name, other in others.items() if other.is_file()}
    return {"train": partial(from_jsonl, path), **found}


def _read(paths: Sequence[Path]) -> Split:
    """Read the files of a split: tables where there are some, else lines."""
    tables = [path for path in paths if path.suffix == ".parquet"]
    if tables:
        arrow, parquet = optional("pyarrow", "Parquet files"), optional("pyarrow.parquet", "Parquet files")
        try:
            return from_table(arrow.concat_tables([parquet.read_table(path) for path in tables]), str(tables[0]))
        except (OSError, arrow.ArrowException) as error:
            reason, do = str(error).splitlines()[0], "Download it again."
            raise DataError(must(str(tables[0]), "be readable, like all of its split", reason, do)) from error
    parts = [from_jsonl(path) for path in paths]
    require(len({len(part.inputs) for part in parts}) == 1, str(paths[0]), "be like the others", "not", "Move them.")
    columns = zip(*(part.inputs for part in parts), strict=True)
    inputs = tuple(list(chain(*column)) for column in columns)
    return Split(inputs, list(chain(*(part.labels for part in parts))), False, str(paths[0]))


def from_folders(folder: Path) -> Splits:
    """Find the splits of a folder of images: SPLIT/CLASS/*.png, or any other format, at any depth.

    The original Tiny ImageNet, whose val has its classes in a file, is read as well.
    """
    annotated = folder / "val" / "val_annotations.txt"
    if annotated.is_file():  # its test examples have no labels
        return {"train": partial(_images, folder / "train"), "val": partial(_annotated, annotated)}
    names = [name for name in ("train", *TEST) if (folder / name).is_dir()]
    return {name: partial(_images, folder / name) for name in names}


def _images(folder: Path) -> Split:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    require(bool(paths), str(folder), "hold images in a folder a class", "none", f"Known: {', '.join(sorted(IMAGES))}.")
    classes = [path.relative_to(folder).parts[0] for path in paths]
    loose = [path.name for path, name in zip(paths, classes, strict=True) if name == path.name]
    require(not loose, str(folder), "hold images in a folder a class", loose[:3], "Put them into folders.")
    return Split((paths,), classes, True, str(folder))


def _annotated(file: Path) -> Split:
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    require(all(len(row) > 1 for row in rows), str(file), "name an image and its class a line", "others", "Mend it.")
    return Split(([file.parent / "images" / row[0] for row in rows],), [row[1] for row in rows], True, str(file))


def from_hub(name: str, config: str | None = None) -> Splits:
    """Load a data set of the Hugging Face hub, or a local folder, by ``datasets.load_dataset``.

    Raises:
        ConfigError: the package is not installed.
        DataError: there is no such data set, or it cannot be loaded.
    """
    datasets = optional("datasets", "Hugging Face data sets")
    try:
        found = datasets.load_dataset(name, config)
    except Exception as error:  # from the network, the file system or the formats: anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        do = "Check the name, or name a configuration (hf:NAME:CONFIG). Offline, give a local folder."
        raise DataError(must(name, "be loaded by datasets.load_dataset", reason, do)) from error
    return {split: partial(_arrow, found[split], f"{name}, {split}") for split in found}


def _arrow(dataset: Any, where: str) -> Split:
    return from_table(dataset.with_format("arrow")[:], where)
