"""Prints one plain line in place of JAX's page when another process of the group has stopped.

A timeout of our own cannot do that: JAX's coordination service ends this process from compiled code (a page about RPCs
and a stack of C++ functions on file descriptor 2, then SIGABRT), and no Python code runs after that. Therefore file
descriptor 2 is redirected to a small process (this file, run by Python alone). It passes everything on except that
page, and prints one line in its place. Python's own standard error is not affected.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

# The first lines of what JAX 0.5 to 0.10 writes, `E1126 01:50:51.972640   12535 coordination_service_agent.cc:289] …`.
# Other words pass through: then the process ends in the same way, with JAX's own page.
_LOST = re.compile(
    rb"Polled an error from coordination service|Use error polling to propagate the following error|"
    rb"Terminating process because the JAX distributed service detected fatal errors"
)

_FAILED = b"exchange failed: "


def translate(lines: Iterable[bytes], message: str) -> Iterator[bytes]:
    """The lines up to JAX's page about a lost process or up to `report`, then ``message``, and nothing after it."""
    for line in lines:
        if line.startswith(_FAILED):
            yield message.encode() + b" (" + line[len(_FAILED) :].strip() + b")\n"
            break
        if _LOST.search(line):
            yield message.encode() + b"\n"
            break
        yield line
    for _ in lines:  # to the end, or the writer would be killed by its closed pipe
        pass


def replace_page(message: str) -> None:
    """Prints ``message`` in place of JAX's page when JAX ends this process because another one is lost."""
    sys.stderr.flush()
    screen = os.dup(2)
    words = subprocess.Popen([sys.executable, "-I", "-S", __file__, message], stdin=subprocess.PIPE)
    os.dup2(words.stdin.fileno(), 2)
    words.stdin.close()
    sys.stderr = open(screen, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - for good


def report(reason: str) -> None:
    """Prints the message of `replace_page` with a reason, unless it has been printed already."""
    os.write(2, _FAILED + " ".join(reason.split()).encode() + b"\n")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes here
    for text in translate(iter(sys.stdin.buffer), sys.argv[1]):
        sys.stderr.buffer.write(text)
        sys.stderr.flush()
