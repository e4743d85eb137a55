"""Each corruption compared with its formula, written out; the same image changes alike in every batch."""

from __future__ import annotations

import io
import math
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from measuring.corruptions import CORRUPTIONS, CorruptedRows, corrupt

NAMES = (
    *("brighter", "darker", "low_contrast", "high_contrast", "blur_1", "blur_2", "noise_10", "noise_20", "jpeg_30"),
    *("rotated_left", "rotated_right", "shifted", "smaller"),
)


def smooth(height=48, width=48, channels=1):
    """A pattern without sharp edges, 20..235, in which no two places are alike."""
    y, x = np.mgrid[:height, :width]
    planes = [127 + 70 * np.sin(x / 7 + c) + 38 * np.cos(y / 5 + x / 11 - c) for c in range(channels)]
    return np.rint(np.stack(planes, axis=-1)).astype(np.uint8)


def clipped(values):
    return np.clip(np.floor(np.asarray(values, np.float64) + 0.5), 0, 255)


def mirrored(place, side):
    """Index of the pixel that stands for ``place`` outside the image: the border pixel is the mirror."""
    period = max(1, 2 * (side - 1))
    place = place % period
    return min(place, period - place)


def test_the_list_is_fixed():
    """Another entry would change the mean of all numbers that were reported."""
    assert tuple(CORRUPTIONS) == NAMES


@pytest.mark.parametrize(("name", "levels"), [("brighter", 50), ("darker", -50)])
def test_light_is_added(name, levels):
    image = np.array([[0, 30, 49, 50, 51, 100, 204, 205, 206, 255]], np.uint8)[..., None]
    assert corrupt(image, name)[0, :, 0].tolist() == [min(255, max(0, int(value) + levels)) for value in image.ravel()]


@pytest.mark.parametrize(("name", "factor"), [("low_contrast", 0.5), ("high_contrast", 1.5)])
def test_contrast_is_about_the_images_own_mean(name, factor):
    image = smooth(9, 7, 3)
    mean = sum(int(value) for value in image.ravel()) / image.size
    expected = clipped([mean + factor * (int(value) - mean) for value in image.ravel()]).reshape(image.shape)
    assert np.abs(corrupt(image, name).astype(int) - expected).max() <= 1  # halves may be rounded either way
    assert np.mean(corrupt(image, name) == expected) > 0.98


@pytest.mark.parametrize(("name", "sigma"), [("blur_1", 1), ("blur_2", 2)])
@pytest.mark.parametrize("side", [48, 96])
def test_blur_is_a_gaussian_that_grows_with_the_side(name, sigma, side):
    image = np.random.default_rng(3).integers(0, 256, (side, side + 10, 1), np.uint8)
    wide = sigma * side / 48
    reach = math.ceil(4 * wide)
    weights = np.array([math.exp(-((step / wide) ** 2) / 2) for step in range(-reach, reach + 1)])
    weights /= weights.sum()
    expected = image[..., 0].astype(np.float64)
    for axis in (0, 1):
        rows = [
            [mirrored(i + step, expected.shape[axis]) for step in range(-reach, reach + 1)]
            for i in range(expected.shape[axis])
        ]
        taken = np.take(expected, rows, axis=axis)  # the axis of the steps follows
        expected = np.tensordot(taken, weights, axes=(axis + 1, 0))
    # OpenCV's kernel for bytes ends at three standard deviations and has 8 bits.
    assert np.abs(corrupt(image, name)[..., 0] - expected).max() < 3


