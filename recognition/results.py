"""What a network recognises in images: faces with their labels, drawn, tabulated and saved. Needs no Keras."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from files import UserError, whole_file
from images import read_image, resize_image
from recognition.inputs import IMAGE_ENDINGS, ImageInput

if TYPE_CHECKING:
    import pandas
    from PIL import Image

# A face is kept at this side or at the network's, so that results take little memory.
KEPT_SIDE = 128
_COLOR = (0, 114, 178)  # as `plots.BLUE`
_SMALLEST_DRAWN = 240  # pixels; a smaller image is enlarged, so that its label is readable
_LARGEST_SHOWN = 800  # side in pixels of an image in a notebook
_SHEET_COLUMNS, _SHEET_CELL, _SHEET_IMAGES = 4, 220, 24
_LINES_SHOWN = 30


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Recognition:
    """What a network recognises in one face; a notebook shows the face beside the probabilities.

    Attributes:
        label: the most probable class.
        probabilities: class name to probability, summing to 1.
        embeddings: float32 (k, d), each row of length 1.
        image: uint8 (S, S, 3) RGB, the face that the network saw, S at most `KEPT_SIDE` or the network's input size.
            `TestModels.predict` of it gives the same probabilities.
        box: x, y, width, height of the face in pixels of the image. It may reach over the border. An image that is
            used whole has the whole image.
        score: how certain the detector is, on its own scale (`faces.Face`); None for an image that is used whole.
        landmarks: float32 (5, 2), see `faces.Face`; None where the detector has none.
    """

    label: str
    probabilities: dict[str, float]
    embeddings: np.ndarray
    image: np.ndarray
    box: tuple[int, int, int, int] | None = None
    score: float | None = None
    landmarks: np.ndarray | None = None

    @property
    def text(self) -> str:
        """The label with its probability, as ``Happy 90%``."""
        return f"{self.label} {self.probabilities[self.label]:.0%}"

    def __repr__(self) -> str:
        if self.box is None:
            return self.text
        x, y, width, height = self.box
        return f"{self.text} at ({x}, {y}), {width} x {height}"

    def _repr_png_(self) -> bytes:
        import plots

        return plots.recognition_png(self.image, self.probabilities)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageResult:
    """The faces of one image; a notebook shows the image with a box and a label for each.

    Attributes:
        name: the image's path, or ``image`` or ``images[3]`` for one without a path.
        size: width and height in pixels; (0, 0) when it cannot be read.
        faces: best first; empty when there is no face.
        error: why the image cannot be read; None when it was read.
        source: what the image can be read from again (`image_inputs.copy_of`). The pixels are not kept.
    """

    name: str
    size: tuple[int, int]
    faces: list[Recognition]
    error: str | None = None
    source: Path | bytes | None = None

    @property
    def best(self) -> Recognition | None:
        """The best face, None when there is none."""
        return self.faces[0] if self.faces else None

    @property
    def label(self) -> str | None:
        """The best face's label, None when there is no face."""
        return self.faces[0].label if self.faces else None

    @property
    def summary(self) -> str:
        """One short line without the name."""
        if self.error is not None:
            return f"cannot be read ({self.error.removeprefix(f'{self.name}: ')})"
        if len(self.faces) < 2:
            return repr(self.faces[0]) if self.faces else "no face found"
        return f"{len(self.faces)} faces: {', '.join(face.text for face in self.faces)}"

    def __repr__(self) -> str:
        return f"{self.name}: {self.summary}"

    def annotated(self) -> np.ndarray:
        """The image with a box and a label for each face.

        Returns:
            uint8 (H, W, 3) RGB of the image's size; an image below 240 pixels is enlarged.

        Raises:
            UserError: the image could not be read, or its file is not there any more or has another size now.
        """
        return np.asarray(_draw(self._read(), self.faces))

    def save(self, path: str | Path) -> None:
        """Writes the image with a box and a label for each face.

        Args:
            path: ends with .jpg, .png or another image ending; its folder is made. It may not be the image itself.

        Raises:
            UserError: see `annotated`; or an ending that is no image's.
        """
        path = Path(path)
        if path.suffix.lower() not in IMAGE_ENDINGS:
            raise UserError(f"{path}: expected a name that ends with one of {' '.join(IMAGE_ENDINGS)}")
        if isinstance(self.source, Path) and path.exists() and path.samefile(self.source):
            raise UserError(f"{path}: this is the image itself; name another file for the copy with the boxes")
        picture = _draw(self._read(), self.faces)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            picture.save(temporary, quality=92, subsampling=0)  # thin coloured lines stay sharp

    def _read(self) -> np.ndarray:
        if self.error is not None or self.source is None:
            raise UserError(self.error or f"{self.name}: the image is not there to be drawn")
        image = read_image(self.source) if isinstance(self.source, Path) else ImageInput(self.name, self.source).read()
        if image.shape[1::-1] != self.size:
            raise UserError(
                f"{self.name}: expected {self.size[0]} x {self.size[1]} pixels as when its faces were found, "
                f"found {image.shape[1]} x {image.shape[0]}; recognise it again"
            )
        return image

    def _repr_png_(self) -> bytes | None:
        if self.error is not None:
            return None
        picture = _draw(self._read(), self.faces, _LARGEST_SHOWN)
        return _png(picture)


