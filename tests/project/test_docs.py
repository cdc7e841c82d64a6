"""The documentation: each code block of README.md and docs/ runs on tiny models that have the names used there.

Python is executed, a page in one namespace; ``fnl-hf`` is run; the words of ``accelerate launch`` go through its parser
and the script's; ``make`` says what it would do. The batch script for SLURM has a test of its own.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    TrainingArguments,
)

import run_pretrain
import run_squad
import studies.__main__
from fnl_hf import FnlBertConfig, FnlBertForQuestionAnswering
from fnl_hf.commands import cli
from fnl_hf.data.tokenizer import train_tokenizer
from fnl_hf.runs.command_line import parse_arguments
from fnl_hf.runs.seeds import commands_of_seeds
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.pretraining_arguments import DataArguments, ModelArguments
from tests.conftest import ROOT, SENTENCES
from tests.publishing.hub_server import Hub
from tests.reports.test_comparison import write_run

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PRETRAINING = (ModelArguments, DataArguments, FnlTrainingArguments)
# What the commands of a page leave, as the page says.
LEFT = {
    "README.md": ["encoder/onnx/model.onnx", "served/model.safetensors"],
    "docs/index.md": ["my-bert/spectra.png", "served/model.safetensors", "small.onnx"],
    "docs/conversion.md": ["my-bert/spectra.png", "served/model.safetensors", "my-bert-squad.onnx"],
    "docs/squad.md": ["answers.tsv"],
    "docs/text_classification.md": ["served/model.safetensors", "small-classifier.onnx"],
    "docs/pretraining_data.md": ["wikipedia-bert/model.safetensors", "wikipedia-books-bert/model.safetensors"],
    "docs/training.md": ["compare.png"],
}
TO_THE_END = "docs/compress_and_serve.md"  # has a test of its own
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# Data that the pages pretrain on and that are here; of each such run two small steps are made.
HERE = {"wikimedia/wikipedia", "wikipedia.parquet"}
SMALL = {
    "preset": "tiny", "attention_embedding_size": 64, "global_train_batch_size": 8, "max_seq_length": 16,
    "bf16": "false", "preprocessing_num_workers": 2, "dataloader_num_workers": 0, "streaming_validation_documents": 9,
    "shuffle_buffer_size": 21,
}  # fmt: skip
KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
MODULES = [
    {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for index, (path, kind) in enumerate(KINDS.items())
]
ENCODER_FILES = {
    "modules.json": MODULES,
    "1_Pooling/config.json": {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True},
    "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
    "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}},
}


class Block(NamedTuple):
    language: str
    text: str
    line: int


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page):
    text = text_of(page)
    found = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, flags=re.MULTILINE)
    return [Block(match[1], match[2], text.count("\n", 0, match.start(2))) for match in found]


SLURM = next(block.text for block in blocks_of("docs/training.md") if "#SBATCH" in block.text)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models under the names of the documentation. Encoders are as wide as there, so that half of E is, too."""
    folder = tmp_path_factory.mktemp("models")
    texts = ["Paris is the capital of France.", "Who wrote it?", "It was written by Ada Lovelace.", *SENTENCES]
    tokenizer = train_tokenizer(Dataset.from_dict({"text": texts * 3}), 150, 512)
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "intermediate_size": 37}
    small = FnlBertConfig(**sizes, hidden_size=42, num_attention_heads=3, attention_embedding_size=21)
    made = {"google-bert/bert-base-uncased": BertForMaskedLM(BertConfig(**sizes))}
    made["FacebookAI/roberta-base"] = RobertaForMaskedLM(RobertaConfig(**sizes))
    made[ENCODER] = BertModel(BertConfig(**sizes, hidden_size=384, num_attention_heads=12))
    made |= dict.fromkeys(("my-squad", "my-bert-squad"), FnlBertForQuestionAnswering(small))
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / ENCODER / "1_Pooling").mkdir()
    for name, content in ENCODER_FILES.items():
        (folder / ENCODER / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(Hub, "user", "me")
    with Hub() as hub:
        hub.serve_this_process(monkeypatch, tmp_path)
        yield hub


def write_data_sets():
    """Tiny ones under the names of the documentation: ``datasets`` prefers a folder to the Hub's data of its name."""
    answers = zip(("no", "yes"), (0, 1))
    reviews = [{"text": f"{text}: {word}", "label": label} for word, label in answers for text in SENTENCES]
    pairs = [{"query": text.replace("the", "which"), "answer": text} for text in SENTENCES]
    articles = [" ".join(SENTENCES[start : start + 9]) for start in range(len(SENTENCES))]
    contents = {
        "stanfordnlp/imdb/train": reviews,
        "stanfordnlp/imdb/test": reviews[::5],
        "sentence-transformers/natural-questions/train": pairs,
        "wikimedia/wikipedia/20231101.en/train": [{"id": "7", "text": text} for text in (*articles, "stub")],
        "sedthh/gutenberg_english/train": [{"TEXT": text} for text in (*articles, articles[0])],
    }
    for name, rows in contents.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))
    configuration = "- config_name: 20231101.en\n  data_files: 20231101.en/*"
    Path("wikimedia/wikipedia/README.md").write_text(f"---\nconfigs:\n{configuration}\n---\n")
    for split in ("train", "test"):
        Dataset.from_list(reviews).to_csv(f"{split}.csv")


