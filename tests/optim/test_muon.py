"""FrobeniusMuon against torch's Muon and AdamW, and against the formulas in float64."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from fnl_hf import FrobeniusMuon, muon_param_groups, register_product
from tests.conftest import needs_muon
from tests.optim.test_frobenius import SHAPES, draw_weights, reference_gradients
from tests.optim.test_optim import same

LR, ADAMW_LR, WEIGHT_DECAY, DECAY = 0.05, 0.003, 0.1, 0.3
READOUT = {"adamw": ["readout.weight"]}
HIDDEN = ("up.weight", "down.weight", "hidden.weight")  # Muon's
pytestmark = needs_muon


class Tagger(nn.Module):
    """An embedding, a product of two heads, a hidden matrix and an output head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 5), nn.LayerNorm(5)
        self.down, self.up = nn.Linear(5, 6, bias=False), nn.Linear(6, 7)
        self.hidden, self.readout = nn.Linear(7, 2), nn.Linear(2, 3)
        register_product(self, "linear", "up.weight", "down.weight", num_heads=2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.6)
        self.to(dtype)

    def forward(self, ids):
        return self.readout(self.hidden(self.up(self.down(self.norm(self.embed(ids)))).tanh()).tanh())


def loss_of(model, seed):
    ids = torch.randint(11, (13,), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(ids), ids % 3)


def train(model, optimizers, steps):
    for seed in steps:
        model.zero_grad()
        loss_of(model, seed).backward()
        for optimizer in optimizers:
            optimizer.step()


def make(model, decay=DECAY, **options):
    groups = muon_param_groups(model, WEIGHT_DECAY, decay, **READOUT)
    return FrobeniusMuon(groups, **{"lr": LR, "adamw_lr": ADAMW_LR} | options)


def torchs(model, decay_of_factors=0.0, **options):
    """torch.optim.Muon and torch.optim.AdamW, with what belongs to each by its name."""
    named = dict(model.named_parameters())
    of_adamw = {name: p for name, p in named.items() if name not in HIDDEN}
    matrices = {name: p for name, p in of_adamw.items() if p.dim() > 1}
    assert set(matrices) == {"embed.weight", "readout.weight"}
    factors = [named["up.weight"], named["down.weight"]]
    options = {"adjust_lr_fn": "match_rms_adamw"} | options
    muon = [{"params": factors, "weight_decay": decay_of_factors}, {"params": [named["hidden.weight"]]}]
    adamw = [
        {"params": list(matrices.values())},
        {"params": [p for name, p in of_adamw.items() if name not in matrices], "weight_decay": 0.0},
    ]
    return (
        torch.optim.Muon(muon, lr=LR, weight_decay=WEIGHT_DECAY, **options),
        torch.optim.AdamW(adamw, lr=ADAMW_LR, weight_decay=WEIGHT_DECAY),
    )


