"""Accelerate's configuration files, and FSDP2 through Trainer: on CPU processes, and on a GPU where there is one."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

import run_pretrain
from fnl_hf import FnlBertConfig, FnlBertForMaskedLM, UserInputError
from fnl_hf.bert.modeling_fnl_bert import mean_cross_entropy
from fnl_hf.runs.checkpoints import CHECKSUMS_FILE, find_fault
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.optimizers import build_optimizer
from fnl_hf.training.trainer import FnlTrainer
from tests.conftest import ROOT, TINY, assert_same_weights, launch, pretraining

FSDP2 = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
# Adam's ε keeps rounding noise of gradients that are zero in theory (key biases) from becoming whole steps.
FLAGS = {
    "config_overrides": TINY + ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0", "adam_epsilon": 1e-3,
    "per_device_train_batch_size": 2, "max_train_samples": 61, "attention_embedding_size": 18, "save_steps": 6,
}  # fmt: skip
ALONE = {"gradient_accumulation_steps": 4, "allow_other_world_size": "true"}
SHARDED = {"gradient_accumulation_steps": 2, "allow_other_world_size": "true"}


def environment_of(config, *flags):
    """The launcher's arguments and what it gives the processes to know."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(config), "--main_process_port", "0", *flags, "script.py"])
    args, _, _ = _validate_launch_command(args)
    return args, prepare_multi_gpu_env(args)


@pytest.mark.parametrize(
    "name, kind",
    [("ddp_1node", DistributedType.MULTI_GPU), ("ddp_multinode", DistributedType.MULTI_GPU), ("fsdp2", "FSDP")],
)
def test_accelerate_reads_its_configuration_files(name, kind):
    file = FSDP2.with_stem(name)
    assert load_config_from_file(str(file)).distributed_type == kind
    flags = ["--num_machines", "3", "--num_processes", "6", "--machine_rank", "2", "--main_process_ip", "10.0.0.1"]
    args, environment = environment_of(file, *flags)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("3", "2", 2)
    assert args.rdzv_endpoint.startswith("10.0.0.1:") and args.rdzv_backend == "static"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no", "the recipe says how it computes"
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2")


def test_the_fsdp_configuration_names_what_there_is(monkeypatch):
    for name, value in environment_of(FSDP2, "--num_processes", "2")[1].items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    with torch.device("meta"):
        model = FnlBertForMaskedLM(FnlBertConfig())
    plugin.set_auto_wrap_policy(model)
    assert plugin.transformer_cls_names_to_wrap == ["FnlBertLayer"] == [type(model.bert.encoder.layer[0]).__name__]


def run(corpus, folder, **flags):
    run_pretrain.run([str(word) for word in pretraining(corpus, folder, **FLAGS | flags)])


def run_sharded(tmp_path, *commands, check=True, **environment):
    """Run command lines one after the other under FSDP2 on two processes."""
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([[str(word) for word in command] for command in commands]))
    made = environment_of(FSDP2, "--num_processes", "2")[1]
    made = {name: value for name, value in made.items() if name.startswith(("FSDP", "ACCELERATE"))}
    return launch("tests/training/fsdp_worker.py", file, processes=2, check=check, **made | environment)


def before_its_end(whole, folder):
    """A copy of a finished run as it was after step 6."""
    shutil.copytree(whole, folder)
    (folder / "all_results.json").unlink()
    shutil.rmtree(folder / "checkpoint-12")
    return folder


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Twelve steps of one process, seven an epoch."""
    folder = tmp_path_factory.mktemp("fsdp") / "alone"
    run(corpus, folder, **ALONE)
    return folder


def test_fsdp2_through_trainer_is_one_process(alone, corpus, tmp_path):
    """Training, checkpoints, resuming, evaluation: the same weights and the same files, read by either."""
    out, resumed, evaluated = tmp_path / "out", before_its_end(alone, tmp_path / "resumed"), tmp_path / "evaluated"
    result = run_sharded(
        tmp_path,
        pretraining(corpus, out, **FLAGS | SHARDED),
        pretraining(corpus, resumed, **FLAGS | SHARDED, resume_from_checkpoint="auto"),
        pretraining(corpus, evaluated, **FLAGS, model_name_or_path=alone, do_eval="true"),
        FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",  # as where nothing is said; makes no difference
    )
    assert [result.stdout.count(f"sharded in step {step}.") for step in (1, 7, 12)] == [2, 4, 4]
    for folder in (out, resumed):
        assert_same_weights(alone, folder, atol=1e-5, rtol=0)
        assert find_fault(folder / "checkpoint-12") is None
    for step in (6, 12):
        first, second = (set(os.listdir(folder / f"checkpoint-{step}")) for folder in (alone, out))
        assert first - {"rng_state.pth"} == second - {"rng_state_0.pth", "rng_state_1.pth"}
        assert (out / f"checkpoint-{step}" / "config.json").read_bytes() == (alone / "config.json").read_bytes()
    assert len(json.loads((out / "checkpoint-12" / CHECKSUMS_FILE).read_text())) == len(second) - 1
    assert "| architecture | FnlBertForMaskedLM, 1 layers" in (out / "README.md").read_text()
    losses = [json.loads((folder / "eval_results.json").read_text())["eval_loss"] for folder in (alone, evaluated)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    again = before_its_end(out, tmp_path / "again")
    run(corpus, again, **ALONE, resume_from_checkpoint="auto")
    assert_same_weights(alone, again, atol=1e-5, rtol=0)


class Plugin:
    """Accelerate's under bf16."""

    mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)


