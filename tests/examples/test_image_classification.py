"""examples/image_classification: its data, its ResNets, and the script on tiny images."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import train
from data import load_idx, to_images
from fnl_hf import UserInputError
from fnl_hf.runs.command_line import parse_arguments
from preparation import Preparation
from pruning import SparseTraining, make_permanent
from resnet import BasicBlock, CifarResNetConfig, CifarResNetForImageClassification
from tests.conftest import IMAGE_HEIGHT, IMAGE_WIDTH, ROOT, assert_same_weights, launch

SCRIPT = "examples/image_classification/train.py"
# Of a ResNet8 for one channel and seven classes.
ELSEWHERE = 9 * 16 + 2 * (3 * 16 + 2 * 32 + 2 * 64) + 7 * 64 + 7  # stem, norms, classifier
KERNELS = 9 * (2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
# Ranks are quarters of the smaller sizes of the matrices: two of 48 x 48, then 96 x 48, 96 x 96, 192 x 96, 192 x 192.
FACTORS = 2 * 12 * (48 + 48) + 12 * (96 + 48) + 24 * (96 + 96) + 24 * (192 + 96) + 48 * (192 + 192)


def command(folder, **flags):
    values = {
        "output_dir": folder, "resnet_depth": 8, "max_steps": 10, "per_device_train_batch_size": 8, "seed": 3,
        "save_strategy": "no", "report_to": "none", "use_cpu": "true", "logging_steps": 1, "crop_padding": 1,
        "disable_tqdm": "true",
    } | flags  # fmt: skip
    if "model_name_or_path" in flags and "resnet_depth" not in flags:
        del values["resnet_depth"]
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", *str(value).split())]


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def logits(folder, seed=0):
    x = torch.randn(5, 1, IMAGE_HEIGHT, IMAGE_WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return AutoModelForImageClassification.from_pretrained(folder).eval()(x).logits


@pytest.fixture(scope="session")
def dense(idx_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "out"
    train.run(command(folder, idx_dir=idx_dir, max_steps=60, eval_strategy="steps", eval_steps=20))
    return folder


@pytest.mark.parametrize("depth, parameters", [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_sizes_of_the_resnets(depth, parameters):
    """0.27, 0.46, 0.85 and 1.7 million, table 6 of He et al."""
    blocks = (depth - 2) // 6
    by_hand = 3 * 9 * 16 + 2 * 16 + 64 * 10 + 10  # stem, classifier
    for before, channels in ((16, 16), (16, 32), (32, 64)):
        by_hand += 9 * channels * (before + (2 * blocks - 1) * channels) + 2 * blocks * 2 * channels
    with torch.device("meta"):
        model = CifarResNetForImageClassification(CifarResNetConfig(depth=depth, num_labels=10))
        wide = CifarResNetForImageClassification(CifarResNetConfig(depth=depth, width_multiplier=2, num_labels=10))
    assert model.num_parameters() == by_hand == parameters
    kernels = sum(p.numel() for p in model.resnet.blocks.parameters() if p.dim() == 4)
    assert sum(p.numel() for p in wide.resnet.blocks.parameters() if p.dim() == 4) == 4 * kernels
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == depth


def test_shortcuts_have_no_parameters():
    block = BasicBlock(3, 8, stride=2)
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 3, 5, 7)
    expected = torch.zeros(2, 8, 3, 4)
    expected[:, 2:5] = x[:, :, [0, 2, 4]][..., [0, 2, 4, 6]]
    assert torch.equal(block(x), expected)


def test_weights_begin_as_he_draws_them():
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(width_multiplier=2, num_labels=7))
    assert model.resnet.blocks[-1].conv2.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert model.classifier.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)


def test_training_a_dense_model(dense, idx_dir):
    found = results(dense)
    assert found["eval_parameters"] == ELSEWHERE + KERNELS
    assert found["eval_accuracy"] > 0.9 and "merged_accuracy" not in found, "it learns its tiles"
    log = json.loads((dense / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_accuracy" in entry] == [20, 40, 60]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates == pytest.approx([0.1] * 30 + [0.01] * 15 + [0.001] * 15)
    assert all(entry["images_per_second"] > 0 for entry in log if "loss" in entry)
    # The same figure from the saved files alone.
    entries = json.loads((dense / "preprocessor_config.json").read_text())
    test = load_idx(str(idx_dir), Preparation())["test"]
    x = (test.pixels.permute(0, 3, 1, 2) / 255 - entries["image_mean"][0]) / entries["image_std"][0]
    with torch.inference_mode():
        predicted = AutoModelForImageClassification.from_pretrained(dense).eval()(x).logits.argmax(-1)
    assert (predicted == test.labels).double().mean().item() == pytest.approx(found["eval_accuracy"])


def test_low_rank_launched(idx_dir, tmp_path):
    folder = tmp_path / "out"
    launch(SCRIPT, *command(folder, idx_dir=idx_dir, method="low_rank", max_steps=60))
    found = results(folder)
    assert (found["eval_parameters"], found["merged_parameters"]) == (ELSEWHERE + FACTORS, ELSEWHERE + KERNELS)
    assert found["merged_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert found["merged_accuracy"] == found["eval_accuracy"] > 0.6
    torch.testing.assert_close(logits(folder / "merged"), logits(folder), atol=1e-4, rtol=0)
    assert not any("left" in name for name in load_file(folder / "merged" / "model.safetensors"))
    assert any("left" in name for name in load_file(folder / "model.safetensors"))
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-classification" and f"| data | {idx_dir.name} |" in card.text
    assert "| factorized layers | 6, of rank 12 to 48 |" in card.text and "images/s" in card.text
    [code] = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    code = code.replace("path/to/this/model", str(folder)) + "\nassert processor.image_mean and model.config.depth == 8"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL)
    flags = {"idx_dir": idx_dir, "model_name_or_path": folder, "do_eval": "true"}
    train.run(command(tmp_path / "again", **flags))
    again = results(tmp_path / "again")
    assert {name: again[name] for name in again if "accuracy" in name or "parameters" in name} == {
        name: found[name] for name in found if "accuracy" in name or "parameters" in name
    }
    with pytest.raises(UserInputError, match="--method low_rank: .*has no layer to factorize"):
        train.run(command(tmp_path / "twice", **flags, method="low_rank"))


@pytest.mark.parametrize("method, parameters", [("wide", 2 * KERNELS), ("deep", 2 * KERNELS)])
def test_overcomplete_models_train_and_merge(method, parameters, idx_dir, tmp_path):
    if method == "deep":
        parameters += 3 * 48**2 + 2 * 96**2 + 192**2
    # Full ranks make wide layers of non-square matrices larger than two dense ones: (96 + 48) · 48 for 96 · 48.
    parameters += (96 + 48) * 48 + (192 + 96) * 96 - 2 * (96 * 48 + 192 * 96)
    train.run(command(tmp_path / "out", idx_dir=idx_dir, method=method))
    found = results(tmp_path / "out")
    assert (found["eval_parameters"], found["merged_parameters"]) == (ELSEWHERE + parameters, ELSEWHERE + KERNELS)
    assert found["merged_loss"] == pytest.approx(found["eval_loss"], rel=1e-4)
    torch.testing.assert_close(logits(tmp_path / "out" / "merged"), logits(tmp_path / "out"), atol=1e-4, rtol=0)


def test_the_flags_of_factorization_change_what_they_say(idx_dir, tmp_path):
    arms = {
        "SI+FD": {},
        "SI": {"decay_mode": "weight"},
        "FD": {"factor_init": "default"},
        "ratio": {"target_ratio": 0.1},
        "energy": {"energy": 0.5},
        "rank": {"rank_scale": 0.1},
        "excluded": {"exclude": "blocks.2.*"},
    }
    found = {}
    for name, flags in arms.items():
        flags = {"method": "low_rank", "max_steps": 2, "weight_decay": 0.1} | flags
        train.run(command(tmp_path / name, idx_dir=idx_dir, **flags))
        found[name] = results(tmp_path / name)
    losses = {name: found[name]["eval_loss"] for name in ("SI+FD", "SI", "FD")}
    assert len(set(losses.values())) == 3
    sizes = {name: result["eval_parameters"] for name, result in found.items()}
    assert sizes["SI+FD"] == sizes["SI"] == sizes["FD"] == ELSEWHERE + FACTORS
    assert sizes["ratio"] <= ELSEWHERE + 0.1 * KERNELS and sizes["ratio"] > ELSEWHERE + 0.09 * KERNELS
    assert len({sizes[name] for name in ("SI+FD", "ratio", "energy", "rank", "excluded")}) == 5


def test_pruning_at_the_budget_of_a_low_rank_model(dense, idx_dir, tmp_path):
    flags = {"idx_dir": idx_dir, "method": "pruning", "model_name_or_path": dense, "learning_rate": 0.01}
    train.run(command(tmp_path / "tuned", **flags))
    train.run(command(tmp_path / "untuned", **flags, do_eval="true"))
    assert results(tmp_path / "untuned")["eval_parameters"] == ELSEWHERE + FACTORS
    assert not (tmp_path / "untuned" / "model.safetensors").exists()
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    assert before.keys() == after.keys()
    kernels = [name for name in before if name.startswith("resnet.blocks") and before[name].dim() == 4]
    threshold = torch.cat([before[name].abs().flatten() for name in kernels]).sort(descending=True)[0][FACTORS - 1]
    for name in kernels:
        assert torch.equal(after[name] != 0, before[name].abs() >= threshold)
        assert not torch.equal(after[name], before[name])
    assert all(torch.all(after[name] != 0) for name in ("classifier.weight", "resnet.stem.weight"))


@pytest.fixture
def sparse_layers():
    """Two layers of 6 and 35 weights, of which 10 are to stay, as a function of the kind; and an optimizer. The second
    layer's weights are stored by columns, as convolutions are if their channels come last."""

    def make(kind):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(7, 5, bias=False)]
        layers[1].weight = torch.nn.Parameter(layers[1].weight.detach().T.contiguous().T)
        callback = SparseTraining(layers, 10, kind, seed=3)
        optimizer = torch.optim.SGD([layer.weight_orig for layer in layers], lr=0.1, momentum=0.9)

        def run(*steps):
            for step in steps:
                optimizer.zero_grad()
                sum((layer(torch.ones(layer.in_features)) ** 2).sum() for layer in layers).backward()
                optimizer.step()
                callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=400), None, optimizer=optimizer)
            masks, weights = ([layer.weight_mask for layer in layers], [layer.weight_orig.detach() for layer in layers])
            return [torch.cat([each.flatten() for each in of]) for of in (masks, weights)]

        return layers, run, optimizer

    return make


