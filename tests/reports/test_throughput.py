"""Throughput of runs whose clock is in our hands: what counts as training, what as waiting, and what as neither."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertForMaskedLM, BertForQuestionAnswering, ElectraForMaskedLM

import fnl_hf
from fnl_hf import (
    FnlBertConfig,
    FnlBertForMaskedLM,
    FnlBertForPreTraining,
    FnlBertForQuestionAnswering,
    FnlBertForTokenClassification,
)
from fnl_hf.data.masking import collate_batch
from fnl_hf.reports import callbacks, throughput
from fnl_hf.reports.callbacks import ReadablePrinterCallback, ReadableProgressCallback, TrainingClockCallback
from fnl_hf.reports.flops import training_flops
from fnl_hf.reports.throughput import ThroughputMeter
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.trainer import FnlTrainer, build_trainer
from tests.conftest import DIMENSIONS

FETCH, STEP, EVALUATE, SAVE, DIAGNOSE = 2.0, 5.0, 1000.0, 10000.0, 300.0
ROWS, LENGTH, LABELLED = 3, 11, 4
PEAK = 1e6


class Clock:
    """Seconds pass only when the test says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "device_peak_flops", lambda device, dtype: (PEAK, "by hand"))
    monkeypatch.setattr(callbacks, "logged_diagnostics", diagnose)
    return clock


