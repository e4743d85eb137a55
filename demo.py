"""A page to try a model on photographs and the webcam: ``python demo.py``."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import html
import importlib.metadata
import importlib.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import faces
import runtime
from command_line import Range, parse_options
from config import Backend, preferred_backend
from files import UserError, cache_folder, run_command
from recognition import ImageResult, Recognition
from test_model import DEFAULT_WEIGHTS, TestModels, is_exported

if TYPE_CHECKING:
    import gradio

ROOT = Path(__file__).parent
MODELS = ROOT / "trained_models"
MOST_EXPLAINED = 4  # faces; each takes about a second
_LARGEST_UPLOAD = 25_000_000  # bytes
_MODELS_KEPT = 4
_ENDINGS = (".h5", ".onnx", ".tflite")
_SHOWN_SECONDS = 5.0  # from the use of an upload to its deletion
_CLEANING_SECONDS = 60  # until an upload that no request has used is deleted


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Serves a page to try models on photographs and the webcam."""

    host: str | None = None
    """Address to listen on; None is GRADIO_SERVER_NAME, which a Hugging Face Space sets, or else 127.0.0.1."""
    port: Annotated[int | None, Range(1, 65_535)] = None
    """Port to listen on; None is GRADIO_SERVER_PORT or else the first free one from 7860."""
    weights: str | None = None
    """Model file that is offered first: .h5, .keras, .onnx, .tflite or hf://owner/repository/file."""
    backend: Backend = dataclasses.field(default_factory=preferred_backend)
    """What Keras computes with; an exported file needs no Keras."""
    debug: bool = False
    """Show tracebacks."""


def models_in(folder: str | Path, first: str | None = None) -> dict[str, str]:
    """The models that the page offers: name to model file, the one shown at the start first.

    Args:
        folder: its ``.h5``, ``.onnx`` and ``.tflite`` files are offered.
        first: a model file, or ``hf://...``; None is the project's own.

    Raises:
        UserError: no model at all.
    """
    found = sorted(path for path in Path(folder).glob("*") if path.suffix in _ENDINGS and path.is_file())
    found.sort(key=lambda path: path != DEFAULT_WEIGHTS)
    models = {path.name: str(path) for path in found}
    if first is not None:
        models = {first: first} | {name: path for name, path in models.items() if Path(path) != Path(first).absolute()}
    if not models:
        raise UserError(f"{folder}: no model file ({', '.join(_ENDINGS)}); name one with --weights")
    return models


def detectors() -> list[tuple[str, str]]:
    """The detectors that need nothing from outside: title and name."""
    from faces.yunet import MODEL

    names = ["mtcnn"] if importlib.util.find_spec("mtcnn") else []
    if (cache_folder() / MODEL.name).is_file():
        names.append("yunet")
    return [(f"auto ({faces.open_detector('auto').name})", "auto"), *((name, name) for name in (*names, "haar"))]


@functools.lru_cache(_MODELS_KEPT)
def load(weights: str, detector: faces.DetectorName) -> TestModels:
    """A model with a detector; the last ones stay in memory."""
    if not is_exported(weights):
        runtime.choose_backend(os.environ.get("KERAS_BACKEND", "tensorflow"))
    return TestModels(weights, GPU=is_exported(weights) or runtime.has_gpu(), detector=detector)


def recognized(image: bytes, weights: str, detector: faces.DetectorName) -> Iterator[tuple[str, str]]:
    """What the page shows for an image: first the faces and no explanation, then both.

    Args:
        image: the content of an image file.
        weights: a model file.
        detector: a detector's name.

    Yields:
        HTML of the faces and HTML of the explanation.
    """
    try:
        model = load(weights, detector)
        (result,) = model.recognize([image])
    except UserError as error:  # of the model file
        yield notice("This model cannot be used.", str(error)), ""
        return
    if result.error is not None:
        remedy = "Choose a photograph: JPEG, PNG, WebP, BMP, TIFF or GIF."
        yield notice("This file cannot be read as an image.", remedy), ""
        return
    shown = result_html(result)
    yield shown, ""
    if result.faces:
        yield shown, explanation_html(model, result.faces)


# HTML. Images are part of it, so that none is written to the disk.


def notice(title: str, text: str) -> str:
    return f'<div class="notice" role="status"><strong>{html.escape(title)}</strong><p>{html.escape(text)}</p></div>'


def result_html(result: ImageResult) -> str:
    """The image with its boxes, and for each face the crop, the label and a bar per class."""
    if not result.faces:
        remedy = "Try a photograph in which a face is larger, sharper or more frontal, or another detector."
        above = notice("No face found", remedy)
    else:
        above = f"<p>{len(result.faces)} {'face' if len(result.faces) == 1 else 'faces'} found</p>"
    found = ", ".join(face.text for face in result.faces) or "no face"
    cards = "".join(_face_html(number, face) for number, face in enumerate(result.faces, 1))
    picture = _image_html(result._repr_png_(), f"The image with its faces marked: {found}", "picture")
    return f'<div class="result">{above}{picture}<div class="faces">{cards}</div></div>'


