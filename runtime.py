"""Sets up the backend: choice, seed, precision, GPU memory, compilation.

The only module that branches on the backend. Keras picks its backend when it is first imported, so
commands call `choose_backend` before they import anything that imports Keras.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from files import UserError, cache_folder

if TYPE_CHECKING:
    import numpy as np

_XLA_THREADS = ("PJRT_NPROC", "NPROC")  # the variables that XLA reads when it makes its threads, the first one first
_COMPILED_BYTES = 2 << 30  # of kept programs; JAX removes those that were not used for the longest time


def choose_backend(name: str) -> None:
    """Makes Keras use ``tensorflow``, ``jax`` or ``torch``, and imports it; call it before anything imports Keras.

    Raises:
        UserError: the backend is not installed, or Keras runs on another one already.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(f"--backend {name}: {name} is not installed here; run: pip install {name}")
    if "keras" in sys.modules:
        running = sys.modules["keras"].backend.backend()
        if running != name:
            raise UserError(f"Keras runs on {running} already; set KERAS_BACKEND={name} before Python starts")
    os.environ["KERAS_BACKEND"] = name
    import_keras()


def import_keras() -> None:
    """Imports Keras with its backend, without the notices of the backend's libraries; does nothing the second time.

    Compiled code writes them to file descriptor 2, where they bury our own output: a dozen lines about oneDNN, CUDA
    and absl at the import and at the first look for a GPU, and later ones such as "Memory patch applied". Errors
    still appear.
    """
    # TensorFlow leaves oneDNN off on a CPU without AVX-512, where it is 1.3 times faster too.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # 1 leaves out notices and 2 warnings too, which on a machine with a GPU's driver explain why it is not used.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if _has_driver() else "2")
    if "keras" in sys.modules:
        return _set_keras_options()
    with notices_hidden():
        import keras

        _set_keras_options()
        if keras.backend.backend() == "tensorflow":
            logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns of a second network in one process
        if keras.backend.backend() != "jax":  # its devices are set up by `exchange.connected`, before the first query
            has_gpu()


def _set_keras_options() -> None:
    """Sets what a user's ``keras.json`` may have set otherwise: our networks and results need Keras's own defaults."""
    import keras

    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    for name in ("set_max_epochs", "set_max_steps_per_epoch"):  # of newer versions: they would cut a training short
        getattr(keras.config, name, lambda limit: None)(None)


@contextlib.contextmanager
def notices_hidden() -> Iterator[None]:
    """Keeps what compiled code writes to file descriptor 2 off the screen while the block runs.

    It is printed after all if the block fails, or if this machine has a GPU's driver and TensorFlow finds no GPU:
    then it says why.
    """
    with tempfile.TemporaryFile() as kept:
        sys.stderr.flush()
        screen = os.dup(2)
        os.dup2(kept.fileno(), 2)
        useful = False
        try:
            yield
            useful = _has_driver() and _is_tensorflow_without_gpu()
        except Exception:
            useful = True
            raise
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
            if useful:
                kept.seek(0)
                sys.stderr.write(kept.read().decode("utf-8", "replace"))


def _has_driver() -> bool:
    """Whether this machine has a GPU's driver."""
    return os.path.exists("/proc/driver/nvidia") or os.path.exists("/dev/dxg")


def _is_tensorflow_without_gpu() -> bool:
    keras = sys.modules.get("keras")
    return keras is not None and keras.backend.backend() == "tensorflow" and not has_gpu()


