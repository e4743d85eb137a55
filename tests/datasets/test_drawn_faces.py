"""Tests of datasets.shared.drawn_faces: the faces are reproducible, balanced, expressive and learnable."""

from __future__ import annotations

import dataclasses
import io
import sys

import cv2
import numpy as np
import pytest

from datasets.shared import drawn_faces as synthetic
from datasets.shared.drawn_faces import PROTOTYPES, Actions, Identity, View, draw_face, draw_faces
from datasets.shared.expressions import ANGER, CONTEMPT, DISGUST, FEAR, HAPPY, NEUTRAL, SAD, SURPRISE
from files import UserError

CANONICAL = Identity()
LEFT, RIGHT = -1, 1


# --- drawing many ----------------------------------------------------------------------------------------------------


def test_drawing_does_not_touch_or_read_the_global_generator():
    np.random.seed(1)
    expected, _ = draw_faces(3)
    np.random.seed(2)
    state = np.random.get_state()[1].copy()
    images, _ = draw_faces(3)
    assert np.array_equal(images, expected)
    assert np.array_equal(np.random.get_state()[1], state)


def test_a_longer_draw_begins_with_the_shorter_one():
    long_images, long_labels = draw_faces(23, seed=2)
    for length in (1, 7, 10):
        images, labels = draw_faces(length, seed=2)
        assert np.array_equal(images, long_images[:length])
        assert np.array_equal(labels, long_labels[:length])


def test_a_face_depends_on_seed_index_and_label_alone():
    seven, labels_seven = draw_faces(40, num_classes=7, seed=3)
    eight, labels_eight = draw_faces(40, num_classes=8, seed=3)
    same = labels_seven == labels_eight
    assert 0 < same.sum() < 40
    assert np.array_equal(seven[same], eight[same])
    assert not any(np.array_equal(a, b) for a, b in zip(seven[~same], eight[~same], strict=True))


def test_other_seeds_and_indices_draw_other_faces():
    first, labels_first = draw_faces(28, seed=0)
    second, labels_second = draw_faces(28, seed=1)
    assert len({image.tobytes() for image in (*first, *second)}) == 56
    assert not np.array_equal(labels_first, labels_second)


def test_shapes_and_types():
    for size in (
        16,
        61,
    ):
        images, labels = draw_faces(5, size=size)
        assert images.shape == (5, size, size, 3)
        assert images.dtype == np.uint8
        assert labels.shape == (5,)
        assert labels.dtype == np.int64
        assert images.std(axis=(1, 2, 3)).min() > 10  # an image, not a flat patch


def test_classes_are_balanced_within_one():
    for num_images, num_classes in (
        (6, 7),
        (45, 7),
        (45, 8),
    ):
        _, labels = draw_faces(num_images, num_classes, size=16)
        counts = [int((labels == code).sum()) for code in range(num_classes)]
        assert sum(counts) == num_images
        assert max(counts) - min(counts) <= 1


def test_classes_come_in_random_order():
    _, labels = draw_faces(70, size=16)
    rounds = {tuple(row) for row in labels.reshape(10, 7)}
    assert len(rounds) > 8  # of 7! = 5040 orders, ten equal ones by chance are as good as impossible
    assert tuple(range(7)) not in rounds


def test_progress_shows_a_bar_on_a_terminal_and_changes_nothing(monkeypatch):
    for on_terminal in (False, True):
        monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
        screen.isatty = lambda shown=on_terminal: shown
        quiet, _ = draw_faces(3, size=16)
        assert screen.getvalue() == ""
        loud, _ = draw_faces(3, size=16, progress=True)
        assert ("3/3" in screen.getvalue()) == on_terminal  # a log file holds no bar
        assert np.array_equal(quiet, loud)


def test_arguments_out_of_range_are_named():
    for arguments, message in (
        ({"num_classes": 9}, "expected num_classes 7 or 8, received 9"),
        ({"seed": -1}, "expected seed of at least 0, received -1"),
    ):
        with pytest.raises(UserError, match=message):
            draw_faces(**{"num_images": 2, **arguments})