def _face_html(number: int, face: Recognition) -> str:
    rows = []
    for name, value in face.probabilities.items():
        best = ' class="best"' if name == face.label else ""
        bar = f'<span class="track"><span class="bar" style="width:{value:.1%}"></span></span>'
        rows.append(f"<li{best}><span>{html.escape(name)}</span>{bar}<span>{value:.0%}</span></li>")
    crop = _image_html(_png(face.image), f"Face {number}", "crop")
    title = f"<h3>{html.escape(face.label)} <small>{face.probabilities[face.label]:.0%}</small></h3>"
    return f'<section class="face"><header>{crop}{title}</header><ul>{"".join(rows)}</ul></section>'


def explanation_html(model: TestModels, found: Sequence[Recognition]) -> str:
    """Which parts of the faces support their labels; for an exported model why that cannot be shown."""
    try:
        model.check_explains()
    except UserError:
        text = "An exported file has no feature maps. Choose the weights file (.h5) that it was made from."
        return f'<div class="why"><h3>Why this label?</h3><p>{text}</p></div>'
    explanation = model.explain(found[:MOST_EXPLAINED])
    figures = []
    for i, face in enumerate(found[:MOST_EXPLAINED]):
        alt = f"Heat maps over face {i + 1}, {face.label}: one for the label and one for each embedding vector"
        figures.append(
            f'<div class="scroll">{_image_html(explanation.figure_png(i, model.class_names), alt, "figure")}</div>'
        )
    first = "" if len(found) <= MOST_EXPLAINED else f" The first {MOST_EXPLAINED} of {len(found)} faces are shown."
    text = (
        "Yellow regions support the label most (Grad-CAM). The network describes a face by several embedding "
        "vectors. Each vector has its own map. The bars show how much each vector adds to the label's score, "
        f"the logit.{first}"
    )
    return f'<div class="why"><h3>Why this label?</h3><p>{text}</p>{"".join(figures)}</div>'


def _png(pixels: Any) -> bytes:
    import cv2

    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()


def _image_html(png: bytes, alt: str, kind: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img class="{kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


# The page


def build_page(models: Mapping[str, str], examples: Sequence[Path]) -> gradio.Blocks:
    """The page; nothing is served yet.

    Args:
        models: name to model file (`models_in`).
        examples: image files that are offered.
    """
    import gradio as gr

    gr.set_static_paths(list(examples))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_CLEANING_SECONDS, _CLEANING_SECONDS)) as page:
        gr.HTML(_HEAD, padding=False)
        with gr.Row(elem_id="layout"):
            with gr.Column(elem_id="photo"):
                photo = gr.Image(label="Photograph", sources=["upload", "webcam", "clipboard"], height=320)
                # Gradio's own reading answers a file that is no image with a message for programmers. This holds as
                # long as no handler returns an update of the component, for which Gradio makes a new one: hence no
                # gr.Examples, which does.
                photo.preprocess = _take_upload
                shown = gr.Dataset(components=[photo], samples=[[str(path)] for path in examples], label="Examples")
            with gr.Column(elem_id="result"):
                result = gr.HTML(_WAITING, padding=False)
            with gr.Column(elem_id="choice"):
                model = gr.Dropdown(list(models), label="Model")
                detector = gr.Dropdown(detectors(), value="auto", label="Face detector")
        explanation = gr.HTML(padding=False)
        # The browser keeps the image for the next choice of a model; the server keeps nothing.
        kept = gr.Textbox(visible="hidden")
        outputs = [result, explanation]

        def on_choice(image: str, name: str, detector: str) -> Iterator[tuple[str, str]]:
            if not image:
                yield _WAITING, ""
                return
            yield from recognized(base64.b64decode(image), models[name], detector)

        def on_photo(image: bytes | None, name: str, detector: str) -> Iterator[tuple[str, str, str]]:
            text = base64.b64encode(image or b"").decode()
            for shown in on_choice(text, name, detector):
                yield text, *shown

        # One image at a time: detectors and networks are not made for several threads.
        shared: dict[str, Any] = dict(
            concurrency_limit=1, concurrency_id="network", api_visibility="private", show_progress="minimal"
        )
        shown.click(lambda sample: sample[0], shown, photo, api_visibility="private", show_progress="hidden")
        photo.change(on_photo, [photo, model, detector], [kept, *outputs], trigger_mode="always_last", **shared)
        gr.on([model.change, detector.change], on_choice, [kept, model, detector], outputs, **shared)
    return page


def _take_upload(payload: Any) -> bytes | None:
    """The content of an uploaded file, which is soon deleted; an example stays."""
    if payload is None or payload.path is None:
        return None
    path = Path(payload.path)
    content = path.read_bytes()
    if path.is_relative_to(os.environ["GRADIO_TEMP_DIR"]):
        # The browser asks for the image once more, to show it beside the result.
        timer = threading.Timer(_SHOWN_SECONDS, _delete, [path])
        timer.daemon = True
        timer.start()
    return content


def _delete(upload: Path) -> None:
    with contextlib.suppress(OSError):  # the same image came twice
        upload.unlink()
        upload.parent.rmdir()


