"""Follows faces through a video: one identity per person, boxes between two detections, smoothed probabilities.

The detector runs on every n-th frame. In between, a face's box moves with the median flow of corners inside it
(Kalal, Mikolajczyk and Matas, "Forward-Backward Error: Automatic Detection of Tracking Failures", ICPR 2010). Where two
faces overlap, and while a face is not seen, its box moves with its last velocity instead. Detections go to the tracks
nearest to them, all at once (the assignment of least total distance).

Only place and motion decide who is who, not looks: who stays away longer than `GAP_SECONDS` gets a new identity, and
two who turn back behind each other are exchanged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from faces.face import Face

# A face that the detector misses is carried by its flow for so long.
CARRY_SECONDS = 0.5
# A face that is not seen keeps its identity for so long. Behind another face, the time counts at this pace only.
GAP_SECONDS = 1.0
HIDDEN_PACE = 1 / 3
# A detection belongs to a track only within this distance (`_distance`), which grows while the face is not seen.
NEAR, NEAR_PER_SECOND = 0.7, 0.8
# Two faces overlap when they share this part of the smaller box: flow would then jump from one to the other.
OVERLAP = 0.1
# The share of the detector's box in the box of a matched track; the rest is the carried box. Less jitter, no lag.
DETECTED_SHARE = 0.6
VELOCITY_SECONDS = 0.15  # time constant of the velocity's mean

# Flow is computed on a gray image whose longer side has at most this many pixels.
FLOW_SIDE = 640
MAX_CORNERS, MIN_CORNERS = 60, 6
MAX_RETURN_ERROR = 1.0  # pixels of that image between a corner and where its flow leads forth and back
MIN_RETURNED = 0.5  # share of the corners that have to come back


@dataclasses.dataclass
class Track:
    """One person's face over time.

    Attributes:
        identity: 1, 2, ... in the order of appearance; 0 until the face counts as certain.
        face: box, score and landmarks in the present frame; the score is that of the last detection.
        detected: whether the detector found it in this frame; otherwise its box was carried here.
        visible: whether its place in this frame is known; False in a gap.
        probabilities: float (C,), smoothed over time (`smooth`); None before the first ones.
    """

    face: Face
    identity: int = 0
    detected: bool = True
    visible: bool = True
    probabilities: np.ndarray | None = None
    _velocity: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2))  # pixels per second
    _detections: int = 1
    _detected_at: float = 0.0
    _gap: float = 0.0  # seconds since it was visible, at their pace
    _smoothed_at: float = 0.0

    def smooth(self, probabilities: np.ndarray, seconds: float, time_constant: float) -> np.ndarray:
        """Takes new probabilities into the exponential mean over time, whatever the frame rate is.

        Args:
            probabilities: float (C,) of this frame.
            seconds: time of this frame.
            time_constant: seconds after which an old value counts 1/e; 0 does not smooth.

        Returns:
            The smoothed probabilities (C,), which sum to 1 as the given ones do.
        """
        new = np.asarray(probabilities, np.float64)
        if self.probabilities is not None and time_constant > 0:
            old = math.exp(-(seconds - self._smoothed_at) / time_constant)
            new = old * self.probabilities + (1 - old) * new
        self.probabilities, self._smoothed_at = new, seconds
        return new


class Tracker:
    """Follows every face of one video, frame by frame.

    Args:
        detect: finds faces in uint8 (H, W, 3) RGB, as `Detector.detect`.
        certain: the score from which a detection starts an identity at once. A weaker one needs a second detection:
            false boxes seldom come twice in the same place.
        detect_every: the detector runs on every n-th frame, and on a frame where the flow lost a face; at least 1.

    Attributes:
        detections: how often the detector ran.
        people: how many identities were given.
    """

    def __init__(self, detect: Callable[[np.ndarray], Sequence[Face]], certain: float, detect_every: int = 5) -> None:
        self._detect, self._certain, self._detect_every = detect, certain, detect_every
        self._tracks: list[Track] = []
        self._gray: np.ndarray | None = None
        self._seconds = 0.0
        self._since_detection = detect_every
        self.detections = self.people = 0

    def update(self, image: np.ndarray, seconds: float) -> list[Track]:
        """Takes the next frame.

        Args:
            image: uint8 (H, W, 3) RGB; every frame has the same size.
            seconds: its time, more than that of the frame before.

        Returns:
            The visible tracks that have an identity, by identity. They are the tracker's own and change with the next
            frame.
        """
        gray, scale = _small_gray(image)
        lost = self._carry(gray, scale, seconds - self._seconds, image.shape) if self._tracks else False
        self._gray, self._seconds = gray, seconds
        self._since_detection += 1
        if lost or self._since_detection >= self._detect_every:
            self._since_detection = 0
            self.detections += 1
            self._match(list(self._detect(image)))
        self._tracks = [track for track in self._tracks if track.visible or track._gap <= GAP_SECONDS]
        shown = [track for track in self._tracks if track.visible and track.identity]
        return sorted(shown, key=lambda track: track.identity)

    def _carry(self, gray: np.ndarray, scale: float, elapsed: float, shape: tuple[int, ...]) -> bool:
        """Moves every box from the last frame to this one; returns whether the flow lost a face."""
        hidden = _overlapping([track.face for track in self._tracks])
        flowing = [track for track, h in zip(self._tracks, hidden, strict=True) if track.visible and not h]
        moved = _flow(self._gray, gray, [track.face for track in flowing], scale)
        by_flow = {id(track): face for track, face in zip(flowing, moved, strict=True)}
        lost = False
        for track, is_hidden in zip(self._tracks, hidden, strict=True):
            track.detected = False
            track._gap = 0.0 if track.visible else track._gap + elapsed * (HIDDEN_PACE if is_hidden else 1)
            face = by_flow.get(id(track))
            if face is not None:
                _learn_velocity(track, face, elapsed)
                track.face = face
                continue
            lost |= id(track) in by_flow
            track.visible &= id(track) not in by_flow
            # Who leaves the image waits at its border, where they would come back.
            x, y = np.array(track.face.center) + track._velocity * elapsed
            track.face = _moved(track.face, (min(max(x, 0), shape[1]), min(max(y, 0), shape[0])))
        return lost

    def _match(self, found: list[Face]) -> None:
        """Gives the detections of this frame to the tracks, and starts tracks with those that are left."""
        cost = np.array([[self._cost(track, face) for face in found] for track in self._tracks])
        cost = cost.reshape(len(self._tracks), len(found))
        # A forbidden pair costs more than any allowed ones together, so that it is made only where none is allowed.
        pairs = zip(*linear_sum_assignment(np.where(np.isfinite(cost), cost, 1e6)), strict=True)
        pairs = {i: j for i, j in pairs if np.isfinite(cost[i, j])}
        hidden = _overlapping([track.face for track in self._tracks])
        for i, track in enumerate(self._tracks):
            if i in pairs:
                self._take(track, found[pairs[i]], blend=track.visible and not hidden[i])
            elif hidden[i] or track._detections < 2 or self._seconds - track._detected_at > CARRY_SECONDS:
                track.visible = False
        self._tracks = [track for track in self._tracks if track.visible or track.identity]
        for j in sorted(set(range(len(found))) - set(pairs.values())):  # best first, as the detector ranks them
            track = Track(found[j], _detected_at=self._seconds)
            self._tracks.append(track)
            self._name(track)

    def _cost(self, track: Track, face: Face) -> float:
        """Distance of a detection from a track; infinite when it is too far."""
        near = NEAR + NEAR_PER_SECOND * (0.0 if track.visible else track._gap)
        distance = _distance(track.face, face)
        return distance if distance <= near else math.inf

    def _take(self, track: Track, face: Face, blend: bool) -> None:
        track.face = _blended(track.face, face) if blend else face
        track.detected = track.visible = True
        track._detected_at = self._seconds
        track._detections += 1
        self._name(track)

    def _name(self, track: Track) -> None:
        if not track.identity and (track._detections > 1 or track.face.score >= self._certain):
            self.people += 1
            track.identity = self.people


def _distance(one: Face, other: Face) -> float:
    """Distance of two boxes: that of the centres in sides, plus the logarithm of the ratio of the sides.

    Unlike their overlap it still tells near from far when the boxes do not touch; equal squares that are 0.5 apart
    overlap by a third (intersection over union).
    """
    a, b = max(one.side, 1e-6), max(other.side, 1e-6)
    return math.dist(one.center, other.center) / math.sqrt(a * b) + abs(math.log(a / b))


def _overlapping(faces: Sequence[Face]) -> np.ndarray:
    """Which boxes share a part of their area with another one; bool (N,)."""
    boxes = np.array([face.box for face in faces], np.float64).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    shared = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    shared = np.prod(np.maximum(shared, 0), axis=2)
    areas = np.prod(boxes[:, 2:], axis=1)
    np.fill_diagonal(shared, 0)
    return (shared > OVERLAP * np.minimum(areas[:, None], areas[None])).any(axis=1)


def _learn_velocity(track: Track, face: Face, elapsed: float) -> None:
    new = (np.array(face.center) - track.face.center) / max(elapsed, 1e-6)
    track._velocity += (1 - math.exp(-elapsed / VELOCITY_SECONDS)) * (new - track._velocity)


def _moved(face: Face, center: tuple[float, float], scale: float = 1.0) -> Face:
    """The face with its centre elsewhere and its sides times ``scale``; the landmarks move with it."""
    (x, y), (_, _, width, height) = face.center, face.box
    width, height = width * scale, height * scale
    box = (float(center[0]) - width / 2, float(center[1]) - height / 2, width, height)
    landmarks = face.landmarks
    if landmarks is not None:
        landmarks = ((landmarks - (x, y)) * scale + np.asarray(center)).astype(np.float32)
    return dataclasses.replace(face, box=box, landmarks=landmarks)


def _blended(carried: Face, detected: Face) -> Face:
    """The detection, its box and landmarks moved towards the carried ones."""
    share = DETECTED_SHARE
    box = tuple(share * new + (1 - share) * old for new, old in zip(detected.box, carried.box, strict=True))
    landmarks = detected.landmarks
    if landmarks is not None and carried.landmarks is not None:
        landmarks = (share * landmarks + (1 - share) * carried.landmarks).astype(np.float32)
    return dataclasses.replace(detected, box=box, landmarks=landmarks)


# --- flow


def _small_gray(image: np.ndarray) -> tuple[np.ndarray, float]:
    """The gray image in which flow is computed, and its scale."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = min(1.0, FLOW_SIDE / max(gray.shape))
    if scale < 1:
        size = max(1, round(gray.shape[1] * scale)), max(1, round(gray.shape[0] * scale))
        gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
    return gray, scale


