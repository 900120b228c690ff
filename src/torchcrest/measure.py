"""Look at a model without leaving a trace: losses, proxy gradients, curvature (steps 2 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchcrest import quadratic, tree
from torchcrest.config import CrestConfig, CurvatureProduct, MeasureMode
from torchcrest.distributed import reshard, unwrapped, whole_parameters
from torchcrest.errors import ConfigError, DataError, must
from torchcrest.objectives import Objective, Projecting, trimmed
from torchcrest.types import Coreset, Pool

__all__ = [
    "How",
    "Meter",
    "device_of",
    "forked",
    "how_of",
    "labels_in",
    "last_layers",
    "observing",
    "pool_of",
    "synchronize",
]

Part = TypeVar("Part")

# Private in torch, but there is no public name for "all batch normalisations".
_BatchNorm = nn.modules.batchnorm._BatchNorm


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU for a model without any."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock means something. Nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def forked(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Restore the CPU's random state, and that of the device, afterwards.

    Args:
        device: the model's.
        seed: of what is drawn inside; None: it goes on from the user's state.
    """
    devices = [] if device.type in ("cpu", "mps") else [device]
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            if seed is not None:
                # torch.manual_seed would seed the other accelerators too, which nobody restores.
                torch.default_generator.manual_seed(seed)
                if device.type != "cpu":
                    torch.get_device_module(device).manual_seed(seed)
            yield
    finally:
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def observing(model: nn.Module, mode: MeasureMode = "eval") -> Iterator[None]:
    """Put the model into a measuring mode; afterwards flags, buffers and random states are as before.

    ``eval`` clears every module's training flag. ``batch_statistics`` does too, but batch normalisation
    that was training normalises by its batch, without updating its running statistics; frozen layers
    stay frozen.
    """
    training = {module: module.training for module in model.modules()}
    tracking: dict[nn.Module, bool] = {}
    try:
        for module, was_training in training.items():
            if mode == "batch_statistics" and was_training and isinstance(module, _BatchNorm):
                tracking[module] = module.track_running_stats
                module.track_running_stats = False
            elif was_training:
                module.training = False
        # Under autocast around a whole loop, weights cast without gradients must not reach the training step.
        torch.clear_autocast_cache()
        with forked(device_of(model)):  # a model that draws even in evaluation mode would move the user's state
            yield
    finally:
        torch.clear_autocast_cache()
        for module, was_training in training.items():
            if module.training != was_training:
                module.training = was_training
        for module, tracked in tracking.items():
            module.track_running_stats = tracked  # type: ignore[assignment]


