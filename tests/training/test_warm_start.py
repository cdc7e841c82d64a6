"""Dense up to a step, then products: the switch, the optimizer's state, and runs that stop on either side of it."""

import json
import re
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, get_scheduler
from transformers.trainer_utils import SchedulerType

import run_pretrain
from fnl_hf import FactorizationConfig, FnlBertConfig, FnlBertForMaskedLM, UserInputError, factorize, find_products
from fnl_hf.data.masking import MaskedLMDataset, MaskingTransform
from fnl_hf.data.packing import separate_documents
from fnl_hf.optim import FrobeniusAdamW
from fnl_hf.surgery.checkpoints import factorized_layers
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.optimizers import build_optimizer
from fnl_hf.training.pretraining_arguments import ModelArguments
from fnl_hf.training.warm_start import (
    SAMPLES,
    WarmStart,
    WarmStartCallback,
    as_done,
    calibration_batches,
    carry_state,
    plan_factorization,
    plan_warm_start,
    project_moments,
    replace_parameters,
    resize_schedule,
)
from tests.conftest import STREAM, assert_same_weights, needs_muon, pretraining

FLAGS = {"max_train_samples": 61, "save_steps": 1, "logging_steps": 1, "factorize_at_step": 4}


def model_flags(**flags):
    return ModelArguments(**{name: float(v) if name == "factorize_at_step" else v for name, v in flags.items()})


