"""The code in the README and on the documentation's pages runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from torchcrest.cli import main

ROOT = Path(__file__).parent.parent
FENCES = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
README = [code for language, code in FENCES.findall((ROOT / "README.md").read_text()) if language == "python"]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if FENCES.search(path.read_text()))
# Lines that are no command of ours, and what runs them in its place.
ELSEWHERE = {"torchrun --standalone --nproc_per_node 2 examples/distributed.py": "test_distributed.py"}
# What other libraries warn of by themselves.
THEIRS = [
    "'pin_memory' argument is set as true but no accelerator",
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "The '.*_dataloader' does not have many workers",
]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in THEIRS]


def run(code: str, names: dict[str, object], path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, str(path), "exec"), names)


def status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # --print_config
        return int(end.code or 0)


def test_there_are_blocks() -> None:
    assert len(README) >= 2
    assert len(PAGES) >= 5


@pytest.mark.parametrize("block", README, ids=lambda block: block.strip().splitlines()[0][:40])
def test_a_block_of_the_readme_runs_alone(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(block, {}, ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for language, code in FENCES.findall(page.read_text()):
        if language == "python":
            run(code, names, page)
            continue
        for line in code.strip().splitlines():
            if line not in ELSEWHERE:
                command, *arguments = shlex.split(line)
                assert command == "torchcrest", line
                assert status(arguments) == 0, line
