"""The network: outputs, input handling, scaling, head, refusals, layers."""

from __future__ import annotations

import inspect

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import cnn_model
import runtime
from cnn_model import PixelInput, UnitVectors, build_model
from files import UserError
from images import resize_image


def images(*shape, seed=0) -> np.ndarray:
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
    found = outputs(request.getfixturevalue(name), images(2, 48, 48, 1))
    assert {key: (value.shape, str(value.dtype)) for key, value in found.items()} == {
        "logits": (logits, "float32"),
        "embeddings": (embeddings, "float32"),
    }
    assert all(np.isfinite(value).all() and value.std() > 0 for value in found.values())


def test_embeddings_have_length_1(network):
    embeddings = outputs(network, images(3, 48, 48, 1))["embeddings"]
    np.testing.assert_allclose(np.sqrt((embeddings.astype(np.float64) ** 2).sum(-1)), 1, atol=1e-6)


def test_gray_is_repeated_colour(network):
    gray = images(2, 48, 48, 1)
    assert_same(outputs(network, gray), outputs(network, np.repeat(gray, 3, axis=-1)))


def test_colour_reaches_a_gray_network_as_luma(mini):
    colour = images(2, 48, 48, 3)
    luma = colour.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert_same(outputs(mini, colour), outputs(mini, luma[..., None].astype(np.float32)))


def test_colour_matters_to_a_colour_network(xcp):
    colour = images(1, 48, 48, 3)
    assert np.abs(outputs(xcp, colour)["embeddings"] - outputs(xcp, colour[..., ::-1])["embeddings"]).max() > 1e-4


@pytest.mark.parametrize("shape", [(20, 31, 3), (130, 64, 1), (5, 3, 3), (224, 30, 3)])
def test_any_image_size_is_resized_inside(mini, shape):
    image = images(2, *shape)
    expected = outputs(mini, resized(image, 48))
    assert_same(outputs(mini, image), expected)
    # Now a compiled function, which TensorFlow traces for any size once it has seen two.
    assert_same(mini.predict_on_batch(image), expected)


def test_uint8_and_float_pixels_are_the_same(network):
    image = images(2, 60, 40, 3)
    assert_same(outputs(network, image), outputs(network, image.astype(np.float32)), tolerance=0)


def test_one_face_does_not_depend_on_the_others(mini):
    image = images(4, 48, 48, 1)
    alone = outputs(mini, image[2:3])
    assert_same(alone, {name: value[2:3] for name, value in outputs(mini, image).items()})


def test_dropout_is_for_training_alone(mini):
    image = images(1, 48, 48, 1)
    assert_same(outputs(mini, image), outputs(mini, image), tolerance=0)
    assert not np.array_equal(mini(image, training=True)["logits"], mini(image, training=True)["logits"])


def test_mini_xcp_is_small(mini):
    assert mini.count_params() <= 500_000
    assert mini.get_layer("backbone").output.shape == (None, 6, 6, 128)


def test_xcp_ends_where_the_paper_cuts_xception(xcp):
    backbone = xcp.get_layer("backbone")
    assert backbone.layers[-1].name == "block14_sepconv2_act" and backbone.output.shape[-1] == 2048


def test_head_options(num_classes=2, k=1, d=3):
    network = build_model("mini_xcp", num_classes, num_embeddings=k, embedding_size=d, input_size=16)
    found = outputs(network, images(2, 16, 16, 1))
    assert found["logits"].shape == (2, num_classes) and found["embeddings"].shape == (2, k, d)
    assert network.get_layer("embedding_dense").count_params() == 128 * k * d + k * d
    assert network.get_layer("logits").count_params() == k * d * num_classes + num_classes


def test_logits_are_the_classifier_of_the_concatenated_embeddings(mini):
    found = outputs(mini, images(2, 48, 48, 1))
    kernel, bias = (value.astype(np.float64) for value in mini.get_layer("logits").get_weights())
    expected = [sum(e[j] @ kernel[256 * j : 256 * (j + 1)] for j in range(7)) + bias for e in found["embeddings"]]
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", ["Xception", "keras:xception", "keras:applications"])
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
        ({"dropout": 1.0}, "dropout: expected 0 <= share < 1, received 1.0"),
        ({"scaling": "half"}, "scaling: expected one of tf, .*, received 'half'"),
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
    assert outputs(first, images(2, 30, 30, 1))["embeddings"].shape == (2, 7, 4)
    first.get_layer("backbone").save_weights(tmp_path / "backbone.weights.h5")
    second = build(str(tmp_path / "backbone.weights.h5"))
    weights = zip(first.get_layer("backbone").weights, second.get_layer("backbone").weights, strict=True)
    assert all(np.array_equal(left, right) for left, right in weights)
    assert not np.array_equal(first.get_layer("logits").kernel, second.get_layer("logits").kernel)


