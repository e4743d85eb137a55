"""Recognising faces in images and video: what counts as an image, the results, and the two commands' output."""

from recognition.results import ImageResult, Recognition, Results

__all__ = ["ImageResult", "Recognition", "Results"]
