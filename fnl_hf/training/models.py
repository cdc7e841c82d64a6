"""Configurations and models to pretrain: presets, files, checkpoints."""

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    BertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fnl_hf.configuration_fnl_bert import FnlBertConfig
from fnl_hf.errors import UserInputError
from fnl_hf.modeling_fnl_bert import FnlBertForMaskedLM, FnlBertForQuestionAnswering

# BERT's sizes: layers, hidden size, heads (Devlin et al. 2019; Turc et al. 2019). The feed-forward size is 4·d.
PRESETS = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}


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
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserInputError(f"no usable configuration in {name_or_path}: {error}") from error
    if not isinstance(config, BertConfig):
        raise UserInputError(
            f"{name_or_path} is a {config.model_type!r} checkpoint: it must be of model type 'bert' or 'fnl_bert'"
        )
    if isinstance(config, FnlBertConfig):
        return config
    entries = {
        k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")
    }
    return make_config(entries)


def make_config(entries: dict) -> FnlBertConfig:
    """An ``FnlBertConfig``, with its errors as UserInputError."""
    try:
        return FnlBertConfig(**entries)
    except (StrictDataclassError, TypeError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserInputError(f"configuration: {cause}") from error


def build_pretraining_config(model_args, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> FnlBertConfig:
    """The configuration that the model flags describe, checked against tokenizer and sequence length."""
    sources = {
        "--preset": model_args.preset,
        "--config_name": model_args.config_name,
        "--model_name_or_path": model_args.model_name_or_path,
    }
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) > 1:
        raise UserInputError(f"give one of {', '.join(sources)}, not {' and '.join(given)}")

    name = model_args.config_name or model_args.model_name_or_path
    if name is not None:
        entries = load_bert_config(name).to_dict()
    else:
        entries = preset_config(model_args.preset or "tiny") | {"vocab_size": len(tokenizer)}
    for key in ("attention_embedding_size", "attention_init"):
        if getattr(model_args, key) is not None:
            entries[key] = getattr(model_args, key)
    entries["sparse_prediction"] = model_args.sparse_prediction
    entries["pad_token_id"] = tokenizer.pad_token_id
    for dropped in ("model_type", "transformers_version", "architectures", "auto_map"):
        entries.pop(dropped, None)
    config = make_config(entries)
    if model_args.config_overrides:
        try:
            config.update_from_string(model_args.config_overrides)
            config = make_config(
                {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")}
            )
        except (ValueError, StrictDataclassError) as error:
            raise UserInputError(f"--config_overrides {model_args.config_overrides}: {error}") from error

    _validate_sizes(config, tokenizer, max_seq_length)
    return config


def build_pretraining_model(name_or_path: str | None, config: FnlBertConfig) -> FnlBertForMaskedLM:
    """A new model, or one that goes on from a checkpoint of the same shapes."""
    try:
        if name_or_path is None:
            return FnlBertForMaskedLM(config)
        return FnlBertForMaskedLM.from_pretrained(name_or_path, config=config)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserInputError(f"model {name_or_path or config.model_type}: {error}") from error


def build_question_answering_model(
    model_args, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> PreTrainedModel:
    """A question answering model of any BERT-like architecture, checked against tokenizer and sequence length.

    Raises:
        UserInputError: no such model, or one that cannot answer questions, hold the tokenizer, or read the sequence.
    """
    name = model_args.model_name_or_path or model_args.config_name
    try:
        if model_args.model_name_or_path is None:
            config = AutoConfig.from_pretrained(name)
            model = AutoModelForQuestionAnswering.from_config(config)
        elif model_args.model_type == FnlBertConfig.model_type:
            model = FnlBertForQuestionAnswering.from_pretrained(name, config=load_bert_config(name))
        else:
            model = AutoModelForQuestionAnswering.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise UserInputError(f"no question answering model in {name}: {error}") from error
    _validate_sizes(model.config, tokenizer, max_seq_length)
    return model


def _validate_sizes(config, tokenizer, max_seq_length):
    if len(tokenizer) > config.vocab_size:
        raise UserInputError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size ({config.vocab_size})"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_seq_length > positions:
        raise UserInputError(
            f"--max_seq_length ({max_seq_length}) exceeds the model's max_position_embeddings ({positions})"
        )
