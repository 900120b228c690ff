from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from torchcrest import ConfigError, CrestConfig
from torchcrest.checks import suggest
from torchcrest.config import PRESETS

NAN, INF = math.nan, math.inf

# Setting, values out of range, what the message says the setting must be.
BAD: list[tuple[str, list[Any], str]] = [
    ("batch_size", [0, -1, 1.5, True, "8", None], "a whole number of at least 1"),
    ("pool_size", [0, 2.0], "a whole number of at least 1"),
    ("pool_size", [127], "at least batch_size = 128"),
    ("tolerance", [0, -0.1, NAN, INF, "x", None, True], "a number above 0"),
    ("interval_scale", [0, -1, INF], "a number above 0"),
    ("coresets_per_step", [0, -1, INF], "a number above 0"),
    ("max_interval", [0, 1.0], "a whole number of at least 1"),
    ("max_coresets", [0, 1.0], "a whole number of at least 1"),
    ("gradient_decay", [-0.1, 1, 1.5, NAN], r"in \[0, 1\)"),
    ("curvature_decay", [-0.1, 1, 1.5, NAN], r"in \[0, 1\)"),
    ("curvature", ["none", None, 1], "one of rms, signed, unsmoothed, first_order"),
    ("curvature_coresets", [0, -1, 1.0], "a whole number of at least 1"),
    ("curvature_examples", [0, -1, 1.0], "a whole number of at least 1"),
    ("curvature_layers", [0, -1, 1.0, True, "last"], "a whole number of at least 1"),
    ("curvature_product", ["exact", None], "one of double_backward, finite_difference"),
    ("check", ["yes", False], "one of paired, none"),
    ("exclude", [1, "yes", None], "True or False"),
    ("difficulty", [1, "yes", None], "True or False"),
    ("learned_loss", [-0.1, NAN, INF], "a number of at least 0"),
    ("learned_interval", [0, -1, True], "a whole number of at least 1"),
    ("learned_interval", [0.0, 1.1, NAN, "x", None], r"steps \(a whole number\) or a share in \(0, 1\]"),
    ("max_extra_visits", [0, -1, NAN, INF, "x"], "a number above 0"),
    ("weight_power", [-1, NAN, INF], "a number of at least 0"),
    ("label_noise", [-0.1, 1.1, NAN, "guess", True], r"'estimated', a share in \[0, 1\], or None"),
    ("stratify", [1, "yes"], "True or False"),
    ("quotas", ["equal", True], "one of share, need"),
    ("diagnostics", [1, "yes"], "True or False"),
    ("proxy", ["logits"], "one of outputs, last_layer"),
    ("measure_mode", ["train"], "one of eval, batch_statistics"),
    ("measure_dtype", ["half", None], "one of model, float32, bfloat16, float16"),
    ("channels_last", [1, None], "True or False"),
    ("measured_together", [0, 1.0], "a whole number of at least 1"),
    ("max_overhead", [0, -1, NAN, INF, "x"], "a number above 0"),
    ("max_coreset_cost", [0, -1, NAN, INF, "x"], "a number above 0"),
    ("overhead_in", ["hours", None], "one of auto, seconds, counted"),
    ("forward_cost", [0, -1, NAN, None], "a number above 0"),
    ("derivative_cost", [0, -1, NAN], "a number above 0"),
    ("renew", [0, 1.5, True], "a whole number of at least 1"),
    ("proxy_source", ["guess", None], "one of auto, forward, history, model, resolution"),
    ("history_age", [0, True], "a whole number of at least 1"),
    ("history_age", [0.0, 1.1, None], r"steps \(a whole number\) or a share in \(0, 1\]"),
    ("history_bytes", [0, 1e9], "a whole number of at least 1"),
    ("resolution", [0, NAN, None], "a number above 0"),
    ("resolution", [1.1], r"a share in \(0, 1\]"),
]
GOOD: list[tuple[str, list[Any]]] = [
    ("batch_size", [1, 256]),
    ("pool_size", [128, None]),
    ("tolerance", [1e-9, 10, 1]),
    ("gradient_decay", [0, 0.0, 0.999]),
    ("curvature_coresets", [None, 1, 1000]),
    ("curvature_examples", [None, 1, 1000]),
    ("curvature_layers", [None, 1, 1000]),
    ("curvature_product", ["double_backward", "finite_difference"]),
    ("learned_loss", [0]),
    ("learned_interval", [1, 10**6, 1.0, 0.001]),
    ("max_extra_visits", [None, 0.5, 3]),
    ("weight_power", [0, 0.0, 2.5]),
    ("coresets_per_step", [0.001, 5]),
    ("measure_mode", ["eval", "batch_statistics"]),
    ("measure_dtype", ["model", "float32", "bfloat16", "float16"]),
    ("measured_together", [None, 1]),
    ("max_overhead", [None, 0.01, 3]),
    ("max_coreset_cost", [None, 0.01, 3]),
    ("derivative_cost", [None, 2]),
    ("renew", [None, 1]),
    ("label_noise", [0, 0.4, 1.0, None, "estimated"]),
    ("proxy_source", ["auto", "forward", "history", "model", "resolution"]),
    ("history_age", [1, 1.0]),
    ("resolution", [1, 0.1]),
]


