"""What does an official AffectNet release look like? Miniatures of both, whose images tell class and part."""

from __future__ import annotations

import io
import tarfile
import zipfile

import cv2
import numpy as np

# The releases' codes, and the red level of the images in these tests.
CODES = {
    "Neutral": 0,
    "Happy": 1,
    "Sad": 2,
    "Surprise": 3,
    "Fear": 4,
    "Disgust": 5,
    "Anger": 6,
    "Contempt": 7,
    "none": 8,
    "uncertain": 9,
    "non-face": 10,
}
LEVELS = {name: 5 + 24 * code for name, code in CODES.items()}
PARTS = {"train": 60, "test": 180}  # the green level
BLUE = 120
HEADER = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"


def jpeg(name, part, box=None, shape=(40, 40)):
    """An image of one colour for its class and part; with a box that colour is inside it and white around."""
    bgr = (BLUE, PARTS[part], LEVELS[name])
    if box is None:
        pixels = np.full((*shape, 3), bgr, np.uint8)
    else:
        pixels = np.full((*shape, 3), 255, np.uint8)
        x, y, width, height = box
        pixels[y : y + height, x : x + width] = bgr
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()


def shown(images):
    """(class, part) that each image tells in its middle, and nothing else may stand there."""
    middle = images[:, images.shape[1] // 2, images.shape[2] // 2].astype(int)
    found = []
    for red, green, blue in middle:
        name = min(LEVELS, key=lambda name: abs(LEVELS[name] - red))
        part = min(PARTS, key=lambda part: abs(PARTS[part] - green))
        assert abs(LEVELS[name] - red) + abs(PARTS[part] - green) + abs(BLUE - blue) < 12, (red, green, blue)
        found.append((name, part))
    return found


def npy(value, dtype=None):
    file = io.BytesIO()
    np.save(file, np.array(value, dtype))
    return file.getvalue()


def annotated(counts, part, label=lambda code: npy(str(code)), first_id=0, suffix=".jpg"):
    """``images/`` and ``annotations/`` with so many images a class, the classes taking turns."""
    files, number = {}, first_id
    for repeat in range(max(counts.values())):
        for name, count in counts.items():
            if repeat < count:
                files[f"images/{number}{suffix}"] = jpeg(name, part)
                files[f"annotations/{number}_exp.npy"] = label(CODES[name])
                files[f"annotations/{number}_val.npy"] = npy("-0.5")
                files[f"annotations/{number}_aro.npy"] = npy("0.25")
                files[f"annotations/{number}_lnd.npy"] = npy(np.zeros(136))
                number += 1
    return files


def release_2021(train, test, label=lambda code: npy(str(code))):
    """relative name -> bytes, as the 2021 release is laid out."""
    return {
        **{f"train_set/{name}": data for name, data in annotated(train, "train", label).items()},
        **{f"val_set/{name}": data for name, data in annotated(test, "test", label, first_id=1000).items()},
    }


def row(path, code, box=(10, 5, 20, 30), valence="-0.176846", arousal="-0.0776398"):
    landmarks = ";".join(f"{10 + i}.5" for i in range(136))
    return ",".join([path, *map(str, box), landmarks, str(code), valence, arousal])


def release_first(train, test, images="Manually_Annotated_Images/", tables="", header=(True, True)):
    """relative name -> bytes, as the first release is laid out; faces stand at odd places in larger images."""
    files = {}
    for part, table, counts, with_header in (
        ("train", "training.csv", train, header[0]),
        ("test", "validation.csv", test, header[1]),
    ):
        lines = [HEADER] * with_header
        number = 0
        for repeat in range(max(counts.values(), default=0)):
            for name, count in counts.items():
                if repeat < count:
                    path = f"{number % 3 + 1}/{part}{number:04}abc.jpg"
                    box = (8 + number % 5, 30 - number % 7, 24, 32)
                    files[images + path] = jpeg(name, part, box, (90, 70))
                    lines.append(row(path, CODES[name], box))
                    number += 1
        files[tables + table] = ("\n".join(lines) + "\n").encode()
    return files


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path
