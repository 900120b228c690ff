from __future__ import annotations

import contextlib
import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mnist1d.data
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from torchcrest.errors import ConfigError, DataError
from torchcrest.train import tasks
from torchcrest.train.models import build
from torchcrest.train.tasks import Examples, load

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and a small MNIST-1D."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "MNIST1D_SIZE", 500)
    return tmp_path / "cache" / "torchcrest"


def images(n: int = 40, **options: Any) -> Examples:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (n, 3, 7, 9), dtype=torch.uint8, generator=generator)
    mean, std = torch.tensor([100.0, 120.0, 140.0]), torch.tensor([50.0, 60.0, 70.0])
    return Examples(inputs, torch.arange(n), mean=mean, std=std, **options)


def crop(x: Tensor, top: int, left: int, mirrored: int) -> Tensor:
    """The slow reference: pixel by pixel, from the image of one example [C, H, W]."""
    _, height, width = x.shape
    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            row, column = i + top - 4, (width - 1 - j if mirrored else j) + left - 4
            if 0 <= row < height and 0 <= column < width:
                out[:, i, j] = x[:, row, column]
    return out


def test_reads_normalised_and_keeps_the_stored_type() -> None:
    examples = images()
    x, y = examples.__getitems__([5, 0, 5])
    assert examples.inputs.dtype == torch.uint8
    assert x.dtype == torch.float32
    assert len(examples) == 40
    assert y.tolist() == [5, 0, 5]
    for channel, (mean, std) in enumerate([(100, 50), (120, 60), (140, 70)]):
        stored = examples.inputs[[5, 0, 5], channel].double()
        torch.testing.assert_close(x[:, channel].double(), (stored - mean) / std)
    assert examples.__getitems__([])[0].shape == (0, 3, 7, 9)
    with pytest.raises(IndexError):
        examples[40]


@pytest.mark.parametrize("options", [{}, {"augment": True}, {"augment": True, "flip": True, "seed": 3}])
def test_one_example_is_the_row_of_a_list_of_one(options: dict[str, Any]) -> None:
    examples = images(**options)
    for i in range(5):
        (x, y), (xs, ys) = examples[i], examples.__getitems__([i])
        assert torch.equal(x, xs[0])
        assert torch.equal(y, ys[0])


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_crop_of_the_padded_image(flip: bool) -> None:
    x, _ = images().__getitems__(list(range(4)))
    augmented, y = images(augment=True, flip=flip).__getitems__(list(range(4)) * 100)
    assert y.tolist() == list(range(4)) * 100
    every = [(top, left, mirrored) for top in range(9) for left in range(9) for mirrored in range(2)]
    crops = [torch.stack([crop(image, *place) for place in every]) for image in x]
    fitting = [(crops[i] == got).all(3).all(2).all(1).nonzero() for i, got in zip(y, augmented, strict=True)]
    tops, lefts, mirrored = zip(*(every[int(place)] for place in fitting), strict=True)  # int: one place fits
    assert set(tops) == set(lefts) == set(range(9))
    assert len(set(zip(tops, lefts, strict=True))) > 70  # of 81: they are independent
    assert 150 < sum(mirrored) < 250 if flip else not any(mirrored)


def test_augmentation_depends_on_the_list_and_the_seed_alone() -> None:
    examples, indices = images(augment=True, flip=True), [3, 1, 4, 1, 5]
    first, _ = examples.__getitems__(indices)
    state = torch.get_rng_state()
    examples.__getitems__([7, 8])
    elsewhere: Examples = pickle.loads(pickle.dumps(examples))  # as a spawned worker gets it
    assert torch.equal(elsewhere.__getitems__(indices)[0], first)
    assert torch.equal(examples.__getitems__(np.array(indices).tolist())[0], first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[1], first[3])  # one example twice in a list: two crops
    assert not torch.equal(examples.__getitems__([1, 3, 4, 1, 5])[0][2], first[2])
    assert not torch.equal(images(augment=True, flip=True, seed=1).__getitems__(indices)[0], first)


