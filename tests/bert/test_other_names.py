"""RoBERTa, XLM-R, CamemBERT, DistilBERT and ELECTRA as BERTs. The oracle: what their own classes compute."""

import logging

import pytest
import torch
import transformers
from transformers import (
    AlbertConfig,
    AlbertModel,
    DebertaConfig,
    DebertaModel,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    ElectraForPreTraining,
    RobertaForCausalLM,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    RobertaPreTrainedModel,
)

import fnl_hf
from fnl_hf.bert import modeling_fnl_bert
from tests.conftest import DIMENSIONS

# Class names, and what the configuration says beside the dimensions; each has a padding id of its own.
ROBERTA = {"pad_token_id": 2, "bos_token_id": 3, "eos_token_id": 5, "type_vocab_size": 1, "layer_norm_eps": 1e-3}
ARCHITECTURES = {
    "Roberta": ROBERTA,
    "XLMRoberta": ROBERTA | {"pad_token_id": 1, "classifier_dropout": 0.3},
    "Camembert": ROBERTA | {"pad_token_id": 0, "tie_word_embeddings": False},
    "DistilBert": {"pad_token_id": 4, "hidden_dim": 35, "activation": "relu", "sinusoidal_pos_embds": True},
    "Electra": {"pad_token_id": 3, "embedding_size": 42, "layer_norm_eps": 1e-2, "type_vocab_size": 3},
}
HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice",
         "ForQuestionAnswering"]  # fmt: skip
OTHER_HEADS = {
    ("DistilBert", "ForSequenceClassification"): "its layers have a ReLU in between, those of BERT a tanh",
    ("DistilBert", "ForMultipleChoice"): "its layers have a ReLU in between, those of BERT a tanh",
    ("Electra", "ForSequenceClassification"): "its layers have a GELU in between, those of BERT a tanh",
    ("Electra", "ForMultipleChoice"): r"its pooling \(summary_type, summary_activation\) is not BERT's",
}
EXACT = [(name, head) for name in ARCHITECTURES for head in HEADS if (name, head) not in OTHER_HEADS]


def make(name, head="Model", **entries):
    """A model with weights and biases large enough that every part shows in its output."""
    sizes = {key: value for key, value in DIMENSIONS.items() if name != "DistilBert" or key != "intermediate_size"}
    labels = {} if head == "ForQuestionAnswering" or "id2label" in entries else {"num_labels": 7}
    config = getattr(transformers, f"{name}Config")(**sizes | labels | ARCHITECTURES[name] | entries)
    model = getattr(transformers, name + head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def ours(head):
    return getattr(modeling_fnl_bert, f"FnlBert{head}")


def right_padded(batch, model, head="Model"):
    padded = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, model.config.pad_token_id)}
    return {name: value[:4].view(2, 2, -1) for name, value in padded.items()} if "Choice" in head else padded


def outputs(model, inputs):
    """The first output, and what else a head for questions has, without padding."""
    with torch.no_grad():
        found = model(**inputs)
    mask = inputs["attention_mask"]
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    parts = [getattr(found, name) for name in names if getattr(found, name, None) is not None]
    return [part[mask.bool()] if part.shape[:2] == mask.shape and mask.dim() == 2 else part for part in parts]


@pytest.mark.parametrize("name, head", EXACT, ids="".join)
def test_each_head_computes_what_it_did(name, head, batch):
    model = make(name, head)
    converted = ours(head).from_bert(model)
    back = converted.to_bert()
    assert type(converted) is ours(head) and type(back).__name__ == f"Bert{head}" and back.config.model_type == "bert"
    inputs = right_padded(batch, model, head)
    for other in (converted, back):
        for expected, found in zip(outputs(model, inputs), outputs(other, inputs)):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    theirs, config = model.config, converted.config
    shift = theirs.pad_token_id + 1 if "bert" in name and "Distill" not in name else 0
    assert config.max_position_embeddings == 19 - shift and config.num_labels == theirs.num_labels
    for entry in ("pad_token_id", "bos_token_id", "eos_token_id", "hidden_size", "num_attention_heads", "vocab_size",
                  "num_hidden_layers", "tie_word_embeddings", "initializer_range"):  # fmt: skip
        assert getattr(config, entry) == getattr(theirs, entry)
    for entry in ("layer_norm_eps", "type_vocab_size", "classifier_dropout"):
        assert getattr(config, entry) == getattr(theirs, entry, getattr(transformers.BertConfig(), entry))
    assert config.hidden_act == ("relu" if name == "DistilBert" else "gelu") and config.intermediate_size == 35
    assert not {"dim", "embedding_size", "summary_type", "activation"} & config.to_dict().keys()