@pytest.mark.parametrize("kind", ["magnitude", "lottery"])
def test_pruned_after_half_of_the_steps(sparse_layers, kind):
    layers, run, optimizer = sparse_layers(kind)
    mask, early = run(19, 20)
    assert mask.all()
    assert run(199)[0].all()
    mask, after = run(200)
    assert mask.sum() == 10
    if kind == "lottery":
        assert torch.equal(after, early)
        assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())
    else:
        assert set(after.abs().argsort(descending=True)[:10].tolist()) == set(mask.nonzero().flatten().tolist())
    pruned, _ = run(201, 300)
    assert torch.equal(pruned, mask)
    make_permanent(torch.nn.ModuleList(layers))
    assert sum(int((layer.weight != 0).sum()) for layer in layers) == 10
    assert [name for layer in layers for name in layer.state_dict()] == ["weight", "weight"]


def test_a_random_pattern_stays_or_changes(sparse_layers):
    (fixed, *_), (dynamic, *_) = (sparse_layers(kind)[1](1) for kind in ("fixed", "dynamic"))
    assert fixed.sum() == 10 and torch.equal(fixed, dynamic)
    assert torch.equal(sparse_layers("fixed")[1](100, 200)[0], fixed)
    layers, run, optimizer = sparse_layers("dynamic")
    run(99)
    of_first = int(layers[0].weight_mask.sum())
    _, before = run(1)
    mask, after = run(100)  # a share of 0.3 · (1 + cos(π/3))/2 = 0.225
    assert mask.sum() == 10 and layers[0].weight_mask.sum() == of_first
    count = int(0.225 * of_first) + int(0.225 * (10 - of_first))
    grown = (mask > fixed).nonzero().flatten()
    assert len(grown) == count > 0 and torch.all(after[grown] == 0)
    momentum = torch.cat([optimizer.state[layer.weight_orig]["momentum_buffer"].flatten() for layer in layers])
    assert torch.all(momentum[grown] == 0) and momentum.abs().sum() > 0
    gone = (mask < fixed).nonzero().flatten()
    assert len(gone) == count
    assert not torch.equal(before, after)
    assert torch.equal(run(400)[0], mask), "after three quarters of the steps it stays"


