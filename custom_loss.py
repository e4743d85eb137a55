"""The Ad-Corre loss: Feature, Mean and Embedding Discriminator beside cross-entropy.

Fard and Mahoor, "Ad-Corre", IEEE Access 2022, doi 10.1109/ACCESS.2022.3156598; `docs/loss.md` derives
every term. The terms are pure functions of tensors. One layer weighs them and owns the confusion history.

Shape letters: B batch, k embeddings per face, d numbers per embedding, C classes, H history.
A suffix names a tensor's axes: `e_bkd`, `corr_bb`; n stands for k * d.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

import baseline_losses
from baseline_losses import face_embeddings, full_precision

# Below this squared length a centred vector counts as constant: its correlation with anything is 0.
EPSILON = 1e-12


def _off_diagonal(n, dtype):
    return 1 - ops.eye(n, dtype=dtype)


def _unit_deviations(x):
    """Centres every vector of the last axis and scales it to length 1; a constant vector becomes 0."""
    x = full_precision(x)
    # The first coordinate goes before the mean: a constant vector is then exactly 0, and not a mean's rounding.
    x = x - ops.stop_gradient(x[..., :1])
    x = x - ops.mean(x, axis=-1, keepdims=True)
    # The guard is inside the root: outside, a constant vector would give NaN gradients.
    return x * ops.rsqrt(ops.maximum(ops.sum(x * x, axis=-1, keepdims=True), EPSILON))


def pearson_correlation(x):
    """Pearson's correlation of every pair of rows.

    `rho(u, v) = sum(u' v') / sqrt(sum(u'^2) sum(v'^2))` with `u' = u - mean(u)`, over the last axis.

    Args:
        x: float (..., n, d): n vectors of d numbers.

    Returns:
        float32 (..., n, n), float64 for float64 input, in -1..1. A constant vector has correlation 0 with
        every vector, itself included, and passes finite gradients.
    """
    x = _unit_deviations(x)
    return ops.matmul(x, ops.swapaxes(x, -1, -2))


def _check_labels(labels, num_classes):
    """Refuses labels outside 0..C-1 (ValueError): `one_hot` would make them rows of zeros, in silence.

    Only where their values are known. In a compiled step they are not; there the data was checked when it was opened.
    """
    if len(shape := np.shape(labels)) == 2 and shape[1] not in (None, num_classes):
        raise ValueError(f"labels: expected (B,), or votes (B, {num_classes}), received the shape {tuple(shape)}")
    if num_classes is None or len(shape) != 1:
        return
    try:
        values = ops.convert_to_numpy(labels)
    except (TypeError, ValueError, NotImplementedError, AttributeError):  # traced: each backend has its own exception
        return
    wrong = ~np.isin(values, np.arange(num_classes))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"labels: expected codes 0..{num_classes - 1}, received {values[row]} in row {row}")


def _class_sums(labels, num_classes, *arrays):
    """Sums every array (B, n) over the faces of each class: (C, n), or (B, n) with zero rows if C is None."""
    if num_classes is not None:
        # A product with the one-hot labels adds in the same order in every run; a scatter on a GPU does not.
        member_bc = ops.one_hot(labels, num_classes, dtype=arrays[0].dtype)
        return [ops.matmul(ops.transpose(member_bc), x_bn) for x_bn in arrays]
    labels = ops.cast(labels, "int32")
    place_b = ops.searchsorted(ops.sort(labels), labels)  # of a class's first face in that order: its number, below B
    return [ops.segment_sum(x_bn, place_b, num_segments=ops.shape(x_bn)[0]) for x_bn in arrays]


def feature_discriminator(embeddings, labels, class_recall=None, weight_floor=1.0, num_classes=None):
    """FD: the embeddings of one class correlate, those of different classes anti-correlate.

    `FD = 1/(k B^2) * sum_l sum_{i != j} W_ij * |Omega_ij - rho(e_i^l, e_j^l)|`, `Omega_ij = +1` for equal labels,
    `-1` otherwise; `W_ij = weight_floor + (1 - recall[y_i]) + (1 - recall[y_j])`, the adaptive attention map.

    No pair is formed. `|Omega - rho| = 1 - Omega * rho`, as `|rho| <= 1`, and rho is the inner product of centred unit
    vectors `u_i` (here the k of a face concatenated), so that sums of pairs are products of sums. With
    `W_ij = h(y_i) + h(y_j)`, `S_c` the sum of the `u_i` of class c, `S` that of all and `n_c` the faces of class c,
    `k B^2 FD = 2 sum_c h_c (k (B - 1) n_c - S_c.(2 S_c - S) + sum_{y_i = c} u_i.u_i)`, whose last sum takes the pairs
    `i = j` out again. Time and memory grow with B, not with its square. At `rho = Omega` exactly the absolute value
    has no derivative; this form's is 0 there, as rho is at its extreme.

    Args:
        embeddings: float (B, k, d).
        labels: int (B,), 0 <= label < C.
        class_recall: float (C,) in 0..1, the diagonal of the row-normalised confusion matrix; no gradient
            flows into it. None switches the adaptive map off: `W_ij = 1`.
        weight_floor: 1 is the published code's formula, 0 the paper's notation.
        num_classes: C, where ``class_recall`` does not give it; faster. None takes whatever labels there are.

    Returns:
        Scalar >= 0 up to rounding, float32 (float64 for float64 embeddings); 0 for a batch of one.

    Raises:
        ValueError: another shape; in eager mode, a label outside its range. So do the other functions of labels.
    """
    e_bkd = face_embeddings(embeddings, labels)
    batch_size, k = ops.shape(e_bkd)[0], e_bkd.shape[1]
    half_weight_c = 0.5
    if class_recall is not None:
        class_recall = ops.stop_gradient(ops.cast(class_recall, e_bkd.dtype))
        half_weight_c, num_classes = weight_floor / 2 + 1 - class_recall, class_recall.shape[0]
    _check_labels(labels, num_classes)
    u_bn = ops.reshape(_unit_deviations(e_bkd), (batch_size, -1))
    itself_b1 = ops.sum(u_bn * u_bn, axis=1, keepdims=True)
    sum_cn, itself_c1, count_c1 = _class_sums(labels, num_classes, u_bn, itself_b1, ops.ones_like(itself_b1))
    corr_c = ops.sum(sum_cn * (2 * sum_cn - ops.sum(sum_cn, axis=0)), axis=1)
    size = ops.cast(batch_size, e_bkd.dtype)
    distance_c = k * (size - 1) * count_c1[:, 0] + itself_c1[:, 0] - corr_c
    several = ops.minimum(size - 1, 1)  # in a batch of one nothing but rounding is left
    return 2 * several * ops.sum(half_weight_c * distance_c) / (k * size * size)


def mean_discriminator(embeddings, labels, num_classes):
    """MD: the mean embeddings of different classes anti-correlate.

    `MD = 1/k * sum_l 1/P^2 * sum_{c != c'} (1 + rho(mu_c^l, mu_c'^l))` over the P classes in the batch.

    Args:
        embeddings: float (B, k, d).
        labels: int (B,), 0 <= label < num_classes.
        num_classes: C.

    Returns:
        Scalar >= 0, float32 (float64 for float64 embeddings); 0 when fewer than two classes are present.
    """
    e_bkd = face_embeddings(embeddings, labels)
    k = e_bkd.shape[1]
    _check_labels(labels, num_classes)
    member_bc = ops.one_hot(labels, num_classes, dtype=e_bkd.dtype)
    count_c = ops.sum(member_bc, axis=0)
    present_c = ops.cast(count_c > 0, e_bkd.dtype)
    sum_kcd = ops.einsum("bc,bkd->kcd", member_bc, e_bkd)
    corr_kcc = pearson_correlation(sum_kcd / ops.maximum(count_c, 1)[None, :, None])
    # Absent classes leave the sum: the published code gave them the batch mean, which is no class's mean.
    pair_cc = present_c[:, None] * present_c[None, :] * _off_diagonal(num_classes, e_bkd.dtype)
    present = ops.maximum(ops.sum(present_c), 1)
    return ops.sum(pair_cc * (1 + corr_kcc)) / (k * present * present)


def embedding_discriminator(embeddings):
    """ED: the k embeddings of one face anti-correlate, so that they carry different information.

    `ED = 1/(B k^2) * sum_i sum_{l != m} (1 + rho(e_i^l, e_i^m))`.

    Args:
        embeddings: float (B, k, d).

    Returns:
        Scalar >= 0, float32 (float64 for float64 embeddings); 0 when k = 1.
    """
    e_bkd = full_precision(embeddings)
    batch_size, k = ops.shape(e_bkd)[0], e_bkd.shape[1]
    corr_bkk = pearson_correlation(e_bkd)
    total = ops.sum(_off_diagonal(k, e_bkd.dtype) * (1 + corr_bkk))
    return total / ops.cast(batch_size * k * k, e_bkd.dtype)


def majority(labels):
    """The label of each image: ``labels`` int (B,) themselves, or the largest entries of votes, float (B, C)."""
    return ops.argmax(labels, axis=-1) if len(labels.shape) == 2 else labels


def cross_entropy(labels, logits, label_smoothing=0.0):
    """CE: the batch mean of `-log softmax(logits)_y`, with the target's share `label_smoothing` spread evenly.

    Of votes it is the batch mean of `-sum_c q_c log softmax(logits)_c`; votes for one class are that label.

    Args:
        labels: int (B,), 0 <= label < C, or float (B, C), the votes q of each image, which sum to 1.
        logits: float (B, C).
        label_smoothing: 0..1.

    Returns:
        Scalar >= 0, float32 (float64 for float64 logits).
    """
    logits = full_precision(logits)
    num_classes = logits.shape[-1]
    _check_labels(labels, num_classes)
    if len(np.shape(labels)) == 2:
        target_bc = ops.cast(labels, logits.dtype)
    else:
        target_bc = ops.one_hot(labels, num_classes, dtype=logits.dtype)
    target_bc = target_bc * (1 - label_smoothing) + label_smoothing / num_classes
    return -ops.mean(ops.sum(target_bc * ops.log_softmax(logits, axis=-1), axis=-1))


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a term of the loss may use of one batch.

    Attributes:
        targets: the labels, or votes float (B, C).
        labels: int (B,), 0 <= label < C.
        logits: float (B, C).
        embeddings: float (B, k, d).
        training: whether the batch is trained on.
        consistency: float (B,), `baseline_losses.attention_consistency` of each image; None where it was not computed.
    """

    targets: Any
    labels: Any
    logits: Any
    embeddings: Any
    training: bool
    consistency: Any = None


