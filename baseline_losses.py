"""The losses that Ad-Corre is compared with: supervised contrastive, triplet, center, erasing-attention consistency.

The first three see a face as one vector: its k unit vectors concatenated and scaled by 1/sqrt(k), which makes the
length 1 again. The last one compares a face with its mirror image. Keras has none of them, and TensorFlow Addons, which
had a triplet loss, is discontinued.

Shape letters: B batch, k embeddings per face, d numbers per embedding, C classes; n stands for k * d. Of feature maps
h and w are the sides, f or F the channels. A suffix names a tensor's axes: `x_bn`, `distance_bb`.
"""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from files import UserError

# A negative counts as farther than a positive only by more than this, in squared length: the distances of two equal
# vectors differ by rounding, which must not choose between negatives.
TIE = 1e-5
# Used instead of -inf, because -inf minus -inf is NaN in a batch of one.
NEVER = -1e9
_EPSILON = 1e-12  # as in `cnn_model.UnitVectors`
_HEAD = ("pool", "embedding_dense", "logits")  # the layers of `cnn_model.build_model` that a map needs


def full_precision(x):
    """float32 whatever the precision policy (a sum of products over d needs it); float64 stays."""
    x = ops.convert_to_tensor(x)
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")


def face_embeddings(embeddings, labels):
    """The embeddings in `full_precision`; refuses (ValueError) other shapes than (B, k, d) and labels (B,).

    Labels (B, 1), the form of Keras's own losses, would be broadcast to other values, in silence.
    """
    for name, array, shape in (("embeddings", embeddings, "B k d"), ("labels", labels, "B")):
        if len(np.shape(array)) != len(shape.split()):
            raise ValueError(f"{name}: expected the axes {shape}, received the shape {tuple(np.shape(array))}")
    return full_precision(embeddings)


def _face_vectors(embeddings, labels):
    """(B, k, d) to (B, k * d) of length 1, in `full_precision`."""
    x = face_embeddings(embeddings, labels)
    k, d = x.shape[1], x.shape[2]
    return ops.reshape(x, (-1, k * d)) * (1 / math.sqrt(k))


def _same_class(labels):
    """Boolean (B, B): equal labels, the diagonal included."""
    labels = ops.convert_to_tensor(labels)
    return labels[:, None] == labels[None, :]


def _itself(x_bn):
    """Boolean (B, B): the diagonal."""
    return ops.cast(ops.eye(ops.shape(x_bn)[0]), "bool")


def _mean_where(chosen, x):
    """Mean of ``x`` over the places where ``chosen`` is true; 0 where none is."""
    chosen = ops.cast(chosen, x.dtype)
    return ops.sum(chosen * x) / ops.maximum(ops.sum(chosen), 1)


def supervised_contrastive(embeddings, labels, temperature=0.1):
    """Supervised contrastive loss: a face is distinguished from the rest of the batch as one of its class.

    `L = mean_i -1/|P(i)| * sum_{p in P(i)} log(exp(x_i.x_p / t) / sum_{a != i} exp(x_i.x_a / t))`, with `P(i)` the
    other faces of the class of i. Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020 (arXiv 2004.11362),
    equation 2, `L_out`, as a mean in place of the sum over i, and without the factor `t / t_base` of their code.

    Args:
        embeddings: float (B, k, d), the k vectors of a face each of length 1, as the network's head gives them.
        labels: int (B,).
        temperature: t > 0. The loss ranges over about 2 / t; the paper's and our default is 0.1.

    Returns:
        Scalar >= 0, float32 (float64 for float64 embeddings). A face that is alone in its class leaves the mean and is
        a negative for the others; 0 without a pair of one class. If all faces of a batch are equal it is `log(B - 1)`.

    Raises:
        UserError: a temperature that is not above 0.
    """
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature: expected a finite number above 0, received {temperature}")
    x_bn = _face_vectors(embeddings, labels)
    itself_bb = _itself(x_bn)
    positive_bb = ops.cast(_same_class(labels) & ~itself_bb, x_bn.dtype)
    logits_bb = ops.where(itself_bb, NEVER, ops.matmul(x_bn, ops.transpose(x_bn)) / temperature)
    count_b = ops.sum(positive_bb, axis=1)
    log_p_bb = ops.log_softmax(logits_bb, axis=1)
    loss_b = -ops.sum(positive_bb * log_p_bb, axis=1) / ops.maximum(count_b, 1)
    return _mean_where(count_b > 0, loss_b)


