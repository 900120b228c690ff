"""Image tasks: decoded images, folders of them, Parquet files, and the original CIFAR archives."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from torchcrest.errors import ConfigError, DataError
from torchcrest.train.tasks import load

Pixels = NDArray[np.uint8]
N, TEST = 12, 5  # training and test images


def pixels(n: int, height: int = 6, width: int = 5, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def encoded(image: Pixels, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


X, X_TEST = pixels(N), pixels(TEST, seed=1)
Y, Y_TEST = np.arange(N) % 3, np.arange(TEST) % 3


def check(task: Any, order: Any = slice(None)) -> None:
    """Compare with what was written."""
    assert task.shape == (3, 6, 5)
    assert task.classes == 3
    np.testing.assert_array_equal(task.train.inputs.numpy(), np.moveaxis(X, 3, 1)[order])
    np.testing.assert_array_equal(task.test.inputs.numpy(), np.moveaxis(X_TEST, 3, 1))
    np.testing.assert_array_equal(task.train.targets.numpy(), Y[order])
    np.testing.assert_array_equal(task.test.targets.numpy(), Y_TEST)


def hub(image: str = "img", label: str = "label", test: str = "test") -> datasets.DatasetDict:
    """Make a data set as the hub has it."""
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["a", "b", "c"])})
    splits = {"train": (X, Y), test: (X_TEST, Y_TEST)}
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {image: [{"bytes": encoded(each), "path": None} for each in x], label: y.tolist()}, features=features
            )
            for name, (x, y) in splits.items()
        }
    )


NAMED = {
    "cifar10": ("uoft-cs/cifar10", "img", "label", "test", "resnet20"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label", "test", "resnet18"),
    "tinyimagenet": ("zh-plus/tiny-imagenet", "image", "label", "valid", "resnet50"),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_tasks_come_from_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, image, label, test, model = NAMED[name]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: {(where, None): hub(image, label, test)}[args])
    task = load(name)
    check(task)
    assert (task.model, task.epochs, task.learning_rate, task.batch_size) == (model, 200, 0.1, 128)
    assert (task.weight_decay, task.optimizer, task.augment, task.flip) == (5e-4, "sgd", True, True)
    assert task.notes == (("The test examples are those of valid.",) if test == "valid" else ())
    plain = load(name, augment=False)
    assert (plain.augment, plain.flip, plain.train.augment) == (False, False, False)
    unmirrored = load(name, flip=False)
    assert (unmirrored.augment, unmirrored.flip, unmirrored.train.flip) == (True, False, False)


def test_any_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: {("me/mine", "small"): hub("picture")}[args])
    task = load("hf:me/mine:small")
    check(task)
    assert (task.model, task.epochs, task.augment) == ("cnn", 10, False)
    assert load("hf:me/mine:small", augment=True, flip=True).train.flip


def test_parquet_files(tmp_path: Path) -> None:
    for name, split in hub().items():
        (tmp_path / "plain_text").mkdir(exist_ok=True)
        split.to_parquet(tmp_path / "plain_text" / f"{name}-00000-of-00001.parquet")
    check(load("cifar10", data=str(tmp_path)))


def write_folders(root: Path, test: str = "test") -> Path:
    for split, x, y in (("train", X, Y), (test, X_TEST, Y_TEST)):
        for k, (image, label) in enumerate(zip(x, y, strict=True)):
            path = root / split / f"class {'abc'[label]}" / f"{k:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))
    return root


BY_CLASS = np.argsort(Y, kind="stable")


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_of_images(tmp_path: Path, test: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path, test)
    order = np.argsort(Y_TEST, kind="stable")
    monkeypatch.setitem(globals(), "X_TEST", X_TEST[order])
    monkeypatch.setitem(globals(), "Y_TEST", Y_TEST[order])
    for task in (load(f"imagefolder:{tmp_path}"), load("tinyimagenet", data=str(tmp_path))):
        check(task, BY_CLASS)


def test_the_original_tiny_imagenet(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    for folder in list((tmp_path / "train").iterdir()):
        (folder / "images").mkdir()
        for file in folder.glob("*.png"):
            file.rename(folder / "images" / file.name)
    (tmp_path / "val" / "images").mkdir()
    lines = []
    for k, (image, label) in enumerate(zip(X_TEST, Y_TEST, strict=True)):
        (tmp_path / "val" / "images" / f"val_{k}.png").write_bytes(encoded(image))
        lines.append(f"val_{k}.png\tclass {'abc'[label]}\t0\t0\t5\t5\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    (tmp_path / "test" / "images").mkdir(parents=True)
    (tmp_path / "test" / "images" / "test_0.png").write_bytes(encoded(X[0]))
    task = load("tinyimagenet", data=str(tmp_path))
    check(task, BY_CLASS)
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.png\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt must name an image and its class a line, got 'others'"):
        load("tinyimagenet", data=str(tmp_path))


def test_grey_images_have_one_channel_unless_one_is_coloured(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for file in tmp_path.rglob("*.png"):
        Image.open(file).convert("L").save(file)
    task = load(f"imagefolder:{tmp_path}")
    assert task.shape == (1, 6, 5)
    with pytest.raises(ConfigError, match=r"max_length must be left out with imagefolder:.*, got 7\. It is for texts"):
        load(f"imagefolder:{tmp_path}", max_length=7)
    first = sorted((tmp_path / "train").rglob("*.png"))[0]
    np.testing.assert_array_equal(task.train.inputs[0, 0].numpy(), np.asarray(Image.open(first)))
    for name in ("train", "test"):
        file = sorted((tmp_path / name).rglob("*.png"))[1]
        file.write_bytes(encoded(X[0]))
    task = load(f"imagefolder:{tmp_path}")
    assert task.shape == (3, 6, 5)
    assert torch.equal(task.train.inputs[0, 0], task.train.inputs[0, 2])


def test_images_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path)
    file = sorted((tmp_path / "train").rglob("*.png"))[2]
    whole = file.read_bytes()
    file.write_bytes(encoded(pixels(1, 6, 7)[0]))
    with pytest.raises(DataError, match=r"\.png must be 5 x 6 pixels, like the first, got '7 x 6'\. Bring all to"):
        load(f"imagefolder:{tmp_path}")
    for damaged in (whole[:40], whole[:-30], b""):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"\.png must be an image, got .* Leave it out"):
            load(f"imagefolder:{tmp_path}")
    held = hub()
    bad = held["train"].to_dict()
    bad["img"][3]["bytes"] = b"no image"
    held["train"] = datasets.Dataset.from_dict(bad, features=held["train"].features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: held)
    with pytest.raises(DataError, match=r"image 3 of me/mine, train must be an image"):
        load("hf:me/mine")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match=r"the package for images must be installed, .*torchcrest\[huggingface\]"):
        load(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "digits", "data": "."}, ConfigError, r"data must be left out with digits, got '\.'\. It is for"),
        ({"name": "hf:x", "data": "."}, ConfigError, r"data must be left out with hf"),
        ({"name": "cifar10", "data": "nowhere"}, DataError, r"data must be a file or folder that is there, got"),
        ({"name": "imagefolder:nowhere"}, DataError, r"imagefolder must be a file or folder that is there"),
        ({"name": "cifar10", "data": "EMPTY"}, DataError, r"EMPTY.* must have a split called train, got \[\]"),
        ({"name": "imagefolder:"}, ConfigError, r"task must be one of .*imagefolder:DIR.*, got 'imagefolder:'"),
        ({"name": "cifar10:x"}, ConfigError, r"task must be one of .*, got 'cifar10:x'\. Did you mean cifar10?"),
        ({"name": "cifar"}, ConfigError, r"Did you mean cifar10"),
    ],
)  # fmt: skip
def test_bad_names(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        load(**arguments)


# CIFAR ----------------------------------------------------------------------------------------------------------

PLACES = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
BATCH = 3  # images in a file
CX = np.random.default_rng(2).integers(0, 256, (6 * BATCH, 3072), dtype=np.uint8)
CY = np.arange(6 * BATCH) % 4


def python2(batch: dict[str, Any]) -> bytes:
    """Pickle by protocol 2 as Python 2 does, whose strings are bytes: the form of the published files."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    data: Pixels = batch["data"]
    array: bytes = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    rows, columns = data.shape
    shape = b"M" + rows.to_bytes(2, "little") + b"M" + columns.to_bytes(2, "little") + b"\x86"
    kind = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
    kind += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array += b"(K\x01" + shape + kind + b"\x89" + text(data.tobytes()) + b"tb"
    items = text(b"data") + array
    for key in ("labels", "fine_labels"):
        if key in batch:
            items += text(key.encode()) + b"(" + b"".join(b"K" + bytes([label]) for label in batch[key]) + b"l"
    return b"\x80\x02}(" + items + b"u."


