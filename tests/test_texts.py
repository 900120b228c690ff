"""Text tasks: tokens in memory, the models for them, and runs that train on them."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from conftest import SMALL, same
from test_sources import Rows, write
from torchcrest.errors import CheckpointError, ConfigError, DataError
from torchcrest.train.compare import compare, plan
from torchcrest.train.files import RunFiles
from torchcrest.train.methods import METHODS
from torchcrest.train.run import Interrupted, train
from torchcrest.train.settings import RunSettings
from torchcrest.train.sources import Split
from torchcrest.train.tasks import Task, load
from torchcrest.train.texts import Bag, Texts, build_text, texts_of

WORDS = ["cold", "warm", "sun", "ice", "the", "is", "a", "not", "and", "of"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def sentences(n: int, seed: int = 0) -> Rows:
    """Pairs of sentences: 0, both cold; 1, both warm; 2, neither nor."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        first, second = draw.randrange(2), draw.randrange(2)
        fill = [" ".join(draw.choices(WORDS[4:], k=draw.randrange(1, 6))) for _ in range(2)]
        texts = [f"{words} {('ice', 'sun')[kind]}" for words, kind in zip(fill, (first, second), strict=True)]
        rows.append({"premise": texts[0], "hypothesis": texts[1], "label": first if first == second else 2})
    return rows


TRAIN, TEST = sentences(120), sentences(30, seed=1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    write(folder / "pairs_test.jsonl.gz", TEST)
    return str(write(folder / "pairs_train.jsonl.gz", TRAIN))


def save_model(folder: Path, *, typed: bool = True, pad: str | None = "[PAD]") -> str:
    """Save a tiny BERT and its tokenizer of words, as save_pretrained does with a large one."""
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(SPECIAL + WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"]
    transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token="[UNK]",
        model_max_length=20,
        model_input_names=names,
    ).save_pretrained(folder)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=14, max_position_embeddings=20, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("bert"))


# Tokens ---------------------------------------------------------------------------------------------------------


def test_batches_are_padded_to_their_longest() -> None:
    tokens = [[5, 6, 7], [], [8], [9, 5]]
    types = [[0, 0, 1], [], [0], [0, 1]]
    texts = Texts(tokens, [0, 1, 2, 3], types=types, vocabulary=10, pad=4)
    assert len(texts) == 4
    batch = texts.__getitems__([3, 1, 2])
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[9, 5], [4, 4], [8, 4]],
        "attention_mask": [[1, 1], [0, 0], [1, 0]],
        "token_type_ids": [[0, 1], [0, 0], [0, 0]],
        "labels": [3, 1, 2],
    }
    assert {column.dtype for column in batch.values()} == {torch.int64}
    assert {name: column.tolist() for name, column in texts[0].items()} == {
        "input_ids": [5, 6, 7],
        "attention_mask": [1, 1, 1],
        "token_type_ids": [0, 0, 1],
        "labels": 0,
    }
    assert texts.__getitems__([1])["input_ids"].shape == (1, 0)
    assert texts.__getitems__([])["input_ids"].shape == (0, 0)
    assert texts.collate(batch) is batch
    assert "token_type_ids" not in Texts(tokens, [0, 1, 2, 3], vocabulary=10)[0]
    assert texts.tokens.dtype == torch.int32
    assert len(pickle.dumps(texts)) < 3000


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("max_length", [128, 6])
def test_tokens_are_those_of_the_models_own_tokenizer(
    tmp_path: Path, typed: bool, pairs: bool, max_length: int
) -> None:
    name = save_model(tmp_path, typed=typed)
    columns = [[str(row[key]) for row in TRAIN] for key in ("premise", "hypothesis")][: 2 if pairs else 1]
    columns[0][0] = " ".join(WORDS * 9)
    split = Split(tuple(columns), [row["label"] for row in TRAIN], False, "here")
    texts, test, classes = texts_of(split, split, name, max_length)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    rows = [0, 3, 5, 2]
    chosen = [[column[row] for row in rows] for column in columns]
    length = min(max_length, 20)
    want = tokenizer(*chosen, padding=True, truncation=True, max_length=length, return_tensors="pt")
    got = texts.__getitems__(rows)
    assert got["input_ids"].shape[1] == length
    assert got.pop("labels").tolist() == [TRAIN[row]["label"] for row in rows]
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in got)
    assert (classes, texts.vocabulary, len(test)) == (3, 14, 120)
    shown = [word for word in texts.text(5).split() if word in WORDS]
    assert shown == [WORDS[token - 4] for token in texts[5]["input_ids"].tolist() if token >= 4]
    assert (" / " in texts.text(5)) == (typed and pairs)


