"""Model files bring back the same network; every other file is refused with a reason."""

from __future__ import annotations

import dataclasses
import errno
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

import cnn_model
from config import ModelConfig
from datasets import CLASS_NAMES
from files import UserError
from model_files import model_file, safe_hdf5
from model_files.description import ModelInfo, NetworkDescription
from model_files.model_file import load_model, read_info, save_model

EIGHT = ModelInfo(
    NetworkDescription("mini_xcp", CLASS_NAMES, num_embeddings=3, embedding_size=4, input_size=16, scaling="image")
)


def build(info: ModelInfo, seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return model_file.build_network(info.network)


def edit(path, change):
    """A change of the HDF5 file in place."""
    with h5py.File(path, "r+") as file:
        change(file)


def describe(**changes):
    """An edit of the description: names to new values; None takes a name out."""

    def change(file):
        values = {**json.loads(file.attrs["ad_corre"]), **changes}
        file.attrs["ad_corre"] = json.dumps({name: value for name, value in values.items() if value is not None})

    return change


def last_kernel(file) -> h5py.Dataset:
    """The classifier's kernel, found by its shape: k * d = 16 numbers to 7 classes."""
    found = []
    file.visititems(lambda _, item: found.append(item) if getattr(item, "shape", ()) == (16, 7) else None)
    return found[0]


@pytest.fixture(scope="module")
def network():
    return build(EIGHT)


@pytest.fixture(scope="module")
def tiny_network(tiny_weights):
    """The network of `tiny_weights`, whatever it holds."""
    return build(read_info(tiny_weights))


@pytest.fixture
def weights(tiny_weights, tmp_path):
    """A copy that a test may change: without the digest, as another program would write it."""
    content = safe_hdf5.read_arrays(tiny_weights)
    with h5py.File(tmp_path / "copy.weights.h5", "w") as file:
        for name, array in content.arrays.items():
            file[name] = array
        file.attrs.update(content.attributes)
    return tmp_path / "copy.weights.h5"


# What is saved comes back


def test_outputs_come_back_bit_for_bit(tmp_path):
    network = build(EIGHT)
    for variable in network.variables:  # the running statistics too, as if trained
        variable.assign(variable + 0.1 * keras.random.uniform(variable.shape, seed=3))
    save_model(tmp_path / "a.weights.h5", network, EIGHT)
    again, info = load_model(str(tmp_path / "a.weights.h5"))
    assert info == EIGHT
    picture = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), np.uint8)
    before, after = network(picture), again(picture)
    for name in ("logits", "embeddings"):
        assert np.array_equal(before[name], after[name])


def test_saving_again_replaces_the_file(tmp_path, network):
    path = tmp_path / "a.weights.h5"
    bias = network.get_layer("logits").bias
    for value in (1.0, 2.0):
        bias.assign(np.full(8, value))
        save_model(path, network, EIGHT)
    bias.assign(np.zeros(8))
    model_file.load_weights(network, path)
    assert np.array_equal(bias, np.full(8, 2.0))
    assert [file.name for file in tmp_path.iterdir()] == ["a.weights.h5"]


def test_the_description_is_one_json_attribute(tiny_weights):
    with h5py.File(tiny_weights, "r") as file:
        described = json.loads(file.attrs["ad_corre"])
    assert described == {
        "format_version": 1,
        "arch": "mini_xcp",
        "class_names": ["Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger"],
        "num_embeddings": 2,
        "embedding_size": 8,
        "input_size": 24,
        "scaling": None,
        "logit_scale": 1.0,
        "temperature": 1.0,
        "exponent": 1.0,
        "dataset": "synthetic/train",
        "metrics": {"split": "val", "accuracy": 0.5},
        "versions": {"keras": keras.__version__},
        "origin": "train.py",
        "calibrated_on": "",
    }