def triplet_semihard(embeddings, labels, margin=0.2):
    """Triplet loss with semi-hard negatives: a class's faces lie nearer to each other than to the others, by a margin.

    `L = mean_{(a, p)} max(0, D_ap - D_an + margin)` over the ordered pairs `a != p` of one class, with the squared
    distance `D_ij = |x_i - x_j|^2`, 0..4. The negative n of a pair is the nearest face of another class that is
    farther from a than p is (by more than `TIE`); where none is farther, the farthest.
    Schroff et al., "FaceNet", CVPR 2015 (arXiv 1503.03832): the farther negatives are their equation 4; to fall back
    on the farthest is the rule of the losses in TensorFlow Contrib and Addons.

    The choice of the negatives compares B^3 distances. TensorFlow without XLA holds the answers in memory, 5 B^3 bytes:
    10 MB for B = 128, 0.7 GB for B = 512. XLA, and so JAX, need not. No gradient passes through the choice, so nothing
    of that size is kept for the backward pass.

    Args:
        embeddings: float (B, k, d), the k vectors of a face each of length 1, as the network's head gives them.
        labels: int (B,).
        margin: >= 0, in squared length; 0.2 is the paper's.

    Returns:
        Scalar >= 0, float32 (float64 for float64 embeddings); 0 without a triplet: one face, one class only, or no two
        faces of one class. If all faces of a batch are equal it is the margin.

    Raises:
        UserError: a margin below 0.
    """
    if not 0 <= margin < float("inf"):
        raise UserError(f"margin: expected a finite number >= 0, received {margin}")
    x_bn = _face_vectors(embeddings, labels)
    square_b = ops.sum(x_bn * x_bn, axis=1)
    # From the inner products: the differences themselves would be (B, B, n). No root, so no guard is needed.
    distance_bb = square_b[:, None] + square_b[None, :] - 2 * ops.matmul(x_bn, ops.transpose(x_bn))
    same_bb = _same_class(labels)
    chosen_bb = _choose_negatives(ops.stop_gradient(distance_bb), ~same_bb)
    negative_distance_bb = ops.take_along_axis(distance_bb, chosen_bb, axis=1)
    loss_bb = ops.maximum(distance_bb - negative_distance_bb + margin, 0)
    # An anchor without a negative has no triplet: the index chosen for it means nothing.
    triplet_bb = same_bb & ~_itself(x_bn) & ops.any(~same_bb, axis=1, keepdims=True)
    return _mean_where(triplet_bb, loss_bb)


def _choose_negatives(distance_bb, negative_bb):
    """Index (B, B) of the negative of an anchor (row) and a positive (column): the nearest farther, or the farthest."""
    by_distance_bb = ops.where(negative_bb, distance_bb, float("inf"))
    order_bb = ops.argsort(by_distance_bb, axis=1)
    # The negatives that are not farther come first in that order; their number is the place of the first that is.
    not_farther_bbb = by_distance_bb[:, None, :] <= distance_bb[:, :, None] + TIE  # (anchor, positive, negative)
    place_bb = ops.sum(ops.cast(not_farther_bbb, "int32"), axis=2)
    last_b1 = ops.sum(ops.cast(negative_bb, "int32"), axis=1, keepdims=True) - 1
    place_bb = ops.maximum(ops.minimum(place_bb, last_b1), 0)  # an anchor without a negative has no last one
    return ops.take_along_axis(order_bb, place_bb, axis=1)


