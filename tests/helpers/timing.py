"""Times of several programs beside each other, for the benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(*functions: Callable[[], object], repetitions: int = 9, calls: int = 1) -> list[float]:
    """Median seconds of each; run in turn, so that all of them see the same machine."""
    seconds: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repetitions):
        for times, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times.append((time.perf_counter() - start) / calls)
    return [statistics.median(times) for times in seconds]
