"""How good does the large network become on FER-2013 within some minutes on one GPU, with and without Ad-Corre?

``python benchmarks/gpu_fer2013.py --minutes 24`` trains xcp on the prepared training part, with cross-entropy and then
with Ad-Corre, each within its half of the minutes, and measures both on PublicTest (val). Needs Keras and JAX, no
TensorFlow. The same command goes on after a kill. docs/gpu.md tells the rest: ``--table`` prints the results,
``--join FOLDER TARGET`` puts the parts of the weights together.

Everything stays on the device: the images as uint8, and a loop of many steps a call (order, augmentation, network,
loss, optimiser, average of the weights), so that Python does nothing a step.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import socket
import sys
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import command_line

sys.path.insert(0, str(Path(__file__).parents[1]))

import config
import runtime
from data_helper import PreparedSplit, open_split
from files import UserError, only_writer, read_json, run_command, sha256, whole_file, write_json, write_text

# The loss options in which a run differs from `config.LossConfig`'s defaults.
LOSSES = {"ce": {"w_fd": 0.0, "w_md": 0.0, "w_ed": 0.0}, "ad_corre": {}}
LOSS_OPTIONS = ("w_ce", "w_fd", "w_md", "w_ed", "adaptive", "weight_floor", "history", "label_smoothing")

# The recipe. 28,709 pictures are few for 20 million weights and a tenth of their labels is wrong, so most of it holds
# the network back: strong augmentation, mixup, smoothed labels (`LossConfig`), weight decay, averaged weights.
# A cosine that ends at 0 with the minutes makes the most of a short training.
AUGMENTATION = config.AugmentConfig(rotation=15.0, shift=0.1, zoom=0.15, erase=0.5)
WEIGHT_DECAY = 0.05
PEAK_RATE = {"scratch": 1e-3, "imagenet": 3e-4}  # trained weights are not to be thrown away
WARMUP_EPOCHS = 2
AVERAGE = 0.999  # of about 1,000 steps: 9 epochs of batches of 256

FIRST_MEASURE_S = 5.0  # of timed steps decide the schedule
CALL_S = 15.0  # a call of many steps takes about this long, or a kill would lose more than a minute
REPORT_S = 45.0  # allowance: compiling in float32, two evaluations, t-SNE and figures
SLACK = 0.05  # share of the time kept back, for steps that turn out slower than those that were timed
UNDECIDED = 2**30  # steps of a schedule that is not decided yet: it warms up and stays at its peak
PART_BYTES = 15 * 2**20
MANIFEST = "weights.f16.json"
NOT_RUN = "not run"


def main() -> None:
    started = time.monotonic()
    options = parse_options()
    if options.table is not None:
        show_table(options.run_dir, options.table)
    elif options.join:
        join(*options.join)
        print(f"{options.join[1]} is whole; test.py reads it")
    else:
        check(options)
        splits = [open_share(options, split) for split in ("train", "val")]
        runtime.choose_backend("jax")
        train_all(options, *splits, started)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="for everything, shared out among the losses")
    parser.add_argument("--data-dir", default="data", help="folder of the prepared data sets")
    parser.add_argument("--dataset", default="fer2013")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/gpu"), help="a folder a loss goes in here")
    parser.add_argument("--losses", nargs="+", choices=tuple(LOSSES), default=list(LOSSES))
    parser.add_argument("--arch", default="xcp")
    parser.add_argument("--size", type=int, default=96, help="side in pixels that the network sees")
    parser.add_argument("--batch-size", type=int, default=256)
    # float16 would need its loss scaled.
    parser.add_argument("--precision", choices=("mixed_bfloat16", "float32"), default="mixed_bfloat16")
    parser.add_argument(
        "--pretrained", choices=("auto", "none", "imagenet"), default="auto", help="auto tries imagenet"
    )
    parser.add_argument("--learning-rate", type=float, help=f"peak; else by the start, {PEAK_RATE}")
    parser.add_argument(
        "--mixup", type=float, default=0.2, help="how much pictures are blended, as mixup's alpha; 0: not at all"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures of both splits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the schedule, instead of --minutes")
    parser.add_argument("--save-seconds", type=float, default=30.0, help="between checkpoints")
    parser.add_argument("--smoke", action="store_true", help="3 steps of 1%% of the data at a toy size, for a CPU")
    parser.add_argument("--table", nargs="?", const="", metavar="PAGE", help="print the results, or put them in PAGE")
    parser.add_argument("--join", nargs=2, type=Path, metavar=("FOLDER", "TARGET"))
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    if options.smoke:
        toy = {"steps": 3, "share": 0.01, "size": 71, "batch_size": 8, "precision": "float32", "pretrained": "none"}
        vars(options).update(toy)
    return options


def check(options: argparse.Namespace) -> None:
    """Refuses numbers that nothing can be trained with."""
    if options.steps is None and options.minutes is None:
        raise UserError("--minutes: expected how long to train, received nothing")
    for name, low, high in (
        ("minutes", 0, 100_000),
        ("learning_rate", 0, 10),
        ("size", 1, 4096),
        ("batch_size", 1, math.inf),
        ("steps", 1, UNDECIDED - 1),
        ("share", 0, 1),
        ("mixup", 0, math.inf),
        ("seed", 0, 2**31 - 1),
        ("save_seconds", 0, math.inf),
    ):
        value = getattr(options, name)
        above = name in ("minutes", "learning_rate", "share")  # 0 itself will not do
        if value is not None and not (low < value <= high if above else low <= value <= high):
            raise UserError(
                f"{command_line.option(name)}: expected {'more than ' if above else ''}{low}"
                f"{'' if high == math.inf else f' to {high}'}{'' if above or high < math.inf else ' or more'}, "
                f"received {value}"
            )


# --- the schedule ---------------------------------------------------------------------------------------------------


def decide_steps(
    share_s: float,
    used_s: float,
    step_s: float,
    measure_s: float,
    save_s: float,
    steps_per_epoch: int,
    save_every_s: float,
) -> int:
    """How many more steps end within the time.

    `floor((share_s - used_s - REPORT_S) / t)`, `t = (step_s + measure_s / steps_per_epoch) * (1 + save_s /
    max(save_every_s, save_s)) * (1 + SLACK)`, the time of a step with its part of validation and checkpoints.

    Args:
        share_s: seconds for this loss, start-up included.
        used_s: seconds of them that are gone.
        step_s: seconds a step.
        measure_s: seconds a validation, one an epoch.
        save_s: seconds a checkpoint.
        steps_per_epoch: batches an epoch.
        save_every_s: seconds between checkpoints.

    Raises:
        UserError: not even one.
    """
    with_saves = 1 + save_s / max(save_every_s, save_s, 1e-9)
    each_s = (step_s + measure_s / steps_per_epoch) * with_saves * (1 + SLACK)
    steps = math.floor((share_s - used_s - REPORT_S) / each_s)
    if steps < 1:
        needed = (used_s + REPORT_S + steps_per_epoch * each_s) / 60
        raise UserError(
            f"--minutes: expected {needed:.1f} or more for each loss (an epoch: {steps_per_epoch * each_s:.0f} s), "
            f"received {share_s / 60:.1f}; give it more, or take a smaller --size or one of the --losses"
        )
    return steps


def rate(step, total, peak: float, warmup: int):
    """Learning rate: a line from 0 up to ``peak`` over ``warmup`` steps, then half a cosine to 0 at ``total``.

    ``step`` and ``total`` are arguments of the compiled program, so the schedule can be decided after the first steps
    without compiling again. A short training warms up for half of it at most.
    """
    import jax.numpy as jnp

    warmup = jnp.maximum(jnp.minimum(warmup, total // 2), 1)
    done = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1), 0, 1)
    # The first step is 1: a rate of 0 would waste it.
    return peak * jnp.minimum((step + 1) / warmup, 0.5 * (1 + jnp.cos(jnp.pi * done)))


# --- what runs on the device ----------------------------------------------------------------------------------------


class Program:
    """Network, loss, optimiser and data on the device, and the two compiled functions that use them.

    ``state`` is everything that training changes, as lists of arrays: ``weights`` (trained), ``others`` (batch-norm
    statistics, confusion history, states of the random generators), ``optimizer``, ``average`` (moving average of the
    network's weights and statistics), ``best`` (the average that did best on val) and ``sums`` (over the epoch's steps
    so far: their number, and by name the loss, its terms and the accuracy).
    """

    def __init__(self, options: argparse.Namespace, loss: str, train: PreparedSplit, val: PreparedSplit, start: str):
        import jax
        import jax.numpy as jnp

        import augmentation
        import cnn_model
        import custom_loss
        import trainer

        runtime.set_up(options.seed, options.precision)
        model = config.ModelConfig()
        self.network = cnn_model.build_model(
            options.arch,
            train.num_classes,
            model.num_embeddings,
            model.embedding_size,
            options.size,
            weights=None if start == "scratch" else start,
            dropout=model.dropout,
            logit_scale=model.logit_scale,
        )
        self.augmentation = augmentation.Augmentation(AUGMENTATION, seed=options.seed)
        self.mixup = augmentation.Mixup(options.mixup, seed=options.seed + 1) if options.mixup else None
        self.loss_layer = custom_loss.AdCorreLoss(train.num_classes, **loss_options(loss))
        self.peak = options.learning_rate or PEAK_RATE[start]
        constant = config.OptimizerConfig(schedule="constant", learning_rate=self.peak, weight_decay=WEIGHT_DECAY)
        self.optimizer = trainer.make_optimizer(constant, steps_per_epoch=1, epochs=1)
        self.optimizer.build(self.network.trainable_variables)
        # `rate` sets it every step.
        self.rate_place = [v.path for v in self.optimizer.variables].index(self.optimizer._learning_rate.path)

        self.batch_size = options.batch_size
        self.num_classes = train.num_classes
        self.steps_per_epoch = len(train) // self.batch_size
        self.warmup = WARMUP_EPOCHS * self.steps_per_epoch
        self.order_key = jax.random.key(options.seed)

        self.trained = self.network.trainable_variables
        parts = (self.network, self.augmentation, self.loss_layer, *([self.mixup] if self.mixup else []))
        self.others = [v for part in parts for v in part.non_trainable_variables]
        place = {id(v): i for i, v in enumerate([*self.trained, *self.others])}
        self.averaged = [place[id(v)] for v in self.network.weights]
        weights, others, moments = (
            [jnp.array(v.value) for v in variables]
            for variables in (self.trained, self.others, self.optimizer.variables)
        )
        average, best = ([jnp.array(v.value) for v in self.network.weights] for _ in range(2))
        self.state = {"weights": weights, "others": others, "optimizer": moments, "average": average, "best": best}
        self.state["sums"] = self._no_sums()

        self.data = jax.device_put((np.asarray(train.images), train.labels.astype(np.int32)))
        short = -len(val) % self.batch_size
        images = np.pad(val.images, ((0, short), (0, 0), (0, 0), (0, 0)))
        labels = np.pad(val.labels.astype(np.int32), (0, short), constant_values=-1)  # a hit for no prediction
        batches = (-1, self.batch_size)
        self.val_data = jax.device_put((images.reshape(*batches, *images.shape[1:]), labels.reshape(batches)))
        self.num_val = len(val)
        # The old state's memory becomes the new one's.
        self._train = jax.jit(self._many_steps, donate_argnums=0)
        self._measure = jax.jit(self._hits)

    def train(self, first: int, last: int, total: int | None) -> float:
        """Takes steps ``first`` to ``last`` (excluded), all of one epoch; returns the epoch's mean loss so far."""
        bounds = (np.int32(first), np.int32(last), np.int32(total or UNDECIDED))
        self.state = self._train(self.state, *self.data, *bounds)
        return float(self.state["sums"]["loss"] / self.state["sums"]["steps"])  # waits for the device

    def take_means(self) -> dict[str, float]:
        """Means of the loss, its terms and the accuracy over the epoch's steps, which then count anew."""
        sums = {name: float(value) for name, value in self.state["sums"].items()}
        self.state["sums"] = self._no_sums()
        count = sums.pop("steps")
        return {name: value / count for name, value in sums.items()}

    def _no_sums(self):
        import jax.numpy as jnp

        return {name: jnp.zeros(()) for name in ("steps", "loss", *self.loss_layer.terms, "accuracy")}

    def measure(self) -> float:
        """Accuracy of the averaged weights on val."""
        return int(self._measure(self.state["average"], *self.val_data)) / self.num_val

    def keep_best(self) -> None:
        import jax
        import jax.numpy as jnp

        self.state["best"] = jax.tree.map(jnp.copy, self.state["average"])

    def _many_steps(self, state, images, labels, first, last, total):
        import jax

        # A function of the epoch, not of what came before: a resumed run finds the same order.
        order = jax.random.permutation(jax.random.fold_in(self.order_key, first // self.steps_per_epoch), len(labels))

        def body(step, state):
            start = step % self.steps_per_epoch * self.batch_size
            rows = jax.lax.dynamic_slice(order, (start,), (self.batch_size,))
            return self._step(state, images[rows], labels[rows], step, total)

        return jax.lax.fori_loop(first, last, body, state)

    def _step(self, state, pixels, labels, step, total):
        import jax
        import jax.numpy as jnp
        import keras

        from augmentation import blend

        def loss(weights):
            values = zip([*self.trained, *self.others], [*weights, *state["others"]], strict=True)
            with keras.StatelessScope(state_mapping=values) as scope:
                changed = self.augmentation(pixels, training=True)
                targets = labels
                if self.mixup:
                    changed, shares = self.mixup(changed)
                    targets = blend(jax.nn.one_hot(labels, self.num_classes), shares)
                outputs = self.network(changed, training=True)
                terms = self.loss_layer(targets, outputs["logits"], outputs["embeddings"], training=True)
            hits = jnp.mean(jnp.argmax(outputs["logits"], axis=-1) == labels)
            return terms["loss"], ({**terms, "accuracy": hits}, [scope.get_current_value(v) for v in self.others])

        (_, (values, others)), gradients = jax.value_and_grad(loss, has_aux=True)(state["weights"])
        moments = list(state["optimizer"])
        moments[self.rate_place] = rate(step, total, self.peak, self.warmup).astype("float32")
        weights, moments = self.optimizer.stateless_apply(moments, gradients, state["weights"])
        # Young, the average forgets faster: it would hold on to the first weights.
        keep = jnp.minimum(AVERAGE, (1 + step) / (10 + step))
        now = [[*weights, *others][i] for i in self.averaged]
        average = [keep * old + (1 - keep) * new for old, new in zip(state["average"], now, strict=True)]
        sums = {name: old + values.get(name, 1.0) for name, old in state["sums"].items()}
        new = {"weights": weights, "others": others, "optimizer": moments, "average": average, "sums": sums}
        return {**state, **new}

    def _hits(self, average, images, labels):
        import jax
        import jax.numpy as jnp
        import keras

        with keras.StatelessScope(state_mapping=zip(self.network.weights, average, strict=True)):

            def hits(batch):
                logits = self.network(batch[0], training=False)["logits"]
                return jnp.sum(jnp.argmax(logits, axis=-1) == batch[1])

            return jnp.sum(jax.lax.map(hits, (images, labels)))


def loss_options(loss: str) -> dict[str, Any]:
    defaults = dataclasses.asdict(config.LossConfig())
    return {**{name: defaults[name] for name in LOSS_OPTIONS}, **LOSSES[loss]}


# --- a run ----------------------------------------------------------------------------------------------------------


def train_all(options: argparse.Namespace, train: PreparedSplit, val: PreparedSplit, started: float) -> None:
    import jax

    device = jax.devices()[0]
    print(f"JAX on {device.device_kind} ({device.platform}){'' if device.platform == 'gpu' else ': no GPU here'}")
    if len(train) < options.batch_size:
        raise UserError(
            f"--batch-size: expected {len(train):,} or less, the pictures of {train.name}, "
            f"received {options.batch_size:,}"
        )
    share_s = math.inf if options.steps else 60 * options.minutes / len(options.losses)
    for loss in options.losses:
        folder = options.run_dir / loss
        with only_writer(folder):
            if same_run(folder, identity(options, loss)) and (folder / "result.json").exists():
                print(f"{folder} holds this run, finished; delete it or choose another --run-dir to train again")
            else:
                Run(options, loss, folder, train, val, share_s, started).finish()
        started = time.monotonic()


def open_share(options: argparse.Namespace, split: str) -> PreparedSplit:
    """A prepared split, or with ``--share`` that part of it, drawn from the seed."""
    whole = open_split(options.data_dir, options.dataset, split)
    if options.share == 1:
        return whole
    rows = np.random.default_rng(options.seed).permutation(len(whole))[: max(1, round(options.share * len(whole)))]
    return dataclasses.replace(
        whole, images=whole.images[np.sort(rows)], labels=whole.labels[np.sort(rows)], votes=None
    )


def identity(options: argparse.Namespace, loss: str) -> dict[str, Any]:
    """What decides the weights, except how many steps."""
    chosen = (
        "dataset",
        "arch",
        "size",
        "batch_size",
        "precision",
        "pretrained",
        "learning_rate",
        "mixup",
        "share",
        "seed",
    )
    fixed = {"peak_rate": PEAK_RATE, "weight_decay": WEIGHT_DECAY, "warmup_epochs": WARMUP_EPOCHS, "average": AVERAGE}
    return {
        "loss": {"name": loss, **loss_options(loss)},
        **{name: getattr(options, name) for name in chosen},
        **fixed,
        "model": dataclasses.asdict(config.ModelConfig()),
        "augmentation": dataclasses.asdict(AUGMENTATION),
    }


def same_run(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds this run, begun or finished.

    Raises:
        UserError: it holds another one.
    """
    path = folder / "config.json"
    if not path.exists():
        write_json(path, wanted)
        return False
    if changed := config.differences(read_json(path), wanted):
        raise UserError(
            f"{folder} holds a run with other options ({'; '.join(changed)}); repeat its own command to go on with it, "
            "or choose another --run-dir"
        )
    return True


class Run:
    """One loss, from its start or its checkpoint to its report.

    ``notes`` is what is remembered beside the arrays: ``step`` (done), ``total`` (of the schedule, None until
    decided), ``start`` (scratch or imagenet), ``seconds`` (used, all processes), ``timed_steps`` and ``timed_seconds``
    (calls that did not compile), ``history`` and ``best`` (its row of the best epoch).
    """

    def __init__(self, options, loss: str, folder: Path, train: PreparedSplit, val: PreparedSplit, share_s, started):
        self.options, self.loss, self.folder = options, loss, folder
        self.train_split, self.val_split = train, val
        self.share_s, self.started = share_s, started
        self.notes: dict[str, Any] = {"step": 0, "total": options.steps, "start": "scratch", "seconds": 0.0}
        self.notes |= {"timed_steps": 0, "timed_seconds": 0.0, "history": [], "best": None}
        arrays = self._read_state()
        self.seconds_before = self.notes["seconds"]
        self.program = self._begin() if arrays is None else self._go_on(arrays)

    def _begin(self) -> Program:
        """A program from ImageNet's weights when they are wanted and can be had, from scratch otherwise."""
        parts = (self.options, self.loss, self.train_split, self.val_split)
        if self.options.pretrained != "none":
            before = socket.getdefaulttimeout()
            socket.setdefaulttimeout(20)  # a machine that reaches nothing may never answer
            try:
                program = Program(*parts, "imagenet")
                self.notes["start"] = "imagenet"
                print(f"{self.loss}: from ImageNet's weights")
                return program
            except UserError as error:
                if self.options.pretrained == "imagenet":
                    raise
                print(f"{self.loss}: NO IMAGENET WEIGHTS, training from scratch ({error})")
            finally:
                socket.setdefaulttimeout(before)
        return Program(*parts, "scratch")

    def _go_on(self, arrays: list[np.ndarray]) -> Program:
        import jax

        # The rate depends on the start; the weights themselves come from the checkpoint.
        program = Program(self.options, self.loss, self.train_split, self.val_split, "scratch")
        program.peak = self.options.learning_rate or PEAK_RATE[self.notes["start"]]
        leaves, tree = jax.tree.flatten(program.state)
        if [leaf.shape for leaf in leaves] != [array.shape for array in arrays]:
            raise UserError(f"{self.folder / 'state.npz'}: holds another network's arrays; choose another --run-dir")
        program.state = jax.device_put(jax.tree.unflatten(tree, arrays))
        total = self.notes["total"]
        print(f"{self.loss}: going on at step {self.notes['step']:,} of {total or 'a schedule to be decided'}")
        return program

    def finish(self) -> None:
        saved = time.monotonic()
        steps = last_steps = 1  # the first call compiles
        compiled = False
        while self.notes["total"] is None or self.notes["step"] < self.notes["total"]:
            before = time.monotonic()
            last_steps = self._call(steps)
            took = time.monotonic() - before
            if compiled:
                self.notes["timed_steps"] += last_steps
                self.notes["timed_seconds"] += took
                steps = max(1, min(2 * steps, int(CALL_S * last_steps / took)))
            compiled = True
            if self.notes["total"] is None and self.notes["timed_seconds"] >= FIRST_MEASURE_S:
                self._decide()
                saved = time.monotonic()
            elif time.monotonic() - saved >= self.options.save_seconds:
                self.save()
                saved = time.monotonic()
        self.save()
        self._report()

    def _call(self, steps: int) -> int:
        """At most ``steps`` steps, up to the epoch's end, where the average is measured; returns how many."""
        program, notes = self.program, self.notes
        first = notes["step"]
        ends = (
            first + steps,
            (first // program.steps_per_epoch + 1) * program.steps_per_epoch,
            notes["total"] or UNDECIDED,
        )
        last = min(ends)
        loss = program.train(first, last, notes["total"])
        if not math.isfinite(loss):
            raise UserError(
                f"{self.loss}: the loss is {loss} within steps {first + 1:,} to {last:,}; the last checkpoint "
                "is kept. Try a smaller --learning-rate in another --run-dir"
            )
        notes["step"] = last
        if last % program.steps_per_epoch == 0 or last == notes["total"]:
            self._end_epoch()
        return last - first

    def _end_epoch(self) -> None:
        notes = self.notes
        row = {"epoch": len(notes["history"]) + 1, "step": notes["step"], **self.program.take_means()}
        row |= {"val_accuracy": self.program.measure(), "seconds": round(self._seconds(), 1)}
        notes["history"].append(row)
        if notes["best"] is None or row["val_accuracy"] > notes["best"]["val_accuracy"]:
            notes["best"] = row
            self.program.keep_best()
        terms = ", ".join(f"{name} {row[name]:.3f}" for name in ("loss", *self.program.loss_layer.terms))
        print(
            f"{self.loss}: epoch {row['epoch']}, step {row['step']:,}/{notes['total'] or '?'}: {terms}, val "
            f"{row['val_accuracy']:.2%} (best {notes['best']['val_accuracy']:.2%}), {self._images_per_second():,.0f} "
            f"images/s, {row['seconds'] / 60:.1f} min",
            flush=True,
        )

    def _decide(self) -> None:
        """Sets the schedule from the measured times; it stays as it is, also when the run goes on after a kill."""
        notes = self.notes
        self.program.measure()  # compiles, the first time
        measure_s = seconds(self.program.measure)
        save_s = seconds(self.save)
        step_s = notes["timed_seconds"] / notes["timed_steps"]
        times = (step_s, measure_s, save_s, self.program.steps_per_epoch, self.options.save_seconds)
        notes["total"] = notes["step"] + decide_steps(self.share_s, self._seconds(), *times)
        print(
            f"{self.loss}: {1e3 * step_s:.1f} ms a step, {measure_s:.1f} s a validation, {save_s:.1f} s a checkpoint: "
            f"{notes['total']:,} steps, {notes['total'] / self.program.steps_per_epoch:.1f} epochs"
        )
        self.save()

    def _seconds(self) -> float:
        """Used for this loss so far, by this process and those before it."""
        return self.seconds_before + time.monotonic() - self.started

    def _images_per_second(self) -> float:
        return self.notes["timed_steps"] * self.options.batch_size / max(self.notes["timed_seconds"], 1e-9)

    def save(self) -> None:
        """Writes the arrays and the notes, whole or not at all."""
        import jax

        self.notes["seconds"] = self._seconds()
        leaves = jax.device_get(jax.tree.leaves(self.program.state))
        arrays = {f"{i:05d}": leaf for i, leaf in enumerate(leaves)}
        with whole_file(self.folder / "state.npz") as temporary:
            np.savez(temporary, notes=np.array(json.dumps(self.notes)), **arrays)

    def _read_state(self) -> list[np.ndarray] | None:
        path = self.folder / "state.npz"
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                self.notes = json.loads(str(file["notes"]))
                return [file[name] for name in sorted(set(file.files) - {"notes"})]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{path}: the checkpoint is damaged ({error}); delete {self.folder} to start again"
            ) from None

    def _report(self) -> None:
        """Writes the best average in half precision and measures what was written; ``result.json`` comes last."""
        import jax

        import evaluation
        import plots
        from model_files import model_file

        notes, network = self.notes, self.program.network
        for variable, value in zip(network.weights, self.program.state["best"], strict=True):
            variable.assign(value)
        pixels, model = network.get_layer("pixel_input"), config.ModelConfig()
        best = {"split": "val", "accuracy": notes["best"]["val_accuracy"], "epoch": notes["best"]["epoch"]}
        info = model_file.ModelInfo(
            model_file.NetworkDescription(
                arch=self.options.arch,
                class_names=self.train_split.class_names,
                num_embeddings=model.num_embeddings,
                embedding_size=model.embedding_size,
                input_size=pixels.size,
                scaling=pixels.scaling,
                logit_scale=model.logit_scale,
            ),
            dataset=self.train_split.name,
            metrics=best,
            versions=runtime.versions(),
            origin="benchmarks/gpu_fer2013.py",
        )
        weights = self.folder / "best.weights.h5"
        model_file.save_model(weights, network, info)
        halve(weights)
        split_file(weights, self.folder)
        plots.save_history(self.folder / "history.png", notes["history"])
        runtime.set_up(precision="float32")
        network, _ = model_file.load_model(weights)  # what the file holds is measured
        for flip in (True, False):
            extra = {
                "selected_on": "val",
                "best_epoch": best["epoch"],
                "last_accuracy": notes["history"][-1]["val_accuracy"],  # selected by nothing
                "steps": notes["step"],
                "start": notes["start"],
                "share": self.options.share,
                "minutes": self._seconds() / 60,
                "images_per_second": self._images_per_second(),
                "device": jax.devices()[0].device_kind,
                "platform": jax.devices()[0].platform,
                "versions": runtime.versions(),
                "history": notes["history"],
                "config": identity(self.options, self.loss),
            }
            folder = self.folder / "flip" if flip else self.folder
            shared = {"seed": self.options.seed, "flip": flip, "extra": extra}
            result = evaluation.evaluate(network, self.val_split, folder, **shared)
            how = f"{self.loss}, flip" if flip else self.loss
            print(f"{how}: {result['accuracy']:.2%} of {result['n']:,} on {result['split']}")
        print(f"{self.loss}: the epoch was selected on this same split, so the estimate is too good")


def seconds(action) -> float:
    before = time.monotonic()
    action()
    return time.monotonic() - before


# --- the weights in half precision, in parts ------------------------------------------------------------------------


def halve(path: Path) -> None:
    """Rewrites a model file with its kernels in half precision.

    Vectors (biases, batch-norm statistics) keep float32: they are a hundredth of the file, and a variance may lie
    outside half precision's range.
    """
    from model_files import model_file

    with h5py.File(path, "r") as file:
        arrays: dict[str, np.ndarray] = {}
        file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
        described = file.attrs[model_file.ATTRIBUTE]
    with h5py.File(content := io.BytesIO(), "w", libver="latest") as file:
        for name, array in arrays.items():
            half = array.astype(np.float16) if array.ndim > 1 else array
            if not np.all(np.isfinite(half)):
                raise UserError(f"{path}: {name} holds numbers beyond half precision's 65,504; the training diverged")
            file[name] = half
        file.attrs[model_file.ATTRIBUTE] = described
    with whole_file(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def split_file(path: Path, folder: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Cuts a file into ``weights.f16.part00`` and so on, and writes their manifest last; returns the parts."""
    with contextlib.suppress(FileNotFoundError):
        (folder / MANIFEST).unlink()
    for old in folder.glob("weights.f16.part*"):
        old.unlink()
    content = path.read_bytes()
    parts = []
    for number, start in enumerate(range(0, len(content), part_bytes)):
        part = folder / f"weights.f16.part{number:02d}"
        with whole_file(part) as temporary:
            temporary.write_bytes(content[start : start + part_bytes])
        parts.append(part)
    listed = [{"name": part.name, "bytes": part.stat().st_size, "sha256": sha256(part)} for part in parts]
    write_json(folder / MANIFEST, {"bytes": len(content), "sha256": sha256(path), "parts": listed})
    return parts


def join(folder: Path, target: Path) -> None:
    """Puts the parts of a folder together into a model file.

    Raises:
        UserError: the manifest or a part is missing or damaged, or another ending than ``.weights.h5``.
    """
    if not str(target).endswith(".weights.h5"):
        raise UserError(f"{target}: expected a name that ends with .weights.h5")
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the folder of a finished run")
    manifest = read_json(path)
    try:
        parts = [(str(part["name"]), str(part["sha256"])) for part in manifest["parts"]]
        whole = str(manifest["sha256"])
    except (KeyError, TypeError):
        raise UserError(f"{path}: expected a manifest of parts with their sha256, found something else") from None
    with whole_file(target) as temporary:
        with open(temporary, "wb") as file:
            for name, digest in parts:
                part = folder / Path(name).name  # a manifest reaches into no other folder
                if not part.is_file():
                    raise UserError(f"{part}: this part is missing; get it again")
                if (found := sha256(part)) != digest:
                    raise UserError(f"{part}: expected sha256 {digest}, found {found}; get it again")
                file.write(part.read_bytes())
        if (found := sha256(temporary)) != whole:
            raise UserError(f"{path}: the parts together: expected sha256 {whole}, found {found}")


# --- the table ------------------------------------------------------------------------------------------------------

TABLE_MARKS = ("<!-- table: begin -->", "<!-- table: end -->")


def show_table(run_dir: Path, page: str) -> None:
    """Prints the table, or puts it between the marks of a page."""
    table = make_table(run_dir)
    if not page:
        print(table)
        return
    text = Path(page).read_text(encoding="utf-8")
    before, begin, rest = text.partition(TABLE_MARKS[0])
    _, end, after = rest.partition(TABLE_MARKS[1])
    if not begin or not end:
        raise UserError(f"{page}: expected the marks {' and '.join(TABLE_MARKS)}, found none")
    write_text(page, f"{before}{begin}\n{table}\n{end}{after}")


def make_table(run_dir: Path) -> str:
    """A Markdown table of a run folder's results, a row a loss; a loss without a whole result is not run."""
    titles = ("loss", "start", "device", "minutes", "images/s", "n", "accuracy", "95% interval", "with flip")
    titles += ("mean class recall", "selected by nothing")
    lines = [row_of(titles), row_of(["---"] * len(titles))]
    for loss in LOSSES:
        result, flipped = (read_result(run_dir / loss / place) for place in ("result.json", "flip/result.json"))
        if result is None or flipped is None:
            lines.append(row_of([loss, *[NOT_RUN] * (len(titles) - 1)]))
            continue
        low, high = result["intervals"]["accuracy"]
        cells = [
            loss,
            result["start"],
            result["device"],
            f"{result['minutes']:.1f}",
            f"{result['images_per_second']:,.0f}",
        ]
        cells += [
            f"{result['n']:,}",
            f"{result['accuracy']:.2%}",
            f"{low:.2%} to {high:.2%}",
            f"{flipped['accuracy']:.2%}",
        ]
        lines.append(row_of([*cells, f"{result['mean_class_recall']:.2%}", f"{result['last_accuracy']:.2%}"]))
    return "\n".join(lines)


def read_result(path: Path) -> Mapping[str, Any] | None:
    """A result of all the data on a GPU; others are told of and left out."""
    if not path.exists():
        return None
    result = read_json(path)
    if result["share"] == 1 and result["platform"] == "gpu":
        return result
    print(f"{path}: left out, {result['share']:.0%} of the data on {result['platform']}", file=sys.stderr)
    return None


def row_of(cells) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
