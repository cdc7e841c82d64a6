"""Truncation by what a model computes on calibration data."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2Model,
)

from fnl_hf import FactorizationConfig, factorize, merge
from fnl_hf.layers import FactorizedLayer
from fnl_hf.surgery import calibration, truncation
from fnl_hf.surgery.calibration import collect_moments
from fnl_hf.surgery.ranks import choose_ranks
from fnl_hf.surgery.truncation import find_truncations
from tests.conftest import DIMENSIONS
from tests.surgery.test_surgery import IDS, IMAGES


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(groups, size, seed):
    root = draw(groups, size, size + 3, seed=seed)
    return root @ root.mT / size


def quietly(model, config, batches):
    with warnings.catch_warnings():
        for text in ("the calibration data give .* rows", ".* layers get more parameters"):
            warnings.filterwarnings("ignore", message=text)
        return factorize(model, config, calibration=batches)


@given(m=st.integers(2, 7), n=st.integers(2, 7), groups=st.sampled_from([1, 3]), data=st.data())
@settings(max_examples=30, deadline=None)
def test_truncations_are_the_weighted_svd(m, n, groups, data):
    """By the formula that inverts both roots, in float64; the losses are the squares of its singular values."""
    rank = data.draw(st.integers(1, min(m, n)))
    weight, inputs, outputs = draw(groups, m, n), positive(groups, n, 1), positive(groups, m, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "SHRINKAGE", 0.0)
        found = find_truncations(weight, inputs, outputs)
    left, right = torch.linalg.cholesky(outputs).mT, torch.linalg.cholesky(inputs)
    p, sigma, qh = torch.linalg.svd(left @ weight @ right, full_matrices=False)
    expected = torch.linalg.inv(left) @ (p[..., :rank] * sigma[:, None, :rank]) @ qh[:, :rank] @ torch.linalg.inv(right)
    torch.testing.assert_close(found.left[..., :rank] @ found.right[..., :rank].mT, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.losses[: min(m, n)], (sigma**2).sum(dim=0), rtol=1e-6, atol=1e-9)


def test_shrinkage_keeps_all_directions_alive():
    """Inputs and outputs of one direction only, and a rank of five: each factor's column has a size."""
    model = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 1))
    batches = [draw(13, 1, seed=1).float() * draw(1, 7, seed=2).float()]
    layer = quietly(model, FactorizationConfig(ranks={"0": 5}), batches)[0]
    left, right = layer.factors()
    for factor in (left, right):
        assert factor.norm(dim=1).min() > 1e-2 * factor.norm(dim=1).max()
    model(draw(13, 7, seed=3).float()).sum().backward()
    assert layer.left.grad.abs().amax(dim=0).min() > 0


class Net(nn.Module):
    """One layer of a type, and a random map of its outputs."""

    def __init__(self, layer, outputs):
        super().__init__()
        self.layer = layer
        self.is_image = isinstance(layer, nn.Conv2d)
        self.register_buffer("map", draw(outputs, 5, seed=7).float())

    def forward(self, x):
        y = self.layer(x)
        return (y.movedim(1, -1) if self.is_image else y) @ self.map


