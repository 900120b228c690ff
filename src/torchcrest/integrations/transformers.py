"""CREST in Hugging Face's Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchcrest.config import CrestConfig
from torchcrest.crest import Crest
from torchcrest.errors import CheckpointError, ConfigError, DataError, must
from torchcrest.feed import examples_in
from torchcrest.objectives import Classification, Objective, Regression, as_objective, split_target
from torchcrest.streaming import is_stream
from torchcrest.tokens import CausalLM, TokenClassification
from torchcrest.train.files import replacing
from torchcrest.types import WeightedBatch

try:
    from transformers import Trainer
    from transformers.models.auto import modeling_auto
    from transformers.trainer_utils import seed_worker
except ImportError as error:
    need = 'torchcrest.integrations.transformers needs more: pip install "torchcrest[huggingface]"'
    raise ImportError(need) from error

__all__ = ["CrestMixin", "CrestTrainer", "objective_for"]

WEIGHTS = "crest_weights"  # beside the model's own inputs, on the way from the loader to the loss

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CrestMixin(_Base):
    """What makes a Trainer train on mini-batch coresets: ``class MyTrainer(CrestMixin, SomeTrainer)``.

    Takes all arguments of the Trainer, and those of :class:`CrestTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        crest: CrestConfig | None = None,
        objective: Objective | Callable[[Tensor, Any], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        self.crest: Crest | None = None
        self.crest_config = crest
        super().__init__(*args, **kwargs)
        self.crest_objective = self._objective_of(objective)
        _refuse(self, self._config())
        self._source: tuple[Any, Any] = (None, None)  # data set and collate function, as the Trainer prepares them
        self._batches: Iterator[WeightedBatch] = iter(())

    # What the Trainer calls, in the order of training -----------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does; each call is a CREST run of its own, or carries a checkpoint's on."""
        self.crest = None
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of as many tickets as the Trainer's own has batches; coresets come in for them later.

        So the Trainer counts steps, epochs and batches to skip as ever, and whoever reads ahead gets tickets only.
        """
        dataset, collate = self.train_dataset, self.data_collator
        if hasattr(dataset, "remove_columns") and not is_stream(dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        self._source = dataset, collate
        tickets = range(self._pass())
        # A generator of its own: DataLoader would otherwise move the user's random state.
        return DataLoader(tickets, batch_size=1, collate_fn=_ticket, generator=torch.Generator())  # type: ignore[arg-type]

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Count the examples that an epoch trains on, on all processes."""
        if getattr(dataloader, "collate_fn", None) is _ticket:
            return len(dataloader) * int(self.args.per_device_train_batch_size * self.args.world_size)
        return int(super().num_examples(dataloader))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, None]:
        """Return an optimizer step's batches, each to be selected when the one before has been trained on."""
        count = len(list(islice(epoch_iterator, num_batches)))
        if self.crest is None:
            self._begin()
        return _Asked(self._next, count), None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the weighted mean of the examples' losses in training, the model's own loss in evaluation."""
        if WEIGHTS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        assert self.crest is not None
        data = {name: value for name, value in inputs.items() if name != WEIGHTS}
        outputs = self.crest_objective.outputs(model, data)
        losses = self.crest_objective.losses(outputs, data)
        self.crest.observe(losses, outputs)
        loss = (losses * inputs[WEIGHTS]).mean()
        return (loss, {"loss": loss, "logits": outputs}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with what selection has cost so far beside each loss of training."""
        if self.crest is not None and ("loss" in logs or "train_loss" in logs):
            names = ("overhead", "regions", "checks", "coresets", "active")
            logs.update({f"crest_{name}": getattr(self.crest.stats, name) for name in names})
        super().log(logs, *args, **kwargs)

    # Stop and resume --------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state of this process, and CREST's beside it."""
        super()._save_rng_state(output_dir)
        if self.crest is not None:
            with replacing(self._file(output_dir)) as file:
                torch.save(self.crest.state_dict(), file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load these, and then CREST: the model is prepared and has its parameters by now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._file(checkpoint)
        if not path.exists():
            do = "Resume from a checkpoint that a CrestTrainer saved with save_only_model=False and as many processes."
            raise CheckpointError(must(checkpoint, f"hold {path.name}", "none", do))
        self._begin().load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"crest_{self.args.process_index}.pt"

    # CREST ------------------------------------------------------------------------------------------------

    def _begin(self) -> Crest:
        """Build CREST on the model as it is trained, wrapped by now."""
        args, config = self.args, self._config()
        _refuse(self, config)  # arguments may have changed since the Trainer was made
        updates = math.ceil(self._pass() / args.gradient_accumulation_steps)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
        epochs, rest = divmod(steps, updates)
        dataset, collate = self._source
        self.crest = Crest(
            self.model_wrapped,
            dataset,
            config,
            # All of training is one pass, so that settings given as shares are shares of it.
            steps=epochs * self._pass() + rest * args.gradient_accumulation_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
            objective=self.crest_objective,
            num_workers=args.dataloader_num_workers,
            collate_fn=collate,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )
        self._batches = iter(())
        return self.crest

    def _next(self) -> dict[str, Any]:
        """Select the next batch."""
        assert self.crest is not None
        self.model_wrapped.train()  # as it would be had it not been evaluated since the last step
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self.crest)
            batch = next(self._batches)
        if not isinstance(batch.data, Mapping):
            want = "return a mapping, the model's inputs by name"
            raise DataError(must("data_collator", want, type(batch.data).__name__, "Trainers need one."))
        return {**batch.data, WEIGHTS: batch.weights}

    def _pass(self) -> int:
        """Count the batches of an epoch on each process, as the Trainer's own loader would."""
        args = self.args
        if is_stream(self.train_dataset):  # has no epochs; the Trainer insists on max_steps
            return max(1, args.max_steps * args.gradient_accumulation_steps)
        examples = examples_in(self.train_dataset, "train_dataset")
        around = math.floor if args.dataloader_drop_last else math.ceil
        return max(1, int(around(around(examples / args.per_device_train_batch_size) / args.world_size)))

    def _config(self) -> CrestConfig:
        size = self.args.per_device_train_batch_size
        return self.crest_config or CrestConfig(batch_size=size)

    def _objective_of(self, objective: Objective | Callable[[Tensor, Any], Tensor] | None) -> Objective:
        smoothing = self.args.label_smoothing_factor
        if objective is None:
            return objective_for(self.model, smoothing)
        if smoothing:
            do = "Smooth the labels in the objective, as in Classification(label_smoothing=0.1)."
            raise ConfigError(must("label_smoothing_factor", "be 0 with an objective of your own", smoothing, do))
        return as_objective(objective)


class CrestTrainer(CrestMixin, Trainer):
    """Hugging Face's Trainer, on mini-batch coresets: the same arguments and two more.

    Data sets are map-style, or streams, read as :class:`torchcrest.Crest` reads them (give ``max_steps``); collate
    functions any. Each batch of ``per_device_train_batch_size`` examples is a
    coreset; pools are collated as a whole, and a coreset is cut down to its own longest example. An epoch has as
    many optimizer steps as ever: CREST is for training in fewer of them, so set ``max_steps`` or
    ``num_train_epochs`` to what you can pay for. An optimizer step's loss is the mean over its batches of the
    weighted mean of the examples' losses; for language models an example's loss is the mean over its tokens that
    count. Evaluation is the Trainer's own. Shares in the configuration are shares of the whole training. ::

        trainer = CrestTrainer(
            model=model, args=args, train_dataset=train, data_collator=collator,
            crest=CrestConfig(batch_size=args.per_device_train_batch_size),
        )
        trainer.train()

    Checkpoints hold ``crest_<process>.pt`` beside the Trainer's files; a run resumed from one is the same run. It must
    be as long as it was to be.

    Args:
        args: the Trainer's arguments, all of them, in its order.
        crest: the settings; ``batch_size`` is ``per_device_train_batch_size``. None: the defaults, and pools twice
            as large as batches.
        objective: how a batch becomes outputs and losses; None: what the model is for, by its class, see
            :func:`objective_for`.
        kwargs: the Trainer's arguments by name.

    Attributes:
        crest: the loader of the training under way, or of the last; None before the first.
        crest_config: the settings.
        crest_objective: the objective.

    Raises:
        ConfigError: arguments that cannot work with CREST, all of them named.
    """


class _Asked:
    """An optimizer step's batches: their number is known, and each is made when it is asked for.

    Selection counts training time from one batch to the next, and data sets may draw random numbers in between.
    """

    def __init__(self, make: Callable[[], dict[str, Any]], count: int) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self._count):
            yield self._make()


def _ticket(tickets: list[int]) -> int:
    return tickets[0]


@dataclass(frozen=True)
class _Classes(Classification):
    """Classification by integers; a model would take other labels for those of several classes at a time."""

    def losses(self, outputs: Tensor, data: Any) -> Tensor:
        target = split_target(data)[1]
        if isinstance(target, Tensor) and target.is_floating_point():
            do = "For several classes at a time, or soft labels, pass objective=..."
            raise DataError(must("labels", "be integers", str(target.dtype), do))
        return super().losses(outputs, data)


def objective_for(model: Any, label_smoothing: float = 0.0) -> Objective:
    """Return the objective that a model of transformers is made for; inside of peft's models it is looked for.

    Sequence and image classification (regression where ``problem_type`` says so or there is one label), token
    classification, masked and causal language models.

    Args:
        model: tells by its class, or one that it is derived from.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.

    Raises:
        ConfigError: it cannot be told.
    """
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {base.__name__ for base in type(inside).__mro__}
    config = getattr(inside, "config", None)
    problem, kind = getattr(config, "problem_type", None), type(inside).__name__
    do = "Pass objective=..., for example torchcrest.Classification(), or a function (outputs, batch) -> losses."
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(must("objective", "be given for models with encoder and decoder", kind, do))
    if names & _names("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION"):
        if problem == "multi_label_classification":
            raise ConfigError(must("objective", "be given for several labels an example", kind, do))
        if problem == "regression" or (problem is None and config.num_labels == 1):  # type: ignore[union-attr]
            if label_smoothing:
                raise ConfigError(must("label_smoothing_factor", "be 0 for regression", label_smoothing, "Drop it."))
            return Regression()
        return _Classes(label_smoothing=label_smoothing)
    if names & _names("TOKEN_CLASSIFICATION"):
        return TokenClassification(label_smoothing=label_smoothing)
    if names & _names("MASKED_LM"):
        return TokenClassification(label_smoothing=label_smoothing, head=True)
    if names & _names("CAUSAL_LM"):
        return CausalLM(label_smoothing=label_smoothing)
    raise ConfigError(must("objective", "be given for a model of another kind", kind, do))


def _names(*kinds: str) -> set[str]:
    """Return the names of the classes of models for some purposes."""
    found: set[str] = set()
    for kind in kinds:
        for name in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            found |= {name} if isinstance(name, str) else set(name)
    return found


def _refuse(trainer: Trainer, config: CrestConfig) -> None:
    """Refuse arguments that CREST would not honour, or that would not honour it."""
    args, problems = trainer.args, []

    def that(name: str, fine: bool, want: str, got: object, do: str) -> None:
        if not fine:
            problems.append(must(name, want, got, do))

    kind = type(config).__name__
    if not isinstance(config, CrestConfig):
        raise ConfigError(must("crest", "be a CrestConfig", kind, "Write crest=CrestConfig(batch_size=...)."))
    size = args.per_device_train_batch_size
    want = f"be per_device_train_batch_size = {size}"
    that("batch_size of crest", config.batch_size == size, want, config.batch_size, "Set both alike.")
    loss, do = trainer.compute_loss_func, "Pass objective=..., a function (outputs, batch) -> losses [n], instead."
    that("compute_loss_func", loss is None, "be None: examples are weighted one by one", loss, do)
    strategy = getattr(args, "train_sampling_strategy", "random")
    that("train_sampling_strategy", strategy == "random", "be 'random'", strategy, "CREST does the sampling.")
    grouped = getattr(args, "group_by_length", False)
    that("group_by_length", not grouped, "be False", grouped, "CREST does the sampling.")
    auto = args.auto_find_batch_size
    that("auto_find_batch_size", not auto, "be False", auto, "Coresets are of one size; lower it and pool_size.")
    that("n_gpu", args.n_gpu <= 1, "be 1 a process", args.n_gpu, "Start with torchrun or accelerate launch.")
    for name in ("deepspeed", "fsdp"):
        on = bool(getattr(trainer, f"is_{name}_enabled", False))
        that(name, not on, "be off", "on", "Use DistributedDataParallel, or torchcrest.Crest in a loop of your own.")
    low = {True: "bfloat16"}.get(args.bf16, "float16" if args.fp16 else "float32")
    if low != "float32":  # accelerate has put autocast into the model, where ours does not reach
        want = f"be 'model' (or {low!r}) where training is in {low}"
        that("measure_dtype", config.measure_dtype in ("model", low), want, config.measure_dtype, "Leave it out.")
        difference = config.curvature != "first_order" and config.curvature_product == "finite_difference"
        want = "be 'double_backward' in low precision, which leaves nothing but noise of a difference"
        that("curvature_product", not difference, want, config.curvature_product, "Or curvature='first_order'.")
    if problems:
        raise ConfigError(problems)
