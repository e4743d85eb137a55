"""Sums up a video: how long each person shows which expression, and a figure with one band per person."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Memory is bounded for any length: when the bins are used up, each two become one.
BINS, FIRST_WIDTH = 1200, 0.02  # seconds
# Of so many people the sums are kept, and so many get a band; those who are seen longest stay.
MAX_PEOPLE, MAX_BANDS = 500, 20
TICK_SECONDS = (10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)


@dataclasses.dataclass(frozen=True)
class Person:
    """One person of a video.

    Attributes:
        identity: as the tracker numbers them.
        first, last: seconds at which they are first and last seen, to the width of a bin.
        seconds: how long they are seen.
        shares: float (C,), the part of that time that each class was the label.
    """

    identity: int
    first: float
    last: float
    seconds: float
    shares: np.ndarray


class Timeline:
    """Collects labels over time.

    Args:
        class_names: C names.

    Attributes:
        people_left_out: how many were dropped, because more than `MAX_PEOPLE` were seen.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        self.people_left_out = 0
        self._width, self._end = FIRST_WIDTH, 0.0
        self._sums: dict[int, np.ndarray] = {}  # identity to seconds, float32 (BINS, C)

    @property
    def end(self) -> float:
        """End of the last frame in seconds."""
        return self._end

    def add(self, start: float, end: float, labels: dict[int, int]) -> None:
        """Takes one frame.

        Args:
            start: its time in seconds.
            end: that of the next frame.
            labels: identity to class code, of the people in it.
        """
        self._end = end
        while end > BINS * self._width:
            self._halve()
        edges = np.clip(np.arange(BINS + 1) * self._width, start, end)
        first, last = int(start / self._width), min(BINS, int(end / self._width) + 1)
        shares = np.diff(edges[first : last + 1])
        for identity, code in labels.items():
            if identity not in self._sums:
                self._make_room(keep=labels)
                self._sums[identity] = np.zeros((BINS, len(self.class_names)), np.float32)
            self._sums[identity][first:last, code] += shares

    def people(self) -> list[Person]:
        """Everyone, by identity."""
        found = []
        for identity, sums in sorted(self._sums.items()):
            seconds = float(sums.sum())
            (used,) = np.nonzero(sums.any(axis=1))
            first, last = used[0] * self._width, min((used[-1] + 1) * self._width, self._end)
            found.append(Person(identity, float(first), float(last), seconds, sums.sum(axis=0) / seconds))
        return found

    def bands(self, identity: int) -> list[tuple[float, float, int]]:
        """One person's intervals as (start, seconds, class code), by time."""
        sums = self._sums[identity]
        # A bin in which the person is seen for less than half of its time is a gap, except in a short appearance.
        seen = sums.sum(axis=1)
        codes = np.where(seen >= min(0.5 * self._width, seen.max()) - 1e-6, sums.argmax(axis=1), -1)
        starts = np.flatnonzero(np.diff(codes, prepend=-2))
        ends = np.append(starts[1:], BINS)
        return [
            (float(a * self._width), float((b - a) * self._width), int(codes[a]))
            for a, b in zip(starts, ends, strict=True)
            if codes[a] >= 0
        ]

    def save(self, path: str | Path, title: str) -> None:
        """Draws one band per person, coloured by expression, as a PNG.

        Args:
            path: the PNG to write.
            title: what was recognised, such as the name of the clip.
        """
        import plots

        people = sorted(self.people(), key=lambda person: -person.seconds)
        shown = sorted(people[:MAX_BANDS], key=lambda person: person.identity)
        count = len(people) + self.people_left_out
        title = f"{title}, {clock(self._end)}, {count} {'person' if count == 1 else 'people'}"
        if len(shown) < count:
            title += f" (the {len(shown)} seen longest)"
        with plots.new_figure(path, 8.0, 0.9 + 0.36 * max(2, len(shown)), title) as figure:
            axes = figure.add_subplot()
            seen = set()
            for row, person in enumerate(shown):
                for start, seconds, code in self.bands(person.identity):
                    color = plots.COLORS[code % len(plots.COLORS)]
                    axes.barh(row, seconds, 0.7, left=start, color=color, linewidth=0)
                    seen.add(code)
            if not shown:
                axes.text(0.5, 0.5, "no face found", transform=axes.transAxes, ha="center", va="center")
            axes.set_yticks(range(len(shown)), [f"Person {p.identity}\n{clock(p.seconds)}" for p in shown])
            axes.set(xlabel="Time (min:s)" if self._end >= 60 else "Time (s)", xlim=(0, self._end or 1))
            if self._end >= 60:
                step = next((step for step in TICK_SECONDS if self._end <= 9 * step), self._end / 4)
                axes.set_xticks(np.arange(0, self._end + 1e-6, step))
                axes.xaxis.set_major_formatter(lambda value, _: clock(value) if value else "0:00")
            axes.set_ylim(max(1, len(shown)) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            axes.grid(True, axis="x")
            if seen:
                plots.expression_legend(figure, np.array(sorted(seen)), self.class_names)

    def _halve(self) -> None:
        self._width *= 2
        for identity, sums in self._sums.items():
            pairs = sums.reshape(BINS // 2, 2, -1).sum(axis=1)
            self._sums[identity] = np.concatenate([pairs, np.zeros_like(pairs)])

    def _make_room(self, keep: dict[int, int]) -> None:
        """Drops the person seen for the shortest time, when there are too many; nobody who is in the frame."""
        if len(self._sums) >= MAX_PEOPLE:
            gone = [identity for identity in self._sums if identity not in keep]
            if gone:
                del self._sums[min(gone, key=lambda identity: float(self._sums[identity].sum()))]
                self.people_left_out += 1


def clock(seconds: float) -> str:
    """A time as text: "12.3 s", "2:05", "1:02:05"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
