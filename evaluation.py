"""Predicts every image of a split, measures the predictions and writes the report."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import datasets
from data_helper import PreparedSplit
from distributed import exchange
from distributed.process_group import GROUP_OF_ONE, ProcessGroup
from files import UserError, sha256, whole_file, write_json
from measuring.study import Measured, Study
from measuring.views import VIEW_TITLES, VIEWS, View, Views, views_of, whole
from model_files import hub
from model_files.description import ModelInfo
from reading.arrays import Rows
from reading.text import aligned

_MOST_MAPPED = 64  # images whose feature maps are in memory in float64


def predict(
    network: keras.Model,
    images: np.ndarray | Rows,
    batch_size: int = 256,
    views: Views = "none",
    compiled: bool = True,
    group: ProcessGroup = GROUP_OF_ONE,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs the network over every image, one batch in memory at a time.

    Args:
        network: pixels 0..255 to ``{"logits": (B, C), "embeddings": (B, k, d)}`` (`cnn_model.build_model`).
        images: uint8 or float (N, H, W, 1 or 3) in 0..255; may be a memory map, or rows of one (`PreparedSplit.rows`).
        batch_size: images per batch.
        views: average the probabilities over views of each image (`views.VIEWS`); the embeddings stay the image's
            own.
        compiled: False runs the layers one by one, which saves compiling a network that runs only once
            (`runtime.eager_is_cheap`); equal to rounding. A process group always compiles.
        group: the processes that share the images: each calls this, reads its share and gets all outputs.

    Returns:
        Class probabilities float32 (N, C), the softmax of the logits, and embeddings float32 (N, k, d).

    Raises:
        UserError: no images, no batch size, or a network whose outputs are not finite.
    """
    given = (network, images, batch_size, compiled, group)
    logits, embeddings = outputs(*given)
    if views == "none":
        return softmax(logits), embeddings
    seen = (softmax(logits if view is whole else outputs(*given, view)[0]) for view in VIEWS[views])
    return sum(seen) / np.float32(len(VIEWS[views])), embeddings


def outputs(
    network: keras.Model,
    images: np.ndarray | Rows,
    batch_size: int = 256,
    compiled: bool = True,
    group: ProcessGroup = GROUP_OF_ONE,
    view: View = whole,
) -> tuple[np.ndarray, np.ndarray]:
    """As `predict`, but returns the logits, float32 (N, C), and shows the network one view of each image."""
    num_images = len(images)
    if not num_images:
        raise UserError("predict: expected at least one image, received none")
    if batch_size < 1:
        raise UserError(f"batch_size: expected 1 or more, received {batch_size}")
    batch_size = min(batch_size, num_images)
    logits = np.empty((num_images, *network.output["logits"].shape[1:]), np.float32)
    embeddings = np.empty((num_images, *network.output["embeddings"].shape[1:]), np.float32)
    outputs_of = exchange.predictor(network, compiled)
    for start in range(0, num_images, batch_size):
        rows = range(start, min(start + batch_size, num_images))
        # The short last batch is filled up and its surplus cut off: a second shape would be compiled a second time.
        batch = group.take(images, rows, batch_size)
        found = outputs_of(view(batch))
        logits[rows.start : rows.stop] = found["logits"][: len(rows)]
        embeddings[rows.start : rows.stop] = found["embeddings"][: len(rows)]
    finite = np.isfinite(logits).all(axis=1) & np.isfinite(embeddings).all(axis=(1, 2))
    if not finite.all():
        raise UserError(
            f"the network's outputs are not finite for {np.sum(~finite):,} of {num_images:,} images, "
            f"first image {np.argmin(finite)}: its weights have diverged, or overflow in half precision; "
            "train again with a smaller --learning-rate or --precision float32"
        )
    return logits, embeddings


