"""CREST in Hugging Face's Trainer equals a loop by hand, to the bit; tiny models, made here."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from conftest import parameters_of, same, seeded
from test_distributed import launch
from torchcrest import (
    CausalLM,
    CheckpointError,
    Classification,
    ConfigError,
    Crest,
    CrestConfig,
    DataError,
    Objective,
    Regression,
    TokenClassification,
)
from torchcrest.integrations.transformers import CrestMixin, CrestTrainer, objective_for

# peft's own, of transformers' names.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WORDS, LONGEST, M = 40, 11, 4
CONFIG = CrestConfig(
    batch_size=M,
    pool_size=12,
    tolerance=0.05,
    interval_scale=3,
    learned_loss=0.6,
    learned_interval=7,
    max_overhead=None,
    overhead_in="counted",
    check="paired",
    label_noise=None,
    quotas="share",
    max_coreset_cost=None,
)
# Random batches between the coresets, and coresets that are used again.
BOUNDED = replace(CONFIG, max_overhead=0.9, renew=4, interval_scale=6)
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def bert(kind: Any = BertForSequenceClassification, **settings: Any) -> Any:
    config = BertConfig(vocab_size=WORDS, max_position_embeddings=16, **SIZES, **{"num_labels": 3, **settings})
    return seeded(lambda: kind(config))


def gpt2(**settings: Any) -> Any:
    config = GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=1, n_head=2, **settings)
    return seeded(lambda: GPT2LMHeadModel(config))


def llama(kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, **settings: Any) -> Any:
    made = config(vocab_size=WORDS, max_position_embeddings=16, num_key_value_heads=1, **SIZES, **settings)
    return seeded(lambda: kind(made))


def examples(task: str, count: int = 60) -> list[dict[str, Any]]:
    """Write texts of 3 to 11 words, of words that go with the class."""
    drawn = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        size, kind = int(drawn.integers(3, LONGEST + 1)), int(drawn.integers(3))
        words = drawn.integers(1 + 10 * kind, 19 + 10 * kind, size)
        each = np.where(drawn.random(size) < 0.3, -100, words % 3)
        each[0] = 1
        labels = {"classes": kind, "regression": float(kind), "tokens": each.tolist(), "words": words.tolist()}
        rows.append({"input_ids": words.tolist(), "labels": labels[task]})
    return rows


def pad(rows: list[dict[str, Any]], left: bool = False, to: int = 0) -> dict[str, Tensor]:
    """Collate to the longest, or to a length."""
    longest = max(to, *(len(row["input_ids"]) for row in rows))

    def padded(values: list[int], filler: int) -> list[int]:
        missing = [filler] * (longest - len(values))
        return missing + values if left else values + missing

    labels = [padded(r["labels"], -100) if isinstance(r["labels"], list) else r["labels"] for r in rows]
    return {
        "input_ids": torch.tensor([padded(list(row["input_ids"]), 0) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor(labels),
    }


def pad_left(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return pad(rows, left=True)


TASKS: dict[str, tuple[Callable[[], Any], str, Any]] = {
    "classes": (bert, "classes", Classification()),
    "regression": (lambda: bert(num_labels=1), "regression", Regression()),
    "tokens": (lambda: bert(BertForTokenClassification), "tokens", TokenClassification()),
    "words": (llama, "words", CausalLM()),
}


# Trimming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collate", [pad, pad_left])
@pytest.mark.parametrize("config", [CONFIG, BOUNDED], ids=["coresets", "random between"])
def test_a_batch_is_what_its_examples_alone_are_collated_to(collate: Any, config: CrestConfig) -> None:
    data, shorter = examples("words"), 0
    crest = Crest(gpt2(), data, config, steps=14, objective=CausalLM(), collate_fn=collate)
    for batch, _ in crest:
        alone = collate([data[i] for i in crest.indices])
        assert batch.keys() == alone.keys()
        assert all(torch.equal(batch[name], alone[name]) for name in alone)
        assert all(tensor.is_contiguous() for tensor in batch.values())
        shorter += alone["input_ids"].shape[1] < LONGEST
    assert shorter
    assert config is CONFIG or 0 < crest.stats.coresets < 14


class TestTrimmed:
    ROWS = pad(examples("classes", 4), to=20)

    @pytest.mark.parametrize("objective", [Classification(), Regression()])
    def test_a_target_per_example_stays(self, objective: Any) -> None:
        """Even one that happens to be as wide as the text."""
        wide = {**self.ROWS, "labels": torch.rand(4, 20)} if isinstance(objective, Classification) else self.ROWS
        cut = objective.trimmed(wide)
        assert cut["input_ids"].shape[1] <= LONGEST
        assert cut["labels"] is wide["labels"]

    def test_dense_targets_leave_all_as_it_is(self) -> None:
        dense = {**self.ROWS, "labels": torch.zeros(4, 20, dtype=torch.int64)}
        assert Classification().trimmed(dense) is dense
        assert Regression().trimmed({**dense, "labels": torch.zeros(4, 20)})["input_ids"].shape[1] == 20

    @pytest.mark.parametrize("objective", [Classification(), Regression(), TokenClassification()])
    def test_nothing_to_cut(self, objective: Any) -> None:
        ids, y = torch.ones(2, 3, dtype=torch.int64), torch.zeros(2)
        for mask in (ids, torch.zeros_like(ids), torch.ones(2, 1, 3, 3)):
            batch = {"input_ids": ids, "attention_mask": mask, "labels": y}
            assert objective.trimmed(batch) is batch
        assert objective.trimmed((ids, y))[0] is ids

    def test_holes_stay(self) -> None:
        mask = torch.tensor([[0, 1, 0, 1, 0]])
        batch = {"x": torch.arange(5)[None], "attention_mask": mask, "labels": torch.arange(5)[None]}
        cut = TokenClassification().trimmed(batch)
        assert cut["x"].tolist() == cut["labels"].tolist() == [[1, 2, 3]]
        assert batch["x"].shape == (1, 5)

    def test_outputs_that_differ_in_width_without_proxies(self) -> None:
        class Dense(TokenClassification):
            proxies = None  # type: ignore[assignment]

        config = replace(CONFIG, measured_together=2)
        crest = Crest(
            bert(BertForTokenClassification), examples("tokens"), config, steps=5, objective=Dense(), collate_fn=pad
        )
        with pytest.raises(DataError, match=r"model outputs must have one shape an example.*Give the objective prox"):
            next(iter(crest))


# Objectives with a class at each token -----------------------------------------------------------------------

TOKENS: dict[str, tuple[Callable[[], Any], str, TokenClassification]] = {
    "gpt2": (gpt2, "words", CausalLM()),
    "llama": (llama, "words", CausalLM()),
    "masked": (lambda: bert(BertForMaskedLM), "tokens", TokenClassification(head=True)),
    "token classes": (lambda: bert(BertForTokenClassification), "tokens", TokenClassification()),
}


@pytest.mark.parametrize(("build", "task", "objective"), TOKENS.values(), ids=TOKENS.keys())
class TestTokens:
    def test_losses_are_the_model_s_own(self, build: Any, task: str, objective: TokenClassification) -> None:
        model = build().double().eval()
        rows = examples(task, 5)
        own = [model(**pad([row])).loss for row in rows]
        for losses in (
            objective.losses(objective.outputs(model, pad(rows)), pad(rows)),
            objective.proxies(model, pad(rows))[0],
        ):
            assert losses.tolist() == pytest.approx([float(loss.detach()) for loss in own], rel=1e-6)

    def test_proxies_are_sums_of_derivatives(self, build: Any, task: str, objective: TokenClassification) -> None:
        model, rows = build().double().eval(), pad(examples(task, 5))
        outputs = objective.outputs(model, rows).detach().requires_grad_()
        (derivatives,) = torch.autograd.grad(objective.losses(outputs, rows).sum(), outputs)
        for each in (objective, replace(objective, rows=3), replace(objective, head=False)):
            losses, gradients = each.proxies(model, rows)
            assert torch.allclose(gradients, derivatives.sum(1), rtol=1e-9, atol=1e-12)
            assert torch.allclose(losses, objective.losses(outputs, rows), rtol=1e-9)
            assert not gradients.requires_grad
        if outputs.shape[-1] > 7:
            sketched = replace(objective, proxy_dim=7, rows=3).proxies(model, rows)[1]
            assert sketched.shape == (5, 7)
            assert torch.allclose(sketched, derivatives.sum(1) @ matrix(outputs.shape[-1], 7), rtol=1e-9, atol=1e-12)

    def test_padding_changes_nothing(self, build: Any, task: str, objective: TokenClassification) -> None:
        model, rows = build().double().eval(), examples(task, 5)
        narrow, wide = pad(rows), pad(rows, to=16)
        for data in (wide, objective.trimmed(wide)):
            close = [
                torch.allclose(a, b, atol=1e-12)
                for a, b in zip(*(objective.proxies(model, d) for d in (narrow, data)), strict=True)
            ]
            assert close == [True, True]
        cut = objective.trimmed(wide)
        assert all(torch.equal(cut[name], narrow[name]) for name in narrow)

    def test_no_token_counts(self, build: Any, task: str, objective: TokenClassification) -> None:
        model, rows = build().eval(), pad(examples(task, 3))
        rows["labels"][1] = -100
        losses, gradients = objective.proxies(model, rows)
        assert losses[1] == 0
        assert not gradients[1].any()
        assert objective.losses(objective.outputs(model, rows), rows)[1] == 0
        rows["labels"][:] = -100
        losses, gradients = objective.proxies(model, rows)
        assert not losses.any()
        assert gradients.shape[0] == 3
        assert not gradients.any()


def matrix(classes: int, buckets: int, seed: int = 0) -> Tensor:
    """Return the sketch as a matrix: one sign in each row, columns of as many as each other."""
    objective = TokenClassification(proxy_dim=buckets, seed=seed)
    return objective._projected(torch.eye(classes, dtype=torch.float64))


class TestSketch:
    def test_a_matrix_of_signs(self) -> None:
        found = matrix(1000, 32)
        assert set(found.unique().tolist()) == {-1, 0, 1}
        assert (found != 0).sum(1).eq(1).all()
        assert set((found != 0).sum(0).tolist()) == {31, 32}
        assert torch.equal(found, matrix(1000, 32))
        assert not torch.equal(found, matrix(1000, 32, seed=1))
        assert torch.equal(matrix(32, 32), torch.eye(32))

    def test_products_are_kept_in_the_mean(self) -> None:
        pair = torch.randn(2, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        products = [float((pair @ matrix(60, 20, seed)).prod(0).sum()) for seed in range(400)]
        error = float(np.std(products)) / math.sqrt(len(products))
        assert abs(np.mean(products) - float(pair.prod(0).sum())) < 4 * error

    def test_logits_are_never_whole(self) -> None:
        """The output embeddings see 5 tokens at a time, and for the rest of the model one an example."""
        model, seen = gpt2(), []
        model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.numel() // WORDS))
        data = examples("words")
        config = replace(CONFIG, measured_together=12)
        next(iter(Crest(model, data, config, steps=3, objective=CausalLM(rows=5), collate_fn=pad)))
        assert max(seen[:-1]) == 12
        assert seen.count(5) > 10
        assert set(seen[:-1]) <= {*range(6), 12}

    @pytest.mark.parametrize("where", ["around", "inside"])
    def test_compiled(self, where: str) -> None:
        model, rows = llama(), pad(examples("words", 3))
        plain = CausalLM().proxies(model, rows)
        if where == "inside":
            model.compile(backend="aot_eager")
        whole: Any = torch.compile(model, backend="eager") if where == "around" else model
        assert all(torch.equal(a, b) for a, b in zip(plain, CausalLM().proxies(whole, rows), strict=True))

    def test_autocast(self) -> None:
        """Inside the model's own, as accelerate puts it there."""
        model, rows = gpt2().eval(), pad(examples("words", 3))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = CausalLM().outputs(model, rows)
            losses, gradients = CausalLM().proxies(model, rows)
        assert outputs.dtype == torch.bfloat16
        assert torch.allclose(losses, CausalLM().losses(outputs, rows), rtol=1e-5)
        assert gradients.dtype == torch.float32

    def test_label_smoothing(self) -> None:
        model, rows = bert(BertForTokenClassification).eval(), pad(examples("tokens", 1))
        objective = TokenClassification(label_smoothing=0.1)
        logits = model(**{k: v for k, v in rows.items() if k != "labels"}).logits[0]
        expected = nn.functional.cross_entropy(logits, rows["labels"][0], label_smoothing=0.1, reduction="none").sum()
        assert float(objective.proxies(model, rows)[0]) == pytest.approx(
            float(expected.detach()) / int((rows["labels"] >= 0).sum())
        )


