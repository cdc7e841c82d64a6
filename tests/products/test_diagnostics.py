"""Diagnostics of products against dense matrices in float64, and their plot."""

import numpy as np
import pytest
import torch
from torch import nn

from fnl_hf import FnlBertConfig, FnlBertModel, diagnose_products, find_products, product_norms, register_product
from fnl_hf.products.diagnostics import non_orthogonality
from fnl_hf.reports.history import logged_products
from fnl_hf.reports.plots import plot_report, plt


@pytest.fixture
def model(dimensions):
    """Attention pairs, a Linear pair and a triple, with weights far from their initialization."""
    model = nn.Module()
    model.bert = FnlBertModel(FnlBertConfig(**dimensions, attention_embedding_size=6))
    model.up, model.middle, model.down = nn.Linear(2, 7), nn.Linear(3, 2), nn.Linear(5, 3)
    model.left, model.right = nn.Parameter(torch.empty(5, 3)), nn.Parameter(torch.empty(11, 3))
    register_product(model, "deep", "up.weight", "middle.weight", "down.weight", name="triple")
    register_product(model, "uv", "left", "right", name="pair")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def dense(product):
    """The block-diagonal matrix of a product's heads, in float64."""
    first, *middle, last = (factor.double() for factor in product.factors())
    for factor in middle:
        first = first @ factor
    return torch.block_diag(*(first @ last.mT))


def test_diagnostics_equal_those_of_the_dense_products(model):
    products = find_products(model)
    assert [p.name for p in products][-2:] == ["triple", "pair"] and len(products) == 6
    found = diagnose_products(products, lr=0.3)
    for product in products:
        matrix, values = dense(product), found[product.name]
        assert values["frobenius"].item() == pytest.approx(matrix.norm().item(), rel=1e-5)
        assert values["nuclear"].item() == pytest.approx(torch.linalg.matrix_norm(matrix, "nuc").item(), rel=1e-5)
        assert values["effective_step"].item() == pytest.approx(0.3 / matrix.norm().item() ** 2, rel=1e-5)
        assert values["bound"] >= values["nuclear"]
        for name, value in product_norms(*product.factors()).items():
            assert values[name].item() == pytest.approx(value.item(), rel=1e-5)
    u, _, v = (factor.double() for factor in products[-2].factors())
    u = u @ products[-2].factors()[1].double()
    expected = 0.5 * (u.square().sum() + v.square().sum()).item()
    assert found["triple"]["bound"].item() == pytest.approx(expected, rel=1e-6)


def test_non_orthogonality_is_the_rms_cosine_between_columns():
    """Left: columns (1, 0), (1, 1): cosine √½. Right: orthogonal. Four ordered pairs, two of them with cosine² ½."""
    left, right = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 5.0], [0.0, 0.0]]])
    assert non_orthogonality((left, right)).item() == pytest.approx(0.5, rel=1e-6)
    assert non_orthogonality((left[..., :1], right[..., :1])).item() == 0.0, "rank 1 has no pairs"
    assert non_orthogonality((right, torch.zeros_like(right))).item() == 0.0
    parallel = torch.ones(2, 3, 4)
    assert non_orthogonality((parallel, parallel)).item() == pytest.approx(1.0, rel=1e-6)


def test_spectral_initialization_is_orthogonal_and_the_normal_one_is_not(dimensions):
    for init, low, high in (("spectral", 0.0, 1e-5), ("normal", 0.1, 0.5)):
        model = FnlBertModel(FnlBertConfig(**dimensions, attention_embedding_size=15, attention_init=init))
        for values in diagnose_products(model.factor_pairs()).values():
            assert low <= values["non_orthogonality"].item() <= high


