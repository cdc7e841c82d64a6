"""Configurations and models to pretrain: presets, files, checkpoints."""

from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from fnl_hf.bert.configuration_fnl_bert import ORIGIN_ENTRIES, FnlBertConfig
from fnl_hf.bert.conversion_fnl_bert import needed_kernel
from fnl_hf.bert.modeling_fnl_bert import FnlBertForMaskedLM, FnlBertForPreTraining, FnlBertForQuestionAnswering
from fnl_hf.bert.other_names import NAMINGS
from fnl_hf.data.tokenizer import load_tokenizer, validate_same_vocabulary, validate_vocabulary, vocabulary_size
from fnl_hf.errors import UserInputError, needs_code, reason_of
from fnl_hf.layers import FactorizedEmbedding
from fnl_hf.publishing.checkpoints import load_model

# BERT's sizes: layers, hidden size, heads (Devlin et al. 2019; Turc et al. 2019). The feed-forward size is 4·d.
PRESETS = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}

PRETRAINING_CLASSES: dict[str, type[PreTrainedModel]] = {"mlm": FnlBertForMaskedLM, "mlm_nsp": FnlBertForPreTraining}

# entry -> smallest value, and the bound that it must stay below, beside what the configuration itself asks for
BOUNDS = {
    "num_hidden_layers": (1, float("inf")),
    "intermediate_size": (1, float("inf")),
    "max_position_embeddings": (1, float("inf")),
    "type_vocab_size": (1, float("inf")),
    "hidden_dropout_prob": (0.0, 1.0),
    "attention_probs_dropout_prob": (0.0, 1.0),
    "layer_norm_eps": (0.0, float("inf")),
    "initializer_range": (0.0, float("inf")),
    "chunk_size_feed_forward": (0, 1),  # the number of masked positions is not a multiple of a chunk
}
ANSWER_LOGITS = 2  # per token: it starts the answer, it ends the answer
LIBRARY_ERRORS = (SafetensorError, StrictDataclassError)  # not subclasses of built-in errors


def preset_config(preset: str) -> dict[str, int]:
    """The dimensions of a preset as configuration entries."""
    layers, hidden_size, heads = PRESETS[preset]
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden_size,
    }


