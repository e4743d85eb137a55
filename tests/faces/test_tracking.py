"""Identities, boxes and smoothed probabilities on drawn scenes; the detector is a stand-in that knows the truth."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from datasets.shared.drawn_faces import draw_face, random_actions, random_identity, random_view
from faces.face import Face
from faces.tracking import Track, Tracker

WIDTH, HEIGHT, SIDE = 480, 270, 80
FPS = 25.0


def someone(seed):
    rng = np.random.default_rng(seed)
    return draw_face(random_actions(seed % 7, rng), random_identity(rng), random_view(rng), 160)


PEOPLE = [someone(1), someone(5)]


def background(seed=0):
    coarse = np.random.default_rng(seed).integers(60, 200, (27, 48, 3), np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def scene(boxes, seed=0):
    """A frame with each person at its box (x, y, side), the last one in front; None: not there."""
    image = background(seed)
    for person, box in zip(PEOPLE, boxes, strict=False):
        if box is None:
            continue
        x, y, side = box
        k = side / len(person)
        matrix = np.array([[k, 0, x], [0, k, y]])
        inside = cv2.warpAffine(np.full(person.shape[:2], 255, np.uint8), matrix, (WIDTH, HEIGHT))[..., None] > 127
        image = np.where(inside, cv2.warpAffine(person, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_AREA), image)
    return image


class Scenes:
    """Plays places of people through a tracker.

    Args:
        places: for each frame one (x, y, side) or None per person.
        missed: frames on which the detector finds nothing.
        score: of every detection.
    """

    def __init__(self, places, missed=(), score=0.99, every=5, noise=0.0):
        self.places, self.missed, self.score, self.noise = places, set(missed), score, noise
        self.rng = np.random.default_rng(0)
        self.tracker = Tracker(self.detect, certain=0.9, detect_every=every)
        self.detected_on = []

    def detect(self, image):
        self.detected_on.append(self.index)
        if self.index in self.missed:
            return []
        there = [box for box in self.places[self.index] if box is not None]
        # The one in front hides the others, as for a real detector.
        seen = [b for i, b in enumerate(there) if all(shared(b, other) < 0.3 for other in there[i + 1 :])]
        found = []
        for box in seen:
            x, y, side = np.array(box) + self.rng.normal(0, self.noise, 3) * box[2]
            points = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]]) * side + (x, y)
            found.append(Face((x, y, side, side), self.score, points.astype(np.float32), "mtcnn"))
        return found

    def play(self):
        """For each frame what the tracker shows: identity to box."""
        shown = []
        for index, boxes in enumerate(self.places):
            self.index = index
            tracks = self.tracker.update(scene(boxes), self.index / FPS)
            assert len({track.identity for track in tracks}) == len(tracks)
            for track in tracks:  # the landmarks stay where they are in the face
                x, y, w, _ = track.face.box
                np.testing.assert_allclose(track.face.landmarks[0], (x + 0.3 * w, y + 0.4 * w), atol=0.02 * w + 0.5)
            shown.append({track.identity: track.face.box for track in tracks})
        return shown


def shared(a, b):
    """Shared part of the smaller of two squares."""
    across, down = (min(a[i] + a[2], b[i] + b[2]) - max(a[i], b[i]) for i in (0, 1))
    return max(across, 0) * max(down, 0) / min(a[2], b[2]) ** 2


def assert_at(box, place, part=0.1):
    x, y, side = place
    assert box[2] == pytest.approx(side, rel=part)
    assert abs(box[0] + box[2] / 2 - x - side / 2) < part * side
    assert abs(box[1] + box[3] / 2 - y - side / 2) < part * side


# --- boxes between detections


def test_boxes_follow_a_face_that_turns_back_and_grows():
    """Six frames between two detections, in which the face moves by half of its side and turns back."""
    t = np.arange(60)
    places = [[(200 + 120 * np.sin(i / 9), 90 + 50 * np.sin(i / 7), SIDE * 1.008**i)] for i in t]
    scenes = Scenes(places, every=6)
    for shown, (place,) in zip(scenes.play(), places, strict=True):
        assert set(shown) == {1}
        assert_at(shown[1], place, 0.08)
    assert scenes.detected_on == list(range(0, 60, 6)) and scenes.tracker.detections == 10


def test_boxes_grow_with_a_face_that_comes_nearer():
    places = [[(200 - 8 * i / 2, 90 - 8 * i / 2, SIDE + 8 * i)] for i in range(12)]
    scenes = Scenes(places, every=20)
    assert_at(scenes.play()[-1][1], places[-1][0], 0.08)
    assert scenes.detected_on == [0]


def test_detector_s_jitter_is_damped():
    places = [[(200.0, 90.0, SIDE)]] * 60
    scenes = Scenes(places, every=2, noise=0.03)
    x = np.array([shown[1][0] for shown in scenes.play()])
    assert np.diff(x).std() < 0.75 * 0.03 * SIDE  # as it comes the steps would have a deviation of 0.03 SIDE


@pytest.mark.parametrize("size", [(270, 480), (1080, 1920)])
def test_large_frames_are_followed_in_their_own_pixels(size):
    k = size[0] / HEIGHT
    tracker = Tracker(lambda image: [Face((k * 100, k * 80, k * SIDE, k * SIDE), 0.99)], 0.9, detect_every=9)
    for i in range(6):
        image = cv2.resize(scene([(100 + 4 * i, 80, SIDE)]), size[::-1], interpolation=cv2.INTER_LINEAR)
        (track,) = tracker.update(image, i / FPS)
    assert_at(np.array(track.face.box) / k, (120, 80, SIDE), 0.04)
    assert not track.detected and tracker.detections == 1


def test_a_cut_leaves_no_box_behind_and_is_searched_at_once():
    places = [[(60, 60, SIDE)]] * 8 + [[(330, 150, SIDE)]] * 8
    scenes = Scenes(places, every=7)
    shown = []
    for index, boxes in enumerate(places):
        scenes.index = index
        tracks = scenes.tracker.update(scene(boxes, seed=boxes[0][0]), scenes.index / FPS)
        shown.append({track.identity: track.face.box for track in tracks})
    assert scenes.detected_on == [0, 7, 8, 15]
    assert all(set(frame) == {1} for frame in shown[:8]) and all(set(frame) == {2} for frame in shown[8:])
    assert_at(shown[8][2], places[8][0])


# --- identities


@pytest.mark.parametrize("every", [1, 5, 10])
@pytest.mark.parametrize("frames", [40, 80, 240])
def test_two_who_cross_keep_their_identities(every, frames):
    """The first one passes behind the second one and is hidden in the middle."""
    across = np.linspace(0, 1, frames)
    places = [[(30 + 340 * a, 100, SIDE), (370 - 330 * a, 115, SIDE * 1.1)] for a in across]
    scenes = Scenes(places, every=every)
    shown = scenes.play()
    assert set().union(*shown) == {1, 2}
    first, _ = places[0]
    one = next(i for i, box in shown[0].items() if abs(box[0] - first[0]) < 20)
    assert set(shown[0]) == set(shown[-1]) == {1, 2}
    assert_at(shown[-1][one], places[-1][0])
    assert_at(shown[-1][3 - one], places[-1][1])
    for i in scenes.detected_on:
        back, front = places[i]
        assert len(shown[i]) == 1 + (shared(back, front) < 0.3)  # no box for a face that is hidden
        assert_at(shown[i][3 - one], front)


@pytest.mark.parametrize(("seconds", "expected"), [(0.6, {1}), (2.0, {1, 2})])
def test_who_comes_back_soon_is_the_same(seconds, expected):
    """Out over the right border and back in; after a longer time it is somebody new."""
    out = [[(300 + 12 * i, 90, SIDE)] for i in range(12)]
    places = [*out, *[[None]] * round(seconds * FPS), *out[::-1]]
    shown = Scenes(places, every=3).play()
    assert set().union(*shown) == expected
    assert not any(shown[14 : 11 + round(seconds * FPS)])
    assert_at(shown[-1][max(expected)], places[-1][0])


def test_a_face_that_the_detector_misses_is_carried_for_half_a_second():
    places = [[(100 + 2 * i, 90, SIDE)] for i in range(60)]
    shown = Scenes(places, missed=range(11, 36), every=5).play()
    seen = [i for i, frame in enumerate(shown) if frame]
    assert set().union(*shown) == {1}
    assert seen == [i for i in range(60) if not 25 <= i < 40]  # 10 + 0.5 s, to the next search; found again at 40
    for i in seen:
        assert_at(shown[i][1], places[i][0])


def test_a_weak_box_needs_a_second_detection_to_become_a_person():
    places = [[None]] * 5 + [[(100, 90, SIDE)]] * 5 + [[None]] * 10 + [[(300, 90, SIDE)]] * 20
    shown = Scenes(places, score=0.7, every=5).play()
    assert [i for i, frame in enumerate(shown) if frame] == list(range(25, 40)) and set(shown[25]) == {1}


def test_people_who_are_gone_are_forgotten():
    """Memory does not grow with the number of people."""
    rng = np.random.default_rng(0)
    image = background()

    def detect(image):
        return [Face((*rng.uniform(0, 200, 2), *rng.uniform(10, 90, 1).repeat(2)), 0.99) for _ in range(8)]

    tracker = Tracker(detect, 0.9, detect_every=1)
    for i in range(200):
        tracks = tracker.update(image, float(i))
        assert len({track.identity for track in tracks}) == len(tracks)
    assert tracker.people > 300 and len(tracker._tracks) < 40


# --- probabilities


def test_smoothing_depends_on_time_not_on_frames():
    """A step from one class to the other: 1 - 1/e of it after one time constant."""
    for steps in (1, 7):
        track = Track(Face((0, 0, 1, 1), 1.0))
        assert track.smooth(np.array([1.0, 0.0]), 5.0, 0.3).tolist() == [1, 0]
        for i in range(1, steps + 1):
            smoothed = track.smooth(np.array([0.0, 1.0]), 5.0 + 0.3 * i / steps, 0.3)
        np.testing.assert_allclose(smoothed, [np.exp(-1), 1 - np.exp(-1)])
    assert track.smooth(np.array([0.5, 0.5]), 5.4, 0.0).tolist() == [0.5, 0.5]
