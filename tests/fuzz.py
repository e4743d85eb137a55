"""Damages small valid files of every format and gives them to the public readers, in processes with limits.

    python tests/fuzz.py --cases 20000 --seed 1          # counts by format and outcome
    python tests/fuzz.py --formats onnx,yaml --cases 500
    python tests/fuzz.py --seed 1 --case 1234            # one case again, with its traceback

A reader must read a file or refuse it with one `files.UserError`; see `Outcome` for all else that can happen.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 30.0  # that a case may take where a core is free for it; a fiftieth of a second is usual
MEMORY = 2**30  # bytes that a case may add
_ADDRESSES = 8 * 2**30  # bytes of addresses that a worker may add; protects the machine
_LONGEST_MESSAGE = 2_000
SOURCE = "fuzz_formats:FORMATS"
GOOD = ("ok", "refused")
OUTCOMES = (*GOOD, "traceback", "signal", "hang", "memory", "message", "believed")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened to one case.

    Attributes:
        case: its number.
        format: its format's name.
        kind: ``ok`` (read), ``refused`` (a `UserError`), ``traceback`` (any other error), ``signal`` (the process
            died), ``hang`` (over `SECONDS`), ``memory`` (over `MEMORY`), ``message`` (a refusal that is not one
            printable line), ``believed`` (a reader took what contradicts a digest).
        detail: the error's type and message.
    """

    case: int
    format: str
    kind: str
    detail: str = ""


# --- damage

_TOKENS = (
    *(b"NaN", b"-1", b"1e999", b"99999999999999999999", b"null", b"true", b"[]", b"{}", b'""', b"\x1b[31m", b"\n"),
    *(b"\\ud800", b"\xff\xfe", b"\x00" * 8, b"&a [*a, *a]", b"2026-02-30", b"!!python/object:os.system", b"=1+1"),
    *(b"9" * 5000, b"[" * 5000, b"../../x", b'"', b",", b"PK\x01\x02", b"\xff" * 4, b"\x7f\xff\xff\xff"),
)


