"""The energy of a run, split into training and what selection costs."""

from __future__ import annotations

import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torchcrest.passes import Phase

__all__ = ["EnergyMeter"]

READ_EVERY = 1.0  # seconds


class EnergyMeter:
    """Splits what codecarbon reads from the machine among the phases of a run.

    Reading the counters takes milliseconds, and phases may change as often, so they are not read at each change:
    codecarbon reads them once a second, from a thread of its own, and each reading is split by the seconds that
    each phase had since the last one. Where a phase draws more power than the phases around it, it is thus given
    too little if it is shorter than a second. Pauses of the training clock, as evaluations, take their share,
    which is dropped.

    What is read is codecarbon's affair, and its settings' (``~/.codecarbon.config`` or ``CODECARBON_...``): by
    default the whole machine with its GPUs, and so whatever else runs on it. Where it may not read the processor's
    own counters (RAPL), it estimates from the load and a rated power; memory is always estimated.
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        """Begin at nothing, or at the kWh of the part of the run that this one goes on with."""
        self._kwh = defaultdict(float, before or {})
        self._seconds: defaultdict[Phase | None, float] = defaultdict(float)  # since the last reading
        self._phase: Phase | None = None
        self._since = time.perf_counter()
        self._lock = threading.Lock()  # readings come from another thread

    def start(self) -> None:
        """Start reading."""
        codecarbon = import_module("codecarbon")
        # Else its own logger, which no other hears, would report each reading on stderr.
        import_module("codecarbon.external.logger").set_logger_level("error")
        self._tracker: Any = codecarbon.OfflineEmissionsTracker(
            measure_power_secs=READ_EVERY,
            api_call_interval=1,  # in readings
            output_handlers=[_Output(self)],
            output_methods=[],
            log_level="error",
            allow_multiple_runs=True,
            force_carbon_intensity_g_co2e_kwh=0.0,  # else it asks where it is
        )
        self._tracker.start()

    def switch(self, phase: Phase | None) -> None:
        """Note that another phase begins; None: the clock is stopped."""
        with self._lock:
            self._advance()
            self._phase = phase

    def take(self, kwh: float) -> None:
        """Split what was spent since the last reading."""
        with self._lock:
            self._advance()
            seconds = max(sum(self._seconds.values()), 1e-9)
            for phase, spent in self._seconds.items():
                if phase:
                    self._kwh[phase] += kwh * spent / seconds
            self._seconds.clear()

    def read(self) -> dict[str, float]:
        """Read the counters and return the kWh of each phase so far."""
        self._tracker.flush()
        with self._lock:
            return dict(self._kwh)

    def stop(self) -> None:
        """Stop reading."""
        self._tracker.stop()
        if not self._kwh:  # it logs its errors and goes on
            warnings.warn("codecarbon gave no readings, so there is no energy_kwh.", stacklevel=2)

    def _advance(self) -> None:
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._since = now


class _Output:
    """Where codecarbon puts its readings; the methods are its ``BaseOutput``'s."""

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter = meter

    def live_out(self, total: Any, delta: Any) -> None:
        """Take a reading."""
        self._meter.take(delta.energy_consumed)

    out = live_out  # at a flush and at the end

    def task_out(self, data: Any, name: str) -> None:
        """Ignore tasks; there are none."""

    def exit(self) -> None:
        """Have nothing to close."""
