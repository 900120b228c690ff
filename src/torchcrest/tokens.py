"""Objectives with a class at each token: token classification, masked and causal language models.

Proxy gradients are of one width whatever the padding, and of a width that can be paid for whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcrest.errors import ConfigError, DataError, must
from torchcrest.objectives import call_model, refuse_outside, split_target, without_padding

__all__ = ["CausalLM", "TokenClassification", "sketch"]


@dataclass(frozen=True)
class TokenClassification:
    """Cross-entropy over classes at each token; an example's loss is the mean over its tokens that count.

    Batches are mappings with labels ``[n, tokens]``, outputs are ``[n, tokens, classes]``. An example's proxy
    gradient is the sum over its tokens of the derivative of its loss with respect to their outputs: ``[classes]``,
    or, where there are more than ``proxy_dim`` classes, a CountSketch of it: each class is added, with a random
    sign, to one of ``proxy_dim`` buckets, all of one size. Distances are kept in expectation (Charikar, Chen,
    Farach-Colton, 2002; Weinberger et al., 2009).

    Attributes:
        ignore_index: label of tokens that don't count; an example without any other has loss 0.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        proxy_dim: most numbers in a proxy gradient.
        seed: of buckets and signs.
        rows: tokens whose derivatives are held at a time, ``[rows, classes]`` each.
        head: have pools' outputs computed for so many tokens at a time too, by the model's output embeddings
            (``get_output_embeddings()``); else they are held for as many examples as are forwarded together. Only
            for models that return what their output embeddings give; others are refused.

    Raises:
        ConfigError: ``proxy_dim`` or ``rows`` is no whole number of at least 1.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    proxy_dim: int = 512
    seed: int = 0
    rows: int = 1024
    head: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that cannot work."""
        sizes = {"proxy_dim": self.proxy_dim, "rows": self.rows}
        wrong = {name: size for name, size in sizes.items() if not isinstance(size, int) or size < 1}
        if wrong:
            do = "Leave it out for the default."
            raise ConfigError([must(name, "be a whole number of at least 1", size, do) for name, size in wrong.items()])

    def outputs(self, model: nn.Module, data: Any) -> Tensor:
        """Return the logits ``[n, tokens, classes]``."""
        return call_model(model, split_target(data)[0])

    def losses(self, outputs: Tensor, data: Any) -> Tensor:
        """Return the mean cross-entropy of each example's tokens that count, ``[n]``.

        Raises:
            DataError: labels are no integers or out of range, or do not fit the outputs' shape.
        """
        targets = self._targets(data, outputs.shape[:-1])
        losses = self._each(outputs.flatten(0, 1), targets.flatten()).view(targets.shape)
        return losses.sum(1) / self._counts(targets)

    def labels(self, data: Any) -> Tensor | None:
        """Return None: there is no class an example."""
        return None

    def trimmed(self, data: Any) -> Any:
        """Cut off padding by ``attention_mask``, of the labels too."""
        return without_padding(data, targets=True)

    def proxies(self, model: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
        """Return losses ``[n]`` and proxy gradients ``[n, min(classes, proxy_dim)]``.

        Raises:
            DataError: as from :meth:`losses`.
            ConfigError: ``head`` is asked for, and the model's outputs are not those of its output embeddings.
        """
        inputs = split_target(data)[0]
        if not self.head:
            logits = call_model(model, inputs)
            return self._reduced(logits, lambda chosen: chosen, self._targets(data, logits.shape[:-1]))

        def reduce(head: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
            return self._reduced(hidden, head, self._targets(data, hidden.shape[:-1]))

        return _at_the_head(model, inputs, reduce, f"{type(self).__name__}(head=False)")

    def _targets(self, data: Any, shape: torch.Size) -> Tensor:
        """Return the class that each token's outputs are to predict, ``[n, tokens]``."""
        labels = split_target(data)[1]
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(must("labels", "be a tensor of integers", got, "One class a token; -100: none."))
        if labels.shape != shape or labels.dim() != 2:
            want = f"have the shape of the tokens that the model has outputs for, {tuple(shape)}"
            do = "It must return [n, tokens, classes]; pass an objective of your own if it does otherwise."
            raise DataError(must("labels", want, tuple(labels.shape), do))
        return labels

    def _each(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return each token's loss; 0 where it doesn't count."""
        do = "Widen the model's output or mend the labels."
        refuse_outside(targets, logits.shape[-1], self.ignore_index, do)
        smoothing = self.label_smoothing
        return F.cross_entropy(
            _exact(logits), targets, reduction="none", ignore_index=self.ignore_index, label_smoothing=smoothing
        )

    def _counts(self, targets: Tensor) -> Tensor:
        return (targets != self.ignore_index).sum(1).clamp(min=1)

    def _reduced(self, values: Tensor, logits_of: Callable[[Tensor], Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Go over the tokens that count, ``rows`` at a time: losses and proxy gradients of the examples.

        Args:
            values: ``[n, tokens, ...]`` of which logits are made.
            logits_of: makes logits ``[k, classes]`` of the values ``[k, ...]`` of some tokens.
            targets: ``[n, tokens]``.
        """
        values, flat = values.flatten(0, 1), targets.flatten()
        losses, gradients = torch.zeros(()), torch.zeros(())
        for chosen in (flat != self.ignore_index).nonzero()[:, 0].split(self.rows):
            logits = _exact(logits_of(values[chosen]).detach()).requires_grad_()
            with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
                each = self._each(logits, flat[chosen])
                (derivatives,) = torch.autograd.grad(each.sum(), logits)
                if not losses.dim():
                    losses = each.new_zeros(flat.shape)
                losses[chosen] = each.detach()
                # A product, for index_add_ adds up in no set order on a GPU.
                members = F.one_hot(chosen // targets.shape[1], len(targets)).T.to(each.dtype)
                gradients = gradients.to(each) + members @ self._projected(derivatives)
        counts = self._counts(targets)
        return losses.view(targets.shape).sum(1) / counts, gradients / counts[:, None]

    def _projected(self, gradients: Tensor) -> Tensor:
        """Return the sketches ``[k, proxy_dim]`` of gradients ``[k, classes]``; few classes stay as they are."""
        classes = gradients.shape[1]
        if classes <= self.proxy_dim:
            return gradients
        order, signs = sketch(classes, self.seed, gradients.device)
        padded = F.pad(gradients[:, order] * signs, (0, -classes % self.proxy_dim))
        return padded.view(len(gradients), -1, self.proxy_dim).sum(1)


@dataclass(frozen=True)
class CausalLM(TokenClassification):
    """Next-token cross-entropy; an example's loss is the mean over its tokens that count.

    As :class:`TokenClassification` but for the shift: the outputs at a token are to predict the label of the next
    one, as the model's own loss has it. Batches have labels ``[n, tokens]`` beside ``input_ids``, not shifted.
    """

    head: bool = True

    def _targets(self, data: Any, shape: torch.Size) -> Tensor:
        return F.pad(super()._targets(data, shape)[:, 1:], (0, 1), value=self.ignore_index)


@lru_cache(maxsize=8)
def sketch(classes: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the order ``[classes]`` in which classes are dealt out to the buckets, and signs ``[classes]``."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(classes, generator=generator)
    signs = torch.randint(2, (classes,), generator=generator).float() * 2 - 1
    return order.to(device), signs.to(device)


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _at_the_head(
    model: nn.Module,
    inputs: Mapping[str, Any],
    use: Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor]],
    otherwise: str,
) -> tuple[Tensor, Tensor]:
    """Run the model up to its output embeddings; return what use makes of these and of their input ``[n, tokens, h]``.

    They run inside the model's forward, with its autocast and gathered parameters; the rest of it sees the outputs
    of one token. That these come out as they are shows that nothing else is done to them.

    Raises:
        ConfigError: the model has no such layer, does not call it once, or changes what it returns.
    """
    model = getattr(model, "_orig_mod", model)  # compiled code may not call hooks
    head = getattr(model, "get_output_embeddings", lambda: None)()
    want = "return what its output embeddings give, unchanged"
    if head is None or hasattr(head, "unshard"):
        got = "none" if head is None else "a layer that is sharded by itself"
        raise ConfigError(must("model", want, got, f"Use {otherwise}."))
    found: list[tuple[Tensor, Tensor]] = []
    given: list[Tensor] = []
    inside = False

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal inside
        if inside or not args or args[0].dim() != 3:
            return None
        inside = True
        try:
            found.append(use(head, args[0]))
        finally:
            inside = False
        return (args[0][:, :1], *args[1:])

    def leave(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not inside:
            given.append(output)

    handles = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave)]
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            logits = call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != 1 or len(given) != 1 or not (logits is given[0] or torch.equal(logits.float(), given[0].float())):
        got = "others" if len(found) == len(given) == 1 else f"{len(given)} calls of them"
        raise ConfigError(must("model", want, got, f"Use {otherwise}, which holds the outputs of what is forwarded."))
    return found[0]
