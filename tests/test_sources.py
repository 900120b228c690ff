"""Where examples come from: rows, files, folders and the hub, and which splits are trained and tested on."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from torchcrest.errors import ConfigError, DataError
from torchcrest.train.sources import (
    Split,
    beside,
    choose,
    from_files,
    from_folders,
    from_hub,
    from_jsonl,
    from_rows,
    numbered,
    split_of,
)

Rows = Sequence[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    else:
        path.write_text(text)
    return path


def texts(n: int, labels: Sequence[Any] = (0, 1), start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text {k}", "label": labels[k % len(labels)]} for k in range(start, start + n)]


def split(labels: Sequence[Any], where: str = "here") -> Split:
    return Split(([f"text {k}" for k in range(len(labels))],), labels, False, where)


# Columns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "inputs", "images"),
    [
        ({"text": "a", "label": 1}, ["a"], False),
        ({"id": "7", "sentence": "a", "label": 1}, ["a"], False),
        ({"utterance": "a", "label": 1}, ["a"], False),
        ({"left": "a", "right": "b", "label": 1}, ["a", "b"], False),
        ({"id": "7", "hypothesis": "b", "premise": "a", "label": 1}, ["a", "b"], False),
        ({"gold_label": 1, "sentence1_parse": "(a)", "sentence1": "a", "sentence2": "b"}, ["a", "b"], False),
        (
            {"img": {"bytes": b"x", "path": None}, "coarse_label": 3, "fine_label": 1},
            [{"bytes": b"x", "path": None}],
            True,
        ),
        ({"image": b"x", "caption": "a", "label": 1}, [b"x"], True),
    ],
)
def test_columns_are_known_by_their_names(row: dict[str, Any], inputs: list[Any], images: bool) -> None:
    found = from_rows([row, row], "here")
    assert [column[1] for column in found.inputs] == inputs
    assert found.labels == [1, 1]
    assert found.images == images


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"here must hold examples, got 'none'"),
        ([{"text": "a"}], r"here must have its labels in one of the columns .* got \['text'\]\. Its columns: text\."),
        ([{"a": "a", "b": "b", "c": "c", "label": 1}], r"here must have one column of images, or texts in text, .*"
         r"premise and hypothesis.*got \['a', 'b', 'c', 'label'\]\. Rename"),
        ([{"a": 1, "label": 1}], r"here must have one column of images, or texts"),
        ([{"a": b"1", "b": b"2", "label": 1}], r"here must have one column of images, got \['a', 'b'\]\. Its col"),
        ([{"text": "a", "label": 1}, {"label": 1}], r"line 2 of here must have text, got \['label'\]"),
    ],
)  # fmt: skip
def test_columns_that_are_not(rows: Rows, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_rows(rows, "here")


def test_an_empty_table(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet must hold examples, got 'none'"):
        from_files(tmp_path)["train"]()


# Labels ---------------------------------------------------------------------------------------------------------


def test_names_are_numbered_in_alphabetical_order() -> None:
    y, y_test = numbered(split(["no", "yes", "maybe", "no"]), split(["yes", "maybe"]))
    assert (y.tolist(), y_test.tolist()) == ([1, 2, 0, 1], [2, 0])


def test_whole_numbers_stay() -> None:
    y, y_test = numbered(split([4, True, 0.0]), split([1]))
    assert (y.tolist(), y_test.tolist()) == ([4, 1, 0], [1])


@pytest.mark.parametrize("odd", [1.5, float("nan"), -2, [1], "1", {}])
def test_labels_that_are_not(odd: Any) -> None:
    with pytest.raises(DataError, match=r"labels of here must be whole numbers from 0, or names, got .* Use one"):
        numbered(split([0, odd]), split([1]))


def test_a_test_label_that_is_unknown() -> None:
    with pytest.raises(DataError, match=r"labels of there must be among a, b, got \['c'\]\. Leave those"):
        numbered(split(["a", "b"]), split(["a", "c"], "there"))


# Splits ---------------------------------------------------------------------------------------------------------


def test_what_has_no_label_is_left_out_and_counted() -> None:
    train, test, notes = choose(
        {"train": lambda: split([0, -1, 1, None, "-", ""]), "test": lambda: split([1, 0])}, "here"
    )
    assert (train.inputs, train.labels) == ((["text 0", "text 2"],), [0, 1])
    assert test.labels == [1, 0]
    assert notes == ("4 of 6 examples in train have no label and are left out.",)


def test_the_first_labelled_of_the_other_splits_is_tested_on() -> None:
    splits = {"train": split([0, 1]), "test": split([-1, -1]), "dev": split([0]), "validation": split([1, 1, 1])}
    _, test, notes = choose({name: lambda part=part: part for name, part in splits.items()}, "here")  # type: ignore[misc]
    assert test.labels == [1, 1, 1]
    assert notes == (
        "2 of 2 examples in test have no label and are left out.",
        "The test examples are those of validation.",
    )


@pytest.mark.parametrize(("count", "held"), [(40, 4), (3, 1), (2, 1)])
def test_without_test_examples_a_tenth_is_held_out(count: int, held: int) -> None:
    found = [choose({"train": lambda: split(range(count))}, "here") for _ in range(2)]
    (train, test, notes), again = found
    assert (train.labels, test.labels) == (again[0].labels, again[1].labels)
    assert len(test.labels) == held
    assert sorted([*train.labels, *test.labels]) == list(range(count))
    assert train.inputs[0] == [f"text {k}" for k in train.labels]
    assert notes == (f"There are no test examples: {held} of {count} in train are held out at random for that.",)


def test_no_training_examples() -> None:
    with pytest.raises(DataError, match=r"here must have a split called train, got \['test'\]\. Name"):
        choose({"test": lambda: split([1])}, "here")
    with pytest.raises(DataError, match=r"here must hold two labelled examples or more, got 1\."):
        choose({"train": lambda: split([1, -1])}, "here")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("plain_text/test-00000-of-00002-ab12.parquet", "test"),
        ("default/validation/0000.parquet", "validation"),
        ("SNLI_1.0_Dev.jsonl", "dev"),
        ("train/part_test.jsonl", "test"),
        ("latest.jsonl", None),
        ("trainer/evaluation.parquet", None),
    ],
)
def test_split_of(path: str, name: str | None) -> None:
    assert split_of(Path(path)) == name


@pytest.mark.parametrize("end", ["jsonl", "jsonl.gz", "parquet"])
def test_files_of_a_split_are_read_in_order(tmp_path: Path, end: str) -> None:
    write(tmp_path / "data" / f"train-00001-of-00002.{end}", texts(3, start=4))
    write(tmp_path / "data" / f"train-00000-of-00002.{end}", texts(4))
    write(tmp_path / "data" / f"valid-00000-of-00001.{end}", texts(2))
    write(tmp_path / "README.parquet.txt", [])
    splits = from_files(tmp_path)
    assert splits.keys() == {"train", "valid"}
    train = splits["train"]()
    assert train.inputs[0] == [f"text {k}" for k in range(7)]
    assert train.labels == [0, 1, 0, 1, 0, 1, 0]
    assert not train.images


def test_files_of_a_split_that_differ(tmp_path: Path) -> None:
    write(tmp_path / "train1.jsonl", texts(2))
    write(tmp_path / "train2.jsonl", [{"premise": "a", "hypothesis": "b", "label": 1}])
    with pytest.raises(DataError, match=r"train1\.jsonl must be like the others"):
        from_files(tmp_path)["train"]()


def test_a_damaged_table(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match=r"train\.parquet must be readable, like all of its split, got .* Download it"):
        from_files(tmp_path)["train"]()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "a", "label": 1}\n{"text": \n', r"line 2 of .*\.jsonl must be a JSON object, got .* Write one"),
        (b'{"text": "a", "label": 1}\n[1]\n', r"line 2 of .* must be a JSON object, got 'a list'"),
        (b"\xff\xfe", r"data\.jsonl must be a JSON object, got .*utf-8"),
    ],
)  # fmt: skip
def test_lines_that_are_not_json(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        from_jsonl(tmp_path / "data.jsonl")


@pytest.mark.parametrize("cut", [0, 5, 30])
def test_a_damaged_archive_of_lines(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "data.jsonl.gz", texts(50))
    whole = path.read_bytes()
    for damaged in (whole[:cut], whole[:30] + b"\0" * 9 + whole[39:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"jsonl\.gz must (be a JSON object|hold examples)"):
            from_jsonl(path)


def test_the_test_file_lies_beside(tmp_path: Path) -> None:
    path = write(tmp_path / "train" / "my_train_train.jsonl.gz", texts(4))
    assert beside(path).keys() == {"train"}
    write(tmp_path / "train" / "my_train_test.jsonl.gz", texts(3))
    assert {name: len(read().labels) for name, read in beside(path).items()} == {"train": 4, "test": 3}
    alone = write(tmp_path / "reviews.jsonl", texts(2))
    assert beside(alone).keys() == {"train"}


def test_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train must hold images in a folder a class, got 'none'\. Known: \.bmp"):
        from_folders(tmp_path)["train"]()
    (tmp_path / "train" / "loose.png").touch()
    with pytest.raises(DataError, match=r"images in a folder a class, got \['loose\.png'\]\. Put them"):
        from_folders(tmp_path)["train"]()


# The hub --------------------------------------------------------------------------------------------------------


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    held = {
        name: datasets.Dataset.from_list(texts(n), features=features) for name, n in (("train", 4), ("validation", 3))
    }
    there = {("glue", "sst2"): datasets.DatasetDict(held)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: there[args])
    splits = from_hub("glue", "sst2")
    assert splits.keys() == held.keys()
    assert splits["validation"]().inputs[0] == ["text 0", "text 1", "text 2"]
    assert splits["train"]().labels == [0, 1, 0, 1]


def test_a_local_folder_by_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "here" / "train.parquet", texts(4))
    write(tmp_path / "here" / "test.parquet", texts(3))
    assert {name: read().labels for name, read in from_hub(str(tmp_path / "here")).items()} == {
        "train": [0, 1, 0, 1],
        "test": [0, 1, 0],
    }


def test_a_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"my/set must be loaded by .* got 'ConnectionError: no network'\. .* Offline"):
        from_hub("my/set")


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.parquet", texts(4))
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for act in (lambda: from_hub("glue"), from_files(tmp_path)["train"]):
        with pytest.raises(ConfigError, match=r"the package for .* must be installed, .*torchcrest\[huggingface\]"):
            act()
    write(tmp_path / "lines" / "train.jsonl", texts(4))
    assert from_files(tmp_path / "lines")["train"]().labels == [0, 1, 0, 1]