class TestRefusedTokens:
    ROWS = pad(examples("words", 3))

    def test_outputs_that_are_changed(self) -> None:
        model = llama(Gemma2ForCausalLM, Gemma2Config, final_logit_softcapping=3.0, head_dim=8)
        with pytest.raises(
            ConfigError,
            match=r"model must return what its output embeddings give, unchanged, got 'others'. Use CausalLM\(head=F",
        ):
            CausalLM().proxies(model, self.ROWS)
        losses = CausalLM(head=False).proxies(model, self.ROWS)[0]
        assert torch.allclose(losses, CausalLM().losses(CausalLM().outputs(model, self.ROWS), self.ROWS))

    def test_no_output_embeddings(self) -> None:
        with pytest.raises(ConfigError, match=r"unchanged, got 'none'. Use TokenClassification\(head=False\)"):
            TokenClassification(head=True).proxies(bert(BertForTokenClassification), pad(examples("tokens", 3)))

    def test_output_embeddings_that_are_not_called(self) -> None:
        model = gpt2()
        model.set_output_embeddings(nn.Linear(16, WORDS))
        model.get_output_embeddings = lambda: nn.Linear(16, WORDS)
        with pytest.raises(ConfigError, match="unchanged, got '0 calls of them'"):
            CausalLM().proxies(model, self.ROWS)

    def test_labels(self) -> None:
        model = gpt2()
        for labels, match in (
            (self.ROWS["labels"].float(), "labels must be a tensor of integers, got 'torch.float32'"),
            ([1, 2, 3], "labels must be a tensor of integers, got 'list'"),
            (self.ROWS["labels"][:, 1:], r"labels must have the shape of the tokens that the model has outputs for"),
            (self.ROWS["labels"] + WORDS, rf"labels must lie in \[0, {WORDS}\)"),
        ):
            with pytest.raises(DataError, match=match):
                CausalLM().proxies(model, {**self.ROWS, "labels": labels})

    def test_sizes(self) -> None:
        with pytest.raises(ConfigError, match=r"proxy_dim must be a whole number of at least 1, got 0(.|\n)*rows must"):
            CausalLM(proxy_dim=0, rows=2.5)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("setting", "match"),
        [
            ({"proxy": "last_layer"}, "proxy must be 'outputs' with this"),
            ({"proxy_source": "history"}, "proxy_source must be another than 'history'"),
        ],
    )
    def test_settings_that_need_outputs(self, setting: Any, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            Crest(gpt2(), examples("words"), replace(CONFIG, **setting), steps=3, objective=CausalLM(), collate_fn=pad)

    def test_glister(self) -> None:
        from torchcrest import Glister, GlisterConfig

        config = GlisterConfig(batch_size=4, subset=20, proxy="outputs")
        with pytest.raises(ConfigError, match="objective must give outputs for the step that Glister looks ahead"):
            Glister(gpt2(), examples("words"), config, steps=3, objective=CausalLM(), collate_fn=pad)

    def test_shapes_of_proxies(self) -> None:
        class Wrong(CausalLM):
            def proxies(self, model: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
                losses, gradients = super().proxies(model, data)
                return losses[1:], gradients

        crest = Crest(gpt2(), examples("words"), CONFIG, steps=3, objective=Wrong(), collate_fn=pad)
        with pytest.raises(DataError, match=r"losses and proxy gradients must have shapes \(4,\) and \(4, d\)"):
            next(iter(crest))


# The Trainer -------------------------------------------------------------------------------------------------

Trace = list[tuple[list[int], list[float]]]


class Tracing(CrestTrainer):
    """Notes indices and weights of each batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.trace: Trace = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "crest_weights" in inputs:
            assert self.crest is not None
            self.trace.append((self.crest.indices.tolist(), inputs["crest_weights"].tolist()))
        return super().compute_loss(model, inputs, *args, **kwargs)


def optimizers(model: nn.Module) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "per_device_train_batch_size": M,
        "num_train_epochs": 2,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**usual, **settings})


def make(
    folder: Path, task: str = "classes", model: Any = None, crest: Any = CONFIG, kind: Any = Tracing, **settings: Any
) -> Any:
    build, name, _ = TASKS[task]
    model = build() if model is None else model
    extra = {
        k: settings.pop(k)
        for k in ("eval_dataset", "objective", "train_dataset", "data_collator", "compute_loss_func")
        if k in settings
    }
    usual = {"train_dataset": examples(name), "data_collator": pad, **extra}
    return kind(model=model, args=arguments(folder, **settings), optimizers=optimizers(model), crest=crest, **usual)


def trained(*args: Any, **kwargs: Any) -> Any:
    """Train, before anything else draws from the random state that the Trainer sets."""
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


class ByHand:
    """The loop of the README, with an optimizer step every so many batches and at the end of each 15."""

    def __init__(
        self,
        task: str,
        model: Any = None,
        crest: CrestConfig = CONFIG,
        every: int = 1,
        steps: int = 30,
        seed: int = 42,
        data: Any = None,
    ) -> None:
        build, name, objective = TASKS[task]
        self.model = build() if model is None else model
        if hasattr(self.model, "config"):
            self.model.config.use_cache = False  # as the Trainer sets it
        torch.manual_seed(seed)
        data = examples(name) if data is None else data
        loader = Crest(self.model, data, crest, steps=steps, seed=seed, objective=objective, collate_fn=pad)
        optimizer, scheduler = optimizers(self.model)
        self.trace: Trace = []
        self.losses: list[float] = []
        self.loader, waiting = loader, 0.0
        self.model.train()
        for k, (batch, weights) in enumerate(loader):
            self.trace.append((loader.indices.tolist(), weights.tolist()))
            outputs = self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            group = min(every, 15 - k % 15 // every * every)
            loss = (objective.losses(outputs, batch) * weights).mean() / group
            loss.backward()
            waiting += float(loss.detach())
            if (k % 15 + 1) % every == 0 or k % 15 == 14:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                self.losses.append(waiting)
                waiting = 0.0


def assert_same_run(trainer: Any, hand: Any) -> None:
    assert trainer.trace == hand.trace
    assert trainer.crest.history == hand.loader.history
    assert same(parameters_of(trainer.model), parameters_of(hand.model))


def losses_in(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Normed(nn.Module):
    """A model of the user's own, with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(WORDS, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        kept = attention_mask[..., None]
        logits = self.head(self.norm((self.embed(input_ids) * kept).sum(1) / kept.sum(1)))
        found = {"logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


def undropped(model: Any) -> Any:
    """Keep a model in evaluation mode: plain loaders draw from the random state of dropout."""
    model.eval().train = lambda *_: model
    return model


class InOrder(Trainer):
    """Trains on batches of given examples."""

    order: list[int]

    def _get_train_sampler(self, *_: Any) -> Any:
        return self.order


class TestSameAsByHand:
    @pytest.mark.parametrize("task", TASKS)
    def test_tasks(self, task: str, tmp_path: Path) -> None:
        config = replace(CONFIG, learned_loss=0.02) if task == "tokens" else CONFIG
        trainer, hand = trained(tmp_path, task, crest=config), ByHand(task, crest=config)
        assert_same_run(trainer, hand)
        assert losses_in(trainer) == pytest.approx(hand.losses, rel=1e-6)
        kinds = {event["event"] for event in trainer.crest.history}
        assert kinds >= {"region", "check"}
        assert len(trainer.trace) == 30

    def test_gradient_accumulation(self, tmp_path: Path) -> None:
        """Of four, with three left over at the end of each epoch."""
        trainer, hand = trained(tmp_path, gradient_accumulation_steps=4), ByHand("classes", every=4)
        assert_same_run(trainer, hand)
        assert len(hand.losses) == trainer.state.global_step == 8
        assert losses_in(trainer) == pytest.approx(hand.losses, rel=1e-6)

    def test_gradient_accumulation_of_tokens(self, tmp_path: Path) -> None:
        """Where the Trainer would count items of a batch."""
        trainer, hand = trained(tmp_path, "words", gradient_accumulation_steps=3), ByHand("words", every=3)
        assert_same_run(trainer, hand)

    def test_workers(self, tmp_path: Path) -> None:
        trainer, hand = trained(tmp_path, dataloader_num_workers=2), ByHand("classes")
        assert_same_run(trainer, hand)

    def test_a_stream(self, tmp_path: Path) -> None:
        """Of more columns than the model takes, which ends and starts over; and a resumed run of it."""

        def stream() -> Any:
            return Dataset.from_list(examples("classes")).to_iterable_dataset()

        columns = [{**row, "idx": i} for i, row in enumerate(examples("classes"))]
        wide = Dataset.from_list(columns).to_iterable_dataset()
        trainer = trained(tmp_path, train_dataset=wide, max_steps=30, save_steps=12, save_strategy="steps")
        hand = ByHand("classes", data=stream())
        assert_same_run(trainer, hand)
        assert max(i for indices, _ in trainer.trace for i in indices) >= 60, "running numbers over all passes"
        resumed = make(tmp_path, train_dataset=stream(), max_steps=30, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
        assert resumed.trace == hand.trace[12:]
        assert same(parameters_of(resumed.model), parameters_of(hand.model))

    def test_random_batches_between(self, tmp_path: Path) -> None:
        trainer, hand = trained(tmp_path, crest=BOUNDED), ByHand("classes", crest=BOUNDED)
        assert_same_run(trainer, hand)
        assert 0 < trainer.crest.stats.coresets < 30

    def test_history(self, tmp_path: Path) -> None:
        """The Trainer tells it of losses and outputs: fewer examples are forwarded."""
        trainer = make(tmp_path, crest=replace(CONFIG, proxy_source="history"))
        trainer.train()
        other = make(tmp_path)
        other.train()
        assert trainer.crest.stats.forwarded_selecting < other.crest.stats.forwarded_selecting

    def test_evaluation_changes_nothing(self, tmp_path: Path) -> None:
        """Nor does it leave the model in another mode when pools are measured in batch statistics."""
        config = replace(CONFIG, measure_mode="batch_statistics", exclude=False)
        evaluating: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": examples("classes", 9)}
        settings: dict[str, Any] = {"crest": config, "objective": Classification(), "save_strategy": "no"}
        trainer = trained(tmp_path, model=seeded(Normed), **settings, **evaluating)
        other = trained(tmp_path, model=seeded(Normed), **settings)
        assert trainer.trace == other.trace
        assert trainer.crest.history == other.crest.history
        assert same(parameters_of(trainer.model), parameters_of(other.model))
        assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 10

    def test_evaluation_is_the_trainer_s(self, tmp_path: Path) -> None:
        trainer = trained(tmp_path, "words", eval_dataset=examples("words", 9), max_steps=2)
        own = trainer.model.eval()(**pad(examples("words", 8))).loss
        evaluated = trainer.evaluate(examples("words", 8))
        assert evaluated["eval_loss"] == pytest.approx(float(own.detach()), rel=1e-5)
        assert not any("crest" in name for name in evaluated)

    def test_max_steps_and_seed(self, tmp_path: Path) -> None:
        trainer = make(tmp_path, max_steps=20, data_seed=3)
        trainer.train()
        assert len(trainer.trace) == len(trainer.crest) == 20
        other = Crest(bert(), examples("classes"), CONFIG, steps=20, seed=3, collate_fn=pad)
        next(iter(other))
        assert other.indices.tolist() == trainer.trace[0][0]

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"dataloader_drop_last": True},
            {"max_steps": 7},
            {"num_train_epochs": 0.3},
            {"gradient_accumulation_steps": 4},
        ],
    )
    def test_as_many_steps_as_the_trainer_takes(self, settings: Any, tmp_path: Path) -> None:
        data = examples("classes", 49)
        ours = make(tmp_path, train_dataset=data, **settings)
        plain = Trainer(bert(), arguments(tmp_path, **settings), data_collator=pad, train_dataset=data)
        found, expected = (t.set_initial_training_values(t.args, t.get_train_dataloader()) for t in (ours, plain))
        number, *_, steps = found
        assert (number, found[1], found[4:]) == (expected[0], expected[1], expected[4:])
        ours.train()
        assert ours.state.global_step == steps
        assert len(ours.crest) == len(ours.trace)

    @pytest.mark.parametrize("task", TASKS)
    def test_pools_as_large_as_batches_are_plain_training(self, task: str, tmp_path: Path) -> None:
        """With texts of one length, for the Trainer's loss is a mean over all of a batch's tokens."""
        build, name, _ = TASKS[task]
        rows = [{"input_ids": row["input_ids"][:3], "labels": row["labels"]} for row in examples(name)]
        for row in rows:
            words = {"tokens": [word % 3 for word in row["input_ids"]], "words": row["input_ids"]}
            row["labels"] = words.get(name, row["labels"])
        config = replace(CONFIG, pool_size=M, exclude=False)
        trainer = trained(tmp_path, task, undropped(build()), config, train_dataset=rows, max_steps=10)
        assert {weight for _, weights in trainer.trace for weight in weights} == {1.0}
        model = undropped(build())
        plain = InOrder(model, arguments(tmp_path, max_steps=10), pad, rows, optimizers=optimizers(model))
        plain.order = [i for indices, _ in trainer.trace for i in indices]
        plain.train()
        assert losses_in(trainer) == pytest.approx(losses_in(plain), rel=1e-5)

    def test_a_second_training_is_a_run_of_its_own(self, tmp_path: Path) -> None:
        trainer = make(tmp_path, max_steps=4)
        trainer.train()
        first, trainer.trace = trainer.trace, []
        trainer.train()
        assert len(trainer.trace) == len(first) == 4
        assert trainer.crest.history[0]["step"] == 0

    def test_a_data_set_with_other_columns(self, tmp_path: Path) -> None:
        rows = [{**row, "note": "x"} for row in examples("classes")]
        trainer, hand = trained(tmp_path, train_dataset=Dataset.from_list(rows)), ByHand("classes")
        assert_same_run(trainer, hand)
        plain = make(tmp_path, train_dataset=rows)
        plain.train()
        assert_same_run(plain, hand)


class TestResume:
    @pytest.mark.parametrize(
        ("task", "settings"),
        [
            ("classes", {"save_steps": 7}),
            ("classes", {"save_steps": 5, "gradient_accumulation_steps": 4, "num_train_epochs": 3, "crest": BOUNDED}),
            ("words", {"save_steps": 7, "dataloader_num_workers": 2}),
            (
                "classes",
                {
                    "save_steps": 15,
                    "eval_strategy": "steps",
                    "eval_steps": 5,
                    "crest": replace(CONFIG, curvature="signed"),
                },
            ),
        ],
        ids=["within an epoch", "accumulating", "workers", "between epochs"],
    )
    def test_the_same_run(self, task: str, settings: dict[str, Any], tmp_path: Path) -> None:
        settings = {**settings, "save_strategy": "steps", "eval_dataset": examples(TASKS[task][1], 6)}
        whole = make(tmp_path / "whole", task, **settings)
        whole.train()
        stop = settings["save_steps"]
        with pytest.MonkeyPatch.context() as patched:
            trainer = make(tmp_path / "stopped", task, **settings)

            def interrupted(*args: Any, **kwargs: Any) -> Any:
                if trainer.state.global_step == stop + 2:
                    raise KeyboardInterrupt
                return Tracing.training_step(trainer, *args, **kwargs)

            patched.setattr(trainer, "training_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        resumed = make(tmp_path / "stopped", task, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.trace == whole.trace[-len(resumed.trace) :]
        assert len(resumed.trace) < len(whole.trace)
        assert resumed.crest.history == whole.crest.history
        assert same(parameters_of(resumed.model), parameters_of(whole.model))
        keep = [
            {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k}
            for entry in whole.state.log_history[:-1]
        ]
        again = [
            {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k}
            for entry in resumed.state.log_history[:-1]
        ]
        assert again == keep

    def test_another_s_checkpoint(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        model = bert()
        plain = Trainer(
            model,
            arguments(tmp_path, **settings),
            data_collator=pad,
            train_dataset=examples("classes"),
            optimizers=optimizers(model),
        )
        plain.train()
        with pytest.raises(
            CheckpointError, match=r"checkpoint-2 must hold crest_0.pt, got 'none'. Resume from a check"
        ):
            make(tmp_path, **settings).train(resume_from_checkpoint=True)

    def test_another_length(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
        make(tmp_path, **settings, max_steps=2).train()
        with pytest.raises(CheckpointError, match="steps of the checkpoint must be 5, as of this loader, got 2"):
            make(tmp_path, **settings, max_steps=5).train(resume_from_checkpoint=True)


def test_logs(tmp_path: Path) -> None:
    trainer = make(tmp_path, logging_steps=4)
    result = trainer.train()
    *logs, last = trainer.state.log_history
    assert [entry["step"] for entry in logs] == list(range(4, 29, 4))
    for entry in (*logs, last):
        assert {f"crest_{name}" for name in ("overhead", "regions", "checks", "coresets", "active")} <= entry.keys()
    stats = trainer.crest.stats
    assert (last["crest_regions"], last["crest_coresets"]) == (stats.regions, 30)
    hand = ByHand("classes")
    assert [entry["loss"] for entry in logs] == pytest.approx(
        [sum(hand.losses[k : k + 4]) / 4 for k in range(0, 28, 4)]
    )
    assert result.metrics["train_loss"] == pytest.approx(sum(hand.losses) / 30)
    samples = result.metrics["train_samples_per_second"] * result.metrics["train_runtime"]
    assert samples == pytest.approx(120, rel=0.01)


def test_bfloat16(tmp_path: Path) -> None:
    """Pools are measured and coresets differentiated in the precision of training."""
    trainer = make(tmp_path, "words", bf16=True, crest=replace(CONFIG, curvature="signed"), max_steps=8)
    seen = set()
    trainer.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert all(math.isfinite(loss) for loss in losses_in(trainer))
    assert trainer.crest.stats.checks


class TestTrainableParameters:
    CONFIG = replace(CONFIG, curvature="signed")

    def lora(self) -> Any:
        config = peft.LoraConfig(r=2, target_modules=["value"], modules_to_save=["classifier"], lora_dropout=0.0)
        return seeded(lambda: peft.get_peft_model(bert(), config))

    def frozen(self) -> Any:
        model = bert()
        model.bert.requires_grad_(False)
        return model

    @pytest.mark.parametrize("kind", ["lora", "frozen"])
    def test_only_these_are_modelled_and_changed(self, kind: str, tmp_path: Path) -> None:
        model = getattr(self, kind)()
        before = parameters_of(model)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        trainer = trained(tmp_path, model=model, crest=self.CONFIG)
        hand = ByHand("classes", getattr(self, kind)(), self.CONFIG)
        assert_same_run(trainer, hand)
        region = trainer.crest.state_dict()["region"]
        assert set(region["parameters"]) == trainable
        assert {
            name for name, value in parameters_of(model).items() if not torch.equal(value, before[name])
        } == trainable
        assert len(trainable) < len(before) / 2
        shapes = [p.shape for p in model.parameters() if p.requires_grad]
        assert [g.shape for g in trainer.crest.state_dict()["quadratic"]["gradient"]] == shapes

    def test_resume(self, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"crest": self.CONFIG, "save_strategy": "steps", "save_steps": 9, "max_steps": 20}
        whole = make(tmp_path, model=self.lora(), **settings)
        whole.train()
        resumed = make(tmp_path, model=self.lora(), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
        assert resumed.trace == whole.trace[9:]
        assert same(parameters_of(resumed.model), parameters_of(whole.model))

    def test_language_model(self) -> None:
        model = seeded(lambda: peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])))
        data = pad(examples("words", 3))
        whole = CausalLM(head=False).proxies(model, data)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, CausalLM().proxies(model, data), strict=True))


