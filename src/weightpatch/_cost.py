"""What a piece of work costs: seconds, and the growth of peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """What one edit cost.

    Attributes:
        seconds: wall-clock time.
        peak_bytes: growth of peak memory above the start: of the accelerator where the model lies on one, else of the
            process (resident, Linux only); None where it cannot be measured.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """Fill the yielded `Cost` when the block ends."""
    cost = Cost()
    before = _reset_peak(device)
    started = time.perf_counter()
    try:
        yield cost
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - started
        peak = _peak(device)
        cost.peak_bytes = None if peak is None or before is None else max(peak - before, 0)


def _reset_peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        _CLEAR.write_text("5")  # resets VmHWM to the present resident size
    except OSError:
        return None
    return _peak(device)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
