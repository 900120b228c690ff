"""The report: a page that stands alone, tables that agree with each other, commands that make the runs again."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import SMALL, Blobs
from torchcrest import CraigConfig, InfoBatchConfig, cli
from torchcrest.errors import ConfigError
from torchcrest.report import report, table
from torchcrest.report.canvas import LINE, MARKS, spread
from torchcrest.report.figures import checks, late, quality
from torchcrest.report.reproduce import compare_command, flat, train_command
from torchcrest.report.table import columns, rows_of
from torchcrest.train.collect import Finished, collect
from torchcrest.train.compare import cells, compare, plan, run_name
from torchcrest.train.files import RunFiles
from torchcrest.train.methods import METHODS
from torchcrest.train.run import prepare
from torchcrest.train.settings import RunSettings

HOSTILE = '<img src=x onerror=alert(1)> & "$(x)".npz'
VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """10 of 20 steps, of data with a name that means something to a page, and to a shell."""
    path = tmp_path_factory.mktemp("data") / HOSTILE
    blobs = Blobs(200)
    x, y = blobs.x.numpy(), blobs.y.numpy()
    with path.open("wb") as file:  # savez would add to the name
        np.savez(file, x_train=x[:160], y_train=y[:160], x_test=x[160:], y_test=y[160:])
    values: dict[str, Any] = {
        "batch_size": 16,
        "epochs": 2,
        "evaluations": 4,
        "crest": replace(SMALL, learned_interval=3),
    }
    return RunSettings(task=f"npz:{path}", **values)


@pytest.fixture(scope="module")
def runs(settings: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods at one budget, and random data at another, for equal time; two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    some = [*plan(settings, list(METHODS), [0.5], [0, 1]), *plan(settings, ["random"], [0.75], [0, 1])]
    compare(some, folder, equal_time=False)
    return folder


@pytest.fixture
def only(runs: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the runs whose names begin so."""

    def copy(*names: str) -> Path:
        for run in runs.iterdir():
            if run.name.startswith(names):
                shutil.copytree(run, tmp_path / "some" / run.name)
        return tmp_path / "some"

    return copy