class Results(list):
    """An `ImageResult` for each image, in order; a notebook shows them as a sheet of small images.

    Args:
        images: the results.
        class_names: the C classes, in the order of the probabilities.
    """

    def __init__(self, images: Iterable[ImageResult] = (), class_names: Sequence[str] = ()) -> None:
        super().__init__(images)
        self.class_names = tuple(class_names)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Results(found, self.class_names) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        lines = [repr(result) for result in self[:_LINES_SHOWN]]
        if len(self) > len(lines):
            lines.append(f"... and {len(self) - len(lines):,} more")
        return "\n".join(lines) or "no images"

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per face; one row with blanks for an image without a face, or one that cannot be read.

        Returns:
            Columns image, face (1 is the best), x, y, width, height (pixels), score, label, one probability per class,
            and error.
        """
        import pandas

        rows = [row for result in self for row in _rows(result)]
        columns = ["image", "face", "x", "y", "width", "height", "score", "label", *self.class_names, "error"]
        table = pandas.DataFrame(rows, columns=columns)
        whole = {name: "Int64" for name in ("face", "x", "y", "width", "height")}
        numbers = {name: float for name in ("score", *self.class_names)}
        return table.astype({**whole, **numbers, "label": "string", "error": "string"})

    def save(self, folder: str | Path) -> list[Path]:
        """Writes each image with boxes and labels, as ``<name>.jpg``; images that cannot be read are left out.

        Returns:
            The files. Equal names get a number: ``a.jpg``, ``a-2.jpg``.

        Raises:
            UserError: see `ImageResult.save`.
        """
        name_for = unique_names(".jpg")
        written = []
        for result in self:
            if result.error is None:
                written.append(Path(folder) / name_for(result.name))
                result.save(written[-1])
        return written

    def _repr_png_(self) -> bytes | None:
        return _png(_sheet(self)) if self else None


def unique_names(ending: str):
    """A function that gives each image's name a file name with this ending, and never the same one twice."""
    taken: set[str] = set()

    def name_for(name: str) -> str:
        stem = Path(name).stem or "image"
        number, found = 1, f"{stem}{ending}"
        while found.casefold() in taken:
            number += 1
            found = f"{stem}-{number}{ending}"
        taken.add(found.casefold())
        return found

    return name_for


def kept(face: np.ndarray, input_size: int) -> np.ndarray:
    """A face as a network sees it, small enough to be kept.

    Args:
        face: uint8 (H, W, 3).
        input_size: the network's side in pixels.

    Returns:
        uint8 (S, S, 3), never a view. A square up to `KEPT_SIDE` or the network's side stays as it is. What is not
        square is stretched to the network's side.
    """
    height, width = face.shape[:2]
    largest = max(KEPT_SIDE, input_size)
    if height != width:
        return resize_image(face, input_size)
    return resize_image(face, largest) if width > largest else face.copy()


