"""run_squad.py on a tiny file, from a tiny pretrained model; and what it refuses."""

import json
import re
import shlex
import shutil

import pytest
import torch
import transformers
from transformers import BertConfig, BertForQuestionAnswering, DistilBertConfig, DistilBertForQuestionAnswering

import run_squad
from fnl_hf import FnlBertForQuestionAnswering, UserInputError, ask
from fnl_hf.commands import cli
from fnl_hf.runs.command_line import join_negative_numbers, parse_arguments
from fnl_hf.runs.seeds import commands_of_seeds
from tests.bad_inputs import edit
from tests.conftest import ROOT, SENTENCES, assert_same_weights, launch


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
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", *str(value).split(" "))]


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
    card = (folder / "README.md").read_text()
    assert "question-answering" in card and f"| base model | {pretrained.name} |" in card


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


@pytest.mark.parametrize("model_type", [None, "fnl_bert"])
def test_a_teachers_answers_are_half_of_the_loss(pretrained, squad_files, tmp_path, model_type):
    """½ CE + ½ T² KL at T = 2, of the global batch; the teacher may be of any architecture with the vocabulary. Both
    return tuples unless told otherwise."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)
    vocab_size = transformers.AutoConfig.from_pretrained(pretrained).vocab_size
    sizes = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 33}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(6)
    models = {
        "student": BertForQuestionAnswering(BertConfig(vocab_size=vocab_size, **sizes, **dropout)),
        "teacher": DistilBertForQuestionAnswering(
            DistilBertConfig(vocab_size=vocab_size, dim=28, n_layers=1, n_heads=7, hidden_dim=44)
        ),
    }
    for name, model in models.items():
        model.qa_outputs.weight.data *= 50  # logits that differ
        tokenizer.save_pretrained(tmp_path / name)
        model.config.return_dict = False
        model.save_pretrained(tmp_path / name)
        model.config.return_dict = True
    examples = json.loads((squad_files / "v1.1.json").read_text())["data"][0]["paragraphs"]
    texts = [[entry["qas"][0]["question"] for entry in examples], [entry["context"] for entry in examples]]
    inputs = tokenizer(*texts, padding="max_length", max_length=80, return_tensors="pt")
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    divergence = 0.0
    outputs = [models["student"].double().eval()(**inputs), models["teacher"].double().eval()(**ids)]
    for name in ("start_logits", "end_logits"):
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            q, p = ((out[name][row][mask] / 2).softmax(-1) for out in outputs)
            divergence += 4 * (p * (p / q).log()).sum().item() / 12 / 2

    def loss(out, **flags):
        common = {
            "max_steps": 1,
            "max_seq_length": 80,
            "logging_steps": 1,
            "do_train": "true",
            "model_type": model_type,
            "learning_rate": 1e-4,
        }
        run_squad.run(squad(tmp_path / "student", tmp_path / out, squad_files / "v1.1.json", **common | flags))
        history = json.loads((tmp_path / out / "trainer_state.json").read_text())["log_history"]
        return next(entry["loss"] for entry in history if "loss" in entry)

    whole, taught = {"per_device_train_batch_size": 12}, {"teacher_name_or_path": tmp_path / "teacher"}
    assert divergence > 0.1
    expected = (loss("alone", **whole) + divergence) / 2
    assert loss("whole", **whole, **taught) == pytest.approx(expected, rel=2e-3)
    assert loss("parts", gradient_accumulation_steps=3, **taught) == pytest.approx(expected, rel=2e-3)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", atol=2e-4, rtol=0)
    assert "| teacher | teacher |" in (tmp_path / "whole" / "README.md").read_text()


def test_accumulation_gives_the_same_model_where_features_are_padded_alike(pretrained, squad_files, tmp_path):
    """8 × 1 and 2 × 4 agree; padded to the longest of a micro-batch they do not, since BERT's loss sees padding."""
    config = transformers.AutoConfig.from_pretrained(
        pretrained, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config.save_pretrained(tmp_path / "config")
    common = {"config_name": tmp_path / "config", "tokenizer_name": pretrained, "adam_epsilon": 1e-3, "max_steps": 3}
    for name, batch, accumulation, padded in (("a", 8, 1, "true"), ("b", 2, 4, "true"), ("c", 2, 4, "false")):
        flags = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        flags |= {"pad_to_max_length": padded, "do_train": "true"} | common
        run_squad.run(squad(None, tmp_path / name, squad_files / "v1.1.json", **flags))
    assert_same_weights(tmp_path / "a", tmp_path / "b", atol=1e-5, rtol=0)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c", atol=1e-5, rtol=0)


def test_an_order_by_length_goes_on_and_a_higher_f1_is_no_worse(pretrained, squad_files, tmp_path):
    flags = {"max_steps": None, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "do_train": "true"}
    flags |= {"train_sampling_strategy": "group_by_length", "eval_strategy": "epoch", "warmup_steps": 0}
    flags |= {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": '{"patience":0,"cooldown":99}'}
    run_squad.run(squad(pretrained, tmp_path / "whole", squad_files / "v1.1.json", **flags))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for name in ("checkpoint-5", "checkpoint-6"):
        shutil.rmtree(tmp_path / "stopped" / name)
    for name in ("all_results.json", "model.safetensors", "trainer_state.json"):
        (tmp_path / "stopped" / name).unlink()
    flags["resume_from_checkpoint"] = "auto"
    run_squad.run(squad(pretrained, tmp_path / "stopped", squad_files / "v1.1.json", **flags))
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    scheduler = torch.load(tmp_path / "whole" / "checkpoint-6" / "scheduler.pt", weights_only=False)
    assert (scheduler["mode"], scheduler["patience"]) == ("max", 0)


def test_the_sample_is_the_default(pretrained, tmp_path):
    flags = {"max_seq_length": 256, "doc_stride": 32, "max_steps": 1, "max_train_samples": 5, "max_eval_samples": 3}
    run_squad.run(squad(pretrained, tmp_path / "out", **flags))
    assert len(json.loads((tmp_path / "out" / "eval_predictions.json").read_text())) == 3


def test_several_seeds_are_several_runs_that_go_on_where_they_stood(pretrained, squad_files, tmp_path, capsys):
    file = tmp_path / "questions.json"
    shutil.copy(squad_files / "v1.1.json", file)
    flags = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 5, "seed": 9}
    command = squad(pretrained, tmp_path / "out", file, seeds="3 5", **flags)
    run_squad.run(command)
    table = capsys.readouterr().out.splitlines()[-3:]
    run_squad.run(squad(pretrained, tmp_path / "alone", file, **flags | {"seed": 5}))
    assert_same_weights(tmp_path / "out" / "seed-5", tmp_path / "alone")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "out" / "seed-3", tmp_path / "alone")
    results = [json.loads((tmp_path / "out" / f"seed-{n}" / "all_results.json").read_text()) for n in (3, 5)]
    saved = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert saved["seeds"] == [3, 5] and list(saved["scores"]) == ["eval_exact_match", "eval_f1"]
    first, second = (result["eval_f1"] for result in results)
    f1 = {"mean": (first + second) / 2, "std": abs(first - second) / 2**0.5}
    assert saved["scores"]["eval_f1"].pop("values") == [first, second]
    assert saved["scores"]["eval_f1"] == pytest.approx(f1)
    assert table[0] == "mean ± standard deviation of 2 seeds (3, 5)"
    assert table[2] == f"eval_f1           {f1['mean']:.2f} ± {f1['std']:.2f}  ({first:.2f}, {second:.2f})"

    # As if killed after the second run's checkpoint of step 4; a third seed is added.
    for name in ("all_results.json", "model.safetensors", "checkpoint-6/model.safetensors"):
        (tmp_path / "out" / "seed-5" / name).unlink()
    resumed = squad(pretrained, tmp_path / "out", file, seeds="3 5 7", resume_from_checkpoint="auto", **flags)
    before = (tmp_path / "out" / "seed-3" / "all_results.json").stat().st_mtime_ns
    run_squad.run(resumed)
    assert (tmp_path / "out" / "seed-3" / "all_results.json").stat().st_mtime_ns == before
    assert_same_weights(tmp_path / "out" / "seed-5", tmp_path / "alone")
    saved = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert saved["seeds"] == [3, 5, 7] and saved["scores"]["eval_f1"]["values"][:2] == [first, second]
    with pytest.raises(UserInputError, match="seed-3 is not empty"):
        run_squad.run(command)

    file.write_text(file.read_text().replace("what jumps", "who jumps", 1))  # one question is another
    with pytest.raises(UserInputError, match="seed-3 contains a run on other data: the fingerprint was"):
        run_squad.run(resumed)
    file.unlink()
    edit("seed-7/run_arguments.json", validation_fingerprint="5a")(tmp_path / "out")
    with pytest.raises(UserInputError, match="are not comparable: validation_fingerprint is .*, 5a in .*seed-7"):
        run_squad.run(resumed)