@pytest.mark.parametrize("name", ["Roberta", "DistilBert"])
def test_heads_of_a_smaller_rank_are_those_of_the_bert_that_it_is(name, batch):
    model = make(name, "ForMaskedLM")
    calibration = [right_padded(batch, model)]
    bert = fnl_hf.FnlBertForMaskedLM.from_bert(model).to_bert()
    small, lost = fnl_hf.FnlBertForMaskedLM.from_bert(model, 21, calibration, output_truncations=True)
    expected = fnl_hf.FnlBertForMaskedLM.from_bert(bert, 21, calibration)
    assert lost[0].name == "bert.encoder.layer.0.attention.qk" and small.config.mha_embedding_size == 21
    for name, weight in expected.state_dict().items():
        assert torch.equal(small.state_dict()[name], weight)


@pytest.mark.parametrize("token_type", [0, 1])
def test_without_token_types_none_changes_anything(batch, token_type):
    model = make("DistilBert")
    inputs = right_padded(batch, model)
    types = {"token_type_ids": torch.full_like(inputs["input_ids"], token_type)}
    expected, found = outputs(model, inputs)[0], outputs(ours("Model").from_bert(model), inputs | types)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_user_entries_of_a_configuration_stay():
    model = make("DistilBert", "ForTokenClassification", id2label={0: "O", 1: "B"}, mine=[3], layer_norm_eps=5.0)
    config = ours("ForTokenClassification").from_bert(model).config
    assert config.id2label == {0: "O", 1: "B"} and config.mine == [3]
    assert config.layer_norm_eps == 1e-12  # which a DistilBERT has, whatever its configuration says


# ---- heads ----


