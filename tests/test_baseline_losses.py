"""The losses beside Ad-Corre equal their papers' formulas, in value, gradient and centers."""

from __future__ import annotations

import math

import baseline_oracle as oracle
import keras
import numpy as np
import pytest
import tensorflow as tf
from test_custom_loss import value_and_gradient

import baseline_losses
from baseline_losses import CenterLoss, supervised_contrastive, triplet_semihard
from files import UserError

NUM_CLASSES = 5


def moved_centers(k, d):
    """Centers away from 0, float32 (C, k * d)."""
    return np.random.default_rng(99).normal(size=(NUM_CLASSES, k * d)).astype(np.float32)


def center_loss(embeddings, labels):
    """The layer's loss, with `moved_centers`."""
    _, k, d = embeddings.shape
    layer = CenterLoss(NUM_CLASSES, k, d)
    layer.set_weights([moved_centers(k, d)])
    return layer(labels, embeddings)


def center_oracle(embeddings, labels):
    _, k, d = np.shape(embeddings)
    centers = oracle.Centers(NUM_CLASSES, k * d, alpha=0.5)
    centers.centers = moved_centers(k, d).astype(np.float64).tolist()
    return centers.loss(embeddings, labels)


# Loss: (ours, oracle), both of embeddings (B, k, d) and labels (B,)
LOSSES = {
    "supervised_contrastive": (supervised_contrastive, oracle.supervised_contrastive),
    "supervised_contrastive_warm": (
        lambda e, y: supervised_contrastive(e, y, temperature=0.7),
        lambda e, y: oracle.supervised_contrastive(e, y, temperature=0.7),
    ),
    "triplet": (triplet_semihard, oracle.triplet_semihard),
    "triplet_wide": (
        lambda e, y: triplet_semihard(e, y, margin=1.5),
        lambda e, y: oracle.triplet_semihard(e, y, margin=1.5),
    ),
    "center": (center_loss, center_oracle),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)


def draw(size=9, k=3, d=7, seed=0, num_classes=NUM_CLASSES):
    """Random unit vectors (size, k, d) float64 and labels (size,) int64, two of them equal where size > 1."""
    rng = np.random.default_rng(seed)
    embeddings, labels = rng.normal(size=(size, k, d)), rng.integers(0, num_classes, size)
    labels[-1] = labels[0]
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True), labels


# Against the loops


@each_loss
def test_value_is_the_loop_oracle_in_float64(loss):
    ours, loops = LOSSES[loss]
    for size, k, d in ((9, 3, 7), (24, 2, 5), (6, 1, 3), (2, 4, 9)):
        embeddings, labels = draw(size, k, d, seed=size)
        value = ours(tf.constant(embeddings), labels)
        assert value.dtype == "float64" and value.shape == ()
        assert size == 2 or value > 0  # two faces of one class have no negative
        np.testing.assert_allclose(value, loops(embeddings, labels), rtol=1e-12, atol=1e-14)


@each_loss
def test_float32_keeps_five_digits(loss):
    ours, loops = LOSSES[loss]
    embeddings, labels = draw(20, 4, 64)
    embeddings = embeddings.astype(np.float32)
    value = ours(tf.constant(embeddings), labels)
    assert value.dtype == "float32"
    np.testing.assert_allclose(value, loops(embeddings, labels), rtol=1e-5)


@each_loss
def test_gradient_is_the_central_difference_of_the_oracle(loss):
    ours, loops = LOSSES[loss]
    embeddings, labels = draw(6, 2, 5, seed=3, num_classes=3)
    _, gradient = value_and_gradient(lambda e: ours(e, labels), embeddings)
    expected, step = np.zeros_like(embeddings), 1e-6
    for at in np.ndindex(embeddings.shape):
        shift = np.zeros_like(embeddings)
        shift[at] = step
        expected[at] = (loops(embeddings + shift, labels) - loops(embeddings - shift, labels)) / (2 * step)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)