def _feature_term(loss, batch):
    if not loss.adaptive:
        return feature_discriminator(batch.embeddings, batch.labels, num_classes=loss.num_classes)
    if batch.training:
        loss.remember(batch.labels, batch.logits)
    return feature_discriminator(batch.embeddings, batch.labels, loss.class_recall(), loss.weight_floor)


# Term to its unweighted value, a function of an `AdCorreLoss` and a `Batch`. A new term is an entry here, and a field
# w_<term> of `config.LossConfig` where it gets an option. A term with state has a layer in `baseline_losses.LAYERS`.
TERMS: dict[str, Callable] = {
    "ce": lambda loss, batch: cross_entropy(batch.targets, batch.logits, loss.label_smoothing),
    "fd": _feature_term,
    "md": lambda loss, batch: mean_discriminator(batch.embeddings, batch.labels, loss.num_classes),
    "ed": lambda loss, batch: embedding_discriminator(batch.embeddings),
    **baseline_losses.TERMS,
}


class AdCorreLoss(keras.layers.Layer):
    """The total loss `w_ce*CE + w_fd*FD + w_md*MD + w_ed*ED`, and the confusion history behind its adaptive map.

    A layer, not a `keras.losses.Loss`: Keras tracks a layer's variables, so the history is saved, resumed and
    carried through JAX's stateless steps.

    Args:
        num_classes: C.
        w_ce: weight of the cross-entropy; None is `50 / num_classes`, the published 50 over a mean that
            also ran over the classes.
        w_fd: weight of the Feature Discriminator. A term of weight 0 is not computed.
        w_md: weight of the Mean Discriminator.
        w_ed: weight of the Embedding Discriminator.
        adaptive: weigh FD's pairs by the recall of their classes.
        weight_floor: see `feature_discriminator`.
        history: H, the predictions the confusion matrix looks back on.
        label_smoothing: see `cross_entropy`.
        ramp_steps: training batches over which the weights of all terms but CE rise linearly from 0.
        embedding_shape: ``(k, d)``, which ``w_center`` needs.
        other_weights: ``w_<term>`` of the other `TERMS`, such as those of `baseline_losses`; 0 if not given.
    """

    def __init__(
        self,
        num_classes,
        w_ce=None,
        w_fd=1.0,
        w_md=1.0,
        w_ed=1.0,
        adaptive=True,
        weight_floor=1.0,
        history=1000,
        label_smoothing=0.0,
        ramp_steps=0,
        embedding_shape=None,
        name="ad_corre_loss",
        **other_weights,
    ):
        super().__init__(name=name, dtype="float32")
        if num_classes < 2:
            raise ValueError(f"num_classes: expected 2 or more, received {num_classes}")
        if history < 1:
            raise ValueError(f"history: expected 1 or more predictions, received {history}")
        if not 0 <= weight_floor < float("inf"):
            raise ValueError(f"weight_floor: expected a finite number >= 0, received {weight_floor}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected 0 <= share < 1, received {label_smoothing}")
        self.num_classes = num_classes
        w_ce = 50 / num_classes if w_ce is None else w_ce
        self.weights_by_term = _by_term({"w_ce": w_ce, "w_fd": w_fd, "w_md": w_md, "w_ed": w_ed, **other_weights})
        self.adaptive = adaptive
        self.weight_floor = weight_floor
        self.history = history
        self.label_smoothing = label_smoothing
        self.ramp_steps = ramp_steps
        self.embedding_shape = embedding_shape
        self.layers_by_term = {
            term: make(self) for term, make in baseline_losses.LAYERS.items() if self.weights_by_term[term]
        }
        # One row per prediction, oldest first: (true code, predicted code); -1 until the row is filled.
        self.history_h2 = self.add_weight(
            name="history",
            shape=(history, 2),
            dtype="int32",
            initializer=keras.initializers.Constant(-1),
            trainable=False,
        )
        self.step = self.add_weight(name="step", shape=(), dtype="int32", initializer="zeros", trainable=False)

    @property
    def terms(self):
        """Names of the terms that are computed: those of `TERMS` whose weight is not 0."""
        return tuple(term for term, weight in self.weights_by_term.items() if weight)

    def class_recall(self):
        """Recall of every class over the history, float32 (C,): `M[c, c]` of the row-normalised confusion matrix.

        A class that the history has not seen has recall 0.
        """
        true_h, predicted_h = self.history_h2[:, 0], self.history_h2[:, 1]
        seen_hc = ops.cast(true_h[:, None] == ops.arange(self.num_classes)[None, :], "float32")
        hit_h = ops.cast(true_h == predicted_h, "float32")
        return ops.sum(seen_hc * hit_h[:, None], axis=0) / ops.maximum(ops.sum(seen_hc, axis=0), 1)

    def remember(self, labels, logits):
        """Adds a batch, labels int (B,) and logits float (B, C), to the confusion history; the oldest leave it."""
        predicted = ops.argmax(logits, axis=-1)
        batch_b2 = ops.stack([ops.cast(labels, "int32"), ops.cast(predicted, "int32")], axis=1)
        self.history_h2.assign(ops.concatenate([self.history_h2, batch_b2], axis=0)[-self.history :])

    def call(self, labels, logits, embeddings, training=False, consistency=None):
        """The loss of one batch.

        Args:
            labels: int (B,), or votes float (B, C), which are cross-entropy's target; the others take their `majority`.
            logits: float (B, C).
            embeddings: float (B, k, d).
            training: adds the batch to the history before the adaptive map is read.
            consistency: float (B,) of `baseline_losses.MirroredViews`, which ``w_eac`` needs.

        Returns:
            Dict of float32 scalars: ``loss``, the weighted total, and each computed term unweighted.

        Raises:
            ValueError: in eager mode, a label outside its range; or no ``consistency`` for ``w_eac``.
        """
        _check_labels(labels, self.num_classes)
        batch = Batch(labels, majority(labels), logits, embeddings, training, consistency)
        values = {term: TERMS[term](self, batch) for term in self.terms}
        ramp = self._ramp(training)
        total = ops.zeros(())
        for term, value in values.items():
            total = total + self.weights_by_term[term] * (value if term == "ce" else ramp * value)
        return {"loss": total, **values}

    def _ramp(self, training):
        """The factor of the weights of all terms but CE at this step, 0..1."""
        if not self.ramp_steps:
            return 1.0
        share = ops.minimum(ops.cast(self.step, "float32") / self.ramp_steps, 1.0)
        if training:
            self.step.assign(self.step + 1)
        return share

    def get_config(self):
        weights = {f"w_{term}": weight for term, weight in self.weights_by_term.items()}
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            **weights,
            "adaptive": self.adaptive,
            "weight_floor": self.weight_floor,
            "history": self.history,
            "label_smoothing": self.label_smoothing,
            "ramp_steps": self.ramp_steps,
            "embedding_shape": self.embedding_shape,
        }


def _by_term(weights):
    """Term to weight, in the order of `TERMS`; 0 where none is given.

    Args:
        weights: ``w_<term>`` to weight.

    Raises:
        TypeError: a weight of no term.
        ValueError: a weight that is negative or not finite.
    """
    if unknown := set(weights) - {f"w_{term}" for term in TERMS}:
        raise TypeError(f"expected weights w_<term> of {', '.join(TERMS)}, received {', '.join(sorted(unknown))}")
    by_term = {term: weights.get(f"w_{term}", 0.0) for term in TERMS}
    for term, weight in by_term.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"w_{term}: expected a finite weight >= 0, received {weight}")
    return by_term
