"""The loss terms equal their formulas, in value and gradient; the layer weighs them and keeps its history."""

from __future__ import annotations

import math
from pathlib import Path

import keras
import loss_oracle as oracle
import numpy as np
import pytest
import tensorflow as tf

import baseline_losses
import custom_loss
import trainer
from custom_loss import (
    AdCorreLoss,
    cross_entropy,
    embedding_discriminator,
    feature_discriminator,
    mean_discriminator,
    pearson_correlation,
)

GOLDEN = Path(__file__).parent / "data" / "published_loss_values.npz"
CASES = ("all_classes_k7", "all_classes_k10", "eight_classes", "missing_classes", "unnormalised")
NUM_CLASSES = 5
RECALL = np.array([0.9, 0.0, 0.25, 1.0, 0.6])

# Term: (ours, oracle), both of embeddings (B, k, d >= 5) and labels (B,); cross-entropy reads its logits out of them.
TERMS = {
    "fd": (feature_discriminator, oracle.feature_discriminator),
    "fd_adaptive": (
        lambda e, y: feature_discriminator(e, y, RECALL),
        lambda e, y: oracle.feature_discriminator(e, y, RECALL, floor=1.0),
    ),
    "fd_floor_0": (
        lambda e, y: feature_discriminator(e, y, RECALL, weight_floor=0.0),
        lambda e, y: oracle.feature_discriminator(e, y, RECALL, floor=0.0),
    ),
    "md": (lambda e, y: mean_discriminator(e, y, NUM_CLASSES), oracle.mean_discriminator),
    "ed": (lambda e, y: embedding_discriminator(e), lambda e, y: oracle.embedding_discriminator(e)),
    "ce": (
        lambda e, y: cross_entropy(y, e[:, 0, :NUM_CLASSES]),
        lambda e, y: oracle.cross_entropy(y, np.asarray(e)[:, 0, :NUM_CLASSES]),
    ),
    "ce_smooth": (
        lambda e, y: cross_entropy(y, e[:, 0, :NUM_CLASSES], label_smoothing=0.3),
        lambda e, y: oracle.cross_entropy(y, np.asarray(e)[:, 0, :NUM_CLASSES], smoothing=0.3),
    ),
}
each_term = pytest.mark.parametrize("term", TERMS)


