"""Published Keras 2 files give the same numbers here, nothing in them is run, and damaged ones are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import cnn_model
from config import ModelConfig
from datasets import CLASS_NAMES
from files import UserError
from model_files import model_file
from model_files.description import NetworkDescription
from model_files.published_file import read_saved_model

SIDE = 71  # the least that Xception takes


@dataclasses.dataclass(frozen=True)
class Published:
    """A file as the published code writes it, and what Keras 2 makes of `FACES` with it."""

    path: Path
    probabilities: np.ndarray  # (N, C)
    embeddings: np.ndarray  # (N, k, d)
    trap: Path  # the code in the file creates this file when it runs


FACES = np.random.default_rng(5).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)


def keras2_network(arch: str, k: int, classes: int, size: int, trap: Path):
    """The published architecture in Keras 2, weights drawn at random.

    The running statistics are those of `FACES`, changed at random: with others, a deep network of random weights
    sees no difference between two faces.
    """
    layers = tf_keras.layers
    if arch == "xcp":
        base = tf_keras.applications.Xception(include_top=False, weights=None, input_shape=(SIDE, SIDE, 3))
        x = layers.GlobalAveragePooling2D()(base.get_layer("block14_sepconv2_act").output)
    else:
        base = tf_keras.applications.ResNet50(include_top=True, weights=None, input_shape=(SIDE, SIDE, 3))
        x = base.get_layer("avg_pool").output
    embeddings = [layers.Lambda(lambda x: tf.math.l2_normalize(x, axis=1))(layers.Dense(size)(x)) for _ in range(k)]
    x = layers.Concatenate(axis=1)(embeddings)
    x = layers.Lambda(lambda x, path=str(trap): (open(path, "w").close(), x)[1])(x)
    out = layers.Dense(classes, activation="softmax", name="out")(layers.Dropout(0.5)(x))
    network = tf_keras.Model([base.input], [out, *embeddings])
    rng = np.random.default_rng(k * classes)

    def draw(variable):
        shape, role = variable.shape, variable.name.split("/")[-1].removesuffix(":0")
        if role in ("gamma", "moving_variance"):
            return rng.uniform(0.5, 1.5, shape)
        if role in ("beta", "moving_mean", "bias"):
            return rng.normal(0, 0.1, shape)
        inputs = np.prod(shape[:-2]) if role == "depthwise_kernel" else np.prod(shape[:-1])
        scale = 1 if variable.name == "out/kernel:0" else np.sqrt(2 / inputs)  # which keeps the size of what passes
        return scale * rng.standard_normal(shape, dtype=np.float32)

    network.set_weights([draw(variable) for variable in network.weights])
    norms = [layer for layer in network.layers if isinstance(layer, layers.BatchNormalization)]
    for layer in norms:
        layer.momentum = 0.0
    network(FACES.astype(np.float32) / 255, training=True)
    for layer in norms:
        for variable in (layer.moving_mean, layer.moving_variance):
            variable.assign(variable * rng.uniform(0.8, 1.2, variable.shape))
    return network


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes published files, each once."""
    folder, made = tmp_path_factory.mktemp("published"), {}

    def get(arch: str, k: int, classes: int, size: int = 8) -> Published:
        key = (arch, k, classes)
        if key not in made:
            path, trap = folder / f"{arch}_{k}_{classes}.h5", folder / f"trap_{arch}_{k}_{classes}"
            network = keras2_network(arch, k, classes, size, trap)
            network.save(path, save_format="h5")
            network.save_weights(folder / f"{arch}_{k}_{classes}_weights.h5")
            probabilities, *embeddings = network(FACES.astype(np.float32) / 255, training=False)
            trap.unlink()
            made[key] = Published(path, probabilities.numpy(), np.stack(embeddings, axis=1), trap)
        return made[key]

    return get


# The same numbers


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "k", "classes"), [("xcp", 7, 7), ("xcp", 10, 8), ("resnet", 7, 8)])
def test_probabilities_and_embeddings_agree_with_keras_2(make, arch, k, classes):
    from test_model import TestModels

    published = make(arch, k, classes)
    model = TestModels(published.path)
    assert model.info.network == NetworkDescription(arch, CLASS_NAMES[:classes], k, 8, SIDE, "unit")
    probabilities, embeddings = model.predict(FACES)
    np.testing.assert_allclose(probabilities, published.probabilities, atol=1e-4)
    np.testing.assert_allclose(embeddings, published.embeddings, atol=1e-4)
    # Faces that all look the same to the network would agree whatever was loaded.
    assert np.ptp(probabilities, axis=0).max() > 0.02 and np.ptp(embeddings, axis=0).max() > 0.2
    assert not published.trap.exists()