def test_the_description_is_read_without_the_network(tiny_weights, monkeypatch):
    monkeypatch.setattr(cnn_model, "build_model", lambda *_: pytest.fail("built a network"))
    info = read_info(tiny_weights)
    assert info.network.class_names == CLASS_NAMES[:7] and info.metrics["accuracy"] == 0.5
    assert info.network.scaling == "image"  # the architecture's own, as the file leaves it open


def test_the_file_is_hardly_larger_than_its_arrays(tiny_weights, tiny_network):
    arrays = sum(4 * np.prod(variable.shape) for variable in tiny_network.variables)
    assert tiny_weights.stat().st_size < 1.1 * arrays


def test_plain_keras_reads_our_file(tiny_weights, tiny_network):
    """The digest is in front of the HDF5 content, and HDF5 skips what is there."""
    for variable in tiny_network.weights:
        variable.assign(np.full(variable.shape, 9))
    tiny_network.load_weights(tiny_weights)
    expected, _ = load_model(tiny_weights)
    for found, variable in zip(tiny_network.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(found, variable)


def test_a_file_without_a_digest_gives_the_same_network(weights, tiny_weights):
    """Files of earlier versions."""
    assert safe_hdf5.read_arrays(tiny_weights).has_digest and not safe_hdf5.read_arrays(weights).has_digest
    (old, old_info), (new, new_info) = load_model(weights), load_model(tiny_weights)
    assert old_info == new_info
    for found, expected in zip(old.weights, new.weights, strict=True):
        np.testing.assert_array_equal(found, expected)


# Half precision


def test_half_precision_is_of_kernels_only(tiny_weights, tmp_path):
    exact, info = load_model(tiny_weights)
    save_model(tmp_path / "half.weights.h5", exact, info, half=True)
    half, found = load_model(tmp_path / "half.weights.h5")
    assert found == info
    assert (tmp_path / "half.weights.h5").stat().st_size < 0.6 * tiny_weights.stat().st_size
    differ = 0
    for a, b in zip(exact.weights, half.weights, strict=True):
        assert b.dtype == "float32"
        if len(a.shape) == 1:
            np.testing.assert_array_equal(a, b, err_msg=a.path)
        np.testing.assert_allclose(a, b, rtol=2**-11, atol=2**-25, err_msg=a.path)
        differ += not np.array_equal(a, b)
    assert differ > 5
    image = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 1), np.uint8)
    np.testing.assert_allclose(exact(image)["logits"], half(image)["logits"], atol=5e-3)


@pytest.mark.parametrize("number", [7e4, -1e30, np.nan])
def test_numbers_beyond_half_precision_are_refused(tmp_path, network, number, recwarn):
    kernel = network.get_layer("logits").kernel
    before = np.array(kernel)
    kernel.assign(np.full(kernel.shape, number))
    try:
        with pytest.raises(UserError, match=r"--half: expected numbers up to 65,504 in layers/dense_1/vars/0"):
            save_model(tmp_path / "a.weights.h5", network, EIGHT, half=True)
    finally:
        kernel.assign(before)
    assert list(tmp_path.iterdir()) == [] and [w for w in recwarn if w.category is RuntimeWarning] == []


# What cannot be saved


@pytest.mark.parametrize("name", ["a.h5", "weights.h5"])
def test_another_ending_is_refused_before_anything_is_written(tmp_path, network, name):
    with pytest.raises(UserError, match=r"expected a name that ends with \.weights\.h5"):
        save_model(tmp_path / name, network, EIGHT)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(tmp_path, network, monkeypatch):
    path = tmp_path / "a.weights.h5"
    save_model(path, network, EIGHT)
    old = path.read_bytes()

    def fail_in_the_middle(_, path, **options):
        with open(path, "wb") as file:
            file.write(old[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keras.Model, "save_weights", fail_in_the_middle)
    with pytest.raises(OSError) as caught:
        save_model(path, network, EIGHT)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == ["a.weights.h5"]


def test_a_description_that_is_not_json_keeps_the_old_file(tmp_path, network):
    path = tmp_path / "a.weights.h5"
    save_model(path, network, EIGHT)
    with pytest.raises(TypeError):
        save_model(path, network, dataclasses.replace(EIGHT, metrics={"accuracy": np.ones(3)}))
    assert read_info(path) == EIGHT


# What cannot be loaded


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such weights file"),
        (b"", "expected an HDF5 weights file, found b''"),
        (b"PK\x03\x04 a zip", "the archive is damaged"),
        (b"\x80\x04 a pickle", "expected an HDF5 weights file, found b'.x80.x04 a pic'"),
        (b"\x89HDF\r\n\x1a\n and no more", r"damaged|expected an HDF5"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, content, message):
    path = tmp_path / "a.weights.h5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.weights\.h5: .*({message})"):
        load_model(path)


