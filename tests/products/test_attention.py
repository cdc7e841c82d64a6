"""Attention of many architectures: what is found, its decay, and that the models' outputs know of nothing else."""

import copy
from collections import Counter

import pytest
import torch

from fnl_hf import (
    FactorizationConfig,
    FrobeniusAdamW,
    diagnose_products,
    factorize,
    find_products,
    frobenius_param_groups,
)
from fnl_hf.bert.factorization import RANK_DIMS, head_rows
from fnl_hf.products.discovery import discover
from fnl_hf.products.views import ViewProduct, pair_rows
from fnl_hf.reports.callbacks import logged_diagnostics
from tests.products.architectures import ARCHITECTURES, BERT, GPT2, GROUPED, model_of, of_transformers

EACH = pytest.mark.parametrize("name", ARCHITECTURES)


def decay_errors(name):
    """{parameter: error of its decay relative to autograd's gradient of the penalty}; all other weights must stay."""
    model = model_of(name)
    sum(attention.penalty() for attention in ARCHITECTURES[name].attentions(model)).backward()
    expected = {each: parameter.grad for each, parameter in model.named_parameters()}
    before = {each: parameter.detach().clone() for each, parameter in model.named_parameters()}
    optimizer = FrobeniusAdamW(frobenius_param_groups(model, 0.0, frobenius_decay=0.0625), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    errors = {}
    for each, parameter in model.named_parameters():
        moved = (before[each] - parameter.detach()) / 0.0625
        if expected[each] is None:
            assert not moved.any(), each
        else:
            errors[each] = ((moved - expected[each]).norm() / expected[each].norm()).item()
    return errors


@EACH
def test_each_factor_is_decayed_by_the_gradient_of_the_dense_penalty(name):
    model = model_of(name)
    assert Counter(product.kind for product in find_products(model)) == ARCHITECTURES[name].found
    errors = decay_errors(name)
    assert errors and max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("name", ["roberta", "gpt2", "gpt_neox", "llama", "cohere", "gpt_bigcode"])
def test_diagnostics_know_the_norms_of_the_penalty(name):
    """Of products whose factors are parts of parameters, of shared keys, of the mean over rotations."""
    model = model_of(name)
    products = find_products(model)
    found = diagnose_products(products)
    total = sum(attention.penalty().item() for attention in ARCHITECTURES[name].attentions(model))
    assert sum(values["frobenius"].item() ** 2 / 2 for values in found.values()) == pytest.approx(total, rel=1e-5)
    for product in products:
        u, v = product.factors()
        dense = u @ v.mT
        assert found[product.name]["frobenius"].item() == pytest.approx(dense.norm().item(), rel=1e-5)
        nuclear = torch.linalg.matrix_norm(dense, "nuc").sum().item()
        assert found[product.name]["nuclear"].item() == pytest.approx(nuclear, rel=1e-5)
        assert nuclear <= found[product.name]["bound"].item() * (1 + 1e-6)
    logged = logged_diagnostics(model.float(), 0.1)
    assert {key.split("/")[1] for key in logged} == set(ARCHITECTURES[name].found)


def rows_of(product):
    """Both factors as views (G, J, r, n) of their parameters."""
    weights = [weight.detach() for weight in product.weights]
    if isinstance(product, ViewProduct):
        return [view.rows(weight) for view, weight in zip(product.pair, weights)]
    dims = RANK_DIMS[product.kind]
    return [head_rows(weight, product.num_heads, dim).unsqueeze(1) for weight, dim in zip(weights, dims)]


def change(product, is_compensated):
    """Other factors of the same product: A F and A⁻ᵀ F', of rows that rotate together a turn and a scale."""
    left, right = rows_of(product)
    generator = torch.Generator().manual_seed(1)
    groups, _, rank, _ = left.shape
    if isinstance(product, ViewProduct) and product.pair.pairing:
        angle = torch.rand(groups, 1, 1, rank // 2, generator=generator, dtype=torch.float64)
        cos, sin, scale = angle.cos(), angle.sin(), 1 + angle
        for rows, factor in ((left, scale), (right, 1 / scale)):
            pairs = pair_rows(rows.mT, product.pair.pairing)  # (G, J, n, r/2, 2)
            first, second = pairs.clone().unbind(-1)
            pairs[..., 0].copy_(factor * (cos * first - sin * second))
            pairs[..., 1].copy_(factor * (sin * first + cos * second))
            if not is_compensated:
                return
        return
    matrix = torch.eye(rank, dtype=torch.float64) + 0.3 * torch.randn(
        groups, 1, rank, rank, generator=generator, dtype=torch.float64
    )
    left.copy_(matrix @ left)
    if is_compensated:
        right.copy_(torch.linalg.inv(matrix).mT @ right)


@torch.no_grad()
def assert_outputs_know_the_products_alone(model, run, kinds):
    """A wrong place of one head or one pair of rows would show."""
    output = run(model)
    for kind in kinds:
        for is_compensated in (True, False):
            other = copy.deepcopy(model)
            for product in find_products(other):
                if product.kind == kind:
                    change(product, is_compensated)
            difference = ((run(other) - output).norm() / output.norm()).item()
            # Some rotate in float32, whatever the model's dtype is.
            assert difference < 1e-5 if is_compensated else difference > 1e-3, (kind, is_compensated, difference)


@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if each.run])
def test_the_models_own_outputs_know_the_products_alone(name):
    assert_outputs_know_the_products_alone(model_of(name), ARCHITECTURES[name].run, ARCHITECTURES[name].found)


@pytest.mark.parametrize(
    "folder, name, sizes, unknown",
    [
        ("xlnet", "XLNet", {"vocab_size": 31, "d_model": 12, "n_layer": 1, "n_head": 3, "d_inner": 7}, True),
        ("codegen", "CodeGen", GPT2 | {"n_embd": 24, "n_head": 4, "rotary_dim": 2}, True),  # q, v, k in four parts
        ("diffllama", "DiffLlama", GROUPED, True),  # values of two heads are one
        ("roformer", "RoFormer", BERT | {"hidden_size": 18, "embedding_size": 5}, False),  # how it rotates
    ],
)
def test_attention_that_is_not_understood_is_named_and_keeps_its_decay(folder, name, sizes, unknown):
    model = of_transformers(folder, name, **sizes)()
    (found,) = discover(model)[1]
    assert found.startswith(name)
    assert {product.kind for product in find_products(model)} == (set() if unknown else {"vo"})


def test_a_weight_that_is_a_product_itself_takes_no_part():
    """Factorized queries, as ``factorize`` makes them of a pattern: no product of attention, and nothing to warn of."""
    model = model_of("vit")
    factorize(model, FactorizationConfig(include=["q_proj", "o_proj"]))
    assert {product.kind for product in find_products(model)} == {"linear"}
    assert discover(model)[1] == []


if __name__ == "__main__":
    for name in ARCHITECTURES:
        kinds = ", ".join(f"{count} {kind}" for kind, count in ARCHITECTURES[name].found.items())
        print(f"{name:<34}{kinds:<24}{max(decay_errors(name).values()):.1e}")
