"""Are the maps Grad-CAM's, do the parts add up to the logit, and does the overlap measure what it says?"""

from __future__ import annotations

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import run_python
from keras import layers, ops

import explain
from cnn_model import UnitVectors, build_model
from files import UserError


def images(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def network_of(arch: str, seed=3, **options) -> keras.Model:
    """A small network whose biases are not 0."""
    keras.utils.set_random_seed(seed)
    network = build_model(arch, num_classes=5, num_embeddings=3, embedding_size=8, **options)
    for name in ("embedding_dense", "logits"):
        bias = network.get_layer(name).bias
        bias.assign(0.1 * np.random.default_rng(seed).normal(size=bias.shape))
    return network


@pytest.fixture(scope="module")
def mini():
    return network_of("mini_xcp", input_size=24, logit_scale=4.0)


def autodiff_maps(network, pixels, labels):
    """Grad-CAM by `tf.GradientTape` from the layers themselves: signed maps (N, k, h, w)."""
    features = keras.Model(network.input, network.get_layer("pool").input)(pixels, training=False)
    scale = next((layer.scale for layer in network.layers if layer.name == "logit_scale"), 1.0)
    kernel = network.get_layer("logits").kernel
    found = []
    for vector in range(network.output["embeddings"].shape[1]):
        with tf.GradientTape() as tape:
            tape.watch(features)
            x = features
            for name in ("pool", "embedding_dense", "embedding_split", "embeddings"):
                x = network.get_layer(name)(x)
            d = x.shape[-1]
            weights = tf.gather(tf.transpose(kernel), labels)[:, vector * d : (vector + 1) * d]
            part = scale * tf.reduce_sum(weights * x[:, vector], axis=-1)
        alpha = tf.reduce_mean(tape.gradient(part, features), axis=(1, 2))
        found.append(np.einsum("bf,bhwf->bhw", alpha, features))
    return np.stack(found, axis=1)


# Closed form


@pytest.mark.parametrize(
    ("arch", "size", "shape"),
    [
        ("mini_xcp", 24, (4, 30, 26, 1)),
        pytest.param("xcp", 71, (2, 71, 71, 3), marks=pytest.mark.slow),
        pytest.param("resnet", 64, (2, 48, 48, 1), marks=pytest.mark.slow),
        pytest.param("keras:MobileNetV2", 64, (2, 64, 64, 3), marks=pytest.mark.slow),
    ],
)
def test_maps_equal_autodiff_and_parts_add_up(arch, size, shape):
    network = network_of(arch, input_size=size, logit_scale=4.0)
    pixels, labels = images(*shape), np.arange(shape[0])
    found = explain.maps(network, pixels, labels)
    expected = autodiff_maps(network, pixels, labels)
    np.testing.assert_allclose(found.signed_maps, expected, atol=1e-4 * abs(expected).max())

    outputs = network(pixels, training=False)
    logits = ops.convert_to_numpy(outputs["logits"])
    bias = ops.convert_to_numpy(network.get_layer("logits").bias)[labels]
    np.testing.assert_allclose(found.parts.sum(axis=1) + bias, logits[np.arange(len(labels)), labels], atol=1e-5)
    np.testing.assert_allclose(found.logits, logits[np.arange(len(labels)), labels], atol=1e-5)
    np.testing.assert_allclose(found.probabilities, ops.convert_to_numpy(ops.softmax(logits)), atol=1e-5)


def test_a_vector_shorter_than_the_guard_has_the_guards_gradient(mini):
    network = keras.models.clone_model(mini)
    network.set_weights(mini.get_weights())
    dense = network.get_layer("embedding_dense")
    dense.bias.assign(dense.bias * 0)
    pixels, labels = images(2, 24, 24, 1), np.array([0, 3])
    pooled = keras.Model(network.input, dense.output)(pixels, training=False)
    longest = np.linalg.norm(ops.convert_to_numpy(pooled).reshape(2, 3, 8), axis=-1).max()
    dense.kernel.assign(dense.kernel * (0.9e-6 / longest))  # just below the guard of 1e-6, where both cases differ most
    expected = autodiff_maps(network, pixels, labels)
    found = explain.maps(network, pixels, labels).signed_maps
    assert abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, atol=1e-3 * abs(expected).max())


def test_no_label_given_explains_the_most_probable_one(mini):
    pixels = images(6, 24, 24, 1)
    found = explain.maps(mini, pixels)
    np.testing.assert_array_equal(found.labels, found.probabilities.argmax(axis=1))
    given = explain.maps(mini, pixels, found.labels)
    np.testing.assert_array_equal(found.signed_maps, given.signed_maps)


