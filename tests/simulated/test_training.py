"""What surrounds a training step, on a simulated GPU: masking, Trainer, the guard, the meter, diagnostics, answers."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from fnl_hf import FnlBertConfig, FnlBertForMaskedLM, FnlBertForPreTraining, FnlBertForQuestionAnswering, ask
from fnl_hf.data.masking import MaskingTransform, collate_batch
from fnl_hf.products.diagnostics import DIAGNOSTICS, diagnose_products
from fnl_hf.reports.callbacks import logged_diagnostics
from fnl_hf.reports.throughput import ThroughputMeter
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.guard import LossGuard, nan_unless_finite
from fnl_hf.training.metrics import pretraining_statistics
from fnl_hf.training.trainer import FnlTrainer
from tests.simulated_cuda import DEVICE, SimulatedCuda

ROWS, LENGTH, STEPS = 24, 11, 6


class Pairs(torch.utils.data.Dataset):
    """Segment pairs with padding, masked positions and sentence labels, served as batches."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(5, 53, (ROWS, LENGTH), generator=generator)
        positions = torch.rand(ROWS, LENGTH, generator=generator).argsort(1)[:, :3]
        mask = torch.ones_like(ids)
        mask[::2, 7:] = 0
        self.columns = {
            "input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2, "masked_positions": positions,
            "labels": ids.gather(1, positions), "next_sentence_label": ids[:, 0] % 2,
        }  # fmt: skip

    def __len__(self):
        return ROWS

    def __getitems__(self, indices):
        return {name: values[indices] for name, values in self.columns.items()}


class WaitsOfEachStep(TrainerCallback):
    def __init__(self, gpu):
        self.gpu, self.steps = gpu, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.gpu.reset()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(list(self.gpu.waits))


def trainer_on_device(folder, dimensions, gpu, **flags):
    config = FnlBertConfig(**dimensions, attention_embedding_size=21, sparse_last_layer=True)
    args = FnlTrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=STEPS, report_to="none", logging_steps=STEPS,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        accelerator_config={"non_blocking": True}, **flags,
    )  # fmt: skip
    assert args.device.type == "cuda"
    counter = WaitsOfEachStep(gpu)
    trainer = FnlTrainer(
        FnlBertForPreTraining(config), args, train_dataset=Pairs(), data_collator=collate_batch, callbacks=[counter]
    )
    # Pinning needs CUDA itself; copies from pinned memory are those that do not block.
    trainer.args.dataloader_pin_memory = True
    trainer.get_train_dataloader = lambda: trainer.accelerator.prepare(
        torch.utils.data.DataLoader(Pairs(), batch_size=4, collate_fn=collate_batch)
    )
    return trainer, counter


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer": "adamw"},
        {"optimizer": "lamb", "gradient_accumulation_steps": 2},
        {"optimizer": "sgd", "max_grad_norm": 0.0},
    ],
)
def test_no_step_of_trainers_waits_but_the_first_and_the_logged_one(tmp_path, dimensions, flags):
    with SimulatedCuda() as gpu:
        trainer, counter = trainer_on_device(tmp_path, dimensions, gpu, **flags)
        trainer.train()
        assert {parameter.device for parameter in trainer.model.parameters()} == {DEVICE}
        assert len(counter.steps) == STEPS
        assert counter.steps[1:-1] == [[]] * (STEPS - 2)
        assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_the_guard_decides_without_a_wait():
    with SimulatedCuda() as gpu:
        loss = torch.tensor(3.0, device="cuda")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3).to("cuda"))], 0.1, fused=True)
        optimizer.state["made"] = True
        trainer = SimpleNamespace(accelerator=SimpleNamespace(scaler=None), _tr_loss=loss)
        guard = LossGuard(trainer)
        state = SimpleNamespace(log_history=[])
        guard.on_train_begin(SimpleNamespace(device=DEVICE), state, None, optimizer=optimizer)
        gpu.reset()
        for norm in (2.0, math.nan):
            guard.on_step_begin(None, state, None)
            loss += nan_unless_finite(torch.full((), norm, device="cuda"))
            guard.examine(torch.full((), norm, device="cuda"))
        assert not gpu.waits
        assert [loss.item(), guard.not_counted.item(), optimizer.found_inf.item()] == [5.0, 1.0, 1.0]


def test_the_meter_counts_without_a_wait(dimensions):
    with SimulatedCuda() as gpu:
        model = FnlBertForMaskedLM(FnlBertConfig(**dimensions, sparse_prediction=True)).to("cuda")
        meter = ThroughputMeter(model, DEVICE, torch.float32, lambda rows: rows)
        ids = torch.ones(5, 11, dtype=torch.long).to("cuda")
        mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [1] * 11, [1] * 3 + [0] * 8, [1] * 11]).to("cuda")
        gpu.reset()
        batches = [{"input_ids": ids, "attention_mask": mask, "labels": ids}] * 2
        assert len(list(meter.batches(iter(batches)))) == 2
        assert not gpu.waits
        meter.stop()
        assert meter.close_window()["tokens_per_second"] > 0 and gpu.waits


def test_diagnostics_wait_once_for_each_shape_and_once_to_be_logged(dimensions):
    model = FnlBertForMaskedLM(FnlBertConfig(**dimensions, attention_embedding_size=21))
    expected = logged_diagnostics(model, 0.1)
    with SimulatedCuda() as gpu:
        model.to("cuda")
        gpu.reset()
        figures = diagnose_products(model.factor_pairs(), 0.1)
        assert len(gpu.waits) == 1  # all four products have heads of one shape
        assert {figures[name][key].device for name in figures for key in DIAGNOSTICS} == {DEVICE}
        gpu.reset()
        assert logged_diagnostics(model, 0.1) == pytest.approx(expected)
        assert len(gpu.waits) == 2


def test_masked_batches_go_to_the_device_and_are_scored_there(tokenizer, dimensions):
    transform = MaskingTransform(tokenizer, 0.3, seed=3, documents="mask")
    batch = transform(np.random.default_rng(0).integers(5, 100, (5, 11)), np.arange(5))
    model = FnlBertForMaskedLM(FnlBertConfig(**dimensions | {"vocab_size": len(tokenizer)})).eval()
    with torch.no_grad():
        expected = pretraining_statistics(model(**batch).logits, batch["labels"])
        with SimulatedCuda() as gpu:
            model.to("cuda")
            there = {name: values.to("cuda", non_blocking=True) for name, values in batch.items()}
            gpu.reset()
            logits = model(**there).logits
            assert not gpu.waits
            found = pretraining_statistics(logits, there["labels"])
            torch.testing.assert_close(found.cpu(), expected)


def test_questions_are_answered_on_the_models_device(tokenizer):
    torch.manual_seed(4)
    sizes = {"hidden_size": 42, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 35}
    config = FnlBertConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=64)
    model = FnlBertForQuestionAnswering(config)
    questions, contexts = ["who jumps?", "what?"], ["the quick brown fox jumps", "pack my box with five dozen jugs"]
    expected = ask(model, questions, contexts, tokenizer, max_seq_length=40, doc_stride=8)
    with SimulatedCuda() as gpu:
        model.to("cuda")
        gpu.reset()
        found = ask(model, questions, contexts, tokenizer, max_seq_length=40, doc_stride=8)
        assert {wait.where.split(":")[0] for wait in gpu.waits} == {"fnl_hf/squad/inference.py"}
    assert [answer["answer"] for answer in found] == [answer["answer"] for answer in expected]
