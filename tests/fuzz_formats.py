"""The formats that `fuzz.py` damages: one small valid file of each, and the public reader of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from fuzz_releases import (
    encoded,
    fer2013,
    read_affectnet,
    read_ferplus,
    read_published,
    read_rafdb,
    write_affectnet_2021,
    write_affectnet_tables,
    write_fer2013_csv,
    write_fer2013_folders_zip,
    write_fer2013_gz,
    write_fer2013_tar,
    write_fer2013_zip,
    write_ferplus,
    write_published,
    write_rafdb,
    write_rafdb_zip,
)

import data_helper
from datasets import CLASS_NAMES
from reading.text import printable_lines

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
        keras: whether reading it needs Keras, which takes seconds to import.
    """

    name: str
    write: Callable[[Path], None]
    targets: Sequence[str]
    read: Callable[[Path], object]
    share: float = 1
    keras: bool = False


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


def write_label_list(folder: Path) -> None:
    from reading.image_digests import image_digests
    from reading.label_lists import write_list

    write_prepared(folder)
    split = data_helper.open_split(folder, "ferplus", "train")
    rows = [7, 2, 5]
    labels = [split.class_names[split.labels[row]] for row in rows]
    columns = {"row": rows, "image": image_digests(split.rows, rows=rows), "label": labels, "score": [0.1, 0.2, 0.3]}
    write_list(folder / "list.csv", columns)


def read_label_list(folder: Path) -> None:
    from training.left_out import kept_rows

    split = data_helper.open_split(folder, "ferplus", "train")
    with contextlib.redirect_stdout(io.StringIO()):
        kept = kept_rows(split, str(folder / "list.csv"), None)
    if not set(range(9)) - set(kept.tolist()) <= {2, 5, 7}:
        raise Believed("a row whose image and label are others")


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


# --- images and video


def image(ending: str) -> Format:
    name = f"image{ending}"

    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        pixels = cv2.resize(rng.integers(0, 256, (4, 5, 3), np.uint8), (50, 40))
        (folder / name).write_bytes(encoded(pixels, ending))

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


def write_tflite(folder: Path) -> None:
    from test_lite_network import write_toy

    write_toy(folder / "toy.tflite")


def read_tflite(folder: Path) -> None:
    from model_files import lite_check
    from model_files.lite_network import LiteNetwork

    lite_check.SECONDS = 5
    network = LiteNetwork(folder / "toy.tflite")
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


# --- a folder of runs


@functools.cache
def _grid():
    from config import DatasetName, TrainConfig
    from grids.experiments import Experiment, Grid

    settings = TrainConfig(dataset=DatasetName.synthetic, data_dir="none")
    return Grid("fuzzed", "", (Experiment("row", settings),), (0,))


def write_runs(folder: Path) -> None:
    import run_identity
    from files import write_json

    experiment, seed = _grid().runs()[0]
    identity = run_identity.RunIdentity(run_identity.options_of(experiment.with_seed(seed)), {"train": "0" * 64})
    run = folder / identity.name
    write_json(run / "config.json", identity.to_dict())
    write_json(run / "error.json", {"command": "python train.py", "exit_code": 2, "message": "the disk is full"})
    (run / "history.csv").write_text("epoch,loss,val_accuracy,seconds\n1,0.5,0.25,3.125\n2,0.5,0.5,3.5\n")
    run.rename(folder / "run")


def read_runs(folder: Path) -> None:
    from files import UserError
    from grids.runner import runs_of
    from reading.run_files import read_history

    with contextlib.redirect_stderr(io.StringIO()) as shown:
        (run,) = runs_of(_grid(), folder)
    message = run.error()
    assert message is None or message == printable_lines(message)
    run.epochs_done(), run.epoch_seconds(), run.title
    read_history(folder / "run/history.csv")
    if shown.getvalue():
        raise UserError(shown.getvalue().removesuffix("\n"))


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
    from model_files import model_file

    model_file.load_model(folder / "published.h5")


def write_archive(folder: Path) -> None:
    network, _ = _tiny()
    network.save(folder / "tiny.keras")


def read_archive(folder: Path) -> None:
    from model_files import model_file

    model_file.load_model(folder / "tiny.keras")


def write_parts(folder: Path) -> None:
    from model_files import parts

    (folder / "whole.bin").write_bytes(bytes(range(256)) * 4)
    parts.split(folder / "whole.bin", folder / "parts", 400)


def read_parts(folder: Path) -> None:
    from model_files import parts

    parts.join(folder / "parts", folder / "joined.bin")
    if (folder / "joined.bin").read_bytes() != bytes(range(256)) * 4:
        raise Believed("parts of another content than the manifest's digests")


@functools.cache
def _trainer():
    from conftest import small_trainer

    return small_trainer()


def _run_state(folder: Path):
    from training.run_state import RunState

    return RunState(folder / "run", "val_accuracy", lambda row: lambda: None, run="fuzzed")


def write_state(folder: Path) -> None:
    (folder / "run").mkdir()
    with contextlib.closing(_run_state(folder)) as state:
        state.set_model(_trainer())
        state.on_epoch_begin(0)
        state.on_epoch_end(0, {"val_accuracy": 0.5})


def read_state(folder: Path) -> None:
    state = _run_state(folder)
    state.restore(_trainer())
    finite = all(np.isfinite(np.asarray(variable)).all() for variable in _trainer().state_variables())
    if not finite or state.epochs_done != 1 or state.steps_done:
        raise Believed("weights that are not finite, or another place than the one that was written")


def write_groups(folder: Path) -> None:
    rows = "".join(f"{row},{'abc'[row % 3]}\n" for row in range(30))
    (folder / "groups.csv").write_text(f"image,group\n{rows}")


def read_groups(folder: Path) -> None:
    from reading import group_table

    found = group_table.read_groups(folder / "groups.csv", 30, "toy/val")
    if not all(0 <= row < 30 and group.isprintable() for row, group in found.items()):
        raise Believed("a row that is none of the split's, or a name that is not printable")


FORMATS = (
    Format("images.npy", write_prepared, ("ferplus/train/images.npy",), read_prepared, 2),
    Format("labels.npy", write_prepared, ("ferplus/train/labels.npy",), read_prepared),
    Format("votes.npy", write_prepared, ("ferplus/train/votes.npy",), read_prepared),
    Format("meta.json", write_prepared, ("ferplus/train/meta.json",), read_prepared, 3),
    Format("label list", write_label_list, ("list.csv",), read_label_list),
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
    Format("tflite", write_tflite, ("toy.tflite",), read_tflite, 0.3, keras=True),
    Format("yaml", write_yaml, ("grid.yaml",), read_yaml, 2),
    Format("result.json", write_run, ("run/result.json",), read_run, 2),
    Format("predictions.npz", write_run, ("run/predictions.npz",), read_run, 2),
    Format("groups.csv", write_groups, ("groups.csv",), read_groups),
    Format("history.csv", write_run, ("run/history.csv",), read_run),
    Format("runs", write_runs, ("run/config.json", "run/error.json", "run/history.csv"), read_runs, 2),
    Format("weights.h5", write_weights, ("best.weights.h5",), read_weights, keras=True),
    Format("state.h5", write_state, ("run/state.h5",), read_state, 2, keras=True),
    Format("published.h5", write_published_h5, ("published.h5",), read_published_h5, keras=True),
    Format("archive", write_archive, ("tiny.keras",), read_archive, keras=True),
    Format("parts", write_parts, ("parts/weights.parts.json", "parts/weights.part01"), read_parts),
)
