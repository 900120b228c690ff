from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from conftest import seeded
from torchcrest.quadratic import QuadraticModel, gradient_and_curvature, gradient_and_difference, relative_error

VARIANTS: list[Any] = ["rms", "signed", "unsmoothed", "first_order"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


class Small:
    """A net of 15 parameters in float64, its loss on nine points, and its Hessian by another route."""

    def __init__(self) -> None:
        self.net: nn.Module = seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)))
        self.net.double()
        self.x = torch.randn(9, 2, generator=generator(1), dtype=torch.float64)
        self.y = torch.randn(9, 1, generator=generator(2), dtype=torch.float64)
        self.parameters = list(self.net.parameters())

    def loss(self) -> Tensor:
        loss: Tensor = (self.net(self.x) - self.y).square().mean()
        return loss

    def gradient_at(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(self.of_flat(torch.cat([t.flatten() for t in tensors])), tensors)

    def of_flat(self, w: Tensor) -> Tensor:
        named, start = {}, 0
        for name, p in self.net.named_parameters():
            named[name] = w[start : start + p.numel()].view_as(p)
            start += p.numel()
        outputs = torch.func.functional_call(self.net, named, (self.x,))
        loss: Tensor = (outputs - self.y).square().mean()
        return loss

    def hessian(self) -> Tensor:
        hessian: Tensor = torch.func.hessian(self.of_flat)(flat(self.parameters))
        return hessian


class TestGradient:
    @pytest.mark.parametrize("second", [True, False])
    def test_equals_backward(self, second: bool) -> None:
        small = Small()
        gradient, _ = gradient_and_curvature(small.loss, small.parameters, generator() if second else None)
        small.loss().backward()
        for g, p in zip(gradient, small.parameters, strict=True):
            assert p.grad is not None
            assert torch.allclose(g, p.grad, rtol=1e-12)
            assert not g.requires_grad

    def test_without_generator_no_curvature(self) -> None:
        small = Small()
        assert gradient_and_curvature(small.loss, small.parameters, None)[1] == []

    @pytest.mark.parametrize("second", [True, False])
    def test_grad_is_untouched(self, second: bool) -> None:
        small = Small()
        for p in small.parameters[:2]:
            p.grad = torch.full_like(p, 7.0)
        gradient_and_curvature(small.loss, small.parameters, generator() if second else None)
        assert all((p.grad == 7).all() for p in small.parameters[:2] if p.grad is not None)
        assert small.parameters[2].grad is None
        assert small.parameters[0].grad is not None

    def test_works_under_no_grad(self) -> None:
        small = Small()
        expected = gradient_and_curvature(small.loss, small.parameters, generator())
        with torch.no_grad():
            got = gradient_and_curvature(small.loss, small.parameters, generator())
        assert all(torch.equal(a, b) for a, b in zip([*expected[0], *expected[1]], [*got[0], *got[1]], strict=True))

    def test_results_have_no_graph(self) -> None:
        small = Small()
        assert not any(h.requires_grad for h in gradient_and_curvature(small.loss, small.parameters, generator())[1])


class TestHutchinson:
    def test_diagonal_hessian_is_exact_with_one_probe(self) -> None:
        w, v = (torch.randn(n, generator=generator(n), dtype=torch.float64, requires_grad=True) for n in (5, 4))
        a, b = torch.arange(1.0, 6).double(), torch.tensor([-2.0, 0, 3, 1]).double()
        for seed in range(5):
            _, h = gradient_and_curvature(lambda: (a * w**2).sum() / 2 + (b * v**3).sum(), [w, v], generator(seed))
            assert torch.allclose(h[0], a, rtol=1e-14)
            assert torch.allclose(h[1], 6 * b * v.detach(), rtol=1e-14)

    def test_mean_over_all_signs_is_the_diagonal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        w = torch.randn(4, generator=generator(), dtype=torch.float64, requires_grad=True)
        matrix = torch.randint(-3, 4, (4, 4), generator=generator()).double()
        matrix = matrix + matrix.T
        probes = []
        for signs in itertools.product([0, 1], repeat=4):
            monkeypatch.setattr(torch, "randint", lambda *_, signs=signs, **__: torch.tensor(signs))
            probes.append(gradient_and_curvature(lambda: w @ matrix @ w / 2, [w], generator())[1][0])
        assert len({tuple(probe.tolist()) for probe in probes}) > 1
        assert torch.allclose(torch.stack(probes).mean(0), matrix.diagonal(), atol=1e-14)

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.hessian's own
    def test_converges_to_the_diagonal(self) -> None:
        """The variance of one probe is known: the sum of the squares beside the diagonal."""
        small = Small()
        hessian, probes = small.hessian(), 3000
        signs = generator()
        total = torch.zeros(len(hessian), dtype=torch.float64)
        for _ in range(probes):
            total += flat(gradient_and_curvature(small.loss, small.parameters, signs)[1])
        diagonal = hessian.diagonal()
        deviation = ((hessian.square().sum(1) - diagonal.square()) / probes).sqrt()
        error = (total / probes - diagonal).abs()
        assert (error <= 5 * deviation).all()  # of 9 entries; one in two million seeds would fail
        assert (5 * deviation).norm() < 0.5 * diagonal.norm(), "the bound says nothing"

    def test_parameters_outside_the_graph_count_as_zero(self) -> None:
        used, unused = torch.tensor([2.0], requires_grad=True), torch.ones(3, 2, requires_grad=True)
        g, h = gradient_and_curvature(lambda: (used**2).sum(), [used, unused], generator())
        assert [t.tolist() for t in (g[0], h[0])] == [[4.0], [2.0]]
        assert torch.equal(g[1], torch.zeros(3, 2))
        assert torch.equal(h[1], torch.zeros(3, 2))

    def test_loss_linear_in_all_parameters(self) -> None:
        w = torch.tensor([1.0, 2.0], requires_grad=True)
        g, h = gradient_and_curvature(lambda: (3 * w).sum(), [w], generator())
        assert g[0].tolist() == [3.0, 3.0]
        assert h[0].tolist() == [0.0, 0.0]

    def test_loss_linear_in_some_parameters(self) -> None:
        w, v = torch.tensor([1.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
        _, h = gradient_and_curvature(lambda: (3 * w + v**2).sum(), [w, v], generator())
        assert [t.tolist() for t in h] == [[0.0], [2.0]]

    def test_signs_are_those_of_the_generator(self) -> None:
        small = Small()
        probes = [flat(gradient_and_curvature(small.loss, small.parameters, generator(s))[1]) for s in (0, 0, 1)]
        assert torch.equal(probes[0], probes[1])
        assert not torch.equal(probes[0], probes[2])


class TestDifference:
    def test_exact_on_a_quadratic(self) -> None:
        """Up to rounding, u / eps = 4e-11 of the gradient."""
        w, v = (torch.randn(n, generator=generator(n), dtype=torch.float64, requires_grad=True) for n in (5, 4))
        matrix = torch.randn(9, 9, generator=generator(), dtype=torch.float64)

        def loss_at(tensors: Sequence[Tensor]) -> Tensor:
            joined = torch.cat(list(tensors))
            loss: Tensor = joined @ matrix @ joined + joined.sum()
            return loss

        for seed in range(5):
            exact = gradient_and_curvature(lambda: loss_at([w, v]), [w, v], generator(seed))
            found = gradient_and_difference(lambda at: torch.autograd.grad(loss_at(at), at), [w, v], generator(seed))
            for a, b in zip([*exact[0], *exact[1]], [*found[0], *found[1]], strict=True):
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)

    def test_second_order_on_a_net(self) -> None:
        """eps is 6e-6 (1 + ||w||) / ||z||, of which the error has the square, about 1e-11, and rounding u / eps."""
        small = Small()
        exact = gradient_and_curvature(small.loss, small.parameters, generator())
        found = gradient_and_difference(small.gradient_at, small.parameters, generator())
        for a, b in zip([*exact[0], *exact[1]], [*found[0], *found[1]], strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)

    def test_single_precision(self) -> None:
        """u^(2/3) = 2e-5 of each, times a constant of the net."""
        small = Small()
        exact = gradient_and_curvature(small.loss, small.parameters, generator())
        small.x, small.y = small.x.float(), small.y.float()
        small.net.float()
        found = gradient_and_difference(small.gradient_at, small.parameters, generator())
        for a, b in zip([*exact[0], *exact[1]], [*found[0], *found[1]], strict=True):
            assert b.dtype == torch.float32
            assert torch.allclose(a, b.double(), rtol=1e-3, atol=1e-3)

    def test_evaluates_twice_at_equal_steps(self) -> None:
        w, v = torch.tensor([3.0, 0.0], requires_grad=True), torch.tensor([[4.0], [0.0]], requires_grad=True)
        seen: list[Tensor] = []

        def gradient_at(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            seen.append(flat(tensors))
            return [2 * t for t in tensors]

        gradient_and_difference(gradient_at, [w, v], generator())
        step = torch.finfo(torch.float32).eps ** (1 / 3) * (1 + 5) / 2
        ahead, behind = seen
        assert torch.allclose(((ahead - behind) / 2).abs(), torch.full((4,), step), rtol=1e-4)
        assert torch.allclose((ahead + behind) / 2, flat([w, v]), atol=1e-6)
        assert torch.unique((ahead - behind).sign()).tolist() == [-1, 1]

    def test_leaves_no_trace(self) -> None:
        small = Small()
        small.parameters[0].grad = torch.full_like(small.parameters[0], 7.0)
        before = flat(small.parameters).clone()
        gradient, products = gradient_and_difference(small.gradient_at, small.parameters, generator())
        assert torch.equal(flat(small.parameters), before)
        assert (small.parameters[0].grad == 7).all()
        assert all(p.grad is None for p in small.parameters[1:])
        assert not any(t.requires_grad for t in (*gradient, *products))

    def test_works_under_no_grad(self) -> None:
        small = Small()
        expected = gradient_and_difference(small.gradient_at, small.parameters, generator())
        with torch.no_grad():
            got = gradient_and_difference(small.gradient_at, small.parameters, generator())
        assert all(torch.equal(a, b) for a, b in zip([*expected[0], *expected[1]], [*got[0], *got[1]], strict=True))


def fed(curvature: Any, rounds: Sequence[tuple[Tensor, Tensor]], beta1: float = 0.9, beta2: float = 0.999) -> Any:
    model = QuadraticModel(curvature, beta1, beta2)
    for g, h in rounds:
        model.update([g], [] if curvature == "first_order" else [h])
    return model


def rounds_of(n: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(size, generator=generator(k)), torch.randn(size, generator=generator(99 + k))) for k in range(n)
    ]


SMOOTHING: dict[str, Callable[[list[Tensor], float], Tensor]] = {
    "rms": lambda h, beta: reference.smoothed([x.double().square() for x in h], beta).sqrt(),
    "signed": lambda h, beta: reference.smoothed([x.double() for x in h], beta),
    "unsmoothed": lambda h, _: h[-1].double(),
    "first_order": lambda h, _: torch.zeros_like(h[-1]).double(),
}


class TestModel:
    def test_exact_where_the_hessian_is_diagonal(self) -> None:
        """F is the loss itself, one probe is enough, and the displacement is measured."""
        w = torch.randn(5, generator=generator(), requires_grad=True)
        a = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])

        def loss() -> Tensor:
            return (a * w**2 / 2 + w).sum() + 10

        model = QuadraticModel("signed", 0.9, 0.999)
        model.update(*gradient_and_curvature(loss, [w], generator()))
        model.anchor([w], loss().item())
        for seed in range(5):
            with torch.no_grad():
                w.add_(torch.randn(5, generator=generator(50 + seed)))
            assert model.predict([w]) == pytest.approx(loss().item(), rel=1e-6)

    @pytest.mark.parametrize("curvature", VARIANTS)
    def test_at_the_anchor_rho_is_exactly_zero(self, curvature: Any) -> None:
        model = fed(curvature, rounds_of(3))
        w = torch.randn(6, generator=generator(7))
        model.anchor([w], 0.1234567)
        assert model.predict([w.clone()]) == 0.1234567
        assert relative_error(model.predict([w]), 0.1234567) == 0

    @pytest.mark.parametrize("rounds", [1, 2, 7])
    @pytest.mark.parametrize("curvature", VARIANTS)
    def test_smoothing(self, curvature: Any, rounds: int) -> None:
        history = rounds_of(rounds)
        model = fed(curvature, history, 0.8, 0.95)
        beta1 = 0.0 if curvature == "unsmoothed" else 0.8
        gradient = reference.smoothed([g.double() for g, _ in history], beta1)
        diagonal = SMOOTHING[curvature]([h for _, h in history], 0.95)
        delta = torch.randn(6, generator=generator(5))
        model.anchor([torch.zeros(6)], 2.0)
        expected = reference.quadratic(2.0, gradient, diagonal, delta)
        assert model.predict([delta]) == pytest.approx(expected, rel=1e-5)
        assert model.gradient_norm() == pytest.approx(float(gradient.norm()), rel=1e-5)
        assert model.curvature_norm() == pytest.approx(float(diagonal.norm()), rel=1e-5)

    def test_hand_computed(self) -> None:
        """Eqs. 8 and 9 with beta1 = 1/2, beta2 = 3/4 on two rounds of one number."""
        model = fed(
            "rms", [(torch.tensor([1.0]), torch.tensor([-2.0])), (torch.tensor([4.0]), torch.tensor([4.0]))], 0.5, 0.75
        )
        # g = (1/4 * 1 + 1/2 * 4) / (3/4) = 3; H^2 = (3/16 * 4 + 1/4 * 16) / (7/16) = 76/7.
        assert model.gradient_norm() == pytest.approx(3.0)
        assert model.curvature_norm() == pytest.approx((76 / 7) ** 0.5)

    def test_before_any_update(self) -> None:
        model = QuadraticModel("rms", 0.9, 0.999)
        assert (model.gradient_norm(), model.curvature_norm()) == (0.0, 0.0)

    def test_several_tensors(self) -> None:
        model = QuadraticModel("signed", 0.0, 0.0)
        model.update([torch.ones(2, 2), torch.full((3,), 2.0)], [torch.ones(2, 2), torch.full((3,), -1.0)])
        model.anchor([torch.zeros(2, 2), torch.ones(3)], 1.0)
        # 4 (1 * 2 + 1/2 * 1 * 4) + 3 (2 * 1 - 1/2 * 1)
        assert model.predict([torch.full((2, 2), 2.0), torch.full((3,), 2.0)]) == pytest.approx(1 + 16 + 4.5)

    def test_arguments_are_left_alone_and_not_kept(self) -> None:
        g, h, w = torch.ones(2), torch.full((2,), 2.0), torch.zeros(2)
        model = fed("rms", [(g, h)])
        model.anchor([w], 0.0)
        assert (g.tolist(), h.tolist()) == ([1, 1], [2, 2])
        w += 1
        g += 9
        assert model.predict([w]) == pytest.approx(2 * (1 + 0.5 * 2))

    def test_low_precision_parameters(self) -> None:
        model = QuadraticModel("signed", 0.0, 0.0)
        model.update([torch.ones(3, dtype=torch.bfloat16)], [torch.ones(3, dtype=torch.bfloat16)])
        model.anchor([torch.zeros(3, dtype=torch.bfloat16)], 0.0)
        assert model.predict([torch.ones(3, dtype=torch.bfloat16)]) == pytest.approx(4.5)

    @pytest.mark.parametrize("curvature", VARIANTS)
    def test_restart_forgets(self, curvature: Any) -> None:
        model = fed(curvature, rounds_of(4, size=6))
        model.restart()
        (g, h) = rounds_of(1, size=3)[0]
        model.update([g], [] if curvature == "first_order" else [h])
        assert model.updates == 1
        assert model.gradient_norm() == pytest.approx(float(g.norm()))

    @pytest.mark.parametrize("curvature", VARIANTS)
    def test_state_round_trip(self, curvature: Any) -> None:
        w = torch.randn(6, generator=generator(7))
        model = fed(curvature, rounds_of(3))
        model.anchor([w], 0.5)
        other = QuadraticModel(curvature, 0.9, 0.999)
        other.load_state_dict(model.state_dict(), [w])
        g, h = rounds_of(5)[-1]
        for m in (model, other):
            m.update([g], [] if curvature == "first_order" else [h])
        assert other.predict([w + 1]) == model.predict([w + 1])
        assert other.updates == model.updates == 4

    def test_state_of_an_unused_model(self) -> None:
        model = QuadraticModel("rms", 0.9, 0.999)
        model.load_state_dict(QuadraticModel("rms", 0.9, 0.999).state_dict(), [torch.zeros(2)])
        assert model.updates == 0

    def test_a_state_stays_as_it_was(self) -> None:
        model = fed("signed", rounds_of(1))
        state = model.state_dict()
        before = str(state)
        model.update(*([t] for t in rounds_of(2)[1]))
        assert str(state) == before


@pytest.mark.parametrize(
    ("predicted", "measured", "expected"),
    [
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 0.0),
        (3.0, 2.0, 0.5),
        (1.0, 2.0, 0.5),
        (1.0, 0.0, torch.inf),
        (-1.0, -2.0, 0.5),
        (torch.tensor(3.0), torch.tensor(2.0), 0.5),
    ],
)
def test_relative_error(predicted: Any, measured: Any, expected: float) -> None:
    assert relative_error(predicted, measured) == expected
