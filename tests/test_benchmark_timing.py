"""The timing of the benchmarks, by a clock that the sides themselves move."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import timing


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0, calls=[])
    times = SimpleNamespace(perf_counter=lambda: clock.now, process_time=lambda: clock.now / 2)
    monkeypatch.setattr(timing, "time", times)
    return clock


def side(clock, name, *seconds, result=None):
    """A side that takes the given seconds, call after call, and the last of them from then on."""
    left = list(seconds)

    def run():
        clock.calls.append(name)
        clock.now += left.pop(0) if len(left) > 1 else left[0]
        return result

    return run


def test_sides_take_turns_in_both_orders_and_the_warm_up_does_not_count(clock):
    found = timing.take_turns({"a": side(clock, "a", 9, 1, 2, 90), "b": side(clock, "b", 9, 3)}, 3)
    assert "".join(clock.calls) == "ab" + "ab" + "ba" + "ab"
    assert found["a"].values().tolist() == [1, 2, 90] and len(found["b"]) == 3
    assert found["a"].median() == 2 and found["a"].median(timing.PROCESSOR) == 1
    assert found["a"].spread() == (46 - 1.5) / 2 / 2 and found["b"].spread() == 0


def test_a_ratio_is_taken_round_by_round(clock):
    """The load doubles both sides in the second round; the third is one side's own."""
    found = timing.take_turns({"a": side(clock, "a", 2, 4, 8), "b": side(clock, "b", 1, 2, 2)}, 3, warm_up=0)
    assert timing.ratio(found["a"], found["b"]) == (2.0, (3 - 2) / 2 / 2)


def test_seconds_extend_the_rounds(clock):
    assert len(timing.take_turns({"a": side(clock, "a", 1)}, 2, seconds=5.0)["a"]) == 5
    assert len(timing.take_turns({"a": side(clock, "a", 1)}, 7, seconds=5.0)["a"]) == 7


def test_what_a_side_returns_replaces_what_was_measured(clock):
    found = timing.take_turns({"a": side(clock, "a", 1, result={"seconds": 0.5, "bytes": 7})}, 2)["a"]
    assert found.median() == 0.5 and found.median("bytes") == 7 and found.median(timing.PROCESSOR) == 0.5


def test_a_turn_of_many_steps_has_the_length_that_is_wanted(clock):
    counts = []

    def run(steps):
        counts.append(steps)
        clock.now += steps * 0.01 + (5.0 if len(counts) == 1 else 0.0)  # the first step compiles

    found = timing.take_turns({"a": timing.many_steps(run, 1.0)}, 2)["a"]
    assert counts == [1, 2, 100, 100, 100] and found.median() == pytest.approx(0.01)
