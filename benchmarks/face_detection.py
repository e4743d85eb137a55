"""Measures how well and how fast faces are found, and whether the crops look like FER-2013.

``python benchmarks/face_detection.py --data data/fer2013/val`` pastes faces of FER-2013's PublicTest, as
`prepare_data.py` prepared them, at known places on backgrounds without people, and measures for each detector:

- framing: the scale and shift that turn its box into FER-2013's square (`faces.framing.FRAMES` holds the result);
- recall by size and by angle, and at the border; boxes where no face is;
- accuracy of a model on the crops against the given faces, on the same images;
- time per image at 640 x 480, full HD and 12 megapixels; the detectors take turns (`timing.py`).

Everything is drawn from --seed. Prints tables and one JSON line.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import faces
from faces import haar, mtcnn, yunet
from faces.framing import landmark_square
from files import UserError, run_command

# isort: split
import timing

SIZES = (24, 32, 48, 64, 100, 200, 400)
ANGLES = (0, 10, 20, 30, 45)
ANGLE_SIZE = 96
TURNED = 20  # degrees, for the accuracy
BORDER_SHARE = 0.2  # of the face is cut off
FOUND_IOU = 0.4  # of the framed square with the true one
CERTAIN = {module.NAME: module.CERTAIN for module in (haar, mtcnn, yunet)}
TIMED = ((640, 480), (1920, 1080), (4000, 3000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("data/fer2013/val"), help="folder with images.npy, labels.npy"
    )
    parser.add_argument("--detectors", nargs="+", default=("haar", "mtcnn"), choices=("haar", "yunet", "mtcnn"))
    parser.add_argument("--file", type=Path, help="model file of yunet; default: fetched into the cache folder")
    parser.add_argument(
        "--faces",
        type=int,
        default=120,
        help="pasted faces of each size and angle; 3 times as many for the framing, 10 times for the accuracy",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed images of each size")
    parser.add_argument("--only", nargs="+", default=(), choices=("framing", "recall", "accuracy", "time"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if min(options.faces, options.rounds) < 1:
        raise UserError("--faces, --rounds: expected 1 or more")
    if not (options.data / "images.npy").exists():
        raise UserError(f"{options.data}: no images.npy; prepare FER-2013 first: python prepare_data.py fer2013")
    given = np.load(options.data / "images.npy", mmap_mode="r"), np.load(options.data / "labels.npy")
    detectors = [faces.open_detector(name, options.file if name == "yunet" else None) for name in options.detectors]
    parts = {"framing": measure_framing, "recall": measure_recall, "accuracy": measure_accuracy}
    results = {"n": options.faces, "seed": options.seed, "opencv": cv2.__version__}
    for name, part in parts.items():
        if not options.only or name in options.only:
            results[name] = [row for one in detectors for row in part(one, *given, options.faces, options.seed)]
            print_table(name, results[name])
    if not options.only or "time" in options.only:
        results["time"] = measure_time(detectors, given[0], options.rounds, options.seed)
        print_table("time, median ms", results["time"])
    print(json.dumps(results))


def print_table(title: str, rows: list[dict]) -> None:
    print(f"\n{title}\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print("|", " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), "|")
    print(flush=True)


# --- scenes


@functools.cache
def photograph(name: str) -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return load_sample_image(name)


def background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A part of one of two photographs without people (scikit-learn's), or a drawn texture; uint8 (H, W, 3)."""
    kind = rng.integers(4)
    if kind < 2:
        photo = photograph(("china.jpg", "flower.jpg")[kind])[:, :: rng.choice((1, -1))]
        part = min(1.0, rng.uniform(0.4, 1)) * min(photo.shape[1] / width, photo.shape[0] / height)
        w, h = max(2, int(width * part)), max(2, int(height * part))
        x, y = rng.integers(photo.shape[1] - w + 1), rng.integers(photo.shape[0] - h + 1)
        return cv2.resize(
            np.ascontiguousarray(photo[y : y + h, x : x + w]), (width, height), interpolation=cv2.INTER_AREA
        )
    image = np.zeros((height, width, 3), np.float32)
    for cell in (4, 16, 64, 256) if kind == 2 else (128,):  # noise of all sizes, or soft patches of colour
        coarse = rng.normal(0, cell**0.5, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + image * (50 / image.std()), 0, 255).astype(np.uint8)


