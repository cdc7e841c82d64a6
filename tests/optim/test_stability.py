"""Decoupled decay multiplies a direction of a factor by 1 − ηλσ²: above 2 it grows, and that is said once."""

import copy
import math
import pickle

import pytest
import torch

from fnl_hf import FrobeniusAdamW, FrobeniusLamb, FrobeniusSGD
from fnl_hf.optim import stability
from tests.optim.test_frobenius import set_zero_gradients

LR = 0.1
OPTIMIZERS = pytest.mark.parametrize(
    "make",
    [
        FrobeniusAdamW,
        lambda groups, **kwargs: FrobeniusSGD(groups, decoupled=True, **kwargs),
        FrobeniusLamb,
    ],
    ids=["adamw", "sgd", "lamb"],
)


def orthogonal(rows, columns, singular_values, seed):
    """A matrix (rows, columns), columns <= rows, with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]
    turn = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))[0]
    return torch.nn.Parameter(basis * torch.tensor(singular_values, dtype=torch.float64) @ turn)


def group_of(*factors, kind="uv", decay=1.0, num_heads=1, **entries):
    set_zero_gradients(factors)
    return {"params": [*factors], "product": kind, "frobenius_decay": decay, "num_heads": num_heads, **entries}


def pair(largest, **entries):
    """A product whose largest σ² is that of the right factor; ηλ is 0.1."""
    left, right = orthogonal(7, 3, [1.0, 0.5, 0.1], 0), orthogonal(5, 3, [math.sqrt(largest), 0.7, 0.2], 1)
    return group_of(left, right, **entries)


def warnings_of(caplog):
    return [record.message for record in caplog.records if "decay" in record.message]


@OPTIMIZERS
@pytest.mark.parametrize("largest, is_unstable", [(19.8, False), (20.2, True), (1e12, True)])
def test_a_growing_product_is_named_once(make, largest, is_unstable, caplog):
    optimizer = make([pair(0.3, name="small"), pair(largest, name="large")], lr=LR, weight_decay=0.0)
    for _ in range(3):
        optimizer.step()
    found = warnings_of(caplog)
    assert len(found) == is_unstable
    if is_unstable:
        assert "parameter group 'large', product 0 (uv)" in found[0]
        assert f"{0.1 * largest:.3g}" in found[0] and "2" in found[0], "ηλσ² and its bound"
        assert "lr (0.1)" in found[0] and "frobenius_decay (1.0)" in found[0]


def test_sigma_is_exact_where_the_norm_of_the_gram_matrix_is_not(caplog):
    """Three directions of σ² 15: the norm of VᵀV is 26, and the largest eigenvalue 15."""
    left, right = orthogonal(7, 3, [1.0, 1.0, 1.0], 0), orthogonal(5, 3, [math.sqrt(15)] * 3, 1)
    FrobeniusAdamW([group_of(left, right)], lr=LR).step()
    assert warnings_of(caplog) == []


def test_heads_are_told_apart(caplog):
    """Query and key of two heads: each is stable, both together as one product would not be."""
    shapes = [torch.zeros(6, 9, dtype=torch.float64) for _ in range(2)]
    for factor in shapes:
        for head in range(2):
            factor[3 * head, head] = math.sqrt(15)  # (rank, outer) of one direction each
    stable = [torch.nn.Parameter(factor.clone()) for factor in shapes]
    FrobeniusAdamW([group_of(*stable, kind="qk", num_heads=2)], lr=LR).step()
    assert warnings_of(caplog) == []
    unstable = [torch.nn.Parameter(factor * 1.3) for factor in shapes]
    FrobeniusAdamW([group_of(*unstable, kind="qk", num_heads=2)], lr=LR).step()
    assert len(warnings_of(caplog)) == 1


STABLE, GROWING = [(1, 1, 1), (2, 1, 2)], [(5, 1, 1), (1, 5, 1), (1, 1, 5), (2.5, 1, 2.5)]


@pytest.mark.parametrize("scales, growing", [(s, False) for s in STABLE] + [(s, True) for s in GROWING])
def test_each_factor_of_three(scales, growing, caplog):
    """U, M, V with the largest singular values u, m, v: their steps multiply by 1 − ηλ(mv)², 1 − ηλ(uv)², 1 − ηλ(um)².

    0.1·25 is above 2 and 0.1·16 is not; (2.5, 1, 2.5) makes the middle one grow, by (6.25)²."""
    u, m, v = scales
    left, middle, right = torch.zeros(7, 3), torch.zeros(3, 2), torch.zeros(2, 5)
    left[0, 0], middle[0, 0], right[0, 0] = u, m, v
    factors = [torch.nn.Parameter(f.double()) for f in (left, middle, right)]
    FrobeniusAdamW([group_of(*factors, kind="deep")], lr=LR).step()
    assert len(warnings_of(caplog)) == growing


def test_what_does_not_move_does_not_grow(caplog):
    """The left factor, which would, is frozen; the right one's partner is small."""
    group = pair(1e3)
    group["params"][0].requires_grad_(False)
    FrobeniusAdamW([group], lr=LR).step()
    assert warnings_of(caplog) == []


def test_decay_in_the_gradient_is_not_this_ones_to_judge(caplog):
    """Momentum decides there, and LAMB's trust ratio."""
    FrobeniusSGD([pair(1e3)], lr=LR).step()
    FrobeniusLamb([pair(1e3)], lr=LR, decay="in_trust_ratio").step()
    assert warnings_of(caplog) == []


def test_instability_that_comes_later_is_found(caplog):
    """A rate that grows, as in warm-up."""
    optimizer = FrobeniusAdamW([pair(25.0)], lr=0.0)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.01 * step
        optimizer.step()
        assert bool(warnings_of(caplog)) == (step >= 9) or step > 9  # the decay itself shrinks σ² a little


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_weights_that_are_not_finite_end_no_step(spoilt, caplog):
    group = pair(1.0)
    group["params"][1].data[0, 0] = spoilt
    FrobeniusAdamW([group], lr=LR).step()
    assert len(warnings_of(caplog)) == math.isinf(spoilt)


def test_the_host_is_asked_in_the_first_step_and_every_hundredth_away_from_the_cpu():
    check = stability.StabilityCheck()
    due = []
    for step in range(250):
        due += [step] if check.is_due(torch.device("cuda")) else []
        assert check.is_due(torch.device("cpu"))
        check.end_step([])
    assert due == [0, 100, 200]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_checks_for_itself(copied, caplog):
    group = pair(1e3)
    twin = copied(FrobeniusAdamW([group], lr=LR))
    set_zero_gradients(twin.param_groups[0]["params"])
    twin.step()
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_rate_in_a_tensor_and_a_skipped_step(found, caplog):
    group = pair(1e3)
    group["params"] = [torch.nn.Parameter(p.detach().float()) for p in group["params"]]
    optimizer = FrobeniusAdamW([group_of(*group["params"])], lr=torch.tensor(LR), fused=True)
    optimizer.found_inf = torch.tensor(found)
    optimizer.step()
    assert len(warnings_of(caplog)) == (found == 0.0)


@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_factor_that_is_lost_beside_one_that_is_too_large(spoilt, caplog):
    """LAPACK refuses Gram matrices of this size that are not finite."""
    factors = [orthogonal(41, 37, [30.0] * 37, seed) for seed in (0, 1)]
    factors[spoilt].data[0, 0] = math.nan
    FrobeniusAdamW([group_of(*factors)], lr=LR).step()
    assert warnings_of(caplog) == []
