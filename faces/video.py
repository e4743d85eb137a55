"""Reads frames from a clip or a camera, writes a clip, and shows frames in a window."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import images as _images  # noqa: F401 - sets OpenCV's environment before OpenCV is imported  # isort: skip
import cv2
import numpy as np

from files import UserError, whole_file
from images import MAX_PIXELS

# OpenCV reads it when it opens its first clip: FFmpeg's own lines do not mix with our one message.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

# FFmpeg also "plays" text and images, and playlists that name other files: only containers of video are let in.
FORMATS = (
    "apng asf avi dv flv gif h264 hevc ivf m4v matroska mjpeg mov mp4 mpeg mpegts mpegvideo mxf nut obu ogg rm webm wtv"
)
CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
DEFAULT_FPS, MAX_FPS = 30.0, 120.0
MIN_STEADY_FPS = 20.0
# A larger step between two time stamps counts as a damaged one.
MAX_STEP_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame of a video.

    Attributes:
        index: 0, 1, 2, ...
        seconds: since the first frame; strictly increasing.
        image: uint8 (H, W, 3) RGB; the same size for every frame of a video.
    """

    index: int
    seconds: float
    image: np.ndarray


class Video:
    """Frames of an open clip or camera, one in memory at a time; `open_clip` and `open_camera` make it.

    Attributes:
        name: for messages and titles.
        size: width and height in pixels.
        fps: frames per second; the average where the rate varies, 30 where the source does not know it.
        length: number of frames as the container states it; None when it does not.
        is_camera: whether it has no end of its own.
        frames_read: so far.
    """

    def __init__(self, capture: cv2.VideoCapture, name: str, is_camera: bool = False) -> None:
        self._capture, self.name, self.is_camera = capture, name, is_camera
        fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.fps = fps if 0 < fps <= MAX_FPS else DEFAULT_FPS
        self.length = int(count) if not is_camera and 0 < count < 1e9 else None
        self.frames_read = 0
        self._first, self._origin = self._read(), self._stamp()
        self.size = self._first.shape[1::-1] if self._first is not None else (0, 0)

    def __iter__(self) -> Iterator[Frame]:
        image, stamp, seconds = self._first, self._origin, 0.0
        self._first = None
        while image is not None:
            if image.shape[1::-1] != self.size:
                image = cv2.resize(image, self.size, interpolation=cv2.INTER_AREA)
            index, self.frames_read = self.frames_read, self.frames_read + 1
            yield Frame(index, seconds, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
            before, image = stamp, self._read()
            stamp = self._stamp()
            # Containers without time stamps state 0, damaged ones jump: then the frame rate counts.
            step = stamp - before
            seconds += step if 0 < step <= MAX_STEP_SECONDS else 1 / self.fps

    @property
    def steady_fps(self) -> float:
        """A constant rate that keeps the frames' times: `fps`, or the lowest multiple of it from 20 on.

        Where the rate varies, many frames come faster than the average.
        """
        return self.fps * math.ceil(MIN_STEADY_FPS / self.fps)

    @property
    def is_cut_off(self) -> bool:
        """Whether clearly fewer frames were read than the container states; it may be wrong by a few."""
        return self.length is not None and self.frames_read < 0.95 * self.length - 2

    def close(self) -> None:
        self._capture.release()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self) -> np.ndarray | None:
        """The next frame, uint8 (H, W, 3) BGR; None at the end."""
        try:
            is_there, image = self._capture.read()
        except cv2.error:  # a damaged frame that its decoder refuses
            return None
        return image if is_there and image is not None and image.size else None

    def _stamp(self) -> float:
        """Time of the frame that was read last, in seconds; a camera's is the clock's."""
        if self.is_camera:
            return time.monotonic()
        stamp = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        return stamp if math.isfinite(stamp) else 0.0


def open_clip(path: str | Path) -> Video:
    """Opens a video file.

    Raises:
        UserError: a URL; missing, a folder, empty, no video, one without a picture (audio only), or frames of more than
            `images.MAX_PIXELS` pixels.
    """
    if "://" in str(path):
        raise UserError(f"{path}: a URL cannot be opened; download the clip and name the file")
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {found}; expected a video file")
    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty; expected a video")
    refusal = UserError(
        f"{path}: expected a video file with a picture that OpenCV decodes (such as .mp4, .avi, .mov, .mkv, .webm, "
        ".gif), found none: it is damaged, cut off, only sound, or another kind of file; an image goes to "
        "`test.py recognize`"
    )
    with _quiet(), _ffmpeg_options(f"format_whitelist;{FORMATS.replace(' ', ',')}"):
        capture = cv2.VideoCapture(str(path), _backend(cv2.CAP_FFMPEG))
    if not capture.isOpened():
        raise refusal
    width, height = capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
    if width * height > MAX_PIXELS:
        capture.release()
        raise UserError(
            f"{path}: expected frames of at most {MAX_PIXELS:,} pixels, found {width:.0f} x {height:.0f}; make it "
            "smaller first"
        )
    video = Video(capture, path.name)
    if video.size == (0, 0):
        video.close()
        raise refusal
    return video