def draw(size=6, k=3, d=7, seed=0, num_classes=NUM_CLASSES):
    """Random embeddings (size, k, d) float64 and labels (size,) int64."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, k, d)), rng.integers(0, num_classes, size)


def value_and_gradient(function, x):
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return value, tape.gradient(value, x)


# Terms against the loops


@each_term
def test_value_is_the_loop_oracle_in_float64(term):
    ours, loops = TERMS[term]
    for size, k, d in ((6, 3, 7), (12, 2, 5), (2, 4, 9)):
        embeddings, labels = draw(size, k, d, seed=size)
        value = ours(tf.constant(embeddings), labels)
        assert value.dtype == "float64" and value.shape == ()
        np.testing.assert_allclose(value, loops(embeddings, labels), rtol=1e-12)


@each_term
def test_float32_keeps_five_digits(term):
    """An offset of ten standard deviations would show a variance computed as E[x^2] - E[x]^2."""
    ours, loops = TERMS[term]
    embeddings, labels = draw(16, 4, 64)
    embeddings = (embeddings + 10).astype(np.float32)
    value = ours(tf.constant(embeddings), labels)
    assert value.dtype == "float32"
    np.testing.assert_allclose(value, loops(embeddings, labels), rtol=1e-5)


@each_term
def test_gradient_is_the_central_difference_of_the_oracle(term):
    ours, loops = TERMS[term]
    embeddings, labels = draw(5, 2, 5, seed=3)
    _, gradient = value_and_gradient(lambda e: ours(e, labels), embeddings)
    expected, step = np.zeros_like(embeddings), 1e-6
    for at in np.ndindex(embeddings.shape):
        shift = np.zeros_like(embeddings)
        shift[at] = step
        expected[at] = (loops(embeddings + shift, labels) - loops(embeddings - shift, labels)) / (2 * step)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("term", ["fd", "fd_adaptive", "md", "ed"])
def test_correlations_do_not_depend_on_scale_or_shift(term):
    ours, loops = TERMS[term]
    embeddings, labels = draw(6, 3, 8)
    for scale in (1e-3, 1e3):
        np.testing.assert_allclose(ours(scale * embeddings + scale, labels), loops(embeddings, labels), rtol=1e-8)


@each_term
def test_order_of_samples_does_not_matter(term):
    ours, _ = TERMS[term]
    embeddings, labels = draw(9, 3, 7)
    order = np.random.default_rng(1).permutation(9)
    value, gradient = value_and_gradient(lambda e: ours(e, labels), embeddings)
    permuted_value, permuted_gradient = value_and_gradient(lambda e: ours(e, labels[order]), embeddings[order])
    np.testing.assert_allclose(permuted_value, value, rtol=1e-12)
    np.testing.assert_allclose(permuted_gradient, np.asarray(gradient)[order], rtol=1e-9, atol=1e-14)


def test_no_gradient_flows_into_class_recall():
    embeddings, labels = draw()
    value, gradient = value_and_gradient(lambda recall: feature_discriminator(embeddings, labels, recall), RECALL)
    assert gradient is None
    assert value != feature_discriminator(embeddings, labels, np.ones(NUM_CLASSES))  # it does depend on it


# Closed forms: a, b, c are centred, rho(a, b) = rho(b, c) = 0 and rho(a, c) = -1

A, B, C = [1.0, 0.0, -1.0], [1.0, -2.0, 1.0], [-1.0, 0.0, 1.0]


def test_pearson_by_hand():
    """w = (2, -1, -1), given as w + 5: |a|^2 = 2 and |b|^2 = |w|^2 = 6.

    a.w = 2 + 1 = 3 gives rho = 3 / sqrt(2 * 6) = sqrt(3) / 2; b.w = 2 + 2 - 1 = 3 gives 3 / sqrt(6 * 6) = 1 / 2.
    """
    x = np.array([A, B, C, [7.0, 4.0, 4.0]])
    aw = math.sqrt(3) / 2
    expected = [[1, 0, -1, aw], [0, 1, 0, 0.5], [-1, 0, 1, -aw], [aw, 0.5, -aw, 1]]
    np.testing.assert_allclose(pearson_correlation(x), expected, atol=1e-14)
    np.testing.assert_allclose(
        pearson_correlation(np.stack([x, x[::-1]]))[1], np.array(expected)[::-1, ::-1], atol=1e-14
    )


def test_feature_discriminator_by_hand():
    """Labels 0, 0, 1 for a, b, c: |1 - 0| + |-1 - (-1)| + |-1 - 0| = 1 + 0 + 1, twice (i, j and j, i), over 1 * 3^2.

    With recall (0.75, 0.5) the pair a, b weighs floor + 0.25 + 0.25 and b, c weighs floor + 0.25 + 0.5:
    2 * (1.5 + 1.75) / 9 = 6.5 / 9 with floor 1 and 2 * (0.5 + 0.75) / 9 = 2.5 / 9 with floor 0.
    """
    embeddings, labels, recall = np.array([[A], [B], [C]]), np.array([0, 0, 1]), np.array([0.75, 0.5])
    np.testing.assert_allclose(feature_discriminator(embeddings, labels), 4 / 9)
    np.testing.assert_allclose(feature_discriminator(embeddings, labels, recall), 6.5 / 9)
    np.testing.assert_allclose(feature_discriminator(embeddings, labels, recall, weight_floor=0.0), 2.5 / 9)


def test_mean_discriminator_by_hand():
    """Class 0 has (3, 0, -1) and (-1, 0, -1), mean a; class 2 has b; class 4 has c; 1 and 3 are absent, so P = 3.

    (1 + 0) + (1 - 1) + (1 + 0) = 2, twice, over 1 * 3^2.
    """
    embeddings = np.array([[[3.0, 0.0, -1.0]], [B], [[-1.0, 0.0, -1.0]], [C]])
    np.testing.assert_allclose(mean_discriminator(embeddings, np.array([0, 2, 0, 4]), num_classes=5), 4 / 9)


def test_embedding_discriminator_by_hand():
    """Sample 1 is a, b, c: 2 * (1 + 0 + 1) = 4. Sample 2 is a, a, a: 6 pairs of 1 + 1, 12. Over 2 * 3^2: 16 / 18."""
    np.testing.assert_allclose(embedding_discriminator(np.array([[A, B, C], [A, A, A]])), 16 / 18)


def test_cross_entropy_by_hand():
    """p = (3/4, 1/4), then (1/2, 1/2); labels 0 and 1: (ln(4/3) + ln 2) / 2.

    Smoothed by 0.2 over 2 classes the targets are 0.9 and 0.1: (0.9 ln(4/3) + 0.1 ln 4 + ln 2) / 2.
    """
    logits, labels = np.array([[math.log(3), 0.0], [1.0, 1.0]]), np.array([0, 1])
    np.testing.assert_allclose(cross_entropy(labels, logits), (math.log(4 / 3) + math.log(2)) / 2)
    smooth = (0.9 * math.log(4 / 3) + 0.1 * math.log(4) + math.log(2)) / 2
    np.testing.assert_allclose(cross_entropy(labels, logits, label_smoothing=0.2), smooth)


def test_cross_entropy_of_a_wildly_wrong_logit_is_the_logit():
    """-log softmax of (1e4, 0) at class 1 is 1e4 + ln(1 + e^-1e4) = 1e4, where exp would overflow."""
    value, gradient = value_and_gradient(lambda z: cross_entropy(np.array([1]), z), np.array([[1e4, 0.0]], np.float32))
    np.testing.assert_allclose(value, 1e4)
    np.testing.assert_allclose(gradient, [[1.0, -1.0]])


# FD without pairs, in batches that are too large for loops


def pairwise_feature_discriminator(embeddings, labels, recall=None, floor=1.0):
    """The formula in float64 with every pair's absolute value in memory."""
    e = tf.cast(embeddings, "float64")
    e = e - tf.reduce_mean(e, axis=-1, keepdims=True)
    e = e / tf.norm(e, axis=-1, keepdims=True)
    corr = tf.einsum("ild,jld->lij", e, e)
    weight = np.ones((len(labels), len(labels)))
    if recall is not None:
        weight = floor + (1 - recall[labels])[:, None] + (1 - recall[labels])[None, :]
    omega = np.where(labels[:, None] == labels[None, :], 1.0, -1.0)
    np.fill_diagonal(weight, 0.0)
    return tf.reduce_mean(weight * tf.abs(omega - corr))


