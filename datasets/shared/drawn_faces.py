"""Draws a face with a given expression from a seed.

Three frozen dataclasses describe an image: what the face's muscles do (`Actions`), whose face it is
(`Identity`) and how it is seen (`View`). Lengths are in face units: the origin is the middle of the face,
x points to the right of the image, y down; the crown is at y = -1, the chin at y = +1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from datasets.shared.expressions import ANGER, CONTEMPT, DISGUST, FEAR, HAPPY, NEUTRAL, SAD, SURPRISE
from files import UserError

Colour = tuple[float, float, float]  # RGB, 0..255; an array of 3 numbers also works
SUPERSAMPLING = 4
UNIT = 0.42  # one face unit, share of the image's side
SKINS: tuple[Colour, ...] = ((236, 204, 182), (226, 188, 158), (204, 156, 120), (160, 112, 82), (118, 80, 60))
HAIRS: tuple[Colour, ...] = ((30, 24, 22), (58, 38, 26), (96, 62, 36), (202, 166, 100), (146, 66, 34), (165, 163, 160))
IRISES: tuple[Colour, ...] = ((84, 54, 30), (60, 40, 26), (70, 104, 140), (84, 116, 72))
DARK, WHITE = np.array((28.0, 20.0, 20.0)), np.array((246.0, 243.0, 238.0))

_T = np.linspace(-1.0, 1.0, 17)  # along a lid or a lip, corner to corner
_S = np.linspace(0.0, 1.0, 11)  # along a stroke
_BEZIER = np.stack([(1 - _S) ** 2, 2 * _S * (1 - _S), _S**2], axis=1)  # (11, 3)
_SPINDLE = np.sqrt(np.sin(np.pi * np.clip(_S, 0.02, 0.98)))  # a crease, thin at both ends
_WEDGE = np.minimum(1.0, 0.7 + 3 * _S) * (1.0 - 0.75 * _S**2)  # a brow, thin at its outer end
_THETA = np.linspace(0.0, 2.0 * np.pi, 56, endpoint=False)
_COS, _SIN = np.cos(_THETA), np.sin(_THETA)


@dataclasses.dataclass(frozen=True)
class Actions:
    """Action units (AU) of the Facial Action Coding System, 0 relaxed to 1 as strong as it gets."""

    inner_brow_raise: float = 0.0  # AU1
    outer_brow_raise: float = 0.0  # AU2
    brow_lower: float = 0.0  # AU4, which also draws the brows together
    upper_lid_raise: float = 0.0  # AU5
    cheek_raise: float = 0.0  # AU6, which also pushes the lower lid up
    lid_tighten: float = 0.0  # AU7
    nose_wrinkle: float = 0.0  # AU9
    upper_lip_raise: float = 0.0  # AU10
    lip_corner_pull: float = 0.0  # AU12
    lip_corner_depress: float = 0.0  # AU15
    chin_raise: float = 0.0  # AU17
    lip_stretch: float = 0.0  # AU20
    lip_press: float = 0.0  # AU23 and AU24
    lips_part: float = 0.0  # AU25
    jaw_drop: float = 0.0  # AU26 and AU27
    clench: float = 0.0  # AU31, both rows of teeth in the opening
    lid_droop: float = 0.0  # AU43
    smirk: float = 0.0  # AU12 and AU14 of one side: the image's right above 0, its left below


# The EMFACS prototypes, the brows (1, 2, 4) first; an expression that people show in two ways has two rows.
PROTOTYPES: dict[int, tuple[Actions, ...]] = {
    NEUTRAL: (Actions(),),
    HAPPY: (  # 6 + 12, or 6 + 12 + 25 + 26
        Actions(cheek_raise=0.8, lip_corner_pull=1.0),
        Actions(cheek_raise=0.9, lip_corner_pull=1.0, lips_part=1.0, jaw_drop=0.35),
    ),
    SAD: (Actions(1, 0, 0.6, lip_corner_depress=1.0, chin_raise=0.5, lid_droop=0.5),),  # 1 + 4 + 15 + 17 + 43
    SURPRISE: (Actions(1, 1, 0, upper_lid_raise=0.9, lips_part=1.0, jaw_drop=0.9),),  # 1 + 2 + 5 + 25 + 26
    FEAR: (  # 1 + 2 + 4 + 5 + 20 + 25, the jaw dropped (26) or the teeth clenched (31)
        Actions(1, 0.3, 0.8, upper_lid_raise=1.0, lip_stretch=1.0, lips_part=1.0, jaw_drop=0.35),
        Actions(1, 0.3, 0.8, upper_lid_raise=1.0, lip_stretch=1.0, lips_part=1.0, clench=1.0),
    ),
    DISGUST: (  # 4 + 7 + 9 + 15 + 17, or 4 + 7 + 9 + 10 + 15 + 25
        Actions(0, 0, 0.5, lid_tighten=0.8, nose_wrinkle=1.0, lip_corner_depress=0.7, chin_raise=1.0),
        Actions(0, 0, 0.5, 0, 0, 0.8, nose_wrinkle=1.0, upper_lip_raise=1.0, lip_corner_depress=0.6, lips_part=1.0),
    ),
    ANGER: (  # 4 + 5 + 7 + 23, or 4 + 5 + 7 + 25 + 26 + 31
        Actions(0, 0, 1, upper_lid_raise=0.4, lid_tighten=0.5, lip_press=1.0),
        Actions(0, 0, 1, upper_lid_raise=0.4, lid_tighten=0.5, lips_part=1.0, jaw_drop=0.3, clench=1.0),
    ),
    CONTEMPT: (Actions(smirk=1.0, lid_droop=0.35, lip_press=0.3),),  # 12 + 14 of one side
}


def _range(low: float, high: float) -> Any:
    """A field that `_random` draws evenly from this range and whose default is the middle."""
    return dataclasses.field(default=(low + high) / 2, metadata={"range": (low, high)})


@dataclasses.dataclass(frozen=True)
class Identity:
    """Whose face it is; the defaults are the canonical face."""

    face_width: float = _range(0.72, 0.88)  # half
    jaw_taper: float = _range(0.08, 0.30)
    eye_spacing: float = _range(0.34, 0.40)  # from the middle
    eye_size: float = _range(0.88, 1.12)
    eye_tilt: float = _range(-0.02, 0.05)
    brow_height: float = _range(0.31, 0.38)
    brow_thickness: float = _range(0.05, 0.115)
    nose_length: float = _range(0.23, 0.32)
    nose_width: float = _range(0.10, 0.17)  # half
    mouth_width: float = _range(0.30, 0.38)  # half
    lip_fullness: float = _range(0.6, 1.3)
    hair_volume: float = _range(1.03, 1.18)
    hair_line: float = _range(-0.78, -0.62)
    hair_part: float = _range(-0.3, 0.3)
    hair_length: float = 0.0  # how far below the middle; 0 is short
    bald: bool = False
    beard: bool = False
    glasses: bool = False
    skin: Colour = SKINS[1]
    hair: Colour = HAIRS[1]
    iris: Colour = IRISES[0]
    cloth: Colour = (70, 100, 140)


@dataclasses.dataclass(frozen=True)
class View:
    """How a face is seen; the defaults are frontal, evenly lit and sharp."""

    angle: float = _range(-12, 12)  # clockwise in the image, degrees
    scale: float = _range(0.9, 1.1)
    shift_x: float = _range(-0.08, 0.08)
    shift_y: float = _range(-0.08, 0.08)
    yaw: float = _range(-0.11, 0.11)  # how far the features moved to the right
    gaze: float = _range(-0.035, 0.035)  # how far the irises moved to the right
    light_x: float = _range(-0.22, 0.22)  # gain at the right edge, share
    light_y: float = _range(-0.16, 0.16)  # gain at the lower edge, share
    contrast: float = _range(0.85, 1.15)
    brightness: float = _range(-22, 22)  # grey levels
    blur: float = 0.0  # sigma, share of the side
    background: tuple[Colour, ...] = ((196, 202, 210),) * 4  # corners, by rows


def brow(a: Actions, identity: Identity, side: int) -> np.ndarray:
    """The middle line of a brow from its inner to its outer end, (11, 2); ``side`` -1 is the image's left."""
    height = 0.03 * a.nose_wrinkle - identity.brow_height
    # AU1 holds the inner end up against AU4, which makes the oblique brows of sadness and fear.
    inner = height - 0.17 * a.inner_brow_raise + 0.18 * a.brow_lower * (1 - 0.8 * a.inner_brow_raise)
    middle = height - 0.11 - 0.20 * a.outer_brow_raise - 0.03 * a.inner_brow_raise + 0.12 * a.brow_lower
    outer = height + 0.02 - 0.12 * a.outer_brow_raise + 0.03 * a.inner_brow_raise + 0.04 * a.brow_lower
    x = identity.eye_spacing + np.array([-0.22 - 0.06 * a.brow_lower, 0.0, 0.26])
    return _BEZIER @ np.stack([side * x, [inner, middle, outer]], axis=1)