class CenterLoss(keras.layers.Layer):
    """Center loss: a face lies near the center of its class, and the centers follow the faces.

    `L = 1/2 * mean_i |x_i - c_{y_i}|^2`; after each training batch
    `c_j -= alpha * sum_{y_i = j} (c_j - x_i) / (1 + n_j)`, with `n_j` the batch's faces of class j.
    Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016, equations 2 and 4;
    a mean in place of their sum over the batch.

    A layer, so that Keras saves the centers, resumes them and carries them through JAX's stateless steps.

    Args:
        num_classes: C.
        num_embeddings: k.
        embedding_size: d.
        alpha: the centers' rate, 0..1; 0.5 is the paper's. 0 leaves the centers where they are.
    """

    def __init__(self, num_classes, num_embeddings, embedding_size, alpha=0.5, name="center_loss"):
        # Without autocast, which would round float64 embeddings: `_face_vectors` sets the precision.
        super().__init__(name=name, dtype="float32", autocast=False)
        sizes = {"num_classes": num_classes, "num_embeddings": num_embeddings, "embedding_size": embedding_size}
        for option, size in sizes.items():
            if size < 1:
                raise UserError(f"{option}: expected 1 or more, received {size}")
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha: expected 0 <= rate <= 1, received {alpha}")
        self.num_classes = num_classes
        self.num_embeddings = num_embeddings
        self.embedding_size = embedding_size
        self.alpha = alpha
        self.centers = self.add_weight(  # (C, n)
            name="centers",
            shape=(num_classes, num_embeddings * embedding_size),
            dtype="float32",
            initializer="zeros",
            trainable=False,
        )

    def call(self, labels, embeddings, training=False):
        """The loss of one batch.

        Args:
            labels: int (B,), 0 <= label < C.
            embeddings: float (B, k, d), the k vectors of a face each of length 1.
            training: moves the centers, after the loss is computed. No gradient flows into them, or through the move.

        Returns:
            Scalar >= 0, float32 (float64 for float64 embeddings). A class absent from the batch keeps its center;
            before the first batch every center is 0 and the loss 1/2.
        """
        x_bn = _face_vectors(embeddings, labels)
        member_bc = ops.one_hot(labels, self.num_classes, dtype=x_bn.dtype)
        centers_cn = ops.stop_gradient(ops.cast(self.centers, x_bn.dtype))
        offset_bn = x_bn - ops.matmul(member_bc, centers_cn)
        if training:
            self._move_centers(ops.stop_gradient(offset_bn), member_bc)
        return ops.mean(ops.sum(offset_bn * offset_bn, axis=1)) / 2

    def _move_centers(self, offset_bn, member_bc):
        """The paper's 1 in the denominator damps a class of few faces, and saves an absent one from 0 / 0."""
        count_c = ops.sum(member_bc, axis=0)
        pull_cn = ops.matmul(ops.transpose(member_bc), offset_bn) / (1 + count_c)[:, None]
        self.centers.assign(self.centers + self.alpha * ops.cast(pull_cn, "float32"))

    def get_config(self):
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "num_embeddings": self.num_embeddings,
            "embedding_size": self.embedding_size,
            "alpha": self.alpha,
        }


def attention_maps(features, kernel, bias, classifier):
    """Class activation maps of the k-vector head: what each position of the feature map adds to each class's logit.

    `CAM_c(x) = sum_l v_cl . (W_l A(x) + b_l) / |z_l|`, `z_l = mean_x (W_l A(x) + b_l)`, with A the last feature map.
    Its mean over the positions x is the logit of class c without the classifier's bias, as it is of the first class
    activation maps (Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, equation 2),
    whose classifier follows the pooling directly.

    Without the division the map would not be a part of the logit, which does not change when the features are scaled:
    a network could make its maps alike by small features, at no cost in cross-entropy. For the same reason the
    gradient passes through `|z_l|`.

    Args:
        features: float (B, h, w, F), the input of the global average pooling.
        kernel: float (F, k, d), W_l of the embedding layer.
        bias: float (k, d), its b_l.
        classifier: float (k, d, C), v_cl, times the logit scale. Dropout is left out: two masks would differ by chance.

    Returns:
        float32 (B, h, w, C), float64 for float64 features. A vector z_l of zeros adds nothing.
    """
    a_bhwf = full_precision(features)
    w_fkd, b_kd, v_kdc = (ops.cast(x, a_bhwf.dtype) for x in (kernel, bias, classifier))
    z_bkd = ops.einsum("bf,fkd->bkd", ops.mean(a_bhwf, axis=(1, 2)), w_fkd) + b_kd
    # The guard is inside the root: outside, a zero vector would give NaN gradients.
    inverse_bk = ops.rsqrt(ops.maximum(ops.sum(z_bkd * z_bkd, axis=-1), _EPSILON))
    # The product of the two layers first: it is small, and the feature map then passes through one product only.
    slope_bfc = ops.einsum("bk,kfc->bfc", inverse_bk, ops.einsum("fkd,kdc->kfc", w_fkd, v_kdc))
    constant_bc = ops.einsum("bk,kc->bc", inverse_bk, ops.einsum("kd,kdc->kc", b_kd, v_kdc))
    return ops.einsum("bhwf,bfc->bhwc", a_bhwf, slope_bfc) + constant_bc[:, None, None, :]