def test_moments_of_a_linear_layer_without_padding():
    """C and the mean of the tokens that are no padding, by hand; G tends to M Mᵀ for each of them."""

    class Masked(Net):
        def forward(self, x, attention_mask):
            return super().forward(x)

    model = Masked(nn.Linear(7, 3), 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batches = [{"x": draw(2, 5, 7, seed=seed).float(), "attention_mask": mask} for seed in range(200)]
    found = dict(collect_moments(model, {"layer": model.layer}, batches))["layer"]
    rows = torch.cat([batch["x"][mask.bool()] for batch in batches]).double()
    assert found.rows == len(rows) == 200 * 8
    torch.testing.assert_close(found.covariance(True)[0], torch.cov(rows.T, correction=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.covariance(False)[0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
    change = draw(3, 7, seed=5)
    torch.testing.assert_close(found.mean_output(change), (rows @ change.T).mean(dim=0), rtol=1e-4, atol=1e-4)
    expected = len(rows) * (model.map @ model.map.T).double()  # E over v of (M v)(M v)ᵀ for each token
    torch.testing.assert_close(found.outputs[0].double(), expected, rtol=0, atol=0.15 * expected.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"stride": (2, 1), "padding": (1, 2)}, {"groups": 3, "padding": "valid"},
                                     {"dilation": (1, 2), "padding": 1, "padding_mode": "circular"}])  # fmt: skip
def test_mean_output_of_a_convolution_is_exact(options):
    """What a changed kernel changes on average, at the borders too: by two convolutions."""
    layer = nn.Conv2d(6, 9, (3, 2), **options)
    images = [draw(2, 6, 8, 7, seed=seed).float() + 1 for seed in range(2)]
    found = dict(collect_moments(Net(layer, 9), {"layer": layer}, images))["layer"]
    change = draw(*layer.weight.shape, seed=5)
    changed = copy.deepcopy(layer)
    changed.weight.data += change.float()
    with torch.no_grad():
        differences = torch.cat([(changed(x) - layer(x)).movedim(1, 0).flatten(1) for x in images], dim=1)
    torch.testing.assert_close(found.mean_output(change).float(), differences.mean(dim=1), rtol=1e-4, atol=1e-4)


def test_patches_of_a_convolution_are_those_of_its_first_factor():
    """Σ x xᵀ by the 1×k_w convolution with each unit kernel."""
    layer = nn.Conv2d(6, 9, (3, 2), stride=(1, 2), padding=(0, 1), groups=3)
    x = draw(2, 6, 8, 7).float()
    found = dict(collect_moments(Net(layer, 9), {"layer": layer}, [x]))["layer"]
    units = torch.eye(4).view(4, 2, 1, 2).repeat(3, 1, 1, 1)  # for each group: its (c_in/G, k_w) inputs
    rows = F.conv2d(x, units, None, (1, 2), (0, 1), groups=3).unflatten(1, (3, 4)).permute(1, 0, 3, 4, 2).flatten(1, 3)
    torch.testing.assert_close(found.inputs, rows.mT @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "batches, expected",
    [
        # two entries occur once: 2 occurrences for the four missing entries
        ([[0, 1, 0], [3, 0, 0]], [4, 1, 0.5, 1, 0.5, 0.5, 0.5]),
        # none occurs once: 1 occurrence for the five missing entries
        ([[0, 2, 0], [2, 2, 0]], [3, 0.2, 3, 0.2, 0.2, 0.2, 0.2]),
        # five occur once, but a missing entry does not occur more often than each of them
        ([[0, 1, 2], [4, 5, 6]], [1, 1, 1, 1, 1, 1, 1]),
        ([[0, 1, 2, 3], [4, 5, 6, 6]], [1, 1, 1, 1, 1, 1, 2]),
        # positions of batches of two lengths, and those of RoBERTa, which begin later
        ([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1], [0, 1]], [4, 4, 2, 2, 2, 2, 2]),
        ([[2, 3, 4], [2, 3, 4], [2, 3, 4]], [3] * 7),
    ],
)
def test_frequencies_of_entries_that_the_text_lacks(batches, expected):
    layer = nn.Embedding(7, 5)
    data = [torch.tensor([batch]) for batch in batches]
    found = dict(collect_moments(Net(layer, 5), {"layer": layer}, data))["layer"]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.covariance(centred=False), expected / expected.sum())


LAYERS = [
    (nn.Linear(11, 7), draw(40, 2, seed=1).float() @ draw(2, 11, seed=2).float() + draw(11, seed=3).float(), 7),
    (nn.Linear(5, 13, bias=False), draw(40, 2, seed=1).float() @ draw(2, 5, seed=2).float(), 13),
    (nn.Conv2d(7, 5, 1), torch.einsum("bchw,cd->bdhw", draw(3, 2, 4, 6).float(), draw(2, 7, seed=2).float()) + 1, 5),
    (nn.Embedding(11, 5), torch.tensor([[3, 8, 3, 3, 8, 8, 3, 8]] * 40), 5),
]


@pytest.mark.parametrize("layer, inputs, outputs", LAYERS)
def test_inputs_of_two_directions_need_two(layer, inputs, outputs):
    """At rank 2 (about their mean, if there is a bias) the outputs stay, which plain truncation loses."""
    model = Net(copy.deepcopy(layer), outputs)
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed).float()
    before = model(inputs).detach()
    config = FactorizationConfig(ranks={"layer": 2})
    plain = factorize(copy.deepcopy(model), config)(inputs)
    after = quietly(model, config, [inputs])(inputs)
    error, plain_error = ((each - before).norm() / before.norm() for each in (after, plain))
    assert error < 0.03 < plain_error


