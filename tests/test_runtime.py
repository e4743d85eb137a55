"""The choice of the backend and of its kernels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import keras  # TensorFlow is running
import pytest
from conftest import ROOT, run_python

import runtime
from files import UserError

NOTICE = re.compile(
    r"absl|oneDNN|cuda|cuInit|rebuild TensorFlow|Memory patch|rendezvous|WARNING|[IWEF]\d{4} \d\d:", re.I
)
RECOGNIZE = f"""
from test_model import TestModels
TestModels(r"{{weights}}").recognize_fer(r"{ROOT / "examples" / "astronaut.png"}")
"""
# Every user's environment has neither of our tests' variables.
PLAIN = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": None, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def plain_environment(monkeypatch):
    for name, value in PLAIN.items():
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_a_first_recognition_prints_no_notices(tiny_weights, plain_environment, tmp_path):
    done = run_python("-c", RECOGNIZE.format(weights=tiny_weights), cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout.split()) == 1
    assert done.stderr in ("", "no GPU found: running on the CPU\n")


@pytest.mark.slow
def test_the_first_cell_of_a_notebook_prints_no_notices(tiny_weights, plain_environment, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(RECOGNIZE.format(weights=tiny_weights))])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[0].outputs)
    assert printed and not NOTICE.search(printed)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_shows_a_bar_and_no_notices_from_the_first_epoch_to_ctrl_c(plain_environment, tmp_path):
    import pexpect

    from datasets.synthetic import PrepareSyntheticConfig, write_synthetic_splits

    write_synthetic_splits(PrepareSyntheticConfig(str(tmp_path), num_train=2000, num_val=28, num_test=28, size=24))
    command = f"{ROOT / 'train.py'} --data-dir {tmp_path} --run-dir {tmp_path / 'run'} --epochs 50 --batch-size 20"
    terminal = pexpect.spawn(
        sys.executable, [*command.split(), "--input-size", "24"], dimensions=(24, 80), timeout=300, encoding="utf-8"
    )
    terminal.logfile_read = shown = open(tmp_path / "shown", "w+", encoding="utf-8")  # noqa: SIM115 - closed below
    terminal.expect_exact("loss = 7.14 ce + 1 fd + 1 md + 1 ed")
    terminal.expect(r"epoch  1/50 \|.*/100 .*loss")
    terminal.expect(r"epoch  1/50  train: loss")
    terminal.expect(r"epoch  2/50 \|.*loss")
    terminal.sendintr()
    terminal.expect_exact("stopped by Ctrl-C")
    terminal.expect(pexpect.EOF)
    terminal.close()
    shown.seek(0)
    text = shown.read()
    shown.close()
    assert terminal.exitstatus == 130 and "Traceback" not in text
    assert not NOTICE.search(text)


BROKEN = """
import os
os.write(2, b"why the library is broken\\n")
raise ImportError("libcudart.so.99: cannot open shared object file")
"""


def test_a_failing_import_says_why(tmp_path):
    """The backend's own words on file descriptor 2, and the error."""
    (tmp_path / "tensorflow.py").write_text(BROKEN)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import runtime; runtime.import_keras()"
    done = run_python("-c", code)
    assert done.returncode == 1
    assert "why the library is broken" in done.stderr and "libcudart.so.99" in done.stderr


def test_errors_after_the_import_are_shown(capfd):
    """File descriptor 2 is the screen again, also after an interruption."""
    with pytest.raises(KeyboardInterrupt), runtime.notices_hidden():
        os.write(2, b"a notice\n")
        raise KeyboardInterrupt
    with runtime.notices_hidden():
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'a notice')"], check=True)
    os.write(2, b"an error\n")
    assert capfd.readouterr().err == "an error\n"


def test_on_a_machine_with_a_driver_the_notices_say_why_tensorflow_has_no_gpu(capfd, monkeypatch):
    monkeypatch.setattr(runtime, "_has_driver", lambda: True)
    for found, shown in ((False, "why\n"), (True, "")):
        monkeypatch.setattr(runtime, "has_gpu", lambda found=found: found)
        with runtime.notices_hidden():
            os.write(2, b"why\n")
        assert capfd.readouterr().err == shown


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_onednn_is_on_unless_the_user_says_no(monkeypatch, before, after):
    """TensorFlow leaves it off on a CPU without AVX-512."""
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", before or "")
    if before is None:
        monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS")
    runtime.choose_backend("tensorflow")
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == after