def open_camera(number: int) -> Video:
    """Opens a camera; 0 is the first one.

    Raises:
        UserError: there is none, another program uses it, or it gives no picture.
    """
    with _quiet():
        capture = cv2.VideoCapture(number)
    if capture.isOpened():
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, not one of half a second ago
        video = Video(capture, f"camera {number}", is_camera=True)
        if video.size != (0, 0):
            return video
    capture.release()
    raise UserError(
        f"--camera {number}: no camera with this number gives a picture; is one connected, free, and allowed for this "
        "program (on Linux: /dev/video*, group video)? A second camera often has the number 1 or 2"
    )


@contextlib.contextmanager
def _ffmpeg_options(options: str) -> Iterator[None]:
    """Options for the clips that are opened in the block; OpenCV takes them from the environment only."""
    name = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
    before = os.environ.get(name)
    os.environ[name] = options
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps OpenCV's own lines away, also where OpenCV was imported before `images` could set its environment."""
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(before)


def _backend(wanted: int) -> int:
    """The wanted backend where this OpenCV has it: the others print lines of their own about damaged files."""
    return wanted if cv2.videoio_registry.hasBackend(wanted) else cv2.CAP_ANY


class Writer:
    """Writes frames at a constant rate; `open_writer` makes it.

    A frame stays until the next one's time, so a varying frame rate keeps its times to half a frame.
    """

    def __init__(self, writer: cv2.VideoWriter, fps: float) -> None:
        self._writer, self._fps = writer, fps
        self._held: np.ndarray | None = None
        self.frames_written = 0

    def write(self, seconds: float, image: np.ndarray) -> None:
        """Takes a frame, uint8 (H, W, 3) RGB of the clip's size, and its time since the first one."""
        self._repeat(round(seconds * self._fps))
        self._held = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)

    def finish(self) -> None:
        self._repeat(self.frames_written + 1)

    def _repeat(self, until: int) -> None:
        if self._held is not None:
            for _ in range(until - self.frames_written):
                self._writer.write(self._held)
                self.frames_written += 1


def check_output(path: str | Path) -> None:
    """Refuses a name of a clip that cannot be written.

    Raises:
        UserError: a suffix that is not one of `CODECS`.
    """
    if Path(path).suffix.lower() not in CODECS:
        raise UserError(f"{path}: expected a name that ends with {', '.join(CODECS)}")


@contextlib.contextmanager
def open_writer(path: str | Path, size: tuple[int, int], fps: float) -> Iterator[Writer]:
    """Yields a writer; the clip is there, whole, when the block ends, and not at all when the block raises.

    Args:
        path: ends with one of `CODECS`; OpenCV writes no sound.
        size: width and height; an odd last column or row is cut off.
        fps: frames per second.

    Raises:
        UserError: another suffix, or OpenCV cannot write such a clip, or not all of it (a full disk).
    """
    check_output(path)
    with whole_file(path) as temporary:
        codec = cv2.VideoWriter_fourcc(*CODECS[Path(path).suffix.lower()])
        opened = cv2.VideoWriter(str(temporary), _backend(cv2.CAP_FFMPEG), codec, fps, size)
        if not opened.isOpened():
            raise UserError(f"{path}: OpenCV cannot write a clip of {size[0]} x {size[1]} pixels there; try .avi")
        writer = Writer(opened, fps)
        try:
            yield writer
            writer.finish()
        finally:
            opened.release()
        # OpenCV reports no failure while it writes.
        check = cv2.VideoCapture(str(temporary), _backend(cv2.CAP_FFMPEG))
        count, is_there = check.get(cv2.CAP_PROP_FRAME_COUNT), check.read()[0]
        check.release()
        if not is_there or count < writer.frames_written:
            raise UserError(f"{path}: the clip could not be written whole; is the disk full?")


# --- window


def has_screen() -> bool:
    """Whether OpenCV can open a window here."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    # Without a screen that answers, Qt ends the whole process: a child process tries.
    code = "import cv2; cv2.namedWindow('?'); cv2.waitKey(1); cv2.destroyAllWindows()"
    try:
        return not subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30).returncode
    except subprocess.TimeoutExpired:
        return False


class Window:
    """A window that shows frames until q, Escape, or its closing."""

    def __init__(self, title: str) -> None:
        os.environ.setdefault("QT_LOGGING_RULES", "*.warning=false")  # notices about missing fonts
        self._title = title
        cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
        self._is_sized = False

    def show(self, image: np.ndarray, wait_ms: int = 1) -> Literal["go on", "end"]:
        """Shows uint8 (H, W, 3) RGB for at least ``wait_ms``; "end" when the user wants no more."""
        if not self._is_sized:
            cv2.resizeWindow(self._title, image.shape[1], image.shape[0])
            self._is_sized = True
        cv2.imshow(self._title, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(wait_ms) & 0xFF
        is_closed = cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1
        return "end" if key in (ord("q"), ord("Q"), 27) or is_closed else "go on"

    def close(self) -> None:
        with contextlib.suppress(cv2.error):  # the user closed it
            cv2.destroyWindow(self._title)
        cv2.waitKey(1)
