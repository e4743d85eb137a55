"""The benchmarks' own arithmetic, and each of their parts once at a toy size; nothing here measures anything."""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import ROOT, run_python, write_split

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import input as reading
import precision
import step
import train_step

import dataset_class
from data_helper import open_split
from files import UserError, run_command

# --- gpu.py ---------------------------------------------------------------------------------------------------------

# All of a toy run in one process where TensorFlow cannot be imported, with a network that compiles at once; the row in
# float32 does as if the batch did not fit.
DRIVER = """
import sys
sys.path.insert(0, {benchmarks!r})
sys.modules["tensorflow"] = None  # every import of it fails
import gpu, runtime
runtime.choose_backend("jax")
import cnn_model, keras

def backbone(size, weights):
    pixels = keras.Input((size, size, 3))
    return keras.Model(pixels, keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(pixels), name="backbone")

def run_row(case, seconds):
    if case.get("precision") == "float32":
        return {{"failed": gpu.why_failed("E0: ...\\nRESOURCE_EXHAUSTED: Out of memory while trying to allocate")}}
    return gpu.measure(case)

cnn_model.ARCHITECTURES["mini_xcp"] = cnn_model.Architecture(backbone, 16, 3, "tf")
gpu.run_row, gpu.TURN_S = run_row, 1e-3
sys.argv[1:] = ["--toy", "--peak-tflops", "0.001", "--output", {output!r}]
gpu.main()
assert not [name for name in sys.modules if name.startswith("tensorflow.")]
"""


