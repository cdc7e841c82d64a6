"""From a corpus to what a Trainer reads: packed sequences, segment pairs or a stream, with their masks."""

from dataclasses import dataclass
from pathlib import Path

import xxhash
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from fnl_hf.data.corpus import first_rows, load_text_files, stream_corpus
from fnl_hf.data.masking import MaskedLMDataset, MaskingTransform
from fnl_hf.data.packing import data_fingerprint, pack_documents, unigram_entropy
from fnl_hf.data.pairs import pair_documents
from fnl_hf.data.streaming import StreamingDataset, StreamState, held_out_documents, merge, validate_shards
from fnl_hf.errors import UserInputError

# The attention kernels, and how each is told which tokens belong to one document.
ATTENTION_KERNELS = {"sdpa": "mask", "eager": "mask", "flash_attention_2": "varlen"}
OBJECTIVES = {"mlm": pack_documents, "mlm_nsp": pair_documents}
STREAM_STATE = "stream_state_{}.json"  # one for each process, in a checkpoint
LIMITS = {"max_train_samples": "training data", "max_eval_samples": "held-out data"}
HEAD_BYTES = 2**20  # of a streamed file, what is read to tell it from another


@dataclass(frozen=True)
class PretrainingData:
    """Training data with masks that change in each epoch, held-out data with fixed ones.

    ``unigram_entropy``: of the held-out tokens, in nats. ``fingerprint``: of what is trained and evaluated on.
    """

    train: MaskedLMDataset | StreamingDataset
    held_out: MaskedLMDataset
    unigram_entropy: float
    fingerprint: str


def validate_choices(data_args) -> None:
    """Raise UserInputError for flags that exclude each other."""
    if data_args.objective != "mlm":
        for name in ("streaming", "attend_within_documents"):
            if getattr(data_args, name):
                raise UserInputError(f"--objective {data_args.objective} makes pairs of segments: not with --{name}")
    if data_args.dataset_config_name is not None and data_args.dataset_name is None:
        raise UserInputError(f"--dataset_config_name ({data_args.dataset_config_name}) needs --dataset_name")
    if data_args.streaming and data_args.max_train_samples is not None:
        raise UserInputError(
            f"--max_train_samples ({data_args.max_train_samples}) is not for --streaming: --max_steps is"
        )
    if data_args.streaming_shards is not None and not data_args.streaming:
        raise UserInputError(f"--streaming_shards ({data_args.streaming_shards}) needs --streaming true")


def masking_transform(model_args, data_args, tokenizer: PreTrainedTokenizerBase, seed: int) -> MaskingTransform:
    """The masks that the command line asks for."""
    return MaskingTransform(
        tokenizer,
        data_args.mlm_probability,
        seed,
        whole_word_mask=data_args.whole_word_mask,
        sparse=model_args.sparse_prediction,
        documents=ATTENTION_KERNELS[model_args.attn_implementation] if data_args.attend_within_documents else None,
    )


def _rows(data_args, documents: Dataset, tokenizer: PreTrainedTokenizerBase, limit: str) -> Dataset:
    make = OBJECTIVES[data_args.objective]
    workers = data_args.preprocessing_num_workers
    try:
        rows = make(documents, tokenizer, data_args.max_seq_length, workers, data_args.cache_dir)
    except UserInputError as error:
        raise UserInputError(f"{LIMITS[limit]}: {error}") from error
    return first_rows(rows, limit, getattr(data_args, limit))


def prepare_data(model_args, data_args, args, corpus: DatasetDict, tokenizer) -> PretrainingData:
    """Tokenize a corpus with splits "train" and "validation", or take from the cache what was."""
    train = _rows(data_args, corpus["train"], tokenizer, "max_train_samples")
    held_out = _rows(data_args, corpus["validation"], tokenizer, "max_eval_samples")
    return PretrainingData(
        train=MaskedLMDataset(train, masking_transform(model_args, data_args, tokenizer, args.seed)),
        held_out=MaskedLMDataset(held_out, masking_transform(model_args, data_args, tokenizer, 0), dynamic=False),
        unigram_entropy=unigram_entropy(held_out, tokenizer.all_special_ids),
        fingerprint=data_fingerprint(train, held_out),
    )


def prepare_stream(model_args, data_args, args, tokenizer, checkpoint: str | None) -> PretrainingData:
    """Training data that are read as they are used, from where the checkpoint's state says.

    Held out are the validation file's documents or, without one, the first of the stream, which are not trained on.

    Raises:
        UserInputError: no number of steps, shards that do not suit the processes, or a state of another stream.
    """
    if args.max_steps <= 0:
        raise UserInputError("--streaming needs --max_steps: the length of a stream is not known")
    state = read_stream_state(checkpoint)
    shards = data_args.streaming_shards or (state.shards if state else args.world_size * _workers(args))
    validate_shards(shards, args.world_size, args.dataloader_num_workers)
    source = (data_args.dataset_name, data_args.dataset_config_name)
    stream, column = stream_corpus(*source, data_args.train_file, data_args.text_column_name, shards)
    hold_out = 0 if data_args.validation_file else -(-data_args.streaming_validation_documents // shards)
    if data_args.validation_file:
        documents = load_text_files(
            data_args.validation_file,
            data_args.text_column_name,
            data_args.cache_dir,
            data_args.strict,
            data_args.preprocessing_num_workers,
        )
    else:
        documents = Dataset.from_dict({"text": held_out_documents(stream, shards, hold_out, column)})
    held_out = _rows(data_args, documents, tokenizer, "max_eval_samples")
    train = StreamingDataset(
        stream,
        tokenizer,
        data_args.max_seq_length,
        args.train_batch_size,
        shards,
        data_args.shuffle_buffer_size,
        args.seed if args.data_seed is None else args.data_seed,
        args.process_index,
        args.world_size,
        state,
        masking_transform(model_args, data_args, tokenizer, args.seed),
        column,
        hold_out,
        data_args.strict,
    )
    return PretrainingData(
        train=train,
        held_out=MaskedLMDataset(held_out, masking_transform(model_args, data_args, tokenizer, 0), dynamic=False),
        unigram_entropy=unigram_entropy(held_out, tokenizer.all_special_ids),
        fingerprint=_stream_fingerprint(source, data_args.train_file, held_out),
    )


def _workers(args) -> int:
    return max(1, args.dataloader_num_workers)


def read_stream_state(checkpoint: str | None) -> StreamState | None:
    """Where a checkpoint's run stood in its stream, put together from the states of all its processes.

    Raises:
        UserInputError: a state is missing or cannot be read.
    """
    if checkpoint is None:
        return None
    states = []
    for file in sorted(Path(checkpoint).glob(STREAM_STATE.format("*"))):
        try:
            states.append(StreamState.from_json(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserInputError(f"{file} is not the state of a stream: {error}") from error
    if not states:
        raise UserInputError(f"checkpoint {checkpoint} has no {STREAM_STATE.format(0)}: where its stream stood is lost")
    return merge(states)


def _stream_fingerprint(source, files: list[str] | None, held_out: Dataset) -> str:
    """Of files their names, sizes and beginnings: reading them whole is what streaming avoids."""
    digest = xxhash.xxh3_128(repr((source, data_fingerprint(held_out))).encode())
    for file in map(Path, files or ()):
        digest.update(repr((file.name, file.stat().st_size)).encode())
        with file.open("rb") as opened:
            digest.update(opened.read(HEAD_BYTES))
    return digest.hexdigest()
