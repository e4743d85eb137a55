"""Draws ``loss_terms.png`` beside this file: the effect of each term of the Ad-Corre loss on embeddings.

``python docs/figures/loss_terms.py``: free embeddings start as correlated as those of an untrained network and follow
the gradient of one term of `custom_loss`, or of their sum. No network and no cross-entropy; TensorFlow, one seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is docs/figures

import runtime

SEED = 0
NUM_CLASSES, PER_CLASS, NUM_EMBEDDINGS, EMBEDDING_SIZE = 7, 8, 7, 64
LABELS = np.repeat(np.arange(NUM_CLASSES), PER_CLASS)
STEPS, LEARNING_RATE = 300, 0.03
# Scale of the part that all faces share; a face's own part has deviation 1. So rho = s^2 / (1 + s^2) = 0.86 at the
# start; untrained mini_xcp and xcp gave 0.93 and 0.83 on FER-2013.
SHARED = 2.5

TERMS = ("FD", "MD", "ED")
OBJECTIVES = {"FD alone": ("FD",), "MD alone": ("MD",), "ED alone": ("ED",), "FD + MD + ED": TERMS}
# Okabe and Ito's colours; the line styles distinguish the curves without colour.
STYLES = dict(zip(OBJECTIVES, (("#0072b2", "-"), ("#e69f00", "--"), ("#009e73", ":"), ("#000000", "-.")), strict=True))
VIEWS = {
    "FD": f"{len(LABELS)} faces\nembedding 1, by class",
    "MD": f"{NUM_CLASSES} class means\nembedding 1",
    "ED": f"{NUM_EMBEDDINGS} embeddings\nof face 1",
}
# With balanced classes and k = C the three terms have the same range, (C - 2) / C to 2 (C - 1) / C (docs/loss.md).
BOUNDS = {"minimum 5/7": (NUM_CLASSES - 2) / NUM_CLASSES, "maximum 12/7": 2 * (NUM_CLASSES - 1) / NUM_CLASSES}
UNCORRELATED = {"FD": 1 - 1 / len(LABELS), "MD": 1 - 1 / NUM_CLASSES, "ED": 1 - 1 / NUM_EMBEDDINGS}
TITLES = {"FD": "Feature Discriminator", "MD": "Mean Discriminator", "ED": "Embedding Discriminator"}


def first_embeddings() -> np.ndarray:
    """Float32 (B, k, d): a part that all faces share, one per embedding index, plus each face's own part."""
    rng = np.random.default_rng(SEED)
    shared = rng.normal(size=(1, NUM_EMBEDDINGS, EMBEDDING_SIZE))
    own = rng.normal(size=(len(LABELS), NUM_EMBEDDINGS, EMBEDDING_SIZE))
    return (SHARED * shared + own).astype(np.float32)


