"""The command ``test.py video``, and `recognize_video` for Python: expressions in a clip or in front of a camera."""

from __future__ import annotations

import contextlib
import csv as csv_module
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro
from tqdm import tqdm

import runtime
from command_line import Range
from config import Backend, preferred_backend
from faces import Detector, DetectorName, crop, pixel_square
from files import UserError, whole_file
from reading.text import csv_cell, printable

if TYPE_CHECKING:
    from faces.timeline import Timeline
    from faces.video import Frame, Video, Window
    from test_model import TestModels


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """Follows the faces in a video file or of a camera, and names their expressions in every frame.

    Ctrl-C, or q in the window, ends it; what was written so far is finished and stays.
    """

    clip: Annotated[str | None, tyro.conf.Positional] = None
    """Video file, such as clip.mp4."""
    camera: Annotated[int | None, Range(0, 10_000)] = None
    """Number of a camera, instead of a file: 0 is the first one. It is shown in a window."""
    output: str | None = None
    """Clip to write, with boxes, labels and bars: .mp4, .mov, .mkv or .avi, without sound."""
    csv: str | None = None
    """Table to write, one row per frame and face."""
    timeline: str | None = None
    """PNG to write, one band per person, coloured by expression."""
    weights: str | None = None
    """Model file, hf://owner/repo/file.weights.h5 or an exported .onnx or .tflite; None is the project's own model."""
    detector: DetectorName = "auto"
    """auto is mtcnn where its package is installed, else haar."""
    detector_file: str | None = None
    """Model file of yunet."""
    detect_every: Annotated[int, Range(1, 1_000_000)] = 5
    """The detector runs on every n-th frame; the faces are followed in between."""
    smooth: Annotated[float, Range(0, 60)] = 0.3
    """Seconds over which each person's probabilities are averaged (exponentially); 0 does not."""
    seconds: Annotated[float | None, Range(0.001, 1_000_000)] = None
    """End after so many seconds of video; None goes to its end."""
    show: bool = False
    """Show a clip in a window too."""
    backend: Backend = dataclasses.field(default_factory=preferred_backend)
    """What Keras computes with; an exported file needs no Keras."""
    debug: bool = False
    """Show tracebacks."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One person in one frame.

    Attributes:
        identity: 1, 2, ... (`faces.tracking`).
        box: x, y, width, height of the square that the network saw, in pixels; it may reach over the border.
        score: of the last detection, on the detector's scale (`faces.Face`).
        detected: whether the detector found the face in this frame; otherwise its box was carried here.
        code: the most probable class.
        probabilities: float (C,), smoothed over time.
    """

    identity: int
    box: tuple[int, int, int, int]
    score: float
    detected: bool
    code: int
    probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class VideoResult:
    """What was seen in a video.

    Attributes:
        timeline: who was seen when, with which label.
        frames: how many were recognised.
        detections: on how many of them the detector ran.
        wall_seconds: how long it took.
        cut_off: whether clearly fewer frames could be read than the file states.
        interrupted: whether Ctrl-C ended it.
    """

    timeline: Timeline
    frames: int
    detections: int
    wall_seconds: float
    cut_off: bool = False
    interrupted: bool = False

    def __repr__(self) -> str:
        lines = [_person_line(person, self.timeline.class_names) for person in self.timeline.people()]
        return "\n".join(lines or ["no face found"])


def recognize_video(
    model: TestModels,
    video: Video | str | Path,
    detector: Detector | None = None,
    *,
    output: str | Path | None = None,
    csv: str | Path | None = None,
    timeline: str | Path | None = None,
    detect_every: int = 5,
    smooth: float = 0.3,
    seconds: float | None = None,
    window: Window | None = None,
) -> VideoResult:
    """Follows the faces in a video and recognises their expressions in every frame.

    One frame is in memory at a time. Ctrl-C ends the video; what was written so far is finished.

    Args:
        model: recognises the faces.
        video: a path, or an open clip or camera (`faces.video`), which is closed at the end.
        detector: None is the model's.
        output: clip to write, with boxes, labels and bars drawn.
        csv: table to write, one row per frame and face.
        timeline: PNG to write, one band per person.
        detect_every: the detector runs on every n-th frame.
        smooth: time constant in seconds of the mean of each person's probabilities; 0 is no mean.
        seconds: end after so many seconds of video, above 0.
        window: where the frames are shown; it may end the video.

    Raises:
        UserError: see `faces.video.open_clip` and `faces.video.open_writer`; an output that is the clip itself; or no
            seconds.
    """
    from faces.timeline import Timeline
    from faces.tracking import Tracker
    from faces.video import check_output, open_clip

    if seconds is not None and not seconds > 0:
        raise UserError(f"seconds: expected a number above 0, received {seconds}")
    _check_outputs(None if not isinstance(video, (str, Path)) else video, output, csv, timeline)
    if output is not None:
        check_output(output)
    video = open_clip(video) if isinstance(video, (str, Path)) else video
    detector = detector or model.detector
    tracker = Tracker(detector.detect, detector.certain, detect_every)
    sums = Timeline(model.class_names)
    frames, start, interrupted = 0, time.monotonic(), False
    with video, contextlib.ExitStack() as outputs:
        takers = _open_outputs(outputs, video, model.class_names, output, csv, window)
        try:
            for frame, end, people in _watch(video, model, tracker, smooth, seconds):
                sums.add(frame.seconds, end, {person.identity: person.code for person in people})
                frames += 1
                if not all([take(frame, people) for take in takers]):
                    break
        except KeyboardInterrupt:
            interrupted = True
            if not sums.end:
                raise  # nothing to finish: no file is left
    cut_off = not interrupted and seconds is None and window is None and video.is_cut_off
    if timeline is not None:
        sums.save(timeline, video.name)
    elapsed = time.monotonic() - start
    return VideoResult(sums, frames, tracker.detections, elapsed, cut_off, interrupted)


