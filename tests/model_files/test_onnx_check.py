"""An ONNX file that is no classifier, never ends or takes all memory is one message; nothing outside is read."""

from __future__ import annotations

import resource

import numpy as np
import pytest
from test_onnx_network import INFO, needs_onnx

from files import UserError
from model_files import onnx_check
from model_files.description import ATTRIBUTE, to_json
from model_files.onnx_network import OnnxNetwork


def write_graph(path, *texts, outputs="float[N, 2] probabilities, float[N, 1, 3] embeddings", constants=()):
    """An ONNX file from lines in ONNX's own text form, which begin from ``mean``, float (N, 3)."""
    import onnx
    from onnx import helper, parser

    body = "\n".join(texts)
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 13]>
        toy (float[N, 2, 2, 3] pixels) => ({outputs}) {{
            mean = ReduceMean <axes = [1, 2], keepdims = 0> (pixels)
            shape = Constant <value = int64[3] {{-1, 1, 3}}> ()
            {body}
        }}"""
    )
    model.graph.initializer.extend(constants)
    helper.set_model_props(model, {ATTRIBUTE: to_json(INFO)})
    onnx.save(model, path)
    return path


TWO = "two = Slice (mean, zero, end, one)"
NUMBERS = (
    "zero = Constant <value = int64[1] {0}> ()",
    "one = Constant <value = int64[1] {1}> ()",
    "end = Constant <value = int64[1] {2}> ()",
    TWO,
    "e = Reshape (mean, shape)",
)
EMBED = "embeddings = Identity (e)"
LOOP = """
    forever = Constant <value = int64[1] {9223372036854775807}> ()
    true = Constant <value = bool {1}> ()
    looped = Loop (forever, true, soft) <body = body (int64 i, bool go, float[N, 2] x) => (bool more, float[N, 2] y) {
        more = Identity (go)
        y = Identity (x)
    }>
    probabilities = Identity (looped)
"""
SOFT = "soft = Softmax <axis = 1> (two)"
NONE = ("half = Sub (soft, soft)", "none = Div (half, half)")  # 0 / 0
LARGE = (
    "size = Constant <value = int64[2] {40000, 40000}> ()",
    "zeros = ConstantOfShape (size)",
    "sum = ReduceSum <keepdims = 0> (zeros)",
    "probabilities = Add (soft, sum)",
)
CASES = {
    "logits": (("probabilities = Identity (two)", EMBED), "the sum 1, as after a softmax"),
    "NaN": ((*NONE, "probabilities = Add (none, soft)", EMBED), "probabilities: expected finite"),
    "infinite embeddings": (
        ("probabilities = Identity (soft)", "none = Sub (e, e)", "embeddings = Div (e, none)"),
        "embeddings: expected finite",
    ),
    "one row": (("probabilities = ReduceMean <axes = [0], keepdims = 1> (soft)", EMBED), "3 rows for 3 images"),
    "no end": ((LOOP, EMBED), "runs for 2 s"),
    "a large constant": ((*LARGE, EMBED), "cannot be used"),
}


@needs_onnx
@pytest.mark.parametrize("case", CASES)
def test_a_network_that_is_no_classifier_is_refused(tmp_path, monkeypatch, case):
    texts, message = CASES[case]
    monkeypatch.setattr(onnx_check, "SECONDS", 2)
    path = write_graph(tmp_path / "bad.onnx", *NUMBERS, SOFT, *texts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"(?s)bad\.onnx: .*{message}"):
        OnnxNetwork(path, gpu=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@needs_onnx
@pytest.mark.parametrize("kind", ["int64", "string"])
def test_outputs_of_another_type_are_refused(tmp_path, kind):
    to = {"int64": 7, "string": 8}[kind]
    texts = (*NUMBERS, SOFT, f"probabilities = Cast <to = {to}> (soft)", EMBED)
    path = write_graph(tmp_path / "bad.onnx", *texts, outputs=f"{kind}[N, 2] probabilities, float[N, 1, 3] embeddings")
    with pytest.raises(UserError, match=r"bad\.onnx: .*probabilities: expected float32"):
        OnnxNetwork(path, gpu=False)


@needs_onnx
def test_data_outside_of_the_file_is_refused(tmp_path, monkeypatch):
    from onnx import TensorProto

    outside = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[1, 2])
    outside.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "secret.bin", "offset": "0", "length": "8"}.items():
        outside.external_data.add(key=key, value=value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(np.zeros(2, np.float32).tobytes())
    texts = (*NUMBERS, "sum = Add (two, outside)", "probabilities = Softmax <axis = 1> (sum)", EMBED)
    path = write_graph(tmp_path / "bad.onnx", *texts, constants=[outside])
    with pytest.raises(UserError, match=r"bad\.onnx: .*weights in another file"):
        OnnxNetwork(path, gpu=False)


@needs_onnx
def test_outputs_are_checked_at_every_call(tmp_path):
    """NaN only where a pixel is 255: the first try does not see it."""
    texts = ("x = Constant <value = float {255.0}> ()", "d = Sub (two, x)", "q = Div (d, d)", "p = Mul (q, soft)")
    path = write_graph(tmp_path / "late.onnx", *NUMBERS, SOFT, *texts, "probabilities = Identity (p)", EMBED)
    network = OnnxNetwork(path, gpu=False)
    with pytest.raises(UserError, match=r"late\.onnx: probabilities: expected finite numbers"):
        network.predict(np.full((1, 2, 2, 3), 255, np.uint8))
