"""Turns what a user calls an image (path, folder, glob, bytes, PIL image, array) into named RGB arrays."""

from __future__ import annotations

import dataclasses
import glob
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from files import UserError
from images import decode_image, over_mid_gray, read_image

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
_COPY_QUALITY = 95  # of a JPEG copy, 0 to 100


@dataclasses.dataclass(frozen=True, eq=False)
class ImageInput:
    """One image that is not read yet.

    Attributes:
        name: its path, or ``image`` or ``images[3]`` for one without a path.
        source: a path, the bytes of a file, a PIL image or an array.
        problem: why it cannot be an image; None when that is not known yet.
    """

    name: str
    source: Any
    problem: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a file or its bytes, so that it can be damaged; anything else is a mistake in the call."""
        return isinstance(self.source, (str, Path, bytes))

    def read(self, bgr: bool = False) -> np.ndarray:
        """The image as uint8 (H, W, 3) RGB, upright.

        Args:
            bgr: an array has its channels in OpenCV's order; files and PIL images say their order themselves.

        Raises:
            UserError: it cannot be read, or is not an image; the message has the name.
        """
        if self.problem is not None:
            raise UserError(self.problem)
        if isinstance(self.source, (str, Path)):
            try:
                return read_image(self.source)
            except OSError as error:
                raise UserError(f"{self.name}: cannot be read ({error.strerror or error})") from None
        if isinstance(self.source, bytes):
            return _rgb(decode_image(self.source, self.name))
        if is_pil(self.source):
            return from_pil(self.source, self.name)
        return from_array(self.source, self.name, bgr)


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """The images of a call, in order.

    Attributes:
        images: gives each once.
        count: how many there are; None for an iterator.
        is_single: one image was given, not a list, a folder or a pattern.
    """

    images: Iterable[ImageInput]
    count: int | None
    is_single: bool = False


def open_inputs(images: Any) -> Inputs:
    """Finds the images that an argument means; nothing is read yet.

    Args:
        images: a path, a folder (its image files, without subfolders), a pattern such as ``photos/*.jpg`` (``**`` for
            subfolders), the bytes of a file, a file object, a PIL image, an array (H, W, 3), (H, W, 1), (H, W) or
            (N, H, W, 3), (N, H, W), or a list or iterator of these.

    Raises:
        UserError: a folder without images, a pattern without files, or something that is none of these.
    """
    if isinstance(images, Inputs):
        return images
    if is_one(images):
        found = _expand(images, "image")
        return Inputs(found, len(found), is_single=not _is_many(images))
    shape = getattr(images, "shape", None)
    if shape is not None and len(shape) != 1 and not _is_stack(shape):
        raise UserError(f"images: {_expected_array(_as_array(images, 'images'))}")
    if not isinstance(images, Iterable) or isinstance(images, dict):
        raise UserError(f"images: {unusable(images)}")
    if not hasattr(images, "__len__"):
        return Inputs(_expand_each(images), None)
    found = list(_expand_each(images))
    if not found:
        raise UserError("images: expected one or more, received none")
    return Inputs(found, len(found))


def _expand_each(images: Iterable[Any]) -> Iterator[ImageInput]:
    for i, image in enumerate(images):
        try:
            yield from _expand(image, f"images[{i}]")
        except UserError as error:
            # One folder without images, say, costs its own row; an object of another type is a mistake in the call.
            if not isinstance(image, (str, Path)):
                raise
            yield ImageInput(str(image), image, str(error))


def _expand(image: Any, name: str) -> list[ImageInput]:
    if not isinstance(image, (str, Path)):
        if not is_one(image):
            raise UserError(f"{name}: {unusable(image)}")
        if hasattr(image, "read"):
            image = image.read()
        if isinstance(image, (bytearray, memoryview)):
            image = bytes(image)
        if not (isinstance(image, bytes) or is_pil(image)):
            image = _as_array(image, name)
        return [ImageInput(name, image)]
    try:
        return _expand_path(image)
    except (OSError, ValueError) as error:  # no permission, a name that is too long or has a zero byte
        raise UserError(f"{str(image)[:200]!r}: cannot be read ({error})") from None


def _expand_path(image: str | Path) -> list[ImageInput]:
    path, text = Path(image), str(image)
    if not text:
        raise UserError("expected the path of an image, received an empty one")
    if "://" in text:
        problem = f"{text}: a URL is not fetched; download the image and name the file"
        return [ImageInput(text, image, problem)]
    if path.is_dir():
        return [ImageInput(str(file), file) for file in _images_in(path)]
    if path.suffix.lower() in VIDEO_ENDINGS:
        problem = f"{text}: expected an image, found a video; run: python test.py video {text}"
        return [ImageInput(text, image, problem)]
    if glob.has_magic(text) and not path.exists():
        files = sorted(file for file in glob.glob(os.path.expanduser(text), recursive=True) if os.path.isfile(file))
        if not files:
            raise UserError(f"{text}: no file matches this pattern")
        return [ImageInput(file, file) for file in files]
    return [ImageInput(text, image)]


def _images_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
    if not files:
        raise UserError(
            f"{folder}: the folder has no image ({' '.join(IMAGE_ENDINGS)}); "
            f"for those of its subfolders name '{folder}/**/*.jpg'"
        )
    return files


