"""Times the sides of a comparison: they take turns in one process, and medians with their spread are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

SECONDS, PROCESSOR = "seconds", "processor_seconds"
Side = Callable[[], object]


class Samples:
    """The measurements of one side, one per round."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []

    def __len__(self) -> int:
        return len(self.rounds)

    def values(self, name: str = SECONDS) -> np.ndarray:
        """One measurement of every round, float64 (rounds,)."""
        return np.array([values[name] for values in self.rounds], np.float64)

    def median(self, name: str = SECONDS) -> float:
        return float(np.median(self.values(name)))

    def spread(self, name: str = SECONDS) -> float:
        """Half the interquartile range, as a share of the median."""
        return _spread(self.values(name))


def take_turns(
    sides: Mapping[str, Side], rounds: int = 5, *, warm_up: int = 1, seconds: float | None = None
) -> dict[str, Samples]:
    """Calls every side once per round, in the opposite order in every other round.

    In turns, because another load on the machine then slows all sides alike; in both orders, because a side may leave
    the caches or the clock rate worse for the next one.

    Args:
        sides: name to a function without arguments, one call of which is measured: ``seconds`` of wall clock and
            ``processor_seconds`` of this process. A side that returns a dict of numbers adds them to the measurement
            and may replace these two, such as one that times a child process. Other results are dropped. A side must
            return only when its work is done: wait for a GPU in it.
        rounds: number of rounds that count; the least number where ``seconds`` are given.
        warm_up: rounds before them that do not count; they compile and fill caches.
        seconds: go on until these have passed.

    Returns:
        The measurements by side, in the order of ``sides``.
    """
    samples = {name: Samples() for name in sides}
    for _ in range(warm_up):
        for run in sides.values():
            run()
    end = time.perf_counter() + (seconds or 0.0)
    done = 0
    while done < rounds or time.perf_counter() < end:
        for name in list(sides)[:: -1 if done % 2 else 1]:
            samples[name].rounds.append(_measured(sides[name]))
        done += 1
    return samples


def _measured(run: Side) -> dict[str, float]:
    start, processor = time.perf_counter(), time.process_time()
    found = run()
    measured = {SECONDS: time.perf_counter() - start, PROCESSOR: time.process_time() - processor}
    return {**measured, **(found if isinstance(found, dict) else {})}


def many_steps(run: Callable[[int], object], turn_seconds: float, most: int = 10_000) -> Side:
    """A side whose turn is so many steps as take about ``turn_seconds``; it measures seconds per step.

    The first call warms up with 1 step and chooses the number from 2 more.

    Args:
        run: does the given number of steps and returns when they are done.
        turn_seconds: length of a turn; long enough that its start and end do not count.
        most: steps of a turn.
    """
    steps = 0

    def timed(count: int) -> float:
        start = time.perf_counter()
        run(count)
        return (time.perf_counter() - start) / count

    def side() -> dict[str, float]:
        nonlocal steps
        if not steps:
            timed(1)
            steps = max(1, min(most, round(turn_seconds / max(timed(2), 1e-9))))
        return {SECONDS: timed(steps)}

    return side


def ratio(of: Samples, to: Samples, name: str = SECONDS) -> tuple[float, float]:
    """The ratio of two sides, taken round by round: its median, and half its interquartile range over the median."""
    ratios = of.values(name) / to.values(name)
    return float(np.median(ratios)), _spread(ratios)


def _spread(values: np.ndarray) -> float:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float(high - low) / 2 / float(middle) if middle else 0.0