def test_collate_in_a_loader() -> None:
    examples = images(augment=True)
    for dataset in (examples, Subset(examples, range(40))):
        x, y = list(DataLoader(dataset, batch_size=16, collate_fn=Examples.collate))[1]
        assert torch.equal(x, examples.__getitems__(list(range(16, 32)))[0])
        assert torch.equal(y, torch.arange(16, 32))
    x, y = Examples.collate([examples[3], examples[8]])  # from a wrapper without __getitems__
    assert torch.equal(x, torch.stack([examples[3][0], examples[8][0]]))
    assert y.tolist() == [3, 8]


@pytest.mark.parametrize(
    ("shape", "targets", "options", "error", "message"),
    [
        ((5,), 5, {}, DataError, r"inputs must be \[n, d\] vectors, .* got \(5,\)\. Reshape"),
        ((0, 3), 0, {}, DataError, r"inputs must .* not empty, got \(0, 3\)\. "),
        ((5, 3), 4, {}, DataError, r"targets must be 5, one for each input, got \(4,\)\. Leave out"),
        ((5, 3), 5, {"mean": torch.zeros(2)}, DataError, r"mean must be one number, .* got \(2,\)\. Axis 1"),
        ((5, 3), 5, {"std": torch.ones(5, 1)}, DataError, r"std must be one number, .* got \(5, 1\)\. "),
        ((5, 3), 5, {"std": 0.0}, DataError, r"std must be above 0, got 0\.0\. Use 1"),
        ((5, 3), 5, {"augment": True}, ConfigError, r"augment must be False here, got True\. .* \(3,\)"),
        ((5, 1, 40), 5, {"augment": True}, ConfigError, r"augment .* Only images .* are \(1, 40\)"),
        ((5, 1, 8, 8), 5, {"flip": True}, ConfigError, r"flip must be False without augment, got True\. Set"),
    ],
)
def test_examples_errors(
    shape: tuple[int, ...], targets: int, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Examples(torch.zeros(shape), torch.zeros(targets), **{"mean": 0.0, "std": 1.0, **options})


@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "settings"),
    [
        ("digits", 1437, 360, (1, 8, 8), ("mlp", 30, 0.05, 32, 5e-4)),
        ("mnist1d", 400, 100, (1, 40), ("conv1d", 60, 0.2, 128, 5e-4)),
    ],
)
def test_named_tasks(name: str, train: int, test: int, shape: tuple[int, ...], settings: tuple[Any, ...]) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    task = load(name)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (len(task.train), len(task.test), task.shape, task.classes) == (train, test, shape, 10)
    assert (task.model, task.epochs, task.learning_rate, task.batch_size, task.weight_decay) == settings
    x, y = task.train.__getitems__(list(range(train)))
    assert abs(x.mean()) < 1e-5
    assert abs(x.std() - 1) < 1e-3
    assert set(y.tolist()) == set(task.test.targets.tolist()) == set(range(10))
    assert torch.equal(task.train.mean, task.test.mean)
    assert build(task.model, task.shape, task.classes, seed=0)(x[:2]).shape == (2, 10)


def test_digits_are_stratified_and_augment_in_training_only() -> None:
    task, plain = load("digits", augment=True, flip=True, seed=4), load("digits")
    counts = torch.bincount(task.test.targets) / torch.bincount(task.train.targets)
    assert (counts - 360 / 1437).abs().max() < 0.01
    assert torch.equal(task.train.inputs, plain.train.inputs)
    assert not torch.equal(task.train[0][0], plain.train[0][0])
    assert torch.equal(task.test[0][0], plain.test[0][0])


