"""Reader of the published repository's layout: ``images/`` with ``annotations/<stem>_exp.npy``."""

from __future__ import annotations

import collections
import dataclasses
from typing import Annotated, Any, Literal

from command_line import Range
from data_helper import Split
from datasets.shared.annotations import annotated_folders, drop_reason, read_annotated
from datasets.shared.archives import SourceFiles
from datasets.shared.dataset import DataSet
from datasets.shared.decoding import ImageFile
from datasets.shared.expressions import CLASS_NAMES
from datasets.shared.release import ImageRelease, PrepareOptions, find_prepared, write_images
from files import UserError


@dataclasses.dataclass(frozen=True)
class PreparePublishedConfig(PrepareOptions):
    """The published repository's own layout: images/*.{jpg,png} with annotations/<stem>_exp.npy."""

    split: Split = "train"
    """What the folder becomes."""
    classes: Literal[7, 8] = 7
    """8 keeps contempt."""
    size: Annotated[int, Range(1, 4_096)] = 224
    """Side of the prepared images in pixels."""


_PATTERNS = [f"{depth}{files}" for depth in ("", "*/") for files in ("images/*", "annotations/*_exp.npy")]


def prepare_published(settings: PreparePublishedConfig) -> dict[str, dict[str, Any]]:
    """Prepares ``images/*.{jpg,png}`` with ``annotations/<stem>_exp.npy`` as one split, with progress bars.

    The codes are the canonical ones, and an image is left out, and counted in `meta.json` (options, ``left_out``, by
    split), as `annotations.drop_reason` says.

    Args:
        settings: where from, where to and what is kept; writes ``published/<split>``, uint8 (N, size, size, 3) RGB,
            in the order of the names.

    Returns:
        Split -> the content of its `meta.json`, for the one split.

    Raises:
        UserError: the source is missing, of another layout, incomplete or damaged; what was prepared stays untouched.
    """
    files = SourceFiles(settings.source, _PATTERNS)
    sources = [files.stamp()]
    chosen = {"classes": settings.classes, "split": settings.split}
    known = {**chosen, "size": settings.size}
    known |= {"pictures_without_annotation": 0} if settings.strict else {}
    if found := find_prepared(settings.data_dir, "published", sources, known, strict=settings.strict):
        return found
    folders = annotated_folders(files.names)
    if len(folders) != 1:
        raise UserError(
            f"{settings.source}: expected one folder with images/*.jpg or *.png and annotations/<stem>_exp.npy, "
            f"found {', '.join(name or 'the top' for name in sorted(folders)[:3]) or 'none'}; give that folder"
        )
    ((name, folder),) = folders.items()
    labelled, bare = read_annotated(folder, f"{settings.source}/{name}".rstrip("/"), files.read, settings.strict)
    reasons = [drop_reason(code, settings.classes) for _, code in labelled]
    images = [
        ImageFile(settings.split, name, code)
        for (name, code), reason in zip(labelled, reasons, strict=True)
        if reason is None
    ]
    if not images:
        raise UserError(f"{settings.source}: no image of the {settings.classes} classes is left")
    options = {
        **chosen,
        "pictures_without_annotation": bare,
        "left_out": {settings.split: dict(collections.Counter(filter(None, reasons)))},
    }
    release = ImageRelease(files, images, settings.size, 3, CLASS_NAMES[: settings.classes], sources, options)
    return write_images(settings.data_dir, "published", release, strict=settings.strict, workers=settings.workers)


DATASET = DataSet(
    name="published",
    title="published layout",
    options=PreparePublishedConfig,
    prepare=prepare_published,
    paper="Fard and Mahoor, Ad-Corre: Adaptive Correlation-Based Loss for Facial Expression Recognition in the Wild, "
    "IEEE Access 2022",
    request="a folder of your own, as https://github.com/aliprf/Ad-Corre reads it",
)
