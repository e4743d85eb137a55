"""Model files named hf://...: fetched from a stand-in for the Hub on loopback, checked, never executed."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import pickle
import threading

import numpy as np
import pytest
from conftest import ROOT, run_python, write_split

from files import UserError
from model_files import hub, model_file
from run_identity import identity_of, planned_identity

huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs the package huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "1234567890abcdef1234567890abcdef12345678"
ADDRESS = "hf://somebody/faces/best.weights.h5"


class StandIn(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does: a large file is named by its SHA-256, an error by its code."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.server.asked.append((self.command, self.path))
        if self.path.startswith("/api/"):  # of the library itself, not about a file
            return self.refuse(404, "")
        owner, name, _, revision, file = self.path.lstrip("/").split("/", 4)
        if (owner, name) != ("somebody", "faces"):
            return self.refuse(401, "RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if file not in self.server.files:
            return self.refuse(404, "EntryNotFound")
        content, digest = self.server.files[file]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(**files):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.asked, server.files = [], {}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(tiny_weights, tmp_path, monkeypatch):
    """A stand-in with one model file; this process takes it for the Hub."""
    hub._fetched.cache_clear()
    with serving() as server:
        add(server, "best.weights.h5", tiny_weights.read_bytes())
        endpoint = f"http://127.0.0.1:{server.server_port}"  # as HF_ENDPOINT, which is read at the import
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        pattern = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server
    hub._fetched.cache_clear()


def add(server, name, content, digest=None):
    server.files[name] = content, digest or hashlib.sha256(content).hexdigest()


def refused(address=ADDRESS) -> str:
    with pytest.raises(UserError) as error:
        hub.local_file(address)
    return str(error.value)


def test_a_model_is_fetched_once_and_then_needs_no_network(server, tiny_weights):
    from test_model import TestModels

    faces = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8)
    found = TestModels(ADDRESS, detector="haar").predict(faces)
    for one, expected in zip(found, TestModels(tiny_weights, detector="haar").predict(faces), strict=True):
        np.testing.assert_array_equal(one, expected)
    assert [path for method, path in server.asked if method == "GET" and "/resolve/" in path] == [
        "/somebody/faces/resolve/main/best.weights.h5"
    ]
    server.shutdown()
    server.server_close()
    hub._fetched.cache_clear()
    assert model_file.read_info(ADDRESS).dataset == "synthetic/train"


def test_one_process_uses_one_version(server, tiny_weights):
    """Otherwise a run could start from another file than the one whose digest is its identity."""
    first = hub.local_file(ADDRESS)
    add(server, "best.weights.h5", b"another version")
    assert hub.local_file(ADDRESS) == first and first.read_bytes() == tiny_weights.read_bytes()


def test_a_revision_and_a_subfolder(server, tiny_weights):
    add(server, "runs/a.weights.h5", tiny_weights.read_bytes())
    assert hub.local_file("hf://somebody/faces@v1/runs/a.weights.h5").read_bytes() == tiny_weights.read_bytes()
    assert ("GET", "/somebody/faces/resolve/v1/runs/a.weights.h5") in server.asked


def test_a_run_that_starts_from_it_is_known_by_its_digest(server, tiny_weights, tmp_path):
    from config import TrainConfig

    settings = TrainConfig(weights=ADDRESS, data_dir=str(tmp_path))
    digest = hashlib.sha256(tiny_weights.read_bytes()).hexdigest()
    assert identity_of(settings, _Splits()).digests["weights"] == digest
    assert planned_identity(settings).digests == {"weights": digest}


class _Splits:
    def __getitem__(self, name):
        return self

    digest = "0" * 64


def test_a_path_is_left_alone(server):
    for path in (None, "a.weights.h5", ROOT / "a.h5"):
        assert hub.local_file(path) is path
    assert server.asked == []


@pytest.mark.parametrize(
    ("address", "facts"),
    [
        ("hf://somebody/faces/none.h5", ("somebody/faces", "none.h5")),
        ("hf://somebody/none/a.h5", ("somebody/none", "auth login")),
        ("hf://somebody/faces@v2/best.weights.h5", ("somebody/faces", "v2")),
    ],
)
def test_what_the_hub_does_not_have(server, address, facts):
    message = refused(address)
    assert message.startswith(f"{address}: ") and all(fact in message for fact in facts)


@pytest.mark.parametrize("address", ["hf://best.weights.h5", "hf://somebody/faces", "hf://a/b/", "hf://a//b.h5"])
def test_another_form_is_refused_and_nothing_is_asked(server, address):
    assert "hf://owner/repository/file" in refused(address)
    assert server.asked == []


def test_a_name_that_leaves_the_cache_folder_is_refused(server, tmp_path):
    refused("hf://somebody/faces/../../../../../etc/passwd")
    refused("hf://../../a.h5")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".h5", "")]


def test_no_network(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's attempts
    server.shutdown()
    server.server_close()
    message = refused()
    assert message.startswith(f"{ADDRESS}: ") and "cannot be reached" in message


def test_content_without_the_hubs_digest_is_not_kept(server, tiny_weights, tmp_path):
    content = tiny_weights.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    add(server, "best.weights.h5", content[:-1] + bytes([content[-1] ^ 1]), digest)
    assert digest in refused()
    assert not [path for path in tmp_path.rglob("*") if path.name in (digest, "best.weights.h5")]
    add(server, "best.weights.h5", content)
    assert hub.local_file(ADDRESS).read_bytes() == content


def test_nothing_in_it_is_executed(server, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    add(server, "best.weights.h5", pickle.dumps(Payload()))
    with pytest.raises(UserError, match=r"best\.weights\.h5: expected an HDF5 weights file"):
        model_file.load_model(ADDRESS)
    assert not (tmp_path / "executed").exists()


def test_without_the_package_the_message_says_how_to_install_it(server, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install huggingface_hub" in refused()


def test_an_evaluation_of_it_is_named_after_the_repository(server, tiny_weights, tmp_path):
    from data_helper import open_split
    from evaluation import default_folder

    write_split(tmp_path, np.arange(7), split="val", shape=(24, 24, 1))
    split = open_split(tmp_path, "synthetic", "val")
    folder = default_folder(ADDRESS, split, views="none", seed=0)
    assert folder.name.startswith("evaluate-faces-best-synthetic-val-")
    assert folder.name[-8:] == default_folder(tiny_weights, split, views="none", seed=0).name[-8:]  # the same bytes


@pytest.mark.slow
def test_the_commands_take_it(server, tmp_path, monkeypatch):
    """HF_ENDPOINT names the Hub to a new process."""
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    done = run_python("test.py", "describe", ADDRESS)
    assert done.returncode == 0 and "mini_xcp" in done.stdout, done.stderr
    done = run_python("test.py", "recognize", "examples/astronaut.png", "--weights", "hf://somebody/faces/none.h5")
    assert done.returncode == 2 and "none.h5" in done.stderr and "Traceback" not in done.stderr


def test_the_head_of_the_model_card_has_the_measured_results():
    """The Hub reads the card's head; people read its text."""
    folder = ROOT / "trained_models"
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    measured = {
        "validation": json.loads((folder / "fer2013_mini_xcp.result.json").read_text()),
        "test": json.loads((folder / "fer2013_mini_xcp.private_test.json").read_text())["views"]["none"],
    }
    names = {"accuracy": "accuracy", "recall": "mean_class_recall", "f1": "macro_f1"}
    found = {(each.dataset_split, each.metric_type): each.metric_value for each in card.data.eval_results}
    expected = {
        (split, kind): round(100 * measured[split][name], 2) for split in measured for kind, name in names.items()
    }
    assert found == expected
    assert all(f"{value:.2f}%" in card.text for value in found.values())
    assert card.data.license == "mit" and set(card.data.metrics) == set(names)


def test_the_card_names_the_file_and_its_calibration():
    path = ROOT / "trained_models" / "fer2013_mini_xcp.weights.h5"
    text, network = (path.parent / "README.md").read_text(), model_file.read_info(path).network
    assert f"{path.stat().st_size:,} bytes" in text
    assert f"temperature {network.temperature:.3f}, exponent {network.exponent:.3f}" in text
