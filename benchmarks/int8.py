"""Measures ways to quantise a network: accuracy, agreement with float32 and size of each file.

``python benchmarks/int8.py --data-dir DIR`` quantises the bundled model in every way of `WAYS` (512 images of
fer2013/train, seed 0) and measures each on fer2013/val. The first row of each format is what ``export --quantize int8``
writes; another row differs in what it names.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import runtime
from files import run_command

# Format, name, other arguments of `quantization.quantize_onnx` or `quantized_tflite`, the fewest channels.
WAYS = (
    ("onnx", "as exported", {}, None),
    ("onnx", "largest value for the 99.99th percentile", {"calibrate_method": "MinMax"}, None),
    ("onnx", "weights of 8 bits", {"reduce_range": False}, None),
    ("onnx", "weights of 8 bits, largest value", {"reduce_range": False, "calibrate_method": "MinMax"}, None),
    ("onnx", "one scale per weight tensor", {"per_channel": False}, None),
    ("onnx", "first convolution too", {}, 1),
    ("onnx", "ReLU in float32", {"op_types_to_quantize": ["Conv", "MatMul", "Gemm", "Add"]}, None),
    ("tflite", "as exported", {}, None),
    ("tflite", "first convolution too", {}, 1),
    ("tflite", "everything", {"all_layers": True}, None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="model file; default: the one that comes with the project")
    parser.add_argument("--data-dir", default="data", help="folder of the prepared data sets")
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--only", nargs="+", choices=("onnx", "tflite"), default=("onnx", "tflite"), help="formats")
    options = parser.parse_args()
    runtime.choose_backend("tensorflow")
    from data_helper import open_split
    from model_files import export, model_file, quantization
    from test_model import DEFAULT_WEIGHTS

    train, val = (open_split(options.data_dir, "fer2013", split) for split in ("train", "val"))
    network, info = model_file.load_model(options.weights or DEFAULT_WEIGHTS)
    images, source = quantization.calibration_images(train, info.network.input_size, options.images, seed=0)
    data = quantization.Quantization(images, val, source, largest_drop=100)
    print(f"calibrated on {source}, measured on {val.name}, n = {len(val):,}")
    print(f"{'format':<8}{'way':<44}{'accuracy':>9}{'points':>8}{'same label':>12}{'cosine':>8}{'kB':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for format, name, changes, channels in WAYS:
            if format not in options.only:
                continue
            path = Path(folder) / f"network.{format}"
            with way(format, changes, channels):
                found = export.export_quantized(network, info, path, format, data)
            print(
                f"{format:<8}{name:<44}{found.after:>9.2%}{found.points:>+8.2f}{found.same_label:>12.2%}"
                f"{found.cosine:>8.4f}{path.stat().st_size / 1e3:>6.0f}",
                flush=True,
            )
    print(f"float32: {found.before:.2%}")


@contextlib.contextmanager
def way(format: str, changes: dict[str, Any], channels: int | None) -> Iterator[None]:
    """While the block runs, the exporter quantises in another way."""
    from model_files import export, quantization

    if "calibrate_method" in changes:
        from onnxruntime.quantization import CalibrationMethod

        changes = changes | {"calibrate_method": CalibrationMethod[changes["calibrate_method"]]}
    name = "quantize_onnx" if format == "onnx" else "quantized_tflite"
    usual = getattr(quantization, name)
    with (
        mock.patch.object(export, name, lambda *given: usual(*given, **changes)),
        mock.patch.object(quantization, "SMALLEST_CHANNELS", channels or quantization.SMALLEST_CHANNELS),
    ):
        yield


if __name__ == "__main__":
    raise SystemExit(run_command(main))
