"""Releases that `fuzz.py` damages: small ones of every data set and form, and the public reader of each."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

import data_helper


def _gray(level: int) -> np.ndarray:
    return np.full((48, 48), level, np.uint8)


def encoded(image: np.ndarray, ending: str = ".jpg") -> bytes:
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
    return {name: encoded(_gray(40 * place)) for place, name in enumerate(names)}


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
        (folder / f"basic/Image/original/{stem}.jpg").write_bytes(encoded(_gray(90)))
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
        (folder / f"release/{part}/a.jpg").write_bytes(encoded(_gray(50)))
        rows = [f"{part}/a.jpg,3,4,20,20,1;2;3,{code},0.1,-0.2" for code in (1, 8)]
        (folder / "release" / name).write_text("\n".join([columns, *rows]) + "\n")


def write_affectnet_2021(folder: Path) -> None:
    with zipfile.ZipFile(folder / "release.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ("train_set", "val_set"):
            for number, code in enumerate((1, 3)):
                archive.writestr(f"{part}/images/{number}.jpg", encoded(_gray(50)))
                archive.writestr(f"{part}/annotations/{number}_exp.npy", _npy(str(code)))


def read_affectnet(folder: Path) -> None:
    from datasets.affectnet import PrepareAffectnetConfig, prepare_affectnet

    source = folder / "release.zip" if (folder / "release.zip").exists() else folder / "release"
    prepare_affectnet(PrepareAffectnetConfig(str(source), str(folder / "data"), size=8, val_share=0, workers=1))


def write_published(folder: Path) -> None:
    for name in ("images", "annotations"):
        (folder / "pub" / name).mkdir(parents=True)
    for number in range(2):
        (folder / f"pub/images/{number}.jpg").write_bytes(encoded(_gray(50)))
        (folder / f"pub/annotations/{number}_exp.npy").write_bytes(_npy(number))


def read_published(folder: Path) -> None:
    from datasets.published import PreparePublishedConfig, prepare_published

    prepare_published(PreparePublishedConfig(str(folder / "pub"), str(folder / "data"), size=8, workers=1))
