"""Runs a program in this process, and ends it when the process that started it has ended: ``worker.py PROGRAM ...``.

The starter holds the other end of this process's standard input and writes nothing there. The system closes it when the
starter ends, even if that one is killed with -9, on every system. The program itself reads an empty standard input.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

_SECONDS = 15  # to stop by itself; after that a compilation or a hanging disk is not waited for


def _end_with(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # on Windows this is the end already
    time.sleep(_SECONDS)
    os._exit(128 + signal.SIGTERM)


def main() -> None:
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
