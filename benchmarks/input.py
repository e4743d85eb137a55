"""Measures how fast prepared files become batches, whether training waits for them, and their memory.

``python benchmarks/input.py [--backend jax]`` measures three things:

- reading: images per second of `dataset_class.Batches` in random order, 48 px gray and 224 px RGB, cold and warm, with
  1 to N workers of Keras's queue (one worker reads without a queue), through the memory map and with ``pread``
  (`arrays.Rows`, what training does);
- waiting: the share of ``fit``'s time (mini_xcp at 48 px) that the training loop waits in ``next`` for a batch;
- memory: a sparse file as large as AffectNet's training part (43 GB; it takes no disk) is opened, read in random
  order and trained on, in a process of its own; its resident set, and how much of that is mapped file.

Cold means that the pages of the file were dropped from this machine's page cache (fsync, then POSIX_FADV_DONTNEED,
while nothing maps it); whether the disk below has a cache of its own is not known here. "disk" is what the process
then had fetched from storage, over the bytes of the images that it asked for (/proc/self/io). The rows of a table take
turns (`timing.py`); medians. Prints tables and one JSON line. Linux only.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import runtime
from data_helper import PreparedSplit, open_split
from datasets import CLASS_NAMES
from files import UserError, run_command, write_json

# isort: split
import timing
from workload import make_trainer, write_split

FILES = ((48, 1, 28_709), (224, 3, 4_000))  # side in pixels, channels, images: FER-2013's, and 600 MB
SPARSE = (287_651, 224, 224, 3)  # AffectNet's training part
BATCH_SIZE = 128
PARTS = ("reading", "waiting", "memory")
WAYS = ("map", "pread")  # to read the file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorflow", choices=("tensorflow", "jax"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="the most that are tried")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each row of reading and waiting")
    parser.add_argument("--seconds", type=float, default=4.0, help="longest turn of reading")
    parser.add_argument("--epochs", type=int, default=1, help="of fit in a turn of waiting")
    parser.add_argument("--batches", type=int, default=2000, help="of 8 images, read from the sparse file")
    parser.add_argument("--folder", default=None, help="disk to measure; else the system's temporary folder")
    parser.add_argument("--quick", action="store_true", help="small files and few steps: a check, no measurement")
    options = parser.parse_args()
    if min(options.rounds, options.epochs, options.batches, options.workers) < 1:
        raise UserError("--rounds, --epochs, --batches, --workers: expected 1 or more")
    files, images = FILES, 40 * BATCH_SIZE
    if options.quick:
        files, images = ((48, 1, 512), (224, 3, 256)), 4 * BATCH_SIZE
        vars(options).update(rounds=1, seconds=0.5, epochs=1, batches=50, workers=min(2, options.workers))
    runtime.choose_backend(options.backend)
    import evaluation

    workers = powers_of_two(options.workers)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measures = {
            "reading": lambda: measure_reading(folder, files, workers, options.seconds, options.rounds),
            "waiting": lambda: measure_waiting(folder, images, workers, options.epochs, options.rounds),
            "memory": lambda: measure_memory(folder, options.backend, options.batches, options.seconds),
        }
        result = {part: measures[part]() for part in PARTS if part in options.parts}
        result["read_ahead_bytes"] = read_ahead(folder)
    print(json.dumps({**result, "options": vars(options), "commit": evaluation.commit(), **runtime.versions()}))


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    return sorted({min(2**i, most) for i in range(most.bit_length() + 1)})


# --- reading --------------------------------------------------------------------------------------------------------


def measure_reading(folder: str, files, workers: list[int], seconds: float, rounds: int) -> list[dict]:
    """One row per file, way, number of workers and state of the page cache; medians of the rounds."""
    rows = []
    print(f"{'reading':<16}{'how':<8}{'workers':>8}{'':>6}{'images/s':>11}{'spread':>8}{'CPU us each':>13}{'disk':>7}")
    for side, channels, num_images in files:
        name = f"read{side}"
        path = write_noise_split(folder, name, (side, side, channels), num_images)

        def read(way: str, count: int, state: str, name: str = name, path: Path = path) -> dict[str, float]:
            if state == "cold":
                drop_cached_pages(path)
            else:
                path.read_bytes()
            # Opened anew: pages that are mapped could not be dropped.
            return read_for(open_split(folder, name, "train"), way, count, seconds)

        cases = list(itertools.product(WAYS, workers, ("cold", "warm")))
        found = timing.take_turns({case: functools.partial(read, *case) for case in cases}, rounds, warm_up=0)
        for (way, count, state), samples in found.items():
            row = {"side": side, "channels": channels, "state": state, "way": way, "workers": count, "rounds": rounds}
            row |= {key: samples.median(key) for key in ("images_per_s", "cpu_us", "disk")}
            row["spread"] = samples.spread("images_per_s")
            rows.append(row)
            print(
                f"{f'{side} px, {channels} ch':<16}{way:<8}{count:>8}{state:>6}{row['images_per_s']:>11,.0f}"
                f"{row['spread']:>8.1%}{row['cpu_us']:>13.1f}{row['disk']:>7.2f}",
                flush=True,
            )
    return rows


def read_for(split: PreparedSplit, way: str, workers: int, seconds: float) -> dict[str, float]:
    """Reads one epoch's batches as ``fit`` does, but for the given seconds at most."""
    from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter  # what `fit` reads with

    batches = make_batches(split, BATCH_SIZE, way)
    batches.workers = workers
    adapter = PyDatasetAdapter(batches, shuffle=False)
    batches.order()
    fetched, processor, start = bytes_from_disk(), time.process_time(), time.perf_counter()
    adapter.on_epoch_begin()
    num_images = num_bytes = 0
    for _, (images, _) in zip(range(len(batches)), adapter.get_numpy_iterator(), strict=False):
        num_images += len(images)
        num_bytes += images.nbytes
        if time.perf_counter() - start > seconds:
            break
    took, processor = time.perf_counter() - start, time.process_time() - processor
    fetched = bytes_from_disk() - fetched
    adapter.on_epoch_end()
    return {
        timing.SECONDS: took,
        "images": num_images,
        "images_per_s": num_images / took,
        "cpu_us": 1e6 * processor / num_images,
        "disk": fetched / num_bytes,
    }


