"""Texts and pairs of texts as tokens in memory, and the models for them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchcrest.errors import ConfigError, must
from torchcrest.train.sources import Split, numbered, optional, require

__all__ = ["BAG", "Bag", "Texts", "build_text", "texts_of"]

BAG = "bag"  # the model that needs nothing from elsewhere
WORDS = 30_000  # in its vocabulary at most
PAD, UNKNOWN = 0, 1
TOGETHER = 10_000  # texts tokenised at a time

Batch = dict[str, Tensor]


class Texts(Dataset[Batch]):
    """Tokens and labels in memory, read a batch at a time and padded to the longest text in it.

    A batch has ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer has some, and
    ``labels``, as the models of Hugging Face's transformers take them by keyword.

    Args:
        tokens: those of each text; its length is theirs.
        labels: ``[n]`` classes.
        types: of each token, 0 or 1, where the model is to be told the texts of a pair apart.
        vocabulary: how many different tokens there are.
        pad: the token that fills up.
        decode: returns the text of tokens, to show it; None: the tokens' numbers are shown.

    >>> texts = Texts([[5, 6, 7], [8]], [0, 1], vocabulary=9)
    >>> texts.__getitems__([0, 1])["input_ids"].tolist()
    [[5, 6, 7], [8, 0, 0]]
    """

    deterministic = True  # draws nothing from the global random states
    evaluated_together = 128

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        labels: Any,
        *,
        types: Sequence[Sequence[int]] | None = None,
        vocabulary: int,
        pad: int = PAD,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        lengths = torch.tensor([len(each) for each in tokens], dtype=torch.int64)
        self.ends = lengths.cumsum(0)
        self.starts = self.ends - lengths
        # One number after the last, for a batch of empty texts to point at.
        self.tokens = _flat(tokens, np.int32)
        self.types = None if types is None else _flat(types, np.uint8)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.vocabulary, self.pad = vocabulary, pad
        self._decode = decode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Batch:
        return {name: column[0] for name, column in self.__getitems__([i]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return one batch: tokens ``[b, longest]`` and labels ``[b]``, all in int64."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        starts, ends = self.starts[rows, None], self.ends[rows, None]
        longest = int((ends - starts).max()) if len(rows) else 0
        places = starts + torch.arange(longest)
        there = places < ends
        places = torch.where(there, places, 0)
        batch = {
            "input_ids": self.tokens[places].long().masked_fill(~there, self.pad),
            "attention_mask": there.long(),
        }
        if self.types is not None:
            batch["token_type_ids"] = self.types[places].long().masked_fill(~there, 0)
        return {**batch, "labels": self.labels[rows]}

    def text(self, i: int) -> str:
        """Return the text of an example, as far as its tokens tell; of a pair, with " / " between the two."""
        at = slice(int(self.starts[i]), int(self.ends[i]))
        tokens, decode = self.tokens[at].tolist(), self._decode or (lambda some: " ".join(map(str, some)))
        types = [0] * len(tokens) if self.types is None else self.types[at].tolist()
        parts = [[token for token, kind in zip(tokens, types, strict=True) if kind == k] for k in (0, 1)]
        return " / ".join(decode(part) for part in parts if part)

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """Leave a batch as it is: DataLoader's collate_fn for `Texts`."""
        return batch


def _flat(parts: Iterable[Iterable[int]], kind: Any) -> Tensor:
    return torch.from_numpy(np.fromiter(chain(*parts, [0]), dtype=kind))


def texts_of(train: Split, test: Split, model: str, max_length: int) -> tuple[Texts, Texts, int]:
    """Tokenise training and test examples as the model needs it, and number the classes.

    Returns:
        Both, and the number of classes.

    Raises:
        ConfigError: the model has no tokenizer that can be loaded.
        DataError: a text is something else, or labels cannot be used.
    """
    for split in (train, test):
        for column in split.inputs:
            odd = next((row for row, text in enumerate(column) if not isinstance(text, str)), None)
            name = f"example {odd} of {split.where}"
            require(odd is None, name, "be text", None if odd is None else column[odd], "Leave it out.")
    pairs = [len(split.inputs) for split in (train, test)]
    require(pairs[0] == pairs[1], test.where, f"have {pairs[0]} texts an example, as in training", pairs[1], "Mend it.")
    y_train, y_test = numbered(train, test)
    tokenize = _words(train, max_length) if model == BAG else _pretrained(model, max_length)
    classes = int(y_train.max()) + 1
    require(int(y_test.max()) < classes, test.where, f"have labels below {classes}", int(y_test.max()), "Leave it out.")
    return tokenize(train, y_train), tokenize(test, y_test), classes