# Refusals ----------------------------------------------------------------------------------------------------


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            (
                {"crest": CrestConfig()},
                "batch_size of crest must be per_device_train_batch_size = 4, got 128. Set both",
            ),
            ({"crest": {"batch_size": 4}}, "crest must be a CrestConfig, got 'dict'"),
            ({"compute_loss_func": print}, "compute_loss_func must be None: examples are weighted one by one"),
            ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be 'random', got 'group"),
            ({"auto_find_batch_size": True}, "auto_find_batch_size must be False, got True. Coresets are of one size"),
            ({"bf16": True, "crest": replace(CONFIG, measure_dtype="float32")}, "measure_dtype must be 'model'"),
            (
                {"bf16": True, "crest": replace(CONFIG, curvature="rms", curvature_product="finite_difference")},
                "curvature_product must be 'double_backward' in low precision",
            ),
            ({"label_smoothing_factor": 0.1, "objective": Classification()}, "label_smoothing_factor must be 0 with"),
            ({"label_smoothing_factor": 0.1, "task": "regression"}, "label_smoothing_factor must be 0 for regression"),
        ],
    )
    def test_arguments(self, settings: dict[str, Any], match: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=match):
            make(tmp_path, **settings)

    def test_all_problems_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"batch_size of crest(.|\n)*auto_find_batch_size"):
            make(tmp_path, crest=CrestConfig(), auto_find_batch_size=True)

    def test_arguments_that_changed(self, tmp_path: Path) -> None:
        trainer = make(tmp_path)
        trainer.args.per_device_train_batch_size = 2
        with pytest.raises(ConfigError, match="batch_size of crest must be per_device_train_batch_size = 2"):
            trainer.train()

    @pytest.mark.parametrize(("name", "n_gpu"), [("is_deepspeed_enabled", 1), ("is_fsdp_enabled", 1), ("none", 2)])
    def test_ways_to_train(self, name: str, n_gpu: int, tmp_path: Path) -> None:
        trainer = make(tmp_path)
        setattr(trainer, name, True)
        trainer.args._n_gpu = n_gpu
        with pytest.raises(
            ConfigError, match=r"(deepspeed|fsdp) must be off, got 'on'|n_gpu must be 1 a process, got 2"
        ):
            trainer._begin()

    def test_soft_labels(self, tmp_path: Path) -> None:
        rows = [{**row, "labels": [0.0, 1.0, 1.0]} for row in examples("classes")]
        trainer = make(tmp_path, train_dataset=rows, data_collator=collate_soft)
        with pytest.raises(DataError, match=r"labels must be integers, got 'torch.float32'. For several classes at a"):
            trainer.train()
        several = make(tmp_path, train_dataset=rows, data_collator=collate_soft, max_steps=3, objective=several_labels)
        several.train()

    @pytest.mark.parametrize("data", [None, []])
    def test_data_that_are_not_map_style(self, data: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"train_dataset must (be a map-style data set|hold examples)"):
            make(tmp_path, train_dataset=data).train()

    def test_batches_that_are_no_mapping(self, tmp_path: Path) -> None:
        trainer = make(tmp_path, objective=Tuples(), data_collator=lambda rows: tuple(pad(rows).values()))
        with pytest.raises(
            DataError, match="data_collator must return a mapping, the model's inputs by name, got 'tup"
        ):
            trainer.train()

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        name = "torchcrest.integrations.transformers"
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=rf'{name} needs more: pip install "torchcrest\[huggingface\]"'):
            importlib.import_module(name)