def make_batches(split: PreparedSplit, batch_size: int, way: str | None = None):
    """Training batches, read the given way; None is the way of a training."""
    import dataset_class

    batches = dataset_class.Batches(split, batch_size, seed=0)
    if way == "map":
        batches.images = split.images
    return batches


def write_noise_split(folder: str, name: str, shape: tuple[int, int, int], num_images: int) -> Path:
    """A split of random pixels, on the disk when this returns; the path of its images."""
    write_split(folder, shape, num_images, name)
    path = Path(folder, name, "train", "images.npy")
    with open(path, "rb+") as file:
        os.fsync(file.fileno())  # dirty pages are not dropped
    return path


def drop_cached_pages(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """What this process has caused to be fetched from storage so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def read_ahead(folder: str) -> int | None:
    """How much the disk of a folder is read ahead, bytes; a page fault reads as much. None where that is not told."""
    device = os.stat(folder).st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/bdi/read_ahead_kb")
    return 1024 * int(path.read_text()) if path.exists() else None


# --- waiting --------------------------------------------------------------------------------------------------------


class WaitClock:
    """Stands between ``fit`` and its compiled step, and notes how long ``next`` and the whole of each step take.

    Keras hands the step an iterator (the last argument), and the step asks it for one batch. On TensorFlow that
    happens in the step's graph, unless the iterator is a plain one, as ours is. There the step returns when it is
    done, so a wait in ``next`` is one of the processor's. On JAX a step returns when it is dispatched: a wait is
    of the Python thread only, and may be hidden by the steps that run meanwhile.
    """

    def __init__(self, model):
        model.make_train_function()
        self.step = model.train_function
        self.waits: list[float] = []
        self.ends: list[float] = []
        model.train_function = self

    def __call__(self, *arguments):
        *state, iterator = arguments
        result = self.step(*state, self._timed(iterator))
        self.ends.append(time.perf_counter())
        return result

    def _timed(self, iterator):
        start = time.perf_counter()
        batch = next(iterator)
        self.waits.append(time.perf_counter() - start)
        yield batch


def measure_waiting(folder: str, num_images: int, workers: list[int], epochs: int, rounds: int) -> list[dict]:
    """One row per number of workers: the seconds of a step and of its wait, medians of the rounds."""
    write_noise_split(folder, "wait", (48, 48, 1), num_images)
    split = open_split(folder, "wait", "train")
    model = make_trainer("mini_xcp", 48, {})

    def train(count: int) -> dict[str, float]:
        batches = make_batches(split, BATCH_SIZE)
        batches.workers = count
        clock = WaitClock(model)
        start = time.perf_counter()
        model.fit(batches, epochs=epochs, shuffle=False, verbose=0)
        took = time.perf_counter() - start
        model.train_function = clock.step
        steps = len(clock.waits)
        return {
            timing.SECONDS: took / steps,  # the loop of `fit` and the start of each epoch included
            "wait_s": sum(clock.waits) / steps,
            "longest_wait_s": max(clock.waits),
            "share": sum(clock.waits) / took,
        }

    found = timing.take_turns({count: functools.partial(train, count) for count in workers}, rounds)
    rows = []
    print(
        f"{'waiting':<24}{'workers':>8}{'step ms':>9}{'spread':>8}{'wait ms':>9}{'longest':>9}{'share':>8}", flush=True
    )
    for count, samples in found.items():
        row = {"workers": count, "rounds": rounds, "step_s": samples.median(), "spread": samples.spread()}
        row |= {key: samples.median(key) for key in ("wait_s", "longest_wait_s", "share")}
        rows.append(row)
        print(
            f"{'mini_xcp 48 px':<24}{count:>8}{1e3 * row['step_s']:>9.1f}{row['spread']:>8.1%}"
            f"{1e3 * row['wait_s']:>9.2f}{1e3 * row['longest_wait_s']:>9.1f}{row['share']:>8.2%}",
            flush=True,
        )
    return rows


# --- memory ---------------------------------------------------------------------------------------------------------


def measure_memory(folder: str, backend: str, num_batches: int, seconds: float) -> list[dict]:
    """One process per way of reading, since a resident set has no way back; through the map for ``seconds`` at most."""
    path = write_sparse_split(folder, "sparse", SPARSE)
    found = os.stat(path)
    print(f"sparse file: {found.st_size / 1e9:.1f} GB long, {512 * found.st_blocks / 1e6:.3f} MB on the disk")
    print(
        f"{'memory':<8}{'open s':>8}{'images':>9}{'images/s':>10}{'MB before':>11}{'opened':>8}{'read':>8}{'(anon':>8}"
        f"{'file)':>8}{'trained':>9}{'peak':>8}",
        flush=True,
    )
    rows = []
    for way, limit in ((None, np.inf), ("map", seconds)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(read_sparse, (folder, backend, way, num_batches, limit))
        rows.append({"bytes": found.st_size, "bytes_on_disk": 512 * found.st_blocks, **row})
        drop_cached_pages(path)
        memory = {place: {name: kib / 1024 for name, kib in row[place].items()} for place in MEMORY}
        print(
            f"{way or 'ours':<8}{row['open_s']:>8.3f}{row['images']:>9,}{row['images_per_s']:>10,.0f}"
            f"{memory['before']['VmRSS']:>11,.0f}{memory['opened']['VmRSS']:>8,.0f}{memory['read']['VmRSS']:>8,.0f}"
            f"{memory['read']['RssAnon']:>8,.0f}{memory['read']['RssFile']:>8,.0f}{memory['trained']['VmRSS']:>9,.0f}"
            f"{memory['trained']['VmHWM']:>8,.0f}",
            flush=True,
        )
    return rows


MEMORY = ("before", "opened", "read", "trained")


def write_sparse_split(folder: str, name: str, shape: tuple[int, ...]) -> Path:
    """A split whose pixels are one hole: its file is as long as a real one's, and takes no disk."""
    path = Path(folder, name, "train", "images.npy")
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape)))
    labels = np.arange(shape[0]) % 7
    np.save(path.with_name("labels.npy"), labels)
    meta = {"format_version": 1, "dataset": name, "split": "train", "num_images": shape[0], "image_shape": shape[1:]}
    counts = np.bincount(labels, minlength=7).tolist()
    meta |= {"class_names": CLASS_NAMES[:7], "class_counts": counts, "sources": [], "options": {}}
    write_json(path.with_name("meta.json"), meta)
    return path