def test_mnist1d_is_what_its_generator_makes_and_is_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = mnist1d.data.get_dataset_args()
    args.num_samples = 500
    data = mnist1d.data.make_dataset(args)
    first = load("mnist1d")
    np.testing.assert_array_equal(first.train.inputs[:, 0].numpy(), data["x"].astype(np.float32))
    np.testing.assert_array_equal(first.test.targets.numpy(), data["y_test"])
    (file,) = cache.iterdir()  # nothing temporary is left
    with monkeypatch.context() as context:
        context.setattr(mnist1d.data, "make_dataset", lambda _: pytest.fail("not read from the cache"))
        assert torch.equal(load("mnist1d").train.inputs, first.train.inputs)
    whole = file.read_bytes()
    for broken in (b"", b"not an npz", whole[:2000], whole.replace(b"x_train", b"x_brain")):
        file.write_bytes(broken)
        assert torch.equal(load("mnist1d").train.inputs, first.train.inputs)
        assert file.stat().st_size == len(whole)


@pytest.mark.parametrize("problem", ["a file in the way", "a full disk", "no home"])
def test_mnist1d_without_a_cache(problem: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if problem == "a file in the way":
        cache.parent.write_text("")
    elif problem == "a full disk":
        monkeypatch.setattr(np, "savez", Mock(side_effect=OSError("No space left on device")))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert len(load("mnist1d").train) == 400
    assert not cache.is_dir() or not list(cache.iterdir())
    assert not Path("relative").exists()


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn.datasets"), ("mnist1d", "mnist1d.data")])
def test_missing_package(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"task {name} must .*{module}.* Run pip install 'torchcrest\[tasks\]'"):
        load(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("digit", "Did you mean digits?"),
        ("a/b.npz", "Did you mean npz:a/b.npz?"),
        ("x", "Known: digits, mnist1d, cifar10, cifar100, tinyimagenet, snli, npz:PATH, imagefolder:DIR, text:FILE, "),
    ],
)
def test_unknown_task(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=r"task must be one of digits, .* hf:DATASET, got ") as error:
        load(name)
    assert f"got {name!r}. {hint}" in str(error.value)


def good() -> Arrays:
    rng = np.random.default_rng(0)
    x_train, x_test = (rng.integers(0, 256, (n, 8, 6), dtype=np.uint8) for n in (12, 5))
    return {"x_train": x_train, "y_train": np.arange(12) % 3, "x_test": x_test, "y_test": np.arange(5) % 3}


def saved(path: Path, arrays: Arrays) -> str:
    np.savez(path / "data.npz", **arrays)  # type: ignore[arg-type]
    return f"npz:{path / 'data.npz'}"


@pytest.mark.parametrize(
    ("layout", "shape"),
    [((8, 6), (1, 8, 6)), ((8, 6, 3), (3, 8, 6)), ((8, 6, 1), (1, 8, 6)), ((3, 8, 6), (3, 8, 6)), ((7,), (7,))],
)
@pytest.mark.parametrize("dtype", ["uint8", "float16", ">f8"])
def test_npz(layout: tuple[int, ...], shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (12, *layout)).astype(dtype)
    x[:, 0] = 9  # in vectors: a channel that is constant
    name = saved(tmp_path, good() | {"x_train": x, "x_test": x[:5], "y_train": np.arange(12, dtype=np.uint8)})
    task = load(name)
    assert (task.name, task.shape, task.classes, task.model) == (name, shape, 12, "cnn" if len(shape) == 3 else "mlp")
    assert (task.epochs, task.learning_rate, task.batch_size) == (10, 0.1, 128)
    assert task.train.inputs.dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    wide = (np.moveaxis(x, 3, 1) if layout[-1] in (1, 3) else x.reshape(12, *shape)).astype(float)
    axes = (0, *range(2, wide.ndim))
    std = wide.std(axes, keepdims=True)
    want = (wide - wide.mean(axes, keepdims=True)) / np.where(std == 0, 1, std)
    np.testing.assert_allclose(task.train.__getitems__(list(range(12)))[0].numpy(), want, rtol=1e-4, atol=1e-5)


