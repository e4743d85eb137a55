"""Is the network what it says: outputs, input handling, scaling, head, refusals, layers, augmentation?"""

from __future__ import annotations

import inspect

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import augmentation
import cnn_model
import runtime
from augmentation import Augmentation
from cnn_model import PixelInput, UnitVectors, build_model
from config import AugmentConfig
from files import UserError

NOTHING = AugmentConfig(flip=False, rotation=0.0, shift=0.0, zoom=0.0, erase=0.0)


def pictures(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def outputs(network, pixels) -> dict[str, np.ndarray]:
    return {name: ops.convert_to_numpy(value) for name, value in network(pixels, training=False).items()}


def assert_same(left, right, tolerance=1e-5):
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def mini():
    keras.utils.set_random_seed(1)
    return build_model("mini_xcp")


@pytest.fixture(scope="module")
def xcp():
    keras.utils.set_random_seed(1)
    return build_model("xcp", num_classes=8, num_embeddings=3, embedding_size=16, input_size=71)


@pytest.fixture(params=["mini", "xcp"])
def network(request):
    return request.getfixturevalue(request.param)


# The network


@pytest.mark.parametrize(("name", "logits", "embeddings"), [("mini", (2, 7), (2, 7, 256)), ("xcp", (2, 8), (2, 3, 16))])
def test_outputs(request, name, logits, embeddings):
    found = outputs(request.getfixturevalue(name), pictures(2, 48, 48, 1))
    assert {key: (value.shape, str(value.dtype)) for key, value in found.items()} == {
        "logits": (logits, "float32"),
        "embeddings": (embeddings, "float32"),
    }
    assert all(np.isfinite(value).all() and value.std() > 0 for value in found.values())


def test_embeddings_have_length_1(network):
    embeddings = outputs(network, pictures(3, 48, 48, 1))["embeddings"]
    np.testing.assert_allclose(np.sqrt((embeddings.astype(np.float64) ** 2).sum(-1)), 1, atol=1e-6)


def test_gray_is_repeated_colour(network):
    gray = pictures(2, 48, 48, 1)
    assert_same(outputs(network, gray), outputs(network, np.repeat(gray, 3, axis=-1)))


def test_colour_reaches_a_gray_network_as_luma(mini):
    colour = pictures(2, 48, 48, 3)
    luma = colour.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert_same(outputs(mini, colour), outputs(mini, luma[..., None].astype(np.float32)))


def test_colour_matters_to_a_colour_network(xcp):
    colour = pictures(1, 48, 48, 3)
    assert np.abs(outputs(xcp, colour)["embeddings"] - outputs(xcp, colour[..., ::-1])["embeddings"]).max() > 1e-4


@pytest.mark.parametrize("shape", [(48, 48, 1), (20, 31, 3), (130, 64, 1), (1, 1, 3)])
def test_any_picture_size_is_resized_inside(mini, shape):
    picture = pictures(2, *shape)
    resized = ops.image.resize(picture.astype(np.float32), (48, 48), data_format="channels_last")
    assert_same(outputs(mini, picture), outputs(mini, resized))


def test_uint8_and_float_pixels_are_the_same(network):
    picture = pictures(2, 60, 40, 3)
    assert_same(outputs(network, picture), outputs(network, picture.astype(np.float32)), tolerance=0)


def test_one_face_does_not_depend_on_the_others(mini):
    picture = pictures(4, 48, 48, 1)
    alone = outputs(mini, picture[2:3])
    assert_same(alone, {name: value[2:3] for name, value in outputs(mini, picture).items()})


def test_dropout_is_for_training_alone(mini):
    picture = pictures(1, 48, 48, 1)
    assert_same(outputs(mini, picture), outputs(mini, picture), tolerance=0)
    without = build_model("mini_xcp", dropout=0.0)
    assert mini.get_layer("dropout").rate == 0.5 and without.get_layer("dropout").rate == 0.0


def test_mini_xcp_is_small(mini):
    assert mini.count_params() <= 500_000
    assert mini.get_layer("backbone").output.shape == (None, 6, 6, 128)


def test_xcp_ends_where_the_paper_cuts_xception(xcp):
    backbone = xcp.get_layer("backbone")
    assert backbone.layers[-1].name == "block14_sepconv2_act" and backbone.output.shape[-1] == 2048


@pytest.mark.parametrize(("num_classes", "k", "d"), [(2, 1, 3), (8, 3, 10)])
def test_head_options(num_classes, k, d):
    network = build_model("mini_xcp", num_classes, num_embeddings=k, embedding_size=d, input_size=16)
    found = outputs(network, pictures(2, 16, 16, 1))
    assert found["logits"].shape == (2, num_classes) and found["embeddings"].shape == (2, k, d)
    assert network.get_layer("embedding_dense").count_params() == 128 * k * d + k * d
    assert network.get_layer("logits").count_params() == k * d * num_classes + num_classes


def test_logits_are_the_classifier_of_the_concatenated_embeddings(mini):
    found = outputs(mini, pictures(2, 48, 48, 1))
    kernel, bias = (value.astype(np.float64) for value in mini.get_layer("logits").get_weights())
    expected = [sum(e[j] @ kernel[256 * j : 256 * (j + 1)] for j in range(7)) + bias for e in found["embeddings"]]
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["vgg", "Xception", "keras:", "keras:xception", "keras:applications", ""])
def test_an_unknown_architecture_lists_the_choices(arch):
    with pytest.raises(UserError) as caught:
        build_model(arch)
    message = str(caught.value)
    assert "mini_xcp, xcp, resnet or keras:<Name>" in message and "MobileNetV2" in message and repr(arch) in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes: expected 2 or more, received 1"),
        ({"num_embeddings": 0}, "num_embeddings: expected 1 or more, received 0"),
        ({"embedding_size": 2}, "embedding_size: expected 3 or more, received 2"),
        ({"input_size": 0}, "input_size: expected 1 or more, received 0"),
        ({"input_size": -48}, "input_size: expected 1 or more, received -48"),
        ({"dropout": 1.0}, "dropout: expected 0 <= share < 1, received 1.0"),
        ({"dropout": -0.1}, "dropout: .* received -0.1"),
        ({"dropout": float("nan")}, "dropout: .* received nan"),
        ({"weights": "imagenet"}, "mini_xcp: expected no pretrained backbone"),
        ({"arch": "xcp", "input_size": 70}, "Xception: .*71"),
        ({"arch": "xcp", "input_size": 71, "weights": "no/such.weights.h5"}, "Xception: .*path to the weights file"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_model(**{"arch": "mini_xcp", **options})


def test_any_keras_application_can_be_the_backbone_and_start_from_a_file(tmp_path):
    def build(weights=None):
        return build_model("keras:MobileNet", input_size=32, embedding_size=4, weights=weights)

    first = build()
    assert outputs(first, pictures(2, 30, 30, 1))["embeddings"].shape == (2, 7, 4)
    first.get_layer("backbone").save_weights(tmp_path / "backbone.weights.h5")
    second = build(str(tmp_path / "backbone.weights.h5"))
    weights = zip(first.get_layer("backbone").weights, second.get_layer("backbone").weights, strict=True)
    assert all(np.array_equal(left, right) for left, right in weights)
    assert not np.array_equal(first.get_layer("logits").kernel, second.get_layer("logits").kernel)


# Precision


@pytest.fixture
def bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy("float32")


def test_half_precision_stays_inside(bfloat16):
    network = build_model("mini_xcp", embedding_size=8, input_size=24)
    found = network(pictures(4, 24, 24, 1))
    assert found["logits"].dtype == found["embeddings"].dtype == "float32"
    assert network.get_layer("backbone").output.dtype == "bfloat16"
    assert {variable.dtype for variable in network.trainable_variables} == {"float32"}
    np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=-1), 1, atol=1e-6)
    changed = Augmentation(AugmentConfig(), seed=0)(pictures(4, 24, 24, 1), training=True)
    assert changed.dtype == "float32"


