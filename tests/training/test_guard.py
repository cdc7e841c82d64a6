"""A non-finite loss or gradient never reaches the weights; too many of them end the run; spikes are reported."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import run_pretrain
from fnl_hf import FrobeniusAdamW, FrobeniusSGD, Lamb
from fnl_hf.errors import TrainingDiverged
from fnl_hf.runs.command_line import run_script
from fnl_hf.training.guard import LossGuard, _supports_found_inf, nan_unless_finite
from fnl_hf.training.trainer import FnlTrainer
from tests.conftest import TINY, assert_same_weights, launch, pretraining
from tests.training.bad_losses import add_to_losses, leave_out_steps, spoil_gradients

NAN, INF = math.nan, math.inf
SPIKED = "spikes"
OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "sgd": {"optimizer": "sgd"},
    "lamb": {"optimizer": "lamb"},
    "lamb, all inside": {"optimizer": "lamb", "optim_args": "decay=in_trust_ratio,bias_correction=false"},
    "lamb, foreach": {"optimizer": "lamb", "optim_args": "foreach=true"},
}
MICRO_BATCHES = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 9, "learning_rate": 1e-3,
    "do_train": "true",
}  # fmt: skip


def run(corpus, folder, **flags):
    run_pretrain.run([str(word) for word in pretraining(corpus, folder, **{"max_train_samples": 61} | flags)])


def history(folder, name):
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row[name]) for row in rows if name in row]


def as_on_an_accelerator(patch):
    """The path on which nothing waits for the gradient norm; torch's fused kernels have it on the CPU, too."""
    begin = LossGuard.on_train_begin

    def on_train_begin(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.is_synchronous = False

    patch.setattr(LossGuard, "on_train_begin", on_train_begin)


def assert_nothing_moved(folder, step):
    """From the checkpoint before a step to the one after it."""
    before, after = folder / f"checkpoint-{step}", folder / f"checkpoint-{step + 1}"
    first, second = (load_file(checkpoint / "model.safetensors") for checkpoint in (before, after))
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (torch.load(checkpoint / "optimizer.pt")["state"] for checkpoint in (before, after))
    assert first.keys() == second.keys() and first
    for index, entries in first.items():
        assert all(torch.equal(value, second[index][name]) for name, value in entries.items())


@pytest.fixture(scope="module")
def without_bad_steps(corpus, tmp_path_factory):
    """Runs of each optimizer in which the updates of these steps are left out."""
    folder = tmp_path_factory.mktemp("without")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_steps({0, 6, 7}, patch.setattr)
        for optimizer, flags in OPTIMIZERS.items():
            run(corpus, folder / optimizer, **MICRO_BATCHES | flags, save_strategy="no")
    return folder


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_moves_nothing_and_the_run_is_one_without_it(
    without_bad_steps, corpus, tmp_path, monkeypatch, optimizer, accelerator
):
    """Bad are the first step and two in a row, the other epoch's first among them, with two micro-batches each."""
    if accelerator:
        as_on_an_accelerator(monkeypatch)
    add_to_losses({0: NAN, 6: INF, 7: -INF}, monkeypatch.setattr)
    run(corpus, tmp_path / "out", **MICRO_BATCHES | OPTIMIZERS[optimizer], save_steps=1)
    for step in (6, 7):
        assert_nothing_moved(tmp_path / "out", step)
    with pytest.raises(AssertionError):
        assert_nothing_moved(tmp_path / "out", 5)
    assert_same_weights(tmp_path / "out", without_bad_steps / optimizer)


@pytest.mark.parametrize("accelerator", [False, True])
def test_bad_gradients_count_as_bad_losses_do(corpus, tmp_path, monkeypatch, accelerator):
    flags = {"save_strategy": "no", "max_grad_norm": 0, "logging_steps": 4}  # the norm is known without clipping, too
    with monkeypatch.context() as patch:
        if accelerator:
            as_on_an_accelerator(patch)
        spoil_gradients({1, 2, 6}, patch.setattr)
        run(corpus, tmp_path / "guarded", **flags)
    assert history(tmp_path / "guarded", "skipped_steps") == (
        [(4, 2), (7, 3)] if accelerator else [(2, 1), (3, 2), (7, 3)]
    ), "with the logs and at the end of an epoch, or at once"
    leave_out_steps({1, 2, 6}, monkeypatch.setattr)
    run(corpus, tmp_path / "left_out", **flags | {"logging_steps": 1})
    assert_same_weights(tmp_path / "guarded", tmp_path / "left_out")
    losses = dict(history(tmp_path / "left_out", "loss"))
    expected = [
        (losses[1] + losses[4]) / 2,
        (losses[5] + losses[6] + losses[8]) / 3,
        sum(losses[i] for i in range(9, 13)) / 4,
    ]
    logged = history(tmp_path / "guarded", "loss")
    assert [step for step, _ in logged] == [4, 8, 12]
    assert [loss for _, loss in logged] == pytest.approx(expected, rel=1e-5), "the mean over the steps that were made"


def test_a_logged_step_that_was_skipped_has_no_loss(corpus, tmp_path, monkeypatch):
    add_to_losses({3: NAN, 4: NAN}, monkeypatch.setattr)
    run(corpus, tmp_path / "out", save_strategy="no", logging_steps=1, max_steps=7)
    assert [step for step, _ in history(tmp_path / "out", "loss")] == [1, 2, 3, 6, 7]
    assert all(math.isfinite(value) for name in ("loss", "grad_norm") for _, value in history(tmp_path / "out", name))


@pytest.mark.parametrize("accelerator", [False, True])
def test_the_count_and_the_weights_survive_a_resume(corpus, tmp_path, monkeypatch, accelerator):
    """The checkpoint at step 5 lies between two logs."""
    if accelerator:
        as_on_an_accelerator(monkeypatch)
    add_to_losses({3: NAN, 8: NAN, 9: NAN}, monkeypatch.setattr)
    flags = {"logging_steps": 4, "max_skipped_steps": 3}
    run(corpus, tmp_path / "out", **flags)
    whole = shutil.copytree(tmp_path / "out", tmp_path / "whole")
    (tmp_path / "out" / "all_results.json").unlink()
    for step in (10, 12):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    run(corpus, tmp_path / "out", resume_from_checkpoint="auto", **flags)
    assert_same_weights(whole, tmp_path / "out")
    counts = history(tmp_path / "out", "skipped_steps")
    assert counts == history(whole, "skipped_steps") and counts[-1][1] == 3


@pytest.mark.parametrize("accelerator", [False, True])
def test_too_many_skipped_steps_end_the_run(corpus, tmp_path, monkeypatch, accelerator):
    if accelerator:
        as_on_an_accelerator(monkeypatch)
    add_to_losses(dict.fromkeys((2, 6, 7), NAN), monkeypatch.setattr)
    with pytest.raises(TrainingDiverged) as error:
        run(corpus, tmp_path / "out", max_skipped_steps=2, logging_steps=4)
    assert str(error.value) == (
        "step 8: the loss or gradient was not finite in 3 steps, more than --max_skipped_steps (2). The newest "
        f"complete checkpoint is {tmp_path / 'out' / 'checkpoint-5'}"
    )
    assert not (tmp_path / "out" / "all_results.json").exists()
    with pytest.raises(TrainingDiverged, match=r"step 3: .* in 1 steps, .* \(0\). There is no complete checkpoint yet"):
        run(corpus, tmp_path / "none", max_skipped_steps=0, logging_steps=1)
    run(corpus, tmp_path / "enough", max_skipped_steps=3, save_strategy="no")


def test_a_diverged_run_is_one_line_and_a_status(monkeypatch, capsys):
    def diverge(argv):
        raise TrainingDiverged("step 8: too much")

    monkeypatch.setattr(sys, "argv", ["/some/run_pretrain.py"])
    monkeypatch.setattr("signal.signal", lambda *args: None)
    for rank, said in (("0", "run_pretrain.py: error: step 8: too much\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            run_script(diverge)
        assert end.value.code == 3 and capsys.readouterr().err == said


def test_processes_agree_when_one_has_a_bad_loss(corpus, tmp_path, monkeypatch):
    # Adam's ε keeps rounding noise of gradients that are zero in theory (key biases) from becoming whole steps.
    flags = {
        "config_overrides": TINY + ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0", "adam_epsilon": 1e-3,
        "per_device_train_batch_size": 4, "save_steps": 1, "max_steps": 10, "max_train_samples": 61,
    }  # fmt: skip
    launch("tests/training/guard_worker.py", *pretraining(corpus, tmp_path / "guarded", **flags), processes=2)
    for step in (2, 5):
        assert_nothing_moved(tmp_path / "guarded", step)
    assert history(tmp_path / "guarded", "skipped_steps") == [(3, 1), (6, 2)]
    leave_out_steps({2, 5}, monkeypatch.setattr)
    run(corpus, tmp_path / "left_out", **flags | {"gradient_accumulation_steps": 2})
    assert_same_weights(tmp_path / "guarded", tmp_path / "left_out", atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_finite_loss_and_its_gradient_are_unchanged(dtype):
    for value in (3.7, -0.0, 1e-30):
        x = torch.tensor(value, dtype=dtype, requires_grad=True)
        loss = nan_unless_finite(x)
        loss.backward()
        assert loss.dtype == dtype and torch.equal(loss.signbit(), x.signbit()) and loss == x and x.grad == 1.0
    for value in (NAN, INF, -INF):
        x = torch.tensor([value, 2.0], dtype=dtype, requires_grad=True)
        nan_unless_finite(x[0] + 0 * x[1]).backward()
        assert x.grad.isnan().all()


def with_loss_scaler(patch, scale):
    """As ``--fp16`` on a GPU."""
    train = FnlTrainer.train

    def scaled(self, *args, **kwargs):
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return train(self, *args, **kwargs)

    patch.setattr(FnlTrainer, "train", scaled)


def test_an_overflow_under_loss_scaling_is_left_to_the_scaler(corpus, tmp_path, monkeypatch):
    """Its first steps overflow by design."""
    with_loss_scaler(monkeypatch, 1e38)
    run(corpus, tmp_path / "out", save_strategy="no", logging_steps=1, max_steps=5, max_skipped_steps=0)
    assert not history(tmp_path / "out", "skipped_steps")
    assert len(history(tmp_path / "out", "loss")) == 5


def test_losses_that_are_not_finite_count_under_loss_scaling_too(corpus, tmp_path, monkeypatch):
    with_loss_scaler(monkeypatch, 16.0)
    add_to_losses({3: NAN}, monkeypatch.setattr)
    run(corpus, tmp_path / "out", save_steps=1, logging_steps=1, max_steps=7)
    assert_nothing_moved(tmp_path / "out", 3)
    assert history(tmp_path / "out", "skipped_steps") == [(4, 1)]
    losses = dict(history(tmp_path / "out", "loss"))
    assert set(losses) == {1, 2, 3, 5, 6, 7} and all(map(math.isfinite, losses.values()))
    train_loss = json.loads((tmp_path / "out" / "all_results.json").read_text())["train_loss"]
    assert train_loss == pytest.approx(sum(losses.values()) / 6, rel=1e-5), "of the steps that were not skipped"
    add_to_losses(dict.fromkeys(range(9), NAN), monkeypatch.setattr)
    with pytest.raises(TrainingDiverged, match=r"step 4: .* in 4 steps, more than --max_skipped_steps \(3\)"):
        run(corpus, tmp_path / "lost", save_strategy="no", max_skipped_steps=3)


@pytest.mark.parametrize("make", [Lamb, FrobeniusAdamW, FrobeniusSGD])
@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}, {"fused": False}, "loaded"], ids=str)
def test_only_fused_kernels_skip_a_step_without_the_host(make, kernel):
    """As the guard says of an optimizer; of those that a loaded state has made slower, too."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = make([weight], lr=0.1, **({"fused": True} if kernel == "loaded" else kernel))
    if kernel == "loaded":
        optimizer.load_state_dict(make([weight], lr=0.1, fused=False).state_dict())
    assert _supports_found_inf(optimizer) == (kernel == {"fused": True})


def test_spikes_are_reported_with_step_and_values(corpus, tmp_path, monkeypatch, caplog):
    add_to_losses({2: 50.0, 8: 50.0, 10: 60.0}, monkeypatch.setattr)  # the first comes before there is a median
    run(corpus, tmp_path / "out", save_strategy="no", logging_steps=1)
    assert history(tmp_path / "out", "spikes") == [(9, 1), (11, 2)]
    warnings = [record.message for record in caplog.records if "spike" in record.message]
    assert len(warnings) == 2 and all("above 2 times its running median" in warning for warning in warnings)
    losses = dict(history(tmp_path / "out", "loss"))
    assert f"step 9: spike: loss {losses[9]:.4g} is above" in warnings[0]


@pytest.mark.parametrize(
    "past, newest, spike",
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 30.5, True),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 30.0, False),  # not above ten times the median, 3
        ([1.0, 2.0, 4.0, 5.0], 99.0, False),  # too few
        ([100.0] * 3 + [3.0] * 20, 31.0, True),  # the last twenty count
        ([1.0, 2.0, NAN, 3.0, 4.0, 5.0], 30.5, True),
        ([1.0, 2.0, 3.0, 4.0, 5.0], NAN, False),
    ],
)
def test_a_spike_is_above_a_multiple_of_the_running_median(past, newest, spike, caplog):
    logged = []
    trainer = SimpleNamespace(log=logged.append, is_world_process_zero=lambda: True)
    rows = [{"grad_norm": value, "loss": 1.0} for value in past]
    rows = [row for pair in zip(rows, [{"norms/qk": 7.0}] * len(rows)) for row in pair] + [{SPIKED: 3}]
    rows.append({"grad_norm": newest, "loss": 1.0})
    LossGuard(trainer).on_log(None, SimpleNamespace(log_history=rows, global_step=23), None, logs=rows[-1])
    assert logged == ([{SPIKED: 4}] if spike else [])
    assert ["step 23: spike: grad_norm" in record.message for record in caplog.records] == [True] * spike
