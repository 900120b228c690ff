"""The example of convex models: a coreset stands for the data better than a random subset does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import convex


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
@pytest.mark.parametrize(
    ("fit", "load", "splits"),
    [(convex.fit_logistic, convex.digits, 3), (convex.fit_ridge, convex.diabetes, 10)],
    ids=["logistic", "ridge"],
)
def test_a_coreset_beats_random_subsets(fit: Any, load: Any, splits: int, share: float) -> None:
    found = [convex.compare(fit, load(split), share, seed=split) for split in range(splits)]
    score = {name: np.mean([each[name][0] for each in found]) for name in ("all", "coreset", "random")}
    off = {name: np.mean([each[name][1] for each in found]) for name in score}
    assert score["random"] < score["coreset"] < score["all"] + 0.01
    assert 0 == off["all"] < off["coreset"] < 0.9 * off["random"]


def test_main_prints_a_row_for_each(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convex, "compare", lambda *a, **kw: dict.fromkeys(("all", "coreset", "random"), (0.5, 0.1)))
    convex.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert all("0.500 ± 0.000" in line for line in lines[1:])
