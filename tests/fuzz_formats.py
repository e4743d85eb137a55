"""The formats that `fuzz.py` damages: one small valid file of each, and the public reader of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

import data_helper
from datasets import CLASS_NAMES

sys.path += [str(Path(__file__).with_name(folder)) for folder in ("model_files", "reporting")]  # their test helpers
NAMES = CLASS_NAMES[:7]


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: as in the counts.
        write: writes the valid files into an empty folder.
        targets: the files that are damaged, one at a time; relative to the folder.
        read: reads what is in the folder; raises `files.UserError` for what is damaged.
        share: how many of a hundred cases are of this format, relative to the others.
        left_out: why the quick tier leaves it out; empty when it does not.
    """

    name: str
    write: Callable[[Path], None]
    targets: Sequence[str]
    read: Callable[[Path], object]
    share: float = 1
    left_out: str = ""


class Believed(AssertionError):
    """A reader took something that contradicts the digest or the rest of the file."""


# --- prepared data


def write_prepared(folder: Path) -> None:
    from datasets.shared.split_writer import SplitWriter

    with SplitWriter(folder, "ferplus", "train", 9, (6, 5, 1), NAMES, [], {"form": "csv"}) as writer:
        rng = np.random.default_rng(0)
        labels = [0, 1, 2, 3, 4, 5, 6, 0, 1]
        for label in labels:
            writer.add(rng.integers(0, 256, (6, 5, 1), np.uint8), label)
        writer.add_array("votes", 0.6 * np.eye(7, dtype=np.float32)[labels] + np.float32(0.4 / 7))


def read_prepared(folder: Path) -> None:
    split = data_helper.open_split(folder, "ferplus", "train")
    images = np.asarray(split.rows[:])
    assert images.shape == split.images.shape and split.class_counts.sum() == len(split)
    if split.digest != split.computed_digest():
        raise Believed("other content than the digest's")


RUN = {"sha256": "0" * 64, "pictures": 5, "splits": ["train"]}


def _writer(folder: Path):
    from datasets.shared.split_writer import SplitWriter

    return SplitWriter(folder, "set", "train", 5, (6, 5, 1), NAMES, [], {}, RUN)


def write_journal(folder: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), _writer(folder) as writer:
        for label in range(3):
            writer.add(np.full((6, 5, 1), label, np.uint8), label)
            writer.checkpoint()
        raise KeyboardInterrupt


def read_journal(folder: Path) -> None:
    with _writer(folder) as writer:
        while writer.done < 5:
            writer.add(np.zeros((6, 5, 1), np.uint8), 0)
    data_helper.open_split(folder, "set", "train")


# --- releases


def _gray(level: int) -> np.ndarray:
    return np.full((48, 48), level, np.uint8)


def _encoded(image: np.ndarray, ending: str = ".jpg") -> bytes:
    return cv2.imencode(ending, image)[1].tobytes()


def _csv() -> str:
    usages = ("Training", "Training", "PublicTest", "PrivateTest")
    rows = (f"{code},{' '.join(['7', '255'] + [str(code)] * 2302)},{usage}" for usage in usages for code in (0, 3, 6))
    return "\n".join(["emotion,pixels,Usage", *rows]) + "\n"


def write_fer2013_csv(folder: Path) -> None:
    (folder / "fer2013.csv").write_text(_csv())


def write_fer2013_gz(folder: Path) -> None:
    (folder / "fer2013.csv.gz").write_bytes(gzip.compress(_csv().encode()))


def write_fer2013_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "fer2013.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fer2013.csv", _csv())


def _folder_form() -> dict[str, bytes]:
    names = ("train/angry/Training_1.jpg", "test/sad/PublicTest_2.jpg", "test/neutral/PrivateTest_3.jpg")
    return {name: _encoded(_gray(40 * place)) for place, name in enumerate(names)}


def write_fer2013_folders_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "fer2013.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in _folder_form().items():
            archive.writestr(name, data)


def write_fer2013_tar(folder: Path) -> None:
    with tarfile.open(folder / "fer2013.tar", "w") as archive:
        for name, data in _folder_form().items():
            (folder / "image").write_bytes(data)
            archive.add(folder / "image", name)
    (folder / "image").unlink()