@pytest.mark.parametrize(("name", "value", "want"), [(n, value, want) for n, values, want in BAD for value in values])
def test_out_of_range(name: str, value: Any, want: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be {want}, got "):
        CrestConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD for value in values])
def test_in_range(name: str, value: Any) -> None:
    assert getattr(CrestConfig(**{name: value}), name) == value


def test_every_setting_is_covered() -> None:
    assert {name for name, _, _ in BAD} == set(CrestConfig().to_dict())


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        CrestConfig(**{name: values[0] for name, values, _ in reversed(BAD)})
    named = [line.split()[0] for line in str(caught.value).splitlines()]
    assert sorted(named) == sorted({name for name, _, _ in BAD})


def test_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="tolerance must be"):
        CrestConfig(tolerance=0)


def test_a_choice_nearly_right() -> None:
    curvature: Any = "first-order"
    with pytest.raises(ConfigError, match=r"got 'first-order'\. Did you mean first_order\?"):
        CrestConfig(curvature=curvature)


def test_frozen() -> None:
    name = "tolerance"
    with pytest.raises(FrozenInstanceError, match=name):
        setattr(CrestConfig(), name, 0.1)


def test_keyword_only() -> None:
    build: Any = CrestConfig
    with pytest.raises(TypeError, match="positional argument"):
        build(128)


def test_to_dict_round_trip() -> None:
    config = CrestConfig(tolerance=0.3, curvature="rms", learned_interval=7)
    assert CrestConfig(**config.to_dict()) == config
    assert all(isinstance(value, int | float | str | bool | None) for value in config.to_dict().values())


# The table "What the paper used" of the specification: tau, h, r, m; b, alpha and T2 are common to all.
PAPER = {
    "cifar10": (0.05, 1, 500, 128),
    "cifar100": (0.01, 10, 500, 128),
    "tinyimagenet": (0.005, 1, 1000, 128),
    "snli": (0.05, 4, 2850, 32),
}


class TestPresets:
    @pytest.mark.parametrize("name", PAPER)
    def test_paper(self, name: str) -> None:
        config = CrestConfig.preset(name)
        assert (config.tolerance, config.interval_scale, config.pool, config.batch_size) == PAPER[name]
        assert config.coresets_per_step == 5
        assert (config.learned_loss, config.learned_interval) == (0.1, 0.1)
        assert (config.gradient_decay, config.curvature_decay) == (0.9, 0.999)
        assert (config.curvature, config.curvature_coresets, config.curvature_examples) == ("rms", None, None)
        assert config.curvature_layers == (1 if name == "snli" else None)
        assert config.curvature_product == "double_backward"
        assert config.weight_power == 1
        assert config.exclude
        assert config.stratify
        assert (config.check, config.quotas, config.label_noise) == ("paired", "share", None)
        assert (config.proxy_source, config.max_overhead, config.renew) == ("forward", None, None)

    def test_selection_by_the_model_itself(self) -> None:
        config = CrestConfig.preset("forward")
        assert (config.proxy_source, config.check, config.max_overhead) == ("forward", "paired", 0.25)

    def test_no_others(self) -> None:
        assert PRESETS.keys() == {*PAPER, "forward"}

    def test_overrides(self) -> None:
        config = CrestConfig.preset("cifar10", tolerance=0.5, pool_size=256)
        assert (config.tolerance, config.pool, config.batch_size) == (0.5, 256, 128)
        assert PRESETS["cifar10"]["tolerance"] == 0.05

    def test_overrides_are_checked(self) -> None:
        with pytest.raises(ConfigError, match="pool_size must be at least batch_size = 128, got 3"):
            CrestConfig.preset("cifar10", pool_size=3)

    def test_unknown_preset(self) -> None:
        with pytest.raises(
            ConfigError, match=r"preset must be one of cifar10, .*, got 'cifar'\. Did you mean cifar10\?"
        ):
            CrestConfig.preset("cifar")

    def test_unknown_override(self) -> None:
        with pytest.raises(
            ConfigError, match=r"overrides must name settings, got 'tolerence'\. Did you mean tolerance\?"
        ):
            CrestConfig.preset("cifar10", tolerence=1)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("tolerence", "Did you mean tolerance?"),
        ("zzz", "Known: tolerance, curvature."),
        (3, "Known: tolerance, curvature."),
    ],
)
def test_suggest(word: Any, expected: str) -> None:
    assert suggest(word, ["tolerance", "curvature"]) == expected