def set_up(seed: int | None = None, precision: str | None = None, gpu: bool = True) -> None:
    """Seeds every random generator, sets the precision policy and lets TensorFlow take GPU memory as it needs it.

    Args:
        seed: None leaves the generators as they are.
        precision: ``float32``, ``mixed_bfloat16`` or ``mixed_float16``; None leaves the policy as it is.
        gpu: False hides the GPUs; True on a machine without one runs on the CPU.
    """
    import_keras()
    import keras

    if seed is not None:
        with notices_hidden():  # it imports TensorFlow, where that is installed, on every backend
            keras.utils.set_random_seed(seed)
    if precision is not None:
        keras.config.set_dtype_policy(precision)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        try:
            if not gpu:
                tf.config.set_visible_devices([], "GPU")
            for device in gpus if gpu else ():
                tf.config.experimental.set_memory_growth(device, True)
        except RuntimeError:  # a notebook has used the GPU already: its setting stays
            pass


def threads() -> int:
    """The threads that the backend computes with on the CPU. The last bits of a result depend on their number."""
    import keras

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.config.threading.get_intra_op_parallelism_threads() or usable
    if keras.backend.backend() == "jax":
        return next((int(os.environ[name]) for name in _XLA_THREADS if os.environ.get(name, "").isdigit()), usable)
    import torch

    return torch.get_num_threads()


def use_threads(number: int) -> bool:
    """Lets the backend compute with this many threads on the CPU, before it is first used.

    Returns:
        Whether it does; False where the backend has started with another number.
    """
    import keras

    if threads() == number:
        return True
    try:
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            tf.config.threading.set_intra_op_parallelism_threads(number)
        elif keras.backend.backend() == "jax":
            import jax

            devices = jax.config.jax_num_cpu_devices
            jax.config.update("jax_num_cpu_devices", devices % 2 + 1)  # a change is refused once JAX has started
            jax.config.update("jax_num_cpu_devices", devices)
            os.environ[_XLA_THREADS[0]] = str(number)
        else:
            import torch

            torch.set_num_threads(number)
    except (RuntimeError, AttributeError):  # an older JAX has no such option
        return False
    return True


def has_gpu() -> bool:
    """Whether the backend sees a GPU."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.get_visible_devices("GPU"))
    if keras.backend.backend() == "jax":
        import jax

        return any(device.platform == "gpu" for device in jax.devices())
    import torch

    return torch.cuda.is_available()


def free_gpu_bytes() -> int | None:
    """Memory that is free on the GPU with the least of it; None without a GPU, or where the backend does not say."""
    import keras

    if not has_gpu():
        return None
    if keras.backend.backend() == "jax":
        import jax

        stats = [device.memory_stats() for device in jax.local_devices()]
        return min((s["bytes_limit"] - s["bytes_in_use"] for s in stats if s and "bytes_limit" in s), default=None)
    if keras.backend.backend() == "torch":
        import torch

        return min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    asked = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]  # TensorFlow does not say
    try:
        printed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        return min(int(line) for line in printed.split()) * 2**20
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def eager_is_cheap() -> bool:
    """Whether one batch runs faster uncompiled: tracing costs TensorFlow as much as several batches.

    JAX would compile every operation separately.
    """
    import keras

    return keras.backend.backend() == "tensorflow"


def jit_compile() -> bool:
    """The value for ``Model.compile(jit_compile=...)``: XLA on a GPU and on JAX, not on TensorFlow's CPU path.

    On 2 cores TensorFlow's own CPU kernels ran an Xception step 5.6 times faster than XLA's, which
    Keras's ``"auto"`` would pick (`benchmarks/step.py`).
    """
    import keras

    return keras.backend.backend() == "jax" or (keras.backend.backend() == "tensorflow" and has_gpu())


def host_copies(tensors: Sequence[Any]) -> list[np.ndarray]:
    """Copies of variables or tensors in the host's memory, all transferred at the same time."""
    import keras
    import numpy as np

    if keras.backend.backend() == "jax":
        import jax

        values = [keras.ops.convert_to_tensor(tensor) for tensor in tensors]
        return [np.array(value) for value in jax.device_get(values)]  # on a CPU these are views
    return [np.array(keras.ops.convert_to_numpy(tensor)) for tensor in tensors]