def lids(a: Actions, identity: Identity, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The edges of the upper and the lower lid from the inner to the outer corner, (17, 2) each."""
    up = 0.150 * (1 + 0.65 * a.upper_lid_raise - 0.35 * a.lid_tighten - 0.25 * a.cheek_raise - 0.45 * a.lid_droop)
    down = 0.095 * (1 + 0.35 * a.upper_lid_raise - 0.75 * a.lid_tighten - 1.15 * a.cheek_raise)
    # The brow weighs on the inner half of the lid in anger and on its outer half in sadness.
    slant = 0.45 * (a.brow_lower - 1.5 * min(a.inner_brow_raise, 2 * a.brow_lower)) * (1 - 0.7 * a.upper_lid_raise)
    arch = identity.eye_size * (1 - _T**2) ** 0.75
    x = side * (identity.eye_spacing + 0.215 * identity.eye_size * _T)
    y = -0.04 - identity.eye_tilt * _T
    upper = y - up * arch * (1 + slant * _T)
    lower = np.maximum(y + down * arch, upper + 0.02 * arch)
    return np.stack([x, upper], axis=1), np.stack([x, lower], axis=1)


def lips(a: Actions, identity: Identity) -> tuple[np.ndarray, ...]:
    """Edges from the left to the right corner, (17, 2) each: upper outer, upper inner, lower inner, lower outer."""
    round_jaw = a.jaw_drop * (1 - a.lip_corner_pull) * (1 - a.lip_stretch) * (1 - a.clench)
    width = identity.mouth_width * (1 + 0.25 * a.lip_corner_pull + 0.3 * a.lip_stretch - 0.08 * a.chin_raise)
    x = width * (1 - 0.42 * round_jaw) * _T + 0.05 * a.smirk
    pull, depress = 0.17 * a.lip_corner_pull, 0.16 * a.lip_corner_depress
    lift = pull - depress - 0.04 * a.lip_stretch + 0.17 * np.maximum(0.0, np.sign(_T) * a.smirk)
    # The corners turn around the mouth's middle rather than lengthen it on one side.
    middle = 0.57 - 0.04 * a.chin_raise - 0.03 * a.nose_wrinkle + 0.3 * (pull - depress)
    line = middle - lift * np.abs(_T) ** 1.6

    square = max(a.lip_stretch, a.clench, 0.7 * a.upper_lip_raise) * (1 - 0.7 * a.lip_corner_pull)
    opening = (1 - _T**2) ** (0.55 - 0.30 * square)
    above = a.lips_part * (0.03 + 0.09 * a.upper_lip_raise + 0.03 * a.clench) + 0.09 * round_jaw
    below = a.lips_part * (0.03 + 0.02 * a.lip_stretch + 0.05 * a.clench) + 0.26 * a.jaw_drop * (1 - 0.4 * a.clench)
    upper, lower = line - above * opening, line + below * opening

    full = identity.lip_fullness * (1 - 0.75 * a.lip_press)
    body = (1 - _T**2) ** 0.55
    outer_upper = upper - 0.06 * full * (1 - 0.3 * a.lip_corner_pull) * body
    outer_lower = lower + (0.085 * full + 0.03 * a.chin_raise) * body
    return tuple(np.stack([x, y], axis=1) for y in (outer_upper, upper, lower, outer_lower))


def outline(a: Actions, identity: Identity) -> np.ndarray:
    """The bald head, clockwise from the image's right, (56, 2)."""
    taper = 1 - identity.jaw_taper * np.maximum(_SIN, 0.0) ** 1.5
    x = identity.face_width * np.sign(_COS) * np.abs(_COS) ** 0.85 * taper
    return np.stack([x, _SIN * np.where(_SIN > 0, 1.0 + 0.1 * a.jaw_drop, 1.0)], axis=1)


class _Painter:
    """Fills shapes given in face units on a canvas larger than the image."""

    def __init__(self, view: View, size: int):
        side = size * SUPERSAMPLING
        self.canvas = cv2.resize(np.array(view.background, np.uint8).reshape(2, 2, 3), (side, side))
        self.turn = cv2.getRotationMatrix2D((0, 0), -view.angle, UNIT * side * view.scale)[:, :2].T
        self.middle = (side - 1) / 2 + UNIT * side * np.array([view.shift_x, view.shift_y])
        self.yaw = view.yaw * self.turn[0]

    def fill(self, points: np.ndarray, colour: np.ndarray) -> None:
        near = np.maximum(0.0, 1 - (points[:, 0:1] / 0.9) ** 2)  # the middle of the face turns furthest, its rim stays
        pixels = (points @ self.turn + self.middle + self.yaw * near) * 16  # 4 fractional bits
        cv2.fillPoly(self.canvas, [pixels.astype(np.int32)], colour.tolist(), shift=4)

    def between(self, one: np.ndarray, other: np.ndarray, colour: np.ndarray) -> None:
        self.fill(np.concatenate([one, other[::-1]]), colour)

    def stroke(self, line: np.ndarray, width: float | np.ndarray, colour: np.ndarray) -> None:
        """A line (n, 2) of the given width, one for all points or one per point."""
        along = np.empty_like(line)
        along[1:-1], along[0], along[-1] = line[2:] - line[:-2], line[1] - line[0], line[-1] - line[-2]
        across = along[:, ::-1] * (-1, 1) * (0.5 * width / np.sqrt((along**2).sum(axis=1) + 1e-9))[:, None]
        self.between(line + across, line - across, colour)

    def crease(self, controls: list[tuple[float, float]], strength: float, colour: np.ndarray) -> None:
        """A fold of the skin along a Bezier curve; a weak one is thin, the weakest is left out."""
        if strength > 0.15:
            self.stroke(_BEZIER @ np.array(controls), 0.045 * min(strength, 1.0) * _SPINDLE, colour)


def _disc(x: float, y: float, radius: float, flat: float = 1.0) -> np.ndarray:
    return np.stack([x + radius * _COS, y + flat * radius * _SIN], axis=1)


def draw_face(a: Actions, identity: Identity = Identity(), view: View = View(), size: int = 48) -> np.ndarray:
    """Draws one face without chance, uint8 (size, size, 3), RGB."""
    painter = _Painter(view, size)
    skin, hair = np.array(identity.skin, float), np.array(identity.hair, float)
    _draw_head(painter, a, identity, view.light_x)
    _draw_nose_and_creases(painter, a, identity, skin * (0.62, 0.50, 0.47))
    _draw_mouth(painter, a, identity, 0.92 * (0.55 * skin + 0.45 * np.array((178, 60, 66))))
    for side in (-1, 1):
        _draw_eye(painter, a, identity, side, view.gaze)
        painter.stroke(brow(a, identity, side), identity.brow_thickness * _WEDGE, 0.55 * hair + 0.3 * DARK)
    if identity.glasses:
        _draw_glasses(painter, identity)
    return _develop(painter.canvas, view, size)


def _draw_head(painter: _Painter, a: Actions, identity: Identity, light: float) -> None:
    skin, hair = np.array(identity.skin, float), np.array(identity.hair, float)
    shade, wide, head = skin * (0.84, 0.77, 0.75), identity.face_width, outline(a, identity)
    grown = head * identity.hair_volume
    if identity.hair_length and not identity.bald:
        below = np.where(_SIN > 0, identity.hair_length * np.abs(_SIN) ** 0.4, grown[:, 1])
        painter.fill(np.stack([1.06 * grown[:, 0], below], axis=1), 0.8 * hair)
    painter.fill(np.array([(-0.5, 0.5), (0.5, 0.5), (0.55, 1.4), (-0.55, 1.4)]) * (wide, 1.0), shade)  # neck
    painter.fill(_disc(0.0, 1.75, 1.15, 0.52), np.array(identity.cloth, float))
    for side in (-1, 1):
        painter.fill(_disc(side * wide, 0.06, 0.13, 1.5), shade)  # ear
    painter.fill(head, shade)
    # Narrower and moved towards the light, the head leaves its shaded cheek visible.
    painter.fill(head * (1 - 0.35 * abs(light), 1.0) + (0.35 * light * wide, 0.0), skin)
    if identity.beard:
        painter.between(head[_SIN > 0.1], head[_SIN > 0.1] * (0.86, 0.76), 0.4 * skin + 0.6 * hair)
    if not identity.bald:
        x = np.linspace(-1.0, 1.0, 25)
        fringe = identity.hair_line + 0.5 * np.abs(x) ** 4 + identity.hair_part * (x - x**3)
        painter.between(grown[_SIN < -1e-6], np.stack([0.985 * wide * x, fringe], axis=1), hair)
        painter.crease([(-0.40, -0.82), (-0.15, -1.0), (0.15, -0.98)], 1.0, 1.15 * hair + 12)


def _draw_eye(painter: _Painter, a: Actions, identity: Identity, side: int, gaze: float) -> None:
    upper, lower = lids(a, identity, side)
    painter.between(upper, lower, WHITE)
    x, y = side * 0.99 * identity.eye_spacing + gaze, -0.06
    for radius, colour in ((0.108, np.array(identity.iris, float)), (0.058, DARK)):
        ball = _disc(x, y, radius * identity.eye_size)
        top, bottom = (np.interp(ball[:, 0], *edge[::side].T) for edge in (upper, lower))  # from left to right
        painter.fill(np.stack([ball[:, 0], np.clip(ball[:, 1], top, bottom)], axis=1), colour)
    if lower[8, 1] - upper[8, 1] > 0.14:
        painter.fill(_disc(x - 0.04, y - 0.04, 0.028), WHITE)
    painter.stroke(lower, 0.018, 0.4 * np.array(identity.skin))
    painter.stroke(upper, 0.05, DARK)


def _draw_nose_and_creases(painter: _Painter, a: Actions, identity: Identity, line: np.ndarray) -> None:
    tip, wing = identity.nose_length - 0.06 * a.nose_wrinkle, identity.nose_width * (1 + 0.25 * a.nose_wrinkle)
    painter.stroke(_BEZIER @ np.array([(-wing, tip - 0.03), (0.0, tip + 0.12), (wing, tip - 0.03)]), 0.035, line)
    for side, (x, y) in zip((-1, 1), lips(a, identity)[1][[0, -1]], strict=True):
        eye, corner, smirk = side * identity.eye_spacing, x + side * 0.07, max(0.0, side * a.smirk)
        painter.fill(_disc(side * 0.55 * wing, tip + 0.015, 0.032, 0.7), 0.6 * line)  # nostril
        fold = max(a.lip_corner_pull, 0.9 * a.nose_wrinkle, a.upper_lip_raise, smirk)
        painter.crease([(side * 1.25 * wing, tip - 0.06), (side * 0.36, tip + 0.04), (corner, y - 0.03)], fold, line)
        painter.crease([(corner, y - 0.09), (corner + side * 0.05, y), (corner, y + 0.07)], smirk, line)
        painter.crease([(side * 0.06, -0.34), (side * 0.08, -0.27), (side * 0.05, -0.18)], 1.3 * a.brow_lower, line)
        for row in (0.0, 0.09):
            painter.crease([(0.0, row), (side * 0.08, row - 0.01), (side * 0.15, row - 0.07)], a.nose_wrinkle, line)
        painter.crease([(eye - side * 0.17, 0.11), (eye, 0.20), (eye + side * 0.19, 0.08)], 0.7 * a.cheek_raise, line)
    painter.crease([(-0.3, -0.54), (0.0, -0.58), (0.3, -0.54)], 0.5 * a.inner_brow_raise, line)
    painter.crease([(-0.12, 0.85), (0.0, 0.77), (0.12, 0.85)], a.chin_raise, line)


def _draw_mouth(painter: _Painter, a: Actions, identity: Identity, red: np.ndarray) -> None:
    outer_upper, upper, lower, outer_lower = lips(a, identity)
    painter.between(outer_upper, outer_lower, red)
    gap = (lower - upper) * (0.0, 1.0)
    if gap.max() < 0.035:
        painter.stroke(upper, 0.04, 0.4 * red)
        return
    painter.between(upper, lower, np.array((66.0, 16.0, 22.0)))
    if a.jaw_drop > 0.3 and a.clench < 0.5:
        tongue = 0.45 * np.maximum(0.0, 1 - (_T / 0.9) ** 2)[:, None]
        painter.between(lower, lower - gap * tongue, np.array((196.0, 84.0, 88.0)))
    shown = max(a.lip_corner_pull, a.upper_lip_raise, 0.6 * a.lip_stretch, 0.3) * (1 - a.clench)
    band = (0.11 * shown * (1 - _T**2) ** 0.3)[:, None] * (0.0, 1.0) + 0.46 * a.clench * gap
    painter.between(upper, upper + np.minimum(band, gap), WHITE)
    if a.clench > 0.3:
        painter.between(lower, lower - 0.42 * a.clench * gap, 0.95 * WHITE)


def _draw_glasses(painter: _Painter, identity: Identity) -> None:
    eye, frame = 1.02 * identity.eye_spacing, 1.5 * DARK
    for x in (-eye, eye):
        ring = _disc(x, -0.02, 0.29, 0.85)
        painter.stroke(np.concatenate([ring, ring[:2]]), 0.03, frame)
    painter.stroke(np.array([(0.29 - eye, -0.04), (eye - 0.29, -0.04)]), 0.03, frame)


def _develop(canvas: np.ndarray, view: View, size: int) -> np.ndarray:
    image = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    if view.blur * size > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), view.blur * size)
    ramp = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    image *= (1 + view.light_x * ramp + view.light_y * ramp[:, None])[:, :, None]
    return np.clip((image - 128) * view.contrast + 128 + view.brightness, 0, 255).astype(np.uint8)