# What `from_json` refuses is in test_description.py.
DESCRIPTIONS = {
    "none": (lambda file: file.attrs.pop("ad_corre"), r"no description of its network \(attribute 'ad_corre'\)"),
    "a number": (lambda file: file.attrs.create("ad_corre", 7), "cannot read the description"),
    "an unknown architecture": (describe(arch="mini_vgg"), "mini_xcp.*received 'mini_vgg'"),
    "an unknown scaling": (describe(scaling="half"), "scaling: .*image.*received 'half'"),
    "k of a billion": (describe(num_embeddings=10**9), "k = 1000000000 .* more than the whole"),
    "another k": (describe(num_embeddings=3), "arrays do not fit a mini_xcp network"),
}


@pytest.mark.parametrize("damage", DESCRIPTIONS)
def test_a_description_that_does_not_fit_is_refused(weights, damage):
    change, message = DESCRIPTIONS[damage]
    edit(weights, change)
    with pytest.raises(UserError, match=rf"copy\.weights\.h5: .*{message}"):
        load_model(weights)


def replace_kernel(array):
    def change(file):
        kernel = last_kernel(file)
        group, name = kernel.parent, kernel.name.split("/")[-1]
        del group[name]
        if array is not None:
            group[name] = array

    return change


ARRAYS = {
    "missing": (replace_kernel(None), "arrays do not fit a mini_xcp network"),
    "too short": (replace_kernel(np.zeros((15, 7), np.float32)), r"do not fit .* network .*\(16, 7\)"),
    "NaN": (replace_kernel(np.full((16, 7), np.nan, np.float32)), "logits/kernel holds numbers that are not finite"),
    "infinite": (
        replace_kernel(np.full((16, 7), np.inf, np.float32)),
        "logits/kernel holds numbers that are not finite",
    ),
    "one too many": (
        lambda file: file.create_dataset("layers/dense_9/vars/0", data=np.ones(3)),
        r"do not fit .* \(expected \d+, found \d+: it has extra ones\)",
    ),
    "elsewhere": (replace_kernel(h5py.ExternalLink("other.h5", "/kernel")), "is an external link to other.h5; refused"),
    "all gone": (lambda file: [file.pop(name) for name in list(file)], "arrays do not fit a mini_xcp network"),
}


@pytest.mark.parametrize("damage", ARRAYS)
def test_arrays_that_do_not_fit_are_refused_in_one_line(weights, tiny_network, damage, recwarn):
    change, message = ARRAYS[damage]
    edit(weights, change)
    with pytest.raises(UserError, match=rf"copy\.weights\.h5: .*{message}") as caught:
        model_file.load_weights(tiny_network, weights)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert [warning for warning in recwarn if warning.category is UserWarning] == []