def test_outputs_that_do_not_count_are_given_up():
    """Of seven outputs the model goes on with two."""
    model = nn.Sequential(nn.Linear(11, 7), nn.Linear(7, 3))
    model[1].weight.data[:, 2:] = 0
    x = draw(50, 11).float()
    before = model(x).detach()
    after = quietly(copy.deepcopy(model), FactorizationConfig(ranks={"0": 2}), [x])(x)
    assert (after - before).norm() < 0.02 * before.norm()


class Routed(nn.Module):
    """A layer of whose output only the largest entry counts."""

    def __init__(self):
        super().__init__()
        self.up, self.router, self.head = nn.Linear(11, 7), nn.Linear(11, 5), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.up(x) + self.router(x).argmax(-1, keepdim=True))


def test_a_layer_without_derivatives_gets_the_common_ratio():
    model = quietly(Routed(), FactorizationConfig(target_ratio=0.6, include=["up", "router"]), [draw(50, 11).float()])
    assert isinstance(model.router, FactorizedLayer) and model.router.rank == 1


def bert(**entries):
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**DIMENSIONS, **entries))


def text(seed=0, padding=0):
    ids = torch.randint(1, 50, (3, 11), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = padding, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_biases_stay_the_same_parameters():
    """One that is tied, whose hook still sees its gradient, and one of two layers, which get two."""
    model, seen = bert().eval(), []
    model.cls.predictions.bias.register_hook(seen.append)
    config = FactorizationConfig(include=["decoder", "encoder.*"], rank_scale=0.5)
    quietly(model, config, [text(seed) for seed in range(3)])
    before = model(**text()).logits
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias and model.cls.predictions.bias.any()
    model.tie_weights()
    assert torch.equal(model(**text()).logits, before)
    before.sum().backward()
    assert len(seen) == 1
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 2))
    net[1].bias = net[0].bias
    x = draw(50, 5).float() + 1
    mean = net[0](x).mean(dim=0)
    quietly(net, FactorizationConfig(rank_scale=0.5), [x])
    torch.testing.assert_close(net[0](x).mean(dim=0), mean, rtol=0, atol=1e-4)