# --- what an expression does to the face -----------------------------------------------------------------------------

# Ekman and Friesen's EMFACS: what each expression must show (by our field names), and what would contradict it.
MUST = {
    HAPPY: {"cheek_raise", "lip_corner_pull"},  # 6 12
    SAD: {"inner_brow_raise", "brow_lower", "lip_corner_depress"},  # 1 4 15
    SURPRISE: {"inner_brow_raise", "outer_brow_raise", "upper_lid_raise", "jaw_drop"},  # 1 2 5 26
    FEAR: {"inner_brow_raise", "outer_brow_raise", "brow_lower", "upper_lid_raise", "lip_stretch"},  # 1 2 4 5 20
    DISGUST: {"nose_wrinkle", "lip_corner_depress"},  # 9 15
    ANGER: {"brow_lower", "upper_lid_raise", "lid_tighten"},  # 4 5 7
    CONTEMPT: {"smirk"},  # 12 14 of one side
}
MUST_NOT = {
    HAPPY: {"brow_lower", "lip_corner_depress", "smirk"},
    SAD: {"outer_brow_raise", "lip_corner_pull", "upper_lid_raise"},
    SURPRISE: {"brow_lower", "lip_corner_pull", "lip_stretch"},
    FEAR: {"lip_corner_pull", "nose_wrinkle"},
    DISGUST: {"inner_brow_raise", "lip_corner_pull", "upper_lid_raise"},
    ANGER: {"inner_brow_raise", "outer_brow_raise", "nose_wrinkle", "lip_corner_pull"},
    CONTEMPT: {"lip_corner_pull", "lip_corner_depress"},
}


def test_prototypes_follow_emfacs():
    for code, must in MUST.items():
        for actions in PROTOTYPES[code]:
            active = {name for name, value in dataclasses.asdict(actions).items() if value}
            assert must <= active and not MUST_NOT[code] & active, code


def test_the_neutral_face_is_relaxed():
    assert PROTOTYPES[NEUTRAL] == (Actions(),)
    assert set(dataclasses.asdict(Actions()).values()) == {0.0}


def corner_lift(actions: Actions) -> tuple[float, float]:
    """How far the left and the right corner of the mouth lie above the middle between the lips (y points down)."""
    _, upper, lower, _ = synthetic.lips(actions, CANONICAL)
    middle = (upper[8, 1] + lower[8, 1]) / 2
    return middle - upper[0, 1], middle - upper[-1, 1]


def mouth_box(actions: Actions) -> tuple[float, float]:
    """Width of the mouth and height of its opening."""
    _, upper, lower, _ = synthetic.lips(actions, CANONICAL)
    return float(np.ptp(upper[:, 0])), float((lower - upper)[:, 1].max())


def eye_opening(actions: Actions) -> float:
    upper, lower = synthetic.lids(actions, CANONICAL, RIGHT)
    return float((lower - upper)[:, 1].max())


def brow_ends(actions: Actions) -> tuple[float, float]:
    """How much higher the inner and the outer end of a brow are than on the relaxed face."""
    moved = synthetic.brow(Actions(), CANONICAL, RIGHT) - synthetic.brow(actions, CANONICAL, RIGHT)
    return moved[0, 1], moved[-1, 1]


def test_mouth_corners_rise_in_joy_and_fall_in_sadness():
    assert corner_lift(Actions()) == pytest.approx((0, 0), abs=1e-9)
    assert all(min(corner_lift(actions)) > 0.1 for actions in PROTOTYPES[HAPPY])
    assert all(max(corner_lift(actions)) < -0.1 for actions in PROTOTYPES[SAD])
    assert all(max(corner_lift(actions)) < 0 for actions in PROTOTYPES[DISGUST])


def test_contempt_lifts_one_corner_of_the_mouth():
    left, right = corner_lift(PROTOTYPES[CONTEMPT][0])
    assert right > 0.1 > abs(left)
    assert corner_lift(Actions(smirk=-1.0)) == pytest.approx(corner_lift(Actions(smirk=1.0))[::-1])


