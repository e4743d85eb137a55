"""Augmentation changes the images as its options say, in both implementations; mixup blends neighbours."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from scipy import ndimage

import augmentation
import runtime
from augmentation import Augmentation
from config import AugmentConfig

NOTHING = AugmentConfig(flip=False, rotation=0.0, shift=0.0, zoom=0.0, erase=0.0)


def images(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(params=["native", "XLA"])
def both_ways(request, monkeypatch):
    """The moves as TensorFlow's kernel makes them, and as our own operations do where XLA compiles the step."""
    monkeypatch.setattr(runtime, "jit_compile", lambda: request.param == "XLA")


moves_both_ways = pytest.mark.usefixtures("both_ways")


def ramps(count: int, height: int, width: int) -> np.ndarray:
    """Float (count, height, width, 2): channel 0 holds x and channel 1 holds y of its pixel.

    Bilinear sampling of a plane is exact, so the changed image tells where each of its pixels came from.
    """
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.broadcast_to(np.stack([x, y], axis=-1), (count, height, width, 2))


def affine_maps(changed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares fits to changed ramps.

    Returns:
        Linear parts (N, 2, 2) and where the centre's pixel came from, less the centre (N, 2), both in (x, y).
    """
    count, height, width, _ = changed.shape
    center = np.array([(width - 1) / 2, (height - 1) / 2])
    places = ramps(1, height, width)[0].reshape(-1, 2) - center
    linear, offset = np.empty((count, 2, 2)), np.empty((count, 2))
    for i in range(count):
        source = changed[i].reshape(-1, 2).astype(np.float64)
        # Beyond the edge the nearest pixel repeats: not the plane any more.
        inside = np.all((source > 0.001) & (source < (width - 1.001, height - 1.001)), axis=1)
        assert inside.sum() > 50
        design = np.column_stack([places[inside], np.ones(inside.sum())])
        fit, *_ = np.linalg.lstsq(design, source[inside] - center, rcond=None)
        np.testing.assert_allclose(design @ fit, source[inside] - center, atol=0.02)
        linear[i], offset[i] = fit[:2].T, fit[2]
    return linear, offset


def moved(config: AugmentConfig, count=300, seed=3) -> tuple[np.ndarray, np.ndarray]:
    """`affine_maps` of what the options do to images 30 high and 40 wide."""
    changed = Augmentation(config, seed)(ramps(count, 30, 40), training=True)
    return affine_maps(ops.convert_to_numpy(changed))


def only(**options) -> AugmentConfig:
    return AugmentConfig(**{**vars(NOTHING), **options})


def assert_spread(values, low, high):
    """As 300 even draws from low..high would be: none outside, some near each end, the mean near the middle.

    An outer thirtieth stays empty with probability (29/30)^300 = 4e-5; a mean deviates by (high - low) / sqrt(12 n).
    """
    near, slack = (high - low) / 30, (high - low) / 1000
    assert values.min() >= low - slack and values.max() <= high + slack
    assert values.min() < low + near and values.max() > high - near
    assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / np.sqrt(12 * len(values))


@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_changes_outside_training(channels):
    image = images(4, 12, 10, channels)
    layer = Augmentation(AugmentConfig(), seed=0)
    for same in (layer(image), layer(image, training=False)):
        assert same.dtype == "float32" and np.array_equal(same, image)
    switched_off = Augmentation(AugmentConfig(augment=False), seed=0)
    assert np.array_equal(switched_off(image, training=True), image)
    assert not np.array_equal(layer(image, training=True), image)


@moves_both_ways
def test_with_every_option_off_training_changes_nothing():
    image = images(4, 12, 10, 3)
    np.testing.assert_allclose(Augmentation(NOTHING, seed=0)(image, training=True), image, atol=1e-3)


@moves_both_ways
def test_flip_alone_mirrors_half_of_the_images():
    image = images(400, 6, 7, 3)
    changed = ops.convert_to_numpy(Augmentation(only(flip=True), seed=0)(image, training=True))
    kept = np.abs(changed - image).max(axis=(1, 2, 3)) < 1e-3
    mirrored = np.abs(changed - image[:, :, ::-1]).max(axis=(1, 2, 3)) < 1e-3
    assert np.all(kept ^ mirrored)
    assert abs(mirrored.sum() - 200) < 5 * np.sqrt(400 / 4)


@moves_both_ways
def test_shift_alone_moves_up_to_its_share_of_each_side():
    linear, offset = moved(only(shift=0.2))
    np.testing.assert_allclose(linear, np.broadcast_to(np.eye(2), linear.shape), atol=1e-3)
    assert_spread(offset[:, 0], -0.2 * 40, 0.2 * 40)
    assert_spread(offset[:, 1], -0.2 * 30, 0.2 * 30)
    assert abs(np.corrcoef(offset.T)[0, 1]) < 5 / np.sqrt(300)


@moves_both_ways
def test_zoom_alone_scales_about_the_centre():
    linear, offset = moved(only(zoom=0.3))
    np.testing.assert_allclose(linear, linear[:, :1, :1] * np.eye(2), atol=1e-3)
    np.testing.assert_allclose(offset, 0, atol=0.01)
    assert_spread(linear[:, 0, 0], 0.7, 1.3)


@moves_both_ways
def test_rotation_alone_turns_about_the_centre():
    linear, offset = moved(only(rotation=25.0))
    np.testing.assert_allclose(linear @ linear.transpose(0, 2, 1), np.broadcast_to(np.eye(2), linear.shape), atol=2e-3)
    np.testing.assert_allclose(np.linalg.det(linear), 1, atol=2e-3)
    np.testing.assert_allclose(offset, 0, atol=0.01)
    assert_spread(np.degrees(np.arctan2(linear[:, 1, 0], linear[:, 0, 0])), -25, 25)


@moves_both_ways
def test_together_they_are_a_similarity_of_independent_draws():
    linear, offset = moved(AugmentConfig(flip=True, rotation=20.0, shift=0.1, zoom=0.2, erase=0.0))
    determinant = np.linalg.det(linear)
    assert abs(np.sum(determinant < 0) - 150) < 5 * np.sqrt(300 / 4)
    zoom = np.sqrt(np.abs(determinant))
    np.testing.assert_allclose(linear @ linear.transpose(0, 2, 1), np.eye(2) * zoom[:, None, None] ** 2, atol=5e-3)
    mirror = np.sign(determinant)
    turn = np.degrees(np.arctan2(linear[:, 1, 0] * mirror, linear[:, 1, 1]))
    assert_spread(zoom, 0.8, 1.2)
    assert_spread(turn, -20, 20)
    assert_spread(offset[:, 0], -4, 4)
    draws = np.column_stack([mirror, zoom, turn, offset])
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 5 / np.sqrt(300)


@pytest.mark.parametrize("channels", [1, 3])
def test_erase_alone_fills_one_rectangle_with_the_images_mean(channels):
    image = images(300, 20, 30, channels).astype(np.float32)
    changed = ops.convert_to_numpy(Augmentation(only(erase=0.3), seed=1)(image, training=True))
    erased, places = 0, []
    for before, after in zip(image, changed, strict=True):
        hole = np.abs(after - before).max(axis=-1) > 1e-3
        if not hole.any():
            continue
        erased += 1
        ys, xs = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        box = np.s_[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        np.testing.assert_allclose(after[box] - before.mean(axis=(0, 1)), 0, atol=1e-2)
        assert len(ys) <= 0.4 * 20 + 1 and len(xs) <= 0.4 * 30 + 1
        places.append((ys[0], xs[0], len(ys), len(xs)))
        after[box] = before[box]
        np.testing.assert_allclose(after, before, atol=1e-3)
    assert abs(erased - 90) < 5 * np.sqrt(300 * 0.3 * 0.7)
    assert len(set(places)) > erased // 2
    # Centres lie evenly over each side, so that about one hole in eight crosses each border.
    top, left, height, width = np.transpose(places)
    for crossing in (top == 0, left == 0, top + height == 20, left + width == 30):
        assert crossing.any()


@moves_both_ways
@pytest.mark.parametrize("shape", [(17, 30, 3), (1, 1, 1)])
def test_the_range_stays_that_of_pixels(shape):
    wild = AugmentConfig(rotation=180.0, shift=0.9, zoom=0.9, erase=1.0)
    image = images(64, *shape)
    changed = ops.convert_to_numpy(Augmentation(wild, seed=0)(image, training=True))
    assert changed.shape == image.shape and np.isfinite(changed).all()
    assert changed.min() >= 0 and changed.max() <= 255 + 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_resampling_is_bilinear_and_its_border_goes_on(channels):
    """Against a loop over pixels; the maps turn, shear, shrink, mirror and leave the image."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (6, 5, 7, channels)).astype(np.float32)
    moves = np.zeros((6, 8), np.float32)
    moves[:, :6] = [1, 0, 0, 0, 1, 0] + rng.normal(size=(6, 6)) * [0.5, 0.5, 3, 0.5, 0.5, 3]
    moves[0, :6] = [-1, 0, 6, 0, 1, 0]
    expected = np.empty_like(x)
    for i, row, column in np.ndindex(6, 5, 7):
        a, b, c, d, e, f = (float(value) for value in moves[i, :6])
        from_x = min(max(a * column + b * row + c, 0), 6)
        from_y = min(max(d * column + e * row + f, 0), 4)
        total = 0
        for y in range(5):
            for z in range(7):
                total += max(0, 1 - abs(from_y - y)) * max(0, 1 - abs(from_x - z)) * x[i, y, z].astype(np.float64)
        expected[i, row, column] = total
    np.testing.assert_allclose(augmentation.resample(x, moves), expected, atol=0.01)
    np.testing.assert_allclose(expected[0], x[0, :, ::-1], atol=1e-4)


def test_the_same_state_gives_the_same_changes_and_the_next_call_others():
    """The state is a variable of the layer, so a run's saved state brings it back."""
    image = images(8, 16, 16, 1)
    layer, twin, other = (Augmentation(AugmentConfig(), seed=seed) for seed in (4, 4, 5))
    (state,) = layer.variables
    first = ops.convert_to_numpy(layer(image, training=True))
    assert np.array_equal(twin(image, training=True), first)
    assert not np.array_equal(other(image, training=True), first)
    saved = state.numpy().copy()
    second = ops.convert_to_numpy(layer(image, training=True))
    assert not np.array_equal(first, second)
    other.variables[0].assign(saved)
    assert np.array_equal(other(image, training=True), second)


@moves_both_ways
def test_each_image_has_its_own_draws():
    image = np.repeat(images(1, 16, 16, 1), 32, axis=0)
    changed = ops.convert_to_numpy(Augmentation(AugmentConfig(), seed=0)(image, training=True))
    assert len({image.tobytes() for image in changed}) == 32


def test_augmentation_compiles_with_xla(monkeypatch):
    """On a GPU XLA compiles the training step (`runtime.jit_compile`); it lacks some of TensorFlow's operations."""
    monkeypatch.setattr(runtime, "jit_compile", lambda: True)
    layer, image = Augmentation(AugmentConfig(), seed=0), images(2, 20, 20, 1)
    changed = tf.function(lambda pixels: layer(pixels, training=True), jit_compile=True)(image)
    assert changed.shape == image.shape and np.isfinite(changed).all() and not np.array_equal(changed, image)


def test_under_half_precision_pixels_stay_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        changed = Augmentation(AugmentConfig(), seed=0)(images(4, 24, 24, 1), training=True)
    finally:
        keras.config.set_dtype_policy("float32")
    assert changed.dtype == "float32"


def test_blend_is_the_weighted_mean_with_the_row_before():
    """Rows 0, 10, 20 with shares 1, 0.5, 0.75: 0; 0.5 * 10 + 0.5 * 0 = 5; 0.75 * 20 + 0.25 * 10 = 17.5."""
    rows = np.array([[0.0], [10.0], [20.0]], "float32")
    found = augmentation.blend(rows, np.array([1.0, 0.5, 0.75], "float32"))
    np.testing.assert_allclose(found, [[0.0], [5.0], [17.5]])


@pytest.mark.parametrize("compiled", (False, True))
def test_mixup_keeps_at_least_half_of_each_image(compiled):
    """Beta(0.4, 0.4) folded at a half: the own shares lie in 0.5..1, differ, and blend the images as they say."""
    layer = augmentation.Mixup(0.4, seed=3)
    pixels = np.random.default_rng(0).uniform(0, 255, (64, 2, 2, 1)).astype("float32")
    blended, shares = tf.function(layer.call, jit_compile=compiled)(pixels)
    shares = np.asarray(shares)
    assert shares.min() >= 0.5 and shares.max() <= 1 and np.std(shares) > 0.1
    expected = [s * pixels[i] + (1 - s) * pixels[i - 1] for i, s in enumerate(shares)]
    np.testing.assert_allclose(blended, expected, atol=1e-3)
    assert not np.allclose(layer(pixels)[1], layer(pixels)[1])


def test_mixup_shares_are_those_of_the_folded_beta():
    """Beta(1, 1) is uniform: folded, uniform over 0.5..1, so that its mean is 0.75 and its deviation 0.5 / sqrt(12)."""
    _, shares = augmentation.Mixup(1.0, seed=0)(np.zeros((20_000, 1, 1, 1), "float32"))
    assert np.mean(shares) == pytest.approx(0.75, abs=0.005)
    assert np.std(shares) == pytest.approx(0.5 / 12**0.5, abs=0.005)


# Light, blur and noise


def alone(**options) -> Augmentation:
    return Augmentation(dataclasses.replace(NOTHING, **options), seed=3)


def test_blur_is_the_gaussian_convolution_of_half_of_the_images():
    """Against SciPy's filter with the width that fits best, which differs from image to image."""
    pixels = images(12, 20, 24, 3).astype("float32")
    blurred = np.asarray(alone(blur=1.5)(pixels, training=True))
    widths = []
    for before, after in zip(pixels, blurred, strict=True):
        tried = {
            width: np.abs(
                ndimage.gaussian_filter(before, (width, width, 0), mode="reflect", radius=(4, 4, 0)) - after
            ).max()
            for width in np.linspace(0.05, 1.5, 1451)
        }
        widths.append(min(tried, key=tried.get))
        assert tried[widths[-1]] < 0.3
    sharp = sum(width < 0.1 for width in widths)
    assert 3 <= sharp <= 9 and len(set(widths)) > 12 - sharp and max(widths) > 0.5


def test_contrast_moves_brightness_and_contrast_of_each_image_within_its_range():
    pixels = np.random.default_rng(0).uniform(110, 140, (200, 8, 8, 1)).astype("float32")
    changed = np.asarray(alone(contrast=0.2)(pixels, training=True))
    factor = changed.std(axis=(1, 2, 3)) / pixels.std(axis=(1, 2, 3))
    added = (changed.mean(axis=(1, 2, 3)) - pixels.mean(axis=(1, 2, 3))) / 255
    for values in (factor - 1, added):
        assert -0.2005 < values.min() < -0.15 and 0.15 < values.max() < 0.2005
    assert abs(np.corrcoef(factor, added)[0, 1]) < 0.3


def test_noise_has_another_strength_in_each_image_none_in_half_of_them_and_is_gray():
    pixels = np.full((300, 12, 12, 3), 128, np.uint8)
    noise = np.asarray(alone(noise=20.0)(pixels, training=True)) - 128
    np.testing.assert_array_equal(noise[..., 0], noise[..., 2])
    strengths = noise[..., 0].std(axis=(1, 2))
    assert 0.4 < np.mean(strengths == 0) < 0.6 and 17 < strengths.max() < 24
    assert strengths[strengths > 0].mean() == pytest.approx(10, abs=1.7) and abs(noise.mean()) < 0.3


@pytest.mark.parametrize("options", [{"contrast": 0.9}, {"blur": 2.0}, {"noise": 255.0}])
def test_pixels_stay_in_their_range_and_evaluation_sees_them_as_they_are(options, monkeypatch):
    monkeypatch.setattr(runtime, "jit_compile", lambda: True)
    pixels = images(20, 12, 10, 1)
    layer = alone(**options)
    changed = np.asarray(layer(pixels, training=True))
    assert changed.shape == pixels.shape and changed.min() >= 0 and changed.max() <= 255 and changed.std() > 1
    np.testing.assert_array_equal(layer(pixels, training=False), pixels)
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    assert np.isfinite(compiled(tf.constant(pixels))).all()
