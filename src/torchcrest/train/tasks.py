"""The tasks: data sets held in memory, with the model and settings that they are trained with by default."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from torchcrest.checks import suggest
from torchcrest.errors import ConfigError, DataError, must

__all__ = ["Examples", "Task", "load"]

PAD = 4  # pixels that the random crop shifts an image by at most, each way
MNIST1D_SIZE = 25_000  # training and test examples together, split 4 : 1

Pair = tuple[Tensor, Tensor]
Arrays = dict[str, NDArray[Any]]  # by these names, as in an npz file:
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class Examples(Dataset[Pair]):
    """Inputs and targets in memory, read a batch at a time.

    Inputs stay in the type that they came in (uint8 images in uint8) and become float32 when read:
    (x - mean) / std per channel, where axis 1 of the inputs counts the channels.

    With `augment`, images are padded with zeros (the mean, after normalising) by 4 pixels all around, cropped
    to their size at a random place and, with `flip`, mirrored left to right half of the time. The random
    numbers are a pure function of (seed, the list of indices read), not of a generator that moves on. Why: a
    list read again gives the same batch, to the bit, so that what a selection measured is what is trained
    on, and neither the number of workers nor a resume changes a run. In another list an example gets another
    crop, so shuffled epochs see new ones; `self[i]` has the crop of the list [i], not of a longer one.

    Args:
        inputs: [n, d] vectors, [n, C, L] signals or [n, C, H, W] images.
        targets: [n] labels, or [n, ...].
        mean: One number, or one for each channel.
        std: One number, or one for each channel; above 0.
        augment: Whether to augment. For images only.
        flip: Whether to mirror as well. Only with `augment`.
        seed: The seed of the augmentation.

    Raises:
        DataError: Inputs and targets differ in length or are empty, or mean or std don't fit them.
        ConfigError: Augmentation of other inputs than images, or `flip` without `augment`.

    >>> ones = Examples(torch.full((3, 2), 5, dtype=torch.uint8), torch.tensor([0, 1, 1]), mean=3.0, std=2.0)
    >>> ones[1]
    (tensor([1., 1.]), tensor(1))
    """

    deterministic = True  # draws nothing from the global random states

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        mean: Tensor | float,
        std: Tensor | float,
        augment: bool = False,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        shape, n = tuple(inputs.shape), len(inputs)
        want = "be [n, d] vectors, [n, C, L] signals or [n, C, H, W] images, and not empty"
        _require(inputs.ndim >= 2 and inputs.numel() > 0, "inputs", want, shape, "Reshape them.")
        got, do = tuple(targets.shape), "Leave out those without a partner."
        _require(got[:1] == (n,), "targets", f"be {n}, one for each input", got, do)
        do = f"Only images (C, H, W) can be shifted; these examples are {shape[1:]}."
        _require(inputs.ndim == 4 or not augment, "augment", "be False here", augment, do, ConfigError)
        want, do = "be False without augment", "Set augment=True as well."
        _require(augment or not flip, "flip", want, flip, do, ConfigError)
        self.inputs, self.targets = inputs, targets
        self.mean, self.std = self._per_channel("mean", mean), self._per_channel("std", std)
        _require(bool((self.std > 0).all()), "std", "be above 0", std, "Use 1 for a constant channel.")
        self.augment, self.flip, self.seed = augment, flip, seed

    def _per_channel(self, name: str, value: Tensor | float) -> Tensor:
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self.inputs.device)
        fits = tensor.shape in ((), (1,), self.inputs.shape[1:2])
        do = f"Axis 1 of the inputs, {tuple(self.inputs.shape)}, counts the channels."
        _require(fits, name, "be one number, or one for each channel", tuple(tensor.shape), do)
        return tensor.reshape(-1, *(1,) * (self.inputs.ndim - 2))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> Pair:
        x, y = self.__getitems__([i])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> Pair:
        """One batch, as PyTorch's loaders ask for it: inputs [b, ...] in float32 and targets [b, ...]."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.inputs.device)
        x = (self.inputs[index].to(torch.float32) - self.mean) / self.std
        return self._augmented(x, indices) if self.augment else x, self.targets[index]

    def _augmented(self, x: Tensor, indices: list[int]) -> Tensor:
        key = f"{self.seed}:".encode() + np.asarray(indices, dtype="<i8").tobytes()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        top, left = torch.randint(2 * PAD + 1, (2, len(x)), generator=generator).to(x.device)
        mirrored = torch.randint(2, (len(x), 1), generator=generator).to(x.device) * self.flip
        height, width = x.shape[2:]
        rows = top[:, None] + torch.arange(height, device=x.device)
        columns = left[:, None] + torch.arange(width, device=x.device)
        columns = torch.where(mirrored == 1, columns.flip(1), columns)
        pixels = (rows[:, :, None] * (width + 2 * PAD) + columns[:, None, :]).reshape(len(x), 1, -1)
        padded = F.pad(x, (PAD,) * 4).flatten(2)
        return padded.gather(2, pixels.expand(-1, x.shape[1], -1)).reshape(x.shape)

    @staticmethod
    def collate(batch: Pair | list[Pair]) -> Pair:
        """Leave a batch as it is, stack a list of examples: DataLoader's collate_fn for `Examples`."""
        if isinstance(batch, tuple):
            return batch
        x, y = default_collate(batch)
        return x, y