def paste(scene: np.ndarray, face: np.ndarray, x: float, y: float, side: int, angle: float = 0) -> None:
    """Draws a square face (48, 48) into a scene (H, W, 3): x and y of its upper left corner, angle in degrees."""
    grown = cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA if side < 48 else cv2.INTER_CUBIC)
    turn = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), angle, 1)
    turn[:, 2] += x, y
    size = scene.shape[1::-1]
    mask = cv2.warpAffine(np.ones((side, side), np.uint8), turn, size, flags=cv2.INTER_NEAREST)
    drawn = cv2.warpAffine(grown, turn, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    scene[mask > 0] = drawn[mask > 0][:, None]


def scene_with(rng, face, side, angle=0, out=0.0):
    """A scene and the square in it, x, y, side; ``out`` is the share of the face beyond the border."""
    width, height = (max(160, int(side * rng.uniform(1.8, 3.2))) for _ in range(2))
    if side <= 48:
        width, height = 320, 240
    scene = background(rng, width, height)
    x, y = (
        rng.integers((width - side) // 4, (width - side) * 3 // 4),
        rng.integers((height - side) // 4, (height - side) * 3 // 4),
    )
    if out:
        x, y = [(-round(out * side), y), (width - side + round(out * side), y), (x, height - side + round(out * side))][
            rng.integers(3)
        ]
    paste(scene, face, x, y, side, angle)
    return scene, (float(x), float(y), float(side))


def overlap(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """Intersection over union of two squares x, y, side."""
    shared = [max(0.0, min(a[i] + a[2], b[i] + b[2]) - max(a[i], b[i])) for i in (0, 1)]
    return shared[0] * shared[1] / (a[2] ** 2 + b[2] ** 2 - shared[0] * shared[1])


def match(found: list, true: tuple[float, float, float]):
    """The face that lies on the true square, or None."""
    hits = [face for face in found if overlap(faces.square(face), true) >= FOUND_IOU]
    return max(hits, key=lambda face: face.score, default=None)


def draw_faces(images: np.ndarray, labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Indices of n faces, without the few images of one gray value."""
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.array([i for i in order[: 2 * n] if images[i].std() > 8][:n])


# --- measurements


def measure_framing(detector, images, labels, n, seed) -> list[dict]:
    """Medians over faces of 40 to 240 pixels, with half the range of the middle half: of boxes, and of landmarks."""
    rng, boxes, landmarks = np.random.default_rng([seed, 1]), [], []
    for i in draw_faces(images, labels, 3 * n, seed + 1):
        side = int(np.exp(rng.uniform(np.log(40), np.log(240))))
        scene, (x, y, _) = scene_with(rng, images[i, ..., 0], side)
        true = np.array([x + side / 2, y + side / 2])
        near = [face for face in detector.detect(scene) if np.hypot(*(true - face.center)) < 0.35 * side]
        for face in near[:1]:
            boxes.append((side / face.side, *((true - face.center) / face.side)))
            if face.landmarks is not None:
                center, reference = landmark_square(face)
                landmarks.append((side / reference, *((true - center) / reference)))
    rows = []
    for name, values in (("box", boxes), ("landmarks", landmarks)):
        row = {"detector": detector.name, "square of": name, "found": len(values), "n": 3 * n}
        for key, column in zip(("scale", "shift x", "shift y"), np.transpose(values), strict=False):
            low, middle, high = np.percentile(column, (25, 50, 75))
            row |= {key: float(middle), f"± {key}": float(high - low) / 2}
        rows += [row] if values else []
    return rows


def measure_recall(detector, images, labels, n, seed) -> list[dict]:
    """Shares found by size and angle and at the border, and boxes on no face per megapixel of background."""
    rng = np.random.default_rng([seed, 2])
    row, false, pixels, sure_false = {"detector": detector.name}, 0, 0, 0
    cases = [(f"{side} px", side, 0, 0.0) for side in SIZES]
    cases += [(f"{angle}°", ANGLE_SIZE, angle, 0.0) for angle in ANGLES[1:]] + [("border", ANGLE_SIZE, 0, BORDER_SHARE)]
    for name, side, angle, out in cases:
        count = max(1, n // 3) if side >= 200 else n
        hits = 0
        for i in draw_faces(images, labels, count, seed + 2):
            sign = rng.choice((-1, 1))
            scene, true = scene_with(rng, images[i, ..., 0], side, sign * angle, out)
            found = detector.detect(scene)
            hits += match(found, true) is not None
            wrong = [face for face in found if overlap(faces.square(face), true) < 0.1]
            false, pixels = false + len(wrong), pixels + scene.shape[0] * scene.shape[1]
            sure_false += sum(face.score >= CERTAIN[detector.name] for face in wrong)
        row[name] = hits / count
    return [row | {"false/MP": false / pixels * 1e6, "certain false/MP": sure_false / pixels * 1e6}]


def measure_accuracy(detector, images, labels, n, seed) -> list[dict]:
    """Accuracy on crops against the given faces, upright and turned: see `accuracy_row`."""
    from test_model import TestModels

    model = TestModels(GPU=False)
    return [accuracy_row(detector, model, images, labels, *case, seed) for case in ((10 * n, 0), (3 * n, TURNED))]


def accuracy_row(detector, model, images, labels, n, angle, seed) -> dict:
    """Accuracy on those found, and with those not found counted as wrong; ± is the difference's standard error."""
    rng = np.random.default_rng([seed, 3])
    chosen, crops, aligned = draw_faces(images, labels, n, seed + 3), {}, {}
    for i in chosen:
        side = int(np.exp(rng.uniform(np.log(48), np.log(200))))
        scene, true = scene_with(rng, images[i, ..., 0], side, rng.choice((-1, 1)) * angle if angle else 0)
        face = match(detector.detect(scene), true)
        if face is not None:
            crops[i] = faces.crop(scene, face, size=model.input_size)
            aligned[i] = faces.crop(scene, face, align=True, size=model.input_size)
    found = np.array(list(crops))

    def right(inputs, indices):
        return model.predict(np.stack(inputs))[0].argmax(axis=1) == labels[indices]

    given, cut = right(images[found], found), right(list(crops.values()), found)
    return {
        "detector": detector.name,
        "turned": f"{angle}°",
        "n": len(chosen),
        "found": len(found) / len(chosen),
        "given, found ones": float(given.mean()),
        "crops, found ones": float(cut.mean()),
        "aligned, found ones": float(right(list(aligned.values()), found).mean()),
        "given, all": float(right(images[chosen], chosen).mean()),
        "crops, all": float(cut.sum() / len(chosen)),
        "±": float((cut.astype(int) - given).std() / len(found) ** 0.5),
    }


def measure_time(detectors, images, rounds, seed) -> list[dict]:
    """Median time of one image with three faces; the detectors take turns. The CPU's time depends less on the load."""
    rows = [{"detector": detector.name} for detector in detectors]
    for width, height in TIMED:
        scenes = make_scenes(images, rounds + 1, width, height, np.random.default_rng([seed, width]))
        # Every detector sees the same images; the first one warms up.
        sides = {detector.name: functools.partial(detect_next, detector, iter(scenes)) for detector in detectors}
        found = timing.take_turns(sides, rounds)
        for row, samples in zip(rows, found.values(), strict=True):
            name = f"{width} x {height}"
            row |= {name: 1e3 * samples.median(), f"{name}, spread": samples.spread()}
            row[f"{name}, CPU"] = 1e3 * samples.median(timing.PROCESSOR)
    return rows


def make_scenes(images, count: int, width: int, height: int, rng: np.random.Generator) -> list[np.ndarray]:
    scenes = []
    for _ in range(count):
        scene = background(rng, width, height)
        for k in range(3):
            side = height // 8 * (k + 1) // 2
            paste(scene, images[rng.integers(len(images)), ..., 0], width * (k + 1) / 5, height / 3, side)
        scenes.append(scene)
    return scenes


def detect_next(detector, scenes) -> None:
    detector.detect(next(scenes))


if __name__ == "__main__":
    sys.exit(run_command(main))