def draw_example(path: Path) -> None:
    """Draws three people, happy, surprised and disgusted, side by side: a PNG of 960 x 320 pixels."""
    import numpy as np

    from datasets import CLASS_NAMES
    from datasets.shared.drawn_faces import PROTOTYPES, View, draw_face, random_identity

    drawn = []
    for name, seed in (("Happy", 3), ("Surprise", 8), ("Disgust", 6)):
        label = CLASS_NAMES.index(name)
        identity = random_identity(np.random.default_rng((label, seed)))
        drawn.append(draw_face(PROTOTYPES[label][0], identity, View(), 320))
    path.write_bytes(_png(np.concatenate(drawn, axis=1)))


def serve(settings: DemoConfig, folder: Path) -> None:
    """Serves the page until the process is stopped.

    Args:
        settings: the options.
        folder: an empty folder for files that are needed while the page is served.

    Raises:
        UserError: a model file that cannot be used (`TestModels`).
    """
    models = models_in(MODELS, settings.weights)
    os.environ["KERAS_BACKEND"] = settings.backend
    load(next(iter(models.values())), "auto")
    # Read when Gradio is imported.
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio as gr

    drawn = folder / "examples" / "drawn.png"
    drawn.parent.mkdir()
    draw_example(drawn)
    page = build_page(models, [ROOT / "examples" / "astronaut.png", drawn])
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, url, _ = page.queue(max_size=32).launch(
        server_name=settings.host,
        server_port=settings.port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,  # which would keep the images in the browser
        enable_monitoring=False,
        max_file_size=_LARGEST_UPLOAD,
        theme=gr.themes.Soft(primary_hue="blue", neutral_hue="slate", **fonts),
        css=_CSS,
    )
    print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
    threading.Event().wait()


def main() -> None:
    settings = parse_options(DemoConfig)
    _check_gradio()
    # A stopped container or Space leaves no files behind either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="ad-corre-demo-") as folder:
        serve(settings, Path(folder).resolve())


def _check_gradio() -> None:
    remedy = "run: pip install -r requirements-demo.txt"
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"demo.py: gradio, which makes the page, is not installed here; {remedy}")
    version = importlib.metadata.version("gradio")
    if int(version.split(".")[0]) < 6:
        raise UserError(f"demo.py: expected gradio 6 or later, found {version}; {remedy}")


TITLE = "Facial expressions with Ad-Corre"
_HEAD = f"""
<header class="head">
<h1>{TITLE}</h1>
<p>Choose a photograph or use the webcam. The page marks each face, names its expression and shows which parts of the
face support that name. Images are processed on the computer that serves this page. They are not kept.
A model names the look of a face. It does not know what a person feels.</p>
</header>
"""
_WAITING = notice("No image yet", "Upload a photograph, use the webcam, or click an example.")
_CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto; }
#layout { display: grid; gap: 1rem 1.5rem; grid-template: "photo result" "choice result" 1fr / 2fr 3fr; }
#photo { grid-area: photo; } #result { grid-area: result; } #choice { grid-area: choice; }
#photo, #result, #choice { min-width: 0; }
.html-container { padding: 0 !important; }
@media (max-width: 700px) { #layout { grid-template: "photo" "result" "choice" / 1fr; } }
.head h1 { font-size: 1.6rem; font-weight: 650; margin: 0.4rem 0; }
.head p { max-width: 80ch; opacity: 0.8; margin: 0 0 0.6rem; }
.notice { border-left: 4px solid var(--color-accent); border-radius: 6px; padding: 0.8rem 1rem;
  background: var(--background-fill-secondary); }
.notice p { margin: 0.2rem 0 0; }
.result > * + * { margin-top: 0.8rem; }
.picture { display: block; max-width: 100%; max-height: 460px; border-radius: 8px; }
.faces { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); gap: 0.8rem; }
.face { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 0.8rem; }
.face header { display: flex; align-items: center; gap: 0.8rem; margin-bottom: 0.6rem; }
.face h3 { font-size: 1.2rem; font-weight: 650; margin: 0; }
.face small { font-weight: 400; opacity: 0.75; }
.crop { width: 64px; height: 64px; border-radius: 6px; }
.face ul { list-style: none; margin: 0; padding: 0; }
.face li { display: grid; grid-template-columns: 5.2em 1fr 2.6em; gap: 0.5rem; align-items: center; margin: 2px 0; }
.face li > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
.face .best { font-weight: 650; }
.track { display: block; height: 10px; border-radius: 5px; background: var(--border-color-primary); }
.bar { display: block; height: 100%; border-radius: 5px; min-width: 2px; background: #8fb8d4; }
.best .bar { background: #0072b2; }
.why h3 { font-size: 1.2rem; font-weight: 650; margin: 0.4rem 0; }
.why p { max-width: 75ch; }
.scroll { overflow-x: auto; margin-top: 0.8rem; }
.figure { display: block; width: 100%; min-width: 560px; max-width: 900px; border-radius: 8px; }
"""

if __name__ == "__main__":
    raise SystemExit(run_command(main))
