"""A student learns its teacher's hidden states and logits, and stays the checkpoint that it was."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraForPreTraining,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5EncoderModel,
    T5Model,
    ViTConfig,
    ViTModel,
)

import fnl_hf
import run_pretrain
from fnl_hf import FactorizationConfig, FnlBertForMaskedLM, UserInputError
from fnl_hf.data.masking import collate_batch
from fnl_hf.data.tokenizer import train_tokenizer
from fnl_hf.layers import FactorizedLayer
from fnl_hf.training.arguments import FnlTrainingArguments
from fnl_hf.training.distillation import (
    DistillationTrainer,
    answer_divergence,
    distillation_metrics,
    distillation_sums,
    drop_nothing,
    hidden_state_errors,
    logit_divergence,
    match_models,
)
from tests.conftest import assert_same_weights, launch, pretraining, weights
from tests.training.test_trainer import Gradients

SIZES = {"vocab_size": 60, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5,
         "intermediate_size": 33, "max_position_embeddings": 19}  # fmt: skip
COMPANIONS = {"modules.json": [{"path": ""}, {"path": "1_Pooling"}], "sentence_bert_config.json": {"max_seq_length": 7},
              "1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}  # fmt: skip


# ---- the loss, against its definition in NumPy ----


def test_errors_are_relative_to_the_teachers_states():
    draw = np.random.default_rng(0).normal
    student, teacher = (
        draw(size=(4, 2, 3, 5)),
        draw(size=(4, 2, 3, 5)) * np.array([1, 10, 100, 1000]).reshape(4, 1, 1, 1),
    )
    expected = np.zeros((2, 3))
    for layer in range(4):
        for row in range(2):
            for token in range(3):
                error = student[layer, row, token] - teacher[layer, row, token]
                expected[row, token] += (error @ error) / (teacher[layer, row, token] @ teacher[layer, row, token]) / 4
    found = hidden_state_errors(torch.tensor(student).unbind(), torch.tensor(teacher).unbind())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_layer_stands_for_several_of_a_deeper_teacher():
    """Of 2 layers and 6: the embeddings, and the third and sixth layer."""
    student, teacher = torch.randn(3, 2, 5, 7), torch.randn(7, 2, 5, 7)
    found = hidden_state_errors(student.unbind(), teacher.unbind())
    torch.testing.assert_close(found, hidden_state_errors(student.unbind(), teacher[[0, 3, 6]].unbind()))
    match_models(bert(BertModel), bert(BertModel, num_hidden_layers=4))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_is_that_of_the_softened_distributions(temperature):
    draw = np.random.default_rng(1).normal
    student, teacher = draw(size=(2, 3, 7)) * 3, draw(size=(2, 3, 7)) * 3
    p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(-1, keepdims=True) for x in (teacher, student))
    found = logit_divergence(torch.tensor(student), torch.tensor(teacher), temperature)
    np.testing.assert_allclose(found, temperature**2 * (p * np.log(p / q)).sum(-1), rtol=1e-5)


def test_padding_is_no_answer():
    """A sequence of three tokens has the divergence of its three logits, however far it is padded."""
    logits = torch.randn(2, 2, 1, 5)
    outputs = [dict(zip(("start_logits", "end_logits"), pair)) for pair in logits]
    found = answer_divergence(*outputs, torch.tensor([[1, 1, 1, 0, 0]]), 2.0)
    alone = [logit_divergence(logits[0, i, :, :3], logits[1, i, :, :3], 2.0) for i in range(2)]
    torch.testing.assert_close(found, (alone[0] + alone[1]) / 2)


def test_metrics_are_means_over_tokens_and_sequences():
    rows = np.array([[2, 1.0, 1.5, 4.0, 0.5], [3, 2.0, 2.5, 1.0, 0.7]])
    found = distillation_metrics(SimpleNamespace(predictions=rows))
    assert found == pytest.approx({"loss": 0.6 + 1 + 0.6, "hidden_loss": 0.6, "cosine": 0.8, "logit_loss": 1 + 0.6})
    assert distillation_metrics(SimpleNamespace(predictions=rows[:, :3])).keys() == {"loss", "hidden_loss", "cosine"}


# ---- one step, however the batch is cut ----


class Texts(torch.utils.data.Dataset):
    """Eight rows of unequal length, padded to eleven tokens."""

    def __init__(self):
        ids = torch.randint(5, 60, (8, 11), generator=torch.Generator().manual_seed(2))
        mask = (torch.arange(11) < torch.arange(3, 11)[:, None]).long()
        self.columns = {"input_ids": ids * mask, "attention_mask": mask}

    def __len__(self):
        return 8

    def __getitems__(self, indices):
        return {name: values[indices] for name, values in self.columns.items()}


def one_step(student, teacher, folder, batch, accumulation):
    args = FnlTrainingArguments(
        str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1,
        use_cpu=True, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        do_train=True,
    )  # fmt: skip
    capture, texts = Gradients(), Texts()
    trainer = DistillationTrainer(
        copy.deepcopy(student), args, teacher=copy.deepcopy(teacher), train_dataset=texts, eval_dataset=texts,
        data_collator=collate_batch, callbacks=[capture], compute_metrics=distillation_metrics,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    return trainer.state.log_history, capture.gradients, before


def bert(kind, **entries):
    return kind(BertConfig(**SIZES | entries))


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForSequenceClassification, BertForQuestionAnswering])
def test_a_step_is_of_the_global_batch(kind, tmp_path):
    """Its gradient is that of the formula on all rows at once in float64, whatever they are padded with."""
    student, teacher = bert(kind), bert(kind)
    logged, whole, before = one_step(student, teacher, tmp_path / "whole", 8, 1)
    _, parts, _ = one_step(student, teacher, tmp_path / "parts", 2, 4)
    student, teacher, texts = student.double().eval(), teacher.double().eval(), Texts().columns
    own, other = (model(**texts, output_hidden_states=True) for model in (student, teacher))
    mask, loss = texts["attention_mask"].bool(), 0.0
    for h, t in zip(own.hidden_states, other.hidden_states):
        loss = loss + (((h - t) ** 2).sum(-1) / (t**2).sum(-1))[mask].mean() / 3
    divergence = torch.nn.functional.kl_div
    if kind is BertForMaskedLM:
        q, p = (out.logits[mask].log_softmax(-1) for out in (own, other))
        loss = loss + divergence(q, p, log_target=True, reduction="batchmean")
    if kind is BertForSequenceClassification:
        q, p = (out.logits.log_softmax(-1) for out in (own, other))
        loss = loss + divergence(q, p, log_target=True, reduction="batchmean")
    if kind is BertForQuestionAnswering:
        for name in ("start_logits", "end_logits"):
            for row in range(8):
                q, p = (out[name][row, : 3 + row].log_softmax(-1) for out in (own, other))
                loss = loss + divergence(q, p, log_target=True, reduction="sum") / 8
    loss.backward()
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert losses == [pytest.approx(loss.item(), rel=1e-3)] and before["eval_loss"] == pytest.approx(
        loss.item(), rel=1e-4
    )
    expected = {name: p.grad.float() for name, p in student.named_parameters() if p.grad is not None}
    assert expected.keys() == whole.keys() == parts.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(whole[name], gradient, atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(parts[name], gradient, atol=2e-5, rtol=1e-3)


def test_a_model_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    model = bert(BertForMaskedLM)  # with dropout
    logged, gradients, before = one_step(model, model, tmp_path, 8, 1)
    assert next(entry["loss"] for entry in logged if "loss" in entry) == before["eval_loss"] == 0.0
    assert before["eval_cosine"] == pytest.approx(1.0) and max(g.abs().max() for g in gradients.values()) < 1e-6


def test_attention_whose_dropout_is_a_number_drops_nothing():
    sizes = {"d_model": 20, "d_kv": 4, "d_ff": 33, "num_layers": 2, "num_heads": 5}
    model = T5EncoderModel(T5Config(vocab_size=60, dropout_rate=0.5, **sizes)).train()
    drop_nothing(model)
    ids = torch.arange(7)[None]
    assert torch.equal(*(model(input_ids=ids).last_hidden_state for _ in range(2))) and model.config.dropout_rate == 0.5


def test_models_that_return_tuples_learn_as_those_that_return_mappings(tmp_path):
    """``return_dict: false`` is in the configurations of some checkpoints."""
    student, teacher = bert(BertForMaskedLM), bert(BertForMaskedLM)
    losses = []
    for kind in ("mappings", "tuples"):
        student.config.return_dict = teacher.config.return_dict = kind == "mappings"
        logged, _, before = one_step(student, teacher, tmp_path / kind, 8, 1)
        losses.append((before["eval_loss"], next(entry["loss"] for entry in logged if "loss" in entry)))
    assert losses[0] == losses[1]


# ---- which models ----


def small(kind):
    if kind is DistilBertModel:
        return kind(DistilBertConfig(vocab_size=60, dim=20, n_layers=2, n_heads=5, hidden_dim=33))
    if kind is GPT2Model:
        return kind(GPT2Config(vocab_size=60, n_embd=20, n_layer=2, n_head=5, n_positions=19))
    return kind(RobertaConfig(**SIZES))


@pytest.mark.parametrize("kind", [DistilBertModel, GPT2Model, RobertaForMaskedLM])
def test_any_encoder_learns_from_another(kind):
    student, teacher = small(kind), bert(BertModel)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    logits = match_models(student, teacher)
    assert logits == {}
    outputs = [model(input_ids=torch.arange(7)[None], output_hidden_states=True) for model in (student, teacher)]
    distillation_sums(*outputs, torch.ones(1, 7), logits).sum().backward()
    reached = {name for name, p in student.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in student.named_parameters() if p.requires_grad} <= trainable
    assert student.config._attn_implementation == small(kind).config._attn_implementation


@pytest.mark.parametrize("kind, entries, expected", [
    (BertForMaskedLM, {}, {"logits": "tokens"}),
    (BertForPreTraining, {}, {"prediction_logits": "tokens", "seq_relationship_logits": "sequences"}),
    (BertForQuestionAnswering, {}, {"start_logits": "positions", "end_logits": "positions"}),
    (BertForSequenceClassification, {}, {"logits": "sequences"}),
    (BertForSequenceClassification, {"num_labels": 3}, {"logits": "sequences"}),
    (BertForSequenceClassification, {"num_labels": 1}, {}), (BertForTokenClassification, {"num_labels": 1}, {}),
    (ElectraForPreTraining, {"embedding_size": 20}, {}),
])  # fmt: skip
def test_logits_are_compared_where_they_are_of_classes(kind, entries, expected):
    """A regression's number, or one of each token, has no distribution: the head stays as it is."""
    config = kind.config_class(**SIZES | entries)
    student, teacher = kind(config), kind(config)
    assert match_models(student, teacher) == expected
    heads = ("cls", "qa_outputs", "classifier", "discriminator_predictions")
    assert {p.requires_grad for name, p in student.named_parameters() if name.startswith(heads)} == {expected != {}}
    inputs = {"input_ids": torch.randint(60, (5, 7)), "output_hidden_states": True}
    rows = distillation_sums(student(**inputs), teacher(**inputs), torch.ones(5, 7), expected)
    assert rows.shape == (5, 5 if expected else 3)


