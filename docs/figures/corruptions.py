"""Measures a model under the 13 corruptions, and writes the section on them in the model card.

    python docs/figures/corruptions.py --data-dir data

Writes ``figures/<model>.corruptions.png`` and ``<model>.corruptions.json`` beside the card, and replaces the table
between the card's two ``corruptions`` comments. TensorFlow; about 30 seconds on two idle cores.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, Python looks in docs/figures only

import runtime
from config import DatasetName
from files import UserError, copy_file, run_command, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
CARD = ROOT / "trained_models" / "README.md"
BLOCK = re.compile(r"(<!-- corruptions -->\n).*?(<!-- end of corruptions -->)", re.S)
KEPT = ("dataset", "split", "n", "accuracy", "intervals", "views", "seed", "commit", "corruptions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=ROOT / "trained_models" / "fer2013_mini_xcp.weights.h5", type=Path)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--split", default="val")
    parser.add_argument("--card", default=CARD, type=Path, help="Markdown file with the two comments")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    card = options.card.read_text(encoding="utf-8")
    if not BLOCK.search(card):
        raise UserError(f"{options.card}: expected <!-- corruptions --> and <!-- end of corruptions -->, found none")
    name = options.weights.name.removesuffix(".weights.h5")
    runtime.choose_backend("tensorflow")
    from reporting import robustness
    from test import EvaluateConfig, evaluate

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):  # it would name the folder
        result = evaluate(
            EvaluateConfig(
                str(options.weights),
                DatasetName.fer2013,
                data_dir=options.data_dir,
                split=options.split,
                run_dir=folder,
                corruptions=True,
            )
        )
        copy_file(Path(folder) / "corruptions.png", options.card.parent / "figures" / f"{name}.corruptions.png")
    write_json(options.card.parent / f"{name}.corruptions.json", {key: result[key] for key in KEPT})
    head = f"{result['dataset']}/{result['split']}: {result['n']:,} images"
    table = "\n".join([head, "", *robustness.lines(result)])
    write_text(options.card, BLOCK.sub(lambda found: f"{found[1]}```\n{table}\n```\n{found[2]}", card))
    print(table)
    print(f"\nwrote the section in {options.card}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