def is_one(image: Any) -> bool:
    """Whether it is a single thing: an image, or a path, a folder or a pattern."""
    if isinstance(image, (str, Path, bytes, bytearray, memoryview)) or is_pil(image) or hasattr(image, "read"):
        return True
    shape = getattr(image, "shape", None)
    return shape is not None and (len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3, 4)))


def _is_stack(shape: tuple[int, ...]) -> bool:
    """Whether an array has several images; three planes of one image are refused, not taken for three gray images."""
    return len(shape) == 4 or (len(shape) == 3 and shape[0] not in (1, 3) and shape[-1] > 4)


def _is_many(image: Any) -> bool:
    return isinstance(image, (str, Path)) and (
        Path(image).is_dir() or (glob.has_magic(str(image)) and not Path(image).exists())
    )


def is_pil(image: Any) -> bool:
    return hasattr(image, "getexif") and hasattr(image, "convert")


def from_pil(image: Any, name: str) -> np.ndarray:
    """A PIL image as uint8 (H, W, 3) RGB: upright, transparent pixels over mid gray.

    Raises:
        UserError: its file is damaged, or its pixels are 32-bit numbers.
    """
    from PIL import ImageOps

    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return _rgb(((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8)[..., None])
        if image.mode in ("I", "F"):
            raise UserError(f"{name}: {_expected_array(np.asarray(image))}")
        if image.has_transparency_data:
            return over_mid_gray(np.asarray(image.convert("RGBA")))
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name}: the PIL image cannot be read ({error})") from None


def from_array(image: Any, name: str, bgr: bool = False) -> np.ndarray:
    """An array as uint8 (H, W, 3) RGB.

    Args:
        image: uint8 (H, W, 3), (H, W, 4) with transparency, (H, W, 1) or (H, W).
        name: its name in messages.
        bgr: the channels are blue, green, red, as OpenCV reads them.

    Raises:
        UserError: another shape, or other numbers; the message says how to convert them.
    """
    image = _as_array(image, name)
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise UserError(f"{name}: {_expected_array(image)}")
    if image.shape[-1] == 4:
        image = over_mid_gray(image)
    return np.ascontiguousarray(image[..., ::-1]) if bgr and image.shape[-1] == 3 else _rgb(image)


def copy_of(source: Any, image: np.ndarray) -> Path | bytes:
    """What an image can be read from again without keeping its pixels in memory.

    Args:
        source: an `ImageInput`'s.
        image: uint8 (H, W, 3), its pixels.

    Returns:
        The absolute path or the bytes of its file; a JPEG of an image that never was a file.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, (str, Path)):
        return Path(source).absolute()
    from PIL import Image

    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG", quality=_COPY_QUALITY)
    return jpeg.getvalue()


def _as_array(image: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(image)
    except Exception as error:  # a tensor's own: it needs its gradient, is on a GPU, or of a type that NumPy lacks
        raise UserError(f"{name}: expected an array, received {type(image).__name__} ({error})") from None


def _rgb(image: np.ndarray) -> np.ndarray:
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def _expected_array(image: np.ndarray) -> str:
    message = f"expected uint8 (H, W, 3) RGB, (H, W, 1) or (H, W) gray, received {image.dtype} {image.shape}"
    if image.dtype.kind == "f":
        in_0_1 = image.size and not np.any(image > 1)  # NaN is not greater
        values, code = ("0..1", "(255 * image)") if in_0_1 else ("0..255", "image")
        return f"{message}; for values in {values}: {code}.round().astype('uint8')"
    if image.dtype == np.uint16:
        return f"{message}; for 16-bit values: (image // 257).astype('uint8')"
    if image.dtype.kind in "iu" and image.dtype != np.uint8:
        return f"{message}; for values in 0..255: image.astype('uint8')"
    if image.dtype == bool:
        return f"{message}; for True as white: 255 * image.astype('uint8')"
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in (1, 3):
        return f"{message}; the channels come last: image.transpose(1, 2, 0) (of gray images: images[..., None])"
    return message


def unusable(image: Any) -> str:
    if image is None:
        return "expected an image, received None (cv2.imread returns None for a file that it cannot read)"
    expected = "expected a path, folder, pattern, bytes, PIL image or uint8 array, or a list of these"
    return f"{expected}, received {type(image).__name__}"
