"""Draws boxes, labels and bars of probabilities on frames, fast enough for every frame of a video."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

WHITE, DARK = (255, 255, 255), (24, 24, 24)
PANEL_OPACITY = 0.6


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What is drawn for one face.

    Attributes:
        box: x, y, width, height in pixels; it may reach over the border.
        text: above the box, such as "1 Happy 90%".
        code: the class that gives the colour.
        bars: one (name, share of 1) per class; empty draws none.
    """

    box: tuple[float, float, float, float]
    text: str
    code: int
    bars: Sequence[tuple[str, float]] = ()


def draw(image: np.ndarray, faces: Sequence[Drawn], colors: Sequence[str]) -> None:
    """Draws faces on an image, in place.

    Bars go beside or below their box, where they fit into the image and hide no face; otherwise they are left out.

    Args:
        image: uint8 (H, W, 3) RGB, contiguous.
        faces: those drawn first get the first choice of a place for their bars.
        colors: one "#rrggbb" per class; they repeat beyond their number.
    """
    height, width = image.shape[:2]
    line = max(11, round(min(height, width) / 34))  # height of a line of text
    taken = [_corners(face.box) for face in faces]
    for face in faces:
        if face.bars and (panel := _place(face, line, (width, height), taken)):
            taken.append(panel)
            _draw_bars(image, face, panel, line, colors)
    for face in faces:
        color = _rgb(colors[face.code % len(colors)])
        left, top, right, bottom = _corners(face.box)
        cv2.rectangle(image, (left, top), (right, bottom), color, max(2, line // 7), cv2.LINE_AA)
        mask = _text(face.text, line)
        tall, wide = mask.shape[0] + 4, mask.shape[1] + 8
        x = min(max(0, left - 1), max(0, width - wide))
        y = top - tall if top >= tall else min(bottom, height - tall)
        cv2.rectangle(image, (x, y), (x + wide - 1, y + tall - 1), color, cv2.FILLED)
        light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140
        _paint(image, mask, x + 4, y + 2, WHITE if light else DARK)


def _corners(box: Sequence[float]) -> tuple[int, int, int, int]:
    x, y, width, height = box
    return round(x), round(y), round(x + width), round(y + height)


def _rgb(color: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(color[1:]))


def _panel_size(face: Drawn, line: int) -> tuple[int, int, int]:
    """Width and height of the bars' panel, and the width of its names."""
    names = max(_text(name, line).shape[1] for name, _ in face.bars)
    return names + 5 * line + 12, len(face.bars) * (line + 2) + 8, names


def _place(
    face: Drawn, line: int, size: tuple[int, int], taken: Sequence[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """A free place for the bars: right of the box, left of it, below it."""
    wide, tall, _ = _panel_size(face, line)
    left, top, right, bottom = _corners(face.box)
    level = min(max(0, top), max(0, size[1] - tall))
    for x, y in ((right + 4, level), (left - 4 - wide, level), (min(max(0, left), size[0] - wide), bottom + 4)):
        panel = (x, y, x + wide, y + tall)
        is_inside = x >= 0 and y >= 0 and panel[2] <= size[0] and panel[3] <= size[1]
        if is_inside and not any(_touch(panel, other) for other in taken):
            return panel
    return None


def _touch(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _draw_bars(
    image: np.ndarray, face: Drawn, panel: tuple[int, int, int, int], line: int, colors: Sequence[str]
) -> None:
    left, top, right, bottom = panel
    part = image[top:bottom, left:right]
    cv2.addWeighted(part, 1 - PANEL_OPACITY, np.full_like(part, DARK), PANEL_OPACITY, 0, part)
    start = left + _panel_size(face, line)[2] + 8
    for row, (name, share) in enumerate(face.bars):
        y = top + 4 + row * (line + 2)
        _paint(image, _text(name, line), left + 4, y, WHITE)
        # The line around the bar keeps a dark colour visible on the dark panel.
        low, high = (start, y + 3), (start + round(share * (right - 4 - start)), y + line - 3)
        cv2.rectangle(image, low, high, _rgb(colors[row % len(colors)]), cv2.FILLED)
        cv2.rectangle(image, low, high, WHITE, 1)


@functools.lru_cache(2048)
def _text(text: str, line: int) -> np.ndarray:
    """A text as uint8 (line, width), 255 where its letters are."""
    from PIL import Image, ImageDraw

    font = _font(round(0.78 * line))
    mask = Image.new("L", (max(1, round(font.getlength(text))), line))
    ImageDraw.Draw(mask).text((0, line / 2), text, 255, font, anchor="lm")
    return np.asarray(mask)


@functools.lru_cache(8)
def _font(size: int):
    import matplotlib
    from PIL import ImageFont

    # It comes with matplotlib, and has Greek and Cyrillic, which OpenCV's fonts have not.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _paint(image: np.ndarray, mask: np.ndarray, x: int, y: int, color: tuple[int, int, int]) -> None:
    """Blends ``color`` into the image where the mask is, and cuts off what reaches over the border."""
    part = image[max(0, y) : y + mask.shape[0], max(0, x) : x + mask.shape[1]]
    if not part.size:
        return
    top, left = max(0, -y), max(0, -x)
    opacity = mask[top : top + part.shape[0], left : left + part.shape[1], None] / np.float32(255)
    part[:] = np.rint(part + opacity * (np.float32(color) - part)).astype(np.uint8)
