"""Changes the images in training, on the device, inside the model: random moves, light, blur, noise, erasing, mixup."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import layers, ops
from scipy.special import betaincinv

import runtime
from config import AugmentConfig

_QUANTILES = 1024  # of mixup's table of shares


def resample(x, moves):
    """Moves the pixels of each image by an affine map, bilinearly; outside the image the border pixels are repeated.

    Args:
        x: float (B, H, W, C).
        moves: float (B, 8): output (column, row) comes from ``(m0 column + m1 row + m2, m3 column + m4 row + m5)``, as
            in `keras.ops.image.affine_transform`, which XLA cannot compile on TensorFlow.

    Returns:
        Float (B, H, W, C).
    """
    height, width, channels = x.shape[1:]
    m = ops.reshape(moves, (-1, 8, 1, 1))
    column = ops.arange(width, dtype=x.dtype)[None, None, :]
    row = ops.arange(height, dtype=x.dtype)[None, :, None]
    from_x = ops.clip(m[:, 0] * column + m[:, 1] * row + m[:, 2], 0, width - 1)  # (B, H, W)
    from_y = ops.clip(m[:, 3] * column + m[:, 4] * row + m[:, 5], 0, height - 1)
    left, top = ops.floor(from_x), ops.floor(from_y)
    share_x, share_y = (from_x - left)[..., None], (from_y - top)[..., None]
    flat = ops.reshape(x, (-1, height * width, channels))

    def pixels(y, x):
        place = ops.cast(ops.minimum(y, height - 1) * width + ops.minimum(x, width - 1), "int32")
        place = ops.repeat(ops.reshape(place, (-1, height * width, 1)), channels, axis=2)
        return ops.reshape(ops.take_along_axis(flat, place, axis=1), (-1, height, width, channels))

    upper = pixels(top, left) * (1 - share_x) + pixels(top, left + 1) * share_x
    lower = pixels(top + 1, left) * (1 - share_x) + pixels(top + 1, left + 1) * share_x
    return upper * (1 - share_y) + lower * share_y


def _native_resample(x, moves):
    return ops.image.affine_transform(
        x, moves, interpolation="bilinear", fill_mode="nearest", data_format="channels_last"
    )


class Augmentation(layers.Layer):
    """Random moves, light, blur, noise and erasing of raw pixels, each image its own; does nothing outside training.

    One affine resampling does flip, turn, shift and zoom, so an image is interpolated once.

    Args:
        config: what is changed and how far.
        seed: of the random numbers; their state is a variable, so a resumed run continues where it stopped.
    """

    def __init__(self, config: AugmentConfig, seed: int, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.config = config
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, pixels, training=False):
        """Uint8 or float (B, H, W, C) in 0..255 to float32 of the same shape and range."""
        x = ops.cast(pixels, "float32")
        if not training or not self.config.augment:
            return x
        # TensorFlow's own kernel is several times faster on a CPU; XLA does not have it.
        x = resample(x, self._moves(x)) if runtime.jit_compile() else _native_resample(x, self._moves(x))
        for chance, change in (
            (self.config.contrast, self._relight),
            (self.config.blur, self._blur),
            (self.config.noise, self._add_noise),
            (self.config.erase, self._erase),
        ):
            x = change(x) if chance else x
        return x

    def _uniform(self, batch_size, low, high):
        return keras.random.uniform((batch_size,), low, high, seed=self.generator)

    def _strengths(self, x, most):
        """One per image, float (B,): 0 for half of them, so that sharp ones are seen often enough, else 0..most."""
        return ops.maximum(self._uniform(ops.shape(x)[0], -most, most), 0.0)

    def _moves(self, x):
        """The affine maps from output to input coordinates, (B, 8) as `keras.ops.image.affine_transform` wants them."""
        batch_size, height, width = ops.shape(x)[0], x.shape[1], x.shape[2]
        c = self.config
        turn = self._uniform(batch_size, -c.rotation, c.rotation) * (3.141592653589793 / 180)
        zoom = 1 + self._uniform(batch_size, -c.zoom, c.zoom)
        mirror = ops.where(self._uniform(batch_size, 0, 1) < 0.5 * c.flip, -1.0, 1.0)
        shift_x = self._uniform(batch_size, -c.shift, c.shift) * width
        shift_y = self._uniform(batch_size, -c.shift, c.shift) * height
        cos, sin = ops.cos(turn) * zoom, ops.sin(turn) * zoom
        center_x, center_y = (width - 1) / 2, (height - 1) / 2
        a, b, d, e = cos * mirror, -sin, sin * mirror, cos
        nothing = ops.zeros_like(turn)
        offset_x = center_x - a * center_x - b * center_y + shift_x
        offset_y = center_y - d * center_x - e * center_y + shift_y
        return ops.stack([a, b, offset_x, d, e, offset_y, nothing, nothing], axis=1)

    def _relight(self, x):
        """Scales each image about its own mean, and adds a share of 255 to it."""
        batch_size, most = ops.shape(x)[0], self.config.contrast
        factor = ops.reshape(1 + self._uniform(batch_size, -most, most), (-1, 1, 1, 1))
        added = ops.reshape(255 * self._uniform(batch_size, -most, most), (-1, 1, 1, 1))
        mean = ops.mean(x, axis=(1, 2, 3), keepdims=True)
        return ops.clip(mean + factor * (x - mean) + added, 0, 255)

    def _blur(self, x):
        """Convolves half of the images with a Gaussian of their own width; beyond the border the image is mirrored."""
        radius = math.ceil(2.5 * self.config.blur)
        width = self._strengths(x, self.config.blur)
        steps = ops.arange(-radius, radius + 1, dtype="float32")
        weights = ops.exp(-ops.square(steps[None, :] / ops.maximum(width, 0.05)[:, None]) / 2)
        weights = weights / ops.sum(weights, axis=1, keepdims=True)  # (B, 2 radius + 1)
        for axis in (1, 2):
            side = x.shape[axis]
            padding = [(0, 0)] * 4
            padding[axis] = (radius, radius)
            wide = ops.pad(x, padding, mode="symmetric")
            parts = (wide[:, i : i + side] if axis == 1 else wide[:, :, i : i + side] for i in range(2 * radius + 1))
            x = sum(ops.reshape(weights[:, i], (-1, 1, 1, 1)) * part for i, part in enumerate(parts))
        return x

    def _add_noise(self, x):
        """Adds Gaussian noise to half of the images, of another strength to each, to every channel alike."""
        strength = ops.reshape(self._strengths(x, self.config.noise), (-1, 1, 1, 1))
        noise = keras.random.normal((*ops.shape(x)[:-1], 1), seed=self.generator)
        return ops.clip(x + strength * noise, 0, 255)

    def _erase(self, x):
        """Fills one rectangle, a tenth to four tenths of each side, with the image's own mean."""
        batch_size, height, width = ops.shape(x)[0], x.shape[1], x.shape[2]
        inside_y = self._stripe(batch_size, height)
        inside_x = self._stripe(batch_size, width)
        chosen = self._uniform(batch_size, 0, 1) < self.config.erase
        hole = inside_y[:, :, None] & inside_x[:, None, :] & chosen[:, None, None]
        return ops.where(hole[..., None], ops.mean(x, axis=(1, 2), keepdims=True), x)

    def _stripe(self, batch_size, side):
        length = self._uniform(batch_size, 0.1, 0.4) * side
        start = self._uniform(batch_size, 0, 1) * side - length / 2
        place = ops.arange(side, dtype="float32")[None, :]
        return (place >= start[:, None]) & (place < (start + length)[:, None])

    def compute_output_shape(self, input_shape):
        return input_shape