def test_bag_knows_the_words_of_the_training_texts() -> None:
    train = Split((["A cat, a dog", "the cat"], ["a", "Dog!"]), [0, 1], False, "here")
    test = Split((["zebra cat cat dog"], [""]), [1], False, "there")
    texts, texts_test, classes = texts_of(train, test, "bag", 6)
    a, cat, dog, comma = 2, 3, 4, 5  # by how often they come, and then by where
    assert texts[0]["input_ids"].tolist() == [a, cat, comma, a], "three words of each text"
    assert texts[0]["token_type_ids"].tolist() == [0, 0, 0, 1]
    assert texts_test[0]["input_ids"].tolist() == [1, cat, cat]
    assert texts[1]["input_ids"].tolist() == [6, cat, dog, 7]
    assert (texts.vocabulary, classes) == (8, 2)
    assert (texts.text(0), texts_test.text(0)) == ("a cat , / a", "… cat cat")


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        ((["a", None],), [0, 1], r"example 1 of there must be text, got None\. Leave it out"),
        ((["a"], ["b"]), [0], r"there must have 1 texts an example, as in training, got 2\. Mend it"),
        ((["a"],), [7], r"there must have labels below 2, got 7\. Leave it out"),
    ],
)
def test_texts_that_cannot_be_used(inputs: Any, labels: list[int], message: str) -> None:
    train = Split((["a", "b"],), [0, 1], False, "here")
    with pytest.raises(DataError, match=message):
        texts_of(train, Split(inputs, labels, False, "there"), "bag", 8)