def test_report_has_a_panel_for_each_kind_and_diagnostic(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    layers = [f"norms/qk/bert.encoder.layer.{layer}.attention.qk" for layer in range(24)]
    keys = ("frobenius", "nuclear", "bound", "effective_step", "non_orthogonality")
    stems = [*layers, "norms/deep/triple"]
    history = [{"step": step} | {f"{s}/{key}": 1.0 + step for s in stems for key in keys} for step in (0, 5)]
    history += [{"step": 5, "loss": 3.0, "grad_norm": 2.0, "learning_rate": 0.1, "tokens_per_second": 7e5},
                {"step": 5, "eval_loss": 2.0}, {"step": 7, "loss": 9.0, "spikes": 1, "skipped_steps": 0}]  # fmt: skip
    found = logged_products(history)
    assert list(found) == ["qk", "deep"] and len(found["qk"]) == 24 and found["deep"] == ["triple"]
    plot_report(history, tmp_path / "all.png", unigram_entropy=2.5)
    plot_report([], tmp_path / "none.png")
    whole, empty = figures
    assert len(whole.axes) == 5 + 2 * 4 and len(empty.axes) == 5  # optimizer and throughput have two axes each
    loss = whole.axes[0]
    curves = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata())) for line in loss.lines}
    assert curves["training"] == [(5, 3.0), (7, 9.0)] and curves["held out"] == [(5, 2.0)]
    assert [step for step, _ in curves["spikes"]] == [7] and "skipped steps" not in curves
    legends = [axes.get_legend() for axes in whole.axes if axes.get_title().endswith("Frobenius norm")]
    layers, triple = ([text.get_text() for text in legend.get_texts()] for legend in legends)
    assert layers == ["layer 0", "layer 4", "layer 8", "layer 12", "layer 16", "layer 20", "layer 23"]
    assert triple == ["triple"]
    assert (tmp_path / "all.png").stat().st_size > 2 * (tmp_path / "none.png").stat().st_size > 5000


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
@pytest.mark.parametrize("factors", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["left", "right", "both"])
def test_weights_that_are_not_finite_spoil_the_figures_of_their_product_alone(model, spoilt, factors):
    """Products of one shape are decomposed together."""
    bad, *others = products = find_products(model)
    expected = diagnose_products(products)
    with torch.no_grad():
        for weight in bad.weights[factors]:
            weight[1] = spoilt
    found, norms = diagnose_products(products), product_norms(*bad.factors())
    for product in others:
        assert found[product.name] == expected[product.name]
    for values in (found[bad.name], norms):
        assert values["frobenius"].isnan() and values["nuclear"].isnan() and not values["bound"].isfinite()
    assert found[bad.name]["effective_step"].isnan() and found[bad.name]["non_orthogonality"].isnan()


def test_inside_autocast_the_figures_are_the_same(model):
    products = find_products(model)
    expected = diagnose_products(products), [product_norms(*p.factors()) for p in products]
    with torch.autocast("cpu", torch.bfloat16):
        found = diagnose_products(products), [product_norms(*p.factors()) for p in products]
    assert found == expected


def drawn_points(axes):
    """What can be seen of an axes' lines: values with a neighbor, and those with a marker."""
    seen = []
    for line in axes.lines:
        values = np.asarray(line.get_ydata(), dtype=float)
        marked = line.get_markevery() if line.get_marker() not in ("None", None) else []
        for i, value in enumerate(values):
            beside = values[max(0, i - 1) : i + 2]
            if (
                np.isfinite(value)
                and len(line.get_xdata()) > 1
                and (np.isfinite(beside).sum() > 1 or i in (marked or []))
            ):
                seen.append((line.get_xdata()[i], value))
    return seen


def test_report_of_a_short_run(tmp_path, monkeypatch):
    """Two logs, one before warm-up with a rate of 0; a loss that is not finite between two that are; zeros."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    stem = "norms/qk/layer.0.attention.qk"
    history = [
        {"step": 0, f"{stem}/effective_step": 0.0, f"{stem}/non_orthogonality": 0.0, f"{stem}/frobenius": 3.0},
        {"step": 5, f"{stem}/effective_step": 0.25, f"{stem}/non_orthogonality": 0.0, f"{stem}/frobenius": 2.0},
    ]
    history += [{"step": 1, "loss": 5.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 4.0},
                {"step": 4, "loss": float("inf")}, {"step": 5, "data_wait": 0.0, "learning_rate": 0.0},
                {"step": 6, "data_wait": 0.0, "learning_rate": 0.0}]  # fmt: skip
    plot_report(history, tmp_path / "short.png", title="run: adamw; decay of the products: frobenius, λ = 0.5")
    plot_report([entry | {f"{stem}/effective_step": 0.0} for entry in history[:2]], tmp_path / "still.png")
    short, still = figures
    panels = {axes.get_title().split(": ")[-1]: axes for axes in short.axes if axes.get_title()}
    assert drawn_points(panels["effective step η/‖W‖²"]) == [(5, 0.25)]
    assert drawn_points(panels["loss (nats)"]) == [(1, 5.0), (3, 4.0)]
    assert short.get_suptitle() == "run: adamw; decay of the products: frobenius, λ = 0.5"
    for axes in short.axes:
        if axes.get_yscale() == "linear":
            bottom, top = axes.get_ylim()
            for _, value in drawn_points(axes):
                assert bottom + 0.01 * (top - bottom) < value < top - 0.01 * (top - bottom), "a line on the frame"
    [panel] = [axes for axes in still.axes if axes.get_title().endswith("effective step η/‖W‖²")]
    assert [text.get_text() for text in panel.texts] == ["the learning rate is 0 in all logged steps"]
