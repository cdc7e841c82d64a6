"""The flags of ``run_pretrain.py`` in addition to those of ``FnlTrainingArguments``."""

from dataclasses import dataclass, field

from fnl_hf.bert.configuration_fnl_bert import ATTENTION_INITS, STUDIED_INITS
from fnl_hf.data.masking import ATTENTION_KERNELS, LARGEST_LENGTH
from fnl_hf.data.packing import PACKED
from fnl_hf.data.rows import OBJECTIVES
from fnl_hf.data.tokenizer import ALPHABET_COVERAGE, ALPHABET_FLOOR, validate_coverage
from fnl_hf.errors import UserInputError, validate_bounds
from fnl_hf.layers.base import INITS, MODES
from fnl_hf.layers.base import STUDIED_INITS as STUDIED_LAYER_INITS
from fnl_hf.training.models import PRESETS

COUNTS = (
    "preprocessing_num_workers",
    "shuffle_buffer_size",
    "streaming_validation_documents",
    "streaming_shards",
    "max_train_samples",
    "max_eval_samples",
)


@dataclass
class ModelArguments:
    """The model to train: a preset, a configuration, or a checkpoint to continue from."""

    preset: str | None = field(
        default=None, metadata={"help": "Size of a new BERT. Default: tiny.", "choices": list(PRESETS)}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a new model: folder, JSON file or Hub name."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Continue training this FNL-BERT or BERT checkpoint; with --objective distill, the student, of any "
            "architecture. Folder or Hub name."
        },
    )
    teacher_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "With --objective distill: the teacher whose hidden states and logits the student learns. Folder "
            "or Hub name."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Change entries of the preset or configuration, for example "
            "hidden_dropout_prob=0.0,type_vocab_size=1"
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer: folder or Hub name. Default: that of the checkpoint, or a new one trained on the "
            "corpus."
        },
    )
    vocab_size: int = field(default=30522, metadata={"help": "Vocabulary size of a tokenizer trained on the corpus."})
    alphabet_coverage: float = field(
        default=ALPHABET_COVERAGE,
        metadata={
            "help": "Minimum share of the corpus's characters that a tokenizer trained on the corpus knows, if the "
            f"vocabulary is large enough; it always knows the {ALPHABET_FLOOR:,} most frequent ones."
        },
    )
    attention_embedding_size: int | None = field(
        default=None,
        metadata={
            "help": "The attention embedding size E, a multiple of the number of heads. Default: the hidden size."
        },
    )
    attention_init: str | None = field(
        default=None,
        metadata={
            "help": f"Initialization of the attention products. Experimental: {' and '.join(STUDIED_INITS)}.",
            "choices": [*ATTENTION_INITS, *STUDIED_INITS],
        },
    )
    sparse_prediction: bool = field(
        default=True, metadata={"help": "Run the prediction head on masked positions only. Does not change the loss."}
    )
    sparse_last_layer: bool = field(
        default=True,
        metadata={
            "help": "With --sparse_prediction, run the last layer on masked positions only, too. Does not change the "
            "predictions."
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "The attention kernel.", "choices": list(ATTENTION_KERNELS)}
    )

    factorize_at_step: float | None = field(
        default=None,
        metadata={
            "help": "Warm start: train a dense model up to this step, or for this share of the steps if below 1, "
            "then factorize the layers of the encoder; see --factorize_init."
        },
    )
    factorize_target_ratio: float = field(
        default=0.5,
        metadata={"help": "Warm start: parameters of the factorized layers as a share of those of the dense layers."},
    )
    factorize_mode: str = field(
        default="low_rank",
        metadata={
            "help": "Warm start: low_rank, at --factorize_target_ratio, or full rank with two factors (wide) or "
            "three (deep), which can be merged after training.",
            "choices": list(MODES),
        },
    )
    factorize_init: str | None = field(
        default=None,
        metadata={
            "help": "Warm start: initialize the factors from the SVD of the dense weights, calibrated on training "
            "data (calibrated) or not (spectral), or at random (default). Default: calibrated for --factorize_mode "
            "low_rank after a step or with --model_name_or_path, else spectral. Experimental: "
            f"{' and '.join(STUDIED_LAYER_INITS)}.",
            "choices": ["calibrated", *INITS, *STUDIED_LAYER_INITS],
        },
    )
    factorize_include: list[str] | None = field(
        default=None,
        metadata={
            "help": "Warm start: shell-style patterns for the names of the layers to factorize. Default: the whole "
            "encoder, encoder.layer.*"
        },
    )

    def __post_init__(self):
        validate_bounds("factorize_target_ratio", self.factorize_target_ratio, 0, 1, above=True)
        validate_bounds("factorize_at_step", self.factorize_at_step, 0)
        if self.factorize_at_step is not None and self.factorize_at_step >= 1 and self.factorize_at_step % 1:
            raise UserInputError(
                f"--factorize_at_step ({self.factorize_at_step}) must be a whole number of steps, or a share of the "
                "run below 1"
            )
        validate_bounds("vocab_size", self.vocab_size, 10, 2**24)  # masking draws random tokens from 24 bits
        validate_coverage(self.alphabet_coverage)


