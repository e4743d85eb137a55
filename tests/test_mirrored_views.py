"""Erasing-attention consistency equals the loops of its formula, and trains features only, through two views."""

from __future__ import annotations

import baseline_oracle as oracle
import keras
import numpy as np
import pytest
import tensorflow as tf

import cnn_model
import custom_loss
from baseline_losses import MirroredViews, attention_consistency, attention_maps
from files import UserError

SHAPES = {"features": (2, 3, 4, 5), "kernel": (5, 2, 6), "bias": (2, 6), "classifier": (2, 6, 3)}


def draw(seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def both(features, mirrored, head, maps=attention_maps, consistency=attention_consistency):
    """The consistency (B,) of two views' feature maps."""
    return consistency(maps(features, *head), maps(mirrored, *head))


def by_loops(features, mirrored, head):
    return both(features, mirrored, head, oracle.attention_maps, oracle.attention_consistency)


def head_of(arrays):
    return [arrays[name] for name in ("kernel", "bias", "classifier")]


# Against the loops


def test_maps_and_consistency_are_the_loop_oracle_in_float64():
    arrays, mirrored = draw(), draw(1)["features"]
    maps = attention_maps(*arrays.values())
    assert maps.dtype == "float64"
    np.testing.assert_allclose(maps, oracle.attention_maps(*arrays.values()), rtol=1e-11)
    value = both(arrays["features"], mirrored, head_of(arrays))
    assert value.shape == (2,) and np.all(np.asarray(value) > 0.1)
    np.testing.assert_allclose(value, by_loops(arrays["features"], mirrored, head_of(arrays)), rtol=1e-11)


@pytest.mark.parametrize("zeros", [False, True])
def test_gradient_is_the_central_difference_of_the_oracle(zeros):
    """In the features of both views; also where one image's vectors have length 0."""
    arrays, mirrored = draw(), draw(1)["features"]
    head = head_of(arrays)
    views = np.stack([arrays["features"], mirrored])
    if zeros:
        head[1] = 0 * head[1]
        views[0, 0] = 0
    with tf.GradientTape() as tape:
        x = tf.constant(views)
        tape.watch(x)
        value = tf.reduce_sum(both(x[0], x[1], head))
    gradient = np.asarray(tape.gradient(value, x))
    assert np.isfinite(gradient).all()
    expected, step = np.zeros_like(views), 1e-6
    for at in np.ndindex(views.shape):
        if zeros and at[:2] == (0, 0):  # below the guard the length is constant: no difference shows that
            continue
        shift = np.zeros_like(views)
        shift[at] = step
        up, down = (sum(by_loops(*(views + sign * shift), head)) for sign in (1, -1))
        expected[at] = (up - down) / (2 * step)
    assert np.abs(expected).max() > 1e-2
    rest = gradient if not zeros else np.where(np.arange(4).reshape(2, 2, 1, 1, 1) > 0, gradient, 0)
    np.testing.assert_allclose(rest, expected, rtol=1e-6, atol=1e-8)


def test_views_that_are_mirror_images_are_consistent():
    arrays = draw()
    mirrored = arrays["features"][:, :, ::-1]
    np.testing.assert_allclose(both(arrays["features"], mirrored, head_of(arrays)), 0, atol=1e-28)
    symmetric = arrays["features"] + mirrored
    np.testing.assert_allclose(both(symmetric, symmetric, head_of(arrays)), 0, atol=1e-28)
    assert np.all(np.asarray(both(arrays["features"], arrays["features"], head_of(arrays))) > 0.1)


def test_larger_features_have_the_same_maps():
    """Otherwise small features would lower the loss, and the logits would not change."""
    arrays = {**draw(), "bias": np.zeros(SHAPES["bias"])}
    larger = {**arrays, "features": 7 * arrays["features"]}
    np.testing.assert_allclose(attention_maps(*larger.values()), attention_maps(*arrays.values()), rtol=1e-12)


# In a network


def network(logit_scale=1.0, seed=0, arch="mini_xcp") -> keras.Model:
    keras.utils.set_random_seed(seed)
    made = cnn_model.build_model(arch, 7, 3, 8, input_size=24, logit_scale=logit_scale)
    rng = np.random.default_rng(seed)
    for layer in ("embedding_dense", "logits"):
        bias = made.get_layer(layer).bias
        bias.assign(rng.normal(size=bias.shape))
    return made


def pixels(size=4) -> np.ndarray:
    return np.random.default_rng(5).uniform(0, 255, (size, 24, 24, 1)).astype(np.float32)


@pytest.mark.parametrize("logit_scale", [1.0, 4.0])
def test_the_mean_of_a_map_is_the_logit_without_the_bias(logit_scale):
    made, images = network(logit_scale), pixels()
    views, logits = MirroredViews(made), made.get_layer("logits")
    maps = attention_maps(keras.Model(made.input, made.get_layer("pool").input)(images), *views._head())
    assert maps.shape == (4, 3, 3, 7) and np.std(maps, axis=(1, 2)).min() > 1e-3
    expected = made(images)["logits"] - logits.bias
    np.testing.assert_allclose(np.mean(maps, axis=(1, 2)), expected, atol=1e-5)


def test_the_second_view_is_the_mirror_image():
    """Its consistency is that of two passes; images that look the same from both sides still differ in their maps."""
    made, images = network(), pixels()
    views = MirroredViews(made)
    features = keras.Model(made.input, made.get_layer("pool").input)
    outputs = views(images)
    expected = both(features(images), features(images[:, :, ::-1]), views._head())
    np.testing.assert_allclose(outputs["consistency"], expected, rtol=1e-5)
    assert np.all(np.asarray(outputs["consistency"]) > 1e-5)
    for name, values in made(images).items():
        np.testing.assert_array_equal(outputs[name], values)
    assert views.variables == [], "the network's variables stay its own"


def test_it_trains_the_features_and_not_the_weights_inside_the_maps():
    made = network()
    views = MirroredViews(made)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(views(pixels(), training=True)["consistency"])
    variables = made.trainable_variables
    reached = {}
    for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
        reached[variable.path] = gradient is not None and bool(np.any(gradient))
    head = {path for path in reached if path.startswith(("embedding_dense", "logits"))}
    assert len(head) == 4 and not any(reached[path] for path in head)
    assert all(reached[path] for path in reached.keys() - head)


def test_each_view_normalises_by_its_own_batch_and_moves_the_statistics():
    made, twin, images = network(), network(), pixels(8)
    MirroredViews(made)(images, training=True)
    twin(images, training=True)
    twin(images[:, :, ::-1], training=True)
    moved = [(now, then) for now, then in zip(made.variables, twin.variables, strict=True) if "moving" in now.path]
    assert moved
    for now, then in moved:
        np.testing.assert_allclose(now, then, rtol=1e-6, err_msg=now.path)


class Holder(keras.Model):
    """A model with the views inside, as a trainer has them: under a mixed policy it reads variables rounded."""

    def __init__(self, views):
        super().__init__()
        self.views = views

    def call(self, images):
        return self.views(images)


def test_maps_are_computed_in_float32_under_a_mixed_policy(policy="mixed_bfloat16"):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        views, read = MirroredViews(network()), []
        views._head = lambda head=views._head: read.append(head()) or read[-1]
        outputs = Holder(views)(pixels())
    finally:
        keras.config.set_dtype_policy(before)
    assert outputs["consistency"].dtype == "float32"
    assert [array.dtype for array in read[-1]] == ["float32"] * 3


def test_a_network_without_the_head_is_refused():
    x = keras.Input((4,))
    other = keras.Model(x, {"logits": keras.layers.Dense(7, name="logits")(x)})
    with pytest.raises(UserError, match=r"--w-eac: expected .*pool, embedding_dense, logits.*pool, embedding_dense"):
        MirroredViews(other)


# As a term


def test_the_term_is_the_mean_over_the_images_and_needs_the_views():
    layer = custom_loss.AdCorreLoss(7, w_ce=1.0, w_fd=0.0, w_md=0.0, w_ed=0.0, w_eac=5.0)
    rng = np.random.default_rng(0)
    inputs = np.arange(4), rng.normal(size=(4, 7)).astype("float32"), rng.normal(size=(4, 2, 3)).astype("float32")
    values = layer(*inputs, consistency=np.array([1, 2, 3, 6], np.float32))
    assert layer.terms == ("ce", "eac") and float(values["eac"]) == 3
    np.testing.assert_allclose(values["loss"], values["ce"] + 15, rtol=1e-6)
    with pytest.raises(ValueError, match=r"consistency: expected .* w_eac"):
        layer(*inputs)
