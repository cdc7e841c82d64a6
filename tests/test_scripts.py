"""The scripts, launched as a user launches them, on tiny fixtures; and what they refuse, in-process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BertConfig, BertForQuestionAnswering, GPT2Config, pipeline

import run_pretrain
import run_squad
from fnl_hf import FnlBertForMaskedLM, FnlBertForQuestionAnswering, UserInputError, ask

from .conftest import ROOT, launch

SENTENCES = [f"the {a} {b} {c} over the {d} dog" for a in ("quick", "slow", "red") for b in ("brown", "blue", "old")
             for c in ("fox jumps", "cat runs", "bird flies") for d in ("lazy", "big")]  # fmt: skip
TINY = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=37"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(SENTENCES * 4), encoding="utf-8")
    return path


def pretraining(corpus, folder, **flags):
    """A command line for a tiny run of twelve steps with a checkpoint every five."""
    values = {
        "train_file": corpus, "output_dir": folder, "vocab_size": 60, "max_seq_length": 16, "config_overrides": TINY,
        "max_steps": 12, "save_steps": 5, "logging_steps": 3, "per_device_train_batch_size": 8, "report_to": "none",
        "learning_rate": 1e-2, "seed": 7, "cache_dir": Path(corpus).parent / "cache", "use_cpu": "true",
    } | flags  # fmt: skip
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def pretrained(corpus, tmp_path_factory):
    """The output folder of one launched run, E halved, spectral initialization."""
    folder = tmp_path_factory.mktemp("pretrained") / "out"
    launch("run_pretrain.py", *pretraining(corpus, folder, attention_embedding_size=16, attention_init="spectral"))
    return folder


# ---- pretraining ----


def test_pretraining_leaves_a_complete_folder(pretrained):
    results = json.loads((pretrained / "all_results.json").read_text())
    assert {"eval_loss", "eval_accuracy", "eval_perplexity", "unigram_entropy", "train_loss"} <= set(results)
    assert results["eval_loss"] < 4.0 and results["eval_perplexity"] == pytest.approx(
        2.718281828 ** results["eval_loss"]
    )
    model = transformers.AutoModelForMaskedLM.from_pretrained(pretrained)
    assert type(model) is FnlBertForMaskedLM
    assert model.config.attention_embedding_size == 16 and model.config.attention_init == "spectral"
    assert len(transformers.AutoTokenizer.from_pretrained(pretrained)) == model.config.vocab_size <= 60
    with open(pretrained / "training_curves.png", "rb") as plot:
        assert plot.read(8) == b"\x89PNG\r\n\x1a\n"
    card = (pretrained / "README.md").read_text()
    assert "library_name: transformers" in card and "16 (50% of d)" in card and "eval_loss" in card
    history = json.loads((pretrained / "trainer_state.json").read_text())["log_history"]
    norms = [entry for entry in history if "norms/layer_0/qk_nuclear" in entry]
    assert [entry["step"] for entry in norms] == [0, 3, 6, 9, 12]
    assert all(
        e[f"norms/layer_0/{k}_nuclear"] <= e[f"norms/layer_0/{k}_bound"] * 1.0001 for e in norms for k in ("qk", "vo")
    )
    assert [entry["step"] for entry in history if "loss" in entry] == [3, 6, 9, 12]


def test_pipelines_work(pretrained, tmp_path):
    found = pipeline("fill-mask", str(pretrained))("the quick [MASK] fox")
    assert len(found) == 5 and all(0 <= entry["score"] <= 1 for entry in found)
    config = transformers.AutoConfig.from_pretrained(pretrained, num_labels=3)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(pretrained).save_pretrained(tmp_path)
    assert pipeline("text-classification", str(tmp_path))("the lazy dog")[0]["label"].startswith("LABEL_")


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(first, second, **tolerance):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        if tolerance:
            torch.testing.assert_close(first[name], second[name], **tolerance)
        else:
            assert torch.equal(first[name], second[name]), name


def test_a_killed_run_resumes_to_the_same_weights(pretrained, corpus, tmp_path):
    """SIGKILL after the first checkpoint, then the same command with ``auto``: equal to the last bit."""
    folder = tmp_path / "out"
    arguments = pretraining(corpus, folder, attention_embedding_size=16, attention_init="spectral")
    arguments += ["--resume_from_checkpoint", "auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "run_pretrain.py"), *arguments],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint-5" / "trainer_state.json").is_file() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (folder / "all_results.json").exists(), "killed before its end"
    torn = folder / "checkpoint-11"  # as left by a kill while a checkpoint is written
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    resumed = launch("run_pretrain.py", *arguments)
    assert "checkpoint-11 is not complete: passing it over" in resumed.stderr
    assert_same_weights(folder, pretrained)
    before = (folder / "all_results.json").stat().st_mtime_ns
    for changed in (["--resume_from_checkpoint", folder / "checkpoint-10"], []):
        with pytest.raises(UserInputError, match="holds another run: adam_beta2 is 0.999 there and 0.5 here"):
            run_in_process([*arguments, *changed, "--adam_beta2", 0.5])
    with pytest.raises(UserInputError, match="holds another run: decay_mode is frobenius there and none here"):
        run_in_process([*arguments, "--decay_mode", "none"])
    again = launch("run_pretrain.py", *arguments)
    assert "is finished: nothing to do" in again.stderr
    assert (folder / "all_results.json").stat().st_mtime_ns == before


def test_processes_and_accumulation_give_the_same_model(corpus, tmp_path):
    """1 × 8, 4 × 2 and two processes × 2 × 2 rows in a global batch, without dropout."""
    overrides = TINY + ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
    # Adam's ε keeps rounding noise of gradients that are zero in theory (key biases) from becoming whole steps.
    # Three steps an epoch, so that the masks change twice.
    common = {
        "config_overrides": overrides,
        "max_steps": 8,
        "max_train_samples": 24,
        "save_strategy": "no",
        "adam_epsilon": 1e-3,
    }
    common["logging_steps"] = 1  # Trainer adds only its own rank's losses since the last log to train_loss
    for name, batch, accumulation, processes in (("whole", 8, 1, 1), ("parts", 2, 4, 1), ("ranks", 2, 2, 2)):
        flags = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation} | common
        launch("run_pretrain.py", *pretraining(corpus, tmp_path / name, **flags), processes=processes)
    for name in ("parts", "ranks"):
        assert_same_weights(tmp_path / "whole", tmp_path / name, atol=1e-5, rtol=0)
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("whole", "parts", "ranks")]
    for key in ("train_loss", "eval_loss"):
        assert [r[key] for r in results] == pytest.approx([results[0][key]] * 3, abs=1e-4)


def run_in_process(arguments, monkeypatch=None):
    run_pretrain.run([str(a) for a in arguments])


def test_decay_mode_changes_the_norms(corpus, tmp_path):
    """In 12 steps at λ = 30: weight decay and Frobenius decay shrink the products, none does not."""
    norm = {}
    for mode in ("frobenius", "weight", "none"):
        flags = {"decay_mode": mode, "frobenius_decay": 30, "weight_decay": 0, "save_strategy": "no"}
        run_in_process(pretraining(corpus, tmp_path / mode, **flags))
        history = json.loads((tmp_path / mode / "trainer_state.json").read_text())["log_history"]
        norm[mode] = [e["norms/layer_0/qk_frobenius"] for e in history if "norms/layer_0/qk_frobenius" in e][-1]
    assert norm["weight"] < 0.5 * norm["none"] and norm["frobenius"] < 0.9 * norm["none"]


def test_config_file_and_flags(corpus, tmp_path):
    flags = dict(zip(*[iter(pretraining(corpus, tmp_path / "out", max_steps=2, save_strategy="no"))] * 2))
    config = {key.removeprefix("--"): value for key, value in flags.items()} | {
        "seed": 1,
        "do_train": True,
        "run_name": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    run_in_process([tmp_path / "config.json", "--seed", 2, "--attention_embedding_size", 8])
    assert weights(tmp_path / "out")["bert.encoder.layer.0.attention.self.query.weight"].shape == (8, 32)
    (tmp_path / "bad.yaml").write_text("no_such_flag: 3\n")
    with pytest.raises(UserInputError, match="unknown argument: --no_such_flag 3"):
        run_in_process([tmp_path / "bad.yaml"])
    (tmp_path / "list.yaml").write_text("- 3\n")
    with pytest.raises(UserInputError, match="must hold a mapping"):
        run_in_process([tmp_path / "list.yaml"])


def test_norms_follow_the_logging_strategy(corpus, tmp_path):
    flags = {"logging_strategy": "epoch", "max_steps": 6, "max_train_samples": 24, "save_strategy": "no"}
    run_in_process(pretraining(corpus, tmp_path / "out", **flags))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [e["step"] for e in history if "norms/layer_0/vo_bound" in e] == [0, 3, 6]
    assert [e["step"] for e in history if "loss" in e] == [3, 6]


def test_half_precision_checkpoints_go_on_in_float32(pretrained, corpus, tmp_path):
    half = transformers.AutoModelForMaskedLM.from_pretrained(pretrained, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    transformers.AutoTokenizer.from_pretrained(pretrained).save_pretrained(tmp_path / "half")
    flags = {
        "model_name_or_path": tmp_path / "half",
        "config_overrides": None,
        "bf16_full_eval": "true",
        "max_steps": 1,
    }
    run_in_process(pretraining(corpus, tmp_path / "out", save_strategy="no", **flags))
    assert {w.dtype for w in weights(tmp_path / "out").values()} == {torch.float32}
    with pytest.raises(UserInputError, match=r"--attention_embedding_size \(8\) differs from that of .* \(16\)"):
        run_in_process(pretraining(corpus, tmp_path / "other", attention_embedding_size=8, **flags))


def test_the_quickstart_is_the_recipe_of_the_embedded_corpus_alone():
    assert run_pretrain.with_quickstart([])[0].endswith("quickstart.yaml")
    assert run_pretrain.with_quickstart(["--preset", "mini"])[0].endswith("quickstart.yaml")
    for own in (["c.yaml"], ["--train-file", "x"], ["--train_file=x"], ["--config_name", "x"]):
        assert run_pretrain.with_quickstart(own) == own


def test_push_to_hub_uploads_the_folder_with_our_card(corpus, tmp_path, monkeypatch):
    """The Hub's client is replaced; what would travel is what is in the folder."""
    uploads = []

    class Repository:
        repo_id = "someone/model"

    monkeypatch.setattr("transformers.trainer.create_repo", lambda *a, **k: Repository(), raising=False)
    api = type("Api", (), {
        "create_repo": lambda self, *a, **k: Repository(),
        "upload_folder": lambda self, **k: uploads.append({**k, "files": sorted(os.listdir(k["folder_path"]))}),
    })()  # fmt: skip
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: api, raising=False)
    monkeypatch.setattr("transformers.trainer.upload_folder", lambda **k: api.upload_folder(**k), raising=False)
    flags = {"max_steps": 1, "save_strategy": "no", "push_to_hub": "true", "hub_model_id": "someone/model"}
    run_in_process(pretraining(corpus, tmp_path / "out", **flags))
    assert {"README.md", "model.safetensors", "modeling_fnl_bert.py", "tokenizer.json"} <= set(uploads[-1]["files"])
    assert "Khodak" in (tmp_path / "out" / "README.md").read_text()


