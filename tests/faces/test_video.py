"""Reading, drawing, summing up and writing clips that are drawn here, and the command ``test.py video`` on them."""

from __future__ import annotations

import csv
import io
import os
import resource
import shutil
import subprocess
import sys
import wave
import weakref

import cv2
import numpy as np
import pytest
from conftest import ROOT, run_python
from PIL import Image

import faces
import test as test_module
from faces import drawing, video
from faces.face import Face
from faces.timeline import BINS, MAX_PEOPLE, Timeline
from files import UserError
from images import read_image
from plots import COLORS
from recognition.video_command import recognize_video

RED, BLUE = (200, 30, 40), (30, 60, 210)
NAMES = ("Calm", "Glad", "Cross")
WIDTH, HEIGHT = 160, 120


def square_at(x, color=RED):
    """A frame with a face that `FakeDetector` finds: a square of 40 pixels."""
    image = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    image[40:80, x : x + 40] = color
    image[50:56, x + 8 : x + 14] = image[50:56, x + 26 : x + 32] = 250
    return image


def write_clip(path, images, fps=25, codec="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, images[0].shape[1::-1])
    assert writer.isOpened()
    for image in images:
        writer.write(image[..., ::-1])
    writer.release()
    return path


def read_clip(path):
    """Frames as the other side reads them, uint8 (N, H, W, 3) RGB, and the frame rate."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    return np.array(frames), capture.get(cv2.CAP_PROP_FPS)


class FakeDetector:
    """Finds the square of `square_at`, in RGB."""

    name, certain = "fake", 0.5

    def detect(self, image):
        away = np.abs(image.astype(int) - 120).max(axis=2) > 60
        x, y, w, h = cv2.boundingRect(away.astype(np.uint8))
        return [Face((float(x), float(y), float(w), float(h)), 0.9, None, "fake")] if w > 10 else []


class FakeModel:
    """Red faces are Cross, blue ones Glad; ``on_call`` is called with the number of the call."""

    class_names = NAMES

    def __init__(self, on_call=None):
        self.calls, self.on_call = 0, on_call

    def predict(self, images):
        self.calls += 1
        if self.on_call:
            self.on_call(self.calls)
        means = np.array([image.mean(axis=(0, 1)) for image in images])
        glad = (means[:, 2] > means[:, 0]).astype(np.float32)
        return np.stack([0.1 + 0 * glad, 0.1 + 0.7 * glad, 0.8 - 0.7 * glad], axis=1), None


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """40 frames at 25 frames/s: red for the first half, then blue; it moves to the right."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_clip(path, [square_at(20 + 2 * i, RED if i < 20 else BLUE) for i in range(40)])


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- reading


def test_frames_are_rgb_with_their_times(clip):
    with video.open_clip(clip) as opened:
        assert (opened.size, opened.fps, opened.length, opened.name) == ((WIDTH, HEIGHT), 25, 40, "clip.mp4")
        frames = list(opened)
    assert [frame.index for frame in frames] == list(range(40)) and not opened.is_cut_off
    np.testing.assert_allclose([frame.seconds for frame in frames], np.arange(40) / 25, atol=1e-6)
    np.testing.assert_allclose(frames[0].image[60, 50], RED, atol=12)


def test_varying_frame_rate_keeps_its_times(tmp_path):
    """A GIF's frames last as long as it states; written at a constant rate they still do."""
    times = [0.0, 0.1, 0.4, 0.46, 1.16]
    shots = [Image.fromarray(square_at(20 + 20 * i)) for i in range(5)]
    lasting = [100, 300, 60, 700, 100]
    shots[0].save(tmp_path / "a.gif", save_all=True, append_images=shots[1:], duration=lasting)
    recognize_video(
        FakeModel(),
        tmp_path / "a.gif",
        FakeDetector(),
        csv=tmp_path / "a.csv",
        output=tmp_path / "a.mp4",
        detect_every=1,
    )
    rows = rows_of(tmp_path / "a.csv")
    np.testing.assert_allclose([float(row["time"]) for row in rows], times, atol=1e-3)
    frames, fps = read_clip(tmp_path / "a.mp4")
    left = [int(np.argmax((frame[70, :, 0] > 150) & (frame[70, :, 1] < 90))) for frame in frames]  # its first red pixel
    for second, row in zip(times, rows, strict=True):
        assert left[round(second * fps)] == pytest.approx(int(row["x"]), abs=3)
    assert fps >= 20 and len(frames) == round(times[-1] * fps) + 1


def test_time_stamps_that_stand_still_or_jump_are_replaced_by_the_frame_rate(monkeypatch, clip):
    stamps = iter([5.0, 5.04, 5.04, 4.0, 1e9, *1e9 + np.arange(1, 40) / 25])
    monkeypatch.setattr(video.Video, "_stamp", lambda self: next(stamps))
    with video.open_clip(clip) as opened:
        seconds = np.array([frame.seconds for frame in opened])
    np.testing.assert_allclose(seconds, np.arange(40) / 25, atol=1e-6)


def no_videos(folder):
    """Files that are no videos, by name."""
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    png = cv2.imencode(".png", square_at(20))[1].tobytes()
    whole = write_clip(folder / "whole.mp4", [square_at(20)] * 20).read_bytes()
    playlist = f"#EXTM3U\n#EXTINF:1,\n{folder / 'whole.mp4'}\n#EXT-X-ENDLIST\n".encode()
    return {
        "empty.mp4": b"",
        "noise.mp4": np.random.default_rng(0).bytes(5000),
        "cut.mp4": whole[: len(whole) // 2],
        "sound.wav": sound.getvalue(),
        "text.txt": b"some text\n" * 500,
        "image.png": png,
        "list.m3u8": playlist,
        "list.mp4": b"ffconcat version 1.0\nfile whole.mp4\n",
    }


def test_what_is_no_video_is_refused_by_name(tmp_path, capfd):
    for name, data in no_videos(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            video.open_clip(tmp_path / name)
    for path in (tmp_path, tmp_path / "missing.mp4", "https://example.org/clip.mp4"):
        with pytest.raises(UserError, match=str(path)):
            video.open_clip(path)
    assert capfd.readouterr() == ("", "")  # nothing of FFmpeg's own


def test_a_camera_that_is_not_there_is_named():
    with pytest.raises(UserError, match="--camera 97"):
        video.open_camera(97)


def test_the_frames_of_a_damaged_clip_are_used_and_the_loss_is_noted(tmp_path, capfd):
    whole = write_clip(tmp_path / "whole.avi", [square_at(20 + i) for i in range(60)], codec="MJPG").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    result = recognize_video(FakeModel(), tmp_path / "cut.avi", FakeDetector())
    assert 15 < result.frames < 45 and result.cut_off
    assert not recognize_video(FakeModel(), tmp_path / "whole.avi", FakeDetector()).cut_off
    assert capfd.readouterr().err == ""


# --- recognising


def test_every_frame_has_a_row_with_identity_box_and_probabilities(clip, tmp_path):
    result = recognize_video(FakeModel(), clip, FakeDetector(), csv=tmp_path / "faces.csv", smooth=0, detect_every=4)
    rows = rows_of(tmp_path / "faces.csv")
    columns = ["time", "frame", "identity", "x", "y", "width", "height", "score", "detected", "label"]
    assert list(rows[0]) == [*columns, *NAMES]
    assert [(row["frame"], row["identity"]) for row in rows] == [(str(i), "1") for i in range(40)]
    assert [row["label"] for row in rows] == ["Cross"] * 20 + ["Glad"] * 20
    assert [int(row["detected"]) for row in rows] == [int(i % 4 == 0) for i in range(40)]
    for i, row in enumerate(rows):
        assert abs(int(row["x"]) - 20 - 2 * i) <= 3 and abs(int(row["width"]) - 40) <= 4
        assert sum(float(row[name]) for name in NAMES) == pytest.approx(1, abs=1e-3)
    assert (result.frames, result.detections) == (40, 10)
    (person,) = result.timeline.people()
    assert person.seconds == pytest.approx(1.6, abs=0.01)
    np.testing.assert_allclose(person.shares, [0, 0.5, 0.5], atol=0.01)


def test_probabilities_are_smoothed_in_time(clip, tmp_path):
    recognize_video(FakeModel(), clip, FakeDetector(), csv=tmp_path / "faces.csv", smooth=0.2)
    values = np.array([float(row["Glad"]) for row in rows_of(tmp_path / "faces.csv")])
    np.testing.assert_allclose(values[:20], 0.1, atol=1e-3)
    np.testing.assert_allclose(values[20:], 0.8 - 0.7 * np.exp(-np.arange(1, 21) / 25 / 0.2), atol=1e-3)


def test_one_frame_at_a_time_is_in_memory(clip, tmp_path):
    """For any length: a frame is gone when the next one but one comes."""
    alive = weakref.WeakSet()
    most = []

    class Watched(FakeDetector):
        def detect(self, image):
            alive.add(Holder(image))
            most.append(len(alive))
            return super().detect(image)

    class Holder:
        def __init__(self, image):
            weakref.finalize(image, lambda kept=[self]: kept.clear())  # lives as long as the image

    recognize_video(FakeModel(), clip, Watched(), output=tmp_path / "o.avi", csv=tmp_path / "o.csv", detect_every=1)
    assert len(most) == 40 and max(most) <= 3


def test_ends_after_the_given_seconds(clip):
    assert recognize_video(FakeModel(), clip, FakeDetector(), seconds=0.5).frames == 13  # at 0, 0.04, ..., 0.48
    with pytest.raises(UserError, match="seconds: expected a number above 0, received 0"):
        recognize_video(FakeModel(), clip, FakeDetector(), seconds=0)


# --- drawing


def test_boxes_labels_and_bars_are_drawn_in_the_expression_s_colour(clip, tmp_path):
    recognize_video(FakeModel(), clip, FakeDetector(), output=tmp_path / "o.avi", smooth=0)
    frames, fps = read_clip(tmp_path / "o.avi")
    assert frames.shape == (40, HEIGHT, WIDTH, 3) and fps == 25
    for i, code in ((2, 2), (30, 1)):
        color = drawing._rgb(COLORS[code])
        near = np.abs(frames[i].astype(int) - color).max(axis=2) < 60
        assert near[38:82, 18 + 2 * i : 22 + 2 * i].mean() > 0.25  # the left side of the box


def test_bars_hide_no_face_and_are_as_long_as_their_shares():
    image = np.full((240, 320, 3), 100, np.uint8)
    bars = [("A", 1.0), ("B", 0.5), ("C", 0.0)]
    left, right = drawing.Drawn((60, 60, 60, 60), "1 A", 0, bars), drawing.Drawn((130, 60, 60, 60), "2 A", 0, bars)
    colors = ("#ff0000", "#00ff00", "#0000ff")
    drawing.draw(image, [left, right], colors)
    for x in (60, 130):
        assert (image[64:116, x + 4 : x + 56] == 100).all()
    # The left one's are below it, because there is no room on its sides.
    lengths = [(image[122:] == drawing._rgb(color)).all(axis=2).sum(axis=1).max() for color in colors]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=4) and lengths[0] > 40 and lengths[2] <= 1
    assert (image[60:120, 194:] != 100).any()


@pytest.mark.parametrize("box", [(-50, -50, 60, 60), (300, 200, 90, 90), (-20, -20, 500, 500), (5, 5, 1, 1)])
def test_boxes_over_the_border_are_drawn(box):
    image = np.full((240, 320, 3), 100, np.uint8)
    drawing.draw(image, [drawing.Drawn(box, "12 Überraschung 100%", 9, [("Ärger", 1.0)])], ("#ffffff", "#102030"))
    assert (image == (16, 32, 48)).all(axis=2).sum() > 20


# --- the timeline


def test_timeline_of_a_long_video_is_exact_in_its_sums_and_bounded():
    times = Timeline(NAMES)
    step = 0.04
    for i in range(100_000):  # 67 minutes; Glad in every second minute, person 2 only in the last five minutes
        start = i * step
        labels = {1: int(start // 60) % 2}
        if start >= 3700:
            labels[2] = 2
        times.add(start, start + step, labels)
    one, two = times.people()
    assert one.seconds == pytest.approx(4000, rel=1e-4) and one.shares[0] == pytest.approx(2020 / 4000, abs=1e-3)
    assert (two.first, two.last) == (pytest.approx(3700, abs=6), pytest.approx(4000, abs=6))
    bands = times.bands(1)
    assert [code for _, _, code in bands] == [i % 2 for i in range(67)]
    np.testing.assert_allclose([start for start, _, _ in bands], 60 * np.arange(67), atol=6)
    assert times._sums[1].shape == (BINS, 3)


def test_timeline_keeps_those_who_are_seen_longest():
    times = Timeline(NAMES)
    for i in range(MAX_PEOPLE + 50):
        times.add(i, i + 1, {0: 0, i + 1: 1})
    assert len(times.people()) == MAX_PEOPLE and times.people_left_out == 51 and times.people()[0].seconds > 500


def test_timeline_figure_has_the_colours_where_they_belong(clip, tmp_path):
    recognize_video(FakeModel(), clip, FakeDetector(), timeline=tmp_path / "t$a$.png", smooth=0)
    picture = read_image(tmp_path / "t$a$.png")
    places = []
    for code in (2, 1):
        rgb = drawing._rgb(COLORS[code])
        y, x = np.nonzero((picture == rgb).all(axis=2))
        across = x[y == np.bincount(y).argmax()]
        band = max(np.split(across, np.flatnonzero(np.diff(across) > 1) + 1), key=len)  # not the legend's dot
        places.append((band[0], band[-1]))
    (a, b), (c, d) = places
    assert 0 < c - b < 8 and abs((b - a) - (d - c)) < 8 and b - a > 300


def test_timeline_without_a_face_is_drawn(tmp_path):
    write_clip(tmp_path / "$gray$.mp4", [np.full((HEIGHT, WIDTH, 3), 120, np.uint8)] * 5)
    result = recognize_video(FakeModel(), tmp_path / "$gray$.mp4", FakeDetector(), timeline=tmp_path / "t.png")
    assert (tmp_path / "t.png").is_file() and repr(result) == "no face found"


# --- writing


@pytest.mark.parametrize("name", ["o.mp4", "o.avi", "o.mkv", "o.mov"])
def test_clips_of_any_kind_and_of_odd_sides_are_written(name, tmp_path):
    with video.open_writer(tmp_path / name, (65, 47), 20) as writer:
        for i in range(10):
            writer.write(i / 20, np.full((47, 65, 3), RED, np.uint8))
    frames, fps = read_clip(tmp_path / name)
    assert len(frames) == 10 and fps == pytest.approx(20)
    np.testing.assert_allclose(frames[5, 20, 30], RED, atol=12)


def test_ctrl_c_finishes_what_was_written(clip, tmp_path):
    def stop(call):
        if call == 15:
            raise KeyboardInterrupt

    outputs = {"output": tmp_path / "o.mp4", "csv": tmp_path / "o.csv", "timeline": tmp_path / "o.png"}
    result = recognize_video(FakeModel(stop), clip, FakeDetector(), **outputs)
    assert result.interrupted and result.frames == 14
    assert len(read_clip(tmp_path / "o.mp4")[0]) == len(rows_of(tmp_path / "o.csv")) == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.csv", "o.mp4", "o.png"]


def test_an_error_or_ctrl_c_in_the_first_frame_leaves_what_was_there(clip, tmp_path):
    (tmp_path / "o.mp4").write_bytes(b"old")
    for error, call in ((ValueError, 15), (KeyboardInterrupt, 1)):

        def fail(number, error=error, call=call):
            if number == call:
                raise error

        with pytest.raises(error):
            recognize_video(FakeModel(fail), clip, FakeDetector(), output=tmp_path / "o.mp4", csv=tmp_path / "o.csv")
        assert [path.name for path in tmp_path.iterdir()] == ["o.mp4"] and (tmp_path / "o.mp4").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files stands in for a full disk")
@pytest.mark.parametrize("name", ["o.mp4", "o.avi"])
def test_a_clip_that_does_not_fit_on_the_disk_is_not_left_half(name, tmp_path):
    rng = np.random.default_rng(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(UserError, match=name), video.open_writer(tmp_path / name, (320, 240), 25) as writer:
            for i in range(30):
                writer.write(i / 25, rng.integers(0, 256, (240, 320, 3), np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# --- the command


def run_main(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["test.py", "video", *map(str, args)])
    test_module.main()


@pytest.fixture(scope="module")
def astronaut_clip(tmp_path_factory):
    """The astronaut moves over a blurred background: 30 frames of 320 x 240 at 15 frames/s."""
    head = cv2.resize(read_image(ROOT / "examples" / "astronaut.png")[20:220, 130:330], (140, 140))
    coarse = np.random.default_rng(0).integers(60, 200, (9, 16, 3), np.uint8)
    ground = cv2.GaussianBlur(cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_CUBIC), (0, 0), 9)
    images = []
    for i in range(30):
        image = ground.copy()
        image[50:190, 20 + 5 * i : 160 + 5 * i] = head
        images.append(image)
    return write_clip(tmp_path_factory.mktemp("clip") / "astronaut.mp4", images, fps=15)


@pytest.mark.parametrize("detector", ["haar", "auto"])
def test_the_command_follows_a_real_face(detector, astronaut_clip, tiny_weights, tmp_path, monkeypatch, capsys):
    args = ("--output", tmp_path / "o.mp4", "--csv", tmp_path / "o.csv", "--timeline", tmp_path / "o.png")
    run_main(monkeypatch, astronaut_clip, "--weights", tiny_weights, "--detector", detector, *args)
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "o.csv")
    assert [(row["frame"], row["identity"]) for row in rows] == [(str(i), "1") for i in range(30)]
    for i, row in enumerate(rows):
        assert abs(float(row["x"]) + float(row["width"]) / 2 - (20 + 5 * i + 0.7 * (224 - 130))) < 10
    assert len(read_clip(tmp_path / "o.mp4")[0]) == 59 and (tmp_path / "o.png").is_file()
    assert "30 frames" in printed and str(tmp_path / "o.csv") in printed and rows[-1]["label"] in printed


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((), "--camera"),
        (("CLIP", "--camera", "0"), "both"),
        (("CLIP", "--output", "CLIP"), "--output"),
        (("CLIP", "--output", "o.gif"), r"o\.gif"),
        (("CLIP", "--timeline", "o.jpg"), r"o\.jpg"),
        (("CLIP", "--csv", "o", "--timeline", "o"), "--csv"),
        (("CLIP", "--detect-every", "0"), "--detect-every"),
        (("--camera", "97"), "--camera 97"),
    ],
)
def test_options_that_do_not_fit_are_refused(args, named, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        run_main(monkeypatch, *(clip if arg == "CLIP" else arg for arg in args))
    assert list(tmp_path.iterdir()) == []


def test_a_camera_without_a_screen_needs_something_to_write(clip, tiny_weights, tmp_path, monkeypatch, capsys):
    """A clip replaces the camera; Ctrl-C ends it as usual."""
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")

    def stand_in(number):
        return video.Video(cv2.VideoCapture(str(clip)), f"camera {number}", is_camera=True)

    monkeypatch.setattr(video, "open_camera", stand_in)
    with pytest.raises(UserError, match="no screen"):
        run_main(monkeypatch, "--camera", 0, "--weights", tiny_weights)

    def stop(*args):
        raise KeyboardInterrupt

    calls = []
    monkeypatch.setattr(faces, "open_detector", lambda *_: FakeDetector())
    predict = test_module.TestModels.predict
    monkeypatch.setattr(
        test_module.TestModels,
        "predict",
        lambda self, images: calls.append(1) or (stop() if len(calls) > 5 else predict(self, images)),
    )
    run_main(monkeypatch, "--camera", 0, "--weights", tiny_weights, "--csv", tmp_path / "o.csv")
    printed = capsys.readouterr()
    assert "no screen" in printed.err and "5 frames" in printed.out and len(rows_of(tmp_path / "o.csv")) == 5


@pytest.mark.slow
def test_an_exported_model_needs_no_keras(tiny_weights, astronaut_clip, tmp_path):
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")
    onnx = tmp_path / "tiny.onnx"
    done = run_python(ROOT / "test.py", "export", "--weights", tiny_weights, "--format", "onnx", "--output", onnx)
    assert done.returncode == 0, done.stderr
    args = ["test.py", "video", *map(str, (astronaut_clip, "--weights", onnx, "--csv", tmp_path / "o.csv"))]
    code = f"""
import sys
sys.argv = {args!r}
import test
test.main()
print(*{{"keras", "tensorflow", "jax", "torch", "matplotlib.pyplot"}} & set(sys.modules))
"""
    done = run_python("-c", code)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[-1] == "" and len(rows_of(tmp_path / "o.csv")) == 30


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="needs the virtual screen Xvfb")
def test_a_window_shows_frames_and_q_ends_it(tmp_path):
    """Everything that Qt does in a process of its own, on a virtual screen; the key is fed to OpenCV."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests" / "faces")!r}]
import cv2
import test_video as t
from faces import video
assert video.has_screen()
clip = t.write_clip({str(tmp_path / "clip.avi")!r}, [t.square_at(20)] * 40, codec="MJPG")
window, waited = video.Window("clip"), cv2.waitKey
keys = iter([-1] * 9 + [ord("q")])
cv2.waitKey = lambda ms: max(waited(ms), next(keys))
result = t.recognize_video(t.FakeModel(), clip, t.FakeDetector(), window=window)
cv2.waitKey = waited
window.close()
print(result.frames)
"""
    reader, writer = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writer), "-screen", "0", "640x480x24"], pass_fds=[writer], stderr=subprocess.DEVNULL
    )
    try:
        os.close(writer)
        number = os.read(reader, 20).decode().strip()
        env = {**os.environ, "DISPLAY": f":{number}"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    finally:
        os.close(reader)
        server.terminate()
        server.wait()
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["10"], "")
