"""The moments of weights and of text that weigh a truncation, and what it makes of them."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining

import fnl_hf
from fnl_hf.bert import moments
from fnl_hf.bert.head_mixing import HeadMoments, activation_moments, regularize_moments, truncate_product
from tests.bert.conversions import outputs, random_weights

HEADS, HEAD_SIZE = 3, 14


@pytest.fixture
def bert(dimensions):
    return random_weights(BertForPreTraining(BertConfig(**dimensions)))


def test_mixing_matrices_minimize_the_weighted_error():
    """Against the SVD of the whitened product, and the optimum's property that no other pair is better."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(2, 11, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mixed_left, mixed_right, sigma = truncate_product(left.mT @ left, right.mT @ right, 3)
    p, expected, qh = np.linalg.svd((left @ right.mT).numpy(), full_matrices=False)
    best = p[..., :3] * expected[:, None, :3] @ qh[:, :3]
    np.testing.assert_allclose(left @ mixed_left @ (right @ mixed_right).mT, best, atol=1e-10)
    np.testing.assert_allclose(sigma, expected[:, :5], atol=1e-10)
    balanced = (left @ mixed_left).square().sum(dim=1), (right @ mixed_right).square().sum(dim=1)
    torch.testing.assert_close(*balanced)


def test_a_product_of_smaller_rank_loses_nothing():
    """Also where moments are singular: a head that is pruned, a direction that no text uses."""
    left = torch.zeros(2, 5, 5, dtype=torch.float64)
    left[0, :2, :2] = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    mixed_left, mixed_right, sigma = truncate_product(left, torch.eye(5, dtype=torch.float64).expand(2, -1, -1), 3)
    product = mixed_left @ mixed_right.mT
    assert torch.isfinite(product).all() and not product[1].any()
    torch.testing.assert_close(product[0, :2, :2], torch.eye(2, dtype=torch.float64))
    assert sigma[0, 2:].abs().max() < 1e-8


def test_activation_moments_are_those_of_the_heads(bert, batch, monkeypatch):
    """Against loops over the tokens that are there, in float64, with autograd's derivatives of one function of the
    outputs in the place of random directions."""
    bert, mask = bert.double(), batch["attention_mask"].bool()
    projected = []
    monkeypatch.setattr(moments, "_project", lambda result, *_: projected.pop(0)(result))
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, None))]
    projected += [lambda result, half=half: projection(result, half["attention_mask"]) for half in halves]
    bert.set_attn_implementation("flex_attention")  # which has no backward pass here
    found = activation_moments(bert.train(), halves)["bert.encoder.layer.1.attention"]
    assert bert.training and bert.config._attn_implementation == "flex_attention"
    bert.set_attn_implementation("eager")
    attention, seen = bert.eval().bert.encoder.layer[1].attention, {}
    for name, layer in (("q", attention.self.query), ("o", attention.output.dense)):
        layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0], output)}))
    result = projection(bert(**batch), mask)
    by_q, by_o = torch.autograd.grad(result, [seen["q"][1], seen["o"][1]])
    q, by_q, contexts = (part.detach().view(5, 11, HEADS, HEAD_SIZE) for part in (seen["q"][1], by_q, seen["o"][0]))
    by_c = (by_o @ attention.output.dense.weight).detach().view(5, 11, HEADS, HEAD_SIZE)
    head, sums, kept = 2, torch.zeros(3, 14, 14).double(), []
    for row, at in mask.nonzero().tolist():
        for part, values in zip(sums, (q, by_q, by_c)):
            part += torch.outer(values[row, at, head], values[row, at, head]) / mask.sum()
        kept.append(contexts[row, at, head])
    close = {"rtol": 1e-3, "atol": 1e-6}
    for name, expected in zip(("query", "key", "output"), sums):
        torch.testing.assert_close(getattr(found, name)[head], expected, **close)
    torch.testing.assert_close(found.context_mean[head], torch.stack(kept).mean(dim=0), **close)
    torch.testing.assert_close(found.value[head], torch.cov(torch.stack(kept).T, correction=0), **close)
    assert found.tokens == mask.sum()


def projection(result, mask):
    return result.prediction_logits.square()[mask.bool()].mean(dim=-1).sum()


def test_calibration_is_better_on_what_it_saw(bert, batch):
    wanted = outputs(bert, batch)[0][batch["attention_mask"].bool()]
    errors = []
    for calibration in (None, [batch]):
        small = fnl_hf.FnlBertForPreTraining.from_bert(bert, 21, calibration)
        errors.append((outputs(small, batch)[0][batch["attention_mask"].bool()] - wanted).square().mean())
    assert errors[1] < 0.5 * errors[0]


# ---- little text ----


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_little_text_leaves_no_direction_without_gradient(bert, caplog, tokens):
    ids = torch.arange(5, 5 + tokens)[None] if tokens < 20 else torch.arange(5, 25).view(2, 10)
    small, lost = fnl_hf.FnlBertForPreTraining.from_bert(bert, 39, [{"input_ids": ids}], output_truncations=True)
    assert (f"has {tokens} tokens, fewer than the 14 dimensions of a head" in caplog.text) == (tokens < 14)
    assert all(product.lost > 1e-4 * product.kept for product in lost)
    inputs = torch.arange(5, 50).view(3, 15)
    small(inputs).prediction_logits.square().sum().backward()
    for layer in small.bert.encoder.layer:
        heads = layer.attention.self
        for weight in (heads.query.weight, heads.key.weight, heads.value.weight, layer.attention.output.dense.weight.T):
            rows = weight.detach().norm(dim=1)
            assert rows.min() > 1e-2 * rows.max()
        for name in ("query", "key", "value"):
            gradients = getattr(heads, name).weight.grad.norm(dim=1)
            assert gradients.min() > 1e-4 * gradients.max() > 0


def test_moments_of_a_text_keep_a_share_of_those_of_the_weights():
    """r = 2 and N = 6: a quarter, at the size of the measured ones; at one size of its own where nothing varies."""
    diagonal = [[[6.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    seen, zeros = torch.tensor(diagonal, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    known = torch.tensor([[[1.0, 0.5], [0.5, 2.0]], [[3.0, 0.0], [0.0, 5.0]]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64).expand(2, -1, -1)
    measured = HeadMoments(seen, eye, eye, eye, zeros, tokens=6)
    mixed = regularize_moments(measured, HeadMoments(known, eye, 3 * eye, 7 * eye, zeros))
    expected = [[[4.5 + 0.25 * 2, 0.25], [0.25, 0.25 * 4]], [[0.75, 0.0], [0.0, 1.25]]]
    torch.testing.assert_close(mixed.query, torch.tensor(expected, dtype=torch.float64))
    for part in (mixed.key, mixed.value, mixed.output):
        torch.testing.assert_close(part, eye)


def test_every_module_keeps_its_mode(bert, batch):
    bert.train()
    bert.bert.encoder.layer[1].eval()
    before = [module.training for module in bert.modules()]
    activation_moments(bert, [batch])
    assert [module.training for module in bert.modules()] == before and len(set(before)) == 2