def load_bert_config(name_or_path: str) -> FnlBertConfig:
    """The configuration of a BERT or FNL-BERT as an ``FnlBertConfig``.

    Raises:
        UserInputError: there is none, or it is another architecture's.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    # configurations are read without checks
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        if needs_code(error):
            raise UserInputError(f"{name_or_path} is neither a BERT nor an FNL-BERT: it comes with code") from error
        raise UserInputError(f"no usable configuration in {name_or_path}: {_reason(error)}") from error
    if not isinstance(config, BertConfig):
        raise UserInputError(
            f"{name_or_path} is a {config.model_type!r} checkpoint: it must be of model type 'bert' or 'fnl_bert'"
            + "; `fnl-hf convert` can make one of it" * (config.model_type in NAMINGS)
        )
    if isinstance(config, FnlBertConfig):
        return config
    return make_config(config.to_dict())


def make_config(entries: dict) -> FnlBertConfig:
    """An ``FnlBertConfig``; its errors are raised as UserInputError."""
    try:
        return FnlBertConfig(**{name: value for name, value in entries.items() if name not in ORIGIN_ENTRIES})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserInputError(f"configuration: {_reason(error)}") from error


def _reason(error: Exception) -> BaseException:
    """The message of a configuration check, without the name of the check."""
    return error.__cause__ or error if isinstance(error, StrictDataclassError) else error


def build_pretraining_config(model_args, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> FnlBertConfig:
    """The configuration that the model flags describe, checked against tokenizer and sequence length."""
    _refuse_two_sources(model_args, ("preset", "config_name", "model_name_or_path"))
    name = model_args.config_name or model_args.model_name_or_path
    if name is not None:
        config = load_bert_config(name)
    else:
        config = make_config(preset_config(model_args.preset or "tiny") | {"vocab_size": vocabulary_size(tokenizer)})
    if model_args.config_name is not None:
        _refuse_other_layers(config, name)
    requested = model_args.attention_embedding_size
    if model_args.model_name_or_path and requested not in (None, config.mha_embedding_size):
        raise UserInputError(
            f"--attention_embedding_size ({requested}) differs from that of {name} ({config.mha_embedding_size})"
        )
    config = _override(config, model_args.config_overrides)
    entries = config.to_dict()
    for key in ("attention_embedding_size", "attention_init"):
        if getattr(model_args, key) is not None:
            entries[key] = getattr(model_args, key)
    sparse_last_layer = model_args.sparse_prediction and model_args.sparse_last_layer
    # The data give the masked positions, so the saved model's outputs have the shapes of the stock model.
    entries |= {"sparse_prediction": False, "sparse_last_layer": sparse_last_layer}
    entries["pad_token_id"] = tokenizer.pad_token_id
    config = make_config(entries)
    _validate_entries(config)
    _validate_sizes(config, tokenizer, max_seq_length, config.max_position_embeddings)
    return config


def _validate_entries(config: FnlBertConfig) -> None:
    for name, (smallest, bound) in BOUNDS.items():
        value = getattr(config, name)
        if not smallest <= value < bound:
            raise UserInputError(f"configuration: {name} ({value}) must be at least {smallest} and below {bound}")
    if config.hidden_act not in ACT2FN:
        raise UserInputError(
            f"configuration: hidden_act ({config.hidden_act}) is not an activation function of Transformers"
        )


def _refuse_two_sources(model_args, names):
    given = [f"--{name}" for name in names if getattr(model_args, name) is not None]
    if len(given) > 1:
        raise UserInputError(f"give only one of {', '.join(f'--{name}' for name in names)}, not {' and '.join(given)}")


def _refuse_other_layers(config: PreTrainedConfig, name: str) -> None:
    """A model made from a configuration alone has dense layers."""
    if getattr(config, "quantization_config", None):
        raise UserInputError(
            f"--config_name {name} is of a model with factorized or quantized layers, which a configuration alone does "
            f"not make: use --model_name_or_path {name}, or remove quantization_config from its config.json"
        )


def _override(config: FnlBertConfig, overrides: str | None) -> FnlBertConfig:
    if not overrides:
        return config
    if not all(name and equals for name, equals, _ in (entry.partition("=") for entry in overrides.split(","))):
        raise UserInputError(
            f"--config_overrides {overrides} must have the form hidden_dropout_prob=0.0,type_vocab_size=1"
        )
    try:
        config.update_from_string(overrides)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:  # TypeError: the entry is None
        raise UserInputError(f"--config_overrides {overrides}: {error}") from error
    return make_config(config.to_dict())


def build_pretraining_model(model_args, config: FnlBertConfig, objective: str) -> PreTrainedModel:
    """A new model, or one loaded from a checkpoint of the same shapes; in float32."""
    model_class = PRETRAINING_CLASSES[objective]
    if objective == "mlm_nsp" and config.type_vocab_size < 2:
        raise UserInputError(f"--objective mlm_nsp needs a type_vocab_size ({config.type_vocab_size}) of at least 2")
    name_or_path = model_args.model_name_or_path
    with as_user_input(name_or_path or "this configuration"):
        if name_or_path is None:
            config._attn_implementation = model_args.attn_implementation
            return model_class(config)
        found: Any = model_class.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            attn_implementation=model_args.attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, loaded = found
    _validate_loaded(name_or_path, model, loaded)
    return model


def _validate_loaded(name_or_path: str, model: PreTrainedModel, loaded: dict) -> None:
    """Refuse loaded weights with other shapes, none of the model's names, or values that are not finite."""
    for name, there, here in sorted(loaded["mismatched_keys"]):
        raise UserInputError(
            f"{name_or_path}: {name} has shape {tuple(there)} in the checkpoint and {tuple(here)} in this model"
        )
    names = {name for name, _ in model.named_parameters()}
    if names <= set(loaded["missing_keys"]):
        raise UserInputError(f"{name_or_path} contains none of the model's weights, such as {min(names)}")
    _validate_finite(name_or_path, model)


