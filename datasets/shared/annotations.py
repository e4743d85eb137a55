"""Reads AffectNet's expression codes from ``.npy`` files and tables; nothing is unpickled.

The 2021 release of AffectNet and the published repository keep a data set as a folder with ``images/<id>.jpg`` and
``annotations/<id>_exp.npy``; the first release of AffectNet keeps the same codes in tables.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from tqdm import tqdm

from datasets.shared.expressions import CONTEMPT
from files import UserError
from reading import limits
from reading.arrays import read_header
from reading.text import printable, quoted

# AffectNet's codes 0..7 are the canonical ones; an image with one of these has no expression to learn.
NOT_EXPRESSIONS = {8: "none", 9: "uncertain", 10: "non-face"}

_CODES = {str(code): code for code in range(11)}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_ANNOTATION_SUFFIX = "_exp.npy"
_READERS, _AT_A_TIME = 16, 500  # network disks have a high delay per file, but serve many files in parallel


def expression_code(text: str, where: str) -> int:
    """The code 0..10 that ``text`` writes; see `drop_reason` for which of them are expressions.

    Raises:
        UserError: any other text; the message begins with ``where``.
    """
    if text not in _CODES:
        others = ", ".join(f"{code} {name}" for code, name in NOT_EXPRESSIONS.items())
        raise UserError(f"{where}: expected an expression code 0..7 ({others} are left out), found {quoted(text)}")
    return _CODES[text]


def drop_reason(code: int, num_classes: int) -> str | None:
    """Why an image of this code 0..10 is left out of ``num_classes`` (7 or 8) classes; None when it is not."""
    if code == CONTEMPT and num_classes <= CONTEMPT:
        return "contempt"
    return NOT_EXPRESSIONS.get(code)


def npy_expression(data: bytes, where: str) -> int:
    """The code 0..10 in a ``.npy`` file that holds one number, or a string of one; nothing is unpickled.

    Args:
        data: the whole file: an array of one element, 0-d or not, of integers, floats, str or bytes.
        where: its name in messages.

    Raises:
        UserError: no ``.npy`` file, cut off, Python objects (a pickle), another number of elements or no code.
    """
    try:
        text = _npy_text(data)
    except ValueError as error:
        raise UserError(
            f"{where}: expected a .npy file with one expression code, found {error}; nothing in it was executed; "
            "download it again"
        ) from None
    return expression_code(text, where)


@functools.lru_cache(maxsize=64)  # the files of a release, 287,651 of them, have eight different contents
def _npy_text(data: bytes) -> str:
    header = read_header(io.BytesIO(data))
    if math.prod(header.shape) != 1 or header.dtype.kind not in "iufUS":
        raise ValueError(f"{header.dtype} of shape {header.shape}")
    if len(data) != header.num_bytes:
        raise ValueError(f"{len(data):,} bytes instead of {header.num_bytes:,}; the file is cut off or damaged")
    if header.dtype.kind == "U":  # NumPy would make any number a character
        order = "be" if header.dtype.byteorder == ">" else "le"
        return data[header.offset :].decode(f"utf-32-{order}").strip("\0 \t\r\n")
    value = np.frombuffer(data, header.dtype, offset=header.offset).item()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return (value.decode("ascii") if isinstance(value, bytes) else str(value)).strip()


@dataclasses.dataclass(frozen=True)
class AnnotatedFolder:
    """The names of the images in ``images/`` and of the labels in ``annotations/`` of one folder."""

    images: list[str]
    annotations: list[str]


def annotated_folders(names: Iterable[str]) -> dict[str, AnnotatedFolder]:
    """Finds ``<folder>/images/<id>.{jpg,png}`` and ``<folder>/annotations/<id>_exp.npy``, by ``<folder>`` ('' the top).

    Args:
        names: relative names with ``/``; others, and what file managers leave behind (``._1.jpg``), are ignored.
    """
    folders: dict[str, AnnotatedFolder] = collections.defaultdict(lambda: AnnotatedFolder([], []))
    for name in names:
        folder, *inner = f"/{name}".rsplit("/", 2)
        if len(inner) < 2 or inner[1].startswith("."):
            continue
        if inner[0] == "images" and inner[1].lower().endswith(_IMAGE_SUFFIXES):
            folders[folder[1:]].images.append(name)
        elif inner[0] == "annotations" and inner[1].endswith(_ANNOTATION_SUFFIX):
            folders[folder[1:]].annotations.append(name)
    return dict(folders)


def read_annotated(
    folder: AnnotatedFolder, where: str, read: Callable[[str, int], bytes], strict: bool
) -> tuple[list[tuple[str, int]], int]:
    """Reads the labels of a folder, with a progress bar.

    Args:
        folder: as `annotated_folders` found it.
        where: its name in messages.
        read: gives the bytes of a name, at most so many (`SourceFiles.read`); called from several threads.
        strict: refuse images without an annotation, instead of ignoring them.

    Returns:
        (name of the image, code 0..10) of each, in the order of `images`, and the number of images without an
        annotation.

    Raises:
        UserError: an annotation without image, two images of one name, nothing to read, or a label that
            `npy_expression` refuses.
    """
    annotations = {_stem(name).removesuffix("_exp"): name for name in folder.annotations}
    images = {_stem(name): name for name in folder.images}
    if len(images) < len(folder.images):
        twice = next(name for name in folder.images if images[_stem(name)] != name)
        raise UserError(
            f"{where}: expected one image for each annotation, found {twice} beside {images[_stem(twice)]}; "
            "remove one of them"
        )
    orphans = [name for stem, name in annotations.items() if stem not in images]
    bare = [name for stem, name in images.items() if stem not in annotations]
    if orphans or len(bare) == len(images) or (bare and strict):
        raise UserError(_not_paired(where, orphans, bare))
    pairs = [(image, annotations[stem]) for stem, image in images.items() if stem in annotations]
    codes = _read_codes([label for _, label in pairs], where, read)
    return [(image, code) for (image, _), code in zip(pairs, codes, strict=True)], len(bare)


def _read_codes(labels: Sequence[str], where: str, read: Callable[[str, int], bytes]) -> list[int]:
    def some(start: int) -> list[int]:
        return [
            npy_expression(read(label, limits.ANNOTATION_BYTES), f"{where}: {label}")
            for label in labels[start : start + _AT_A_TIME]
        ]

    codes: list[int] = []
    pool = concurrent.futures.ThreadPoolExecutor(_READERS)
    try:
        with tqdm(total=len(labels), desc="reading labels", unit="file", disable=None) as bar:
            for found in pool.map(some, range(0, len(labels), _AT_A_TIME)):
                codes += found
                bar.update(len(found))
    finally:
        pool.shutdown(cancel_futures=True)
    return codes


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0]


def _not_paired(where: str, orphans: Sequence[str], bare: Sequence[str]) -> str:
    kinds = {"annotations without an image": orphans, "images without an annotation": bare}
    found = " and ".join(f"{len(names):,} {kind} ({few(names)})" for kind, names in kinds.items() if names)
    return (
        f"{where}: expected an images/<id>.jpg for each annotations/<id>_exp.npy and the reverse, "
        f"found {found or 'neither'}; is the release unpacked whole?"
    )


def few(names: Sequence[str]) -> str:
    """The first three names, for a message."""
    return ", ".join(printable(name, 80) for name in names[:3]) + ", ..." * (len(names) > 3) or "nothing"
