"""The settings of CREST, each a part of the algorithm that can be varied or switched off."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_type_hints

import torch

from torchcrest.checks import Checks, suggest
from torchcrest.errors import ConfigError, must

__all__ = ["PRESETS", "CrestConfig", "counted", "steps_of"]

Curvature = Literal["rms", "signed", "unsmoothed", "first_order"]
CurvatureProduct = Literal["double_backward", "finite_difference"]
Check = Literal["paired", "none"]
Proxy = Literal["outputs", "last_layer"]
MeasureMode = Literal["eval", "batch_statistics"]
MeasureDtype = Literal["model", "float32", "bfloat16", "float16"]
Quotas = Literal["share", "need"]
ProxySource = Literal["auto", "forward", "history", "model", "resolution"]
OverheadIn = Literal["auto", "seconds", "counted"]


@dataclass(frozen=True, kw_only=True)
class CrestConfig:
    """Settings of :class:`torchcrest.Crest`; symbols are those of the paper (arXiv 2306.01244).

    Attributes:
        batch_size: m, examples in each mini-batch coreset.
        pool_size: r, examples in the random subset from which a coreset is picked, at least m; None: 4m. See
            ``label_noise``.
        tolerance: tau, largest relative error of the quadratic model before a new region begins.
        interval_scale: h, steps between checks while the curvature is what it was at the start.
        coresets_per_step: b, coresets picked for each step of the check interval (paper: 5).
        max_interval: largest number of steps between two checks.
        max_coresets: most coresets of one region; beyond it coresets are used more than once.
        gradient_decay: beta1, decay of the running mean of gradients (Eq. 8).
        curvature_decay: beta2, decay of the running mean of the curvature (Eq. 9).
        curvature: ``first_order`` uses the gradient alone, and intervals are ``interval_scale`` steps. Ten steps
            ahead it predicts the loss as well as anything with curvature, fifty steps ahead best, for a third of
            the cost (benchmarks). ``signed`` smooths Hutchinson's estimate of the Hessian's diagonal as it is;
            ``rms``, the paper's, takes the root of the mean of its squares; ``unsmoothed`` keeps the newest
            gradient and estimate alone.
        curvature_coresets: how many of a region's coresets feed gradient and curvature; None: all.
        curvature_examples: how many examples of each of these coresets, drawn at random; None, or no fewer
            than there are: all.
        curvature_layers: how many of the model's last layers gradient, curvature and displacement cover;
            None: all. A layer is a module that owns trainable parameters, normalisations among them, in the
            order of registration. Changes of other parameters count as none.
        curvature_product: ``double_backward`` differentiates the gradient; ``finite_difference`` takes the
            difference of two gradients close by instead, which needs no second derivative (fused attention,
            functions that are differentiable once), but full precision: autocast is switched off for it, TF32 is
            yours to switch off.
        check: ``paired`` compares the model with the loss of the same examples, every interval;
            ``none`` never checks and begins a new region every interval. Coresets that are used once, see ``renew``,
            do not go stale, so there is nothing to check.
        exclude: stop drawing examples that are learned.
        learned_loss: alpha, an example whose loss stays below it is learned.
        learned_interval: T2, steps (an int), or share of ``len(crest)`` (a float up to 1), over which the
            loss must stay below ``learned_loss``.
        max_extra_visits: from the second epoch on (as many examples trained on as there are), an example that was
            in more batches than the mean of those not set aside by more than this rests until the others have caught
            up: hard ones are not trained on much more often than the rest, and not learned by heart. Those of a class
            under two thirds of the mean class may be in as many times more as would make it as large as that; all are
            one class where coresets are not picked by class, see ``stratify``. Looked at four times an epoch.
            None: no bound, as in the paper; streams have none. It takes 9 bytes an example.
        weight_power: an example's weight is its cluster's size to this power, scaled to mean 1 over the
            batch. 1: the paper's; 0: uniform. The default is what trained best in our benchmarks. See ``label_noise``.
        label_noise: share of the labels that are wrong. With none, a pool of 2m gives a coreset, with weights of
            ``weight_power``. From a tenth on it takes 4m, and the power rises, to 1 at three tenths: large clusters
            are of right labels, and outvote the others. What is read together is divided into such pools.
            ``estimated`` goes by how often the surest tenth of the predictions for a pool are wrong (see
            :mod:`torchcrest.noise`); None: one coreset of all ``pool_size``, and ``weight_power``.
        stratify: pick from each class, where there are class labels; else from the whole pool.
        quotas: how many from each class. ``share``: by its size, as in the paper. ``need``: by how much its gradients
            differ, so that hard and rare classes get more; one that is all alike gets one.
        proxy: ``outputs`` compares gradients with respect to the model's outputs; ``last_layer`` those of
            the whole last linear layer.
        measure_mode: ``eval`` measures in evaluation mode; ``batch_statistics`` lets batch normalisation
            that is in training mode use the pool's statistics. Buffers are left alone in both.
        measure_dtype: what pools and check sets are forwarded in, through ``torch.autocast``: ``bfloat16`` or
            ``float16``, ``float32`` even where training is not, or what the ``model`` would be called in
            where a batch is asked for.
        channels_last: forward images of pools and check sets with the channels last, which is faster on most
            devices. A model that calls ``view`` on images or feature maps refuses them; it needs ``reshape``.
        measured_together: examples in a forward pass of measuring; None: ``batch_size`` on a CPU, where more
            would leave the cache, and a pool elsewhere.
        max_overhead: most cost of selection, checks and curvature for each unit of training's own; None: no
            bound. Coresets that it cannot pay for are left out: see ``renew``. They are saved up for, and those of
            ``renew`` steps, or 16 of them, are picked together: each then costs less than one alone.
        max_coreset_cost: most that a coreset may cost, in training steps; None: whatever it costs. While they cost
            more, a tenth of the bound is spent, to notice when they no longer do, and the other batches are random.
            Without a bound it has no effect.
        overhead_in: the unit of ``max_overhead``. ``seconds`` are measured as the run goes, so two runs may
            select differently. ``counted`` is the same for every run: examples forwarded and differentiated.
            ``auto`` counts where ``torch.use_deterministic_algorithms(True)`` is set, and takes seconds elsewhere.
        forward_cost: counted cost of forwarding an example in a measurement; training on one is 1.
        derivative_cost: counted cost of differentiating an example's loss once for the quadratic model; None: 1,
            or 3 where that is done by a second backward pass as well.
        renew: steps after which coresets are picked anew inside a region. Each is then trained on once, and
            steps for which none could be paid take a random batch. None: the region's coresets are
            used again until it ends (the paper's), and the bound makes them fewer.
        proxy_source: where proxy gradients come from. ``auto``: a small model, yours or a network of one hidden layer
            that is made to fit the first pool; ``forward``, where none can be made: with inputs other than tensors of
            pixels or real numbers, other objectives than :class:`torchcrest.Classification` with a class an example,
            ``proxy="last_layer"``. ``forward``: the model's own forward pass. ``history``:
            each example's last known outputs, from measurements and from :meth:`torchcrest.Crest.observe`;
            only what is not known, or too old, is forwarded. ``model``: a small model of yours that is
            trained alongside. ``resolution``: the model's forward pass over smaller inputs.
        history_age: oldest outputs that ``history`` uses, in steps (an int) or as a share of ``len(crest)`` (a
            float up to 1).
        history_bytes: most memory for ``history``, which takes 2 bytes an output and 4 an example.
        resolution: side of the inputs that ``resolution`` measures, as a share of what it is.
        diagnostics: keep running estimates of the bias and variance of coresets' gradients, from the proxy gradients
            that are there anyway: the history's ``quality`` events. It costs next to nothing (benchmarks). The events'
            ``cost`` and ``pay_off`` are in the unit of ``overhead_in``; seconds are never the same again.
        difficulty: keep a record of each example, :class:`torchcrest.Difficulty`: forgetting events, how often it
            was picked, when it was set aside. It is made of what is measured and observed anyway, takes 11 bytes
            an example, in the state too, and changes no batch. Of several ranks, each records what it sees itself.

    Raises:
        ConfigError: any setting is out of range; all problems are listed at once.
    """

    batch_size: int = 128
    pool_size: int | None = None
    tolerance: float = 0.05
    interval_scale: float = 50.0
    coresets_per_step: float = 1.0
    max_interval: int = 100
    max_coresets: int = 100
    gradient_decay: float = 0.9
    curvature_decay: float = 0.999
    curvature: Curvature = "first_order"
    curvature_coresets: int | None = 1
    curvature_examples: int | None = None
    curvature_layers: int | None = None
    curvature_product: CurvatureProduct = "double_backward"
    check: Check = "none"
    exclude: bool = True
    learned_loss: float = 0.1
    learned_interval: int | float = 0.2
    max_extra_visits: float | None = 0.5
    weight_power: float = 0.5
    label_noise: float | Literal["estimated"] | None = "estimated"
    stratify: bool = True
    quotas: Quotas = "need"
    proxy: Proxy = "outputs"
    measure_mode: MeasureMode = "eval"
    measure_dtype: MeasureDtype = "model"
    channels_last: bool = False
    measured_together: int | None = None
    max_overhead: float | None = 0.1
    max_coreset_cost: float | None = 0.25
    overhead_in: OverheadIn = "auto"
    forward_cost: float = 1 / 3
    derivative_cost: float | None = None
    renew: int | None = 10
    proxy_source: ProxySource = "auto"
    history_age: int | float = 0.2
    history_bytes: int = 2**30
    resolution: float = 0.5
    diagnostics: bool = True
    difficulty: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, naming all of them."""
        checks = Checks(self)
        checks.whole("batch_size", 1, "Use for example 128.")
        if self.pool_size is not None:
            fine = checks.whole("pool_size", 1, "None takes 4 * batch_size.") and checks.fine("batch_size")
            do = "A coreset is picked from its pool; use 2 to 8 times batch_size."
            if fine:
                want = f"be at least batch_size = {self.batch_size}"
                checks.that("pool_size", self.pool_size >= self.batch_size, want, do)
        checks.above_zero("tolerance", "The paper uses 0.005 to 0.05.")
        checks.above_zero("interval_scale", "The paper uses 1 to 10.")
        checks.above_zero("coresets_per_step", "1 gives each step a coreset of its own; the paper uses 5.")
        checks.whole("max_interval", 1, "Use for example 100.")
        checks.whole("max_coresets", 1, "Use for example 100.")
        for name in ("gradient_decay", "curvature_decay"):
            checks.share(name, "0 keeps no memory; 0.9 and 0.999 are usual.")
        checks.choice("curvature", get_args(Curvature))
        if self.curvature_coresets is not None:
            checks.whole("curvature_coresets", 1, "None uses all of a region's coresets.")
        if self.curvature_examples is not None:
            checks.whole("curvature_examples", 1, "None uses all of a coreset's examples.")
        if self.curvature_layers is not None:
            checks.whole("curvature_layers", 1, "1 covers the last layer, None all of them.")
        checks.choice("curvature_product", get_args(CurvatureProduct))
        checks.choice("check", get_args(Check))
        checks.flag("exclude")
        checks.at_least_zero("learned_loss", "The paper uses 0.1; exclude=False switches exclusion off.")
        checks.steps_or_share("learned_interval", "Use for example 0.1, a tenth of the run.")
        if self.max_extra_visits is not None:
            checks.above_zero("max_extra_visits", "0.5 lets none be much ahead of the others; None: no bound.")
        checks.at_least_zero("weight_power", "1 is the paper's, 0 gives uniform weights.")
        if self.label_noise is not None and self.label_noise != "estimated":
            want, do = "be 'estimated', a share in [0, 1], or None", "'estimated' finds it out in training."
            fine = isinstance(self.label_noise, int | float) and not isinstance(self.label_noise, bool)
            checks.that("label_noise", fine and 0 <= self.label_noise <= 1, want, do)
        checks.flag("stratify")
        checks.choice("quotas", get_args(Quotas))
        checks.choice("proxy", get_args(Proxy))
        checks.choice("measure_mode", get_args(MeasureMode))
        checks.choice("measure_dtype", get_args(MeasureDtype))
        checks.flag("channels_last")
        if self.measured_together is not None:
            checks.whole("measured_together", 1, "None lets the device decide.")
        if self.max_overhead is not None:
            checks.above_zero("max_overhead", "0.25 allows a quarter of the training time; None: no bound.")
        if self.max_coreset_cost is not None:
            checks.above_zero("max_coreset_cost", "0.5 lets a coreset cost half a training step; None: anything.")
        checks.choice("overhead_in", get_args(OverheadIn))
        checks.above_zero("forward_cost", "1/3 counts a forward pass as a third of a training step.")
        if self.derivative_cost is not None:
            checks.above_zero("derivative_cost", "Leave it out for the default.")
        if self.renew is not None:
            checks.whole("renew", 1, "10 picks coresets anew every 10 steps; None uses a region's until it ends.")
        if checks.choice("proxy_source", get_args(ProxySource)) and self.proxy_source in ("history", "model"):
            do = "These have nothing but outputs: leave proxy out, or use proxy_source='forward'."
            checks.that("proxy", self.proxy == "outputs", f"be 'outputs' with proxy_source={self.proxy_source!r}", do)
        checks.steps_or_share("history_age", "Use for example 0.2, a fifth of the run.")
        checks.whole("history_bytes", 1, "2**30 is a gibibyte.")
        if checks.above_zero("resolution", "0.5 measures a quarter of an image's pixels."):
            checks.that("resolution", self.resolution <= 1, "be a share in (0, 1]", "0.5 measures half of each side.")
        checks.flag("diagnostics")
        checks.flag("difficulty")
        checks.close()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> CrestConfig:
        """Return the settings of one of the paper's experiments, or those of selection by the model itself.

        Args:
            name: ``cifar10``, ``cifar100``, ``tinyimagenet`` or ``snli``; or ``forward``: gradients from the model's
                own forward passes, for up to a quarter of the training time, and checks. Of use where a coreset is
                worth that, and no small model can stand in.
            overrides: settings to change, by name.

        Raises:
            ConfigError: no such preset or setting.

        >>> CrestConfig.preset("snli", tolerance=0.1).pool_size
        2850
        """
        if name not in PRESETS:
            raise ConfigError(must("preset", f"be one of {', '.join(PRESETS)}", name, suggest(name, PRESETS)))
        fields = get_type_hints(cls)
        for key in overrides:
            if key not in fields:
                raise ConfigError(must("overrides", "name settings", key, suggest(key, fields)))
        return cls(**{**PRESETS[name], **overrides})

    @property
    def pool(self) -> int:
        """r, examples in a pool: ``pool_size``, or 4m."""
        return 4 * self.batch_size if self.pool_size is None else self.pool_size

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain numbers and strings."""
        return asdict(self)


def counted(config: CrestConfig) -> bool:
    """Tell whether the bound is in counted examples, not in seconds."""
    auto = config.overhead_in == "auto" and torch.are_deterministic_algorithms_enabled()
    return auto or config.overhead_in == "counted"


def steps_of(share: int | float, steps: int) -> int:
    """Return a number of steps given as such (an int) or as a share of all (a float).

    >>> steps_of(7, 100), steps_of(0.2, 100)
    (7, 20)
    """
    return share if isinstance(share, int) else max(1, round(share * steps))


# The paper's settings; b, alpha and the smoothing of both g and H are common to all four. T2 = 20 epochs
# of 200, a tenth of training. The caps are ours: the paper's T1 and P have none.
_PAPER: dict[str, Any] = {
    "coresets_per_step": 5.0,
    "curvature": "rms",
    "curvature_coresets": None,
    "curvature_examples": None,
    "curvature_layers": None,
    "curvature_product": "double_backward",
    "learned_loss": 0.1,
    "learned_interval": 0.1,
    "max_extra_visits": None,
    "check": "paired",
    "proxy_source": "forward",
    "weight_power": 1.0,
    "label_noise": None,
    "quotas": "share",
    "max_coreset_cost": None,
    "max_overhead": None,
    "renew": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {**_PAPER, "tolerance": 0.05, "interval_scale": 1.0, "pool_size": 500, "batch_size": 128},
    "cifar100": {**_PAPER, "tolerance": 0.01, "interval_scale": 10.0, "pool_size": 500, "batch_size": 128},
    "tinyimagenet": {
        **_PAPER,
        "tolerance": 0.005,
        "interval_scale": 1.0,
        "pool_size": 1000,
        "batch_size": 128,
    },
    # Gradient and curvature of the last layer alone, of 123 million parameters.
    "snli": {
        **_PAPER,
        "tolerance": 0.05,
        "interval_scale": 4.0,
        "pool_size": 2850,
        "batch_size": 32,
        "curvature_layers": 1,
    },
    "forward": {
        "pool_size": 256,
        "check": "paired",
        "proxy_source": "forward",
        "label_noise": None,
        "max_extra_visits": None,
        "quotas": "share",
        "max_overhead": 0.25,
        "max_coreset_cost": None,
    },
}