# ---- SQuAD ----


@pytest.fixture(scope="session")
def squad_files(tmp_path_factory):
    """Contexts of the corpus's words; the v2.0 file has questions without answer."""
    folder = tmp_path_factory.mktemp("squad")
    for version in ("1.1", "2.0"):
        paragraphs = []
        for index, sentence in enumerate(SENTENCES[:12]):
            animal = sentence.split()[3]
            answers = [{"text": animal, "answer_start": sentence.index(animal)}]
            qas = [{"id": f"q{index}", "question": "what jumps over the dog", "answers": answers}]
            if version == "2.0":
                qas.append({"id": f"n{index}", "question": "what flies", "answers": [], "is_impossible": True})
            paragraphs.append({"context": sentence, "qas": qas})
        content = {"version": version, "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"v{version}.json").write_text(json.dumps(content))
    return folder


def squad(model, folder, file=None, **flags):
    values = {
        "model_name_or_path": model, "output_dir": folder, "max_seq_length": 40, "doc_stride": 4, "max_steps": 6,
        "save_strategy": "no", "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": "true",
        "learning_rate": 1e-2,
    }  # fmt: skip
    if file is not None:
        values |= {"train_file": file, "validation_file": file}
    values |= flags
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]


def test_fine_tuning_on_squad(pretrained, squad_files, tmp_path):
    folder = tmp_path / "out"
    launch("run_squad.py", *squad(pretrained, folder, squad_files / "v1.1.json", max_steps=40))
    results = json.loads((folder / "all_results.json").read_text())
    assert results["eval_f1"] > 50.0, "it learns its twelve questions"
    predictions = json.loads((folder / "eval_predictions.json").read_text())
    nbest = json.loads((folder / "eval_nbest_predictions.json").read_text())
    assert len(predictions) == len(nbest) == 12 and nbest["q0"][0]["text"] == predictions["q0"]
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    assert type(model) is FnlBertForQuestionAnswering
    answer = ask(str(folder), "what jumps over the dog", SENTENCES[0], max_seq_length=40, doc_stride=4)
    assert answer["answer"] in SENTENCES[0]
    assert "question-answering" in (folder / "README.md").read_text()