@pytest.fixture
def desk(models, hub, monkeypatch, tmp_path):
    """The folder that a reader of the pages works in."""
    folder = tmp_path / "desk"
    shutil.copytree(models, folder)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "text.txt").write_text("\n".join(SENTENCES * 3))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES * 40))
    qas = [{"id": "a", "question": "Who wrote it?"}, {"id": "b", "question": "When?"}]
    paragraphs = [{"context": "Ada Lovelace wrote it in 1843.", "qas": qas}]
    questions = {"version": "1.1", "data": [{"title": "it", "paragraphs": paragraphs}]}
    (folder / "questions.json").write_text(json.dumps(questions))
    for mode in ("frobenius", "weight"):
        write_run(folder / "output" / mode, 5, [{"step": 5, "loss": 3.0}], decay_mode=mode)
    monkeypatch.chdir(folder)
    write_data_sets()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def names_of_the_reader():
    """What the blocks take for granted: a model, arguments, data and a module of the reader's own."""
    factors = {"up": nn.Linear(5, 7), "mid": nn.Linear(5, 5), "down": nn.Linear(3, 5)}
    return {
        "model": BertForMaskedLM(BertConfig(num_hidden_layers=1, hidden_size=42, num_attention_heads=3)),
        "args": TrainingArguments("my-output", use_cpu=True, report_to="none"),
        "data": Dataset.from_dict({"input_ids": [[1, 2, 3]]}),
        "block": nn.ModuleDict(factors),
        "net": nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 5, 1)),
        "adapter": nn.ModuleDict(factors),
        "adapted": peft.get_peft_model(BertModel(BertConfig(num_hidden_layers=1)), peft.LoraConfig()),
        "attention": nn.ModuleDict({name: nn.Linear(24, 24) for name in ("wq", "wk", "wv", "wo")}),
        "fused": nn.ModuleDict({"qkv": nn.Linear(24, 72), "wo": nn.Linear(24, 24)}),
        "questions": ["Who wrote it?", "Who?"],
        "contexts": ["It was written by Ada Lovelace.", "Ada Lovelace wrote it."],
    }


def parse_launch(words):
    """The launcher's own arguments, then those of the script; a distillation, whose model is used next, is run, and so
    is what trains on data that are here."""
    launch = launch_command_parser().parse_args(words)
    assert launch.config_file is None or os.path.isfile(launch.config_file)
    words = [*launch.training_script_args, "--use_cpu", "true"]
    if launch.training_script == "run_pretrain.py":
        parse_arguments(PRETRAINING, words)
        if "distill" in words or HERE & set(words):
            small = {"max_seq_length": 16} if "distill" in words else SMALL
            for name, value in ({"max_steps": 2, "report_to": "none"} | small).items():
                words += [f"--{name}", str(value)]
            run_pretrain.run(words)
    else:
        assert launch.training_script == "run_squad.py"
        *_, args = parse_arguments(run_squad.ARGUMENTS, words)
        for command in commands_of_seeds(words, args) if args.seeds else ():
            parse_arguments(run_squad.ARGUMENTS, command)


def run_command(line):
    words = list(itertools.dropwhile(lambda word: re.match("[A-Z_]+=", word), shlex.split(line, comments=True)))
    if words[:2] == ["accelerate", "launch"]:
        parse_launch(words[2:])
    elif words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "pip":
        assert words[1:] == ["install", "-e", ".[onnx]"]
    else:
        assert words[0] == "fnl-hf", f"no way to run {line!r}"
        if words[1] == "export":
            pytest.importorskip("onnxruntime")
        arguments, _, file = (words[1:], "", os.devnull) if ">" not in words else (words[1:-2], *words[-2:])
        with open(file, "w") as output, contextlib.redirect_stdout(output):
            cli.main(arguments)