def run(corpus, folder, **flags):
    run_pretrain.run([str(word) for word in pretraining(corpus, folder, **FLAGS | flags)])
    return folder


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Twelve steps, seven an epoch, with dropout; the layers are products after the fourth."""
    return run(corpus, tmp_path_factory.mktemp("warm") / "whole")


def history(folder):
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "data_wait", "peak_memory", "mfu")
    return [{key: value for key, value in row.items() if not any(t in key for t in timed)} for row in rows]


def assert_goes_on_exactly(whole, corpus, out, stopped, **flags):
    """The copy in ``out`` of a finished run, without what came after step ``stopped``, ends as the run has ended."""
    shutil.copytree(whole, out)
    (out / "all_results.json").unlink()
    for step in range(stopped + 1, 13):
        shutil.rmtree(out / f"checkpoint-{step}")
    run(corpus, out, resume_from_checkpoint="auto", **flags)
    assert_same_weights(whole, out)
    assert [row for row in history(whole) if "loss" in row] == [row for row in history(out) if "loss" in row]
    for file in ("optimizer.pt", "scheduler.pt"):
        there, here = (torch.load(folder / "checkpoint-12" / file, weights_only=True) for folder in (whole, out))
        assert there.get("param_groups") == here.get("param_groups")
        torch.testing.assert_close(there.get("state", there), here.get("state", here), rtol=0, atol=0)


@pytest.mark.parametrize("stopped", [3, 4, 5, 8])
def test_a_run_goes_on_from_either_side_of_the_switch_to_the_last_bit(whole, corpus, tmp_path, stopped):
    assert_goes_on_exactly(whole, corpus, tmp_path / "out", stopped)


def test_a_stream_goes_on_likewise(finished_runs, corpus, tmp_path):
    flags = STREAM | {"tokenizer_name": finished_runs.run, "max_train_samples": None}
    whole = run(corpus, tmp_path / "whole", **flags)
    assert_goes_on_exactly(whole, corpus, tmp_path / "out", 4, **flags)


def test_pairs_of_segments_accumulated_micro_batches_and_lamb_likewise(corpus, tmp_path):
    flags = {"objective": "mlm_nsp", "optimizer": "lamb", "gradient_accumulation_steps": 2, "max_train_samples": None,
             "per_device_train_batch_size": 4, "max_seq_length": 19}  # fmt: skip
    whole = run(corpus, tmp_path / "whole", **flags)
    assert not [name for name in json.loads((whole / "config.json").read_text())["quantization_config"]["layers"]
                if not name.startswith("encoder.layer.")]  # fmt: skip
    assert_goes_on_exactly(whole, corpus, tmp_path / "out", 5, **flags)


def test_the_switch_is_where_it_was_asked_for_and_leaves_the_size_that_was_asked_for(whole):
    def config(step):
        return json.loads((whole / f"checkpoint-{step}" / "config.json").read_text())

    assert (
        "quantization_config" not in config(4) and config(5)["quantization_config"] == config(12)["quantization_config"]
    )
    model, dense = (AutoModelForMaskedLM.from_pretrained(whole / f"checkpoint-{step}") for step in (12, 4))
    matrices = [
        sum(p.numel() for name, p in each.bert.encoder.named_parameters() if p.dim() == 2) for each in (model, dense)
    ]
    assert 0.47 < matrices[0] / matrices[1] <= 0.5
    assert type(model.cls.predictions.transform.dense) is torch.nn.Linear
    switches = [row for row in history(whole) if "factorized_layers" in row]
    assert switches == [{"factorized_layers": len(factorized_layers(model)), "epoch": 4 / 7, "step": 4}]
    assert (whole / "training_report.png").is_file()
    assert "dense for 4 steps, then the encoder's layers as products with 0.5 of" in (whole / "README.md").read_text()


def test_a_run_that_was_made_longer_keeps_its_switch():
    planned = WarmStart(8, FactorizationConfig(), True)
    log = [{"loss": 1.0, "step": 1}, {"factorized_layers": 6, "step": 4}, {"factorized_layers": 6, "step": 7}]
    assert (as_done(planned, log).step, as_done(planned, log[:1]), as_done(None, log)) == (4, planned, None)


def test_the_schedule_goes_on(whole):
    """Linear from 0.01 to 0 in twelve steps; the rate that is logged is the one that the step had."""
    rates = [row["learning_rate"] for row in history(whole) if "learning_rate" in row]
    assert rates == pytest.approx([0.01 * (1 - step / 12) for step in range(12)], rel=1e-12)


def test_the_best_model_is_one_of_those_after_the_switch(corpus, tmp_path):
    """By the highest loss, which the first evaluation has."""
    flags = {"load_best_model_at_end": "true", "eval_strategy": "steps", "eval_steps": 1, "greater_is_better": "true"}
    out = run(corpus, tmp_path / "out", **flags)
    losses = {row["step"]: row["eval_loss"] for row in history(out) if "eval_loss" in row and row["step"] < 13}
    state = json.loads((out / "trainer_state.json").read_text())
    best = state["best_global_step"]
    assert max(losses, key=losses.__getitem__) <= 4 < best
    assert losses[best] == max(loss for step, loss in losses.items() if step > 4)
    assert_same_weights(out, out / f"checkpoint-{best}")


@pytest.mark.parametrize("at, epochs, steps, expected", [
    (0, None, 100, 0), (0.29, None, 100, 29), (0.999, None, 100, 99), (1, None, 100, 1), (99, None, 100, 99),
    (0.5, 1.5, -1, 5),  # 61 samples, 8 a step: 7 steps an epoch, 11 in all
    (10, 1.5, -1, 10),
])  # fmt: skip
def test_a_step_or_a_share_of_the_run(dimensions, tmp_path, at, epochs, steps, expected):
    args = FnlTrainingArguments(
        str(tmp_path), do_train=True, use_cpu=True, max_steps=steps, num_train_epochs=epochs or 3.0,
        per_device_train_batch_size=8,
    )  # fmt: skip
    flags = model_flags(factorize_at_step=at)
    model = FnlBertForMaskedLM(FnlBertConfig(**dimensions))
    assert plan_warm_start(flags, args, model, range(61)).step == expected
    assert plan_warm_start(SimpleNamespace(factorize_at_step=None), args, model, range(61)) is None


@pytest.mark.parametrize("flags, said", [
    ({"factorize_mode": "deep", "factorize_init": "ones"}, "init ones needs --factorize_mode low_rank, not deep"),
    ({"factorize_include": ["pooler.*", "nothing"]}, "include: 'pooler.*' matches no layer that can be factorized"),
])  # fmt: skip
def test_what_cannot_be_factorized_is_refused_before_training(dimensions, flags, said):
    model, args = FnlBertForMaskedLM(FnlBertConfig(**dimensions)), SimpleNamespace(seed=0)
    with pytest.raises(UserInputError, match=re.escape(f"--factorize_{said}")):
        plan_factorization(model_flags(factorize_at_step=1, **flags), args.seed, model, 1)


@pytest.mark.parametrize("share, start, is_calibrated", [
    (0, None, False), (0.001, None, False), (0, "a-bert", True), (0.2, None, True),
])  # fmt: skip
def test_only_a_trained_network_calibrates_by_default(dimensions, tmp_path, share, start, is_calibrated):
    args = FnlTrainingArguments(str(tmp_path), do_train=True, use_cpu=True, max_steps=200)
    model = FnlBertForMaskedLM(FnlBertConfig(**dimensions))
    for init, expected in ((None, is_calibrated), ("calibrated", True), ("spectral", False)):
        flags = model_flags(factorize_at_step=share, model_name_or_path=start, factorize_init=init)
        assert plan_warm_start(flags, args, model, range(61)).is_calibrated is expected


def test_padding_does_not_calibrate(tokenizer, tmp_path):
    """Short rows would fill up their masked positions with the first token."""
    rows = separate_documents(
        datasets.Dataset.from_dict({"text": ["fox", "dog " * 30]}), tokenizer, 23, cache_dir=str(tmp_path)
    )
    data = MaskedLMDataset(rows, MaskingTransform(tokenizer, 0.3, seed=5))
    (batch,) = calibration_batches(data, 2)
    assert set(batch) == {"input_ids", "attention_mask"} and batch["attention_mask"].sum().item() == sum(rows["length"])


FEED_FORWARD = ["layer.[0-9].intermediate.dense", "layer.[0-9].output.dense"]


@pytest.mark.parametrize("mode, init, factors, keeps", [
    ("wide", None, 2, True), ("wide", "default", 2, False), ("deep", "spectral", 3, True),
    ("low_rank", "ones", 2, False), ("low_rank", "rates", 2, False), ("low_rank", "spectral", 2, False),
])  # fmt: skip
def test_the_layers_become_the_products_that_were_asked_for(dimensions, batch, tmp_path, mode, init, factors, keeps):
    args = FnlTrainingArguments(str(tmp_path), do_train=True, use_cpu=True, learning_rate=0.1, max_steps=9)
    model = FnlBertForMaskedLM(FnlBertConfig(**dimensions)).eval()
    flags = model_flags(factorize_at_step=0, factorize_mode=mode, factorize_init=init, factorize_include=FEED_FORWARD)
    callback = WarmStartCallback(SimpleNamespace(model_wrapped=model), plan_warm_start(flags, args, model, range(61)))
    optimizer = build_optimizer(args, model)
    with torch.no_grad():
        before = model(**batch).logits
        callback._factorize(args, model, optimizer)
        after = model(**batch).logits
    layers = factorized_layers(model)
    assert sorted(layers) == [f"encoder.layer.{index}.{name}.dense" for index in (0, 1)
                              for name in ("intermediate", "output")]  # fmt: skip
    products = find_products(model)[4:]
    assert [len(product.weights) for product in products] == 4 * [factors]
    assert torch.allclose(before, after, atol=1e-5) == keeps
    left, right = products[0].factors()[0], products[0].factors()[-1]
    rank = left.shape[2]  # of 35 x 42, half of whose entries are 9.5 · (35 + 42)
    assert rank in ((9, 10) if mode == "low_rank" else (35,))
    values = torch.linalg.svdvals(left @ right.mT)[0, :rank]
    if init == "ones":
        torch.testing.assert_close(values, torch.ones_like(values))
    if init == "rates":  # a step of U counts √(42/r) times as much, one of V as much less
        torch.testing.assert_close(right.square().sum(), left.square().sum() * (42 / rank) ** 2)


def test_a_run_over_epochs_switches_at_its_share_of_them(corpus, tmp_path):
    out = run(corpus, tmp_path / "out", max_steps=None, num_train_epochs=1.5, factorize_at_step=0.5, save_strategy="no")
    assert [row["step"] for row in history(out) if "factorized_layers" in row] == [5]
    assert json.loads((out / "trainer_state.json").read_text())["max_steps"] == 11


@pytest.mark.parametrize("environment, compiled, said", [
    ({"ACCELERATE_USE_FSDP": "true"}, False, "uses FSDP$"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, False, "uses torch.compile$"),
    ({}, True, "uses torch.compile$"),
])  # fmt: skip
def test_what_holds_on_to_layers_is_refused(dimensions, monkeypatch, environment, compiled, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = SimpleNamespace(do_train=True, torch_compile=compiled)
    model = FnlBertForMaskedLM(FnlBertConfig(**dimensions))
    with pytest.raises(UserInputError, match=r"^--factorize_at_step \(4\) works without FSDP .*" + said):
        plan_warm_start(SimpleNamespace(factorize_at_step=4.0), args, model, range(61))


def test_a_model_with_factorized_layers_is_refused(whole, corpus, tmp_path):
    with pytest.raises(
        UserInputError, match=r"^--factorize_at_step \(4\) needs a dense model: \d+ layers of .*whole are"
    ):
        run(corpus, tmp_path / "out", model_name_or_path=whole)
    assert not (tmp_path / "out").exists()


# ---- the optimizer ----


def adam_states(gradients, *weights):
    """Of torch's Adam, after autograd has taken ⟨G, W⟩ of each G, W the weight or the product of two; nothing moves."""
    weights = [weight.clone().requires_grad_() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=0.0, amsgrad=True)
    for gradient in gradients:
        optimizer.zero_grad()
        (gradient * (weights[0] @ weights[1] if len(weights) == 2 else weights[0])).sum().backward()
        optimizer.step()
    return [optimizer.state[weight] for weight in weights]