KERAS_JSON = """
import runtime
runtime.import_keras()
import keras, numpy as np, cnn_model
network = cnn_model.build_model("mini_xcp", num_embeddings=2, embedding_size=4, input_size=24)
outputs = network(np.zeros((1, 24, 24, 3), "uint8"))
print(outputs["embeddings"].dtype.name, network.layers[-1].kernel.dtype, keras.config.image_data_format())
print(keras.config.epsilon(), keras.config.floatx())
"""


@pytest.mark.slow
def test_a_users_keras_json_changes_no_network(tmp_path):
    settings = {"floatx": "float16", "epsilon": 1e-3, "backend": "tensorflow", "image_data_format": "channels_first"}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    done = run_python("-c", KERAS_JSON, env_changes={"KERAS_HOME": str(tmp_path), "KERAS_MAX_EPOCHS": "1"})
    assert done.stdout.split() == ["float32", "float32", "channels_last", "1e-07", "float32"], done.stderr


def test_another_backend_than_the_running_one_is_refused():
    with pytest.raises(UserError, match="Keras runs on tensorflow already; set KERAS_BACKEND=jax"):
        runtime.choose_backend("jax")


def test_the_fused_batch_norm_is_for_tensorflow_without_xla(monkeypatch):
    assert runtime.has_fused_batch_norm()
    monkeypatch.setattr(runtime, "jit_compile", lambda: True)
    assert not runtime.has_fused_batch_norm()


# Prints the folder of the kept programs, a result, and how often JAX compiled, found and missed a program.
COMPILES = """
import collections
import jax, keras, numpy as np
import runtime
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.rpartition("/")[2]]))
kept = runtime.keep_compiled_programs(always=True)
assert kept is None or runtime.keep_compiled_programs(always=True) == kept
keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
model.compile("adam", "mse")
x = np.ones((4, 3), "float32")
model.fit(x, x[:, :2], epochs=2, verbose=0)
print(kept, float(model.predict(x, verbose=0).sum()))
print(counts["compile_requests_use_cache"], counts["cache_hits"], counts["cache_misses"])
"""


def compiles(**environment):
    done = run_python("-c", COMPILES, env_changes={"KERAS_BACKEND": "jax", **environment})
    assert done.returncode == 0, done.stderr
    kept, result, *counts = done.stdout.split()
    ours = [line for line in done.stderr.splitlines() if "compiled programs" in line]
    return kept, result, list(map(int, counts)), ours


@pytest.mark.slow
def test_the_second_process_compiles_nothing(tmp_path):
    kept, result, (requests, hits, misses), _ = compiles(AD_CORRE_CACHE=str(tmp_path))
    assert kept == str(tmp_path / "jax") and requests > 10 and hits + misses == requests and misses > 10
    torn = tmp_path / "jax" / "jit_step-0123-cache"
    torn.write_bytes(b"half a prog")  # of a killed process
    again = compiles(AD_CORRE_CACHE=str(tmp_path))
    assert again == (kept, result, [requests, requests, 0], [])
    assert not torn.exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_costs_one_line_and_a_users_own_is_kept(tmp_path):
    (tmp_path / "file").touch()
    kept, result, (_, hits, _), lines = compiles(AD_CORRE_CACHE=str(tmp_path / "file"))
    assert (kept, hits, len(lines)) == ("None", 0, 1) and str(tmp_path / "file") in lines[0]
    theirs = tmp_path / "theirs"
    environment = {"AD_CORRE_CACHE": str(tmp_path / "ours"), "JAX_COMPILATION_CACHE_DIR": str(theirs)}
    assert compiles(**environment)[::3] == (str(theirs), [])
    assert compiles(**environment, JAX_ENABLE_COMPILATION_CACHE="false")[:2] == ("None", result)
    assert not (tmp_path / "ours").exists()


def test_programs_are_kept_for_a_gpu_on_jax(monkeypatch, tmp_path):
    monkeypatch.setenv("AD_CORRE_CACHE", str(tmp_path))
    assert runtime.keep_compiled_programs(always=True) is None  # TensorFlow
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    monkeypatch.setattr(runtime, "has_gpu", lambda: False)
    assert runtime.keep_compiled_programs() is None and not any(tmp_path.iterdir())