def test_squad_v2_threshold_prediction_and_a_stock_model(pretrained, squad_files, tmp_path):
    config = transformers.AutoConfig.from_pretrained(pretrained)
    stock = BertConfig(**{k: getattr(config, k) for k in ("vocab_size", "hidden_size", "num_hidden_layers",
                                                         "num_attention_heads", "intermediate_size")})  # fmt: skip
    BertForQuestionAnswering(stock).save_pretrained(tmp_path / "stock")
    transformers.AutoTokenizer.from_pretrained(pretrained).save_pretrained(tmp_path / "stock")
    file = squad_files / "v2.0.json"
    common = {"version_2_with_negative": "true", "do_eval": "true", "do_predict": "true", "test_file": file}
    for threshold, answered in ((-1e9, 0), (1e9, 24)):
        folder = tmp_path / f"t{answered}"
        flags = common | {"null_score_diff_threshold": threshold}
        run_squad.run(squad(tmp_path / "stock", folder, file, **flags))
        results = json.loads((folder / "all_results.json").read_text())
        assert {"eval_exact", "eval_f1", "eval_HasAns_f1", "eval_NoAns_f1", "eval_best_f1_thresh"} <= set(results)
        predictions = json.loads((folder / "predict_predictions.json").read_text())
        assert sum(bool(text) for text in predictions.values()) == answered
        assert results["eval_NoAns_exact"] == (0.0 if answered else 100.0)
        assert set(json.loads((folder / "eval_null_odds.json").read_text())) == set(predictions)
    control = {"model_name_or_path": None, "config_name": tmp_path / "stock", "tokenizer_name": pretrained}
    control |= {"model_type": "fnl_bert", "load_best_model_at_end": "true", "eval_strategy": "steps", "eval_steps": 3}
    control |= {"save_strategy": "steps", "save_steps": 3}
    run_squad.run(squad(None, tmp_path / "control", squad_files / "v1.1.json", **control))
    assert json.loads((tmp_path / "control" / "config.json").read_text())["model_type"] == "fnl_bert"
    flags = {"model_type": "fnl_bert"}
    run_squad.run(squad(tmp_path / "stock", tmp_path / "ours", squad_files / "v1.1.json", **flags))
    run_squad.run(squad(tmp_path / "stock", tmp_path / "theirs", squad_files / "v1.1.json"))
    assert "factorized" not in (tmp_path / "theirs" / "README.md").read_text()
    ours, theirs = (json.loads((tmp_path / n / "eval_predictions.json").read_text()) for n in ("ours", "theirs"))
    assert ours == theirs, "the same weights answer alike, stock or factorized at E = d"