def test_every_array_is_missed(weights, tiny_network):
    """None may keep the random numbers that its layer was made with."""
    names = []
    with h5py.File(weights, "r") as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    data = weights.read_bytes()
    assert len(names) == len(tiny_network.weights)
    for name in names[:: len(names) // 4]:
        weights.write_bytes(data)
        edit(weights, lambda file: file.pop(name))  # noqa: B023 - called at once
        with pytest.raises(UserError, match="arrays do not fit"):
            model_file.load_weights(tiny_network, weights)


def test_each_array_returns_to_its_own_variable(tmp_path):
    network = build(EIGHT)
    for number, weight in enumerate(network.weights):
        weight.assign(np.full(weight.shape, number))
    save_model(tmp_path / "a.weights.h5", network, EIGHT)
    loaded, _ = load_model(tmp_path / "a.weights.h5")
    assert [float(np.ravel(weight)[0]) for weight in loaded.weights] == list(range(len(network.weights)))


def test_an_optimisers_arrays_beside_them_do_no_harm(weights, tiny_network):
    edit(weights, lambda file: file.create_dataset("optimizer/vars/0", data=1.0))
    tiny_network.get_layer("logits").bias.assign(np.full(7, 5.0))
    model_file.load_weights(tiny_network, weights)
    assert not np.any(tiny_network.get_layer("logits").bias == 5.0)


def large(rows, width):
    """An edit: a head of k = 1, d = ``width`` by the description, and kernels of so many rows and columns."""

    def change(file):
        describe(num_embeddings=1, embedding_size=width)(file)
        file.create_dataset("layers/x/vars/0", (rows, width), "f2", compression="gzip")
        file.create_dataset("layers/y/vars/0", (width, 7), "f2", compression="gzip")

    return change


@pytest.mark.parametrize(
    ("rows", "width", "message"),
    [(1, 50_000, r"expected kernels \(128, 50000\) and \(50000, 7\)"), (2, 20_000, "20000")],
)
def test_a_large_head_is_refused_before_it_is_built(weights, monkeypatch, rows, width, message):
    """The file holds rows of that length, but fewer than the backbone has features."""
    edit(weights, large(rows, width))
    monkeypatch.setattr(model_file, "build_network", lambda *_: pytest.fail("built a network"))
    with pytest.raises(UserError, match=rf"copy\.weights\.h5: its arrays do not fit .*{message}"):
        load_model(weights)


def test_a_large_head_that_is_there_is_read(tmp_path):
    described = NetworkDescription("mini_xcp", CLASS_NAMES[:2], 1, 16_400, 16)
    save_model(tmp_path / "a.weights.h5", model_file.build_network(described), ModelInfo(described))
    assert read_info(tmp_path / "a.weights.h5").network.embedding_size == 16_400


def test_no_flipped_bit_of_our_file_gives_other_weights(tiny_weights, tmp_path):
    data, rng = tiny_weights.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(data), 200):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.weights.h5").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.weights\.h5: "):
            read_info(tmp_path / "a.weights.h5")


def test_loading_runs_nothing_of_the_file(weights, monkeypatch):
    """Arrays are read, classes are not made from names: what Keras would build objects with is never called."""
    monkeypatch.setattr(keras.saving, "deserialize_keras_object", lambda *_, **__: pytest.fail("deserialised"))
    edit(weights, describe(metrics={"class_name": "Lambda", "config": {"function": "boom"}}))
    _, info = load_model(weights)
    assert info.metrics["class_name"] == "Lambda"


# What `keras.Model.save` wrote of our own networks


@pytest.fixture(scope="module", params=["run.keras", "compiled.h5"])
def saved(request, tmp_path_factory):
    """A file of `Model.save` and its network, with running statistics as if trained."""
    keras.utils.set_random_seed(1)
    network = model_file.build_network(NetworkDescription("mini_xcp", CLASS_NAMES[:7], 2, 8, 24, logit_scale=5.0))
    for variable in network.variables:
        if variable.dtype == "float32":
            variable.assign(variable + 0.1 * keras.random.uniform(variable.shape, seed=3))
    if request.param.startswith("compiled"):
        network.compile("adam", "mse")
        network.optimizer.build(network.trainable_variables)
    path = tmp_path_factory.mktemp("saved") / request.param
    network.save(path)
    return path, network


