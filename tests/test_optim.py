"""FrobeniusAdamW against torch's AdamW and a float64 reference written from the formula."""

import copy
import io
import pickle

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from fnl_hf import FnlBertConfig, FnlBertForMaskedLM, FrobeniusAdamW, frobenius_param_groups

FUSED = pytest.mark.parametrize("fused", [False, True])


def small_model(dimensions, **kwargs):
    return FnlBertForMaskedLM(FnlBertConfig(**dimensions, attention_embedding_size=6, **kwargs))


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def pair_group(kind="qk", heads=3, dtype=torch.float32, scale=1.0):
    """Two pairs of three heads of rank 2: sizes 5 and 7."""
    shapes = {"qk": [(6, 5), (6, 7)], "vo": [(6, 5), (7, 6)]}[kind] * 2
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(scale * torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]
    return {"params": params, "product": kind, "num_heads": heads}


def reference_decay(left, right, kind, heads, step):
    """One head at a time, dense, in float64: the gradient of ½‖U Vᵀ‖²_F by autograd."""
    factors = []
    for weight, transposed in ((left, True), (right, kind == "qk")):
        weight = weight.detach().double()
        factors.append(weight.T if transposed else weight)
    new = [f.clone() for f in factors]
    rank = factors[0].shape[1] // heads
    for h in range(heads):
        columns = slice(h * rank, (h + 1) * rank)
        u, v = (f[:, columns].clone().requires_grad_() for f in factors)
        gradients = torch.autograd.grad(0.5 * (u @ v.T).square().sum(), (u, v))
        for target, gradient in zip(new, gradients):
            target[:, columns] -= step * gradient
    return new[0].T, new[1].T if kind == "qk" else new[1]


@FUSED
def test_without_decay_it_is_adamw_to_the_last_bit(dimensions, fused):
    model = small_model(dimensions)
    other = copy.deepcopy(model)
    ours = FrobeniusAdamW(frobenius_param_groups(model, 0.1, 0.0), lr=1e-2, fused=fused)
    groups = frobenius_param_groups(other, 0.1, 0.0)
    theirs = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups], lr=1e-2, fused=fused
    )
    for step in range(5):
        set_gradients(model.parameters(), step)
        set_gradients(other.parameters(), step)
        ours.step()
        theirs.step()
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name


@FUSED
@pytest.mark.parametrize("kind", ["qk", "vo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_equals_the_formula(kind, dtype, fused):
    """With zero gradients and a fresh state AdamW leaves the factors alone, so one step is the decay alone."""
    group = pair_group(kind, dtype=dtype)
    expected = [
        value
        for left, right in (group["params"][:2], group["params"][2:])
        for value in reference_decay(left, right, kind, 3, step=0.1 * 0.05)
    ]
    optimizer = FrobeniusAdamW([group], lr=0.1, frobenius_decay=0.05, weight_decay=0.0, fused=fused)
    for parameter in group["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, value in zip(group["params"], expected):
        error = (parameter.double() - value).norm() / value.norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-14)


def test_decay_comes_before_adamw_and_adds_to_nothing_else():
    group = pair_group(dtype=torch.float64)
    twin = copy.deepcopy(group)
    optimizer = FrobeniusAdamW([group], lr=0.1, frobenius_decay=0.05, weight_decay=0.0)
    for left, right in (twin["params"][:2], twin["params"][2:]):
        for parameter, value in zip((left, right), reference_decay(left, right, "qk", 3, 0.005)):
            parameter.data.copy_(value)
    adamw = torch.optim.AdamW(twin["params"], lr=0.1, weight_decay=0.0)
    set_gradients(group["params"], 0)
    set_gradients(twin["params"], 0)
    optimizer.step()
    adamw.step()
    for a, b in zip(group["params"], twin["params"]):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_a_frozen_partner_counts_and_stays_and_an_idle_pair_is_left_alone():
    group = pair_group()
    frozen, moving, *idle = group["params"]
    frozen.requires_grad_(False)
    before = [p.detach().clone() for p in group["params"]]
    expected = reference_decay(frozen, moving, "qk", 3, 0.05)[1]
    optimizer = FrobeniusAdamW([group], lr=1.0, frobenius_decay=0.05, weight_decay=0.0)
    moving.grad = torch.zeros_like(moving)
    optimizer.step()
    assert torch.equal(frozen, before[0])
    torch.testing.assert_close(moving.double(), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, b) for p, b in zip(idle, before[2:]))


def test_closure_is_evaluated_before_the_decay_and_hooks_run_once():
    group = pair_group()
    optimizer = FrobeniusAdamW([group], lr=0.1, frobenius_decay=0.5)
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])  # makes torch wrap AdamW.step with hooks too
    start = [p.detach().clone() for p in group["params"]]
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append(all(torch.equal(a, b) for a, b in zip(group["params"], start)))
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in group["params"])
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(sum(p.square().sum().item() for p in start), rel=1e-6)
    assert calls == ["pre", True, "post"]