@pytest.mark.slow
def test_the_counter_in_layer_names_does_not_matter(make):
    """Two Xceptions of one process: the second's shortcuts begin at conv2d_4; both agree with Keras 2 above."""
    shortcuts = []
    for published in (make("xcp", 7, 7), make("xcp", 10, 8)):
        with h5py.File(published.path) as file:
            shortcuts.append([n for n in file["model_weights"].attrs["layer_names"] if n.startswith("conv2d")])
    assert len(shortcuts[0]) == len(shortcuts[1]) == 4 and not set(shortcuts[0]) & set(shortcuts[1])


@pytest.mark.slow
def test_code_in_the_file_is_not_run_though_keras_2_runs_it(make):
    published = make("xcp", 7, 7)
    assert model_file.describe(published.path)["code"].startswith("8 Lambda layers, ignored")  # 7 of the code, 1 trap
    model_file.load_model(published.path)
    assert not published.trap.exists()
    tf_keras.models.load_model(published.path, custom_objects={"tf": tf}, compile=False, safe_mode=False)
    assert published.trap.exists(), "the trap would have shown it"
    published.trap.unlink()


@pytest.mark.slow
def test_a_weights_only_file_gives_the_same_network(make):
    published = make("resnet", 7, 8)
    weights = published.path.with_name("resnet_7_8_weights.h5")
    saved = read_saved_model(weights)
    assert saved.info.network == NetworkDescription("resnet", CLASS_NAMES, 7, 8, None, "unit")
    assert saved.ignored_code == 0
    for one, other in zip(saved.layers, read_saved_model(published.path).layers, strict=True):
        assert one.name == other.name and one.arrays.keys() == other.arrays.keys()
        assert all(np.array_equal(one.arrays[role], other.arrays[role]) for role in one.arrays)


@pytest.mark.slow
def test_converted_it_is_ours(make, tmp_path, monkeypatch, capsys):
    import test

    published = make("xcp", 10, 8)
    source = shutil.copy(published.path, tmp_path / "AffectNet_6336.h5")
    target = tmp_path / "ours.weights.h5"
    monkeypatch.setattr("sys.argv", ["test.py", "convert", str(source), str(target)])
    test.main()
    assert f"wrote {target}: xcp, 8 classes" in capsys.readouterr().out
    model = test.TestModels(target)
    np.testing.assert_allclose(model.predict(FACES)[0], published.probabilities, atol=1e-4)
    assert (model.info.dataset, model.info.metrics["accuracy"]) == ("affectnet", 0.6336)
    assert model.info.network.scaling == "unit"
    assert model.info.origin.endswith("full model; converted from AffectNet_6336.h5")
    assert not published.trap.exists()


@pytest.mark.slow
def test_training_starts_from_it(make):
    """Its input range counts, not the one of ImageNet's Xception."""
    published = make("xcp", 7, 7)
    network, described = model_file.new_network(
        ModelConfig(arch="xcp", embedding_size=8), CLASS_NAMES[:7], published.path
    )
    assert described == NetworkDescription("xcp", CLASS_NAMES[:7], 7, 8, SIDE, "unit")
    np.testing.assert_allclose(network(FACES)["embeddings"], published.embeddings, atol=1e-4)


