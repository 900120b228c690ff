"""The tasks: data sets held in memory, with the model and settings that they are trained with by default."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import random
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from torchcrest.checks import suggest
from torchcrest.errors import ConfigError, DataError, must
from torchcrest.train.images import Arrays, arrays_of, cifar
from torchcrest.train.models import build
from torchcrest.train.sources import Split, Splits, beside, choose, from_files, from_folders, from_hub
from torchcrest.train.sources import require as _require
from torchcrest.train.texts import BAG, Texts, build_text, texts_of

__all__ = ["Examples", "Task", "load"]

PAD = 4  # pixels that the random crop shifts an image by at most, each way
MNIST1D_SIZE = 25_000  # training and test examples together, split 4 : 1

MAX_LENGTH = 128  # tokens of a text, by default

Pair = tuple[Tensor, Tensor]
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
    evaluated_together = 1000

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
    """A data set with the settings of its full training run, in passes over `train`.

    `train` and `test` are `Examples` or `Texts`. Test images are normalised by the training images' mean and
    std and never augmented. `shape` is one example's (of texts: none), labels are 0 to `classes` - 1, and
    `notes` says in sentences what was left out or held out.
    """

    name: str
    train: Any
    test: Any
    shape: tuple[int, ...]
    classes: int
    model: str
    epochs: int
    learning_rate: float
    batch_size: int = 128
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    augment: bool = False
    flip: bool = False
    max_length: int | None = None
    notes: tuple[str, ...] = ()

    def build(self, model: str, seed: int) -> nn.Module:
        """Build a model for the examples, on the CPU; see `torchcrest.train.models.build` and `build_text`.

        Raises:
            ConfigError: there is no such model, or it doesn't fit.
        """
        if isinstance(self.train, Texts):
            return build_text(model, self.train.vocabulary, self.classes, seed)
        return build(model, self.shape, self.classes, seed)

    def seeded(self, seed: int) -> Task:
        """Return the task with another seed of the augmentation, on the same data."""
        train = copy.copy(self.train)
        train.seed = seed
        return replace(self, train=train)


def load(
    name: str,
    *,
    data: str | None = None,
    augment: bool | None = None,
    flip: bool | None = None,
    seed: int = 0,
    model: str | None = None,
    max_length: int | None = None,
) -> Task:
    """Load a task. The global random states stay as they were.

    Nothing is downloaded but by `cifar10`, `cifar100`, `tinyimagenet`, `snli` without `data`, by `hf:NAME`, and
    by the names of pretrained models. Rows without a label (-1, "-" or none) are left out. Where there are no
    test examples, those for validation are tested on, else a tenth of the training examples that is held out.

    Args:
        name: `digits` (1,797 images of 8 x 8); `mnist1d` (25,000 signals of length 40, generated in seconds
            and kept in the user's cache folder); `npz:PATH`, arrays `x_train`, `y_train`, `x_test` and
            `y_test`, where inputs are images [n, H, W], [n, H, W, C] or [n, C, H, W] (C 1 or 3) or vectors
            [n, d], in uint8 or any float, and labels are whole numbers from 0, [n]; `cifar10`, `cifar100`,
            `tinyimagenet` or `snli`; `imagefolder:DIR`, images in train/CLASS and test/CLASS; `text:FILE`,
            texts or pairs in a JSON object a line (.jsonl or .jsonl.gz), with test in place of train in the name
            of the test file; `hf:NAME` or `hf:NAME:CONFIG`, images or texts of the Hugging Face hub, or
            `hf:DIR`, a folder that `datasets.load_dataset` takes.
        data: Where the files of `cifar10`, `cifar100`, `tinyimagenet` or `snli` are: their original files, a
            folder of images, or Parquet or JSON-lines files with train and test in their names.
        augment: Whether to shift training images at random, see `Examples`; None: the task's default.
        flip: Whether to mirror them as well; None: likewise.
        seed: The seed of the augmentation. The data and their split don't depend on it.
        model: The text model, whose tokenizer is used; None: the task's default.
        max_length: Tokens of a text that are kept, fewer where the model takes no more; None: 128.

    Raises:
        ConfigError: The task is unknown, its package isn't installed, or a setting doesn't suit it.
        DataError: The files can't be used.

    >>> task = load("digits")
    >>> len(task.train), len(task.test), task.shape, task.classes
    (1437, 360, (1, 8, 8), 10)
    """
    kind, _, rest = name.partition(":")
    known = [*_TASKS, *_NAMED, *(f"{form}:{what}" for form, what in _FORMS.items())]
    if (name not in known or rest) and (kind not in _FORMS or not rest):
        do = f"Did you mean npz:{name}?" if name.endswith(".npz") else suggest(name, known)
        raise ConfigError(must("task", f"be one of {', '.join(known)}", name, do))
    want, do = f"be left out with {kind}", f"It is for {', '.join(_NAMED)}."
    _require(data is None or name in _NAMED, "data", want, data, do, ConfigError)
    defaults = _NAMED.get(name, _Defaults())
    arrays: Arrays | None = None
    notes: tuple[str, ...] = ()
    with _same_random_states():
        if kind == "npz":
            arrays = _read(Path(os.path.expanduser(rest)))
            arrays |= {key: _channels_first(key, arrays[key]) for key in ("x_train", "x_test")}
        elif name in _TASKS:
            make, defaults = _TASKS[name]
            try:
                arrays = make()
            except ImportError as error:
                do = "Run pip install 'torchcrest[tasks]'."
                raise ConfigError(must(f"task {name}", "have its packages installed", str(error), do)) from error
        elif data is not None and defaults.cifar:
            arrays = cifar(_there("data", data), defaults.cifar)
        if arrays is None:
            train, test, notes = choose(_splits(kind, rest, defaults.hub, data), data or rest or name)
            if not train.images:
                for setting, value in (("augment", augment), ("flip", flip)):
                    _require(not value, setting, "be False for texts", value, "Only images are augmented.", ConfigError)
                return _of_texts(name, train, test, model or TEXT_MODEL, max_length or MAX_LENGTH, notes)
            arrays = arrays_of(train, test)
    do = "It is for texts."
    _require(max_length is None, "max_length", f"be left out with {name}", max_length, do, ConfigError)
    augment = defaults.augment if augment is None else augment
    flip = defaults.augment and augment if flip is None else flip
    (x, y), (x_test, y_test) = _tensors("train", arrays), _tensors("test", arrays)
    kinds = [f"{inputs.dtype} {tuple(inputs.shape[1:])}" for inputs in (x, x_test)]
    _require(kinds[0] == kinds[1], "x_test", f"be like x_train, {kinds[0]}", kinds[1], "Prepare both alike.")
    classes, top = int(y.max()) + 1, int(y_test.max())
    _require(top < classes, "y_test", f"be below {classes}, as y_train is", top, "Leave out such examples.")
    mean, std = _moments(x)
    return Task(
        name,
        Examples(x, y, mean=mean, std=std, augment=augment, flip=flip, seed=seed),
        Examples(x_test, y_test, mean=mean, std=std),
        tuple(x.shape[1:]),
        classes,
        defaults.model or ("cnn" if x.ndim == 4 else "mlp"),
        defaults.epochs,
        defaults.learning_rate,
        defaults.batch_size,
        augment=augment,
        flip=flip,
        notes=notes,
    )


def _of_texts(name: str, train: Split, test: Split, model: str, length: int, notes: tuple[str, ...]) -> Task:
    """Tokenise texts. As in the CREST paper, they are fine-tuned by AdamW at a rate of 1e-5, in batches of 32."""
    texts, texts_test, classes = texts_of(train, test, model, length)
    epochs, rate = (10, 1e-3) if model == BAG else (8 if name == "snli" else 3, 1e-5)
    return Task(
        name,
        texts,
        texts_test,
        (),
        classes,
        model,
        epochs,
        rate,
        batch_size=32,
        weight_decay=0.01,
        optimizer="adamw",
        max_length=length,
        notes=notes,
    )


def _splits(kind: str, rest: str, hub: str, data: str | None) -> Splits:
    """Find the splits of a task whose examples are rows."""
    if kind == "text":
        return beside(_there("text", rest))
    if kind == "imagefolder":
        return from_folders(_there("imagefolder", rest))
    if kind == "hf":
        local = Path(os.path.expanduser(rest))
        name, _, config = (str(local), "", "") if local.exists() else rest.partition(":")
        return from_hub(name, config or None)
    if data is None:
        return from_hub(hub)
    found = _there("data", data)
    return beside(found) if found.is_file() else from_files(found) or from_folders(found)


def _there(name: str, path: str) -> Path:
    found = Path(os.path.expanduser(path))
    _require(found.exists(), name, "be a file or folder that is there", path, "Check the path.")
    return found


@contextlib.contextmanager
def _same_random_states() -> Iterator[None]:
    # MNIST-1D's generator seeds both of these, and the first import of scikit-learn draws from one.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


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


@dataclass(frozen=True)
class _Defaults:
    """What a task is trained with, where the settings don't say; and where it is."""

    model: str = ""  # of other data than texts; none: cnn or mlp, by the shape
    epochs: int = 10
    learning_rate: float = 0.1
    batch_size: int = 128
    augment: bool = False  # and mirror
    hub: str = ""
    cifar: int = 0  # classes, where the original archives are known


_TASKS = {
    "digits": (_digits, _Defaults("mlp", 30, 0.05, 32)),
    "mnist1d": (_mnist1d, _Defaults("conv1d", 60, 0.2, 128)),
}
TEXT_MODEL = "FacebookAI/roberta-base"
_NAMED = {
    "cifar10": _Defaults("resnet20", 200, augment=True, hub="uoft-cs/cifar10", cifar=10),
    "cifar100": _Defaults("resnet18", 200, augment=True, hub="uoft-cs/cifar100", cifar=100),
    "tinyimagenet": _Defaults("resnet50", 200, augment=True, hub="zh-plus/tiny-imagenet"),
    "snli": _Defaults(hub="stanfordnlp/snli"),
}
_FORMS = {"npz": "PATH", "imagefolder": "DIR", "text": "FILE", "hf": "DATASET"}


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