def _pretrained(name: str, max_length: int) -> Any:
    """Return what tokenises as a pretrained model's own tokenizer does."""
    transformers = optional("transformers", "pretrained text models")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # from the network, the file system or the formats: anything
        raise _no_model(name, error) from error
    named, do = f"the tokenizer of {name}", "Choose another model, or set its pad_token and save it again."
    require(tokenizer.pad_token_id is not None, named, "have a padding token", None, do, ConfigError)
    length = min(max_length, tokenizer.model_max_length)
    typed = "token_type_ids" in tokenizer.model_input_names

    def tokenize(split: Split, labels: Any) -> Texts:
        tokens: list[Any] = []
        types: list[Any] = []
        for start in range(0, len(labels), TOGETHER):
            columns = [list(column[start : start + TOGETHER]) for column in split.inputs]
            found = tokenizer(*columns, truncation=True, max_length=length)
            tokens += [np.asarray(ids, np.int32) for ids in found["input_ids"]]
            types += [np.asarray(ids, np.uint8) for ids in found["token_type_ids"]] if typed else []
        kinds, decode = types if typed else None, _Decoder(tokenizer)
        return Texts(tokens, labels, types=kinds, vocabulary=len(tokenizer), pad=tokenizer.pad_token_id, decode=decode)

    return tokenize


@dataclass(frozen=True)
class _Decoder:
    """Spells what a pretrained model's tokenizer has made of a text."""

    tokenizer: Any

    def __call__(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()


@dataclass(frozen=True)
class _Spelling:
    """Spells what :func:`_words` has made of a text."""

    words: list[str]

    def __call__(self, tokens: list[int]) -> str:
        return " ".join(self.words[token - UNKNOWN - 1] if token > UNKNOWN else "…" for token in tokens)


def _words(train: Split, max_length: int) -> Any:
    """Return what tokenises into words, the most frequent of the training examples; the texts of a pair share."""

    def split_up(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    counts = Counter(word for column in train.inputs for text in column for word in split_up(text))
    known = {word: number for number, (word, _) in enumerate(counts.most_common(WORDS), UNKNOWN + 1)}
    each = max(1, max_length // len(train.inputs))

    def tokenize(split: Split, labels: Any) -> Texts:
        columns = [
            [[known.get(word, UNKNOWN) for word in split_up(text)[:each]] for text in column] for column in split.inputs
        ]
        tokens = [[token for part in parts for token in part] for parts in zip(*columns, strict=True)]
        types = [[k for k, part in enumerate(parts) for _ in part] for parts in zip(*columns, strict=True)]
        return Texts(tokens, labels, types=types, vocabulary=UNKNOWN + 1 + len(known), decode=_Spelling([*known]))

    return tokenize


# Models ---------------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """Classifies the mean of a text's word vectors; for a pair, both means, their distance and their product.

    Small and quick, for a CPU. In the spirit of fastText (Joulin et al., 2017) and, for pairs, of InferSent
    (Conneau et al., 2017).
    """

    def __init__(self, vocabulary: int, classes: int, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.vectors = nn.Embedding(vocabulary, width)
        self.body = nn.Sequential(nn.Linear(4 * width, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return logits ``[n, classes]`` of tokens ``[n, length]``."""
        vectors, means = self.vectors(input_ids), []
        for kind in (0, 1):
            which = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            mask = (attention_mask * (which == kind)).unsqueeze(2).to(vectors.dtype)
            means.append((vectors * mask).sum(1) / mask.sum(1).clamp(min=1))
        first, second = means
        logits: Tensor = self.head(self.body(torch.cat([first, second, (first - second).abs(), first * second], 1)))
        return logits


def build_text(name: str, vocabulary: int, classes: int, seed: int) -> nn.Module:
    """Build a text model on the CPU; the seed decides whatever weights are not pretrained.

    The global random state is left as it was.

    Args:
        name: ``bag``, the name of a pretrained model on the Hugging Face hub, or a folder that holds one.
        vocabulary: tokens of the bag.
        classes: the number of logits.
        seed: of the initial weights; of a pretrained model, its last layers'.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if name == BAG:
            return Bag(vocabulary, classes)
        auto = optional("transformers", "pretrained text models").AutoModelForSequenceClassification
        try:
            model: nn.Module = auto.from_pretrained(name, num_labels=classes)
        except Exception as error:  # as above
            raise _no_model(name, error) from error
    return model.train()


def _no_model(name: str, error: Exception) -> ConfigError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    want = f"be {BAG}, a text model on the Hugging Face hub, or a folder with one and its tokenizer"
    return ConfigError(must("model", f"{want} ({reason})", name, f"Offline, use a folder, or --model {BAG}."))