@pytest.mark.slow
def test_the_gpu_benchmark_measures_every_row(tmp_path, monkeypatch):
    """FLOPs by hand: 3 x 3 x 3 x 8 products at 16 x 16 places, 8 x 1,792 and 1,792 x 7 in the head."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling takes most of the time
    output = tmp_path / "gpu.json"
    driver = DRIVER.format(benchmarks=str(ROOT / "benchmarks"), output=str(output))
    done = run_python("-c", driver)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert result["toy"] and result["device"]["platform"] == "cpu" and result["device"]["commit"]
    rows = result["rows"]
    assert [(row["what"], row["precision"]) for row in rows] == [
        *[("train", name) for name in ("tf32", "mixed_bfloat16", "float32")],
        ("ratios", "mixed_bfloat16"),
        *[("inference", name) for name in ("mixed_bfloat16", "tf32")],
    ]
    forward = 2 * (216 * 256 + 8 * 1792 + 1792 * 7)
    for row in rows:
        if row["precision"] == "float32":
            assert row["failed"] == "out of memory" and "seconds" not in row
            continue
        assert row["flops_per_image"] == (1 if row["what"] == "inference" else 3) * forward
        assert row["images_per_s"] == pytest.approx(4 / row["seconds"])
        assert row["utilisation"] == pytest.approx(row["flops_per_image"] * row["images_per_s"] / 1e9)
    ratios = rows[3]
    assert ratios["ad_corre_over_ce"] > 0 and ratios["augmentation_over_none"] > 0
    assert ratios["input_share"] == pytest.approx(1 - ratios["seconds"] / ratios["fed_seconds"])
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and {line.count("|") for line in table} == {10}
    assert table[4] == "| train | float32 | 4 | - | - | - | - | - | out of memory |"
    assert "a toy size, no measurement" in done.stdout


def test_a_row_is_a_process_of_its_own():
    found = gpu.run_row({"what": "device"}, 300.0)
    assert found["platform"] in ("cpu", "gpu") and "jax" in found["versions"], found
    assert list(gpu.run_row({"what": "device"}, 0.01)) == ["failed"]
    assert gpu.why_failed("Traceback\n  a | b\n\nKeyError: 'x|y'\n") == "KeyError: 'x/y'"
    assert gpu.why_failed("") == ""


def test_published_flops_of_xception():
    """8.4e9 products at 299 px (timm's model card of legacy_xception), 22.9 million parameters."""
    network = keras.applications.Xception(weights=None)
    assert gpu.multiply_adds(network) == pytest.approx(8.4e9, rel=0.01)
    assert gpu.forward_flops(network) == 2 * gpu.multiply_adds(network)


def test_peaks_are_those_of_the_device():
    assert gpu.peaks_of("NVIDIA H100 80GB HBM3", None)["mixed_bfloat16"] == 989.5
    assert gpu.peaks_of("NVIDIA H100 PCIe", None)["mixed_bfloat16"] == 756.5
    assert gpu.peaks_of("NVIDIA A100-SXM4-40GB", None)["tf32"] == 156.0
    assert gpu.peaks_of("cpu", None) == {}
    assert set(gpu.peaks_of("cpu", 7.0).values()) == {7.0}


def test_the_time_that_is_left_decides_what_is_run(monkeypatch, capsys):
    device = {"kind": "NVIDIA H200", "platform": "gpu"}
    monkeypatch.setattr(gpu, "run_row", lambda case, seconds: device if case["what"] == "device" else 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", "0.1"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert {row["failed"] for row in rows} == {"not run"} and {row["arch"] for row in rows} == {"xcp"}
    assert sorted({row["batch"] for row in rows if row["what"] == "train"}) == [64, 128, 256, 512, 1024]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", "0"])
    assert run_command(gpu.main) == 2
    assert capsys.readouterr().err == "error: --minutes: expected more than 0, received 0.0\n"


def test_medians_of_turns(monkeypatch):
    """Sides of 1 and 3 s a step by the clock that they move, one of them with a slow turn."""
    clock = SimpleNamespace(now=0.0, turns=0)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock.now)

    def side(seconds):
        def run(steps):
            clock.turns += 1
            clock.now += steps * (seconds if clock.turns != 6 else 50 * seconds)

        return run

    assert gpu.take_turns([side(1.0), side(3.0)], 3) == [1.0, 3.0]
    assert clock.turns == 2 * 2 + 2 * 3


# --- input.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["map", "pread"])
@pytest.mark.parametrize("workers", [1, 2])
def test_reading_is_counted(tmp_path, way, workers):
    path = reading.write_noise_split(tmp_path, "noise", (8, 8, 3), 300)
    split = open_split(tmp_path, "noise", "train")
    expected = dataset_class._DiskRows if way == "pread" else np.memmap
    assert type(reading.make_batches(split, 8, way)._images) is expected
    assert dataset_class.MAPPED_BYTES == 2**30
    row = reading.read_for(split, way, workers, 60.0)
    assert row["images"] == 256, "two whole batches of 128"
    assert row["images_per_s"] > 0 and row["cpu_us"] > 0
    del split
    before = reading.bytes_from_disk()
    reading.drop_cached_pages(path)
    path.read_bytes()
    assert reading.bytes_from_disk() - before >= 0
    assert reading.powers_of_two(1) == [1] and reading.powers_of_two(6) == [1, 2, 4, 6]


def test_waiting_is_what_the_training_loop_waits(tmp_path):
    """A source that takes 30 ms a batch before a step that takes next to nothing."""

    class Slow(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            time.sleep(0.03)
            return np.zeros((2, 3), np.float32), np.zeros((2, 1), np.float32)

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(Slow(), verbose=0)
    clock = reading.WaitClock(model)
    start = time.perf_counter()
    model.fit(Slow(), epochs=2, shuffle=False, verbose=0)
    took = time.perf_counter() - start
    assert len(clock.waits) == len(clock.ends) == 10
    # Read ahead, a batch may be there; on average there is none.
    assert 0.5 * 10 * 0.03 < sum(clock.waits) < took


def test_the_sparse_file_takes_no_disk_and_is_read(tmp_path, monkeypatch):
    def make_trainer(arch, size, options):
        network = [keras.Input((224, 224, 3)), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(7)]
        model = keras.Sequential(network)
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
        return model

    monkeypatch.setattr(train_step, "make_trainer", make_trainer)
    path = reading.write_sparse_split(tmp_path, "sparse", (8000, 224, 224, 3))
    found = os.stat(path)
    assert found.st_size == 128 + 8000 * 224 * 224 * 3 and 512 * found.st_blocks < 2**20
    row = reading.read_sparse(str(tmp_path), "tensorflow", None, 5, np.inf)
    assert row["images"] == 40 and row["open_s"] > 0
    for place in reading.MEMORY:
        assert row[place]["VmRSS"] >= row[place]["RssAnon"] > 0
    # 1.2 GB is more than MAPPED_BYTES: none of it is mapped.
    assert row["read"]["RssFile"] - row["opened"]["RssFile"] < 2**10


# --- precision.py ---------------------------------------------------------------------------------------------------


def test_precisions_are_compared_seed_by_seed():
    """Differences of 0.02 and 0.04 to float32: 0.03 on average, deviation sqrt(2) / 100, t = 3, p = 0.2048."""
    accuracies = {"float32": [0.5, 0.7], "mixed_float16": [0.52, 0.74]}
    row = precision.summary("mixed_float16", accuracies, [3.0, 5.0], 700)
    assert (row["n"], row["seeds"], row["train_seconds"]) == (700, 2, 4.0)
    assert row["mean"] == pytest.approx(0.63) and row["difference"] == pytest.approx(0.03)
    assert row["difference_std"] == pytest.approx(2**0.5 / 100) and row["p"] == pytest.approx(0.2048, abs=1e-4)
    full = precision.summary("float32", accuracies, [3.0, 5.0], 700)
    assert full["difference"] is None and full["p"] is None
    lines = precision.format_table([full, row]).splitlines()
    assert lines[2] == "| float32 | 700 | 2 | 60.00% | 14.14 | - | - | - | 4 |"
    assert lines[3] == "| mixed_float16 | 700 | 2 | 63.00% | 15.56 | +3.00 | 1.41 | 0.20 | 4 |"


def test_precisions_want_a_seed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["precision.py", "--seeds", "0"])
    with pytest.raises(UserError, match="--seeds, --epochs: expected 1 or more, received 0 and 12"):
        precision.main()


# --- what input.py made necessary -----------------------------------------------------------------------------------


def test_large_files_are_read_without_the_map(tmp_path, monkeypatch):
    """The same batches; a part of a map, whose rows are not the file's, stays as it is; a file cut short is told."""
    folder = write_split(tmp_path, np.arange(40) % 7, shape=(5, 9, 3))
    split = open_split(tmp_path, "synthetic", "train")
    mapped = dataset_class.Batches(split, 7, seed=1)
    monkeypatch.setattr(dataset_class, "MAPPED_BYTES", 0)
    read = dataset_class.Batches(split, 7, seed=1)
    assert isinstance(mapped._images, np.memmap) and isinstance(read._images, dataset_class._DiskRows)
    for index in range(len(read)):
        images, labels = read[index]
        assert images.dtype == np.uint8 and images.flags.writeable
        np.testing.assert_array_equal(images, mapped[index][0])
        np.testing.assert_array_equal(labels, mapped[index][1])
    for part in (split.images[3:], np.asarray(split.images).copy()):
        assert dataset_class._readable(part) is part
    os.truncate(folder / "images.npy", 1000)
    with pytest.raises(UserError, match=r"images.npy: ends before row \d+; prepare the data set again"):
        read[0]


# --- step.py --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_steps_profile_names_its_kernels():
    kernels = step.profile("mini_xcp", 16, 8, steps=1)
    assert any("Conv2D" in kernel for kernel in kernels) and not {"Process", "Run"} & set(kernels)
    assert 0.5 < sum(kernels.values()) <= 1