def _random(kind: type, rng: np.random.Generator, **others: Any) -> Any:
    ranged = {f.name: rng.uniform(*f.metadata["range"]) for f in dataclasses.fields(kind) if f.metadata}
    return kind(**ranged, **others)


def random_actions(label: int, rng: np.random.Generator) -> Actions:
    """One of the expression's prototypes, half to fully strong, every muscle a little off."""
    rows = PROTOTYPES[label]
    values = np.array(list(vars(rows[rng.integers(len(rows))]).values()))
    values = values * rng.uniform(0.5, 1.1) * rng.uniform(0.75, 1.25, values.size) + rng.uniform(0, 0.1, values.size)
    values = np.minimum(values, 1.0)
    values[-1] = (values[-1] - 0.05) * rng.choice((-1, 1))  # either side may smirk
    return Actions(*values.tolist())


def random_identity(rng: np.random.Generator) -> Identity:
    """Somebody: proportions, skin, hair, eyes and clothes, now and then glasses or a beard."""
    skin, hair, iris = (np.array(tones[rng.integers(len(tones))]) for tones in (SKINS, HAIRS, IRISES))
    skin = np.clip(skin * rng.uniform(0.92, 1.05) + rng.uniform(-4, 4, 3), 0, 255)
    long, bald, beard, glasses = rng.uniform(size=4) < (0.4, 0.07, 0.12, 0.15)
    some = dict(hair_length=long * rng.uniform(0.5, 1.4), bald=bald, beard=beard, glasses=glasses)
    return _random(Identity, rng, skin=skin, hair=hair, iris=iris, cloth=rng.uniform(30, 220, 3), **some)