@pytest.mark.parametrize("kind", ["fixed", "lottery"])
def test_a_sparse_model_is_one_of_the_size_that_was_asked_for(kind, idx_dir, tmp_path):
    flags = {"idx_dir": idx_dir, "method": "pruning", "sparsity": kind, "save_strategy": "steps", "save_steps": 7}
    train.run(command(tmp_path / "whole", **flags))
    assert results(tmp_path / "whole")["eval_parameters"] == ELSEWHERE + FACTORS
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    kernels = [name for name in saved if name.startswith("resnet.blocks") and saved[name].dim() == 4]
    assert sum(int((saved[name] != 0).sum()) for name in kernels) == FACTORS
    assert not [name for name in saved if "mask" in name or "early" in name]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("all_results.json", "model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-10")
    train.run(command(tmp_path / "cut", **flags, resume_from_checkpoint="auto"))
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("method", ["low_rank", "pruning"])
def test_resuming_gives_the_same_model(method, dense, idx_dir, tmp_path):
    flags = {"method": method, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 9, "max_steps": 13}
    flags |= {"idx_dir": idx_dir, "model_name_or_path": dense if method == "pruning" else None}
    train.run(command(tmp_path / "whole", **flags))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("all_results.json", "checkpoint-12/model.safetensors", "checkpoint-13", "model.safetensors"):
        path = tmp_path / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train.run(command(tmp_path / "cut", **flags, resume_from_checkpoint="auto"))  # in the middle of an epoch of ten
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert results(tmp_path / "cut")["eval_loss"] == results(tmp_path / "whole")["eval_loss"]