UNMATCHED = {
    "depth": (bert(BertModel), bert(BertModel, num_hidden_layers=3), "has 2 layers of size 20, the teacher 3 of"),
    "size": (bert(BertModel, hidden_size=30), bert(BertModel), "has 2 layers of size 30, the teacher 2 of size 20$"),
    "classes": (
        bert(BertForSequenceClassification, num_labels=3), bert(BertForSequenceClassification),
        "student's logits have 3 classes, the teacher's 2: they must",
    ),
    "images": (
        bert(BertModel),
        ViTModel(ViTConfig(hidden_size=20, num_hidden_layers=2, num_attention_heads=5, image_size=20, patch_size=5)),
        "ViTModel cannot be distilled: ",
    ),
    "decoder": (T5Model(T5Config(vocab_size=60, d_model=20, d_kv=5, d_ff=9, num_layers=2, num_heads=4)),
                bert(BertModel), "T5Model cannot be distilled: "),
}  # fmt: skip


@pytest.mark.parametrize("name", UNMATCHED)
def test_models_that_do_not_match_are_refused(name):
    student, teacher, message = UNMATCHED[name]
    with pytest.raises(UserInputError, match=message):
        match_models(student, teacher)


# ---- the script ----


@pytest.fixture(scope="module")
def pair(corpus, tmp_path_factory):
    """A teacher, and its compressed copy as sentence-transformers keeps one."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = train_tokenizer(texts_of(corpus), 60, model_max_length=64)
    torch.manual_seed(3)
    model = bert(BertModel)
    model.save_pretrained(folder / "teacher")
    student = fnl_hf.factorize(model, FactorizationConfig(target_ratio=0.5, include=["encoder.*"]))
    student.save_pretrained(folder / "student")
    tokenizer.mask_token = None
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(folder / name)
    (folder / "student" / "1_Pooling").mkdir()
    for name, content in COMPANIONS.items():
        (folder / "student" / name).write_text(json.dumps(content))
    return folder


def texts_of(corpus):
    return Dataset.from_dict({"text": corpus.read_text().splitlines()})


def command(corpus, pair, out, **flags):
    own = {"objective": "distill", "model_name_or_path": pair / "student", "teacher_name_or_path": pair / "teacher",
           "vocab_size": None, "config_overrides": None}  # fmt: skip
    return pretraining(corpus, out, **own | flags)


STREAM = {"streaming": "true", "streaming_validation_documents": 9}
BEST = {"eval_strategy": "steps", "eval_steps": 5, "metric_for_best_model": "cosine", "load_best_model_at_end": "true"}


@pytest.fixture(scope="module")
def distilled(corpus, pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled") / "out"
    run_pretrain.run(command(corpus, pair, out, **BEST))
    return out


def test_a_distilled_checkpoint_is_what_its_student_was(distilled, pair):
    model = AutoModel.from_pretrained(distilled)
    assert type(model) is BertModel and any(isinstance(m, FactorizedLayer) for m in model.encoder.modules())
    assert model.config.hidden_dropout_prob == 0.1
    assert {name: json.loads((distilled / name).read_text()) for name in COMPANIONS} == COMPANIONS
    before, after, teacher = weights(pair / "student"), weights(distilled), weights(pair / "teacher")
    assert before.keys() == after.keys()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {"pooler.dense.bias", "pooler.dense.weight"}
    assert torch.equal(teacher["pooler.dense.weight"], after["pooler.dense.weight"])
    history = json.loads((distilled / "trainer_state.json").read_text())["log_history"]
    cosines = [entry["eval_cosine"] for entry in history if "eval_cosine" in entry]
    assert cosines == sorted(cosines) and cosines[-1] > 0.9
    results = json.loads((distilled / "all_results.json").read_text())
    assert results["eval_loss"] == results["eval_hidden_loss"] and "unigram_entropy" not in results
    card = (distilled / "README.md").read_text()
    assert "| teacher | teacher |" in card and "| base model | student |" in card and "masked |" not in card
    assert "pipeline_tag: sentence-similarity" in card and "import AutoModel, AutoTokenizer" in card


def test_a_stopped_distillation_goes_on_to_the_same_weights(distilled, corpus, pair, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(distilled, out)
    for name in ("all_results.json", "model.safetensors", "trainer_state.json"):
        (out / name).unlink()
    for step in (10, 12):
        shutil.rmtree(out / f"checkpoint-{step}")
    run_pretrain.run(command(corpus, pair, out, **BEST, resume_from_checkpoint="auto"))
    assert_same_weights(distilled, out)


def test_a_run_belongs_to_its_teacher(distilled, corpus, pair, tmp_path):
    out, other = tmp_path / "out", tmp_path / "teacher"
    shutil.copytree(distilled, out)
    shutil.copytree(pair / "teacher", other)
    with pytest.raises(UserInputError, match="contains another run: teacher_name_or_path was"):
        run_pretrain.run(command(corpus, pair, out, **BEST, teacher_name_or_path=other, resume_from_checkpoint="auto"))
    moved = tmp_path / "pair"
    shutil.copytree(pair, moved)
    run_pretrain.run(command(corpus, moved, tmp_path / "moved", max_steps=1, save_strategy="no"))
    torch.manual_seed(9)
    bert(BertModel).save_pretrained(moved / "teacher")
    with pytest.raises(
        UserInputError, match="moved contains a run that has a teacher with other weights: the checksum"
    ):
        run_pretrain.run(
            command(corpus, moved, tmp_path / "moved", max_steps=1, save_strategy="no", resume_from_checkpoint="auto")
        )


@pytest.mark.parametrize("by_line", ["true", "false"])
def test_two_processes_distil_as_one_does(corpus, pair, tmp_path, by_line):
    """Also where their batches differ in length."""
    common = {
        "line_by_line": by_line,
        "max_steps": 4,
        "save_strategy": "no",
        "adam_epsilon": 1e-3,
        "do_train": "true",
        "do_eval": "true",
    }
    one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run_pretrain.run(command(corpus, pair, tmp_path / "one", **common | one))
    launch(
        "run_pretrain.py",
        *command(corpus, pair, tmp_path / "two", per_device_train_batch_size=4, **common),
        processes=2,
    )
    assert_same_weights(tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=0)
    one, two = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two"))
    for name in ("eval_loss", "eval_cosine"):
        assert two[name] == pytest.approx(one[name], abs=1e-5)


def test_streams_and_documents_of_their_own(finished_runs, corpus, tmp_path):
    """An FNL-BERT learns from another on a stream; whether documents see each other changes what it learns."""
    config = FnlBertForMaskedLM.from_pretrained(finished_runs.run).config
    torch.manual_seed(4)
    FnlBertForMaskedLM(config).save_pretrained(tmp_path / "student")
    shutil.copytree(finished_runs.run, tmp_path / "teacher", ignore=shutil.ignore_patterns("checkpoint-*"))
    for file in finished_runs.run.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "student")
    flags = STREAM | {"max_steps": 3, "save_strategy": "no"}
    for within in ("true", "false"):
        run_pretrain.run(command(corpus, tmp_path, tmp_path / within, **flags, attend_within_documents=within))
    results = [json.loads((tmp_path / within / "all_results.json").read_text()) for within in ("true", "false")]
    assert all(result["eval_logit_loss"] > 0 for result in results)
    assert results[0]["eval_loss"] != results[1]["eval_loss"]


def test_a_classifier_is_distilled_on_single_texts(pair, corpus, tmp_path):
    """Packed texts would have logits of several texts together."""
    tokenizer = AutoTokenizer.from_pretrained(pair / "teacher")
    sizes = {"num_labels": 3, "initializer_range": 0.5}  # so large that the logits depend on the text
    models = {name: bert(BertForSequenceClassification, **sizes).eval() for name in ("student", "teacher")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    flags = {"validation_file": corpus, "max_seq_length": 13, "do_train": "false", "do_eval": "true"}
    for name, own in {"default": {}, "packed": {"line_by_line": "false"}, "single": {"line_by_line": "true"}}.items():
        run_pretrain.run(command(corpus, tmp_path, tmp_path / name, **flags | own))
    found = {
        name: json.loads((tmp_path / name / "all_results.json").read_text())["eval_logit_loss"]
        for name in ("default", "packed", "single")
    }
    texts = [text for text in corpus.read_text().splitlines() if text.strip()]
    with torch.no_grad():
        inputs = [tokenizer(text, truncation=True, max_length=13, return_tensors="pt") for text in texts]
        own, other = (torch.cat([model(**each).logits for each in inputs]).log_softmax(-1) for model in models.values())
    expected = torch.nn.functional.kl_div(own, other, reduction="batchmean", log_target=True).item()
    assert found["default"] == found["single"] == pytest.approx(expected, rel=1e-4)
    assert abs(found["packed"] / expected - 1) > 0.01
    with pytest.raises(UserInputError, match="^--line_by_line true, the default if a classifier .* leave out --stream"):
        run_pretrain.run(command(corpus, tmp_path, tmp_path / "stream", max_steps=1, **STREAM))


REFUSED = {
    "no teacher": ({"teacher_name_or_path": None}, "^--objective distill needs --teacher_name_or_path$"),
    "no student": ({"model_name_or_path": None}, "^--objective distill needs --model_name_or_path$"),
    "teacher without distillation": (
        {"objective": "mlm"},
        r"^--teacher_name_or_path \(.*\) needs --objective distill$",
    ),
    "another student": (
        {"config_overrides": "hidden_dropout_prob=0.0"},
        r"as it is: leave out --config_overrides \(hid",
    ),
    "another E": ({"attention_embedding_size": 10}, r"as it is: leave out --attention_embedding_size \(10\)$"),
    "documents in a stock BERT": (
        {"attend_within_documents": "true"},
        "needs an FNL-BERT, but .*student is a BertModel",
    ),
    "positions": ({"max_seq_length": 23}, r"\(23\) exceeds /.*/student's max_position_embeddings \(19\)$"),
    "positions of the teacher": (
        {"teacher_name_or_path": "<short>"},
        r"^--max_seq_length \(16\) exceeds /.*/short's max_position_embeddings \(9\)$",
    ),
    "a teacher's table that is too small": (
        {"teacher_name_or_path": "<narrow>"},
        r"needs a vocabulary of 60, more than /.*/narrow's vocab_size \(59\)$",
    ),
    "a teacher without tokenizer": (
        {"teacher_name_or_path": "<bare>"},
        "^the tokenizer of /.*/bare has only its 5 special tokens and no vocabulary$",
    ),
    "no such teacher": ({"teacher_name_or_path": "/no/such"}, "^no tokenizer in /no/such: "),
    "another vocabulary": (
        {"teacher_name_or_path": "<vocabulary>"},
        r"must have the vocabulary of its student: '.*' has",
    ),
    "another depth": (
        {"teacher_name_or_path": "<depth>"},
        "the student has 2 layers of size 20, the teacher 3 of size 20$",
    ),
    "weights of something else": ({"teacher_name_or_path": "<empty>"}, "contains none of the weights of BertModel$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_distillations_are_refused(name, corpus, pair, tmp_path):
    flags, message = REFUSED[name]
    places = {f"<{kind}>": tmp_path / kind for kind in ("vocabulary", "depth", "empty", "short", "narrow", "bare")}
    for kind, place in places.items():
        if kind in flags.values():
            shutil.copytree(pair / "teacher", place)
    if "<vocabulary>" in flags.values():
        train_tokenizer(texts_of(corpus), 50, model_max_length=64).save_pretrained(tmp_path / "vocabulary")
    for kind, entries in (
        ("depth", {"num_hidden_layers": 3}), ("short", {"max_position_embeddings": 9}), ("narrow", {"vocab_size": 59}),
    ):  # fmt: skip
        if f"<{kind}>" in flags.values():
            bert(BertModel, **entries).save_pretrained(tmp_path / kind)
    if "<bare>" in flags.values():
        for file in (tmp_path / "bare").glob("tokenizer*"):
            file.unlink()
    if "<empty>" in flags.values():
        save_file({"x": torch.ones(3)}, tmp_path / "empty" / "model.safetensors", metadata={"format": "pt"})
    flags = {flag: places.get(value, value) for flag, value in flags.items()}
    with pytest.raises(UserInputError, match=message):
        run_pretrain.run(command(corpus, pair, tmp_path / "out", **flags))
    assert not (tmp_path / "out").exists()
