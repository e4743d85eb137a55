"""The largest files, images and arrays that are read; every reader takes its limit from here.

A compressed file of a few megabytes can hold gigabytes. So every reader compares what it is about to read with one of
these numbers before it takes the memory, and names the number in its message.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from files import UserError

# Images. The largest cameras give 100 megapixels; 8 bits and three channels each are the second limit.
MAX_PIXELS = 100_000_000
DECODED_BYTES = 300_000_000
IMAGE_BYTES = 200_000_000  # of the compressed file

# Files of a release. Tables are streamed; the others are read whole.
ANNOTATION_BYTES = 4_096  # a `_exp.npy` holds one number
LIST_BYTES = 50_000_000  # RAF-DB's list of 15,339 images has 300 kB
TABLE_BYTES = 2_000_000_000  # fer2013.csv has 301 MB, AffectNet's training.csv less than that
TABLE_LINE = 1_000_000  # characters: a row of fer2013.csv has 10,000
TABLE_LINES = 10_000_000
ARCHIVE_MEMBERS = 2_000_000  # AffectNet has 1.6 million files

# Files of ours.
JSON_BYTES = 50_000_000
YAML_BYTES = 1_000_000
HISTORY_BYTES = 50_000_000  # one row per epoch
PREDICTIONS_BYTES = 500_000_000  # of each array; one million images of 100 classes
EXPORTED_BYTES = 2_000_000_000  # of an ONNX or TensorFlow Lite file: more than that neither keeps in one file


def check_size(size: int, limit: int, name: str | Path, what: str) -> None:
    """Refuses what is larger than its limit.

    Args:
        size: bytes found so far.
        limit: one of the limits above, in bytes.
        name: the file's name in the message.
        what: what is that large, such as "a table".

    Raises:
        UserError: ``size`` is above ``limit``.
    """
    if size > limit:
        raise UserError(f"{name}: expected {what} of at most {limit:,} bytes, found more")


def read_bytes(path: str | Path, limit: int, what: str) -> bytes:
    """The bytes of a file that is not larger than its limit.

    Raises:
        UserError: the file is larger.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        check_size(status.st_size, limit, path, what)
        # A device or pipe has no size. Not the limit for a file: Python would take that much memory.
        data = file.read((status.st_size if stat.S_ISREG(status.st_mode) else limit) + 1)
    check_size(len(data), limit, path, what)
    return data