def evaluate(
    network: keras.Model,
    split: PreparedSplit,
    folder: str | Path,
    *,
    batch_size: int = 256,
    seed: int = 0,
    views: Views = "none",
    with_maps: bool = False,
    studies: Sequence[Study] = (),
    extra: Mapping[str, Any] | None = None,
    group: ProcessGroup = GROUP_OF_ONE,
) -> dict[str, Any]:
    """Measures a network on every image of a split and writes the report.

    Args:
        network: see `predict`.
        split: the images and their labels.
        folder: where ``predictions.npz``, the figures (`plots.save_figures`) and, as the last file,
            ``result.json`` go.
        batch_size: images per batch.
        seed: of the bootstrap intervals and of the t-SNE figure.
        views: see `predict`.
        with_maps: also explain the predicted labels: ``explain.png`` (`mean_maps.MeanMaps.save_figure`) and the entry
            ``explain``. The maps are those of the images as they are, never of other views.
        studies: more that is measured and drawn (`robustness.Robustness`, `groups.Groups`,
            `second_ruler.SecondRuler`).
        extra: more JSON-ready entries of the result, such as ``weights`` and ``selected_on``.
        group: see `predict`; only rank 0 writes the report, the others return an empty result.

    Returns:
        What ``result.json`` holds: ``dataset``, ``split``, all that `metrics.score` returns, ``correlations``
        (`metrics.correlations`), ``class_names``, ``views``, ``parameters``, ``seed``, ``commit`` (of this code;
        ``-dirty`` when tracked files differ from it, None outside git) and the extra entries. ``explain`` holds
        ``overlap`` and ``interval`` (`mean_maps.MeanMaps.mean_overlap`; None where k = 1), ``n``, the images that have
        an overlap, and ``num_embeddings``, k. ``predictions.npz``
        holds ``labels`` int64 (N,), ``probabilities`` float32 (N, C), ``class_names`` (C,), and of the images in the
        t-SNE figure ``tsne_rows`` int64 (M,) and ``tsne_places`` float32 (M, 2), both empty where there is none.

    Raises:
        UserError: the network has another number of classes than the split, or cannot be explained (`explain.check`);
            or see `predict`.
    """
    # scikit-learn and Matplotlib take half a second to import, and `predict` alone needs neither.
    import metrics
    import plots
    from labels import second_ruler
    from measuring import groups
    from reporting import robustness

    check_classes(network, split)
    if with_maps:
        import explain

        explain.check(network)
    folder = Path(folder)
    probabilities, embeddings = predict(network, split.rows, batch_size, views, group=group)
    if not group.is_rank0:
        return {}
    scores = metrics.score(split.labels, probabilities, split.class_names, seed)
    tsne_rows, tsne_places = metrics.tsne(embeddings, seed)
    with whole_file(folder / "predictions.npz") as temporary:
        np.savez_compressed(
            temporary,
            labels=split.labels.astype(np.int64),
            probabilities=probabilities,
            class_names=np.array(split.class_names),
            tsne_rows=tsne_rows,
            tsne_places=tsne_places,
        )
    title = f"{datasets.title(split.meta['dataset'])}, {split.meta['split']}, n = {len(split.labels):,}"
    title += f", accuracy {scores['accuracy']:.2%}" + f", views: {views}" * (views != "none")
    plots.save_figures(folder, title, split.labels, probabilities, split.class_names, scores, tsne_rows, tsne_places)
    # What an earlier evaluation drew in this folder may not belong to the result.
    for name in ("explain.png", *robustness.FILES, *groups.FILES, *second_ruler.FILES):
        (folder / name).unlink(missing_ok=True)
    explained = _explained(network, split, probabilities, folder, title, seed, batch_size) if with_maps else {}
    measured = Measured(
        lambda images: predict(network, images, batch_size, views)[0], probabilities, scores, folder, title
    )
    for study in studies:
        explained |= study(measured)
    result = {
        "dataset": split.meta["dataset"],
        "split": split.meta["split"],
        **scores,
        "correlations": metrics.correlations(split.labels, embeddings, split.num_classes),
        **explained,
        "class_names": list(split.class_names),
        "views": views,
        "parameters": network.count_params(),
        "seed": seed,
        "commit": commit(),
        **(extra or {}),
    }
    write_json(folder / "result.json", result)
    return result