def _rows(result: ImageResult) -> Iterator[dict[str, Any]]:
    if not result.faces:
        yield {"image": result.name, "error": result.error}
    for number, face in enumerate(result.faces, 1):
        box = dict(zip(("x", "y", "width", "height"), face.box or (), strict=False))
        yield {
            "image": result.name,
            "face": number,
            **box,
            "score": face.score,
            "label": face.label,
        } | face.probabilities


# Drawing


def _draw(image: np.ndarray, faces: Sequence[Recognition], largest: int | None = None) -> Image.Image:
    """The image, at most ``largest`` pixels wide and high, with boxes and labels."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = image.shape[:2]
    scale = max(1.0, _SMALLEST_DRAWN / min(width, height))
    if largest is not None:
        scale = min(scale, largest / max(width, height))
    picture = Image.fromarray(image)
    if scale != 1:
        picture = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    draw = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 250))
    for face in reversed(faces):  # the best one is drawn last, over the others
        if face.box is None:
            continue
        x, y, w, h = (value * scale for value in face.box)
        box = _inside((x, y, x + w - 1, y + h - 1), picture.size)
        draw.rectangle(box, outline=_COLOR, width=line)
        # As wide as the box where that is readable.
        font = ImageFont.load_default(float(np.clip(0.16 * w, max(12, min(picture.size) / 50), min(picture.size) / 14)))
        _write(draw, face.text, box, font, picture.size)
    return picture


def _inside(box: tuple[float, ...], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a box (left, top, right, bottom) that the image shows."""
    left, top, right, bottom = box
    left, top = min(max(left, 0), size[0] - 1), min(max(top, 0), size[1] - 1)
    return left, top, max(min(right, size[0] - 1), left), max(min(bottom, size[1] - 1), top)


def _write(draw: Any, text: str, box: tuple[float, ...], font: Any, size: tuple[int, int]) -> None:
    """Writes a label above a box, or inside it where there is no room above."""
    _, _, width, height = draw.textbbox((0, 0), text, font=font, anchor="lt")
    pad = max(2, height // 4)
    width, height = width + 2 * pad, height + 2 * pad
    left = min(max(box[0], 0), max(0, size[0] - width))
    top = box[1] - height if box[1] >= height else box[1]
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=_COLOR)
    draw.text((left + pad, top + pad), text, font=font, fill="white", anchor="lt")


def _sheet(results: Results) -> Image.Image:
    """Small images in rows, each with its name and label below."""
    from PIL import Image, ImageDraw, ImageFont

    shown = results[:_SHEET_IMAGES]
    columns = min(_SHEET_COLUMNS, len(shown))
    cell, caption, gap = _SHEET_CELL, 38, 10
    rows = -(-len(shown) // columns)
    rest = 24 * (len(results) > len(shown))
    sheet = Image.new("RGB", (columns * (cell + gap) - gap, rows * (cell + caption + gap) - gap + rest), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, result in enumerate(shown):
        x, y = i % columns * (cell + gap), i // columns * (cell + caption + gap)
        if result.error is None:
            picture = _draw(result._read(), result.faces, cell)
            sheet.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2))
        else:
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill="#eeeeee")
        for row, text in enumerate((Path(result.name).name, _caption(result))):
            draw.text((x, y + cell + 3 + 17 * row), _shortened(draw, text, font, cell), font=font, fill="black")
    if rest:
        draw.text((0, sheet.height - 20), f"{len(shown)} of {len(results):,} images", font=font, fill="black")
    return sheet


def _caption(result: ImageResult) -> str:
    return "cannot be read" if result.error is not None else ", ".join(f.text for f in result.faces) or "no face found"


def _shortened(draw: Any, text: str, font: Any, width: int) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font=font) > width:
        text = text[:-1]
    return f"{text}..."


def _png(picture: Image.Image) -> bytes:
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue()