def test_the_sample_is_the_default(pretrained, tmp_path):
    flags = {"max_seq_length": 256, "doc_stride": 32, "max_steps": 1, "max_train_samples": 5, "max_eval_samples": 3}
    run_squad.run(squad(pretrained, tmp_path / "out", **flags))
    assert len(json.loads((tmp_path / "out" / "eval_predictions.json").read_text())) == 3


# ---- refusals ----


def test_an_output_folder_in_use_is_never_overwritten_unasked(pretrained, corpus, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for resume in ([], ["--resume_from_checkpoint", "auto"]):
        with pytest.raises(UserInputError, match=f"--output_dir {folder} is not empty"):
            run_in_process(pretraining(corpus, folder) + resume)
    assert os.listdir(folder) == ["thesis.tex"]
    for flags, message in (
        ({"do_eval": "true"}, "is not empty: choose another"),
        ({"resume_from_checkpoint": pretrained / "checkpoint-10"}, "is not empty and not the folder of checkpoint"),
        ({"resume_from_checkpoint": "auto", "overwrite_output_dir": "true"}, "exclude each other"),
        ({"overwrite_output_dir": "true", "frobenius_decay": -1}, r"--frobenius_decay \(-1.0\) must be at least 0"),
    ):
        with pytest.raises(UserInputError, match=message):
            run_in_process(pretraining(corpus, folder, **flags))
    assert os.listdir(folder) == ["thesis.tex"]
    copy = tmp_path / "copy"
    shutil.copytree(pretrained, copy)
    with pytest.raises(UserInputError, match="is not empty: choose another, continue its training"):
        run_in_process(pretraining(corpus, copy))
    assert_same_weights(copy, pretrained)
    run_in_process(pretraining(corpus, copy, overwrite_output_dir="true", max_steps=1, save_strategy="no"))
    assert not list(copy.glob("checkpoint-*"))
    assert weights(copy)["bert.encoder.layer.0.attention.self.query.weight"].shape == (32, 32)


@pytest.fixture(scope="session")
def other_architecture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=60).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"attention_embedding_size": 15}, r"attention_embedding_size \(15\) must be a positive multiple of .*\(2\)"),
        ({"attention_embedding_size": 64, "attention_init": "spectral"}, r"\(64\) <= hidden_size \(32\)"),
        ({"max_seq_length": 513}, r"--max_seq_length \(513\) exceeds the model's max_position_embeddings \(512\)"),
        ({"max_seq_length": 512}, "shorter than one sequence of --max_seq_length 512"),
        ({"mlm_probability": 1.5}, r"--mlm_probability \(1.5\)"),
        ({"vocab_size": 3}, r"--vocab_size \(3\) must be at least 10"),
        ({"train_file": "/no/such.txt"}, "/no/such.txt: no such file"),
        ({"tokenizer_name": "/no/such"}, "no tokenizer in /no/such"),
        ({"tokenizer_name": None, "config_name": "/no/such"}, "no usable configuration in /no/such"),
        ({"preset": "base", "config_name": "x"}, "give one of --preset, .* not --preset and --config_name"),
        ({"preset": "huge"}, "argument --preset: invalid choice: 'huge'"),
        ({"optim": "adafactor"}, r"--optim \(.*ADAFACTOR.*|--optim \(adafactor\) is not used here: set --optimizer"),
        ({"label_smoothing_factor": 0.1}, r"--label_smoothing_factor \(0.1\) must be 0"),
        ({"optimizer": "adagrad"}, "argument --optimizer: invalid choice"),
        ({"decay_mode": "nuclear"}, "argument --decay_mode/--decay-mode: invalid choice"),
        ({"learning_rate": "fast"}, "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ({"config_overrides": "no_such=3"}, "--config_overrides no_such=3"),
        ({"config_overrides": "attention_embedding_size=4"}, "--config_overrides attention_embedding_size=4"),
        ({"config_overrides": "num_attention_heads=0"}, r"num_attention_heads \(0\) must be at least 1"),
        ({"config_overrides": "hidden_act=nope"}, "no model of the wanted kind .*nope"),
        ({"learning_rate": -1}, r"--learning_rate \(-1.0\) must be at least 0.0 and below inf"),
        ({"weight_decay": "nan"}, r"--weight_decay \(nan\) must be at least"),
        ({"adam_beta1": 2}, r"--adam_beta1 \(2.0\) must be at least 0.0 and below 1.0"),
        ({"per_device_train_batch_size": 0}, r"--per_device_train_batch_size \(0\) must be at least 1"),
        ({"max_eval_samples": 0}, r"--max_eval_samples \(0\) must be at least 1"),
        ({"preprocessing_num_workers": 0}, r"--preprocessing_num_workers \(0\) must be at least 1"),
        ({"report_to": "no_such_tracker"}, "no_such_tracker"),
        ({"do_predict": "true"}, "pretraining has nothing to predict"),
        ({"resume_from_checkpoint": "/no/such"}, "--resume_from_checkpoint /no/such: no complete checkpoint"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused(corpus, tmp_path, flags, message):
    with pytest.raises(UserInputError, match=message):
        run_in_process(pretraining(corpus, tmp_path / "out", **flags))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))


