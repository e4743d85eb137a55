"""Shows which parts of a face support its label: Grad-CAM for the label and for each embedding vector."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import keras
import numpy as np
from keras import ops

import runtime
from files import UserError
from measuring.calibration import Calibration

_EPSILON = 1e-12  # as in `cnn_model.UnitVectors`
_HEAD = ("pool", "embedding_dense", "embeddings", "logits")
_VECTORS_PER_ROW = 7
_ROWS_AT_ONCE = 1024  # of a memory map that are in memory


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a network gives N faces their labels.

    Attributes:
        images: uint8 (N, H, W, 1 or 3), the faces.
        labels: int64 (N,), the explained class of each face.
        probabilities: float32 (N, C), rows that add up to 1.
        logits: float32 (N,), the label's logit.
        parts: float32 (N, k), each vector's part of it: the k parts and the label's bias add up to the logit.
        signed_maps: float32 (N, k, h, w), the vectors' maps before the ReLU, at the feature map's size: positive
            where the face supports the label, negative where it counts against it, in logits. Their sum over the
            vectors is the label's map before the ReLU.
    """

    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray
    parts: np.ndarray
    signed_maps: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Explanation:
        """The explanation of some of the faces."""
        return Explanation(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @property
    def label_maps(self) -> np.ndarray:
        """Grad-CAM of the label, float32 (N, h, w) in 0..1 (see `positive_part`)."""
        return positive_part(self.signed_maps.sum(axis=1))

    @property
    def vector_maps(self) -> np.ndarray:
        """Grad-CAM of each vector's part of the logit, float32 (N, k, h, w) in 0..1 (see `positive_part`)."""
        return positive_part(self.signed_maps)

    @property
    def shares(self) -> np.ndarray:
        """Each part over the sum of the k parts, float32 (N, k); NaN where that sum is not positive."""
        total = self.parts.sum(axis=1, keepdims=True)
        return np.where(total > 0, self.parts / np.where(total > 0, total, 1), np.nan).astype(np.float32)

    def full_size(self, maps: np.ndarray) -> np.ndarray:
        """Maps (..., h, w) resized to the faces' size: float32 (..., H, W), bilinear, so that 0..1 stays 0..1."""
        height, width = self.images.shape[1:3]
        flat = maps.reshape(-1, *maps.shape[-2:])
        resized = [cv2.resize(one, (width, height), interpolation=cv2.INTER_LINEAR) for one in flat]
        return np.array(resized, np.float32).reshape(*maps.shape[:-2], height, width)

    def figure_png(self, index: int, class_names: Sequence[str]) -> bytes:
        """The bytes of `save_figure`'s PNG."""
        png = io.BytesIO()
        _draw_face(png, self, index, class_names)
        return png.getvalue()

    def save_figure(self, path: str | Path, index: int, class_names: Sequence[str]) -> None:
        """Draws a face, its label's map, each vector's part of the logit, and the k vectors' maps.

        Args:
            path: the PNG to write.
            index: which of the N faces.
            class_names: C names.
        """
        _draw_face(path, self, index, class_names)

    def save_mean_figure(self, path: str | Path, class_names: Sequence[str]) -> None:
        """Draws, for each class, the mean face, the mean label map and the mean maps of the k vectors.

        Args:
            path: the PNG to write.
            class_names: C names; one row per class that occurs in `labels` (`mean_maps.MeanMaps.save_figure`).
        """
        from measuring import mean_maps

        parts = (self[start : start + _ROWS_AT_ONCE] for start in range(0, len(self), _ROWS_AT_ONCE))
        mean_maps.average(parts, len(class_names)).save_figure(path, class_names)


def maps(
    network: keras.Model, images: np.ndarray, labels: np.ndarray | None = None, batch_size: int = 64
) -> Explanation:
    """Computes Grad-CAM on the backbone's last feature map, for a label and for each of its k vectors.

    The label's logit is ``b_y + sum_l part_l`` with ``part_l = s * w_yl . e_l``: ``w_yl`` (d,) are the classifier's
    weights between vector l and label y, ``s`` the logit scale, ``e_l`` the unit vector. The map of vector l is
    ``ReLU(sum_f alpha_lf A_f)``, ``alpha_lf`` the mean over the positions of ``d part_l / d A_f``, A (h, w, F) the
    feature map. Source: Selvaraju et al., "Grad-CAM", ICCV 2017, equations 1 and 2; the split by vector is ours.

    The gradient needs no automatic differentiation. Between A and part_l there are the mean over the positions p (F,),
    ``z_l = W_l p + c_l``, ``e_l = z_l / |z_l|`` and a dot product, hence
    ``alpha_l = s / (h w) * W_l^T (w_yl - (w_yl . e_l) e_l) / |z_l|``, equal at all positions. One forward pass gives
    all maps, on every backend.

    A part depends on the direction of z_l only. So a map before the ReLU adds up to ``-(dpart_l / dz_l) . c_l`` over
    the positions, 0 without a bias c_l: it says where a face supports the label more than its mean position does.

    Args:
        network: what `cnn_model.build_model` made (or a network with a head of these layers and names).
        images: uint8 (N, H, W, 1 or 3), 0..255, RGB, taken as faces; may be a memory map.
        labels: int (N,), the classes to explain; None explains each face's most probable class.
        batch_size: images per forward pass; the result depends on it by rounding only.

    Raises:
        UserError: images or labels of another form, or a network without this head.
    """
    found = list(batches(network, images, labels, batch_size))
    columns = ([getattr(batch, field.name) for batch in found] for field in dataclasses.fields(Explanation)[1:])
    return Explanation(images, *(np.concatenate(column) for column in columns))


def batches(
    network: keras.Model, images: np.ndarray, labels: np.ndarray | None = None, batch_size: int = 64
) -> Iterator[Explanation]:
    """`maps` batch by batch, in order: for more images than the maps of which fit in memory.

    The arguments and errors are those of `maps`.
    """
    head = _Head(network)
    images = _checked_images(images)
    labels = _checked_labels(labels, len(images), head.num_classes)
    batch_size = min(batch_size, len(images))
    features_of = _forward(network, compiled=len(images) > batch_size or not runtime.eager_is_cheap())
    for start in range(0, len(images), batch_size):
        batch = np.asarray(images[start : start + batch_size])
        rows = len(batch)
        # The short last batch is filled up: a second shape would be compiled a second time.
        filled = np.concatenate([batch, np.repeat(batch[-1:], batch_size - rows, axis=0)])
        features = features_of(filled)[:rows]
        yield Explanation(batch, *head.explain(features, None if labels is None else labels[start : start + rows]))


def check(network: keras.Model) -> None:
    """Refuses a network without the head that `maps` needs.

    Raises:
        UserError: names the layers that are missing.
    """
    _Head(network)


def positive_part(signed: np.ndarray) -> np.ndarray:
    """ReLU, then each map divided by its own maximum.

    Args:
        signed: float (..., h, w).

    Returns:
        Float32 (..., h, w) in 0..1 with maximum 1; a map without a positive value is 0 everywhere.
    """
    positive = np.maximum(signed, 0)
    largest = positive.max(axis=(-2, -1), keepdims=True)
    return (positive / np.where(largest > 0, largest, 1)).astype(np.float32)


def overlap(vector_maps: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """How much an image's k maps cover the same places: the mean cosine over the pairs l < m.

    ``cos(a, b) = sum_x a(x) b(x) / (|a| |b|)``. For maps without negative values it is 0 when no place is in both, 1
    when one is a multiple of the other; it needs no threshold, and no choice of how a map is scaled.

    Args:
        vector_maps: float (N, k, h, w), not negative (`Explanation.vector_maps`). With signed maps the result is their
            mean uncentred correlation, -1..1.
        others: float (N, k, h, w), where the second map of each pair comes from; None is ``vector_maps``. With
            another image's maps the result is the overlap of maps that share their habits and not the image.

    Returns:
        Float64 (N,). A pair with an empty map has no cosine and is left out; NaN where no pair is left.

    Raises:
        ValueError: fewer than two vectors.
    """
    num_vectors = vector_maps.shape[1]
    if num_vectors < 2:
        raise ValueError(f"overlap: expected two or more vectors per image, received {num_vectors}")
    left = _unit_maps(vector_maps)
    right = left if others is None else _unit_maps(others)
    cosines = np.einsum("nkx,nmx->nkm", left, right)
    full = left.any(axis=2)[:, :, None] & right.any(axis=2)[:, None, :]
    # With others, (l, m) and (m, l) are two different pairs: all l != m count; without, each pair counts twice.
    pairs = full & ~np.eye(num_vectors, dtype=bool)
    count = pairs.sum(axis=(1, 2))
    total = np.where(pairs, cosines, 0).sum(axis=(1, 2))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _unit_maps(maps_nkhw: np.ndarray) -> np.ndarray:
    """(N, k, h, w) to float64 (N, k, h * w), each of length 1 or, when empty, 0."""
    flat = maps_nkhw.reshape(*maps_nkhw.shape[:2], -1).astype(np.float64)
    length = np.linalg.norm(flat, axis=-1, keepdims=True)
    return flat / np.where(length > 0, length, 1)


class _Head:
    """The layers after the feature map, as NumPy arrays in float64."""

    def __init__(self, network: keras.Model):
        names = {layer.name for layer in getattr(network, "layers", ())}
        if missing := [name for name in _HEAD if name not in names]:
            raise UserError(
                f"explain: expected a Keras network with the layers {', '.join(_HEAD)} (cnn_model.build_model), found "
                f"none named {', '.join(missing)}; an exported file has no feature map: use the weights file it is from"
            )
        _, self.num_vectors, self.size = network.output["embeddings"].shape
        kernel, bias = _arrays(network.get_layer("embedding_dense"))
        self.dense_kdf = kernel.T.reshape(self.num_vectors, self.size, -1)
        self.dense_bias_kd = bias.reshape(self.num_vectors, self.size)
        kernel, self.bias_c = _arrays(network.get_layer("logits"))
        self.num_classes = len(self.bias_c)
        scale = float(network.get_layer("logit_scale").scale) if "logit_scale" in names else 1.0
        self.classifier_ckd = scale * kernel.T.reshape(self.num_classes, self.num_vectors, self.size)
        layer = network.get_layer("calibration") if "calibration" in names else None
        self.calibration = Calibration(layer.temperature, layer.exponent) if layer else Calibration()

    def explain(self, features: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """Feature maps (B, h, w, F) to what `Explanation` holds after its images, for B faces."""
        _, height, width, _ = features.shape
        z_bkd = np.einsum("bf,kdf->bkd", features.mean(axis=(1, 2)), self.dense_kdf, optimize=True) + self.dense_bias_kd
        squared = np.sum(z_bkd**2, axis=-1, keepdims=True)
        inverse = 1 / np.sqrt(np.maximum(squared, _EPSILON))
        e_bkd = z_bkd * inverse
        logits_bc = np.einsum("bkd,ckd->bc", e_bkd, self.classifier_ckd, optimize=True) + self.bias_c
        if labels is None:
            labels = logits_bc.argmax(axis=1)
        w_bkd = self.classifier_ckd[labels]
        parts_bk = np.sum(w_bkd * e_bkd, axis=-1)
        # Below the guard of `UnitVectors` the length does not follow z, and only the first term is left.
        along = np.where(squared > _EPSILON, parts_bk[..., None] * e_bkd, 0)
        gradient_bkd = (w_bkd - along) * inverse
        alpha_bkf = np.einsum("bkd,kdf->bkf", gradient_bkd, self.dense_kdf, optimize=True) / (height * width)
        signed = np.einsum("bkf,bhwf->bkhw", alpha_bkf, features, optimize=True)
        exponentials = np.exp(self.calibration.logits(logits_bc))  # the largest is 0, so none overflows
        return (
            labels.astype(np.int64),
            (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32),
            logits_bc[np.arange(len(labels)), labels].astype(np.float32),
            parts_bk.astype(np.float32),
            signed.astype(np.float32),
        )


def _arrays(layer: keras.layers.Dense) -> tuple[np.ndarray, np.ndarray]:
    kernel, bias = (ops.convert_to_numpy(ops.cast(array, "float32")) for array in (layer.kernel, layer.bias))
    return kernel.astype(np.float64), bias.astype(np.float64)


def _forward(network: keras.Model, compiled: bool):
    """A function of pixels (B, H, W, C) that gives the last feature map, float64 (B, h, w, F)."""
    backbone = keras.Model(network.input, network.get_layer("pool").input)
    backbone.jit_compile = runtime.jit_compile()

    def features_of(pixels: np.ndarray) -> np.ndarray:
        features = backbone.predict_on_batch(pixels) if compiled else backbone(pixels, training=False)
        return ops.convert_to_numpy(ops.cast(features, "float32")).astype(np.float64)

    return features_of


def _checked_images(images: np.ndarray) -> np.ndarray:
    shape, dtype = getattr(images, "shape", ()), getattr(images, "dtype", type(images).__name__)
    if len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape or dtype != np.uint8:
        raise UserError(f"images: expected uint8 (N, H, W, 1 or 3) with N, H, W > 0, received {dtype} {shape}")
    return images


def _checked_labels(labels: np.ndarray | None, num_images: int, num_classes: int) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise UserError(f"labels: expected {num_images} whole numbers, received {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"labels: expected 0 to {num_classes - 1}, received {labels.min()} to {labels.max()}")
    return labels


# --- figures


def _draw_face(
    target: str | Path | io.BytesIO, explanation: Explanation, index: int, class_names: Sequence[str]
) -> None:
    import plots

    face, label = explanation.images[index], explanation.labels[index]
    label_map = explanation.full_size(explanation.label_maps[index])
    vector_maps = explanation.full_size(explanation.vector_maps[index])
    columns = min(len(vector_maps), _VECTORS_PER_ROW)
    rows = -(-len(vector_maps) // columns)
    width = max(6.2, 1.05 * columns)
    row_height = width / columns + 0.2
    with plots.new_figure(target, width, 2.45 + rows * row_height) as figure:
        top, bottom = figure.subfigures(2, 1, height_ratios=(2.45, rows * row_height))
        face_axes, label_axes, bars = top.subplots(1, 3, width_ratios=(1, 1, 1.15))
        _show(face_axes, face, None, "Face")
        _show(label_axes, face, label_map, f"{class_names[label]}, {explanation.probabilities[index, label]:.0%}")
        _draw_parts(bars, explanation, index)
        panels = bottom.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for vector, (axes, map_hw) in enumerate(zip(panels, vector_maps, strict=False)):
            share = explanation.shares[index, vector]
            _show(
                axes, face, map_hw, f"Vector {vector + 1}" + ("" if np.isnan(share) else f", {share:.0%}"), fontsize=8
            )


def _draw_parts(axes, explanation: Explanation, index: int) -> None:
    """A bar per vector: its part of the label's logit; the classifier's bias is the rest."""
    parts, logit = explanation.parts[index], explanation.logits[index]
    numbers = np.arange(1, len(parts) + 1)
    axes.bar(numbers, parts, color="#e69f00")
    axes.axhline(0, color="black", linewidth=0.8)
    # Many vectors have no room for a number each.
    axes.set_xticks(numbers if len(numbers) <= 2 * _VECTORS_PER_ROW else numbers[:: len(numbers) // _VECTORS_PER_ROW])
    axes.tick_params(length=0)
    axes.set(xlabel="Vector", title=f"Logit {logit:.2f} by vector (bias {logit - parts.sum():+.2f})")
    axes.title.set_fontsize(8)
    axes.grid(True, axis="y")


def _show(axes, face: np.ndarray, map_hw: np.ndarray | None, title: str = "", fontsize: float = 9) -> None:
    """A face as it is, or in gray with a map's colours over it."""
    image = np.broadcast_to(face, (*face.shape[:2], 3)) if map_hw is None else overlaid(face, map_hw)
    axes.imshow(image, interpolation="bicubic")
    axes.set_axis_off()
    axes.set_title(title, fontsize=fontsize)


def overlaid(face: np.ndarray, map_hw: np.ndarray) -> np.ndarray:
    """A face in gray with a map's colours over it: nothing at 0, bright yellow at 1.

    Args:
        face: uint8 (H, W, 1 or 3).
        map_hw: float (H, W) in 0..1.

    Returns:
        Uint8 (H, W, 3) RGB.
    """
    import matplotlib

    gray = face.mean(axis=-1, keepdims=True) / 255
    colors = matplotlib.colormaps["inferno"](0.25 + 0.75 * map_hw)[..., :3]
    strength = 0.75 * map_hw[..., None]
    return ((gray * (1 - strength) + colors * strength) * 255).round().astype(np.uint8)