class Rows(torch.utils.data.Dataset):
    """Whole batches, each fetched in ``FETCH`` seconds; the last two tokens of each row are padding."""

    def __init__(self, clock):
        self.clock = clock

    def __len__(self):
        return 8 * ROWS

    def __getitems__(self, indices):
        self.clock.now += FETCH
        ids = torch.full((len(indices), LENGTH), 7)
        labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
        labels[:, :LABELLED], mask[:, -2:] = 8, 0
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class TimedTrainer(FnlTrainer):
    """Steps, evaluations and checkpoints last as long as the test says."""

    def training_step(self, *args, **kwargs):
        self.train_dataset.clock.now += STEP
        return super().training_step(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        self.train_dataset.clock.now += EVALUATE
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self.train_dataset.clock.now += SAVE
        return super()._save_checkpoint(*args, **kwargs)


def diagnose(model, lr):
    model.clock.now += DIAGNOSE
    return {}


def train(clock, folder, checkpoint=None, **arguments):
    """Log entries and metrics of a run of six steps, with evaluations and checkpoints every two."""
    arguments = {
        "max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "use_cpu": True,
        "per_device_train_batch_size": ROWS, "disable_tqdm": True, "report_to": "none", "product_norms_steps": 3,
    } | arguments  # fmt: skip
    model = FnlBertForMaskedLM(FnlBertConfig(**DIMENSIONS, sparse_prediction=True))
    model.clock = clock
    held_out = Rows(Clock())  # what evaluation fetches is in EVALUATE
    trainer = build_trainer(
        TimedTrainer,
        model=model,
        args=FnlTrainingArguments(str(folder), **arguments),
        train_dataset=Rows(clock),
        eval_dataset=held_out,
        data_collator=collate_batch,
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    return [entry for entry in trainer.state.log_history if "loss" in entry], metrics


def test_windows_and_the_run_by_hand(clock, tmp_path):
    """Accelerate fetches one batch ahead, so that the first window fetches three for its two steps."""
    logged, metrics = train(clock, tmp_path)
    config = FnlBertConfig(**DIMENSIONS)
    tokens, flops = 2 * ROWS * (LENGTH - 2), 2 * ROWS * training_flops(config, LENGTH, LABELLED)
    for entry, fetched in zip(logged, (3, 2, 2)):
        seconds = 2 * STEP + fetched * FETCH
        assert entry["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert entry["data_wait"] == pytest.approx(fetched * FETCH / seconds)
        assert entry["mfu"] == pytest.approx(flops / (seconds * PEAK))
        assert 0.05 < entry["peak_memory_gb"] < 50
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    seconds = 4 * STEP + 4 * FETCH  # without the first window
    assert metrics["train_tokens_per_second"] == pytest.approx(2 * tokens / seconds)
    assert metrics["train_mfu"] == pytest.approx(2 * flops / (seconds * PEAK))
    assert metrics["train_data_wait"] == pytest.approx(4 * FETCH / seconds)
    assert metrics["train_mfu_peak"] == "1e-06 TFLOP/s per device: by hand"


def test_accumulation_ends_of_epochs_and_a_rest_without_a_log(clock, tmp_path):
    """Four steps of two batches an epoch; after the log of step 5 comes a last one that only the run's figures have."""
    logged, metrics = train(clock, tmp_path, gradient_accumulation_steps=2, logging_steps=5)
    (entry,) = logged
    batch = ROWS * (LENGTH - 2)
    # Eight batches in the first epoch, and of the second those of step 5 and one ahead.
    assert entry["tokens_per_second"] == pytest.approx(10 * batch / (10 * STEP + 11 * FETCH))
    assert metrics["train_tokens_per_second"] == pytest.approx(2 * batch / (2 * STEP + 2 * FETCH))


def test_a_run_of_one_window_and_a_resumed_run(clock, tmp_path):
    _, metrics = train(clock, tmp_path, max_steps=2, save_steps=2)
    batch = ROWS * (LENGTH - 2)
    assert metrics["train_tokens_per_second"] == pytest.approx(2 * batch / (2 * STEP + 3 * FETCH))
    logged, metrics = train(clock, tmp_path, str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in logged[-2:]] == [4, 6]
    # The run's figures are those of what came after the first window of this start.
    assert logged[-2]["tokens_per_second"] == pytest.approx(2 * batch / (2 * STEP + 3 * FETCH))
    assert metrics["train_tokens_per_second"] == pytest.approx(2 * batch / (2 * STEP + 2 * FETCH))


def meter(model, gather=lambda rows: rows):
    return ThroughputMeter(model, torch.device("cpu"), torch.float32, gather)


def take(meter, clock, batch, seconds):
    """One batch, fetched in FETCH seconds and trained on for ``seconds``."""

    def fetch():
        clock.now += FETCH
        yield batch

    for _ in meter.batches(fetch()):
        clock.now += seconds


def test_an_epoch_s_start_counts_and_what_is_done_before_it_does_not(clock):
    own, batch = meter(torch.nn.Linear(2, 3)), {"input_ids": torch.ones(ROWS, LENGTH, dtype=torch.long)}
    callback, nothing = TrainingClockCallback(own), SimpleNamespace(global_step=1)
    control = SimpleNamespace(should_log=False, should_evaluate=False, should_save=False)
    callback.on_train_begin(None, nothing, control)
    callback.on_epoch_begin(None, nothing, control)
    clock.now += 70.0  # before the first batch
    take(own, clock, batch, 6.0)
    callback.on_step_end(None, nothing, control)
    clock.now += 1.0
    control.should_save = True
    callback.on_epoch_end(None, nothing, control)
    clock.now += 100.0
    callback.on_epoch_begin(None, nothing, control)
    clock.now += 3.0  # workers start
    take(own, clock, batch, 6.0)
    own.stop()
    assert own.close_window()["tokens_per_second"] == pytest.approx(2 * ROWS * LENGTH / (2 * (6.0 + FETCH) + 1.0 + 3.0))


def test_processes_add_up_and_the_slowest_counts(clock):
    """The second process has half the tokens, waits three times as long and needs more memory."""

    def gather(rows):
        tokens, flops, seconds, waited, peak, _ = rows[0].tolist()
        return torch.cat([rows, torch.tensor([[tokens / 2, flops / 2, seconds, 3 * waited, peak, 7e13]])])

    config = FnlBertConfig(**DIMENSIONS)
    both = meter(FnlBertForMaskedLM(config), gather)
    take(both, clock, {"input_ids": torch.ones(ROWS, LENGTH, dtype=torch.long)}, 6.0)
    with both.paused():
        clock.now += 100.0
        figures = both.close_window()
    assert figures["tokens_per_second"] == pytest.approx(1.5 * ROWS * LENGTH / (6.0 + FETCH))
    assert figures["data_wait"] == pytest.approx(3 * FETCH / (6.0 + FETCH))
    assert figures["mfu"] == pytest.approx(1.5 * ROWS * training_flops(config, LENGTH, 0) / (8.0 * 2 * PEAK))
    assert figures["peak_memory_gb"] == pytest.approx(7e4)


@pytest.mark.parametrize(
    "model_class, entries, target, positions",
    [
        (FnlBertForMaskedLM, {"sparse_prediction": True}, "labels", LABELLED),
        (FnlBertForMaskedLM, {"sparse_prediction": True}, "masked_positions", (7, None)),
        (FnlBertForMaskedLM, {"sparse_prediction": True, "sparse_last_layer": True}, "masked_positions", (7, 7)),
        (FnlBertForPreTraining, {"sparse_prediction": True, "sparse_last_layer": True}, "masked_positions", (7, 8)),
        (FnlBertForMaskedLM, {}, "labels", LENGTH),
        (BertForMaskedLM, {}, "labels", LENGTH),
        (BertForQuestionAnswering, {}, "start_positions", 0),
        (FnlBertForQuestionAnswering, {}, "start_positions", 0),
        (FnlBertForTokenClassification, {"sparse_prediction": True}, "labels", 0),
        (ElectraForMaskedLM, {"embedding_size": 5}, "labels", None),
    ],
)
def test_flops_of_each_head(clock, model_class, entries, target, positions):
    model = model_class(model_class.config_class(**DIMENSIONS, **entries))
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    columns = {
        "labels": {"labels": torch.where(torch.arange(LENGTH).expand(ROWS, -1) < LABELLED, ids, -100)},
        "masked_positions": {"labels": torch.ones(ROWS, 7), "masked_positions": torch.ones(ROWS, 7)},
        "start_positions": {"start_positions": torch.ones(ROWS)},
    }[target]
    own = meter(model)
    take(own, clock, {"input_ids": ids} | columns, 6.0)
    with own.paused():
        figures = own.close_window()
    assert figures["tokens_per_second"] == pytest.approx(ROWS * LENGTH / 8.0)
    if positions is None:
        assert "mfu" not in figures
    else:
        predicted, last_layer = positions if isinstance(positions, tuple) else (positions, None)
        flops = ROWS * training_flops(model.config, LENGTH, predicted, last_layer)
        assert figures["mfu"] == pytest.approx(flops / (8.0 * PEAK))


def test_no_utilization_of_factorized_layers(clock):
    model = fnl_hf.factorize(FnlBertForMaskedLM(FnlBertConfig(**DIMENSIONS)))
    own = meter(model)
    take(own, clock, {"input_ids": torch.ones(ROWS, LENGTH, dtype=torch.long)}, 6.0)
    with own.paused():
        figures = own.close_window()
    assert figures["tokens_per_second"] > 0 and "mfu" not in figures


def test_the_progress_bar_shows_the_rate_and_prints_little():
    printed, shown = [], []
    callback = ReadableProgressCallback()
    callback.training_bar = SimpleNamespace(write=printed.append, set_postfix_str=shown.append)
    state = SimpleNamespace(is_world_process_zero=True)
    callback.on_log(None, state, None, logs={"norms/qk/a/bound": 1.0})
    logs = {"loss": 5.25, "grad_norm": 1.5, "learning_rate": 0.002, "tokens_per_second": 12345.6, "mfu": 0.41,
            "data_wait": 0.01, "peak_memory_gb": 0.7, "epoch": 0.1}  # fmt: skip
    callback.on_log(None, state, None, logs=dict(logs))
    assert shown == ["12,346 tokens/s"]
    assert printed == [str({"loss": "5.25", "learning_rate": "0.002", "tokens_per_second": "1.235e+04", "mfu": "0.41"})]
    callback.on_log(None, state, None, logs={"eval_loss": 5.5, "epoch": 1.0})
    assert printed[1:] == [str({"eval_loss": "5.5", "epoch": "1"})]


def test_without_a_progress_bar_as_little_is_printed(capsys):
    state = SimpleNamespace(is_local_process_zero=True)
    ReadablePrinterCallback().on_log(None, state, None, logs={"norms/qk/a/bound": 1.0})
    ReadablePrinterCallback().on_log(None, state, None, logs={"loss": 5.25, "mfu": 0.5, "data_wait": 0.01})
    assert capsys.readouterr().out == str({"loss": "5.25", "mfu": "0.5"}) + "\n"
