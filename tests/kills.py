"""Kills a small training before and after every replacement of a file, and lets the same command go on.

    python tests/kills.py              # every place; prints one line for each
    python tests/kills.py --places 4   # so many places, spread over the run
    python tests/kills.py --skip 20    # every place but the first 20

A place is the n-th call of `os.replace` for a file, which is how `files` puts every file and folder into its place.
Each run is a fork of this process, which has imported Keras but computed nothing: that saves most of its time.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
_SPLITS = {"train": 28, "val": 14, "test": 14}  # images; four batches
_OPTIONS = ["--epochs=2", "--batch-size=7", "--input-size=24", "--num-embeddings=2", "--embedding-size=8"]
_OPTIONS += ["--save-seconds=0"]


def write_data(folder: Path) -> None:
    """Splits of random images, named as the synthetic data set."""
    from conftest import write_split

    rng = np.random.default_rng(0)
    for split, num in _SPLITS.items():
        images = rng.integers(0, 256, (num, 24, 24, 1), np.uint8)
        write_split(folder, np.arange(num) % 7, split=split, shape=(24, 24, 1), images=images)


class Place(NamedTuple):
    """Where to kill: before or after the n-th replacement of a file, n counted from 1."""

    name: str
    n: int
    after: bool

    def __str__(self) -> str:
        return f"{'after' if self.after else 'before'} replacement {self.n} of {self.name}"


class Kill:
    """Replaces `os.replace`, and kills this process at a place.

    Args:
        place: where; None kills never.
        log: gets the name of each replaced file, one per line.
    """

    def __init__(self, place: Place | None, log: Path):
        self.place, self._count = place, 0
        self._log = open(log, "w")  # noqa: SIM115 - as long as the process
        self._replace, self._lock = os.replace, threading.Lock()

    def __call__(self, source, target, **options) -> None:
        with self._lock:  # a thread saves the state; it may not write on while this one dies
            name = Path(target).name
            print(name, file=self._log, flush=True)
            self._count += bool(self.place) and name == self.place.name
            here = self.place == (name, self._count, self.place.after) if self.place else False
            if here and not self.place.after:
                os.kill(os.getpid(), signal.SIGKILL)
            self._replace(source, target, **options)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)


def train(data: Path, run: Path, place: Place | None = None) -> tuple[int, list[str]]:
    """Runs `train.py` in a fork of this process.

    Returns:
        Its exit code (-9 where it was killed), and the names of the files that it replaced, in their order.
    """
    log = run.with_suffix(".log")
    return _in_fork(lambda: _train(data, run, Kill(place, log))), log.read_text().splitlines()


def _train(data: Path, run: Path, kill: Kill) -> int:
    import train as command
    from files import run_command

    sys.argv = ["train.py", "--dataset=synthetic", f"--data-dir={data}", f"--run-dir={run}", *_OPTIONS]
    os.replace = kill
    return run_command(command.main)


def _in_fork(work: Callable[[], int]) -> int:
    child = os.fork()
    if not child:
        code = 1
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
            code = work()
        finally:
            os._exit(code)  # not the ends of the process that was forked
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(run: Path) -> dict[str, object]:
    """All that must be the same to the bit, whenever the run was killed: file and name -> value."""
    from conftest import read_state

    found: dict[str, object] = {f"state.h5 {name}": array.tobytes() for name, array in read_state(run).items()}
    found["best.weights.h5"] = (run / "best.weights.h5").read_bytes()
    with open(run / "history.csv", newline="") as file:
        for row in csv.DictReader(file):
            found |= {f"history.csv {row['epoch']} {name}": text for name, text in row.items() if name != "seconds"}
    result = json.loads((run / "result.json").read_text())
    # The commit is that of the code, whose files may change meanwhile.
    same = result.keys() - {"train_seconds", "commit"}
    return found | {f"result.json {name}": result[name] for name in same}


def differences(whole: dict[str, object], run: Path) -> list[str]:
    """What differs from the run that was not killed, and files that should not be there; empty for nothing."""
    found = content(run)
    names = [name for name in sorted(whole.keys() | found.keys()) if whole.get(name) != found.get(name)]
    return names + [path.name for path in run.glob(".tmp-*")]


def places(replaced: list[str], some: int | None = None) -> list[Place]:
    """Every place of a run, or ``some`` of them, spread evenly."""
    numbered = ((name, replaced[: i + 1].count(name)) for i, name in enumerate(replaced))
    every = [Place(name, n, after) for name, n in numbered for after in (False, True)]
    return every if some is None else [every[i] for i in np.linspace(0, len(every), some + 2)[1:-1].astype(int)]


def run_all(
    folder: Path, some: int | None = None, skip: int = 0, report: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Kills and continues a run at every place, or at ``some``; one line for each that did not end as it should.

    A state is saved when the thread that writes is free, so a run can have fewer replacements than the first one; then
    it ends without a kill.

    Args:
        folder: an empty one.
        some: number of places; None takes all.
        skip: number of places to leave out at the start.
        report: called with one line per place.
    """
    import experiment  # noqa: F401 - before the forks

    write_data(folder / "data")
    code, replaced = train(folder / "data", folder / "whole")
    if code:
        raise RuntimeError(f"the run that is not killed ended with {code}")
    whole, bad = content(folder / "whole"), []
    for number, place in enumerate(places(replaced, some)[skip:], skip):
        run = folder / f"{number}"
        first, names = train(folder / "data", run, place)
        code, _ = train(folder / "data", run)
        how = "killed" if first == -signal.SIGKILL else f"ended with {first}, not killed"
        wrong = [f"exit code {code}"] if code else differences(whole, run)
        if first != -signal.SIGKILL and (first or names.count(place.name) >= place.n):
            wrong.append("it was not killed")
        line = f"{how} {place}: {wrong or 'the same'}"
        report(line)
        bad += [line] if wrong else []
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an empty one, whose runs are kept; none: a temporary one")
    parser.add_argument("--places", type=int, help="how many; none: all")
    parser.add_argument("--skip", type=int, default=0, help="of them, how many to leave out at the start")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        bad = run_all(folder, options.places, options.skip, lambda line: print(line, flush=True))
    print(f"{len(bad)} did not end as the run that was not killed")
    return int(bool(bad))


if __name__ == "__main__":
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    sys.path[:0] = [str(ROOT / place) for place in (".", "tests")]
    sys.exit(main())