def large_batch(kind, size=130, k=3, d=32):
    """Labels (size,), and embeddings (size, k, d) float32 of length 1, at random or around one point or one a class."""
    noise, labels = draw(size, k, d, num_classes=1 if kind == "one_class" else NUM_CLASSES)
    centers, _ = draw(NUM_CLASSES, k, d, seed=1)
    embeddings = {
        "random": noise,
        "collapsed": centers[0] + 1e-3 * noise,
        "one_class": centers[0] + 1e-3 * noise,
        "trained": (centers - centers.mean(axis=0))[labels] + 0.1 * noise,
    }[kind]
    return (embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("recall", [None, RECALL], ids=["plain", "adaptive"])
@pytest.mark.parametrize("kind", ["random", "collapsed", "one_class", "trained"])
def test_feature_discriminator_is_the_sum_of_its_pairs(kind, recall):
    """In float32. The gradient's yardstick is the largest that a vector can have, 2 max W / (k B |e'|)."""
    embeddings, labels = large_batch(kind)
    value, gradient = value_and_gradient(lambda e: feature_discriminator(e, labels, recall), embeddings)
    expected, expected_gradient = value_and_gradient(
        lambda e: pairwise_feature_discriminator(e, labels, recall), embeddings
    )
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6)
    size, k, _ = embeddings.shape
    largest = 2 * (1 if recall is None else 3) / (k * size * embeddings.std(axis=-1).min() * math.sqrt(32))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-6 * largest)


