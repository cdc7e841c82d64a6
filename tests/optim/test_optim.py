"""The optimizers with Frobenius decay as optimizers: against their base classes with the decay done by hand."""

import copy
import io
import pickle
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from fnl_hf import (
    FnlBertConfig,
    FnlBertForMaskedLM,
    FrobeniusAdamW,
    FrobeniusLamb,
    FrobeniusSGD,
    Lamb,
    find_products,
    frobenius_param_groups,
    register_product,
)
from tests.optim.test_frobenius import SHAPES, draw_weights, reference_gradients

MOMENTUM = {"momentum": 0.9}
# Our class, its base class, what both are given, what ours alone is given.
CASES = {
    "adamw": (FrobeniusAdamW, torch.optim.AdamW, {"betas": (0.8, 0.95)}, {}),
    "adamw-foreach": (FrobeniusAdamW, torch.optim.AdamW, {"foreach": True, "amsgrad": True}, {}),
    "adamw-fused": (FrobeniusAdamW, torch.optim.AdamW, {"fused": True}, {}),
    "sgd": (FrobeniusSGD, torch.optim.SGD, MOMENTUM, {}),
    "sgd-nesterov": (FrobeniusSGD, torch.optim.SGD, MOMENTUM | {"nesterov": True, "foreach": True}, {}),
    "sgd-fused": (FrobeniusSGD, torch.optim.SGD, MOMENTUM | {"fused": True}, {}),
    "sgd-decoupled": (FrobeniusSGD, torch.optim.SGD, MOMENTUM, {"decoupled": True}),
    "sgd-decoupled-fused": (FrobeniusSGD, torch.optim.SGD, MOMENTUM | {"fused": True}, {"decoupled": True}),
    "lamb": (FrobeniusLamb, Lamb, {"decay": "decoupled"}, {}),
    "lamb-in-ratio": (FrobeniusLamb, Lamb, {"decay": "in_trust_ratio"}, {}),
}
ALL = pytest.mark.parametrize("case", CASES)
BY_HAND = pytest.mark.parametrize("case", [case for case in CASES if case != "lamb-in-ratio"])
COUPLED = ("sgd", "sgd-nesterov", "sgd-fused")
DECAY, LR = 0.3, 0.05


class Net(nn.Module):
    """A registered pair of two products, a triple, and weights that belong to none."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.down, self.up = nn.Linear(5, 6, bias=False), nn.Linear(6, 7)
        self.v, self.m, self.u = (nn.Linear(*size, bias=False) for size in [(7, 3), (3, 2), (2, 5)])
        self.readout = nn.Linear(5, 3)
        register_product(self, "linear", "up.weight", "down.weight", num_heads=2)
        register_product(self, "deep", "u.weight", "m.weight", "v.weight", name="triple")
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.6)
        self.to(dtype)

    def forward(self, x):
        return self.readout(self.u(self.m(self.v(self.up(self.down(x)).tanh()))))


def loss_of(model, seed=0, rows=11):
    x = torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return model(x.to(model.up.weight.dtype)).square().mean()


def make(case, model, decay=DECAY, **kwargs):
    ours, _, shared, own = CASES[case]
    return ours(frobenius_param_groups(model, 0.1, decay), **({"lr": LR} | shared | own | kwargs))


def make_plain(case, model, **kwargs):
    groups = [{n: g[n] for n in ("params", "weight_decay")} for g in frobenius_param_groups(model, 0.1)]
    return CASES[case][1](groups, **({"lr": LR} | CASES[case][2] | kwargs))


def train(model, optimizer, steps=range(2)):
    for seed in steps:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()


def step_by_hand(case, model, plain, decay=DECAY):
    """The decay as the documentation has it, then the plain optimizer's step."""
    for product in find_products(model):
        gradients = reference_gradients(product.weights, product.kind, product.num_heads)
        for weight, gradient in zip(product.weights, gradients):
            if weight.grad is None:
                continue
            if case in COUPLED:
                weight.grad += decay * gradient
            else:
                weight.data -= plain.param_groups[0]["lr"] * decay * gradient
    plain.step()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def assert_close(first, second, rtol=1e-11):
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert (a - b).norm() <= rtol * b.norm(), name


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_decay_it_is_the_base_class_to_the_last_bit(case, dtype):
    model = Net(dtype)
    twin = copy.deepcopy(model)
    train(model, make(case, model, decay=0.0), range(5))
    train(twin, make_plain(case, twin), range(5))
    assert same(model, twin)


