# Copyright 2026 The fnl_hf authors. Licensed under the Apache License, Version 2.0.
"""BERTs by another name: the names that other models of Transformers use for the parts of a BERT.

RoBERTa (Liu et al. 2019), XLM-R (Conneau et al. 2020), CamemBERT (Martin et al. 2020), DistilBERT (Sanh et al. 2019)
and ELECTRA (Clark et al. 2020) compute the same as a BERT, except for what :data:`NAMINGS` lists.

This file travels with checkpoints: it imports only torch, transformers, and its neighbors by relative name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)


class Naming(NamedTuple):
    """Where an architecture differs from BERT.

    Attributes:
        classes: what the names of its classes begin with.
        parts: parts of the names of its weights -> BERT's.
        entries: those of its configuration -> BERT's.
        constants: entries of BERT's that it has none for.
        counts_from_padding: its first position is the padding id + 1.
        predicts_with_gelu: its head for masked tokens has a GELU, whatever ``hidden_act`` is.
        other_heads: heads that compute something else than BERT's of the same name -> what.
    """

    classes: str
    parts: Mapping[str, str]
    entries: Mapping[str, str] = {}
    constants: Mapping[str, Any] = {}
    counts_from_padding: bool = False
    predicts_with_gelu: bool = False
    other_heads: Mapping[str, str] = {}


TOKEN_TYPES = 2  # BERT's
ROBERTA = Naming(
    "Roberta",
    parts={
        "roberta.": "bert.",
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.layer_norm": "cls.predictions.transform.LayerNorm",
        "lm_head.decoder": "cls.predictions.decoder",
        "lm_head.bias": "cls.predictions.bias",
        "classifier.dense": "bert.pooler.dense",  # then a tanh, as in the pooler
        "classifier.out_proj": "classifier",
    },
    counts_from_padding=True,
    predicts_with_gelu=True,
)
NAMINGS = {
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA._replace(classes="XLMRoberta"),
    "camembert": ROBERTA._replace(classes="Camembert"),
    "distilbert": Naming(
        "DistilBert",
        parts={
            "distilbert.": "bert.",
            "transformer.layer": "encoder.layer",
            "attention.q_lin": "attention.self.query",
            "attention.k_lin": "attention.self.key",
            "attention.v_lin": "attention.self.value",
            "attention.out_lin": "attention.output.dense",
            "sa_layer_norm": "attention.output.LayerNorm",
            "ffn.lin1": "intermediate.dense",
            "ffn.lin2": "output.dense",
            "output_layer_norm": "output.LayerNorm",
            "vocab_transform": "cls.predictions.transform.dense",
            "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
            "vocab_projector": "cls.predictions.decoder",
        },
        entries={
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size",
            "activation": "hidden_act",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
        },
        constants={"layer_norm_eps": 1e-12, "type_vocab_size": TOKEN_TYPES},
        other_heads=dict.fromkeys(
            ("ForSequenceClassification", "ForMultipleChoice"),
            "its layers have a ReLU in between, those of BERT a tanh",
        ),
    ),
    "electra": Naming(
        "Electra",
        parts={
            "electra.": "bert.",
            "generator_predictions.dense": "cls.predictions.transform.dense",
            "generator_predictions.LayerNorm": "cls.predictions.transform.LayerNorm",
            "generator_lm_head": "cls.predictions.decoder",
        },
        predicts_with_gelu=True,
        other_heads={
            "ForSequenceClassification": "its layers have a GELU in between, those of BERT a tanh",
            "ForMultipleChoice": "its pooling (summary_type, summary_activation) is not BERT's pooler",
        },
    ),
}
# The heads that BERT and all of these models have; "Model" is the encoder.
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice",
         "ForQuestionAnswering")  # fmt: skip
PARTS_OF_HEADS = {"ForPreTraining": "ForMaskedLM"}  # a head of BERT -> the part of it that these models have


def find_naming(config: PreTrainedConfig) -> Naming:
    """The names that an architecture uses for the parts of a BERT.

    Raises:
        ValueError: it is none of :data:`NAMINGS`, or of a form that BERT has not.
    """
    naming = NAMINGS.get(config.model_type)
    if naming is None:
        taken = ", ".join(("bert", "fnl_bert", *NAMINGS))
        raise ValueError(f"model type {config.model_type!r} cannot be converted: it must be one of {taken}")
    width = getattr(config, "embedding_size", config.hidden_size)
    if width != config.hidden_size:
        raise ValueError(
            f"embedding_size ({width}) must equal hidden_size ({config.hidden_size}): BERT has no projection "
            "between the two"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError("it is a decoder (is_decoder or add_cross_attention): BERT is an encoder")
    return naming


def head_of(class_name: str) -> str | None:
    """The head of a class under BERT's name, "ForMaskedLM" for ``RobertaForMaskedLM``; None if BERT has no head for the
    same task, as for ``ElectraForPreTraining``, which detects replaced tokens."""
    for beginning in ("FnlBert", "Bert"):
        if class_name.startswith(beginning):
            return class_name.removeprefix(beginning)
    for naming in NAMINGS.values():
        head = class_name.removeprefix(naming.classes)
        if head != class_name and head in HEADS:
            return head
    return None


def _explain_other_head(head: str | None, config: PreTrainedConfig) -> str | None:
    """Why no head of BERT computes the same as this one; None if one does."""
    naming = find_naming(config)
    if head is None:
        return "BERT has no head for its task"
    if head == "ForMaskedLM" and naming.predicts_with_gelu and config.hidden_act != "gelu":
        return f"its layers have a GELU in between, those of BERT hidden_act ({config.hidden_act!r})"
    return naming.other_heads.get(head)


def class_to_load(config: PreTrainedConfig, wanted: str) -> Any:
    """The class of Transformers that reads a checkpoint for BERT's head ``wanted``: the class with that head, or the
    encoder if the head is to be new.

    Raises:
        ValueError: see :func:`find_naming`; or the checkpoint has that head, and it computes something else.
    """
    naming, wanted = find_naming(config), PARTS_OF_HEADS.get(wanted, wanted)
    reason = _explain_other_head(wanted if wanted in HEADS else None, config)
    if reason and config.architectures and head_of(config.architectures[0]) == wanted:
        raise ValueError(_refusal(wanted, reason))
    return getattr(transformers, naming.classes + ("Model" if reason else wanted))


def _refusal(head: str, reason: str | None) -> str:
    return f"its head ({head}) cannot be converted: {reason}. FnlBertModel.from_bert converts the encoder only"


def head_to_take(model: PreTrainedModel, wanted: str) -> str:
    """The head of a model under BERT's name, "ForMaskedLM"; "Model", the encoder, with a warning, if no head of BERT
    computes the same.

    Args:
        wanted: the head of BERT's that the weights are for.

    Raises:
        ValueError: see :func:`find_naming`; or the head that is wanted computes something else.
    """
    find_naming(model.config)
    known = (head_of(kind.__name__) for kind in type(model).__mro__ if kind.__module__.startswith("transformers."))
    head = next(filter(None, known), None)
    reason = _explain_other_head(head, model.config)
    if head is not None and reason is None:
        return head
    if head == PARTS_OF_HEADS.get(wanted, wanted):
        raise ValueError(_refusal(head, reason))
    logger.warning(f"the head of {model.name_or_path or 'the model'} ({type(model).__name__}) is left out: {reason}")
    return "Model"


def bert_entries(entries: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Entries of a configuration under BERT's names, without entries that BERT does not have; user-defined ones are
    kept."""
    naming = find_naming(config)
    renamed = {**entries, **{ours: entries[theirs] for theirs, ours in naming.entries.items()}, **naming.constants}
    unknown = type(config)().to_dict().keys() - BertConfig().to_dict().keys()
    renamed["max_position_embeddings"] -= _padding_positions(config)
    return {name: value for name, value in renamed.items() if name not in unknown}


def bert_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model, or of an encoder alone, under BERT's names.

    Positions that only padding uses are left out. If there are no token types, there are two rows of zeros, so that the
    token types from a tokenizer have no effect.
    """
    config, weights = model.config, {}
    naming = find_naming(config)
    for name, value in model.state_dict().items():
        for theirs, ours in naming.parts.items():
            name = name.replace(theirs, ours)
        if name.endswith("position_embeddings.weight"):
            value = value[_padding_positions(config) :]
        weights[name] = value
        if name.endswith("word_embeddings.weight") and "type_vocab_size" in naming.constants:
            weights[name.replace("word", "token_type")] = value.new_zeros(TOKEN_TYPES, value.shape[-1])
        if name == "cls.predictions.decoder.bias":
            weights.setdefault("cls.predictions.bias", value)
    return weights


def _padding_positions(config: PreTrainedConfig) -> int:
    """Positions of the table that no token uses."""
    return config.pad_token_id + 1 if find_naming(config).counts_from_padding else 0