def test_other_questions_to_evaluate_under_the_same_name_are_refused(pretrained, squad_files, tmp_path, caplog):
    """By a run that goes on and by a finished one, whose scores would pass for those of the new files."""
    files = {name: tmp_path / f"{name}.json" for name in ("train_file", "validation_file", "test_file")}
    for file in files.values():
        shutil.copy(squad_files / "v1.1.json", file)
    out = tmp_path / "out"
    flags = {"do_train": "true", "do_eval": "true", "do_predict": "true", "save_strategy": "steps", "save_steps": 4}
    command = squad(pretrained, out, **files, **flags, resume_from_checkpoint="auto")
    run_squad.run(command)
    results = (out / "all_results.json").read_text()
    text = files["test_file"].read_text()

    def refused(name, kind):
        for changed in (text.replace("the quick", "the cool!"), text.replace("what jumps", "who jumps", 1)):
            files[name].write_text(changed)
            with pytest.raises(
                UserInputError, match=rf"out contains a run on other {kind}: the fingerprint was \w+ and"
            ):
                run_squad.run(command)
        files[name].write_text(text)

    kinds = {"train_file": "data", "validation_file": "validation data", "test_file": "test data"}
    for name, kind in kinds.items():
        refused(name, kind)
    run_squad.run(command)
    assert f"The run in {out} is finished: nothing to do" in caplog.text
    files["validation_file"].rename(tmp_path / "away")
    run_squad.run(command)
    assert (
        f"finished run in {out} could not be read to check that they are unchanged: {files['validation_file']}: no"
        in caplog.text
    )
    (tmp_path / "away").rename(files["validation_file"])
    assert (out / "all_results.json").read_text() == results

    (out / "all_results.json").unlink()
    shutil.rmtree(out / "checkpoint-6")
    refused("validation_file", "validation data")
    run_squad.run(command)
    scores = [json.loads(text)["eval_f1"] for text in (results, (out / "all_results.json").read_text())]
    assert scores[0] == scores[1]