def test_the_logit_scale_is_an_inverse_temperature(mini):
    network = build_model("mini_xcp", logit_scale=4.0)
    network.set_weights(mini.get_weights())
    plain, scaled = outputs(mini, pictures(2, 48, 48, 1)), outputs(network, pictures(2, 48, 48, 1))
    bias = mini.get_layer("logits").get_weights()[1]
    np.testing.assert_allclose(scaled["logits"] - bias, 4 * (plain["logits"] - bias), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scaled["embeddings"], plain["embeddings"])


# Batch normalisation


def normalised(layer, x, upstream, training=True):
    """Outputs, and the gradients of ``sum(upstream * outputs)`` by the inputs, the scale and the offset."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training)
        loss = tf.reduce_sum(upstream * y)
    return [y, *tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])]


@pytest.mark.parametrize("training", [True, False])
def test_fused_batch_norm_is_keras_own(training):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(2, 3, (5, 4, 3, 6)), tf.float32)
    upstream = tf.constant(rng.normal(size=x.shape), tf.float32)
    ours, keras_own = cnn_model.BatchNorm(momentum=0.9), keras.layers.BatchNormalization(momentum=0.9)
    for layer in (ours, keras_own):
        layer.build(x.shape)
        layer.set_weights([rng_.normal(1, 0.1, 6) for rng_ in [np.random.default_rng(1)] for _ in range(4)])
    assert runtime.has_fused_batch_norm()
    for found, expected in zip(
        normalised(ours, x, upstream, training), normalised(keras_own, x, upstream, training), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for found, expected in zip(ours.get_weights(), keras_own.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_frozen_batch_norm_keeps_its_statistics():
    layer = cnn_model.BatchNorm()
    layer.build((None, 2, 2, 3))
    layer.trainable = False
    x = np.random.default_rng(0).normal(5, 2, (4, 2, 2, 3)).astype(np.float32)
    np.testing.assert_allclose(layer(x, training=True), x / np.sqrt(1 + layer.epsilon), rtol=1e-5)
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(3))


# The input layer


def applications() -> dict[str, object]:
    """Each `keras.applications` network's name and the module that publishes it with its ``preprocess_input``."""
    found = {}
    for module in vars(keras.applications).values():
        if inspect.ismodule(module) and hasattr(module, "preprocess_input"):
            found |= {name: module for name in vars(module) if callable(getattr(keras.applications, name, None))}
    return found