def _watch(
    video: Video, model: TestModels, tracker, smooth: float, seconds: float | None
) -> Iterator[tuple[Frame, float, list[Seen]]]:
    """Each frame with its end in seconds and the people in it."""
    total = video.length if seconds is None else None
    is_watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    step = 1 / video.fps
    with tqdm(total=total, unit="frame", desc=video.name, delay=1, leave=False, disable=not is_watched) as bar:
        before = 0.0
        for frame in video:
            if seconds is not None and frame.seconds >= seconds:
                return
            step = frame.seconds - before or step
            before = frame.seconds
            yield frame, frame.seconds + step, _recognize(model, tracker, frame, smooth)
            bar.update()


def _recognize(model: TestModels, tracker, frame: Frame, smooth: float) -> list[Seen]:
    tracks = tracker.update(frame.image, frame.seconds)
    if not tracks:
        return []
    probabilities, _ = model.predict([crop(frame.image, track.face) for track in tracks])
    people = []
    for track, new in zip(tracks, probabilities, strict=True):
        smoothed = track.smooth(new, frame.seconds, smooth)
        x, y, side = pixel_square(track.face)
        code = int(np.argmax(smoothed))
        people.append(Seen(track.identity, (x, y, side, side), track.face.score, track.detected, code, smoothed))
    return people


# --- outputs: each takes a frame and its people, and answers whether to go on


def _open_outputs(
    stack: contextlib.ExitStack,
    video: Video,
    class_names: Sequence[str],
    output: str | Path | None,
    csv: str | Path | None,
    window: Window | None,
) -> list[Callable[[Frame, list[Seen]], bool]]:
    from faces.video import open_writer

    takers = []
    if csv is not None:
        takers.append(stack.enter_context(_table(csv, class_names)))
    if output is None and window is None:
        return takers
    takers.append(_drawer(class_names))  # in place: what comes after it gets the drawn frame
    if output is not None:
        writer = stack.enter_context(open_writer(output, video.size, video.steady_fps))
        takers.append(lambda frame, people: writer.write(frame.seconds, frame.image) is None)
    if window is not None:
        start = time.monotonic()

        def show(frame: Frame, people: list[Seen]) -> bool:
            early = 0.0 if video.is_camera else frame.seconds - (time.monotonic() - start)
            return window.show(frame.image, max(1, round(1000 * early))) == "go on"

        takers.append(show)
    return takers


@contextlib.contextmanager
def _table(path: str | Path, class_names: Sequence[str]) -> Iterator[Callable[[Frame, list[Seen]], bool]]:
    """Writes one row per frame and face; the file is there, whole, when the block ends."""
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = csv_module.writer(file)
        columns = ("time", "frame", "identity", "x", "y", "width", "height", "score", "detected", "label")
        rows.writerow([*columns, *map(csv_cell, class_names)])

        def take(frame: Frame, people: list[Seen]) -> bool:
            for person in people:
                facts = (f"{person.score:.4g}", int(person.detected), csv_cell(class_names[person.code]))
                values = (f"{value:.4f}" for value in person.probabilities)
                rows.writerow([f"{frame.seconds:.3f}", frame.index, person.identity, *person.box, *facts, *values])
            return True

        yield take


def _drawer(class_names: Sequence[str]) -> Callable[[Frame, list[Seen]], bool]:
    from faces.drawing import Drawn, draw
    from plots import COLORS

    def take(frame: Frame, people: list[Seen]) -> bool:
        drawn = []
        for person in people:
            text = f"{person.identity} {class_names[person.code]} {person.probabilities[person.code]:.0%}"
            drawn.append(Drawn(person.box, text, person.code, [*zip(class_names, person.probabilities, strict=True)]))
        draw(frame.image, drawn, COLORS)
        return True

    return take