def collate_soft(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {**pad([{**row, "labels": 0} for row in rows]), "labels": torch.tensor([row["labels"] for row in rows])}


def several_labels(outputs: Tensor, data: Any) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs, data["labels"], reduction="none").mean(1)


class Tuples(Classification):
    def outputs(self, model: nn.Module, data: Any) -> Tensor:
        logits: Tensor = model(data[0], data[1]).logits
        return logits


class TestObjectiveFor:
    @pytest.mark.parametrize(
        ("build", "kind"),
        [
            (bert, Classification),
            (lambda: bert(num_labels=1), Regression),
            (lambda: bert(problem_type="regression"), Regression),
            (lambda: bert(BertForTokenClassification), TokenClassification),
            (gpt2, CausalLM),
            (llama, CausalLM),
            (TestTrainableParameters().lora, Classification),
        ],
    )
    def test_kinds(self, build: Callable[[], Any], kind: type) -> None:
        objective: Objective = objective_for(build())
        assert isinstance(objective, kind)

    def test_masked(self) -> None:
        assert objective_for(bert(BertForMaskedLM), 0.1) == TokenClassification(label_smoothing=0.1, head=True)

    def test_a_class_of_the_user_s(self) -> None:
        mine = type("Mine", (BertForSequenceClassification,), {})
        assert isinstance(objective_for(bert(mine)), Classification)

    def test_refused(self) -> None:
        for model, match in (
            (nn.Linear(2, 2), "objective must be given for a model of another kind, got 'Linear'. Pass objective="),
            (bert(problem_type="multi_label_classification"), "objective must be given for several labels an example"),
            (bert(is_encoder_decoder=True), "objective must be given for models with encoder and decoder"),
        ):
            with pytest.raises(ConfigError, match=match):
                objective_for(model)