def test_num_classes_changes_nothing_but_the_way():
    embeddings, labels = draw(12)
    expected = value_and_gradient(lambda e: feature_discriminator(e, labels), embeddings)
    known = value_and_gradient(lambda e: feature_discriminator(e, labels, num_classes=NUM_CLASSES), embeddings)
    np.testing.assert_allclose(known[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(known[1], expected[1], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("recall", [None, RECALL], ids=["plain", "adaptive"])
def test_nothing_in_the_step_is_larger_than_the_embeddings(recall):
    size, k, d = 2048, 2, 8
    step = tf.function(lambda e, y: value_and_gradient(lambda x: feature_discriminator(x, y, recall), e))
    graph = step.get_concrete_function(tf.TensorSpec((size, k, d)), tf.TensorSpec((size,), tf.int32)).graph
    shapes = [tensor.shape for operation in graph.get_operations() for tensor in operation.outputs]
    assert all(shape.rank is not None for shape in shapes)
    assert max(math.prod(side or size for side in shape) for shape in shapes) == size * k * d


# The published values


def published(case):
    with np.load(GOLDEN, allow_pickle=False) as file:
        embeddings, labels = file[f"{case}/embeddings"].transpose(1, 0, 2), file[f"{case}/labels"]
        return embeddings, labels, file[f"{case}/probabilities"], file[f"{case}/expected"]


@pytest.mark.parametrize("case", CASES)
def test_published_values(case):
    embeddings, labels, probabilities, (fd, md, ed, ce) = published(case)
    num_classes = probabilities.shape[1]
    np.testing.assert_allclose(feature_discriminator(embeddings, labels), fd, atol=1e-5)
    np.testing.assert_allclose(embedding_discriminator(embeddings), ed, atol=1e-5)
    np.testing.assert_allclose(cross_entropy(labels, np.log(probabilities)) / num_classes, ce, atol=1e-5)
    if case != "missing_classes":
        np.testing.assert_allclose(mean_discriminator(embeddings, labels, num_classes), md, atol=1e-5)


def test_absent_classes_are_left_out_where_the_published_code_counts_the_batch_mean():
    embeddings, labels, probabilities, (_, md, _, _) = published("missing_classes")
    num_classes = probabilities.shape[1]
    ours = float(mean_discriminator(embeddings, labels, num_classes))
    np.testing.assert_allclose(ours, oracle.mean_discriminator(embeddings, labels), atol=1e-6)
    np.testing.assert_allclose(oracle.published_mean_discriminator(embeddings, labels, num_classes), md, atol=1e-5)
    assert abs(ours - md) > 0.1


# Degenerate batches

RANDOM, _ = draw(6, 3, 7, seed=4)
MIXED = np.array([0, 1, 2, 0, 1, 4])
DEGENERATE = {
    "one_sample": (RANDOM[:1], MIXED[:1]),
    "one_class": (RANDOM, np.full(6, 2)),
    "duplicates": (np.repeat(RANDOM[:1], 6, axis=0), MIXED),
    "equal_vectors": (np.repeat(RANDOM[:, :1], 3, axis=1), MIXED),
    "zeros": (np.zeros((6, 3, 7)), MIXED),
    "constants": (np.full((6, 3, 7), 0.1) * np.arange(1, 7)[:, None, None], MIXED),
    "one_zero_vector": (RANDOM * (np.arange(18).reshape(6, 3, 1) != 4), MIXED),
    "classes_cancel": (np.concatenate([RANDOM[:3], -RANDOM[:3]]), np.array([0, 1, 1, 0, 1, 1])),
    "absent_classes": (RANDOM, np.array([0, 0, 4, 4, 4, 0])),
    "k_1": (RANDOM[:, :1], MIXED),
}


@each_term
def test_degenerate_batches(term):
    ours, loops = TERMS[term]
    for name, (embeddings, labels) in DEGENERATE.items():
        expected = loops(embeddings, labels)
        for dtype in ("float32", "float64"):
            value, gradient = value_and_gradient(lambda e, y=labels: ours(e, y), embeddings.astype(dtype))
            np.testing.assert_allclose(value, expected, atol=1e-5, err_msg=f"{name}, {dtype}")
            assert np.isfinite(gradient).all(), f"{name}, {dtype}"


@pytest.mark.parametrize("xla", [False, True], ids=["eager", "xla"])
@pytest.mark.parametrize("d", [1, 250])
def test_a_constant_vector_correlates_with_nothing(d, xla):
    """Its mean is off by a rounding; that residue must not be scaled up to a unit vector."""
    x = np.stack([np.full(d, c) for c in (0.1, 0.2, 1 / 3, 0.0625, -7.3, 123.4)] + [np.arange(d)]).astype(np.float32)
    expected = np.zeros((7, 7))
    expected[6, 6] = d > 1
    function = tf.function(pearson_correlation, jit_compile=True) if xla else pearson_correlation
    np.testing.assert_allclose(function(x), expected, atol=1e-5)


# Compiled, and in lower precision


def test_xla_equals_eager():
    """All terms in one program, each with its gradient."""
    embeddings, labels = draw(8, 3, 16)

    def every_term(e):
        return {term: value_and_gradient(lambda x: ours(x, labels), e) for term, (ours, _) in TERMS.items()}  # noqa: B023

    eager, compiled = every_term(embeddings), tf.function(every_term, jit_compile=True)(embeddings)
    for term in TERMS:
        np.testing.assert_allclose(compiled[term][0], eager[term][0], rtol=1e-12, err_msg=term)
        np.testing.assert_allclose(compiled[term][1], eager[term][1], rtol=1e-10, atol=1e-14, err_msg=term)


@each_term
def test_one_graph_takes_every_batch_size(term):
    ours, _ = TERMS[term]
    signature = [tf.TensorSpec((None, 3, 7), tf.float64), tf.TensorSpec((None,), tf.int64)]
    graph = tf.function(lambda e, y: ours(e, y), input_signature=signature)
    for size in (1, 2, 9):
        embeddings, labels = draw(size)
        np.testing.assert_allclose(graph(embeddings, labels), ours(embeddings, labels), rtol=1e-12, atol=1e-15)


@each_term
def test_half_precision_is_computed_in_float32(term, dtype="bfloat16"):
    ours, _ = TERMS[term]
    embeddings, labels = draw(8, 3, 32)
    rounded = tf.cast(embeddings, dtype)
    value, gradient = value_and_gradient(lambda e: ours(e, labels), rounded)
    expected, expected_gradient = value_and_gradient(lambda e: ours(e, labels), tf.cast(rounded, "float32"))
    assert value.dtype == "float32" and gradient.dtype == dtype
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient, tf.cast(expected_gradient, dtype))


# The layer


def batch(size, seed=0, num_classes=NUM_CLASSES):
    """Labels (size,), logits (size, C) and embeddings (size, 3, 7), float32."""
    rng = np.random.default_rng(seed)
    embeddings, labels = draw(size, seed=seed, num_classes=num_classes)
    return labels, rng.normal(size=(size, num_classes)).astype("float32"), embeddings.astype("float32")


def logits_for(predictions, num_classes=NUM_CLASSES):
    return np.eye(num_classes, dtype="float32")[predictions]


def same_state(layer, state):
    return all(np.array_equal(now, then) for now, then in zip(layer.get_weights(), state, strict=True))


def test_layer_returns_the_terms_and_their_weighted_sum():
    labels, logits, embeddings = batch(8)
    layer = AdCorreLoss(NUM_CLASSES, w_ce=3.0, w_fd=0.5, w_md=2.0, w_ed=7.0, adaptive=False, label_smoothing=0.1)
    terms = {name: float(value) for name, value in layer(labels, logits, embeddings, training=True).items()}
    expected = {
        "ce": oracle.cross_entropy(labels, logits, 0.1),
        "fd": oracle.feature_discriminator(embeddings, labels),
        "md": oracle.mean_discriminator(embeddings, labels),
        "ed": oracle.embedding_discriminator(embeddings),
    }
    expected["loss"] = 3.0 * expected["ce"] + 0.5 * expected["fd"] + 2.0 * expected["md"] + 7.0 * expected["ed"]
    assert terms == pytest.approx(expected, rel=1e-5)


def test_default_weights_are_50_over_the_classes_and_ones():
    terms = AdCorreLoss(NUM_CLASSES)(*batch(8), training=True)
    assert float(terms["loss"]) == pytest.approx(float(10.0 * terms["ce"] + terms["fd"] + terms["md"] + terms["ed"]))


def test_class_recall_by_hand():
    """True 0, 0, 1 predicted 0, 1, 1: class 0 is right once of twice, class 1 once of once, class 2 never seen."""
    layer = AdCorreLoss(3)
    np.testing.assert_array_equal(layer.class_recall(), [0, 0, 0])
    _, _, embeddings = batch(3)
    layer(np.array([0, 0, 1]), logits_for([0, 1, 1], 3), embeddings, training=True)
    np.testing.assert_allclose(layer.class_recall(), [0.5, 1, 0])


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_adaptive_map_follows_a_scripted_training(mode):
    """86 predictions through a history of 10; class 4 is seen in the first batches only, and forgotten again."""
    history = oracle.History(NUM_CLASSES, size=10)
    layer = AdCorreLoss(NUM_CLASSES, history=10)
    step = lambda *arrays: layer(*arrays, training=True)  # noqa: E731 - tf.function wraps it
    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "xla", reduce_retracing=True)
    recalls = []
    for number, size in enumerate([3, 1, 4, 10, 3, 25, 4, 1, 25, 10]):
        labels, logits, embeddings = batch(size, seed=number, num_classes=5 if number < 3 else 4)
        labels[0] = 4 if number == 0 else labels[0]
        right = np.random.default_rng(number).random(size) < 0.6
        logits = logits_for(np.where(right, labels, (labels + 1) % NUM_CLASSES)) + 0.1
        if number == 0:
            logits[0] = logits_for(4)
        terms = step(labels, logits, embeddings)
        history.add(labels, logits)
        recalls.append(history.recall())
        np.testing.assert_allclose(layer.class_recall(), recalls[-1], rtol=1e-6, err_msg=f"step {number}")
        expected = oracle.feature_discriminator(embeddings, labels, recalls[-1], floor=1.0)
        np.testing.assert_allclose(terms["fd"], expected, rtol=1e-5, err_msg=f"step {number}")
    assert recalls[0][4] > 0 and recalls[-1][4] == 0 and np.ptp(recalls, axis=0).min() > 0.2  # the script exercised it


def test_evaluation_uses_the_history_and_leaves_it_alone():
    layer = AdCorreLoss(NUM_CLASSES, weight_floor=0.0)
    labels, _, embeddings = batch(8)
    layer(labels, logits_for(np.where(labels < 2, labels, 0)), embeddings, training=True)
    state, recall = layer.get_weights(), np.array(layer.class_recall())
    labels, logits, embeddings = batch(6, seed=1)
    terms = layer(labels, logits, embeddings, training=False)
    assert same_state(layer, state)
    expected = oracle.feature_discriminator(embeddings, labels, recall, floor=0.0)
    np.testing.assert_allclose(terms["fd"], expected, rtol=1e-5)


def test_history_is_non_trainable_and_resumes_from_its_weights():
    layer, resumed = AdCorreLoss(NUM_CLASSES, history=10), AdCorreLoss(NUM_CLASSES, history=10)
    for seed in range(3):
        layer(*batch(7, seed), training=True)
    assert layer.trainable_weights == [] and layer.non_trainable_weights
    resumed(*batch(2), training=True)
    resumed.set_weights(layer.get_weights())
    for seed in range(3, 6):
        expected = layer(*batch(4, seed), training=True)
        np.testing.assert_array_equal(resumed(*batch(4, seed), training=True)["loss"], expected["loss"])
    assert same_state(resumed, layer.get_weights())


def test_a_term_of_weight_0_is_absent_and_never_computed(monkeypatch):
    options = {"w_center": 1.0, "w_supcon": 1.0, "w_triplet": 1.0, "w_eac": 1.0, "embedding_shape": (3, 7)}
    inputs = {"consistency": np.ones(6, np.float32), "training": True}
    calls = []
    for term, function in list(custom_loss.TERMS.items()):
        monkeypatch.setitem(custom_loss.TERMS, term, lambda *args, t=term, f=function: calls.append(t) or f(*args))
    for off in custom_loss.TERMS:
        layer = AdCorreLoss(NUM_CLASSES, **{**options, f"w_{off}": 0.0})
        layer(*batch(6), **inputs)  # Keras may call a layer twice the first time
        calls.clear()
        terms = layer(*batch(6), **inputs)
        rest = [term for term in custom_loss.TERMS if term != off]
        assert list(terms) == ["loss", *rest] and calls == rest
        assert off != "center" or len(layer.weights) == 2  # no centers either


def test_a_new_term_is_one_entry(monkeypatch):
    """It appears in the layer's output, its total and its configuration, and in the trainer's metrics."""
    monkeypatch.setitem(custom_loss.TERMS, "spread", lambda loss, batch: keras.ops.std(batch.logits) + loss.num_classes)
    labels, logits, embeddings = batch(8)
    layer = AdCorreLoss(NUM_CLASSES, w_spread=2.0)
    terms = layer(labels, logits, embeddings, training=True)
    np.testing.assert_allclose(terms["spread"], NUM_CLASSES + np.std(logits), rtol=1e-6)
    without = AdCorreLoss(NUM_CLASSES)(labels, logits, embeddings, training=True)
    assert "spread" not in without
    np.testing.assert_allclose(terms["loss"] - without["loss"], 2 * terms["spread"], rtol=1e-5)
    assert AdCorreLoss.from_config(layer.get_config()).weights_by_term["spread"] == 2.0

    pixels = keras.Input((3,))
    x = keras.layers.Dense(14)(pixels)
    outputs = {"logits": keras.layers.Dense(NUM_CLASSES)(x), "embeddings": keras.layers.Reshape((2, 7))(x)}
    model = trainer.AdCorreTrainer(keras.Model(pixels, outputs), layer)
    model.compile("sgd")
    history = model.fit(np.ones((8, 3), np.float32), labels, batch_size=8, verbose=0).history
    assert history["spread"][0] >= NUM_CLASSES and {"loss", "ce", "fd", "md", "ed", "accuracy"} <= set(history)


def test_a_weight_of_no_term_is_refused():
    with pytest.raises(TypeError, match=r"triplet.* received w_tripel"):
        AdCorreLoss(NUM_CLASSES, w_tripel=1.0)


def test_baselines_are_terms_like_the_others():
    options = {"w_fd": 0.0, "w_md": 0.0, "w_ed": 0.0, "w_center": 2.0, "w_supcon": 3.0, "w_triplet": 5.0}
    labels, logits, embeddings = batch(12)
    layer = AdCorreLoss(NUM_CLASSES, embedding_shape=tuple(embeddings.shape[1:]), **options)
    assert layer.terms == ("ce", "center", "supcon", "triplet")
    first = layer(labels, logits, embeddings, training=True)
    length = np.mean(np.sum(np.square(embeddings), axis=(1, 2))) / embeddings.shape[1]
    np.testing.assert_allclose(first["center"], length / 2, rtol=1e-5)  # every center is still 0
    np.testing.assert_allclose(first["supcon"], baseline_losses.supervised_contrastive(embeddings, labels), rtol=1e-6)
    np.testing.assert_allclose(first["triplet"], baseline_losses.triplet_semihard(embeddings, labels), rtol=1e-6)
    weighted = 50 / NUM_CLASSES * first["ce"] + 2 * first["center"] + 3 * first["supcon"] + 5 * first["triplet"]
    np.testing.assert_allclose(first["loss"], weighted, rtol=1e-6)
    assert layer(labels, logits, embeddings)["center"] < first["center"], "the centers have moved, and are in the state"
    assert any("centers" in weight.path for weight in layer.non_trainable_weights)
    twin = AdCorreLoss.from_config(layer.get_config())
    assert twin.get_config() == layer.get_config()


def test_a_center_loss_needs_the_shape_of_the_embeddings():
    with pytest.raises(ValueError, match=r"embedding_shape: expected \(k, d\)"):
        AdCorreLoss(NUM_CLASSES, w_center=1.0)


def test_a_ramp_lifts_all_terms_but_cross_entropy_in_training():
    """Weights 0, 1/4, 2/4, 3/4, 1, 1 at the first six steps; an evaluation moves nothing."""
    labels, logits, embeddings = batch(9)
    layer = AdCorreLoss(NUM_CLASSES, ramp_steps=4, adaptive=False)
    for share in (0, 0.25, 0.5, 0.75, 1, 1):
        evaluated = layer(labels, logits, embeddings, training=False)
        terms = layer(labels, logits, embeddings, training=True)
        others = sum(terms[name] for name in ("fd", "md", "ed"))
        np.testing.assert_allclose(terms["loss"], 50 / NUM_CLASSES * terms["ce"] + share * others, rtol=1e-6)
        np.testing.assert_allclose(evaluated["loss"], terms["loss"], rtol=1e-6)


@pytest.mark.parametrize(("policy", "half_inputs"), [("mixed_bfloat16", False), ("mixed_float16", True)])
def test_layer_computes_in_float32_under_a_mixed_policy(policy, half_inputs):
    """Nor does it round float32 inputs, as a layer of the policy's own type would."""
    labels, logits, embeddings = batch(8)
    dtype = policy.removeprefix("mixed_") if half_inputs else "float32"
    logits, embeddings = tf.cast(logits, dtype), tf.cast(embeddings, dtype)
    expected = AdCorreLoss(NUM_CLASSES)(
        labels, tf.cast(logits, "float32"), tf.cast(embeddings, "float32"), training=True
    )
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        layer = AdCorreLoss(NUM_CLASSES)
        terms = layer(labels, logits, embeddings, training=True)
    finally:
        keras.config.set_dtype_policy(before)
    for name, value in terms.items():
        assert value.dtype == "float32", name
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert layer.class_recall().dtype == "float32"


@pytest.mark.parametrize("label", [7, -1, 1.5, float("nan")])
def test_a_label_out_of_range_is_an_error_in_eager_mode(label):
    labels = np.array([0, 1, label])
    logits, embeddings = np.zeros((3, 7), "float32"), np.ones((3, 2, 4), "float32")
    for call in (
        lambda: custom_loss.AdCorreLoss(7)(labels, logits, embeddings),
        lambda: cross_entropy(labels, logits),
        lambda: mean_discriminator(embeddings, labels, 7),
        lambda: feature_discriminator(embeddings, labels, num_classes=7),
        lambda: feature_discriminator(embeddings, labels, np.ones(7)),
    ):
        with pytest.raises(ValueError, match=f"labels: expected codes 0..6, received {label} in row 2"):
            call()


def test_another_shape_is_an_error_where_broadcasting_would_give_another_value():
    labels, column, one_hot = np.arange(3), np.arange(3)[:, None], np.eye(3, 7)
    logits, embeddings = np.zeros((3, 7), "float32"), np.ones((3, 2, 4), "float32")
    for call in (
        lambda: custom_loss.AdCorreLoss(7)(column, logits, embeddings),
        lambda: cross_entropy(column, logits),
        lambda: mean_discriminator(embeddings, column, 7),
        lambda: feature_discriminator(embeddings, column, num_classes=7),
        lambda: feature_discriminator(embeddings, one_hot, num_classes=7),
        lambda: baseline_losses.supervised_contrastive(embeddings, column),
        lambda: baseline_losses.triplet_semihard(embeddings, column),
    ):
        with pytest.raises(ValueError, match=r"labels: expected .*received the shape"):
            call()
    with pytest.raises(ValueError, match="embeddings: expected the axes B k d, received the shape"):
        feature_discriminator(embeddings[:, 0], labels, num_classes=7)
    np.testing.assert_allclose(cross_entropy([0, 1, 2], logits.tolist()), np.log(7), rtol=1e-6)


def test_a_compiled_step_does_not_look_at_its_labels():
    loss = custom_loss.AdCorreLoss(7)
    operations = {
        operation.type
        for operation in tf.function(loss)
        .get_concrete_function(
            *(
                tf.TensorSpec((3, *shape), dtype)
                for shape, dtype in (((), "int32"), ((7,), "float32"), ((2, 4), "float32"))
            )
        )
        .graph.get_operations()
    }
    assert "OneHot" in operations and not {"Assert", "PyFunc", "EagerPyFunc"} & operations


def test_config_round_trip():
    options = {"w_ce": 3.0, "w_fd": 0.5, "w_md": 0.0, "w_ed": 2.0, "weight_floor": 0.25, "history": 12}
    layer = AdCorreLoss(num_classes=6, adaptive=False, label_smoothing=0.1, name="loss", **options)
    config = layer.get_config()
    twin = AdCorreLoss.from_config(config)
    assert twin.get_config() == config
    assert options.items() <= config.items()
    assert (config["num_classes"], config["adaptive"], config["label_smoothing"]) == (6, False, 0.1)
    arrays = batch(8, num_classes=6)
    np.testing.assert_array_equal(twin(*arrays, training=True)["loss"], layer(*arrays, training=True)["loss"])


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 1},
        {"history": 0},
        {"weight_floor": -0.125},
        {"label_smoothing": 1.125},
        {"w_ce": -0.125},
        {"w_fd": float("nan")},
    ],
    ids=str,
)
def test_bad_arguments_say_what_was_expected_and_received(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"(?is){name}.*expected.*received.*{value}"):
        AdCorreLoss(**{"num_classes": NUM_CLASSES, **options})


