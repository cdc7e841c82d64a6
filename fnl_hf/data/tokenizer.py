"""WordPiece tokenizers, and documents as packed sequences of token ids."""

from collections import Counter

import numpy as np
from datasets import Dataset, Features, Sequence, Value
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from fnl_hf.errors import UserInputError

# Documents that are packed together; of every such batch less than one sequence is left over and dropped.
PACKING_BATCH = 1000
ALPHABET_LIMIT = 1000  # the library's own default


def train_tokenizer(documents: Dataset, vocab_size: int, model_max_length: int) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer as BERT's, trained on the column "text"; the same each time.

    ``tokenizers`` numbers the pieces "##c" in the order of a randomly seeded hash map and breaks ties between merges by
    number, so that two trainings on one text differ. Numbered beforehand, as if they were special tokens, they do not.
    """
    if vocab_size < 10:
        raise UserInputError(f"--vocab_size ({vocab_size}) must be at least 10: five special tokens and some text")
    blank = BertTokenizer()
    backend = Tokenizer(models.WordPiece(unk_token=blank.unk_token))
    backend.normalizer = blank.backend_tokenizer.normalizer
    backend.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    batches = [range(start, min(start + 1000, len(documents))) for start in range(0, len(documents), 1000)]
    letters: Counter[str] = Counter()
    for batch in batches:
        letters.update(backend.normalizer.normalize_str(" ".join(documents[batch]["text"])))
    specials = [str(blank.convert_ids_to_tokens(i)) for i in range(len(blank))]
    limit = min(ALPHABET_LIMIT, (vocab_size - len(specials)) // 2)  # a letter starts words and stands inside them
    alphabet = sorted(sorted(letters), key=lambda letter: -letters[letter])[:limit]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=specials + [f"##{letter}" for letter in sorted(alphabet) if not letter.isspace()],
        initial_alphabet=alphabet,
        limit_alphabet=limit,
        show_progress=False,
    )
    backend.train_from_iterator((documents[batch]["text"] for batch in batches), trainer)
    return BertTokenizer(vocab=backend.get_vocab(with_added_tokens=False), model_max_length=model_max_length)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a folder or the Hub.

    Raises:
        UserInputError: there is none, or it is a slow one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        raise UserInputError(f"no tokenizer in {name_or_path}: {error}") from error
    if not tokenizer.is_fast:
        raise UserInputError(f"the tokenizer of {name_or_path} is a slow one ({type(tokenizer).__name__})")
    return tokenizer


def validate_mlm_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserInputError unless the tokenizer has the special tokens that masked language modelling needs."""
    missing = [name for name in ("cls_token", "sep_token", "mask_token") if getattr(tokenizer, name) is None]
    if missing:
        raise UserInputError(f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} has no {missing}")


def pack_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, num_proc: int | None = None
) -> Dataset:
    """Sequences of exactly ``max_seq_length`` tokens, without padding: [CLS] text [SEP] text ... [SEP].

    Documents follow each other, a [SEP] between them, and are cut wherever a sequence is full.

    Args:
        documents: a dataset with a column "text".

    Returns:
        a dataset with one column "input_ids" of fixed length.

    Raises:
        UserInputError: the documents do not fill one sequence.
    """
    if max_seq_length < 3:
        raise UserInputError(f"--max_seq_length ({max_seq_length}) must be at least 3: [CLS], a token, [SEP]")
    dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"
    packed = documents.map(
        _pack_batch,
        batched=True,
        batch_size=PACKING_BATCH,
        num_proc=num_proc,
        remove_columns=documents.column_names,
        features=Features({"input_ids": Sequence(Value(dtype), length=max_seq_length)}),
        fn_kwargs={"tokenizer": tokenizer, "max_seq_length": max_seq_length, "dtype": dtype},
        desc="Tokenizing and packing",
    )
    if len(packed) == 0:
        raise UserInputError(
            f"the corpus ({len(documents)} documents) is shorter than one sequence of --max_seq_length {max_seq_length}"
        )
    return packed


def _pack_batch(batch, tokenizer, max_seq_length, dtype):
    encoded = tokenizer(
        batch["text"],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents longer than the model's maximum are meant to be cut
    )
    separator = [tokenizer.sep_token_id]
    tokens = np.concatenate([np.asarray(ids + separator, dtype=dtype) for ids in encoded["input_ids"]])
    content = max_seq_length - 2
    count = len(tokens) // content
    sequences = np.empty((count, max_seq_length), dtype=dtype)
    sequences[:, 0] = tokenizer.cls_token_id
    sequences[:, 1:-1] = tokens[: count * content].reshape(count, content)
    sequences[:, -1] = tokenizer.sep_token_id
    return {"input_ids": list(sequences)}


def unigram_entropy(sequences: Dataset, special_ids: list[int]) -> float:
    """Entropy in nats of the distribution of single tokens, special ones aside, in packed sequences.

    The loss of a masked language model that knows the frequencies of the held-out tokens and nothing else.
    """
    counts = np.zeros(0, dtype=np.int64)
    for batch in sequences.with_format("numpy").iter(batch_size=4096):
        found = np.bincount(batch["input_ids"].ravel(), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    counts[[i for i in special_ids if i < len(counts)]] = 0
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())