def test_the_model_is_left_as_it_was():
    """Modes of its parts, frozen parameters, gradients, hooks, weights; also when calibration fails."""
    model = bert()
    model.bert.encoder.layer[0].eval()
    model.bert.embeddings.requires_grad_(False)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers = {"dense": model.bert.encoder.layer[1].output.dense}
    dict(collect_moments(model, layers, [text()]))
    with pytest.raises(ValueError, match="the calibration data have no batch"):
        dict(collect_moments(model, layers, []))
    with pytest.raises(ValueError, match="input_ids"):
        dict(collect_moments(model, layers, [{"attention_mask": torch.ones(2, 3)}]))
    assert model.training and not model.bert.encoder.layer[0].training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_kernels_without_a_backward_pass_are_those_of_the_user_again():
    """flex_attention has none on a CPU. A CLIP's two towers have kernels of their own."""
    sizes = {"hidden_size": 28, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 44}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 53, "max_position_embeddings": 20},
        vision_config={**sizes, "image_size": 20, "patch_size": 5},
        projection_dim=7,
    )
    kernels = {"text_config": "flex_attention", "vision_config": "sdpa"}
    batch = {"input_ids": IDS, "pixel_values": IMAGES}
    found = []
    for kernel in ("flex_attention", "eager"):
        torch.manual_seed(0)
        model = CLIPModel(config)
        model.set_attn_implementation(kernels | {"text_config": kernel})
        quietly(model, FactorizationConfig(rank_scale=0.25), [batch])
        assert [getattr(model.config, name)._attn_implementation for name in kernels] == [kernel, "sdpa"]
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_padding_and_passes_do_not_matter(monkeypatch):
    """Other ids in the padding, and one layer a pass: the same model to the last bits."""
    config = FactorizationConfig(target_ratio=0.4, include=["Linear", "*attention*"])
    models = [quietly(bert(), config, [text(seed, padding) for seed in range(4)]) for padding in (0, 7)]
    monkeypatch.setattr(calibration, "MAX_BYTES", 1)
    models.append(quietly(bert(), config, [text(seed) for seed in range(4)]))
    expected = models[0].state_dict()
    for model in models[1:]:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_a_calibrated_checkpoint_comes_back(tmp_path):
    """Some of its layers stay dense; its record says that it was calibrated."""
    config = FactorizationConfig(target_ratio=0.8, include=["Linear", "*attention*"])
    model = quietly(bert(), config, [text(seed) for seed in range(4)]).eval()
    kinds = {
        type(layer) for layer in model.bert.encoder.modules() if hasattr(layer, "weight") or hasattr(layer, "left")
    }
    assert nn.Linear in kinds and any(issubclass(kind, FactorizedLayer) for kind in kinds)
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert again.config.quantization_config.factorizations[0]["calibrated"] is True
    expected = model(**text()).logits
    torch.testing.assert_close(again(**text()).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(merge(again)(**text()).logits, expected, rtol=0, atol=1e-4)


def test_frozen_models_in_place_activations_and_conv1d():
    """GPT-2's layers, in bfloat16, none of whose parameters takes a gradient; a ReLU that overwrites its input."""
    torch.manual_seed(0)
    gpt2 = GPT2Model(GPT2Config(vocab_size=53, n_positions=20, n_embd=28, n_layer=2, n_head=7, n_inner=44))
    gpt2 = gpt2.to(torch.bfloat16).requires_grad_(False)
    quietly(gpt2, FactorizationConfig(target_ratio=0.5), [text()])
    factors = [p for name, p in gpt2.named_parameters() if name.endswith((".left", ".right"))]
    assert factors and all(p.dtype == torch.bfloat16 and not p.requires_grad for p in factors)
    x = draw(50, 11).float()
    nets = [nn.Sequential(nn.Linear(11, 7), nn.ReLU(inplace), nn.Linear(7, 3)) for inplace in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    found = [dict(collect_moments(net, {"0": net[0]}, [x]))["0"].outputs for net in nets]
    torch.testing.assert_close(*found, rtol=0, atol=0)


class Two(nn.Module):
    """Layers that ``choose_ranks`` asks for nothing but their sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 6, bias=False), nn.Linear(4, 4, bias=False)


def losses_of(a, b):
    return {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)}


@pytest.mark.parametrize(
    "ratio, a, b, expected",
    [
        # a: 60 parameters, 16 a direction; b: 16, 8 a direction, dense from the second on.
        (0.6, [90, 80, 1, 1, 1, 1], [7, 6, 5, 4], {"a": 2, "b": 1}),  # 45.6: 24 + 16 (5 a parameter), 5.6 left
        (0.75, [90, 80, 1, 1, 1, 1], [7, 6, 5, 4], {"a": 2}),  # 57: 40 and b dense with 8 more
        (0.75, [90, 80, 70, 1, 1, 1], [7, 6, 5, 4], {"a": 3, "b": 1}),  # 70/16 before 6/8
        (1.0, [90, 80, 70, 60, 1, 1], [7, 6, 5, 4], {}),
    ],
)
def test_ranks_go_where_a_parameter_saves_most(ratio, a, b, expected):
    layers = dict(Two().named_children())
    assert choose_ranks(layers, FactorizationConfig(target_ratio=ratio), losses=losses_of(a, b)) == expected


def test_ranks_of_large_layers_go_in_steps_of_eight():
    """96 x 64: 160 parameters a direction. The second step of b saves more than the second of a, its first less."""
    layers = {"a": nn.Linear(64, 96, bias=False), "b": nn.Linear(64, 96, bias=False)}
    losses = losses_of([9.0] * 8 + [1.0] * 56, [8.0] * 8 + [2.0] * 8 + [0.0] * 48)
    for left, expected in (
        (16, {"a": 8, "b": 8}),
        (23, {"a": 8, "b": 8}),
        (24, {"a": 8, "b": 16}),
        (8, {"a": 1, "b": 1}),
    ):
        config = FactorizationConfig(target_ratio=left * 160 / (2 * 64 * 96))
        assert choose_ranks(layers, config, losses=losses) == expected


def test_energy_of_calibrated_layers_is_that_of_their_losses():
    layers = dict(Two().named_children())
    losses = losses_of([90, 5, 2, 1, 1, 1], [4, 3, 2, 1])
    found = choose_ranks(layers, FactorizationConfig(energy=0.9), losses=losses)
    assert found == {"a": 1, "b": 3}


def test_target_ratio_is_kept():
    model = bert()
    layers = [m for n, m in model.named_modules() if type(m) is nn.Linear and "encoder" in n]
    before = sum(p.numel() for p in model.bert.encoder.parameters())
    dense = sum(m.weight.numel() + m.bias.numel() for m in layers)
    quietly(model, FactorizationConfig(target_ratio=0.6, include=["encoder.*"]), [text(seed) for seed in range(3)])
    left = dense - (before - sum(p.numel() for p in model.bert.encoder.parameters()))
    assert 0.6 * dense - max(math.prod(m.weight.shape) for m in layers) / 10 < left <= 0.6 * dense


def test_padding_of_a_decoder_is_left_out():
    """Source and target of one width, with other padding; keys and values of cross-attention are the source's."""
    sizes = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 30, "decoder_start_token_id": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 14, "decoder_ffn_dim": 10}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, max_position_embeddings=20))
    ids = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    masks = {"attention_mask": (2, 3), "decoder_attention_mask": (7, 4)}
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    batch |= {name: torch.tensor([[place < n for place in range(7)] for n in ns]).long() for name, ns in masks.items()}
    names = ["encoder.layers.0.fc1", "decoder.layers.0.fc1"]
    names += [f"decoder.layers.0.{part}_proj" for part in ("self_attn.k", "encoder_attn.k", "encoder_attn.q")]
    names += ["encoder.embed_tokens", "decoder.embed_tokens"]
    layers = {f"model.{name}": model.get_submodule(f"model.{name}") for name in names}
    rows = {
        name: moments.rows for name, moments in collect_moments(model, layers | {"lm_head": model.lm_head}, [batch])
    }
    assert list(rows.values()) == [5, 11, 11, 5, 11, 5, 11, 11]