def test_the_mouth_is_round_in_surprise_and_wide_in_fear():
    relaxed_width, relaxed_opening = mouth_box(Actions())
    assert relaxed_opening == 0
    width, opening = mouth_box(PROTOTYPES[SURPRISE][0])
    assert width < 0.8 * relaxed_width
    assert opening > 0.5 * width
    for actions in PROTOTYPES[FEAR]:
        width, opening = mouth_box(actions)
        assert width > 1.2 * relaxed_width
        assert 0 < opening < 0.3 * width


def test_eyes_widen_in_surprise_and_fear_and_narrow_in_joy_and_disgust():
    relaxed = eye_opening(Actions())
    assert all(eye_opening(actions) > 1.3 * relaxed for code in (SURPRISE, FEAR) for actions in PROTOTYPES[code])
    assert all(eye_opening(actions) < 0.8 * relaxed for code in (HAPPY, DISGUST) for actions in PROTOTYPES[code])


def test_brows_tell_surprise_fear_sadness_and_anger_apart():
    inner, outer = brow_ends(PROTOTYPES[SURPRISE][0])
    assert min(inner, outer) > 0.05
    for code in (SAD, FEAR):  # oblique: the inner end alone goes up
        inner, outer = brow_ends(PROTOTYPES[code][0])
        assert inner > 0.1
        assert -0.1 < outer < 0
    inner, outer = brow_ends(PROTOTYPES[ANGER][0])
    assert inner < -0.1 < outer


def test_the_two_halves_of_a_symmetric_face_mirror_each_other():
    actions = PROTOTYPES[FEAR][0]
    mirror = np.array([-1.0, 1.0])
    np.testing.assert_allclose(
        synthetic.brow(actions, CANONICAL, LEFT) * mirror, synthetic.brow(actions, CANONICAL, RIGHT)
    )
    for left, right in zip(
        synthetic.lids(actions, CANONICAL, LEFT), synthetic.lids(actions, CANONICAL, RIGHT), strict=True
    ):
        np.testing.assert_allclose(left * mirror, right)
    for edge in synthetic.lips(actions, CANONICAL):
        np.testing.assert_allclose(edge[::-1] * mirror, edge, atol=1e-12)


def test_random_actions_stay_in_range_and_vary_in_strength():
    rng = np.random.default_rng(0)
    for code in PROTOTYPES:
        drawn = [synthetic.random_actions(code, rng) for _ in range(60)]
        values = np.array([dataclasses.astuple(actions) for actions in drawn])
        assert values[:, :-1].min() >= 0
        assert np.abs(values).max() <= 1
        if code in MUST:
            field = next(iter(MUST[code]))
            strengths = [abs(getattr(actions, field)) for actions in drawn]
            assert max(strengths) - min(strengths) > 0.3
    smirks = [synthetic.random_actions(CONTEMPT, rng).smirk for _ in range(60)]
    assert min(smirks) < -0.3
    assert max(smirks) > 0.3


# --- pixels ----------------------------------------------------------------------------------------------------------


def darkest_row(image: np.ndarray, column: int, top: int, bottom: int) -> int:
    return top + int(image[top:bottom, column].sum(axis=-1).argmin())


@pytest.mark.parametrize(("code", "sign"), [(HAPPY, 1), (SAD, -1)])
def test_the_drawn_mouth_curves_as_the_expression_says(code, sign):
    # At 192 px a face unit is 0.42 * 192 = 81 px; the mouth's line is the darkest thing between nose and chin.
    image = draw_face(PROTOTYPES[code][0], size=192)
    centre, left, right = (darkest_row(image, column, 122, 165) for column in (96, 74, 118))
    assert sign * (centre - left) >= 3
    assert sign * (centre - right) >= 3


def test_smirks_of_both_sides_are_mirror_images():
    right, left = (draw_face(Actions(smirk=side), size=96)[55:].astype(int) for side in (RIGHT, LEFT))
    assert np.abs(right[:, ::-1] - left).mean() < 1
    assert np.abs(right - left).mean() > 2