UNMOVED = {
    "all": (),
    "one of a pair": ("up.weight",),
    "a product": ("up.weight", "down.weight"),
    "ends of a triple": ("u.weight", "v.weight"),
    "middle": ("m.weight",),
}


@BY_HAND
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("names", UNMOVED.values(), ids=UNMOVED)
def test_steps_equal_the_base_class_with_the_decay_by_hand(case, names, frozen):
    """Factors without a gradient, or frozen ones, stay but count for their partners."""
    model = Net()
    start = [model.get_parameter(name).detach().clone() for name in names]
    twin = copy.deepcopy(model)
    for name in names if frozen else ():
        model.get_parameter(name).requires_grad_(False)
    optimizer, plain = make(case, model), make_plain(case, twin)
    for seed in range(3):
        for m in (model, twin):
            m.zero_grad()
            loss_of(m, seed).backward()
            for name in names:
                m.get_parameter(name).grad = None
        optimizer.step()
        step_by_hand(case, twin, plain)
    assert_close(model, twin)
    assert all(torch.equal(model.get_parameter(name), before) for name, before in zip(names, start))


@BY_HAND
def test_the_decay_follows_the_learning_rate_and_comes_once_an_accumulated_step(case):
    model = Net()
    twin = copy.deepcopy(model)
    optimizer, plain = make(case, model), make_plain(case, twin)
    schedules = [LambdaLR(o, lambda step: 1.0 / (1 + 3 * step)) for o in (optimizer, plain)]
    for seed in range(0, 6, 2):
        for m in (model, twin):
            m.zero_grad()
            for part in (seed, seed + 1):
                (0.5 * loss_of(m, part)).backward()
        optimizer.step()
        step_by_hand(case, twin, plain)
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 10)
    assert_close(model, twin)