def read_sparse(folder: str, backend: str, way: str | None, num_batches: int, seconds: float) -> dict:
    """Opens the sparse split, reads batches of 8 in random order and trains two steps of mini_xcp, in this process.

    Returns:
        Seconds to open it, images a second, and the resident set at each place of `MEMORY`, in KiB.
    """
    runtime.choose_backend(backend)
    model = make_trainer("mini_xcp", 48, {})
    row: dict = {"way": way, "before": resident_set()}
    start = time.perf_counter()
    split = open_split(folder, "sparse", "train")
    batches = make_batches(split, 8, way)
    batches[0]
    row |= {"open_s": time.perf_counter() - start, "opened": resident_set()}
    start = time.perf_counter()
    for done in range(1, num_batches + 1):
        batches[done % len(batches)]
        if (took := time.perf_counter() - start) > seconds:
            break
    row |= {"images": 8 * done, "images_per_s": 8 * done / took, "read": resident_set()}
    model.fit(make_batches(split, BATCH_SIZE // 4, way), steps_per_epoch=2, shuffle=False, verbose=0)
    return {**row, "trained": resident_set()}


def resident_set() -> dict[str, int]:
    """KiB: all that is resident (VmRSS), of it own memory (RssAnon) and mapped files (RssFile), and VmRSS's peak."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    wanted = ("VmRSS:", "VmHWM:", "RssAnon:", "RssFile:")
    return {words[0][:-1]: int(words[1]) for words in lines if words and words[0] in wanted}


if __name__ == "__main__":
    raise SystemExit(run_command(main))
