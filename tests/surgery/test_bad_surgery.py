"""What is refused or left alone: layers, options and models that cannot be factorized or merged."""

import peft
import pytest
import torch
from torch import nn

import fnl_hf
from fnl_hf import FactorizationConfig, factorize, merge
from tests.surgery.test_surgery import Small, bert, factorized_names, t5


def with_hook():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def hooked(model):
    model.up.register_forward_hook(lambda *_: None)
    return model


def with_hook_of_a_weight():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    model[0].weight.register_hook(lambda gradient: gradient / 2)
    return model


def hooked_factor(model):
    model.up.left.register_post_accumulate_grad_hook(lambda _: None)
    return model


def with_own_forward():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    model[0].forward = lambda x: x.repeat(1, 2)[:, :7]
    return model


def with_adapters():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 2))
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["1"]), model)


def with_infinity():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    model[0].weight.data[2, 3] = float("inf")
    return model


class Registered(nn.Module):
    """A product of the user's own beside an ordinary layer."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"up": nn.Linear(3, 7, False), "down": nn.Linear(7, 3, False)})
        self.other, self.head = nn.Linear(7, 5), nn.Linear(5, 2)
        fnl_hf.register_product(self.block, "linear", "up.weight", "down.weight", name="lora")


def test_factors_of_registered_products_are_left_alone():
    model = factorize(Registered(), FactorizationConfig(rank_scale=0.5))
    assert factorized_names(model) == ["other"]
    assert [product.name for product in fnl_hf.find_products(model)] == ["block.lora", "other"]
    fnl_hf.frobenius_param_groups(model, weight_decay=0.1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FactorizationConfig(rank_scale=0.1, energy=0.9), "rank_scale and energy exclude each other"),
        (lambda: FactorizationConfig(rank_scale=0.0), r"rank_scale \(0.0\) must be above 0 and finite"),
        (lambda: FactorizationConfig(target_ratio=float("nan")), r"target_ratio \(nan\)"),
        (lambda: FactorizationConfig(rank_scale="0.1"), r"rank_scale \('0.1'\) must be"),
        (lambda: FactorizationConfig(ranks={"up": 2.5}), r"the rank of 'up' \(2.5\) must be a whole number"),
        (
            lambda: FactorizationConfig(include=[3]),
            r"include \(\[3\]\) must be a list of layer types and name patterns",
        ),
        (
            lambda: FactorizationConfig(include=None),
            r"include \(None\) must be a list of layer types and name patterns",
        ),
        (
            lambda: FactorizationConfig(ranks=[3]),
            r"ranks \(\[3\]\) must be a mapping of layer types or name patterns to ranks",
        ),
        (lambda: FactorizationConfig(ranks={3: 2}), "ranks: 3 must be a layer type or name pattern"),
        (lambda: factorize(nn.Linear(5, 7), {"Linear": 2}), "config must be a FactorizationConfig, not a dict"),
        (lambda: factorize(nn.Linear(5, 7), {}), "config must be a FactorizationConfig, not a dict"),
        (lambda: factorize("bert"), "model must be a torch.nn.Module, not a str"),
        (lambda: merge("bert"), "model must be a torch.nn.Module, not a str"),
        (
            lambda: factorize(Registered(), FactorizationConfig(include=["down"])),
            r"block.down: its weight is a factor of the registered product block.lora, which would no longer be found",
        ),
        (
            lambda: factorize(Registered(), FactorizationConfig(ranks={"*": 1})),
            "block.(up|down): its weight is a factor",
        ),
        (lambda: FactorizationConfig(energy=True), r"energy \(True\) must be above 0"),
        (lambda: FactorizationConfig(target_ratio=1.1), r"target_ratio \(1.1\) must be above 0 and at most 1"),
        (lambda: FactorizationConfig(model_ratio=5), r"model_ratio \(5\) must be above 0 and at most 1"),
        (lambda: FactorizationConfig(energy=1.5), r"energy \(1.5\) must be above 0 and at most 1"),
        (lambda: FactorizationConfig(mode="wide", energy=0.5), r"energy \(0.5\) needs mode 'low_rank', not 'wide'"),
        (lambda: FactorizationConfig(mode="thin"), "mode must be one of .*, not 'thin'"),
        (lambda: FactorizationConfig(init="svd"), "init must be one of .*, not 'svd'"),
        (lambda: FactorizationConfig(include="Linear"), r"include \('Linear'\) must be a list"),
        (
            lambda: factorize(Small(), FactorizationConfig(include=["upp"])),
            r"'upp' matches no layer .* \(no module at all\); the layers that can be are table",
        ),
        (lambda: factorize(Small(), FactorizationConfig(exclude=["upp"])), "'upp' matches no layer that can"),
        (lambda: factorize(Small(), FactorizationConfig(ranks={"up": 8})), r"up: rank \(8\) of a low_rank layer must"),
        (lambda: factorize(nn.Sequential(nn.ReLU())), "Sequential has no layer to factorize"),
        (lambda: factorize(Small(), FactorizationConfig(include=["norm"])), r"matches no layer .* \(LayerNorm\)"),
        (
            lambda: factorize(nn.Sequential(nn.ConvTranspose2d(3, 5, 2)), FactorizationConfig(ranks={"0": 2})),
            r"'0' matches no layer that can be factorized \(ConvTranspose2d\)",
        ),
        (lambda: factorize(t5(), FactorizationConfig(include=["shared"])), "shared: it shares its table with encoder"),
        (lambda: factorize(with_hook()), "0: it has hooks"),
        (lambda: merge(hooked(factorize(Small()))), "up: it has hooks"),
        (lambda: factorize(with_hook_of_a_weight()), "0: its weight has hooks"),
        (lambda: merge(hooked_factor(factorize(Small()))), "up: its left has hooks"),
        (lambda: factorize(with_own_forward()), "0: it has hooks or a forward of its own"),
        (lambda: factorize(with_adapters()), "the model has adapters of PEFT: factorize it first"),
        (lambda: factorize(with_infinity()), "0: its weight has values that are not finite"),
        (
            lambda: factorize(with_infinity(), FactorizationConfig(energy=0.5)),
            "0: its weight has values that are not finite",
        ),
        (lambda: factorize(torch.compile(Small())), "the model is wrapped in OptimizedModule"),
        (lambda: factorize(nn.DataParallel(Small())), "the model is wrapped in DataParallel"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_refused_model_is_unchanged():
    quantized = bert()
    quantized.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match=r"the model is quantized \(bitsandbytes\)"):
        factorize(quantized)
    model = Small()
    with pytest.raises(ValueError, match=r"head: rank \(9\)"):
        factorize(model, FactorizationConfig(ranks={"up": 2, "head": 9}))
    assert factorized_names(model) == []