def test_an_overflow_skips_the_decay_too():
    group = pair_group()
    start = [p.detach().clone() for p in group["params"]]
    optimizer = FrobeniusAdamW([group], lr=0.1, frobenius_decay=0.5, fused=True)
    set_gradients(group["params"], 0)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())  # as torch.amp.GradScaler sets them
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(group["params"], start))


def test_state_dict_round_trip_through_disk_and_pickle(dimensions):
    model = small_model(dimensions)
    optimizer = FrobeniusAdamW(frobenius_param_groups(model, 0.1, 0.3), lr=1e-2, fused=True)
    set_gradients(model.parameters(), 0)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    resumed = FrobeniusAdamW(frobenius_param_groups(twin, 0.7, 0.9), lr=0.5)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(3):
        for m, o in ((model, optimizer), (twin, resumed)):
            set_gradients(m.parameters(), step)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    again = pickle.loads(pickle.dumps(optimizer))
    again.add_param_group(pair_group())
    assert again.param_groups[-1]["frobenius_decay"] == 0.0, "the default of the constructor"


def test_groups_hold_every_parameter_once_and_by_kind(dimensions):
    model = small_model(dimensions)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["name"]: [names[id(p)] for p in g["params"]] for g in frobenius_param_groups(model, 0.1, 0.3)}
    layer = "bert.encoder.layer.{}.attention."
    assert groups["qk"] == [layer.format(i) + f"self.{n}.weight" for i in (0, 1) for n in ("query", "key")]
    assert groups["vo"] == [layer.format(i) + n for i in (0, 1) for n in ("self.value.weight", "output.dense.weight")]
    assert groups["decay"] == [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
        "bert.encoder.layer.0.output.dense.weight",
        "bert.encoder.layer.1.intermediate.dense.weight",
        "bert.encoder.layer.1.output.dense.weight",
        "cls.predictions.transform.dense.weight",
    ]
    assert all(name.endswith("bias") or "LayerNorm" in name for name in groups["plain"])
    assert sorted(sum(groups.values(), [])) == sorted(names.values())


@pytest.mark.parametrize("mode, frobenius, weight", [("frobenius", 0.3, 0.0), ("weight", 0.0, 0.3), ("none", 0.0, 0.0)])
def test_decay_mode_changes_the_pairs_alone(dimensions, mode, frobenius, weight):
    groups = {g["name"]: g for g in frobenius_param_groups(small_model(dimensions), 0.1, 0.3, mode)}
    for kind in ("qk", "vo"):
        assert (groups[kind]["frobenius_decay"], groups[kind]["weight_decay"]) == (frobenius, weight)
        assert (groups[kind]["product"], groups[kind]["num_heads"]) == (kind, 3)
    assert groups["decay"]["weight_decay"] == 0.1 and groups["plain"]["weight_decay"] == 0.0


def test_the_decay_of_pairs_defaults_to_the_weight_decay_and_stock_bert_has_pairs_too(dimensions):
    groups = {g["name"]: g for g in frobenius_param_groups(BertForMaskedLM(BertConfig(**dimensions)), 0.07)}
    assert groups["qk"]["frobenius_decay"] == groups["decay"]["weight_decay"] == 0.07
    assert len(groups["qk"]["params"]) == len(groups["vo"]["params"]) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frobenius_decay": -0.1}, r"frobenius_decay \(-0.1\) must be finite and >= 0"),
        ({"frobenius_decay": float("nan")}, r"frobenius_decay \(nan\)"),
        ({"product": "qq"}, r"product must be one of \['deep', .*'vo'\] or None, got 'qq'"),
        ({"product": None, "frobenius_decay": 0.1}, "needs products of parameters"),
        ({"num_heads": 4}, r"\(6, 5\) and \(6, 7\) must share one size, a multiple of num_heads \(4\)"),
        ({"product": "vo"}, r"\(6, 5\) and \(6, 7\) must share one size"),
        ({"params": pair_group()["params"][:3]}, "multiple of 2 parameters, got 3: a factor is missing"),
        ({"params": pair_group(dtype=torch.bfloat16)["params"]}, "torch.bfloat16: .*float32"),
        ({"params": pair_group(dtype=torch.float16)["params"]}, "torch.float16: .*float32"),
    ],
)
def test_bad_groups_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FrobeniusAdamW([pair_group() | change])


def test_bad_arguments_of_the_groups_are_refused(dimensions):
    model = small_model(dimensions)
    with pytest.raises(ValueError, match=r"weight_decay \(-1\) must be finite"):
        frobenius_param_groups(model, -1)
    with pytest.raises(ValueError, match="decay_mode must be one of .* got 'nuclear'"):
        frobenius_param_groups(model, decay_mode="nuclear")
    with pytest.raises(ValueError, match="no trainable parameters"):
        frobenius_param_groups(model.requires_grad_(False))