def test_models_that_cannot_be_used(tmp_path: Path, bert: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model must be bag, a text model .*, got '.*empty'\. Offline, use a folder"):
        load(f"text:{file}", model=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"model must be bag, a text model .*, got '.*empty'"):
        build_text(str(tmp_path / "empty"), 14, 3, 0)
    with pytest.raises(ConfigError, match=r"the tokenizer of .*unpadded must have a padding token, got None\. Choose"):
        load(f"text:{file}", model=save_model(tmp_path / "unpadded", pad=None))
    with pytest.raises(ConfigError, match=r"model must be one of resnet20"):
        load("digits").build("bag", 0)
    for setting in ("augment", "flip"):
        with pytest.raises(ConfigError, match=rf"{setting} must be False for texts, got True\. Only images"):
            load(f"text:{file}", model="bag", **{setting: True})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_length must be above 0, got 0"):
        RunSettings(task=f"text:{file}", max_length=0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for act in (lambda: load(f"text:{file}", model=bert), lambda: build_text(bert, 14, 3, 0)):
        with pytest.raises(ConfigError, match=r"package for pretrained text models must .*torchcrest\[huggingface\]"):
            act()
    assert load(f"text:{file}", model="bag").classes == 3, "it needs no package"


# Tasks ----------------------------------------------------------------------------------------------------------


def test_a_file_and_the_one_beside_it(file: str, bert: str) -> None:
    task = load(f"text:{file}", model="bag")
    assert (len(task.train), len(task.test), task.classes, task.shape, task.notes) == (120, 30, 3, (), ())
    assert (task.model, task.epochs, task.learning_rate, task.batch_size) == ("bag", 10, 1e-3, 32)
    tuned = load(f"text:{file}", model=bert, max_length=9)
    assert (tuned.model, tuned.epochs, tuned.learning_rate, tuned.max_length) == (bert, 3, 1e-5, 9)
    assert (tuned.weight_decay, tuned.optimizer) == (0.01, "adamw")


@pytest.mark.parametrize("form", ["own", "own file", "parquet", "hub"])
def test_snli(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own format the labels are words, and in both some rows have none."""
    names = ["entailment", "neutral", "contradiction"]
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, rows in (("train", TRAIN), ("dev", TEST[:10]), ("test", TEST)):
        splits[split] = [dict(row) for row in rows]
        splits[split][3]["label"] = -1
    if form.startswith("own"):
        for split, rows in splits.items():
            own = [
                {
                    "annotator_labels": ["neutral"],
                    "gold_label": "-" if row["label"] < 0 else names[row["label"]],
                    "sentence1_parse": f"({row['premise']})",
                    "sentence1": row["premise"],
                    "sentence2": row["hypothesis"],
                }
                for row in rows
            ]
            write(tmp_path / f"snli_1.0_{split}.jsonl", own)
    elif form == "parquet":
        for split, rows in splits.items():
            write(tmp_path / "plain_text" / f"{split.replace('dev', 'validation')}-00000-of-00001.parquet", rows)
    else:
        held = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})
        monkeypatch.setattr(datasets, "load_dataset", lambda *args: {("stanfordnlp/snli", None): held}[args])
    data = None if form == "hub" else str(tmp_path / ("snli_1.0_train.jsonl" if form == "own file" else ""))
    task = load("snli", data=data, model="bag")
    assert (len(task.train), len(task.test), task.classes) == (119, 29, 3)
    assert task.notes == (
        "1 of 120 examples in train have no label and are left out.",
        "1 of 30 examples in test have no label and are left out.",
    )
    kept = [row["label"] for row in splits["train"] if row["label"] >= 0]
    order = sorted(range(3), key=lambda k: names[k]) if form.startswith("own") else [0, 1, 2]
    assert task.train.labels.tolist() == [order.index(label) for label in kept]
    assert (task.epochs, task.batch_size, task.max_length) == (10, 32, 128)


def test_snli_is_fine_tuned_as_in_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(name: str) -> None:
        asked.append(name)
        raise OSError("offline")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    for name, rows in (("train", TRAIN), ("test", TEST)):
        write(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(ConfigError, match=r"model must be bag, .* \(OSError: offline\), got 'FacebookAI/roberta-base'"):
        load("snli", data=str(tmp_path))
    assert asked == ["FacebookAI/roberta-base"]
    monkeypatch.undo()
    task = load("snli", data=str(tmp_path), model=save_model(tmp_path / "model"))
    assert (task.epochs, task.learning_rate, task.batch_size, task.optimizer) == (8, 1e-5, 32, "adamw")


def test_texts_of_a_local_folder_by_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "here" / "train.jsonl", TRAIN)
    task = load(f"hf:{tmp_path / 'here'}", model="bag")
    assert (len(task.train), len(task.test), task.classes) == (108, 12, 3)
    assert task.notes == ("There are no test examples: 12 of 120 in train are held out at random for that.",)


# Models ---------------------------------------------------------------------------------------------------------


def test_bag_is_means_of_word_vectors() -> None:
    model = build_text("bag", 12, 3, seed=0)
    assert isinstance(model, Bag)
    vectors = model.vectors.weight
    tokens, types = torch.tensor([[3, 4, 5, 0]]), torch.tensor([[0, 0, 1, 0]])
    first, second = (vectors[3] + vectors[4]) / 2, vectors[5]
    features = torch.cat([first, second, (first - second).abs(), first * second])
    want = model.head(torch.relu(model.body[0](features)))
    got = model(input_ids=tokens, attention_mask=(tokens > 0).long(), token_type_ids=types)
    torch.testing.assert_close(got[0], want)
    padded = torch.cat([tokens, torch.zeros(1, 5, dtype=torch.int64)], 1)
    again = model(padded, (padded > 0).long(), torch.cat([types, torch.zeros(1, 5, dtype=torch.int64)], 1))
    torch.testing.assert_close(again, got)
    alone = model(tokens, (tokens > 0).long())
    mean = (vectors[3] + vectors[4] + vectors[5]) / 3
    features = torch.cat([mean, torch.zeros_like(mean), mean.abs(), torch.zeros_like(mean)])
    torch.testing.assert_close(alone[0], model.head(torch.relu(model.body[0](features))))
    assert torch.isfinite(model(tokens[:, :0], tokens[:, :0])).all()


def test_the_seed_decides_what_is_not_pretrained(bert: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    states = []
    for name, seed in ((bert, 0), (bert, 0), (bert, 1), ("bag", 0), ("bag", 0), ("bag", 1)):
        model = build_text(name, 14, 3, seed)
        assert model.training
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    for first, again, other in (states[:3], states[3:]):
        assert same(first, again)
        assert not same(first, other)
    assert states[0]["classifier.weight"].shape == (3, 16)
    pretrained = transformers.BertModel.from_pretrained(bert).state_dict()
    for state in states[:3]:
        assert all(torch.equal(state[f"bert.{name}"], tensor) for name, tensor in pretrained.items())


# Runs -----------------------------------------------------------------------------------------------------------


def settings(file: str, model: str, **changes: Any) -> RunSettings:
    """15 batches an epoch, 60 steps in full, 12 in the budget."""
    values: dict[str, Any] = {"batch_size": 8, "epochs": 4, "budget": 0.2, "evaluations": 2, "learning_rate": 0.01}
    crest = replace(SMALL, batch_size=8, pool_size=24, exclude=False)
    return RunSettings(task=f"text:{file}", model=model, crest=crest, device="cpu", **(values | changes))


def final(folder: Path) -> dict[str, Tensor]:
    model: dict[str, Tensor] = RunFiles(folder).read_checkpoint()["model"]
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bag", "bert"])
def test_every_method_trains(
    tmp_path: Path, file: str, bert: str, method: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bert if kind == "bert" else "bag"
    budget = 0.5 if kind == "bag" else 0.2
    summary = train(settings(file, model, method=method, budget=budget), tmp_path)
    steps = {"full": 60}.get(method, round(60 * budget))
    assert (summary["steps"], summary["examples_trained"]) == (steps, 8 * steps)
    assert summary["accuracy"] > (0.5 if kind == "bag" else 0.1), "chance is 0.5, of the most frequent class"
    assert summary["examples_forwarded"] > 0 or method not in ("crest", "craig", "gradmatch", "glister")
    config = RunFiles(tmp_path).read_config()
    assert (config["optimizer"], config["weight_decay"], config["max_length"]) == ("adamw", 0.01, 128)
    assert capsys.readouterr().out == "", "a library call prints nothing"


def test_crest_measures_a_bag_in_place_of_a_large_model(tmp_path: Path, file: str, bert: str) -> None:
    base = settings(file, bert, proxy_model="bag")
    summary = train(replace(base, crest=replace(base.crest, proxy_source="model")), tmp_path)
    assert summary["regions"] >= 1


def stop_after(step: int) -> Callable[[], bool]:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= step

    return stop


@pytest.mark.parametrize("method", ["random", "crest", "infobatch"])
def test_dropout_goes_on_where_it_was(tmp_path: Path, file: str, bert: str, method: str) -> None:
    run = settings(file, bert, method=method)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train(run, tmp_path / "whole")
    assert torch.equal(torch.get_rng_state(), before), "the user's random state"
    for name in ("again", "stopped"):
        torch.rand(3)
        if name == "stopped":
            with pytest.raises(Interrupted):
                train(run, tmp_path / name, stop=stop_after(5))
            torch.rand(3)
        state = torch.get_rng_state()
        train(run, tmp_path / name, resume=True)
        assert torch.equal(torch.get_rng_state(), state)
        assert same(final(tmp_path / "whole"), final(tmp_path / name)), name


def test_without_its_random_states_a_checkpoint_is_refused(tmp_path: Path, file: str) -> None:
    run = settings(file, "bag", method="random")
    with pytest.raises(Interrupted):
        train(run, tmp_path, stop=stop_after(5))
    files = RunFiles(tmp_path)
    state = files.read_checkpoint()
    del state["random"]
    files.write_checkpoint(state)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt must fit this run, got .*random"):
        train(run, tmp_path, resume=True)


def test_a_comparison_loads_the_task_once_and_tells_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(write(tmp_path / "all.jsonl", TRAIN))
    loads: list[str] = []

    def counted(name: str, **kw: Any) -> Task:
        loads.append(name)
        return load(name, **kw)

    monkeypatch.setattr("torchcrest.train.run.load", counted)
    runs = plan(settings(file, "bag", epochs=1), ["random", "crest"], [0.2], [0, 1])
    said: list[str] = []
    compare(runs, tmp_path / "runs", equal_time=False, say=said.append)
    assert len(loads) == 1
    assert said == ["There are no test examples: 12 of 120 in train are held out at random for that."]
    train(runs[1], tmp_path / "alone", say=said.append)
    assert said == said[:1] * 2
    assert same(final(tmp_path / "alone"), final(tmp_path / "runs" / "crest-0.2-s0"))