def test_noise_is_normal_and_its_own_for_every_image_and_value():
    gray = np.full((64, 64, 3), 128, np.uint8)
    first, second = (corrupt(gray, "noise_20", seed=1, row=row).astype(float) - 128 for row in (0, 1))
    for noise in (first, second):
        # 12,288 values: standard errors 0.18 of the mean, 0.13 of the deviation.
        assert abs(noise.mean()) < 0.8 and abs(noise.std() - 20) < 0.6
        assert abs(np.mean(np.abs(noise) < 20) - 0.683) < 0.02
    for one, other in ((first, second), (first[..., 0], first[..., 1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.06
    z = np.random.default_rng((1, 5)).standard_normal(gray.shape)
    np.testing.assert_array_equal(corrupt(gray, "noise_10", 1, 5), clipped(128 + 10 * z))
    assert (corrupt(gray, "noise_20", 2, 5) != corrupt(gray, "noise_20", 1, 5)).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_another_librarys(channels):
    image = smooth(48, 40, channels)
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=30, subsampling=2)
    expected = np.asarray(Image.open(file), np.float64).reshape(image.shape)
    found = corrupt(image, "jpeg_30")
    assert np.abs(found - expected).mean() < 1 and np.abs(found - expected).max() < 12
    assert 1 < np.abs(found.astype(float) - image).mean() < 10


@pytest.mark.parametrize(("name", "degrees"), [("rotated_left", 15), ("rotated_right", -15)])
@pytest.mark.parametrize("shape", [(48, 48, 1), (40, 52, 3)])
def test_rotation_turns_the_image_about_its_centre(name, degrees, shape):
    image = smooth(*shape)
    height, width, _ = shape
    found = corrupt(image, name)
    middle_y, middle_x, turn = (height - 1) / 2, (width - 1) / 2, math.radians(degrees)
    for y in range(height):
        for x in range(width):
            # Counter-clockwise with y downwards: what lies at angle a comes to a + turn.
            right, up = x - middle_x, middle_y - y
            from_x = middle_x + right * math.cos(turn) + up * math.sin(turn)
            from_y = middle_y - (up * math.cos(turn) - right * math.sin(turn))
            left, top = math.floor(from_x), math.floor(from_y)
            value = np.zeros(shape[2])
            for i, share_y in ((top, 1 - from_y + top), (top + 1, from_y - top)):
                for j, share_x in ((left, 1 - from_x + left), (left + 1, from_x - left)):
                    value += share_y * share_x * image[mirrored(i, height), mirrored(j, width)]
            assert np.abs(found[y, x] - value).max() < 3, (y, x)  # OpenCV rounds places to 1/32 pixel


def test_shift_moves_by_a_tenth_in_a_drawn_direction():
    image = smooth(48, 30, 3)
    seen = set()
    for row in range(24):
        found = corrupt(image, "shifted", seed=0, row=row)
        moves = {"left": (0, -3), "right": (0, 3), "up": (-5, 0), "down": (5, 0)}
        fits = []
        for name, (down, right) in moves.items():
            rows = [mirrored(y - down, 48) for y in range(48)]
            columns = [mirrored(x - right, 30) for x in range(30)]
            if np.array_equal(found, image[rows][:, columns]):
                fits.append(name)
        (direction,) = fits
        assert direction == ("left", "right", "up", "down")[np.random.default_rng((0, row)).integers(4)]
        seen.add(direction)
    assert seen == {"left", "right", "up", "down"}


def test_smaller_face_is_the_mean_of_areas_in_the_middle():
    image = smooth(48, 40, 1)
    found = corrupt(image, "smaller")

    def shares(side, small):
        """Of each pixel in each smaller one: (small, side)."""
        table = np.zeros((small, side))
        for i in range(small):
            low, high = i * side / small, (i + 1) * side / small
            for j in range(side):
                table[i, j] = max(0, min(high, j + 1) - max(low, j)) * small / side
        return table

    small = shares(48, 38) @ image[..., 0].astype(np.float64) @ shares(40, 32).T
    assert np.abs(found[5:43, 4:36, 0] - small).max() <= 1
    inside = found[5:43, 4:36, 0]
    rows, columns = [mirrored(y - 5, 38) for y in range(48)], [mirrored(x - 4, 32) for x in range(40)]
    np.testing.assert_array_equal(found[..., 0], inside[rows][:, columns])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(48, 48, 1), (31, 50, 3), (2, 3, 3), (1, 1, 1)])
def test_the_form_stays_and_the_image_is_not_written_to(name, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    before = image.copy()
    image.setflags(write=False)
    found = corrupt(image, name)
    assert (found.shape, found.dtype) == (shape, np.uint8)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", ["noise_20", "shifted", "blur_1"])
def test_an_image_changes_alike_in_every_batch(name):
    images = np.random.default_rng(0).integers(0, 256, (7, 12, 12, 1), np.uint8)
    rows = CorruptedRows(images, name, seed=4)
    expected = np.stack([corrupt(image, name, 4, row) for row, image in enumerate(images)])
    assert len(rows) == 7 and rows.shape == images.shape
    for batch in (slice(0, 7), slice(2, 5), slice(6, 9), [3, 0, 3], range(4, 6)):
        np.testing.assert_array_equal(
            rows[batch], expected[list(range(7))[batch] if isinstance(batch, slice) else batch]
        )


def test_only_the_batch_is_read():
    class Spy:
        shape = (1_000_000, 4, 4, 1)
        seen: ClassVar = []

        def __len__(self):
            return len(range(self.shape[0]))

        def __getitem__(self, rows):
            self.seen.append(rows)
            return np.zeros((rows.stop - rows.start, 4, 4, 1), np.uint8)

    rows = CorruptedRows(Spy(), "blur_1")
    assert rows[5:9].shape == (4, 4, 4, 1) and Spy.seen == [slice(5, 9)] and len(rows) == 1_000_000