# --- votes instead of labels ----------------------------------------------------------------------------------------


def draw_votes(size, seed=0):
    """Distributions (size, C), float64, some of them all for one class."""
    votes = np.random.default_rng(seed).dirichlet(np.full(NUM_CLASSES, 0.5), size)
    votes[::3] = np.eye(NUM_CLASSES)[votes[::3].argmax(axis=1)]
    return votes


def cross_entropy_loop(votes, logits, smoothing):
    """CE = 1/B sum_i -sum_c q_ic log p_ic, q_ic = (1 - smoothing) * votes_ic + smoothing / C."""
    total = 0.0
    for vote, row in zip(votes, logits, strict=True):
        normaliser = sum(math.exp(z) for z in row)
        for share, z in zip(vote, row, strict=True):
            target = (1 - smoothing) * share + smoothing / len(row)
            total -= target * math.log(math.exp(z) / normaliser)
    return total / len(votes)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("size", [1, 8])
def test_cross_entropy_of_votes_equals_the_loop(size, smoothing):
    votes, logits = draw_votes(size), np.random.default_rng(1).normal(size=(size, NUM_CLASSES))
    value = cross_entropy(tf.constant(votes), tf.constant(logits), smoothing)
    assert value.dtype == "float64" and value.shape == ()
    np.testing.assert_allclose(value, cross_entropy_loop(votes, logits, smoothing), rtol=1e-12)
    value = cross_entropy(votes.astype(np.float32), tf.constant(logits.astype(np.float32)), smoothing)
    assert value.dtype == "float32"
    np.testing.assert_allclose(value, cross_entropy_loop(votes, logits, smoothing), rtol=1e-5)