class Mixup(layers.Layer):
    """Blends each image of a batch with its neighbour (Zhang et al. 2018, arXiv 1710.09412).

    Args:
        alpha: shares come from Beta(alpha, alpha), an image's own and at least a half, so that its label stays the
            larger part of its target.
        seed: of the shares; their state is a variable, so a resumed run continues where it stopped.
    """

    def __init__(self, alpha: float, seed: int, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.generator = keras.random.SeedGenerator(seed)
        # From a table, because XLA on TensorFlow cannot compile keras.random.beta.
        levels = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
        self.quantiles = betaincinv(alpha, alpha, 0.5 + levels / 2).astype(np.float32)

    def call(self, pixels):
        """Float (B, H, W, C) to the blended images of the same shape and each image's own share, float32 (B,)."""
        place = keras.random.randint((ops.shape(pixels)[0],), 0, _QUANTILES, seed=self.generator)
        shares = ops.take(ops.convert_to_tensor(self.quantiles), place)
        return blend(pixels, shares), shares


def blend(x, shares):
    """Each row of ``x``, float (B, ...), weighted with its share, float (B,), and the row before it with the rest."""
    shares = ops.reshape(shares, (-1, *(1,) * (len(x.shape) - 1)))
    return shares * x + (1 - shares) * ops.roll(x, 1, axis=0)