def test_networks_of_model_save_come_back_bit_for_bit(saved, monkeypatch):
    """And nothing in the file is deserialised."""
    for owner, name in ((keras.saving, "deserialize_keras_object"), (keras.saving, "load_model")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("made something from the file"))
    path, network = saved
    again, info = load_model(path)
    assert info.network == NetworkDescription("mini_xcp", CLASS_NAMES[:7], 2, 8, 24, "image", 5.0)
    image = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 1), np.uint8)
    for name, values in network(image).items():
        assert np.array_equal(values, again(image)[name])
    assert info.origin.startswith(f"train.py, Keras {keras.__version__} ")


def rewrite(path, target, **members):
    """A copy of a `.keras` archive with members changed; None takes one out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            change = members.get(name.split(".")[0], lambda data: data)
            if change is not None:
                new.writestr(name, change(old.read(name)))
    return target


@pytest.fixture(scope="module")
def archive(tiny_weights, tmp_path_factory):
    network, _ = load_model(tiny_weights)
    path = tmp_path_factory.mktemp("archive") / "run.keras"
    network.save(path)
    return path


def in_config(old, new):
    return {"config": lambda data: data.replace(old, new)}


ARCHIVES = {
    "no configuration": ({"config": None}, "expected a Keras archive with config.json"),
    "no arrays": ({"model": None}, "expected a Keras archive with model.weights.h5"),
    "another network": (in_config(b"embedding_split", b"reshape"), "expected a network that train.py made"),
    "an unknown architecture": (in_config(b'"mini_xcp"', b'"resnext"'), "expected one of mini_xcp.*'resnext'"),
    "a billion units": (
        in_config(b'"target_shape": [2, 8]', b'"target_shape": [1000000000, 8]'),
        "more than the whole",
    ),
    "k in words": (in_config(b'"target_shape": [2, 8]', b'"target_shape": ["2", 8]'), "num_embeddings is '2'"),
    "arrays cut off": ({"model": lambda data: data[:-9]}, "truncated file"),
    "a bomb": ({"model": lambda data: bytes(50_000_000)}, "refused: model.weights.h5 unpacks to 50,000,000 bytes"),
}


@pytest.mark.parametrize("damage", ARCHIVES)
def test_archives_that_were_changed_are_refused(archive, tmp_path, damage):
    members, message = ARCHIVES[damage]
    path = rewrite(archive, tmp_path / "bad.keras", **members)
    with pytest.raises(UserError, match=rf"bad\.keras: .*{message}"):
        load_model(path)


def test_a_lambda_in_an_archive_is_counted_and_ignored(archive, tmp_path):
    extra = b'"layers": [{"class_name": "Lambda", "name": "x", "config": {"function": "boom"}}, '
    path = rewrite(archive, tmp_path / "a.keras", config=lambda data: data.replace(b'"layers": [', extra, 1))
    assert model_file.describe(path)["code"] == "1 Lambda layers, ignored: nothing in them was run"
    load_model(path)


def test_an_archive_with_two_parts_of_one_name_is_refused(archive, tmp_path):
    path = rewrite(archive, tmp_path / "a.keras")
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("model.weights.h5", b"others")
    with pytest.raises(UserError, match=r"a\.keras: .*model\.weights\.h5, found a zip with 2 of that name"):
        load_model(path)


def test_what_is_looked_through_is_what_is_loaded(archive, weights, tmp_path):
    """An HDF5 file whose name says zip, with a zip archive of other weights behind it: Keras would load the zip."""
    edit(weights, lambda file: file[last_kernel(file).name].write_direct(np.full((16, 7), 0.25, np.float32)))
    for name, behind in (("hdf5.keras", b""), ("both.keras", archive.read_bytes())):
        (tmp_path / name).write_bytes(weights.read_bytes() + behind)
        network, _ = load_model(tmp_path / name)
        assert np.all(np.array(network.get_layer("logits").kernel) == 0.25)
    assert zipfile.is_zipfile(tmp_path / "both.keras")


def test_an_archive_cut_off_is_refused(archive, tmp_path):
    data = archive.read_bytes()
    (tmp_path / "a.keras").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.keras: the archive is damaged"):
        load_model(tmp_path / "a.keras")


# What a network is built from


def test_the_properties_in_the_file_are_built_in(tmp_path):
    wanted = dataclasses.replace(EIGHT.network, scaling="unit", logit_scale=4.0)
    save_model(tmp_path / "a.weights.h5", model_file.build_network(wanted), ModelInfo(wanted))
    again, found = load_model(tmp_path / "a.weights.h5")
    assert found.network == wanted and again.get_layer("logit_scale").scale == 4.0
    pixels = again.get_layer("pixel_input")(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
    assert np.min(pixels) == 0 and np.max(pixels) == 1


def test_a_new_network_follows_its_options(monkeypatch):
    options = ModelConfig(num_embeddings=2, embedding_size=8, dropout=0.25, logit_scale=3.0)
    network, described = model_file.new_network(options, CLASS_NAMES[:7])
    assert described == NetworkDescription("mini_xcp", CLASS_NAMES[:7], 2, 8, 48, "image", 3.0)
    assert network.get_layer("dropout").rate == 0.25 and network.get_layer("logit_scale").scale == 3.0
    asked = {}
    monkeypatch.setattr(model_file, "build_network", lambda *args: asked.update(weights=args[1]))
    model_file.new_network(dataclasses.replace(options, arch="xcp", pretrained="imagenet"), CLASS_NAMES)
    assert asked == {"weights": "imagenet"}


def test_a_new_network_starts_from_a_file(tiny_weights, tiny_network):
    options = ModelConfig(num_embeddings=2, embedding_size=8, dropout=0.25, pretrained="imagenet")  # the file wins
    network, described = model_file.new_network(options, tuple("abcdefg"), tiny_weights)
    assert described == NetworkDescription("mini_xcp", tuple("abcdefg"), 2, 8, 24, "image")
    assert network.get_layer("dropout").rate == 0.25
    model_file.load_weights(tiny_network, tiny_weights)
    for found, expected in zip(network.weights, tiny_network.weights, strict=True):
        np.testing.assert_array_equal(found, expected)
    _, larger = model_file.new_network(dataclasses.replace(options, input_size=32), CLASS_NAMES[:7], tiny_weights)
    assert larger.input_size == 32
    for change, message in (
        ({"arch": "resnet"}, "--arch resnet.* found mini_xcp"),
        ({"num_embeddings": 10}, "--num-embeddings 10.* found 2"),
        ({"logit_scale": 4.0}, "--logit-scale 4.0.* found 1.0"),
    ):
        with pytest.raises(UserError, match=rf"tiny\.weights\.h5: .*{message}"):
            model_file.new_network(dataclasses.replace(options, **change), CLASS_NAMES[:7], tiny_weights)
    with pytest.raises(UserError, match=r"tiny\.weights\.h5: .*8 classes.* found one of 7"):
        model_file.new_network(options, CLASS_NAMES, tiny_weights)


def test_describe_lists_the_facts_of_a_file(tiny_weights):
    facts = model_file.describe(tiny_weights)
    assert facts["origin"] == "train.py" and facts["architecture"] == "mini_xcp" and facts["code"] == "none"
    assert facts["embeddings"] == "k = 2 vectors of d = 8" and facts["input"].startswith("24 x 24 px, gray")
    assert facts["classes"] == "7: Neutral, Happy, Sad, Surprise, Fear, Disgust, Anger"
    assert facts["precision"] == "float32"
    assert facts["trained on"] == "synthetic/train" and facts["metrics"] == "split val, accuracy 0.5"
    assert facts["file"] == f"{tiny_weights}, {tiny_weights.stat().st_size:,} bytes"