@pytest.mark.parametrize("labels", [None, np.array([0, 4, 2, 1, 3])])
def test_maps_do_not_depend_on_the_batch(mini, labels):
    pixels = images(5, 24, 24, 1)
    whole = explain.maps(mini, pixels, labels)
    for batch_size in (1, 2):
        parts = explain.maps(mini, pixels, labels, batch_size)
        np.testing.assert_allclose(parts.signed_maps, whole.signed_maps, atol=1e-6)
        np.testing.assert_array_equal(parts.labels, whole.labels)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_give_the_same_maps(backend, mini, tmp_path):
    pytest.importorskip(backend)
    pixels = images(3, 24, 24, 1)
    mini.save_weights(tmp_path / "w.weights.h5")
    np.save(tmp_path / "pixels.npy", pixels)
    done = run_python(
        "-c",
        f"""
import runtime; runtime.choose_backend({backend!r})
import numpy as np, cnn_model, explain
network = cnn_model.build_model("mini_xcp", 5, 3, 8, input_size=24, logit_scale=4.0)
network.load_weights("w.weights.h5")
np.save("maps.npy", explain.maps(network, np.load("pixels.npy"), batch_size=2).signed_maps)
""",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    expected = explain.maps(mini, pixels).signed_maps
    np.testing.assert_allclose(np.load(tmp_path / "maps.npy"), expected, atol=1e-4 * abs(expected).max())


def corner_network(bias=0.0) -> keras.Model:
    """Two vectors, two classes, on 4 x 4 cells of 8 pixels: vector 1 and class 1 rest on the cells' mean brightness
    alone, vector 2 on how dark they are."""
    pixels = x = keras.Input((32, 32, 1))
    x = layers.Rescaling(1 / 255)(x)
    x = layers.AveragePooling2D(8)(x)
    x = layers.Concatenate()([x, layers.Rescaling(-1, offset=1)(x)])  # F = 2: bright, dark
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    dense = layers.Dense(2 * 2, name="embedding_dense")
    x = layers.Reshape((2, 2))(dense(x))
    embeddings = UnitVectors(name="embeddings")(x)
    classifier = layers.Dense(2, name="logits")
    logits = classifier(layers.Flatten()(embeddings))
    # z_1 = (bright, 0.1), z_2 = (dark, 0.1): the bias keeps their directions from being constant.
    dense.set_weights([np.array([[1, 0, 0, 0], [0, 0, 1, 0]], np.float32), np.array([0, 0.1, 0, 0.1], np.float32)])
    classifier.set_weights([np.array([[0, 1], [0, 0], [0, 1], [0, 0]], np.float32), np.array([0, bias], np.float32)])
    return keras.Model(pixels, {"logits": logits, "embeddings": embeddings})


def test_where_one_corner_matters_the_map_is_there():
    face = np.zeros((32, 32), np.uint8)
    face[:8, 24:] = 255
    pixels = face[None, ..., None]
    found = explain.maps(corner_network(), pixels, np.array([1]))
    expected = np.zeros((4, 4))
    expected[0, 3] = 1
    np.testing.assert_array_equal(found.vector_maps[0, 0], expected)
    np.testing.assert_allclose(found.vector_maps[0, 1], 1 - expected)
    large = found.full_size(found.vector_maps)
    assert large.shape == (1, 2, 32, 32)
    assert large[0, 0, :4, 28:].min() == 1 and large[0, 0, 12:].max() == 0 and large[0, 0, :, :20].max() == 0
    # By hand: z_1 = (1/16, 0.1), and part_1 is the first coordinate of its direction.
    assert found.parts[0, 0] == pytest.approx((1 / 16) / np.hypot(1 / 16, 0.1))


def test_rotating_a_vectors_space_with_its_classifier_changes_the_correlation_and_not_the_maps(mini):
    network = keras.models.clone_model(mini)
    network.set_weights(mini.get_weights())
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(8, 8)))[0]
    for name, axis in (("embedding_dense", 1), ("logits", 0)):
        layer = network.get_layer(name)
        kernel, bias = layer.get_weights()
        of_vector = [slice(None), slice(None)]
        of_vector[axis] = slice(8, 16)
        block = kernel[tuple(of_vector)]
        kernel[tuple(of_vector)] = block @ rotation if axis else rotation.T @ block
        if axis:
            bias[8:16] = bias[8:16] @ rotation
        layer.set_weights([kernel, bias])
    pixels = images(3, 24, 24, 1)
    before, after = explain.maps(mini, pixels), explain.maps(network, pixels)
    np.testing.assert_allclose(after.signed_maps, before.signed_maps, atol=1e-5)
    turned, straight = (model(pixels, training=False)["embeddings"][:, 1] for model in (network, mini))
    assert np.abs(turned - straight).max() > 0.1


# Maps


def test_a_map_without_a_positive_value_is_zero():
    signed = np.array([[[-3.0, -1.0], [-2.0, 0.0]], [[-1.0, 4.0], [2.0, 0.0]]])
    found = explain.positive_part(signed)
    np.testing.assert_array_equal(found, [[[0, 0], [0, 0]], [[0, 1], [0.5, 0]]])
    assert found.dtype == np.float32