def test_moments_are_those_that_the_factors_would_have():
    """The first ones for any gradients, the second ones where no two entries of a gradient share a row or column."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3, 2), (2, 5)))
    dense = [torch.randn(3, 5, generator=draw, dtype=torch.float64) for _ in range(7)]
    sparse = [gradient * torch.eye(5).roll(step, 1)[:3] for step, gradient in enumerate(dense)]
    for gradients, names in ((dense, ["exp_avg"]), (sparse, ["exp_avg", "exp_avg_sq"])):
        (of_weight,) = adam_states(gradients, u @ v)
        for found, expected in zip(project_moments(of_weight, u, v), adam_states(gradients, u, v), strict=True):
            assert found.keys() == expected.keys() and found["step"] == 7
            for name in names:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)
            assert found["max_exp_avg_sq"].shape == found["exp_avg"].shape and (found["max_exp_avg_sq"] >= 0).all()
    assert project_moments({}, u, v) == ({}, {})
    assert project_moments({"momentum_buffer": None}, u, v)[0] == {"momentum_buffer": None}


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", pytest.param("muon", marks=needs_muon)])
def test_an_optimizer_goes_on_with_the_factors(dimensions, batch, tmp_path, name):
    args = FnlTrainingArguments(str(tmp_path), do_train=True, use_cpu=True, optimizer=name, learning_rate=0.1,
                                optim_args="adamw_lr=0.5" if name == "muon" else None)  # fmt: skip
    model = FnlBertForMaskedLM(FnlBertConfig(**dimensions))
    optimizer = build_optimizer(args, model)

    def step():
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()

    step()
    for group in optimizer.param_groups:
        group["lr"] = 0.05 if group.get("use_muon") is False else 0.03  # as a schedule has it

    def moment(parameter):
        entries = optimizer.state[parameter]
        return entries["exp_avg"] if "exp_avg" in entries else entries["momentum_buffer"]

    before = dict(model.named_parameters())
    kept = {name: moment(parameter).clone() for name, parameter in before.items()}
    factorize(model, FactorizationConfig(include=["encoder.layer.*"]), calibration=[batch])
    replace_parameters(optimizer, build_optimizer(args, model), carry_state(optimizer.state, before, model))

    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    with_muon = {"linear": 0.03, "decay_adamw": 0.05, "plain": 0.05}
    assert rates == (with_muon if name == "muon" else {"linear": 0.03, "decay": 0.03, "plain": 0.03})
    layer = model.bert.encoder.layer[1].intermediate.dense
    of_weight = kept.pop("bert.encoder.layer.1.intermediate.dense.weight")
    torch.testing.assert_close(moment(layer.left), of_weight @ layer.right.T)
    torch.testing.assert_close(moment(layer.right), layer.left.T @ of_weight)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(moment(parameter), kept[name]), name
    states = optimizer.state_dict()
    fresh = build_optimizer(args, model)
    fresh.load_state_dict(states)  # as a run does that goes on
    after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step()
    assert not [name for name, parameter in model.named_parameters()
                if parameter.dim() == 2 and torch.equal(parameter, after[name])]  # fmt: skip


@pytest.mark.parametrize("kind", list(SchedulerType), ids=lambda kind: kind.value)
def test_every_schedule_goes_on_with_more_groups_and_fewer(kind):
    """As one whose groups stay; two of them have three loads of steps, others come between."""
    kwargs = {"cosine_with_min_lr": {"min_lr": 0.01}, "warmup_stable_decay": {"num_decay_steps": 4},
              "cosine_warmup_with_min_lr": {"min_lr": 0.01}}.get(kind.value)  # fmt: skip

    def make(groups):
        return FrobeniusAdamW([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(groups)], lr=0.1)

    optimizers = [make(2), make(2)]
    schedules = [get_scheduler(kind, each, 2, 12, kwargs) for each in optimizers]
    for step in range(12):
        if step in (5, 8):
            like = replace_parameters(optimizers[1], make(3 if step == 5 else 1), {})
            resize_schedule(schedules[1], like)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step(*([float(step)] if kind in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY) else []))
        assert {group["lr"] for each in optimizers for group in each.param_groups} == {
            optimizers[0].param_groups[0]["lr"]
        }
    rates = schedules[1].state_dict()
    for name in ("base_lrs", "_last_lr", "min_lrs"):
        assert len(rates.get(name, [0])) == 1, name


def test_a_schedule_goes_on_with_the_rates_of_both_rules():
    def make(*rules):
        groups = [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "use_muon": rule} for rule in rules]
        return FrobeniusAdamW([group | {"lr": 0.1 if group["use_muon"] else 0.2} for group in groups])

    optimizer = make(True, False)
    schedule = get_scheduler("linear", optimizer, 0, 10)
    optimizer.step()
    schedule.step()
    like = replace_parameters(optimizer, make(True, False, False, True), {})
    resize_schedule(schedule, like)
    assert like == [0, 1, 1, 0]
    for expected in ([0.09, 0.18, 0.18, 0.09], [0.08, 0.16, 0.16, 0.08]):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
        optimizer.step()
        schedule.step()


# ---- the data ----


class Dataset:
    """Says which samples were asked for."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitems__(self, indices):
        return {"input_ids": torch.tensor(indices), "labels": torch.tensor(indices), "max_length_q": 5}


@pytest.mark.parametrize("length, expected", [(7, list(range(7))), (1021, None)])
def test_calibration_takes_samples_from_all_over_the_data_and_no_labels(length, expected):
    batches = list(calibration_batches(Dataset(length), 3))
    assert all(batch.keys() == {"input_ids", "max_length_q"} for batch in batches)
    found = np.concatenate([batch["input_ids"] for batch in batches]).tolist()
    assert max(len(batch["input_ids"]) for batch in batches) == 3
    assert expected in (None, found)
    assert len(found) == len(set(found)) == min(length, SAMPLES) and found[0] == 0 and found[-1] == length - 1