@pytest.fixture
def trainer(tmp_path, dimensions):
    """Its constructor has found FSDP2; the model is a language model with tied embeddings."""
    args = FnlTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = FnlTrainer(FnlBertForMaskedLM(FnlBertConfig(**dimensions)), args)
    trainer.is_fsdp_enabled, trainer.accelerator.state.fsdp_plugin = True, Plugin()
    yield trainer
    del trainer.accelerator.state.fsdp_plugin


def test_gradients_are_added_up_and_the_loss_returned_in_float32(trainer, monkeypatch):
    seen = []

    def prepare(self, *args):
        seen.extend([self.model.get_input_embeddings(), self.model.get_output_embeddings()])

    monkeypatch.setattr(Trainer, "_prepare_for_training", prepare)
    trainer._prepare_for_training(3, None, None)
    policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert seen == [None, None], "so that Accelerate makes no group of them"
    assert trainer.model.get_input_embeddings() is trainer.model.bert.embeddings.word_embeddings
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([2, 5, 1])
    wanted = -logits.double().log_softmax(1)[range(3), labels].sum() / 3
    loss = mean_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_parameters_that_are_no_longer_tied_are_refused(trainer, monkeypatch):
    def untie(self, *args):
        decoder = self.model.cls.predictions.decoder
        decoder.weight = torch.nn.Parameter(decoder.weight.detach().clone())

    monkeypatch.setattr(Trainer, "_prepare_for_training", untie)
    tied = "bert.embeddings.word_embeddings.weight and cls.predictions.decoder.weight are one tied parameter, but"
    with pytest.raises(UserInputError, match=tied):
        trainer._prepare_for_training(3, None, None)


@pytest.mark.parametrize("sharded, chosen", [(True, "foreach"), (False, "fused")])
def test_sgd_takes_a_kernel_that_knows_sharded_parameters(tmp_path, dimensions, sharded, chosen):
    args = FnlTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", optimizer="sgd")
    optimizer = build_optimizer(args, FnlBertForMaskedLM(FnlBertConfig(**dimensions)), sharded=sharded)
    assert [name for name in ("foreach", "fused") if optimizer.param_groups[0][name]] == [chosen]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fsdp2_on_a_gpu_is_plain_training(corpus, tmp_path):
    """One GPU is enough: its process holds DTensors. Plain, sharded, and sharded from the plain run's checkpoint."""
    alone, out, resumed = (tmp_path / name for name in ("alone", "out", "resumed"))
    flags = FLAGS | {"gradient_accumulation_steps": 4, "use_cpu": "false"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0"}

    def call(*command):
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    call(ROOT / "run_pretrain.py", *pretraining(corpus, alone, **flags))
    before_its_end(alone, resumed)
    commands = [pretraining(corpus, out, **flags), pretraining(corpus, resumed, **flags, resume_from_checkpoint="auto")]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", FSDP2, "--num_processes", 1]
    printed = call(*launcher, ROOT / "tests" / "training" / "fsdp_worker.py", tmp_path / "commands.json")
    assert [printed.count(f"sharded in step {step}.") for step in (1, 7)] == [1, 2]
    for folder in (out, resumed):
        assert_same_weights(alone, folder, atol=1e-5, rtol=0)
