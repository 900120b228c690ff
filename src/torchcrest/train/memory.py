"""The most memory a run had in use at a time."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["PeakMemory"]

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory in use at a time since this was made, evaluations included.

    On CUDA and its like it is what PyTorch's allocator had given out on the device. On MPS, which keeps no peak,
    it is what the driver held at the readings; that includes the allocator's cache, which rarely shrinks.
    On the CPU it is the resident memory of the process: PyTorch itself, the data and what the allocator kept
    from before count, worker processes do not. Linux can begin that peak anew; elsewhere it is that of the
    process's whole life, with all runs before this one.

    Attributes:
        of: what was measured: process, or the kind of device.
    """

    def __init__(self, device: torch.device, before: int = 0) -> None:
        """Begin anew; before is the peak, in bytes, of the part of the run that this one goes on with."""
        module = torch.get_device_module(device)
        self._most = before
        self._now: Callable[[], int]
        if hasattr(module, "max_memory_allocated"):
            module.reset_peak_memory_stats(device)
            self.of, self._now = device.type, lambda: module.max_memory_allocated(device)
        elif device.type == "mps":
            self.of, self._now = "mps", module.driver_allocated_memory
        else:
            _forget_resident_peak()
            self.of, self._now = "process", _resident_peak

    def read(self) -> int | None:
        """Return bytes; None where the system does not tell."""
        self._most = max(self._most, self._now())
        return self._most or None


def _forget_resident_peak() -> None:
    """Let the peak be what is resident now, where the system can."""
    with suppress(OSError):
        RESET.write_text("5")  # see proc(5)


def _resident_peak() -> int:
    """Return the most bytes this process had resident; 0 where that is not known."""
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()):
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