@pytest.mark.parametrize("case", ["adamw", "adamw-foreach", "adamw-fused", "sgd", "sgd-fused", "sgd-decoupled"])
def test_decay_shrinks_when_maximizing_too(case):
    """With gradients of zero the decay is the whole step."""
    model = Net()
    optimizer = make(case, model, maximize=True)
    weights = [w for product in find_products(model) for w in product.weights]
    gradients = [g for p in find_products(model) for g in reference_gradients(p.weights, p.kind, p.num_heads)]
    expected = [w.detach() - LR * DECAY * g for w, g in zip(weights, gradients)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for weight, value in zip(weights, expected):
        torch.testing.assert_close(weight.detach(), value, rtol=1e-12, atol=1e-14)


@BY_HAND
def test_factors_may_move_in_memory_between_steps(case):
    """What an optimizer keeps of its factors from step to step must not outlive their memory."""
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    ours, plain = make(case, model), make_plain(case, twin)
    attributes = set(vars(ours))
    for seed in range(3):
        for net in (model, twin):
            net.zero_grad()
            loss_of(net, seed).backward()
        ours.step()
        step_by_hand(case, twin, plain)
        assert_close(model, twin)
        for product in find_products(model):
            left, *others = product.weights
            left.data = left.data.clone()  # as moving a model does; the old memory is gone
            if "fused" not in case:  # torch's fused kernels want parameter and moments laid out alike
                for weight in others:
                    weight.data = weight.data.T.contiguous().T
        assert vars(ours).keys() == attributes, "nothing is held between steps"


@ALL
def test_closure_is_evaluated_before_the_decay_and_hooks_run_once(case):
    model = Net()
    twin = copy.deepcopy(model)
    optimizer, calls = make(case, model), []
    CASES[case][1]([nn.Parameter(torch.ones(2))], lr=LR)  # makes torch wrap the base class's step with hooks too
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        calls.append(same(model, twin))
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == loss_of(twin).item()
    assert calls == ["pre", True, "post"]
    train(twin, make(case, twin), range(1))
    assert same(model, twin)


@pytest.mark.parametrize("case", COUPLED)
def test_coupled_decay_leaves_the_gradients_as_they_were(case, monkeypatch):
    model = Net()
    optimizer = make(case, model)
    loss_of(model).backward()
    factors = [w for product in find_products(model) for w in product.weights]  # torch's kernels may change the others
    before = [(w.grad, w.grad.clone()) for w in factors]

    def as_before():
        return all(w.grad is g and torch.equal(g, value) for w, (g, value) in zip(factors, before))

    optimizer.step()
    assert as_before()

    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(optimizer, "_base_step", fail)
    with suppress(RuntimeError):
        optimizer.step()
    assert as_before()


@ALL
def test_loss_scaling_changes_nothing_and_an_overflow_skips_everything(case):
    """Scaled by 256, a good step equals the unscaled one, the decay included: torch's fused kernels unscale by
    themselves, after the decay was added to the gradient."""
    model = Net(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, unscaled = make(case, model), make(case, twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def scaled_step(seed, factor=1.0):
        optimizer.zero_grad()
        scaler.scale(factor * loss_of(model, seed)).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled_step(0)
    weights, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    scaled_step(1, float("inf"))
    assert scaler.get_scale() == 128.0 and same(model, weights)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][n], v) for i, entries in state.items() for n, v in entries.items() if v is not None)
    scaled_step(2)
    train(twin, unscaled, (0, 2))
    assert_close(model, twin, rtol=2e-6)


@ALL
def test_groups_added_later_are_as_good_as_first_ones(case):
    model = Net()
    twin = copy.deepcopy(model)
    linear, *others = frobenius_param_groups(model, 0.1, DECAY)
    ours, _, shared, own = CASES[case]
    optimizer = ours([linear], lr=LR, **shared, **own)
    for group in others:
        optimizer.add_param_group(group)
    train(model, optimizer)
    train(twin, make(case, twin))
    assert same(model, twin)