def python3(protocol: int) -> Callable[[dict[str, Any]], bytes]:
    return lambda batch: pickle.dumps(batch, protocol)


def members(classes: int, dump: Callable[[dict[str, Any]], bytes] = python2) -> dict[str, bytes]:
    """Make the files of the Python version."""
    key = {10: "labels", 100: "fine_labels"}[classes]
    names = {10: [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], 100: ["train", "test"]}[classes]
    ends = np.cumsum([0, *([BATCH] * 6 if classes == 10 else [5 * BATCH, BATCH])]).tolist()
    return {
        name: dump({"data": CX[start:end], key: CY[start:end].tolist()})
        for name, start, end in zip(names, ends[:-1], ends[1:], strict=True)
    }


def binary(classes: int) -> dict[str, bytes]:
    """Make the files of the binary version."""
    before = [CY[:, None]] if classes == 10 else [np.full_like(CY[:, None], 9), CY[:, None]]
    rows = np.concatenate([*before, CX], 1).astype(np.uint8)
    ends = dict(zip(members(classes), [BATCH] * 6 if classes == 10 else [5 * BATCH, BATCH], strict=True))
    held, start = {}, 0
    for name, count in ends.items():
        held[f"{name}.bin"] = rows[start : start + count].tobytes()
        start += count
    return held


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"some-folder/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def check_cifar(name: str, data: Path) -> None:
    task = load(name, data=str(data))
    want = CX.reshape(-1, 3, 32, 32)
    assert torch.equal(torch.cat([task.train.inputs, task.test.inputs]), torch.from_numpy(want))
    assert torch.cat([task.train.targets, task.test.targets]).tolist() == CY.tolist()
    assert len(task.test) == BATCH
    assert task.notes == ()


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(
    "dump", [python2, python3(2), python3(4)], ids=["Python 2", "Python 3, protocol 2", "protocol 4"]
)
def test_cifar_python(tmp_path: Path, classes: int, dump: Callable[[dict[str, Any]], bytes]) -> None:
    name, files = f"cifar{classes}", members(classes, dump)
    check_cifar(name, write_files(tmp_path / "a" / PLACES[classes], files))
    check_cifar(name, tmp_path / "a")
    check_cifar(name, write_archive(tmp_path / "b" / f"cifar-{classes}-python.tar.gz", files))
    check_cifar(name, tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == [f"cifar-{classes}-python.tar.gz"], "nothing unpacked"


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_binary(tmp_path: Path, classes: int) -> None:
    name = f"cifar{classes}"
    check_cifar(name, write_files(tmp_path / "a", binary(classes)))
    check_cifar(name, write_archive(tmp_path / "b" / f"cifar-{classes}-binary.tar.gz", binary(classes)).parent)
    held = binary(classes)
    cut = sorted(held)[0]
    held[cut] = held[cut][:-1]
    with pytest.raises(DataError, match=rf"{cut} must hold 307[34] bytes an image, got '\d+ bytes'\. Download"):
        load(name, data=str(write_files(tmp_path / "a", held)))


class Malicious:
    def __init__(self, act: Any, *arguments: Any) -> None:
        self.act, self.arguments = act, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.act, self.arguments


MARK = "torchcrest-test-was-run"
MALICIOUS = {
    "a command": lambda: pickle.dumps(Malicious(os.system, f"touch {MARK}")),
    "eval": lambda: pickle.dumps({"data": Malicious(eval, f"open({MARK!r}, 'w')"), "labels": []}),
    "of numpy": lambda: pickle.dumps(Malicious(np.fromfile, MARK)),
    "by name": lambda: b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "by hand": lambda: f"cposix\nsystem\n(S'touch {MARK}'\ntR.".encode(),
    "an instance": lambda: f"(S'touch {MARK}'\nios\nsystem\n.".encode(),
    "getattr": lambda: b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
}


@pytest.mark.parametrize("make", MALICIOUS.values(), ids=MALICIOUS.keys())
def test_a_malicious_pickle_is_refused(
    tmp_path: Path, make: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {**members(10), "data_batch_3": make()}
    with pytest.raises(DataError, match=r"data_batch_3 must hold nothing but .* it asks for [\w.]+'\. .*download"):
        load("cifar10", data=str(write_files(tmp_path / "data", files)))
    assert not (tmp_path / MARK).exists()


STRANGE = {
    "cut off": lambda: members(10)["data_batch_3"][:-100],
    "of doubles": lambda: pickle.dumps({"data": CX[:3].astype(float), "labels": [0, 1, 2]}, 2),
    "of objects": lambda: pickle.dumps({"data": np.array([{}, {}, {}]), "labels": [0, 1, 2]}, 2),
    "by columns": lambda: pickle.dumps({"data": np.asfortranarray(CX[:3]), "labels": [0, 1, 2]}, 2),
    "too few labels": lambda: pickle.dumps({"data": CX[:3], "labels": [0, 1]}, 2),
    "without data": lambda: pickle.dumps({"labels": [0, 1]}, 2),
    "a list": lambda: pickle.dumps([1, 2], 2),
    "a wrong length": lambda: python2({"data": CX[:3], "labels": [0, 1, 2]}).replace(b"M\x03\x00", b"M\x04\x00"),
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
def test_a_strange_pickle_is_refused(tmp_path: Path, make: Callable[[], bytes]) -> None:
    files = {**members(10), "data_batch_3": make()}
    with pytest.raises(DataError, match=r"data_batch_3 must hold nothing but plain containers and arrays of bytes, "):
        load("cifar10", data=str(write_files(tmp_path, files)))


def test_a_damaged_archive(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "cifar-10-python.tar.gz", members(10))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive", whole[:200] + b"\0" * 50 + whole[250:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"tar\.gz must be an archive of CIFAR, got .* Download it again"):
            load("cifar10", data=str(tmp_path))
