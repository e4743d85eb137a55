"""Connects the devices and processes of a process group, and moves tensors between them (JAX)."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from distributed import lost_peers
from distributed.process_group import ProcessGroup
from files import UserError, run_command

# JAX ends all processes when one has sent no heartbeat for this many seconds (JAX's default: 100).
_HEARTBEAT_SECONDS = 20
# Words in the message of an exchange that fails because a process is gone: JAX has no exception class for it.
_EXCHANGE = re.compile("gloo|nccl|coordination", re.IGNORECASE)
_SILENT_SECONDS = 5.0  # then a line says that this process waits
_START_SECONDS = 300  # between the start of the first and the last process


@contextlib.contextmanager
def connected(group: ProcessGroup) -> Iterator[ProcessGroup]:
    """Makes the devices of a process group train one network together while the block runs (JAX only).

    Models built in the block keep their variables on every device. Each device gets its share of the images of a batch
    (`ProcessGroup.share`) and all targets, which are a few bytes per image. For one device it changes nothing.

    If the block raises in one of several processes, this process ends at once with the message and the exit code of
    `files.run_command`, because the others may never answer again. If another process stops, this one ends within about
    `_HEARTBEAT_SECONDS` with a message and an exit code that is not 0.

    Yields:
        The group.

    Raises:
        UserError: fewer devices than wanted, or the other processes cannot be reached.
    """
    if group.all_devices == 1:
        yield group
        return
    import keras

    if group.processes == 1:
        _claim_devices(group)
        with _data_parallel(group).scope():
            yield group
        return
    try:
        lost_peers.replace_page(
            ("\n" if group.is_rank0 else "")  # below its progress bar
            + f"error: process {group.process_id} of {group.processes} ends: another process of this run has stopped "
            "or cannot be reached (killed, out of memory, its machine lost, never started, or an error that it printed "
            "itself); start the processes again as before, and the run continues after its last checkpoint"
        )
        _claim_devices(group)
        _connect(group)
        _print_on_rank0_only(group)
        keras.distribution.set_distribution(_data_parallel(group))
        yield group
        group.wait()  # no process leaves before rank 0 has written its report
    except BaseException as error:
        _leave_at_once(error)


def _claim_devices(group: ProcessGroup) -> None:
    """Lets a CPU count as several devices; has no effect on GPUs."""
    import jax

    with contextlib.suppress(RuntimeError):  # JAX has its devices already: `_data_parallel` counts them
        jax.config.update("jax_num_cpu_devices", group.devices)


def _connect(group: ProcessGroup) -> None:
    """Waits for the other processes. Not `keras.distribution.initialize`, because that does not set the timeouts."""
    import jax

    with contextlib.suppress(AttributeError):  # not an option of older versions
        # It would catch SIGTERM, only to announce it, and the process would go on (`files.run_command`).
        jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                group.coordinator,
                group.processes,
                group.process_id,
                local_device_ids=list(range(group.first_device, group.first_device + group.devices)),
                cluster_detection_method="deactivate",  # `process_group` has read Slurm's environment
                initialization_timeout=_START_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
        except Exception as error:
            failures.append(error)

    # It waits in compiled code, where neither Ctrl-C nor SIGTERM reaches Python: so not in the main thread.
    waits = threading.Thread(target=initialize, daemon=True)
    waits.start()
    waits.join(_SILENT_SECONDS)
    if waits.is_alive():
        place = f"process {group.process_id} of {group.processes} waits for the others at {group.coordinator}"
        print(f"{place}, at most {_START_SECONDS} s", file=sys.stderr, flush=True)
    waits.join()
    if failures and not isinstance(failures[0], RuntimeError):
        raise failures[0]
    if failures:
        raise UserError(
            f"--coordinator {group.coordinator}: process {group.process_id} could not connect to the other "
            f"{group.processes - 1} there ({' '.join(str(failures[0]).split())[:300]}); start "
            f"all {group.processes}, with one free port of process 0's machine, or one alone with --processes 1"
        )


def _print_on_rank0_only(group: ProcessGroup) -> None:
    """Keeps standard output for Python in rank 0: Gloo, which connects the processes' CPUs, writes to it too."""
    sys.stdout.flush()
    screen = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    if group.is_rank0:
        sys.stdout = open(screen, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - for good


def _data_parallel(group: ProcessGroup) -> Any:
    """The Keras distribution over the first devices of each process."""
    import jax
    import keras

    try:
        found = jax.devices()
    except RuntimeError as error:
        raise UserError(f"--devices {group.devices}: JAX cannot use them ({error})") from None
    devices = []
    for process in range(group.processes):
        own = [device for device in found if device.process_index == process]
        if len(own) < group.devices:
            raise UserError(
                f"--devices: expected at most {len(own)}, the {own[0].platform.upper()}s that process {process} sees, "
                f"received {group.devices}"
            )
        devices += own[: group.devices]

    class SplitImages(keras.distribution.DataParallel):
        """Splits the images, (B, H, W, C), over the devices; every device gets all targets, (B,) or (B, C)."""

        def get_data_layout(self, data_shape):
            if len(data_shape) == 4:
                return super().get_data_layout(data_shape)
            return keras.distribution.TensorLayout([None] * len(data_shape), self.device_mesh)

    names = [f"{device.platform}:{device.id}" for device in devices]
    return SplitImages(devices=names, auto_shard_dataset=False)


def _leave_at_once(error: BaseException) -> NoReturn:
    """Prints the error and ends this process, without the shutdown in which JAX would wait for the others."""
    if _EXCHANGE.search(str(error)) and not isinstance(error, UserError):
        lost_peers.report(str(error)[:300])
        os._exit(2)

    def fail() -> NoReturn:
        raise error

    try:
        code = run_command(fail)
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def all_gather(tensors: Any) -> Any:
    """The same tensors, in any nesting, each whole on every device of the group; for use in a compiled step."""
    import keras

    distribution = keras.distribution.distribution()
    if distribution is None:
        return tensors

    def gather(tensor):
        layout = keras.distribution.TensorLayout([None] * len(tensor.shape), distribution.device_mesh)
        return keras.distribution.distribute_tensor(tensor, layout)

    return keras.tree.map_structure(gather, tensors)


def split_batch(images: Any) -> Any:
    """A batch of images, (B, H, W, C), that every device can make, as one in which each makes its share only."""
    import keras

    distribution = keras.distribution.distribution()
    if distribution is None:
        return images
    return keras.distribution.distribute_tensor(images, distribution.get_data_layout(images.shape))


def predictor(network: Any, compiled: bool = True) -> Callable[[Any], dict[str, Any]]:
    """A function of this process's share of a batch, uint8 or float (B / processes, H, W, C), that returns the outputs.

    Each is the whole batch's, a NumPy array (B, …) in every process. On one device it is the network's
    ``predict_on_batch``, or without ``compiled`` the network itself.
    """
    import keras

    distribution = keras.distribution.distribution()
    if distribution is None and compiled:
        return network.predict_on_batch
    if distribution is None:
        return lambda images: keras.tree.map_structure(keras.ops.convert_to_numpy, network(images, training=False))
    import jax
    import numpy as np

    replicated = keras.distribution.TensorLayout([], distribution.device_mesh).backend_layout

    def outputs(trainable, other, images):
        return network.stateless_call(trainable, other, images, training=False)[0]

    run = jax.jit(outputs, out_shardings=replicated)

    def predict(images):
        shares = distribution.get_data_layout(images.shape).backend_layout
        batch = jax.make_array_from_process_local_data(shares, images)
        variables = [[v.value for v in each] for each in (network.trainable_variables, network.non_trainable_variables)]
        return jax.tree.map(np.asarray, run(*variables, batch))

    return predict