def check_classes(network: keras.Model, split: PreparedSplit, names: Sequence[str] | None = None) -> None:
    """Refuses a network of another number of classes than the split, or of other ``names`` in the order of its logits.

    With another order every number would be wrong, in silence.
    """
    num_classes = network.output["logits"].shape[-1]
    if num_classes != split.num_classes:
        raise UserError(
            f"{split.name}: expected a network of its {split.num_classes} classes ({', '.join(split.class_names)}), "
            f"received one of {num_classes}; choose weights trained on such a data set, or another --dataset"
        )
    if names is not None and tuple(names) != split.class_names:
        raise UserError(
            f"{split.name}: expected a network of its classes {', '.join(split.class_names)}, in this order, received "
            f"one of {', '.join(names)}; choose weights trained on such a data set, or another --dataset"
        )


def _explained(
    network: keras.Model,
    split: PreparedSplit,
    probabilities: np.ndarray,
    folder: Path,
    title: str,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Draws ``explain.png``; the entry ``explain`` of the result."""
    import explain
    from measuring import mean_maps

    batches = explain.batches(network, split.rows, probabilities.argmax(axis=1), min(batch_size, _MOST_MAPPED))
    maps = mean_maps.average(batches, split.num_classes)
    overlap = maps.mean_overlap(seed)
    shown = "Mean Grad-CAM by predicted expression" + (f", overlap {overlap[0]:.3f}" if overlap else "")
    maps.save_figure(folder / "explain.png", split.class_names, f"{title}\n{shown}")
    mean, interval = overlap or (None, None)
    count = int((~np.isnan(maps.overlaps)).sum())
    num_embeddings = maps.vector_maps.shape[1]
    return {"explain": {"overlap": mean, "interval": interval, "n": count, "num_embeddings": num_embeddings}}


def default_folder(weights: str | Path, split: PreparedSplit, views: Views, seed: int) -> Path:
    """The folder of an evaluation: ``runs/evaluate-<run>-<weights>-<dataset>-<split>[-<views>]-<8 hex>``.

    The name tells evaluations apart: the digits depend on the bytes of the weights and of the split, and on the seed.

    Args:
        weights: the model file, or ``hf://owner/repository/file``; the name of its folder is ``<run>``.
        split: the split to measure.
        views: those that are averaged.
        seed: of the bootstrap intervals and the t-SNE figure.
    """
    digest = hashlib.sha256(f"{sha256(hub.local_file(weights))} {split.digest} {seed}".encode()).hexdigest()
    # The Hub's cache has a folder of its own making around the file.
    place = Path(weights) if hub.is_address(weights) else Path(weights).resolve()
    names = [place.parent.name, Path(weights).stem.removesuffix(".weights"), *split.name.split("/")]
    return Path("runs") / "-".join(["evaluate", *filter(None, names), *[views] * (views != "none"), digest[:8]])


def check_free(folder: str | Path) -> None:
    """Refuses the folder of a training run, whose result an evaluation would replace."""
    if (Path(folder) / "config.json").exists():
        raise UserError(f"--run-dir {folder}: holds a training run, whose result this would replace; choose another")


def selected_on(trained_on: str | None, metrics: Mapping[str, Any], split: PreparedSplit) -> str | None:
    """The name of ``split`` if a model file's epoch was selected on it; None otherwise, or if the file does not say.

    Args:
        trained_on: ``<dataset>/<split>`` of the file (`model_file.ModelInfo.dataset`).
        metrics: of the file; its ``split`` is what the epoch was selected on.
        split: the split that is measured.
    """
    dataset, name = split.meta["dataset"], split.meta["split"]
    return name if str(trained_on).split("/")[0] == dataset and metrics.get("split") == name else None


def calibration(info: ModelInfo) -> dict[str, Any]:
    """The entries of a result that say how the probabilities are calibrated; empty where they are not."""
    fitted = {name: getattr(info.network, name) for name in ("temperature", "exponent")}
    fitted["calibrated_on"] = info.calibrated_on
    return fitted if info.calibrated_on else {}


def format_table(result: Mapping[str, Any]) -> str:
    """The report as plain text: overall measures with their intervals, one line per class, the confusion matrix.

    Args:
        result: what `evaluate` returned or ``result.json`` holds.
    """
    lines = [f"{result['dataset']}/{result['split']}: {result['n']:,} images"]
    chosen_on = result.get("selected_on")
    if chosen_on == "test":
        lines += ["The epoch was selected on the test split (--select-on test), as in the", "published practice."]
    if chosen_on == result["split"]:
        lines.append("The epoch was selected on this same split, so the estimate is too high.")
    if result.get("calibrated_on") == f"{result['dataset']}/{result['split']}":
        lines.append("The calibration was fitted on this same split, so its error is too low.")
    if (shown := views_of(result)) != "none":
        lines.append(f"Every probability is the mean over {VIEW_TITLES[shown]} (--views {shown}).")
    lines.append("")
    lines += [*_measure_lines(result), ""]

    width = max(len(name) for name in (*result["class_names"], "expression"))
    lines.append(f"{'expression':<{width}}  precision   recall       F1        n")
    for name, values in result["per_class"].items():
        shares = (_percent(values[measure]) for measure in ("precision", "recall", "f1"))
        lines.append("{:<{}}  {:>9}{:>9}{:>9}{:>9,}".format(name, width, *shares, values["n"]))
    lines += ["", *_confusion_lines(result)]
    from labels import second_ruler  # these three are imported late, as `metrics`
    from measuring import groups
    from reporting import robustness

    for more in (robustness.lines(result), groups.lines(result), second_ruler.lines(result)):
        lines += ["", *more] if more else []
    return "\n".join(lines)


def _measure_lines(result: Mapping[str, Any]) -> list[str]:
    """One line per measure with its interval; a result of an older version may lack some."""
    import metrics  # imported late: recognising does not wait for scikit-learn

    lines = []
    for name, measure in metrics.MEASURES.items():
        if result.get(name) is not None:
            line = f"{measure.title:<26}" + format(result[name], "7.2%" if measure.is_share else "7.3f")
            interval = result.get("intervals", {}).get(name)
            lines.append(line + ("   95% interval {:.2%} to {:.2%}".format(*interval) if interval else ""))
    return lines + _explain_lines(result)


def _explain_lines(result: Mapping[str, Any]) -> list[str]:
    explained = result.get("explain")
    if not explained:
        return []
    if explained["overlap"] is None:
        return ["The figure explain.png has no overlap of maps, because there are no two maps to compare."]
    line = f"{'overlap of vector maps':<26}{explained['overlap']:7.3f}"
    lines = [line + "   95% interval {:.3f} to {:.3f}".format(*explained["interval"])]
    if views_of(result) != "none":
        lines.append("The maps are those of the images, not of their mirror images or crops.")
    return lines


def _confusion_lines(result: Mapping[str, Any]) -> list[str]:
    names = result["class_names"]
    rows = [
        [name, *(f"{count:,}" for count in row)] for name, row in zip(names, result["confusion_matrix"], strict=True)
    ]
    return ["confusion matrix (rows: true expression, columns: predicted)", *aligned([["", *names], *rows])]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (N, C) of logits (N, C), of the same dtype."""
    # Less the row's largest, or exp overflows.
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def commit() -> str | None:
    """The commit of this file's repository, 40 hexadecimal digits, ``-dirty`` when tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None