@pytest.mark.parametrize("name, head", OTHER_HEADS, ids="".join)
def test_a_head_that_computes_something_else_is_refused_or_left_out(name, head, batch, caplog, tmp_path):
    model, reason = make(name, head), OTHER_HEADS[name, head]
    refused = rf"{name}{head}: its head \({head}\) cannot be converted: {reason}"
    with pytest.raises(ValueError, match=f"^{refused}"):
        ours(head).from_bert(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: its head \({head}\) cannot"):
        ours(head).from_bert(tmp_path)
    with caplog.at_level(logging.WARNING, logger="fnl_hf"):
        encoder = ours("ForTokenClassification").from_bert(model).bert
    assert f"({name}{head}) is left out" in caplog.text and "newly initialized" in caplog.text
    inputs = right_padded(batch, model)
    torch.testing.assert_close(outputs(encoder, inputs)[0], outputs(model.base_model, inputs)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Camembert", "Electra"])
def test_a_head_for_masked_tokens_has_one_activation_with_the_layers(name):
    model = make(name, "ForMaskedLM", hidden_act="relu")
    for head in ("ForMaskedLM", "ForPreTraining"):  # of which it is a part
        with pytest.raises(ValueError, match=r"its layers have a GELU in between, those of BERT hidden_act \('relu'\)"):
            ours(head).from_bert(model)
    ours("Model").from_bert(model)


class RobertaForRanking(RobertaPreTrainedModel):
    """A head that transformers does not have."""

    def __init__(self, config):
        super().__init__(config)
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.score = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()


@pytest.mark.parametrize("kind", [ElectraForPreTraining, RobertaForCausalLM, RobertaForRanking])
def test_of_a_model_with_a_head_of_another_task_the_encoder_is_taken(kind, batch, caplog):
    """ELECTRA's head for pretraining finds replaced tokens; it is not BERT's of the same name."""
    name = kind.__name__.partition("For")[0]
    model = kind(make(name).config).eval()
    with caplog.at_level(logging.WARNING, logger="fnl_hf"):
        converted = ours("ForPreTraining").from_bert(model)
    assert f"({kind.__name__}) is left out: BERT has no head for its task" in caplog.text
    assert "newly initialized" in caplog.text and "bert.pooler.dense.weight, cls.predictions.bias" in caplog.text
    inputs = right_padded(batch, model)
    expected = outputs(model.base_model, inputs)[0]
    torch.testing.assert_close(outputs(converted.bert, inputs)[0], expected, atol=1e-5, rtol=0)


def test_a_head_for_masked_tokens_is_a_part_of_that_for_pretraining(batch, tmp_path):
    model = make("Roberta", "ForMaskedLM")
    model.save_pretrained(tmp_path)
    inputs = right_padded(batch, model)
    for source in (model, tmp_path):
        found = ours("ForPreTraining").from_bert(source)(**inputs).prediction_logits[inputs["attention_mask"] == 1]
        torch.testing.assert_close(found, outputs(model, inputs)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [RobertaForMaskedLM, DistilBertForMaskedLM])
def test_a_checkpoint_without_the_head_gets_a_new_one(kind, batch, tmp_path):
    """Also where the head of that name would be refused: DistilBERT's."""
    model = make(kind.__name__.removesuffix("ForMaskedLM"), "ForMaskedLM", num_labels=2)
    model.save_pretrained(tmp_path)
    inputs = right_padded(batch, model)
    for head in ("ForSequenceClassification", "ForQuestionAnswering", "ForNextSentencePrediction"):
        converted = ours(head).from_bert(tmp_path)
        expected = outputs(model.base_model, inputs)[0]
        torch.testing.assert_close(outputs(converted.bert, inputs)[0], expected, atol=1e-5, rtol=0)
    with_head = ours("ForMaskedLM").from_bert(tmp_path)
    torch.testing.assert_close(outputs(with_head, inputs)[0], outputs(model, inputs)[0], atol=1e-5, rtol=0)


# ---- what is refused ----


def decoder():
    return RobertaForMaskedLM(make("Roberta", is_decoder=True).config)


def wrapped():
    model = make("Roberta", "ForSequenceClassification")
    model.classifier.dense = torch.nn.Sequential(model.classifier.dense)
    return model


def factorized():
    model = make("DistilBert")
    fnl_hf.factorize(model, fnl_hf.FactorizationConfig(rank_scale=0.5, include=["lin1"]))
    return model


def relative():
    model = make("Electra")
    model.config.position_embedding_type = "relative_key"
    return model


@pytest.mark.parametrize(
    "source, message",
    [
        (lambda: make("Electra", embedding_size=15), r"embedding_size \(15\) must equal hidden_size \(42\)"),
        (decoder, r"it is a decoder \(is_decoder or add_cross_attention\): BERT is an encoder"),
        (relative, r"ElectraModel: position_embedding_type \('relative_key'\) must be 'absolute'"),
        (wrapped, "it lacks bert.pooler.dense.bias, bert.pooler.dense.weight and has bert.pooler.dense.0.bias"),
        (factorized, "transformer.layer.0.ffn.lin1 is a product of matrices: make it dense first"),
        (
            lambda: DebertaModel(DebertaConfig(**DIMENSIONS)),
            "^DebertaModel: model type 'deberta' cannot be converted: it must be one of bert, fnl_bert, roberta, "
            "xlm-roberta, camembert, distilbert, electra$",
        ),
        (lambda: AlbertModel(AlbertConfig(**DIMENSIONS, embedding_size=15)), "model type 'albert' cannot be converted"),
    ],
)
def test_what_is_no_bert_is_refused(source, message):
    model = source()
    head = "ForSequenceClassification" if isinstance(model, RobertaForSequenceClassification) else "Model"
    with pytest.raises(ValueError, match=message):
        ours(head).from_bert(model)


def test_a_distilbert_of_another_task_is_not_the_wanted_head_by_its_name_alone():
    """Its ``classifier`` reads a ReLU, so that BERT's for tokens must not start from it."""
    model = DistilBertForSequenceClassification(make("DistilBert").config)
    converted = ours("ForTokenClassification").from_bert(model)
    assert not torch.equal(converted.classifier.weight, model.classifier.weight)
