"""The page to try a model on, in headless Chromium: labels, messages, what is asked of whom, what is left behind."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, run_python

import demo
from files import UserError

# Reports every connection that the process makes to another machine.
SERVER = """
import sys
def report(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "::1", "localhost"):
        print("CONNECTS", args[1], file=sys.stderr, flush=True)
sys.addaudithook(report)
import demo
from files import run_command
raise SystemExit(run_command(demo.main))
"""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]
CHROMIUM = shutil.which("chromium")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
WAIT_MS = 120_000  # the machine may be busy

needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
needs_gradio = pytest.mark.skipif("gradio" in MISSING, reason="needs gradio")
ASTRONAUT = ROOT / "examples" / "astronaut.png"


# Without a browser


def test_the_projects_own_model_comes_first_and_a_named_one_before_it(tmp_path):
    own = demo.DEFAULT_WEIGHTS.name
    assert next(iter(demo.models_in(demo.MODELS))) == own
    assert list(demo.models_in(demo.MODELS, "hf://a/b/c.h5"))[:2] == ["hf://a/b/c.h5", own]
    for name in ("b.onnx", "a.weights.h5", "a.history.csv"):
        (tmp_path / name).touch()
    assert list(demo.models_in(tmp_path)) == ["a.weights.h5", "b.onnx"]
    assert list(demo.models_in(tmp_path, str(tmp_path / "b.onnx"))) == [str(tmp_path / "b.onnx"), "a.weights.h5"]


def test_no_model_at_all_is_refused(tmp_path):
    with pytest.raises(UserError, match="--weights"):
        demo.models_in(tmp_path)


def test_a_damaged_model_is_a_message_on_the_page(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "<b>.onnx").write_bytes(b"no model")
    ((shown, explanation),) = demo.recognized(ASTRONAUT.read_bytes(), str(tmp_path / "<b>.onnx"), "haar")
    assert "expected an ONNX file" in shown and "&lt;b&gt;" in shown and "<b>" not in shown and explanation == ""


def test_without_gradio_the_command_says_how_to_install_it():
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *rest: None if name == 'gradio' else find(name, *rest); "
        "sys.argv = ['demo.py']; import demo; from files import run_command; sys.exit(run_command(demo.main))"
    )
    done = run_python("-c", code)
    assert done.returncode == 2 and done.stdout == ""
    assert "pip install -r requirements-demo.txt" in done.stderr and len(done.stderr.splitlines()) == 1


@needs_gradio
@pytest.mark.slow
def test_weights_that_do_not_exist_are_refused_before_anything_is_served():
    done = run_python("demo.py", "--weights", "none.weights.h5")
    assert done.returncode == 2 and "none.weights.h5" in done.stderr and "page is at" not in done.stdout


# In a browser


@contextlib.contextmanager
def served(folder: Path, *args):
    """The page, served from an empty folder; yields its address, its log file and its folder for temporary files."""
    work, temporary, log = folder / "work", folder / "temporary", folder / "log.txt"
    work.mkdir()
    temporary.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(temporary),
        "HOME": str(work),
        "AD_CORRE_CACHE": str(work / "cache"),
    }
    environment.pop("GRADIO_SERVER_NAME", None)
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, "--port", str(port), *args],
            cwd=work,
            env=environment,
            stdout=out,
            stderr=out,
        )
    try:
        until = time.monotonic() + WAIT_MS / 1000
        while "page is at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", log, temporary
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """The project's model, exported."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    path = tmp_path_factory.mktemp("exported") / "exported.onnx"
    done = run_python("test.py", "export", "--output", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory, onnx_file):
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}")
    with served(tmp_path_factory.mktemp("demo"), "--weights", str(onnx_file)) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp("browser")
    # The webcam shows the astronaut.
    assert cv2.imwrite(str(folder / "webcam.jpg"), cv2.imread(str(ASTRONAUT)))
    webcam = folder / "webcam.mjpeg"
    (folder / "webcam.jpg").rename(webcam)
    flags = [*FLAGS, f"--use-file-for-fake-video-capture={webcam}"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page, just opened; whatever it asks of another machine fails the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(WAIT_MS)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(server[0])
    page.wait_for_selector(".notice")
    yield page
    page.close()
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {server[0].split("/")[2]}
    assert errors == []


def upload(page, path):
    page.set_input_files("input[type=file]", str(path))


def choose(page, what, name):
    page.get_by_label(what).click()
    page.get_by_role("option", name=name).click()


def labels(page, count=1):
    page.wait_for_function(f"document.querySelectorAll('.face').length == {count}")
    return [text.split()[0] for text in page.locator(".face h3").all_inner_texts()]


@needs_browser
@pytest.mark.slow
def test_a_photograph_gets_its_label_and_a_model_with_weights_its_explanation(page):
    upload(page, ASTRONAUT)
    assert labels(page) == ["Happy"]
    page.wait_for_selector(".why")
    assert "weights file" in page.inner_text(".why") and page.locator(".why img").count() == 0
    assert page.locator(".face li").count() == 7
    bars = page.evaluate("[...document.querySelectorAll('.bar')].map(bar => bar.getBoundingClientRect().width)")
    assert bars.index(max(bars)) == 1
    choose(page, "Model", demo.DEFAULT_WEIGHTS.name)
    page.wait_for_selector(".why img")
    assert labels(page) == ["Happy"]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(page, width, tmp_path):
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("button.gallery-item").nth(1).click()
    assert labels(page, 3) == ["Happy", "Surprise", "Anger"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    shown = cv2.imread(str(tmp_path / "page.png"))
    assert shown.shape[1] == width and shown.std() > 10


@needs_browser
@pytest.mark.slow
def test_what_has_no_face_or_is_no_image_gets_a_message_and_the_page_goes_on(page, server, tmp_path):
    assert cv2.imwrite(str(tmp_path / "wall.png"), np.full((300, 400, 3), 180, np.uint8))
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name, message in (("wall.png", "No face found"), ("broken.png", "cannot be read as an image")):
        upload(page, tmp_path / name)
        page.wait_for_selector(f".notice:has-text('{message}')")
        assert page.locator(".face").count() == 0
        page.get_by_label("Remove Image").click()
        page.wait_for_selector(".notice:has-text('No image yet')")
    upload(page, ASTRONAUT)
    assert labels(page) == ["Happy"]
    assert "Traceback" not in server[1].read_text()


@needs_browser
@pytest.mark.slow
def test_the_webcam(page):
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.get_by_label("capture photo").click()
    assert labels(page) == ["Happy"]


def files_of_the_project() -> set[Path]:
    """Without the hidden folders and caches, where tools and other tests write meanwhile."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
    return {path for path in found if not any(part.startswith(".") or part == "__pycache__" for part in path.parts)}


@needs_browser
@pytest.mark.slow
def test_nothing_is_kept_and_nobody_else_is_asked(page, server):
    _, log, temporary = server
    before = files_of_the_project()
    upload(page, ASTRONAUT)
    labels(page)
    until = time.monotonic() + 60
    while left := [path for path in temporary.rglob("*") if path.is_file() and path.name != "drawn.png"]:
        assert time.monotonic() < until, left
        time.sleep(0.2)
    assert files_of_the_project() == before
    assert [path for path in (temporary.parent / "work").rglob("*") if path.suffix in (".png", ".jpg", ".webp")] == []
    assert "CONNECTS" not in log.read_text()
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0


@needs_browser
@pytest.mark.slow
def test_it_listens_on_this_machine_only_and_leaves_no_files(tmp_path, onnx_file):
    with served(tmp_path, "--weights", str(onnx_file)) as (url, _, temporary):
        port = int(url.rsplit(":", 1)[1])
        table = Path("/proc/net/tcp")
        if table.exists():
            listening = [line.split() for line in table.read_text().splitlines()[1:]]
            assert {row[1] for row in listening if row[3] == "0A" and row[1].endswith(f":{port:04X}")} == {
                f"0100007F:{port:04X}"
            }
        assert list(temporary.iterdir())
    assert list(temporary.iterdir()) == []