@pytest.mark.slow
def test_layers_of_one_shape_in_each_others_place_are_refused(make, tmp_path):
    path = shutil.copy(make("xcp", 7, 7).path, tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        names = list(file["model_weights"].attrs["layer_names"])
        i, j = names.index("block6_sepconv1"), names.index("block9_sepconv2")
        names[i], names[j] = names[j], names[i]
        file["model_weights"].attrs["layer_names"] = names
    with pytest.raises(UserError, match=r"in place of block6_sepconv1 .* the file has block9_sepconv2"):
        model_file.load_model(path)


# Small files in the published layout: what is read from them


def write_keras2(path, layers, *, model_config=None, full=True, listed=None):
    """An HDF5 file in Keras 2's layout: layer name to its arrays, in order."""
    with h5py.File(path, "w") as file:
        weights = file.create_group("model_weights") if full else file
        weights.attrs["layer_names"] = [name.encode() for name in (layers if listed is None else listed)]
        weights.attrs["keras_version"] = b"2.9.0"
        for name, arrays in layers.items():
            group = weights.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{role}:0".encode() for role in arrays]
            for role, array in arrays.items():
                group[f"{name}/{role}:0"] = array
        if model_config is not None:
            file.attrs["model_config"] = model_config
    return path


def dense(rows, columns, start=0.0):
    kernel = start + np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    return {"kernel": kernel, "bias": start + np.arange(columns, dtype=np.float32)}


def small(k=3, d=4, classes=7) -> dict:
    """The layers of a backbone that is one convolution, k embeddings whose names run over 9, and the classifier."""
    layers = {"input_1": {}, "conv": {"kernel": np.ones((3, 3, 3, 32), np.float32)}, "pool": {}}
    layers |= {f"dense_{8 + i}": dense(5, d, start=100.0 * i) for i in range(k)}
    return layers | {"lambda": {}, "out": dense(k * d, classes)}


def test_counts_come_from_shapes_and_embeddings_stand_in_the_files_order(tmp_path):
    saved = read_saved_model(write_keras2(tmp_path / "a.h5", small()))
    assert saved.info.network == NetworkDescription("xcp", CLASS_NAMES[:7], 3, 4, None, "unit")
    assert saved.info.versions == {"keras": "2.9.0"}
    backbone, embedding, classifier = saved.layers
    assert (backbone.name, embedding.name, classifier.name) == ("conv", "embedding_dense", "logits")
    assert embedding.arrays["bias"].tolist() == [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203]
    assert embedding.arrays["kernel"][1].tolist() == [4, 5, 6, 7, 104, 105, 106, 107, 204, 205, 206, 207]
    assert np.array_equal(classifier.arrays["kernel"], dense(12, 7)["kernel"])


def test_one_embedding_is_a_network_too(tmp_path):
    saved = read_saved_model(write_keras2(tmp_path / "a.h5", small(k=1)))
    assert (saved.info.network.num_embeddings, saved.info.network.embedding_size) == (1, 4)


def test_a_long_list_of_layers_is_spread_over_attributes(tmp_path):
    path = write_keras2(tmp_path / "a.h5", small())
    whole = read_saved_model(path)
    with h5py.File(path, "r+") as file:
        attributes = file["model_weights"].attrs
        names = attributes.pop("layer_names")
        attributes["layer_names0"], attributes["layer_names1"] = names[:4], names[4:]
    assert [layer.name for layer in read_saved_model(path).layers] == [layer.name for layer in whole.layers]


@pytest.mark.parametrize(
    ("name", "dataset", "metrics"),
    [
        ("AffectNet_6336.h5", "affectnet", {"accuracy": 0.6336, "source": "the file's name"}),
        ("RafDB_8696.h5", "rafdb", {"accuracy": 0.8696, "source": "the file's name"}),
        ("model.h5", "", {}),
    ],
)
def test_the_published_names_tell_the_data_set(tmp_path, name, dataset, metrics):
    saved = read_saved_model(write_keras2(tmp_path / name, small()))
    assert (saved.info.dataset, saved.info.metrics) == (dataset, metrics)


def test_the_configuration_tells_the_input_and_the_code(tmp_path):
    layers = [
        {"class_name": "InputLayer", "config": {"batch_input_shape": [None, 96, 96, 3]}},
        {"class_name": "Lambda", "config": {"function": ["4wEAAAAA", None, None]}},
        {"class_name": "Lambda", "config": {"function": {"class_name": "__lambda__"}}},
    ]
    text = json.dumps({"class_name": "Functional", "config": {"layers": layers}})
    path = write_keras2(tmp_path / "a.h5", small(), model_config=text)
    saved = read_saved_model(path)
    assert (saved.info.network.input_size, saved.ignored_code) == (96, 2)
    facts = model_file.describe(path)
    assert facts["code"] == "2 Lambda layers, ignored: nothing in them was run"
    assert facts["origin"] == "published code, Keras 2.9.0 full model"
    assert facts["input"] == "96 x 96 px, RGB, scaled to 0..1" and facts["trained on"] == "unknown"


@pytest.mark.parametrize("text", ["{", "[]", "[" * 50_000], ids=["cut", "list", "deep"])
def test_a_configuration_that_is_not_json_is_refused(tmp_path, text):
    path = write_keras2(tmp_path / "a.h5", small(), model_config=np.bytes_(text))
    with pytest.raises(UserError, match=r"a\.h5: cannot read its model_config"):
        read_saved_model(path)


@pytest.mark.parametrize("full", [True, False], ids=["full", "weights"])
def test_nothing_is_unpickled_evaluated_or_deserialised(tmp_path, monkeypatch, full):
    import keras

    path = write_keras2(tmp_path / "a.h5", small(), full=full, model_config='{"class_name": "Lambda"}')
    for owner, name in (
        (keras.saving, "deserialize_keras_object"),
        (keras.saving, "load_model"),
        (keras.models, "model_from_json"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("made something from the file"))
    for name in ("pickle.loads", "marshal.loads", "builtins.eval", "builtins.exec"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("ran something of the file"))
    assert read_saved_model(path).ignored_code == 1


# Small files in the published layout: what is refused


def changed(name, **arrays):
    """`small` with another layer, or with arrays added, replaced or (None) taken out of a layer."""

    def change():
        layers = small()
        layers[name] = {r: a for r, a in {**layers.get(name, {}), **arrays}.items() if a is not None}
        return layers

    return change


def without(*names):
    return lambda: {name: arrays for name, arrays in small().items() if name not in names}


NAN, WRONG = np.full((5, 4), np.nan, np.float32), np.zeros((5, 3), np.float32)
LAYERS = {
    "an embedding missing": (without("dense_9"), r"layer out: expected kernel \(8, 7\), .* found kernel \(12, 7\)"),
    "the classifier missing": (without("out"), r"layer dense_10: expected kernel \(8, 4\)"),
    "no backbone": (without("conv"), "found 0 layers that begin with a kernel of shape None"),
    "another backbone": (changed("conv", kernel=np.ones((5, 5, 3, 8), np.float32)), r"of shape \(5, 5, 3, 8\)"),
    "an embedding too many": (
        lambda: {"conv": small()["conv"], "dense_7": dense(5, 4), **without("conv")()},
        r"layer out: expected kernel \(16, 7\), .* found kernel \(12, 7\)",
    ),
    "a Dense before the backbone": (lambda: {"dense": dense(5, 4), **small()}, r"with a kernel of shape \(5, 4\)"),
    "no bias": (changed("dense_9", bias=None), r"layer dense_9: expected kernel .* found kernel \(5, 4\)$"),
    "an array too many": (changed("out", gamma=np.ones(3, np.float32)), r"layer out: .* found .* gamma \(3,\)"),
    "mis-shaped": (changed("dense_9", kernel=WRONG), r"dense_9: expected kernel \(5, 4\).*found kernel \(5, 3\)"),
    "NaN": (changed("dense_9", kernel=NAN), r"dense_9/kernel:0 holds numbers that are not finite"),
    "integers": (changed("out", bias=np.zeros(7, np.int32)), "out/bias:0: expected floats, found int32"),
}


@pytest.mark.parametrize("damage", LAYERS)
def test_layers_that_do_not_fit_are_refused(tmp_path, damage):
    make_layers, message = LAYERS[damage]
    path = write_keras2(tmp_path / "a.h5", make_layers())
    with pytest.raises(UserError, match=rf"a\.h5: .*({message})") as caught:
        model_file.load_model(path)
    assert "\n" not in str(caught.value)


def drop(name):
    return lambda file: file.pop(name)


def relist(attribute, group="/model_weights", names=None):
    def change(file):
        del file[group].attrs[attribute]
        if names is not None:
            file[group].attrs[attribute] = names

    return change


FILES = {
    "a listed array gone": (drop("model_weights/out/out/bias:0"), "array out/bias:0 of layer out is missing"),
    "a listed layer gone": (drop("model_weights/conv"), "layer conv is missing"),
    "an array that no layer lists": (
        lambda file: file.create_dataset("model_weights/out/out/more:0", data=np.ones(3)),
        "1 extra arrays that no layer lists: /model_weights/out/out/more:0",
    ),
    "no list of layers": (relist("layer_names"), "attribute 'layer_names' is missing"),
    "no list of arrays": (relist("weight_names", "model_weights/out"), "attribute 'weight_names' is missing"),
    "a list of numbers": (relist("layer_names", names=[1, 2]), "attribute 'layer_names': expected text, found int"),
    "an array listed twice": (
        relist("weight_names", "model_weights/out", [b"out/kernel:0", b"out/kernel:0"]),
        "layer out lists the array out/kernel:0 twice",
    ),
    "a path upwards": (relist("layer_names", names=["../.."]), r"layer \.\./\.\. is missing"),
    "an external link": (
        lambda file: file["model_weights"].__setitem__("x", h5py.ExternalLink("/etc/hostname", "/")),
        "/model_weights/x is an external link",
    ),
    "an array in place of the group": (
        lambda file: (file.pop("model_weights"), file.create_dataset("model_weights", data=[1.0])),
        "no description of its network",
    ),
}


@pytest.mark.parametrize("damage", FILES)
def test_files_that_were_changed_are_refused(tmp_path, damage):
    change, message = FILES[damage]
    path = write_keras2(tmp_path / "a.h5", small())
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(UserError, match=rf"a\.h5: .*{message}"):
        model_file.load_model(path)


def test_a_small_backbone_is_not_an_xception(tmp_path, monkeypatch):
    """The order of layers is compared with a whole network's; here one without the cost of a real one."""
    path = write_keras2(tmp_path / "a.h5", small())
    real = cnn_model.build_model
    monkeypatch.setattr(cnn_model, "build_model", lambda arch, **options: real("mini_xcp", **options))
    with pytest.raises(UserError, match=r"do not fit a mini_xcp network: expected \d+ layers with arrays, found 3"):
        model_file.load_model(path)


@pytest.mark.parametrize("classes", [6, 9])
def test_a_class_count_without_names_is_refused(tmp_path, classes):
    with pytest.raises(UserError, match=f"expected a network of 7 or 8 classes, found {classes}"):
        model_file.read_info(write_keras2(tmp_path / "a.h5", small(classes=classes)))
