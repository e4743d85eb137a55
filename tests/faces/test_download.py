"""Fetching a model file: checked, whole or not at all, from a server on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import threading

import pytest

from faces.download import ModelFile, fetch
from files import UserError

CONTENT = bytes(range(256)) * 40


@contextlib.contextmanager
def serving(content, claimed=None):
    """A server that sends ``content`` for every path; yields its address and the paths that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(claimed or len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/model.onnx", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AD_CORRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model(url):
    return ModelFile("model.onnx", url, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def test_fetched_once(cache, capsys):
    with serving(CONTENT) as (url, asked):
        path = fetch(model(url), "--detector-file")
        assert path == cache / "model.onnx" and path.read_bytes() == CONTENT
        assert "model.onnx" in capsys.readouterr().err
        assert fetch(model(url), "--detector-file") == path
        assert asked == ["/model.onnx"] and capsys.readouterr().err == ""
        path.write_bytes(CONTENT[:-1])  # damaged since
        assert fetch(model(url), "--detector-file").read_bytes() == CONTENT and len(asked) == 2


@pytest.mark.parametrize(
    "content", [CONTENT[:-1] + b"x", CONTENT + b"x", b"version https://git-lfs.github.com/spec/v1"]
)
def test_another_file_is_not_kept(cache, content):
    with serving(content) as (url, _), pytest.raises(UserError) as error:
        fetch(model(url), "--detector-file")
    assert model(url).sha256 in str(error.value) and "--detector-file" in str(error.value)
    assert list(cache.iterdir()) == []


def test_cut_off_or_missing(cache):
    for content, claimed in ((CONTENT[:100], len(CONTENT)), (None, None)):
        with serving(content, claimed) as (url, _), pytest.raises(UserError, match=r"--detector-file"):
            fetch(model(url), "--detector-file")
        assert list(cache.iterdir()) == []
    closed = dataclasses.replace(model(url), url=url)  # that server is gone
    with pytest.raises(UserError, match=r"127\.0\.0\.1"):
        fetch(closed, "--detector-file")
