"""Runs notebooks in a real Jupyter kernel, and reads their outputs."""

from __future__ import annotations

import base64
import copy
import os
import re
from pathlib import Path

import cv2
import nbformat
import numpy as np
from conftest import ROOT
from nbclient import NotebookClient

# A progress bar, or what is left of one that was cleared.
_BAR = re.compile(r"\d+%\||\d+(image|frame|face|step|it)/s|^\s*$")


def run_notebook(notebook: nbformat.NotebookNode, folder: Path, path: Path | None = ROOT) -> nbformat.NotebookNode:
    """Executes a copy of a notebook; a cell that fails raises with its traceback.

    Args:
        notebook: its kept outputs are dropped.
        folder: the kernel's working directory.
        path: what the kernel's path begins with, besides the working directory.
    """
    notebook = copy.deepcopy(notebook)
    for each in notebook.cells:
        if each.cell_type == "code":
            each.outputs, each.execution_count = [], None
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "KERAS_"))}
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",  # the Python that runs the tests
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    environment["PYTHONPATH"] = "" if path is None else str(path)
    client.execute(env=environment)
    return notebook


def text_of(part: nbformat.NotebookNode) -> str:
    """Standard output and the text of what is shown, of a cell; the Markdown of a notebook."""
    if "cells" in part:
        return "\n".join(each.source for each in part.cells if each.cell_type == "markdown")
    texts = [
        output.get("text", "") if output.output_type == "stream" else output.data.get("text/plain", "")
        for output in part.outputs
        if output.get("name") != "stderr"
    ]
    return "".join(texts).strip()


def shown_images(cell: nbformat.NotebookNode) -> list[np.ndarray]:
    """The images that a cell shows, uint8 (H, W, 3)."""
    data = [
        output.data[kind]
        for output in cell.outputs
        if output.output_type != "stream"
        for kind in ("image/png", "image/jpeg")
        if kind in output.data
    ]
    return [cv2.imdecode(np.frombuffer(base64.b64decode(each), np.uint8), cv2.IMREAD_COLOR) for each in data]


def notices(notebook: nbformat.NotebookNode) -> list[str]:
    """The lines on standard error that are no progress bar."""
    texts = [
        output.text
        for each in notebook.cells
        if each.cell_type == "code"
        for output in each.outputs
        if output.get("name") == "stderr"
    ]
    return [line for text in texts for line in re.split(r"[\r\n]", text) if not _BAR.search(line)]