def optimise(terms: tuple[str, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Minimises the sum of the named terms by gradient descent.

    Returns:
        The embeddings after the last step, float32 (B, k, d), and every term's value before each step and
        after the last, (STEPS + 1,).
    """
    import keras
    import tensorflow as tf

    import custom_loss
    from cnn_model import UnitVectors

    functions = {
        "FD": lambda e_bkd: custom_loss.feature_discriminator(e_bkd, LABELS),
        "MD": lambda e_bkd: custom_loss.mean_discriminator(e_bkd, LABELS, NUM_CLASSES),
        "ED": custom_loss.embedding_discriminator,
    }
    free = keras.Variable(first_embeddings())
    unit_vectors = UnitVectors()  # as in the network's head
    optimizer = keras.optimizers.Adam(LEARNING_RATE)
    optimizer.build([free])

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            embeddings = unit_vectors(free)
            values = {term: function(embeddings) for term, function in functions.items()}
            objective = sum(values[term] for term in terms)
        optimizer.apply([tape.gradient(objective, free.value)], [free])
        return values

    history = [step() for _ in range(STEPS)]
    embeddings = unit_vectors(free)
    history.append({term: function(embeddings) for term, function in functions.items()})
    return np.asarray(embeddings), {term: np.array([float(row[term]) for row in history]) for term in TERMS}


def correlations(e_bkd: np.ndarray) -> dict[str, np.ndarray]:
    """The matrix that each term uses: faces (B, B) and class means (C, C) of one embedding, and (k, k) of one face."""
    mean_cd = np.eye(NUM_CLASSES)[LABELS].T @ e_bkd[:, 0] / PER_CLASS
    return {"FD": np.corrcoef(e_bkd[:, 0]), "MD": np.corrcoef(mean_cd), "ED": np.corrcoef(e_bkd[0])}


def draw_matrices(figure, columns) -> None:
    """Draws the matrices: one column per objective, one row per term.

    Args:
        figure: the (sub)figure to draw into.
        columns: title to (embeddings (B, k, d), {term: value}, terms that were minimised).
    """
    panels = figure.subplots(len(TERMS), len(columns))
    for column, (title, (embeddings, values, minimised)) in enumerate(columns.items()):
        panels[0, column].set_title(title, fontweight="bold", pad=9)
        for axes, (term, corr) in zip(panels[:, column], correlations(embeddings).items(), strict=True):
            image = axes.imshow(corr, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{term} = {values[term]:.3f}", fontweight="bold" if term in minimised else "normal")
            axes.spines[:].set(linewidth=2.4 if term in minimised else 0.6, color="black")
    for axes, term in zip(panels[:, 0], TERMS, strict=True):
        axes.set_ylabel(VIEWS[term])
    bar = figure.colorbar(image, ax=panels, shrink=0.5, aspect=30, pad=0.015, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.set_label("Pearson's correlation")
    bar.outline.set_visible(False)


def draw_curves(figure, histories) -> None:
    """Draws one panel per term: its value under every objective, with its bounds.

    Args:
        figure: the (sub)figure to draw into.
        histories: objective to {term: (STEPS + 1,)}.
    """
    panels = figure.subplots(1, len(TERMS), sharey=True)
    for axes, term in zip(panels, TERMS, strict=True):
        for name, level in {**BOUNDS, "uncorrelated": UNCORRELATED[term]}.items():
            axes.axhline(level, color="#8c8c8c", linewidth=0.8, linestyle=":" if name == "uncorrelated" else "-")
            side, offset = ("top", -3) if name.startswith("minimum") else ("bottom", 3)
            axes.annotate(
                name, (STEPS, level), (0, offset), textcoords="offset points", ha="right", va=side, color="#595959"
            )
        for name, history in histories.items():
            color, line = STYLES[name]
            axes.plot(history[term], color=color, linestyle=line, linewidth=1.8, label=name)
        axes.set(title=f"{TITLES[term]} ({term})", xlabel="Step", xlim=(0, STEPS), ylim=(0.55, 1.88))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("Value of the term")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, handlelength=3)


def main() -> None:
    runtime.choose_backend("tensorflow")
    runtime.set_up(seed=SEED, gpu=False)
    runs = {name: optimise(terms) for name, terms in OBJECTIVES.items()}
    histories = {name: history for name, (_, history) in runs.items()}
    start = {term: values[0] for term, values in histories["FD alone"].items()}
    columns = {"Start": (first_embeddings(), start, ())}
    for name, (embeddings, history) in runs.items():
        columns[name] = (embeddings, {term: values[-1] for term, values in history.items()}, OBJECTIVES[name])
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9}):
        figure = Figure(figsize=(10, 9), layout="constrained")
        FigureCanvasAgg(figure)
        top, bottom = figure.subfigures(2, 1, height_ratios=(2.75, 1))
        draw_matrices(top, columns)
        draw_curves(bottom, histories)
        path = Path(__file__).with_suffix(".png")
        figure.savefig(path, dpi=180, metadata={"Software": None})
    for name, (_, values, _) in columns.items():
        print(f"{name:13}", *(f"{term} {value:.4f}" for term, value in values.items()))
    print(path)


if __name__ == "__main__":
    main()
