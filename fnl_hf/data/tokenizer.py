"""WordPiece tokenizers."""

from collections import Counter

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from fnl_hf.errors import UserInputError

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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # its files are read without checks
        raise UserInputError(f"no tokenizer in {name_or_path}: {error}") from error
    if not tokenizer.is_fast:
        raise UserInputError(f"the tokenizer of {name_or_path} is a slow one ({type(tokenizer).__name__})")
    return tokenizer


def vocabulary_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """All token ids, ascending. They may have holes: ``len(tokenizer)`` counts them and bounds none."""
    return np.unique(np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id + 1: what a table indexed by ids must hold."""
    return int(vocabulary_ids(tokenizer)[-1]) + 1


def validate_mlm_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserInputError unless the tokenizer has others than special tokens, and those that are needed."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    missing = [token for token in ("cls_token", "sep_token", "mask_token") if getattr(tokenizer, token) is None]
    if missing:
        raise UserInputError(f"the tokenizer of {name} has no {missing}")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # Transformers makes one where tokenizer.json is missing
        raise UserInputError(f"the tokenizer of {name} has no vocabulary, only {len(tokenizer)} special tokens")