@dataclass(frozen=True)
class Task:
    """A data set with the settings of its full training run: SGD on one peak rate, in passes over `train`.

    Test examples are normalised by the training examples' mean and std and never augmented. `shape` is one
    example's, labels are 0 to `classes` - 1, and `model` is a name in `torchcrest.train.models.MODELS`.
    """

    name: str
    train: Examples
    test: Examples
    shape: tuple[int, ...]
    classes: int
    model: str
    epochs: int
    learning_rate: float
    batch_size: int = 128
    weight_decay: float = 5e-4


def load(name: str, *, augment: bool = False, flip: bool = False, seed: int = 0) -> Task:
    """Load a task. Nothing is downloaded, and the global random states stay as they were.

    Args:
        name: `digits` (1,797 images of 8 x 8), `mnist1d` (25,000 signals of length 40, generated in seconds
            and kept in the user's cache folder), or `npz:PATH`: arrays `x_train`, `y_train`, `x_test` and
            `y_test`, where inputs are images [n, H, W], [n, H, W, C] or [n, C, H, W] (C 1 or 3) or vectors
            [n, d], in uint8 or any float, and labels are whole numbers from 0, [n].
        augment: Whether to shift training images at random, see `Examples`.
        flip: Whether to mirror them as well.
        seed: The seed of the augmentation. The data and their split don't depend on it.

    Raises:
        ConfigError: The task is unknown, its package isn't installed, or augmentation doesn't suit it.
        DataError: The npz file can't be used.

    >>> task = load("digits")
    >>> len(task.train), len(task.test), task.shape, task.classes
    (1437, 360, (1, 8, 8), 10)
    """
    if name.startswith("npz:"):
        arrays = _read(Path(os.path.expanduser(name.removeprefix("npz:"))))
        arrays |= {key: _channels_first(key, arrays[key]) for key in ("x_train", "x_test")}
        model, epochs, rate, batch = ("cnn" if arrays["x_train"].ndim == 4 else "mlp"), 10, 0.1, 128
    elif name in _TASKS:
        make, model, epochs, rate, batch = _TASKS[name]
        # MNIST-1D's generator seeds both of these, and the first import of scikit-learn draws from one.
        states = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            arrays = make()
        except ImportError as error:
            do = "Run pip install 'torchcrest[tasks]'."
            raise ConfigError(must(f"task {name}", "have its packages installed", str(error), do)) from error
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
    else:
        do = f"Did you mean npz:{name}?" if name.endswith(".npz") else suggest(name, [*_TASKS, "npz:PATH"])
        raise ConfigError(must("task", f"be one of {', '.join(_TASKS)}, npz:PATH", name, do))
    (x, y), (x_test, y_test) = _tensors("train", arrays), _tensors("test", arrays)
    kinds = [f"{inputs.dtype} {tuple(inputs.shape[1:])}" for inputs in (x, x_test)]
    _require(kinds[0] == kinds[1], "x_test", f"be like x_train, {kinds[0]}", kinds[1], "Prepare both alike.")
    classes, top = int(y.max()) + 1, int(y_test.max())
    _require(top < classes, "y_test", f"be below {classes}, as y_train is", top, "Leave out such examples.")
    mean, std = _moments(x)
    train = Examples(x, y, mean=mean, std=std, augment=augment, flip=flip, seed=seed)
    test = Examples(x_test, y_test, mean=mean, std=std)
    return Task(name, train, test, tuple(x.shape[1:]), classes, model, epochs, rate, batch)