def test_held_out_images_and_subsets(idx_dir, tmp_path):
    flags = {"idx_dir": idx_dir, "max_train_samples": 56, "validation_samples": 14, "eval_strategy": "epoch"}
    train.run(command(tmp_path / "out", **flags, max_steps=None, num_train_epochs=2))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_validation_accuracy" in entry] == [7, 14]
    assert "eval_accuracy" in results(tmp_path / "out")
    assert not [entry for entry in log if "eval_accuracy" in entry and entry["step"] < 14]


def test_processes_evaluate_what_is_saved(idx_dir, tmp_path):
    """Each has running statistics of its own images; one process that loads the model finds the same scores."""
    flags = {"idx_dir": idx_dir, "per_device_eval_batch_size": 5}  # a divisor: Trainer's loss counts padding, too
    launch(SCRIPT, *command(tmp_path / "out", **flags, method="low_rank"), processes=2)
    train.run(command(tmp_path / "again", **flags, model_name_or_path=tmp_path / "out", do_eval="true"))
    for name in ("eval_loss", "merged_loss"):
        assert results(tmp_path / "out")[name] == pytest.approx(results(tmp_path / "again")[name], rel=1e-5)


def test_image_folders_and_any_model_of_transformers(folders, tmp_path):
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=37, image_size=12, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    entries = {"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 12}}
    entries |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.5], "do_resize": True, "resample": 2}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(entries))
    flags = {"train_dir": folders / "train", "validation_dir": folders / "test", "cache_dir": tmp_path / "cache"}
    vit = flags | {"model_name_or_path": tmp_path / "vit", "optimizer": "adamw", "learning_rate": 1e-3}
    train.run(command(tmp_path / "out", **vit, method="low_rank"))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(model) is ViTForImageClassification and model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    saved = json.loads((tmp_path / "out" / "merged" / "preprocessor_config.json").read_text())
    assert {name: saved[name] for name in entries} == entries
    cards = [(tmp_path / "out" / name / "README.md").read_text(encoding="utf-8") for name in ("", "merged")]
    assert ["import fnl_hf" in card for card in cards] == [True, False] and "multiplied out" in cards[1]
    assert "pipeline_tag: image-classification" in cards[1] and "| Accuracy |" in cards[1]
    assert str(tmp_path) not in cards[1]
    assert results(tmp_path / "out")["merged_loss"] == pytest.approx(results(tmp_path / "out")["eval_loss"], rel=1e-4)

    message = r"images of 12 sizes, such as \(16, 19\) and \(17, 19\): give --image_size"
    with pytest.raises(UserInputError, match=message):
        train.run(command(tmp_path / "none", **flags))
    train.run(command(tmp_path / "resnet", **flags, image_size=9))
    assert load_file(tmp_path / "resnet" / "model.safetensors")["resnet.stem.weight"].shape == (16, 3, 3, 3)


