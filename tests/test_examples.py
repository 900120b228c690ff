"""The example scripts run; `distributed.py` has its test in `test_distributed.py`."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from test_docs import ROOT, THEIRS

ARGUMENTS = {"transformers_trainer.py": ["--steps", "60", "--rate", "3e-3"]}
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in THEIRS]


@pytest.mark.parametrize("name", ["lightning_module.py", "plain_loop.py", "transformers_trainer.py"])
def test_an_example_learns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *ARGUMENTS.get(name, [])])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    out = capsys.readouterr().out
    shares = [float(each) / 100 for each in re.findall(r"accuracy ([\d.]+)%", out)]
    shares += [float(each) for each in re.findall(r"'eval_accuracy': '?([\d.]+)", out)]
    assert shares[-1] > 0.7