def attention_consistency(maps, maps_of_mirrored):
    """The mean squared difference of each image's maps and the mirrored maps of its mirror image.

    `L_i = 1/(C h w) * sum_{c, x} (CAM_c(x; image i) - flip(CAM_c(.; flip(image i)))(x))^2`; the loss of a batch is the
    mean over its images. Zhang, Wang, Ling and Deng, "Learn From All: Erasing Attention Consistency for Noisy Label
    Facial Expression Recognition", ECCV 2022 (arXiv 2207.10299).

    Args:
        maps: float (B, h, w, C) of the images.
        maps_of_mirrored: float (B, h, w, C) of their mirror images, left and right exchanged.

    Returns:
        float (B,) >= 0.
    """
    difference_bhwc = maps - ops.flip(maps_of_mirrored, axis=2)
    return ops.mean(difference_bhwc * difference_bhwc, axis=(1, 2, 3))


class MirroredViews(keras.layers.Layer):
    """Runs a network on images and on their mirror images; its outputs with the `attention_consistency` of the two.

    As in the paper's code, the two are two passes, so each normalises with its own batch's statistics and moves the
    moving ones; the weights inside a map (of the embedding layer and the classifier) get no gradient, so that the
    features must become alike; and the logits are those of the first images only.

    Args:
        network: of `cnn_model.build_model`. Its variables stay its own.

    Raises:
        UserError: a network without this head.
    """

    def __init__(self, network, name="mirrored_views"):
        # Without autocast: the maps are computed in float32 whatever the precision policy of the network.
        super().__init__(name=name, dtype="float32", autocast=False)
        names = {layer.name for layer in getattr(network, "layers", ())}
        if missing := [layer for layer in _HEAD if layer not in names]:
            raise UserError(
                f"--w-eac: expected a network with the layers {', '.join(_HEAD)} (cnn_model.build_model), found none "
                f"named {', '.join(missing)}"
            )
        features = network.get_layer("pool").input
        both = keras.Model(network.input, {**network.output, "features": features})
        half = keras.Model(network.input, features)  # the second view needs no logits
        # In closures: as attributes they would be tracked as this layer's own.
        self._both = lambda pixels, training: both(pixels, training=training)
        self._features = lambda pixels, training: half(pixels, training=training)
        self._head = lambda: _head_of(network)
        self.built = True

    def call(self, pixels, training=False):
        """Float (B, H, W, C) to the network's outputs and ``consistency``, float32 (B,)."""
        outputs = dict(self._both(pixels, training))
        head = [ops.stop_gradient(x) for x in self._head()]
        maps = attention_maps(outputs.pop("features"), *head)
        maps_of_mirrored = attention_maps(self._features(ops.flip(pixels, axis=2), training), *head)
        return {**outputs, "consistency": attention_consistency(maps, maps_of_mirrored)}


def _head_of(network):
    """The arrays of `attention_maps` after the features."""
    names = {layer.name for layer in network.layers}
    dense, logits = network.get_layer("embedding_dense"), network.get_layer("logits")
    k, d = network.output["embeddings"].shape[1:]
    scale = network.get_layer("logit_scale").scale if "logit_scale" in names else 1.0
    kernel, bias, classifier = (ops.convert_to_tensor(x) for x in (dense.kernel, dense.bias, logits.kernel))
    return (
        ops.reshape(kernel, (-1, k, d)),
        ops.reshape(bias, (k, d)),
        scale * ops.reshape(classifier, (k, d, -1)),
    )


def _consistency_term(loss, batch):
    if batch.consistency is None:
        raise ValueError("consistency: expected float (B,) of MirroredViews for the weight w_eac, received None")
    return ops.mean(batch.consistency)


def _make_center_loss(loss):
    if loss.embedding_shape is None:
        raise ValueError("embedding_shape: expected (k, d) for the center loss, received None")
    return CenterLoss(loss.num_classes, *loss.embedding_shape)


def _center_term(loss, batch):
    return loss.layers_by_term["center"](batch.labels, batch.embeddings, training=batch.training)


# Term to its unweighted value, a function of a `custom_loss.AdCorreLoss` and a `custom_loss.Batch`.
TERMS = {
    "center": _center_term,
    "supcon": lambda loss, batch: supervised_contrastive(batch.embeddings, batch.labels),
    "triplet": lambda loss, batch: triplet_semihard(batch.embeddings, batch.labels),
    "eac": _consistency_term,
}
# Term to a function of an `AdCorreLoss` that makes the layer with the term's state.
LAYERS = {"center": _make_center_loss}