def test_full_size_is_the_faces_height_and_width():
    found = explain.Explanation(images(1, 6, 9, 1), *([None] * 5))
    resized = found.full_size(np.array([[[[1, 0], [1, 0]], [[1, 1], [0, 0]]]], np.float32))
    assert resized.shape == (1, 2, 6, 9)
    assert (resized[0, 0, :, 0] == 1).all() and (resized[0, 0, :, -1] == 0).all()
    assert (resized[0, 1, 0] == 1).all() and (resized[0, 1, -1] == 0).all()


def test_shares_add_up_to_1_and_are_blank_where_the_parts_do_not_support_the_label(mini):
    found = explain.maps(mini, images(4, 24, 24, 1))
    np.testing.assert_allclose(found.shares[found.parts.sum(axis=1) > 0].sum(axis=1), 1, atol=1e-5)
    against = explain.Explanation(*([None] * 4), parts=np.array([[-2.0, 1.0], [3.0, -1.0]]), signed_maps=None)
    np.testing.assert_allclose(against.shares, [[np.nan, np.nan], [1.5, -0.5]])


@pytest.mark.parametrize(
    ("pixels", "labels", "facts"),
    [
        (images(2, 24, 24, 1).astype(np.float32), None, ("uint8", "float32")),
        (images(24, 24, 1), None, ("(24, 24, 1)",)),
        (np.empty((0, 24, 24, 1), np.uint8), None, ("(0, 24, 24, 1)",)),
        (images(2, 24, 24, 1), np.array([0]), ("labels", "2")),
        (images(2, 24, 24, 1), np.array([0, 5]), ("labels", "0 to 4", "5")),
    ],
)
def test_refused(mini, pixels, labels, facts):
    with pytest.raises(UserError) as error:
        explain.maps(mini, pixels, labels)
    assert all(fact in str(error.value) for fact in facts)


def test_a_network_without_the_head_is_refused():
    x = keras.Input((8, 8, 1))
    with pytest.raises(UserError, match="embedding_dense"):
        explain.maps(keras.Model(x, layers.Flatten()(x)), images(1, 8, 8, 1))
    with pytest.raises(UserError, match="weights file"):
        explain.maps(object(), images(1, 8, 8, 1))  # what runs an exported file


# Overlap


def test_overlap_by_hand():
    one, other, both = [[1, 0], [0, 0]], [[0, 0], [0, 3]], [[2, 0], [0, 2]]
    empty = [[0, 0], [0, 0]]
    found = explain.overlap(np.array([[one, one, one], [one, other, both], [one, one, empty], [one, empty, empty]]))
    np.testing.assert_allclose(found, [1, (0 + 2 * np.sqrt(0.5)) / 3, 1, np.nan])


def test_overlap_with_others_pairs_every_map_with_the_others_other_maps():
    one, other = [[1, 0], [0, 0]], [[0, 0], [0, 1]]
    both = np.array([[one, other], [other, other]])
    # Image 1's maps 1, 2 against image 2's 2, 1, and image 2's against image 1's.
    np.testing.assert_allclose(explain.overlap(both, both[::-1]), [0.5, 0.5])
    with pytest.raises(ValueError, match="two"):
        explain.overlap(both[:, :1])


# Figures


@pytest.mark.slow
def test_figures_show_what_they_are_given(mini, tmp_path, monkeypatch):
    import plots

    drawn = []

    class Recorder(plots.FigureCanvasAgg):
        def print_png(self, *args, **kwargs):
            drawn.append(self.figure)
            super().print_png(*args, **kwargs)

    monkeypatch.setattr(plots, "FigureCanvasAgg", Recorder)
    names = ["Neutral", "Happy", "Sad", "Surprise", "Fear"]
    found = explain.maps(mini, images(6, 24, 24, 3), np.array([1, 1, 3, 1, 3, 3]))
    found.save_figure(tmp_path / "face.png", 2, names)
    found.save_mean_figure(tmp_path / "mean.png", names)
    face, mean = (_texts(figure) for figure in drawn)
    assert any("Surprise" in text and f"{found.probabilities[2, 3]:.0%}" in text for text in face)
    assert sum(text.startswith("Vector ") for text in face) == 3
    assert any(f"{found.logits[2]:.2f}" in text for text in face)
    assert {"Happy\nn = 3", "Surprise\nn = 3", "Label", "Vector 3"} <= set(mean)
    assert not any("Sad" in text for text in mean)
    assert cv2.imdecode(np.frombuffer(found.figure_png(0, names), np.uint8), cv2.IMREAD_COLOR).std() > 0


def _texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_overlaid_leaves_a_face_alone_where_the_map_is_0():
    face = images(4, 4, 1)
    map_hw = np.zeros((4, 4), np.float32)
    map_hw[0, 0] = 1
    shown = explain.overlaid(face, map_hw)
    np.testing.assert_array_equal(shown[1:], np.repeat(face[1:], 3, axis=-1))
    red, _, blue = shown[0, 0].astype(int)
    assert red - blue > 50
