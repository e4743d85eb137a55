"""Makes the devices and processes of a group train one network together (JAX), and what they exchange."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from distributed import lost_peers
from distributed.process_group import Team
from files import UserError, run_command

# JAX ends the others of a process that has sent no sign of life for so long; its own default is 100.
_HEARTBEAT_SECONDS = 20
# Whose words an exchange between processes fails with when one is gone: JAX has no exception of its own for it.
_EXCHANGE = re.compile("gloo|nccl|coordination", re.IGNORECASE)
_START_SECONDS = 300  # the processes of a team may start so far apart


@contextlib.contextmanager
def together(team: Team) -> Iterator[None]:
    """Makes the devices of a team train one network together while the block runs (JAX only).

    Models built in the block keep their variables on every device. Each device takes its share of a batch's images
    (`Team.share`); the targets, a few bytes an image, every device has whole. One device is as if it were not there.

    If the block raises in one of several processes, the process ends at once with the message and the exit code of
    `errors.run_command`, for the others may never answer again. If another process stops, this one ends in about
    `_HEARTBEAT_SECONDS` with a message and an exit code that is not 0.

    Raises:
        UserError: fewer devices than wanted, or the other processes cannot be reached.
    """
    if team.all_devices == 1:
        yield
        return
    import keras

    if team.processes == 1:
        _claim_devices(team)
        with _data_parallel(team).scope():
            yield
        return
    try:
        lost_peers.put_in_words(
            ("\n" if team.leads else "")  # below its progress bar
            + f"error: process {team.process_id} of {team.processes} ends: another process of this run has stopped or "
            "cannot be reached (killed, out of memory, its machine lost, never started, or an error that it told "
            "itself); start the processes again as before, and the run goes on after its last whole epoch"
        )
        _claim_devices(team)
        _meet(team)
        _speak_for_all(team)
        keras.distribution.set_distribution(_data_parallel(team))
        yield
        told(None)  # nobody leaves before process 0 has written its report
    except BaseException as error:
        _leave_at_once(error)


def _claim_devices(team: Team) -> None:
    """Lets a CPU count as several devices; has no effect on GPUs."""
    import jax

    with contextlib.suppress(RuntimeError):  # JAX has its devices already: `_data_parallel` counts them
        jax.config.update("jax_num_cpu_devices", team.devices)


def _meet(team: Team) -> None:
    """Waits for the other processes. As `keras.distribution.initialize`, which leaves no say in the timeouts."""
    import jax

    try:
        jax.distributed.initialize(
            team.coordinator,
            team.processes,
            team.process_id,
            local_device_ids=list(range(team.first_device, team.first_device + team.devices)),
            cluster_detection_method="deactivate",  # `team_of` has read Slurm's environment
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise UserError(
            f"--coordinator {team.coordinator}: process {team.process_id} could not meet the other "
            f"{team.processes - 1} there ({' '.join(str(error).split())[:300]}); start "
            f"all {team.processes}, with one free port of process 0's machine, or one alone with --processes 1"
        ) from None


def _speak_for_all(team: Team) -> None:
    """Standard output is for Python in process 0; Gloo, which links the processes' CPUs, writes there as it likes."""
    sys.stdout.flush()
    screen = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    if team.leads:
        sys.stdout = open(screen, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - for good


def _data_parallel(team: Team) -> Any:
    """The Keras distribution over the first devices of each process."""
    import jax
    import keras

    try:
        found = jax.devices()
    except RuntimeError as error:
        raise UserError(f"--devices {team.devices}: JAX cannot use them ({error})") from None
    devices = []
    for process in range(team.processes):
        own = [device for device in found if device.process_index == process]
        if len(own) < team.devices:
            raise UserError(
                f"--devices: expected at most {len(own)}, the {own[0].platform.upper()}s that process {process} sees, "
                f"received {team.devices}"
            )
        devices += own[: team.devices]

    class ImagesShared(keras.distribution.DataParallel):
        """Shares out the images, (B, H, W, C), and gives the targets, (B,) or (B, C), to every device."""

        def get_data_layout(self, data_shape):
            if len(data_shape) == 4:
                return super().get_data_layout(data_shape)
            return keras.distribution.TensorLayout([None] * len(data_shape), self.device_mesh)

    names = [f"{device.platform}:{device.id}" for device in devices]
    return ImagesShared(devices=names, auto_shard_dataset=False)


def _leave_at_once(error: BaseException) -> NoReturn:
    """Tells what went wrong and ends this process of several, without the farewell that JAX would wait for."""
    if _EXCHANGE.search(str(error)) and not isinstance(error, UserError):
        lost_peers.tell(str(error)[:300])
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


def told(value: Any) -> Any:
    """What process 0 has called this with: JSON-ready. Every process of a team must call it; waits until all have."""
    import keras

    distribution = keras.distribution.distribution()
    if distribution is None or distribution.num_processes == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(np.resize(text, length))  # the shape must be the same everywhere
    return json.loads(np.asarray(text).tobytes())


def everywhere(tensors: Any) -> Any:
    """The same tensors, in any nesting, each held whole by every device of the team; for use in a compiled step."""
    import keras

    distribution = keras.distribution.distribution()
    if distribution is None:
        return tensors

    def gather(tensor):
        layout = keras.distribution.TensorLayout([None] * len(tensor.shape), distribution.device_mesh)
        return keras.distribution.distribute_tensor(tensor, layout)

    return keras.tree.map_structure(gather, tensors)


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

    everywhere = keras.distribution.TensorLayout([], distribution.device_mesh).backend_layout

    def outputs(trainable, other, images):
        return network.stateless_call(trainable, other, images, training=False)[0]

    run = jax.jit(outputs, out_shardings=everywhere)

    def predict(images):
        shares = distribution.get_data_layout(images.shape).backend_layout
        batch = jax.make_array_from_process_local_data(shares, images)
        variables = [[v.value for v in each] for each in (network.trainable_variables, network.non_trainable_variables)]
        return jax.tree.map(np.asarray, run(*variables, batch))

    return predict
