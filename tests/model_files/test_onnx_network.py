"""An ONNX file recognises without Keras; one that is not ours is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
from conftest import run_python

from files import UserError
from model_files.description import ATTRIBUTE, ExportInfo, NetworkDescription, to_json
from model_files.onnx_network import OnnxNetwork

NETWORK = NetworkDescription("toy", ("Dark", "Bright"), 1, 3, 2)
INFO = ExportInfo(NETWORK, "toy/train", "a test")
ONNX_HERE = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not ONNX_HERE, reason="pip install -r requirements-export.txt")


def write_toy(path, info: str | None = to_json(INFO), input_name="pixels", outputs=("probabilities", "embeddings")):
    """Probabilities softmax(-m, m) of the red mean m, embeddings (1, 3) the mean of each channel, all over 255."""
    from onnx import TensorProto, checker, helper, save

    def values(name, array):
        array = np.array(array, np.float32)
        return helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.ravel())

    nodes = [
        helper.make_node("Div", [input_name, "scale"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Reshape", ["mean", "shape"], [outputs[1]]),
        helper.make_node("MatMul", ["mean", "red"], ["logits"]),
        helper.make_node("Softmax", ["logits"], [outputs[0]], axis=1),
    ]
    constants = [values("scale", 255.0), values("red", [[-1, 1], [0, 0], [0, 0]])]
    constants.append(helper.make_tensor("shape", TensorProto.INT64, [3], [-1, 1, 3]))
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["N", 2, 2, 3])],
        [
            helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, ["N", 2]),
            helper.make_tensor_value_info(outputs[1], TensorProto.FLOAT, ["N", 1, 3]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    if info is not None:
        helper.set_model_props(model, {ATTRIBUTE: info})
    checker.check_model(model)
    save(model, path)
    return path


@needs_onnx
@pytest.mark.parametrize("batch_size", [2, 64])
def test_every_image_is_predicted_whatever_the_batch(tmp_path, batch_size):
    network = OnnxNetwork(write_toy(tmp_path / "toy.onnx"), gpu=False)
    assert network.info == INFO
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 3), np.uint8)
    probabilities, embeddings = network.predict(images, batch_size)
    assert probabilities.dtype == embeddings.dtype == np.float32
    for image, found, embedding in zip(images, probabilities, embeddings, strict=True):
        mean = [sum(float(image[y, x, c]) for y in range(2) for x in range(2)) / 4 / 255 for c in range(3)]
        dark = 1 / (1 + np.exp(2 * mean[0]))
        np.testing.assert_allclose(found, [dark, 1 - dark], rtol=1e-5)
        np.testing.assert_allclose(embedding, [mean], rtol=1e-5)


@needs_onnx
def test_no_batch_size_is_refused(tmp_path):
    network = OnnxNetwork(write_toy(tmp_path / "toy.onnx"))
    with pytest.raises(UserError, match=r"batch_size: .*received 0"):
        network.predict(np.zeros((1, 2, 2, 3), np.uint8), 0)


@needs_onnx
def test_what_is_none_of_our_files_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("Dear Sir or Madam")
    whole = write_toy(tmp_path / "toy.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "cut"):
        with pytest.raises(UserError, match=rf"{name}\.onnx: expected an ONNX file"):
            OnnxNetwork(tmp_path / f"{name}.onnx")
    with pytest.raises(UserError, match=r"a\.onnx: no description .*expected a file that `python test\.py export`"):
        OnnxNetwork(write_toy(tmp_path / "a.onnx", info=None))
    others = ({"input_size": 3}, {"class_names": ("a", "b", "c")}, {"num_embeddings": 2})
    infos = [{"info": to_json(ExportInfo(dataclasses.replace(NETWORK, **other)))} for other in others]
    for wrong in ({"input_name": "image"}, {"outputs": ("p", "e")}, *infos):
        with pytest.raises(UserError, match=r"b\.onnx: expected pixels \(N, \d, \d, 3\) in, .*, found "):
            OnnxNetwork(write_toy(tmp_path / "b.onnx", **wrong))


@needs_onnx
def test_an_older_export_without_k_and_d_takes_them_from_its_outputs(tmp_path):
    old = {
        "format_version": 1,
        "class_names": ["Dark", "Bright"],
        "input_size": 2,
        "arch": "toy",
        "dataset": "toy/train",
    }
    network = OnnxNetwork(write_toy(tmp_path / "old.onnx", info=json.dumps({**old, "origin": "a test"})))
    assert network.info == INFO


@needs_onnx
def test_the_runtime_sends_nothing_about_its_use(tmp_path, monkeypatch):
    """Its telemetry begins with a session file in the folder for temporary files."""
    write_toy(tmp_path / "toy.onnx")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    code = "import sys; from model_files.onnx_network import OnnxNetwork; OnnxNetwork(sys.argv[1], gpu=False)"
    done = run_python("-c", code, tmp_path / "toy.onnx")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "temporary").iterdir()) == []
