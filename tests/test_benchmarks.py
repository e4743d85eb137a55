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
from conftest import ROOT, run_python

sys.path.insert(0, str(ROOT / "benchmarks"))

import bare_loop
import flops
import gpu
import input as reading
import step
import torch_peer
import workload

import config
import runtime
from data_helper import open_split
from files import UserError, run_command
from reading import arrays

# --- gpu.py ---------------------------------------------------------------------------------------------------------

# A toy run in one process where TensorFlow cannot be imported, with a network that compiles at once; the last row does
# as if the batch did not fit.
DRIVER = """
import sys, time
sys.path.insert(0, {benchmarks!r})
sys.modules["tensorflow"] = None  # every import of it fails
import runtime
runtime.choose_backend("jax")
import cnn_model, gpu, gpu_rows, keras

def backbone(size, weights):
    pixels = keras.Input((size, size, 3))
    return keras.Model(pixels, keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(pixels), name="backbone")

def run_row(case, folder, seconds):
    if case.get("start") == "kept":
        return {{"failed": gpu.why_failed("E0: ...\\nRESOURCE_EXHAUSTED: Out of memory while trying to allocate")}}
    return gpu_rows.measure({{**case, "spawned": time.time(), "seconds_left": seconds}})

cnn_model.ARCHITECTURES["mini_xcp"] = cnn_model.Architecture(backbone, 16, 3, "tf")
gpu.run_row = run_row
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
    speed, cold, kept, peer = result["rows"]
    assert speed["flops_per_image"] == 3 * 2 * (216 * 256 + 8 * 1792 + 1792 * 7)
    assert speed["images_per_s"] == pytest.approx(8 / speed["seconds"])
    assert speed["utilisation"] == pytest.approx(speed["flops_per_image"] * speed["images_per_s"] / 1e9)
    assert speed["fit_over_bare"] > 0 and speed["ad_corre_over_ce"] > 0 and speed["rounds"] == 3
    assert set(speed["bare_stages"]) == {"trace", "lower", "compile"} and min(speed["bare_stages"].values()) > 0
    assert cold["first_step_s"] == pytest.approx(sum(cold["stages"].values()), rel=0.05)
    assert 0 < cold["step_program"]["compile"] <= cold["stages"]["compile"] and cold["programs"] >= 1
    assert kept["failed"] == "out of memory" and peer["failed"].startswith("not run: ")
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and {line.count("|") for line in table} == {10}
    assert table[4] == "| start kept | mini_xcp, 16 px | 8 | - | - | - | - | - | out of memory |"
    assert "a toy size, no measurement" in done.stdout


@pytest.mark.slow
def test_a_row_is_a_process_of_its_own(tmp_path):
    case = {"what": "device", "cache": "device"}
    found = gpu.run_row(case, str(tmp_path), 300.0)
    assert found["platform"] in ("cpu", "gpu") and "jax" in found["versions"], found
    assert gpu.run_row(case, str(tmp_path), 0.01)["failed"].startswith("not run")
    assert gpu.why_failed("Traceback\n  a | b\n\nKeyError: 'x|y'\n") == "KeyError: 'x/y'"
    assert gpu.why_failed("") == ""


def test_published_flops_of_xception():
    """8.4e9 products at 299 px (timm's model card of legacy_xception), 22.9 million parameters."""
    network = keras.applications.Xception(weights=None)
    assert flops.multiply_adds(network) == pytest.approx(8.4e9, rel=0.01)
    assert flops.forward_flops(network) == 2 * flops.multiply_adds(network)


def test_peaks_are_those_of_the_device():
    assert flops.peak_tflops("NVIDIA H100 80GB HBM3", "mixed_bfloat16") == 989.5
    assert flops.peak_tflops("NVIDIA H100 PCIe", "mixed_bfloat16") == 756.5
    assert flops.peak_tflops("NVIDIA A100-SXM4-40GB", "tf32") == 156.0
    assert flops.peak_tflops("cpu", "tf32") is None and flops.peak_tflops("cpu", "tf32", 7.0) == 7.0


def test_the_time_that_is_left_decides_what_is_run(monkeypatch, capsys):
    device = {"kind": "NVIDIA H200", "platform": "gpu"}
    monkeypatch.setattr(gpu, "run_row", lambda case, *rest: device if case["what"] == "device" else 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", "0.1"])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert {row["failed"] for row in rows} == {"not run"}
    speed = [(row["arch"], row["size"], row["batch"]) for row in rows if row["what"] == "speed"]
    assert speed == [("mini_xcp", 48, 256), ("xcp", 96, 256), ("xcp", 224, 128)]
    assert [(row["size"], row["batch"]) for row in rows if row["what"] == "peer"] == [(96, 256), (224, 128)]
    cold = {row["cache"]: rows.index(row) for row in rows if row.get("start") == "cold"}
    earlier = [{row["cache"] for row in rows[:place]} for place in cold.values()]
    assert all(cache not in caches for cache, caches in zip(cold, earlier, strict=True)), "a cold start finds programs"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", "0"])
    assert run_command(gpu.main) == 2
    assert "--minutes: expected more than 0, received 0.0" in capsys.readouterr().err


def test_the_peer_of_the_same_size_is_compared():
    speed = {"what": "speed", "arch": "xcp", "images_per_s": 900.0}
    before = [{**speed, "size": 96}, {**speed, "size": 224, "images_per_s": 300.0}]
    row = {"what": "peer", "arch": "xcp", "size": 224, "images_per_s": 200.0}
    gpu.compare(row, before, peak=None)
    assert row["fit_over_peer"] == 1.5 and "fit / peer 1.500" in gpu.notes(row)[0]
    gpu.compare(alone := {**row, "size": 48}, before, peak=None)
    assert alone["fit_over_peer"] == 1.5, "unchanged"


@pytest.mark.slow
def test_the_peer_trains(monkeypatch):
    torch = pytest.importorskip("torch")

    class Network(torch.nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1))
            self.head = torch.nn.Linear(4, num_classes)

        def forward(self, x):
            assert x.is_contiguous(memory_format=torch.channels_last) and x.min() >= -1 and x.max() <= 1
            return self.head(self.layers(x).flatten(1))

    made = []

    def create_model(name, pretrained, num_classes):
        made.append(Network(num_classes))
        assert name == "xception" and not pretrained
        return made[0]

    old_timm = SimpleNamespace(is_model=lambda name: name == "xception", create_model=create_model, __version__="0.8")
    monkeypatch.setitem(sys.modules, "timm", old_timm)
    monkeypatch.setattr(torch_peer, "why_not", lambda device: "")
    monkeypatch.setattr(torch_peer, "IMAGES", 8)
    first = torch.random.get_rng_state()
    case = {"size": 12, "batch": 4, "turn_s": 0.01, "rounds": 2, "precision": "mixed_bfloat16"}
    row = torch_peer.measure(case, device="cpu", compiled=False)
    assert row["images_per_s"] == pytest.approx(4 / row["seconds"]) and row["rounds"] == 2
    torch.random.set_rng_state(first)
    fresh = Network(7).head.weight
    assert not torch.equal(fresh, made[0].head.weight), "the optimiser changed nothing"


def test_a_peer_that_is_not_there_says_so(monkeypatch):
    monkeypatch.setattr(torch_peer.importlib.util, "find_spec", lambda name: None if name == "timm" else True)
    assert torch_peer.measure({"what": "peer"}) == {"failed": "not run: timm is not installed"}


# --- input.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["map", "pread"])
@pytest.mark.parametrize("workers", [1, 2])
def test_reading_is_counted(tmp_path, way, workers):
    path = reading.write_noise_split(tmp_path, "noise", (8, 8, 3), 300)
    split = open_split(tmp_path, "noise", "train")
    expected = arrays.Rows if way == "pread" else np.memmap
    assert type(reading.make_batches(split, 8, way).images) is expected
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

    monkeypatch.setattr(reading, "make_trainer", make_trainer)
    path = reading.write_sparse_split(tmp_path, "sparse", (8000, 224, 224, 3))
    found = os.stat(path)
    assert found.st_size == 128 + 8000 * 224 * 224 * 3 and 512 * found.st_blocks < 2**20
    row = reading.read_sparse(str(tmp_path), "tensorflow", None, 5, np.inf)
    assert row["images"] == 40 and row["open_s"] > 0
    for place in reading.MEMORY:
        assert row[place]["VmRSS"] >= row[place]["RssAnon"] > 0
    assert row["read"]["RssFile"] - row["opened"]["RssFile"] < 2**10


# --- step.py and its loops ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bare_loop_and_fit_train(tmp_path):
    """Both lower the loss of data that they can learn by heart, and so many steps are so many."""
    split = workload.write_split(tmp_path, (16, 16, 1), 14)
    model = config.ModelConfig(input_size=16, embedding_size=8)
    settings = config.TrainConfig(batch_size=7, model=model, epochs=40)
    fit_seconds = workload.make_fit(settings, split)
    assert len(fit_seconds(2)) == 2 and min(fit_seconds(1)) > 0
    parts = bare_loop.Parts(settings, split.class_names, {})
    loop = bare_loop.make_loop(parts, split.images, split.labels, 7)

    def loss():
        outputs = parts.network(split.images, training=True)
        return float(bare_loss(split.labels, outputs["logits"], outputs["embeddings"])["loss"])

    bare_loss = parts.loss
    before = loss()
    loop(1)
    loop(30)
    assert int(parts.optimizer.iterations) == 31 and loss() < before


@pytest.mark.slow
@pytest.mark.parametrize("in_one_call", [True, False])
def test_the_bare_loop_on_jax_trains(tmp_path, in_one_call):
    done = run_python("-c", JAX_LOOP, ROOT / "benchmarks", in_one_call, env_changes={"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr


JAX_LOOP = """
import sys
sys.path.insert(0, sys.argv[1])
import runtime
runtime.choose_backend("jax")
import cnn_model, config, keras, numpy as np
from bare_loop import JaxLoop, Parts

def backbone(size, weights):
    pixels = keras.Input((size, size, 1))
    return keras.Model(pixels, keras.layers.Conv2D(8, 3)(pixels), name="backbone")

cnn_model.ARCHITECTURES["mini_xcp"] = cnn_model.Architecture(backbone, 16, 1, "tf")
settings = config.TrainConfig(model=config.ModelConfig(embedding_size=8))
parts = Parts(settings, tuple("abcdefg"), {})
first = [np.array(v) for v in parts.network.trainable_variables]
pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 1), np.uint8)
loop = JaxLoop(parts, pixels, np.arange(16) % 7, 8, in_one_call=sys.argv[2] == "True")
loop(1)
loop(4)
assert int(loop.state["step"]) == 5 and set(loop.stages) == {"trace", "lower", "compile"}
assert int(np.array(loop.state["optimizer"][0])) == 5
assert all((np.array(new) != old).any() for new, old in zip(loop.state["weights"], first))
assert np.array(loop.state["loss"][0]).min(axis=1).max() >= 0, "the history remembers nothing"
"""


def test_options_without_a_meaning_are_refused(monkeypatch):
    cases = [
        (["--rounds", "0"], "--rounds.*1.*0"),
        (["--fit", "--backend", "torch"], "--fit.*torch"),
        (["--kernels", "--backend", "jax"], "--kernels.*tensorflow.*jax"),
    ]
    for words, facts in cases:
        monkeypatch.setattr(sys, "argv", ["step.py", *words])
        with pytest.raises(UserError, match=facts):
            step.main()


@pytest.mark.slow
def test_fit_is_compared_with_the_bare_loop():
    runtime.choose_backend("tensorflow")
    row = step.measure_fit(16, 7, steps=2, rounds=2)
    assert row["fit_over_bare"] > 0 and row["fit_s"] > 0 and row["bare_s"] > 0


@pytest.mark.slow
def test_the_steps_profile_names_its_kernels():
    kernels = step.profile("mini_xcp", 16, 8, steps=1)
    assert any("Conv2D" in kernel for kernel in kernels) and not {"Process", "Run"} & set(kernels)
    assert 0.5 < sum(kernels.values()) <= 1