bad = {
    "images": ({"x_train": np.ones((12, 2, 8, 6))}, r"x_train must be \[n, d\], .* got \(12, 2, 8, 6\)\. Reshape"),
    "ambiguous": ({"x_train": np.ones((12, 3, 8, 3))}, r"x_train .* C alone .* got \(12, 3, 8, 3\)"),
    "number": ({"x_test": np.ones(())}, r"x_test must be \[n, d\], .* got \(\)"),
    "empty": ({"x_test": np.ones((0, 8, 6))}, r"x_test must hold one example or more, got \(0, 1, 8, 6\)"),
    "int64": ({"x_train": np.ones((12, 8, 6), int)}, r"x_train must be uint8 or float, got 'int64'\. Use"),
    "nan": ({"x_train": np.full((12, 8, 6), np.nan)}, r"be finite in float32, got 'NaN .* \[0, 1, 2, 3, 4\]'"),
    "huge": ({"x_train": np.full((12, 8, 6), 1e300)}, r"x_train must be finite in float32, .* Leave those out"),
    "float labels": ({"y_train": np.ones(12)}, r"y_train must be whole numbers .* 'float64 \(12,\)'\. Number"),
    "columns": ({"y_test": np.ones((5, 1), int)}, r"y_test must be whole numbers .* 'int64 \(5, 1\)'"),
    "lengths": ({"y_test": np.zeros(4, int)}, r"y_test must be 5, one for each example, got 4\. Leave out"),
    "negative": ({"y_test": np.array([0, 1, 0, 1, -1])}, r"y_test must be 0 or more, got -1\. Number"),
    "range": ({"y_test": np.array([0, 1, 2, 3, 0])}, r"y_test must be below 3, as y_train is, got 3\. Leave"),
    "shapes": ({"x_test": np.ones((5, 6, 8), np.uint8)}, r"like x_train, torch\.uint8 \(1, 8, 6\), got .*\(1, 6, 8\)'"),
    "types": ({"x_test": np.ones((5, 8, 6))}, r"x_test must be like x_train, torch\.uint8 .* 'torch\.float32"),
    "objects": ({"y_test": np.array([{}] * 5)}, r"y_test must be readable, .* without pickle, got 'Object arrays"),
}


@pytest.mark.parametrize(("change", "message"), bad.values(), ids=bad.keys())
def test_npz_errors(change: Arrays, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(saved(tmp_path, good() | change))


def test_npz_file_errors(tmp_path: Path) -> None:
    arrays = good()
    name = saved(tmp_path, {key: arrays[key] for key in ("x_train", "y_train", "x_test")})
    with pytest.raises(DataError, match=r"data\.npz must hold .*, got \['x_train', .*\]\. Add y_test\."):
        load(name)
    with pytest.raises(DataError, match=r"none\.npz must be readable, .* No such file .* Write .*none\.npz with"):
        load(f"npz:{tmp_path / 'none.npz'}")
    np.save(tmp_path / "one.npy", arrays["x_train"])
    with pytest.raises(DataError, match=r"one\.npy must be readable, .* not a zip file"):
        load(f"npz:{tmp_path / 'one.npy'}")


def test_npz_damaged_anywhere(tmp_path: Path) -> None:
    name = saved(tmp_path, good())
    file = tmp_path / "data.npz"
    whole, want = file.read_bytes(), load(name).train.inputs
    for at in range(0, len(whole), 37):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :]):
            file.write_bytes(damaged)
            with contextlib.suppress(DataError):
                assert torch.equal(load(name).train.inputs, want)  # what was hit doesn't matter


def test_seeded_is_the_same_data_with_another_augmentation() -> None:
    task = load("digits", augment=True, seed=3)
    other = task.seeded(4)
    assert other.train.inputs is task.train.inputs
    assert torch.equal(other.train[0][0], load("digits", augment=True, seed=4).train[0][0])
    assert not torch.equal(other.train[0][0], task.train[0][0])
    assert torch.equal(task.train[0][0], load("digits", augment=True, seed=3).train[0][0])