def _validate_finite(name_or_path: str, model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise UserInputError(f"{name_or_path}: {name} has values that are not finite")


def load_text_model(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A checkpoint of any architecture as a model of its own class, in float32, checked against tokenizer and sequence
    length."""
    # If an architecture has no SDPA, Transformers uses what it has, unless told otherwise.
    kernel = {} if attn_implementation == "sdpa" else {"attn_implementation": attn_implementation}
    with as_user_input(name_or_path):
        AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    model = load_model(name_or_path, trust_remote_code, dtype=torch.float32, **kernel)
    _validate_finite(name_or_path, model)
    if not hasattr(model.config, "vocab_size"):
        raise UserInputError(
            f"{name_or_path} is a {model.config.model_type!r} checkpoint: its model does not read text"
        )
    _validate_sizes(model.config, tokenizer, max_seq_length, usable_positions(model), f"{name_or_path}'s")
    return model


def build_question_answering_model(
    model_args,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    is_trained: bool,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A question answering model of any BERT-like architecture, checked against tokenizer and sequence length.

    Args:
        is_trained: it is to be trained, so that it may begin with a new head.

    Raises:
        UserInputError: no such model, or one that cannot answer questions, hold the tokenizer, or read the sequence.
    """
    _refuse_two_sources(model_args, ("config_name", "model_name_or_path"))
    name = model_args.model_name_or_path or model_args.config_name
    factorized = model_args.model_type == FnlBertConfig.model_type
    config = load_bert_config(name) if factorized else None
    if model_args.model_name_or_path is not None:
        model = load_question_answering_model(name, config, is_trained, trust_remote_code, dtype=torch.float32)
    elif not is_trained:
        raise UserInputError(f"--config_name {name} starts from random weights: train them (--do_train)")
    else:
        with as_user_input(name):
            config = config or AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            _refuse_other_layers(config, name)
            config.dtype, config.num_labels = torch.float32, ANSWER_LOGITS
            model = AutoModelForQuestionAnswering.from_config(config, trust_remote_code=trust_remote_code)
    _validate_sizes(model.config, tokenizer, max_seq_length, usable_positions(model))
    return model


def load_question_answering_model(
    name: str,
    config: FnlBertConfig | None = None,
    is_trained: bool = False,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """The question answering model of a checkpoint, regardless of the number of labels in its configuration.

    Args:
        config: of a stock BERT, to load it as an FNL-BERT.
        is_trained: it is to be trained: the encoder of another model gets a new head.
        kwargs: for ``from_pretrained``.

    Raises:
        UserInputError: no such model, one whose head is of another kind, or a head that nobody has trained.
    """
    with as_user_input(name, "no question answering model in"):
        entries, _ = PreTrainedConfig.get_config_dict(name)
        kwargs = needed_kernel(entries) | kwargs | {"ignore_mismatched_sizes": True, "output_loading_info": True}
        if config is None:
            found: Any = AutoModelForQuestionAnswering.from_pretrained(
                name, num_labels=ANSWER_LOGITS, trust_remote_code=trust_remote_code, **kwargs
            )
        else:
            config.num_labels = ANSWER_LOGITS
            found = FnlBertForQuestionAnswering.from_pretrained(name, config=config, **kwargs)
    model, loaded = found
    _validate_loaded(name, model, loaded)
    missing = sorted(loaded["missing_keys"])
    if missing and not is_trained and not getattr(model, "_hf_peft_config_loaded", False):  # adapters may bring them
        raise UserInputError(
            f"no question answering model in {name}: it lacks {missing[0]}, which would be random: fine-tune it "
            "with run_squad.py first"
        )
    return model


def load_answer_teacher(
    name: str, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A fine-tuned question answering model that accepts the inputs of its student."""
    validate_same_vocabulary(tokenizer, load_tokenizer(name, trust_remote_code))
    model = load_question_answering_model(name, trust_remote_code=trust_remote_code, dtype=torch.float32)
    _validate_sizes(model.config, tokenizer, max_seq_length, usable_positions(model), f"{name}'s")
    return model


@contextmanager
def as_user_input(name, problem: str = "no model of the required kind can be built from"):
    """Turn errors of Transformers for a configuration or checkpoint into UserInputError."""
    try:
        yield
    except UserInputError:  # a ValueError, and says all
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, ImportError, OSError, *LIBRARY_ERRORS) as error:
        raise UserInputError(f"{problem} {name}: {reason_of(error)}") from error


def usable_positions(model: PreTrainedModel) -> int | None:
    """The maximum length of a sequence, or None; RoBERTa and similar models use some positions for padding."""
    for name, module in model.named_modules():
        is_table = isinstance(module, torch.nn.Embedding | FactorizedEmbedding)
        if name.endswith("position_embeddings") and is_table:
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _validate_sizes(config, tokenizer, max_seq_length, positions, whose="the model's"):
    validate_vocabulary(tokenizer, config.vocab_size, whose)
    if positions is not None and max_seq_length > positions:
        raise UserInputError(
            f"--max_seq_length ({max_seq_length}) exceeds {whose} max_position_embeddings ({positions})"
        )
