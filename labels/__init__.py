"""Doubts about labels: a second set of labels for the same images, and labels that are likely wrong."""