def test_every_family_is_among_the_applications():
    assert {"Xception", "ResNet50", "DenseNet121", "EfficientNetB0", "VGG16", "ResNet50V2"} <= set(applications())


@pytest.mark.parametrize("name", applications())
def test_scaling_is_that_of_the_applications_own_module(name):
    picture = pictures(2, 6, 6, 3)
    plan = cnn_model.architecture(f"keras:{name}")
    ours = PixelInput(6, plan.channels, plan.scaling)(picture)
    theirs = applications()[name].preprocess_input(picture.astype(np.float32), data_format="channels_last")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("arch", "name"), [("xcp", "Xception"), ("resnet", "ResNet50")])
def test_our_short_names_scale_as_their_networks(arch, name):
    plan = cnn_model.architecture(arch)
    assert (plan.scaling, plan.channels) == (cnn_model.architecture(f"keras:{name}").scaling, 3)


def test_resizing_is_opencvs_bilinear():
    picture = pictures(1, 20, 33, 3)
    ours = PixelInput(47, 3, "raw")(picture)[0]
    theirs = cv2.resize(picture[0].astype(np.float32), (47, 47), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_scalings_at_black_and_white():
    black_and_white = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1).repeat(2, axis=1)
    for scaling, low, high in (("tf", -1, 1), ("unit", 0, 1), ("raw", 0, 255)):
        scaled = PixelInput(2, 1, scaling)(black_and_white)
        np.testing.assert_allclose(scaled[0, 0, :, 0], [low, high], atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_scaling_takes_light_and_contrast_out_of_each_picture(channels):
    picture = pictures(3, 8, 8, channels)
    picture[1] = 200  # nothing to see
    scaled = PixelInput(8, channels, "image")(picture)
    assert not np.any(scaled[1])
    for found, pixels in zip(scaled, picture.astype(np.float64), strict=True):
        np.testing.assert_allclose(found, (pixels - pixels.mean()) / np.sqrt(pixels.var() + 1), atol=1e-4)


def test_unit_vectors_have_length_1_and_zero_stays_zero_with_finite_gradients():
    vectors = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32) * [[[1e-3]], [[1]], [[1e3]], [[0]]]
    x = tf.constant(vectors, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = UnitVectors()(x)
        total = tf.reduce_sum(y * np.arange(5, dtype=np.float32))
    np.testing.assert_allclose(y[:3], vectors[:3] / np.linalg.norm(vectors[:3], axis=-1, keepdims=True), rtol=1e-5)
    assert not np.any(y[3])
    gradient = tape.gradient(total, x).numpy()
    assert np.isfinite(gradient).all()
    # d/dx of w.x/|x| is (w - (w.u) u) / |x|, u = x/|x|
    length = np.linalg.norm(vectors[1], axis=-1, keepdims=True)
    unit = vectors[1] / length
    expected = (np.arange(5) - (unit @ np.arange(5))[:, None] * unit) / length
    np.testing.assert_allclose(gradient[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [PixelInput(9, 3, "torch", name="input"), UnitVectors(name="unit")])
def test_layers_can_be_written_down_and_made_again(layer):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is type(layer) and again.get_config() == layer.get_config()
    picture = pictures(1, 4, 5, 3).astype(np.float32)
    assert np.array_equal(again(picture), layer(picture))


def test_the_whole_network_can_be_written_down_and_made_again(mini):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(mini))
    again.set_weights(mini.get_weights())
    picture = pictures(2, 30, 20, 3)
    assert_same(outputs(mini, picture), outputs(again, picture), tolerance=0)


# Augmentation


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
    picture = pictures(4, 12, 10, channels)
    layer = Augmentation(AugmentConfig(), seed=0)
    for same in (layer(picture), layer(picture, training=False)):
        assert same.dtype == "float32" and np.array_equal(same, picture)
    switched_off = Augmentation(AugmentConfig(augment=False), seed=0)
    assert np.array_equal(switched_off(picture, training=True), picture)
    assert not np.array_equal(layer(picture, training=True), picture)


@moves_both_ways
def test_with_every_option_off_training_changes_nothing():
    picture = pictures(4, 12, 10, 3)
    np.testing.assert_allclose(Augmentation(NOTHING, seed=0)(picture, training=True), picture, atol=1e-3)


@moves_both_ways
def test_flip_alone_mirrors_half_of_the_images():
    picture = pictures(400, 6, 7, 3)
    changed = ops.convert_to_numpy(Augmentation(only(flip=True), seed=0)(picture, training=True))
    kept = np.abs(changed - picture).max(axis=(1, 2, 3)) < 1e-3
    mirrored = np.abs(changed - picture[:, :, ::-1]).max(axis=(1, 2, 3)) < 1e-3
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
    picture = pictures(300, 20, 30, channels).astype(np.float32)
    changed = ops.convert_to_numpy(Augmentation(only(erase=0.3), seed=1)(picture, training=True))
    erased, places = 0, []
    for before, after in zip(picture, changed, strict=True):
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


@moves_both_ways
@pytest.mark.parametrize("shape", [(24, 24, 1), (17, 30, 3), (1, 1, 1)])
def test_the_range_stays_that_of_pixels(shape):
    wild = AugmentConfig(rotation=180.0, shift=0.9, zoom=0.9, erase=1.0)
    picture = pictures(64, *shape)
    changed = ops.convert_to_numpy(Augmentation(wild, seed=0)(picture, training=True))
    assert changed.shape == picture.shape and np.isfinite(changed).all()
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
    picture = pictures(8, 16, 16, 1)
    layer, twin, other = (Augmentation(AugmentConfig(), seed=seed) for seed in (4, 4, 5))
    (state,) = layer.variables
    first = ops.convert_to_numpy(layer(picture, training=True))
    assert np.array_equal(twin(picture, training=True), first)
    assert not np.array_equal(other(picture, training=True), first)
    saved = state.numpy().copy()
    second = ops.convert_to_numpy(layer(picture, training=True))
    assert not np.array_equal(first, second)
    other.variables[0].assign(saved)
    assert np.array_equal(other(picture, training=True), second)


@moves_both_ways
def test_each_image_has_its_own_draws():
    picture = np.repeat(pictures(1, 16, 16, 1), 32, axis=0)
    changed = ops.convert_to_numpy(Augmentation(AugmentConfig(), seed=0)(picture, training=True))
    assert len({image.tobytes() for image in changed}) == 32


def test_augmentation_and_network_compile_with_xla(mini, monkeypatch):
    """On a GPU XLA compiles the training step (`runtime.jit_compile`); it lacks some of TensorFlow's operations."""
    monkeypatch.setattr(runtime, "jit_compile", lambda: True)
    layer = Augmentation(AugmentConfig(), seed=0)
    picture = pictures(2, 20, 20, 1)

    @tf.function(jit_compile=True)
    def step(pixels):
        return layer(pixels, training=True), mini(pixels, training=False)["logits"]

    changed, logits = step(picture)
    assert changed.shape == (2, 20, 20, 1)
    np.testing.assert_allclose(logits, outputs(mini, picture)["logits"], rtol=1e-4, atol=1e-4)


def test_blend_is_the_weighted_mean_with_the_row_before():
    """Rows 0, 10, 20 with shares 1, 0.5, 0.75: 0; 0.5 * 10 + 0.5 * 0 = 5; 0.75 * 20 + 0.25 * 10 = 17.5."""
    rows = np.array([[0.0], [10.0], [20.0]], "float32")
    found = augmentation.blend(rows, np.array([1.0, 0.5, 0.75], "float32"))
    np.testing.assert_allclose(found, [[0.0], [5.0], [17.5]])


@pytest.mark.parametrize("compiled", (False, True))
def test_mixup_keeps_at_least_half_of_each_image(compiled):
    """Beta(0.4, 0.4) folded at a half: the own shares lie in 0.5..1, differ, and blend the images as they say."""
    import tensorflow as tf

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