class Page(HTMLParser):
    """A page's elements and visible text; refuses elements that don't close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path) -> tuple[str, Page]:
    text = report(folder, folder.parent / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def whole(runs: Path) -> tuple[str, Page]:
    """The page about all of them."""
    return page_of(runs)


# The page --------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert "http" not in text
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.tags}
    attributes = [(name, value or "") for _, each in page.tags for name, value in each.items()]
    assert all(value.startswith("#") for name, value in attributes if name in ("href", "src"))
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = {a or b for _, value in attributes for a, b in re.findall(r"^#(\S+)|url\(#(\S+)\)", value)}
    assert {"caveats"} < referred <= set(ids)
    assert len(text) < 1_000_000


def test_a_hostile_name_is_text(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert HOSTILE in page.text
    assert "<img" not in text
    assert f"{HOSTILE}, mlp, 2 seeds" in page.text


def test_figures_have_a_name_and_words_for_who_does_not_see_them(runs: Path, whole: tuple[str, Page]) -> None:
    _, page = whole
    figures = page.all("svg")
    assert len(figures) == len(page.all("figure")) == 1 + 3 + 4
    said = [figure["aria-label"] or "" for figure in figures]
    assert len(set(said)) == len(said)
    (cell,) = (cell for cell in cells([run.summary for run in collect(runs).runs]) if cell.method == "crest")
    assert any(f"crest {100 * cell.accuracy:.2f} %" in words for words in said)
    assert all(figure["role"] == "img" for figure in figures)


def test_all_colours_are_the_page_s_in_light_and_in_dark(whole: tuple[str, Page]) -> None:
    text, _ = whole
    style, body = text.split("</style>")
    light, dark = (set(re.findall(r"(--[\w-]+): #", each)) for each in style.split("prefers-color-scheme: dark"))
    assert light == dark
    assert set(re.findall(r"var\((--[\w-]+)\)", body)) <= light
    assert not re.findall(r"#[0-9a-f]{6}\b|rgb\(", body)
    assert {f"--m-{method}" for method in METHODS} <= light
    assert len({MARKS[method] for method in METHODS}) == len(METHODS)


def test_the_verdict_comes_first_and_crest_s_before_the_others(whole: tuple[str, Page]) -> None:
    _, page = whole
    order = ["crest 0.5 ", "infobatch 0.5 ", "full is the reference", "In numbers", "Accuracy over training"]
    order += ["What selection does", "Time to accuracy", "Settings", "torchcrest compare", "Read this with care"]
    body = page.text.split("takes.", 1)[1]
    places = [body.index(words) for words in order[:-1]] + [body.rindex(order[-1])]
    assert places == sorted(places)


def test_the_same_runs_give_the_same_bytes(runs: Path, whole: tuple[str, Page], tmp_path: Path) -> None:
    from matplotlib import rc_context

    elsewhere = shutil.copytree(runs, tmp_path / "elsewhere")
    with rc_context({"font.size": 30, "lines.linewidth": 9, "axes.grid": False}):
        assert report(elsewhere, tmp_path / "new" / "second.html").read_text(encoding="utf-8") == whole[0]


def test_random_data_for_equal_time_is_told_apart(runs: Path, whole: tuple[str, Page]) -> None:
    rows = rows_of(collect(runs))
    assert [row.label for row in rows if row.extra] == ["random 0.75"]
    _, page = whole
    assert "meet the others at equal time (1)" in page.text
    assert "| random 0.75 (for equal time) |" in table(runs, "md")
    assert "--budget 0.5 --seeds 0 1" in page.text


@pytest.mark.parametrize(
    ("kept", "figures", "said", "unsaid"),
    [
        (("crest-0.5-s0",), 3 + 4, ["has no random data", "add full to", "1 seed", "One seed shows no spread"], "±"),
        (("full", "random-0.5"), 3 + 1, ["CREST itself was not run", "full is the reference"], "add full"),
        (("crest", "truncated"), 3 + 4, ["has no random data", "add full to"], "Short of full"),
        (("crest", "random-0.5"), 1 + 3 + 4, ["add full to --methods"], "Short of full"),
        (("craig", "infobatch-0.5-s1"), 3 + 2, ["CREST itself was not run"], "To random"),
        (("full",), 3 + 1, ["full is the reference"], "To random"),
    ],
    ids=["one run", "no crest", "no random", "no full", "neither", "full alone"],
)
def test_what_was_not_run_is_left_out_and_said(
    only: Callable[..., Path], kept: tuple[str, ...], figures: int, said: list[str], unsaid: str
) -> None:
    text, page = page_of(only(*kept))
    assert len(page.all("svg")) == figures
    for words in said:
        assert words in page.text
    table_of_figures = text[text.index("In numbers") : text.index("Accuracy over training")]
    assert unsaid not in table_of_figures.split("Means over seeds")[0]


def test_what_new_runs_measure_is_shown_where_it_is_there(only: Callable[..., Path]) -> None:
    folder = only("crest", "random-0.5")
    assert "codecarbon" not in page_of(folder)[1].text
    for name in ("crest-0.5-s0", "crest-0.5-s1"):
        files = RunFiles(folder / name)
        energy = {"training": 0.002, "selecting": 0.001, "checking": 0.0005}
        files.write_summary({**files.read_summary(), "energy_kwh": energy, "processes": 3})
    text, page = page_of(folder)
    assert "<td>2</td><td>1.5</td><td>3.5</td>" in text
    assert "codecarbon" in page.text
    assert "1 and 3 at a time" in page.text


def test_the_page_says_whose_learning_rate_is_whose(only: Callable[..., Path]) -> None:
    folder = only("crest-0.5-s0", "random-0.5-s0")
    files = RunFiles(folder / "crest-0.5-s0")
    config = files.read_config()
    text = page_of(folder)[1].text
    assert f"this comparison used one, {config['learning_rate']:g}, for all" in text
    assert "--rates" not in text
    files.write_config({**config, "learning_rate": 0.3})
    text = page_of(folder)[1].text
    assert "this comparison used the ones below" in text
    assert "--rates crest=0.3" in text
    assert re.search(rf"random\s+learning_rate\s*{config['learning_rate']}\b", text)
    assert re.search(r"crest\s[\w\s.]*learning_rate\s*0\.3\b", text)


@pytest.mark.parametrize("rhos", [[], [0.0, math.inf, math.nan, 0.5], [k % 7 / 70 for k in range(5000)]])
def test_any_number_of_checks_can_be_drawn(runs: Path, rhos: list[float]) -> None:
    (run, *_) = (run for run in collect(runs).runs if run.summary["method"] == "crest")
    region = next(event for event in run.events if event["event"] == "region")
    found: list[dict[str, Any]] = [
        {"event": "check", "step": k, "rho": x, "passed": x < 0.02} for k, x in enumerate(rhos)
    ]
    picture = checks(replace(run, events=[region, *found], summary={**run.summary, "steps": 5000}), "crest")
    assert picture is not None
    finite = [x for x in rhos if math.isfinite(x)]
    assert f"{sum(x < 0.02 for x in finite)} of {len(finite)} checks passed; regions: 1" in picture.caption
    marks = picture.svg.count("<use")
    assert min(len(finite), 300) <= marks <= 500
    assert ("One mark stands for" in picture.caption) == (len(rhos) > 400)


def test_a_run_without_checks_has_no_picture_of_them(only: Callable[..., Path]) -> None:
    folder = only("crest-0.5-s0")
    files = RunFiles(folder / "crest-0.5-s0")
    config = files.read_config()
    assert "checks passed" in page_of(folder)[1].text
    files.write_config({**config, "crest": {**config["crest"], "check": "none"}})
    assert "checks passed" not in page_of(folder)[1].text


def told(step: int, **values: Any) -> dict[str, Any]:
    """Make an event of a gradient of norm 0.3, of batches of 16 out of 48."""
    event = {"event": "quality", "step": step, "gradient_norm": 0.3, "bias": 0.05, "deviation": 0.3, "bounded": True}
    sizes = {"random_deviation": 0.4, "pool_deviation": 0.4 / 3**0.5, "effective_batch_size": 28.4}
    return {**event, **sizes, "cost": 1.5, "pay_off": 1.2, **values}


def test_the_quality_of_gradients_is_drawn(runs: Path) -> None:
    (run, *_) = (run for run in collect(runs).runs if run.summary["method"] == "crest")
    shown = [event for event in run.events if event["event"] == "quality"]
    assert shown
    assert run.summary["effective_batch_size"] > 0
    assert (picture := quality(run, "crest")) is not None
    assert f"has the noise of {run.summary['effective_batch_size']:.0f} random examples" in picture.caption

    def drawn(*found: dict[str, Any], **summary: Any) -> Any:
        return quality(replace(run, events=list(found), summary={**run.summary, "steps": 100, **summary}), "crest")

    some = [told(1), told(50, bias=0.2, bounded=False), told(90, bias=0.4, bounded=False), told(99)]
    picture = drawn(*some, effective_batch_size=28.4, pay_off=1.2)
    assert picture is not None
    assert "50 % of the time, and above the norm, where nothing is guaranteed, 25 %." in picture.caption
    assert "noise of 28 random examples. That is 1.20 times" in picture.caption
    assert "more than random batches" in picture.caption
    assert "not early on" in picture.caption
    assert "coreset 0.75; its bias 0.44; gradient / 3 0.25" in picture.svg
    assert all(words in picture.svg for words in (">random 16<", ">random 48<", ">coreset<", ">its bias<"))
    fewer = drawn(told(1), effective_batch_size=28.4, pay_off=0.0)
    assert fewer is not None
    assert "100 % of the time." in fewer.caption
    assert "times" not in fewer.caption
    assert drawn() is None
    assert drawn(told(1, random_deviation=0.0)) is None


def test_targets_are_told(runs: Path, tmp_path: Path) -> None:
    text = report(runs, tmp_path / "page.html", targets=[0.4, 0.999]).read_text(encoding="utf-8")
    assert "40.0 %</th>" in text
    assert "99.9 %</th>" in text


@pytest.mark.parametrize("target", [0.0, -0.1, 1.5, 95.0, math.nan])
def test_targets_out_of_range_are_refused(runs: Path, tmp_path: Path, target: float) -> None:
    with pytest.raises(ConfigError, match=r"targets must be in \(0, 1\]"):
        report(runs, tmp_path / "page.html", targets=[0.9, target])


def test_a_page_without_a_place_is_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(ConfigError, match="out must be a file in a folder"):
            report(runs, out)


def test_without_matplotlib_there_is_the_table(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"matplotlib must be installed.*torchcrest\[plot\].*--format md"):
        report(runs, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    assert table(runs, "md").startswith("| Method |")


# The figures' arithmetic -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_names_keep_their_order_and_do_not_touch(wanted: list[float]) -> None:
    gap = LINE / 214
    places = spread(wanted, gap, 0.0, 1.02)
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    steps = np.diff([places[k] for k in order])
    assert (steps >= gap - 1e-9).all()
    assert min(places) >= -1e-9
    assert max(places) <= 1.02 + 1e-9
    if all(b - a >= gap for a, b in zip(sorted(wanted), sorted(wanted)[1:], strict=False)):
        assert places == pytest.approx(wanted)


def test_a_method_that_failed_does_not_press_the_others_together() -> None:
    good = [("full", 98.7), ("random", 97.4), ("crest", 97.6), ("glister", 95.2)]
    bottom, top = late([*good, ("craig", 9.7)])
    assert 90 < bottom < 95.2
    assert 98.7 < top <= 100
    assert late(good) == (bottom, top)


def test_limits_of_a_single_line_leave_room() -> None:
    assert late([("glister", 10.0)]) == pytest.approx((9.2, 10.15))


# Tables ----------------------------------------------------------------------------------------------------------


def test_json_and_csv_hold_the_cells_in_full(runs: Path) -> None:
    expected = cells([run.summary for run in collect(runs).runs])
    rows = json.loads(table(runs, "json"))
    assert [{name: row[name] for name in asdict(cell)} for row, cell in zip(rows, expected, strict=True)] == [
        asdict(cell) for cell in expected
    ]
    crest = next(row for row in rows if row["method"] == "crest")
    assert crest["verdict"].startswith("crest 0.5")
    accuracies = {name: RunFiles(runs / name).read_summary()["accuracy"] for name in (p.name for p in runs.iterdir())}
    paired = [accuracies[f"crest-0.5-s{seed}"] - accuracies[f"random-0.5-s{seed}"] for seed in (0, 1)]
    assert crest["equal_steps_mean"] == pytest.approx(sum(paired) / 2)
    assert (crest["equal_steps_n"], crest["extra"]) == (2, False)
    as_text = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert list(csv.DictReader(table(runs, "csv").splitlines())) == as_text


def test_markdown_is_what_the_page_shows(runs: Path) -> None:
    collected = collect(runs)
    shown = columns(rows_of(collected))
    head, rule, *lines = [line.strip("|\n").split("|") for line in table(runs, "md").splitlines()]
    assert [heading.strip() for heading in head] == [column.heading for column in shown]
    assert {len(line) for line in (head, rule, *lines)} == {len(shown)}
    for k, (line, cell) in enumerate(zip(lines, cells([run.summary for run in collected.runs]), strict=True)):
        assert [entry.strip() for entry in line] == [str(column.entries[k]) for column in shown]
        assert line[1].strip() == f"{100 * cell.accuracy:.2f} ± {100 * cell.accuracy_sd:.2f}"


def test_unknown_formats_are_refused(runs: Path) -> None:
    with pytest.raises(ConfigError, match="format must be one of md, csv, json, got 'xls'"):
        table(runs, "xls")


# Commands --------------------------------------------------------------------------------------------------------


def test_commands_make_the_runs_again(runs: Path) -> None:
    for run in collect(runs).runs:
        program, *arguments = shlex.split(train_command(run, "again/x"))
        args = cli._parse(arguments).train
        again = cli._settings(args, method=args.method, budget=args.budget, seed=args.seed)
        assert prepare(again)[1].to_dict() == run.config
        assert (program, str(args.out)) == ("torchcrest", "again/x")


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "crest", "crest": replace(SMALL, curvature_coresets=None, learned_interval=1.0, exclude=False)},
        {"method": "crest", "crest": replace(SMALL, weight_power=1, tolerance=1e-07, proxy="last_layer")},
        {"method": "infobatch", "infobatch": InfoBatchConfig(anneal=1, prune=1 / 3)},
        {"method": "craig", "craig": CraigConfig(reselect=5, stratify=False), "num_workers": 1},
        {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.0, "learning_rate": 1e-05, "augment": False},
    ],
    ids=["crest, other kinds", "crest, small numbers", "infobatch", "craig", "adamw"],
)
def test_commands_say_all_settings(settings: RunSettings, changes: dict[str, Any]) -> None:
    config = prepare(replace(settings, **changes))[1].to_dict()
    run = Finished("x", Path("x"), config, {}, [], [])
    args = cli._parse(shlex.split(train_command(run, "x"))[1:]).train
    again = cli._settings(args, method=args.method, budget=args.budget, seed=args.seed)
    assert prepare(again)[1].to_dict() == config
    for name, value in dict(flat(config)).items():
        if name.rpartition(".")[2] in ("learned_interval", "anneal", "reselect"):  # 1 is a step, 1.0 the whole run
            assert type(dict(flat(prepare(again)[1].to_dict()))[name]) is type(value)


@pytest.mark.parametrize("rates", [{}, {"crest": 0.3, "glister": 1e-05}, {"full": 2.0}], ids=str)
def test_the_command_of_all_plans_all_runs(runs: Path, rates: dict[str, float]) -> None:
    found = [run for run in collect(runs).runs if run.config["budget"] != 0.75]
    usual = found[0].config["learning_rate"]
    own = [{**run.config, "learning_rate": rates.get(run.config["method"], usual)} for run in found]
    found = [replace(run, config=config) for run, config in zip(found, own, strict=True)]
    command = compare_command(found, "again")
    assert ("--rates" in command) == bool(rates)
    args = cli._parse(shlex.split(command)[1:]).compare
    planned = plan(cli._settings(args), args.methods, args.budget, args.seeds, cli._rates(args.rates))
    assert {run_name(run): prepare(run)[1].to_dict() for run in planned} == {run.name: run.config for run in found}
