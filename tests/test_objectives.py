from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcrest import Classification, ConfigError, DataError, Objective, Regression
from torchcrest.objectives import LossObjective, as_objective, call_model, split_target

X, Y = torch.arange(12.0).view(4, 3), torch.tensor([0, 2, 1, 2])
LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", ["image", "label"])


class TestBatches:
    @pytest.mark.parametrize(
        "data",
        [(X, Y), [X, Y], Pair(X, Y), {"input": X, "labels": Y}, {"input": X, "label": Y}, {"input": X, "y": Y}],
        ids=["tuple", "list", "named tuple", "labels", "label", "y"],
    )
    def test_batches_with_a_target(self, data: Any) -> None:
        model = nn.Linear(3, 3)
        objective = Classification()
        outputs = objective.outputs(model, data)
        assert torch.equal(outputs, model(X))
        assert torch.equal(objective.losses(LOGITS, data), F.cross_entropy(LOGITS, Y, reduction="none"))
        labels = objective.labels(data)
        assert labels is not None
        assert torch.equal(labels, Y)

    @pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
    def test_target_is_taken_out_of_a_mapping(self, key: str) -> None:
        inputs, target = split_target({"input_ids": X, key: Y})
        assert inputs.keys() == {"input_ids"}
        assert target is Y

    def test_several_inputs(self) -> None:
        class Two(nn.Module):
            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return a + 2 * b

        assert torch.equal(Classification().outputs(Two(), (X, X + 1, Y)), 3 * X + 2)
        assert torch.equal(Classification().outputs(Two(), {"b": X, "a": X + 1, "labels": Y}), 3 * X + 1)

    def test_outputs_with_logits(self) -> None:
        class Wrapped(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return SimpleNamespace(loss=None, logits=x * 2)

        assert torch.equal(Classification().outputs(Wrapped(), (X, Y)), X * 2)

    def test_outputs_by_name(self) -> None:
        class Named(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return {"loss": None, "logits": x * 2}

        assert torch.equal(Classification().outputs(Named(), (X, Y)), X * 2)

    @pytest.mark.parametrize("data", [X, (X,), "text", None, 3])
    def test_no_pair(self, data: Any) -> None:
        with pytest.raises(DataError, match=r"batch must be a tuple \(inputs, target\) or a mapping, got"):
            split_target(data)

    def test_no_target(self) -> None:
        with pytest.raises(DataError, match=r"batch must have one of the keys labels, .*, got \['a', 'b'\]"):
            split_target({"b": X, "a": Y})

    def test_model_that_returns_something_else(self) -> None:
        class Both(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return x, x

        with pytest.raises(DataError, match=r"model must return a tensor or something with logits, got 'tuple'"):
            call_model(Both(), (X,))


class TestClassification:
    def test_soft_targets(self) -> None:
        soft = torch.softmax(LOGITS.flip(0), 1)
        expected = -(soft * LOGITS.log_softmax(1)).sum(1)
        assert torch.allclose(Classification().losses(LOGITS, (X, soft)), expected)
        labels = Classification().labels((X, soft))
        assert labels is not None
        assert labels.tolist() == LOGITS.flip(0).argmax(1).tolist()

    @pytest.mark.parametrize("logits", [torch.float32, torch.float64])
    @pytest.mark.parametrize("soft", [torch.float32, torch.float64, torch.bfloat16])
    def test_soft_targets_of_other_precision(self, logits: torch.dtype, soft: torch.dtype) -> None:
        target = F.one_hot(Y, 3)
        losses = Classification().losses(LOGITS.to(logits), (X, target.to(soft)))
        assert torch.allclose(losses.float(), F.cross_entropy(LOGITS, Y, reduction="none"))

    def test_ignored_examples(self) -> None:
        y = torch.tensor([0, -100, 1, -100])
        losses = Classification().losses(LOGITS, (X, y))
        assert (losses == 0).tolist() == [False, True, False, True]
        assert torch.equal(Classification(ignore_index=2).losses(LOGITS, (X, Y)) == 0, Y == 2)

    def test_all_ignored(self) -> None:
        assert Classification().losses(LOGITS, (X, torch.full((4,), -100))).tolist() == [0.0] * 4

    def test_dense_targets(self) -> None:
        """[n, classes, T] against [n, T]: the mean over the positions that count."""
        outputs = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
        y = torch.tensor([[0, 1, -100, -100, 2], [-100] * 5])
        first = F.cross_entropy(outputs[0][:, [0, 1, 4]].T, torch.tensor([0, 1, 2]))
        losses = Classification().losses(outputs, (X, y))
        assert losses.tolist() == [pytest.approx(float(first)), 0.0]
        assert Classification().labels((X, y)) is None

    def test_dense_soft_targets(self) -> None:
        outputs = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
        soft = outputs.softmax(1)
        expected = -(soft * outputs.log_softmax(1)).sum(1).mean(1)
        assert torch.allclose(Classification().losses(outputs, (X, soft)), expected)
        assert Classification().labels((X, soft)) is None

    def test_label_smoothing(self) -> None:
        expected = F.cross_entropy(LOGITS, Y, reduction="none", label_smoothing=0.2)
        assert torch.equal(Classification(label_smoothing=0.2).losses(LOGITS, (X, Y)), expected)

    @pytest.mark.parametrize(
        ("outputs", "target", "match"),
        [
            (LOGITS, Y.tolist(), r"labels must be a tensor, got 'list'\. Let the collate function make one\."),
            (LOGITS[:, 0], Y, r"model must return logits \[n, classes\], got \(4,\)\. .* Regression\(\)"),
            (LOGITS, Y.float(), r"labels must be integers, got 'torch\.float32'\. Use labels\.long\(\)"),
            (LOGITS, X[:, :2], r"labels must be integers, got 'torch\.float32'"),
            (LOGITS, Y.unsqueeze(1), r"labels must have shape \(4,\), got \(4, 1\)\. One class an example\."),
            (LOGITS, Y[:3], r"labels must have shape \(4,\), got \(3,\)"),
            (LOGITS.view(4, 3, 1), Y, r"labels must have shape \(4, 1\), got \(4,\)"),
            (LOGITS, Y + 1, r"labels must lie in \[0, 3\), the model's 3 outputs, got 3\. Widen the model's output"),
            (LOGITS, Y - 1, r"labels must lie in \[0, 3\), the model's 3 outputs, got -1\."),
        ],
        ids=["list", "one output", "float", "float matrix", "column", "short", "dense", "too large", "negative"],
    )
    def test_refuses(self, outputs: Tensor, target: Any, match: str) -> None:
        with pytest.raises(DataError, match=match):
            Classification().losses(outputs, (X, target))


class TestRegression:
    def test_no_broadcasting(self) -> None:
        outputs, y = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 1.0, 1.0])
        assert Regression().losses(outputs, (X, y)).tolist() == [0.0, 1.0, 9.0]
        assert Regression().losses(outputs[:, 0], (X, y.unsqueeze(1))).tolist() == [0.0, 1.0, 9.0]

    def test_several_targets(self) -> None:
        expected = (LOGITS - X).square().mean(1)
        assert torch.allclose(Regression().losses(LOGITS, (X, X)), expected)

    def test_integer_targets_are_no_classes(self) -> None:
        assert Regression().labels((X, Y)) is None
        assert Regression().losses(torch.zeros(4), (X, Y)).tolist() == [0.0, 4.0, 1.0, 4.0]

    @pytest.mark.parametrize(("target", "got"), [(Y, r"\(4,\)"), ([1, 2], "'list'")], ids=["other size", "no tensor"])
    def test_refuses(self, target: Any, got: str) -> None:
        with pytest.raises(DataError, match=rf"targets must have as many entries as the outputs \(4, 3\), got {got}"):
            Regression().losses(LOGITS, (X, target))


class TestAsObjective:
    def test_default(self) -> None:
        assert as_objective(None) == Classification()

    @pytest.mark.parametrize("objective", [Classification(ignore_index=3), Regression()])
    def test_objectives_are_kept(self, objective: Objective) -> None:
        assert as_objective(objective) is objective

    def test_functions_are_wrapped(self) -> None:
        def loss(outputs: Tensor, data: Any) -> Tensor:
            result: Tensor = outputs.sum(1) + data[-1]
            return result

        objective = as_objective(loss)
        assert objective == LossObjective(loss)
        assert torch.equal(objective.losses(LOGITS, (X, Y)), LOGITS.sum(1) + Y)
        assert torch.equal(objective.outputs(nn.Identity(), (X, Y)), X)

    @pytest.mark.parametrize(
        ("target", "classes"),
        [(Y, Y.tolist()), (Y.int(), Y.tolist()), (Y.float(), None), (X, None), ("text", None)],
        ids=["int64", "int32", "float", "matrix", "no tensor"],
    )
    def test_integer_targets_of_a_function_are_classes(self, target: Any, classes: list[int] | None) -> None:
        labels = LossObjective(lambda outputs, _: outputs).labels((X, target))
        assert (None if labels is None else labels.tolist()) == classes

    @pytest.mark.parametrize(
        ("objective", "match"),
        [
            (Classification, r"objective must be an instance, got .*Write Classification\(\)\."),
            (nn.MSELoss, r"objective must be an instance, got .*Write MSELoss\(\)\."),
            ("mse", "objective must have outputs, losses and labels, or be a function .* got 'mse'"),
        ],
        ids=["our class", "a class", "text"],
    )
    def test_refuses(self, objective: Any, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            as_objective(objective)
