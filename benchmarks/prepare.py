"""Measures how fast images are prepared, against a bare multi-process loop of cv2.imread and cv2.resize.

``python benchmarks/prepare.py`` makes JPEGs in a temporary folder, a zip and a tar and measures, in turns
(`timing.py`):

- the bare loop, which writes nothing, with OpenCV's default filter (bilinear, which aliases) and with the area
  filter, processes started beforehand;
- `release.write_images` of the folder, the zip and the tar, everything included up to the files on the disk.

Prints a table of medians over the rounds and one JSON line. Where other programs run beside it, trust the ratios of the
processor time: all cores are busy on both sides, so on an idle machine they are those of the throughput.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets.shared.archives import SourceFiles
from datasets.shared.decoding import ImageFile
from datasets.shared.release import ImageRelease, write_images
from files import run_command

# isort: split
import cv2  # after our modules, which set its limits
import numpy as np
import timing

FILTERS = {"bare loop, bilinear": cv2.INTER_LINEAR, "bare loop, area": cv2.INTER_AREA}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--side", type=int, default=400, help="of the JPEGs, pixels")
    parser.add_argument("--size", type=int, default=224, help="of what is prepared, pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(options.workers, cv2.setNumThreads, (1,)) as pool:
        sources = make_sources(Path(folder), options.images, options.side)
        sides: dict[str, timing.Side] = {}
        for name, method in FILTERS.items():
            sides[name] = partial(bare_loop, pool, sources["folder"], options.size, method)
        for form, source in sources.items():
            sides[f"ours, {form}"] = partial(prepare, source, Path(folder, "data"), options.size, options.workers)
        found = timing.take_turns(sides, options.rounds)
    report(found, options)


def make_sources(folder: Path, num_images: int, side: int) -> dict[str, Path]:
    """Smooth colours with noise, about as large as photographs: a folder, a zip and a tar of the same JPEGs."""
    rng = np.random.default_rng(0)
    images = folder / "jpeg"
    images.mkdir()
    for number in range(num_images):
        smooth = cv2.resize(rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8), (side, side))
        noise = rng.integers(0, 20, (side, side, 3), np.uint8)
        cv2.imwrite(str(images / f"{number:06}.jpg"), cv2.add(smooth, noise), [cv2.IMWRITE_JPEG_QUALITY, 90])
    with zipfile.ZipFile(folder / "jpeg.zip", "w") as archive, tarfile.open(folder / "jpeg.tar", "w") as tar:
        for path in sorted(images.iterdir()):
            archive.write(path, path.name)
            tar.add(path, path.name)
    return {"folder": images, "zip": folder / "jpeg.zip", "tar": folder / "jpeg.tar"}


def bare_loop(pool: multiprocessing.pool.Pool, folder: Path, size: int, method: int) -> dict[str, float]:
    """Returns the seconds of processor time, of all processes."""
    paths = map(str, sorted(folder.iterdir()))
    seconds = sum(pool.map(partial(read_and_resize, size=size, method=method), paths, chunksize=16))
    return {timing.PROCESSOR: seconds}


def read_and_resize(path: str, size: int, method: int) -> float:
    start = time.process_time()
    cv2.resize(cv2.imread(path), (size, size), interpolation=method)
    return time.process_time() - start


def prepare(source: Path, data_dir: Path, size: int, workers: int) -> dict[str, float]:
    """Returns the seconds of processor time of all threads, and of the clock, without cleaning up."""
    start, processor = time.perf_counter(), time.process_time()
    files = SourceFiles(source, ["*.jpg"])
    images = [ImageFile("train", name, 0) for name in files.names]
    write_images(data_dir, "bench", ImageRelease(files, images, size, 3, ["a"], [files.stamp()], {}), workers=workers)
    found = {timing.SECONDS: time.perf_counter() - start, timing.PROCESSOR: time.process_time() - processor}
    shutil.rmtree(data_dir)
    return found


def report(found: dict[str, timing.Samples], options: argparse.Namespace) -> None:
    """Ratios are taken round by round, because another program slows both sides of a round alike."""
    rows = []
    print(f"{'':<22}{'images/s':>12}{'spread':>8}{'CPU ms each':>13}{'of bilinear':>20}{'of area':>20}")
    for name, samples in found.items():
        rate, processor = options.images / samples.median(), samples.median(timing.PROCESSOR)
        row = {
            "side": name,
            "images_per_s": rate,
            "spread": samples.spread(),
            "cpu_ms": 1e3 * processor / options.images,
        }
        print(f"{name:<22}{rate:>12.0f}{row['spread']:>8.1%}{row['cpu_ms']:>13.2f}", end="")
        for bare in FILTERS:
            row[f"of {bare}"] = timing.ratio(found[bare], samples)[0]
            row[f"of {bare}, CPU"] = timing.ratio(found[bare], samples, timing.PROCESSOR)[0]
            print(f"{row[f'of {bare}']:>9.2f}, CPU {row[f'of {bare}, CPU']:>4.2f}", end="")
        print()
        rows.append(row)
    print(json.dumps({"rows": rows, "opencv": cv2.__version__, "cores": os.cpu_count(), **vars(options)}))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