@each_loss
def test_order_of_samples_does_not_matter(loss):
    ours, _ = LOSSES[loss]
    embeddings, labels = draw(11)
    order = np.random.default_rng(1).permutation(11)
    value, gradient = value_and_gradient(lambda e: ours(e, labels), embeddings)
    permuted_value, permuted_gradient = value_and_gradient(lambda e: ours(e, labels[order]), embeddings[order])
    np.testing.assert_allclose(permuted_value, value, rtol=1e-12)
    np.testing.assert_allclose(permuted_gradient, np.asarray(gradient)[order], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", ["supervised_contrastive", "triplet_wide"])
def test_names_of_classes_and_order_of_the_k_vectors_do_not_matter(loss):
    ours, _ = LOSSES[loss]
    embeddings, labels = draw(11)
    renamed = np.array([40, 7, 0, 3, 12])[labels]
    np.testing.assert_allclose(ours(embeddings[:, ::-1], renamed), ours(embeddings, labels), rtol=1e-12)


# Closed forms

X, Y = [1.0, 0.0], [0.0, 1.0]
MINUS_X = [-1.0, 0.0]


def test_a_face_is_its_vectors_concatenated_and_of_length_1():
    """k = 2: (X, Y) is (1, 0, 0, 1) / sqrt 2, (Y, Y) is (0, 1, 0, 1) / sqrt 2; their product is 1/2."""
    vectors = np.asarray(baseline_losses._face_vectors(np.array([[X, Y], [Y, Y]]), [0, 1]))
    half = math.sqrt(0.5)
    np.testing.assert_allclose(vectors, [[half, 0, 0, half], [0, half, 0, half]])
    np.testing.assert_allclose(vectors @ vectors.T, [[1, 0.5], [0.5, 1]])


def test_supervised_contrastive_by_hand():
    """Faces X, X, Y of class 0 and -X of class 1, t = 1.

    The first has products 1, 0, -1 with the others and positives of 1 and 0:
    ln(e + 1 + 1/e) - (1 + 0) / 2; the second is its twin. The third has products 0, 0, 0: ln 3 - 0. The fourth is
    alone and leaves the mean, which is over three. (The mean inside the logarithm, `L_in`, would be less.)
    With t = 1/2 the products double: ln(e^2 + 1 + e^-2) - 1.
    """
    embeddings, labels = np.array([[X], [X], [Y], [MINUS_X]]), np.array([0, 0, 0, 1])
    expected = (2 * (math.log(math.e + 1 + 1 / math.e) - 0.5) + math.log(3)) / 3
    np.testing.assert_allclose(supervised_contrastive(embeddings, labels, temperature=1.0), expected)
    expected = (2 * (math.log(math.exp(2) + 1 + math.exp(-2)) - 1) + math.log(3)) / 3
    np.testing.assert_allclose(supervised_contrastive(embeddings, labels, temperature=0.5), expected)


def test_supervised_contrastive_of_two_vectors_a_face_by_hand():
    """Faces (X, X), (X, Y) of class 0 and (Y, Y) of class 1: products 1/2, 0 and 1/2, t = 1/2, so 1, 0 and 1.

    The first: ln(e + 1) - 1. The second: ln(e + e) - 1 = ln 2. The third is alone.
    """
    embeddings, labels = np.array([[X, X], [X, Y], [Y, Y]]), np.array([0, 0, 1])
    expected = (math.log(math.e + 1) - 1 + math.log(2)) / 2
    np.testing.assert_allclose(supervised_contrastive(embeddings, labels, temperature=0.5), expected)


def test_triplet_semihard_by_hand():
    """Class 0 has a = X and p at 60 degrees, class 1 has m = Y and n = -X; margin 1.5. D = 2 - 2 cos(angle).

    D_ap = 1, D_am = 2, D_an = 4, D_pm = 2 - sqrt 3 = 0.27, D_pn = 3, D_mn = 2.
    (a, p): 2 and 4 are farther than 1, the nearer is 2: 1 - 2 + 1.5 = 0.5.
    (p, a): only 3 is farther than 1: max(0, 1 - 3 + 1.5) = 0.
    (m, n): neither 2 (to a, a tie) nor 0.27 is farther than 2; the farthest is 2: 2 - 2 + 1.5 = 1.5.
    (n, m): 4 and 3 are farther than 2, the nearer is 3: 2 - 3 + 1.5 = 0.5.
    The mean is 2.5 / 4; with margin 0.2 only (m, n) is left, 0.2 / 4.
    """
    embeddings = np.array([[X], [[0.5, math.sqrt(0.75)]], [Y], [MINUS_X]])
    labels = np.array([0, 0, 1, 1])
    np.testing.assert_allclose(triplet_semihard(embeddings, labels, margin=1.5), 2.5 / 4)
    np.testing.assert_allclose(triplet_semihard(embeddings, labels), 0.2 / 4)


@pytest.mark.parametrize(("rounding", "dtype"), [(0.0, "float32"), (1e-6, "float64")])
def test_a_positive_and_a_negative_that_are_one_image(rounding, dtype):
    """FER-2013 has duplicate images with different labels; a tie must not be broken by rounding. Margin 3.

    Class 0 has a and p, class 1 has q = p and f = -a. With a.p = 1/3: D_ap = D_aq = 4/3, D_pq = 0, D_af = 4 and
    D_pf = D_qf = 2 + 2/3 = 8/3.
    (a, p): q is as far as p and so not farther, f is: 4/3 - 4 + 3 = 1/3.
    (p, a): q at 0 is not farther, f at 8/3 is: 4/3 - 8/3 + 3 = 5/3.
    (q, f): neither p at 0 nor a at 4/3 is farther than 8/3, a is the farthest: 8/3 - 4/3 + 3 = 13/3.
    (f, q): p is as far as q, a at 4 is farther: 8/3 - 4 + 3 = 5/3.
    The mean is 8 / 4. What stands for a rounding turns q away from a and towards f by a millionth: without `TIE`,
    q would be farther from a than p, and p farther from f than q.
    """
    rng = np.random.default_rng(5)
    a, b = np.linalg.qr(rng.normal(size=(48, 2)))[0].T
    p, q = (a * math.cos(angle) + b * math.sin(angle) for angle in (math.acos(1 / 3), math.acos(1 / 3) + rounding))
    embeddings, labels = np.stack([a, p, q, -a])[:, None].astype(dtype), np.array([0, 0, 1, 1])
    np.testing.assert_allclose(triplet_semihard(embeddings, labels, margin=3.0), 8 / 4, rtol=1e-5)


def test_centers_of_two_steps_by_hand():
    """C = 3, k = 1, d = 2, alpha = 1/2, centers 0.

    Step 1, X and Y, both of class 0: loss (1 + 1) / 2 / 2 = 1/2; c_0 = 0 + 1/2 * ((1, 0) + (0, 1)) / (1 + 2) =
    (1/6, 1/6). Step 2, X of class 0 and Y of class 1: |x - c|^2 = (5/6)^2 + (1/6)^2 = 26/36 and 1, loss
    (26/36 + 1) / 2 / 2 = 31/72; c_0 = (1/6, 1/6) + 1/2 * (5/6, -1/6) / 2 = (3/8, 1/8), c_1 = 1/2 * (0, 1) / 2 =
    (0, 1/4). Class 2 is never seen.
    """
    layer, embeddings = CenterLoss(3, 1, 2, alpha=0.5), np.array([[X], [Y]])
    np.testing.assert_array_equal(layer.centers, np.zeros((3, 2)))
    np.testing.assert_allclose(layer(np.array([0, 0]), embeddings, training=True), 1 / 2)
    np.testing.assert_allclose(layer.centers, [[1 / 6, 1 / 6], [0, 0], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(layer(np.array([0, 1]), embeddings, training=True), 31 / 72, rtol=1e-6)
    np.testing.assert_allclose(layer.centers, [[3 / 8, 1 / 8], [0, 1 / 4], [0, 0]], rtol=1e-6)


# Degenerate batches

RANDOM, _ = draw(6, 3, 7, seed=4)
MIXED = np.array([0, 1, 2, 0, 1, 4])
DEGENERATE = {
    "one_sample": (RANDOM[:1], MIXED[:1]),
    "two_of_one_class": (RANDOM[:2], np.array([3, 3])),
    "one_class": (RANDOM, np.full(6, 2)),
    "all_classes_different": (RANDOM[:5], np.arange(5)),
    "duplicates": (np.repeat(RANDOM[:1], 6, axis=0), MIXED),
    "pairs_of_duplicates": (np.repeat(RANDOM[:3], 2, axis=0), MIXED),
    "opposites": (np.concatenate([RANDOM[:3], -RANDOM[:3]]), MIXED),
    "zeros": (np.zeros((6, 3, 7)), MIXED),
    "one_zero_face": (RANDOM * (np.arange(6).reshape(6, 1, 1) != 3), MIXED),
    "one_zero_vector": (RANDOM * (np.arange(18).reshape(6, 3, 1) != 4), MIXED),
    "k_1": (RANDOM[:, :1], MIXED),
}
NO_PAIR = {"one_sample", "all_classes_different"}
NO_TRIPLET = NO_PAIR | {"two_of_one_class", "one_class"}


@each_loss
def test_degenerate_batches(loss):
    ours, loops = LOSSES[loss]
    nothing = NO_PAIR if loss.startswith("supervised") else NO_TRIPLET if loss.startswith("triplet") else ()
    for name, (embeddings, labels) in DEGENERATE.items():
        for dtype in ("float32", "float64"):
            value, gradient = value_and_gradient(lambda e, y=labels: ours(e, y), embeddings.astype(dtype))
            expected = loops(embeddings.astype(dtype), labels)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=f"{name}, {dtype}")
            assert np.isfinite(gradient).all(), f"{name}, {dtype}"
            assert name not in nothing or (value == 0 and not np.any(gradient)), f"{name}, {dtype}"


@pytest.mark.parametrize("name", ["duplicates", "zeros"])
def test_equal_faces_by_hand(name):
    """Every product is the same, so each of the B - 1 = 5 others is as likely: ln 5. Every D is 0: the margin."""
    embeddings, labels = DEGENERATE[name][0].astype("float32"), DEGENERATE[name][1]
    np.testing.assert_allclose(supervised_contrastive(embeddings, labels), math.log(5), rtol=1e-5)
    np.testing.assert_allclose(triplet_semihard(embeddings, labels), 0.2, rtol=1e-5)


# Compiled, and in lower precision


@pytest.mark.parametrize("loss", ["supervised_contrastive", "triplet_wide", "center"])
def test_xla_equals_eager(loss):
    ours, _ = LOSSES[loss]
    embeddings, labels = draw(10, 3, 16)
    if loss == "center":  # a variable may not be made inside a graph
        layer = CenterLoss(NUM_CLASSES, 3, 16)
        layer.set_weights([moved_centers(3, 16)])
        ours = lambda e, y: layer(y, e)  # noqa: E731 - stands for the function of the table
    eager = value_and_gradient(lambda e: ours(e, labels), embeddings)
    compiled = tf.function(lambda e: value_and_gradient(lambda x: ours(x, labels), e), jit_compile=True)(embeddings)
    assert eager[0] > 0
    np.testing.assert_allclose(compiled[0], eager[0], rtol=1e-12)
    np.testing.assert_allclose(compiled[1], eager[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", ["supervised_contrastive", "triplet"])
def test_one_graph_takes_every_batch_size(loss):
    ours, _ = LOSSES[loss]
    signature = [tf.TensorSpec((None, 3, 7), tf.float64), tf.TensorSpec((None,), tf.int64)]
    graph = tf.function(lambda e, y: value_and_gradient(lambda x: ours(x, y), e), input_signature=signature)
    for size in (1, 2, 9):
        embeddings, labels = draw(size)
        value, gradient = value_and_gradient(lambda e, y=labels: ours(e, y), embeddings)
        from_graph = graph(embeddings, labels)
        np.testing.assert_allclose(from_graph[0], value, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(from_graph[1], gradient, rtol=1e-10, atol=1e-14)


@each_loss
def test_half_precision_is_computed_in_float32(loss, dtype="bfloat16"):
    ours, _ = LOSSES[loss]
    embeddings, labels = draw(8, 3, 32)
    rounded = tf.cast(embeddings, dtype)
    value, gradient = value_and_gradient(lambda e: ours(e, labels), rounded)
    expected, expected_gradient = value_and_gradient(lambda e: ours(e, labels), tf.cast(rounded, "float32"))
    assert value.dtype == "float32" and gradient.dtype == dtype and value > 0
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient, tf.cast(expected_gradient, dtype))


@each_loss
def test_labels_of_any_integer_type(loss):
    ours, _ = LOSSES[loss]
    embeddings, labels = draw()
    for dtype in ("int32", "uint8"):
        np.testing.assert_array_equal(ours(embeddings, tf.cast(labels, dtype)), ours(embeddings, labels))


# The layer


@pytest.mark.parametrize(("mode", "alpha"), [("eager", 1.0), ("graph", 0.5), ("xla", 0.5)])
def test_centers_follow_a_scripted_training(mode, alpha):
    """Eight batches of changing size; class 4 is seen in the first only and then keeps its center."""
    layer, expected = CenterLoss(NUM_CLASSES, 3, 7, alpha=alpha), oracle.Centers(NUM_CLASSES, 21, alpha)
    step = lambda y, e: layer(y, e, training=True)  # noqa: E731 - tf.function wraps it
    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "xla", reduce_retracing=True)
    for number, size in enumerate([8, 1, 3, 8, 3, 20, 1, 20]):
        embeddings, labels = draw(size, seed=number, num_classes=4)
        labels[0] = 4 if number == 0 else labels[0]
        value = step(labels, embeddings.astype(np.float32))
        np.testing.assert_allclose(value, expected.loss(embeddings, labels), rtol=1e-5, err_msg=f"step {number}")
        expected.move(embeddings, labels)
        np.testing.assert_allclose(layer.centers, expected.centers, atol=1e-6, err_msg=f"step {number}")
        if number == 0:
            last_seen = np.array(layer.centers)[4]
    assert np.any(last_seen)
    np.testing.assert_array_equal(np.array(layer.centers)[4], last_seen)


def test_evaluation_leaves_the_centers_alone():
    embeddings, labels = draw()
    layer = CenterLoss(NUM_CLASSES, 3, 7)
    layer(labels, embeddings, training=True)
    centers = np.array(layer.centers)
    assert layer(labels, embeddings, training=False) < 0.5  # nearer than to the zeros before
    np.testing.assert_array_equal(layer.centers, centers)


def test_no_gradient_flows_through_the_move_or_into_the_centers():
    """With or without training it is (x_i - c_{y_i}) / (B sqrt k): of half a squared length, through the scale."""
    embeddings, labels = draw()
    layer = CenterLoss(NUM_CLASSES, 3, 7)
    centers = moved_centers(3, 7)
    expected = (np.array(oracle.face_vectors(embeddings)) - centers[labels]) / 9 / math.sqrt(3)
    for training in (False, True):
        layer.set_weights([centers])
        with tf.GradientTape() as tape:
            x = tf.constant(embeddings)
            tape.watch([x, layer.centers.value])
            value = layer(labels, x, training=training)
        gradient, of_centers = tape.gradient(value, [x, layer.centers.value])
        np.testing.assert_allclose(gradient, expected.reshape(9, 3, 7), rtol=1e-6, atol=1e-9)
        assert of_centers is None
    assert not np.array_equal(layer.centers, centers)
    assert layer.trainable_weights == [] and len(layer.non_trainable_weights) == 1


class Holder(keras.Model):
    """A model with the layer inside, as a trainer has it."""

    def __init__(self):
        super().__init__()
        self.center_loss = CenterLoss(NUM_CLASSES, 3, 7)

    def build(self, input_shape):
        self.built = True

    def call(self, embeddings):
        return embeddings


def test_centers_are_saved_with_a_model_and_resumed(tmp_path):
    trained, resumed = Holder(), Holder()
    for seed in range(3):
        embeddings, labels = draw(seed=seed)
        trained.center_loss(labels, embeddings, training=True)
    for model in (trained, resumed):
        model(embeddings)
    trained.save_weights(tmp_path / "holder.weights.h5")
    assert not np.any(resumed.center_loss.centers)
    resumed.load_weights(tmp_path / "holder.weights.h5")
    np.testing.assert_array_equal(resumed.center_loss.centers, trained.center_loss.centers)
    embeddings, labels = draw(seed=3)
    values = [model.center_loss(labels, embeddings, training=True) for model in (trained, resumed)]
    np.testing.assert_array_equal(*values)
    np.testing.assert_array_equal(resumed.center_loss.centers, trained.center_loss.centers)


def test_layer_computes_in_float32_under_a_mixed_policy(policy="mixed_bfloat16"):
    embeddings, labels = draw()
    embeddings = embeddings.astype(np.float32)
    expected = CenterLoss(NUM_CLASSES, 3, 7)
    expected_values = [expected(labels, embeddings, training=True) for _ in range(2)]
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        layer = CenterLoss(NUM_CLASSES, 3, 7)
        values = [layer(labels, embeddings, training=True) for _ in range(2)]
    finally:
        keras.config.set_dtype_policy(before)
    assert layer.centers.dtype == "float32" and values[1].dtype == "float32"
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(layer.centers, expected.centers)


def test_config_round_trip():
    layer = CenterLoss(6, 3, 7, alpha=0.25, name="centers_of_six")
    config = layer.get_config()
    assert config == {
        "name": "centers_of_six",
        "num_classes": 6,
        "num_embeddings": 3,
        "embedding_size": 7,
        "alpha": 0.25,
    }
    twin = CenterLoss.from_config(config)
    assert twin.get_config() == config
    embeddings, labels = draw(num_classes=6)
    for one in (layer, twin):
        one(labels, embeddings, training=True)
    assert np.any(layer.centers)
    np.testing.assert_array_equal(twin.centers, layer.centers)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (supervised_contrastive, {"temperature": 0.0}),
        (triplet_semihard, {"margin": -0.125}),
    ],
)
def test_bad_arguments_say_what_was_expected_and_received(function, options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=rf"{name}.*expected.*received {value}"):
        function(*draw(), **options)


@pytest.mark.parametrize(
    "options",
    [{"num_classes": 0}, {"alpha": 1.125}],
    ids=str,
)
def test_bad_sizes_and_rates_say_what_was_expected_and_received(options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=rf"{name}.*expected.*received {value}"):
        CenterLoss(**{"num_classes": NUM_CLASSES, "num_embeddings": 3, "embedding_size": 7, **options})
