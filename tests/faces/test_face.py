"""Ranking of faces and suppression of overlapping boxes."""

from __future__ import annotations

import numpy as np

from faces.face import Face, ranked, suppress


def face(side, score, x=0.0):
    return Face((x, 0.0, float(side), float(side)), score)


def test_best_face_is_the_most_certain_of_the_large_ones():
    weak_and_large, best, second, small = face(107, 1.2), face(83, 5.9), face(90, 5.0), face(20, 8.0)
    assert ranked([weak_and_large, small, second, best], certain=3.0) == [best, second, small, weak_and_large]


def test_ranking_without_a_certain_face():
    assert ranked([face(20, 1.4), face(100, 1.2)], certain=3.0) == [face(100, 1.2), face(20, 1.4)]
    assert ranked([], certain=3.0) == []


def test_equal_faces_have_one_order():
    left, right = face(50, 0.99, x=10.0), face(50, 0.99, x=90.0)
    assert ranked([right, left], 0.9) == ranked([left, right], 0.9) == [left, right]


def test_suppression_is_greedy():
    """The middle box goes because of the first, so the third, which only the middle one overlaps, stays."""
    boxes = np.array([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10], [100, 0, 110, 10]], float)
    scores = np.array([0.9, 0.8, 0.7, 0.95])
    assert suppress(boxes, scores, 0.3).tolist() == [3, 0, 2]
    assert suppress(boxes, scores, 0.5).tolist() == [3, 0, 1, 2]


def test_suppression_of_a_box_inside_another():
    boxes = np.array([[0, 0, 100, 100], [30, 30, 60, 60]], float)
    scores = np.array([0.9, 0.95])
    assert suppress(boxes, scores, 0.5).tolist() == [1, 0]
    assert suppress(boxes, scores, 0.5, of_smaller=True).tolist() == [1]
    assert suppress(boxes[:0], scores[:0], 0.5).shape == (0,)