def last_layers(model: nn.Module, count: int | None) -> list[nn.Parameter]:
    """Return the trainable parameters of a model's last layers.

    Args:
        model: the model; its layers are the modules that own trainable parameters, in order of registration.
        count: how many layers; None, or no fewer than there are: all trainable parameters.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if count is None:
        return trainable
    owned = [{id(p) for p in module.parameters(recurse=False) if p.requires_grad} for module in model.modules()]
    covered = set().union(*[layer for layer in owned if layer][-count:])
    return [p for p in trainable if id(p) in covered]


@dataclass(frozen=True)
class How:
    """How a pool is forwarded.

    Attributes:
        mode: evaluation mode, or batch statistics where batch normalisation is in training.
        dtype: of the forward pass, through autocast; None: as the model would be called.
        channels_last: memory format of images.
        together: examples in a forward pass; None: all.
        resolution: side of the inputs, as a share of what it is.
    """

    mode: MeasureMode = "eval"
    dtype: torch.dtype | None = None
    channels_last: bool = False
    together: int | None = None
    resolution: float = 1.0


def how_of(config: CrestConfig, device: torch.device) -> How:
    """Return how pools are forwarded on a device."""
    together = config.measured_together or (config.batch_size if device.type == "cpu" else None)
    dtype = None if config.measure_dtype == "model" else getattr(torch, config.measure_dtype)
    return How(config.measure_mode, dtype, config.channels_last, together)


class Meter:
    """Measures pools and differentiates coresets of one model, and counts the examples it forwards.

    Attributes:
        forwarded: examples that went through the model in measurements so far.
        differentiated: and those whose gradient and curvature was taken.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        how: How,
        *,
        whole_layer: bool = False,
        last_layer: nn.Linear | None = None,
        layers: int | None = None,
        product: CurvatureProduct = "double_backward",
    ) -> None:
        if whole_layer and isinstance(objective, Projecting):
            do = "The objective gives proxy gradients of its own."
            raise ConfigError(must("proxy", "be 'outputs' with this objective", "last_layer", do))
        self.model = unwrapped(model)
        self.objective = objective
        self.how = how
        self.forwarded = 0
        self.differentiated = 0
        self._whole_layer = whole_layer
        self._last_layer = last_layer
        self._layers = layers
        self._product: CurvatureProduct = product

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters that are modelled, sharded ones as the optimizer knows them."""
        return last_layers(reshard(self.model), self._layers)

    def measure(self, indices: Tensor, data: Any) -> Pool:
        """Forward a pool once and return its losses, proxy gradients and labels.

        Raises:
            DataError: outputs or losses do not have an entry an example.
        """
        # Before the move, so that a device need not be waited for.
        data = tree.move(trimmed(self.objective, data), device_of(self.model))
        if isinstance(self.objective, Projecting):
            losses, gradients = self._proxies(self.objective, data, len(indices))
            return Pool(indices, data, losses, gradients, labels=labels_in(self.objective, data, len(indices)))
        outputs, features, bias = self.forward(data, len(indices))
        return replace(pool_of(self.objective, indices, data, outputs), features=features, bias=bias)

    def _proxies(self, objective: Projecting, data: Any, examples: int) -> tuple[Tensor, Tensor]:
        """Return losses ``[examples]`` and proxy gradients ``[examples, d]`` as the objective gives them."""

        def call(part: Any, size: int) -> tuple[Tensor, Tensor]:
            losses, gradients = objective.proxies(self.model, part)
            got = tuple(losses.shape), tuple(gradients.shape)
            if got[0] != (size,) or len(got[1]) != 2 or got[1][0] != size:
                do = "Check the objective's proxies()."
                raise DataError(must("losses and proxy gradients", f"have shapes ({size},) and ({size}, d)", got, do))
            return losses.detach(), gradients.detach().float()

        losses, gradients = zip(*self._in_parts(data, examples, call), strict=True)
        return torch.cat(losses), torch.cat(gradients)

    def forward(self, data: Any, examples: int) -> tuple[Tensor, Tensor | None, bool]:
        """Return the outputs ``[examples, ...]`` in float32 or float64, without a graph.

        With them come the last layer's inputs ``[examples, k]``, where the whole layer is asked for, and
        whether that layer has a bias.

        Args:
            data: on the model's device; it stays as it is.
            examples: how many it holds.

        Raises:
            DataError: the outputs do not have an entry an example.
        """
        features: list[Tensor] = []
        bias = True

        def call(part: Any, size: int) -> Tensor:
            nonlocal bias
            with ExitStack() as hooks:
                caught = hooks.enter_context(self._catch_features()) if self._whole_layer else []
                outputs = self._call(part)
            if outputs.dim() == 0 or len(outputs) != size:
                want, got = f"have {size} entries, one an example", tuple(outputs.shape)
                raise DataError(must("model outputs", want, got, "Check the objective's outputs()."))
            if self._whole_layer:
                found, bias = self._features(caught, outputs)
                features.append(found)
            return outputs

        outputs = self._in_parts(data, examples, call)
        shapes = sorted({tuple(part.shape[1:]) for part in outputs})
        if len(shapes) > 1:
            want = "have one shape an example, whatever the part of a pool that is forwarded"
            do = "Give the objective proxies(), or measured_together = pool_size and no trimmed()."
            raise DataError(must("model outputs", want, shapes, do))
        whole = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        whole = whole if whole.dtype == torch.float64 else whole.float()
        return whole.detach(), torch.cat(features) if features else None, bias

    def _in_parts(self, data: Any, examples: int, call: Callable[[Any, int], Part]) -> list[Part]:
        """Call something with each part of a pool that is forwarded together, in the measuring mode, without a graph.

        Args:
            data: on the model's device; it stays as it is.
            examples: how many it holds.
            call: takes a part, and how many examples it holds.
        """
        # The statistics of batch normalisation are those of all that is forwarded together.
        together = examples if self.how.mode == "batch_statistics" else self.how.together or examples
        results: list[Part] = []
        with observing(self.model, self.how.mode), torch.no_grad(), self._precision():
            for start in range(0, examples, together):
                size = min(together, examples - start)
                part = tree.part(data, start, start + size)
                if size < examples:
                    part = trimmed(self.objective, part)
                # A copy, for a model may change its input in place; the pool is still to be trained on.
                results.append(call(self._prepared(part), size))
            reshard(self.model)
        self.forwarded += examples
        return results

    def _call(self, data: Any) -> Tensor:
        """Run the model, as the objective has it."""
        try:
            return self.objective.outputs(self.model, data)
        except RuntimeError as error:
            if self.how.resolution == 1:
                raise
            want = "be another than 'resolution' for a model that fails on smaller inputs"
            do = f"It takes inputs of one size, perhaps: {str(error).splitlines()[0]}"
            raise ConfigError(must("proxy_source", want, "resolution", do)) from error

    def _prepared(self, data: Any) -> Any:
        """Return a copy of inputs, in the resolution and memory format that are measured in."""
        how = self.how
        shrunk = how.resolution == 1

        def prepare(leaf: Tensor) -> Tensor:
            nonlocal shrunk
            if how.resolution < 1 and leaf.is_floating_point() and leaf.dim() in (3, 4, 5):
                size = [max(1, round(side * how.resolution)) for side in leaf.shape[2:]]
                leaf, shrunk = F.interpolate(leaf, size=size, mode="area"), True
            if how.channels_last and leaf.is_floating_point() and leaf.dim() == 4:
                return leaf.clone(memory_format=torch.channels_last)
            return leaf.clone()

        prepared = tree.apply(data, prepare)
        if not shrunk:
            want = "be another than 'resolution' where no input has sides to shrink"
            do = "Inputs must be [n, channels, length] or [n, channels, height, width] in floating point."
            raise ConfigError(must("proxy_source", want, "resolution", do))
        return prepared

    def _precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the model is called."""
        if self.how.dtype is None:
            return nullcontext()
        kind = device_of(self.model).type
        # Nothing is cast where all is float32.
        return torch.autocast(kind, dtype=self.how.dtype, enabled=self.how.dtype != torch.float32)

    def differentiate(self, coreset: Coreset, generator: torch.Generator | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return gradient and Hutchinson estimate of a coreset's weighted mean loss, whole, in the same mode.

        Runs the eager module; where its gradient is differentiated, with the attention that has a second derivative.

        Raises:
            ConfigError: the loss does not depend on the layers, or has no second derivative where one is needed.
        """
        model = getattr(self.model, "_orig_mod", self.model)
        modules = list(model.modules())
        data = trimmed(self.objective, coreset.data)  # some of a coreset's examples may be shorter than all

        def loss() -> Tensor:
            with observing(model, self.how.mode):  # the same random numbers each time
                outputs = self.objective.outputs(model, tree.clone(data))
                outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
                losses = self.objective.losses(outputs, data)
            self.differentiated += len(coreset.weights)
            if self._layers is not None and not losses.requires_grad:
                want = "reach a layer that the loss depends on"
                do = "Layers count in the order of registration; use more, or None for all."
                raise ConfigError(must("curvature_layers", want, self._layers, do))
            return (losses * coreset.weights).mean()

        second = generator is not None and self._product == "double_backward"
        with observing(model, self.how.mode), ExitStack() as stack:
            # Neither fused attention, nor compiled modules, nor cuDNN's recurrent layers have a second derivative.
            if second:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in modules):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if any(isinstance(m, nn.RNNBase) for m in modules):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(whole_parameters(model))
            parameters = last_layers(model, self._layers)
            function = _Function(model, loss, parameters)
            try:
                if generator is None or second:
                    result = quadratic.gradient_and_curvature(function.value, parameters, generator)
                else:
                    # In low precision the difference of two gradients is noise.
                    stack.enter_context(torch.autocast(device_of(model).type, enabled=False))
                    result = quadratic.gradient_and_difference(function.gradient, parameters, generator)
            except RuntimeError as error:
                if not second or "derivative" not in str(error):
                    raise
                want = "be 'first_order' where the loss or the model has no second derivative"
                do = "Set it in CrestConfig, or curvature_product='finite_difference'."
                raise ConfigError(must("curvature", want, str(error).splitlines()[0], do)) from error
        return result

    @contextmanager
    def _catch_features(self) -> Iterator[list[tuple[nn.Linear, Tensor]]]:
        """Catch the inputs of the last linear layer, or of all where it is not yet known which is last."""
        caught: list[tuple[nn.Linear, Tensor]] = []

        def catch(module: nn.Module, inputs: Sequence[Any], named: dict[str, Any], _: Any) -> None:
            assert isinstance(module, nn.Linear)
            caught.append((module, next(iter((*inputs, *named.values()))).detach()))

        linears = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        modules = [self._last_layer] if self._last_layer else linears
        handles = [m.register_forward_hook(catch, with_kwargs=True) for m in modules]
        try:
            yield caught
        finally:
            for handle in handles:
                handle.remove()

    def _features(self, caught: list[tuple[nn.Linear, Tensor]], outputs: Tensor) -> tuple[Tensor, bool]:
        """Return the last layer's inputs ``[r, h]`` and whether it has a bias."""
        if (
            not caught
            or outputs.dim() != 2
            or caught[-1][1].dim() != 2
            or caught[-1][0].out_features != outputs.shape[1]
        ):
            raise ConfigError(
                must(
                    "proxy",
                    "be 'outputs' for this model: its outputs are not those of a linear layer on [n, features]",
                    "last_layer",
                    "Or name the layer: Crest(..., last_layer=model.head).",
                )
            )
        self._last_layer, features = caught[-1]
        return features.float(), self._last_layer.bias is not None


class _Function(nn.Module):
    """A loss as a function of some of a model's parameters; the other ones are constants, without a graph.

    The model holds what stands in for its parameters only while it runs, and after an error has its own too.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.of = list(parameters)

    def value(self) -> Tensor:
        """Return the loss, with a graph to the parameters themselves."""
        loss: Tensor = self._run(self.of, False)
        return loss

    def gradient(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradient at tensors in the parameters' stead."""
        gradients: tuple[Tensor, ...] = self._run(tensors, True)
        return gradients

    def forward(self, tensors: Sequence[Tensor] | None = None) -> Any:
        """Return the loss, or its gradient: checkpointed activations run the model again to go backward."""
        return self.loss() if tensors is None else torch.autograd.grad(self.loss(), tensors, materialize_grads=True)

    def _run(self, tensors: Sequence[Tensor], gradient: bool) -> Any:
        given = {id(p): tensor for p, tensor in zip(self.of, tensors, strict=True)}
        stand_ins = {
            name: given.get(id(p), p.detach())
            for name, p in self.named_parameters()
            if p.requires_grad and given.get(id(p)) is not p
        }
        inputs = (tensors,) if gradient else ()
        return torch.func.functional_call(self, stand_ins, inputs) if stand_ins else self(*inputs)


def pool_of(objective: Objective, indices: Tensor, data: Any, outputs: Tensor) -> Pool:
    """Return the pool that has these outputs ``[r, ...]``: its losses, proxy gradients and labels.

    The proxy gradient is the derivative of an example's loss with respect to the model's outputs:
    for cross-entropy softmax - onehot, and the same line for any other differentiable loss.

    Raises:
        DataError: losses or labels do not have an entry an example.
    """
    r = len(indices)
    with torch.enable_grad():
        outputs = outputs.detach().requires_grad_()
        losses = objective.losses(outputs, data)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (r,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise DataError(must("losses", f"have shape ({r},), one an example", got, 'Use reduction="none".'))
        (gradients,) = torch.autograd.grad(losses.sum(), outputs)
    flat = gradients.flatten(1).float()
    labels = labels_in(objective, data, r)
    return Pool(indices, data, losses.detach(), flat, labels=labels, outputs=outputs.detach())


def labels_in(objective: Objective, data: Any, examples: int) -> Tensor | None:
    """Return the classes ``[examples]`` of a batch, None where it has none, or refuse other shapes."""
    labels = objective.labels(data)
    if labels is not None and tuple(labels.shape) != (examples,):
        do = "Return None from labels() where there is no class an example."
        raise DataError(must("class labels", f"have shape ({examples},)", tuple(labels.shape), do))
    return labels