def test_evaluation_alone_and_prediction_without_answers(pretrained, squad_files, tmp_path):
    run_squad.run(squad(pretrained, tmp_path / "model", squad_files / "v1.1.json"))
    trained = json.loads((tmp_path / "model" / "all_results.json").read_text())
    flags = {"train_file": None, "cache_dir": tmp_path / "cache", "preprocessing_num_workers": 2}
    evaluating = squad(tmp_path / "model", tmp_path / "eval", squad_files / "v1.1.json", **flags, do_eval="true")
    run_squad.run(evaluating)
    results = json.loads((tmp_path / "eval" / "all_results.json").read_text())
    assert results["eval_f1"] == trained["eval_f1"] and "train_loss" not in results
    assert not (tmp_path / "eval" / "model.safetensors").exists()
    assert list((tmp_path / "cache" / "squad").rglob("*.arrow")), "--cache_dir has the features"

    content = json.loads((squad_files / "v1.1.json").read_text())
    for paragraph in content["data"][0]["paragraphs"]:
        for question in paragraph["qas"]:
            del question["answers"]
    (tmp_path / "unlabeled.json").write_text(json.dumps(content))
    flags = {"do_predict": "true", "test_file": tmp_path / "unlabeled.json"}
    run_squad.run(squad(tmp_path / "model", tmp_path / "predict", **flags))
    predicted = json.loads((tmp_path / "predict" / "predict_predictions.json").read_text())
    assert predicted == json.loads((tmp_path / "model" / "eval_predictions.json").read_text())
    assert not [name for name in json.loads((tmp_path / "predict" / "all_results.json").read_text()) if "f1" in name]

    paragraph = content["data"][0]["paragraphs"][0]
    paragraph["qas"] *= 2
    (tmp_path / "unlabeled.json").write_text(json.dumps(content))
    with pytest.raises(UserInputError, match="question id 'q0' occurs 2 times among the test questions"):
        run_squad.run(squad(tmp_path / "model", tmp_path / "twice", **flags))


def test_the_commands_of_the_documentation_parse(tmp_path):
    text = (ROOT / "docs" / "squad.md").read_text(encoding="utf-8").replace("\\\n", " ")
    scripts = re.findall(r"^accelerate launch run_squad.py (.*)$", text, flags=re.MULTILINE)
    assert len(scripts) == 6
    for words in scripts:
        model_args, _, args = parse_arguments(run_squad.ARGUMENTS, [*shlex.split(words), "--use_cpu", "true"])
        assert model_args.model_name_or_path and (args.seeds is None or len(commands_of_seeds([], args)) == 3)
    asking = re.findall(r"^fnl-hf ([^>#\n]*)", text, flags=re.MULTILINE)
    runs = [cli.build_parser().parse_args(shlex.split(words)).run for words in asking]
    assert runs == [cli.run_ask, cli.run_ask, cli.run_factorize]