def fer2013(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from datasets.fer2013 import PrepareFer2013Config, prepare_fer2013

        prepare_fer2013(PrepareFer2013Config(str(folder / name), str(folder / "data")))
        data_helper.open_split(folder / "data", "fer2013", "train")

    return read


def write_ferplus(folder: Path) -> None:
    write_fer2013_csv(folder)
    columns = "neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
    lines = [f"Usage,Image name,{columns}"]
    usages = (row.rpartition(",")[2] for row in _csv().splitlines()[1:])
    lines += [f"{usage},fer{place}.png,0,8,1,0,1,0,0,0,0,0" for place, usage in enumerate(usages)]
    (folder / "fer2013new.csv").write_text("\n".join(lines) + "\n")


def read_ferplus(folder: Path) -> None:
    from datasets.ferplus import PrepareFerplusConfig, prepare_ferplus

    prepare_ferplus(PrepareFerplusConfig(str(folder), str(folder / "data")))


def write_rafdb(folder: Path) -> None:
    stems = ("train_00001", "train_00002", "test_0001")
    for name in ("EmoLabel", "Image/original", "Annotation/boundingbox"):
        (folder / "basic" / name).mkdir(parents=True)
    (folder / "basic/EmoLabel/list_patition_label.txt").write_text("".join(f"{stem}.jpg 4\n" for stem in stems))
    for stem in stems:
        (folder / f"basic/Image/original/{stem}.jpg").write_bytes(_encoded(_gray(90)))
        (folder / f"basic/Annotation/boundingbox/{stem}_boundingbox.txt").write_text("3.2 8.1 29.6 39.8\n")


def read_rafdb(folder: Path) -> None:
    from datasets.rafdb import PrepareRafdbConfig, prepare_rafdb

    source = folder / "basic.zip" if (folder / "basic.zip").exists() else folder / "basic"
    prepare_rafdb(PrepareRafdbConfig(str(source), str(folder / "data"), size=8, images="original", workers=1))


def write_rafdb_zip(folder: Path) -> None:
    write_rafdb(folder)
    shutil.make_archive(str(folder / "basic"), "zip", folder, "basic")
    shutil.rmtree(folder / "basic")


def _npy(value: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(value))
    return file.getvalue()


def write_affectnet_tables(folder: Path) -> None:
    columns = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
    for name, part in (("training.csv", "1"), ("validation.csv", "2")):
        (folder / "release" / part).mkdir(parents=True)
        (folder / f"release/{part}/a.jpg").write_bytes(_encoded(_gray(50)))
        rows = [f"{part}/a.jpg,3,4,20,20,1;2;3,{code},0.1,-0.2" for code in (1, 8)]
        (folder / "release" / name).write_text("\n".join([columns, *rows]) + "\n")


def write_affectnet_2021(folder: Path) -> None:
    with zipfile.ZipFile(folder / "release.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ("train_set", "val_set"):
            for number, code in enumerate((1, 3)):
                archive.writestr(f"{part}/images/{number}.jpg", _encoded(_gray(50)))
                archive.writestr(f"{part}/annotations/{number}_exp.npy", _npy(str(code)))


def read_affectnet(folder: Path) -> None:
    from datasets.affectnet import PrepareAffectnetConfig, prepare_affectnet

    source = folder / "release.zip" if (folder / "release.zip").exists() else folder / "release"
    prepare_affectnet(PrepareAffectnetConfig(str(source), str(folder / "data"), size=8, val_share=0, workers=1))


def write_published(folder: Path) -> None:
    for name in ("images", "annotations"):
        (folder / "pub" / name).mkdir(parents=True)
    for number in range(2):
        (folder / f"pub/images/{number}.jpg").write_bytes(_encoded(_gray(50)))
        (folder / f"pub/annotations/{number}_exp.npy").write_bytes(_npy(number))


def read_published(folder: Path) -> None:
    from datasets.published import PreparePublishedConfig, prepare_published

    prepare_published(PreparePublishedConfig(str(folder / "pub"), str(folder / "data"), size=8, workers=1))


# --- images and video


def image(ending: str) -> Format:
    name = f"image{ending}"

    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        pixels = cv2.resize(rng.integers(0, 256, (4, 5, 3), np.uint8), (50, 40))
        (folder / name).write_bytes(_encoded(pixels, ending))

    def read(folder: Path) -> None:
        from images import read_image

        found = read_image(folder / name)
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3

    return Format(ending[1:], write, (name,), read)


def write_video(folder: Path) -> None:
    writer = cv2.VideoWriter(str(folder / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for level in range(5):
        writer.write(np.full((48, 64, 3), 40 * level, np.uint8))
    writer.release()


def read_video(folder: Path) -> None:
    from faces.video import open_clip

    with open_clip(folder / "clip.avi") as video:
        for _ in zip(video, range(100), strict=False):
            pass


# --- networks, grids, reports


def write_onnx(folder: Path) -> None:
    from test_onnx_network import write_toy

    write_toy(folder / "toy.onnx")


def read_onnx(folder: Path) -> None:
    from model_files import onnx_check
    from model_files.onnx_network import OnnxNetwork

    onnx_check.SECONDS = 5
    network = OnnxNetwork(folder / "toy.onnx", gpu=False)
    size = network.info.network.input_size
    probabilities, _ = network.predict(np.zeros((2, size, size, 3), np.uint8))
    json.dumps(probabilities.tolist(), allow_nan=False)


def write_yaml(folder: Path) -> None:
    (folder / "grid.yaml").write_text(
        "about: Does a ramp help?\nrecipe: default\ndatasets: [fer2013]\nbase: {epochs: 3, w_ed: 0, adaptive: false}\n"
        "rows:\n  - {name: no ramp}\n  - {name: ramp, ramp_epochs: 1.5, w_ed: 2, w_ce: null}\n"
    )


def read_yaml(folder: Path) -> None:
    from config import TrainConfig
    from grids.experiments import make_grid, read_experiments

    make_grid(read_experiments(str(folder / "grid.yaml")), TrainConfig(), False, 1)


def write_run(folder: Path) -> None:
    from report_runs import write_run as write

    write(folder / "run", n=30)


def read_run(folder: Path) -> None:
    from reporting.rows import RunFiles

    run = RunFiles.read(folder / "run")
    assert run.correct.shape == (30,)


# --- HDF5


def _tiny() -> tuple:
    from model_files import model_file
    from model_files.description import NetworkDescription

    described = NetworkDescription("mini_xcp", NAMES, num_embeddings=2, embedding_size=8, input_size=24)
    return model_file.build_network(described), model_file.ModelInfo(described)


def write_weights(folder: Path) -> None:
    from model_files import model_file

    model_file.save_model(folder / "best.weights.h5", *_tiny())


def read_weights(folder: Path) -> None:
    from model_files import model_file

    model_file.load_model(folder / "best.weights.h5")


def write_published_h5(folder: Path) -> None:
    network, _ = _tiny()
    network.save(folder / "published.h5")


def read_published_h5(folder: Path) -> None:
    from model_files.published_file import read_saved_model

    read_saved_model(folder / "published.h5")


@functools.cache
def _trained():
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def write_state(folder: Path) -> None:
    from trainer import RunState

    state = RunState(folder / "run", "val_accuracy", lambda row: None)
    state.set_model(_trained())
    state.on_epoch_begin(0)
    state.on_epoch_end(0, {"val_accuracy": 0.5})


def read_state(folder: Path) -> None:
    from trainer import RunState

    state = RunState(folder / "run", "val_accuracy", lambda row: None)
    state.restore(_trained())
    finite = all(np.isfinite(np.asarray(variable)).all() for variable in _trained().variables)
    if not finite or state.epochs_done > 1:
        raise Believed("weights that are not finite, or more epochs than were trained")


_GATE = "HDF5's own parser ends the process for some damage until files are tried in another process first"

FORMATS = (
    Format("images.npy", write_prepared, ("ferplus/train/images.npy",), read_prepared, 2),
    Format("labels.npy", write_prepared, ("ferplus/train/labels.npy",), read_prepared),
    Format("votes.npy", write_prepared, ("ferplus/train/votes.npy",), read_prepared),
    Format("meta.json", write_prepared, ("ferplus/train/meta.json",), read_prepared, 3),
    Format("journal", write_journal, ("set/.tmp-train/journal.jsonl", "set/.tmp-train/new/images.npy"), read_journal),
    Format("fer2013.csv", write_fer2013_csv, ("fer2013.csv",), fer2013("fer2013.csv"), 2),
    Format("fer2013.csv.gz", write_fer2013_gz, ("fer2013.csv.gz",), fer2013("fer2013.csv.gz")),
    Format("csv in zip", write_fer2013_zip, ("fer2013.zip",), fer2013("fer2013.zip"), 2),
    Format("folders in zip", write_fer2013_folders_zip, ("fer2013.zip",), fer2013("fer2013.zip"), 2),
    Format("folders in tar", write_fer2013_tar, ("fer2013.tar",), fer2013("fer2013.tar"), 2),
    Format("ferplus votes", write_ferplus, ("fer2013new.csv",), read_ferplus),
    Format(
        "rafdb",
        write_rafdb,
        (
            "basic/EmoLabel/list_patition_label.txt",
            "basic/Annotation/boundingbox/train_00001_boundingbox.txt",
            "basic/Image/original/train_00001.jpg",
        ),
        read_rafdb,
    ),
    Format("rafdb zip", write_rafdb_zip, ("basic.zip",), read_rafdb),
    Format("affectnet csv", write_affectnet_tables, ("release/training.csv", "release/validation.csv"), read_affectnet),
    Format("affectnet zip", write_affectnet_2021, ("release.zip",), read_affectnet, 2),
    Format("published", write_published, ("pub/annotations/0_exp.npy", "pub/images/0.jpg"), read_published),
    *map(image, (".png", ".jpg", ".bmp", ".tiff", ".webp", ".gif")),
    Format("video", write_video, ("clip.avi",), read_video),
    Format("onnx", write_onnx, ("toy.onnx",), read_onnx, 0.3),
    Format("yaml", write_yaml, ("grid.yaml",), read_yaml, 2),
    Format("result.json", write_run, ("run/result.json",), read_run, 2),
    Format("predictions.npz", write_run, ("run/predictions.npz",), read_run, 2),
    Format("history.csv", write_run, ("run/history.csv",), read_run),
    Format("weights.h5", write_weights, ("best.weights.h5",), read_weights, left_out=_GATE),
    Format("state.h5", write_state, ("run/state.h5",), read_state, left_out=_GATE),
    Format("published.h5", write_published_h5, ("published.h5",), read_published_h5, left_out=_GATE),
)