def test_checkpoints_of_another_shape_are_refused(pretrained, corpus, other_architecture, tmp_path):
    with pytest.raises(UserInputError, match="is a 'gpt2' checkpoint: it must be of model type"):
        run_in_process(pretraining(corpus, tmp_path / "a", model_name_or_path=other_architecture,
                                   tokenizer_name=pretrained, config_overrides=""))  # fmt: skip
    checkpoint = tmp_path / "checkpoint-5"
    shutil.copytree(pretrained / "checkpoint-5", checkpoint)
    with pytest.raises(
        UserInputError, match="is of another architecture: attention_embedding_size is 16 there and None"
    ):
        run_in_process(pretraining(corpus, tmp_path / "b", resume_from_checkpoint=checkpoint))
    small = BertConfig(vocab_size=7, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=9)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(UserInputError, match=r"tokens, more than the model's vocab_size \(7\)"):
        run_in_process(pretraining(corpus, tmp_path / "c", config_name=tmp_path / "small", config_overrides=""))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"model_name_or_path": "/no/such"}, "no tokenizer in /no/such"),
        ({"doc_stride": 39}, r"--doc_stride \(39\) must be smaller than the window"),
        ({"max_seq_length": 600}, r"--max_seq_length \(600\) exceeds"),
        ({"max_train_samples": -1}, r"--max_train_samples \(-1\) must be at least 1"),
        ({"config_name": "/no/such"}, "give one of --config_name, --model_name_or_path, not"),
        ({"n_best_size": 0}, r"--n_best_size \(0\) must be at least 1"),
        ({"do_predict": "true"}, "no questions to predict: give --test_file"),
    ],
)
def test_bad_squad_flags_are_refused(pretrained, squad_files, tmp_path, flags, message):
    with pytest.raises(UserInputError, match=message):
        run_squad.run(squad(pretrained, tmp_path / "out", squad_files / "v1.1.json", **flags))
    with pytest.raises(UserInputError, match="12 of 24 train questions have no answer: set --version_2_with_negative"):
        run_squad.run(squad(pretrained, tmp_path / "out", squad_files / "v2.0.json"))


def test_errors_are_one_line_and_a_status(corpus, tmp_path):
    result = launch("run_pretrain.py", *pretraining(corpus, tmp_path / "o", attention_embedding_size=15), check=False)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("run_pretrain.py: error: ")]
    assert len(lines) == 1 and "(15)" in lines[0]
    assert 'run_pretrain.py", line' not in result.stderr, "no traceback into the script"