def through_disk(model, optimizer, case):
    """A new optimizer, whose own hyperparameters the state replaces."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    model = copy.deepcopy(model)
    resumed = make(case, model, decay=0.9, lr=0.7)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    return model, resumed


COPIES = {
    "disk": through_disk,
    "deepcopy": lambda model, optimizer, case: copy.deepcopy((model, optimizer)),
    "pickle": lambda model, optimizer, case: pickle.loads(pickle.dumps((model, optimizer))),
}


@ALL
@pytest.mark.parametrize("how", COPIES)
def test_a_saved_optimizer_continues_to_the_last_bit(case, how):
    model = Net()
    optimizer = make(case, model)
    train(model, optimizer)
    twin, resumed = COPIES[how](model, optimizer, case)
    assert twin.up.weight is not model.up.weight
    train(model, optimizer, range(2, 5))
    train(twin, resumed, range(2, 5))
    assert same(model, twin)


def new_pair(**entries):
    """A group of one product that no model holds, and its gradients."""
    params = draw_weights(SHAPES["linear"](7, 5, 6, 0))
    for parameter in params:
        parameter.grad = 0.1 * parameter.detach().cos()
    return {"params": params, "product": "linear", "num_heads": 3} | entries


@ALL
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_keeps_the_defaults_of_the_constructor(case, how):
    model = Net()
    optimizer = make(case, model, frobenius_decay=0.2)
    twin, resumed = COPIES[how](model, optimizer, case)
    pairs = []
    for m, o in ((model, optimizer), (twin, resumed)):
        pairs.append(new_pair())
        o.add_param_group(pairs[-1])
        o.add_param_group({"params": draw_weights([(3, 5)])})
        assert [group["frobenius_decay"] for group in o.param_groups[-2:]] == [0.2, 0.0]
        loss_of(m).backward()
        o.step()
    assert same(model, twin)
    assert all(torch.equal(a, b) for a, b in zip(pairs[0]["params"], pairs[1]["params"]))


@BY_HAND
def test_a_state_of_the_base_class_keeps_the_products(case):
    model = Net()
    twin = copy.deepcopy(model)
    plain = make_plain(case, twin)
    train(twin, plain)
    model.load_state_dict(twin.state_dict())
    optimizer = make(case, model, lr=0.7)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch keeps a state's tensors
    train(model, optimizer, range(2, 3))
    twin.zero_grad()
    loss_of(twin, 2).backward()
    step_by_hand(case, twin, plain)
    assert_close(model, twin)


def test_a_groups_own_entry_outlives_a_state_that_has_none():
    group = new_pair(decoupled=True, frobenius_decay=DECAY)
    optimizer = FrobeniusSGD([group], lr=LR)
    optimizer.load_state_dict(torch.optim.SGD(group["params"], lr=0.1).state_dict())
    kept = {name: optimizer.param_groups[0][name] for name in ("decoupled", "product", "num_heads", "frobenius_decay")}
    assert kept == {"decoupled": True, "product": "linear", "num_heads": 3, "frobenius_decay": DECAY}


@ALL
@pytest.mark.parametrize("entry, theirs, ours", [("product", "linear", "uv"), ("num_heads", 3, 2)])
def test_a_state_of_other_products_is_refused_and_changes_nothing(case, entry, theirs, ours):
    """Positions alone tie a state to parameters, and these shapes would fit both."""
    shapes = {"params": draw_weights([(6, 6), (6, 6)])}
    source = CASES[case][0]([new_pair() | shapes], lr=0.1)
    optimizer = CASES[case][0]([new_pair(**{entry: ours}) | shapes | {"name": "pair"}], lr=LR)
    with pytest.raises(ValueError, match=f"parameter group 'pair' .*{ours!r}.*{theirs!r}"):
        optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["lr"] == LR and optimizer.param_groups[0][entry] == ours


@ALL
def test_under_accelerate_it_steps_alike(case):
    from accelerate import Accelerator

    model = Net()
    twin = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, make(case, model))
    for seed in range(2):
        optimizer.zero_grad()
        accelerator.backward(loss_of(prepared, seed))
        optimizer.step()
    train(twin, make(case, twin))
    assert same(model, twin)


class Rows(torch.utils.data.Dataset):
    """Token ids, every token with a label, so that the mean over a step is the mean of its batches' means."""

    def __init__(self):
        self.ids = torch.randint(5, 53, (8, 11), generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index].flip(0)}


def test_under_trainer_it_steps_as_in_a_loop_by_hand(dimensions, tmp_path):
    """Two steps of two batches of two rows."""
    config = FnlBertConfig(**dimensions, attention_embedding_size=6, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    model = FnlBertForMaskedLM(config).double()
    twin, batches = copy.deepcopy(model).train(), []

    def collate(rows):
        batches.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        return batches[-1]

    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, max_grad_norm=0.0,
        lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    optimizers = (FrobeniusAdamW(frobenius_param_groups(model, 0.1, DECAY), lr=LR), None)
    Trainer(model, args, train_dataset=Rows(), data_collator=collate, optimizers=optimizers).train()
    by_hand = torch.optim.AdamW([{"params": g["params"], "weight_decay": g["weight_decay"]}
                                 for g in frobenius_param_groups(twin, 0.1, DECAY)], lr=LR)  # fmt: skip
    for step in range(2):
        by_hand.zero_grad()
        for batch in batches[2 * step : 2 * step + 2]:
            (0.5 * twin(**batch).loss).backward()
        step_by_hand("adamw", twin, by_hand)
    assert_close(model, twin, rtol=1e-9)