def _check_outputs(
    clip: str | Path | None, output: str | Path | None, csv: str | Path | None, timeline: str | Path | None
) -> None:
    given = {name: Path(p) for name, p in (("output", output), ("csv", csv), ("timeline", timeline)) if p is not None}
    for name, path in given.items():
        if clip is not None and path.exists() and Path(clip).exists() and path.samefile(clip):
            raise UserError(f"--{name} {path}: this is the clip itself; name another file")
    if len({path.absolute() for path in given.values()}) < len(given):
        raise UserError("--output, --csv, --timeline: expected different files, received the same one twice")
    if timeline is not None and Path(timeline).suffix.lower() != ".png":
        raise UserError(f"--timeline {timeline}: expected a name that ends with .png")


# --- the command


def video(settings: VideoConfig) -> None:
    """Prints who was seen when with which expressions, and writes what the options name.

    Raises:
        UserError: neither a clip nor a camera, or both; no screen and nothing to write; see `recognize_video`.
        KeyboardInterrupt: after everything was finished, when Ctrl-C ended a clip.
    """
    from faces.video import Window, check_output, open_camera, open_clip
    from test_model import TestModels, is_exported

    if (settings.clip is None) == (settings.camera is None):
        raise UserError("video: expected a video file or --camera 0, received " + ("both" if settings.clip else "none"))
    _check_outputs(settings.clip, settings.output, settings.csv, settings.timeline)
    if settings.output is not None:
        check_output(settings.output)
    source = open_clip(settings.clip) if settings.clip is not None else open_camera(settings.camera)
    with source:
        is_shown = _may_show(settings)
        if not is_exported(settings.weights):
            runtime.choose_backend(settings.backend)
        model = TestModels(
            settings.weights,
            GPU=is_exported(settings.weights) or runtime.has_gpu(),
            detector=settings.detector,
            detector_file=settings.detector_file,
        )
        window = Window(f"{source.name} (q ends)") if is_shown else None
        try:
            result = recognize_video(
                model,
                source,
                model.detector,
                output=settings.output,
                csv=settings.csv,
                timeline=settings.timeline,
                detect_every=settings.detect_every,
                smooth=settings.smooth,
                seconds=settings.seconds,
                window=window,
            )
        finally:
            if window is not None:
                window.close()
    _print(result, source, [settings.output, settings.csv, settings.timeline])
    if result.interrupted and not source.is_camera:  # a camera has no other end
        raise KeyboardInterrupt


def _may_show(settings: VideoConfig) -> bool:
    """Whether a window is wanted and possible."""
    from faces.video import has_screen

    if not settings.show and settings.camera is None:
        return False
    if has_screen():
        return True
    if settings.clip is None and not (settings.output or settings.csv or settings.timeline):
        raise UserError(
            f"--camera {settings.camera}: there is no screen here for its window, and nothing to write; "
            "add --output, --csv or --timeline"
        )
    end = "; Ctrl-C ends the camera" if settings.clip is None else ""
    print(f"no screen here: no window is shown{end}", file=sys.stderr)
    return False


def _print(result: VideoResult, source: Video, written: Sequence[str | None]) -> None:
    from faces.timeline import clock

    print(f"{'person':<8}{'from':>9}{'to':>9}{'seen':>9}  expressions" if result.timeline.people() else "no face found")
    for person in result.timeline.people():
        print(_person_line(person, result.timeline.class_names))
    if result.timeline.people_left_out:
        print(f"... and {result.timeline.people_left_out} more, seen for a shorter time")
    rate = result.frames / max(result.wall_seconds, 1e-6)
    print(
        f"\n{result.frames:,} frames, {clock(result.timeline.end)} of video, in {clock(result.wall_seconds)} "
        f"({rate:.0f} frames/s); the detector ran on {result.detections:,} of them"
    )
    if result.cut_off:
        print(
            f"note: {printable(source.name)} states {source.length:,} frames, and {result.frames:,} could be read; "
            "it may be damaged or cut off",
            file=sys.stderr,
        )
    if any(written):
        print(printable("wrote " + ", ".join(name for name in written if name)))


def _person_line(person, class_names: Sequence[str]) -> str:
    from faces.timeline import clock

    order = np.argsort(-person.shares, kind="stable")[:3]
    shares = ", ".join(f"{class_names[code]} {person.shares[code]:.0%}" for code in order if person.shares[code] > 0)
    times = "".join(f"{clock(value):>9}" for value in (person.first, person.last, person.seconds))
    return f"{person.identity:<8}{times}  {shares}"