def test_the_gradient_of_votes_is_probability_minus_vote():
    """d/dz_c of -sum q log softmax(z) = p_c - q_c, over the batch's mean."""
    votes, logits = draw_votes(6), np.random.default_rng(1).normal(size=(6, NUM_CLASSES))
    _, gradient = value_and_gradient(lambda z: cross_entropy(tf.constant(votes), z), logits)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(gradient, (p - votes) / 6, atol=1e-12)


def test_cross_entropy_is_least_where_the_prediction_is_the_vote():
    """Then it is the entropy; here of (1/2, 1/4, 1/8, 1/16, 1/16): 1/2 + 2/4 + 3/8 + 4/16 + 4/16 = 1.875 bits."""
    votes = 2.0 ** -np.array([[1, 2, 3, 4, 4]])
    np.testing.assert_allclose(cross_entropy(votes, np.log(votes)), 1.875 * math.log(2), rtol=1e-6)
    assert cross_entropy(votes, np.log(votes[:, [1, 0, 2, 3, 4]])) > 1.9 * math.log(2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_votes_for_one_class_are_its_label_in_every_term(smoothing):
    embeddings, labels = draw(9, 3, 7)
    logits = np.random.default_rng(1).normal(size=(9, NUM_CLASSES)).astype(np.float32)
    found = []
    for targets in (labels, np.eye(NUM_CLASSES, dtype=np.float32)[labels]):
        layer = AdCorreLoss(NUM_CLASSES, history=12, label_smoothing=smoothing)
        terms = layer(targets, logits, embeddings.astype(np.float32), training=True)
        found.append(
            {name: float(value) for name, value in terms.items()} | {"history": layer.history_h2.numpy().tolist()}
        )
    assert found[0] == found[1]


def test_only_cross_entropy_feels_how_clear_the_votes_were():
    embeddings, labels = draw(9, 3, 7)
    embeddings = embeddings.astype(np.float32)
    logits = np.random.default_rng(1).normal(size=(9, NUM_CLASSES)).astype(np.float32)
    unclear = (0.6 * np.eye(NUM_CLASSES)[labels] + 0.4 / NUM_CLASSES).astype(np.float32)
    hard, soft = AdCorreLoss(NUM_CLASSES, history=12), AdCorreLoss(NUM_CLASSES, history=12)
    of_labels, of_votes = (
        hard(labels, logits, embeddings, training=True),
        soft(unclear, logits, embeddings, training=True),
    )
    assert float(of_votes["ce"]) == pytest.approx(cross_entropy_loop(unclear, logits, 0.0), rel=1e-5)
    assert float(of_votes["ce"]) != pytest.approx(float(of_labels["ce"]), rel=1e-2)
    for term in ("fd", "md", "ed"):
        assert float(of_votes[term]) == float(of_labels[term])
    assert soft.history_h2.numpy().tolist() == hard.history_h2.numpy().tolist()