def test_heads_of_other_kinds(pretrained, squad_files, tmp_path):
    """A classifier of three labels begins anew with two logits a token; what nobody has trained is not scored."""
    config = transformers.AutoConfig.from_pretrained(pretrained)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    stock = BertConfig(**{key: getattr(config, key) for key in sizes}, num_labels=3)
    folder = tmp_path / "classifier"
    transformers.BertForSequenceClassification(stock).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(pretrained).save_pretrained(folder)
    file = squad_files / "v1.1.json"
    for name, entries in (("stock", {}), ("ours", {"model_type": "fnl_bert"})):
        run_squad.run(squad(folder, tmp_path / name, file, max_steps=1, do_train="true", **entries))
        config = transformers.AutoConfig.from_pretrained(tmp_path / name)
        assert config.num_labels == 2 and ask(str(tmp_path / name), "what jumps", SENTENCES[0], doc_stride=4)["answer"]
    anew = {"config_name": folder, "tokenizer_name": pretrained}
    run_squad.run(squad(None, tmp_path / "anew", file, max_steps=1, do_train="true", **anew))
    for name, flags, message in (
        (folder, {}, "no question answering model in .*classifier: it lacks qa_outputs.bias, which would be random"),
        (pretrained, {}, "it lacks qa_outputs.bias, which would be random"),
        (None, anew, "--config_name .*classifier starts from random weights: train them"),
    ):
        with pytest.raises(UserInputError, match=message):
            run_squad.run(squad(name, tmp_path / "none", file, do_eval="true", **flags))
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("written", ["-1e9", "-2.5E-3", "-.5e2", "-3.", "-7", "-0.5", "4e-2"])
def test_a_flag_takes_every_number_that_python_knows(tmp_path, written):
    (tmp_path / "run.yaml").write_text(
        f"null_score_diff_threshold: {float(written) if written[-1] != 'f' else '-.inf'}"
    )
    common = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    for words in (["--null_score_diff_threshold", written, *common], [str(tmp_path / "run.yaml"), *common]):
        assert parse_arguments(run_squad.ARGUMENTS, words)[1].null_score_diff_threshold == float(written)
    asking = ["ask", "model", "Who?", "Ada.", "--null_score_diff_threshold", written]
    assert cli.build_parser().parse_args(join_negative_numbers(asking)).null_score_diff_threshold == float(written)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"model_name_or_path": "/no/such"}, "no tokenizer in /no/such"),
        ({"teacher_name_or_path": "/no/such"}, "no tokenizer in /no/such"),
        ({"doc_stride": 0}, r"--doc_stride \(0\) must be at least 1"),
        ({"max_seq_length": 600}, r"--max_seq_length \(600\) exceeds"),
        ({"max_train_samples": -1}, r"--max_train_samples \(-1\) must be at least 1"),
        ({"config_name": "/no/such"}, "give only one of --config_name, --model_name_or_path, not"),
        ({"learning_rate": "-1e-4"}, r"--learning_rate \(-0.0001\) must be at least 0.0"),
        ({"n_best_size": 0}, r"--n_best_size \(0\) must be at least 1"),
        (
            {"prediction_loss_only": "true"},
            r"--prediction_loss_only \(True\) keeps no predictions to compute answers from",
        ),
        (
            {"dataloader_drop_last": "true", "per_device_train_batch_size": 99},
            r"--dataloader_drop_last \(True\): the training data are \d+ windows, fewer than one batch of 99",
        ),
        ({"do_predict": "true", "do_train": "true"}, "no questions for prediction: give --test_file"),
        ({"seeds": 5}, r"--seeds \(5\) must be two or more different seeds"),
        ({"seeds": "3 3"}, r"--seeds \(3 3\) must be two or more different seeds"),
        ({"seeds": "3 -1"}, r"--seeds \(-1\) must be at least 0"),
        ({"seeds": "3 5", "do_train": "true"}, "--seeds .* needs --do_train and --do_eval"),
        (
            {"seeds": "3 5", "push_to_hub": "true"},
            "--push_to_hub cannot be used with --seeds, which trains several models",
        ),
        (
            {"seeds": "3 5", "resume_from_checkpoint": "x/checkpoint-3"},
            "checkpoint of one run: use 'auto' with --seeds",
        ),
    ],
)
def test_bad_squad_flags_are_refused(pretrained, squad_files, tmp_path, flags, message):
    with pytest.raises(UserInputError, match=message):
        run_squad.run(squad(pretrained, tmp_path / "out", squad_files / "v1.1.json", **flags))
    with pytest.raises(UserInputError, match="12 of 24 train questions have no answer: set --version_2_with_negative"):
        run_squad.run(squad(pretrained, tmp_path / "out", squad_files / "v2.0.json"))