def test_shifts_turns_and_zooms_move_the_image():
    base = draw_face(Actions()).astype(int)
    pixel = 1 / (0.42 * 48)
    right = draw_face(Actions(), view=View(shift_x=4 * pixel)).astype(int)
    assert np.abs(right[:, 4:] - base[:, :-4]).mean() < 0.5
    down = draw_face(Actions(), view=View(shift_y=3 * pixel)).astype(int)
    assert np.abs(down[3:] - base[:-3]).mean() < 0.5
    turned = draw_face(Actions(), view=View(angle=90)).astype(int)
    assert np.abs(turned - np.rot90(base, -1)).mean() < 1  # OpenCV fills rows and columns a little differently
    background = np.array([196, 202, 210])
    small = draw_face(Actions(), view=View(scale=0.8))
    assert (small == background).all(axis=-1).sum() > (base == background).all(axis=-1).sum()


def test_light_contrast_and_brightness_change_grey_levels_as_written():
    lit = draw_face(Actions(), view=View(light_x=0.2, light_y=0.1))
    # The background is 196 in red; the gain is 1 - 0.2 - 0.1 at the top left and 1 + 0.2 - 0.1 at the top right.
    assert lit[0, 0, 0] == 137  # 137.2
    assert lit[0, -1, 0] == 215  # 215.6
    assert draw_face(Actions(), view=View(contrast=0.5))[0, 0, 0] == 162  # 128 + (196 - 128) / 2
    assert draw_face(Actions(), view=View(brightness=-20))[0, 0, 0] == 176


def test_blur_is_a_share_of_the_side():
    def detail(image):
        return np.abs(np.diff(image.astype(float), axis=1)).mean()

    for size in (48, 96):
        sharp, blurred = draw_face(Actions(), size=size), draw_face(Actions(), view=View(blur=0.04), size=size)
        assert detail(blurred) < 0.8 * detail(sharp)
    small = cv2.resize(draw_face(Actions(), view=View(blur=0.04), size=96), (48, 48), interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - draw_face(Actions(), view=View(blur=0.04), size=48)).mean() < 3


def test_identity_shows():
    plain = draw_face(Actions()).astype(int)
    for change in ({"glasses": True}, {"beard": True}, {"bald": True}, {"hair_length": 1.2}, {"skin": (118, 80, 60)}):
        assert np.abs(draw_face(Actions(), Identity(**change)) - plain).mean() > 1, change


# --- learnability ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grey_faces() -> tuple[np.ndarray, np.ndarray]:
    """900 faces as 24 x 24 grey pixels, each standardised, (900, 576), and their labels; 700 are for training."""
    images, labels = draw_faces(900, size=24, seed=0)
    grey = images.mean(axis=-1).reshape(900, 576)
    return (grey - grey.mean(axis=1, keepdims=True)) / grey.std(axis=1, keepdims=True), labels


def test_a_linear_classifier_learns_the_expressions(grey_faces):
    """Ridge regression to one-hot labels, written out."""
    pixels, labels = grey_faces
    centred = pixels - pixels[:700].mean(axis=0)
    targets = np.eye(7)[labels[:700]]
    weights = np.linalg.solve(centred[:700].T @ centred[:700] + 100 * np.eye(576), centred[:700].T @ targets)
    predicted = (centred[700:] @ weights + targets.mean(axis=0)).argmax(axis=1)
    assert (predicted == labels[700:]).mean() > 0.58  # measured 0.68 to 0.69 with three seeds; chance 0.14


def test_no_single_pixel_gives_the_expression_away(grey_faces):
    pixels, labels = grey_faces
    best = 0.0
    for values in pixels.T:
        level = np.digitize(values, np.quantile(values[:700], np.arange(1, 8) / 8))  # eight levels
        counts = np.zeros((8, 7))
        np.add.at(counts, (level[:700], labels[:700]), 1)
        best = max(best, (counts.argmax(axis=1)[level[700:]] == labels[700:]).mean())
    assert best < 0.40  # measured 0.24 to 0.26 with three seeds
