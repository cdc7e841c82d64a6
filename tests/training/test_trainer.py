"""Losses are means over the whole global batch, however it is cut."""

import copy
import signal
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, Trainer, TrainerCallback, TrainingArguments

import fnl_hf
from fnl_hf import FnlBertConfig, FrobeniusAdamW, UserInputError, frobenius_param_groups
from fnl_hf.data.masking import collate_batch
from fnl_hf.errors import TrainingDiverged
from fnl_hf.runs.command_line import run_script
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.trainer import FnlTrainer, build_trainer

LENGTH = 11


class Rows(torch.utils.data.Dataset):
    """Eight rows with unequal numbers of labels, served as batches."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return 8

    def __getitems__(self, indices):
        return {name: values[indices] for name, values in self.columns.items()}


def rows(head):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 53, (8, LENGTH), generator=generator)
    masked = torch.full_like(ids, -100)
    for row in range(8):  # row r has r labels, so the first has none
        masked[row, :row] = ids[row, :row]
    sentence = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    start = torch.tensor([1, 2, 3, 4, 5, 6, 7, 50])  # the last is outside and ignored
    columns = {
        "ForMaskedLM": {"labels": masked},
        "ForPreTraining": {"labels": masked, "next_sentence_label": sentence},
        "ForNextSentencePrediction": {"labels": sentence},
        "ForSequenceClassification": {"labels": sentence},
        "ForTokenClassification": {"labels": torch.where(masked < 0, -100, masked % 2)},
        "ForQuestionAnswering": {"start_positions": start, "end_positions": start + 2},
    }[head]
    return Rows({"input_ids": ids} | columns)


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(trainer_class, arguments_class, model, dataset, folder, batch_size, accumulation):
    """The logged loss and the gradients of one optimizer step on all eight rows."""
    args = arguments_class(
        str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1,
        use_cpu=True, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        remove_unused_columns=False,
    )  # fmt: skip
    capture = Gradients()
    trainer = trainer_class(
        copy.deepcopy(model), args, train_dataset=dataset, data_collator=collate_batch, callbacks=[capture]
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], capture.gradients


def build(family, head, dimensions):
    dimensions |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = FnlBertConfig(**dimensions, sparse_prediction=True) if family == "FnlBert" else BertConfig(**dimensions)
    model = getattr(fnl_hf if family == "FnlBert" else transformers, family + head)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    "family, head, trainer_class, arguments_class",
    [
        *[("FnlBert", head, FnlTrainer, FnlTrainingArguments) for head in (
            "ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction", "ForSequenceClassification",
            "ForTokenClassification", "ForQuestionAnswering",
        )],
        ("Bert", "ForQuestionAnswering", FnlTrainer, FnlTrainingArguments),
        ("Bert", "ForNextSentencePrediction", FnlTrainer, FnlTrainingArguments),
        ("FnlBert", "ForMaskedLM", Trainer, TrainingArguments),
        ("FnlBert", "ForTokenClassification", Trainer, TrainingArguments),
        ("FnlBert", "ForSequenceClassification", Trainer, TrainingArguments),
    ],
)  # fmt: skip
def test_accumulation_changes_neither_loss_nor_gradient(
    tmp_path, dimensions, family, head, trainer_class, arguments_class
):
    model = build(family, head, dimensions)
    dataset = rows(head)
    if family == "Bert" and head == "ForQuestionAnswering":  # a stock head's loss is NaN for an ignored row alone
        dataset.columns["start_positions"] = dataset.columns["start_positions"].clamp(max=LENGTH - 1)
        dataset.columns["end_positions"] = dataset.columns["end_positions"].clamp(max=LENGTH - 1)
    whole = one_step(trainer_class, arguments_class, model, dataset, tmp_path, 8, 1)
    parts = one_step(trainer_class, arguments_class, model, dataset, tmp_path, 2, 4)
    model.eval()  # without dropout; the stock definition of each loss, on the whole batch
    stock = getattr(transformers, "Bert" + head)(BertConfig(**dimensions)).eval()
    stock.load_state_dict(model.state_dict())
    expected = stock(**dataset.__getitems__(list(range(8)))).loss.item()
    assert whole[0] == pytest.approx(expected, rel=1e-4) and parts[0] == pytest.approx(expected, rel=1e-4)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_sparse_prediction_is_the_full_head_s_loss(dimensions):
    model = build("FnlBert", "ForMaskedLM", dimensions).eval()
    inputs = rows("ForMaskedLM").__getitems__(list(range(8)))
    sparse = model(**inputs)
    model.config.sparse_prediction = False
    full = model(**inputs)
    assert sparse.logits.shape == (28, 53) and full.logits.shape == (8, LENGTH, 53)
    torch.testing.assert_close(sparse.logits, full.logits[inputs["labels"] != -100])
    torch.testing.assert_close(sparse.loss, full.loss)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs).loss == 0.0, "no masked token is no loss, not NaN"


def test_regression_and_multi_label_losses_are_stock_s(dimensions):
    for labels, kwargs in (
        (torch.randn(8, dtype=torch.float32), {"num_labels": 1}),
        (torch.rand(8, 3), {"num_labels": 3}),
    ):
        config = FnlBertConfig(**dimensions, **kwargs)
        model = fnl_hf.FnlBertForSequenceClassification(config).eval()
        stock = transformers.BertForSequenceClassification(BertConfig(**dimensions, **kwargs)).eval()
        stock.load_state_dict(model.state_dict())
        ids = rows("ForMaskedLM").columns["input_ids"]
        torch.testing.assert_close(model(ids, labels=labels).loss, stock(ids, labels=labels).loss)
        assert model.config.problem_type == stock.config.problem_type


def test_one_line_gives_a_stock_trainer_the_same_optimizer(tmp_path, dimensions):
    model = build("FnlBert", "ForMaskedLM", dimensions)
    common = {
        "output_dir": str(tmp_path), "max_steps": 3, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "remove_unused_columns": False,
    }  # fmt: skip
    ours = FnlTrainer(
        copy.deepcopy(model),
        FnlTrainingArguments(**common, weight_decay=0.1, frobenius_decay=0.3),
        train_dataset=rows("ForMaskedLM"),
        data_collator=collate_batch,
    )
    other = copy.deepcopy(model)
    theirs = Trainer(
        other,
        TrainingArguments(**common),
        train_dataset=rows("ForMaskedLM"),
        data_collator=collate_batch,
        optimizers=(FrobeniusAdamW(frobenius_param_groups(other, 0.1, 0.3), lr=1e-2, fused=True), None),
    )
    ours.train()
    theirs.train()
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters()):
        assert torch.equal(a, b), name


def test_iterators_over_data_leave_the_generator_of_dropout_alone(tmp_path, dimensions):
    """Workers that persist need one iterator for all epochs, others one for each, a resumed run another number."""
    args = FnlTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = FnlTrainer(build("FnlBert", "ForMaskedLM", dimensions), args, data_collator=collate_batch)
    before = torch.get_rng_state()
    assert len(list(trainer.get_eval_dataloader(rows("ForMaskedLM")))) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_the_last_batch_is_dropped_in_training_alone(tmp_path, dimensions):
    args = FnlTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", dataloader_drop_last=True,
        per_device_train_batch_size=3, per_device_eval_batch_size=3,
    )  # fmt: skip
    model, data = build("FnlBert", "ForMaskedLM", dimensions), rows("ForMaskedLM")  # 8
    trainer = FnlTrainer(model, args, train_dataset=data, data_collator=collate_batch)
    loaders = trainer.get_train_dataloader(), trainer.get_eval_dataloader(data), trainer.get_test_dataloader(data)
    assert [len(loader) for loader in loaders] == [2, 3, 3] and args.dataloader_drop_last


class Normalized(nn.Module):
    """A model with a buffer that is seen, and a gradient that is left from somewhere."""

    def __init__(self):
        super().__init__()
        self.norm, self.seen = nn.BatchNorm1d(3, affine=False), []
        self.linear = nn.Linear(3, 2)
        self.linear.bias.grad = torch.full((2,), 0.1)
        self.norm.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, x, labels=None):
        self.seen.append((x.dtype, self.norm.running_mean.dtype, self.linear.weight.dtype))
        logits = self.linear(self.norm(x.to(self.linear.weight.dtype)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("flag, dtype", [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)])
@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_in_half_precision_leaves_the_model_as_it_was(tmp_path, flag, dtype, fails):
    """Trainer casts it in place; what trains, evaluates, predicts or saves afterwards must not see that."""
    model = Normalized()
    tensors = [*model.parameters(), *model.buffers(), model.linear.bias.grad]
    before = [tensor.clone() for tensor in tensors]
    args = FnlTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **{flag: True})
    data = Rows({"x": torch.randn(8, 3), "labels": torch.arange(8) % 2})
    trainer = FnlTrainer(model, args, eval_dataset=data, data_collator=collate_batch)
    if fails:
        trainer.compute_metrics = MagicMock(side_effect=ArithmeticError)
    for use in (trainer.evaluate, lambda: trainer.predict(data)):
        with pytest.raises(ArithmeticError) if fails else nullcontext():
            use()
        after = [*model.parameters(), *model.buffers(), model.linear.bias.grad]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(after, before, strict=True))
        assert [id(p) for p in model.parameters()] == [id(p) for p in tensors[:2]], "an optimizer has them"
    assert model.seen == [(torch.float32, dtype, dtype)] * 2


@pytest.mark.parametrize(
    "device, flags, expected",
    [("cpu", {}, False), ("meta", {}, True), ("meta", {"dataloader_pin_memory": False}, False),
     ("meta", {"accelerator_config": {"non_blocking": False}}, False)],
)  # fmt: skip
def test_batches_are_copied_to_an_accelerator_while_it_works(tmp_path, monkeypatch, device, flags, expected):
    monkeypatch.setattr(FnlTrainingArguments, "device", torch.device(device))
    args = FnlTrainingArguments(str(tmp_path), **flags)
    assert args.accelerator_config.non_blocking == expected


def test_a_process_uses_one_gpu(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    args = FnlTrainingArguments(str(tmp_path), per_device_train_batch_size=5, global_train_batch_size=35)
    assert (args.n_gpu, args.train_batch_size, args.gradient_accumulation_steps) == (1, 5, 7)
    assert (
        "3 GPUs are visible, but each process trains on one. To use all of them, start the script with `torchrun"
        in caplog.text
    )


@pytest.mark.parametrize("backend, error, status, left", [
    ("gloo", UserInputError("no such file"), 2, True),
    ("gloo", TrainingDiverged("three losses"), 3, True),
    ("nccl", UserInputError("no such file"), 2, False),
    ("nccl", TrainingDiverged("three losses"), 3, True),
])  # fmt: skip
def test_processes_part_before_they_end_with_a_status(monkeypatch, backend, error, status, left):
    """NCCL may wait for processes that do not end with this one; gloo never does."""
    sigterm = signal.getsignal(signal.SIGTERM)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    try:
        with pytest.raises(SystemExit) as end:
            run_script(MagicMock(side_effect=error))
        assert end.value.code == status and torch.distributed.is_initialized() == (not left)
    finally:
        signal.signal(signal.SIGTERM, sigterm)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "deepspeed, version, half, refused",
    [
        (True, None, None, "DeepSpeed and FSDP1 flatten parameters.*use FSDP2"),
        (False, 1, None, "DeepSpeed and FSDP1 flatten parameters.*use FSDP2"),
        (False, 2, "bf16_full_eval", "--bf16_full_eval and --fp16_full_eval cast the model, which does not"),
        (False, 2, "fp16_full_eval", "--bf16_full_eval and --fp16_full_eval cast the model, which does not"),
        (False, 2, None, None),
        (False, None, "bf16_full_eval", None),
    ],
)
def test_what_sharding_does_not_take_is_refused(deepspeed, version, half, refused):
    plugin = None if version is None else SimpleNamespace(fsdp_version=version)
    trainer = MagicMock(is_deepspeed_enabled=deepspeed)
    trainer.accelerator.state = SimpleNamespace(fsdp_plugin=plugin)
    trainer.args.bf16_full_eval, trainer.args.fp16_full_eval = half == "bf16_full_eval", half == "fp16_full_eval"
    with pytest.raises(UserInputError, match=refused) if refused else nullcontext():
        assert build_trainer(lambda **kwargs: trainer, args=SimpleNamespace(do_train=False)) is trainer