def test_padding_of_choices_is_left_out():
    model = BertForMultipleChoice(BertConfig(**DIMENSIONS))
    name = "bert.encoder.layer.0.intermediate.dense"
    mask = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0]]])
    batch = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    ((_, found),) = collect_moments(model, {name: model.get_submodule(name)}, [batch])
    assert found.rows == 2 + 3 + 1 + 2


def test_bad_calibrations_are_refused():
    config = FactorizationConfig(mode="wide")
    with pytest.raises(ValueError, match="calibration needs mode 'low_rank' and init 'spectral', not 'wide'"):
        factorize(bert(), config, calibration=[text()])
    with pytest.warns(UserWarning, match="calibration data give 28 rows for .*, which has 42 inputs"):
        factorize(bert(), FactorizationConfig(target_ratio=0.5, include=["encoder.*"]), calibration=[text()])
    broken = bert()
    broken.bert.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"layer\.0\.output\.dense: calibration needs the layer's weight, but it is not finite"
    ):
        factorize(broken, FactorizationConfig(include=["encoder.*dense"]), calibration=[text()])
    for data, message in (
        (text(), "a batch must be a mapping, a tuple or a tensor, not 'input_ids': give a list of such batches"),
        ([{name: value.tolist() for name, value in text().items()}], "attention_mask must be a tensor, not a list"),
        ([text() | {"attention_mask": torch.zeros(3, 11)}], "the calibration data reach none of the layers"),
    ):
        with pytest.raises(ValueError, match=message):
            quietly(bert(), FactorizationConfig(include=["encoder.*"]), data)
    with pytest.raises(ValueError, match="Sequential cannot be called with a batch: .* leave labels out"):
        quietly(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 2)), None, [(torch.ones(3, 7), torch.ones(3))])
    with pytest.raises(ValueError, match="inputs of 0, or derivatives by its outputs, are not finite"):
        quietly(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 2)), None, [torch.full((11, 7), math.inf)])
    model = nn.Sequential(nn.Linear(2, 3), nn.Flatten())
    with pytest.raises(ValueError, match="returns no tensor that depends on the layers"):
        dict(collect_moments(model, {"other": nn.Linear(2, 3)}, [torch.ones(1, 2)]))
