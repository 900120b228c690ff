"""The example scripts run, each as a user would call it; `distributed.py` has its test in `test_distributed.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ARGUMENTS = {"transformers_trainer.py": ["--steps", "60", "--rate", "3e-3"]}


@pytest.mark.parametrize("name", ["lightning_module.py", "plain_loop.py", "transformers_trainer.py"])
def test_an_example_learns(name: str) -> None:
    command = [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, [])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    shares = [float(each) / 100 for each in re.findall(r"accuracy ([\d.]+)%", done.stdout)]
    shares += [float(each) for each in re.findall(r"'eval_accuracy': '?([\d.]+)", done.stdout)]
    assert shares[-1] > 0.7
