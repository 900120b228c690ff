"""Arrows point down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchcrest

ROOT = Path(torchcrest.__file__).parent
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in ROOT.rglob("*.py"))

LEVELS = [
    {"errors", "checks", "types", "tree", "config"},
    {"objectives", "tokens", "solvers", "quadratic", "active", "visits", "distributed", "overhead", "difficulty"},
    {"student", "noise"},
    {"measure", "feed", "streaming", "proxies", "account", "diagnostics"},
    {"passes", "region", "crest", "baselines"},
    {"train", "integrations"},
    {"report"},
    {"cli"},
]
# Within a level nothing imports anything, but a package itself, and these.
ALLOWED = {
    ("types", "tree"),
    ("checks", "errors"),
    ("config", "checks"),
    ("config", "errors"),
    ("types", "errors"),
    ("tokens", "objectives"),
    ("proxies", "measure"),
    ("account", "measure"),
    ("account", "proxies"),
    ("streaming", "feed"),
    ("diagnostics", "measure"),
    ("diagnostics", "feed"),
    ("crest", "passes"),
    ("crest", "region"),
    ("baselines", "passes"),
    ("integrations", "train"),
}
# Only these may be imported by what is at the bottom; the rest of the world comes with the command.
BOTTOM = {"torch", "numpy"}


def part(module: str) -> str:
    """Return the file or package right below torchcrest."""
    return module.split(".")[0]


def level(module: str) -> int:
    return next(k for k, names in enumerate(LEVELS) if part(module) in names)


def imports(module: str) -> set[str]:
    """List what a module imports, anywhere in it, with torchcrest's own names below ``torchcrest.``."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            if node.module == "torchcrest":
                found |= {f"torchcrest.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def own(module: str) -> set[str]:
    return {name.removeprefix("torchcrest.") for name in imports(module) if name.startswith("torchcrest.")}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_arrows_point_down(module: str) -> None:
    for other in own(module):
        assert part(other) in {part(m) for m in MODULES}, other
        inside = part(module) == part(other)
        allowed = (part(module), part(other)) in ALLOWED
        assert inside or allowed or level(other) < level(module), f"{module} imports {other}"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__" and level(m) < 5])
def test_the_package_itself_is_not_imported_from_below(module: str) -> None:
    assert "torchcrest" not in imports(module)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__" and level(m) < 5])
def test_the_library_needs_torch_and_numpy_only(module: str) -> None:
    outside = {part(name) for name in imports(module)} - {"torchcrest"}
    assert outside - set(sys.stdlib_module_names) <= BOTTOM


def test_importing_loads_nothing_that_is_not_asked_for() -> None:
    """The library nothing of the command, and the command no tracker."""
    tell = "print(sorted({m.split('.')[0] for m in sys.modules}))"
    code = f"import sys, torchcrest; {tell}; import torchcrest.cli; {tell}"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    library, command = told.splitlines()
    for name in ("rich", "jsonargparse", "matplotlib", "sklearn", "mnist1d", "lightning"):
        assert f"'{name}'" not in library
    assert "'torch'" in library
    for name in ("tensorboard", "trackio", "wandb", "codecarbon"):
        assert f"'{name}'" not in command
    assert "'jsonargparse'" in command


def test_public_names() -> None:
    assert all(hasattr(torchcrest, name) for name in torchcrest.__all__)
    wanted = {"Crest", "CrestConfig", "WeightedBatch", "facility_location", "coreset", "Classification", "Regression"}
    assert wanted <= set(torchcrest.__all__)
