"""The errors of torchcrest, and the form of their messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NonFiniteLossError",
    "RankError",
    "TorchcrestError",
    "must",
]


class TorchcrestError(Exception):
    """Any error that torchcrest raises on purpose."""


class ConfigError(TorchcrestError, ValueError):
    """Settings that cannot work. The message lists every problem that was found."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Join the problems into one message."""
        problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(problems))


class DataError(TorchcrestError, ValueError):
    """Data that cannot be used: of the wrong kind, shape, size or range."""


class CheckpointError(TorchcrestError, ValueError):
    """A checkpoint that is corrupt, foreign, or made with other settings or data."""


class NonFiniteLossError(TorchcrestError, ArithmeticError):
    """A loss that is NaN or infinite. Names the step and the examples."""

    @classmethod
    def about(cls, what: str, when: str, indices: Sequence[int], measured: int) -> NonFiniteLossError:
        """Name what is not finite, when, and which of how many examples are concerned."""
        shown = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
        return cls(
            f"The {what} is NaN or infinite {when} for {len(indices)} of {measured} examples "
            f"(data-set indices {shown}). Lower the learning rate, clip gradients, or look at these examples."
        )


class RankError(TorchcrestError, RuntimeError):
    """Another process of the same training has failed, so this one cannot go on."""

    @classmethod
    def of(cls, messages: Mapping[int, str], size: int) -> RankError:
        """Repeat what each rank that failed has said."""
        said = "\n".join(f"Rank {rank} of {size} has failed: {message}" for rank, message in messages.items())
        return cls(f"{said}\nIts own output has the traceback.")


def must(name: str, want: str, got: object, do: str) -> str:
    """Say what an argument must be, what came, and the way out.

    >>> must("batch_size", "be at least 1", 0, "Use for example 128.")
    'batch_size must be at least 1, got 0. Use for example 128.'
    """
    return f"{name} must {want}, got {got!r}. {do}"