def _flow(before: np.ndarray, now: np.ndarray, faces: Sequence[Face], scale: float) -> list[Face | None]:
    """Moves faces from one gray image to the next by median flow; None where too few corners come back."""
    corners = [_corners(before, face, scale) for face in faces]
    if not any(map(len, corners)):
        return [None] * len(faces)
    points = np.concatenate(corners)
    forth, there, _ = cv2.calcOpticalFlowPyrLK(before, now, points, None, winSize=(15, 15), maxLevel=3)
    back, here, _ = cv2.calcOpticalFlowPyrLK(now, before, forth, None, winSize=(15, 15), maxLevel=3)
    returned = (there & here).ravel().astype(bool) & (np.linalg.norm(back - points, axis=1) <= MAX_RETURN_ERROR)
    ends = np.cumsum([len(c) for c in corners])
    moved = []
    for face, start, end in zip(faces, [0, *ends[:-1]], ends, strict=True):
        good = np.flatnonzero(returned[start:end]) + start
        if len(good) < max(MIN_CORNERS, MIN_RETURNED * (end - start)):
            moved.append(None)
            continue
        shift = np.median(forth[good] - points[good], axis=0)
        ratio = _growth(points[good], forth[good])
        # The corners' own middle need not be the box's: growth moves the box's centre around it.
        middle = np.median(points[good], axis=0)
        center = middle + shift + (np.array(face.center) * scale - middle) * ratio
        moved.append(_moved(face, tuple(center / scale), ratio))
    return moved


def _corners(gray: np.ndarray, face: Face, scale: float) -> np.ndarray:
    """Corners inside the middle of a face's box, float32 (N, 2); its rim shows the background."""
    x, y, width, height = (scale * v for v in face.box)
    left, right = (min(max(0, round(x + k * width)), gray.shape[1]) for k in (0.1, 0.9))
    top, bottom = (min(max(0, round(y + k * height)), gray.shape[0]) for k in (0.1, 0.9))
    part = gray[top:bottom, left:right]
    if min(part.shape) < 3:
        return np.empty((0, 2), np.float32)
    found = cv2.goodFeaturesToTrack(part, MAX_CORNERS, 0.02, max(2.0, min(width, height) / 16))
    return np.empty((0, 2), np.float32) if found is None else found.reshape(-1, 2) + np.float32((left, top))


def _growth(before: np.ndarray, now: np.ndarray) -> float:
    """Median ratio of the distances between points (N, 2)."""
    i, j = np.triu_indices(len(before), 1)
    distances = [np.linalg.norm(points[i] - points[j], axis=1) for points in (before, now)]
    return float(np.median(distances[1] / np.maximum(distances[0], 1e-6)))
