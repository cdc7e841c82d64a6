"""Models and tokenizers that run_pretrain.py refuses."""

import pytest
import torch
from safetensors.torch import save
from transformers import GPT2Config, RobertaConfig

from tests.bad_inputs import (
    SPECIALS,
    assert_refused,
    bert,
    flags,
    not_finite,
    prepared,
    pretrained,
    tokenizer,
    without,
    word_level,
    write,
)

# name -> what makes the bad input, and what the message says of it
MODELS = {
    "E no multiple of heads": (
        flags(attention_embedding_size=15), r"attention_embedding_size \(15\) must be a positive multiple of .*\(2\)$"
    ),
    "spectral with E above d": (
        flags(attention_embedding_size=64, attention_init="spectral"), r"\(64\) must be at most hidden_size \(32\)"
    ),
    "no configuration": (flags(config_name="/no/such"), "^no usable configuration in /no/such: "),
    "torn configuration": (
        prepared(write("config.json", "{"), config_name="<here>"), "^no usable configuration in .*JSON"
    ),
    "another architecture": (
        prepared(GPT2Config().save_pretrained, config_name="<here>"),
        "is a 'gpt2' checkpoint: it must be of model type 'bert' or 'fnl_bert'$",
    ),
    "a BERT by another name": (
        prepared(RobertaConfig().save_pretrained, config_name="<here>"),
        "is a 'roberta' checkpoint: .* 'fnl_bert'; `fnl-hf convert` can make one of it$",
    ),
    "unknown architecture": (bert("no_such"), "^no usable configuration in .* has model type `no_such`"),
    "a word for a number": (bert(hidden_size="big"), "Field 'hidden_size' expected int, got str .value: 'big'.$"),
    "no layers": (bert(num_hidden_layers=0), r"num_hidden_layers \(0\) must be at least 1"),
    "dropout that is no number": (
        flags(config_overrides="hidden_dropout_prob=nan"), r"hidden_dropout_prob \(nan\) must be at least 0.0 and"
    ),
    "unknown activation": (bert(hidden_act="nope"), r"hidden_act \(nope\) is not an activation"),
    "vocabulary too small": (bert(vocab_size=7), r"needs a vocabulary of \d+, more than the model's vocab_size \(7\)$"),
    "positions too few": (
        bert(max_position_embeddings=9), r"^--max_seq_length \(16\) exceeds the model's max_position_embeddings \(9\)$"
    ),
    "sentences without types": (
        flags(objective="mlm_nsp", config_overrides="type_vocab_size=1"), r"needs a type_vocab_size \(1\) of at least 2"
    ),
    "too large for the machine": (flags(config_overrides="hidden_size=1000000000000"), "can.t allocate memory"),
    "unknown override": (flags(config_overrides="no_such=3"), "^--config_overrides no_such=3: key no_such isn't"),
    "override without value": (
        flags(config_overrides="hidden_size"), "^--config_overrides hidden_size must have the form"
    ),
    "override of nothing": (
        flags(config_overrides="attention_embedding_size=4"), "^--config_overrides attention_embedding_size=4: "
    ),
    "a configuration of products": (
        bert(quantization_config={"quant_method": "fnl_factorized", "layers": {}}),
        "^--config_name .* is of a model with factorized or quantized layers, .*: use --model_name_or_path .*.json$",
    ),
    "two sources": (flags(preset="base", config_name="x"), "^give only one of --preset, .* and --config_name$"),
    "another E": (pretrained(attention_embedding_size=8), r"\(8\) differs from that of .* \(32\)$"),
    "other shapes": (
        pretrained(config_overrides="intermediate_size=11"),
        r"intermediate.dense.bias has shape \(37,\) in .* and \(11,\) in this model$",
    ),
    "torn weights": (pretrained(write("model.safetensors", "torn")), "^no model of the required kind .* deserializing"),
    "weights of something else": (
        pretrained(write("model.safetensors", save({"x": torch.ones(3)}, {"format": "pt"}))),
        "contains none of the model's weights",
    ),
    "weights that are no numbers": (pretrained(not_finite), "model: bert.* has values that are not finite$"),
    "no tokenizer": (flags(tokenizer_name="/no/such"), "^no tokenizer in /no/such: "),
    "torn tokenizer": (tokenizer(write("tokenizer.json", "{")), "^no tokenizer in "),
    "tokenizer that is a list": (tokenizer(write("tokenizer_config.json", "[]")), "^no tokenizer in "),
    "tokenizer without words": (
        tokenizer(without("tokenizer.json")), "has only its 5 special tokens and no vocabulary$"
    ),
    "tokenizer without [MASK]": (
        tokenizer(word_level(**SPECIALS | {"mask_token": None})), r"the tokenizer of .* has no \['mask_token'\]$"
    ),
    "whole words that no piece shows": (
        tokenizer(
            word_level(**SPECIALS), whole_word_mask="true"
        ),
        "^--whole_word_mask needs a tokenizer that marks word pieces with '##', '▁' or 'Ġ': that of .* does not$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_is_refused_in_one_line_and_changes_nothing(workspace, name):
    assert_refused(workspace, *MODELS[name])
