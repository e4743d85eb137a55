"""Checks what is read: arrays, JSON, the headers of images, the files of a run; the limits of every reader; printable text."""