def validate_kernel(model_args: ModelArguments, args) -> None:
    """Raise UserInputError for an attention kernel that does not support the run's precision."""
    if model_args.attn_implementation == "flash_attention_2" and not (args.bf16 or args.fp16):
        raise UserInputError("--attn_implementation flash_attention_2 needs 16-bit precision: set --bf16 true")


def validate_distillation(model_args: ModelArguments, objective: str) -> None:
    """Raise UserInputError for a teacher without a student, a student without a teacher, or flags that would change the
    student."""
    teacher = model_args.teacher_name_or_path
    if objective != "distill":
        if teacher is not None:
            raise UserInputError(f"--teacher_name_or_path ({teacher}) needs --objective distill")
        return
    for name in ("model_name_or_path", "teacher_name_or_path"):
        if getattr(model_args, name) is None:
            raise UserInputError(f"--objective distill needs --{name}")
    for name in ("preset", "config_name", "config_overrides", "attention_embedding_size"):
        if getattr(model_args, name) is not None:
            raise UserInputError(
                f"--objective distill trains the model of --model_name_or_path as it is: leave out --{name} "
                f"({getattr(model_args, name)})"
            )


@dataclass
class DataArguments:
    """What to train on. Without --dataset_name and --train_file: the embedded corpus."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training text: txt (one document per line), json, jsonl, csv or parquet files, compressed or not."
        },
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Held-out text, in the same formats."})
    validation_split_percentage: float = field(
        default=5.0,
        metadata={"help": "Percentage of the documents to hold out if there is no validation split or file."},
    )
    text_column_name: str = field(default="text", metadata={"help": "Name of the column with the text."})
    strict: bool = field(
        default=False, metadata={"help": "Stop at broken records of the corpus instead of leaving them out."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Cache folder of the datasets library."})
    max_seq_length: int = field(
        default=128,
        metadata={
            "help": "Tokens per sequence. Documents are packed into sequences of this length, or see --line_by_line."
        },
    )
    objective: str = field(
        default="mlm",
        metadata={
            "help": "Masked language modeling on packed text (mlm), masked language modeling and next sentence "
            "prediction on pairs of segments (mlm_nsp), or distillation from a teacher (distill).",
            "choices": list(OBJECTIVES),
        },
    )
    line_by_line: bool | None = field(
        default=None,
        metadata={
            "help": "Make each document a sequence of its own, cut to --max_seq_length and padded to the longest of "
            "its batch. Default: true if a classifier of whole sequences is distilled, else false.",
            "nargs": "?",
            "const": True,
        },
    )
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Share of the tokens to mask; each epoch masks others."}
    )
    whole_word_mask: bool = field(default=False, metadata={"help": "Mask whole words instead of single tokens."})
    attend_within_documents: bool = field(
        default=False,
        metadata={
            "help": "Let tokens attend only to tokens of the same document, if several documents share a sequence."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read and tokenize the corpus during training, for a corpus that is too large to store."},
    )
    streaming_shards: int | None = field(
        default=None,
        metadata={
            "help": "Number of shards of the stream. It determines the order of the data, whatever the number of "
            "processes. Default: processes x dataloader workers."
        },
    )
    shuffle_buffer_size: int = field(
        default=8192, metadata={"help": "Sequences in the shuffle buffer of each shard of the stream."}
    )
    streaming_validation_documents: int = field(
        default=1000,
        metadata={
            "help": "Hold out this many documents, from the start of each shard of the stream, if there is no "
            "--validation_file."
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that read and tokenize the corpus."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many training sequences, for a quick test."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many held-out sequences."}
    )

    def __post_init__(self):
        for name in COUNTS:
            validate_bounds(name, getattr(self, name), 1)
        validate_bounds("max_seq_length", self.max_seq_length, PACKED.min_length, LARGEST_LENGTH + 1)
        validate_bounds("mlm_probability", self.mlm_probability, 0, 1, above=True)
        validate_bounds("validation_split_percentage", self.validation_split_percentage, 0, 100, above=True)
        self._validate_choices()

    def _validate_choices(self) -> None:
        """Raise UserInputError for flags that exclude each other."""
        if self.objective == "mlm_nsp":
            for name in ("streaming", "attend_within_documents", "line_by_line"):
                if getattr(self, name):
                    raise UserInputError(
                        f"--objective {self.objective} trains on pairs of segments: leave out --{name}"
                    )
        if self.line_by_line:
            for name in ("streaming", "attend_within_documents"):
                if getattr(self, name):
                    raise UserInputError(
                        "--line_by_line true, the default if a classifier is distilled, makes each document a sequence "
                        f"of its own: leave out --{name}, or set --line_by_line false"
                    )
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise UserInputError(f"--dataset_config_name ({self.dataset_config_name}) needs --dataset_name")
        if self.streaming and self.max_train_samples is not None:
            raise UserInputError(
                f"--max_train_samples ({self.max_train_samples}) cannot be used with --streaming: set --max_steps"
            )
        if self.streaming_shards is not None and not self.streaming:
            raise UserInputError(f"--streaming_shards ({self.streaming_shards}) needs --streaming true")