def _digits() -> Arrays:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 1, 8, 8).astype(np.uint8)  # grey levels, 0 to 16
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def _mnist1d() -> Arrays:
    """The generated data, from the cache if they are there and whole."""
    roots = (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"))
    root = next(filter(os.path.isabs, roots), os.devnull)  # without a home: where no file can be
    version = metadata.version("mnist1d")  # not installed: an ImportError
    file = Path(root, "torchcrest", f"mnist1d-{version}-{MNIST1D_SIZE}.npz")
    with contextlib.suppress(DataError):
        return _read(file)
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.num_samples = MNIST1D_SIZE
    data = make_dataset(args)
    x_train, x_test = data["x"][:, None], data["x_test"][:, None]
    arrays = {"x_train": x_train, "y_train": data["y"], "x_test": x_test, "y_test": data["y_test"]}
    with contextlib.suppress(OSError):  # a cache that can't be written costs time, nothing else
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            np.savez(Path(folder, "arrays.npz"), **arrays)
            os.replace(Path(folder, "arrays.npz"), file)  # others see the whole file or none
    return arrays


_TASKS = {  # how to get it, model, epochs, learning rate, batch size
    "digits": (_digits, "mlp", 30, 0.05, 32),
    "mnist1d": (_mnist1d, "conv1d", 60, 0.2, 128),
}


def _require(ok: bool, name: str, want: str, got: Any, do: str, error: type[Exception] = DataError) -> None:
    if not ok:
        raise error(must(name, want, got, do))


def _read(path: Path) -> Arrays:
    name, arrays = str(path), {}
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            keys = file.files
            for name in (key for key in ARRAYS if key in keys):
                arrays[name] = np.asarray(file[name])
    except Exception as error:  # what a damaged file makes numpy raise can be anything
        do = f"Write {path} with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
        raise DataError(must(name, "be readable, from an npz file without pickle", str(error), do)) from error
    missing = ", ".join(key for key in ARRAYS if key not in arrays)
    _require(not missing, str(path), f"hold {', '.join(ARRAYS)}", keys, f"Add {missing}.")
    return arrays


def _channels_first(name: str, x: NDArray[Any]) -> NDArray[Any]:
    if x.ndim == 3:
        return x[:, None]
    axes = [axis for axis in (1, 3) if x.ndim == 4 and x.shape[axis] in (1, 3)]
    want = "be [n, d], [n, H, W], [n, H, W, C] or [n, C, H, W], where C alone is 1 or 3"
    _require(x.ndim == 2 or len(axes) == 1, name, want, x.shape, "Reshape it.")
    return np.moveaxis(x, 3, 1) if axes == [3] else x


def _tensors(split: str, arrays: Arrays) -> Pair:
    """Check a split and make tensors of it: inputs in uint8 or float32, labels in int64."""
    inputs, labels = f"x_{split}", f"y_{split}"
    x, y = arrays[inputs], arrays[labels]
    _require(x.size > 0, inputs, "hold one example or more", x.shape, "Check how it was made.")
    if x.dtype != np.uint8:
        _require(x.dtype.kind == "f", inputs, "be uint8 or float", str(x.dtype), "Use x.astype('float32').")
        with np.errstate(over="ignore"):  # what is too large for float32 is found below
            x = x.astype(np.float32, copy=False)
        bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1)).tolist()
        _require(not bad, inputs, "be finite in float32", f"NaN or infinity at {bad[:5]}", "Leave those out.")
    ok, do = y.ndim == 1 and y.dtype.kind in "iu", "Number the classes from 0."
    _require(ok, labels, "be whole numbers [n]", f"{y.dtype} {y.shape}", do)
    _require(len(y) == len(x), labels, f"be {len(x)}, one for each example", len(y), "Leave out the others.")
    y = y.astype(np.int64)
    _require(y.min() >= 0, labels, "be 0 or more", int(y.min()), do)
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C]; channel by channel, to hold one of them in float32 at a time."""
    pairs = [torch.std_mean(x[:, channel].float(), correction=0) for channel in range(x.shape[1])]
    std, mean = (torch.stack(values) for values in zip(*pairs, strict=True))
    # What spreads less than float32 resolves is a constant: its std is nothing but rounding.
    return mean, torch.where(std > 1e-6 * mean.abs(), std, 1.0)