def test_a_data_set_in_the_layout_of_the_hub(tmp_path):
    generator = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    for split, count in (("train", 16), ("validation", 10), ("test", 6)):
        pixels = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        columns = {"img": [Image.fromarray(p) for p in pixels], "label": [n % 2 for n in range(count)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    flags = {"dataset_name": tmp_path / "set", "cache_dir": tmp_path / "cache", "max_steps": 2}
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best |= {"load_best_model_at_end": "true", "metric_for_best_model": "accuracy"}
    train.run(command(tmp_path / "out", **flags, **best))
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "x", 1: "y"}
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    chosen = [entry["eval_validation_accuracy"] for entry in state["log_history"] if "eval_validation_loss" in entry]
    assert state["best_metric"] == max(chosen) in [n / 10 for n in range(11)] and len(chosen) == 2
    assert results(tmp_path / "out")["eval_accuracy"] in [n / 6 for n in range(7)]
    with pytest.raises(UserInputError, match="img must be a column of images and img a column of classes"):
        train.run(command(tmp_path / "bad", **flags, label_column_name="img"))


def test_the_commands_of_the_documentation_parse():
    text = (ROOT / "examples" / "image_classification" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python train.py (.*)$", text, flags=re.MULTILINE)
    assert len(commands) == 6
    for words in commands:
        parse_arguments(train.ARGUMENTS, [*shlex.split(words, comments=True), "--use_cpu", "true"])


def test_bad_images_and_labels_are_refused(folders, tmp_path):
    image = Image.new("RGB", (5, 7))
    for label in (-1, 2, None):
        with pytest.raises(UserInputError, match=f"here: label {label} is not one of the 2 classes"):
            to_images([image], [label], ["a", "b"], Preparation(), "here")
    shutil.copytree(folders / "train", tmp_path / "broken")
    (tmp_path / "broken" / "red" / "0.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    shutil.copytree(folders / "test" / "red", tmp_path / "others" / "red")
    shutil.copytree(folders / "test" / "red", tmp_path / "others" / "pink")
    for train_dir, validation_dir, message in (
        (tmp_path / "none", folders / "test", "--train_dir .*none: no such folder"),
        (tmp_path / "empty", folders / "test", "--train_dir .*empty: "),
        (tmp_path / "broken", folders / "test", "--train_dir .*broken: an image cannot be read"),
        (
            folders / "train",
            tmp_path / "others",
            r"must have the classes of --train_dir, \['blue', 'green', 'red'\], but has \['pink'",
        ),
    ):
        flags = {"train_dir": train_dir, "validation_dir": validation_dir, "cache_dir": tmp_path / "cache"}
        with pytest.raises(UserInputError, match=message):
            train.run(command(tmp_path / "out", **flags, image_size=8))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"resnet_depth": 21}, r"--resnet_depth 21: .*depth \(21\) must be 6n \+ 2"),
        ({"width_multiplier": 0}, r"width_multiplier \(0\) must be at least 1"),
        ({"train_dir": "a"}, "give one of --dataset_name, --train_dir and --idx_dir, not"),
        ({"idx_dir": None}, "give one of --dataset_name, --train_dir and --idx_dir, not none"),
        ({"idx_dir": None, "train_dir": "a"}, "--train_dir and --validation_dir must be given together"),
        ({"idx_dir": "/no/such"}, "--idx_dir /no/such: it contains neither train-images-idx3-ubyte"),
        ({"model_name_or_path": "/no/such"}, "/no/such"),
        ({"method": "pruning"}, "--method pruning needs --model_name_or_path"),
        ({"sparsity": "fixed"}, r"--sparsity \(fixed\) has no effect: --method dense prunes nothing"),
        ({"method": "wider"}, "invalid choice: 'wider'"),
        ({"method": "low_rank", "rank_scale": 0.5, "target_ratio": 0.5}, "low_rank: rank_scale and target_ratio ex"),
        ({"method": "low_rank", "rank_scale": -1.0}, r"rank_scale \(-1.0\) must be"),
        ({"method": "low_rank", "include": "nowhere"}, "'nowhere' matches no layer"),
        ({"lr_milestones": "0.5 1.5"}, r"--lr_milestones \(1.5\) must be above 0 and below 1"),
        ({"crop_padding": -1}, r"--crop_padding \(-1\) must be at least 0"),
        ({"max_train_samples": 700}, "need 100 images of class 0, but there are 12"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length. must be one of .'random', 'seq"),
        ({"per_device_train_batch_size": 90}, "84 samples, fewer than one global batch of 90"),
        ({"optimizer": "adagrad"}, "invalid choice: 'adagrad'"),
        ({"target_ratio": 0.1}, r"--target_ratio \(0.1\) has no effect: --method dense factorizes nothing"),
        ({"model_name_or_path": "a", "resnet_depth": 56}, r"--resnet_depth \(56\) has no effect"),
        ({"factor_init": "default"}, r"--factor_init \(default\) has no effect: --method dense"),
        ({"lr_scheduler_type": "cosine", "lr_milestones": 0.1}, "--lr_milestones .*: --lr_scheduler_type is cosine"),
        ({"validation_samples": 7}, r"--validation_samples \(7\) has no effect: it needs --eval_strategy"),
        ({"image_column_name": "img"}, "--image_column_name .*: it needs --dataset_name"),
        ({"load_best_model_at_end": "true", "eval_strategy": "epoch", "save_strategy": "epoch"}, "needs held-out"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused(flags, message, idx_dir, tmp_path):
    with pytest.raises(UserInputError, match=message):
        train.run(command(tmp_path / "out", **{"idx_dir": idx_dir} | flags))
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_status_2(tmp_path):
    words = [sys.executable, str(ROOT / SCRIPT), *command(tmp_path / "out", idx_dir=tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("train.py: error: --idx_dir")