def run_block(block, page, names):
    if "FrobeniusMuon(" in block.text and not hasattr(torch.optim, "Muon"):
        return  # it came with torch 2.9
    if block.language == "python":
        if "sentence_transformers" not in block.text or find_spec("sentence_transformers"):
            exec(compile("\n" * block.line + block.text, page, "exec"), names)
    elif block.language == "bash":
        for line in block.text.replace("\\\n", " ").splitlines():
            run_command(line)
    else:  # formulas, and directives, which the site's build carries out
        assert block.language in ("text", "math") or block.language.startswith("{"), block


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the Hub's client
# Older versions of datasets leave a CSV file open.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")  # of a stock Trainer without an accelerator
@pytest.mark.parametrize("page", [page for page in PAGES if page != TO_THE_END])
def test_every_block_runs(page, desk, hub):
    names = names_of_the_reader()
    for block in blocks_of(page):
        if block.text != SLURM:
            run_block(block, page, names)
    for path in LEFT.get(page, ()):
        assert Path(path).stat().st_size, path
    if page == "README.md":
        assert hub.repositories["me/my-bert-squad"].private


def test_the_end_of_the_road_is_what_sentence_transformers_computes(desk, hub):
    """The page's function on the page's file, by the pooling that its folder names, in torch; and by their class."""
    page, names = TO_THE_END, {}
    for block in blocks_of(page):
        run_block(block, page, names)
    assert {name: json.loads(Path("encoder", name).read_text()) for name in ENCODER_FILES} == ENCODER_FILES
    texts = ["Who wrote it?", "It was written by Ada Lovelace.", "No."]
    model, tokenizer = AutoModel.from_pretrained("encoder").eval(), AutoTokenizer.from_pretrained("encoder")
    rows = []
    for text in texts:
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        rows.append(mean / mean.norm())
    found = torch.from_numpy(names["embed"](texts)).float()
    torch.testing.assert_close(found, torch.stack(rows), atol=1e-5, rtol=0)
    int8 = torch.from_numpy(names["load"]("encoder", "model_int8.onnx")(texts)).float()
    assert 0.95 < (found * int8).sum(dim=1).min() < 1
    sizes = [Path("encoder", "onnx", name).stat().st_size for name in ("model_int8.onnx", "model.onnx")]
    assert sizes[0] < sizes[1] and Path("encoder-dense", "1_Pooling", "config.json").exists()
    if find_spec("sentence_transformers"):
        torch.testing.assert_close(torch.from_numpy(names["embeddings"]), torch.stack(rows[:2]), atol=1e-5, rtol=0)


def test_flags_exist():
    scripts = {name for kind in (*PRETRAINING, *run_squad.ARGUMENTS) for name in kind.__dataclass_fields__}
    commands = next(action for action in cli.build_parser()._actions if action.choices).choices.values()
    parsers = [*commands, studies.__main__.build_parser()]
    known = scripts | {flag.lstrip("-") for parser in parsers for flag in parser._option_string_actions}
    spans = [span for page in PAGES for span in re.findall(r"`([^`\n]*--[^`]*)`", text_of(page))]
    named = {flag for span in spans if "benchmarks/" not in span for flag in re.findall(r"--(\w+)", span)}
    others = {"num_processes", "num_cpu_threads_per_process", "nproc_per_node", "signal"}  # of launchers and SLURM
    others |= {"quiet", "training_step", "render", "flag"}  # of a launcher, of benchmarks, a stand-in
    assert len(named) > 40 and named - known == others


@pytest.mark.parametrize("page", PAGES)
def test_blocks_fit_the_site(page):
    """A line of more than 90 characters has to be scrolled there, on a desktop, too."""
    blocks = [block for block in blocks_of(page) if block.language != "math"]
    assert [line for block in blocks for line in block.text.splitlines() if len(line) > 90] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    text = text_of(page)
    files = re.findall(r"\b(?:benchmarks|configs|docs|tests|fnl_hf)/[\w./]+\.\w+", text)
    links = [os.path.join(os.path.dirname(page), link) for link in re.findall(r"\]\(([\w./]+)[#)]", text)]
    assert [path for path in (*files, *links) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (75, True)])
def test_the_slurm_script_requeues_what_was_preempted(tmp_path, monkeypatch, status, requeued):
    """With a ``srun`` of two tasks, whose status is the highest one of theirs."""
    stubs = {
        "scontrol": 'echo "$@" >> scontrol.log; echo first; echo second',
        "srun": 'shift; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@"; s=$?; done; exit $s',
        "python": f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $@" >> python.log; exit {status}',
    }
    for name, script in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    variables = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "37"}
    environment = os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", SLURM], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
    tasks = [line.split() for line in (tmp_path / "python.log").read_text().splitlines()]
    assert [task[:4] for task in tasks] == [[i, i, "2", "first"] for i in "01"]
    assert ("requeue 37" in (tmp_path / "scontrol.log").read_text()) == requeued
    monkeypatch.chdir(ROOT)
    parse_launch(tasks[0][4:])
