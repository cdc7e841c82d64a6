#!/usr/bin/env python
"""The README's picture: a head as two products, and where each decay leaves their singular values.

    .venv/bin/python docs/head_diagram.py docs/_static/head.svg

The bars on the right are computed. For targets σ, gradient descent on ½‖UVᵀ - T‖² ends at σ/(1 + λ) under Frobenius
decay and at max(σ - λ, 0) under weight decay of the factors; tests/optim/test_decay_behavior.py runs both.
"""

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

TARGET = (3.0, 2.2, 1.6, 1.1, 0.8, 0.5, 0.3)
DECAY = 0.6  # λ, large enough to be seen
COLORS = {"Q": "#0072b2", "K": "#56b4e9", "V": "#d55e00", "O": "#e69f00"}  # Okabe and Ito
TALL, THIN = 1.5, 0.42  # of a factor, d x r


def draw_factor(axes, x, y, name, is_transposed):
    """A factor as a rectangle with its center at (x, y)."""
    width, height = (TALL, THIN) if is_transposed else (THIN, TALL)
    box = Rectangle((x - width / 2, y - height / 2), width, height, facecolor=COLORS[name], edgecolor="none")
    axes.add_patch(box)
    label = f"${name}_h^\\top$" if is_transposed else f"${name}_h$"
    axes.text(x, y, label, ha="center", va="center", color="white" if name in "QV" else "black", fontsize=11)


def draw_product(axes, x, names, role):
    """A pair of factors with their size and what their product does in the head."""
    draw_factor(axes, x, 1.6, names[0], False)
    draw_factor(axes, x + 1.12, 1.6 + (TALL - THIN) / 2, names[1], True)
    axes.text(x - 0.3, 1.6, "$d$", ha="right", va="center", color="0.35", fontsize=10)
    axes.text(x, 1.6 - TALL / 2 - 0.08, "$r = E/H$", ha="center", va="top", color="0.35", fontsize=9)
    axes.text(x + 0.36, 1.34, role, ha="left", va="center", fontsize=9, linespacing=1.4)


def draw_head(axes):
    axes.set_title("An attention head is two products of rank $r$", loc="left", fontsize=11)
    draw_product(axes, 0.6, "QK", "$d \\times d$ bilinear form:\nwhich tokens attend\nto which")
    draw_product(axes, 3.5, "VO", "$d \\times d$ linear map:\nwhat they take\nfrom them")
    formula = "head$(x)$ = softmax$(x\\,Q_hK_h^\\top x^\\top/\\sqrt{r})\\;x\\,V_hO_h^\\top$"
    axes.text(0.22, 0.1, formula, va="center", fontsize=12)
    axes.set(xlim=(0.1, 6), ylim=(-0.3, 2.5), aspect="equal")
    axes.axis("off")


def draw_decays(axes):
    axes.set_title(
        f"Where decay leaves the singular values of a product ($\\lambda$ = {DECAY})", loc="left", fontsize=11
    )
    curves = {
        "without decay": ("0.75", TARGET),
        "Frobenius decay, $\\lambda\\|UV^\\top\\|_F^2/2$: as in a dense layer": (
            "#0072b2",
            [value / (1 + DECAY) for value in TARGET],
        ),
        "weight decay, $\\lambda(\\|U\\|_F^2+\\|V\\|_F^2)/2$: rank is lost": (
            "#d55e00",
            [max(value - DECAY, 0) for value in TARGET],
        ),
    }
    for place, (label, (color, values)) in enumerate(curves.items()):
        positions = [index + (place - 1) * 0.27 for index in range(len(values))]
        axes.bar(positions, values, width=0.25, color=color, label=label)
    axes.set(xticks=range(len(TARGET)), xticklabels=range(1, len(TARGET) + 1), xlabel="singular value of $UV^\\top$")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def main(path):
    # Paths, not fonts, and no date: the file looks and reads the same everywhere.
    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "fnl_hf"}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 3.4), layout="constrained", gridspec_kw={"width_ratios": (6, 5)}
        )
        draw_head(left)
        draw_decays(right)
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None, dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1])
