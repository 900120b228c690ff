"""What a run writes down of its examples, and what is made of it: words, tables, a sheet, figures."""

from __future__ import annotations

import base64
import csv
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import SMALL, Blobs
from test_report import Page
from torchcrest import cli
from torchcrest.errors import ConfigError, DataError
from torchcrest.report import explain, export, report, story, suspect_sheet
from torchcrest.train.files import RunFiles
from torchcrest.train.run import Interrupted, train
from torchcrest.train.scores import SIDE, read_log, read_scores, shown_of
from torchcrest.train.settings import RunSettings
from torchcrest.train.tasks import Examples, Task, load
from torchcrest.train.texts import Texts

PLANTED = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray[Any, Any]]:
    """600 images of three kinds of bars, 30 of them with the next kind's label; and which."""
    generator = np.random.default_rng(0)
    y = generator.integers(3, size=700)
    bars = np.zeros((3, 8, 8))
    bars[0, 3:5], bars[1, :, 3:5], bars[2] = 1, 1, np.eye(8)
    x = (60 * bars[y] + generator.integers(0, 160, (700, 8, 8))).astype(np.uint8)
    planted = generator.choice(600, PLANTED, replace=False)
    y[planted] = (y[planted] + 1) % 3
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    np.savez(path, x_train=x[:600], y_train=y[:600], x_test=x[600:], y_test=y[600:])
    return f"npz:{path}", planted


def settings(task: str, **changes: Any) -> RunSettings:
    """150 steps, four passes over the data."""
    values: dict[str, Any] = {"model": "mlp", "batch_size": 16, "epochs": 4, "budget": 1.0, "evaluations": 3}
    values |= {"learning_rate": 0.05, "difficulty": True, "picks": True, "device": "cpu"}
    values |= {"crest": replace(SMALL, learned_interval=40, learned_loss=0.01, tolerance=0.2)}
    return RunSettings(task=task, **(values | changes))


