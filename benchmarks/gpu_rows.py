"""Measures one row of `gpu.py` on this process's first device."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import config
import runtime

# isort: split
import timing
from gpu import PRECISIONS
from workload import CROSS_ENTROPY, make_fit, write_split

_STAGES = {  # JAX's names of the durations that it reports
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """The row of a case of `gpu.plan`, JSON-ready."""
    if case["what"] == "peer":
        import torch_peer

        return torch_peer.measure(case)
    runtime.choose_backend("jax")
    return {"device": describe_device, "speed": measure_speed, "start": measure_start}[case["what"]](case)


def describe_device(case: dict[str, Any]) -> dict[str, Any]:
    import jax

    import evaluation

    device = jax.devices()[0]
    memory = device.memory_stats() or {}  # None on a CPU
    found = {"kind": device.device_kind, "platform": device.platform, "bytes": memory.get("bytes_limit")}
    return {**found, "versions": runtime.versions(), "commit": evaluation.commit()}


def settings_of(case: dict[str, Any]) -> config.TrainConfig:
    """The options that a user of `train.py` would give."""
    return config.TrainConfig(
        backend="jax",
        precision=PRECISIONS[case["precision"]][0],
        batch_size=case["batch"],
        epochs=100,
        model=config.ModelConfig(arch=case["arch"], input_size=case["size"]),
    )


def peak_bytes() -> int | None:
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


# --- speed ----------------------------------------------------------------------------------------------------------


def measure_speed(case: dict[str, Any]) -> dict[str, Any]:
    """``fit``, and the bare loop with Ad-Corre and with cross-entropy; the latter only where its time is left.

    The peak memory is that of ``fit``, which runs first.
    """
    from bare_loop import Parts, make_loop
    from flops import forward_flops

    ends = time.monotonic() + case["seconds_left"]
    settings = settings_of(case)
    with tempfile.TemporaryDirectory() as folder:
        split = write_split(folder, tuple(case["pixels"]), case["images"])
        fit_seconds = make_fit(settings, split)
        fit_seconds(1)  # compiles
        epoch_s = fit_seconds(1)[0]
        memory = peak_bytes()
        steps_per_epoch = len(split) // settings.batch_size
        epochs = max(1, round(case["turn_s"] / epoch_s))
        steps = epochs * steps_per_epoch

        def fit() -> dict[str, float]:
            return {timing.SECONDS: sum(fit_seconds(epochs)) / steps}

        def bare(loss_options: dict[str, float]) -> tuple[timing.Side, Any, float]:
            start = time.monotonic()
            parts = Parts(settings, split.class_names, loss_options)
            loop = make_loop(parts, split.images, split.labels, settings.batch_size)

            def side() -> dict[str, float]:
                begin = time.perf_counter()
                loop(steps)
                return {timing.SECONDS: (time.perf_counter() - begin) / steps}

            return side, (loop, parts.network), time.monotonic() - start

        ours, (loop, network), compile_s = bare({})
        sides = {"fit": fit, "bare": ours}
        turns_s = 4 * case["rounds"] * steps * (epoch_s / steps_per_epoch)
        if ends - time.monotonic() > 1.5 * compile_s + turns_s:
            sides["ce"] = bare(CROSS_ENTROPY)[0]
        found = timing.take_turns(sides, case["rounds"])
    over_bare, over_bare_spread = timing.ratio(found["bare"], found["fit"])  # of images/s, not of seconds
    row = rates(case["batch"], found["fit"], 3 * forward_flops(network))
    row |= {"fit_over_bare": over_bare, "fit_over_bare_spread": over_bare_spread, "peak_bytes": memory}
    row |= {"bare_images_per_s": case["batch"] / found["bare"].median(), "bare_stages": loop.stages}
    if "ce" in found:
        row["ad_corre_over_ce"], row["ad_corre_over_ce_spread"] = timing.ratio(found["bare"], found["ce"])
    return row


def rates(batch: int, samples: timing.Samples, flops: int) -> dict[str, Any]:
    """Speed and arithmetic of steps of which ``samples`` has the seconds; ``flops`` is per image."""
    images_per_s = batch / samples.median()
    return {
        "seconds": samples.median(),
        "spread": samples.spread(),
        "rounds": len(samples),
        "images_per_s": images_per_s,
        "flops_per_image": flops,
        "flops_per_s": flops * images_per_s,
    }


# --- start ----------------------------------------------------------------------------------------------------------


class CompileClock:
    """Adds up what JAX reports of every program: seconds of tracing, lowering and compilation.

    Attributes:
        stages: seconds of all programs, by stage; from a cache, ``compile`` is the time to read it.
        programs: the same by the function's name.
        count: number of compiled programs.
    """

    def __init__(self):
        import jax

        self.stages = dict.fromkeys(_STAGES.values(), 0.0)
        self.programs: dict[str, dict[str, float]] = {}
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **facts: Any) -> None:
        if (stage := _STAGES.get(event)) is None:
            return
        self.stages[stage] += seconds
        self.count += stage == "compile"
        name = str(facts.get("fun_name")).removeprefix("jit(").removesuffix(")")
        program = self.programs.setdefault(name, dict.fromkeys(self.stages, 0.0))
        program[stage] += seconds

    def largest(self) -> dict[str, float]:
        """The stages of the program that took longest to trace, from a cache too: the training step."""
        return max(self.programs.values(), key=lambda stages: stages["trace"], default={})


def measure_start(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the start of this process to the end of the first step of ``fit``, and what they went into.

    ``stages``: ``import``; ``trace``, ``lower`` and ``compile`` of all programs, the small ones that fill a network's
    variables included; ``rest``: data, Python that builds the network, the step itself. ``step_program``: the training
    step's own part of these. Tracing a program may count that of the ones that it calls twice.
    """
    clock = CompileClock()
    import experiment  # noqa: F401 - what a run imports

    imported = time.time()
    settings = settings_of(case)
    with tempfile.TemporaryDirectory() as folder:
        split = write_split(folder, tuple(case["pixels"]), case["batch"])  # one step per epoch
        make_fit(settings, split)(1)
        done = time.time()
    importing = imported - case["spawned"]
    rest = done - case["spawned"] - importing - sum(clock.stages.values())
    return {
        "first_step_s": done - case["spawned"],
        "stages": {"import": importing, **clock.stages, "rest": max(0.0, rest)},
        "step_program": clock.largest(),
        "programs": clock.count,
        "peak_bytes": peak_bytes(),
    }