OPTIONS = {
    "default": {},
    "original": {"adjust_lr_fn": "original"},
    "torch's default": {"adjust_lr_fn": None},
    "without Nesterov": {"nesterov": False, "momentum": 0.7},
    "iteration": {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_decay_it_is_torchs_muon_and_adamw_to_the_last_bit(dtype, options):
    model = Tagger(dtype)
    twin, default = copy.deepcopy(model), copy.deepcopy(model)
    train(model, [make(model, decay=0.0, **options)], range(5))
    train(twin, torchs(twin, **options), range(5))
    train(default, [make(default, decay=0.0)], range(5))
    assert same(model, twin)
    assert same(model, default) == (not options)


def test_the_rate_of_adamw_is_that_of_muon_unless_it_has_its_own():
    groups = muon_param_groups(Tagger(), **READOUT)
    assert [group["lr"] for group in FrobeniusMuon(copy.deepcopy(groups), lr=0.25).param_groups] == [0.25] * 4
    groups[3]["lr"] = 0.75
    optimizer = FrobeniusMuon(groups, lr=0.25, adamw_lr=0.5)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("linear", 0.25), ("decay", 0.25), ("decay_adamw", 0.5), ("plain", 0.75),
    ]  # fmt: skip


# ---- the formulas, in float64 ----

BETAS, EPS = (0.9, 0.999), 1e-8
SIZES = {"q": (6, 5), "k": (6, 7), "matrix": (3, 8), "table": (11, 3), "bias": (4,)}


def orthogonalized(matrix):
    """Five iterations X ← aX + (bA + cA²)X, A = XXᵀ, of the matrix over its norm."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    if len(x) > x.shape[1]:
        return orthogonalized(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def gradients_of(step):
    """Of matrices far from singular: torch iterates in bfloat16, which loses what is small."""
    drawn = [w.detach() for w in draw_weights(SIZES.values(), seed=100 + step // 2)]
    factors = (torch.linalg.svd(w, full_matrices=False) for w in drawn[:3])
    return [u @ vt + 0.1 * w for (u, _, vt), w in zip(factors, drawn)] + drawn[3:]


def reference(weights, steps, momentum=0.95, nesterov=True, decay=DECAY, weight_decay=WEIGHT_DECAY):
    """By the formulas: products decayed, Muon on the first three, AdamW on the others. The rate falls."""
    weights = [w.detach().clone() for w in weights]
    buffers = [torch.zeros_like(w) for w in weights]
    squares = [torch.zeros_like(w) for w in weights]
    for t in range(1, steps + 1):
        rate, adamw_rate = LR / t**0.5, ADAMW_LR / t**0.5
        q, k = weights[:2]
        halves = [slice(0, 3), slice(3, 6)]
        change_q = torch.cat([k[r] @ k[r].T @ q[r] for r in halves])
        change_k = torch.cat([q[r] @ q[r].T @ k[r] for r in halves])
        weights[0], weights[1] = q - rate * decay * change_q, k - rate * decay * change_k
        for i, gradient in enumerate(gradients_of(t)):
            if i < 3:
                buffers[i] = momentum * buffers[i] + (1 - momentum) * gradient
                direction = momentum * buffers[i] + (1 - momentum) * gradient if nesterov else buffers[i]
                scale = 0.2 * math.sqrt(max(weights[i].shape))
                kept = 1 - rate * weight_decay if i == 2 else 1.0
                weights[i] = kept * weights[i] - rate * scale * orthogonalized(direction)
                continue
            buffers[i] = BETAS[0] * buffers[i] + (1 - BETAS[0]) * gradient
            squares[i] = BETAS[1] * squares[i] + (1 - BETAS[1]) * gradient**2
            first, second = buffers[i] / (1 - BETAS[0] ** t), squares[i] / (1 - BETAS[1] ** t)
            kept = 1 - adamw_rate * weight_decay if i == 3 else 1.0
            weights[i] = kept * weights[i] - adamw_rate * first / (second.sqrt() + EPS)
    return weights


def test_fifty_steps_follow_the_formulas():
    """Muon's within what bfloat16 leaves of a step, AdamW's exactly; each part of the formula is noticed."""
    params = draw_weights(SIZES.values())
    start = [p.detach().clone() for p in params]
    product = {"params": params[:2], "product": "qk", "num_heads": 2}
    others = [{"params": params[2:3], "use_muon": True}, {"params": params[3:4], "use_muon": False}]
    groups = [product, *others, {"params": params[4:], "weight_decay": 0.0}]
    optimizer = FrobeniusMuon(groups, LR, WEIGHT_DECAY, adamw_lr=ADAMW_LR, frobenius_decay=DECAY)
    schedule = LambdaLR(optimizer, lambda step: (step + 1) ** -0.5)
    for t in range(1, 51):
        for parameter, gradient in zip(params, gradients_of(t)):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    expected = reference(start, 50)
    errors = [((p - e).norm() / (e - s).norm()).item() for p, e, s in zip(params, expected, start)]
    assert max(errors[:3]) < 0.02 and max(errors[3:]) < 1e-11, errors
    for other in ({"momentum": 0.8}, {"nesterov": False}, {"decay": 0.0}, {"weight_decay": 0.0}):
        changed = reference(start, 50, **other)
        effect = max(((c - e).norm() / (e - s).norm()).item() for c, e, s in zip(changed, expected, start))
        assert effect > 0.05, other


# ---- heads, convolutions ----


def set_gradients(params, step):
    for parameter, drawn in zip(params, draw_weights([p.shape for p in params], params[0].dtype, seed=20 + step)):
        parameter.grad = drawn.detach()


# How the blocks of two heads lie in the factors of a product.
BLOCKS = {
    "qk": [lambda q: q.split(3, 0), lambda k: k.split(3, 0)],
    "vo": [lambda v: v.split(3, 0), lambda o: o.split(3, 1)],
    "deep": [lambda u: u.split(3, 1), lambda m: m.split(3, 0), lambda vt: vt.split(2, 0)],
}


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_per_head_is_muon_on_the_blocks_of_each_head(kind, adjust):
    params = draw_weights(SHAPES[kind](5, 7, 6, 2, 2), torch.float32)
    blocks = [b.clone().contiguous() for p, split in zip(params, BLOCKS[kind]) for b in split(p.detach())]
    blocks = [nn.Parameter(block) for block in blocks]
    together = [nn.Parameter(p.detach().clone()) for p in params]
    options = {"lr": LR, "weight_decay": WEIGHT_DECAY, "adjust_lr_fn": adjust}
    group = {"product": kind, "num_heads": 2}
    ours = FrobeniusMuon([group | {"params": params}], per_head=True, **options)
    of_all = FrobeniusMuon([group | {"params": together}], **options)
    of_blocks = torch.optim.Muon(blocks, **options)
    for step in range(3):
        gradients = [g.detach() for g in draw_weights([p.shape for p in params], torch.float32, seed=20 + step)]
        in_blocks = [b for gradient, split in zip(gradients, BLOCKS[kind]) for b in split(gradient)]
        for each, its in ((params, gradients), (together, gradients), (blocks, in_blocks)):
            for parameter, gradient in zip(each, its):
                parameter.grad = gradient.clone().contiguous()
        for optimizer in (ours, of_all, of_blocks):
            optimizer.step()
    found = [b for p, split in zip(params, BLOCKS[kind]) for b in split(p.detach())]
    for block, expected in zip(found, blocks, strict=True):
        torch.testing.assert_close(block, expected.detach(), rtol=1e-6, atol=1e-7)
    assert all((a - b).norm() > 1e-3 * a.norm() for a, b in zip(params, together))


@pytest.mark.parametrize("per_head", [False, True])
def test_a_factor_of_a_convolution_is_the_matrix_that_the_product_has(per_head):
    """Uᵀ (6, 5, 2, 1) as U (10, 6), Vᵀ (6, 7, 1, 3) as (6, 21); of each of two heads as (10, 3) and (3, 21)."""
    params = draw_weights(SHAPES["conv"](5, 7, 6, 0), torch.float32)
    heads = 2 if per_head else 1

    def matrices(u, v):
        return [*u.flatten(1).T.chunk(heads, 1), *v.flatten(1).chunk(heads, 0)]

    options = {"lr": LR, "weight_decay": WEIGHT_DECAY, "adjust_lr_fn": "original"}
    seen = [nn.Parameter(m.clone()) for m in matrices(*(p.detach() for p in params))]
    plain = torch.optim.Muon(seen, **options)
    ours = FrobeniusMuon([{"params": params, "product": "conv", "num_heads": 2}], per_head=per_head, **options)
    for step in range(3):
        set_gradients(params, step)
        for matrix, gradient in zip(seen, matrices(*(p.grad for p in params)), strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        plain.step()
    for found, expected in zip(matrices(*(p.detach() for p in params)), seen, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_dense_convolution_is_a_matrix_of_its_outputs_by_all_else():
    kernel = draw_weights([(5, 3, 2, 2)], torch.float32)[0]
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    options = {"lr": LR, "adjust_lr_fn": "original"}
    ours = FrobeniusMuon([{"params": [kernel], "use_muon": True}], weight_decay=0.1, **options)
    plain = torch.optim.Muon([matrix], weight_decay=0.1, **options)
    for step in range(3):
        set_gradients([kernel], step)
        matrix.grad = kernel.grad.flatten(1)
        ours.step()
        plain.step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach(), rtol=1e-5, atol=1e-6)


# ---- the decay, and what else an optimizer has to do ----


def test_products_are_decayed_before_the_step_at_the_rate_of_their_group():
    """Those of AdamW, as a factorized embedding is, at its own."""
    params = draw_weights([*SHAPES["qk"](5, 7, 6, 0), *SHAPES["linear"](11, 7, 3, 0)])
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    products = [{"params": params[:2], "product": "qk", "num_heads": 2, "frobenius_decay": DECAY},
                {"params": params[2:], "product": "linear", "use_muon": False, "frobenius_decay": DECAY}]  # fmt: skip
    ours = FrobeniusMuon(products, LR, adamw_lr=ADAMW_LR)
    plain = [
        torch.optim.Muon(twins[:2], lr=LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(twins[2:], lr=ADAMW_LR, weight_decay=0.0),
    ]
    for step in range(4):
        for each in (params, twins):
            set_gradients(each, step)
        ours.step()
        gradients = [*reference_gradients(twins[:2], "qk", 2), *reference_gradients(twins[2:], "linear")]
        for weight, gradient, rate in zip(twins, gradients, [LR, LR, ADAMW_LR, ADAMW_LR]):
            weight.data -= rate * DECAY * gradient
        for optimizer in plain:
            optimizer.step()
    for found, expected in zip(params, twins):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode, of_factors", [("weight", 0.4), ("none", 0.0)])
def test_other_modes_of_decay_are_torchs_weight_decay_or_none(mode, of_factors):
    model = Tagger()
    twin = copy.deepcopy(model)
    groups = muon_param_groups(model, WEIGHT_DECAY, 0.4, mode, **READOUT)
    train(model, [FrobeniusMuon(groups, LR, adamw_lr=ADAMW_LR)], range(3))
    train(twin, torchs(twin, of_factors), range(3))
    assert same(model, twin)


def test_a_closure_comes_first_and_hooks_run_once():
    model = Tagger()
    twin = copy.deepcopy(model)
    optimizer, calls = make(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    of_every_optimizer = register_optimizer_step_post_hook(lambda *_: calls.append("any"))

    def closure():
        calls.append(same(model, twin))
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    try:
        assert optimizer.step(closure).item() == loss_of(twin, 0).item()
    finally:
        of_every_optimizer.remove()
    assert calls == ["pre", True, "post", "any"]
    train(twin, [make(twin)], range(1))
    assert same(model, twin)


def test_loss_scaling_changes_nothing_and_an_overflow_skips_the_step():
    model = Tagger()
    twin = copy.deepcopy(model)
    optimizer, unscaled = make(model, fused=True), make(twin, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for seed, factor in ((0, 1.0), (1, math.inf), (2, 1.0)):
        before = copy.deepcopy(model)
        model.zero_grad()
        scaler.scale(factor * loss_of(model, seed)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert same(model, before) == (factor == math.inf)
    train(twin, [unscaled], (0, 2))
    for first, second in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(first, second, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_step_inside_autocast_equals_one_outside(half):
    model = Tagger()
    twin = copy.deepcopy(model)
    optimizers = make(model), make(twin)
    for seed in range(2):
        for net, optimizer, is_inside in ((model, optimizers[0], True), (twin, optimizers[1], False)):
            net.zero_grad()
            loss_of(net, seed).backward()
            with torch.autocast("cpu", half, enabled=is_inside):
                optimizer.step()
    assert same(model, twin)


def test_rates_may_be_tensors():
    model = Tagger()
    twin = copy.deepcopy(model)
    train(model, [make(model, lr=torch.tensor(0.5), adamw_lr=torch.tensor(0.25))], range(2))
    train(twin, [make(twin, lr=0.5, adamw_lr=0.25)], range(2))
    for first, second in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(first, second)


def through_disk(model, optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    model = copy.deepcopy(model)
    resumed = make(model, decay=0.9, lr=0.7, adamw_lr=0.8, per_head=False)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    return model, resumed


COPIES = {
    "disk": through_disk,
    "deepcopy": lambda *both: copy.deepcopy(both),
    "pickle": lambda *both: pickle.loads(pickle.dumps(both)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_saved_optimizer_goes_on_to_the_last_bit_and_a_schedule_scales_both_rates(how):
    model = Tagger()
    optimizer = make(model, per_head=True)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, [optimizer, schedule], range(2))
    assert [group["lr"] for group in optimizer.param_groups] == [LR / 4, LR / 4, ADAMW_LR / 4, ADAMW_LR / 4]
    twin, resumed = COPIES[how](model, optimizer)
    assert twin.hidden.weight is not model.hidden.weight
    train(model, [optimizer], range(2, 5))
    train(twin, [resumed], range(2, 5))
    assert same(model, twin)
    weight = nn.Parameter(torch.ones(2, 3))
    resumed.add_param_group({"params": [weight], "use_muon": False})
    assert resumed.param_groups[-1]["lr"] == (0.8 if how == "disk" else ADAMW_LR)