@pytest.fixture(scope="module")
def runs(data: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for method in ("crest", "random"):
        train(settings(data[0], method=method), folder / method)
    return folder


@pytest.fixture
def crest(runs: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(runs / "crest", tmp_path / "crest")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on short texts."""
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 90), ("test", 12)):
        lines = [f'{{"text": "{("good", "bad")[k % 2]} film number {k}", "label": {k % 2}}}' for k in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    train(settings(f"text:{folder / 'train.jsonl'}", model="bag", epochs=1), folder / "run")
    return folder / "run"


def said(lines: list[str]) -> str:
    return "\n".join(lines)


# What a run writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["crest", "random"])
def test_the_scores_are_what_the_log_adds_up_to(runs: Path, method: str) -> None:
    scores, log = read_scores(runs / method), read_log(runs / method)
    assert scores is not None
    assert log is not None
    seen: dict[int, list[tuple[bool, float]]] = defaultdict(list)
    for index, learned, loss in zip(log["seen_index"], log["seen_learned"], log["seen_loss"], strict=True):
        seen[int(index)].append((bool(learned), float(loss)))
    for i in range(600):
        rights = [right for right, _ in seen[i]]
        assert scores["forgotten"][i] == sum(a and not b for a, b in pairwise(rights))
        assert scores["seen"][i] == len(rights)
        if rights:
            assert (scores["learned"][i], scores["loss"][i]) == (rights[-1], seen[i][-1][1])
    trained = np.bincount(log["trained_index"], minlength=600)
    assert (scores["trained"] == trained).all()
    assert trained.sum() == 150 * 16
    assert scores["weight"] == pytest.approx(np.bincount(log["trained_index"], log["trained_weight"], 600), rel=1e-5)
    tenths = (log["trained_step"] - 1) * 10 // 150
    for part in range(10):
        assert (scores.parts[part] == np.bincount(log["trained_index"][tenths == part], minlength=600)).all()
    if method == "crest":
        assert (scores["pooled"] == np.bincount(log["pooled_index"], minlength=600)).all()
        picked = log["pooled_weight"] > 0
        assert (scores["picked"] == np.bincount(log["pooled_index"][picked], minlength=600)).all()
        assert 0 < (scores["excluded"] >= 0).sum() < 600
    else:
        assert "pooled_index" not in log
        assert scores["picked"].sum() == 0


def test_metrics_tell_how_hard_what_is_trained_on_is(runs: Path) -> None:
    lines = [line for line in RunFiles(runs / "crest").read_metrics() if line["event"] == "difficulty"]
    assert [line["step"] for line in lines] == [50, 100, 150]
    last = lines[-1]
    assert 0 < last["trained_difficulty"] < 3
    assert last["excluded"] == sum(
        e["excluded"] for e in RunFiles(runs / "crest").read_metrics() if e["event"] == "exclude"
    )
    assert last["excluded_accuracy"] > 0.9
    others = [line for line in RunFiles(runs / "random").read_metrics() if line["event"] == "difficulty"]
    assert {(line["excluded"], line["excluded_accuracy"]) for line in others} == {(0, None)}


def test_excluded_accuracy_is_that_of_the_model(runs: Path) -> None:
    """Fewer than 1,000 are set aside, so all of them are measured."""
    config, scores = RunFiles(runs / "crest").read_config(), read_scores(runs / "crest")
    assert scores is not None
    task = load(config["task"])
    model = task.build("mlp", 0)
    model.load_state_dict(RunFiles(runs / "crest").read_checkpoint()["model"])
    rows = np.flatnonzero(scores["excluded"] >= 0).tolist()
    x, y = task.train.__getitems__(rows)
    right = (model.eval()(x).argmax(1) == y).float().mean()
    lines = [line for line in RunFiles(runs / "crest").read_metrics() if line["event"] == "difficulty"]
    assert lines[-1]["excluded_accuracy"] == pytest.approx(float(right))


def test_planted_labels_are_found(runs: Path, data: tuple[str, np.ndarray[Any, Any]]) -> None:
    for method in ("crest", "random"):
        scores = read_scores(runs / method)
        assert scores is not None
        assert np.isin(scores.suspects(20), data[1]).mean() > 0.7


@pytest.mark.parametrize("method", ["crest", "random"])
def test_a_resumed_run_writes_the_same(data: tuple[str, Any], runs: Path, tmp_path: Path, method: str) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked in (37, 90)

    again = settings(data[0], method=method)
    for _ in range(2):
        with pytest.raises(Interrupted):
            train(again, tmp_path / "run", stop=stop, resume=True)
    train(again, tmp_path / "run", resume=True)
    for name in ("examples.npz", "picks.npz"):
        assert (tmp_path / "run" / name).read_bytes() == (runs / method / name).read_bytes()
    first, second = (
        [line for line in RunFiles(folder).read_metrics() if line["event"] == "difficulty"]
        for folder in (tmp_path / "run", runs / method)
    )
    assert first == second


def test_a_run_is_the_same_without(data: tuple[str, Any], runs: Path, tmp_path: Path) -> None:
    train(settings(data[0], difficulty=False, picks=False), tmp_path / "plain")
    models = [RunFiles(folder).read_checkpoint()["model"] for folder in (tmp_path / "plain", runs / "crest")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    assert not files & {"examples.npz", "picks.npz"}


def test_a_log_without_the_record_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"picks must be left out without difficulty, got True"):
        RunSettings(task="digits", picks=True)


@pytest.mark.parametrize("name", ["examples.npz", "picks.npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive"])
def test_damaged_files_are_named(crest: Path, name: str, content: bytes) -> None:
    (crest / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} must hold a run's .*It is damaged"):
        story(crest, 0)


def test_a_file_that_lacks_something_is_damaged(crest: Path) -> None:
    np.savez(crest / "examples.npz", parts=np.zeros((10, 600)))
    with pytest.raises(
        DataError, match=r"examples.npz must hold a run's scores of its examples, got 'no ever_learned'"
    ):
        explain(crest)


# In words --------------------------------------------------------------------------------------------------------


def test_the_summary_counts(runs: Path, data: tuple[str, np.ndarray[Any, Any]]) -> None:
    scores = read_scores(runs / "crest")
    assert scores is not None
    text = said(explain(runs / "crest", 5))
    gone = (scores["excluded"] >= 0).mean()
    assert f"Set aside as learned: {100 * gone:.1f} %" in text
    assert f"forgotten at least once: {100 * (scores['forgotten'] > 0).mean():.1f} %" in text
    lists = [part.splitlines() for part in text.split("\n\n")[1:]]
    assert [part[0].split(":")[0] for part in lists] == ["Most selected", "Least selected", "Suspected label errors"]
    rows = [[int(line.split()[0]) for line in part[1:]] for part in lists]
    assert all(len(part) == 5 for part in rows)
    picked = scores["picked"].astype(int)
    assert sorted(picked[rows[0]], reverse=True) == sorted(picked, reverse=True)[:5]
    assert sorted(picked[rows[1]]) == sorted(picked[scores["seen"] > 0])[:5]
    assert rows[2] == scores.suspects(5).tolist()


def test_random_data_is_selected_by_how_often_it_is_trained_on(runs: Path) -> None:
    text = said(explain(runs / "random"))
    assert "picked" not in text.split("Most selected")[1]
    assert "Set aside" not in text


def test_a_story_is_the_log_of_an_example(runs: Path) -> None:
    scores, log = read_scores(runs / "crest"), read_log(runs / "crest")
    assert scores is not None
    assert log is not None
    example = int(np.flatnonzero((scores["excluded"] >= 0) & (scores["picked"] > 0))[0])
    lines = story(runs / "crest", example)[1:]
    steps = [int(line.split()[1]) for line in lines]
    assert steps == sorted(steps)
    words = [line.split(maxsplit=2)[2] for line in lines]
    assert sum(each.startswith("seen with loss") for each in words) == scores["seen"][example]
    assert sum(each.startswith("in a pool") for each in words) == scores["pooled"][example]
    assert sum("picked with weight" in each for each in words) == scores["picked"][example]
    assert sum(each.startswith("trained on with weight") for each in words) == scores["trained"][example]
    at = np.flatnonzero((log["pooled_index"] == example) & (log["pooled_weight"] > 0))[0]
    assert f"step {log['pooled_step'][at]:>6}  in a pool, picked with weight {log['pooled_weight'][at]:.3g}" in said(
        lines
    )
    gone = f"step {scores['excluded'][example]:>6}  set aside: each loss measured in the 40 steps before was below 0.01"
    assert gone in said(lines)


@pytest.mark.parametrize("example", [-1, 600])
def test_there_is_no_such_example(runs: Path, example: int) -> None:
    with pytest.raises(ConfigError, match=f"example must be from 0 to 599, got {example}"):
        story(runs / "crest", example)


def test_what_was_not_kept_cannot_be_told(crest: Path, runs: Path) -> None:
    (crest / "picks.npz").unlink()
    with pytest.raises(ConfigError, match=r"must hold picks.npz, .*--difficulty true --picks true"):
        story(crest, 0)
    assert explain(crest)
    (crest / "examples.npz").unlink()
    with pytest.raises(ConfigError, match=r"must hold examples.npz, .*--difficulty true"):
        explain(crest)
    with pytest.raises(ConfigError, match=r"must be the folder of one run, got '2 runs'. Name one of them: .*random, "):
        explain(runs)


def test_runs_that_cannot_be_compared_are_named_too(runs: Path, crest: Path) -> None:
    shutil.copytree(runs / "random", crest.parent / "random")
    config = RunFiles(crest).read_config()
    RunFiles(crest).write_config(config | {"batch_size": 99})
    with pytest.raises(ConfigError, match=f"got '2 runs'. Name one of them: {crest.parent / 'random'}, {crest}\\.$"):
        explain(crest.parent)


def test_a_run_is_told_whatever_else_its_folder_holds(runs: Path, crest: Path) -> None:
    expected = said([*explain(crest), *story(crest, 7)])
    shutil.copytree(runs / "crest", crest / "again")
    assert said([*explain(crest), *story(crest, 7)]) == expected


def test_a_folder_of_a_single_run_tells_it(crest: Path) -> None:
    assert explain(crest.parent) == explain(crest)
    assert story(crest.parent, 7) == story(crest, 7)


def test_learned_examples_are_not_said_to_be_never_learned(runs: Path) -> None:
    scores = read_scores(runs / "crest")
    assert scores is not None
    never = int((~scores["ever_learned"] & (scores["seen"] > 0)).sum())
    part = explain(runs / "crest", never + 5)
    title = next(line for line in part if line.startswith("Suspected"))
    assert title == "Suspected label errors: those never learned first, then by mean loss:"
    suspects = part[part.index(title) + 1 :]
    assert ["never learned" in line for line in suspects] == [True] * never + [False] * 5


def test_texts_are_shown(texts: Path) -> None:
    text = said(explain(texts))
    assert re.search(r"label +0 .*'good film number \d+'", text)
    assert re.search(r"label +1 .*'bad film number \d+'", text)


def test_a_text_of_tokens_alone_is_their_numbers() -> None:
    pair = Texts([[5, 6, 7]], [0], types=[[0, 0, 1]], vocabulary=9)
    assert pair.text(0) == "5 6 / 7"
    assert Texts([[]], [0], vocabulary=9).text(0) == ""


# As a table ------------------------------------------------------------------------------------------------------


def test_csv_and_parquet_hold_the_same(runs: Path, tmp_path: Path) -> None:
    scores = read_scores(runs / "crest")
    assert scores is not None
    for name in ("scores.csv", "scores.parquet"):
        export(runs / "crest", tmp_path / "new" / name)
    with (tmp_path / "new" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = import_module("pyarrow.parquet").read_table(tmp_path / "new" / "scores.parquet").to_pydict()
    assert list(rows[0]) == list(columns)
    assert [int(row["example"]) for row in rows] == list(range(600)) == columns["example"]
    for name in ("label", "picked", "trained", "forgotten", "excluded"):
        assert [int(row[name]) for row in rows] == scores[name].tolist() == columns[name]
    ranked = sorted((rank, row) for row, rank in enumerate(columns["suspect_rank"]) if rank)
    assert [row for _, row in ranked] == scores.suspects(600).tolist()


def test_tables_that_cannot_be_written(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"export must end in .csv or .parquet"):
        export(runs / "crest", tmp_path / "scores.xls")
    with pytest.raises(ConfigError, match="export must be a file in a folder"):
        export(runs / "crest", tmp_path / "file" / "scores.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"the package for Parquet must be installed.*torchcrest\[huggingface\]"):
        export(runs / "crest", tmp_path / "scores.parquet")


# As pictures -----------------------------------------------------------------------------------------------------


def test_the_sheet_of_suspects(runs: Path, tmp_path: Path) -> None:
    suspect_sheet(runs / "crest", tmp_path / "sheet.png", 23)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_sheets_that_cannot_be_drawn(
    runs: Path, texts: Path, data: tuple[str, Any], crest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"suspects must be images, got 'texts'"):
        suspect_sheet(texts, tmp_path / "sheet.png", 5)
    with pytest.raises(ConfigError, match=r"suspects must be a picture, like suspects.png"):
        suspect_sheet(runs / "crest", tmp_path / "sheet.mp3", 5)
    with pytest.raises(ConfigError, match="suspects must be a file in a folder"):
        suspect_sheet(runs / "crest", tmp_path, 5)
    config = RunFiles(crest).read_config()
    with np.load(data[0].removeprefix("npz:")) as file:
        np.savez(tmp_path / "less.npz", **{name: file[name][:50] for name in file.files})
    RunFiles(crest).write_config({**config, "task": f"npz:{tmp_path / 'less.npz'}"})
    with pytest.raises(DataError, match="must hold the 600 training examples of the run, got 50"):
        suspect_sheet(crest, tmp_path / "sheet.png", 5)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"matplotlib must be installed.*torchcrest\[plot\]"):
        suspect_sheet(runs / "crest", tmp_path / "sheet.png", 5)


def test_pictures_for_a_page_are_small_and_in_uint8() -> None:
    def shown(inputs: torch.Tensor) -> dict[str, Any]:
        train = Examples(inputs, torch.zeros(len(inputs), dtype=torch.int64), mean=0.0, std=1.0)
        return shown_of(Task("x", train, train, tuple(inputs.shape[1:]), 1, "mlp", 1, 0.1), np.array([1]))

    grey = torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8)
    assert (shown(grey)["pictures"] == grey[1].numpy()).all()
    colour = torch.stack([torch.zeros(3, 2, 2), torch.linspace(-1, 2, 12).reshape(3, 2, 2)])
    (picture,) = shown(colour)["pictures"]
    assert picture.shape == (2, 2, 3)
    assert (picture.min(), picture.max()) == (0, 255)
    assert shown(torch.rand(2, 1, 300, 150))["pictures"].shape == (1, SIDE, SIDE // 2)
    assert shown(torch.rand(2, 5)) == {}


def test_the_page_shows_difficulty_and_the_examples(runs: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    text = report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert report(shutil.copytree(runs, tmp_path / "again"), tmp_path / "2.html").read_text(encoding="utf-8") == text
    page = Page(text)
    titles = ["Difficulty of what is trained on", "Selections of crest 1", "Set aside by crest 1"]
    assert [title for title in titles if title in page.text] == titles
    assert "the same count for all" in page.text
    for title in ("Most selected by crest 1", "Least selected by crest 1", "Suspected label errors, by crest 1"):
        assert title in page.text
    pictures = page.all("img")
    assert len(pictures) == 36
    scores = read_scores(runs / "crest")
    assert scores is not None
    for row, shown in zip(scores.suspects(12).tolist(), pictures[24:], strict=True):
        (tmp_path / "one.png").write_bytes(
            base64.b64decode((shown["src"] or "").removeprefix("data:image/png;base64,"))
        )
        (at,) = np.flatnonzero(scores.shown == row)
        assert (np.round(255 * imread(tmp_path / "one.png")) == scores.pictures[at]).all()  # type: ignore[index]
        assert (shown["alt"] or "").startswith(f"No. {row}, label {scores['label'][row]}, ")
    body = text.split("</style>")[1]
    assert not re.findall(r"#[0-9a-f]{6}\b|rgb\(", re.sub(r'src="[^"]*"', "", body))


def test_the_mean_of_what_was_trained_on_by_hand(runs: Path, tmp_path: Path) -> None:
    text = report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    reference = read_scores(runs / "random")
    assert reference is not None
    for method in ("crest", "random"):
        log = read_log(runs / method)
        assert log is not None
        tenths = (log["trained_step"] - 1) * 10 // 150
        first, last = (reference["forgotten"][log["trained_index"][tenths == part]].mean() for part in (0, 9))
        assert (
            f"{method} 1 from {first:.2f} to {last:.2f}" in text or f"{method} from {first:.2f} to {last:.2f}" in text
        )


def test_texts_are_in_the_page_and_vectors_are_not(texts: Path, tmp_path: Path) -> None:
    page = Page(report(texts, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not page.all("img")
    assert re.search(r"good film number \d+No\. \d+, label 0, \d+ ×", page.text)
    assert "as each run counted them itself" in page.text
    blobs = Blobs(200)
    x, y = blobs.x.numpy(), blobs.y.numpy()
    np.savez(tmp_path / "blobs.npz", x_train=x[:160], y_train=y[:160], x_test=x[160:], y_test=y[160:])
    train(settings(f"npz:{tmp_path / 'blobs.npz'}", picks=False, epochs=1), tmp_path / "run")
    page = Page(report(tmp_path / "run", tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Difficulty of what is trained on" in page.text
    assert "Most selected" not in page.text


# The command -----------------------------------------------------------------------------------------------------


def test_the_command(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: str) -> tuple[int, str, str]:
        status = cli.main(["explain", str(runs / "crest"), *words])
        return status, *capsys.readouterr()

    assert command("--top", "3")[:2] == (0, said(explain(runs / "crest", 3)) + "\n")
    assert command("--example", "7")[1] == said(story(runs / "crest", 7)) + "\n"
    status, out, _ = command(f"--export={tmp_path / 's.csv'}", f"--suspects={tmp_path / 's.png'}")
    assert status == 0
    assert f"Scores: {tmp_path / 's.csv'}" in out
    assert f"Suspected label errors: {tmp_path / 's.png'}" in out
    assert {path.name for path in tmp_path.iterdir()} == {"s.csv", "s.png"}
    assert command("--top", "0")[::2] == (2, "error: top must be at least 1, got 0. Use for example 10.\n")
    assert command("--example", "x")[0] == 2
    assert command("--export=scores.xls")[:2] == (2, ""), "refused before anything is told"


def test_the_command_records(data: tuple[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model=mlp", "--batch_size=16", "--epochs=1", "--budget=0.2", "--crest.pool_size=32"]
    assert cli.main(["train", data[0], *words, "--difficulty=true", f"--out={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run" / "examples.npz").exists()
    assert not (tmp_path / "run" / "picks.npz").exists()
    assert "difficulty" not in RunFiles(tmp_path / "run").read_config()["crest"], "the run's own says it"
    assert cli.main(["train", data[0], "--crest.difficulty=true", f"--out={tmp_path / 'other'}"]) == 2
    assert "flag must be a known one" in capsys.readouterr().err