def random_view(rng: np.random.Generator) -> View:
    """A pose, a light, a lens and a plain or graded background."""
    graded = rng.uniform() < 0.6
    corners = rng.uniform(50, 215) + rng.uniform(-22, 22, 3) + graded * rng.uniform(-45, 45, (4, 1))
    corners = np.clip(corners + graded * rng.uniform(-12, 12, (4, 3)), 0, 255)
    return _random(View, rng, blur=rng.uniform(0, 0.012), background=corners)


def draw_faces(
    num_images: int, num_classes: int = 7, size: int = 48, seed: int = 0, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draws labelled faces; image i does not depend on num_images, so a longer draw begins with the shorter one.

    Args:
        num_images: at least 1.
        num_classes: 7, or 8 to add contempt.
        size: side of an image in pixels, at least 16.
        seed: at least 0.
        progress: show a progress bar.

    Returns:
        images: uint8 (num_images, size, size, 3), RGB.
        labels: int64 (num_images,), codes of `CLASS_NAMES` in random order; counts differ by 1 at most.

    Raises:
        UserError: an argument is out of its range.
    """
    if num_classes not in (7, 8):
        raise UserError(f"synthetic faces: expected num_classes 7 or 8, received {num_classes}")
    for name, value, least in (("num_images", num_images, 1), ("size", size, 16), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"synthetic faces: expected {name} of at least {least}, received {value}")
    # Every num_classes neighbours hold each class once, so the draw is balanced wherever it is cut.
    # The third word of the seed keeps this stream apart from the drawing's.
    blocks = range(-(-num_images // num_classes))
    orders = [np.random.default_rng((seed, block, 1)).permutation(num_classes) for block in blocks]
    labels = np.concatenate(orders)[:num_images].astype(np.int64)
    images = np.empty((num_images, size, size, 3), np.uint8)
    for index in tqdm(range(num_images), desc="drawing faces", unit="face", disable=None if progress else True):
        rng = np.random.default_rng((seed, index))
        face = draw_face(random_actions(labels[index], rng), random_identity(rng), random_view(rng), size)
        grain = rng.uniform(0, 7) * rng.standard_normal((size, size, 1), np.float32)
        images[index] = np.clip(face + grain, 0, 255)
    return images, labels