def test_default_settings_and_mixin(tmp_path: Path) -> None:
    class Mine(CrestMixin, Trainer):
        pass

    trainer = make(tmp_path, crest=None, kind=Mine, max_steps=3)
    trainer.train()
    assert trainer.crest.config == CrestConfig(batch_size=4)


# Two processes -----------------------------------------------------------------------------------------------


def distributed(rank: int, size: int, folder: Path) -> Any:
    """Train under accelerate; and again, from a checkpoint."""
    for name, value in (
        ("RANK", rank),
        ("LOCAL_RANK", rank),
        ("WORLD_SIZE", size),
        ("LOCAL_WORLD_SIZE", size),
        ("OMP_NUM_THREADS", 1),
    ):
        os.environ[name] = str(value)
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 5,
        "ddp_find_unused_parameters": False,
    }
    outcomes = []
    for checkpoint in (None, str(folder / "checkpoint-5")):
        trainer = make(folder, model=bert(), **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        outcomes.append(
            {
                "trace": trainer.trace,
                "parameters": parameters_of(trainer.model),
                "history": trainer.crest.history,
                "step": trainer.state.global_step,
                "wrapped": type(trainer.model_wrapped).__name__,
            }
        )
        dist.barrier()
    return outcomes


def test_two_processes(tmp_path: Path) -> None:
    ranks = launch(partial(distributed, folder=tmp_path / "run"), 2, tmp_path)
    for whole, resumed in ranks:
        assert whole["wrapped"] == "DistributedDataParallel"
        assert whole["step"] == 8
        assert resumed["trace"] == whole["trace"][10:]
        assert same(resumed["parameters"], whole["parameters"])
        assert resumed["history"] == whole["history"]
    (first, _), (second, _) = ranks
    assert same(first["parameters"], second["parameters"])
    assert first["history"] == second["history"]
    assert len(first["trace"]) == 16
    for (mine, _), (theirs, _) in zip(first["trace"], second["trace"], strict=True):
        assert not set(mine) & set(theirs)
    assert {path.name for path in (tmp_path / "run" / "checkpoint-5").glob("crest_*")} == {"crest_0.pt", "crest_1.pt"}