def damage(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start = rng.randrange(len(changed) + 1)
        # Half of the changes are near the ends, where most formats have their headers and directories.
        if rng.random() < 0.5:
            start = min(len(changed), rng.randrange(128)) if rng.random() < 0.6 else max(0, len(changed) - start % 128)
        stop = min(len(changed), start + rng.choice((1, 2, 4, 16, 256, len(changed))))
        kind = rng.randrange(9)
        if kind <= 2 and start < len(changed):
            changed[start] ^= 1 << rng.randrange(8)
        elif kind == 3:
            changed[start:stop] = rng.randbytes(stop - start)
        elif kind == 4:
            del changed[start:stop]
        elif kind == 5:
            changed[start:start] = changed[start:stop] * rng.choice((1, 3))
        elif kind == 6:
            changed[start:start] = rng.choice(_TOKENS)
        elif kind == 7:
            token = rng.choice(_TOKENS)
            changed[start : start + len(token)] = token
        else:
            del changed[start:]
    return bytes(changed)


_VALUES = (None, True, -1, 0, 1.5, 10**30, "", "x" * 10_000, "\x1b[31m\n", [], {}, [[1]], {"a": {"b": []}})


def damage_json(text: bytes, rng: random.Random) -> bytes:
    """The JSON with one value replaced, removed or added."""
    value = json.loads(text)
    places = [(None, None), *_places(value)]
    parent, key = rng.choice(places)
    if parent is None:
        return json.dumps(rng.choice(_VALUES)).encode()
    if rng.random() < 0.25:
        del parent[key]
    else:
        parent[key] = rng.choice((*_VALUES, [parent[key]], str(parent[key])))
    return json.dumps(value).encode()


def _places(value: object) -> Iterator[tuple[object, object]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def damage_zip(path: Path, rng: random.Random) -> bytes:
    """The archive with one damaged member and right checksums."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice(list(members))
    members[chosen] = damage(members[chosen], rng)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def damage_hdf5(data: bytes, rng: random.Random) -> bytes:
    """The HDF5 file with one damaged text or array, and a right digest if it had one: what a careful forger writes."""
    with h5py.File(file := io.BytesIO(data), "r+") as content:
        arrays: list[h5py.Dataset] = []
        content.visititems(lambda name, item: arrays.append(item) if isinstance(item, h5py.Dataset) else None)
        texts = [name for name, value in content.attrs.items() if isinstance(value, str)]
        if texts and rng.random() < 0.6:
            name = rng.choice(texts)
            text = content.attrs[name].encode()
            with contextlib.suppress(ValueError):
                text = damage_json(text, rng) if rng.random() < 0.8 else damage(text, rng)
            content.attrs[name] = _attribute(text)
        else:
            _damage_array(content, rng.choice(arrays), rng)
    return sealed(file.getvalue())


def sealed(data: bytes) -> bytes:
    """The HDF5 file with a right digest, if it has one."""
    from model_files import safe_hdf5

    if data.startswith(b"Ad-Corre, HDF5.") and len(data) > 512:
        safe_hdf5.seal(memoryview(data := bytearray(data)))
    return bytes(data)


def _attribute(text: bytes) -> str | np.bytes_:
    text = text.replace(b"\0", b"")[:60_000] or b" "
    try:
        return text.decode()
    except UnicodeDecodeError:
        return np.bytes_(text)


def _damage_array(content: h5py.File, array: h5py.Dataset, rng: random.Random) -> None:
    name, values = array.name, array[()]
    del content[name]
    kind = rng.randrange(5)
    if kind == 0:
        content[name] = np.full_like(values, rng.choice((np.nan, np.inf, 1e30)) if values.dtype.kind == "f" else -1)
    elif kind == 1:
        content[name] = np.expand_dims(values, 0)
    elif kind == 2:
        content[name] = values.astype(rng.choice((np.int64, np.float16, np.complex64)))
    elif kind == 3:
        content[f"{name}x"] = values


def _damaged(path: Path, rng: random.Random) -> bytes:
    half = rng.random() < 0.5
    if path.suffix == ".h5" and half:
        return damage_hdf5(path.read_bytes(), rng) if rng.random() < 0.7 else sealed(damage(path.read_bytes(), rng))
    if path.suffix == ".json" and half:
        return damage_json(path.read_bytes(), rng)
    if path.suffix in (".zip", ".npz", ".keras") and half:
        return damage_zip(path, rng)
    return damage(path.read_bytes(), rng)


# --- one case, in a worker


def _formats(names: Sequence[str], source: str) -> list:
    module, _, variable = source.partition(":")
    found = getattr(importlib.import_module(module), variable)
    return [each for each in found if each.name in names]


class Cases:
    """Makes and reads cases; the valid files of each format are written once."""

    def __init__(self, seed: int, names: Sequence[str], source: str, folder: Path):
        self.seed, self.folder = seed, folder
        self.formats = _formats(names, source)
        self._valid: dict[str, Path] = {}

    def chosen(self, case: int) -> tuple:
        rng = random.Random(f"{self.seed}/{case}")
        return rng.choices(self.formats, [each.share for each in self.formats])[0], rng

    def run(self, case: int) -> Outcome:
        """Runs one case; memory and time are the caller's business."""
        form, rng = self.chosen(case)
        if form.name not in self._valid:
            valid = self.folder / "valid" / form.name.replace(" ", "-")
            valid.mkdir(parents=True)
            form.write(valid)
            self._valid[form.name] = valid
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self._valid[form.name], place)
        target = place / rng.choice(form.targets)
        target.write_bytes(_damaged(target, rng))
        return Outcome(case, form.name, *_outcome(form, place))


def _outcome(form: object, place: Path) -> tuple[str, str]:
    from fuzz_formats import Believed

    from files import UserError

    try:
        form.read(place)
    except UserError as error:
        text = str(error)
        named = str(place) in text or any(target.stem in text for target in place.rglob("*"))
        one_line = text.isprintable() and len(text) <= _LONGEST_MESSAGE and named
        return "refused" if one_line else "message", text[:500]
    except Believed as error:
        return "believed", str(error)
    except OSError as error:
        if error.filename and error.errno:  # such as a missing file: the command prints it with its name
            return "refused", str(error)
        return "traceback", "".join(traceback.format_exception(error)[-3:])
    except Exception as error:
        return "traceback", "".join(traceback.format_exception(error)[-3:])
    return "ok", ""


def _work(seed: int, names: Sequence[str], source: str) -> None:
    """Reads case numbers, one per line, and answers with one JSON object per line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(seed, names, source, Path(folder))
        answers.write("ready\n")
        for line in sys.stdin:
            before = _reset_peak()
            outcome = cases.run(int(line))
            if _status("VmHWM") - before > MEMORY and outcome.kind in GOOD:
                outcome = dataclasses.replace(outcome, kind="memory")
            answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")


def _status(name: str) -> int:
    """A number of bytes of /proc/self/status; 0 on other systems."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _reset_peak() -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _waiting_share() -> float:
    """By how much this machine's other work makes a process slower, 1 or more; 1 where the system does not say it."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)) if hasattr(os, "getloadavg") else 1.0


def _limit_addresses() -> None:
    with contextlib.suppress(ImportError):
        import resource

        most = _status("VmSize") + _ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# --- many cases


class Worker:
    """A process that runs one case after the other, and is started again when it dies."""

    def __init__(self, seed: int, names: Sequence[str], source: str):
        self._arguments = ["--worker", "--seed", str(seed), "--formats", ",".join(names), "--source", source]
        self._cases = Cases(seed, names, source, Path())
        self._process: subprocess.Popen | None = None

    def run(self, case: int) -> Outcome:
        if self._process is None:
            self._start()
        name = self._cases.chosen(case)[0].name
        try:
            self._process.stdin.write(f"{case}\n")
            self._process.stdin.flush()
            line = self._answer(SECONDS * _waiting_share())
        except BrokenPipeError:
            line = ""
        except TimeoutError:
            self.close()
            return Outcome(case, name, "hang", f"over {SECONDS:.0f} s")
        if not line:
            code = self._process.wait()
            self.close()
            return Outcome(case, name, "signal", f"exit code {code}")
        return Outcome(**json.loads(line))

    def _start(self) -> None:
        paths = [str(ROOT / place) for place in (".", "tests")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        command = [sys.executable, __file__, *self._arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, cwd=tempfile.gettempdir(), **pipes)
        if self._answer(120) != "ready\n":
            raise RuntimeError("a worker cannot be started")

    def _answer(self, seconds: float) -> str:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise TimeoutError
        return self._process.stdout.readline()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


def run_cases(
    cases: Sequence[int],
    seed: int,
    names: Sequence[str],
    jobs: int = 2,
    source: str = SOURCE,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Runs cases in ``jobs`` processes; the outcomes in the order of the cases.

    Args:
        cases: their numbers.
        seed: together with the number it decides what is done.
        names: of the formats.
        jobs: number of processes.
        source: ``module:variable`` with the formats.
        report: called with each outcome, from several threads.
    """

    # One process alone takes the cases that need Keras, so that one alone imports it.
    chosen = Cases(seed, names, source, Path()).chosen
    with_keras = collections.deque(case for case in cases if chosen(case)[0].keras)
    others = collections.deque(case for case in cases if not chosen(case)[0].keras)

    def some(worker_number: int) -> list[Outcome]:
        found = []
        with contextlib.closing(Worker(seed, names, source)) as worker, contextlib.suppress(IndexError):
            while True:
                waiting = with_keras if with_keras and not worker_number else others
                found.append(worker.run(waiting.popleft()))
                report(found[-1])
        return found

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        found = [outcome for part in pool.map(some, range(jobs)) for outcome in part]
    return sorted(found, key=lambda outcome: outcome.case)


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts by format and outcome."""
    counts = collections.Counter((outcome.format, outcome.kind) for outcome in outcomes)
    rows = [["format", *OUTCOMES]]
    for name in [*dict.fromkeys(sorted(outcome.format for outcome in outcomes)), "all"]:
        of_name = [sum(n for (f, k), n in counts.items() if k == kind and name in (f, "all")) for kind in OUTCOMES]
        rows.append([name, *map(str, of_name)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _print_bad(outcome: Outcome) -> None:
    if outcome.kind not in GOOD:
        print(f"case {outcome.case}, {outcome.format}: {outcome.kind}: {outcome.detail!a}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2_000, help="how many; their numbers begin at 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", default="", help="names with commas; none: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", type=int, help="run this one in this process, without limits")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--source", default=SOURCE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    module, _, variable = options.source.partition(":")
    known = [each.name for each in getattr(importlib.import_module(module), variable)]
    names = options.formats.split(",") if options.formats else known
    if unknown := set(names) - set(known):
        parser.error(f"--formats: expected some of {', '.join(known)}, received {', '.join(sorted(unknown))}")
    if options.worker:
        _limit_addresses()
        _work(options.seed, names, options.source)
        return 0
    if options.case is not None:
        folder = Path(tempfile.mkdtemp())
        print(Cases(options.seed, names, options.source, folder).run(options.case), folder / "case", sep="\n")
        return 0
    started = time.monotonic()
    outcomes = run_cases(range(options.cases), options.seed, names, options.jobs, report=_print_bad)
    print(table(outcomes))
    print(f"{len(outcomes):,} cases of seed {options.seed} in {time.monotonic() - started:.0f} s")
    return int(any(outcome.kind not in GOOD for outcome in outcomes))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / place) for place in (".", "tests")]
    sys.exit(main())
