"""Counts the variables that each loss term trains: NumPy inside the gradient tape against ``keras.ops``.

``python docs/gradient_check.py`` builds an Xception with the embedding head, computes Feature, Mean and
Embedding Discriminator in both ways on one batch, and counts the variables that their gradients reach.
`docs/loss.md` discusses the output. TensorFlow only: the mistake needs an eager tape to go unnoticed.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, Python looks in docs/ only

import runtime

NUM_CLASSES = 7
IMAGES_PER_CLASS = 2
INPUT_SIZE = 71  # the smallest that Xception takes
TOLERANCE = 1e-5


def numpy_feature_discriminator(embeddings, labels) -> float:
    """FD of an eager tensor (B, k, d), unweighted; the diagonal of ``|Omega - rho|`` is 0."""
    corr_kbb = np.array([np.corrcoef(e_bd) for e_bd in embeddings.numpy().transpose(1, 0, 2)])
    omega_bb = np.where(labels[:, None] == labels[None, :], 1, -1)
    return np.mean(np.abs(omega_bb - corr_kbb))


def numpy_mean_discriminator(embeddings, labels) -> float:
    """MD of an eager tensor (B, k, d); every class must be in the batch."""
    mean_ckd = [np.average(embeddings.numpy(), axis=0, weights=labels == code) for code in range(NUM_CLASSES)]
    corr_kcc = np.array([np.corrcoef(mean_cd) for mean_cd in np.array(mean_ckd).transpose(1, 0, 2)])
    return np.mean((1 - np.eye(NUM_CLASSES)) * (1 + corr_kcc))


def numpy_embedding_discriminator(embeddings) -> float:
    """ED of an eager tensor (B, k, d)."""
    corr_bkk = np.array([np.corrcoef(e_kd) for e_kd in embeddings.numpy()])
    return np.mean((1 - np.eye(embeddings.shape[1])) * (1 + corr_bkk))


def is_reached(gradient) -> bool:
    """Whether a variable's gradient is there, finite and not all zero."""
    return gradient is not None and bool(np.isfinite(gradient).all()) and bool(np.any(gradient))


def relative_distance(gradients, others) -> float:
    """``|g - h| / |h|`` of two lists of gradients, each read as one long vector."""
    distance = sum(np.sum(np.square(np.subtract(g, h))) for g, h in zip(gradients, others, strict=True))
    return float(np.sqrt(distance / sum(np.sum(np.square(h)) for h in others)))


def main() -> None:
    runtime.choose_backend("tensorflow")
    runtime.set_up(seed=0, gpu=False)
    import keras
    import tensorflow as tf

    import cnn_model
    import custom_loss

    network = cnn_model.build_model("xcp", num_classes=NUM_CLASSES, input_size=INPUT_SIZE)
    variables = [variable.value for variable in network.trainable_variables]
    labels = np.repeat(np.arange(NUM_CLASSES), IMAGES_PER_CLASS)
    images = np.random.default_rng(0).uniform(0, 255, (len(labels), INPUT_SIZE, INPUT_SIZE, 3)).astype(np.float32)

    with tf.GradientTape(persistent=True) as tape:
        outputs = network(images, training=True)
        e_bkd = outputs["embeddings"]
        cross_entropy = custom_loss.cross_entropy(labels, outputs["logits"])
        in_numpy = {
            "CE": cross_entropy,
            "FD": tf.constant(numpy_feature_discriminator(e_bkd, labels), tf.float32),
            "MD": tf.constant(numpy_mean_discriminator(e_bkd, labels), tf.float32),
            "ED": tf.constant(numpy_embedding_discriminator(e_bkd), tf.float32),
        }
        ours = {
            "CE": cross_entropy,
            "FD": custom_loss.feature_discriminator(e_bkd, labels),
            "MD": custom_loss.mean_discriminator(e_bkd, labels, NUM_CLASSES),
            "ED": custom_loss.embedding_discriminator(e_bkd),
        }
        only_ce = 50 / NUM_CLASSES * cross_entropy
        totals = [only_ce + terms["FD"] + terms["MD"] + terms["ED"] for terms in (in_numpy, ours)]

    print(f"Python {platform.python_version()}, TensorFlow {tf.__version__}, Keras {keras.__version__}, ", end="")
    print(f"NumPy {np.__version__}")
    print(f"Xception, {INPUT_SIZE} px, untrained; {len(labels)} images; {len(variables)} trainable variables\n")
    print(f"{'':6}{'value':^22}{'variables reached by the gradient':>36}")
    print(f"{'term':6}{'NumPy':>11}{'keras.ops':>11}{'NumPy in the tape':>19}{'keras.ops':>17}")
    for term in ours:
        difference = abs(float(in_numpy[term]) - float(ours[term]))
        assert difference < TOLERANCE, f"{term}: the two values differ by {difference}"
        reached = [sum(map(is_reached, tape.gradient(terms[term], variables))) for terms in (in_numpy, ours)]
        values = f"{float(in_numpy[term]):11.6f}{float(ours[term]):11.6f}"
        print(f"{term:6}{values}{reached[0]:12} of {len(variables)}{reached[1]:10} of {len(variables)}")

    ce_gradient = tape.gradient(only_ce, variables)
    distances = [relative_distance(tape.gradient(total, variables), ce_gradient) for total in totals]
    print("\nGradient of 50/C CE + FD + MD + ED against that of 50/C CE alone, |g - g_CE| / |g_CE|:")
    print(f"{'NumPy in the tape':20}{distances[0]:.6f}\n{'keras.ops':20}{distances[1]:.6f}")


if __name__ == "__main__":
    main()