def device_copies(variables: Sequence[Any]) -> list[Any]:
    """The variables' values as tensors that a later assignment leaves alone."""
    import keras

    if keras.backend.backend() == "jax":  # an array never changes
        return [variable.value for variable in variables]
    return [keras.ops.multiply(variable, 1) for variable in variables]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A pure function of tensors; on JAX one program instead of many small ones."""
    import keras

    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function)


def compiled_alike(step: Callable[..., Any]) -> Callable[..., Any]:
    """A training step for the body of a loop, with the same bits as outside of one.

    TensorFlow optimises a function of its own as it does the whole step, but leaves some of it out in a loop's body.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        return step
    import tensorflow as tf

    return tf.function(step, autograph=False)


def keep_compiled_programs(always: bool = False) -> Path | None:
    """Lets JAX keep its compiled programs in the user's cache folder, so that the next process need not compile them.

    Call it before the first program is compiled, and after `exchange.connected`, because it looks for a GPU. It leaves
    JAX's own settings as they are: ``JAX_COMPILATION_CACHE_DIR`` names another folder, and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps nothing. A folder that cannot be written costs one line on standard
    error. Whoever can write into the folder can run code here, as JAX's documentation warns.

    Args:
        always: also without a GPU, where programs compile within seconds.

    Returns:
        The folder of the programs; None where none are kept.
    """
    import keras

    if keras.backend.backend() != "jax" or not (always or has_gpu()):
        return None
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    folder = cache_folder() / "jax"
    try:
        _remove_torn_programs(folder)
    except OSError as error:
        print(f"{folder}: compiled programs are not kept ({error}); AD_CORRE_CACHE names another", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a network's first values are 50 programs
    # For programs that are new, with the same layers: which kernel is the fastest.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "xla_gpu_per_fusion_autotune_cache_dir")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _remove_torn_programs(folder: Path) -> None:
    """Removes what a killed process has left half-written in JAX's cache; JAX itself would never replace it.

    JAX writes ``<key>-cache`` and then ``<key>-atime``, under the lock ``.lockfile``. Without the second it can
    remove no old programs either.

    Raises:
        OSError: the folder cannot be written, or a process has held the lock for seconds (`filelock.Timeout`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lockfile", timeout=10):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()


def has_fused_batch_norm() -> bool:
    """Whether `fused_batch_norm` can be called: on TensorFlow's CPU path, which XLA does not compile."""
    import keras

    return keras.backend.backend() == "tensorflow" and not jit_compile()


def fused_batch_norm(x, gamma, beta, epsilon: float):
    """Batch normalisation in one kernel per direction; Keras's own takes a dozen passes over ``x``.

    Args:
        x: float (B, H, W, C).
        gamma: float32 (C,), scale.
        beta: float32 (C,), offset.
        epsilon: added to the variance.

    Returns:
        The normalised ``x``, and the mean and the (biased) variance of each channel, float32 (C,).
    """
    import tensorflow as tf

    none = tf.constant([], tf.float32)
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, mean=none, variance=none, epsilon=epsilon, is_training=True
    )
    count = tf.cast(tf.size(x) // tf.shape(x)[-1], tf.float32)
    return y, mean, variance * (count - 1) / count  # the kernel's is the unbiased one


def versions() -> dict[str, str]:
    """Versions for ``env.json``: Python, Keras, its backend, NumPy, OpenCV, platform and device."""
    import platform

    import cv2
    import keras
    import numpy as np

    backend = keras.backend.backend()
    return {
        "python": platform.python_version(),
        "keras": keras.__version__,
        backend: sys.modules[backend].__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "platform": platform.platform(),
        "cpu_count": str(os.cpu_count()),
        "device": "GPU" if has_gpu() else "CPU",
    }


def tensorboard(folder: Path) -> list[Any]:
    """The callback that writes TensorBoard's event files, in a list; empty where its package is not installed."""
    from training import event_files

    return [event_files.EventFiles(folder)] if event_files.is_available() else []
