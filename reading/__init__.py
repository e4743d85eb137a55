"""Checks what is read: arrays, JSON, images' headers, the files of a run; the limits of readers; printable text."""