def test_the_arguments_can_be_read_off_the_configuration(xcp):
    assert cnn_model.arguments_of(xcp.get_config()) == {
        "arch": "xcp",
        "num_classes": 8,
        "num_embeddings": 3,
        "embedding_size": 16,
        "input_size": 71,
        "scaling": "tf",
        "logit_scale": 1.0,
        "temperature": 1.0,
        "exponent": 1.0,
    }
    with pytest.raises(KeyError):
        cnn_model.arguments_of({"name": "other", "layers": []})


# Precision


@pytest.fixture
def bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy("float32")


def test_half_precision_stays_inside(bfloat16):
    network = build_model("mini_xcp", embedding_size=8, input_size=24)
    found = network(images(4, 24, 24, 1))
    assert found["logits"].dtype == found["embeddings"].dtype == "float32"
    assert network.get_layer("backbone").output.dtype == "bfloat16"
    assert {variable.dtype for variable in network.trainable_variables} == {"float32"}
    np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_the_logit_scale_is_an_inverse_temperature(mini, scale):
    network = build_model("mini_xcp", logit_scale=scale)
    assert cnn_model.arguments_of(network.get_config())["logit_scale"] == scale
    network.set_weights(mini.get_weights())
    plain, scaled = outputs(mini, images(2, 48, 48, 1)), outputs(network, images(2, 48, 48, 1))
    bias = mini.get_layer("logits").get_weights()[1]
    np.testing.assert_allclose(scaled["logits"] - bias, scale * (plain["logits"] - bias), rtol=1e-4, atol=1e-5)
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


def test_scaling_is_that_of_the_applications_own_module():
    image = images(2, 6, 6, 3)
    for name, module in applications().items():
        plan = cnn_model.architecture(f"keras:{name}")
        ours = PixelInput(6, plan.channels, plan.scaling)(image)
        theirs = module.preprocess_input(image.astype(np.float32), data_format="channels_last")
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("arch", "name"), [("xcp", "Xception"), ("resnet", "ResNet50")])
def test_our_short_names_scale_as_their_networks(arch, name):
    plan = cnn_model.architecture(arch)
    assert (plan.scaling, plan.channels) == (cnn_model.architecture(f"keras:{name}").scaling, 3)


def resized(batch, size):
    """What `images.resize_image` makes of images, not rounded."""

    def one(image):
        image = image.astype(np.float32)
        small = cv2.resize(image, [min(side, size) for side in image.shape[1::-1]], interpolation=cv2.INTER_AREA)
        return cv2.resize(small, (size, size), interpolation=cv2.INTER_LINEAR).reshape(size, size, -1)

    return np.stack([one(image) for image in batch])


@pytest.mark.parametrize("shape", [(20, 33), (130, 64), (224, 224), (130, 20), (47, 48), (9, 47)])
def test_resizing_is_that_of_recognition(shape):
    image = images(2, *shape, 3)
    ours = ops.convert_to_numpy(PixelInput(47, 3, "raw")(image))
    np.testing.assert_allclose(ours, resized(image, 47), atol=0.01)
    np.testing.assert_allclose(ours[0], resize_image(image[0], 47), atol=1.01)  # it rounds twice


def test_scalings_at_black_and_white():
    black_and_white = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1).repeat(2, axis=1)
    for scaling, low, high in (("tf", -1, 1), ("unit", 0, 1), ("raw", 0, 255)):
        scaled = PixelInput(2, 1, scaling)(black_and_white)
        np.testing.assert_allclose(scaled[0, 0, :, 0], [low, high], atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_scaling_takes_light_and_contrast_out_of_each_image(channels):
    image = images(3, 8, 8, channels)
    image[1] = 200  # nothing to see
    scaled = PixelInput(8, channels, "image")(image)
    assert not np.any(scaled[1])
    for found, pixels in zip(scaled, image.astype(np.float64), strict=True):
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
    image = images(1, 4, 5, 3).astype(np.float32)
    assert np.array_equal(again(image), layer(image))


def test_the_network_compiles_with_xla(mini):
    """As the training step on a GPU does (`runtime.jit_compile`)."""
    image = images(2, 20, 20, 1)
    logits = tf.function(lambda pixels: mini(pixels, training=False)["logits"], jit_compile=True)(image)
    np.testing.assert_allclose(logits, outputs(mini, image)["logits"], rtol=1e-4, atol=1e-4)


def test_the_whole_network_can_be_written_down_and_made_again(mini):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(mini))
    again.set_weights(mini.get_weights())
    image = images(2, 30, 20, 3)
    assert_same(outputs(mini, image), outputs(again, image), tolerance=0)


@pytest.mark.parametrize("arch", ["mini_xcp", "xcp", "keras:MobileNetV3Small"])
def test_batch_statistics_are_young(arch):
    """Keras's 0.99 to 0.999 would measure a short run with the statistics of its first weights."""
    backbone = cnn_model.build_model(arch, input_size={"mini_xcp": 24, "xcp": 71}.get(arch, 32)).get_layer("backbone")
    momenta = [x.momentum for x in backbone._flatten_layers() if isinstance(x, keras.layers.BatchNormalization)]
    assert momenta and max(momenta) <= 0.95
